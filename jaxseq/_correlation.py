"""The trilinear form of a convolution, <ȳ, C(x, w)>, and the three contractions that read off it.

With batch b, input channel i, output channel o, output position n, input position m and tap k, each
position and tap standing for one index per spatial axis (the geometry of `_geometry.py`):

    y[b, n, o] = sum_{k, i}  x[b, s n + d k - lo, i]  w[k, i, o]                              (1)

x is zero outside its bounds. (1) is linear in x and in w, so both pullbacks read off the scalar <ȳ, y>.

To the input. Collect the terms of <ȳ, y> that hold x[b, m, i]:

    x̄[b, m, i] = sum_{n, k, o : s n + d k - lo = m}  ȳ[b, n, o]  w[k, i, o]                    (2)

Spread ȳ out by the stride, ỹ[s n] = ȳ[n] and zero in between, and turn the window round,
k = K - 1 - j. The constraint becomes  s n = m + d j - (d (K - 1) - lo),  so

    x̄[b, m, i] = sum_{j, o}  ỹ[b, m + d j - lo', o]  w[K - 1 - j, i, o],    lo' = d (K - 1) - lo

which is (1) with stride 1, dilation d, left padding lo', on an input dilated by s, with the window
reversed and the channels exchanged. The right padding hi' is what gives I outputs (the formula for O,
solved): hi' = I + d (K - 1) - ((O - 1) s + 1) - lo'.

To the kernel. Collect the terms that hold w[k, i, o]:

    w̄[k, i, o] = sum_{b, n}  x[b, d k + s n - lo, i]  ȳ[b, n, o]                               (3)

which is (1) again with k in the role of the output position, n in that of the tap, the batch in that of
the contracted channel: ȳ is the window, and stride and dilation have changed places. The left padding
stays lo; hi'' = d (K - 1) + s (O - 1) + 1 - I - lo gives K outputs.

Groups. With g groups, channel i = (γ, i') and o = (γ, o'), γ the group: (1) to (3) hold in each group.
The kernel is stored w[k, i', (γ, o')]; (2) needs w[k, o', (γ, i')], an exchange of i' and o' within each
group; (3) contracts x and ȳ group by group.

Depthwise. With one input and one output channel in each group there is no sum over channels left, and all
three are sums of shifted products, one term a tap:

    y[b, n, c] = sum_k  x[b, s n + d k - lo, c]  w[k, c]
    w̄[k, c] = sum_{b, n}  x[b, s n + d k - lo, c]  ȳ[b, n, c]

and (2) likewise from ỹ. The compiler makes one pass over the arrays of it, where XLA's convolution on CPU treats
each group as a convolution of its own: (8, 1024, 256) with 4 taps takes 1.7 ms against 45, with both gradients 6.6
against 112. The products of (3) are laid down in memory before they are summed, hence 25 MB of temporaries against 9.
The terms are written out, so there is a limit to their number.

`conv` computes (1) and pulls back by (2) and (3); `conv_transpose` computes (2) and pulls back by (1) and (3).
All three come in the accumulator's dtype.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxseq import _precision, _sharding
from jaxseq._geometry import Geometry

# The letters of lax's dimension numbers for 0 (unused), 1, 2 and 3 spatial axes.
_SPACE = ("", "W", "HW", "DHW")
# The most taps of a depthwise window that are written out one by one.
TAPS = 32


# x (N, *I, C_in), kernel (*K, C_in/g, C_out), y (N, *O, C_out)


def to_output(
    geometry: Geometry, precision: Any, x: jax.Array, kernel: jax.Array, outputs: tuple[int, ...], sharding: Any
) -> jax.Array:
    """y of (1), of size `outputs`, laid out over devices as `sharding` says."""
    common = _precision.promote(x, kernel)
    window = kernel.shape[:-2]
    if x.size == 0:
        shape = (x.shape[0], *outputs, kernel.shape[-1])
        return jnp.zeros(shape, _precision.accumulator(common), out_sharding=sharding)
    if _is_depthwise(geometry, x.shape[-1], kernel.shape[-1], window):
        pads = [(lo, hi, 0) for lo, hi in geometry.padding]
        seen = _seen(x, window, outputs, pads, geometry.stride, geometry.dilation)
        return _sharding.laid_out(_shifted(seen, kernel), sharding)
    return _correlate(
        x.astype(common),
        kernel.astype(common),
        stride=geometry.stride,
        padding=geometry.padding,
        dilation=geometry.dilation,
        groups=geometry.groups,
        precision=precision,
        out_sharding=sharding,
    )


def to_input(
    geometry: Geometry, precision: Any, kernel: jax.Array, ȳ: jax.Array, space: tuple[int, ...], sharding: Any
) -> jax.Array:
    """x̄ of (2), for an input of size `space`."""
    g, axes = geometry.groups, kernel.ndim - 2
    common = _precision.promote(ȳ, kernel)
    if ȳ.size == 0:
        shape = (ȳ.shape[0], *space, kernel.shape[-2] * g)
        return jnp.zeros(shape, _precision.accumulator(common), out_sharding=sharding)
    padding = []
    for I, O, K, s, d, (lo, _) in _per_axis(geometry, space, ȳ, kernel.shape[:axes]):
        lo_ = d * (K - 1) - lo
        padding.append((lo_, I + d * (K - 1) - ((O - 1) * s + 1) - lo_))
    w = jnp.flip(kernel, range(axes))  # (*K, I', g O')
    if _is_depthwise(geometry, kernel.shape[-2] * g, kernel.shape[-1], kernel.shape[:axes]):
        pads = [(lo, hi, s - 1) for (lo, hi), s in zip(padding, geometry.stride, strict=True)]
        seen = _seen(ȳ, kernel.shape[:axes], space, pads, (1,) * axes, geometry.dilation)
        return _sharding.laid_out(_shifted(seen, w), sharding)
    w = w.reshape(*w.shape[:-1], g, -1).swapaxes(-3, -1)  # (*K, O', g, I')
    w = w.reshape(*w.shape[:-2], -1)  # (*K, O', g I')
    return _correlate(
        ȳ.astype(common),
        w.astype(common),
        spread=geometry.stride,
        padding=padding,
        dilation=geometry.dilation,
        groups=g,
        precision=precision,
        out_sharding=sharding,
    )


def to_kernel(
    geometry: Geometry, precision: Any, x: jax.Array, ȳ: jax.Array, window: tuple[int, ...], sharding: Any
) -> jax.Array:
    """w̄ of (3), for a kernel of size `window`."""
    common = _precision.promote(x, ȳ)
    if ȳ.size == 0:
        shape = (*window, x.shape[-1] // geometry.groups, ȳ.shape[-1])
        return jnp.zeros(shape, _precision.accumulator(common), out_sharding=sharding)
    if _is_depthwise(geometry, x.shape[-1], ȳ.shape[-1], window):
        pads = [(lo, hi, 0) for lo, hi in geometry.padding]
        seen = _seen(x, window, ȳ.shape[1:-1], pads, geometry.stride, geometry.dilation)
        wide, over = _precision.accumulator(common), tuple(range(ȳ.ndim - 1))
        terms = [jnp.sum(part.astype(wide) * ȳ.astype(wide), over) for _, part in seen]
        return _sharding.laid_out(jnp.stack(terms).reshape(*window, 1, ȳ.shape[-1]), sharding)
    padding = []
    for I, O, K, s, d, (lo, _) in _per_axis(geometry, x.shape[1:-1], ȳ, window):
        padding.append((lo, d * (K - 1) + s * (O - 1) + 1 - I - lo))
    space = _SPACE[len(window)]
    return _correlate(
        x.astype(common),
        ȳ.astype(common),
        # The channel of x plays the batch, the batch the contracted channel, and w̄ comes out as (*K, I', O).
        letters=(f"C{space}N", f"I{space}O", f"{space}NC"),
        stride=geometry.dilation,
        padding=padding,
        dilation=geometry.stride,
        batch_groups=geometry.groups,
        precision=precision,
        out_sharding=sharding,
    )


def _per_axis(geometry: Geometry, space: tuple[int, ...], ȳ: jax.Array, window: tuple[int, ...]) -> Iterator[Any]:
    """(I, O, K, s, d, (lo, hi)) of each spatial axis."""
    return zip(space, ȳ.shape[1:-1], window, geometry.stride, geometry.dilation, geometry.padding, strict=True)


# --- Depthwise: shifted products ---


def _is_depthwise(geometry: Geometry, c_in: int, c_out: int, window: tuple[int, ...]) -> bool:
    return geometry.groups == c_in == c_out and prod(window) <= TAPS


def _seen(
    x: jax.Array,
    window: tuple[int, ...],
    outputs: tuple[int, ...],
    pads: Sequence[tuple[int, int, int]],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Iterator[tuple[tuple[int, ...], jax.Array]]:
    """For each tap k, the x[s n + d k] that the outputs see through it, x padded."""
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *pads, (0, 0, 0)])
    for tap in product(*map(range, window)):
        places = [
            slice(d * k, d * k + s * O, s)  # x[s n + d k], n = 0 .. O - 1
            for k, O, s, d in zip(tap, outputs, stride, dilation, strict=True)
        ]
        yield tap, x[(slice(None), *places)]


def _shifted(seen: Iterator[tuple[tuple[int, ...], jax.Array]], kernel: jax.Array) -> jax.Array:
    """The sum over k of what is seen through it times w[k]."""
    total: Any = None
    for tap, part in seen:
        wide = _precision.accumulator(_precision.promote(part, kernel))
        w = jnp.expand_dims(kernel[(*tap, 0)], range(part.ndim - 1))
        term = part.astype(wide) * w.astype(wide)
        total = term if total is None else total + term
    return total


# --- All others: lax ---


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
    out_sharding: Any = None,
) -> jax.Array:
    """The one call of lax: (1) for an input first dilated by `spread`, accumulated in float32 at least."""
    axes = len(dilation)
    space = _SPACE[axes]
    letters = letters or (f"N{space}C", f"{space}IO", f"N{space}C")
    stride, spread = stride or (1,) * axes, spread or (1,) * axes
    dims = lax.conv_dimension_numbers(x.shape, w.shape, letters)
    sizes = [(x.shape[axis] - 1) * p + 1 for axis, p in zip(dims.lhs_spec[2:], spread, strict=True)]
    if any(-min(pair) > size for pair, size in zip(padding, sizes, strict=True)):
        # A crop beyond the far edge: some backends of XLA then read wrong elements, lax.pad does not.
        config = [(0, 0, 0)] * x.ndim
        for axis, (lo, hi), p in zip(dims.lhs_spec[2:], padding, spread, strict=True):
            config[axis] = (lo, hi, p - 1)
        x = lax.pad(x, jnp.zeros((), x.dtype), config)
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
        out_sharding=out_sharding,
    )
