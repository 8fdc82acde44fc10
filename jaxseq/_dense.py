"""The contraction of a dense linear map, and the bias of every linear map."""

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
