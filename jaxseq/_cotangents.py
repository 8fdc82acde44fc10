"""Conversion of the cotangents that a hand-derived rule receives."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def as_jax_arrays(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Convert the last argument of a backward pass, the cotangents, to JAX arrays.

    The pullback that `jax.vjp` returns passes NumPy arrays through unconverted.
    """

    @functools.wraps(backward)
    def converted(*args: Any) -> Any:
        *known, cotangents = args
        return backward(*known, jax.tree.map(jnp.asarray, cotangents))

    return converted
