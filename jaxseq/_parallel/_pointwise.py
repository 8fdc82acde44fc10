"""Whether the step of a cell is pointwise: the state of a unit depends on that unit only.

Decided from the jaxpr of the step, without batch axes. Every operation that reads the state or the pre-activations has
to be elementwise, on arrays of the shape (H,). An unknown operation, or one that moves elements, is not: an answer of
False costs time, and never a wrong result.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.core import ShapedArray

from jaxseq._parallel._steps import Steps
from jaxseq._recurrence._cell import pre_activations

_NAMES = """
abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp convert_element_type copy copy_p cos cosh
div eq erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow is_finite le log log1p logistic lt max min mul ne neg
nextafter not or pow rem round rsqrt select_n sign sin sinh sqrt square stop_gradient sub tan tanh xor
"""
ELEMENTWISE = frozenset(_NAMES.split())  # operations of `jax.lax`
CALLS = ("jaxpr", "call_jaxpr", "fun_jaxpr")  # the parameters of operations that call a function of their operands


def is_pointwise(steps: Steps) -> bool:
    """Return True if the step of the cell is known to be pointwise."""
    vectors, sweep = steps.vectors, steps.sweep
    if sweep.phi.inner or len(set(vectors.sizes)) > 1:
        return False
    of_example = lambda a, axes: jax.ShapeDtypeStruct(a.shape[axes:], a.dtype)  # noqa: E731
    axes = steps.first.ndim
    H = vectors.sizes[0]
    u = jax.ShapeDtypeStruct((len(sweep.cell.gates) * H,), sweep.accumulator)
    r = jax.ShapeDtypeStruct((sweep.cell.recurrent_gates * H,), sweep.accumulator)
    a = jax.eval_shape(lambda u, r: pre_activations(sweep.cell, u, r), u, r)
    state = vectors.structure.unflatten([jax.ShapeDtypeStruct((H,), sweep.accumulator) for _ in vectors.sizes])
    side = jax.tree.map(lambda e: of_example(e, axes), steps.side)
    closed = jax.make_jaxpr(lambda a, s, side: jax.tree.leaves(sweep.phi.step(a, s, side).state))(a, state, side)
    dependent = [True] * len(jax.tree.leaves((a, state))) + [False] * len(jax.tree.leaves(side))
    return _results(closed.jaxpr, dependent, (H,)) is not None


def _results(jaxpr: Any, dependent: Sequence[bool], shape: tuple[int, ...]) -> list[bool] | None:
    """Return which results depend on the dependent arguments, or None if an operation is not elementwise."""
    found = {v for v, is_dependent in zip(jaxpr.invars, dependent, strict=True) if is_dependent}
    reads = lambda v: not hasattr(v, "val") and v in found  # noqa: E731  # literals are not hashable
    for eqn in jaxpr.eqns:
        operands = [reads(v) for v in eqn.invars]
        if not any(operands):
            continue
        inner = next((eqn.params[name] for name in CALLS if name in eqn.params), None)
        if inner is not None and eqn.primitive.name not in ("scan", "while", "cond"):
            inner = getattr(inner, "jaxpr", inner)
            if len(inner.invars) != len(operands) or (results := _results(inner, operands, shape)) is None:
                return None
            found.update(v for v, is_dependent in zip(eqn.outvars, results, strict=True) if is_dependent)
            continue
        read = [v.aval for v, is_dependent in zip(eqn.invars, operands, strict=True) if is_dependent]
        if eqn.primitive.name not in ELEMENTWISE or any(_shape(a) != shape for a in (*read, eqn.outvars[0].aval)):
            return None
        found.update(eqn.outvars)
    return [reads(v) for v in jaxpr.outvars]


def _shape(aval: ShapedArray) -> tuple[int, ...]:
    return aval.shape
