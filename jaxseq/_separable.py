"""Depthwise and separable convolution: `conv` with one group per channel.

    depthwise    u[b, n, (c, r)] = sum_k  x[b, s n + d k - lo, c]  w[k, (c, r)]
    separable    y[b, n, o] = sum_{c, r}  u[b, n, (c, r)]  v[(c, r), o]  +  β[o]

r numbers the outputs of a channel. Both are compositions of `conv`, whose rules compute the gradients: shifted products
for u, a matrix product for y.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Array, Inexact

from jaxseq import _checks
from jaxseq._conv import conv
from jaxseq._op import op
from jaxseq._types import AnyArray


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


def _by_channel(x: Any, kernel: Any, name: str) -> tuple[jax.Array, jax.Array]:
    """Return `x` and a depthwise kernel as checked arrays."""
    x, kernel = _checks.array("x", x, complex_ok=True), _checks.array(name, kernel, complex_ok=True)
    if not x.ndim or not x.shape[-1]:
        _checks.bad_value("x", "at least one channel, on its last axis", str(x.shape))
    if kernel.ndim < 3 or kernel.shape[-2] != 1 or kernel.shape[-1] % x.shape[-1]:
        expected = f"(*kernel_size, 1, a multiple of c_in = {x.shape[-1]})"
        _checks.bad_value(name, expected, str(kernel.shape), x=x)
    return x, kernel
