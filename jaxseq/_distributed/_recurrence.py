"""Shardings of the arrays of a recurrence: on an explicit mesh, time and batch of all arrays are sharded like those of
xs.

Mesh axes that shard features are automatic inside the rule (`_sharding.with_auto_axes`): the product of a sharded
state needs a collective at every step, and no rule can move it out of the loop.

Each device processes its own shard of the time axis. The initial state of a shard comes from the previous shard through
`jaxseq.carry_across_shards`. If truncation windows end at the ends of shards, no gradient crosses from one shard to
another, and the backward pass runs on all devices at once, in parallel over the windows of each shard. Without
truncation, cotangents of the state travel back through the shards. Windows that cross the end of a shard are left to
the compiler, which gathers xs and shards the residuals.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jaxtyping import PyTree

from jaxseq import _mesh, _windows
from jaxseq._distributed import _sharding
from jaxseq._distributed._carry_across_shards import carry_across_shards, from_one, is_first
from jaxseq._recurrence._cell import State, h_of
from jaxseq._recurrence._inputs import Inputs, with_partitioning
from jaxseq._recurrence._linear_cell import AnyCell, LinearCell
from jaxseq._time_options import Options

Rule = Callable[..., tuple[State, jax.Array]]  # (cell, options, inputs), and for linear cells the shards


def run(rule: Rule, cell: AnyCell, options: Options, batch: int, inputs: Inputs) -> tuple[State, jax.Array]:
    """Run `rule` with `batch` batch axes and the shardings that the module docstring describes."""
    inputs = _align_inputs(_mesh.align_varying(inputs), batch, options.axis)
    weights, carry, xs, masks = inputs
    per_example = weights.recurrent_dropout_mask, weights.reset_state, carry
    maps = weights._replace(recurrent_dropout_mask=None, reset_state=None)
    of_features = [(a, slice(None)) for a in jax.tree.leaves(maps)]
    of_features += [(a, slice(batch, None)) for a in jax.tree.leaves(per_example)]
    of_features += [(a, slice(batch + 1, None)) for a in jax.tree.leaves((xs, masks.zoneout))]
    names = frozenset().union(*(_sharding.sharded_axes(a, axes) for a, axes in of_features))
    is_linear = isinstance(cell, LinearCell)
    if not _time_shards_fit(options, xs, is_linear=is_linear):
        names |= _sharding.sharded_axes(xs, options.axis)
    xs_sharding = _mesh.explicit_sharding(xs)
    of_ys = xs_sharding and _sharding.with_feature_sharding(xs_sharding, h_of(carry), xs.ndim - batch - 1)
    of_states = of_ys
    if is_linear and xs_sharding is not None:  # the outputs have features of their own
        of_ys = _sharding.unshard_axis(xs_sharding, xs.ndim - 1)
    results = jax.tree.map(lambda a: of_states if options.return_states else _mesh.explicit_sharding(a), carry), of_ys
    result: tuple[State, jax.Array] = _sharding.with_auto_axes(
        partial(_run_on_time_shards, rule, cell, options), names, results
    )(inputs)
    return result


def place_outputs_like(xs: jax.Array, ys: jax.Array, features: int) -> jax.Array:
    """Return ys with batch and time sharded like those of xs."""
    xs_sharding = _mesh.explicit_sharding(xs)
    return _sharding.reshard(ys, xs_sharding and _sharding.with_feature_sharding(xs_sharding, ys, features))


def _align_inputs(inputs: Inputs, batch: int, axis: int) -> Inputs:
    weights, carry, xs, masks = inputs
    xs_sharding = _mesh.explicit_sharding(xs)
    if xs_sharding is None:
        return inputs
    features = xs.ndim - batch - 1
    of_batch = _sharding.drop_axis(xs_sharding, axis)

    def place(tree: PyTree, s: NamedSharding) -> PyTree:
        return jax.tree.map(lambda a: _sharding.reshard(a, _sharding.with_feature_sharding(s, a, features)), tree)

    side = jax.tree.map(lambda a: _sharding.reshard(a, _sharding.leading_axes(xs_sharding, batch + 1)), masks.side)
    zoneout = place(masks.zoneout, xs_sharding)
    masks = _sharding.place_steps_like(xs, masks._replace(zoneout=None, side=None))._replace(zoneout=zoneout, side=side)
    weights = _sharding.unshard(weights, _sharding.sharded_axes(xs, slice(batch + 1)))._replace(
        recurrent_dropout_mask=place(weights.recurrent_dropout_mask, of_batch),
        reset_state=place(weights.reset_state, of_batch),
    )
    return Inputs(weights, place(carry, of_batch), xs, masks)


# --- Time shards ---


def _time_shards_fit(options: Options, xs: jax.Array, *, is_linear: bool) -> bool:
    """Return whether each device can process its own shard of time."""
    steps, devices = xs.shape[options.axis], _sharding.shard_count(xs, options.axis)
    if devices == 1:
        return True
    k1, k2 = _windows.window_lengths(options.truncation, steps)
    if is_linear:
        return k1 >= steps
    return k1 >= steps or (k1 == k2 and steps // devices % k1 == 0)


def _run_on_time_shards(rule: Rule, cell: AnyCell, options: Options, inputs: Inputs) -> tuple[State, jax.Array]:
    """Run `rule` on each device, with its shards of batch and time."""
    xs, axis = inputs.xs, options.axis
    names, steps = _sharding.mesh_axes_of(xs, axis), xs.shape[axis]

    def run(inputs: Inputs) -> tuple[State, jax.Array]:
        inputs = _mesh.align_varying(inputs)
        static = with_partitioning(cell, options, _mesh.partitioning(inputs))
        run_shard = lambda carry: rule(*static, inputs._replace(carry=carry))  # noqa: E731
        if not names:
            return run_shard(inputs.carry)
        if isinstance(cell, LinearCell):  # all devices at once: the rule exchanges states
            first = jnp.where(is_first(names, reverse=options.reverse), inputs.carry, 0)
            last, ys = rule(*static, inputs._replace(carry=first), names)
            end = last if options.return_states else from_one(is_first(names, reverse=not options.reverse), last, names)
            return end, ys
        to_end = static[0], static[1]._replace(return_states=False)
        start = carry_across_shards(
            lambda carry: rule(*to_end, inputs._replace(carry=carry))[0], inputs.carry, names, reverse=options.reverse
        )
        if _windows.window_lengths(options.truncation, steps)[0] < steps:
            first = is_first(names, reverse=options.reverse)
            start = jax.tree.map(lambda a, b: jnp.where(first, a, b), inputs.carry, lax.stop_gradient(start))
        last, ys = run_shard(start)
        if options.return_states:
            return last, ys
        return from_one(_shard_holds_end(options, inputs, names), last, names), ys

    of_states = jax.tree.map(lambda _: xs, inputs.carry) if options.return_states else inputs.carry
    result: tuple[State, jax.Array] = _sharding.map_shards(run, (inputs,), (of_states, xs))
    return result


def _shard_holds_end(options: Options, inputs: Inputs, names: tuple[str, ...]) -> jax.Array:
    """Return whether this device has the final state, for all sequences or for each.

    With `valid` in forward order it is one boolean per sequence: the end of a sequence may be in any shard, and no
    gradient then has to cross shards of padding.
    """
    if inputs.masks.valid is None or options.reverse:
        return is_first(names, reverse=not options.reverse)
    steps = inputs.xs.shape[options.axis]
    length = lax.psum(jnp.sum(inputs.masks.valid, options.axis, dtype=jnp.int32), names)
    return jnp.maximum(length - 1, 0) // steps == lax.axis_index(names)
