"""Conversion of the cotangents that a hand-derived rule receives."""

import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

R = TypeVar("R")


def as_jax_arrays(backward: Callable[..., R]) -> Callable[..., R]:
    """Convert the last argument of a backward pass, the cotangents, to JAX arrays.

    The pullback that `jax.vjp` returns passes NumPy arrays through unconverted.
    """

    @functools.wraps(backward)
    def converted(*args: PyTree) -> R:
        *known, cotangents = args
        return backward(*known, jax.tree.map(jnp.asarray, cotangents))

    return converted
