"""Shardings of arrays, read from their JAX types, and the shard_map around every rule.

Inside `shard_map`, some arrays vary over a mesh axis and others do not. `align_varying` makes all inputs of a custom
rule vary alike, so that JAX itself sums the cotangents of the inputs that did not vary.

On an explicit mesh, JAX requires the sharding of the result of every operation. The rules of this library do not know
about devices. The code around them treats each mesh axis by what it shards:

    features        `shard_by_features` gives each device some output channels of a convolution, and the inputs that
                    they need. For a recurrence, `with_auto_axes` makes these mesh axes automatic inside the rule, and
                    states the sharding of its results only: weights and states are sharded differently (four gates over
                    two devices), and inside the loop over time the compiler chooses better what to move.
    batch           `map_shards` runs the rule on each device with its own part of the batch. Devices communicate once,
                    to sum the cotangents of the weights.
    space and time  like the batch, after neighbours have exchanged the rows that a kernel reaches (`_halo.py`) or the
                    carry (`_carry_across_shards.py`).
"""

from collections.abc import Callable, Iterable
from math import prod
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxseq._mesh import explicit_sharding

Tree = TypeVar("Tree")


def sharded_axes(x: jax.Array, axes: slice | int = slice(None)) -> frozenset[str]:
    """Return the explicit mesh axes over which these axes of `x` are sharded."""
    sharding = explicit_sharding(x)
    if sharding is None:
        return frozenset()
    parts = tuple(sharding.spec)[axes] if isinstance(axes, slice) else (tuple(sharding.spec)[axes],)
    return frozenset(name for part in parts if part is not None for name in _as_names(part))


def _as_names(part: Any) -> tuple[str, ...]:
    """Return the mesh axes of one entry of a PartitionSpec."""
    return part if isinstance(part, tuple) else (part,)


def with_auto_axes(rule: Callable[..., Any], names: Iterable[str], results: Any) -> Callable[..., Any]:
    """Return `rule` with the mesh axes `names` automatic inside it; `results` is the sharding of its results."""
    names = tuple(sorted(names))
    return jax.sharding.auto_axes(rule, axes=names, out_sharding=results) if names else rule


def map_shards(run: Callable[..., Any], args: tuple[Any, ...], like: Any) -> Any:
    """Return `run(*args)`, run on each device of an explicit mesh with its own shards of the arguments.

    Arguments that are not sharded are passed whole. The results are sharded like `like`, a tree of arrays or shardings.
    If no argument is sharded, every device computes the whole result. Without a mesh in the context this needs a
    `shard_map` too, because jax 0.12 places `zeros_like` of a replicated array on the mesh of the context.
    """
    mesh = next((sharding.mesh for a in jax.tree.leaves(args) if (sharding := explicit_sharding(a)) is not None), None)
    names = frozenset().union(*map(sharded_axes, jax.tree.leaves(args)))
    needs_context = jax.sharding.get_abstract_mesh().empty and mesh is not None and mesh.are_all_axes_explicit
    if not names and not needs_context:
        return run(*args)
    spec = lambda a: (a if isinstance(a, NamedSharding) else jax.typeof(a).sharding).spec  # noqa: E731
    specs, out = (jax.tree.map(spec, tree) for tree in (args, like))
    # Without names, JAX takes all axes but those over which `vmap` maps.
    return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=out, axis_names={*names})(*args)


def mesh_axes_of(x: jax.Array, axis: int) -> tuple[str, ...]:
    """Return the explicit mesh axes that shard one axis of `x`, in order."""
    sharding = explicit_sharding(x)
    part = None if sharding is None else sharding.spec[axis]
    return () if part is None else _as_names(part)


def shard_count(x: jax.Array, axis: int) -> int:
    """Return the number of devices over which an explicit mesh shards one axis of `x`."""
    return prod(jax.typeof(x).sharding.mesh.shape[name] for name in mesh_axes_of(x, axis))


def shift_between_shards(x: jax.Array, names: tuple[str, ...], by: int) -> jax.Array:
    """Return the `x` of the device `by` positions before this one, inside `shard_map`.

    A negative `by` is a device behind this one. The result is zeros if there is no such device. Shardings and
    `axis_index` number devices in the order of `names`, the last name fastest. `ppermute` numbers them in the order of
    the mesh (jax 0.10), or accepts no other order of names (jax 0.12).
    """
    mesh = jax.sharding.get_abstract_mesh()
    in_mesh = tuple(name for name in mesh.axis_names if name in names)
    numbers = np.arange(lax.axis_size(names)).reshape([mesh.shape[name] for name in in_mesh])
    numbers = numbers.transpose([in_mesh.index(name) for name in names]).ravel().tolist()
    pairs = [(numbers[i], numbers[i + by]) for i in range(len(numbers)) if 0 <= i + by < len(numbers)]
    return lax.ppermute(x, in_mesh, pairs) if pairs else jnp.zeros_like(x)


def zeros(shape: tuple[int, ...], x: jax.Array, axis: int | None = None, features: int = 2) -> jax.Array:
    """Return zeros (*batch, *features) with the batch axes sharded like those of `x`.

    If `axis` is passed, `x` has one more batch axis there.
    """
    return jnp.zeros(shape, x.dtype, out_sharding=batch_sharding(x, axis, features))


def batch_sharding(x: jax.Array, axis: int | None, features: int) -> NamedSharding | None:
    """Return the sharding of the batch axes of `x`, without `axis`, with `features` axes that are not sharded."""
    sharding = explicit_sharding(x)
    if sharding is None:
        return None
    batch = [part for i, part in enumerate(sharding.spec[:-features]) if i != axis]
    return NamedSharding(sharding.mesh, PartitionSpec(*batch, *(None,) * features))


def product_sharding(x: jax.Array, w: jax.Array, axis: int = -1) -> NamedSharding | None:
    """Return the sharding of the result of a linear map: that of `x`, with the last axis sharded like `axis` of `w`."""
    sharding = explicit_sharding(x)
    if sharding is None:
        return None
    return _combine(sharding, tuple(sharding.spec[:-1]), (jax.typeof(w).sharding.spec[axis],))


def with_feature_sharding(sharding: NamedSharding, a: jax.Array, features: int) -> NamedSharding:
    """Return `sharding` with its last `features` axes sharded like those of `a`."""
    first = tuple(sharding.spec)[: len(sharding.spec) - features]
    return _combine(sharding, first, tuple(jax.typeof(a).sharding.spec)[a.ndim - features :])


def _combine(sharding: NamedSharding, first: tuple[Any, ...], last: tuple[Any, ...]) -> NamedSharding:
    """Concatenate the entries `first` and `last`, without mesh axes in `last` that already shard `first`."""
    taken = {name for part in first if part is not None for name in _as_names(part)}
    free = (None if part is None or taken & {*_as_names(part)} else part for part in last)
    return NamedSharding(sharding.mesh, PartitionSpec(*first, *free))


def unshard_axis(sharding: NamedSharding, axis: int) -> NamedSharding:
    """Return `sharding` with one axis not sharded."""
    return NamedSharding(sharding.mesh, PartitionSpec(*(None if i == axis else p for i, p in enumerate(sharding.spec))))


def gather_axis(x: jax.Array, axis: int) -> jax.Array:
    """Return `x` with one axis not sharded."""
    sharding = explicit_sharding(x)
    return x if sharding is None else reshard(x, unshard_axis(sharding, axis))


def shard_by_features(
    groups: int, x: jax.Array, kernel: jax.Array, bias: jax.Array | None, c_out: int
) -> tuple[int, jax.Array, jax.Array, jax.Array | None, NamedSharding | None]:
    """Reshard the operands of a convolution so that each device computes some output channels without communication.

    Without groups, every device has all channels of x, and the kernel is sharded by output channels. With groups, each
    device has some of the groups, in x, kernel and result. Operands that cannot be sharded this way are gathered. Axis
    `c_out` of the kernel has the output channels. Returns (groups of a device, x, kernel, bias, sharding of the
    result).
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
    sharded_axis = kernel.ndim + c_out if groups == 1 else kernel.ndim - 1
    place = lambda a, *spec: reshard(a, NamedSharding(mesh, PartitionSpec(*spec)))  # noqa: E731
    x = place(x, *first, part if groups > 1 else None)
    kernel = place(kernel, *(part if axis == sharded_axis else None for axis in range(kernel.ndim)))
    bias = None if bias is None else place(bias, part)
    return here, x, kernel, bias, NamedSharding(mesh, PartitionSpec(*first, part))


def unshard(tree: Tree, names: Iterable[str]) -> Tree:
    """Return the same arrays, not sharded over these mesh axes.

    Weights that are also sharded over the mesh axis of the batch are gathered before a rule, and the sum of their
    cotangents is scattered after it.
    """
    names = {*names}

    def without_names(part: Any) -> Any:
        left = () if part is None else tuple(name for name in _as_names(part) if name not in names)
        return left or None

    def place(a: jax.Array) -> jax.Array:
        sharding = explicit_sharding(a)
        if sharding is None or not names & sharded_axes(a):
            return a
        return reshard(a, NamedSharding(sharding.mesh, PartitionSpec(*map(without_names, sharding.spec))))

    return jax.tree.map(place, tree)


def drop_axis(sharding: NamedSharding, axis: int) -> NamedSharding:
    """Return `sharding` for an array without one axis."""
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:axis], *sharding.spec[axis + 1 :]))


def leading_axes(sharding: NamedSharding, axes: int) -> NamedSharding:
    """Return the sharding of the first `axes` axes."""
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:axes]))


def place_steps_like(xs: jax.Array, masks: Tree) -> Tree:
    """Return masks (time and batch, as in xs) sharded like xs."""
    xs_sharding = explicit_sharding(xs)
    if xs_sharding is None:
        return masks
    return jax.tree.map(lambda a: reshard(a, leading_axes(xs_sharding, a.ndim)), masks)


def place_masks_like(
    xs: jax.Array, axis: int, lengths: jax.Array | None, resets: jax.Array | None
) -> tuple[jax.Array | None, jax.Array | None]:
    """Return lengths and resets, the input of the masks, with batch sharded like that of xs and time not sharded."""
    xs_sharding = explicit_sharding(xs)
    if xs_sharding is None:
        return lengths, resets
    place = lambda a, s: None if a is None else reshard(a, leading_axes(s, a.ndim))  # noqa: E731
    lengths = place(lengths, drop_axis(xs_sharding, axis))
    return lengths, place(resets, unshard_axis(xs_sharding, axis))


def reshard(x: jax.Array, sharding: NamedSharding | None) -> jax.Array:
    """Return `x` with this sharding; None leaves `x` unchanged."""
    return x if sharding is None else jax.sharding.reshard(x, sharding)
