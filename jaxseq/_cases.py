"""Every public op once: its twin, and variants with random arguments.

What must hold for all ops runs over `CASES`, so that a new op gets every property test by one entry here. The
arguments are hard on purpose: non-zero biases and states, and sizes that are all different, since zero biases and
square weights hide wrong rules.
"""

from collections.abc import Callable, Mapping
from functools import partial, wraps
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxseq import reference
from jaxseq._causal_conv import causal_conv
from jaxseq._conv import conv
from jaxseq._conv_transpose import conv_transpose
from jaxseq._gru import GRUParams, gru, gru_cell
from jaxseq._init import normal
from jaxseq._lstm import LSTMParams, LSTMState, lstm, lstm_cell
from jaxseq._rnn import RNNParams, rnn, rnn_cell
from jaxseq._separable import depthwise_conv, separable_conv


class Variant(NamedTuple):
    """One way to call an op.

    Attributes:
        example: `(key, *, dtype, batch, length) -> args`: random arguments with the given batch axes, and `length`
            time steps or positions along the first spatial axis where the op has any.
        options: the keyword-only options.
        arrays: the names of those keyword-only options that are arrays, and last among the arguments.
    """

    example: Callable[..., tuple[Any, ...]]
    options: Mapping[str, Any]
    arrays: tuple[str, ...] = ()

    def arguments(self, key: Any, *, dtype: Any = jnp.float32, batch: tuple[int, ...] = (2,), length: int = 7) -> tuple:
        """Random arguments for the op and its twin."""
        return self.example(key, dtype=dtype, batch=batch, length=length)

    def bound(self, f: Callable[..., Any]) -> Callable[..., Any]:
        """The op or its twin under these options, a function of the arguments alone."""
        return partial(_by_position(f, self.arrays) if self.arrays else f, **self.options)


def _by_position(f: Callable[..., Any], names: tuple[str, ...]) -> Callable[..., Any]:
    """f, the last of whose arguments go to it by name."""

    @wraps(f)
    def call(*args: Any, **options: Any) -> Any:
        first = len(args) - len(names)
        arrays = dict(zip(names, args[first:], strict=True))
        if "lengths" in arrays:  # who tries other sizes leaves integers as they are
            arrays["lengths"] = jnp.minimum(arrays["lengths"], args[2].shape[options.get("time_axis", 0)])
        return f(*args[:first], **arrays, **options)

    return call


class Case(NamedTuple):
    """A public op, the twin that defines it, and the variants under which the two are compared."""

    op: Callable[..., Any]
    twin: Callable[..., Any]
    variants: Mapping[str, Variant]


def _normals(key: Any, dtype: Any) -> Callable[..., jax.Array]:
    """Draws normal arrays of moderate size, each from a key of its own: `draw(*shape)`."""
    keys = iter(jax.random.split(key, 8))  # no op takes more
    return lambda *shape: (normal(next(keys), shape) * 0.5).astype(dtype)


def _conv_example(
    key: Any,
    *,
    dtype: Any,
    batch: tuple[int, ...],
    length: int,
    kernel: tuple[int, ...],
    groups: int = 1,
    bias: bool = True,
    transposed: bool = False,
) -> tuple[Any, ...]:
    draw = _normals(key, dtype)
    space, (c_in, c_out) = (length, 6, 5)[: len(kernel) - 2], (kernel[-2] * groups, kernel[-1])
    if transposed:
        c_in, c_out = c_out, c_in
    x, w = draw(*batch, *space, c_in), draw(*kernel)
    return (x, w, draw(c_out)) if bias else (x, w)


def _separable_example(
    key: Any,
    *,
    dtype: Any,
    batch: tuple[int, ...],
    length: int,
    window: tuple[int, ...],
    c_in: int,
    c_middle: int,
    c_out: int | None,
    bias: bool,
) -> tuple[Any, ...]:
    draw, axes = _normals(key, dtype), len(window)
    kernels = [draw(*window, 1, c_middle)] + ([draw(*(1,) * axes, c_middle, c_out)] if c_out else [])
    args = (draw(*batch, *(length, 6, 5)[:axes], c_in), *kernels)
    return (*args, draw(c_out or c_middle)) if bias else args


def _causal_example(
    key: Any,
    *,
    dtype: Any,
    batch: tuple[int, ...],
    length: int,
    kernel: tuple[int, int, int],
    dilation: int,
    groups: int,
    bias: bool,
    carry: bool,
    resets: bool,
) -> tuple[Any, ...]:
    draw, (taps, per_in, c_out) = _normals(key, dtype), kernel
    x, w, b = draw(*batch, length, per_in * groups), draw(*kernel), draw(c_out)
    past = draw(*batch, (taps - 1) * dilation, per_in * groups)
    args = (past if carry else None, x, w, b if bias else None)
    if not resets:
        return args
    marks = jax.random.bernoulli(jax.random.fold_in(key, 1), 0.3, x.shape[:-1])
    return (*args, marks.at[..., :1].set(False))  # else no gradient might reach the carry, and nothing be said of it


def _recurrence_example(
    key: Any,
    *,
    dtype: Any,
    batch: tuple[int, ...],
    length: int,
    params: type,
    gates: int,
    biases: int = 1,
    state: type | None = None,
    time: bool = True,
    bias: bool = True,
    carry: bool = True,
    masks: tuple[str, ...] = (),
    batch_first: bool = False,
) -> tuple[Any, ...]:
    draw, D, H = _normals(key, dtype), 3, 5
    weights = params(
        draw(D, gates * H),
        draw(H, gates * H),
        *(draw(gates * H) if bias else None for _ in range(biases)),
    )
    h, c = draw(*batch, H), draw(*batch, H)
    first = h if state is None else state(h, c)
    sizes = (*batch, length) if batch_first else (length, *batch)
    x = draw(*(sizes if time else batch), D)
    # Sequences of many lengths, none among them; resets anywhere but at the first step, where they would close the only
    # way into a carry or out of one.
    marks = jax.random.bernoulli(jax.random.fold_in(key, 1), 0.2, sizes)
    drawn = {
        "lengths": jax.random.permutation(key, jnp.arange(prod(batch)) * (length + 3) % (length + 1)).reshape(batch),
        "resets": marks & (jax.lax.broadcasted_iota(int, sizes, len(batch) if batch_first else 0) > 0),
    }
    return weights, first if carry else None, x, *(drawn[name] for name in masks)


def _conv_variants(transposed: bool) -> dict[str, Variant]:
    def variant(kernel: tuple[int, ...], *, groups: int = 1, bias: bool = True, **options: Any) -> Variant:
        example = partial(_conv_example, kernel=kernel, groups=groups, bias=bias, transposed=transposed)
        return Variant(example, {**options, **({"groups": groups} if groups > 1 else {})})

    if transposed:
        return {
            "1d": variant((3, 4, 6)),
            "strided same": variant((3, 4, 6), stride=2, padding="SAME"),
            "gaps, dilated causal": variant((2, 4, 6), stride=5, dilation=2, padding="CAUSAL", bias=False),
            "output padding, grouped": variant((2, 2, 6), groups=2, stride=3, output_padding=2, padding=1),
            "cropped": variant((4, 4, 3), padding=((-2, 3),), stride=2),
            "depthwise": variant((4, 1, 3), groups=3, stride=2, padding=((3, 0),)),
            "2d depthwise, long": variant((9, 8, 1, 3), groups=3, stride=2, padding=((4, 0), (-1, 3))),
            "one tap": variant((1, 4, 6), stride=2, output_padding=1),
            "2d grouped, dilated": variant(
                (2, 3, 2, 9), groups=3, dilation=(3, 1), padding=((1, 2), (-1, 3)), stride=(2, 1), output_padding=(1, 0)
            ),
            "3d": variant((2, 3, 1, 3, 4), stride=(2, 1, 3), dilation=(1, 2, 1), padding=((1, 0), (1, 1), (-1, 0))),
        }
    return {
        "1d": variant((3, 4, 6)),
        "strided same": variant((3, 4, 6), stride=2, padding="SAME"),
        "dilated causal": variant((3, 4, 6), dilation=2, padding="CAUSAL", bias=False),
        "flipped, grouped": variant((2, 2, 6), groups=2, flip=True, padding=3),
        "cropped": variant((2, 4, 3), padding=((-2, 1),), stride=3),
        "depthwise": variant((4, 1, 3), groups=3, padding=((3, -1),), dilation=2, stride=2),
        "depthwise, two outputs a channel": variant((4, 1, 16), groups=8, padding=((3, 0),)),
        "2d depthwise, long": variant((9, 8, 1, 3), groups=3, padding="SAME", dilation=(1, 2), bias=False),
        "one tap": variant((1, 4, 6), stride=2),
        "2d": variant((3, 2, 4, 6), padding="SAME", stride=(1, 2)),
        "2d grouped, dilated": variant(
            (2, 3, 2, 9), groups=3, dilation=(3, 1), padding=((1, 2), (-1, 3)), stride=(2, 1)
        ),
        "2d depthwise": variant((2, 3, 1, 4), groups=4, padding="SAME", stride=(1, 2), dilation=(2, 1)),
        "3d": variant((2, 3, 1, 3, 4), stride=(2, 1, 3), dilation=(1, 2, 1), padding=1),
    }


def _separable_variants(pointwise: bool) -> dict[str, Variant]:
    def variant(window: tuple[int, ...], c_in: int, c_middle: int, *, bias: bool = True, **options: Any) -> Variant:
        example = partial(
            _separable_example, window=window, c_in=c_in, c_middle=c_middle, c_out=5 if pointwise else None, bias=bias
        )
        return Variant(example, options)

    return {
        "1d, two outputs a channel": variant((4,), 3, 6, padding="CAUSAL", dilation=2),
        "2d strided, flipped": variant((2, 3), 4, 4, padding="SAME", stride=(1, 2), flip=True, bias=False),
    }


def _causal_variants() -> dict[str, Variant]:
    def variant(
        kernel: tuple[int, int, int], *, bias: bool = True, carry: bool = True, resets: bool = False, **options: int
    ) -> Variant:
        sizes = {"dilation": 1, "groups": 1, **options}
        example = partial(_causal_example, kernel=kernel, bias=bias, carry=carry, resets=resets, **sizes)
        return Variant(example, options, ("resets",) if resets else ())

    return {
        "plain": variant((4, 5, 6)),
        "dilated, beyond the chunk": variant((4, 5, 6), dilation=3),
        "no carry": variant((4, 5, 6), carry=False),
        "grouped, no bias": variant((5, 3, 10), groups=2, bias=False),
        "depthwise": variant((4, 1, 5), groups=5),
        "resets": variant((4, 5, 6), resets=True),
        "resets, grouped, no carry": variant((3, 4, 6), groups=2, carry=False, bias=False, resets=True),
        "resets, depthwise, dilated": variant((3, 1, 5), groups=5, dilation=4, resets=True),
        "resets, long": variant((17, 3, 4), resets=True),
    }


def _time_variants(example: Callable[..., tuple], **options: Any) -> dict[str, Variant]:
    """The time options, for a sequence op."""

    def variant(*masks: str, **more: Any) -> Variant:
        batch_first = more.get("time_axis", 0) == 1
        return Variant(partial(example, masks=masks, batch_first=batch_first), {**options, **more}, masks)

    return {
        "plain": Variant(example, options),
        "no bias, zero carry": Variant(partial(example, bias=False, carry=False), options),
        "reverse": variant(reverse=True),
        "truncation": variant(truncation=3),
        "truncation, reverse": variant(truncation=2, reverse=True, unroll=2),
        "windows that reach back": variant(truncation=(2, 5)),
        "resets, truncation, reverse": variant("resets", truncation=3, reverse=True),
        "checkpoint, windows that reach back": variant(truncation=(2, 3), checkpoint=4, reverse=True),
        "lengths": variant("lengths"),
        "lengths, resets, reverse": variant("lengths", "resets", reverse=True),
        "resets, checkpoint": variant("resets", checkpoint=3),
        "batch first, lengths, checkpoint": variant("lengths", time_axis=1, checkpoint="auto"),
    }


def _step_variants(example: Callable[..., tuple], **options: Any) -> dict[str, Variant]:
    """For the cell of a sequence op. From a zero carry no gradient reaches w_h, and nothing could be said of it."""
    step = partial(example, time=False)
    return {"plain": Variant(step, options), "no bias": Variant(partial(step, bias=False), options)}


_RNN = partial(_recurrence_example, params=RNNParams, gates=1)
_GRU = partial(_recurrence_example, params=GRUParams, gates=3, biases=2)
_LSTM = partial(_recurrence_example, params=LSTMParams, gates=4, state=LSTMState)

CASES: dict[str, Case] = {
    "conv": Case(conv, reference.conv, _conv_variants(transposed=False)),
    "conv_transpose": Case(conv_transpose, reference.conv_transpose, _conv_variants(transposed=True)),
    "depthwise_conv": Case(depthwise_conv, reference.depthwise_conv, _separable_variants(pointwise=False)),
    "separable_conv": Case(separable_conv, reference.separable_conv, _separable_variants(pointwise=True)),
    "causal_conv": Case(causal_conv, reference.causal_conv, _causal_variants()),
    "rnn": Case(
        rnn, reference.rnn, {**_time_variants(_RNN), "relu": Variant(_RNN, {"activation": "relu", "truncation": 4})}
    ),
    "rnn_cell": Case(
        rnn_cell,
        reference.rnn_cell,
        {**_step_variants(_RNN), "relu": Variant(partial(_RNN, time=False), {"activation": "relu"})},
    ),
    "gru": Case(gru, reference.gru, _time_variants(_GRU)),
    "gru_cell": Case(gru_cell, reference.gru_cell, _step_variants(_GRU)),
    "lstm": Case(lstm, reference.lstm, _time_variants(_LSTM)),
    "lstm_cell": Case(lstm_cell, reference.lstm_cell, _step_variants(_LSTM)),
}
