"""The contraction of a dense linear map, the bias of every linear map, and the tangent of a product with a bias."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.lax import PrecisionLike

from jaxseq import _precision


def contract(
    precision: PrecisionLike, a: jax.Array, b: jax.Array, over_a: tuple[int, ...], over_b: tuple[int, ...]
) -> jax.Array:
    """Return the sum of a b over these axes, in the dtype of the accumulator."""
    dtype = _precision.promote(a, b)
    return lax.dot_general(
        a.astype(dtype),
        b.astype(dtype),
        ((over_a, over_b), ((), ())),
        precision=precision,
        preferred_element_type=_precision.accumulator(dtype),
    )


def add_bias(y: jax.Array, b: jax.Array | None) -> jax.Array:
    """Return y + b, with b along the last axis."""
    return y if b is None else y + jnp.expand_dims(b.astype(y.dtype), range(y.ndim - 1))


def pull_bias(y_bar: jax.Array) -> jax.Array:
    """Return b̄, the sum of ȳ over all leading axes."""
    return jnp.sum(y_bar, axis=range(y_bar.ndim - 1), dtype=_precision.accumulator(y_bar.dtype))


def push_product(
    product: Callable[[tuple[jax.Array, ...], jax.Array], jax.Array],
    z: tuple[jax.Array, ...],
    w: jax.Array,
    directions: tuple[tuple[Any, ...], Any, Any],
) -> jax.Array:
    """Return the tangent of y = product(z, w) + b, for a product that is linear in each of the two.

        y' = product(z', w) + product(z, w') + b'

    `directions` is (z', w', b'), with None where a tangent is zero.
    """
    z_dot, w_dot, b_dot = directions
    terms = []
    if any(a is not None for a in z_dot):
        whole = tuple(jnp.zeros_like(a) if t is None else t for a, t in zip(z, z_dot, strict=True))
        terms.append(product(whole, w))
    if w_dot is not None:
        terms.append(product(z, w_dot))
    y_dot = sum(terms[1:], terms[0]) if terms else jnp.zeros_like(product(z, w))
    return add_bias(y_dot, b_dot)
