"""All other forms: XLA's convolution, with (2) and (3) in the form of (1).

Dense convolutions over one and two axes are what XLA does well: of what was tried on CPU (products tap by tap, one
product of all taps side by side, residues of the stride as channels) nothing was faster at more than a few shapes.
The last, for (3) and windows of whole strides, was 0.6 to 1.5 times as fast over fourteen shapes, and above 1.2 only
at tiny ones.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxseq import _precision, _sharding
from jaxseq._correlation import _taps
from jaxseq._correlation._form import Form

# The letters of lax's dimension numbers for 0 (unused), 1, 2 and 3 spatial axes.
_SPACE = ("", "W", "HW", "DHW")


def to_output(form: Form, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """y of (1)."""
    if _sharding.may_leave_idle(x, kernel):
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


def to_input(form: Form, kernel: jax.Array, ȳ: jax.Array) -> jax.Array:
    """x̄ of (2)."""
    if _sharding.may_leave_idle(kernel, ȳ):
        return _taps.to_input(form, kernel, ȳ)
    g = form.geometry.groups
    w = jnp.flip(kernel, range(len(form.window)))  # (*K, I', g O')
    w = w.reshape(*w.shape[:-1], g, -1).swapaxes(-3, -1)  # (*K, O', g, I')
    w = w.reshape(*w.shape[:-2], -1)  # (*K, O', g I')
    return _correlate(
        ȳ,
        w,
        spread=form.geometry.stride,
        padding=form.input_padding(),
        dilation=form.geometry.dilation,
        groups=g,
        precision=form.precision,
    )


def to_kernel(form: Form, x: jax.Array, ȳ: jax.Array) -> jax.Array:
    """w̄ of (3): the channel of x plays the batch, the batch the contracted channel, and w̄ comes out as (*K, I', O')."""
    if _sharding.may_leave_idle(x, ȳ):
        return _taps.to_kernel(form, x, ȳ)
    geometry, space = form.geometry, _SPACE[len(form.window)]
    correlate = partial(
        _correlate,
        stride=geometry.dilation,
        padding=form.kernel_padding(),
        dilation=geometry.stride,
        precision=form.precision,
    )
    if geometry.groups > 1:
        letters = f"C{space}N", f"I{space}O", f"{space}NC"
        return correlate(x, ȳ, letters=letters, batch_groups=geometry.groups)
    # The same in the letters of (1). In those above XLA's CPU backend takes 1.15 times as long, and inside of a loop,
    # where it leaves letters as they are, 27 times: (8, 32, 32, 16) to 64 channels, 3 x 3 taps, 67 ms and 2.5.
    w̄ = correlate(x.swapaxes(0, -1), jnp.moveaxis(ȳ, 0, -2))  # (C, *I, N), (*O, N, O') -> (C, *K, O')
    return jnp.moveaxis(w̄, 0, -2)


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
    """The one call of lax: (1) for an input first dilated by `spread`, accumulated in float32 at least."""
    axes = len(dilation)
    space = _SPACE[axes]
    letters = letters or (f"N{space}C", f"{space}IO", f"N{space}C")
    stride, spread = stride or (1,) * axes, spread or (1,) * axes
    dims = lax.conv_dimension_numbers(x.shape, w.shape, letters)
    sizes = [(x.shape[axis] - 1) * p + 1 for axis, p in zip(dims.lhs_spec[2:], spread, strict=True)]
    taps = [w.shape[axis] for axis in dims.rhs_spec[2:]]
    # A crop beyond the far edge: some backends of XLA then read wrong elements, lax.pad does not.
    cropped = any(-min(pair) > size for pair, size in zip(padding, sizes, strict=True))
    # Taps that do not meet along one axis, and more of them than inputs along another: XLA (of jax 0.10 to 0.12) aborts
    # the process as it exchanges the operands, unless the stretched input is kept from it.
    apart = any(1 < p >= k for p, k in zip(spread, taps, strict=True))
    exchanged = apart and any(k > x.shape[axis] for k, axis in zip(taps, dims.lhs_spec[2:], strict=True))
    if cropped or exchanged:
        config = [(0, 0, 0)] * x.ndim
        for axis, (lo, hi), p in zip(dims.lhs_spec[2:], padding, spread, strict=True):
            config[axis] = (lo, hi, p - 1)
        x = lax.pad(x, jnp.zeros((), x.dtype), config)
        x = lax.optimization_barrier(x) if exchanged else x
        padding, spread = ((0, 0),) * axes, (1,) * axes
    return lax.conv_general_dilated(
        x,
        w,
        window_strides=stride,
        padding=padding,
        lhs_dilation=spread,
        rhs_dilation=dilation,
        dimension_numbers=dims,
        feature_group_count=groups,
        batch_group_count=batch_groups,
        precision=precision,
        preferred_element_type=_precision.accumulator(x.dtype),
    )
