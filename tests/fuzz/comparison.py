"""Compare the leaves of two trees, one of them in low precision and the other in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Largest error of a leaf, relative to the largest element of that leaf in float64.
BOUNDS = {"float32": 3e-5, "bfloat16": 5e-2}


def rounded(tree: Any, dtype: Any) -> Any:
    """The floats of a tree in `dtype`; all other leaves as they are."""
    return jax.tree.map(lambda a: jnp.asarray(a, dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)


def problems(actual: Any, expected: Any, dtype: str) -> list[str]:
    """One line for each leaf that has another shape, is not finite, or is farther from float64 than the bound."""
    found = []
    for (path, got), want in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        where = f"{dtype} {jax.tree_util.keystr(path)}"
        if got.shape != want.shape:
            found.append(f"{where} has shape {got.shape}, expected {want.shape}")
            continue
        low, exact = (np.asarray(a).astype(np.float64) for a in (got, want))
        error = np.abs(low - exact).max(initial=0) / (np.abs(exact).max(initial=0) or 1)
        if not error < BOUNDS[dtype]:
            found.append(f"{where} is off by {error:.1e} of its largest element")
    return found
