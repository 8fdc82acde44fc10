"""Reference implementations of recurrences: the equations of each cell, step by step."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jax import lax
from jax.lax import PrecisionLike
from jaxtyping import Array, Float, PyTree

from jaxseq import linear_maps
from jaxseq._precision import accumulator, cast_like, promote
from jaxseq._recurrence._cell import Cell
from jaxseq._recurrence._linear_cell import LinearCell
from jaxseq._time_options import TimeOptions
from jaxseq._types import GRUParams, LSTMParams, LSTMState, RNNParams
from jaxseq.reference._convolution import conv
from jaxseq.reference._time import expand_mask, through_time


def rnn(
    params: RNNParams,
    carry: Float[Array, "*batch H"] | None,
    xs: Float[Array, "*time_and_batch D"],
    *,
    activation: str | Callable[[jax.Array], jax.Array] = "tanh",
    **time: Unpack[TimeOptions],
) -> tuple[Float[Array, "*batch H"], Float[Array, "*time_and_batch H"]]:
    """Reference implementation of `jaxseq.rnn`."""
    return through_time(partial(_rnn_cell, params, activation=activation), carry, xs, **time)


def _rnn_cell(
    params: PyTree,
    carry: PyTree,
    x: PyTree,
    *,
    activation: str | Callable[[jax.Array], jax.Array] = "tanh",
    precision: PrecisionLike,
    recurrent_dropout_mask: PyTree = None,
) -> PyTree:
    h = _zeros(params, x) if carry is None else carry
    a = _affine(x, params.w_x, params.b, precision) + _affine(
        _dropped(recurrent_dropout_mask, h), params.w_h, None, precision
    )
    relu = lambda a: jnp.where(a <= 0, 0, a)  # noqa: E731  # jax.nn.relu has a custom rule
    new = activation(a) if callable(activation) else {"tanh": jnp.tanh, "relu": relu}[activation](a)
    return new.astype(h.dtype), new.astype(x.dtype)


def rnn_cell(
    params: RNNParams,
    carry: Float[Array, "*batch H"] | None,
    x: Float[Array, "*batch D"],
    *,
    activation: str | Callable[[jax.Array], jax.Array] = "tanh",
    precision: PrecisionLike = None,
) -> tuple[Float[Array, "*batch H"], Float[Array, "*batch H"]]:
    """Reference implementation of `jaxseq.rnn_cell`."""
    return _rnn_cell(params, carry, x, activation=activation, precision=precision)


def gru(
    params: GRUParams,
    carry: Float[Array, "*batch H"] | None,
    xs: Float[Array, "*time_and_batch D"],
    **time: Unpack[TimeOptions],
) -> tuple[Float[Array, "*batch H"], Float[Array, "*time_and_batch H"]]:
    """Reference implementation of `jaxseq.gru`."""
    return through_time(partial(_gru_cell, params), carry, xs, **time)


def _gru_cell(
    params: PyTree, carry: PyTree, x: PyTree, *, precision: PrecisionLike, recurrent_dropout_mask: PyTree = None
) -> PyTree:
    h = _zeros(params, x) if carry is None else carry
    return _gru_step(
        _affine(x, params.w_x, params.b_x, precision),
        _affine(_dropped(recurrent_dropout_mask, h), params.w_h, params.b_h, precision),
        h,
        x,
    )


def gru_cell(
    params: GRUParams,
    carry: Float[Array, "*batch H"] | None,
    x: Float[Array, "*batch D"],
    *,
    precision: PrecisionLike = None,
) -> tuple[Float[Array, "*batch H"], Float[Array, "*batch H"]]:
    """Reference implementation of `jaxseq.gru_cell`."""
    return _gru_cell(params, carry, x, precision=precision)


def _gru_step(u: jax.Array, recurrent: jax.Array, h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Apply the equations of a GRU to the outputs `u` and `recurrent` of its maps."""
    u_r, u_z, u_n = jnp.split(u, 3, axis=-1)
    r_r, r_z, r_n = jnp.split(recurrent, 3, axis=-1)
    r, z = jax.nn.sigmoid(u_r + r_r), jax.nn.sigmoid(u_z + r_z)
    n = jnp.tanh(u_n + r * r_n)
    new = (1 - z) * n + z * h.astype(z.dtype)
    return new.astype(h.dtype), new.astype(x.dtype)


def lstm(
    params: LSTMParams,
    carry: LSTMState | None,
    xs: Float[Array, "*time_and_batch D"],
    **time: Unpack[TimeOptions],
) -> tuple[LSTMState, Float[Array, "*time_and_batch H"]]:
    """Reference implementation of `jaxseq.lstm`."""
    return through_time(partial(_lstm_cell, params), carry, xs, **time)


def _lstm_cell(
    params: PyTree, carry: PyTree, x: PyTree, *, precision: PrecisionLike, recurrent_dropout_mask: PyTree = None
) -> PyTree:
    state = LSTMState(_zeros(params, x), _zeros(params, x)) if carry is None else carry
    a = _affine(x, params.w_x, params.b, precision) + _affine(
        _dropped(recurrent_dropout_mask, state.h), params.w_h, None, precision
    )
    return _lstm_step(a, state, x)


def lstm_cell(
    params: LSTMParams, carry: LSTMState | None, x: Float[Array, "*batch D"], *, precision: PrecisionLike = None
) -> tuple[LSTMState, Float[Array, "*batch H"]]:
    """Reference implementation of `jaxseq.lstm_cell`."""
    return _lstm_cell(params, carry, x, precision=precision)


def _lstm_step(a: jax.Array, state: LSTMState, x: jax.Array) -> tuple[LSTMState, jax.Array]:
    """Apply the equations of an LSTM to the pre-activations `a`."""
    a_i, a_f, a_g, a_o = jnp.split(a, 4, axis=-1)
    i, f, g, o = jax.nn.sigmoid(a_i), jax.nn.sigmoid(a_f), jnp.tanh(a_g), jax.nn.sigmoid(a_o)
    c = f * state.c.astype(f.dtype) + i * g
    h = o * jnp.tanh(c)
    return cast_like(LSTMState(h, c), state), h.astype(x.dtype)


def conv_gru(
    params: GRUParams,
    carry: Float[Array, "*batch_and_outputs F"] | None,
    xs: Float[Array, "*time_batch_and_space C"],
    *,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[tuple[int, int]] = "SAME",
    dilation: int | Sequence[int] = 1,
    **time: Unpack[TimeOptions],
) -> tuple[Float[Array, "*batch_and_outputs F"], Float[Array, "*time_batch_and_outputs F"]]:
    """Reference implementation of `jaxseq.conv_gru`."""
    cell = partial(_conv_gru_cell, params, stride=stride, padding=padding, dilation=dilation)
    return through_time(cell, carry, xs, features=params.w_x.ndim - 1, **time)


def _conv_gru_cell(
    params: PyTree,
    carry: PyTree,
    x: PyTree,
    *,
    precision: PrecisionLike,
    recurrent_dropout_mask: PyTree = None,
    **options: PyTree,
) -> PyTree:
    u = conv(_wide(x), params.w_x, params.b_x, **options, precision=precision)
    h = jnp.zeros((*u.shape[:-1], params.w_h.shape[-2]), accumulator(x.dtype)) if carry is None else carry
    return _gru_step(
        u,
        conv(_wide(_dropped(recurrent_dropout_mask, h)), params.w_h, params.b_h, padding="SAME", precision=precision),
        h,
        x,
    )


def conv_gru_cell(
    params: GRUParams,
    carry: Float[Array, "*batch_and_outputs F"] | None,
    x: Float[Array, "*batch_and_space C"],
    *,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[tuple[int, int]] = "SAME",
    dilation: int | Sequence[int] = 1,
    precision: PrecisionLike = None,
) -> tuple[Float[Array, "*batch_and_outputs F"], Float[Array, "*batch_and_outputs F"]]:
    """Reference implementation of `jaxseq.conv_gru_cell`."""
    return _conv_gru_cell(params, carry, x, stride=stride, padding=padding, dilation=dilation, precision=precision)


def conv_lstm(
    params: LSTMParams,
    carry: LSTMState | None,
    xs: Float[Array, "*time_batch_and_space C"],
    *,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[tuple[int, int]] = "SAME",
    dilation: int | Sequence[int] = 1,
    **time: Unpack[TimeOptions],
) -> tuple[LSTMState, Float[Array, "*time_batch_and_outputs F"]]:
    """Reference implementation of `jaxseq.conv_lstm`."""
    cell = partial(_conv_lstm_cell, params, stride=stride, padding=padding, dilation=dilation)
    return through_time(cell, carry, xs, features=params.w_x.ndim - 1, **time)


def _conv_lstm_cell(
    params: PyTree,
    carry: PyTree,
    x: PyTree,
    *,
    precision: PrecisionLike,
    recurrent_dropout_mask: PyTree = None,
    **options: PyTree,
) -> PyTree:
    u = conv(_wide(x), params.w_x, params.b, **options, precision=precision)
    zero = jnp.zeros((*u.shape[:-1], params.w_h.shape[-2]), accumulator(x.dtype))
    state = LSTMState(zero, zero) if carry is None else carry
    return _lstm_step(
        u + conv(_wide(_dropped(recurrent_dropout_mask, state.h)), params.w_h, padding="SAME", precision=precision),
        state,
        x,
    )


def conv_lstm_cell(
    params: LSTMParams,
    carry: LSTMState | None,
    x: Float[Array, "*batch_and_space C"],
    *,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[tuple[int, int]] = "SAME",
    dilation: int | Sequence[int] = 1,
    precision: PrecisionLike = None,
) -> tuple[LSTMState, Float[Array, "*batch_and_outputs F"]]:
    """Reference implementation of `jaxseq.conv_lstm_cell`."""
    return _conv_lstm_cell(params, carry, x, stride=stride, padding=padding, dilation=dilation, precision=precision)


def recurrence(
    cell: Cell | LinearCell,
    params: PyTree,
    carry: PyTree | None,
    xs: Float[Array, "*time_batch_and_space D"] | tuple[PyTree, PyTree],
    **time: Unpack[TimeOptions],
) -> tuple[PyTree, Float[Array, "*time_batch_and_outputs H"]]:
    """Reference implementation of `jaxseq.recurrence`."""
    if isinstance(cell, LinearCell):
        y = partial(_linear_output, cell, params, time.get("precision"))
        return through_time(partial(_linear_cell, cell, params), carry, xs, output=y, **time)
    features = 1 + cell.input.dimensions(params.w_x)
    step = partial(_recurrence_cell, cell, params)
    return through_time(step, carry, xs, features=features, takes_valid_mask=True, **time)


def _recurrence_cell(
    cell: Cell,
    params: PyTree,
    carry: PyTree,
    x: PyTree,
    *,
    precision: PrecisionLike,
    recurrent_dropout_mask: PyTree = None,
    valid: PyTree = None,
) -> PyTree:
    fields = params._asdict()
    x, side = x if cell.side_inputs else (x, None)
    u = _linear(cell.input, params.w_x, fields.get("b", fields.get("b_x")), x, precision)
    us = jnp.split(u, len(cell.gates), -1)
    recurrent = len(cell.gates) - len(cell.input_only_gates)
    if carry is None:
        outputs, _ = cell.recurrent.channels(params.w_h, recurrent) or (0, 0)
        h = jnp.zeros((*u.shape[:-1], outputs), accumulator(x.dtype))
        other = jnp.zeros(us[0].shape, accumulator(x.dtype))
        carry = h if cell.state is None else cell.state(h, *(other for _ in cell.state._fields[1:]))  # type: ignore[attr-defined]
    h = jax.tree.leaves(carry)[0]
    rs = jnp.split(
        _linear(cell.recurrent, params.w_h, fields.get("b_h"), _dropped(recurrent_dropout_mask, h), precision),
        recurrent,
        -1,
    )

    a = []
    for gate, u in zip(cell.gates, us, strict=True):
        r = None if gate in cell.input_only_gates else rs[len(a)]
        a.append(u if r is None else (u, r) if gate in cell.split_gates else u + r)
    wide = lambda tree: jax.tree.map(lambda b: b.astype(us[0].dtype), tree)  # noqa: E731
    cell_params = (
        [params._replace(**{f: wide(v) if f in cell.cell_params else None for f, v in fields.items()})]
        if cell.cell_params
        else []
    )

    def step(valid: PyTree, a: PyTree, s: PyTree, side: PyTree) -> PyTree:
        """Apply the step of the cell. Where `valid` is False its arguments and inner product are zero, because an
        infinite derivative times a zero cotangent would be NaN.
        """

        def masked(tree: PyTree) -> PyTree:
            return tree if valid is None else jax.tree.map(lambda v: jnp.where(expand_mask(valid, v), v, 0), tree)

        inner = [lambda q: masked(_affine(masked(q), params.w_q, None, precision))] if "w_q" in fields else []
        new = cell.step(*masked((a, s, *cell_params)), *inner, *([masked(side)] if cell.side_inputs else []))
        return new if cell.pullback is None else new.state

    # The mask applies to the parameters of the cell as well, so each example needs a copy of them.
    for _ in range(0 if valid is None or not cell_params else valid.ndim):
        step = jax.vmap(step)
    new = step(valid, tuple(a), wide(carry), side)
    return cast_like(new, carry), jax.tree.leaves(new)[0].astype(x.dtype)


def _linear_cell(
    cell: LinearCell,
    params: PyTree,
    carry: PyTree,
    x: PyTree,
    *,
    precision: PrecisionLike,
    recurrent_dropout_mask: None = None,
) -> PyTree:
    """Apply one step of a linear cell: its coefficients are those of a sequence of one step."""
    p, wide = _wide_params(params, x)
    a, v = cell.coefficients(p, wide[None], partial(_product, precision))
    a = jnp.broadcast_to(jnp.expand_dims(a, range(v.ndim - a.ndim)), v.shape)[0].astype(v.dtype)
    h = jnp.zeros_like(v[0]) if carry is None else carry
    new = (a * h.astype(v.dtype) + v[0]).astype(h.dtype)
    return new, _linear_output(cell, params, precision, new, x).astype(x.dtype)


def _linear_output(cell: LinearCell, params: PyTree, precision: PrecisionLike, h: PyTree, x: PyTree) -> PyTree:
    p, wide = _wide_params(params, x)
    return h if cell.output is None else cell.output(p, h[None], wide[None], partial(_product, precision))[0]


def _wide_params(params: PyTree, x: jax.Array) -> tuple[PyTree, jax.Array]:
    dtype = accumulator(promote(*jax.tree.leaves(params), x))
    return jax.tree.map(lambda a: a.astype(dtype), params), x.astype(dtype)


def _product(
    precision: PrecisionLike, w: jax.Array, x: jax.Array, kind: linear_maps.LinearMap | None = None
) -> jax.Array:
    return _linear(linear_maps.Dense() if kind is None else kind, w, None, x, precision)


def recurrence_cell(
    cell: Cell | LinearCell,
    params: PyTree,
    carry: PyTree | None,
    x: Float[Array, "*batch_and_space D"] | tuple[PyTree, PyTree],
    *,
    precision: PrecisionLike = None,
) -> tuple[PyTree, Float[Array, "*batch_and_outputs H"]]:
    """Reference implementation of `jaxseq.recurrence_cell`: the step of the cell. Its pullback is not used."""
    if isinstance(cell, LinearCell):
        return _linear_cell(cell, params, carry, x, precision=precision)
    return _recurrence_cell(cell, params, carry, x, precision=precision)


def _linear(
    kind: linear_maps.LinearMap, w: jax.Array, b: jax.Array | None, x: jax.Array, precision: PrecisionLike
) -> jax.Array:
    """Apply a map of `jaxseq.linear_maps` with weights w and bias b to x, in the dtype of the accumulator."""
    if isinstance(kind, linear_maps.Dense):
        return _affine(x, w, b, precision)
    if isinstance(kind, linear_maps.Conv):
        options: dict[str, Any] = {"stride": kind.stride, "padding": kind.padding, "dilation": kind.dilation}
        return conv(_wide(x), w, b, **options, precision=precision)
    if isinstance(kind, linear_maps.Diagonal):
        wide, gains = _wide(x), w.astype(_wide(x).dtype)
        y = jnp.concatenate([wide * jnp.broadcast_to(gain, x.shape) for gain in gains], -1)
    elif isinstance(kind, linear_maps.BlockDiagonal):
        heads = jnp.split(x, w.shape[0], -1)
        y = jnp.concatenate(
            [_affine(head, w[n, :, g], None, precision) for g in range(w.shape[2]) for n, head in enumerate(heads)], -1
        )
    else:  # a user-defined map
        y = kind.product(precision, w, x)
    return y if b is None else y + jnp.broadcast_to(b.astype(y.dtype), y.shape)


def _wide(x: jax.Array) -> jax.Array:
    """Cast x to the dtype in which its products accumulate, so that nothing is rounded before the cell."""
    return x.astype(accumulator(x.dtype))


def _affine(x: jax.Array, w: jax.Array, b: jax.Array | None, precision: PrecisionLike) -> jax.Array:
    """Return x w + b, accumulated in at least float32."""
    common = promote(x, w)
    y = jnp.matmul(x.astype(common), w.astype(common), precision=precision, preferred_element_type=accumulator(common))
    return y if b is None else y + jnp.broadcast_to(b.astype(y.dtype), y.shape)


def _dropped(recurrent_dropout_mask: jax.Array | None, h: jax.Array) -> jax.Array:
    return h if recurrent_dropout_mask is None else h * lax.stop_gradient(recurrent_dropout_mask).astype(h.dtype)


def _zeros(params: PyTree, x: jax.Array) -> jax.Array:
    """Return the zero state for one input x (*B, D)."""
    return jnp.zeros((*x.shape[:-1], params.w_h.shape[0]), accumulator(x.dtype))
