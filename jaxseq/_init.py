"""First weights: those of a recurrence are the same for every cell.

The input map is normal with variance 1 / D; the recurrent map is, for each gate, a random orthogonal matrix, which
keeps the norm of what it carries through time; biases are zero unless a cell's file says otherwise.

Source: A. M. Saxe, J. L. McClelland and S. Ganguli, Exact solutions to the nonlinear dynamics of learning in deep
linear neural networks (2014), section 3.
"""

from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from jaxseq import _checks, _precision


def normal(key: Any, shape: tuple[int, ...], dtype: Any = float) -> jax.Array:
    """The numbers of `jax.random.normal`, drawn in one row: XLA takes seconds to compile a draw of four axes."""
    return jax.random.normal(key, (prod(shape),), dtype).reshape(shape)


def maps(key: Any, input_size: Any, hidden_size: Any, gates: int, dtype: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """w_x (D, gates H), w_h (H, gates H) and a zero bias (gates H,)."""
    rows = _checks.integer("input_size", input_size, at_least=1)
    hidden = _checks.integer("hidden_size", hidden_size, at_least=1)
    dtype = _checks.dtype("dtype", dtype)
    # Drawn and orthogonalised in float32 at least: there is no QR in bfloat16.
    wide = _precision.accumulator(dtype)
    key_x, key_h = jax.random.split(key)
    w_x = jax.random.normal(key_x, (rows, gates * hidden), wide) * rows**-0.5
    orthogonal = jax.nn.initializers.orthogonal()
    w_h = jnp.concatenate([orthogonal(k, (hidden, hidden), wide) for k in jax.random.split(key_h, gates)], -1)
    return w_x.astype(dtype), w_h.astype(dtype), jnp.zeros((gates * hidden,), dtype)
