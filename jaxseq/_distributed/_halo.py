"""A spatial axis sharded over devices: each device receives from its neighbours the rows that the kernel reaches.

Along one axis, let D devices hold I rows of x and O = I / s rows of y, in equal shards. The outputs of a shard depend
on the inputs (the formula of `_correlation/`, m = s n + d k - lo)

    from row -lo of their own shard of x to row s (O / D - 1) + d (K - 1) - lo

so a device needs lo rows from before its shard and d (K - 1) - (s - 1) - lo from behind it, together the extent of the
dilated kernel minus one stride. A negative number is a number of rows to crop. With these rows in place, y is a
convolution without padding on each device separately. For the transpose, the shards change roles: y has I rows, x has
O, and output m depends on the inputs n with

    s n = m + lo - d k,    from  n = -floor((d (K - 1) - lo) / s)  to  floor((I / D - 1 + lo) / s).

Before the first shard and behind the last one the rows are zero, as the padding requires: `ppermute` returns zeros on a
device to which no device sends. Its transpose sends the cotangents of received rows back. The rest is the rule of a
single device, and JAX sums the kernel's cotangent over devices, once.

Only an explicit mesh states in the types what is sharded. Over automatic axes, the compiler does the same for its own
convolutions; see `docs/devices.md`.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxseq import _checks
from jaxseq._distributed import _sharding
from jaxseq._geometry import Geometry


class Part(NamedTuple):
    """A sharded axis of x: its mesh axes, and the numbers of rows to receive from before and behind each shard."""

    axis: int
    names: tuple[str, ...]
    before: int
    behind: int


def of_conv(geometry: Geometry, kernel_size: tuple[int, ...], x: jax.Array) -> tuple[Geometry, list[Part]]:
    """Return the geometry within a shard, and the sharded axes, of the convolution of x (*batch, *space, C)."""
    parts, padding = [], list(geometry.padding)
    for i, axis, names, devices, I, s, K, d, (lo, hi) in _sharded_space_axes(geometry, kernel_size, x):
        O = (I + lo + hi - d * (K - 1) - 1) // s + 1
        if s * O != I or O % devices:
            _raise_uneven(f"{I} inputs and {O} outputs at stride {s} over {devices}", names, x)
        parts.append(Part(axis, names, lo, d * (K - 1) - (s - 1) - lo))
        padding[i] = 0, 0
    return geometry._replace(padding=tuple(padding)), parts


def of_transpose(
    geometry: Geometry, kernel_size: tuple[int, ...], space: tuple[int, ...], x: jax.Array
) -> tuple[Geometry, tuple[int, ...], list[Part]]:
    """Return the geometry within a shard, the spatial shape of its outputs, and the sharded axes, of the transpose at x
    (*batch, *outputs, C).
    """
    parts, padding, here = [], list(geometry.padding), list(space)
    for i, axis, names, devices, O, s, K, d, (lo, _) in _sharded_space_axes(geometry, kernel_size, x):
        I, rows = space[i] // devices, O // devices
        if s * O != space[i]:
            _raise_uneven(f"{O} inputs and {space[i]} outputs at stride {s} over {devices}", names, x)
        before, behind = (d * (K - 1) - lo) // s, (I - 1 + lo) // s - rows + 1
        parts.append(Part(axis, names, before, behind))
        crop = s * before + lo
        padding[i] = crop, (before + rows + behind - 1) * s + d * (K - 1) + 1 - crop - I
        here[i] = I
    return geometry._replace(padding=tuple(padding)), tuple(here), parts


def extend_with_halo(parts: list[Part], x: jax.Array) -> jax.Array:
    """Return `x` with the rows received from other shards.

    Axes are extended one after another, so that corners are included.
    """
    for part in parts:
        axis, size = part.axis, x.shape[part.axis]
        own = lax.slice_in_dim(x, max(0, -part.before), size - max(0, -part.behind), axis=axis)
        x = jnp.concatenate(
            [*_receive_rows(x, part, part.before, 1)[::-1], own, *_receive_rows(x, part, part.behind, -1)], axis
        )
    return x


def _receive_rows(x: jax.Array, part: Part, rows: int, offset: int) -> list[jax.Array]:
    """Return the nearest rows of the shards before (`offset` 1) or behind (-1), in pieces, nearest shard first.

    There are several pieces if the kernel reaches beyond the nearest shard.
    """
    size, found = x.shape[part.axis], []
    for hop in range(1, -(-max(0, rows) // max(1, size)) + 1):
        count = min(size, rows - (hop - 1) * size)
        first = size - count if offset == 1 else 0
        piece = lax.slice_in_dim(x, first, first + count, axis=part.axis)
        found.append(_sharding.shift_between_shards(piece, part.names, offset * hop))
    return found


def _sharded_space_axes(geometry: Geometry, kernel_size: tuple[int, ...], x: jax.Array) -> Iterator[Any]:
    """Yield (i, axis of x, names, devices, rows of x, s, K, d, (lo, hi)) for each spatial axis i that is sharded over
    an explicit mesh.
    """
    options = geometry.stride, kernel_size, geometry.dilation, geometry.padding
    for i, of_axis in enumerate(zip(*options, strict=True)):
        axis = x.ndim - 1 - len(kernel_size) + i
        names = _sharding.mesh_axes_of(x, axis)
        if names:
            yield i, axis, names, _sharding.shard_count(x, axis), x.shape[axis], *of_axis


def _raise_uneven(got: str, names: tuple[str, ...], x: jax.Array) -> None:
    outputs = 'outputs that shard like the inputs, stride times fewer (padding "SAME" or "CAUSAL")'
    expected = f"along a spatial axis sharded over {names}, {outputs}"
    _checks.bad_value("x", expected, got, x=x)
