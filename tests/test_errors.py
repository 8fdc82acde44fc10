# ruff: noqa: E501 - each message is on one line
"""Error messages for bad input: the argument, what was expected and what was passed."""

from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxseq

F = jnp.float32


def ones(*shape, dtype=F):
    """Return ones without compiling a program. Most tests of this file compile nothing."""
    return jax.device_put(np.ones(shape, dtype))


X, W, B = ones(2, 9, 4), ones(3, 2, 6), ones(6)  # two groups
WT, PAST = ones(3, 2, 4), ones(2, 4, 4)
PARAMS = {
    "rnn": jaxseq.RNNParams(ones(3, 5), ones(5, 5), ones(5)),
    "gru": jaxseq.GRUParams(ones(3, 15), ones(5, 15), ones(15), ones(15)),
    "lstm": jaxseq.LSTMParams(ones(3, 20), ones(5, 20), ones(20)),
}
H = ones(2, 5)
STATE = jaxseq.LSTMState(H, H)
XS = ones(7, 2, 3)


def conv_transpose(x=X, kernel=WT, bias=None, **options):
    return lambda: jaxseq.conv_transpose(x, kernel, bias, **{"groups": 2, **options})


def causal_conv(carry=PAST, xs=X, kernel=W, bias=B, **options):
    params, options = jaxseq.ConvParams(kernel, bias), {"groups": 2, "dilation": 2, "time_axis": 1, **options}
    return lambda: jaxseq.causal_conv(params, carry, xs, **options)


def conv(x=X, kernel=W, bias=B, **options):
    return lambda: jaxseq.conv(x, kernel, bias, **{"groups": 2, **options})


def lstm(params=PARAMS["lstm"], carry=STATE, xs=XS, **options):
    return lambda: jaxseq.lstm(params, carry, xs, **options)


def gru(params=PARAMS["gru"], carry=H, xs=XS, **options):
    return lambda: jaxseq.gru(params, carry, xs, **options)


MISTAKES = {
    # --- conv: arrays ---
    "integer x": (
        conv(x=ones(2, 9, 4, dtype=jnp.int32)),
        TypeError,
        r"`x`: expected a float or complex array, got int32\[2, 9, 4\]",
    ),
    "list x": (conv(x=[[1.0]]), TypeError, r"`x`: expected a float or complex array, got list \[\[1\.0\]\]"),
    "boolean kernel": (
        conv(kernel=W > 0),
        TypeError,
        r"`kernel`: expected a float or complex array, got bool\[3, 2, 6\]",
    ),
    "integer bias": (
        conv(bias=ones(6, dtype=jnp.int32)),
        TypeError,
        r"`bias`: expected a float or complex array, got int32\[6\]",
    ),
    "complex kernel for real x": (
        conv(kernel=W.astype(jnp.complex64)),
        TypeError,
        r"`kernel`: expected a real dtype to match `x` of dtype float32, got complex64",
    ),
    "kernel of rank 2": (
        conv(kernel=W[0]),
        ValueError,
        r"`kernel`: expected 3, 4 or 5 axes .*, got 2 \(kernel \(2, 6\)\)",
    ),
    "kernel of rank 6": (conv(kernel=W[None, None, None]), ValueError, r"`kernel`: expected 3, 4 or 5 axes .*, got 6"),
    "kernel without taps": (
        conv(kernel=W[:0]),
        ValueError,
        r"`kernel`: expected at least one tap and one channel, got \(0, 2, 6\)",
    ),
    "x without channels axis": (
        conv(x=X[0, 0]),
        ValueError,
        r"`x`: expected at least 2 axes .* got 1 \(x \(4,\), kernel \(3, 2, 6\)\)",
    ),
    "channels": (
        conv(x=X[..., :2]),
        ValueError,
        r"`kernel`: expected c_in // groups = 2 // 2 = 1 input channels, got 2 \(x \(2, 9, 2\), kernel",
    ),
    "groups that do not divide": (
        conv(groups=3),
        ValueError,
        r"`groups`: expected a divisor of both c_in and c_out, got 3 for 4 and 6",
    ),
    "bias size": (conv(bias=B[:5]), ValueError, r"`bias`: expected shape \(6,\) = \(c_out,\), got \(5,\)"),
    "kernel larger than x": (
        conv(x=X[:, :2]),
        ValueError,
        r"`x`: expected a padded size of at least the kernel's extent, 3, got 2 \+ 0 \+ 0 = 2",
    ),
    # --- conv: options ---
    "unknown method": (
        conv(method="fft"),
        ValueError,
        r"`method`: expected one of 'auto', 'direct', got str 'fft'",
    ),
    "unknown padding word": (
        conv(padding="FULL"),
        ValueError,
        r"`padding`: expected one of 'SAME', 'VALID', 'CAUSAL', an integer or \(lo, hi\) pairs, got 'FULL'",
    ),
    "2-D causal": (
        lambda: jaxseq.conv(X[..., None], W[..., None], padding="CAUSAL"),
        ValueError,
        r"`padding`: expected one spatial axis with padding='CAUSAL'; for 2 use 'SAME', 'VALID' or pairs .*, got 2",
    ),
    "flat pair": (
        conv(padding=(1, 2)),
        ValueError,
        r"`padding`: expected one \(lo, hi\) pair for each of the 1 spatial axes, got \(1, 2\)",
    ),
    "pairs for another rank": (
        conv(padding=((1, 2), (0, 0))),
        ValueError,
        r"`padding`: expected one \(lo, hi\) pair for each of the 1",
    ),
    "float padding": (conv(padding=1.5), TypeError, r"`padding`: expected an integer, got float 1\.5"),
    "zero stride": (conv(stride=0), ValueError, r"`stride`: expected an integer >= 1, got 0"),
    "negative stride": (conv(stride=(-2,)), ValueError, r"`stride`: expected an integer >= 1, got -2"),
    "two strides": (
        conv(stride=(1, 2)),
        ValueError,
        r"`stride`: expected an integer or one for each of the 1 spatial axes, got \(1, 2\)",
    ),
    "float stride": (conv(stride=2.0), TypeError, r"`stride`: expected an integer >= 1, got float 2\.0"),
    "traced stride": (
        lambda: jax.jit(lambda s: jaxseq.conv(X, W, groups=2, stride=s))(2),
        TypeError,
        r"`stride`: expected an integer >= 1, known when the function is traced",
    ),
    "zero dilation": (conv(dilation=0), ValueError, r"`dilation`: expected an integer >= 1, got 0"),
    "boolean dilation": (conv(dilation=True), TypeError, r"`dilation`: expected an integer >= 1, .* got bool True"),
    "zero groups": (conv(groups=0), ValueError, r"`groups`: expected an integer >= 1, got 0"),
    "flip as a number": (conv(flip=1), TypeError, r"`flip`: expected True or False, .* got int 1"),
    "precision": (
        conv(precision="exact"),
        ValueError,
        r"`precision`: expected a precision of jax.lax, .* got str 'exact'",
    ),
    # --- conv_transpose ---
    "transposed: channels": (
        conv_transpose(x=X[..., :2]),
        ValueError,
        r"`kernel`: expected c_in = 2 channels on its last axis, got 4",
    ),
    "transposed: groups": (
        conv_transpose(groups=3),
        ValueError,
        r"`groups`: expected a divisor of both c_in and c_out",
    ),
    "transposed: bias": (conv_transpose(bias=B), ValueError, r"`bias`: expected shape \(4,\) = \(c_out,\), got \(6,\)"),
    "transposed: output padding of a stride": (
        conv_transpose(stride=2, output_padding=2),
        ValueError,
        r"`output_padding`: expected less than the stride \(2,\) or the dilation \(1,\), got \(2,\); for a larger amount, pass padding=",
    ),
    "transposed: causal": (
        conv_transpose(stride=2, dilation=3, padding="causal"),
        ValueError,
        r"`padding`: expected padding=\[\(0, 5\)\] for causal upsampling .* got 'causal'",
    ),
    "transposed: unknown padding word": (
        conv_transpose(padding="FULL"),
        ValueError,
        r"`padding`: expected one of 'SAME', 'VALID', an integer or",
    ),
    "transposed: negative output padding": (
        conv_transpose(output_padding=-1),
        ValueError,
        r"`output_padding`: expected an integer >= 0, got -1",
    ),
    "transposed: output padding with SAME": (
        conv_transpose(stride=2, padding="SAME", output_padding=1),
        ValueError,
        r"`output_padding`: expected 0 with padding='SAME', which determines the size, got \(1,\)",
    ),
    "transposed: all of it cropped": (
        conv_transpose(padding=6),
        ValueError,
        r"`padding`: expected lo \+ hi < 11, the size of the uncropped output, got \(6, 6\)",
    ),
    "transposed: rank": (conv_transpose(kernel=W[0]), ValueError, r"`kernel`: expected 3, 4 or 5 axes .*, got 2"),
    # --- depthwise and separable ---
    "depthwise: more than one channel in": (
        lambda: jaxseq.depthwise_conv(X, W),
        ValueError,
        r"`kernel`: expected \(\*kernel_size, 1, a multiple of c_in = 4\), got \(3, 2, 6\)",
    ),
    "depthwise: no multiple": (
        lambda: jaxseq.depthwise_conv(X, W[:, :1]),
        ValueError,
        r"`kernel`: expected .* a multiple of c_in = 4\), got \(3, 1, 6\)",
    ),
    "depthwise: no channel": (lambda: jaxseq.depthwise_conv(X[..., :0], W), ValueError, r"`x`: expected at least one"),
    "separable: depthwise part": (
        lambda: jaxseq.separable_conv(X, W, WT[:1]),
        ValueError,
        r"`depthwise`: expected \(\*kernel_size, 1, a multiple of c_in = 4\), got \(3, 2, 6\)",
    ),
    "separable: pointwise kernel": (
        lambda: jaxseq.separable_conv(X, WT[:, :1], WT),
        ValueError,
        r"`pointwise`: expected size one along each spatial axis, .*, got \(3, 2, 4\)",
    ),
    "separable: pointwise channels": (
        lambda: jaxseq.separable_conv(X, WT[:, :1], WT[:1]),
        ValueError,
        r"`pointwise`: expected c_middle = 4 input channels, got 2",
    ),
    "conv: lengths over two axes": (
        lambda: jaxseq.conv(ones(2, 5, 5, 4), ones(2, 2, 4, 6), lengths=jnp.array([5, 5])),
        ValueError,
        r"`lengths`: expected None for a kernel with several spatial axes, got an array",
    ),
    "conv: lengths that are too large": (
        conv(lengths=jnp.array([10, 3])),
        ValueError,
        r"`lengths`: expected lengths from 0 to 9, the number of steps, got 3 to 10",
    ),
    # --- causal_conv ---
    "causal: 2-D kernel": (
        causal_conv(kernel=W[..., None]),
        ValueError,
        r"`kernel`: expected 3 axes \(kernel_size, c_in // groups, c_out\), got 4 \(kernel \(3, 2, 6, 1\)\)",
    ),
    "causal: integer x": (
        causal_conv(xs=ones(2, 9, 4, dtype=jnp.int32)),
        TypeError,
        r"`xs`: expected a float or complex array, got int32\[2, 9, 4\]",
    ),
    "causal: xs without time": (
        causal_conv(xs=X[0, 0]),
        ValueError,
        r"`xs`: expected at least 2 axes \(time, \*batch, channels\), got 1 \(xs \(4,\)\)",
    ),
    "causal: time axis": (
        causal_conv(time_axis=2),
        ValueError,
        r"`time_axis`: expected an axis from 0 to 1 or from -3 to -2, before the feature axis, got 2 \(xs \(2, 9, 4\)\)",
    ),
    "causal: lengths": (
        causal_conv(lengths=jnp.array([10, 3])),
        ValueError,
        r"`lengths`: expected lengths from 0 to 9, the number of steps, got 3 to 10",
    ),
    "causal: lengths of another batch": (
        causal_conv(lengths=jnp.zeros(9, jnp.int32)),
        ValueError,
        r"`lengths`: expected shape \(2,\) = \*batch, got \(9,\)",
    ),
    "causal: arrays in place of parameters": (
        lambda: jaxseq.causal_conv(PAST, X, W),
        TypeError,
        r"`params`: expected ConvParams\(kernel, bias\), got float32\[2, 4, 4\]; the order is \(params, carry, xs\)",
    ),
    "causal: channels": (
        causal_conv(xs=X[..., :2]),
        ValueError,
        r"`kernel`: expected c_in // groups = 2 // 2 = 1 input channels, got 2 \(xs \(2, 9, 2\), kernel",
    ),
    "causal: groups": (
        causal_conv(groups=3),
        ValueError,
        r"`groups`: expected a divisor of both c_in and c_out, got 3 for 4 and 6",
    ),
    "causal: bias": (causal_conv(bias=B[:5]), ValueError, r"`bias`: expected shape \(6,\) = \(c_out,\), got \(5,\)"),
    "causal: dilation for each axis": (
        causal_conv(dilation=(2,)),
        TypeError,
        r"`dilation`: expected an integer >= 1, got tuple \(2,\)",
    ),
    "causal: zero dilation": (causal_conv(dilation=0), ValueError, r"`dilation`: expected an integer >= 1, got 0"),
    "causal: precision": (causal_conv(precision=3), ValueError, r"`precision`: expected a precision of jax.lax"),
    "causal: length of carry": (
        causal_conv(carry=ones(2, 2, 4)),
        ValueError,
        r"`carry`: expected shape \(2, 4, 4\) = the shape of `xs` with \(kernel_size - 1\) \* dilation steps, got \(2, 2, 4\)",
    ),
    "causal: carry that would broadcast": (
        causal_conv(carry=ones(1, 4, 4)),
        ValueError,
        r"`carry`: expected shape \(2, 4, 4\) = .*, got \(1, 4, 4\)",
    ),
    "causal: integer carry": (
        causal_conv(carry=ones(2, 4, 4, dtype=jnp.int32)),
        TypeError,
        r"`carry`: expected a float or complex array, got int32\[2, 4, 4\]",
    ),
    "causal: complex carry for real x": (
        causal_conv(carry=ones(2, 4, 4, dtype=jnp.complex64)),
        TypeError,
        r"`carry`: expected a real dtype to match `xs` of dtype float32, got complex64",
    ),
    "causal: real kernel for complex x": (
        causal_conv(xs=X.astype(jnp.complex64)),
        TypeError,
        r"`kernel`: expected a complex dtype to match `xs` of dtype complex64, got float32",
    ),
    "causal: resets with time first": (
        causal_conv(resets=jnp.zeros((9, 2), bool)),
        ValueError,
        r"`resets`: expected shape \(2, 9\) = the shape of `xs` without features, got \(9, 2\) \(xs \(2, 9, 4\)\)",
    ),
    "causal: resets of one example": (
        causal_conv(resets=jnp.zeros(9, bool)),
        ValueError,
        r"`resets`: expected shape \(2, 9\) = .*, got \(9,\)",
    ),
    "causal: integer resets": (
        causal_conv(resets=jnp.zeros((2, 9), jnp.int32)),
        TypeError,
        r"`resets`: expected a boolean array, got int32\[2, 9\]",
    ),
    "causal: one boolean for resets": (
        causal_conv(resets=True),
        TypeError,
        r"`resets`: expected a boolean array, got bool True",
    ),
    # --- conv_init ---
    "init of 4 axes": (
        lambda: jaxseq.conv_init(jax.random.key(0), (1, 1, 1, 1), 2, 2),
        ValueError,
        r"`kernel_size`: expected 1 to 3 spatial axes, got 4",
    ),
    "init of no taps": (
        lambda: jaxseq.conv_init(jax.random.key(0), 0, 2, 2),
        ValueError,
        r"`kernel_size`: expected an integer >= 1, got 0",
    ),
    "init of groups": (
        lambda: jaxseq.conv_init(jax.random.key(0), 3, 4, 6, groups=4),
        ValueError,
        r"`groups`: expected a divisor of both c_in and c_out, got 4 for 4 and 6",
    ),
    "init of no channels": (
        lambda: jaxseq.conv_init(jax.random.key(0), 3, 0, 6),
        ValueError,
        r"`c_in`: expected an integer >= 1, got 0",
    ),
    "init of strides": (
        lambda: jaxseq.conv_transpose_init(jax.random.key(0), (3, 3), 4, 6, stride=(1, 2, 3)),
        ValueError,
        r"`stride`: expected",
    ),
    "init in integers": (
        lambda: jaxseq.conv_init(jax.random.key(0), 3, 1, 6, dtype=int),
        TypeError,
        r"`dtype`: expected a floating dtype, got int",
    ),
    # --- recurrences: containers ---
    "params of another cell": (
        lstm(params=PARAMS["gru"]),
        TypeError,
        r"`params`: expected LSTMParams\(w_x, w_h, b\), got GRUParams",
    ),
    "params as a plain tuple": (
        gru(params=tuple(PARAMS["gru"])),
        TypeError,
        r"`params`: expected GRUParams\(w_x, w_h, b_x, b_h\), got tuple",
    ),
    "params of rnn for rnn_cell": (
        lambda: jaxseq.rnn_cell(PARAMS["lstm"], H, XS[0]),
        TypeError,
        r"`params`: expected RNNParams\(w_x, w_h, b\), got LSTMParams",
    ),
    "array for a state": (lstm(carry=H), TypeError, r"`carry`: expected LSTMState\(h, c\), got float32\[2, 5\]"),
    "tuple for a state": (lstm(carry=(H, H)), TypeError, r"`carry`: expected LSTMState\(h, c\), got tuple"),
    "a state of that name from another library": (
        lstm(carry=namedtuple("LSTMState", "hidden cell", module="haiku._src.recurrent")(H, H)),
        TypeError,
        r"`carry`: expected LSTMState\(h, c\), got haiku\.LSTMState",
    ),
    "state for an array": (gru(carry=STATE), TypeError, r"`carry`: expected a float array, got LSTMState"),
    # --- recurrences: arrays ---
    "integer xs": (
        lstm(xs=ones(7, 2, 3, dtype=jnp.int32)),
        TypeError,
        r"`xs`: expected a float array, got int32\[7, 2, 3\]",
    ),
    "complex xs": (lstm(xs=XS.astype(jnp.complex64)), TypeError, r"`xs`: expected a float array, got complex64"),
    "integer weights": (
        lstm(params=PARAMS["lstm"]._replace(w_x=ones(3, 20, dtype=jnp.int32))),
        TypeError,
        r"`params\.w_x`: expected a float array, got int32\[3, 20\]",
    ),
    "no weights": (
        lstm(params=PARAMS["lstm"]._replace(w_h=None)),
        TypeError,
        r"`params\.w_h`: expected a float array, got NoneType None",
    ),
    "integer bias of gru": (
        gru(params=PARAMS["gru"]._replace(b_h=ones(15, dtype=jnp.int32))),
        TypeError,
        r"`params\.b_h`: expected a float array, got int32\[15\]",
    ),
    "integer carry": (
        gru(carry=ones(2, 5, dtype=jnp.int32)),
        TypeError,
        r"`carry`: expected a float array, got int32\[2, 5\]",
    ),
    "xs of rank 1": (
        lstm(xs=XS[0, 0]),
        ValueError,
        r"`xs`: expected at least 2 axes \(time, \*batch, features\), got 1 \(xs \(3,\)\)",
    ),
    "features": (
        lstm(xs=XS[..., :2]),
        ValueError,
        r"`xs`: expected 3 features on the last axis, as in `params\.w_x`, got 2 \(xs \(7, 2, 2\), w_x \(3, 20\)\)",
    ),
    "features of a cell": (
        lambda: jaxseq.gru_cell(PARAMS["gru"], H, XS[0, :, :2]),
        ValueError,
        r"`x`: expected 3 features on the last axis, .* got 2",
    ),
    "scalar for a cell": (
        lambda: jaxseq.gru_cell(PARAMS["gru"], H, jnp.float32(1)),
        ValueError,
        r"`x`: expected at least 1 axis \(\*batch, features\), got a scalar",
    ),
    "recurrent weights": (
        lstm(params=PARAMS["lstm"]._replace(w_h=ones(5, 15))),
        ValueError,
        r"`params\.w_h`: expected shape \(H, 4 H\), one block of H columns for each gate i, f, g, o, got \(5, 15\)",
    ),
    "recurrent weights that are not square": (
        lstm(params=PARAMS["lstm"]._replace(w_h=ones(4, 20))),
        ValueError,
        r"`params\.w_h`: expected shape \(H, 4 H\), one block of H columns for each gate i, f, g, o, got \(4, 20\)",
    ),
    "transposed recurrent weights": (
        lstm(params=PARAMS["lstm"]._replace(w_h=ones(20, 5))),
        ValueError,
        r"`params\.w_h`: expected shape \(H, 4 H\)",
    ),
    "input weights": (
        lstm(params=PARAMS["lstm"]._replace(w_x=ones(3, 16))),
        ValueError,
        r"`params\.w_x`: expected shape \(D, 20\) to match `params\.w_h`, got \(3, 16\)",
    ),
    "bias of gates": (
        lstm(params=PARAMS["lstm"]._replace(b=ones(5))),
        ValueError,
        r"`params\.b`: expected shape \(20,\) = \(4 H,\), got \(5,\)",
    ),
    "hidden size of carry": (
        gru(carry=H[:, :4]),
        ValueError,
        r"`carry`: expected shape \(2, 5\) = \(\*batch, H\), got \(2, 4\)",
    ),
    "carry that would broadcast": (
        gru(carry=H[:1]),
        ValueError,
        r"`carry`: expected shape \(2, 5\) = \(\*batch, H\), got \(1, 5\) \(xs \(7, 2, 3\)",
    ),
    "memory of carry": (
        lstm(carry=STATE._replace(c=H[0])),
        ValueError,
        r"`carry\.c`: expected shape \(2, 5\) = \(\*batch, H\), got \(5,\)",
    ),
    # --- recurrences: options ---
    "zero truncation": (
        lstm(truncation=0),
        ValueError,
        r"`truncation`: expected an integer >= 1, a pair \(k1, k2\) or None, got 0",
    ),
    "float truncation": (
        lstm(truncation=2.5),
        TypeError,
        r"`truncation`: expected an integer >= 1, a pair \(k1, k2\) or None, got float 2\.5",
    ),
    "truncation shorter than its windows": (
        lstm(truncation=(4, 3)),
        ValueError,
        r"`truncation`: expected \(k1, k2\) with k2 >= k1, got tuple \(4, 3\)",
    ),
    "truncation of three": (lstm(truncation=(1, 2, 3)), ValueError, r"`truncation`: expected an integer or a pair"),
    "zero in a pair": (lstm(truncation=(0, 3)), ValueError, r"`truncation\[0\]`: expected an integer >= 1, got 0"),
    "zero checkpoint": (
        lstm(checkpoint=0),
        ValueError,
        r"`checkpoint`: expected an integer >= 1, .auto. .* or None, got 0",
    ),
    "checkpoint as another string": (
        lstm(checkpoint="all"),
        ValueError,
        r"`checkpoint`: expected an integer >= 1, .auto. .* or None, got 'all'",
    ),
    "time among the features": (
        lstm(time_axis=2),
        ValueError,
        r"`time_axis`: expected an axis from 0 to 1 .*, before the feature axis, got 2",
    ),
    "time as the last axis": (
        lstm(time_axis=-1),
        ValueError,
        r"`time_axis`: .* from -3 to -2, before the feature axis, got -1 \(xs \(7, 2, 3\)\)",
    ),
    "lengths of another batch": (
        lstm(lengths=jnp.array([1, 2, 3])),
        ValueError,
        r"`lengths`: expected shape \(2,\) = \*batch, got \(3,\)",
    ),
    "lengths beyond the steps": (
        lstm(lengths=jnp.array([1, 8])),
        ValueError,
        r"`lengths`: expected lengths from 0 to 7, the number of steps, got 1 to 8",
    ),
    "negative lengths": (lstm(lengths=np.array([-1, 7])), ValueError, r"`lengths`: .* got -1 to 7"),
    "lengths of floats": (lstm(lengths=jnp.ones(2)), TypeError, r"`lengths`: expected an array of integers, got float"),
    "lengths as a list": (lstm(lengths=[1, 2]), TypeError, r"`lengths`: expected an array of integers, got list"),
    "resets of integers": (
        lstm(resets=ones(7, 2, dtype=int)),
        TypeError,
        r"`resets`: expected a boolean array, got int",
    ),
    "resets time first, xs batch first": (
        lstm(xs=ones(2, 7, 3), time_axis=1, resets=ones(7, 2, dtype=bool)),
        ValueError,
        r"`resets`: expected shape \(2, 7\)",
    ),
    "dropout mask that would broadcast": (
        lstm(recurrent_dropout_mask=H[:1]),
        ValueError,
        r"`recurrent_dropout_mask`: expected shape \(2, 5\) = the shape of h, got \(1, 5\)",
    ),
    "zoneout mask that would broadcast": (
        gru(zoneout=ones(7, 1, 5, dtype=bool)),
        ValueError,
        r"`zoneout`: expected shape \(7, 2, 5\) = the shape of the state, with the time axis of `xs`, got \(7, 1, 5\)",
    ),
    "zoneout amounts of one step": (
        lstm(zoneout=jaxseq.LSTMState(0.5, H)),
        ValueError,
        r"`zoneout\.c`: expected shape \(7, 2, 5\) = the shape of the state, with the time axis of `xs`, got \(2, 5\)",
    ),
    "reset state of another size": (
        lstm(reset_state=jaxseq.LSTMState(H, H[:1])),
        ValueError,
        r"`reset_state\.c`: expected shape \(2, 5\) = \(\*batch, H\), or \(5,\) for all of the batch, got \(1, 5\)",
    ),
    "reset state as an array": (
        lstm(reset_state=H),
        TypeError,
        r"`reset_state`: expected LSTMState\(h, c\), got float32\[2, 5\]",
    ),
    "integer reset state": (
        gru(reset_state=jnp.zeros(5, jnp.int32)),
        TypeError,
        r"`reset_state`: expected a float array, got int32\[5\]",
    ),
    "return_states as a number": (
        lstm(return_states=1),
        TypeError,
        r"`return_states`: expected True or False, .* got int 1",
    ),
    "reverse as a string": (lstm(reverse="yes"), TypeError, r"`reverse`: expected True or False, .* got str 'yes'"),
    "zero unroll": (lstm(unroll=0), ValueError, r"`unroll`: expected an integer >= 1, got 0"),
    "unknown activation": (
        lambda: jaxseq.rnn(PARAMS["rnn"], H, XS, activation="gelu"),
        ValueError,
        r"`activation`: expected one of 'tanh', 'relu', or a function of one array, got str 'gelu'",
    ),
    "unhashable activation": (
        lambda: jaxseq.rnn(PARAMS["rnn"], H, XS, activation=["tanh"]),
        ValueError,
        r"`activation`: expected one of 'tanh', 'relu', or a function of one array, got list",
    ),
    "precision of lstm": (lstm(precision=3), ValueError, r"`precision`: expected a precision of jax.lax"),
    "init size": (
        lambda: jaxseq.lstm_init(jax.random.key(0), 3, 0),
        ValueError,
        r"`hidden_size`: expected an integer >= 1, got 0",
    ),
    "resets of zeros and ones": (
        lstm(resets=ones(7, 2)),
        TypeError,
        r"`resets`: expected a boolean array, got float32\[7, 2\]; convert it with `\.astype\(bool\)`",
    ),
    "lengths of a sequence that is batch first": (
        lstm(lengths=jnp.ones(7, int)),
        ValueError,
        r"`lengths`: expected shape \(2,\) = \*batch, got \(7,\); for arrays \(batch, T, D\), pass time_axis=1",
    ),
    "a carry as a tuple": (
        lstm(carry=(H, H)),
        TypeError,
        r"`carry`: expected LSTMState\(h, c\), got tuple; pass LSTMState\(h=\.\.\., c=\.\.\.\), because the order differs",
    ),
    "checkpoint is True": (lstm(checkpoint=True), TypeError, r'`checkpoint`: expected .* "auto" .*, got bool True'),
    "an option of another library": (
        lstm(batch_first=True),
        TypeError,
        r"jaxseq\.lstm: got an unexpected keyword argument 'batch_first'; use `time_axis=1`\. Options: lengths, resets,",
    ),
    "a misspelt option": (
        conv(dilatation=2),
        TypeError,
        r"jaxseq\.conv: .* 'dilatation'; use `dilation`\. Options: stride, padding, dilation, groups, flip, lengths, precision, method$",
    ),
    "init size as float": (
        lambda: jaxseq.gru_init(jax.random.key(0), 3.0, 2),
        TypeError,
        r"`input_size`: expected an integer >= 1, got float 3\.0",
    ),
    "init dtype": (
        lambda: jaxseq.rnn_init(jax.random.key(0), 3, 2, dtype="int8"),
        TypeError,
        r"`dtype`: expected a floating dtype, got int8",
    ),
    "init of an invalid dtype": (
        lambda: jaxseq.rnn_init(jax.random.key(0), 3, 2, dtype="float" + "y"),
        TypeError,
        r"`dtype`: expected a floating dtype, got str 'floaty'",
    ),
}


@pytest.mark.other_types
@pytest.mark.parametrize("mistake", MISTAKES)
def test_message(mistake):
    call, kind, pattern = MISTAKES[mistake]
    with pytest.raises(kind, match=pattern) as info:
        call()
    assert info.type is kind


def test_messages_are_the_same_under_jit():
    with pytest.raises(ValueError, match=r"`xs`: expected 3 features"):
        jax.jit(jaxseq.lstm)(PARAMS["lstm"], STATE, XS[..., :2])


def test_numpy_arrays_are_welcome():
    """NumPy's float64 arrays stay float64 under x64."""
    y = jaxseq.conv(np.ones((9, 1)), np.ones((3, 1, 2)), None, stride=2)
    assert (y.shape, y.dtype) == ((4, 2), jnp.float64)
    params = jax.tree.map(np.asarray, PARAMS["lstm"])
    (h, _), ys = jaxseq.lstm(params, jax.tree.map(np.asarray, STATE), np.ones((7, 2, 3), np.float32))
    assert isinstance(h, jax.Array)
    assert ys.dtype == jnp.float32


@pytest.mark.other_types
def test_numpy_integers_are_options():
    assert jaxseq.conv(np.ones((9, 1)), np.ones((3, 1, 2)), None, stride=np.int64(2)).shape == (4, 2)
