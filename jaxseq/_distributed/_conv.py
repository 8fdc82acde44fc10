"""Convolutions of arrays on an explicit mesh or inside `shard_map`.

Each device computes its own shard of the result: some batch entries, positions and output channels. `_sharding.py`
describes what moves for each kind of axis. Every function gets the rule of one device as an argument.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from jaxseq import _mesh
from jaxseq._distributed import _halo, _sharding
from jaxseq._distributed._carry_across_shards import carry_across_shards, from_one, is_first
from jaxseq._geometry import Geometry

# carry, x, kernel, bias, resets, lengths of `jaxseq.causal_conv`
Operands = tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array | None, jax.Array | None]


def conv(
    rule: Callable[..., jax.Array], geometry: Geometry, x: jax.Array, kernel: jax.Array, bias: jax.Array | None
) -> jax.Array:
    """Return `rule(geometry, x, kernel, bias)` of `jaxseq.conv`, run on shards."""
    sharded = _shard_operands(geometry, x, kernel, bias, c_out=-1)
    geometry, parts = _halo.of_conv(sharded.geometry, kernel.shape[:-2], sharded.x)
    return _run_on_shards(partial(rule, geometry), parts, sharded)


def conv_transpose(
    rule: Callable[..., jax.Array],
    geometry: Geometry,
    space: tuple[int, ...],
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
) -> jax.Array:
    """Return `rule(geometry, space, x, kernel, bias)` of `jaxseq.conv_transpose`, run on shards."""
    sharded = _shard_operands(geometry, x, kernel, bias, c_out=-2)
    geometry, space, parts = _halo.of_transpose(sharded.geometry, kernel.shape[:-2], space, sharded.x)
    return _run_on_shards(partial(rule, geometry, space), parts, sharded)


class _Sharded(NamedTuple):
    """Operands that are sharded so that each device computes its part of the result, and shardings of the result."""

    geometry: Geometry  # with the groups of one device
    x: jax.Array
    kernel: jax.Array
    bias: jax.Array | None
    computed: NamedSharding | None  # as the devices compute it
    returned: NamedSharding | None  # as the op returns it


def _shard_operands(
    geometry: Geometry, x: jax.Array, kernel: jax.Array, bias: jax.Array | None, *, c_out: int
) -> _Sharded:
    """Shard the operands. Axis `c_out` of the kernel has the channels of the result."""
    x, kernel, bias = _mesh.align_varying((x, kernel, bias))
    kernel, bias = _sharding.unshard((kernel, bias), _sharding.sharded_axes(x, slice(-1)))
    returned = _sharding.product_sharding(x, kernel, c_out)
    groups, x, kernel, bias, computed = _sharding.shard_by_features(geometry.groups, x, kernel, bias, c_out)
    geometry = geometry._replace(groups=groups, partitioning=_mesh.partitioning((x, kernel, bias)))
    return _Sharded(geometry, x, kernel, bias, computed, returned)


def _run_on_shards(rule: Callable[..., jax.Array], parts: list[_halo.Part], sharded: _Sharded) -> jax.Array:
    """Return `rule(x, kernel, bias)` of each device, whose `x` first receives the rows `parts` from other shards."""

    def run(*operands: Any) -> jax.Array:
        x, *weights = _mesh.align_varying(operands)
        return rule(_halo.extend_with_halo(parts, x), *weights)

    y = _sharding.map_shards(run, (sharded.x, sharded.kernel, sharded.bias), sharded.computed)
    return _sharding.reshard(y, sharded.returned)


def causal_conv(
    rule: Callable[..., jax.Array],
    new_carry: Callable[..., jax.Array],
    geometry: Geometry,
    operands: Operands,
) -> tuple[jax.Array, jax.Array]:
    """Return (carry', y) of `jaxseq.causal_conv`, run on shards.

    `rule(geometry, operands)` returns y, and `new_carry(operands)` returns carry'. On an explicit mesh, batch and time
    of all arrays are sharded as those of x. Where time is sharded, each device starts from the carry of the previous
    time shard.
    """
    carry, x, kernel, bias, resets, lengths = _mesh.align_varying(operands)
    x_sharding = _mesh.explicit_sharding(x)
    if x_sharding is not None:
        carry = _sharding.reshard(carry, _sharding.with_feature_sharding(x_sharding, carry, 2))
        resets = None if resets is None else _sharding.reshard(resets, _sharding.leading_axes(x_sharding, x.ndim - 1))
        lengths = (
            None if lengths is None else _sharding.reshard(lengths, _sharding.leading_axes(x_sharding, x.ndim - 2))
        )
    kernel, bias = _sharding.unshard((kernel, bias), _sharding.sharded_axes(x, slice(-1)))
    carry_sharding, y_sharding = _mesh.explicit_sharding(carry), _sharding.product_sharding(x, kernel)
    groups, x, kernel, bias, y_like = _sharding.shard_by_features(geometry.groups, x, kernel, bias, -1)
    geometry = geometry._replace(groups=groups, partitioning=_mesh.partitioning((carry, x, kernel, bias)))
    if x_sharding is not None:
        carry = _sharding.reshard(carry, _sharding.unshard_axis(jax.typeof(x).sharding, x.ndim - 2))
    names = _sharding.mesh_axes_of(x, -2)

    def run(*shards: Any) -> tuple[jax.Array, jax.Array]:
        carry, x, kernel, bias, resets, lengths = shards
        ends_here = None
        if names and lengths is not None:  # from now on, the length of the part of each sequence on this device
            device, T = lax.axis_index(names), x.shape[-2]
            ends_here = device == jnp.maximum(lengths - 1, 0) // T
            lengths = jnp.clip(lengths - device * T, 0, T)
        carry, x, resets, lengths = _mesh.align_varying((carry, x, resets, lengths))  # carry' does not need the kernel
        step = lambda carry: new_carry((carry, x, kernel, bias, resets, lengths))  # noqa: E731
        if names and carry.size:
            rounds = -(-carry.shape[-2] // x.shape[-2])
            carry = carry_across_shards(step, carry, names, rounds=rounds)
        last = step(carry)
        if names:
            last = from_one(is_first(names, reverse=True) if ends_here is None else ends_here, last, names)
        return last, rule(geometry, _mesh.align_varying((carry, x, kernel, bias, resets, lengths)))

    last, y = _sharding.map_shards(run, (carry, x, kernel, bias, resets, lengths), (carry, y_like))
    return _sharding.reshard(last, carry_sharding), _sharding.reshard(y, y_sharding)
