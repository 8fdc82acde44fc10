"""Checks of the parameters, the carry and the arrays of a recurrence. The errors name the argument."""

from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxseq import _checks, _mesh, _precision
from jaxseq._annotations import check_annotated, input_size
from jaxseq._distributed._sharding import batch_sharding
from jaxseq._recurrence._cell import MAPS, State, h_of
from jaxseq._recurrence._inputs import Weights
from jaxseq._recurrence._linear_cell import AnyCell, LinearCell, shapes_of


def check_dropout_mask(value: object, carry: State) -> jax.Array:
    """Check the mask that multiplies h at every step. No gradient flows to it."""
    recurrent_dropout_mask = _checks.array("recurrent_dropout_mask", value)
    _checks.shape("recurrent_dropout_mask", recurrent_dropout_mask, h_of(carry).shape, "the shape of h")
    return jax.lax.stop_gradient(recurrent_dropout_mask)


def check_zoneout(cell: AnyCell, value: object, carry: State, axis: int, steps: int) -> State:
    """Check the weight of the previous state, for each leaf of the state and every step. No gradient flows to it."""
    if cell.state is not None and _is_number(value):  # the same for every leaf
        value = cell.state(*[value] * len(jax.tree.leaves(carry)))
    found = [
        _check_zoneout_leaf(name, part, (*leaf.shape[:axis], steps, *leaf.shape[axis:]), leaf.dtype)
        for (name, part), leaf in zip(_named_leaves(cell, "zoneout", value), jax.tree.leaves(carry), strict=True)
    ]
    return found[0] if cell.state is None else cell.state(*found)


def check_reset_state(cell: AnyCell, value: object, carry: State, features: int) -> State:
    """Check the state after a reset, and broadcast it to the shape and dtype of the state between steps."""
    leaves = []
    for (name, part), like in zip(_named_leaves(cell, "reset_state", value), jax.tree.leaves(carry), strict=True):
        leaf = _checks.array(name, part, complex_ok=jnp.iscomplexobj(like))
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


def _named_leaves(cell: AnyCell, name: str, value: object) -> list[tuple[str, object]]:
    """Return (name, leaf) for each leaf of a value with the structure of the state."""
    if cell.state is None:
        return [(name, value)]
    parts = _checks.container(name, value, cell.state)._asdict()
    return [(f"{name}.{field}", part) for field, part in parts.items()]


def _check_zoneout_leaf(name: str, value: object, shape: tuple[int, ...], dtype: np.dtype) -> jax.Array:
    """Check one leaf: booleans or floats of this shape, or a number for all of it."""
    if _is_number(value):
        return jnp.full(shape, _checks.rate(name, value), jnp.finfo(dtype).dtype)
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


def split_side_inputs(cell: AnyCell, name: str, value: PyTree) -> tuple[PyTree, tuple[PyTree, ...]]:
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


def input_features(cell: AnyCell, weights: Weights) -> int:
    """Return the number of feature axes of the input."""
    return 1 if isinstance(cell, LinearCell) else 1 + cell.input.dimensions(weights.w_x)


def check_params(cell: AnyCell, params: PyTree) -> Weights:
    """Check the linear maps and the other parameters of the cell against each other."""
    if isinstance(cell, LinearCell):
        no_map: PyTree = None
        return Weights(no_map, no_map, None, None, cell_params=check_annotated("params", params, cell.params))
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


def check_carry(
    cell: AnyCell, weights: Weights, carry: State | None, name: str, x: jax.Array, axis: int | None
) -> State:
    """Check the initial state against x, the argument `name`, with time at `axis` if not None. None is zeros."""
    if isinstance(cell, LinearCell):
        return _check_carry_of_linear_cell(cell, weights, carry, name, x, axis)
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


def _check_carry_of_linear_cell(
    cell: LinearCell, weights: Weights, carry: State | None, name: str, x: jax.Array, axis: int | None
) -> jax.Array:
    """Check the state of a linear cell, one array whose dtype is complex if the coefficients are."""
    D = input_size(weights.cell_params) or x.shape[-1]
    if x.shape[-1] != D:
        _checks.bad_value(name, f"{D} features on the last axis, as in `params`", str(x.shape[-1]), **{name: x})
    state = shapes_of(cell, weights.cell_params, D, x.dtype).state
    batch = tuple(size for i, size in enumerate(x.shape[:-1]) if i != axis)
    shape = (*batch, *state.shape)
    if carry is None:
        dtype = _in_field_of(state, _precision.accumulator(x.dtype))
        return jnp.zeros(shape, dtype, out_sharding=batch_sharding(x, axis, 1) if _mesh.is_distributed(x) else None)
    h = _checks.array("carry", carry, complex_ok=True)
    is_complex = jnp.issubdtype(state.dtype, jnp.complexfloating)
    if jnp.iscomplexobj(h) != is_complex:
        kind = "a complex array" if is_complex else "a real array"
        _checks.bad_type("carry", f"{kind}, as the state of the cell {cell.name!r} is", _checks.describe(carry))
    _checks.shape("carry", h, shape, "(*batch, H)", **{name: x})
    return h


def _in_field_of(state: jax.ShapeDtypeStruct, dtype: np.dtype) -> np.dtype:
    """Return `dtype`, or the complex dtype with such parts if the state is complex."""
    is_complex = jnp.issubdtype(state.dtype, jnp.complexfloating)
    return _precision.common(dtype, np.dtype(np.complex64)) if is_complex else dtype


def _state_of_linear_cell(cell: LinearCell, weights: Weights) -> jax.ShapeDtypeStruct:
    """Return the shape and dtype of the state of an example, from the parameters alone."""
    D = input_size(weights.cell_params)
    if D is None:
        expected = 'an annotation with D, the number of features of the input, such as Float[Array, "D H"]'
        _checks.bad_value(f"{cell.name}.params", expected, cell.params.__name__)
    return shapes_of(cell, weights.cell_params, D, np.dtype(np.float32)).state


def zero_leaves(
    cell: AnyCell, weights: Weights, batch_and_space: tuple[int, ...], dtype: np.dtype | None
) -> list[jax.Array]:
    """Return the leaves of a state of zeros. A dtype of None is that of the parameters, float32 at least."""
    if dtype is None:
        of_params = weights.cell_params if isinstance(cell, LinearCell) else weights.w_h
        dtype = _precision.accumulator(_precision.promote(*jax.tree.leaves(of_params)))
    if isinstance(cell, LinearCell):
        dtype = _in_field_of(_state_of_linear_cell(cell, weights), dtype)
    return [jnp.zeros(shape, dtype) for shape in state_shapes(cell, weights, batch_and_space)]


def output_size(cell: AnyCell, weights: Weights) -> int:
    """Return the number of output features."""
    if isinstance(cell, LinearCell):
        D = input_size(weights.cell_params)
        return shapes_of(cell, weights.cell_params, D, np.dtype(np.float32)).y.shape[-1] if D else 0
    return state_shapes(cell, weights, ())[0][-1]


def state_shapes(cell: AnyCell, weights: Weights, batch_and_space: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return the shape of each leaf of the state: P channels of h, which is the first, and H channels of the others."""
    if isinstance(cell, LinearCell):
        return [(*batch_and_space, *_state_of_linear_cell(cell, weights).shape)]
    P, H = cell.recurrent.channels(weights.w_h, cell.recurrent_gates) or (0, 0)
    count = 1 if cell.state is None else len(cell.state._fields)  # type: ignore[attr-defined]
    return [(*batch_and_space, P), *[(*batch_and_space, H)] * (count - 1)]


def state_between_steps(carry: State, dtype: np.dtype | None) -> State:
    """Return the carry in the dtype of the state between steps: `dtype`, or at least float32 for None."""

    def between(a: jax.Array) -> jax.Array:
        if dtype is None:
            return a.astype(_precision.accumulator(a.dtype))
        return a.astype(_precision.common(dtype, np.dtype(np.complex64)) if jnp.iscomplexobj(a) else dtype)

    return jax.tree.map(between, carry)
