"""A sequence sharded over devices along time: each device passes its final state to the next.

With D devices, F_i the run over the shard of device i, and s_0 the initial state,

    s_{i+1} = F_i(s_i),    0 <= i < D - 1                                                          (1)

Each F_i waits for the previous one, so adding devices does not reduce the number of sequential steps. Sharding time
saves memory: each device stores T / D steps of inputs, outputs and residuals. With truncation it also saves time in the
backward pass: if no gradient crosses from shard to shard, all shards run backward at the same time.

All devices run the same program, so (1) is D - 1 rounds in which every device runs its F. After round i, the states are
correct up to device i + 1. A causal convolution depends only on the inputs within its kernel size, so it needs only as
many rounds as there are shards within one kernel size: one, if the shards are long.

The backward pass through (1) is also one round after another. It recomputes each round, and stores only its initial
state.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxseq import _checks, _mesh
from jaxseq._distributed import _sharding

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
    communication that a recurrence needs when time is sharded. On an explicit mesh, the ops of jaxseq call this
    function themselves.

    The shards are processed one after another, so this takes as many steps as on one device. Gradients flow back
    through it over all shards. To cut the gradient between shards, as with `truncation`, apply `jax.lax.stop_gradient`
    to the returned carry on all devices but the first. The backward pass then runs on all shards at the same time.

    Args:
        step: a function `(carry) -> carry` that runs over this device's shard. It may close over this device's arrays.
        carry: the initial state, a pytree of arrays, the same on all devices.
        axis_name: the mesh axis that shards time, or a tuple of mesh axes, in the order in which the `PartitionSpec` of
            time names them.
        rounds: the number of times that states are passed on. None is the number of devices minus one. Fewer rounds are
            enough if the state does not depend on steps more than `rounds` shards back.
        reverse: if True, process time backwards, from the last device to the first.

    Returns:
        The state with which this device starts.

    Raises:
        TypeError: if `step` is not a function, or an option has the wrong type.
        ValueError: if a mesh axis does not exist, if the call is not inside `shard_map`, or if `rounds` is less than
            one.

    Example:
        >>> import jax, jax.numpy as jnp, jaxseq
        >>> from jax.sharding import AxisType, PartitionSpec as P
        >>> mesh = jax.make_mesh((1,), ("time",), axis_types=(AxisType.Auto,))  # use all devices in practice
        >>> params = jaxseq.gru_init(jax.random.key(0), 3, 4)
        >>> def run(params, carry, xs):
        ...     start = jaxseq.carry_across_shards(lambda carry: jaxseq.gru(params, carry, xs)[0], carry, "time")
        ...     return jaxseq.gru(params, start, xs)[1]
        >>> run = jax.shard_map(run, mesh=mesh, in_specs=(P(), P(), P("time")), out_specs=P("time"))
        >>> run(params, jnp.zeros((2, 4)), jnp.ones((8, 2, 3))).shape
        (8, 2, 4)

    Reference:
        Y. Huang et al., GPipe: efficient training of giant neural networks using pipeline parallelism (2019),
        section 2; here the pipeline runs along time instead of depth, with one micro-batch.
    """
    if not callable(step):
        _checks.bad_type("step", "a function (carry) -> carry", repr(step))
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    known = jax.sharding.get_abstract_mesh().manual_axes
    if not names or not set(names) <= set(known) or len(set(names)) < len(names):
        _checks.bad_value("axis_name", f"distinct manual mesh axes of `shard_map`, out of {known}", repr(axis_name))
    devices = lax.axis_size(names)
    rounds = devices - 1 if rounds is None else min(devices - 1, _checks.integer("rounds", rounds, at_least=1))
    reverse = _checks.boolean("reverse", reverse)
    carry, _ = _mesh.align_varying((carry, lax.axis_index(names)))
    first, offset = is_first(names, reverse=reverse), -1 if reverse else 1

    def one_round(start: State, _: None) -> tuple[State, None]:
        sent = jax.tree.map(lambda a: _sharding.shift_between_shards(a, names, offset), step(start))
        return jax.tree.map(lambda a, b: jnp.where(first, a, b.astype(a.dtype)), carry, sent), None

    start = jax.tree.map(lambda a: jnp.where(first, a, jnp.zeros_like(a)), carry)
    return lax.scan(jax.checkpoint(one_round, prevent_cse=False), start, None, length=rounds)[0] if rounds else start


def is_first(names: Names, *, reverse: bool) -> jax.Array:
    """Return whether this device has the shard that is processed first."""
    return lax.axis_index(names) == (lax.axis_size(names) - 1 if reverse else 0)


def from_one(is_source: jax.Array, tree: State, names: Names) -> State:
    """Broadcast `tree` from one device to all.

    `is_source` is True on the device to copy from: a scalar, or one boolean per sequence.
    """

    def pick(a: jax.Array) -> jax.Array:
        mask = is_source.reshape(is_source.shape + (1,) * (a.ndim - is_source.ndim))
        return lax.psum(jnp.where(mask, a, jnp.zeros_like(a)), names)

    return jax.tree.map(pick, tree)
