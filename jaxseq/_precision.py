"""The dtype policy.

Products accumulate in float32 at least. Elementwise operations use the accumulator's dtype. States are stored in
float32 at least between steps. Results are returned in the dtype of the input, and every cotangent in the dtype of its
primal. For float32 and float64 all casts below are no-ops.
"""

from operator import methodcaller
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

Tree = TypeVar("Tree")


def promote(*arrays: jax.Array) -> np.dtype:
    """Return the common dtype of arrays by standard promotion, also under `jax_numpy_dtype_promotion="strict"`."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*(array.dtype for array in arrays))


def accumulator(dtype: np.dtype) -> np.dtype:
    """Return the dtype in which products of `dtype` accumulate: float32 for bfloat16 and float16."""
    return common(dtype, np.dtype(np.float32))


def common(dtype: np.dtype, other: np.dtype) -> np.dtype:
    """Return the common dtype of two dtypes by standard promotion, also under strict promotion."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(dtype, other)


def wider(dtype: np.dtype, other: np.dtype) -> bool:
    """Return True if `dtype` is wider than `other`: different, and the common dtype of both."""
    return dtype != other and common(dtype, other) == dtype


def cast(tree: Tree, dtype: np.dtype) -> Tree:
    """Cast every leaf to `dtype`."""
    return jax.tree.map(methodcaller("astype", dtype), tree)


def cast_like(tree: Tree, primal: PyTree) -> Tree:
    """Cast every leaf to the dtype of the corresponding leaf of `primal`."""
    leaves, structure = jax.tree.flatten(tree)
    pairs = zip(leaves, structure.flatten_up_to(primal), strict=True)
    return structure.unflatten(leaf.astype(like.dtype) for leaf, like in pairs)
