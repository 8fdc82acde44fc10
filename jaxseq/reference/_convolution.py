"""Reference implementations of convolutions: a sum over taps."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.lax import PrecisionLike
from jaxtyping import Array, Bool, Inexact, Integer

from jaxseq import _geometry
from jaxseq._precision import accumulator, promote
from jaxseq._types import ConvParams


def conv(
    x: Inexact[Array, "*batch_and_space c_in"],
    kernel: Inexact[Array, "*kernel_size c_in_per_group c_out"],
    bias: Inexact[Array, " c_out"] | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[tuple[int, int]] = "VALID",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    flip: bool = False,
    lengths: Integer[Array, "*batch"] | None = None,
    precision: PrecisionLike = None,
    method: str = "auto",
) -> Inexact[Array, "*batch_and_outputs c_out"]:
    """Reference implementation of `jaxseq.conv`: for each tap, a strided slice of the padded input times a matrix.

    The functions in this file ignore `method` and always sum directly.
    """
    axes = kernel.ndim - 2
    if lengths is not None:
        x = _within(lengths, x)
    space, kernel_size = x.shape[-axes - 1 : -1], kernel.shape[:axes]
    (per_in, c_out), batch = kernel.shape[axes:], x.shape[: -axes - 1]
    geometry = _geometry.resolve(space, kernel_size, stride, padding, dilation, groups)
    if flip:
        kernel = kernel[(slice(None, None, -1),) * axes]
    common = promote(x, kernel)
    pads = [(0, 0, 0)] * len(batch) + [(lo, hi, 0) for lo, hi in geometry.padding] + [(0, 0, 0)]
    padded = lax.pad(x.astype(common), jnp.zeros((), common), pads)
    outputs = _geometry.output_sizes(geometry, space, kernel_size)

    y = jnp.zeros((*batch, *outputs, c_out), accumulator(common))
    for tap in product(*map(range, kernel_size)):
        positions = [
            slice(d * k, d * k + s * O, s)  # x[s n + d k], n = 0 .. O - 1
            for k, s, d, O in zip(tap, geometry.stride, geometry.dilation, outputs, strict=True)
        ]
        operand = padded[(..., *positions, slice(None))].reshape(*batch, *outputs, groups, per_in)
        weight = kernel[tap].astype(common).reshape(per_in, groups, c_out // groups)
        term = jnp.einsum("...gi,igo->...go", operand, weight, precision=precision, preferred_element_type=y.dtype)
        y = y + term.reshape(y.shape)
    if bias is not None:
        y = y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)
    if lengths is not None:
        s, d, (lo, hi) = geometry.stride[0], geometry.dilation[0], geometry.padding[0]
        # The position of an output is the last input that it reads, without the padding; for "SAME", the first.
        position = jnp.arange(outputs[0]) * s + (0 if padding == "SAME" else d * (kernel_size[0] - 1) - lo - hi)
        y = jnp.where(_before(lengths, position)[..., None], y, 0)
    return y.astype(x.dtype)


def _before(lengths: jax.Array, position: jax.Array) -> jax.Array:
    """Return (*batch, n) whether a position (n,) is less than each length (*batch,)."""
    return position.reshape((1,) * lengths.ndim + (-1,)).astype(lengths.dtype) < lengths[..., None]


def _within(lengths: jax.Array, x: jax.Array) -> jax.Array:
    """Return x (*batch, T, channels) with zeros beyond each length."""
    return jnp.where(_before(lengths, jnp.arange(x.shape[-2]))[..., None], x, 0)


def depthwise_conv(
    x: Inexact[Array, "*batch_and_space c_in"],
    kernel: Inexact[Array, "*kernel_size 1 c_out"],
    bias: Inexact[Array, " c_out"] | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[tuple[int, int]] = "VALID",
    dilation: int | Sequence[int] = 1,
    flip: bool = False,
    precision: PrecisionLike = None,
    method: str = "auto",
) -> Inexact[Array, "*batch_and_outputs c_out"]:
    """Reference implementation of `jaxseq.depthwise_conv`: a separate convolution of each channel."""
    options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "flip": flip}
    r = kernel.shape[-1] // x.shape[-1]
    ys = [
        conv(x[..., c : c + 1], kernel[..., r * c : r * (c + 1)], **options, precision=precision)
        for c in range(x.shape[-1])
    ]
    y = jnp.concatenate(ys, -1)
    return y if bias is None else (y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)).astype(x.dtype)


def separable_conv(
    x: Inexact[Array, "*batch_and_space c_in"],
    depthwise: Inexact[Array, "*kernel_size 1 c_middle"],
    pointwise: Inexact[Array, "*ones c_middle c_out"],
    bias: Inexact[Array, " c_out"] | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[tuple[int, int]] = "VALID",
    dilation: int | Sequence[int] = 1,
    flip: bool = False,
    precision: PrecisionLike = None,
    method: str = "auto",
) -> Inexact[Array, "*batch_and_outputs c_out"]:
    """Reference implementation of `jaxseq.separable_conv`: a depthwise, then a pointwise convolution."""
    options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "flip": flip}
    u = depthwise_conv(x, depthwise, **options, precision=precision)
    return conv(u, pointwise, bias, precision=precision)


def conv_transpose(
    x: Inexact[Array, "*batch_and_space c_in"],
    kernel: Inexact[Array, "*kernel_size c_out_per_group c_in"],
    bias: Inexact[Array, " c_out"] | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[tuple[int, int]] = "VALID",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    output_padding: int | Sequence[int] = 0,
    precision: PrecisionLike = None,
    method: str = "auto",
) -> Inexact[Array, "*batch_and_outputs c_out"]:
    """Reference implementation of `jaxseq.conv_transpose`: for each tap, add the input times a matrix to the strided
    positions of the output.
    """
    axes = kernel.ndim - 2
    outputs, kernel_size = x.shape[-axes - 1 : -1], kernel.shape[:axes]
    (per_out, c_in), batch = kernel.shape[axes:], x.shape[: -axes - 1]
    geometry, space = _geometry.resolve_transposed(
        outputs, kernel_size, stride, padding, dilation, groups, output_padding=output_padding
    )
    common = promote(x, kernel)
    groups = geometry.groups
    operand = x.astype(common).reshape(*batch, *outputs, groups, c_in // groups)

    full_sizes = [
        max(0, s * (O - 1) + _geometry.extent(K, d))
        for O, K, s, d in zip(outputs, kernel_size, geometry.stride, geometry.dilation, strict=True)
    ]
    y = jnp.zeros((*batch, *full_sizes, per_out * groups), accumulator(common))
    for tap in product(*map(range, kernel_size)):
        positions = [
            slice(d * k, d * k + s * O, s)  # y[s n + d k], n = 0 .. O - 1
            for k, s, d, O in zip(tap, geometry.stride, geometry.dilation, outputs, strict=True)
        ]
        weight = kernel[tap].astype(common).reshape(per_out, groups, c_in // groups)
        term = jnp.einsum("...go,igo->...gi", operand, weight, precision=precision, preferred_element_type=y.dtype)
        y = y.at[(..., *positions, slice(None))].add(term.reshape(*batch, *outputs, per_out * groups))
    crop = [(-lo, size + lo - L, 0) for (lo, _), size, L in zip(geometry.padding, space, full_sizes, strict=True)]
    y = lax.pad(y, jnp.zeros((), y.dtype), [(0, 0, 0)] * len(batch) + crop + [(0, 0, 0)])
    if bias is not None:
        y = y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)
    return y.astype(x.dtype)


def causal_conv(
    params: ConvParams,
    carry: Inexact[Array, "..."] | None,
    xs: Inexact[Array, "..."],
    *,
    dilation: int = 1,
    groups: int = 1,
    lengths: Integer[Array, "*batch"] | None = None,
    resets: Bool[Array, "..."] | None = None,
    time_axis: int = 0,
    precision: PrecisionLike = None,
    method: str = "auto",
) -> tuple[Inexact[Array, "..."], Inexact[Array, "..."]]:
    """Reference implementation of `jaxseq.causal_conv`: for each tap, the shifted input times a matrix. Inputs from
    other episodes count as zero.
    """
    kernel, bias = params
    axis = time_axis % xs.ndim
    x = jnp.moveaxis(xs, axis, -2)
    (K, per_in, c_out), (*batch, T, c_in) = kernel.shape, x.shape
    reach = (K - 1) * dilation
    past = jnp.zeros((*batch, reach, c_in), x.dtype) if carry is None else jnp.moveaxis(carry, axis, -2)
    common = promote(past, x, kernel)
    ends = jnp.full(batch, T) if lengths is None else lengths
    z = jnp.concatenate([past.astype(common), _within(ends, x.astype(common))], -2)
    # Number the episodes. The carry belongs to the first one.
    started = jnp.zeros((*batch, T), bool) if resets is None else jnp.moveaxis(resets, axis, -1)
    episode = jnp.cumsum(jnp.concatenate([jnp.zeros((*batch, reach), bool), started], -1), -1)

    def in_episode(current: jax.Array, start: int, stop: int) -> jax.Array:
        """Return steps start .. stop - 1 of carry and input, zero where their episode is not `current`."""
        same = episode[..., start:stop] == current
        return jnp.where(same[..., None], z[..., start:stop, :], 0)

    y = jnp.zeros((*batch, T, c_out), accumulator(common))
    for k in range(K):
        operand = in_episode(episode[..., reach:], dilation * k, dilation * k + T).reshape(*batch, T, groups, per_in)
        weight = kernel[k].astype(common).reshape(per_in, groups, c_out // groups)
        term = jnp.einsum("...gi,igo->...go", operand, weight, precision=precision, preferred_element_type=y.dtype)
        y = y + term.reshape(y.shape)
    if bias is not None:
        y = y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)
    # The new carry for every possible length, and the one of this length.
    last = in_episode(episode[..., -1:], T, T + reach)
    for n in range(0 if lengths is None else T):
        current = episode[..., n + reach - 1 : n + reach] if n + reach else episode[..., :0]
        last = jnp.where((ends == n)[..., None, None], in_episode(current, n, n + reach), last)
    last = last.astype(x.dtype if carry is None else carry.dtype)
    y = _within(ends, y).astype(x.dtype)
    return jnp.moveaxis(last, -2, axis), jnp.moveaxis(y, -2, axis)
