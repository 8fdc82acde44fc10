"""Layer-normalized LSTM and GRU: the outputs u and r of the two maps are normalized over units before they are added.

Normalization of a row a of N numbers, and its pullback, with mean μ and variance var(a):

    N(a) = (a - μ) / s,  s² = var(a) + ε          â := N(a)
    N*(ȳ) = (ȳ - mean(ȳ) - â mean(ȳ â)) / s

LSTM, with gains γ and shifts β; N normalizes all four gates of the layer together:

    (a_i, a_f, a_g, a_o) = γ_x N(u) + γ_h N(r) + β
    c' = σ(a_f) c + σ(a_i) tanh(a_g)
    h' = σ(a_o) tanh(γ_c N(c') + β_c)

GRU; N normalizes the gates r and z together and n separately, and r scales the normalized product:

    (a_r, a_z, v_n) = γ_x N(u) + β_x              (b_r, b_z, m) = γ_h N(r) + β_h
    r = σ(a_r + b_r)     z = σ(a_z + b_z)     n = tanh(v_n + r m)     h' = (1 - z) n + z h

Pullback: that of the LSTM or GRU with respect to its pre-activations gives δ. Then N* is applied to γ_x δ and to γ_h δ,
and for every example

    γ̄_x = δ N(u)     γ̄_h = δ N(r)     β̄ = δ

In the LSTM, with d = γ_c N(c') + β_c:  d̄ = h̄' σ(a_o) (1 - tanh²(d)),  c̄ := c̄' + N*(γ_c d̄).

Source: J. L. Ba, J. R. Kiros and G. E. Hinton, Layer normalization (2016), equations 20 to 22 and 24 to 27.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray, PyTree

from jaxseq import _gru, _init, _lstm
from jaxseq._op import with_hints
from jaxseq._recurrence import Cell, Gates, Pullback, StepResult
from jaxseq._types import LayerNormGRUParams, LayerNormLSTMParams, LSTMState

EPSILON = 1e-5


def _normalize(*parts: jax.Array) -> tuple[list[jax.Array], jax.Array]:
    """Normalize a row given in equal parts. Return the normalized parts and 1 / s."""
    mean = sum(jnp.mean(a, -1, keepdims=True) for a in parts) / len(parts)
    parts = tuple(a - mean for a in parts)
    var = sum(jnp.mean(a * a, -1, keepdims=True) for a in parts) / len(parts)
    inverse = lax.rsqrt(var + EPSILON)
    return [a * inverse for a in parts], inverse


def _normalize_pullback(normal: Sequence[jax.Array], inverse: jax.Array, *cotangents: jax.Array) -> list[jax.Array]:
    """Return N* of the cotangents of a row given in equal parts."""
    count = len(cotangents)
    pairs = list(zip(normal, cotangents, strict=True))
    mean = sum(jnp.mean(y_bar, -1, keepdims=True) for y_bar in cotangents) / count
    projection = sum(jnp.mean(a_hat * y_bar, -1, keepdims=True) for a_hat, y_bar in pairs) / count
    return [(y_bar - mean - a_hat * projection) * inverse for a_hat, y_bar in pairs]


def _per_gate(p: jax.Array, like: jax.Array, gates: int) -> list[jax.Array]:
    """Split a gain or shift by gate, with leading axes of size 1 to match `like`."""
    return jnp.split(jnp.expand_dims(p, range(like.ndim - 1)), gates, -1)


# --- LSTM ---


def _lstm_sums(us: PyTree, rs: PyTree, p: LayerNormLSTMParams) -> list[jax.Array]:
    sides = [_per_gate(q, us[0], 4) for q in (p.gain_x, p.gain_h, p.shift)]
    return [gamma_x * u + gamma_h * r + beta for u, r, gamma_x, gamma_h, beta in zip(us, rs, *sides, strict=True)]


def _lstm_step(a: Gates, s_prev: LSTMState, p: LayerNormLSTMParams) -> StepResult:
    (us, inverse_u), (rs, inverse_r) = (_normalize(*side) for side in zip(*a, strict=True))
    a_i, a_f, a_g, a_o = _lstm_sums(us, rs, p)
    i, f, g, o = jax.nn.sigmoid(a_i), jax.nn.sigmoid(a_f), jnp.tanh(a_g), jax.nn.sigmoid(a_o)
    c = f * s_prev.c + i * g
    d, _, _ = _memory(c, p)
    return StepResult(LSTMState(o * jnp.tanh(d), c), ((i, f, g, o), us, rs, inverse_u, inverse_r))


def _memory(c: jax.Array, p: LayerNormLSTMParams) -> tuple[jax.Array, list[jax.Array], jax.Array]:
    """Return (γ_c N(c) + β_c, N(c), 1 / s)."""
    normal, inverse = _normalize(c)
    return _per_gate(p.gain_c, c, 1)[0] * normal[0] + _per_gate(p.shift_c, c, 1)[0], normal, inverse


def _lstm_pullback(residuals: PyTree, s_prev: LSTMState, s_bar: LSTMState, p: LayerNormLSTMParams) -> Pullback:
    (i, f, g, o), us, rs, inverse_u, inverse_r = residuals
    d, normal, inverse = _memory(f * s_prev.c + i * g, p)
    tanh_d = jnp.tanh(d)
    d_bar = s_bar.h * o * (1 - tanh_d * tanh_d)
    c_bar = s_bar.c + _normalize_pullback(normal, inverse, _per_gate(p.gain_c, d_bar, 1)[0] * d_bar)[0]
    delta = [
        c_bar * g * i * (1 - i),
        c_bar * s_prev.c * f * (1 - f),
        c_bar * i * (1 - g * g),
        s_bar.h * tanh_d * o * (1 - o),
    ]
    gains = (_per_gate(q, d_bar, 4) for q in (p.gain_x, p.gain_h))
    scaled = [[gamma * delta_g for gamma, delta_g in zip(gain, delta, strict=True)] for gain in gains]
    delta_u, delta_r = _normalize_pullback(us, inverse_u, *scaled[0]), _normalize_pullback(rs, inverse_r, *scaled[1])
    p_bar = p._replace(
        gain_x=jnp.concatenate([a * b for a, b in zip(us, delta, strict=True)], -1),
        gain_h=jnp.concatenate([a * b for a, b in zip(rs, delta, strict=True)], -1),
        shift=jnp.concatenate(delta, -1),
        gain_c=normal[0] * d_bar,
        shift_c=d_bar,
    )
    s_prev_bar = LSTMState(jnp.zeros_like(d_bar), c_bar * f)
    return Pullback(tuple(zip(delta_u, delta_r, strict=True)), s_prev_bar, p_bar)


def _lstm_replay(residuals: PyTree, s_prev: LSTMState, p: LayerNormLSTMParams) -> LSTMState:
    (i, f, g, _), *_ = residuals
    return LSTMState(s_prev.h, f * s_prev.c + i * g)


layer_norm_lstm = Cell(
    name="layer_norm_lstm",
    gates="ifgo",
    split_gates="ifgo",
    step=_lstm_step,
    pullback=_lstm_pullback,
    replay=_lstm_replay,
    params=LayerNormLSTMParams,
    state=LSTMState,
)


# --- GRU ---


def _gru_normalize(side: Sequence[jax.Array]) -> tuple[list[jax.Array], tuple[jax.Array, jax.Array]]:
    """Normalize the gates r and z together and n separately. Return the normalized gates and both 1 / s."""
    (r, z), inverse = _normalize(*side[:2])
    (n,), inverse_n = _normalize(side[2])
    return [r, z, n], (inverse, inverse_n)


def _gru_sides(normal: PyTree, p: LayerNormGRUParams) -> Gates:
    """Return the pre-activations of the GRU: γ N + β for u and r, summed except for n."""
    us, rs = normal
    u, r = (
        [
            gamma * a + beta
            for gamma, a, beta in zip(_per_gate(gain, side[0], 3), side, _per_gate(shift, side[0], 3), strict=True)
        ]
        for side, gain, shift in ((us, p.gain_x, p.shift_x), (rs, p.gain_h, p.shift_h))
    )
    return u[0] + r[0], u[1] + r[1], (u[2], r[2])


def _gru_step(a: Gates, h_prev: jax.Array, p: LayerNormGRUParams) -> StepResult:
    (us, inverse_u), (rs, inverse_r) = (_gru_normalize(side) for side in zip(*a, strict=True))
    h, gates = _gru.step(_gru_sides((us, rs), p), h_prev)
    return StepResult(h, (gates, us, rs, inverse_u, inverse_r))


def _gru_pullback(residuals: PyTree, h_prev: jax.Array, h_bar: jax.Array, p: LayerNormGRUParams) -> Pullback:
    gates, us, rs, inverse_u, inverse_r = residuals
    found_gru = _gru.pullback(gates, h_prev, h_bar)
    delta_r, delta_z, (delta_n, delta_m) = found_gru.delta
    sides, found = [], []
    for normal, (inverse, inverse_n), gain, delta in (
        (us, inverse_u, p.gain_x, (delta_r, delta_z, delta_n)),
        (rs, inverse_r, p.gain_h, (delta_r, delta_z, delta_m)),
    ):
        scaled = [gamma * delta_g for gamma, delta_g in zip(_per_gate(gain, h_bar, 3), delta, strict=True)]
        sides.append(
            [
                *_normalize_pullback(normal[:2], inverse, *scaled[:2]),
                *_normalize_pullback(normal[2:], inverse_n, scaled[2]),
            ]
        )
        found.append(
            (jnp.concatenate([a * b for a, b in zip(normal, delta, strict=True)], -1), jnp.concatenate(delta, -1))
        )
    (gain_x, shift_x), (gain_h, shift_h) = found
    p_bar = p._replace(gain_x=gain_x, gain_h=gain_h, shift_x=shift_x, shift_h=shift_h)
    return Pullback(tuple(zip(*sides, strict=True)), found_gru.state_bar, p_bar)


layer_norm_gru = Cell(
    name="layer_norm_gru",
    gates="rzn",
    split_gates="rzn",
    step=_gru_step,
    pullback=_gru_pullback,
    params=LayerNormGRUParams,
)


# --- Initializers ---


@with_hints
def layer_norm_lstm_init(
    key: PRNGKeyArray,
    input_size: int,
    hidden_size: int,
    *,
    w_x_init: _init.Initializer | None = None,
    w_h_init: _init.Initializer | None = None,
    dtype: DTypeLike = jnp.float32,
) -> LayerNormLSTMParams:
    """Initialize `cells.layer_norm_lstm`: `w_x` and `w_h` as `jaxseq.lstm_init` does, gains one, shifts one for the
    forget gate and zero elsewhere.

    Args:
        key: a JAX random key.
        input_size: D.
        hidden_size: H.
        w_x_init: replaces the initializer of `w_x`: a function `(key, shape, dtype) -> array`, as in
            `jax.nn.initializers`, called for each gate with the shape (D, H).
        w_h_init: the same for `w_h`, with the shape (H, H).
        dtype: floating dtype of the parameters.

    Returns:
        `LayerNormLSTMParams(w_x, w_h, gain_x, gain_h, shift, gain_c, shift_c)`.

    Raises:
        TypeError: if a size is not an integer, `dtype` is not a floating dtype, or an initializer is not a function.
        ValueError: if a size is less than 1.

    Example:
        >>> import jax, jax.numpy as jnp, jaxseq
        >>> params = jaxseq.cells.layer_norm_lstm_init(jax.random.key(0), 3, 5)
        >>> (h, c), ys = jaxseq.recurrence(jaxseq.cells.layer_norm_lstm, params, None, jnp.ones((7, 2, 3)))
        >>> ys.shape
        (7, 2, 5)

    Reference:
        J. L. Ba, J. R. Kiros and G. E. Hinton, Layer normalization (2016), equations 20 to 22.
    """
    w_x, w_h, b = _lstm.lstm_init(key, input_size, hidden_size, w_x_init=w_x_init, w_h_init=w_h_init, dtype=dtype)
    one = jnp.ones_like(w_x[0])
    return LayerNormLSTMParams(
        w_x, w_h, one, jnp.copy(one), one * (0 if b is None else b), one[:hidden_size], 0 * one[:hidden_size]
    )


@with_hints
def layer_norm_gru_init(
    key: PRNGKeyArray,
    input_size: int,
    hidden_size: int,
    *,
    w_x_init: _init.Initializer | None = None,
    w_h_init: _init.Initializer | None = None,
    dtype: DTypeLike = jnp.float32,
) -> LayerNormGRUParams:
    """Initialize `cells.layer_norm_gru`: `w_x` and `w_h` as `jaxseq.gru_init` does, gains one, shifts zero.

    Args:
        key: a JAX random key.
        input_size: D.
        hidden_size: H.
        w_x_init: replaces the initializer of `w_x`: a function `(key, shape, dtype) -> array`, as in
            `jax.nn.initializers`, called for each gate with the shape (D, H).
        w_h_init: the same for `w_h`, with the shape (H, H).
        dtype: floating dtype of the parameters.

    Returns:
        `LayerNormGRUParams(w_x, w_h, gain_x, gain_h, shift_x, shift_h)`.

    Raises:
        TypeError: if a size is not an integer, `dtype` is not a floating dtype, or an initializer is not a function.
        ValueError: if a size is less than 1.

    Example:
        >>> import jax, jax.numpy as jnp, jaxseq
        >>> params = jaxseq.cells.layer_norm_gru_init(jax.random.key(0), 3, 5)
        >>> h, ys = jaxseq.recurrence(jaxseq.cells.layer_norm_gru, params, None, jnp.ones((7, 2, 3)))
        >>> ys.shape
        (7, 2, 5)

    Reference:
        J. L. Ba, J. R. Kiros and G. E. Hinton, Layer normalization (2016), equations 24 to 27.
    """
    w_x, w_h, zero = _init.matrices(key, input_size, hidden_size, 3, dtype, w_x_init=w_x_init, w_h_init=w_h_init)
    return LayerNormGRUParams(w_x, w_h, zero + 1, zero + 1, zero, jnp.zeros_like(zero))
