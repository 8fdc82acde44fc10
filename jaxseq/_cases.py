"""Every public op once: its twin, and variants with random arguments.

What must hold for all ops runs over `CASES`, so that a new op gets every property test by one entry here. The
arguments are hard on purpose: non-zero biases and states, and sizes that are all different, since zero biases and
square weights hide wrong rules.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxseq import reference
from jaxseq._conv import conv
from jaxseq._conv_transpose import conv_transpose
from jaxseq._gru import GRUParams, gru, gru_cell
from jaxseq._lstm import LSTMParams, LSTMState, lstm, lstm_cell
from jaxseq._rnn import RNNParams, rnn, rnn_cell


class Variant(NamedTuple):
    """One way to call an op.

    Attributes:
        example: `(key, *, dtype, batch, length) -> args`: random arguments with the given batch axes, and `length`
            time steps or positions along the first spatial axis where the op has any.
        options: the keyword-only options.
    """

    example: Callable[..., tuple[Any, ...]]
    options: Mapping[str, Any]

    def arguments(self, key: Any, *, dtype: Any = jnp.float32, batch: tuple[int, ...] = (2,), length: int = 7) -> tuple:
        """Random arguments for the op and its twin."""
        return self.example(key, dtype=dtype, batch=batch, length=length)


class Case(NamedTuple):
    """A public op, the twin that defines it, and the variants under which the two are compared."""

    op: Callable[..., Any]
    twin: Callable[..., Any]
    variants: Mapping[str, Variant]


def _normals(key: Any, dtype: Any) -> Callable[..., jax.Array]:
    """Draws normal arrays of moderate size, each from a key of its own: `draw(*shape)`."""
    keys = iter(jax.random.split(key, 8))  # no op takes more
    return lambda *shape: (jax.random.normal(next(keys), shape) * 0.5).astype(dtype)


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
) -> tuple[Any, ...]:
    draw, D, H = _normals(key, dtype), 3, 5
    weights = params(
        draw(D, gates * H),
        draw(H, gates * H),
        *(draw(gates * H) if bias else None for _ in range(biases)),
    )
    h, c = draw(*batch, H), draw(*batch, H)
    first = h if state is None else state(h, c)
    x = draw(*((length,) if time else ()), *batch, D)
    return weights, first if carry else None, x


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
        "depthwise, two outputs a channel": variant((4, 1, 6), groups=3, padding=((3, 0),)),
        "depthwise, long": variant((33, 1, 3), groups=3, padding="CAUSAL", bias=False),
        "2d": variant((3, 2, 4, 6), padding="SAME", stride=(1, 2)),
        "2d grouped, dilated": variant(
            (2, 3, 2, 9), groups=3, dilation=(3, 1), padding=((1, 2), (-1, 3)), stride=(2, 1)
        ),
        "2d depthwise": variant((2, 3, 1, 4), groups=4, padding="SAME", stride=(1, 2), dilation=(2, 1)),
        "3d": variant((2, 3, 1, 3, 4), stride=(2, 1, 3), dilation=(1, 2, 1), padding=1),
    }


def _time_variants(example: Callable[..., tuple], **options: Any) -> dict[str, Variant]:
    """The time options, for a sequence op."""
    return {
        "plain": Variant(example, options),
        "no bias, zero carry": Variant(partial(example, bias=False, carry=False), options),
        "reverse": Variant(example, {**options, "reverse": True}),
        "truncation": Variant(example, {**options, "truncation": 3}),
        "truncation, reverse": Variant(example, {**options, "truncation": 2, "reverse": True, "unroll": 2}),
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
