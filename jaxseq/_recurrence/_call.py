"""Entry points of the public functions of every cell: check the arguments, make the masks, run the rule."""

from functools import partial, reduce
from math import prod
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from jaxseq import _checks, _mesh, _precision, _sizes, _time
from jaxseq._distributed import _recurrence as _devices
from jaxseq._distributed import _sharding
from jaxseq._recurrence._cell import MAPS, Cell, Inputs, State, Weights, h_of
from jaxseq._recurrence._forward import forward_without_residuals
from jaxseq._recurrence._inspect import inspect
from jaxseq._recurrence._rule import rule
from jaxseq._time import Options
from jaxseq._time_options import TimeOptions, with_defaults


def sequence(
    cell: Cell, params: Any, carry: State | None, xs: Any, **time: Unpack[TimeOptions]
) -> tuple[State, jax.Array]:
    """Check the arguments and run the cell over `xs`, whose axis `time_axis` is time."""
    given = with_defaults(time)
    weights = _check_params(cell, params)
    xs, features = _checks.array("xs", xs), 1 + cell.input.dimensions(weights.w_x)
    if xs.ndim < 1 + features:
        words = "(time, *batch, features)" if features == 1 else "(time, *batch, *space, channels)"
        _checks.bad_value("xs", f"at least {1 + features} axes {words}", str(xs.ndim), xs=xs)
    options = Options(
        reverse=_checks.boolean("reverse", given.reverse),
        truncation=_checks.truncation(given.truncation),
        checkpoint=_checks.checkpoint(given.checkpoint),
        axis=_checks.axis("time_axis", given.time_axis, xs.ndim - features, features, xs=xs),
        unroll=_checks.integer("unroll", given.unroll, at_least=1),
        precision=_checks.precision(given.precision),
    )
    axis, sizes = options.axis, xs.shape[:-features]
    steps, batch = sizes[axis], (*sizes[:axis], *sizes[axis + 1 :])
    dtype = None if given.state_dtype is None else _checks.dtype("state_dtype", given.state_dtype)
    first, carry = _check_carry(cell, weights, carry, "xs", xs, axis, batch, dtype)
    inspect(cell, options.precision, weights, carry, xs, len(batch))
    lengths, resets = given.lengths, given.resets
    if lengths is not None:
        lengths = _checks.lengths("lengths", lengths, batch, steps)
    if resets is not None:
        resets = _checks.mask("resets", resets)
        _checks.shape("resets", resets, sizes, "the shape of `xs` without features", xs=xs)
    weights = weights._replace(recurrent_dropout_mask=_check_dropout_mask(given.recurrent_dropout_mask, carry))
    zoneout = _check_zoneout(cell, given.zoneout, carry, axis, steps)
    if steps == 0:
        return first, jnp.zeros((*sizes, *h_of(carry).shape[len(batch) :]), xs.dtype)
    lengths, resets = _devices.place_masks_like(xs, axis, lengths, resets)
    valid, reset, last = _time.masks(options, steps, lengths, resets)
    zoned_out = _fully_zoned_out(zoneout, features)
    xs_sharding, reverse = _mesh.explicit_sharding(xs), lambda tree: tree
    if options.reverse and lengths is not None and options.truncation is not None:
        # Windows start at the first processed step of each sequence, the last one within its length.
        options = options._replace(reverse=False)
        reverse = partial(jax.tree.map, partial(_time.reverse_within_length, lengths=lengths, axis=axis))
        xs, zoneout, zoned_out = jax.tree.map(lambda a: _sharding.gather_axis(a, axis), (xs, zoneout, zoned_out))
    out, ys = _run(cell, options, len(batch), Inputs(weights, carry, *reverse((xs, valid, reset, zoneout, zoned_out))))
    ys = reverse(ys)
    out = _precision.cast_like(_time.zero_where(last, out), first)
    return out, _sharding.reshard(ys, xs_sharding and _sharding.with_feature_sharding(xs_sharding, ys, features))


def _run(cell: Cell, options: Options, batch: int, inputs: Inputs) -> tuple[State, jax.Array]:
    """Run the rule, with `batch` batch axes."""
    single = prod(h_of(inputs.carry).shape[:batch]) == 1
    symbolic = not _sizes.is_concrete(inputs.xs.shape[options.axis])
    if symbolic and options.truncation is not None and options.checkpoint is None:
        run = forward_without_residuals  # there may be no whole window
    else:
        run = partial(_run_without_batch, batch) if single else rule
    return _devices.run(run, cell, options, batch, inputs)


def _run_without_batch(axes: int, cell: Cell, options: Options, inputs: Inputs) -> tuple[State, jax.Array]:
    """Run the rule on a batch of one with its `axes` batch axes removed.

    Over axes of size one, XLA's CPU backend copies whole arrays and takes up to 1.5 times as long. The axes stay where
    the compiler may partition them.
    """
    weights, carry, xs, *masks = inputs
    if options.partitioning.implicit:
        return rule(cell, options, inputs)
    steps = xs.shape[options.axis]
    recurrent_dropout_mask = (
        None
        if weights.recurrent_dropout_mask is None
        else weights.recurrent_dropout_mask.reshape(weights.recurrent_dropout_mask.shape[axes:])
    )
    one = Inputs(
        weights._replace(recurrent_dropout_mask=recurrent_dropout_mask),
        jax.tree.map(lambda a: a.reshape(a.shape[axes:]), carry),
        *jax.tree.map(lambda a: a.reshape(steps, *a.shape[axes + 1 :]), (xs, *masks)),
    )
    result: tuple[State, jax.Array] = rule(cell, options._replace(axis=0), one)
    out, ys = result
    out = jax.tree.map(lambda a, like: a.reshape(like.shape), out, carry)
    return out, ys.reshape(*xs.shape[: axes + 1], *ys.shape[1:])


def one_step(cell: Cell, params: Any, carry: State | None, x: Any, *, precision: Any) -> tuple[State, jax.Array]:
    """Check the arguments and run one step, x (*B, *features), for use in the caller's own loop."""
    weights = _check_params(cell, params)
    x, features = _checks.array("x", x), 1 + cell.input.dimensions(weights.w_x)
    if x.ndim < features:
        if features == 1:
            _checks.bad_value("x", "at least 1 axis (*batch, features)", "a scalar")
        _checks.bad_value("x", f"at least {features} axes (*batch, *space, channels)", str(x.ndim), x=x)
    options = Options(precision=_checks.precision(precision))
    batch = x.shape[:-features]
    first, carry = _check_carry(cell, weights, carry, "x", x, None, batch, None)
    inspect(cell, options.precision, weights, carry, x, len(batch))
    out, ys = _run(cell, options, len(batch), Inputs(weights, carry, x[None], None, None))
    return _precision.cast_like(out, first), ys[0]


def _check_dropout_mask(value: Any, carry: State) -> jax.Array | None:
    """Check the mask that multiplies h at every step. No gradient flows to it."""
    if value is None:
        return None
    recurrent_dropout_mask = _checks.array("recurrent_dropout_mask", value)
    _checks.shape("recurrent_dropout_mask", recurrent_dropout_mask, h_of(carry).shape, "the shape of h")
    return jax.lax.stop_gradient(recurrent_dropout_mask)


def _check_zoneout(cell: Cell, value: Any, carry: State, axis: int, steps: int) -> State | None:
    """Check the weight of the previous state, for each leaf of the state and every step. No gradient flows to it."""
    if value is None:
        return None
    if cell.state is not None and _is_number(value):  # the same for every leaf
        value = cell.state(*[value] * len(jax.tree.leaves(carry)))
    found = [
        _check_zoneout_leaf(name, part, (*leaf.shape[:axis], steps, *leaf.shape[axis:]), leaf.dtype)
        for (name, part), leaf in zip(_named_leaves(cell, "zoneout", value), jax.tree.leaves(carry), strict=True)
    ]
    return found[0] if cell.state is None else cell.state(*found)


def _fully_zoned_out(zoneout: State | None, features: int) -> jax.Array | None:
    """Return (T, *B), with the axes of xs: True where booleans keep all units of all leaves."""
    leaves = jax.tree.leaves(zoneout)
    if not leaves or any(k.dtype != bool for k in leaves):
        return None
    return reduce(jnp.logical_and, (jnp.all(k, range(k.ndim - features, k.ndim)) for k in leaves))


def _named_leaves(cell: Cell, name: str, value: Any) -> list[tuple[str, Any]]:
    """Return (name, leaf) for each leaf of a value with the structure of the state."""
    if cell.state is None:
        return [(name, value)]
    parts = _checks.container(name, value, cell.state)._asdict()
    return [(f"{name}.{field}", part) for field, part in parts.items()]


def _check_zoneout_leaf(name: str, value: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
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


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.floating) and not isinstance(value, bool)


def _check_params(cell: Cell, params: Any) -> Weights:
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


def _check_carry(
    cell: Cell,
    weights: Weights,
    carry: State | None,
    name: str,
    x: jax.Array,
    axis: int | None,
    batch: tuple[int, ...],
    dtype: Any,
) -> tuple[State, State]:
    """Check the initial state against x (*batch, *features), with time at `axis` if not None.

    Returns it twice: in the dtypes in which the final state is returned, and in the dtype of the state between steps,
    which is `dtype`, or at least float32.
    """
    to_state_dtype = lambda a: a.astype(dtype or _precision.accumulator(a.dtype))  # noqa: E731
    D, H = cell.input.channels(weights.w_x, len(cell.gates)) or (0, 0)
    P, _ = cell.recurrent.channels(weights.w_h, cell.recurrent_gates) or (0, 0)
    if x.shape[-1] != D:
        expected = f"{D} features on the last axis, as in `params.w_x`"
        _checks.bad_value(name, expected, str(x.shape[-1]), **{name: x, "w_x": weights.w_x})
    space = cell.input.space(weights.w_x, cell.input.space_of(weights.w_x, x))
    if len(space) != cell.recurrent.dimensions(weights.w_h):
        _checks.bad_value(
            "params.w_h", f"a kernel with {len(space)} spatial axes, as in `params.w_x`", str(weights.w_h.shape)
        )
    if cell.recurrent.space(weights.w_h, space) != space:
        _checks.bad_value(
            f"{cell.name}.recurrent", f"a map that preserves the spatial shape {space}", str(cell.recurrent)
        )

    count = 1 if cell.state is None else len(cell.state._fields)  # type: ignore[attr-defined]
    shapes = [(*batch, *space, P), *[(*batch, *space, H)] * (count - 1)]
    meaning = "(*batch, *space, H)" if space else "(*batch, H)"
    if carry is None:
        leaves = [to_state_dtype(_sharding.zeros(shape, x, axis, 1 + len(space))) for shape in shapes]
    else:
        named = [(field, _checks.array(field, part)) for field, part in _named_leaves(cell, "carry", carry)]
        for (field, leaf), shape in zip(named, shapes, strict=True):
            _checks.shape(field, leaf, shape, meaning, **{name: x, "w_h": weights.w_h})
        leaves = [leaf for _, leaf in named]
    first = leaves[0] if cell.state is None else cell.state(*leaves)
    return first, jax.tree.map(to_state_dtype, first)
