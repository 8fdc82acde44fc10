"""Convolution: a linear map whose two pullbacks are convolutions again.

With batch b, input channel i, output channel o, output position n, input position m and tap k, each
position and tap standing for one index per spatial axis (the geometry of `_geometry.py`):

    y[b, n, o] = sum_{k, i}  x[b, s n + d k - lo, i]  w[k, i, o]                              (1)

x is zero outside its bounds. (1) is linear in x and in w, so both pullbacks read off the scalar
<ȳ, y>, which is one trilinear form in ȳ, x and w.

Pullback to the input. Collect the terms of <ȳ, y> that hold x[b, m, i]:

    x̄[b, m, i] = sum_{n, k, o : s n + d k - lo = m}  ȳ[b, n, o]  w[k, i, o]                    (2)

Spread ȳ out by the stride, ỹ[s n] = ȳ[n] and zero in between, and turn the window round,
k = K - 1 - j. The constraint becomes  s n = m + d j - (d (K - 1) - lo),  so

    x̄[b, m, i] = sum_{j, o}  ỹ[b, m + d j - lo', o]  w[K - 1 - j, i, o],    lo' = d (K - 1) - lo

which is (1) with stride 1, dilation d, left padding lo', on an input dilated by s, with the window
reversed and the channels exchanged. The right padding hi' is what gives I outputs (the formula for O,
solved): hi' = I + d (K - 1) - ((O - 1) s + 1) - lo'.

Pullback to the kernel. Collect the terms that hold w[k, i, o]:

    w̄[k, i, o] = sum_{b, n}  x[b, d k + s n - lo, i]  ȳ[b, n, o]                               (3)

which is (1) again with k in the role of the output position, n in that of the tap, the batch in that of
the contracted channel: ȳ is the window, and stride and dilation have changed places. The left padding
stays lo; hi'' = d (K - 1) + s (O - 1) + 1 - I - lo gives K outputs.

Bias. y gains b[o], so  b̄[o] = sum_{b, n} ȳ[b, n, o].

Groups. With g groups, channel i = (γ, i') and o = (γ, o'), γ the group: (1) to (3) hold in each group.
The kernel is stored w[k, i', (γ, o')]; (2) needs w[k, o', (γ, i')], an exchange of i' and o' within each
group; (3) contracts x and ȳ group by group.

On a dense kernel these rules are equal to the ones jax has, neither faster nor smaller.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Inexact, PRNGKeyArray

from jaxseq import _checks, _dense, _geometry, _precision, _sharding
from jaxseq._geometry import Geometry
from jaxseq._op import op

# The letters of lax's dimension numbers for 0 (unused), 1, 2 and 3 spatial axes.
_SPACE = ("", "W", "HW", "DHW")


class ConvParams(NamedTuple):
    """Parameters of a convolution, in the order in which `conv` takes them: `conv(x, *params)`."""

    kernel: Inexact[Array, "*window c_in_per_group c_out"]
    bias: Inexact[Array, " c_out"] | None


# --- The linear map and its pullbacks: x (N, *I, C_in), kernel (*K, C_in/g, C_out), y (N, *O, C_out) ---


def apply(geometry: Geometry, precision: Any, x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    """y of (1), in the dtype of x."""
    common = _precision.promote(x, kernel)
    y = _correlate(
        x.astype(common),
        kernel.astype(common),
        stride=geometry.stride,
        padding=geometry.padding,
        dilation=geometry.dilation,
        groups=geometry.groups,
        precision=precision,
        out_sharding=_sharding.joined(x, kernel),
    )
    return _dense.add_bias(y, bias).astype(x.dtype)


def pull_input(geometry: Geometry, precision: Any, kernel: jax.Array, ȳ: jax.Array, x: jax.Array) -> jax.Array:
    """x̄ of (2); of x only shape and dtype are read."""
    if ȳ.size == 0:
        return jnp.zeros_like(x)
    padding = []
    for I, O, K, s, d, (lo, _) in _per_axis(geometry, x, ȳ, kernel.shape[:-2]):
        lo_ = d * (K - 1) - lo
        padding.append((lo_, I + d * (K - 1) - ((O - 1) * s + 1) - lo_))
    g, axes = geometry.groups, kernel.ndim - 2
    w = jnp.flip(kernel, range(axes))  # (*K, I', g O')
    w = w.reshape(*w.shape[:-1], g, -1).swapaxes(-3, -1)  # (*K, O', g, I')
    w = w.reshape(*w.shape[:-2], -1)  # (*K, O', g I')
    common = _precision.promote(ȳ, kernel)
    return _correlate(
        ȳ.astype(common),
        w.astype(common),
        spread=geometry.stride,
        padding=padding,
        dilation=geometry.dilation,
        groups=g,
        precision=precision,
        out_sharding=_sharding.of(x),
    ).astype(x.dtype)


def pull_kernel(geometry: Geometry, precision: Any, x: jax.Array, ȳ: jax.Array, kernel: jax.Array) -> jax.Array:
    """w̄ of (3); of the kernel only shape and dtype are read."""
    if ȳ.size == 0:
        return jnp.zeros_like(kernel)
    padding = []
    for I, O, K, s, d, (lo, _) in _per_axis(geometry, x, ȳ, kernel.shape[:-2]):
        padding.append((lo, d * (K - 1) + s * (O - 1) + 1 - I - lo))
    space = _SPACE[kernel.ndim - 2]
    common = _precision.promote(x, ȳ)
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
        out_sharding=_sharding.of(kernel),
    ).astype(kernel.dtype)


def _per_axis(geometry: Geometry, x: jax.Array, ȳ: jax.Array, window: tuple[int, ...]) -> Iterator[Any]:
    """(I, O, K, s, d, (lo, hi)) of each spatial axis."""
    return zip(
        x.shape[1:-1],
        ȳ.shape[1:-1],
        window,
        geometry.stride,
        geometry.dilation,
        geometry.padding,
        strict=True,
    )


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


# --- The rule ---


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _conv(geometry: Geometry, precision: Any, x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    return apply(geometry, precision, x, kernel, bias)


def _conv_fwd(geometry: Geometry, precision: Any, x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> Any:
    return apply(geometry, precision, x, kernel, bias), (x, kernel, bias)


def _conv_bwd(geometry: Geometry, precision: Any, residuals: Any, ȳ: jax.Array) -> Any:
    x, kernel, bias = residuals
    x̄ = pull_input(geometry, precision, kernel, ȳ, x)
    w̄ = pull_kernel(geometry, precision, x, ȳ, kernel)
    b̄ = None if bias is None else _dense.pull_bias(ȳ).astype(bias.dtype)
    return x̄, w̄, b̄


_conv.defvjp(_conv_fwd, _conv_bwd)


# --- Public ---


@op
def conv(
    x: Inexact[Array, "*batch_and_space c_in"],
    kernel: Inexact[Array, "*window c_in_per_group c_out"],
    bias: Inexact[Array, " c_out"] | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[tuple[int, int]] = "VALID",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    flip: bool = False,
    precision: Any = None,
) -> Inexact[Array, "*batch_and_outputs c_out"]:
    r"""Convolution over 1, 2 or 3 spatial axes, channels last, with a hand-derived gradient.

    $$y[b, n, o] = \sum_{k, i} x[b,\; s n + d k - lo,\; i]\; w[k, i, o] + \beta[o]$$

    for every output position $n$, tap $k$ and channel $i$ of the group of $o$; $x$ is zero outside its bounds.
    This is cross-correlation, as deep learning has it; `flip=True` turns the kernel round in space, which
    gives the mathematician's convolution ($w[K - 1 - k]$ in place of $w[k]$). Along each axis the output has
    $\lfloor (I + lo + hi - d (K - 1) - 1) / s \rfloor + 1$ positions.

    Args:
        x: input `(*batch, *space, c_in)`: any number of batch axes, also none. The last axis is the channels,
            and the `kernel.ndim - 2` axes before it are space.
        kernel: `(*window, c_in // groups, c_out)`.
        bias: `(c_out,)`, or None.
        stride: step between outputs, one integer or one for each spatial axis.
        padding: `"VALID"` (none), `"SAME"` (ceil(I / s) outputs, the odd zero at the end), `"CAUSAL"` (1-D: output n
            reads inputs up to s n only), one integer for all sides, or a pair (lo, hi) for each spatial axis.
            Negative amounts crop.
        dilation: distance between taps, one integer or one for each spatial axis.
        groups: channel groups; group γ of the outputs reads group γ of the inputs only. `groups=c_in` is depthwise.
        flip: whether to turn the kernel round.
        precision: as in `jax.lax.conv_general_dilated`.

    Returns:
        `(*batch, *outputs, c_out)` in the dtype of `x`; products accumulate in float32 at least.

    Raises:
        TypeError: `x`, `kernel` or `bias` is no float (or complex) array, or an option is of the wrong kind.
        ValueError: a rank, channel number, padding word or other option that does not fit; an input that is
            smaller than the window.

    Example:
        >>> import jax.numpy as jnp, jaxseq
        >>> x = jnp.arange(5.0)[:, None]  # no batch axis, 5 positions, 1 channel
        >>> difference = jnp.array([-1.0, 1.0])[:, None, None]
        >>> jaxseq.conv(x**2, difference)[:, 0]
        Array([1., 3., 5., 7.], dtype=float32)

    Reference:
        V. Dumoulin and F. Visin, A guide to convolution arithmetic for deep learning (2016), sections 2 and 4.
    """
    x = _checks.array("x", x, complex_ok=True)
    kernel = _checks.array("kernel", kernel, complex_ok=True)
    axes = kernel.ndim - 2
    if not 1 <= axes <= 3:
        _checks.bad_value("kernel", "3, 4 or 5 axes (*window, c_in // groups, c_out)", f"{kernel.ndim}", kernel=kernel)
    if 0 in kernel.shape:
        _checks.bad_value("kernel", "at least one tap and one channel", str(kernel.shape))
    if x.ndim < axes + 1:
        expected = f"at least {axes + 1} axes (*batch, *space, c_in) for a kernel with {axes} spatial axes"
        _checks.bad_value("x", expected, str(x.ndim), x=x, kernel=kernel)
    geometry = _geometry.resolve(x.shape[-axes - 1 : -1], kernel.shape[:axes], stride, padding, dilation, groups)
    g, (per_in, c_out) = geometry.groups, kernel.shape[axes:]
    _check_groups(g, x.shape[-1], c_out, x=x, kernel=kernel)
    if x.shape[-1] != per_in * g:
        expected = f"c_in // groups = {x.shape[-1]} // {g} = {x.shape[-1] // g} input channels"
        _checks.bad_value("kernel", expected, str(per_in), x=x, kernel=kernel)
    if bias is not None:
        bias = _checks.array("bias", bias, complex_ok=True)
        _checks.shape("bias", bias, (c_out,), "(c_out,)", kernel=kernel)
    for name, value in (("kernel", kernel), ("bias", bias)):
        if value is not None and jnp.iscomplexobj(value) != jnp.iscomplexobj(x):
            _checks.bad_type(name, f"real or complex as `x` is, {x.dtype}", str(value.dtype))
    if _checks.boolean("flip", flip):
        kernel = jnp.flip(kernel, range(axes))
    batch = x.shape[: -axes - 1]
    if len(batch) != 1:  # one batch axis needs no reshape, which a sharded axis may forbid
        x = x.reshape(prod(batch), *x.shape[-axes - 1 :])
    y: jax.Array = _conv(geometry, _checks.precision(precision), *_sharding.together((x, kernel, bias)))
    return y if len(batch) == 1 else y.reshape(*batch, *y.shape[1:])


def conv_init(
    key: PRNGKeyArray,
    window: int | Sequence[int],
    c_in: int,
    c_out: int,
    *,
    groups: int = 1,
    dtype: Any = jnp.float32,
) -> ConvParams:
    """A random kernel and a zero bias for `conv`.

    The kernel is normal with variance 1 / fan_in, fan_in = (taps of the window) * c_in // groups, so that
    white input of variance one gives output of variance one.

    Args:
        key: a JAX random key.
        window: taps along each spatial axis, an integer for 1-D or one for each of 1 to 3 axes.
        c_in: channels of the input.
        c_out: channels of the output.
        groups: channel groups, as in `conv`.
        dtype: floating dtype of the parameters.

    Returns:
        `ConvParams(kernel, bias)`, in the order in which `conv` takes them.

    Raises:
        TypeError: a size that is no integer or a dtype that is no floating dtype.
        ValueError: a size below one, more than three axes, or groups that do not divide the channels.

    Example:
        >>> import jax, jax.numpy as jnp, jaxseq
        >>> params = jaxseq.conv_init(jax.random.key(0), (3, 3), 4, 8, groups=2)
        >>> jaxseq.conv(jnp.ones((10, 28, 28, 4)), *params, groups=2).shape
        (10, 26, 26, 8)

    Reference:
        Y. LeCun, L. Bottou, G. B. Orr and K.-R. Müller, Efficient BackProp (1998), section 4.6.
    """
    axes = len(window) if isinstance(window, tuple | list) else 1
    if not 1 <= axes <= 3:
        _checks.bad_value("window", "1 to 3 spatial axes", f"{axes}")
    taps = _geometry.per_axis("window", window, axes)
    c_in, c_out = _checks.integer("c_in", c_in, at_least=1), _checks.integer("c_out", c_out, at_least=1)
    groups = _checks.integer("groups", groups, at_least=1)
    _check_groups(groups, c_in, c_out)
    dtype = _checks.dtype("dtype", dtype)
    per_in = c_in // groups
    kernel = jax.random.normal(key, (*taps, per_in, c_out), dtype) * (prod(taps) * per_in) ** -0.5
    return ConvParams(kernel, jnp.zeros((c_out,), dtype))


def _check_groups(groups: int, c_in: int, c_out: int, **arrays: jax.Array) -> None:
    if c_in % groups or c_out % groups:
        got = f"{groups} for {c_in} and {c_out}"
        _checks.bad_value("groups", "a divisor of both c_in and c_out", got, **arrays)
