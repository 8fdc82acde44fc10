"""Values and gradients of every op and variant in float32 and bfloat16, against the float64 reference implementation.

Users run these dtypes, compiled with optimisation, at sizes that reach the vectorised kernels of XLA. So do
these tests: at least 15 channels and 40 positions, with the optimisation that the suite turns off elsewhere.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import GRID, OPS, cotangents_for, long_where, pullback

from jaxseq._cases import CASES

WIDTH, LENGTH = 5, 40

# Largest error of a leaf, relative to the largest element of that leaf in float64. Where a step is unstable, the bound
# is four times the error of autodiff of the reference implementation in the same dtype.
BOUNDS = {jnp.float32: 2e-5, jnp.bfloat16: 4e-2}
# This cell, which JAX differentiates, multiplies two pre-activations that are kept in bfloat16.
LOOSE = {"twice": 3}


def rounded(tree, dtype):
    """The floats of a tree in `dtype`; all other leaves as they are."""
    return jax.tree.map(lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.inexact) else a, tree)


def errors(actual, expected):
    """The error of each leaf, relative to its largest element; cotangents of integers hold no number."""
    for (path, got), want in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        if want.dtype == jax.dtypes.float0:
            continue
        low, exact = (np.asarray(a).astype(np.float64) for a in (got, want))
        yield jax.tree_util.keystr(path), np.abs(low - exact).max(initial=0) / (np.abs(exact).max(initial=0) or 1)


def later(name, label):
    """bfloat16 takes the same branches for every variant; the first of each op, and all convolutions, have both."""
    return "conv" not in name and (name, label) not in [p.values for p in OPS]


@pytest.mark.parametrize(
    ("name", "label", "dtype"),
    [pytest.param(*p.values, jnp.float32, id=f"{p.id}-float32") for p in GRID]
    + long_where([pytest.param(*p.values, jnp.bfloat16, id=f"{p.id}-bfloat16") for p in GRID], later),
)
def test_low_precision(name, label, dtype, key):
    case = CASES[name]
    variant = case.variants[label].widened(WIDTH)
    op, reference = (pullback(variant.bound(f)) for f in (case.op, case.twin))
    args = rounded(variant.arguments(key, length=LENGTH, dtype=jnp.float32), dtype)
    drawn = cotangents_for(variant.bound(case.op), args, jax.random.fold_in(key, 1))  # a carry may be wider than dtype
    cotangents = jax.tree.map(lambda a, like: a.astype(like.dtype), rounded(drawn, dtype), drawn)
    expected = jax.jit(reference)(rounded(args, jnp.float64), rounded(cotangents, jnp.float64))
    optimised = {"compiler_options": {"xla_backend_optimization_level": 3}}
    found = dict(errors(jax.jit(op, **optimised)(args, cotangents), expected))
    limit = BOUNDS[dtype] * (LOOSE.get(label, 1) if dtype == jnp.bfloat16 else 1)
    if all(error < limit for error in found.values()):  # false for NaN, of which `max` takes no notice
        return
    autodiff = dict(
        errors(jax.jit(reference, **optimised)(args, cotangents), expected)
    )  # of the same step, as unstable
    for path, error in found.items():
        bound = max(limit, 4 * autodiff[path])
        assert error < bound, f"relative error at {path}: {error:.1e}, of autodiff {autodiff[path]:.1e}"
