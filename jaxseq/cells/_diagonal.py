"""Complex maps from and to real features, for LRU and S5.

The weights are real arrays. With B = B_re + i B_im and C = C_re + i C_im,

    B x = x B_re + i x B_im               w_x = [B_re, B_im], side by side
    Re(C h) = Re h C_re - Im h C_im       w_y = [C_re, C_im], one above the other
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxseq._recurrence import LinearProduct


def complex_input(L: LinearProduct, w_x: jax.Array, x: jax.Array) -> jax.Array:
    """Return B x."""
    return lax.complex(*jnp.split(L(w_x, x), 2, -1))


def real_output(L: LinearProduct, w_y: jax.Array, h: jax.Array) -> jax.Array:
    """Return Re(C h)."""
    return L(w_y, jnp.concatenate([jnp.real(h), -jnp.imag(h)], -1))
