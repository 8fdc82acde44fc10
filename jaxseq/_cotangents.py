"""The cotangents of a hand-derived rule."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def as_jax_arrays(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Convert the last argument of a backward pass, the cotangents, to JAX arrays.

    The pullback that `jax.vjp` returns passes NumPy arrays on as they are.
    """

    @functools.wraps(backward)
    def converted(*args: Any) -> Any:
        *known, cotangents = args
        return backward(*known, jax.tree.map(jnp.asarray, cotangents))

    return converted
