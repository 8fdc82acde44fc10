r"""The Jacobian of every step with respect to the state before it, A_t[i, j] = ∂s_t[j] / ∂s_{t-1}[i], and its diagonal.

The step is s = φ(u, r, s_prev) with r = L_h(h) + b_h. The derivative of the recurrent map does not depend on time:
L_h(e_i), for a unit vector e_i of h. So the row i of all A_t is one directional derivative of φ,

    A_t[i] = ∂φ/∂r L_h(e_i) + ∂φ/∂s e_i

and no row needs a product with w_h. N rows take O(N G H) operations for each step, in parallel.

If φ is pointwise, A_t consists of diagonal blocks from φ and of the blocks of w_h. For the diagonal of A_t, the
directions e_i of the units i of one leaf are added up. φ maps the sum to the sum, in which each unit is affected by its
own direction only, if L_h(e_i) is reduced to unit i:

    diag(A_t) on leaf k = leaf k of  ∂φ/∂r d_k + ∂φ/∂s 1_k,     d_k = diag of w_h for each gate if leaf k is h, else 0

This is one directional derivative for each leaf of the state. Otherwise all N rows are computed, one after another, and
their elements on the diagonal are kept.

If φ is pointwise, the recurrent map is diagonal and h is the only leaf of the state, then A_t is diagonal. The two
methods are then the same, and no matrix is formed, for the gradient either.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxseq._parallel._pointwise import is_pointwise
from jaxseq._parallel._steps import Push, Steps, push_of
from jaxseq.linear_maps import Diagonal


def is_diagonal(steps: Steps) -> bool:
    """Return True if A is known to be diagonal."""
    of_map = isinstance(steps.sweep.cell.recurrent, Diagonal)
    return of_map and len(steps.vectors.sizes) == 1 and is_pointwise(steps)


def jacobian(steps: Steps, s_prev: jax.Array) -> jax.Array:
    """Return A: its diagonal (T, *B, N) if it is known to be diagonal, else (T, *B, N, N)."""
    return diagonal(steps, s_prev) if is_diagonal(steps) else matrices(steps, s_prev)


def matrices(steps: Steps, s_prev: jax.Array) -> jax.Array:
    """Return A (T, *B, N, N)."""
    directions = jnp.eye(steps.vectors.size, dtype=s_prev.dtype)
    return jax.vmap(push_of(steps, s_prev), out_axes=-2)(directions, steps.rows())


def diagonal(steps: Steps, s_prev: jax.Array) -> jax.Array:
    """Return the diagonal of A, (T, *B, N)."""
    push, rows, N = push_of(steps, s_prev), steps.rows(), steps.vectors.size
    if is_pointwise(steps):
        return _diagonal_of_pointwise(steps, push, rows, s_prev.dtype)

    def element(i: jax.Array) -> jax.Array:
        direction = (jnp.arange(N) == i).astype(s_prev.dtype)
        row = lax.dynamic_index_in_dim(rows, i, keepdims=False)
        return lax.dynamic_index_in_dim(push(direction, row), i, s_prev.ndim - 1, keepdims=False)

    return jnp.moveaxis(lax.map(element, jnp.arange(N)), 0, -1)


def _diagonal_of_pointwise(steps: Steps, push: Push, rows: jax.Array, dtype: np.dtype) -> jax.Array:
    vectors, found = steps.vectors, []
    H, total = vectors.sizes[0], vectors.size
    of_unit = jnp.diagonal(rows[:H].reshape(H, -1, H), axis1=0, axis2=2).reshape(-1)  # d of h, gate after gate
    for k in range(len(vectors.sizes)):
        direction = (jnp.arange(total) // H == k).astype(dtype)
        found.append(push(direction, jnp.zeros_like(of_unit) if k else of_unit)[..., k * H : (k + 1) * H])
    return jnp.concatenate(found, -1)
