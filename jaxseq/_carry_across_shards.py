"""Time divided over devices: each holds a stretch of it, and hands its last state on to the next.

With D devices, F_i the run over the stretch of device i, and s_0 the first state,

    s_{i+1} = F_i(s_i),    0 <= i < D - 1                                                          (1)

Each F waits for the one before it: no number of devices makes a recurrence take fewer steps. What division saves is
memory, each device holding T / D steps of input, output and residuals, and, under truncation, the time of backward:
where no gradient crosses from stretch to stretch, all of them go back at once.

All devices run the same program, so (1) is D - 1 rounds of all F at once, of which round i is that of device i, and
leaves states that are right up to device i + 1. A causal convolution remembers no more than its window, so there as
many rounds do as a window has stretches: one, if the stretches are long.

What comes back through (1) is one round after the other as well, each of them run again on the way: a round keeps its
first state alone.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxseq import _checks, _sharding

State = TypeVar("State")
Names = str | tuple[str, ...]


def carry_across_shards(
    step: Callable[[State], State],
    carry: State,
    axis_name: Names,
    *,
    rounds: int | None = None,
    reverse: bool = False,
) -> State:
    """Return the initial carry of this device's shard of time, inside `jax.shard_map`.

    Device 0 starts with `carry`. Device i + 1 starts with the carry that `step` returns on device i. This is the only
    communication that a recurrence needs when time is sharded. On an explicit mesh the ops of this library do it
    themselves.

    The shards are processed one after the other, so this takes as many steps as one device would. Gradients flow through
    it and back over all shards. If the gradient should be cut between shards, as with `truncation`, apply
    `jax.lax.stop_gradient` to the returned carry on all devices but the first; then the backward pass runs on all shards
    at once.

    Args:
        step: `(carry) -> carry`, the run over this device's own stretch, and over its own arrays.
        carry: the first state, any pytree of arrays, the same on all devices.
        axis_name: the mesh axis that divides time, or a tuple of several, in the order in which the `PartitionSpec`
            of time names them.
        rounds: how often states are handed on: one less than there are devices (None) or fewer, where a step forgets
            what lies that many stretches behind.
        reverse: whether time is read backwards, so that the last device is the first.

    Returns:
        The state with which this device begins.

    Raises:
        TypeError: a `step` that is no function, or an option of the wrong kind.
        ValueError: a mesh axis that does not exist, or not inside of `shard_map`; rounds below one.

    Example:
        >>> import jax, jax.numpy as jnp, jaxseq
        >>> from jax.sharding import AxisType, PartitionSpec as P
        >>> mesh = jax.make_mesh((1,), ("time",), axis_types=(AxisType.Auto,))  # as many as there are
        >>> params = jaxseq.gru_init(jax.random.key(0), 3, 4)
        >>> def run(params, carry, xs):
        ...     start = jaxseq.carry_across_shards(lambda carry: jaxseq.gru(params, carry, xs)[0], carry, "time")
        ...     return jaxseq.gru(params, start, xs)[1]
        >>> run = jax.shard_map(run, mesh=mesh, in_specs=(P(), P(), P("time")), out_specs=P("time"))
        >>> run(params, jnp.zeros((2, 4)), jnp.ones((8, 2, 3))).shape
        (8, 2, 4)

    Reference:
        The stretches of a pipeline, as in Y. Huang et al., GPipe: efficient training of giant neural networks using
        pipeline parallelism (2019), section 2, along time in place of depth, and with one micro-batch.
    """
    if not callable(step):
        _checks.bad_type("step", "a function (carry) -> carry", repr(step))
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    known = jax.sharding.get_abstract_mesh().manual_axes
    if not names or not set(names) <= set(known) or len(set(names)) < len(names):
        _checks.bad_value("axis_name", f"mesh axes that `shard_map` divides, of {known}, each once", repr(axis_name))
    devices = lax.axis_size(names)
    rounds = devices - 1 if rounds is None else min(devices - 1, _checks.integer("rounds", rounds, at_least=1))
    reverse = _checks.boolean("reverse", reverse)
    carry, _ = _sharding.align_varying((carry, lax.axis_index(names)))
    leads, towards = is_first(names, reverse=reverse), -1 if reverse else 1

    def hand_on(start: State, _: None) -> tuple[State, None]:
        sent = jax.tree.map(lambda a: _sharding.shift_between_shards(a, names, towards), step(start))
        return jax.tree.map(lambda a, b: jnp.where(leads, a, b.astype(a.dtype)), carry, sent), None

    start = jax.tree.map(lambda a: jnp.where(leads, a, jnp.zeros_like(a)), carry)
    return lax.scan(jax.checkpoint(hand_on, prevent_cse=False), start, None, length=rounds)[0] if rounds else start


def is_first(names: Names, *, reverse: bool) -> jax.Array:
    """Whether this device holds the stretch that is read first."""
    return lax.axis_index(names) == (lax.axis_size(names) - 1 if reverse else 0)


def from_one(mine: jax.Array, tree: State, names: Names) -> State:
    """To all devices what one of them has, that for which `mine` holds: for each sequence, or for all alike."""

    def pick(a: jax.Array) -> jax.Array:
        return lax.psum(jnp.where(mine.reshape(mine.shape + (1,) * (a.ndim - mine.ndim)), a, jnp.zeros_like(a)), names)

    return jax.tree.map(pick, tree)
