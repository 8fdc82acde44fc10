"""Entry points of the public functions of every cell: check the arguments, make the masks, run the rule."""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jax.lax import PrecisionLike
from jax.typing import ArrayLike
from jaxtyping import PyTree

from jaxseq import _checks, _mesh, _precision, _sizes, _time, tuning
from jaxseq._distributed import _recurrence as _distributed
from jaxseq._distributed._sharding import gather_axis, place_masks_like, place_steps_like
from jaxseq._recurrence._arguments import (
    PAIRS,
    check_carry,
    check_dropout_mask,
    check_params,
    check_reset_state,
    check_side_inputs,
    check_zoneout,
    fully_zoned_out,
    input_features,
    split_side_inputs,
    state_between_steps,
)
from jaxseq._recurrence._cell import Cell, State, h_of
from jaxseq._recurrence._forward import forward_without_residuals
from jaxseq._recurrence._inputs import Inputs, Masks, with_partitioning
from jaxseq._recurrence._inspect import inspect
from jaxseq._recurrence._linear_cell import AnyCell, LinearCell, shapes_of
from jaxseq._recurrence._linear_rule import rule as linear_rule
from jaxseq._recurrence._rule import rule
from jaxseq._time_options import Options, TimeOptions, with_defaults

Rule = Callable[[AnyCell, Options, Inputs], tuple[State, jax.Array]]


def sequence(
    cell: AnyCell, params: PyTree, carry: State | None, xs: PyTree[ArrayLike], **time: Unpack[TimeOptions]
) -> tuple[State, jax.Array]:
    """Check the arguments and run the cell over `xs`, whose axis `time_axis` is time."""
    given = with_defaults(time)
    weights = check_params(cell, params)
    side: tuple[PyTree, ...] = ()
    if cell.side_inputs or isinstance(xs, PAIRS):
        xs, side = split_side_inputs(cell, "xs", xs)
    xs, features = _checks.array("xs", xs), input_features(cell, weights)
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
        tuning=tuning.for_backend().recurrence,
        linear=tuning.for_backend().linear,
        return_states=_checks.boolean("return_states", given.return_states),
    )
    axis, sizes = options.axis, xs.shape[:-features]
    steps, batch = sizes[axis], (*sizes[:axis], *sizes[axis + 1 :])
    if side:
        side = check_side_inputs(side, sizes, xs=xs)
    dtype = None if given.state_dtype is None else _checks.dtype("state_dtype", given.state_dtype)
    first = check_carry(cell, weights, carry, "xs", xs, axis)
    between = state_between_steps(first, dtype)
    first, carry = between if carry is None else first, between  # `first` has the dtypes of the final state
    y_shape = _inspect(cell, options, Inputs(weights, carry, xs, Masks(side=side)), len(batch))
    lengths, resets, zoneout = given.lengths, given.resets, given.zoneout
    if lengths is not None:
        lengths = _checks.lengths("lengths", lengths, batch, steps)
    if resets is not None:
        resets = _checks.mask("resets", resets)
        _checks.shape("resets", resets, sizes, "the shape of `xs` without features", xs=xs)
    if given.recurrent_dropout_mask is not None:
        if isinstance(cell, LinearCell):
            got = _checks.describe(given.recurrent_dropout_mask)
            _checks.bad_type("recurrent_dropout_mask", f"None, since {cell.name!r} has no recurrent map", got)
        weights = weights._replace(recurrent_dropout_mask=check_dropout_mask(given.recurrent_dropout_mask, carry))
    if zoneout is not None:
        zoneout = check_zoneout(cell, zoneout, carry, axis, steps)
    reset_state = None
    if given.reset_state is not None:
        reset_state = check_reset_state(cell, given.reset_state, carry, features)
        weights = weights._replace(reset_state=None if resets is None else reset_state)
    if steps == 0:
        nothing = jax.tree.map(lambda a: jnp.zeros((*sizes, *a.shape[len(batch) :]), a.dtype), first)
        return nothing if options.return_states else first, jnp.zeros((*sizes, *y_shape), xs.dtype)

    distributed = _mesh.is_distributed(weights, carry, xs, lengths, resets, zoneout, side)
    if distributed:
        lengths, resets = place_masks_like(xs, axis, lengths, resets)
    valid = reset = last = None
    if lengths is not None or resets is not None:
        valid, reset, last = _time.masks(options, steps, lengths, resets)
    zoned_out = None if zoneout is None else fully_zoned_out(zoneout, features)
    read = None
    if zoned_out is not None:  # a step reads its input where it is neither padding nor keeps all of its state
        if distributed:
            valid, zoned_out = place_steps_like(xs, (valid, zoned_out))
        read = ~zoned_out if valid is None else valid & ~zoned_out
    inputs = Inputs(weights, carry, xs, Masks(valid, reset, zoneout, read, side))
    if options.reverse and options.truncation is not None and lengths is not None:
        # Windows start at the first processed step of each sequence, the last one within its length.
        inputs = _reverse_within_length(inputs, lengths, axis)
        out, ys = _run(cell, options._replace(reverse=False), inputs, len(batch), distributed)
        in_order = partial(_time.reverse_within_length, lengths=lengths, axis=axis)
        out, ys = jax.tree.map(in_order, out) if options.return_states else out, in_order(ys)
    else:
        out, ys = _run(cell, options, inputs, len(batch), distributed)
    if distributed:
        place = lambda a: _distributed.place_outputs_like(xs, a, features)  # noqa: E731
        out, ys = jax.tree.map(place, out) if options.return_states else out, place(ys)
    if not options.return_states:
        out = _time.replace_where(last, out, reset_state)
    return _precision.cast_like(out, first), ys


def _reverse_within_length(inputs: Inputs, lengths: jax.Array, axis: int) -> Inputs:
    """Return the inputs with each sequence reversed within its length."""
    gather = partial(gather_axis, axis=axis)
    masks = jax.tree.map(gather, inputs.masks)
    reverse = partial(_time.reverse_within_length, lengths=lengths, axis=axis)
    return inputs._replace(xs=reverse(gather(inputs.xs)), masks=jax.tree.map(reverse, masks))


def _inspect(cell: AnyCell, options: Options, inputs: Inputs, batch: int) -> tuple[int, ...]:
    """Check what the functions of a cell return, and return the shape of the output of an example."""
    if isinstance(cell, LinearCell):
        params, xs = inputs.weights.cell_params, inputs.xs
        return shapes_of(cell, params, xs.shape[-1], xs.dtype).y.shape
    inspect(cell, options.precision, inputs, batch)
    return h_of(inputs.carry).shape[batch:]


def _run(cell: AnyCell, options: Options, inputs: Inputs, batch: int, distributed: bool) -> tuple[State, jax.Array]:
    """Run the rule, with `batch` batch axes."""
    chosen: Any = rule
    symbolic = not _sizes.is_concrete(inputs.xs.shape[options.axis])
    if isinstance(cell, LinearCell):
        chosen = linear_rule
    elif symbolic and options.truncation is not None and options.checkpoint is None:
        chosen = forward_without_residuals  # there may be no whole window
    elif batch and prod(h_of(inputs.carry).shape[:batch]) == 1:
        chosen = partial(_run_without_batch, batch)
    if distributed:
        return _distributed.run(chosen, cell, options, batch, inputs)
    return chosen(*with_partitioning(cell, options, _mesh.partitioning(inputs)), inputs)


def _run_without_batch(axes: int, cell: Cell, options: Options, inputs: Inputs) -> tuple[State, jax.Array]:
    """Run the rule on a batch of one with its `axes` batch axes removed.

    Over axes of size one, XLA's CPU backend copies whole arrays and takes up to 1.5 times as long. The axes stay where
    the compiler may partition them.
    """
    weights, carry, xs, masks = inputs
    if options.partitioning.implicit:
        return rule(cell, options, inputs)
    steps, dropout = xs.shape[options.axis], weights.recurrent_dropout_mask
    if dropout is not None:
        weights = weights._replace(recurrent_dropout_mask=dropout.reshape(dropout.shape[axes:]))
    without_batch = lambda a: a.reshape(a.shape[axes:])  # noqa: E731
    weights = weights._replace(reset_state=jax.tree.map(without_batch, weights.reset_state))
    state = jax.tree.map(without_batch, carry)
    steps_first = jax.tree.map(lambda a: a.reshape(steps, *a.shape[axes + 1 :]), (xs, masks))
    result: tuple[State, jax.Array] = rule(cell, options._replace(axis=0), Inputs(weights, state, *steps_first))
    out, ys = result
    over_time = lambda a: a.reshape(*xs.shape[: axes + 1], *a.shape[1:])  # noqa: E731
    if options.return_states:
        return jax.tree.map(over_time, out), over_time(ys)
    return jax.tree.map(lambda a, like: a.reshape(like.shape), out, carry), over_time(ys)


def one_step(
    cell: AnyCell, params: PyTree, carry: State | None, x: PyTree[ArrayLike], *, precision: PrecisionLike
) -> tuple[State, jax.Array]:
    """Check the arguments and run one step, x (*B, *features), for use in the caller's own loop."""
    weights = check_params(cell, params)
    side: tuple[PyTree, ...] = ()
    if cell.side_inputs or isinstance(x, PAIRS):
        x, side = split_side_inputs(cell, "x", x)
    x, features = _checks.array("x", x), input_features(cell, weights)
    if x.ndim < features:
        if features == 1:
            _checks.bad_value("x", "at least 1 axis (*batch, features)", "a scalar")
        _checks.bad_value("x", f"at least {features} axes (*batch, *space, channels)", str(x.ndim), x=x)
    of_backend = tuning.for_backend()
    options = Options(precision=_checks.precision(precision), tuning=of_backend.recurrence, linear=of_backend.linear)
    batch = x.ndim - features
    first = check_carry(cell, weights, carry, "x", x, None)
    carry = state_between_steps(first, None)
    side = jax.tree.map(lambda a: a[None], check_side_inputs(side, x.shape[:batch], x=x))
    inputs = Inputs(weights, carry, x[None], Masks(side=side))
    _inspect(cell, options, inputs, batch)
    out, ys = _run(cell, options, inputs, batch, _mesh.is_distributed(inputs))
    return _precision.cast_like(out, first), ys[0]
