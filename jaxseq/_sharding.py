"""What JAX's types say of an array beyond shape and dtype: on which devices its parts lie.

Two places need to say so by hand. Inside `shard_map`, arrays that vary over a mesh axis meet arrays that do not;
`together` makes all vary alike before a custom rule sees them, so that JAX itself sums the cotangents of those that
did not. On an explicit mesh, a contraction over a sharded axis needs the sharding of its result: `of` names that of
the array whose cotangent it is.
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

Tree = TypeVar("Tree")


def together(tree: Tree) -> Tree:
    """The same arrays, all varying over the union of the mesh axes that any of them varies over."""
    union = frozenset().union(*(_varying(leaf) for leaf in jax.tree.leaves(tree)))

    def cast(leaf: jax.Array) -> jax.Array:
        missing = tuple(sorted(union - _varying(leaf)))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, tree)


def _varying(x: jax.Array) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying


def of(x: jax.Array) -> NamedSharding | None:
    """The sharding of x where a mesh is explicit; None leaves it to the compiler."""
    sharding: Any = jax.typeof(x).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def zeros(shape: tuple[int, ...], x: jax.Array, axis: int | None, features: int) -> jax.Array:
    """Zeros (*batch, *features) whose batch axes lie where those of x do, which may have one more, at `axis`."""
    sharding = of(x)
    if sharding is not None:
        batch = [part for i, part in enumerate(sharding.spec[:-features]) if i != axis]
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*batch, *(None,) * features))
    return jnp.zeros(shape, x.dtype, out_sharding=sharding)


def zeros_like(tree: Tree) -> Tree:
    """Zeros that lie and vary as the arrays do: for the carry of a loop."""
    return together((jax.tree.map(jnp.zeros_like, tree), tree))[0]


def undivided() -> bool:
    """Whether no compiler can divide arrays over devices behind our back: there is one device, or all axes of the mesh
    are in the hands of `shard_map`.
    """
    kinds = jax.sharding.get_abstract_mesh().axis_types
    return jax.device_count() == 1 or (len(kinds) > 0 and all(kind == AxisType.Manual for kind in kinds))


def joined(x: jax.Array, w: jax.Array, axis: int = -1) -> NamedSharding | None:
    """The sharding of a linear map's result: that of x, with the last axis as the last of w, or another of w."""
    sharding = of(x)
    return sharding and NamedSharding(
        sharding.mesh, PartitionSpec(*sharding.spec[:-1], jax.typeof(w).sharding.spec[axis])
    )


def tail(sharding: NamedSharding | None, axes: int) -> NamedSharding | None:
    """That of the last axes alone."""
    return sharding and NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[-axes:]))


def laid_out(x: jax.Array, sharding: NamedSharding | None) -> jax.Array:
    """x with that sharding, where a mesh is explicit."""
    return x if sharding is None else jax.sharding.reshard(x, sharding)


def whole(*arrays: jax.Array, but_batch: bool) -> bool:
    """Whether no axis is split over an explicit mesh, or none but the first."""
    specs = [tuple(sharding.spec)[but_batch:] for a in arrays if (sharding := of(a)) is not None]
    return not any(part is not None for spec in specs for part in spec)
