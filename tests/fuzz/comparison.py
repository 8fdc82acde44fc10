"""Compare the leaves of a tree in low precision with those of a tree in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Largest error of a leaf, relative to the largest element of that leaf in float64.
BOUNDS = {"float32": 3e-5, "bfloat16": 5e-2}


def rounded(tree: Any, dtype: Any) -> Any:
    """Convert the floats of a tree to `dtype`; leave other leaves as they are."""
    return jax.tree.map(lambda a: jnp.asarray(a, dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)


def problems(actual: Any, expected: Any, dtype: str) -> list[str]:
    """Return one line for each leaf with another shape or with an error above the bound or not finite."""
    found = []
    for (path, got), want in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        where = f"{dtype} {jax.tree_util.keystr(path)}"
        if got.shape != want.shape:
            found.append(f"{where} has shape {got.shape}, expected {want.shape}")
            continue
        low, exact = (np.asarray(a).astype(np.float64) for a in (got, want))
        error = np.abs(low - exact).max(initial=0) / (np.abs(exact).max(initial=0) or 1)
        if not error < BOUNDS[dtype]:
            found.append(f"{where} has the error {error:.1e}, relative to its largest element")
    return found
