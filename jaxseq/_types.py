"""Types shared by annotations."""

from typing import TYPE_CHECKING

import jax
import numpy as np

# The arrays that public functions accept, as in `Float[AnyArray, "*batch D"]`. Unlike `jax.typing.ArrayLike` this
# excludes Python numbers. Not shown in annotations: public functions also convert objects with `__jax_array__`, and
# mappings passed as parameters.
AnyArray = jax.Array | np.ndarray

# The results of NumPy functions. For zero-dimensional arrays these are scalars, which the type stubs declare as arrays.
if TYPE_CHECKING:
    ArrayOrScalar = np.ndarray
else:
    ArrayOrScalar = np.ndarray | np.generic
