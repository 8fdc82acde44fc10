"""Static description of a trilinear form: its geometry and the sizes of x, w and y."""

from collections.abc import Sequence
from enum import IntEnum
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxseq import _sizes
from jaxseq._geometry import Geometry
from jaxseq.tuning import ACCELERATOR, CPU, ConvTuning

# "default" is every platform except CPUs, as in `jax.lax.platform_dependent`.
Backend = Literal["cpu", "default"]


class Contraction(IntEnum):
    """One of the three contractions of a form: equation (1), (2) or (3)."""

    TO_OUTPUT = 0
    TO_INPUT = 1
    TO_KERNEL = 2


class Form(NamedTuple):
    """The form <ȳ, C(x, w)> of x (N, *I, g I'), w (*K, I', g O') and y (N, *O, g O')."""

    geometry: Geometry
    precision: Any
    space: tuple[int, ...]  # I
    outputs: tuple[int, ...]  # O
    kernel_size: tuple[int, ...]  # K
    in_channels: int  # I', input channels of a group
    out_channels: int  # O', output channels of a group
    backend: Backend | None = None  # the platform, inside a branch for it; None outside

    @property
    def tuning(self) -> ConvTuning:
        """The measured numbers for the platform of the form."""
        return self.geometry.tuning or (ACCELERATOR if self.backend == "default" else CPU).conv

    def padding(self, which: Contraction) -> list[tuple[int, int]]:
        """Return the padding of a contraction in the form of (1): (lo, hi) of x, (lo', hi') of ȳ or (lo, hi'') of x."""
        if which is Contraction.TO_OUTPUT:
            return list(self.geometry.padding)
        padding = []
        for I, O, K, s, d, (lo, _) in self.axes():
            dilated = _sizes.at_least(s * (O - 1) + 1, 0)  # the size of ȳ dilated by the stride
            if which is Contraction.TO_INPUT:
                lo_ = d * (K - 1) - lo
                padding.append((lo_, I + d * (K - 1) - dilated - lo_))
            else:
                padding.append((lo, d * (K - 1) + dilated - I - lo))
        return padding

    def is_known(self) -> bool:
        """Return True if no spatial size is symbolic."""
        return _sizes.is_concrete(*self.space, *self.outputs)

    def in_reach(self) -> tuple["Form", list[tuple[int, int]], list[tuple[int, int]]] | None:
        """Return the form without the leading and trailing outputs and taps that read padding only.

        Also return the numbers of removed outputs and of removed taps, (before, after) for each axis. Return None if
        along some axis no tap of any output reads an input: all three contractions are then exactly zero. A form of
        symbolic size is returned unchanged.
        """
        if not self.is_known() or all(
            O > 0 >= lo and s * (O - 1) + d * (K - 1) - lo < I for I, O, K, s, d, (lo, _) in self.axes()
        ):  # every tap of every output reads an input
            nothing = [(0, 0)] * len(self.kernel_size)
            return self, nothing, nothing
        kernel_size, sizes, padding, outputs, taps = [], [], [], [], []
        for I, O, K, s, d, (lo, hi) in self.axes():
            n0, O_ = _range_in_reach(I, O, K, s, d, lo)
            k0, K_ = _range_in_reach(I, K, O, d, s, lo)
            if O_ == 0:
                return None
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
    first = next((n for n in range(O) if _reads(n, I, K, s, d, lo)), O)
    last = next((n for n in reversed(range(first, O)) if _reads(n, I, K, s, d, lo)), O - 1)
    return first, last - first + 1


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
