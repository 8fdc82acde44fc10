r"""Time sharded over devices: all devices compute their own steps at once.

The steps of one device are an affine map of the state, h -> A h + e. A is the product of their factors, and e the state
after them if they start from zero. The state that enters the steps of device i is that of the devices before it:

    (A_0, e_0) then (A_1, e_1) then ... then (A_{i-1}, e_{i-1})

All n devices find theirs in log2 n exchanges. After k of them, a device has two pairs: that of the 2^k devices that end
with itself (`whole`), and that of these without itself (`before`). It receives `whole` from the device 2^k before it,
and puts it in front of both. Then each device computes its states, from the right one.

The backward pass is the same in the opposite direction. A gradient takes 2 log2 n exchanges of one factor and one
state, and no device waits for the steps of another. The carry enters on the device that is processed first. The
returned carry is the state of the last one, and one sum over the devices copies it to all.

With truncation, the compiler gathers the arrays.

Source: W. D. Hillis and G. L. Steele, Data parallel algorithms (1986), section "partial sums".
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jaxseq import _mesh
from jaxseq._distributed._carry_across_shards import from_one, is_first
from jaxseq._distributed._sharding import map_shards, mesh_axes_of, shift_between_shards, with_auto_axes
from jaxseq._linear_recurrence._solve import Steps, factors, then, within

Names = tuple[str, ...]  # mesh axes
Results = tuple[jax.Array, jax.Array]  # h_T and ys


def entering(names: Names, steps: Steps, x: jax.Array, end: jax.Array, *, reverse: bool) -> jax.Array:
    """Return the state that enters the steps of this device, zero on the first one.

    `end` is the state after its steps if none enters, `x` has the shape of its states, and `reverse` is the direction
    in which states flow.
    """
    count, index = lax.axis_size(names), lax.axis_index(names)
    position = count - 1 - index if reverse else index
    cut = within(steps.valid, steps.cut)
    of_cut = () if cut is None else (jnp.broadcast_to(jnp.any(cut, 0), end.shape),)
    whole = (jnp.prod(factors(end.dtype, steps.a, x, steps.valid), 0), end, *of_cut)
    before = (jnp.ones_like(end), jnp.zeros_like(end), *map(jnp.zeros_like, of_cut))
    distance = 1
    while distance < count:
        sent = jnp.stack([part.astype(end.dtype) for part in whole])
        factor, state, *has_cut = shift_between_shards(sent, names, -distance if reverse else distance)
        earlier, exists = (factor, state, *(part != 0 for part in has_cut)), position >= distance
        whole, before = (
            tuple(jnp.where(exists, both, own) for both, own in zip(then(earlier, pair), pair, strict=True))
            for pair in (whole, before)
        )
        distance *= 2
    return before[1]


def sharded_like_x(inputs: PyTree) -> PyTree:
    """Return the inputs with the axes that they share with x sharded like those, on an explicit mesh."""
    x, sharding = inputs.x, _mesh.explicit_sharding(inputs.x)
    if sharding is None:
        return inputs

    def place(a: jax.Array) -> jax.Array:
        of_x = zip(x.shape[x.ndim - a.ndim :], sharding.spec[x.ndim - a.ndim :], strict=True)
        parts = [part if n == size else None for n, (size, part) in zip(a.shape, of_x, strict=True)]
        return jax.sharding.reshard(a, NamedSharding(sharding.mesh, PartitionSpec(*parts)))

    return jax.tree.map(place, inputs)


def over_devices(run: Callable[[Names, PyTree], Results], inputs: PyTree, *, reverse: bool) -> Results:
    """Return `run(names, inputs)`, run on each device with its own steps, if the mesh axes `names` shard time.

    `inputs` are those of the rule, sharded like x.
    """
    names = mesh_axes_of(inputs.x, 0)
    if not names:
        return run((), inputs)

    def of_device(inputs: PyTree) -> Results:
        carry = jnp.where(is_first(names, reverse=reverse), inputs.carry, 0)
        end, ys = run(names, inputs._replace(carry=carry))
        return from_one(is_first(names, reverse=not reverse), end, names), ys

    return map_shards(of_device, (inputs,), _results_like(inputs.x))


def with_time_gathered(run: Callable[..., Results], inputs: PyTree, *more: PyTree) -> Results:
    """Return `run(inputs, *more)`, where the compiler chooses what to do along a sharded axis of time."""
    return with_auto_axes(run, mesh_axes_of(inputs.x, 0), _results_like(inputs.x))(inputs, *more)


def _results_like(x: jax.Array) -> tuple[NamedSharding | None, NamedSharding | None]:
    """Return the shardings of h_T and ys."""
    sharding = _mesh.explicit_sharding(x)
    if sharding is None:
        return None, None
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:])), sharding
