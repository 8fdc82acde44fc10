"""Space divided over devices: each has a part of an axis, and asks its neighbours for the rows its window reaches into.

Along one axis let D devices hold I rows of x and O = I / s of y in equal parts. The outputs of a part read (the formula
of `_correlation/`, m = s n + d k - lo)

    from row -lo of their own part of x to row s (O / D - 1) + d (K - 1) - lo

so that lo rows from before the part and d (K - 1) - (s - 1) - lo from behind it are asked for, together a window less
one stride; a negative number is one of rows that are left out. With these in place, y is a convolution without padding,
of each device by itself. For the transpose the parts change roles: y has I rows, x has O, and output m reads those n
with

    s n = m + lo - d k,    from  n = -floor((d (K - 1) - lo) / s)  to  floor((I / D - 1 + lo) / s).

Before the first part and behind the last one lie zeros, as the padding would have it: `ppermute` gives them to a device
that nobody sends to. Its transpose sends cotangents of borrowed rows home. All else is the rule of one device, and JAX
sums the kernel's cotangent over devices, once.

Only an explicit mesh says in its types what is divided. Over automatic axes the compiler does the same
for the convolutions that it has itself; see `docs/devices.md`.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxseq import _checks, _sharding
from jaxseq._geometry import Geometry


class Part(NamedTuple):
    """Of an axis of x: the mesh axes that divide it, and the rows borrowed from before and behind."""

    axis: int
    names: tuple[str, ...]
    before: int
    behind: int


def of_conv(geometry: Geometry, window: tuple[int, ...], x: jax.Array) -> tuple[Geometry, list[Part]]:
    """The geometry within a part, and the parts, of the convolution of x (*batch, *space, C)."""
    parts, padding = [], list(geometry.padding)
    for i, axis, names, devices, I, s, K, d, (lo, hi) in _sharded_space_axes(geometry, window, x):
        O = (I + lo + hi - d * (K - 1) - 1) // s + 1
        if s * O != I or O % devices:
            _refuse(f"{I} inputs and {O} outputs at stride {s} over {devices}", names, x)
        parts.append(Part(axis, names, lo, d * (K - 1) - (s - 1) - lo))
        padding[i] = 0, 0
    return geometry._replace(padding=tuple(padding)), parts


def of_transpose(
    geometry: Geometry, window: tuple[int, ...], space: tuple[int, ...], x: jax.Array
) -> tuple[Geometry, tuple[int, ...], list[Part]]:
    """The geometry within a part, the space of its outputs, and the parts, of the transpose at x
    (*batch, *outputs, C).
    """
    parts, padding, here = [], list(geometry.padding), list(space)
    for i, axis, names, devices, O, s, K, d, (lo, _) in _sharded_space_axes(geometry, window, x):
        I, rows = space[i] // devices, O // devices
        if s * O != space[i]:
            _refuse(f"{O} inputs and {space[i]} outputs at stride {s} over {devices}", names, x)
        before, behind = (d * (K - 1) - lo) // s, (I - 1 + lo) // s - rows + 1
        parts.append(Part(axis, names, before, behind))
        crop = s * before + lo
        padding[i] = crop, (before + rows + behind - 1) * s + d * (K - 1) + 1 - crop - I
        here[i] = I
    return geometry._replace(padding=tuple(padding)), tuple(here), parts


def extend_with_halo(parts: list[Part], x: jax.Array) -> jax.Array:
    """x with the rows that its parts borrow; of several axes one after the other, so that corners come along."""
    for part in parts:
        axis, size = part.axis, x.shape[part.axis]
        own = lax.slice_in_dim(x, max(0, -part.before), size - max(0, -part.behind), axis=axis)
        x = jnp.concatenate(
            [*_receive_rows(x, part, part.before, 1)[::-1], own, *_receive_rows(x, part, part.behind, -1)], axis
        )
    return x


def _receive_rows(x: jax.Array, part: Part, rows: int, towards: int) -> list[jax.Array]:
    """The nearest rows of the parts before (towards = 1) or behind (-1), the nearest part first, which may not do."""
    size, found = x.shape[part.axis], []
    for hop in range(1, -(-max(0, rows) // max(1, size)) + 1):
        count = min(size, rows - (hop - 1) * size)
        first = size - count if towards == 1 else 0
        piece = lax.slice_in_dim(x, first, first + count, axis=part.axis)
        found.append(_sharding.shift_between_shards(piece, part.names, towards * hop))
    return found


def _sharded_space_axes(geometry: Geometry, window: tuple[int, ...], x: jax.Array) -> Iterator[Any]:
    """(i, axis of x, names, devices, rows of x, s, K, d, (lo, hi)) of each axis i of space that lies over an explicit
    mesh.
    """
    options = geometry.stride, window, geometry.dilation, geometry.padding
    for i, of_axis in enumerate(zip(*options, strict=True)):
        axis = x.ndim - 1 - len(window) + i
        names = _sharding.mesh_axes_of(x, axis)
        if names:
            yield i, axis, names, _sharding.shard_count(x, axis), x.shape[axis], *of_axis


def _refuse(got: str, names: tuple[str, ...], x: jax.Array) -> None:
    of = 'outputs that can be divided alike, stride times fewer than inputs (padding "SAME" or "CAUSAL")'
    expected = f"along an axis of space that is divided over {names}, {of}"
    _checks.bad_value("x", expected, got, x=x)
