"""Values and gradients of every op and variant in float32 and bfloat16, against the float64 reference implementation.

Users run these dtypes, compiled with optimisation, at sizes that reach the vectorised kernels of XLA. Both are asked for
here: at least 15 channels and 40 positions, and the compiler option that the suite otherwise turns off.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import GRID, cotangents_for, pullback

from jaxseq._cases import CASES

WIDTH, LENGTH = 5, 40

# Largest error of a leaf, relative to the largest element of that leaf in float64.
BOUNDS = {jnp.float32: 2e-5, jnp.bfloat16: 4e-2}


def rounded(tree, dtype):
    """The floats of a tree in `dtype`; all other leaves as they are."""
    return jax.tree.map(lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.inexact) else a, tree)


def errors(actual, expected):
    """The error of each leaf, relative to its largest element; cotangents of integers hold no number."""
    for (path, got), want in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        if want.dtype == jax.dtypes.float0:
            continue
        got, want = (np.asarray(a).astype(np.float64) for a in (got, want))
        scale = np.abs(want).max(initial=0)
        yield jax.tree_util.keystr(path), np.abs(got - want).max(initial=0) / (scale or 1)


@pytest.mark.parametrize(("name", "label"), GRID)
def test_low_precision(name, label, key):
    case = CASES[name]
    variant = case.variants[label].widened(WIDTH)
    op, reference = (pullback(variant.bound(f)) for f in (case.op, case.twin))
    args = rounded(variant.arguments(key, length=LENGTH, dtype=jnp.float32), jnp.bfloat16)
    cotangents = cotangents_for(variant.bound(case.op), args, jax.random.fold_in(key, 1))
    expected = jax.jit(reference)(rounded(args, jnp.float64), rounded(cotangents, jnp.float64))
    optimised = jax.jit(op, compiler_options={"xla_backend_optimization_level": 3})
    for dtype, bound in BOUNDS.items():
        actual = optimised(rounded(args, dtype), rounded(cotangents, dtype))
        for path, error in errors(actual, expected):
            assert error < bound, f"{jnp.dtype(dtype).name} at {path}: relative error {error:.1e}"
