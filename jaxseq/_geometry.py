"""The geometry of a convolution: the input position that each tap reads, and the output size.

With input size I, kernel size K, stride s, dilation d and padding (lo, hi), output n reads through tap k the input
position

    m = s n + d k - lo,        0 <= n < O,   0 <= k < K,

where the input is zero outside 0 <= m < I. The kernel spans d (K - 1) + 1 positions, its *extent*, so

    O = floor((I + lo + hi - extent) / s) + 1.

Conversely, s different input sizes give O outputs,

    I = (O - 1) s + extent - lo - hi + extra,        0 <= extra < s,

so a transposed convolution, which maps O positions to I, needs `extra` as an option.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxseq import _checks, _sizes
from jaxseq._mesh import Partitioning
from jaxseq.tuning import ConvTuning

WORDS = ("SAME", "VALID", "CAUSAL")
METHODS = ("auto", "direct")


class Geometry(NamedTuple):
    """Stride, padding and dilation of each spatial axis, and static options of the computation. Hashable."""

    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    method: str = "auto"  # or "direct": without Fourier transforms
    partitioning: Partitioning = Partitioning()
    tuning: ConvTuning | None = None  # None is that of the platform


def extent(kernel_size: int, dilation: int) -> int:
    """Return the number of input positions that a dilated kernel of size `kernel_size` spans."""
    return dilation * (kernel_size - 1) + 1


def output_sizes(geometry: Geometry, space: tuple[int, ...], kernel_size: tuple[int, ...]) -> tuple[int, ...]:
    """Return the output size O of each spatial axis, at least zero: an empty input has an empty output."""
    return tuple(
        _sizes.at_least((I + lo + hi - extent(K, d)) // s + 1, 0)
        for I, K, s, (lo, hi), d in zip(
            space, kernel_size, geometry.stride, geometry.padding, geometry.dilation, strict=True
        )
    )


def resolve(
    space: tuple[int, ...], kernel_size: tuple[int, ...], stride: Any, padding: Any, dilation: Any, groups: Any
) -> Geometry:
    """Return the geometry for the options of the user, an input of size `space` and a kernel of size `kernel_size`."""
    axes = len(kernel_size)
    stride = per_axis("stride", stride, axes)
    dilation = per_axis("dilation", dilation, axes)
    groups = _checks.integer("groups", groups, at_least=1)
    pads = _padding(padding, space, kernel_size, stride, dilation)
    for size, taps, (lo, hi), d in zip(space, kernel_size, pads, dilation, strict=True):
        if _sizes.is_concrete(size) and size > 0 and size + lo + hi < extent(taps, d):
            _checks.bad_value(
                "x",
                f"a padded size of at least the kernel's extent, {extent(taps, d)}",
                f"{size} + {lo} + {hi} = {size + lo + hi} (space {tuple(space)}, kernel size {tuple(kernel_size)})",
            )
    return _bounded(space, kernel_size, stride, pads, dilation, groups)


def resolve_transposed(
    outputs: tuple[int, ...],
    kernel_size: tuple[int, ...],
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    *,
    output_padding: Any,
) -> tuple[Geometry, tuple[int, ...]]:
    """Return the geometry of the convolution to transpose, and its input size, given its output size `outputs`.

    With padding "SAME" the input size is s O, because O = ceil(I / s). Otherwise an `output_padding` of e reduces the
    padding at the end by e, I = (O - 1) s + extent - lo - (hi - e), and the convolution reads all of its input.
    """
    axes = len(kernel_size)
    stride = per_axis("stride", stride, axes)
    dilation = per_axis("dilation", dilation, axes)
    groups = _checks.integer("groups", groups, at_least=1)
    extra = per_axis("output_padding", output_padding, axes, at_least=0)
    whole = tuple(s * O for s, O in zip(stride, outputs, strict=True))
    if isinstance(padding, str) and padding.upper() == "CAUSAL" and axes == 1:
        hi = extent(kernel_size[0], dilation[0]) - stride[0]
        _checks.bad_value(
            "padding",
            f"padding=[(0, {hi})] for causal upsampling (no output depends on a later input)",
            f"{padding!r}, whose transpose is anti-causal",
        )
    pads = _padding(padding, whole, kernel_size, stride, dilation, WORDS[:2])
    if any(e >= max(s, d) for e, s, d in zip(extra, stride, dilation, strict=True)):
        expected = f"less than the stride {stride} or the dilation {dilation}"
        hint = "for a larger amount, pass padding=[(lo, hi - output_padding)]"
        _checks.bad_value("output_padding", expected, f"{extra}; {hint}")
    if isinstance(padding, str) and padding.upper() == "SAME":
        if any(extra):
            _checks.bad_value("output_padding", "0 with padding='SAME', which determines the size", str(extra))
        return _bounded(whole, kernel_size, stride, pads, dilation, groups), whole
    pads = tuple((lo, hi - e) for (lo, hi), e in zip(pads, extra, strict=True))
    space = []
    for O, K, s, d, (lo, hi) in zip(outputs, kernel_size, stride, dilation, pads, strict=True):
        size = (O - 1) * s + extent(K, d) - lo - hi if O else 0
        if _sizes.is_concrete(O) and O and size < 1:
            _checks.bad_value("padding", f"lo + hi < {size + lo + hi}, the size of the uncropped output", str((lo, hi)))
        space.append(size)
    return _bounded(space, kernel_size, stride, pads, dilation, groups), tuple(space)


def _bounded(
    space: Sequence[int],
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    pads: tuple[tuple[int, int], ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Geometry:
    """Return an equivalent geometry that fits into 32 bits, as XLA requires.

    Every stride larger than the padded input gives one output, and the dilation of one tap has no effect.
    """
    stride = tuple(
        s if s < 2**31 else min(s, max(1, size + lo + hi))
        for s, size, (lo, hi) in zip(stride, space, pads, strict=True)
    )
    return Geometry(stride, pads, tuple(d if K > 1 else 1 for d, K in zip(dilation, kernel_size, strict=True)), groups)


def per_axis(name: str, value: Any, axes: int, at_least: int = 1) -> tuple[int, ...]:
    """Return one integer per spatial axis, from one integer for all of them or one for each."""
    values = tuple(value) if isinstance(value, tuple | list) else (value,) * axes
    if len(values) != axes:
        _checks.bad_value(name, f"an integer or one for each of the {axes} spatial axes", str(values))
    return tuple(_checks.integer(name, v, at_least=at_least) for v in values)


def _padding(
    padding: Any,
    space: tuple[int, ...],
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    words: tuple[str, ...] = WORDS,
) -> tuple[tuple[int, int], ...]:
    axes = len(kernel_size)
    if isinstance(padding, str):
        word = padding.upper()
        if word == "VALID":
            return ((0, 0),) * axes
        if word == "SAME":
            return tuple(map(_same, space, kernel_size, stride, dilation))
        if word in words and word == "CAUSAL":
            if axes == 1:
                return ((extent(kernel_size[0], dilation[0]) - 1, 0),)
            pairs = ", ".join(["(lo, hi)"] * axes)
            expected = f"one spatial axis with padding='CAUSAL'; for {axes} use 'SAME', 'VALID' or pairs [{pairs}]"
            _checks.bad_value("padding", expected, f"{axes} spatial axes")
        _checks.bad_value(
            "padding", "one of " + ", ".join(map(repr, words)) + ", an integer or (lo, hi) pairs", repr(padding)
        )
    if not isinstance(padding, tuple | list):
        amount = _checks.integer("padding", padding)
        return ((amount, amount),) * axes
    pairs = [tuple(p) if isinstance(p, tuple | list) else p for p in padding]
    if len(pairs) != axes or any(not isinstance(p, tuple) or len(p) != 2 for p in pairs):
        _checks.bad_value("padding", f"one (lo, hi) pair for each of the {axes} spatial axes", repr(padding))
    return tuple((_checks.integer("padding", lo), _checks.integer("padding", hi)) for lo, hi in pairs)


def _same(size: int, kernel_size: int, stride: int, dilation: int) -> tuple[int, int]:
    """Return the padding with O = ceil(I / s). An odd element is at the end."""
    total = _sizes.at_least((-(-size // stride) - 1) * stride + extent(kernel_size, dilation) - size, 0)
    return total // 2, total - total // 2
