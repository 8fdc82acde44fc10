"""Transposed convolution: the pullback of a convolution to its input, as a separate function.

It is the second contraction of the trilinear form of `_correlation/`, with x in place of ȳ and y in place of x̄:

    y = to_input(w, x) + b

The backward pass consists of the other two contractions:

    x̄ = to_output(ȳ, w)        w̄ = to_kernel(ȳ, x)        b̄[i] = sum_{b, m} ȳ[b, m, i]
"""

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact, PRNGKeyArray

from jaxseq import _checks, _conv, _dense, _geometry, _init, _mesh
from jaxseq._both_modes import Rule, call_in_both_modes
from jaxseq._conv import ConvParams
from jaxseq._correlation import Contraction, Form, contract
from jaxseq._distributed import _conv as _distributed
from jaxseq._geometry import Geometry
from jaxseq._linear_transpose import Linearity
from jaxseq._op import op, with_hints
from jaxseq._types import AnyArray
from jaxseq.tuning import used_for_convolutions

# --- Custom rule: x (N, *O, C_in), kernel (*K, C_out/g, C_in), y (N, *I, C_out) with I = space ---


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _conv_transpose(form: Form, x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    return _fwd(form, x, kernel, bias)[0]


def _fwd(form: Form, x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, Any]:
    """Return y in the dtype of x, and the residuals."""
    y = contract(Contraction.TO_INPUT, form, kernel, x)
    return _dense.add_bias(y, bias).astype(x.dtype), (x, kernel, bias)


def _bwd(form: Form, residuals: Any, y_bar: AnyArray) -> Any:
    x, kernel, bias = residuals
    y_bar = jnp.asarray(y_bar)  # the pullback of `jax.vjp` passes NumPy arrays through
    x_bar = contract(Contraction.TO_OUTPUT, form, y_bar, kernel).astype(x.dtype)
    w_bar = contract(Contraction.TO_KERNEL, form, y_bar, x).astype(kernel.dtype)
    b_bar = None if bias is None else _dense.pull_bias(y_bar).astype(bias.dtype)
    return x_bar, w_bar, b_bar


_conv_transpose.defvjp(_fwd, _bwd)


def _push(form: Form, args: Any, _: Any, directions: Any) -> jax.Array:
    x, kernel, _ = args
    x_dot, *rest = directions
    product = lambda z, w: contract(Contraction.TO_INPUT, form, w, z[0])  # noqa: E731
    return _dense.push_product(product, (x,), kernel, ((x_dot,), *rest)).astype(x.dtype)


def _conv_transpose_over_batch(
    precision: Any,
    geometry: Geometry,
    space: tuple[int, ...],
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
) -> jax.Array:
    """Return y, of spatial size `space`, for any number of batch axes, on one device."""
    axes = len(geometry.stride)
    batch, outputs, kernel_size = x.shape[: -axes - 1], x.shape[-axes - 1 : -1], kernel.shape[:axes]
    in_channels, out_channels = kernel.shape[-2], kernel.shape[-1] // geometry.groups  # of the convolution
    form = Form(geometry, precision, space, outputs, kernel_size, in_channels, out_channels)
    functions = (partial(f, form) for f in (_conv_transpose, _fwd, _bwd, _conv_transpose, _push))
    linearity = Linearity("conv_transpose", (0,), (1,), () if bias is None else (2,))
    rule = Rule(*functions, linearity=linearity)
    y: Any = call_in_both_modes(rule, x.reshape(prod(batch), *x.shape[len(batch) :]), kernel, bias)
    return y.reshape(*batch, *y.shape[1:])


# --- Public ---


@op
def conv_transpose(
    x: Inexact[AnyArray, "*batch_and_space c_in"],
    kernel: Inexact[AnyArray, "*kernel_size c_out_per_group c_in"],
    bias: Inexact[AnyArray, " c_out"] | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[tuple[int, int]] = "VALID",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    output_padding: int | Sequence[int] = 0,
    precision: Any = None,
    method: str = "auto",
) -> Inexact[Array, "*batch_and_outputs c_out"]:
    r"""Transposed convolution over 1, 2 or 3 spatial axes, channels last, with a hand-derived gradient.

    $$y[b, m, i] = \sum_{n, k, o\,:\, s n + d k - lo = m} x[b, n, o]\; w[k, i, o] + \beta[i]$$

    This is the transpose of `conv` with the **same kernel array** and the same options: with $C =$ `conv(·, kernel)`
    from size $I$ to $O$ and $C^T$ this function, $\langle x, C(u) \rangle = \langle C^T(x), u \rangle$ for all $u$.
    Along each axis, $O$ positions become $I = (O - 1) s + d (K - 1) + 1 - lo - hi$ plus `output_padding`.

    Args:
        x: input `(*batch, *space, c_in)` with any number of batch axes, including none.
        kernel: `(*kernel_size, c_out // groups, c_in)`, the kernel of a convolution from c_out to c_in channels.
        bias: `(c_out,)`, or None.
        stride: distance in the output between neighbouring inputs, one integer or one for each spatial axis.
        padding: the padding of the convolution, which crops the output: `"VALID"` (none), `"SAME"` (s O outputs), one
            integer for all sides, or a pair (lo, hi) for each spatial axis. Negative numbers add zeros. `"CAUSAL"` is
            rejected, because the transpose of a causal convolution is anti-causal. For causal upsampling to s O
            outputs, none of which depends on a later input, use `padding=[(0, d * (K - 1) + 1 - s)]`.
        dilation: distance between taps, one integer or one for each spatial axis.
        groups: number of channel groups, as in `conv`.
        output_padding: number of additional outputs at the end, less than `stride` or `dilation`. With a stride, it
            selects one of the $s$ input sizes that `conv` maps to $O$. The same as
            `padding=[(lo, hi - output_padding)]`.
        precision: as in `jax.lax.conv_general_dilated`.
        method: `"auto"` or `"direct"`, as in `conv`.

    Returns:
        `(*batch, *outputs, c_out)` in the dtype of `x`. Products accumulate in float32 at least.

    Raises:
        TypeError: if `x`, `kernel` or `bias` is not a float or complex array, or an option has the wrong type.
        ValueError: if a rank, a number of channels or an option is invalid, or the padding crops the whole output.

    Example:
        >>> import jax.numpy as jnp, jaxseq
        >>> x = jnp.array([1.0, 0.0, 2.0])[:, None]  # no batch axis, 3 positions, 1 channel
        >>> kernel = jnp.array([1.0, 2.0, 3.0])[:, None, None]
        >>> jaxseq.conv_transpose(x, kernel, stride=2)[:, 0]
        Array([1., 2., 3., 0., 2., 4., 6.], dtype=float32)

    Reference:
        V. Dumoulin and F. Visin, A guide to convolution arithmetic for deep learning (2016), section 4.
    """
    x, kernel, bias, axes = _conv.operands(x, kernel, bias)
    kernel_size, (per_out, c_in) = kernel.shape[:axes], kernel.shape[axes:]
    outputs = x.shape[-axes - 1 : -1]
    geometry, space = _geometry.resolve_transposed(
        outputs, kernel_size, stride, padding, dilation, groups, output_padding=output_padding
    )
    method = _checks.choice("method", method, _geometry.METHODS)
    geometry = geometry._replace(method=method, tuning=used_for_convolutions())
    c_out = per_out * geometry.groups
    _conv.check_groups(geometry.groups, x.shape[-1], c_out, x=x, kernel=kernel)
    if x.shape[-1] != c_in:
        _checks.bad_value("kernel", f"c_in = {x.shape[-1]} channels on its last axis", str(c_in), x=x, kernel=kernel)
    if bias is not None:
        _checks.shape("bias", bias, (c_out,), "(c_out,)", kernel=kernel)
    over_batch = partial(_conv_transpose_over_batch, _checks.precision(precision))
    if _mesh.is_distributed(x, kernel, bias):
        y = _distributed.conv_transpose(over_batch, geometry, space, x, kernel, bias)
    else:
        geometry = geometry._replace(partitioning=_mesh.partitioning((x, kernel, bias)))
        y = over_batch(geometry, space, x, kernel, bias)
    return y


@with_hints
def conv_transpose_init(
    key: PRNGKeyArray,
    kernel_size: int | Sequence[int],
    c_in: int,
    c_out: int,
    *,
    stride: int | Sequence[int] = 1,
    groups: int = 1,
    use_bias: bool = True,
    kernel_init: _init.Initializer | None = None,
    dtype: Any = jnp.float32,
) -> ConvParams:
    r"""Initialize the parameters of `conv_transpose`: a random kernel and a zero bias.

    $$w \sim N\Bigl(0,\; \frac{s}{K\, c_{in} / g}\Bigr)$$

    where $K$ is the number of taps and $s$ the product of the strides. An output is a sum over $K / s$ taps on average,
    so white input of variance one gives output of variance one.

    Args:
        key: a JAX random key.
        kernel_size: kernel size, an integer for 1-D or one for each of 1 to 3 spatial axes.
        c_in: number of input channels.
        c_out: number of output channels.
        stride: as in `conv_transpose`, one integer or one for each spatial axis.
        groups: number of channel groups, as in `conv_transpose`.
        use_bias: if False, the bias is None.
        kernel_init: replaces the initializer of the kernel: a function `(key, shape, dtype) -> array`, as in
            `jax.nn.initializers`, called with the shape (*kernel_size, c_in // groups, c_out), whose axes are
            then transposed.
        dtype: floating dtype of the parameters.

    Returns:
        `ConvParams(kernel (*kernel_size, c_out // groups, c_in), bias (c_out,))`, in the order of the arguments of
        `conv_transpose`.

    Raises:
        TypeError: if a size is not an integer, `dtype` is not a floating dtype, or `kernel_init` is not a function.
        ValueError: if a size is less than 1, there are more than three axes, or `groups` does not divide the channels.

    Example:
        >>> import jax, jax.numpy as jnp, jaxseq
        >>> params = jaxseq.conv_transpose_init(jax.random.key(0), (4, 4), 8, 3, stride=2)
        >>> jaxseq.conv_transpose(jnp.ones((10, 14, 14, 8)), *params, stride=2, padding="SAME").shape
        (10, 28, 28, 3)

    Reference:
        Y. LeCun, L. Bottou, G. B. Orr and K.-R. Müller, Efficient BackProp (1998), section 4.6.
    """
    taps, c_in, c_out = _init.kernel_sizes(kernel_size, c_in, c_out)
    strides = _geometry.per_axis("stride", stride, len(taps))
    groups = _checks.integer("groups", groups, at_least=1)
    _conv.check_groups(groups, c_in, c_out)
    dtype = _checks.dtype("dtype", dtype)
    bias = jnp.zeros((c_out,), dtype) if _checks.boolean("use_bias", use_bias) else None
    if kernel_init is not None:
        drawn = _init.drawn("kernel_init", kernel_init, key, (*taps, c_in // groups, c_out), dtype)
        by_group = jnp.moveaxis(drawn.reshape(*taps, c_in // groups, groups, c_out // groups), -1, -3)
        return ConvParams(jnp.moveaxis(by_group, -1, -2).reshape(*taps, c_out // groups, c_in), bias)
    scale = (prod(strides) / (prod(taps) * (c_in // groups))) ** 0.5
    kernel = scale * _init.normal(key, (*taps, c_out // groups, c_in), dtype)
    return ConvParams(kernel, bias)
