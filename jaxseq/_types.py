"""Types that annotations of public functions share."""

import jax
import numpy as np

# What public functions take as an array, as in `Float[AnyArray, "*batch D"]`: not a Python number, which
# `jax.typing.ArrayLike` includes. Objects with `__jax_array__`, and mappings in place of parameters, are converted too,
# but no annotation says so.
AnyArray = jax.Array | np.ndarray
