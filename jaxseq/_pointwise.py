"""Pointwise functions of several cells, in plain JAX."""

import jax
import jax.numpy as jnp


def log_sigmoid(a: jax.Array) -> jax.Array:
    """Return log σ(a), by cases: from minimum and abs, the second derivatives at 0 would be wrong."""
    return jnp.where(a > 0, 0, a) - jnp.log1p(jnp.exp(jnp.where(a > 0, -a, a)))


def softplus(a: jax.Array) -> jax.Array:
    """Return log(1 + exp(a))."""
    return -log_sigmoid(-a)


def add_skip(y: jax.Array, skip: jax.Array | None, x: jax.Array) -> jax.Array:
    """Return y + skip ⊙ x, with `skip` along the last axis."""
    return y if skip is None else y + jnp.expand_dims(skip, range(x.ndim - 1)) * x
