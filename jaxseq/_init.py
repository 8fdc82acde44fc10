"""Initializers.

The input map is normal with variance 1 / D. The recurrent map is a random orthogonal matrix for each gate, which
preserves the norm of the state. Biases are zero unless the module of a cell states otherwise.

Source: A. M. Saxe, J. L. McClelland and S. Ganguli, Exact solutions to the nonlinear dynamics of learning in deep
linear neural networks (2014), section 3.
"""

from collections.abc import Callable, Sequence
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from jaxseq import _checks, _geometry, _precision

# `(key, shape, dtype) -> array`, as in `jax.nn.initializers`.
Initializer = Callable[[PRNGKeyArray, tuple[int, ...], DTypeLike], jax.Array]


def normal(key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike = float) -> jax.Array:
    """Return `jax.random.normal`, drawn as one vector: XLA takes seconds to compile a draw with four axes."""
    return jax.random.normal(key, (prod(shape),), dtype).reshape(shape)


def sizes(input_size: int, hidden_size: int, dtype: DTypeLike) -> tuple[int, int, np.dtype]:
    """Return (D, H, dtype), checked."""
    return (
        _checks.integer("input_size", input_size, at_least=1),
        _checks.integer("hidden_size", hidden_size, at_least=1),
        _checks.dtype("dtype", dtype),
    )


def matrix(key: PRNGKeyArray, rows: int, columns: int, dtype: np.dtype) -> jax.Array:
    """Return a normal matrix (rows, columns) of variance 1 / rows, drawn in float32 at least."""
    return (jax.random.normal(key, (rows, columns), _precision.accumulator(dtype)) * rows**-0.5).astype(dtype)


def orthogonal(key: PRNGKeyArray, size: int, gates: int, dtype: np.dtype) -> jax.Array:
    """Return (H, gates H), a random orthogonal matrix for each gate.

    It is drawn in float32 at least, because there is no QR decomposition in bfloat16.
    """
    draw = jax.nn.initializers.orthogonal()
    blocks = [draw(k, (size, size), _precision.accumulator(dtype)) for k in jax.random.split(key, gates)]
    return jnp.concatenate(blocks, -1).astype(dtype)


def matrices(
    key: PRNGKeyArray,
    input_size: int,
    hidden_size: int,
    gates: int,
    dtype: DTypeLike,
    *,
    w_x_init: Initializer | None = None,
    w_h_init: Initializer | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return w_x (D, gates H), w_h (H, gates H) and a zero bias (gates H,)."""
    D, H, dtype = sizes(input_size, hidden_size, dtype)
    key_x, key_h = jax.random.split(key)
    w_x, w_h = input_map(w_x_init, key_x, (D, H), gates, dtype), recurrent_map(w_h_init, key_h, H, gates, dtype)
    return w_x, w_h, jnp.zeros((gates * H,), dtype)


def input_map(
    init: Initializer | None, key: PRNGKeyArray, shape: tuple[int, int], gates: int, dtype: np.dtype
) -> jax.Array:
    """Return (D, gates H) for the shape (D, H), by `init` for each gate, or normal of variance 1 / D for None."""
    D, H = shape
    if init is None:
        return matrix(key, D, gates * H, dtype)
    return by_gate("w_x_init", init, key, shape, gates, dtype=dtype)


def recurrent_map(init: Initializer | None, key: PRNGKeyArray, size: int, gates: int, dtype: np.dtype) -> jax.Array:
    """Return (H, gates H), by `init` for each gate, or orthogonal for None."""
    if init is None:
        return orthogonal(key, size, gates, dtype)
    return by_gate("w_h_init", init, key, (size, size), gates, dtype=dtype)


def kernels(
    key: PRNGKeyArray,
    kernel_size: int | Sequence[int],
    c_in: int,
    c_out: int,
    gates: int,
    dtype: DTypeLike,
    *,
    w_x_init: Initializer | None = None,
    w_h_init: Initializer | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return normal w_x (*K, C, gates F) and w_h (*K, F, gates F) of variance 1 / fan_in, and a zero bias."""
    taps, C, F = kernel_sizes(kernel_size, c_in, c_out)
    dtype = _checks.dtype("dtype", dtype)
    key_x, key_h = jax.random.split(key)

    def draw(name: str, init: Initializer | None, key: PRNGKeyArray, channels: int) -> jax.Array:
        if init is None:
            return kernel(key, taps, channels, gates * F, dtype)
        return by_gate(name, init, key, (*taps, channels, F), gates, dtype=dtype)

    w_x, w_h = draw("w_x_init", w_x_init, key_x, C), draw("w_h_init", w_h_init, key_h, F)
    return w_x, w_h, jnp.zeros(gates * F, dtype)


def by_gate(
    name: str, init: Initializer, key: PRNGKeyArray, shape: tuple[int, ...], gates: int, *, dtype: np.dtype
) -> jax.Array:
    """Return one weight of this shape for each gate, drawn by `init`, side by side on the last axis."""
    return jnp.concatenate([drawn(name, init, k, shape, dtype) for k in jax.random.split(key, gates)], -1)


def drawn(name: str, init: Initializer, key: PRNGKeyArray, shape: tuple[int, ...], dtype: np.dtype) -> jax.Array:
    """Return `init(key, shape)`, checked. It draws in float32 at least, because some do not draw in 16 bits."""
    if not callable(init):
        _checks.bad_type(name, "a function (key, shape, dtype) -> array", _checks.describe(init))
    found = _checks.array(name, init(key, shape, _precision.accumulator(dtype)))
    _checks.shape(name, found, shape, "the shape that was passed to it")
    return found.astype(dtype)


def kernel_sizes(kernel_size: int | Sequence[int], c_in: int, c_out: int) -> tuple[tuple[int, ...], int, int]:
    """Return (kernel size of each axis, C_in, C_out), checked."""
    axes = len(kernel_size) if isinstance(kernel_size, tuple | list) else 1
    if not 1 <= axes <= 3:
        _checks.bad_value("kernel_size", "1 to 3 spatial axes", f"{axes}")
    taps = _geometry.per_axis("kernel_size", kernel_size, axes)
    return taps, _checks.integer("c_in", c_in, at_least=1), _checks.integer("c_out", c_out, at_least=1)


def kernel(
    key: PRNGKeyArray, taps: tuple[int, ...], in_channels: int, out_channels: int, dtype: DTypeLike
) -> jax.Array:
    """Return a normal kernel (*taps, in_channels, out_channels) of variance 1 / fan_in."""
    return normal(key, (*taps, in_channels, out_channels), dtype) * (prod(taps) * in_channels) ** -0.5
