"""Shardings of arrays, read from their JAX types, and the shard_map around every rule.

Inside `shard_map`, some arrays vary over a mesh axis and others do not. `align_varying` makes all inputs of a custom
rule vary alike, so that JAX itself sums the cotangents of the inputs that did not vary.

On an explicit mesh, JAX requires the sharding of the result of every operation. The rules of this library do not know
about devices. The code around them treats each mesh axis by what it shards:

    features        `shard_by_features` gives each device some output channels of a convolution, and the inputs that they
                    need. For a recurrence, `with_auto_axes` makes these mesh axes automatic inside the rule, and states
                    the sharding of its results only: weights and states are sharded differently (four gates over two
                    devices), and inside the loop over time the compiler chooses better what to move.
    batch           `map_shards` runs the rule on each device with its own part of the batch. Devices communicate once,
                    to sum the cotangents of the weights.
    space and time  like the batch, after neighbours have exchanged the rows that a kernel reaches (`_halo.py`) or the
                    carry (`_carry_across_shards.py`).
"""

from collections.abc import Callable, Iterable
from math import prod
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

Tree = TypeVar("Tree")


def align_varying(tree: Tree) -> Tree:
    """The same arrays, all on the explicit mesh where any of them is on one, and all varying over the union of the mesh
    axes that any of them varies over.
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


def _varying(x: jax.Array) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying


def explicit_sharding(x: jax.Array) -> NamedSharding | None:
    """The sharding of x where a mesh is explicit; None leaves it to the compiler."""
    sharding: Any = jax.typeof(x).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def sharded_axes(x: jax.Array, axes: slice | int = slice(None)) -> frozenset[str]:
    """The explicit mesh axes over which those axes of x are divided."""
    sharding = explicit_sharding(x)
    if sharding is None:
        return frozenset()
    parts = tuple(sharding.spec)[axes] if isinstance(axes, slice) else (tuple(sharding.spec)[axes],)
    return frozenset(name for part in parts if part is not None for name in _as_names(part))


def _as_names(part: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    return part if isinstance(part, tuple) else (part,)


def with_auto_axes(rule: Callable[..., Any], names: Iterable[str], results: Any) -> Callable[..., Any]:
    """`rule`, to which the mesh axes of those names are automatic; its results are laid out as `results` says."""
    names = tuple(sorted(names))
    return jax.sharding.auto_axes(rule, axes=names, out_sharding=results) if names else rule


def map_shards(run: Callable[..., Any], args: tuple[Any, ...], like: Any) -> Any:
    """`run(*args)`, each device of an explicit mesh for itself, with its parts of those arguments that are divided and
    all of the others; the results are divided as `like` says, by arrays or shardings.
    """
    names = frozenset().union(*map(sharded_axes, jax.tree.leaves(args)))
    if not names:
        return run(*args)
    spec = lambda a: (a if isinstance(a, NamedSharding) else jax.typeof(a).sharding).spec  # noqa: E731
    specs, out = (jax.tree.map(spec, tree) for tree in (args, like))
    mesh = next(sharding.mesh for a in jax.tree.leaves(args) if (sharding := explicit_sharding(a)) is not None)
    return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=out, axis_names={*names})(*args)


def mesh_axes_of(x: jax.Array, axis: int) -> tuple[str, ...]:
    """The explicit mesh axes that divide one axis of x, in their order."""
    sharding = explicit_sharding(x)
    part = None if sharding is None else sharding.spec[axis]
    return () if part is None else _as_names(part)


def shard_count(x: jax.Array, axis: int) -> int:
    """Over how many devices an explicit mesh divides one axis of x."""
    return prod(jax.typeof(x).sharding.mesh.shape[name] for name in mesh_axes_of(x, axis))


def shift_between_shards(x: jax.Array, names: tuple[str, ...], by: int) -> jax.Array:
    """In `shard_map`: the x of the device so many places before this one, behind it if negative; zeros if none is.

    Shardings and `axis_index` number devices in the order of `names`, the last name fastest; `ppermute` numbers them in
    the order of the mesh (jax 0.10) or takes names in no other (jax 0.12).
    """
    mesh = jax.sharding.get_abstract_mesh()
    in_mesh = tuple(name for name in mesh.axis_names if name in names)
    numbers = np.arange(lax.axis_size(names)).reshape([mesh.shape[name] for name in in_mesh])
    numbers = numbers.transpose([in_mesh.index(name) for name in names]).ravel().tolist()
    pairs = [(numbers[i], numbers[i + by]) for i in range(len(numbers)) if 0 <= i + by < len(numbers)]
    return lax.ppermute(x, in_mesh, pairs) if pairs else zeros_like(x)


def zeros(shape: tuple[int, ...], x: jax.Array, axis: int | None = None, features: int = 2) -> jax.Array:
    """Zeros (*batch, *features) whose batch axes lie where those of x do, which may have one more, at `axis`."""
    sharding = explicit_sharding(x)
    if sharding is not None:
        batch = [part for i, part in enumerate(sharding.spec[:-features]) if i != axis]
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*batch, *(None,) * features))
    return jnp.zeros(shape, x.dtype, out_sharding=sharding)


def zeros_like(tree: Tree) -> Tree:
    """Zeros that lie and vary as the arrays do: for the carry of a loop."""
    return align_varying((jax.tree.map(jnp.zeros_like, tree), tree))[0]


class Partitioning(NamedTuple):
    """What the compiler may do with arrays that their types do not say.

    An op decides it once, with `partitioning`, before its custom rule is entered. The rule receives it as static data,
    so that its forward and its backward pass cannot disagree.
    """

    implicit: bool = False  # partition arrays over devices
    idle_axes: bool = False  # partition them over one mesh axis and leave another idle


def partitioning(tree: Any) -> Partitioning:
    """Return what the compiler may do, where this is called, with the arrays of a tree.

    The mesh is that of the context, or else that of the arrays' types. If all of its axes are explicit or manual, types
    say everything. Without a mesh nothing is known of a traced array, so that more than one device is enough to expect
    a partition. A mesh that appears only in `in_shardings` of a `jit`, for arrays that are not placed yet, is not seen.
    """
    meshes = [jax.sharding.get_abstract_mesh(), *_meshes(tree)]
    mesh = next((mesh for mesh in meshes if not mesh.empty), None)
    if jax.device_count() == 1 or (mesh is not None and AxisType.Auto not in mesh.axis_types):
        return Partitioning()
    return Partitioning(implicit=True, idle_axes=mesh is not None and _has_idle_axes(mesh))


def may_have_idle_axis(known: Partitioning, *operands: jax.Array) -> bool:
    """True if the compiler may partition the operands of a product over one mesh axis and leave another idle.

    A cotangent may lie on a mesh that the arguments of its op do not show, so the operands' own types count as well.
    """
    return known.idle_axes or any(map(_has_idle_axes, _meshes(operands)))


def _meshes(tree: Any) -> list[Any]:
    """Return the meshes of the arrays' types."""
    return [jax.typeof(a).sharding.mesh for a in jax.tree.leaves(tree)]


def _has_idle_axes(mesh: Any) -> bool:
    """True if the compiler partitions over some axis of the mesh and there are several axes."""
    return AxisType.Auto in mesh.axis_types and sum(size > 1 for size in mesh.axis_sizes) > 1


def product_sharding(x: jax.Array, w: jax.Array, axis: int = -1) -> NamedSharding | None:
    """The sharding of a linear map's result: that of x, with the last axis as the last of w, or another of w."""
    sharding = explicit_sharding(x)
    if sharding is None:
        return None
    return _combine(sharding, tuple(sharding.spec[:-1]), (jax.typeof(w).sharding.spec[axis],))


def with_feature_sharding(sharding: NamedSharding, a: jax.Array, features: int) -> NamedSharding:
    """That sharding, so many of its last axes divided as those of a."""
    first = tuple(sharding.spec)[: len(sharding.spec) - features]
    return _combine(sharding, first, tuple(jax.typeof(a).sharding.spec)[a.ndim - features :])


def _combine(sharding: NamedSharding, first: tuple[Any, ...], last: tuple[Any, ...]) -> NamedSharding:
    """First axes divided so, and the last ones so, but for mesh axes that divide the first already."""
    taken = {name for part in first if part is not None for name in _as_names(part)}
    free = (None if part is None or taken & {*_as_names(part)} else part for part in last)
    return NamedSharding(sharding.mesh, PartitionSpec(*first, *free))


def unshard_axis(sharding: NamedSharding, axis: int) -> NamedSharding:
    """That sharding, that axis in one place."""
    return NamedSharding(sharding.mesh, PartitionSpec(*(None if i == axis else p for i, p in enumerate(sharding.spec))))


def gather_axis(x: jax.Array, axis: int) -> jax.Array:
    """x, that axis in one place."""
    sharding = explicit_sharding(x)
    return x if sharding is None else reshard(x, unshard_axis(sharding, axis))


def shard_by_features(
    groups: int, x: jax.Array, kernel: jax.Array, bias: jax.Array | None, c_out: int
) -> tuple[int, jax.Array, jax.Array, jax.Array | None, NamedSharding | None]:
    """(groups of a device, x, kernel, bias, the sharding of the result): the operands of a convolution so that each
    device computes channels of the result by itself. Axis `c_out` of the kernel holds these channels.

    Without groups, x has all its channels everywhere, and the kernel is divided by those of the result. With groups,
    each device has some of them, in x, kernel and result. What cannot be divided so is gathered.
    """
    sharding = explicit_sharding(x)
    if sharding is None:
        return groups, x, kernel, bias, None
    mesh, first = sharding.mesh, tuple(sharding.spec[:-1])
    axes = (
        mesh_axes_of(kernel, c_out),
        mesh_axes_of(x, -1),
        *(mesh_axes_of(kernel, axis) for axis in range(kernel.ndim)),
    )
    names = next(filter(None, axes), ())
    count = prod(mesh.shape[name] for name in names)
    part = names if names and (kernel.shape[c_out] if groups == 1 else groups) % count == 0 else None
    here = groups // count if groups > 1 and part else groups
    divided = kernel.ndim + c_out if groups == 1 else kernel.ndim - 1
    lay = lambda a, *spec: reshard(a, NamedSharding(mesh, PartitionSpec(*spec)))  # noqa: E731
    x = lay(x, *first, part if groups > 1 else None)
    kernel = lay(kernel, *(part if axis == divided else None for axis in range(kernel.ndim)))
    bias = None if bias is None else lay(bias, part)
    return here, x, kernel, bias, NamedSharding(mesh, PartitionSpec(*first, part))


def unshard(tree: Tree, names: Iterable[str]) -> Tree:
    """The same arrays, not divided over those mesh axes: weights that lie over the axis of the batch too are gathered
    before a rule, and what is summed of their cotangents is scattered after it.
    """
    names = {*names}

    def free(part: Any) -> Any:
        left = () if part is None else tuple(name for name in _as_names(part) if name not in names)
        return left or None

    def lay(a: jax.Array) -> jax.Array:
        sharding = explicit_sharding(a)
        if sharding is None or not names & sharded_axes(a):
            return a
        return reshard(a, NamedSharding(sharding.mesh, PartitionSpec(*map(free, sharding.spec))))

    return jax.tree.map(lay, tree)


def drop_axis(sharding: NamedSharding, axis: int) -> NamedSharding:
    """That sharding, of an array without that axis."""
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:axis], *sharding.spec[axis + 1 :]))


def leading_axes(sharding: NamedSharding, axes: int) -> NamedSharding:
    """That of the first axes alone."""
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:axes]))


def reshard(x: jax.Array, sharding: NamedSharding | None) -> jax.Array:
    """x with that sharding, where a mesh is explicit."""
    return x if sharding is None else jax.sharding.reshard(x, sharding)
