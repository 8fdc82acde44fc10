"""The plain twin of every op: the equations as they stand in a textbook, differentiated by JAX.

Each function has the name, the signature and the meaning of the op it defines, and no custom rule anywhere below it.
It is the oracle of the tests, and the way for what a reverse rule can't do: `jax.jvp`, `jax.jacfwd`,
`jax.linearize`. It is written for reading, not for speed, and leaves the checking of arguments to the ops.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Inexact, PRNGKeyArray

from jaxseq import _geometry, _layers, maps
from jaxseq._gru import GRUParams
from jaxseq._lstm import LSTMParams, LSTMState
from jaxseq._precision import accumulator, cast_like, promote
from jaxseq._recurrence import Cell
from jaxseq._rnn import RNNParams
from jaxseq._time import Given, Time


def conv(
    x: Inexact[Array, "*batch_and_space c_in"],
    kernel: Inexact[Array, "*window c_in_per_group c_out"],
    bias: Inexact[Array, " c_out"] | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[tuple[int, int]] = "VALID",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    flip: bool = False,
    precision: Any = None,
) -> Inexact[Array, "*batch_and_outputs c_out"]:
    """The twin of `jaxseq.conv`: for each tap, a strided slice of the padded input times a matrix."""
    axes = kernel.ndim - 2
    space, window = x.shape[-axes - 1 : -1], kernel.shape[:axes]
    (per_in, c_out), batch = kernel.shape[axes:], x.shape[: -axes - 1]
    geometry = _geometry.resolve(space, window, stride, padding, dilation, groups)
    if flip:
        kernel = kernel[(slice(None, None, -1),) * axes]
    common = promote(x, kernel)
    pads = [(0, 0, 0)] * len(batch) + [(lo, hi, 0) for lo, hi in geometry.padding] + [(0, 0, 0)]
    padded = lax.pad(x.astype(common), jnp.zeros((), common), pads)
    outputs = _geometry.output_sizes(geometry, space, window)

    y = jnp.zeros((*batch, *outputs, c_out), accumulator(common))
    for tap in product(*map(range, window)):
        places = [
            slice(d * k, d * k + s * O, s)  # x[s n + d k], n = 0 .. O - 1
            for k, s, d, O in zip(tap, geometry.stride, geometry.dilation, outputs, strict=True)
        ]
        seen = padded[(..., *places, slice(None))].reshape(*batch, *outputs, groups, per_in)
        weight = kernel[tap].astype(common).reshape(per_in, groups, c_out // groups)
        term = jnp.einsum("...gi,igo->...go", seen, weight, precision=precision, preferred_element_type=y.dtype)
        y = y + term.reshape(y.shape)
    if bias is not None:
        y = y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)
    return y.astype(x.dtype)


def depthwise_conv(
    x: Inexact[Array, "*batch_and_space c_in"],
    kernel: Inexact[Array, "*window 1 c_out"],
    bias: Inexact[Array, " c_out"] | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[tuple[int, int]] = "VALID",
    dilation: int | Sequence[int] = 1,
    flip: bool = False,
    precision: Any = None,
) -> Inexact[Array, "*batch_and_outputs c_out"]:
    """The twin of `jaxseq.depthwise_conv`: a convolution for each channel, one after the other."""
    options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "flip": flip}
    r = kernel.shape[-1] // x.shape[-1]
    ys = [
        conv(x[..., c : c + 1], kernel[..., r * c : r * (c + 1)], **options, precision=precision)
        for c in range(x.shape[-1])
    ]
    y = jnp.concatenate(ys, -1)
    return y if bias is None else (y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)).astype(x.dtype)


def separable_conv(
    x: Inexact[Array, "*batch_and_space c_in"],
    depthwise: Inexact[Array, "*window 1 c_middle"],
    pointwise: Inexact[Array, "*ones c_middle c_out"],
    bias: Inexact[Array, " c_out"] | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[tuple[int, int]] = "VALID",
    dilation: int | Sequence[int] = 1,
    flip: bool = False,
    precision: Any = None,
) -> Inexact[Array, "*batch_and_outputs c_out"]:
    """The twin of `jaxseq.separable_conv`: the one after the other."""
    options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "flip": flip}
    u = depthwise_conv(x, depthwise, **options, precision=precision)
    return conv(u, pointwise, bias, precision=precision)


def conv_transpose(
    x: Inexact[Array, "*batch_and_space c_in"],
    kernel: Inexact[Array, "*window c_out_per_group c_in"],
    bias: Inexact[Array, " c_out"] | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[tuple[int, int]] = "VALID",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    output_padding: int | Sequence[int] = 0,
    precision: Any = None,
) -> Inexact[Array, "*batch_and_outputs c_out"]:
    """The twin of `jaxseq.conv_transpose`: for each tap, the input times a matrix, added where the tap falls."""
    axes = kernel.ndim - 2
    outputs, window = x.shape[-axes - 1 : -1], kernel.shape[:axes]
    (per_out, c_in), batch = kernel.shape[axes:], x.shape[: -axes - 1]
    geometry, space = _geometry.resolve_transposed(outputs, window, stride, padding, dilation, groups, output_padding)
    common = promote(x, kernel)
    groups = geometry.groups
    seen = x.astype(common).reshape(*batch, *outputs, groups, c_in // groups)

    whole = [
        max(0, s * (O - 1) + _geometry.extent(K, d))
        for O, K, s, d in zip(outputs, window, geometry.stride, geometry.dilation, strict=True)
    ]
    y = jnp.zeros((*batch, *whole, per_out * groups), accumulator(common))
    for tap in product(*map(range, window)):
        places = [
            slice(d * k, d * k + s * O, s)  # y[s n + d k], n = 0 .. O - 1
            for k, s, d, O in zip(tap, geometry.stride, geometry.dilation, outputs, strict=True)
        ]
        weight = kernel[tap].astype(common).reshape(per_out, groups, c_in // groups)
        term = jnp.einsum("...go,igo->...gi", seen, weight, precision=precision, preferred_element_type=y.dtype)
        y = y.at[(..., *places, slice(None))].add(term.reshape(*batch, *outputs, per_out * groups))
    crop = [(-lo, size + lo - L, 0) for (lo, _), size, L in zip(geometry.padding, space, whole, strict=True)]
    y = lax.pad(y, jnp.zeros((), y.dtype), [(0, 0, 0)] * len(batch) + crop + [(0, 0, 0)])
    if bias is not None:
        y = y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)
    return y.astype(x.dtype)


def causal_conv(
    carry: Inexact[Array, "*batch reach c_in"] | None,
    x: Inexact[Array, "*batch T c_in"],
    kernel: Inexact[Array, "window c_in_per_group c_out"],
    bias: Inexact[Array, " c_out"] | None = None,
    *,
    dilation: int = 1,
    groups: int = 1,
    resets: Bool[Array, "*batch T"] | None = None,
    precision: Any = None,
) -> tuple[Inexact[Array, "*batch reach c_in"], Inexact[Array, "*batch T c_out"]]:
    """The twin of `jaxseq.causal_conv`: for each tap, what is of the same episode as the output, times a matrix."""
    (K, per_in, c_out), (*batch, T, c_in) = kernel.shape, x.shape
    reach = (K - 1) * dilation
    carry = jnp.zeros((*batch, reach, c_in), x.dtype) if carry is None else carry
    common = promote(carry, x, kernel)
    z = jnp.concatenate([carry.astype(common), x.astype(common)], -2)
    # The number of the episode, all of the carry in the first.
    started = jnp.zeros((*batch, T), bool) if resets is None else resets
    episode = jnp.cumsum(jnp.concatenate([jnp.zeros((*batch, reach), bool), started], -1), -1)

    def seen_from(now: jax.Array, start: int, stop: int) -> jax.Array:
        same = episode[..., start:stop] == now
        return jnp.where(same[..., None], z[..., start:stop, :], 0)

    y = jnp.zeros((*batch, T, c_out), accumulator(common))
    for k in range(K):
        seen = seen_from(episode[..., reach:], dilation * k, dilation * k + T).reshape(*batch, T, groups, per_in)
        weight = kernel[k].astype(common).reshape(per_in, groups, c_out // groups)
        term = jnp.einsum("...gi,igo->...go", seen, weight, precision=precision, preferred_element_type=y.dtype)
        y = y + term.reshape(y.shape)
    if bias is not None:
        y = y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)
    return seen_from(episode[..., -1:], T, T + reach).astype(carry.dtype), y.astype(x.dtype)


def rnn(
    params: RNNParams,
    carry: Float[Array, "*batch H"] | None,
    xs: Float[Array, "T *batch D"],
    *,
    activation: str = "tanh",
    **time: Unpack[Time],
) -> tuple[Float[Array, "*batch H"], Float[Array, "T *batch H"]]:
    """The twin of `jaxseq.rnn`."""
    return _through_time(partial(_rnn_cell, params, activation=activation), carry, xs, **time)


def _rnn_cell(params: Any, carry: Any, x: Any, *, activation: str = "tanh", precision: Any, drop: Any = None) -> Any:
    h = _zeros(params, x) if carry is None else carry
    a = _affine(x, params.w_x, params.b, precision) + _affine(_dropped(drop, h), params.w_h, None, precision)
    new = jnp.tanh(a) if activation == "tanh" else jnp.where(a <= 0, 0, a)  # relu without jax.nn's custom rule
    return new.astype(h.dtype), new.astype(x.dtype)


def rnn_cell(
    params: RNNParams,
    carry: Float[Array, "*batch H"] | None,
    x: Float[Array, "*batch D"],
    *,
    activation: str = "tanh",
    precision: Any = None,
) -> tuple[Float[Array, "*batch H"], Float[Array, "*batch H"]]:
    """The twin of `jaxseq.rnn_cell`."""
    return _rnn_cell(params, carry, x, activation=activation, precision=precision)


def gru(
    params: GRUParams,
    carry: Float[Array, "*batch H"] | None,
    xs: Float[Array, "T *batch D"],
    **time: Unpack[Time],
) -> tuple[Float[Array, "*batch H"], Float[Array, "T *batch H"]]:
    """The twin of `jaxseq.gru`."""
    return _through_time(partial(_gru_cell, params), carry, xs, **time)


def _gru_cell(params: Any, carry: Any, x: Any, *, precision: Any, drop: Any = None) -> Any:
    h = _zeros(params, x) if carry is None else carry
    return _gru_step(
        _affine(x, params.w_x, params.b_x, precision),
        _affine(_dropped(drop, h), params.w_h, params.b_h, precision),
        h,
        x,
    )


def gru_cell(
    params: GRUParams,
    carry: Float[Array, "*batch H"] | None,
    x: Float[Array, "*batch D"],
    *,
    precision: Any = None,
) -> tuple[Float[Array, "*batch H"], Float[Array, "*batch H"]]:
    """The twin of `jaxseq.gru_cell`."""
    return _gru_cell(params, carry, x, precision=precision)


def _gru_step(u: jax.Array, recurrent: jax.Array, h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The equations of a GRU, of what its maps give."""
    u_r, u_z, u_n = jnp.split(u, 3, axis=-1)
    r_r, r_z, r_n = jnp.split(recurrent, 3, axis=-1)
    r, z = jax.nn.sigmoid(u_r + r_r), jax.nn.sigmoid(u_z + r_z)
    n = jnp.tanh(u_n + r * r_n)
    new = (1 - z) * n + z * h.astype(z.dtype)
    return new.astype(h.dtype), new.astype(x.dtype)


def lstm(
    params: LSTMParams,
    carry: LSTMState | None,
    xs: Float[Array, "T *batch D"],
    **time: Unpack[Time],
) -> tuple[LSTMState, Float[Array, "T *batch H"]]:
    """The twin of `jaxseq.lstm`."""
    return _through_time(partial(_lstm_cell, params), carry, xs, **time)


def _lstm_cell(params: Any, carry: Any, x: Any, *, precision: Any, drop: Any = None) -> Any:
    state = LSTMState(_zeros(params, x), _zeros(params, x)) if carry is None else carry
    a = _affine(x, params.w_x, params.b, precision) + _affine(_dropped(drop, state.h), params.w_h, None, precision)
    return _lstm_step(a, state, x)


def lstm_cell(
    params: LSTMParams, carry: LSTMState | None, x: Float[Array, "*batch D"], *, precision: Any = None
) -> tuple[LSTMState, Float[Array, "*batch H"]]:
    """The twin of `jaxseq.lstm_cell`."""
    return _lstm_cell(params, carry, x, precision=precision)


def _lstm_step(a: jax.Array, state: LSTMState, x: jax.Array) -> tuple[LSTMState, jax.Array]:
    """The equations of an LSTM, of what its maps give."""
    a_i, a_f, a_g, a_o = jnp.split(a, 4, axis=-1)
    i, f, g, o = jax.nn.sigmoid(a_i), jax.nn.sigmoid(a_f), jnp.tanh(a_g), jax.nn.sigmoid(a_o)
    c = f * state.c.astype(f.dtype) + i * g
    h = o * jnp.tanh(c)
    return cast_like(LSTMState(h, c), state), h.astype(x.dtype)


def conv_gru(
    params: GRUParams,
    carry: Float[Array, "*batch_and_outputs F"] | None,
    xs: Float[Array, "T *batch_and_space C"],
    *,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[tuple[int, int]] = "SAME",
    dilation: int | Sequence[int] = 1,
    **time: Unpack[Time],
) -> tuple[Float[Array, "*batch_and_outputs F"], Float[Array, "T *batch_and_outputs F"]]:
    """The twin of `jaxseq.conv_gru`."""
    cell = partial(_conv_gru_cell, params, stride=stride, padding=padding, dilation=dilation)
    return _through_time(cell, carry, xs, features=params.w_x.ndim - 1, **time)


def _conv_gru_cell(params: Any, carry: Any, x: Any, *, precision: Any, drop: Any = None, **options: Any) -> Any:
    u = conv(_wide(x), params.w_x, params.b_x, **options, precision=precision)
    h = jnp.zeros((*u.shape[:-1], params.w_h.shape[-2]), x.dtype) if carry is None else carry
    return _gru_step(
        u, conv(_wide(_dropped(drop, h)), params.w_h, params.b_h, padding="SAME", precision=precision), h, x
    )


def conv_gru_cell(
    params: GRUParams,
    carry: Float[Array, "*batch_and_outputs F"] | None,
    x: Float[Array, "*batch_and_space C"],
    *,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[tuple[int, int]] = "SAME",
    dilation: int | Sequence[int] = 1,
    precision: Any = None,
) -> tuple[Float[Array, "*batch_and_outputs F"], Float[Array, "*batch_and_outputs F"]]:
    """The twin of `jaxseq.conv_gru_cell`."""
    return _conv_gru_cell(params, carry, x, stride=stride, padding=padding, dilation=dilation, precision=precision)


def conv_lstm(
    params: LSTMParams,
    carry: LSTMState | None,
    xs: Float[Array, "T *batch_and_space C"],
    *,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[tuple[int, int]] = "SAME",
    dilation: int | Sequence[int] = 1,
    **time: Unpack[Time],
) -> tuple[LSTMState, Float[Array, "T *batch_and_outputs F"]]:
    """The twin of `jaxseq.conv_lstm`."""
    cell = partial(_conv_lstm_cell, params, stride=stride, padding=padding, dilation=dilation)
    return _through_time(cell, carry, xs, features=params.w_x.ndim - 1, **time)


def _conv_lstm_cell(params: Any, carry: Any, x: Any, *, precision: Any, drop: Any = None, **options: Any) -> Any:
    u = conv(_wide(x), params.w_x, params.b, **options, precision=precision)
    zero = jnp.zeros((*u.shape[:-1], params.w_h.shape[-2]), x.dtype)
    state = LSTMState(zero, zero) if carry is None else carry
    return _lstm_step(
        u + conv(_wide(_dropped(drop, state.h)), params.w_h, padding="SAME", precision=precision), state, x
    )


def conv_lstm_cell(
    params: LSTMParams,
    carry: LSTMState | None,
    x: Float[Array, "*batch_and_space C"],
    *,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[tuple[int, int]] = "SAME",
    dilation: int | Sequence[int] = 1,
    precision: Any = None,
) -> tuple[LSTMState, Float[Array, "*batch_and_outputs F"]]:
    """The twin of `jaxseq.conv_lstm_cell`."""
    return _conv_lstm_cell(params, carry, x, stride=stride, padding=padding, dilation=dilation, precision=precision)


def recurrence(
    cell: Cell, params: Any, carry: Any | None, xs: Float[Array, "T *batch_and_features"], **time: Unpack[Time]
) -> tuple[Any, Float[Array, "T *batch_and_features"]]:
    """The twin of `jaxseq.recurrence`."""
    features = 1 + cell.input.dimensions(params.w_x)
    return _through_time(partial(_recurrence_cell, cell, params), carry, xs, features=features, **time)


def _recurrence_cell(cell: Cell, params: Any, carry: Any, x: Any, *, precision: Any, drop: Any = None) -> Any:
    given = params._asdict()
    u = _linear(cell.input, params.w_x, given.get("b", given.get("b_x")), x, precision)
    us = jnp.split(u, len(cell.gates), -1)
    recurrent = len(cell.gates) - len(cell.alone)
    if carry is None:
        outputs, _ = cell.recurrent.channels(params.w_h, recurrent) or (0, 0)
        h, other = jnp.zeros((*u.shape[:-1], outputs), x.dtype), jnp.zeros(us[0].shape, x.dtype)
        carry = h if cell.state is None else cell.state(h, *(other for _ in cell.state._fields[1:]))  # type: ignore[attr-defined]
    h = jax.tree.leaves(carry)[0]
    rs = jnp.split(_linear(cell.recurrent, params.w_h, given.get("b_h"), _dropped(drop, h), precision), recurrent, -1)

    a = []
    for gate, u in zip(cell.gates, us, strict=True):
        r = None if gate in cell.alone else rs[len(a)]
        a.append(u if r is None else (u, r) if gate in cell.apart else u + r)
    wide = lambda tree: jax.tree.map(lambda b: b.astype(us[0].dtype), tree)  # noqa: E731
    more = []
    if cell.own:
        more.append(params._replace(**{f: wide(v) if f in cell.own else None for f, v in given.items()}))
    if "w_q" in given:
        more.append(lambda q: _affine(q, params.w_q, None, precision))
    new = cell.step(tuple(a), wide(carry), *more)
    new = new if cell.pullback is None else new[0]
    return cast_like(new, carry), jax.tree.leaves(new)[0].astype(x.dtype)


def recurrence_cell(
    cell: Cell, params: Any, carry: Any | None, x: Float[Array, "*batch_and_features"], *, precision: Any = None
) -> tuple[Any, Float[Array, "*batch_and_features"]]:
    """The twin of `jaxseq.recurrence_cell`: the step as the cell says it, whatever pullback it brings."""
    return _recurrence_cell(cell, params, carry, x, precision=precision)


def bidirectional(
    layer: Callable[..., Any] | Sequence[Callable[..., Any]],
    params: Sequence[Any],
    carry: Sequence[Any] | None,
    xs: Float[Array, "T *batch_and_features"],
    **time: Unpack[Time],
) -> tuple[tuple[Any, Any], Float[Array, "T *batch_and_features"]]:
    """The twin of `jaxseq.bidirectional`, of layers that are twins."""
    forwards, backwards = (layer, layer) if callable(layer) else layer
    first, second = (None, None) if carry is None else carry
    pairs = {option: value for option in ("drop", "hold") if (value := time.get(option)) is not None}
    near, far = ({**time, **{option: pair[i] for option, pair in pairs.items()}} for i in range(2))
    a, ys = forwards(params[0], first, xs, **near)
    b, zs = backwards(params[1], second, xs, **{**far, "reverse": True})
    return (a, b), jnp.concatenate([ys, zs], -1)


def stack(
    layer: Callable[..., Any] | Sequence[Callable[..., Any]],
    params: Sequence[Any],
    carry: Sequence[Any] | None,
    xs: Float[Array, "T *batch_and_features"],
    *,
    residual: bool = False,
    dropout: float = 0.0,
    recurrent_dropout: float = 0.0,
    zoneout: float = 0.0,
    key: PRNGKeyArray | None = None,
    **time: Unpack[Time],
) -> tuple[tuple[Any, ...], Float[Array, "T *batch_and_features"]]:
    """The twin of `jaxseq.stack`, of layers that are twins, with the same random numbers."""
    carries, y = [], xs
    for i, p in enumerate(params):
        if i and dropout:
            assert key is not None
            mask = jax.random.bernoulli(jax.random.fold_in(key, i), 1 - dropout, y.shape)
            y = y * mask.astype(y.dtype) / (1 - dropout)
        read, state = layer if callable(layer) else layer[i], None if carry is None else carry[i]
        own = None if key is None else jax.random.fold_in(key, len(params) + i)
        masks = _layers.draw(own, read, p, state, y, recurrent_dropout, zoneout, time)
        end, out = read(p, state, y, **time, **masks)
        y = y + out if residual and y.shape == out.shape else out
        carries.append(end)
    return tuple(carries), y


def _linear(kind: maps.Map, w: jax.Array, b: jax.Array | None, x: jax.Array, precision: Any) -> jax.Array:
    """w of x by one of `jaxseq.maps`, in the accumulator's dtype."""
    if isinstance(kind, maps.Dense):
        return _affine(x, w, b, precision)
    if isinstance(kind, maps.Conv):
        options: dict[str, Any] = {"stride": kind.stride, "padding": kind.padding, "dilation": kind.dilation}
        return conv(_wide(x), w, b, **options, precision=precision)
    if isinstance(kind, maps.Diagonal):
        wide, gains = _wide(x), w.astype(_wide(x).dtype)
        y = jnp.concatenate([wide * jnp.broadcast_to(gain, x.shape) for gain in gains], -1)
    elif isinstance(kind, maps.Blocks):
        heads = jnp.split(x, w.shape[0], -1)
        y = jnp.concatenate(
            [_affine(head, w[n, :, g], None, precision) for g in range(w.shape[2]) for n, head in enumerate(heads)], -1
        )
    else:  # a map of the user's own
        y = kind.product(precision, w, x)
    return y if b is None else y + jnp.broadcast_to(b.astype(y.dtype), y.shape)


def _wide(x: jax.Array) -> jax.Array:
    """x in the dtype in which its products accumulate, that nothing is rounded before the cell."""
    return x.astype(accumulator(x.dtype))


def _affine(x: jax.Array, w: jax.Array, b: jax.Array | None, precision: Any) -> jax.Array:
    """x w + b, accumulated in float32 at least."""
    common = promote(x, w)
    y = jnp.matmul(x.astype(common), w.astype(common), precision=precision, preferred_element_type=accumulator(common))
    return y if b is None else y + jnp.broadcast_to(b.astype(y.dtype), y.shape)


def _dropped(drop: jax.Array | None, h: jax.Array) -> jax.Array:
    return h if drop is None else h * lax.stop_gradient(drop).astype(h.dtype)


def _zeros(params: Any, x: jax.Array) -> jax.Array:
    """The zero state for one input x (*B, D)."""
    return jnp.zeros((*x.shape[:-1], params.w_h.shape[0]), x.dtype)


def _through_time(
    cell: Callable[..., tuple[Any, jax.Array]], carry: Any, xs: jax.Array, features: int = 1, **time: Unpack[Time]
) -> tuple[Any, jax.Array]:
    """Reads xs step by step, j = 0 .. T - 1 in the order of reading. `checkpoint` has no meaning here: it says what is
    kept, not what is computed.
    """
    lengths, resets, reverse, truncation, _, time_axis, unroll, precision, drop, hold = tuple(Given(**time))
    read, time_axis = partial(cell, precision=precision, drop=drop), time_axis % xs.ndim
    if carry is None:  # shapes only: there may be no step
        carry = jax.tree.map(jnp.zeros_like, jax.eval_shape(read, None, jnp.sum(xs, time_axis))[0])
    hold = jax.tree.map(lambda k: jnp.moveaxis(k, time_axis, 0) if jnp.ndim(k) else k, hold)

    def step(state: Any, x: jax.Array, j: jax.Array) -> tuple[Any, jax.Array]:
        """A step, of which the part that is held is taken back."""
        new, y = read(state, x)
        if hold is None:
            return new, y
        held = [jnp.take_along_axis(k, _like(j[None], k), 0)[0] if jnp.ndim(k) else k for k in jax.tree.leaves(hold)]
        pairs = zip(held, jax.tree.leaves(state), jax.tree.leaves(new), strict=True)
        amount = lambda k, a: lax.stop_gradient(jnp.asarray(k, a.dtype))  # noqa: E731
        leaves = [a * amount(k, a) + b * (1 - amount(k, a)) for k, a, b in pairs]
        return jax.tree.unflatten(jax.tree.structure(new), leaves), leaves[0].astype(y.dtype)

    xs = jnp.moveaxis(xs, time_axis, 0)
    T, batch = xs.shape[0], xs.shape[1:-features]
    live = reset = last = None
    t = order = jnp.broadcast_to(jnp.arange(T).reshape(T, *(1 for _ in batch)), (T, *batch))
    if lengths is not None:
        live = t < lengths[None]
    if resets is not None:
        reset = jnp.moveaxis(resets, time_axis, 0)
        reset = reset if live is None else reset & live
    if reverse:
        if reset is not None:  # into a step goes the boundary above it, and out of the last one that below it
            last = jnp.any(reset[:1], 0)
            reset = jnp.concatenate([reset[1:], jnp.zeros_like(reset[:1])])
        # Which step is read as the j-th: padding comes last, either way.
        order = T - 1 - t if lengths is None else jnp.where(t < lengths[None], lengths[None] - 1 - t, t)
        xs = jnp.take_along_axis(xs, _like(order, xs), 0)
        reset = reset if reset is None else jnp.take_along_axis(reset, order, 0)

    def where(mask: jax.Array | None, yes: Any, no: Any) -> Any:
        return no if mask is None else jax.tree.map(lambda a, b: jnp.where(_like(mask, a), a, b), yes, no)

    def run(state: Any, first: int, stop: int, every: int | None) -> tuple[Any, tuple[Any, jax.Array]]:
        """Steps first .. stop - 1 from `state`: the last state, and every state and output."""

        def body(state: Any, at: Any) -> Any:
            j, x, dead, reset = at
            if every is not None:
                cut = jnp.broadcast_to((j > 0) & (j % every == 0), batch)
                cut = cut if dead is None else cut & ~dead
                state = where(cut, lax.stop_gradient(state), state)
            new, y = step(where(reset, zeros(state), state), where(dead, zeros(x), x), order[j])
            state = where(dead, state, new)
            return state, (state, where(dead, zeros(y), y))

        known = (xs, None if live is None else ~live, reset)
        at = (jnp.arange(first, stop), *(a if a is None else a[first:stop] for a in known))
        return lax.scan(body, state, at, unroll=unroll)

    zeros = partial(jax.tree.map, jnp.zeros_like)
    k1, k2 = truncation if isinstance(truncation, tuple) else (truncation or T + 1, truncation or T + 1)
    end, (states, ys) = run(carry, 0, T, k1 if k1 == k2 <= T else None)
    if k1 < k2 and k1 < T:
        # Every window is run again, from k2 - k1 steps before it on.
        parts, end = [], carry
        for window in range(0, T, k1):
            first = max(0, window - (k2 - k1))
            state = jax.tree.map(lambda a, i=first: lax.stop_gradient(a[i - 1]), states) if first else carry
            last_state, (_, part) = run(state, first, min(window + k1, T), None)
            end = last_state if live is None else where(live[window], last_state, end)
            parts.append(part[window - first :])
        ys = jnp.concatenate(parts)
    if reverse:
        ys = jnp.take_along_axis(ys, _like(order, ys), 0)
    return where(last, zeros(end), end), jnp.moveaxis(ys, 0, time_axis)


def _like(mask: jax.Array, a: jax.Array) -> jax.Array:
    """The mask with axes of one for those of a that it lacks."""
    return jnp.expand_dims(mask, range(mask.ndim, a.ndim))
