"""Depthwise and separable convolution: `conv` with one group per channel.

    depthwise    u[b, n, (c, r)] = sum_k  x[b, s n + d k - lo, c]  w[k, (c, r)]
    separable    y[b, n, o] = sum_{c, r}  u[b, n, (c, r)]  v[(c, r), o]  +  β[o]

r numbers the outputs of a channel. Both are compositions of `conv`, whose rules compute the gradients: shifted products
for u, a matrix product for y.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Inexact, PRNGKeyArray

from jaxseq import _checks, _init
from jaxseq._conv import conv, conv_init
from jaxseq._op import op, with_hints
from jaxseq._types import AnyArray, ConvParams, SeparableConvParams


@op
def depthwise_conv(
    x: Inexact[AnyArray, "*batch_and_space c_in"],
    kernel: Inexact[AnyArray, "*kernel_size 1 c_out"],
    bias: Inexact[AnyArray, " c_out"] | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[tuple[int, int]] = "VALID",
    dilation: int | Sequence[int] = 1,
    flip: bool = False,
    precision: Any = None,
    method: str = "auto",
) -> Inexact[Array, "*batch_and_outputs c_out"]:
    r"""Convolution of each channel with its own kernels: `conv` with `groups=c_in`.

    $$y[b, n, (c, r)] = \sum_k x[b,\; s n + d k - lo,\; c]\; w[k, (c, r)] + \beta[(c, r)]$$

    with $0 \le r <$ c_out / c_in, the *multiplier*. Output channel $(c, r)$ has index c * multiplier + r.

    Args:
        x: input `(*batch, *space, c_in)`.
        kernel: `(*kernel_size, 1, c_out)`, c_out a multiple of c_in.
        bias: `(c_out,)`, or None.
        stride: as in `conv`.
        padding: as in `conv`.
        dilation: as in `conv`.
        flip: as in `conv`.
        precision: as in `conv`.
        method: as in `conv`.

    Returns:
        `(*batch, *outputs, c_out)` in the dtype of `x`.

    Raises:
        TypeError: as in `conv`.
        ValueError: as in `conv`, or if the shape of `kernel` is not (*kernel_size, 1, a multiple of c_in).

    Example:
        >>> import jax.numpy as jnp, jaxseq
        >>> x = jnp.array([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]])  # 3 positions, 2 channels
        >>> kernel = jnp.array([[1.0, 0.0], [1.0, 1.0]])[:, None]  # a sum, and the later one
        >>> jaxseq.depthwise_conv(x, kernel)
        Array([[ 3., 20.],
               [ 6., 40.]], dtype=float32)

    Reference:
        L. Sifre, Rigid-motion scattering for image classification (2014), section 6.2.
    """
    x, kernel = _by_channel(x, kernel, "kernel")
    options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "flip": flip}
    return conv(x, kernel, bias, **options, groups=x.shape[-1], precision=precision, method=method)


@op
def separable_conv(
    x: Inexact[AnyArray, "*batch_and_space c_in"],
    depthwise: Inexact[AnyArray, "*kernel_size 1 c_middle"],
    pointwise: Inexact[AnyArray, "*ones c_middle c_out"],
    bias: Inexact[AnyArray, " c_out"] | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[tuple[int, int]] = "VALID",
    dilation: int | Sequence[int] = 1,
    flip: bool = False,
    precision: Any = None,
    method: str = "auto",
) -> Inexact[Array, "*batch_and_outputs c_out"]:
    r"""Depthwise convolution, followed by a dense map of the channels at each position.

    $$y[b, n, o] = \sum_{c, r} \Big( \sum_k x[b,\; s n + d k - lo,\; c]\; w[k, (c, r)] \Big)\; v[(c, r), o] + \beta[o]$$

    This is the convolution with the kernel $\sum_r w[k, (c, r)]\, v[(c, r), o]$. It has K c_middle + c_middle c_out
    weights, and as many products per output position, instead of K c_in c_out.

    Args:
        x: input `(*batch, *space, c_in)`.
        depthwise: w, `(*kernel_size, 1, c_middle)`, c_middle a multiple of c_in.
        pointwise: v, `(*ones, c_middle, c_out)` with size one along each spatial axis.
        bias: `(c_out,)`, or None.
        stride: of the depthwise part, as in `conv`.
        padding: of the depthwise part, as in `conv`.
        dilation: of the depthwise part, as in `conv`.
        flip: for the depthwise part, as in `conv`.
        precision: of both parts, as in `conv`.
        method: of both parts, as in `conv`.

    Returns:
        `(*batch, *outputs, c_out)` in the dtype of `x`.

    Raises:
        TypeError: as in `depthwise_conv`.
        ValueError: as in `depthwise_conv`, or if `pointwise` has more than one tap or its input channels do not match
            `depthwise`.

    Example:
        >>> import jax, jax.numpy as jnp, jaxseq
        >>> w, _ = jaxseq.conv_init(jax.random.key(0), (3, 3), 8, 16, groups=8)
        >>> v, bias = jaxseq.conv_init(jax.random.key(1), (1, 1), 16, 32)
        >>> jaxseq.separable_conv(jnp.ones((10, 28, 28, 8)), w, v, bias, padding="SAME").shape
        (10, 28, 28, 32)

    Reference:
        F. Chollet, Xception: deep learning with depthwise separable convolutions (2017), section 2.
    """
    x, depthwise = _by_channel(x, depthwise, "depthwise")
    pointwise = _checks.array("pointwise", pointwise, complex_ok=True)
    if pointwise.ndim < 3 or any(K != 1 for K in pointwise.shape[:-2]):
        expected = "size one along each spatial axis, (*ones, c_middle, c_out)"
        _checks.bad_value("pointwise", expected, str(pointwise.shape))
    if pointwise.shape[-2] != depthwise.shape[-1]:
        expected = f"c_middle = {depthwise.shape[-1]} input channels"
        _checks.bad_value("pointwise", expected, str(pointwise.shape[-2]), depthwise=depthwise, pointwise=pointwise)
    options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "flip": flip}
    u = depthwise_conv(x, depthwise, **options, precision=precision, method=method)
    return conv(u, pointwise, bias, precision=precision, method=method)


@with_hints
def depthwise_conv_init(
    key: PRNGKeyArray,
    kernel_size: int | Sequence[int],
    c_in: int,
    *,
    multiplier: int = 1,
    use_bias: bool = True,
    kernel_init: _init.Initializer | None = None,
    dtype: DTypeLike = jnp.float32,
) -> ConvParams:
    """Initialize `depthwise_conv`: a normal kernel of variance 1 / (number of taps), and a zero bias.

    Args:
        key: a JAX random key.
        kernel_size: kernel size, an integer for 1-D or one for each of 1 to 3 spatial axes.
        c_in: number of channels.
        multiplier: number of outputs of each channel; c_out = c_in * multiplier.
        use_bias: if False, the bias is None.
        kernel_init: replaces the initializer of the kernel, as in `conv_init`, with the shape (*kernel_size, 1, c_out).
        dtype: floating dtype of the parameters.

    Returns:
        `ConvParams(kernel (*kernel_size, 1, c_out), bias (c_out,))`, in the order of the arguments of `depthwise_conv`.

    Raises:
        TypeError: if a size is not an integer, `dtype` is not a floating dtype, or `kernel_init` is not a function.
        ValueError: if a size is less than 1, or there are more than three axes.

    Example:
        >>> import jax, jax.numpy as jnp, jaxseq
        >>> params = jaxseq.depthwise_conv_init(jax.random.key(0), 3, 4, multiplier=2)
        >>> jaxseq.depthwise_conv(jnp.ones((10, 28, 4)), *params).shape
        (10, 26, 8)

    Reference:
        Y. LeCun, L. Bottou, G. B. Orr and K.-R. Müller, Efficient BackProp (1998), section 4.6.
    """
    c_out = _checks.integer("c_in", c_in, at_least=1) * _checks.integer("multiplier", multiplier, at_least=1)
    return conv_init(
        key, kernel_size, c_in, c_out, groups=c_in, use_bias=use_bias, kernel_init=kernel_init, dtype=dtype
    )


@with_hints
def separable_conv_init(
    key: PRNGKeyArray,
    kernel_size: int | Sequence[int],
    c_in: int,
    c_out: int,
    *,
    multiplier: int = 1,
    use_bias: bool = True,
    kernel_init: _init.Initializer | None = None,
    dtype: DTypeLike = jnp.float32,
) -> SeparableConvParams:
    """Initialize `separable_conv`: normal kernels of variance 1 / fan_in for both parts, and a zero bias.

    Args:
        key: a JAX random key.
        kernel_size: kernel size of the depthwise part, an integer for 1-D or one for each of 1 to 3 spatial axes.
        c_in: number of input channels.
        c_out: number of output channels.
        multiplier: number of outputs of each channel in the depthwise part; c_middle = c_in * multiplier.
        use_bias: if False, the bias is None.
        kernel_init: replaces the initializer of both kernels, as in `conv_init`, with the shapes
            (*kernel_size, 1, c_middle) and (*ones, c_middle, c_out).
        dtype: floating dtype of the parameters.

    Returns:
        `SeparableConvParams(depthwise, pointwise, bias)`, in the order of the arguments of `separable_conv`.

    Raises:
        TypeError: if a size is not an integer, `dtype` is not a floating dtype, or `kernel_init` is not a function.
        ValueError: if a size is less than 1, or there are more than three axes.

    Example:
        >>> import jax, jax.numpy as jnp, jaxseq
        >>> params = jaxseq.separable_conv_init(jax.random.key(0), (3, 3), 8, 32)
        >>> jaxseq.separable_conv(jnp.ones((10, 28, 28, 8)), *params, padding="SAME").shape
        (10, 28, 28, 32)

    Reference:
        Y. LeCun, L. Bottou, G. B. Orr and K.-R. Müller, Efficient BackProp (1998), section 4.6.
    """
    first, second = jax.random.split(key)
    options: dict[str, Any] = {"kernel_init": kernel_init, "dtype": dtype}
    depthwise, _ = depthwise_conv_init(first, kernel_size, c_in, multiplier=multiplier, use_bias=False, **options)
    ones = (1,) * (depthwise.ndim - 2)
    pointwise, bias = conv_init(second, ones, depthwise.shape[-1], c_out, use_bias=use_bias, **options)
    return SeparableConvParams(depthwise, pointwise, bias)


def _by_channel(x: Any, kernel: Any, name: str) -> tuple[jax.Array, jax.Array]:
    """Return `x` and a depthwise kernel as checked arrays."""
    x, kernel = _checks.array("x", x, complex_ok=True), _checks.array(name, kernel, complex_ok=True)
    if not x.ndim or not x.shape[-1]:
        _checks.bad_value("x", "at least one channel, on its last axis", str(x.shape))
    if kernel.ndim < 3 or kernel.shape[-2] != 1 or kernel.shape[-1] % x.shape[-1]:
        expected = f"(*kernel_size, 1, a multiple of c_in = {x.shape[-1]})"
        _checks.bad_value(name, expected, str(kernel.shape), x=x)
    return x, kernel
