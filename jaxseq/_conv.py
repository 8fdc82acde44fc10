"""Convolution, as the first contraction of the trilinear form of `_correlation/`.

    y = to_output(x, w) + b

The backward pass consists of the other two contractions:

    x̄ = to_input(w, ȳ)        w̄ = to_kernel(x, ȳ)        b̄[o] = sum_{b, n} ȳ[b, n, o]
"""

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact, Integer, PRNGKeyArray

from jaxseq import _checks, _dense, _geometry, _init, _mesh, _time
from jaxseq._both_modes import Rule, call_in_both_modes
from jaxseq._correlation import Contraction, Form, contract
from jaxseq._distributed import _conv as _distributed
from jaxseq._distributed import _sharding
from jaxseq._geometry import Geometry
from jaxseq._linear_transpose import Linearity
from jaxseq._op import op, with_hints
from jaxseq._types import AnyArray, ConvParams
from jaxseq.tuning import used_for_convolutions

# --- Custom rule ---


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _conv(form: Form, x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    return _conv_fwd(form, x, kernel, bias)[0]


def _conv_fwd(form: Form, x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, Any]:
    """Return y in the dtype of x, and the residuals."""
    y = contract(Contraction.TO_OUTPUT, form, x, kernel)
    return _dense.add_bias(y, bias).astype(x.dtype), (x, kernel, bias)


def _conv_bwd(form: Form, residuals: Any, y_bar: AnyArray) -> Any:
    x, kernel, bias = residuals
    y_bar = jnp.asarray(y_bar)  # the pullback of `jax.vjp` passes NumPy arrays through
    x_bar = contract(Contraction.TO_INPUT, form, kernel, y_bar).astype(x.dtype)
    w_bar = contract(Contraction.TO_KERNEL, form, x, y_bar).astype(kernel.dtype)
    b_bar = None if bias is None else _dense.pull_bias(y_bar).astype(bias.dtype)
    return x_bar, w_bar, b_bar


_conv.defvjp(_conv_fwd, _conv_bwd)


def _conv_push(form: Form, args: Any, _: Any, directions: Any) -> jax.Array:
    x, kernel, _ = args
    x_dot, *rest = directions
    product = lambda z, w: contract(Contraction.TO_OUTPUT, form, z[0], w)  # noqa: E731
    return _dense.push_product(product, (x,), kernel, ((x_dot,), *rest)).astype(x.dtype)


def _conv_over_batch(
    precision: Any, geometry: Geometry, x: jax.Array, kernel: jax.Array, bias: jax.Array | None
) -> jax.Array:
    """Return y for any number of batch axes, on one device."""
    axes = len(geometry.stride)
    batch, space, kernel_size = x.shape[: -axes - 1], x.shape[-axes - 1 : -1], kernel.shape[:axes]
    outputs = _geometry.output_sizes(geometry, space, kernel_size)
    in_channels, out_channels = kernel.shape[-2], kernel.shape[-1] // geometry.groups
    form = Form(geometry, precision, space, outputs, kernel_size, in_channels, out_channels)
    functions = (partial(f, form) for f in (_conv, _conv_fwd, _conv_bwd, _conv, _conv_push))
    linearity = Linearity("conv", (0,), (1,), () if bias is None else (2,))
    rule = Rule(*functions, linearity=linearity)
    y: Any = call_in_both_modes(rule, x.reshape(prod(batch), *x.shape[len(batch) :]), kernel, bias)
    return y.reshape(*batch, *y.shape[1:])


# --- Public ---


@op
def conv(
    x: Inexact[AnyArray, "*batch_and_space c_in"],
    kernel: Inexact[AnyArray, "*kernel_size c_in_per_group c_out"],
    bias: Inexact[AnyArray, " c_out"] | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[tuple[int, int]] = "VALID",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    flip: bool = False,
    lengths: Integer[AnyArray, "*batch"] | None = None,
    precision: Any = None,
    method: str = "auto",
) -> Inexact[Array, "*batch_and_outputs c_out"]:
    r"""Convolution over 1, 2 or 3 spatial axes, channels last, with a hand-derived gradient.

    $$y[b, n, o] = \sum_{k, i} x[b,\; s n + d k - lo,\; i]\; w[k, i, o] + \beta[o]$$

    for every output position $n$, tap $k$ and channel $i$ of the group of $o$. $x$ is zero outside its bounds.
    As usual in deep learning, this is a cross-correlation. `flip=True` reverses the kernel in space, which gives a
    convolution in the mathematical sense ($w[K - 1 - k]$ instead of $w[k]$). Along each axis the output has
    $\lfloor (I + lo + hi - d (K - 1) - 1) / s \rfloor + 1$ positions.

    The algorithm depends on the sizes. Large kernels (depthwise with more than 64 taps, dense with hundreds) use
    Fourier transforms. Their rounding errors are relative to the largest outputs, and a NaN or an infinity reaches all
    positions of its channel. On CPU, several narrow groups are computed together, and a NaN or an infinity reaches all
    of them. `method="direct"` avoids both.

    Args:
        x: input `(*batch, *space, c_in)` with any number of batch axes, including none. The last axis is the channel
            axis, and the `kernel.ndim - 2` axes before it are the spatial axes.
        kernel: `(*kernel_size, c_in // groups, c_out)`.
        bias: `(c_out,)`, or None.
        stride: step between outputs, one integer or one for each spatial axis.
        padding: `"VALID"` (none), `"SAME"` (ceil(I / s) outputs, an odd zero at the end), `"CAUSAL"` (1-D only: output
            n reads inputs up to s n), one integer for all sides, or a pair (lo, hi) for each spatial axis. Negative
            numbers crop.
        dilation: distance between taps, one integer or one for each spatial axis.
        groups: number of channel groups. Group γ of the outputs reads only group γ of the inputs. `groups=c_in` is
            depthwise.
        flip: if True, reverse the kernel along every spatial axis.
        lengths: for one spatial axis (time), the length of each sequence, `(*batch,)` integers from 0 to I. Beyond it,
            `x` counts as zero, as beyond its bounds, and is never read: it may be NaN. The output is that of the
            sequence by itself, followed by zeros: ceil(length / s) outputs for "SAME", else the number above with the
            length in place of I. "SAME" with a stride pads the start as for I.
        precision: as in `jax.lax.conv_general_dilated`.
        method: `"auto"` uses Fourier transforms for large kernels. `"direct"` never does, also not in gradients: each
            output is a sum over its receptive field and group, so rounding errors are relative to that sum, and a NaN
            reaches only the outputs that read it. It is slower for large kernels.

    Returns:
        `(*batch, *outputs, c_out)` in the dtype of `x`. Products accumulate in float32 at least.

    Raises:
        TypeError: if `x`, `kernel` or `bias` is not a float or complex array, or an option has the wrong type.
        ValueError: if a rank, a number of channels, a length or an option is invalid, if the padded input is smaller
            than the dilated kernel, or if `lengths` is passed with more than one spatial axis.

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
    method = _checks.choice("method", method, _geometry.METHODS)
    geometry = geometry._replace(method=method, tuning=used_for_convolutions())
    check_channels(geometry.groups, x, kernel, bias)
    if lengths is not None:
        if axes != 1:
            _checks.bad_value("lengths", "None for a kernel with several spatial axes", "an array", kernel=kernel)
        lengths = _checks.lengths("lengths", lengths, x.shape[:-2], x.shape[-2])
        x = _zero_padding(lengths, x)
    if _checks.boolean("flip", flip):
        kernel = jnp.flip(kernel, range(axes))
    over_batch = partial(_conv_over_batch, _checks.precision(precision))
    if _mesh.is_distributed(x, kernel, bias):
        y = _distributed.conv(over_batch, geometry, x, kernel, bias)
    else:
        geometry = geometry._replace(partitioning=_mesh.partitioning((x, kernel, bias)))
        y = over_batch(geometry, x, kernel, bias)
    if lengths is not None:
        y = _zero_padding(_output_lengths(geometry, padding, kernel.shape[0], lengths), y)
    return y


def _output_lengths(geometry: Geometry, padding: Any, K: int, lengths: jax.Array) -> jax.Array:
    """Return the number of outputs of each sequence by itself."""
    (s,), (d,), ((lo, hi),) = geometry.stride, geometry.dilation, geometry.padding
    reach = 0 if padding == "SAME" else d * (K - 1) - lo - hi
    return jnp.maximum((lengths - reach - 1) // s + 1, 0)


def _zero_padding(lengths: jax.Array, a: jax.Array) -> jax.Array:
    """Set `a` (*batch, positions, channels) to zero beyond the lengths (*batch,)."""
    valid = _time.valid_steps(a.shape[-2], lengths, lengths.ndim)
    return _time.zero_padding(_sharding.place_steps_like(a, valid), a)


@with_hints
def conv_init(
    key: PRNGKeyArray,
    kernel_size: int | Sequence[int],
    c_in: int,
    c_out: int,
    *,
    groups: int = 1,
    use_bias: bool = True,
    kernel_init: _init.Initializer | None = None,
    dtype: Any = jnp.float32,
) -> ConvParams:
    """Initialize the parameters of `conv`: a random kernel and a zero bias.

    The kernel is normal with variance 1 / fan_in, where fan_in = (number of taps) * c_in // groups. White input of
    variance one then gives output of variance one.

    Args:
        key: a JAX random key.
        kernel_size: kernel size, an integer for 1-D or one for each of 1 to 3 spatial axes.
        c_in: number of input channels.
        c_out: number of output channels.
        groups: number of channel groups, as in `conv`.
        use_bias: if False, the bias is None.
        kernel_init: replaces the initializer of the kernel: a function `(key, shape, dtype) -> array`, as in
            `jax.nn.initializers`, called with the shape (*kernel_size, c_in // groups, c_out).
        dtype: floating dtype of the parameters.

    Returns:
        `ConvParams(kernel, bias)`, in the order of the arguments of `conv`.

    Raises:
        TypeError: if a size is not an integer, `dtype` is not a floating dtype, or `kernel_init` is not a function.
        ValueError: if a size is less than 1, there are more than three axes, or `groups` does not divide the channels.

    Example:
        >>> import jax, jax.numpy as jnp, jaxseq
        >>> params = jaxseq.conv_init(jax.random.key(0), (3, 3), 4, 8, groups=2)
        >>> jaxseq.conv(jnp.ones((10, 28, 28, 4)), *params, groups=2).shape
        (10, 26, 26, 8)

    Reference:
        Y. LeCun, L. Bottou, G. B. Orr and K.-R. Müller, Efficient BackProp (1998), section 4.6.
    """
    taps, c_in, c_out = _init.kernel_sizes(kernel_size, c_in, c_out)
    groups = _checks.integer("groups", groups, at_least=1)
    check_groups(groups, c_in, c_out)
    dtype = _checks.dtype("dtype", dtype)
    bias = jnp.zeros((c_out,), dtype) if _checks.boolean("use_bias", use_bias) else None
    if kernel_init is None:
        return ConvParams(_init.kernel(key, taps, c_in // groups, c_out, dtype), bias)
    return ConvParams(_init.drawn("kernel_init", kernel_init, key, (*taps, c_in // groups, c_out), dtype), bias)


# --- Shared with `conv_transpose` and `causal_conv` ---


def operands(x: Any, kernel: Any, bias: Any, *, name: str = "x") -> tuple[jax.Array, jax.Array, jax.Array | None, int]:
    """Return (x, kernel, bias) as checked arrays, and the number of spatial axes. `name` is that of x in errors."""
    for argument, value in ((name, x), ("kernel", kernel)):
        if isinstance(value, ConvParams):
            _checks.bad_type(argument, "an array", "ConvParams; pass its arrays after `x`, as in conv(x, *params)")
    x = _checks.array(name, x, complex_ok=True)
    kernel = _checks.array("kernel", kernel, complex_ok=True)
    axes = kernel.ndim - 2
    if not 1 <= axes <= 3:
        _checks.bad_value(
            "kernel", "3, 4 or 5 axes (*kernel_size, channels, channels)", f"{kernel.ndim}", kernel=kernel
        )
    if 0 in kernel.shape:
        _checks.bad_value("kernel", "at least one tap and one channel", str(kernel.shape))
    if x.ndim < axes + 1:
        expected = f"at least {axes + 1} axes (*batch, *space, c_in) for a kernel with {axes} spatial axes"
        _checks.bad_value(name, expected, str(x.ndim), **{name: x}, kernel=kernel)
    if bias is not None:
        bias = _checks.array("bias", bias, complex_ok=True)
    for argument, value in (("kernel", kernel), ("bias", bias)):
        if value is not None and jnp.iscomplexobj(value) != jnp.iscomplexobj(x):
            _checks.bad_type(argument, matching_kind(name, x), str(value.dtype))
    return x, kernel, bias, axes


def matching_kind(name: str, x: jax.Array) -> str:
    """Describe the dtypes, real or complex, that can be combined with `x`, the argument `name`."""
    return f"a {'complex' if jnp.iscomplexobj(x) else 'real'} dtype to match `{name}` of dtype {x.dtype}"


def check_groups(groups: int, c_in: int, c_out: int, **arrays: jax.Array) -> None:
    """Check that `groups` divides both numbers of channels."""
    if c_in % groups or c_out % groups:
        got = f"{groups} for {c_in} and {c_out}"
        _checks.bad_value("groups", "a divisor of both c_in and c_out", got, **arrays)


def check_channels(groups: int, x: jax.Array, kernel: jax.Array, bias: jax.Array | None, *, name: str = "x") -> None:
    """Check the channels of `x` and `bias` against a kernel `(*kernel_size, c_in // groups, c_out)`."""
    c_in, (per_in, c_out) = x.shape[-1], kernel.shape[-2:]
    check_groups(groups, c_in, c_out, **{name: x}, kernel=kernel)
    if c_in != per_in * groups:
        expected = f"c_in // groups = {c_in} // {groups} = {c_in // groups} input channels"
        _checks.bad_value("kernel", expected, str(per_in), **{name: x}, kernel=kernel)
    if bias is not None:
        _checks.shape("bias", bias, (c_out,), "(c_out,)", kernel=kernel)
