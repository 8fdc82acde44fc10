"""Every public op with its reference implementation, and variants with random arguments.

Tests that apply to all ops iterate over `CASES`: one entry here gives a new op every property test. Biases and states
are non-zero and all sizes differ, because zero biases and square weights hide wrong rules.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import partial, wraps
from math import prod
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray, PyTree

from jaxseq import cells, linear_maps, reference
from jaxseq._any_cell import recurrence, recurrence_cell
from jaxseq._causal_conv import causal_conv
from jaxseq._conv import conv
from jaxseq._conv_recurrence import conv_gru, conv_gru_cell, conv_lstm, conv_lstm_cell
from jaxseq._conv_transpose import conv_transpose
from jaxseq._gru import GRUParams, gru, gru_cell
from jaxseq._layers import bidirectional, stack
from jaxseq._linear_recurrence import linear_recurrence
from jaxseq._lstm import LSTMParams, LSTMState, lstm, lstm_cell
from jaxseq._mlstm import mlstm, mlstm_cell
from jaxseq._qrnn import qrnn, qrnn_cell
from jaxseq._recurrence import Cell, LinearCell
from jaxseq._rnn import RNNParams, rnn, rnn_cell
from jaxseq._scan import scan
from jaxseq._separable import depthwise_conv, separable_conv
from jaxseq._types import ConvParams, MLSTMParams, MLSTMState, QRNNParams, QRNNState

# A function of arrays and trees of arrays: an op with its options, or its reference implementation.
Op = Callable[..., PyTree]
# Positional arguments of an op.
Args = tuple[PyTree, ...]
# `(key, *, dtype, batch, length, width=1) -> args`, random arguments.
Example = Callable[..., Args]


class Variant(NamedTuple):
    """One way to call an op.

    Attributes:
        example: `(key, *, dtype, batch, length) -> args`: random arguments with the given batch axes. `length` is the
            number of time steps, or the size of the first spatial axis.
        options: the keyword-only options.
        arrays: the names of the keyword-only options that are arrays. `example` returns them as the last arguments.
        first: the leading arguments that are not arrays.
        first_of_reference: the same for the reference implementation, if different.
        call: turns an op that takes a function into a function of arrays.
    """

    example: Example
    options: Mapping[str, Any]
    arrays: tuple[str, ...] = ()
    first: tuple[object, ...] = ()
    first_of_reference: tuple[object, ...] | None = None
    call: Callable[[Op], Op] | None = None

    def arguments(
        self, key: PRNGKeyArray, *, dtype: DTypeLike = jnp.float32, batch: tuple[int, ...] = (2,), length: int = 7
    ) -> Args:
        """Return random arguments for the op and its reference implementation."""
        return self.example(key, dtype=dtype, batch=batch, length=length)

    def widened(self, width: int) -> "Variant":
        """Return the variant with `width` times as many channels, features, hidden units and groups."""
        groups = {"groups": self.options["groups"] * width} if "groups" in self.options else {}
        return self._replace(example=partial(self.example, width=width), options={**self.options, **groups})

    def bound(self, f: Op) -> Op:
        """Return the op or its reference implementation with these options, as a function of the arguments only."""
        of_reference = self.first_of_reference is not None and f.__module__.startswith(reference.__name__)
        first = self.first_of_reference if of_reference else self.first
        f = self.call(f) if self.call else f
        return partial(_by_position(f, self.arrays) if self.arrays else f, *(first or ()), **self.options)


def _by_position(f: Op, names: tuple[str, ...]) -> Op:
    """Return `f` with the last arguments passed by the given names."""
    of_conv = next(iter(inspect.signature(f).parameters)) == "x"

    @wraps(f)
    def call(*args: PyTree, **options: Any) -> PyTree:
        first = len(args) - len(names)
        arrays = dict(zip(names, args[first:], strict=True))
        if "lengths" in arrays:  # a caller that shortens xs does not change the integers
            steps = args[0].shape[-2] if of_conv else args[first - 1].shape[options.get("time_axis", 0)]
            arrays["lengths"] = jnp.minimum(arrays["lengths"], steps)
        if "recurrent_dropout_mask" in arrays:  # boolean among the arguments, so that no gradient is checked
            arrays["recurrent_dropout_mask"] = jnp.where(arrays["recurrent_dropout_mask"], 0, 1.25).astype(
                args[first - 1].dtype
            )
        return f(*args[:first], **arrays, **options)

    return call


class Case(NamedTuple):
    """A public op, its reference implementation, and the variants on which the two are compared.

    Attributes:
        op: the op.
        reference: its reference implementation.
        variants: the variants by label.
        quick: the labels of the variants that `python -m jaxseq verify` checks by default, at least one per op. They
            cover every rule of `_correlation` for each of the three contractions, and every line of the rules, the
            recurrence engine, `scan` and the cells that all variants together cover. tests/test_verify.py checks this
            by tracing. Among variants with the same coverage, the cheapest to compile is listed.
    """

    op: Op
    reference: Op
    variants: Mapping[str, Variant]
    quick: tuple[str, ...]


def _generator(key: PRNGKeyArray) -> np.random.Generator:
    """Return a NumPy generator: `jax.random` compiles a program per shape, which takes longer than most checks."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def _normals(generator: np.random.Generator, dtype: DTypeLike) -> Callable[..., jax.Array]:
    """Return `draw(*shape, scale=1)`, which draws normal arrays of standard deviation 0.5 times the scale.

    `jnp.asarray` compiles a program for each shape; `jax.device_put` does not.
    """

    def draw(*shape: int, scale: float = 1.0) -> jax.Array:
        return jax.device_put((generator.standard_normal(shape) * 0.5 * scale).astype(dtype))

    return draw


def _lengths(generator: np.random.Generator, batch: tuple[int, ...], length: int) -> jax.Array:
    """Draw lengths from 0 to `length`; they vary and include 0."""
    drawn = generator.permutation(np.arange(prod(batch), dtype=np.int32) * (length + 3) % (length + 1))
    return jax.device_put(drawn.reshape(batch))


def _marks(generator: np.random.Generator, shares: float, shape: tuple[int, ...]) -> np.ndarray:
    """Draw booleans that are true with probability `shares`."""
    return generator.random(shape) < shares


def _wide_kernel(kernel: tuple[int, ...], groups: int, width: int) -> tuple[tuple[int, ...], int]:
    """Return the kernel shape and groups for `width` times as many channels: `width` times the groups if grouped."""
    *kernel_size, per_group, c_out = kernel
    if groups > 1:
        return (*kernel_size, per_group, c_out * width), groups * width
    return (*kernel_size, per_group * width, c_out * width), 1


def _conv_example(
    key: PRNGKeyArray,
    *,
    dtype: DTypeLike,
    batch: tuple[int, ...],
    length: int,
    kernel: tuple[int, ...],
    groups: int = 1,
    bias: bool = True,
    transposed: bool = False,
    lengths: bool = False,
    width: int = 1,
) -> Args:
    generator = _generator(key)
    draw = _normals(generator, dtype)
    kernel, groups = _wide_kernel(kernel, groups, width)
    space, (c_in, c_out) = (length, 6, 5)[: len(kernel) - 2], (kernel[-2] * groups, kernel[-1])
    if transposed:
        c_in, c_out = c_out, c_in
    x, w = draw(*batch, *space, c_in), draw(*kernel)
    args = (x, w, draw(c_out)) if bias else (x, w)
    return (*args, _lengths(generator, batch, length)) if lengths else args


def _separable_example(
    key: PRNGKeyArray,
    *,
    dtype: DTypeLike,
    batch: tuple[int, ...],
    length: int,
    kernel_size: tuple[int, ...],
    c_in: int,
    c_middle: int,
    c_out: int | None,
    bias: bool,
    width: int = 1,
) -> Args:
    draw, axes = _normals(_generator(key), dtype), len(kernel_size)
    c_in, c_middle, c_out = c_in * width, c_middle * width, c_out and c_out * width
    kernels = [draw(*kernel_size, 1, c_middle)] + ([draw(*(1,) * axes, c_middle, c_out)] if c_out else [])
    args = (draw(*batch, *(length, 6, 5)[:axes], c_in), *kernels)
    return (*args, draw(c_out or c_middle)) if bias else args


def _causal_example(
    key: PRNGKeyArray,
    *,
    dtype: DTypeLike,
    batch: tuple[int, ...],
    length: int,
    kernel: tuple[int, int, int],
    dilation: int,
    groups: int,
    bias: bool,
    carry: bool,
    masks: tuple[str, ...],
    batch_first: bool,
    width: int = 1,
) -> Args:
    wide, groups = _wide_kernel(kernel, groups, width)
    generator, (taps, per_in, c_out) = _generator(key), wide
    draw = _normals(generator, dtype)
    sizes = lambda steps: (*batch, steps) if batch_first else (steps, *batch)  # noqa: E731
    x, w, b = draw(*sizes(length), per_in * groups), draw(*wide), draw(c_out)
    past = draw(*sizes((taps - 1) * dilation), per_in * groups)
    args = (ConvParams(w, b if bias else None), past if carry else None, x)
    marks = _marks(generator, 0.3, x.shape[:-1])
    # Without a reset at the first step: otherwise no gradient may reach the carry, and its check has no power.
    marks[(slice(None),) * (len(batch) if batch_first else 0) + (slice(0, 1),)] = False
    drawn = {"lengths": _lengths(generator, batch, length), "resets": jax.device_put(marks)}
    return *args, *(drawn[name] for name in masks)


def _recurrence_example(
    key: PRNGKeyArray,
    *,
    dtype: DTypeLike,
    batch: tuple[int, ...],
    length: int,
    params: type,
    gates: int = 1,
    state: type | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    features: tuple[int, ...] = (3,),
    states: tuple[tuple[int, ...], ...] | None = None,
    time: bool = True,
    bias: bool = True,
    carry: bool = True,
    masks: tuple[str, ...] = (),
    batch_first: bool = False,
    width: int = 1,
    more_blocks: tuple[str, ...] = (),
    positive: tuple[str, ...] = (),
) -> Args:
    """Return random `(params, carry, x, *masks)` for a recurrence of input size 3 and hidden size 5.

    `shapes`, `features` and `states` override the shapes of parameters, x and carry. `width` multiplies channels,
    features and hidden units, or for the fields `more_blocks` the number of blocks, their first axis. Weights are
    divided by its square root, so that sums keep their scale. The state fields `positive` are drawn positive, as the
    cell keeps them.
    """
    D, H = 3, 5
    generator, columns = _generator(key), gates * H
    draw = _normals(generator, dtype)
    sizes_of = {"w_x": (D, columns), "w_h": (H, columns), **dict.fromkeys(("b", "b_x", "b_h"), (columns,))}
    sizes_of |= shapes or {}

    def weight(field: str) -> jax.Array:
        shape = sizes_of[field]
        if field in more_blocks:
            return draw(shape[0] * width, *shape[1:])
        wide = tuple(n * width if axis >= len(shape) - 2 and n > 1 else n for axis, n in enumerate(shape))
        return draw(*wide, scale=width**-0.5 if len(shape) > 1 else 1.0)

    fields: tuple[str, ...] = params._fields  # type: ignore[attr-defined]
    weights = params(*(weight(f) if bias or f[:1] != "b" else None for f in fields))
    count = 1 if state is None else len(state._fields)  # type: ignore[attr-defined]
    leaves = [draw(*batch, *shape[:-1], shape[-1] * width) for shape in states or ((H,),) * count]
    features = (*features[:-1], features[-1] * width)
    first: PyTree = leaves[0] if state is None else state(*leaves)
    for field in positive:
        first = first._replace(**{field: jnp.abs(getattr(first, field))})
    sizes = (*batch, length) if batch_first else (length, *batch)
    x = draw(*(sizes if time else batch), *features)
    # There is no reset at the first step, where it would block every gradient to the carry.
    resets = _marks(generator, 0.2, sizes)
    if time:
        at = lambda t: (slice(None),) * (len(batch) if batch_first else 0) + (slice(t, t + 1),)  # noqa: E731
        resets[at(0)] = False
        if "reset_state" in masks:  # otherwise there may be no reset within the lengths
            resets[at(1)] = True
    drawn = {
        "lengths": _lengths(generator, batch, length),
        "recurrent_dropout_mask": _marks(generator, 0.2, leaves[0].shape),
        "zoneout": _zoneout_mask(generator, sizes, first),
        "resets": resets,
        "reset_state": jax.tree.map(lambda leaf: draw(*leaf.shape), first) if "reset_state" in masks else None,
    }
    return weights, first if carry else None, x, *(jax.tree.map(jax.device_put, drawn[name]) for name in masks)


def _zoneout_mask(
    generator: np.random.Generator, sizes: tuple[int, ...], state: PyTree[jax.Array]
) -> PyTree[np.ndarray]:
    """Draw a boolean mask for each leaf (*batch, *features) of a state. `sizes` are the time and batch axes."""
    leaves, structure = jax.tree.flatten(state)
    shapes = [(*sizes, *leaf.shape[len(sizes) - 1 :]) for leaf in leaves]
    return structure.unflatten([_marks(generator, 0.3, shape) for shape in shapes])


def _conv_variants(transposed: bool) -> dict[str, Variant]:
    def variant(
        kernel: tuple[int, ...], *, groups: int = 1, bias: bool = True, lengths: bool = False, **options: object
    ) -> Variant:
        sizes = {"kernel": kernel, "groups": groups, "bias": bias}
        example = partial(_conv_example, **sizes, transposed=transposed, lengths=lengths)
        options |= {"groups": groups} if groups > 1 else {}
        return Variant(example, options, ("lengths",) if lengths else ())

    if transposed:
        return {
            "1d": variant((3, 4, 6)),
            "strided same": variant((3, 4, 6), stride=2, padding="SAME"),
            "strided, dilated, causal": variant((2, 4, 6), stride=5, dilation=2, padding=((0, -2),), bias=False),
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
        "lengths": variant((3, 4, 6), stride=2, padding=((2, 1),), lengths=True),
        "dilated beyond the outputs": variant((3, 4, 6), dilation=4, padding=((2, 1),)),
        "flipped, grouped": variant((2, 2, 6), groups=2, flip=True, padding=3),
        "cropped": variant((2, 4, 3), padding=((-2, 1),), stride=3),
        "depthwise": variant((4, 1, 3), groups=3, padding=((3, -1),), dilation=2, stride=2),
        "depthwise, depth multiplier 2": variant((4, 1, 16), groups=8, padding=((3, 0),)),
        "depthwise, long": variant((90, 1, 3), groups=3, padding=((80, 90),)),
        "2d depthwise, long": variant((9, 8, 1, 3), groups=3, padding="SAME", dilation=(1, 2), bias=False),
        "grouped, direct": variant((3, 2, 6), groups=2, padding=((2, -1),), stride=2, method="direct"),
        "one tap": variant((1, 4, 6), stride=2),
        "2d": variant((3, 2, 4, 6), padding="SAME", stride=(1, 2)),
        "2d grouped, dilated": variant(
            (2, 3, 2, 9), groups=3, dilation=(3, 1), padding=((1, 2), (-1, 3)), stride=(2, 1)
        ),
        "2d depthwise": variant((2, 3, 1, 4), groups=4, padding="SAME", stride=(1, 2), dilation=(2, 1)),
        "3d": variant((2, 3, 1, 3, 4), stride=(2, 1, 3), dilation=(1, 2, 1), padding=1),
        "3d, overlapping patches": variant((2, 2, 2, 2, 3), padding="SAME"),
    }


def _separable_variants(pointwise: bool) -> dict[str, Variant]:
    def variant(
        kernel_size: tuple[int, ...], c_in: int, c_middle: int, *, bias: bool = True, **options: object
    ) -> Variant:
        example = partial(
            _separable_example,
            kernel_size=kernel_size,
            c_in=c_in,
            c_middle=c_middle,
            c_out=5 if pointwise else None,
            bias=bias,
        )
        return Variant(example, options)

    return {
        "1d, depth multiplier 2": variant((4,), 3, 6, padding="CAUSAL", dilation=2),
        "2d strided, flipped": variant((2, 3), 4, 4, padding="SAME", stride=(1, 2), flip=True, bias=False),
    }


def _causal_variants() -> dict[str, Variant]:
    def variant(
        kernel: tuple[int, int, int], *masks: str, bias: bool = True, carry: bool = True, **options: int
    ) -> Variant:
        sizes = {"dilation": options.get("dilation", 1), "groups": options.get("groups", 1)}
        example = partial(_causal_example, kernel=kernel, bias=bias, carry=carry, masks=masks, **sizes)
        return Variant(partial(example, batch_first=options.get("time_axis") == 1), options, masks)

    return {
        "plain": variant((4, 5, 6)),
        "dilated, beyond the chunk": variant((4, 5, 6), dilation=3),
        "no carry": variant((4, 5, 6), carry=False),
        "grouped, no bias": variant((5, 3, 10), groups=2, bias=False),
        "depthwise": variant((4, 1, 5), groups=5),
        "batch first, lengths": variant((4, 5, 6), "lengths", time_axis=1),
        "resets": variant((4, 5, 6), "resets"),
        "resets, grouped, no carry": variant((3, 4, 6), "resets", groups=2, carry=False, bias=False),
        "resets, depthwise, dilated": variant((3, 1, 5), "resets", groups=5, dilation=4),
        "lengths, resets, long": variant((17, 3, 4), "lengths", "resets"),
    }


def _time_variants(example: Example, **options: object) -> dict[str, Variant]:
    """Return variants of a recurrence that cover the time options."""

    def variant(*masks: str, **more: object) -> Variant:
        batch_first = more.get("time_axis", 0) == 1
        return Variant(partial(example, masks=masks, batch_first=batch_first), {**options, **more}, masks)

    return {
        "plain": Variant(example, options),
        "no bias, zero carry": Variant(partial(example, bias=False, carry=False), options),
        "reverse": variant(reverse=True),
        "truncation": variant(truncation=3),
        "truncation, reverse": variant(truncation=2, reverse=True, unroll=2),
        "overlapping windows": variant(truncation=(2, 5)),
        "resets, truncation, reverse": variant("resets", truncation=3, reverse=True),
        "checkpoint, overlapping windows": variant(truncation=(2, 3), checkpoint=4, reverse=True),
        "lengths": variant("lengths"),
        "lengths, resets, reverse": variant("lengths", "resets", reverse=True),
        "resets, checkpoint": variant("resets", checkpoint=3),
        "batch first, lengths, checkpoint": variant("lengths", time_axis=1, checkpoint="auto"),
        "recurrent dropout, zoneout": variant("recurrent_dropout_mask", "zoneout"),
        "resets, zoneout, truncation, checkpoint": variant("resets", "zoneout", truncation=3, checkpoint=2),
    }


def _state_variants(example: Example) -> dict[str, Variant]:
    """Return variants that return all states, and start from another state than zero after a reset."""
    masks: dict[str, tuple[str, ...]] = {
        "states, reset state, lengths": ("lengths", "resets", "reset_state"),
        "states, reset state, reverse": ("resets", "reset_state"),
    }
    options: list[dict[str, object]] = [{}, {"reverse": True, "checkpoint": 3}]
    return {
        label: Variant(partial(example, masks=names), {"return_states": True, **more}, names)
        for (label, names), more in zip(masks.items(), options, strict=True)
    }


def _step_variants(example: Example, **options: object) -> dict[str, Variant]:
    """Return variants of a single step, all with a carry: from a zero carry, w_h gets no gradient to check."""
    step = partial(example, time=False)
    return {"plain": Variant(step, options), "no bias": Variant(partial(step, bias=False), options)}


def _layers_example(
    key: PRNGKeyArray,
    *,
    dtype: DTypeLike,
    batch: tuple[int, ...],
    length: int,
    layers: tuple[PyTree[Example], ...],
    masks: tuple[str, ...] = (),
    width: int = 1,
) -> Args:
    """Return random arguments for several layers, the first with input size 3.

    `layers` are the examples of the single layers, nested as the layers are.
    """
    sizes = {"dtype": dtype, "batch": batch, "length": length, "width": width}

    def of(layers: tuple[PyTree[Example], ...], key: PRNGKeyArray) -> tuple[list[PyTree], list[PyTree]]:
        keys = jax.random.split(key, len(layers))
        found = [
            of(layer, k) if isinstance(layer, tuple) else layer(k, **sizes)
            for layer, k in zip(layers, keys, strict=True)
        ]
        return [p for p, *_ in found], [carry for _, carry, *_ in found]

    _, _, x, *drawn = _RNN(key, masks=masks, **sizes)
    return *of(layers, key), x, *drawn


_KEY = jax.random.key(0)
_RNN = partial(_recurrence_example, params=RNNParams, gates=1)
_GRU = partial(_recurrence_example, params=GRUParams, gates=3)
_SQUARE = {"w_x": (3, 9), "w_h": (3, 9), "b_x": (9,), "b_h": (9,)}  # input and output of the same size
_SQUARE_GRU = partial(_GRU, shapes=_SQUARE, states=((3,),))
_LSTM = partial(_recurrence_example, params=LSTMParams, gates=4, state=LSTMState)


def _kernels(gates: int, *kernel_size: int) -> dict[str, tuple[int, ...]]:
    """Return parameter shapes of a convolutional recurrence from 2 to 3 channels, with kernels of different sizes."""
    return {
        "w_x": (*kernel_size, 2, 3 * gates),
        "w_h": (*(k + 1 for k in kernel_size), 3, 3 * gates),
        **dict.fromkeys(("b", "b_x", "b_h"), (3 * gates,)),
    }


def _conv_recurrence_variants(params: type, gates: int, state: type | None, *, time: bool) -> dict[str, Variant]:
    """Return variants over 1 to 3 spatial axes, and for a sequence also with time options."""

    def variant(
        kernel_size: tuple[int, ...],
        space: tuple[int, ...],
        outputs: tuple[int, ...],
        *masks: str,
        bias: bool = True,
        carry: bool = True,
        **options: object,
    ) -> Variant:
        example = partial(
            _recurrence_example,
            params=params,
            state=state,
            shapes=_kernels(gates, *kernel_size),
            features=(*space, 2),
            states=((*outputs, 3),) * (1 if state is None else 2),
            time=time,
            bias=bias,
            carry=carry,
            masks=masks,
            batch_first=options.get("time_axis", 0) == 1,
        )
        return Variant(example, options, masks)

    found = {
        "1d": variant((2,), (6,), (6,)),
        "2d strided": variant((3, 2), (5, 4), (3, 4), stride=(2, 1), bias=False),
    }
    if not time:
        return found
    return found | {
        "3d": variant((2, 1, 2), (3, 2, 4), (2, 2, 1), padding="VALID", dilation=(1, 1, 3), carry=False),
        "1d truncation, reverse": variant((2,), (6,), (6,), truncation=3, reverse=True),
        "1d lengths, resets, checkpoint": variant((3,), (4,), (4,), "lengths", "resets", checkpoint=3, time_axis=1),
    }


class _LeakyParams(NamedTuple):
    """Parameters of the user-defined cell `_LEAKY`."""

    w_x: jax.Array
    w_h: jax.Array
    b: jax.Array
    rate: jax.Array
    gain: jax.Array


def _leaky_step(a: tuple[jax.Array], h: jax.Array, p: _LeakyParams) -> jax.Array:
    rate, gain = jnp.expand_dims(jax.nn.sigmoid(p.rate), range(h.ndim - 1)), p.gain
    return (1 - rate) * h + rate * jnp.tanh(gain * a[0])


class _TwiceParams(NamedTuple):
    """Parameters of the user-defined cell `_TWICE`, which has a product inside the step and two leaves of state."""

    w_x: jax.Array
    w_h: jax.Array
    b_x: jax.Array
    b_h: jax.Array
    w_q: jax.Array
    rate: jax.Array


class _TwiceState(NamedTuple):
    h: jax.Array
    s: jax.Array


def _twice_step(
    a: tuple[tuple[jax.Array, jax.Array], jax.Array],
    state: _TwiceState,
    p: _TwiceParams,
    L: Callable[[jax.Array], jax.Array],
) -> _TwiceState:
    (u, r), v = a
    s = jnp.expand_dims(p.rate, range(v.ndim - 1)) * state.s + jnp.tanh(u * r)
    return _TwiceState(jnp.sin(L(s * v)) + state.h, s)


_LEAKY = Cell("leaky", gates="h", step=_leaky_step, params=_LeakyParams)
_TWICE = Cell(
    "twice", gates="gv", split_gates="g", input_only_gates="v", step=_twice_step, params=_TwiceParams, state=_TwiceState
)


class _Sizes(TypedDict, total=False):
    """Options of `_recurrence_example` that differ between cells."""

    gates: int
    state: type
    shapes: Mapping[str, tuple[int, ...]]
    features: tuple[int, ...]
    states: tuple[tuple[int, ...], ...]
    more_blocks: tuple[str, ...]
    positive: tuple[str, ...]


def _cell_variants(*, time: bool) -> dict[str, Variant]:
    """Return variants for two user-defined cells and every cell of `jaxseq.cells` without a dedicated op.

    Each cell has one combination of time options, in turn.
    """
    lstm: _Sizes = {"gates": 4, "state": LSTMState}
    H = (5,)
    norm = dict.fromkeys(("gain_x", "gain_h", "shift", "shift_x", "shift_h"))
    known: dict[str, tuple[Cell, _Sizes]] = {
        "leaky": (_LEAKY, {"shapes": {"rate": H, "gain": ()}}),
        "twice": (
            _TWICE,
            {
                "gates": 2,
                "state": _TwiceState,
                "states": ((4,), H),
                "shapes": {"w_h": (4, 5), "b_h": H, "w_q": (5, 4), "rate": H},
            },
        ),
        "peephole_lstm": (cells.peephole_lstm, {**lstm, "shapes": dict.fromkeys(("p_i", "p_f", "p_o"), H)}),
        "projected_lstm": (
            cells.projected_lstm,
            {**lstm, "shapes": {"w_h": (4, 20), "w_q": (5, 4)}, "states": ((4,), H)},
        ),
        "layer_norm_lstm": (
            cells.layer_norm_lstm,
            {**lstm, "shapes": dict.fromkeys(norm, (20,)) | {"gain_c": H, "shift_c": H}},
        ),
        "layer_norm_gru": (cells.layer_norm_gru, {"gates": 3, "shapes": dict.fromkeys(norm, (15,))}),
        "classic_gru": (cells.classic_gru, {"gates": 3, "shapes": {"w_h": (5, 10), "w_q": (5, 5)}}),
        "mgu": (cells.mgu, {"gates": 2}),
        "indrnn": (cells.indrnn, {"shapes": {"w_h": (1, 5)}}),
        "slstm": (
            cells.slstm,
            {
                "gates": 4,
                "state": cells.SLSTMState,
                "states": ((6,),) * 4,
                "more_blocks": ("w_h",),
                "positive": ("n",),
                "shapes": {"w_x": (3, 24), "w_h": (2, 3, 4, 3), "b": (24,)},
            },
        ),
        "lstm from a convolution": (
            cells.lstm._replace(name="lstm from a convolution", input=linear_maps.Conv(), recurrent=linear_maps.Conv()),
            {**lstm, "shapes": _kernels(4, 2), "features": (4, 2), "states": ((4, 3),) * 2},
        ),
    }
    options: list[tuple[tuple[str, ...], dict[str, object]]] = [
        (("resets",), {"truncation": 3, "reverse": True}),
        (("lengths",), {"checkpoint": 3}),
        ((), {"truncation": (2, 3)}),
        (("lengths", "resets"), {"reverse": True}),
    ]
    found = {}
    for i, (name, (cell, sizes)) in enumerate(known.items()):
        example = partial(_recurrence_example, params=cell.params, time=time, **sizes)
        found[name] = Variant(example, {}, first=(cell,))
        if time:
            masks, more = options[i % len(options)]
            label = ", ".join([*masks, *more])
            found[f"{name}, {label}"] = Variant(partial(example, masks=masks), more, masks, (cell,))
    return found


def _linear_cell_example(
    key: PRNGKeyArray,
    *,
    dtype: DTypeLike,
    batch: tuple[int, ...],
    length: int,
    params: type,
    shapes: tuple[tuple[int, ...], ...],
    state: int,
    is_complex: bool = False,
    time: bool = True,
    masks: tuple[str, ...] = (),
    width: int = 1,
) -> Args:
    """Return random `(params, carry, x, *masks)` for a linear cell with 4 features.

    `shapes` has the shape of each parameter. `width` multiplies all sizes but those of one or two. A complex carry is
    None, a state of zeros.
    """
    generator = _generator(key)
    draw = _normals(generator, dtype)
    wide = lambda n: n if n < 3 else n * width  # noqa: E731
    scale = lambda shape: width**-0.5 if len(shape) > 1 else 1.0  # noqa: E731
    weights = params(*(draw(*map(wide, shape), scale=scale(shape)) for shape in shapes))
    first = draw(*batch, state * width)
    sizes = (length, *batch) if time else batch
    x = draw(*sizes, 4 * width)
    resets = _marks(generator, 0.2, sizes)
    resets[:1] = False
    drawn = {"lengths": _lengths(generator, batch, length), "resets": resets}
    return weights, None if is_complex else first, x, *(jax.device_put(drawn[name]) for name in masks)


class _LinearSizes(TypedDict, total=False):
    """Options of `_linear_cell_example` that differ between cells."""

    shapes: tuple[tuple[int, ...], ...]
    state: int
    is_complex: bool


def _linear_cell_variants(*, time: bool) -> dict[str, Variant]:
    """Return variants for every linear cell of `jaxseq.cells`, with one combination of time options each."""
    of_complex: _LinearSizes = {
        "shapes": ((5,), (5,), (5,), (4, 10), (10, 4), (4,)),
        "state": 5,
        "is_complex": True,
    }
    known: dict[str, tuple[LinearCell, _LinearSizes]] = {
        "min_gru": (cells.min_gru, {"shapes": ((4, 10), (10,)), "state": 5}),
        "min_lstm": (cells.min_lstm, {"shapes": ((4, 15), (15,)), "state": 5}),
        "lru": (cells.lru, of_complex),
        "s5": (cells.s5, of_complex),
        "s5_bilinear": (cells.s5_bilinear, of_complex),
        "rg_lru": (cells.rg_lru, {"shapes": ((4,), (1, 4, 2, 4), (8,)), "state": 4}),
        "selective_ssm": (
            cells.selective_ssm,
            {"shapes": ((4, 2), (2, 4), (4,), (4, 2), (4, 2), (4, 2), (4,)), "state": 8},
        ),
    }
    options: list[tuple[tuple[str, ...], dict[str, object]]] = [
        (("resets",), {"truncation": 3, "reverse": True}),
        (("lengths",), {"checkpoint": 3}),
        ((), {"truncation": (2, 3)}),
        (("lengths", "resets"), {"reverse": True}),
    ]
    found = {}
    for i, (name, (cell, sizes)) in enumerate(known.items()):
        example = partial(_linear_cell_example, params=cell.params, time=time, **sizes)
        if not time:
            found[name] = Variant(example, {}, first=(cell,))
            continue
        masks, more = options[i % len(options)]
        label = ", ".join([name, *masks, *more])
        found[label] = Variant(partial(example, masks=masks), more, masks, (cell,))
    return found


def _linear_example(
    key: PRNGKeyArray,
    *,
    dtype: DTypeLike,
    batch: tuple[int, ...],
    length: int,
    width: int = 1,
    constant: bool = False,
    carry: bool = True,
    masks: tuple[str, ...] = (),
    batch_first: bool = False,
) -> Args:
    """Return random `(a, carry, x, *masks)` for a linear recurrence, with factors that may be larger than 1."""
    generator, H = _generator(key), 5 * width
    draw = _normals(generator, dtype)
    sizes = (*batch, length) if batch_first else (length, *batch)
    a, first, x = draw(*(() if constant else sizes), H, scale=1.4), draw(*batch, H), draw(*sizes, H)
    drawn = {"lengths": _lengths(generator, batch, length), "resets": _marks(generator, 0.2, sizes)}
    drawn["resets"][(slice(None),) * (len(batch) if batch_first else 0) + (0,)] = False
    return a, first if carry else None, x, *(jax.device_put(drawn[name]) for name in masks)


def _linear_variants() -> dict[str, Variant]:
    def variant(*masks: str, constant: bool = False, carry: bool = True, **options: object) -> Variant:
        batch_first = options.get("time_axis", 0) == 1
        example = partial(_linear_example, masks=masks, constant=constant, carry=carry, batch_first=batch_first)
        return Variant(example, options, masks)

    return {
        "plain": variant(),
        "constant, zero carry, reverse": variant(constant=True, carry=False, reverse=True),
        "lengths, resets, reverse": variant("lengths", "resets", reverse=True),
        "truncation, reverse": variant(constant=True, truncation=2, reverse=True, unroll=2),
        "overlapping windows": variant(constant=True, truncation=(2, 5)),
        "batch first, resets, checkpoint": variant("resets", time_axis=1, checkpoint=3),
    }


def _layer_example(
    key: PRNGKeyArray,
    *,
    dtype: DTypeLike,
    batch: tuple[int, ...],
    length: int,
    width: int = 1,
    kind: str,
    carry: bool = True,
    bias: bool = True,
    time: bool = True,
    masks: tuple[str, ...] = (),
    batch_first: bool = False,
) -> Args:
    """Return random `(params, carry, xs, *masks)` for an mLSTM with 2 heads, or a QRNN with 3 taps, of 4 features."""
    generator, D = _generator(key), 4 * width
    draw = _normals(generator, dtype)
    scale = D**-0.5
    params: PyTree
    first: PyTree
    if kind == "mlstm":
        N, K, V = 2, 3 * width, 2 * width
        sizes_of = {"w_q": (N, K), "w_k": (N, K), "w_v": (N, V), "w_o": (N, V), "w_i": (N,), "w_f": (N,)}
        weights: dict[str, Any] = {f: draw(D, *shape, scale=scale) for f, shape in sizes_of.items()}
        biases = {"b_i": draw(N), "b_f": draw(N) + 1, "b_o": draw(N, V)}
        params = MLSTMParams(**weights | (biases if bias else dict.fromkeys(biases)))
        first = MLSTMState(draw(*batch, N, K, V), draw(*batch, N, K), draw(*batch, N) + 2)
    else:
        H, taps = 5 * width, 3
        params = QRNNParams(draw(taps, D, 3 * H, scale=scale), draw(3 * H) if bias else None)
        first = QRNNState(draw(*batch, taps - 1, D), draw(*batch, H))
    sizes = ((*batch, length) if batch_first else (length, *batch)) if time else batch
    x, resets = draw(*sizes, D), _marks(generator, 0.2, sizes)
    resets[(slice(None),) * (len(batch) if batch_first else 0) + (slice(1),)] = False
    drawn = {"lengths": _lengths(generator, batch, length), "resets": resets}
    return params, first if carry else None, x, *(jax.device_put(drawn[name]) for name in masks)


def _layer_variants(kind: str, *, time: bool = True) -> dict[str, Variant]:
    def variant(*masks: str, carry: bool = True, bias: bool = True, **options: object) -> Variant:
        batch_first = options.get("time_axis", 0) == 1
        sizes = {"kind": kind, "carry": carry, "bias": bias, "time": time, "masks": masks, "batch_first": batch_first}
        return Variant(partial(_layer_example, **sizes), options, masks)

    if not time:
        return {"plain": variant(), "no bias, zero carry": variant(carry=False, bias=False)}
    return {
        "plain": variant(),
        "no bias, zero carry, reverse": variant(carry=False, bias=False, reverse=True),
        "lengths, resets, reverse": variant("lengths", "resets", reverse=True),
        "batch first, resets, checkpoint": variant("resets", time_axis=1, checkpoint=3),
        "truncation": variant(truncation=2),
        "overlapping windows, resets": variant("resets", truncation=(2, 3)),
    }


class _Leaky(NamedTuple):
    """State of `_scan_step`."""

    h: jax.Array
    slow: jax.Array


def _scan_step(params: RNNParams, s: _Leaky, x: jax.Array) -> tuple[_Leaky, tuple[jax.Array, jax.Array]]:
    h = jnp.tanh(x @ params.w_x + s.h @ params.w_h + jnp.broadcast_to(jnp.asarray(params.b), s.h.shape))
    slow = 0.8 * s.slow + jnp.sin(h)
    return _Leaky(h * slow, slow), (h - s.slow, jnp.sum(s.h * h, -1))


def _scan_variants() -> dict[str, Variant]:
    """Return variants of a step that closes over the parameters it is differentiated with respect to."""

    def example(key: PRNGKeyArray, *, dtype: DTypeLike, batch: tuple[int, ...], length: int, width: int = 1) -> Args:
        draw, D, H = _normals(_generator(key), dtype), 3 * width, 5 * width
        params = RNNParams(draw(D, H, scale=width**-0.5), draw(H, H, scale=width**-0.5), draw(H))
        return params, _Leaky(draw(*batch, H), draw(*batch, H)), draw(length, *batch, D)

    def call(scan: Op) -> Op:
        return wraps(scan)(lambda params, init, xs, **options: scan(partial(_scan_step, params), init, xs, **options))

    options: dict[str, dict[str, object]] = {
        "truncation": {"truncation": 3},
        "plain": {"reverse": True},
        "checkpoint": {"checkpoint": 3},
        "truncation, reverse, checkpoint": {"truncation": 2, "reverse": True, "checkpoint": 5},
        "overlapping windows": {"truncation": (2, 3), "unroll": 2},
        "overlapping windows, segments": {"truncation": (2, 5), "checkpoint": 2, "reverse": True},
    }
    return {label: Variant(example, chosen, call=call) for label, chosen in options.items()}


CASES: dict[str, Case] = {
    "conv": Case(
        conv,
        reference.conv,
        _conv_variants(transposed=False),
        quick=(
            "1d",
            "lengths",
            "dilated beyond the outputs",
            "depthwise",
            "depthwise, depth multiplier 2",
            "depthwise, long",
            "grouped, direct",
            "2d",
            "2d depthwise, long",
            "3d, overlapping patches",
        ),
    ),
    "conv_transpose": Case(
        conv_transpose,
        reference.conv_transpose,
        _conv_variants(transposed=True),
        quick=("output padding, grouped", "2d depthwise, long"),
    ),
    "depthwise_conv": Case(
        depthwise_conv, reference.depthwise_conv, _separable_variants(pointwise=False), quick=("2d strided, flipped",)
    ),
    "separable_conv": Case(
        separable_conv,
        reference.separable_conv,
        _separable_variants(pointwise=True),
        quick=("1d, depth multiplier 2",),
    ),
    "causal_conv": Case(
        causal_conv,
        reference.causal_conv,
        _causal_variants(),
        quick=("no carry", "resets, grouped, no carry", "resets, depthwise, dilated", "lengths, resets, long"),
    ),
    "rnn": Case(
        rnn,
        reference.rnn,
        {
            **_time_variants(_RNN),
            "relu": Variant(_RNN, {"activation": "relu", "truncation": 4}),
            "gelu": Variant(_RNN, {"activation": jax.nn.gelu}),
        },
        quick=("overlapping windows", "checkpoint, overlapping windows", "lengths, resets, reverse"),
    ),
    "rnn_cell": Case(
        rnn_cell,
        reference.rnn_cell,
        {
            **_step_variants(_RNN),
            "relu": Variant(partial(_RNN, time=False), {"activation": "relu"}),
            "gelu": Variant(partial(_RNN, time=False), {"activation": jax.nn.gelu}),
        },
        quick=("plain",),
    ),
    "gru": Case(gru, reference.gru, _time_variants(_GRU), quick=("no bias, zero carry",)),
    "gru_cell": Case(gru_cell, reference.gru_cell, _step_variants(_GRU), quick=("plain",)),
    "lstm": Case(
        lstm,
        reference.lstm,
        {**_time_variants(_LSTM), **_state_variants(_LSTM)},
        quick=(
            "batch first, lengths, checkpoint",
            "recurrent dropout, zoneout",
            "states, reset state, lengths",
            "states, reset state, reverse",
        ),
    ),
    "lstm_cell": Case(lstm_cell, reference.lstm_cell, _step_variants(_LSTM), quick=("plain",)),
    "conv_gru": Case(
        conv_gru, reference.conv_gru, _conv_recurrence_variants(GRUParams, 3, None, time=True), quick=("1d",)
    ),
    "conv_gru_cell": Case(
        conv_gru_cell,
        reference.conv_gru_cell,
        _conv_recurrence_variants(GRUParams, 3, None, time=False),
        quick=("1d",),
    ),
    "conv_lstm": Case(
        conv_lstm, reference.conv_lstm, _conv_recurrence_variants(LSTMParams, 4, LSTMState, time=True), quick=("1d",)
    ),
    "conv_lstm_cell": Case(
        conv_lstm_cell,
        reference.conv_lstm_cell,
        _conv_recurrence_variants(LSTMParams, 4, LSTMState, time=False),
        quick=("1d",),
    ),
    "bidirectional": Case(
        bidirectional,
        reference.bidirectional,
        {
            "lstm": Variant(partial(_layers_example, layers=(_LSTM, _LSTM)), {}, (), (lstm,), (reference.lstm,)),
            "rnn and gru, lengths, checkpoint": Variant(
                partial(_layers_example, layers=(_RNN, _GRU), masks=("lengths",)),
                {"checkpoint": 3},
                ("lengths",),
                ((rnn, gru),),
                ((reference.rnn, reference.gru),),
            ),
        },
        quick=("lstm",),
    ),
    "stack": Case(
        stack,
        reference.stack,
        {
            "gru": Variant(
                partial(_layers_example, layers=(_SQUARE_GRU, _SQUARE_GRU)),
                {"residual": True},
                (),
                (gru,),
                (reference.gru,),
            ),
            "bidirectional lstm, dropout, resets": Variant(
                partial(
                    _layers_example,
                    layers=((_LSTM, _LSTM), (partial(_LSTM, shapes={"w_x": (10, 20)}),) * 2),
                    masks=("resets",),
                ),
                {"dropout": 0.2, "recurrent_dropout": 0.2, "zoneout": 0.1, "key": _KEY},
                ("resets",),
                (partial(bidirectional, lstm),),
                (partial(reference.bidirectional, reference.lstm),),
            ),
        },
        quick=("gru",),
    ),
    "linear_recurrence": Case(
        linear_recurrence,
        reference.linear_recurrence,
        _linear_variants(),
        quick=("lengths, resets, reverse", "overlapping windows", "batch first, resets, checkpoint"),
    ),
    "mlstm": Case(
        mlstm,
        reference.mlstm,
        _layer_variants("mlstm"),
        quick=("lengths, resets, reverse", "overlapping windows, resets"),
    ),
    "qrnn": Case(
        qrnn,
        reference.qrnn,
        _layer_variants("qrnn"),
        quick=("lengths, resets, reverse", "truncation", "overlapping windows, resets"),
    ),
    **{
        f"{name}_cell": Case(op, plain, _layer_variants(name, time=False), quick=("plain",))
        for name, op, plain in (("mlstm", mlstm_cell, reference.mlstm_cell), ("qrnn", qrnn_cell, reference.qrnn_cell))
    },
    "scan": Case(
        scan,
        reference.scan,
        _scan_variants(),
        quick=("plain", "truncation", "checkpoint", "truncation, reverse, checkpoint", "overlapping windows"),
    ),
    "recurrence": Case(
        recurrence,
        reference.recurrence,
        {**_cell_variants(time=True), **_linear_cell_variants(time=True)},
        quick=(
            "leaky",
            "min_gru, resets, truncation, reverse",
            "min_lstm, lengths, checkpoint",
            "lru, truncation",
            "s5, lengths, resets, reverse",
            "selective_ssm, truncation",
        ),
    ),
    "recurrence_cell": Case(
        recurrence_cell,
        reference.recurrence_cell,
        {**_cell_variants(time=False), **_linear_cell_variants(time=False)},
        quick=(
            "twice",
            "peephole_lstm",
            "projected_lstm",
            "layer_norm_lstm",
            "layer_norm_gru",
            "classic_gru",
            "mgu",
            "indrnn",
            "slstm",
            "s5_bilinear",
            "rg_lru",
        ),
    ),
}
