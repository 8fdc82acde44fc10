"""Checks, by tracing only, that a cell meets the requirements of the engine: shapes, dtypes and structures."""

from collections.abc import Callable, Hashable
from functools import lru_cache, partial
from typing import TypeVar

import jax
import numpy as np
from jax.lax import PrecisionLike
from jaxtyping import PyTree

from jaxseq import _checks, _precision
from jaxseq._recurrence._cell import Cell, Gates, Pullback, State, StepResult, fill_h, h_of, pre_activations
from jaxseq._recurrence._inputs import Inputs, Weights, dtypes, float_leaves
from jaxseq._recurrence._phi import make_phi

Result = TypeVar("Result")


def inspect(cell: Cell, precision: PrecisionLike, inputs: Inputs, axes: int) -> None:
    """Check that the step and the pullback of a cell are as documented in `Cell`; the carry has `axes` batch axes.

    The errors name the cell and the part.
    """
    weights, carry, xs, masks = inputs
    product, accumulator = dtypes(weights, carry, xs)
    of_example = [(a.shape, a.dtype) for a in jax.tree.leaves(weights)]
    of_example += [(a.shape[axes:], accumulator) for a in jax.tree.leaves(carry)]
    of_example += [(a.shape[axes + 1 :], a.dtype) for a in jax.tree.leaves(masks.side)]
    leaves = tuple(jax.ShapeDtypeStruct(*like) for like in of_example)
    structure = jax.tree.structure((weights, carry, masks.side))
    sizes = cell.input.channels(weights.w_x, len(cell.gates))
    assert sizes is not None
    _inspect(cell, precision, (structure, leaves), product, sizes[1])


@lru_cache(256)
def _inspect(
    cell: Cell,
    precision: PrecisionLike,
    given: tuple[Hashable, tuple[jax.ShapeDtypeStruct, ...]],
    product: np.dtype,
    outputs: int,
) -> None:
    """Check a cell, given the structure and the leaves of what the step of one example reads, both hashable."""
    weights, state, side = jax.tree.unflatten(*given)
    accumulator, features = _precision.accumulator(product), jax.tree.leaves(state)[0].shape
    u, r = (
        jax.ShapeDtypeStruct((*features[:-1], count * outputs), accumulator)
        for count in (len(cell.gates), cell.recurrent_gates)
    )
    a = jax.eval_shape(partial(pre_activations, cell), u, r)

    check = partial(_check_types, cell, precision, product)
    jax.eval_shape(check, weights, a, state, side)


def _check_types(
    cell: Cell, precision: PrecisionLike, product: np.dtype, weights: Weights, a: Gates, *state_and_side: PyTree
) -> State:
    """Run the step and the pullback of a cell on abstract arrays, and check what they return."""
    state, side = state_and_side
    phi = make_phi(cell, precision, weights, product)
    more = *phi.cell_params, *phi.inner, *side
    result = _run_part(cell, "step", phi.cell.step, a, state, *more)
    if not isinstance(result, StepResult):
        expected = "jaxseq.StepResult(state, residuals), since there is a pullback"
        _checks.bad_type(f"{cell.name}.step", expected, _describe_tree(result))
    _check_same(cell, "step", "a state like `s_prev`", result.state, state)
    residuals = fill_h(result.residuals, h_of(result.state))
    if not all(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(residuals)):
        _checks.bad_type(f"{cell.name}.step", "arrays as residuals", _describe_tree(result.residuals))
    pull = phi.cell.pullback
    assert pull is not None
    found = _run_part(cell, "pullback", pull, residuals, state, state, *more)
    if not isinstance(found, Pullback):
        _checks.bad_type(f"{cell.name}.pullback", "jaxseq.Pullback(delta, state_bar)", _describe_tree(found))
    _check_same(cell, "pullback", "`delta` like the pre-activations", found.delta, a)
    _check_same(cell, "pullback", "`state_bar` like the state", found.state_bar, state)
    if phi.cell_params:
        _check_same(
            cell,
            "pullback",
            "`params_bar` of one example like the cell parameters",
            found.params_bar,
            phi.cell_params[0],
        )
    expected = "`side_bar` like the side inputs, None for those that are not floats"
    _check_same(cell, "pullback", expected, tuple(jax.tree.leaves(found.side_bar)), float_leaves(side))
    if not phi.inner and found.inner is not None:
        expected = "None as `inner`, since there is no `w_q`"
        _checks.bad_value(f"{cell.name}.pullback", expected, _describe_tree(found.inner))
    if phi.inner and (not isinstance(found.inner, tuple) or len(found.inner) != 2):
        expected = "the pair (q, v̄) as `inner`, since there is `w_q`"
        _checks.bad_value(f"{cell.name}.pullback", expected, _describe_tree(found.inner))
    return result.state


def _run_part(cell: Cell, part: str, f: Callable[..., Result], *args: PyTree) -> Result:
    """Return `f(*args)`. An error gets a note that names the part of the cell."""
    try:
        return f(*args)
    except Exception as error:
        error.add_note(f"jaxseq: raised by `{part}` of the cell {cell.name!r}.")
        raise


def _check_same(cell: Cell, part: str, expected: str, actual: PyTree, like: PyTree) -> None:
    """Check that `actual` has the structure, shapes and dtypes of `like`."""
    if jax.tree.structure(actual) == jax.tree.structure(like):
        pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(like), strict=True)
        if all(getattr(a, "shape", None) == b.shape and a.dtype == b.dtype for a, b in pairs):
            return
    _checks.bad_value(f"{cell.name}.{part}", f"{expected}, {_describe_tree(like)}", _describe_tree(actual))


def _describe_tree(tree: PyTree) -> str:
    words = jax.tree.map(lambda a: f"{a.dtype}{list(a.shape)}" if hasattr(a, "shape") else repr(a), tree)
    return str(words).replace("'", "")
