"""What the types of arrays state about devices, and what the compiler may do beyond that.

Every op asks here once, before it enters its custom rule, whether its arrays are distributed. If they are not, it goes
straight to its rule. If they are, `_distributed/` runs the rule on each device.
"""

from typing import Any, NamedTuple, TypeVar

import jax
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import PyTree

Tree = TypeVar("Tree")


def is_distributed(*trees: PyTree) -> bool:
    """Return True if an array is on an explicit mesh, or varies over a mesh axis inside `shard_map`."""
    types: list[Any] = [jax.typeof(a) for a in jax.tree.leaves(trees)]
    return any(AxisType.Explicit in t.sharding.mesh.axis_types or t.manual_axis_type.varying for t in types)


def explicit_sharding(x: jax.Array) -> NamedSharding | None:
    """Return the explicit sharding of `x`, or None if its mesh axes are Auto."""
    sharding: Any = jax.typeof(x).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def _varying(x: jax.Array) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying


def align_varying(tree: Tree) -> Tree:
    """Return the same arrays, made consistent for a custom rule.

    If one of them is on an explicit mesh, all are placed on it. All vary over the union of the mesh axes over which any
    of them varies.
    """
    leaves = jax.tree.leaves(tree)
    union = frozenset().union(*(_varying(leaf) for leaf in leaves))
    mesh = next((sharding.mesh for leaf in leaves if (sharding := explicit_sharding(leaf)) is not None), None)

    def cast(leaf: jax.Array) -> jax.Array:
        if mesh is not None and jax.typeof(leaf).sharding.mesh.empty:
            leaf = jax.sharding.reshard(leaf, NamedSharding(mesh, PartitionSpec()))
        missing = tuple(sorted(union - _varying(leaf)))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, tree)


class Partitioning(NamedTuple):
    """What the compiler may do with arrays that their types do not state.

    Each op decides it once, with `partitioning`, before it enters its custom rule. The rule receives it as static data,
    so its forward pass and its backward pass cannot disagree.
    """

    implicit: bool = False  # partition arrays over devices
    idle_axes: bool = False  # partition them over one mesh axis and leave another idle


def partitioning(tree: PyTree) -> Partitioning:
    """Return what the compiler may do, at this point of the program, with the arrays of a tree.

    The mesh is that of the context, else that of the arrays' types. If all of its axes are explicit or manual, the
    types state everything. Without a mesh, nothing is known about a traced array, so with more than one device a
    partition is assumed. A mesh that appears only in `in_shardings` of a `jit`, for arrays that are not placed yet, is
    not visible.
    """
    if jax.device_count() == 1:
        return Partitioning()
    meshes = [jax.sharding.get_abstract_mesh(), *(jax.typeof(a).sharding.mesh for a in jax.tree.leaves(tree))]
    mesh = next((mesh for mesh in meshes if not mesh.empty), None)
    if mesh is not None and AxisType.Auto not in mesh.axis_types:
        return Partitioning()
    return Partitioning(implicit=True, idle_axes=mesh is not None and _has_idle_axes(mesh))


def may_have_idle_axis(known: Partitioning, *operands: jax.Array) -> bool:
    """True if the compiler may partition the operands of a product over one mesh axis and leave another idle.

    A cotangent may be on a mesh that the arguments of its op do not show, so the operands' own types count as well.
    """
    meshes = [jax.typeof(a).sharding.mesh for a in operands]
    return known.idle_axes or any(_has_idle_axes(mesh) for mesh in meshes if not mesh.empty)


def _has_idle_axes(mesh: Any) -> bool:
    """True if the compiler partitions over some axis of the mesh and there are several axes."""
    return AxisType.Auto in mesh.axis_types and sum(size > 1 for size in mesh.axis_sizes) > 1
