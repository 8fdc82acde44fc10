"""Reference implementations of the layers that are linear in their state: their equations, step by step."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.lax import PrecisionLike
from jaxtyping import Array, Bool, Float, Integer, PyTree

from jaxseq._pointwise import log_sigmoid
from jaxseq._precision import accumulator, cast_like, promote
from jaxseq._types import MLSTMParams, MLSTMState, QRNNParams, QRNNState
from jaxseq.reference._time import through_time


def mlstm(
    params: MLSTMParams,
    carry: MLSTMState | None,
    xs: Float[Array, "*time_and_batch D"],
    *,
    lengths: Integer[Array, "*batch"] | None = None,
    resets: Bool[Array, "*time_and_batch"] | None = None,
    reverse: bool = False,
    truncation: int | tuple[int, int] | None = None,
    checkpoint: int | str | None = None,
    time_axis: int = 0,
    precision: PrecisionLike = None,
) -> tuple[MLSTMState, Float[Array, "*time_and_batch H"]]:
    """Reference implementation of `jaxseq.mlstm`."""
    return through_time(
        partial(_step, mlstm_cell, params),
        carry,
        xs,
        output_of_cell=True,
        lengths=lengths,
        resets=resets,
        reverse=reverse,
        truncation=truncation,
        checkpoint=checkpoint,
        time_axis=time_axis,
        precision=precision,
    )


def mlstm_cell(
    params: MLSTMParams,
    carry: MLSTMState | None,
    x: Float[Array, "*batch D"],
    *,
    precision: PrecisionLike = None,
) -> tuple[MLSTMState, Float[Array, "*batch H"]]:
    """Reference implementation of `jaxseq.mlstm_cell`."""
    w = params
    _, N, K = w.w_q.shape
    V, batch = w.w_v.shape[-1], x.shape[:-1]
    if carry is None:
        zeros = lambda *shape: jnp.zeros((*batch, *shape), accumulator(x.dtype))  # noqa: E731
        carry = MLSTMState(zeros(N, K, V), zeros(N, K), zeros(N))
    dtype = accumulator(promote(*jax.tree.leaves(params), x, *carry))
    c, n, m = (a.astype(dtype) for a in carry)

    def linear(letters: str, weight: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        y = jnp.einsum(f"...d,d{letters}->...{letters}", x.astype(dtype), weight.astype(dtype), precision=precision)
        return y if bias is None else y + jnp.broadcast_to(bias.astype(dtype), y.shape)

    q, k, v = linear("nk", w.w_q), linear("nk", w.w_k) / K**0.5, linear("nv", w.w_v)
    a_i, a_f, a_o = linear("n", w.w_i, w.b_i), linear("n", w.w_f, w.b_f), linear("nv", w.w_o, w.b_o)
    log_f = log_sigmoid(a_f)
    larger = log_f + m > a_i
    new_m = jnp.where(larger, log_f + m, a_i)
    i, f = jnp.exp(a_i - new_m), jnp.exp(log_f + m - new_m)
    c = f[..., None, None] * c + i[..., None, None] * k[..., :, None] * v[..., None, :]
    n = f[..., None] * n + i[..., None] * k
    numerator = jnp.einsum("...kv,...k->...v", c, q, precision=precision)
    denominator, one = jnp.einsum("...k,...k->...", n, q, precision=precision), jnp.exp(-new_m)
    size = jnp.where(denominator > 0, denominator, -denominator)
    y = jax.nn.sigmoid(a_o) * numerator / jnp.where(size > one, size, one)[..., None]
    state = MLSTMState(c, n, new_m)
    return cast_like(state, carry), y.reshape(*batch, N * V).astype(x.dtype)


def qrnn(
    params: QRNNParams,
    carry: QRNNState | None,
    xs: Float[Array, "*time_and_batch D"],
    *,
    lengths: Integer[Array, "*batch"] | None = None,
    resets: Bool[Array, "*time_and_batch"] | None = None,
    reverse: bool = False,
    truncation: int | tuple[int, int] | None = None,
    checkpoint: int | str | None = None,
    time_axis: int = 0,
    unroll: int = 1,
    precision: PrecisionLike = None,
) -> tuple[QRNNState, Float[Array, "*time_and_batch H"]]:
    """Reference implementation of `jaxseq.qrnn`."""
    return through_time(
        partial(_step, qrnn_cell, params),
        carry,
        xs,
        output_of_cell=True,
        lengths=lengths,
        resets=resets,
        reverse=reverse,
        truncation=truncation,
        checkpoint=checkpoint,
        time_axis=time_axis,
        unroll=unroll,
        precision=precision,
    )


def qrnn_cell(
    params: QRNNParams,
    carry: QRNNState | None,
    x: Float[Array, "*batch D"],
    *,
    precision: PrecisionLike = None,
) -> tuple[QRNNState, Float[Array, "*batch H"]]:
    """Reference implementation of `jaxseq.qrnn_cell`."""
    kernel, bias = params
    taps, D, columns = kernel.shape
    batch = x.shape[:-1]
    if carry is None:
        zeros = lambda *shape: jnp.zeros((*batch, *shape), accumulator(x.dtype))  # noqa: E731
        carry = QRNNState(zeros(taps - 1, D), zeros(columns // 3))
    dtype = accumulator(promote(kernel, x, *carry))
    inputs = jnp.concatenate([carry.past.astype(dtype), x.astype(dtype)[..., None, :]], -2)
    u = jnp.einsum("...kd,kdu->...u", inputs, kernel.astype(dtype), precision=precision)
    u = u if bias is None else u + jnp.broadcast_to(bias.astype(dtype), u.shape)
    u_z, u_f, u_o = jnp.split(u, 3, -1)
    f = jax.nn.sigmoid(u_f)
    c = f * carry.c.astype(dtype) + (1 - f) * jnp.tanh(u_z)
    state = QRNNState(inputs[..., 1:, :], c)
    return cast_like(state, carry), (jax.nn.sigmoid(u_o) * c).astype(x.dtype)


def _step(
    cell: Callable[..., tuple[PyTree, jax.Array]],
    params: PyTree,
    carry: PyTree,
    x: jax.Array,
    *,
    precision: PrecisionLike,
    recurrent_dropout_mask: None,
) -> tuple[PyTree, jax.Array]:
    """Apply a cell as `through_time` calls it."""
    return cell(params, carry, x, precision=precision)
