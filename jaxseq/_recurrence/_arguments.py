"""Checks of the parameters, the carry and the arrays of a recurrence. The errors name the argument."""

from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxseq import _checks, _mesh, _precision
from jaxseq._distributed._sharding import batch_sharding
from jaxseq._recurrence._cell import MAPS, Cell, State, h_of
from jaxseq._recurrence._inputs import Weights


def check_dropout_mask(value: object, carry: State) -> jax.Array:
    """Check the mask that multiplies h at every step. No gradient flows to it."""
    recurrent_dropout_mask = _checks.array("recurrent_dropout_mask", value)
    _checks.shape("recurrent_dropout_mask", recurrent_dropout_mask, h_of(carry).shape, "the shape of h")
    return jax.lax.stop_gradient(recurrent_dropout_mask)


def check_zoneout(cell: Cell, value: object, carry: State, axis: int, steps: int) -> State:
    """Check the weight of the previous state, for each leaf of the state and every step. No gradient flows to it."""
    if cell.state is not None and _is_number(value):  # the same for every leaf
        value = cell.state(*[value] * len(jax.tree.leaves(carry)))
    found = [
        _check_zoneout_leaf(name, part, (*leaf.shape[:axis], steps, *leaf.shape[axis:]), leaf.dtype)
        for (name, part), leaf in zip(_named_leaves(cell, "zoneout", value), jax.tree.leaves(carry), strict=True)
    ]
    return found[0] if cell.state is None else cell.state(*found)


def check_reset_state(cell: Cell, value: object, carry: State, features: int) -> State:
    """Check the state after a reset, and broadcast it to the shape and dtype of the state between steps."""
    leaves = []
    for (name, part), like in zip(_named_leaves(cell, "reset_state", value), jax.tree.leaves(carry), strict=True):
        leaf = _checks.array(name, part)
        if leaf.shape not in (like.shape, like.shape[-features:]):
            expected = f"shape {like.shape} = (*batch, H), or {like.shape[-features:]} for all of the batch"
            _checks.bad_value(name, expected, str(leaf.shape))
        broadcast = jnp.broadcast_to(jnp.expand_dims(leaf, range(like.ndim - leaf.ndim)), like.shape)
        leaves.append(broadcast.astype(like.dtype))
    return leaves[0] if cell.state is None else cell.state(*leaves)


def fully_zoned_out(zoneout: State, features: int) -> jax.Array | None:
    """Return (T, *B), with the axes of xs: True where booleans keep all units of all leaves. None is nowhere."""
    leaves = jax.tree.leaves(zoneout)
    if any(k.dtype != bool for k in leaves):
        return None
    return reduce(jnp.logical_and, (jnp.all(k, range(k.ndim - features, k.ndim)) for k in leaves))


def _named_leaves(cell: Cell, name: str, value: object) -> list[tuple[str, object]]:
    """Return (name, leaf) for each leaf of a value with the structure of the state."""
    if cell.state is None:
        return [(name, value)]
    parts = _checks.container(name, value, cell.state)._asdict()
    return [(f"{name}.{field}", part) for field, part in parts.items()]


def _check_zoneout_leaf(name: str, value: object, shape: tuple[int, ...], dtype: np.dtype) -> jax.Array:
    """Check one leaf: booleans or floats of this shape, or a number for all of it."""
    if _is_number(value):
        return jnp.full(shape, _checks.rate(name, value), dtype)
    amount = _checks.converted(value)
    if not isinstance(amount, _checks.ARRAYS) or not (
        amount.dtype == bool or jnp.issubdtype(amount.dtype, jnp.floating)
    ):
        _checks.not_an_array(name, "an array of booleans or floats, or a number from 0 to 1", value)
    amount = jnp.asarray(amount)
    _checks.shape(name, amount, shape, "the shape of the state, with the time axis of `xs`")
    return jax.lax.stop_gradient(amount)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.floating) and not isinstance(value, bool)


# What is meant as the pair of an input and side inputs, rightly or not.
PAIRS = (tuple, list, dict)


def split_side_inputs(cell: Cell, name: str, value: PyTree) -> tuple[PyTree, tuple[PyTree, ...]]:
    """Return the input of the input map, and (e,) with the side inputs of the cell. `name` is `xs` or `x`."""
    if not cell.side_inputs:
        hint = "; only a cell with `side_inputs=True` takes a pair"
        _checks.bad_type(name, "a float array", _checks.describe(value) + hint)
    if not isinstance(value, tuple | list) or len(value) != 2:
        expected = f"a pair ({name}, side inputs), because the cell {cell.name!r} has side inputs"
        _checks.bad_type(name, expected, _checks.describe(value))
    return value[0], (value[1],)


def check_side_inputs(side: tuple[PyTree, ...], sizes: tuple[int, ...], **arrays: jax.Array) -> tuple[PyTree, ...]:
    """Return (e,) with arrays whose first axes have `sizes`, those of time and batch."""

    def check(path: tuple[object, ...], value: object) -> jax.Array:
        name, found = f"side input{jax.tree_util.keystr(path)}", _checks.converted(value)
        if not isinstance(found, _checks.ARRAYS):
            _checks.not_an_array(name, "an array", value)
        if found.shape[: len(sizes)] != sizes:
            _checks.bad_value(
                name, f"a shape that begins with {sizes}, as that of the input", str(found.shape), **arrays
            )
        return jnp.asarray(found)

    return tuple(jax.tree_util.tree_map_with_path(check, e) for e in side)


def check_params(cell: Cell, params: PyTree) -> Weights:
    """Check the linear maps and the other parameters of the cell against each other."""
    params = _checks.container("params", params, cell.params)
    given = params._asdict()
    w_x, w_h = (_checks.array(f"params.{f}", given[f]) for f in ("w_x", "w_h"))
    w_q = _checks.array("params.w_q", given["w_q"]) if "w_q" in given else None
    gates, recurrent_gates = len(cell.gates), cell.recurrent_gates
    into = "H" if w_q is None else "P"

    sizes = cell.recurrent.channels(w_h, recurrent_gates)
    if sizes is None or (w_q is None and sizes[0] != sizes[1]):
        names = ", ".join(cell.gates[:recurrent_gates])
        expected = (
            f"shape {cell.recurrent.shape(into, recurrent_gates, 'H')}, one block of H columns for each gate {names}"
        )
        _checks.bad_value("params.w_h", expected, str(w_h.shape))
    _, H = sizes
    if w_q is not None and w_q.ndim != 2:
        _checks.bad_value("params.w_q", "2 axes (Q, V), for the product inside the step", str(w_q.shape))
    found = cell.input.channels(w_x, gates)
    if found is None or found[1] != H:
        expected = f"shape {cell.input.shape('D', gates, H)} to match `params.w_h`"
        _checks.bad_value("params.w_x", expected, str(w_x.shape), w_h=w_h)
    biases = {f: None if given[f] is None else _checks.array(f"params.{f}", given[f]) for f in given if f in MAPS[3:]}
    for field, bias in biases.items():
        if bias is not None:
            served = recurrent_gates if field == "b_h" else gates
            _checks.shape(f"params.{field}", bias, (served * H,), f"({served} H,)", w_h=w_h)
    cell_params = None
    if cell.cell_params:
        cell_params = {f: _checks.arrays(f"params.{f}", given[f]) for f in cell.cell_params}
        cell_params = params._replace(**{f: cell_params.get(f) for f in given})
    return Weights(w_x, w_h, biases.get("b", biases.get("b_x")), biases.get("b_h"), w_q, cell_params)


def check_carry(cell: Cell, weights: Weights, carry: State | None, name: str, x: jax.Array, axis: int | None) -> State:
    """Check the initial state against x, the argument `name`, with time at `axis` if not None. None is zeros."""
    D, _ = cell.input.channels(weights.w_x, len(cell.gates)) or (0, 0)
    if x.shape[-1] != D:
        expected = f"{D} features on the last axis, as in `params.w_x`"
        _checks.bad_value(name, expected, str(x.shape[-1]), **{name: x, "w_x": weights.w_x})
    space = cell.input.space(weights.w_x, cell.input.space_of(weights.w_x, x))
    if len(space) != cell.recurrent.dimensions(weights.w_h):
        expected = f"a kernel with {len(space)} spatial axes, as in `params.w_x`"
        _checks.bad_value("params.w_h", expected, str(weights.w_h.shape))
    if cell.recurrent.space(weights.w_h, space) != space:
        expected = f"a map that preserves the spatial shape {space}"
        _checks.bad_value(f"{cell.name}.recurrent", expected, str(cell.recurrent))

    features = 1 + len(space)
    batch = tuple(size for i, size in enumerate(x.shape[: x.ndim - features]) if i != axis)
    shapes = state_shapes(cell, weights, (*batch, *space))
    if carry is None:
        sharding = batch_sharding(x, axis, features) if _mesh.is_distributed(x) else None
        leaves = [jnp.zeros(shape, x.dtype, out_sharding=sharding) for shape in shapes]
        leaves = [leaf.astype(_precision.accumulator(leaf.dtype)) for leaf in leaves]
    else:
        meaning = "(*batch, *space, H)" if space else "(*batch, H)"
        named = [(field, _checks.array(field, part)) for field, part in _named_leaves(cell, "carry", carry)]
        for (field, leaf), shape in zip(named, shapes, strict=True):
            _checks.shape(field, leaf, shape, meaning, **{name: x, "w_h": weights.w_h})
        leaves = [leaf for _, leaf in named]
    return leaves[0] if cell.state is None else cell.state(*leaves)


def state_shapes(cell: Cell, weights: Weights, batch_and_space: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return the shape of each leaf of the state: P channels of h, which is the first, and H channels of the others."""
    P, H = cell.recurrent.channels(weights.w_h, cell.recurrent_gates) or (0, 0)
    count = 1 if cell.state is None else len(cell.state._fields)  # type: ignore[attr-defined]
    return [(*batch_and_space, P), *[(*batch_and_space, H)] * (count - 1)]


def state_between_steps(carry: State, dtype: np.dtype | None) -> State:
    """Return the carry in the dtype of the state between steps: `dtype`, or at least float32 for None."""
    leaves, structure = jax.tree.flatten(carry)
    return structure.unflatten(a.astype(dtype or _precision.accumulator(a.dtype)) for a in leaves)
