"""Convolution, with C the correlation of `_correlation/`.

    y = to_output(x, w) + b

What pulls it back are the other two contractions of the form:

    x̄ = to_input(w, ȳ)        w̄ = to_kernel(x, ȳ)        b̄[o] = sum_{b, n} ȳ[b, n, o]
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact, PRNGKeyArray

from jaxseq import _checks, _correlation, _dense, _geometry, _halo, _init, _precision, _sharding
from jaxseq._cotangents import as_jax_arrays
from jaxseq._geometry import Geometry
from jaxseq._op import op
from jaxseq._transpose_hint import hint_at_transpose
from jaxseq._types import AnyArray


class ConvParams(NamedTuple):
    """Parameters of a convolution, in the order in which `conv` takes them: `conv(x, *params)`."""

    kernel: Inexact[Array, "*window c_in_per_group c_out"]
    bias: Inexact[Array, " c_out"] | None


# --- The rule ---


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _conv(geometry: Geometry, precision: Any, x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    return apply(geometry, precision, x, kernel, bias)


def apply(geometry: Geometry, precision: Any, x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    """y, in the dtype of x."""
    outputs = _geometry.output_sizes(geometry, x.shape[1:-1], kernel.shape[:-2])
    y = _correlation.to_output(geometry, precision, x, kernel, outputs)
    return _dense.add_bias(y, bias).astype(x.dtype)


def _conv_fwd(geometry: Geometry, precision: Any, x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> Any:
    return apply(geometry, precision, x, kernel, bias), (x, kernel, bias)


def _conv_bwd(geometry: Geometry, precision: Any, residuals: Any, y_bar: jax.Array) -> Any:
    x, kernel, bias = residuals
    x_bar = _correlation.to_input(geometry, precision, kernel, y_bar, x.shape[1:-1])
    w_bar = _correlation.to_kernel(geometry, precision, x, y_bar, kernel.shape[:-2])
    b_bar = None if bias is None else _dense.pull_bias(y_bar)
    return _precision.cast_like((x_bar, w_bar, b_bar), residuals)


_conv.defvjp(_conv_fwd, as_jax_arrays(_conv_bwd))


# --- Public ---


@op
def conv(
    x: Inexact[AnyArray, "*batch_and_space c_in"],
    kernel: Inexact[AnyArray, "*window c_in_per_group c_out"],
    bias: Inexact[AnyArray, " c_out"] | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[tuple[int, int]] = "VALID",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    flip: bool = False,
    precision: Any = None,
    method: str = "auto",
) -> Inexact[Array, "*batch_and_outputs c_out"]:
    r"""Convolution over 1, 2 or 3 spatial axes, channels last, with a hand-derived gradient.

    $$y[b, n, o] = \sum_{k, i} x[b,\; s n + d k - lo,\; i]\; w[k, i, o] + \beta[o]$$

    for every output position $n$, tap $k$ and channel $i$ of the group of $o$; $x$ is zero outside its bounds.
    This is cross-correlation, as deep learning has it; `flip=True` turns the kernel round in space, which
    gives the mathematician's convolution ($w[K - 1 - k]$ in place of $w[k]$). Along each axis the output has
    $\lfloor (I + lo + hi - d (K - 1) - 1) / s \rfloor + 1$ positions.

    How it is computed depends on the sizes. Long windows (depthwise ones beyond 64 taps, dense ones of hundreds) go
    through spectra, whose rounding is relative to the largest outputs and where a NaN or an infinity reaches all
    positions of its channel; on CPU narrow groups are computed several together, and it reaches those. With
    `method="direct"` neither happens.

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
        method: `"auto"`, by spectra where windows are long, or `"direct"`, never by spectra, the gradients included:
            each output is a sum over its own window and group, so that rounding is relative to that sum, and a NaN
            reaches the outputs whose window holds it. Slower for long windows.

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
    x, kernel, bias, axes = operands(x, kernel, bias)
    geometry = _geometry.resolve(x.shape[-axes - 1 : -1], kernel.shape[:axes], stride, padding, dilation, groups)
    geometry = geometry.by(method)
    check_channels(geometry.groups, x, kernel, bias)
    if _checks.boolean("flip", flip):
        kernel = jnp.flip(kernel, range(axes))
    precision = _checks.precision(precision)

    def rule(geometry: Geometry, x: jax.Array) -> Any:
        here, parts = _halo.of_conv(geometry, kernel.shape[:axes], x)
        return parts, partial(_conv, here, precision)

    return hint_at_transpose("conv", over_batch(rule, geometry, x, kernel, bias))


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
    taps, c_in, c_out = _init.window_sizes(window, c_in, c_out)
    groups = _checks.integer("groups", groups, at_least=1)
    check_groups(groups, c_in, c_out)
    dtype = _checks.dtype("dtype", dtype)
    return ConvParams(_init.kernel(key, taps, c_in // groups, c_out, dtype), jnp.zeros((c_out,), dtype))


# --- What `conv_transpose` and `causal_conv` ask too ---


def operands(x: Any, kernel: Any, bias: Any) -> tuple[jax.Array, jax.Array, jax.Array | None, int]:
    """(x, kernel, bias, spatial axes), all of them arrays that can meet."""
    x = _checks.array("x", x, complex_ok=True)
    kernel = _checks.array("kernel", kernel, complex_ok=True)
    axes = kernel.ndim - 2
    if not 1 <= axes <= 3:
        _checks.bad_value("kernel", "3, 4 or 5 axes (*window, channels, channels)", f"{kernel.ndim}", kernel=kernel)
    if 0 in kernel.shape:
        _checks.bad_value("kernel", "at least one tap and one channel", str(kernel.shape))
    if x.ndim < axes + 1:
        expected = f"at least {axes + 1} axes (*batch, *space, c_in) for a kernel with {axes} spatial axes"
        _checks.bad_value("x", expected, str(x.ndim), x=x, kernel=kernel)
    if bias is not None:
        bias = _checks.array("bias", bias, complex_ok=True)
    for name, value in (("kernel", kernel), ("bias", bias)):
        if value is not None and jnp.iscomplexobj(value) != jnp.iscomplexobj(x):
            _checks.bad_type(name, f"real or complex as `x` is, {x.dtype}", str(value.dtype))
    return x, kernel, bias, axes


def check_groups(groups: int, c_in: int, c_out: int, **arrays: jax.Array) -> None:
    """Both numbers of channels have to fall into that many groups."""
    if c_in % groups or c_out % groups:
        got = f"{groups} for {c_in} and {c_out}"
        _checks.bad_value("groups", "a divisor of both c_in and c_out", got, **arrays)


def check_channels(groups: int, x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> None:
    """Those of x are what a kernel (*window, c_in // groups, c_out) takes, and those of the bias what it gives."""
    c_in, (per_in, c_out) = x.shape[-1], kernel.shape[-2:]
    check_groups(groups, c_in, c_out, x=x, kernel=kernel)
    if c_in != per_in * groups:
        expected = f"c_in // groups = {c_in} // {groups} = {c_in // groups} input channels"
        _checks.bad_value("kernel", expected, str(per_in), x=x, kernel=kernel)
    if bias is not None:
        _checks.shape("bias", bias, (c_out,), "(c_out,)", kernel=kernel)


def over_batch(
    rule: Callable[[Geometry, jax.Array], tuple[list[_halo.Part], Callable[..., jax.Array]]],
    geometry: Geometry,
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    c_out: int = -1,
) -> jax.Array:
    """A rule that has one batch axis, for any number of them, and for any arrays over devices: each device of an
    explicit mesh computes its own part of the result. Axis `c_out` of the kernel holds the channels of the result.

    `rule(geometry, x)` gives the rows that x borrows from other devices, and the function of one device.
    """
    x, kernel, bias = _sharding.align_varying((x, kernel, bias))
    axes = kernel.ndim - 2
    kernel, bias = _sharding.unshard((kernel, bias), _sharding.sharded_axes(x, slice(-1)))
    home = _sharding.product_sharding(x, kernel, c_out)
    groups, x, kernel, bias, like = _sharding.shard_by_features(geometry.groups, x, kernel, bias, c_out)
    partitioning = _sharding.partitioning((x, kernel, bias))
    parts, here = rule(geometry._replace(groups=groups, partitioning=partitioning), x)

    def run(*operands: Any) -> jax.Array:
        x, *weights = _sharding.align_varying(operands)
        x = _halo.extend_with_halo(parts, x)
        batch = x.shape[: -axes - 1]
        y = here(x if len(batch) == 1 else x.reshape(prod(batch), *x.shape[-axes - 1 :]), *weights)
        return y.reshape(*batch, *y.shape[1:])

    return _sharding.reshard(_sharding.map_shards(run, (x, kernel, bias), like), home)
