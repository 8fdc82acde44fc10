"""Helpers shared by the tests: the grid of cases, random cotangents, and comparison leaf by leaf."""

import importlib.util
from functools import cache
from math import prod

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding

import jaxseq
from jaxseq import tuning
from jaxseq._cases import CASES

OPS = [pytest.param(name, next(iter(case.variants)), id=name) for name, case in CASES.items()]
GRID = [pytest.param(name, label, id=f"{name}-{label}") for name, case in CASES.items() for label in case.variants]
# Ops that differ from another op only in their map, number of steps or number of layers. The default suite tests the
# other op.
DERIVED = ("conv_gru", "bidirectional", "separable_conv", *(name for name in CASES if name.endswith("_cell")))
SEQUENCES = [pytest.param(name, id=name) for name in ("rnn", "gru", "lstm")]


def long_where(grid, later):
    """Mark as long the entries of the grid for which `later(op, label)` is true."""
    mark = lambda p: [pytest.mark.long] if later(*p.values[:2]) else []  # noqa: E731
    return [pytest.param(*p.values, id=p.id, marks=mark(p)) for p in grid]


def derived(name, label):
    return name in DERIVED


def bound(name, label, *, reference=False):
    """Return the op (or its reference implementation) with the options of a variant bound, as a function of arrays."""
    case = CASES[name]
    return case.variants[label].bound(case.reference if reference else case.op)


def arguments(name, label, key, *, dtype=jnp.float64, **sizes):
    return CASES[name].variants[label].arguments(key, dtype=dtype, **sizes)


def causal_conv(carry, x, kernel, bias=None, *, module=jaxseq, **options):
    """Call `module.causal_conv` with time on the axis -2, and with the arrays of the parameters as arguments."""
    return module.causal_conv(jaxseq.ConvParams(kernel, bias), carry, x, time_axis=-2, **options)


def normals(key, tree, stream=0):
    """Return random normal leaves with the shapes and dtypes of `tree`, for cotangents and directions.

    Different streams of the same key give different numbers. The generator is NumPy's, since `jax.random` would compile
    a program for each shape.
    """
    generator = np.random.default_rng([*np.asarray(jax.random.key_data(key)), stream])
    return jax.tree.map(lambda leaf: jax.device_put(generator.standard_normal(leaf.shape).astype(leaf.dtype)), tree)


def draw(*shape):
    """Return random normal float32 numbers, the same at every call."""
    return jax.device_put(np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32))


def pullback(f):
    """Return the function `(args, cotangents) -> (outputs, cotangents of args)`, not jitted."""

    def both(args, cotangents):
        outputs, vjp = jax.vjp(f, *args)
        return outputs, vjp(cotangents)

    return both


@cache
def compiled(name, label, *, reference=False):
    """Return the jitted pullback of a variant. The cache lets tests with equal shapes share a compiled program."""
    return jax.jit(pullback(bound(name, label, reference=reference)))


def cotangents_for(f, args, key):
    return normals(key, jax.eval_shape(f, *args))


def assert_close(actual, expected, relative=1e-10):
    """Assert equal structure, shapes and dtypes, and errors of at most `relative` times the leaf's largest element."""
    chex.assert_trees_all_equal_structs(actual, expected)
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    for (path, got), wanted in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        if wanted.dtype == jax.dtypes.float0:  # the cotangent of an integer has no value
            continue
        kind = np.complex128 if jnp.iscomplexobj(wanted) else np.float64
        a, e = np.asarray(got).astype(kind), np.asarray(wanted).astype(kind)
        where = jax.tree_util.keystr(path)
        assert np.isfinite(e).all(), f"the expected value at {where} is not finite"
        scale = np.abs(e).max(initial=0.0)
        np.testing.assert_allclose(a, e, rtol=0, atol=relative * scale, err_msg=where)


def inner(a, b):
    """Return the inner product <a, b>, summed over the leaves of two trees."""
    return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def subjaxprs(jaxpr):
    """Yield every equation of a jaxpr and of the jaxprs nested in it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for param in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            inner_jaxpr = getattr(param, "jaxpr", param)
            if hasattr(inner_jaxpr, "eqns"):
                yield from subjaxprs(inner_jaxpr)


def scans(f, *args):
    """Return the scan equations in the jaxpr of f(*args), outermost first."""
    return [eqn for eqn in subjaxprs(jax.make_jaxpr(f)(*args).jaxpr) if eqn.primitive.name == "scan"]


# --- Devices ---


def mesh_of(sizes, names, kind):
    """Return a mesh of the first devices, all axes of one type: explicit if `kind` is "explicit", else automatic."""
    axis = AxisType.Explicit if kind == "explicit" else AxisType.Auto
    return jax.make_mesh(sizes, names, axis_types=(axis,) * len(sizes), devices=jax.devices()[: prod(sizes)])


def place(mesh, tree, specs):
    """Place the arrays of a tree on a mesh as a tree of PartitionSpecs specifies."""
    return jax.device_put(tree, jax.tree.map(lambda s: NamedSharding(mesh, s), specs))


def script(path):
    """Import an example script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path.parent)  # as Python does for a script, which may import modules beside it
        spec.loader.exec_module(module)
    return module


def in_chunks(parts):
    """Return a context in which the backward pass of a recurrence runs in this number of chunks, however short."""
    return tuning.use(tuning.Tuning(tuning.RecurrenceTuning(parts=parts, least_rows=1, least_steps=1)))
