"""Static description of a trilinear form: its geometry and the sizes of x, w and y."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxseq import _sizes
from jaxseq._geometry import Geometry, spread


class Form(NamedTuple):
    """The form <ȳ, C(x, w)> of x (N, *I, g I'), w (*K, I', g O') and y (N, *O, g O')."""

    geometry: Geometry
    precision: Any
    space: tuple[int, ...]  # I
    outputs: tuple[int, ...]  # O
    kernel_size: tuple[int, ...]  # K
    in_channels: int  # I', input channels of a group
    out_channels: int  # O', output channels of a group

    def input_padding(self) -> list[tuple[int, int]]:
        """Return (lo', hi') of (2), the padding of ȳ dilated by the stride."""
        padding = []
        for I, O, K, s, d, (lo, _) in self.axes():
            lo_ = d * (K - 1) - lo
            padding.append((lo_, I + d * (K - 1) - spread(O, s) - lo_))
        return padding

    def kernel_padding(self) -> list[tuple[int, int]]:
        """Return (lo, hi'') of (3)."""
        return [(lo, d * (K - 1) + spread(O, s) - I - lo) for I, O, K, s, d, (lo, _) in self.axes()]

    def is_known(self) -> bool:
        """Return True if no spatial size is symbolic."""
        return _sizes.is_concrete(*self.space, *self.outputs)

    def reaches(self) -> bool:
        """Return True if along every axis some tap of some output reads an input.

        Otherwise all three contractions are exactly zero.
        """
        if not self.is_known():
            return True
        return all(any(_reads(n, I, K, s, d, lo) for n in range(O)) for I, O, K, s, d, (lo, _) in self.axes())

    def in_reach(self) -> tuple["Form", list[tuple[int, int]], list[tuple[int, int]]]:
        """Return the form without the leading and trailing outputs and taps that read padding only.

        Also return the numbers of removed outputs and of removed taps, (before, after) for each axis. The form must
        read an input: see `reaches`.
        """
        kernel_size, sizes, padding, outputs, taps = [], [], [], [], []
        for I, O, K, s, d, (lo, hi) in self.axes():
            n0, O_ = _range_in_reach(I, O, K, s, d, lo)
            k0, K_ = _range_in_reach(I, K, O, d, s, lo)
            lo_ = lo - s * n0 - d * k0
            outputs.append((n0, O - n0 - O_))
            taps.append((k0, K - k0 - K_))
            sizes.append(O_)
            kernel_size.append(K_)
            padding.append((lo_, hi if (O, K) == (O_, K_) else s * (O_ - 1) + d * (K_ - 1) + 1 - I - lo_))
        geometry = self.geometry._replace(padding=tuple(padding))
        return self._replace(geometry=geometry, outputs=tuple(sizes), kernel_size=tuple(kernel_size)), outputs, taps

    def axes(self) -> Any:
        """(I, O, K, s, d, (lo, hi)) of each spatial axis."""
        g = self.geometry
        return zip(self.space, self.outputs, self.kernel_size, g.stride, g.dilation, g.padding, strict=True)


def _reads(n: int, I: int, K: int, s: int, d: int, lo: int) -> bool:
    """Return True if some tap k of output n reads an input, 0 <= s n + d k - lo < I."""
    k = max(0, -(-(lo - s * n) // d))  # the first tap at 0 or above
    return k < K and s * n + d * k - lo < I


def _range_in_reach(I: int, O: int, K: int, s: int, d: int, lo: int) -> tuple[int, int]:
    """Return the first output that reads an input, and the number of outputs from it to the last one that does."""
    first = next(n for n in range(O) if _reads(n, I, K, s, d, lo))
    last = next(n for n in reversed(range(O)) if _reads(n, I, K, s, d, lo))
    return first, last - first + 1


# Computes one of the three contractions of a form from its two operands.
Contraction = Callable[[Form, jax.Array, jax.Array], jax.Array]


def padded(a: jax.Array, places: Sequence[tuple[int, int, int]], first: int = 1) -> jax.Array:
    """Pad the axes from `first` on with zeros (before, after, between). Negative numbers crop.

    With zeros between elements, elements are cropped before: XLA aborts the process over a pad that crops and dilates
    an axis sharded over devices.
    """
    sizes = a.shape[first : first + len(places)]
    crops, zeros = [], []
    for crop, zero in map(_crop, sizes, places):
        crops.append(crop)
        zeros.append(zero)
    rest = a.ndim - first - len(places)
    for config in [crops, zeros] if any(map(any, crops)) else [zeros]:
        a = lax.pad(a, jnp.zeros((), a.dtype), [*[(0, 0, 0)] * first, *config, *[(0, 0, 0)] * rest])
    return a


def _crop(size: int, place: tuple[int, int, int]) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Split one pad configuration into two: elements to crop, then zeros to add."""
    before, after, between = place
    if between == 0 or size == 0 or min(before, after) >= 0:
        return (0, 0, 0), place
    step = between + 1
    start, stop = (max(0, -(side // step)) for side in (before, after))
    if start + stop >= size:  # no element remains
        return (-size, 0, 0), (before + after + (size - 1) * step + 1, 0, 0)
    return (-start, -stop, 0), (before + start * step, after + stop * step, between)
