"""Types that annotations share."""

from typing import TYPE_CHECKING

import jax
import numpy as np

# What public functions take as an array, as in `Float[AnyArray, "*batch D"]`: not a Python number, which
# `jax.typing.ArrayLike` includes. Objects with `__jax_array__`, and mappings in place of parameters, are converted too,
# but no annotation says so.
AnyArray = jax.Array | np.ndarray

# What NumPy computes: of arrays without axes its functions return scalars, which its type stubs call arrays.
if TYPE_CHECKING:
    ArrayOrScalar = np.ndarray
else:
    ArrayOrScalar = np.ndarray | np.generic
