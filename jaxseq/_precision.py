"""The dtype policy, said once.

Products accumulate in float32 at least, pointwise mathematics runs in the accumulator's dtype, states are
held in float32 at least between steps, results leave in the dtype of the input, and every cotangent leaves
in the dtype of its primal. For float32 and float64 all the casts below are no-ops.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def promote(*arrays: jax.Array) -> np.dtype:
    """The common dtype in which arrays of different dtypes meet, under strict promotion too."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*(array.dtype for array in arrays))


def accumulator(dtype: np.dtype) -> np.dtype:
    """The dtype in which products of `dtype` accumulate: float32 for bfloat16 and float16."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(dtype, jnp.float32)


def wider(dtype: np.dtype, other: np.dtype) -> bool:
    """Whether `dtype` holds more than `other`."""
    with jax.numpy_dtype_promotion("standard"):
        return dtype != other and jnp.promote_types(dtype, other) == dtype


def cast(tree: Any, dtype: np.dtype) -> Any:
    """Every leaf in `dtype`."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


def cast_like(tree: Any, primal: Any) -> Any:
    """Every leaf in the dtype of the corresponding leaf of `primal`."""
    return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), tree, primal)
