"""Causal convolution in chunks. The carry from one chunk to the next is the last inputs that the kernel reaches.

With K taps at distance d, the kernel reaches P = d (K - 1) steps back. Let z = [carry, x] be the P rows of the carry
followed by the T rows of x, so that row t + P of z is x[t]. Tap k of output t reads row t + d k of z, which is P - d k
steps before t:

    y[t] = sum_k  z[t + d k] w[k] + b        carry'[p] = z[T + p],  0 <= p < P                            (1)

y is a convolution of z without padding. Its backward pass is therefore `to_input` and `to_kernel` of `_correlation/`,
and carry and x take their rows of z̄:

    z̄[m] = sum_{t, k : t + d k = m}  ȳ[t] w[k]ᵀ,        z̄ = [c̄, x̄]                                       (2)
    w̄[k] = sum_{b, t}  z[t + d k]ᵀ ȳ[t],                b̄ = sum_{b, t} ȳ[t]                              (3)

carry' is a copy of rows: of x only if T >= P, otherwise also of carry. JAX adds the cotangent that flows through it.

Resets. resets[t] marks a boundary between t - 1 and t, and no output reads across it. Let the age a[t] be the number of
steps since the last boundary at or before t, and at least P if there is none. The step n before t is on the same side
of that boundary if and only if n <= a[t]. So the input s_k that outputs read through tap k, and the new carry, are

    s_k[t] = z[t + d k]  where P - d k <= a[t],  else 0
    carry'[p] = z[T + p]  where P - 1 - p <= a[T - 1],  else 0

The mask depends on t and k jointly, so this is not a convolution, but the form is still trilinear,

    <ȳ, y> = sum_k  sum_{b, t : P - d k <= a[b, t]}  sum_{i, o}  z[b, t + d k, i]  w[k, i, o]  ȳ[b, t, o]       (4)

and its three contractions are computed tap by tap, with one matrix product per term:

    y += s_k w[k]        z̄[t + d k] += ȳ[t] w[k]ᵀ where P - d k <= a[t]        w̄[k] = sum_{b, t} s_k[t]ᵀ ȳ[t]

The mask selects and does not multiply, so a NaN on the other side of a boundary has no effect. s_k is recomputed for
every tap, so memory does not grow with the kernel size.
"""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Inexact

from jaxseq import _checks, _conv, _correlation, _dense, _geometry, _mesh, _precision, _time
from jaxseq._cotangents import as_jax_arrays
from jaxseq._distributed import _sharding
from jaxseq._distributed._carry_across_shards import carry_across_shards, from_one, is_first
from jaxseq._geometry import Geometry
from jaxseq._mesh import Partitioning
from jaxseq._op import op
from jaxseq._transpose_hint import hint_at_transpose
from jaxseq._types import AnyArray


class Options(NamedTuple):
    """Static options of the rule. Hashable."""

    dilation: int
    groups: int
    precision: Any
    method: str
    partitioning: Partitioning = Partitioning()

    @property
    def geometry(self) -> Geometry:
        """The geometry of the convolution of z."""
        return Geometry((1,), ((0, 0),), (self.dilation,), self.groups, self.method, self.partitioning)


# --- Custom rule: carry (B, P, C_in), x (B, T, C_in), kernel (K, C_in/g, C_out). B is any axes with resets (*B, T) ---


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _causal_conv(
    options: Options,
    carry: jax.Array,
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    resets: jax.Array | None,
) -> jax.Array:
    return apply(options, carry, x, kernel, bias, resets)


def apply(
    options: Options,
    carry: jax.Array,
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    resets: jax.Array | None,
) -> jax.Array:
    """Return y, in the dtype of x."""
    z, age = _prepend_carry(carry, x), _steps_since_reset(resets, reach=carry.shape[-2])
    if age is None:
        y = _correlation.to_output(options.geometry, options.precision, z, kernel, x.shape[1:-1])
    else:
        y = _masked_output(options, z, kernel, age)
    return _dense.add_bias(y, bias).astype(x.dtype)


def _fwd(options: Options, *operands: Any) -> Any:
    return apply(options, *operands), operands


def _bwd(options: Options, operands: Any, y_bar: jax.Array) -> Any:
    carry, x, kernel, bias, resets = operands
    z, P = _prepend_carry(carry, x), carry.shape[-2]
    age = _steps_since_reset(resets, reach=P)
    if age is None:
        geometry, precision = options.geometry, options.precision
        z_bar = _correlation.to_input(geometry, precision, kernel, y_bar, z.shape[1:-1])
        w_bar = _correlation.to_kernel(geometry, precision, z, y_bar, kernel.shape[:-2])
    else:
        z_bar, w_bar = _masked_pullback(options, z, kernel, age, y_bar)
    b_bar = None if bias is None else _dense.pull_bias(y_bar)
    return *_precision.cast_like((z_bar[..., :P, :], z_bar[..., P:, :], w_bar, b_bar), operands[:4]), None


_causal_conv.defvjp(_fwd, as_jax_arrays(_bwd))


def _new_carry(carry: jax.Array, x: jax.Array, resets: jax.Array | None) -> jax.Array:
    """Return carry', in the dtype of carry.

    This is not an output of the custom rule. Under a `vmap` over kernels only, carry' is the same for all of them. JAX
    0.10 counts the cotangent of such an output once per kernel, and JAX 0.12 raises an error.
    """
    rows, age = _prepend_carry(carry, x)[..., x.shape[-2] :, :], _steps_since_reset(resets, reach=carry.shape[-2])
    if age is not None:
        ago = jnp.arange(rows.shape[-2], dtype=age.dtype)[::-1]
        rows = _time.zero_padding(jnp.expand_dims(ago, range(age.ndim - 1)) <= age[..., -1:], rows)
    return rows.astype(carry.dtype)


def _prepend_carry(carry: jax.Array, x: jax.Array) -> jax.Array:
    """Return z."""
    common = _precision.promote(carry, x)
    return jnp.concatenate([carry.astype(common), x.astype(common)], -2)


# --- Boundaries ---


def _steps_since_reset(resets: jax.Array | None, *, reach: int) -> jax.Array | None:
    """Return the age a (*B, T), for a kernel that reaches `reach` steps back."""
    if resets is None:
        return None
    t = jnp.expand_dims(jnp.arange(resets.shape[-1], dtype=jnp.int32), range(resets.ndim - 1))
    return t - lax.cummax(jnp.where(resets, t, -reach), axis=resets.ndim - 1)


# --- The masked form (4), in a loop over taps: one program for all kernel sizes, and the memory of one tap ---


def _masked_output(options: Options, z: jax.Array, kernel: jax.Array, age: jax.Array) -> jax.Array:
    """Return y of (4), without the bias."""
    form, taps = _tap_product(options, z, kernel)
    T, time = age.shape[-1], age.ndim - 1
    P = z.shape[time] - T

    def step(y: jax.Array, at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        start, w = at
        s = _time.zero_padding(P - start <= age, lax.dynamic_slice_in_dim(z, start, T, time))
        return y + form("z,w->y", s, w), None

    y = _zeros((*age.shape, kernel.shape[-1]), z, kernel)
    return _scan_taps(step, y, options, taps)[0]


def _masked_pullback(
    options: Options, z: jax.Array, kernel: jax.Array, age: jax.Array, y_bar: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return (z̄, w̄) of (4)."""
    form, taps = _tap_product(options, z, kernel)
    y_bar = y_bar.astype(_precision.promote(z, kernel))
    T, time = age.shape[-1], age.ndim - 1
    P = z.shape[time] - T

    def step(z_bar: jax.Array, at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        start, w = at
        valid = P - start <= age
        s = _time.zero_padding(valid, lax.dynamic_slice_in_dim(z, start, T, time))
        rows = lax.dynamic_slice_in_dim(z_bar, start, T, time) + _time.zero_padding(valid, form("y,w->z", y_bar, w))
        return lax.dynamic_update_slice_in_dim(z_bar, rows, start, time), form("z,y->w", s, y_bar)

    z_bar, w_bar = _scan_taps(step, _zeros(z.shape, z, kernel), options, taps)
    w_bar = jnp.sum(w_bar, range(1, 1 + w_bar.ndim - taps.ndim))  # over the batch, which `_depthwise` does not sum
    return z_bar, w_bar.reshape(kernel.shape)


def _scan_taps(
    step: Callable[..., tuple[jax.Array, Any]], total: jax.Array, options: Options, taps: jax.Array
) -> tuple[jax.Array, Any]:
    """Run `total, term = step(total, (d k, w[k]))` for every tap k. Return the last total and all terms."""
    starts = options.dilation * jnp.arange(taps.shape[0], dtype=jnp.int32)
    # Without the checkpoint, a second derivative would store every s_k.
    return lax.scan(jax.checkpoint(step, prevent_cse=False), total, (starts, taps))


def _zeros(shape: tuple[int, ...], z: jax.Array, kernel: jax.Array) -> jax.Array:
    """Return the initial value of a sum of products of `z` and `kernel`, varying over the same mesh axes."""
    zeros = jnp.zeros(shape, _precision.accumulator(_precision.promote(z, kernel)))
    return _mesh.align_varying((zeros, z))[0]


# --- One term of (4) ---


def _tap_product(options: Options, z: jax.Array, kernel: jax.Array) -> tuple[Callable[..., jax.Array], jax.Array]:
    """Return the contraction of two of z, w and y to the third, `form("z,w->y", s, w)`, and the w[k] in its layout."""
    if options.groups == z.shape[-1] == kernel.shape[-1]:
        return _depthwise, kernel[:, 0]
    return partial(_grouped, options), kernel


def _depthwise(which: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Compute one term elementwise. The sum over the batch follows after the loop: devices communicate only once."""
    wide = _precision.accumulator(_precision.promote(a, b))
    product = a.astype(wide) * jnp.expand_dims(b.astype(wide), range(a.ndim - b.ndim))
    return jnp.sum(product, -2) if which == "z,y->w" else product


def _grouped(options: Options, which: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Compute one term as a matrix product per group."""
    g, common = options.groups, _precision.promote(a, b)
    a, b = a.astype(common), b.astype(common)
    letters = {"z": "...i", "w": "io", "y": "...o"}
    if g > 1:  # the last axis of all three is (g, ·)
        letters = {"z": "...gi", "w": "igo", "y": "...go"}
        a, b = (part.reshape(*part.shape[:-1], g, -1) for part in (a, b))
    result = jnp.einsum(
        which.translate(str.maketrans(letters)),
        a,
        b,
        precision=options.precision,
        preferred_element_type=_precision.accumulator(common),
    )
    return result.reshape(*result.shape[:-2], -1) if g > 1 else result


# --- Sharded arrays and any number of batch axes ---


def _run(options: Options, *operands: Any) -> tuple[jax.Array, jax.Array]:
    """Return (carry', y).

    On an explicit mesh, batch and time of all arrays are sharded as those of x, and each device computes its own shard.
    Where time is sharded, each device starts from the carry of the previous time shard.
    """
    carry, x, kernel, bias, resets = _mesh.align_varying(operands)
    x_sharding = _mesh.explicit_sharding(x)
    if x_sharding is not None:
        carry = _sharding.reshard(carry, _sharding.with_feature_sharding(x_sharding, carry, 2))
        resets = None if resets is None else _sharding.reshard(resets, _sharding.leading_axes(x_sharding, x.ndim - 1))
    kernel, bias = _sharding.unshard((kernel, bias), _sharding.sharded_axes(x, slice(-1)))
    carry_sharding, y_sharding = _mesh.explicit_sharding(carry), _sharding.product_sharding(x, kernel)
    groups, x, kernel, bias, y_like = _sharding.shard_by_features(options.groups, x, kernel, bias, -1)
    options = options._replace(groups=groups, partitioning=_mesh.partitioning((carry, x, kernel, bias)))
    if x_sharding is not None:
        carry = _sharding.reshard(carry, _sharding.unshard_axis(jax.typeof(x).sharding, x.ndim - 2))
    names = _sharding.mesh_axes_of(x, -2)

    def run(carry: jax.Array, x: jax.Array, kernel: jax.Array, bias: Any, resets: Any) -> tuple[jax.Array, jax.Array]:
        carry, x, resets = _mesh.align_varying((carry, x, resets))  # carry' does not depend on the kernel
        if names and carry.size:
            rounds = -(-carry.shape[-2] // x.shape[-2])
            carry = carry_across_shards(lambda carry: _new_carry(carry, x, resets), carry, names, rounds=rounds)
        last, batch = _new_carry(carry, x, resets), x.shape[:-2]
        if names:
            last = from_one(is_first(names, reverse=True), last, names)
        carry, x, kernel, bias, resets = _mesh.align_varying((carry, x, kernel, bias, resets))
        flat = resets is None and len(batch) != 1  # the convolution has one batch axis, the masked form any number
        if flat:
            carry, x = (a.reshape(prod(batch), *a.shape[-2:]) for a in (carry, x))
        y: Any = _causal_conv(options, carry, x, kernel, bias, resets)
        return last, y.reshape(*batch, *y.shape[1:]) if flat else y

    last, y = _sharding.map_shards(run, (carry, x, kernel, bias, resets), (carry, y_like))
    return _sharding.reshard(last, carry_sharding), _sharding.reshard(y, y_sharding)


# --- Public ---


@op
def causal_conv(
    carry: Inexact[AnyArray, "*batch reach c_in"] | None,
    x: Inexact[AnyArray, "*batch T c_in"],
    kernel: Inexact[AnyArray, "kernel_size c_in_per_group c_out"],
    bias: Inexact[AnyArray, " c_out"] | None = None,
    *,
    dilation: int = 1,
    groups: int = 1,
    resets: Bool[AnyArray, "*batch T"] | None = None,
    precision: Any = None,
    method: str = "auto",
) -> tuple[Inexact[Array, "*batch reach c_in"], Inexact[Array, "*batch T c_out"]]:
    r"""Causal 1-D convolution of a signal in chunks, with a hand-derived gradient.

    With $z$ the `carry` followed by `x`, $K$ taps at distance $d$, and $P = d (K - 1)$, the number of steps that the
    kernel reaches back,

    $$y[b, t, o] = \sum_{k, i} z[b,\; t + d k,\; i]\; w[k, i, o] + \beta[o], \qquad carry'[b, p] = z[b, T + p]$$

    for every step $0 \le t < T$, tap $k$ and channel $i$ of the group of $o$, and $0 \le p < P$. Tap $K - 1$ reads the
    current step. Without a carry, $y$ equals `conv(x, kernel, bias, padding="CAUSAL")`. Consecutive chunks of any
    length, also shorter than the kernel or empty, give the values and the gradients of the whole signal. With chunks of
    one step, the function can be the body of a loop.

    Args:
        carry: the last inputs before the chunk, `(*batch, (kernel_size - 1) * dilation, c_in)`, the latest last. None
            is zeros.
        x: input `(*batch, T, c_in)` with any number of batch axes, including none. The last axis is the channel axis,
            and the axis before it is time.
        kernel: `(kernel_size, c_in // groups, c_out)`.
        bias: `(c_out,)`, or None.
        dilation: distance between taps.
        groups: number of channel groups. Group γ of the outputs reads only group γ of the inputs. `groups=c_in` is
            depthwise.
        resets: `(*batch, T)` booleans, with the time axis last, whereas in a recurrence it is first by default.
            `resets[..., t]` marks a boundary between t - 1 and t ("x_t opens a new episode"). From t on, outputs and
            the returned carry contain zeros in place of the inputs before the boundary, NaN included, and no gradient
            flows across it. A reset at t = 0 replaces the carry. Without resets a chunk is one convolution; with resets
            it is one product per tap.
        precision: as in `jax.lax.conv_general_dilated`.
        method: `"auto"` or `"direct"`, as in `conv`. With `resets` the method is always direct.

    Returns:
        `(carry, y)`: the carry for the next chunk, in the dtype of `carry` (of `x` if `carry` is None), and the output
        `(*batch, T, c_out)` in the dtype of `x`. Products accumulate in float32 at least.

    Raises:
        TypeError: if `carry`, `x`, `kernel` or `bias` is not a float or complex array, `resets` is not a boolean array,
            or an option has the wrong type.
        ValueError: if a rank, a shape, a number of channels or an option is invalid.

    Example:
        >>> import jax.numpy as jnp, jaxseq
        >>> x = jnp.arange(1.0, 7.0)[:, None]  # no batch axis, 6 steps, 1 channel
        >>> kernel = jnp.array([1.0, 10.0, 100.0])[:, None, None]
        >>> carry, y = jaxseq.causal_conv(None, x[:4], kernel)
        >>> y[:, 0], carry[:, 0]
        (Array([100., 210., 321., 432.], dtype=float32), Array([3., 4.], dtype=float32))
        >>> carry, y = jaxseq.causal_conv(carry, x[4:], kernel, resets=jnp.array([False, True]))
        >>> y[:, 0], carry[:, 0]
        (Array([543., 600.], dtype=float32), Array([0., 6.], dtype=float32))

    Reference:
        A. van den Oord et al., WaveNet: a generative model for raw audio (2016), section 2.1.
    """
    kernel = _checks.array("kernel", kernel, complex_ok=True)
    if kernel.ndim != 3:
        _checks.bad_value("kernel", "3 axes (kernel_size, c_in // groups, c_out)", str(kernel.ndim), kernel=kernel)
    x, kernel, bias, _ = _conv.operands(x, kernel, bias)
    K, (*batch, T, c_in) = kernel.shape[0], x.shape
    dilation = _checks.integer("dilation", dilation, at_least=1)
    dilation = dilation if K > 1 else 1  # has no effect on one tap, and may exceed the 32 bits of XLA
    groups = _checks.integer("groups", groups, at_least=1)
    _conv.check_channels(groups, x, kernel, bias)
    past = (*batch, (K - 1) * dilation, c_in)
    if carry is None:
        carry = _sharding.zeros(past, x)
    else:
        carry = _checks.array("carry", carry, complex_ok=True)
        if jnp.iscomplexobj(carry) != jnp.iscomplexobj(x):
            _checks.bad_type("carry", _conv.matching_kind(x), str(carry.dtype))
        _checks.shape("carry", carry, past, "(*batch, (kernel_size - 1) * dilation, c_in)", x=x, kernel=kernel)
    if resets is not None:
        resets = _checks.mask("resets", resets)
        _checks.shape("resets", resets, (*batch, T), "(*batch, T)", x=x)
        if not resets.size or K == 1:  # no boundary, or no tap that could read across it
            resets = None
    method = _checks.choice("method", method, _geometry.METHODS)
    options = Options(dilation, groups, _checks.precision(precision), method)
    carry, y = _run(options, carry, x, kernel, bias, resets)
    return carry, hint_at_transpose("causal_conv", y)
