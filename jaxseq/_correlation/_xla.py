"""All other forms: XLA's convolution, with (2) and (3) in the form of (1).

For dense convolutions over one and two axes, nothing that was tried on CPU beats XLA at more than a few shapes:
docs/measured-convolution.md.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxseq import _mesh, _precision, _sizes
from jaxseq._correlation._form import Contraction, Form
from jaxseq._correlation._rule import Rule

# The spatial letters of lax's dimension numbers for 0 (unused), 1, 2 and 3 axes.
_SPACE = ("", "W", "HW", "DHW")


@dataclass(frozen=True)
class _Xla(Rule):
    """XLA's convolution."""

    name = "xla"

    def applies(self, which: Contraction, form: Form) -> bool:
        return True

    def to_output(self, form: Form, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """Return y of (1)."""
        return _correlate(
            x,
            kernel,
            stride=form.geometry.stride,
            padding=form.padding(Contraction.TO_OUTPUT),
            dilation=form.geometry.dilation,
            groups=form.geometry.groups,
            precision=form.precision,
        )

    def to_input(self, form: Form, kernel: jax.Array, y_bar: jax.Array) -> jax.Array:
        """Return x̄ of (2)."""
        g = form.geometry.groups
        w = jnp.flip(kernel, range(len(form.kernel_size)))  # (*K, I', g O')
        if g == 1:  # reshapes would hide from XLA's GPU backend that cuDNN has this convolution
            w = w.swapaxes(-2, -1)
        else:
            w = w.reshape(*w.shape[:-1], g, -1).swapaxes(-3, -1)  # (*K, O', g, I')
            w = w.reshape(*w.shape[:-2], -1)  # (*K, O', g I')
        return _correlate(
            y_bar,
            w,
            spread=form.geometry.stride,
            padding=form.padding(Contraction.TO_INPUT),
            dilation=form.geometry.dilation,
            groups=g,
            precision=form.precision,
        )

    def to_kernel(self, form: Form, x: jax.Array, y_bar: jax.Array) -> jax.Array:
        """Return w̄ of (3), with the channel of x as the batch and the batch as the contracted channel."""
        geometry, space = form.geometry, _SPACE[len(form.kernel_size)]
        correlate = partial(
            _correlate,
            stride=geometry.dilation,
            padding=form.padding(Contraction.TO_KERNEL),
            dilation=geometry.stride,
            precision=form.precision,
        )
        if geometry.groups > 1 or form.backend == "default":
            letters = f"C{space}N", f"I{space}O", f"{space}NC"
            return correlate(x, y_bar, letters=letters, batch_groups=geometry.groups)
        if form.backend is None:
            cpu, default = (partial(self.to_kernel, form._replace(backend=b)) for b in ("cpu", "default"))
            return lax.platform_dependent(x, y_bar, cpu=cpu, default=default)
        # The same with the dimension numbers of (1). Those above are slow in XLA's CPU backend, 27 times as slow inside
        # a loop, where it does not change them: docs/measured-convolution.md. On other platforms, they save a copy.
        w_bar = correlate(x.swapaxes(0, -1), jnp.moveaxis(y_bar, 0, -2))  # (C, *I, N), (*O, N, O') -> (C, *K, O')
        return jnp.moveaxis(w_bar, 0, -2)


XLA = _Xla()


def _correlate(
    x: jax.Array,
    w: jax.Array,
    *,
    padding: Sequence[tuple[int, int]],
    dilation: tuple[int, ...],
    precision: Any,
    letters: tuple[str, str, str] | None = None,
    stride: tuple[int, ...] | None = None,
    spread: tuple[int, ...] | None = None,
    groups: int = 1,
    batch_groups: int = 1,
) -> jax.Array:
    """Call lax for (1), on an input that is first dilated by `spread`, accumulated in float32 at least.

    Negative padding is removed first: XLA's CPU backend reads out of bounds where one side crops and the other pads.
    """
    axes = len(dilation)
    space = _SPACE[axes]
    letters = letters or (f"N{space}C", f"{space}IO", f"N{space}C")
    stride, spread = stride or (1,) * axes, spread or (1,) * axes
    dims = lax.conv_dimension_numbers(x.shape, w.shape, letters)
    at_x, at_w, at_y = dims.lhs_spec[2:], dims.rhs_spec[2:], dims.out_spec[2:]
    sizes = [x.shape[axis] for axis in at_x], [w.shape[axis] for axis in at_w]
    wide = _precision.accumulator(x.dtype)
    conv = partial(
        lax.conv_general_dilated,
        window_strides=stride,
        rhs_dilation=dilation,
        dimension_numbers=dims,
        feature_group_count=groups,
        batch_group_count=batch_groups,
        precision=precision,
        preferred_element_type=wide,
    )
    if wide != x.dtype:
        conv = partial(_conv_of_narrow, conv)
    if not _sizes.is_concrete(*sizes[0], *sizes[1], *chain(*padding)):
        # It is unknown whether a symbolic amount crops or pads; lax.pad does both.
        return conv(_pad_and_dilate(x, at_x, padding, spread), w, padding=((0, 0),) * axes)
    parts = [part for part in map(_overlap, *sizes, padding, spread, stride, dilation) if part]
    if len(parts) < axes:  # nothing overlaps along some axis
        y = jax.eval_shape(partial(conv, padding=padding, lhs_dilation=spread), x, w)
        return _mesh.align_varying((jnp.zeros(y.shape, y.dtype), x, w))[0]
    if parts == [_Overlap((0, I - 1), (0, K - 1), pads, (0, 0)) for I, K, pads in zip(*sizes, padding, strict=True)]:
        return conv(x, w, padding=padding, lhs_dilation=spread)
    x = _slice(x, at_x, [part.rows for part in parts])
    w = _slice(w, at_w, [part.taps for part in parts])
    y = conv(x, w, padding=[part.padding for part in parts], lhs_dilation=spread)
    config = [(0, 0, 0)] * y.ndim
    for axis, part in zip(at_y, parts, strict=True):
        config[axis] = (*part.zeros, 0)
    return lax.pad(y, jnp.zeros((), y.dtype), config) if any(map(any, config)) else y


def _conv_of_narrow(conv: Callable[..., jax.Array], x: jax.Array, w: jax.Array, **options: Any) -> jax.Array:
    """Return `conv(x, w)`, a convolution of operands that are narrower than the accumulator.

    For a result in float32, XLA's GPU backend converts bfloat16 operands to float32. cuDNN accumulates in float32 in
    either case, so on a GPU the result is in the dtype of the operands, and is converted.
    """
    wide = _precision.accumulator(x.dtype)
    rounded = lambda x, w: conv(x, w, **options, preferred_element_type=x.dtype).astype(wide)  # noqa: E731
    return lax.platform_dependent(x, w, cuda=rounded, rocm=rounded, default=partial(conv, **options))


def _pad_and_dilate(
    x: jax.Array, axes: Sequence[int], padding: Sequence[tuple[int, int]], spread: tuple[int, ...]
) -> jax.Array:
    """Return x with all zeros materialized. The barrier keeps XLA from folding them into the convolution."""
    config = [(0, 0, 0)] * x.ndim
    for axis, (lo, hi), p in zip(axes, padding, spread, strict=True):
        config[axis] = (lo, hi, p - 1)
    return lax.optimization_barrier(lax.pad(x, jnp.zeros((), x.dtype), config))


class _Overlap(NamedTuple):
    """The part of one axis on which input, kernel and output overlap. The rest contributes nothing."""

    rows: tuple[int, int]  # of the input, first and last
    taps: tuple[int, int]  # of the kernel, first and last
    padding: tuple[int, int]  # of these rows, never negative
    zeros: tuple[int, int]  # outputs before and after that read no row


def _overlap(
    size: int, taps: int, padding: tuple[int, int], spread: int, stride: int, dilation: int
) -> _Overlap | None:
    """Remove outer rows m, outputs n and taps k that cannot satisfy spread m = stride n + dilation k - lo.

    Let m0, n0, k0 be the first that remain and M, N, K the last. The padding of the remainder,

        lo' = lo + spread m0 - stride n0 - dilation k0,    hi' = stride N + dilation K - spread M - lo,

    is not negative, because tap k0 of output n0 reads row m0 or a row before it, and tap K of output N reads row M or a
    row after it. This also holds for the correlations that JAX derives from this one at second order, and where XLA
    exchanges a short input with a large kernel: there, rows, outputs and taps change roles.

    Return None if nothing overlaps.
    """
    lo, hi = padding
    outputs = (spread * (size - 1) + lo + hi - dilation * (taps - 1)) // stride + 1
    m0, M, n0, N, k0, K = 0, size - 1, 0, outputs - 1, 0, taps - 1
    previous = None
    while previous != (m0, M, n0, N, k0, K):  # bound each of the three by the ranges of the other two
        previous = m0, M, n0, N, k0, K
        m0 = max(m0, -(-(stride * n0 + dilation * k0 - lo) // spread))
        M = min(M, (stride * N + dilation * K - lo) // spread)
        n0 = max(n0, -(-(spread * m0 + lo - dilation * K) // stride))
        N = min(N, (spread * M + lo - dilation * k0) // stride)
        k0 = max(k0, -(-(spread * m0 + lo - stride * N) // dilation))
        K = min(K, (spread * M + lo - stride * n0) // dilation)
        if m0 > M or n0 > N or k0 > K:
            return None
    before = lo + spread * m0 - stride * n0 - dilation * k0
    behind = stride * N + dilation * K - spread * M - lo
    return _Overlap(rows=(m0, M), taps=(k0, K), padding=(before, behind), zeros=(n0, outputs - 1 - N))


def _slice(a: jax.Array, axes: Sequence[int], ranges: Sequence[tuple[int, int]]) -> jax.Array:
    """Return the elements from first to last along each of the axes, without an operation if these are all."""
    for axis, (first, last) in zip(axes, ranges, strict=True):
        if (first, last + 1) != (0, a.shape[axis]):
            a = lax.slice_in_dim(a, first, last + 1, axis=axis)
    return a
