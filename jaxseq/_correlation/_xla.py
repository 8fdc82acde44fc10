"""All other forms: XLA's convolution, with (2) and (3) in the form of (1).

For dense convolutions over one and two axes, nothing that was tried on CPU beats XLA at more than a few shapes:
docs/measured-convolution.md.
"""

from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxseq import _mesh, _precision, _sizes
from jaxseq._correlation import _taps
from jaxseq._correlation._form import Form

# The spatial letters of lax's dimension numbers for 0 (unused), 1, 2 and 3 axes.
_SPACE = ("", "W", "HW", "DHW")


def to_output(form: Form, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Return y of (1)."""
    if _mesh.may_have_idle_axis(form.geometry.partitioning, x, kernel):
        return _taps.to_output(form, x, kernel)
    return _correlate(
        x,
        kernel,
        stride=form.geometry.stride,
        padding=form.geometry.padding,
        dilation=form.geometry.dilation,
        groups=form.geometry.groups,
        precision=form.precision,
    )


def to_input(form: Form, kernel: jax.Array, y_bar: jax.Array) -> jax.Array:
    """Return x̄ of (2)."""
    if _mesh.may_have_idle_axis(form.geometry.partitioning, kernel, y_bar):
        return _taps.to_input(form, kernel, y_bar)
    g = form.geometry.groups
    w = jnp.flip(kernel, range(len(form.kernel_size)))  # (*K, I', g O')
    w = w.reshape(*w.shape[:-1], g, -1).swapaxes(-3, -1)  # (*K, O', g, I')
    w = w.reshape(*w.shape[:-2], -1)  # (*K, O', g I')
    return _correlate(
        y_bar,
        w,
        spread=form.geometry.stride,
        padding=form.input_padding(),
        dilation=form.geometry.dilation,
        groups=g,
        precision=form.precision,
    )


def to_kernel(form: Form, x: jax.Array, y_bar: jax.Array) -> jax.Array:
    """Return w̄ of (3), with the channel of x as the batch and the batch as the contracted channel."""
    if _mesh.may_have_idle_axis(form.geometry.partitioning, x, y_bar):
        return _taps.to_kernel(form, x, y_bar)
    geometry, space = form.geometry, _SPACE[len(form.kernel_size)]
    correlate = partial(
        _correlate,
        stride=geometry.dilation,
        padding=form.kernel_padding(),
        dilation=geometry.stride,
        precision=form.precision,
    )
    if geometry.groups > 1:
        letters = f"C{space}N", f"I{space}O", f"{space}NC"
        return correlate(x, y_bar, letters=letters, batch_groups=geometry.groups)
    # The same with the dimension numbers of (1). Those above are slow in XLA's CPU backend, 27 times as slow inside a
    # loop, where it does not change them: docs/measured-convolution.md.
    w_bar = correlate(x.swapaxes(0, -1), jnp.moveaxis(y_bar, 0, -2))  # (C, *I, N), (*O, N, O') -> (C, *K, O')
    return jnp.moveaxis(w_bar, 0, -2)


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
    conv = partial(
        lax.conv_general_dilated,
        window_strides=stride,
        rhs_dilation=dilation,
        dimension_numbers=dims,
        feature_group_count=groups,
        batch_group_count=batch_groups,
        precision=precision,
        preferred_element_type=_precision.accumulator(x.dtype),
    )
    if not _sizes.is_concrete(*sizes[0], *sizes[1], *chain(*padding)):
        # It is unknown whether a symbolic amount crops or pads; lax.pad does both.
        return conv(_pad_and_dilate(x, at_x, padding, spread), w, padding=((0, 0),) * axes)
    parts = [part for part in map(_overlap, *sizes, padding, spread, stride, dilation) if part]
    if len(parts) < axes:  # nothing overlaps along some axis
        y = jax.eval_shape(partial(conv, padding=padding, lhs_dilation=spread), x, w)
        return _mesh.align_varying((jnp.zeros(y.shape, y.dtype), x, w))[0]
    x = _slice(x, at_x, [part.rows for part in parts])
    w = _slice(w, at_w, [part.taps for part in parts])
    padding = [part.padding for part in parts]
    y = conv(x, w, padding=padding, lhs_dilation=spread)
    config = [(0, 0, 0)] * y.ndim
    for axis, part in zip(at_y, parts, strict=True):
        config[axis] = (*part.zeros, 0)
    return lax.pad(y, jnp.zeros((), y.dtype), config) if any(map(any, config)) else y


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
    previous, m, n, k = None, (0, size - 1), (0, outputs - 1), (0, taps - 1)
    while previous != (m, n, k):
        previous = m, n, k
        m = _multiples(spread, m, stride * n[0] + dilation * k[0] - lo, stride * n[1] + dilation * k[1] - lo)
        n = _multiples(stride, n, spread * m[0] + lo - dilation * k[1], spread * m[1] + lo - dilation * k[0])
        k = _multiples(dilation, k, spread * m[0] + lo - stride * n[1], spread * m[1] + lo - stride * n[0])
        if any(last < first for first, last in (m, n, k)):
            return None
    first = lo + spread * m[0] - stride * n[0] - dilation * k[0]
    last = stride * n[1] + dilation * k[1] - spread * m[1] - lo
    return _Overlap(rows=m, taps=k, padding=(first, last), zeros=(n[0], outputs - 1 - n[1]))


def _multiples(step: int, indices: tuple[int, int], low: int, high: int) -> tuple[int, int]:
    """Return the first and last of the indices i with low <= step i <= high."""
    return max(indices[0], -(-low // step)), min(indices[1], high // step)


def _slice(a: jax.Array, axes: Sequence[int], ranges: Sequence[tuple[int, int]]) -> jax.Array:
    """Return the elements from first to last along each of the axes, without an operation if these are all."""
    for axis, (first, last) in zip(axes, ranges, strict=True):
        if (first, last + 1) != (0, a.shape[axis]):
            a = lax.slice_in_dim(a, first, last + 1, axis=axis)
    return a
