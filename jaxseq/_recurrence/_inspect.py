"""Checks, by tracing only, that a cell meets the requirements of the engine: shapes, dtypes and structures."""

from functools import lru_cache
from typing import Any

import jax

from jaxseq import _checks, _precision
from jaxseq._recurrence._cell import Cell, State, Weights, dtypes, pre_activations
from jaxseq._recurrence._phi import make_phi


def inspect(cell: Cell, precision: Any, weights: Weights, carry: State, x: jax.Array, axes: int) -> None:
    """Check that the step and the pullback of a cell are as documented in `Cell`; the carry has `axes` batch axes.

    The errors name the cell and the part.
    """
    product, acc = dtypes(weights, carry, x)
    state = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[axes:], acc), carry)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), weights)
    sizes = cell.input.channels(weights.w_x, len(cell.gates))
    assert sizes is not None
    _inspect(cell, precision, shapes, state, product, sizes[1])


@lru_cache(256)
def _inspect(cell: Cell, precision: Any, weights: Weights, state: State, product: Any, outputs: int) -> None:
    acc = _precision.accumulator(product)
    features = jax.tree.leaves(state)[0].shape
    u, r = (
        jax.ShapeDtypeStruct((*features[:-1], count * outputs), acc)
        for count in (len(cell.gates), cell.recurrent_gates)
    )
    a = jax.eval_shape(lambda u, r: pre_activations(cell, u, r), u, r)

    def output_type(part: str, f: Any, *args: Any) -> Any:
        try:
            return jax.eval_shape(f, *args)
        except Exception as error:
            error.add_note(f"jaxseq: raised by `{part}` of the cell {cell.name!r}.")
            raise

    step = lambda weights, a, s: make_phi(cell, precision, weights, product).step(a, s)  # noqa: E731
    out = output_type("step", step, weights, a, state)
    if not isinstance(out, tuple) or len(out) != 2:
        _checks.bad_type(f"{cell.name}.step", "a pair (state, saved), since there is a pullback", _describe_tree(out))
    _check_same(cell, "step", "a state like `s_prev`", out[0], state)

    def pull(weights: Weights, saved: Any, s_prev: State, s_bar: State) -> Any:
        return make_phi(cell, precision, weights, product).pullback(saved, s_prev, s_bar)

    delta, s_tilde, p_bar, _ = output_type("pullback", pull, weights, out[1], state, state)
    _check_same(cell, "pullback", "δ like the pre-activations", delta, a)
    _check_same(cell, "pullback", "s̄_prev like the state", s_tilde, state)
    if weights.cell_params is not None:
        cell_params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, acc), weights.cell_params)
        _check_same(cell, "pullback", "p̄ of one example like the cell parameters", p_bar, cell_params)


def _check_same(cell: Cell, part: str, expected: str, actual: Any, like: Any) -> None:
    """Check that `actual` has the structure, shapes and dtypes of `like`."""
    signature = lambda tree: [(a.shape, a.dtype) for a in jax.tree.leaves(tree)]  # noqa: E731
    if jax.tree.structure(actual) != jax.tree.structure(like) or signature(actual) != signature(like):
        _checks.bad_value(f"{cell.name}.{part}", f"{expected}, {_describe_tree(like)}", _describe_tree(actual))


def _describe_tree(tree: Any) -> str:
    words = jax.tree.map(lambda a: f"{a.dtype}{list(a.shape)}", tree)
    return str(words).replace("'", "")
