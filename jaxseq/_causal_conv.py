"""Causal convolution in chunks: it takes the inputs just past as a carry, and hands on those that the next chunk needs.

With K taps at distance d the window reaches P = d (K - 1) steps back. Let z = [carry, x], the P rows of the carry
and then the T of x, so that row t + P of z is x[t]. Tap k of output t reads row t + d k, which lies P - d k steps back:

    y[t] = sum_k  z[t + d k] w[k] + b        carry'[p] = z[T + p],  0 <= p < P                            (1)

z is the input of a convolution without padding, C of `_correlation`, and y its T outputs. What pulls y back is
therefore `to_input` and `to_kernel`; carry and x take their rows of z̄:

    z̄[m] = sum_{t, k : t + d k = m}  ȳ[t] w[k]ᵀ,        z̄ = [c̄, x̄]                                       (2)
    w̄[k] = sum_{b, t}  z[t + d k]ᵀ ȳ[t],                b̄ = sum_{b, t} ȳ[t]                              (3)

carry' is a copy of rows, of x alone where T >= P, and otherwise still of carry. JAX adds what comes back through it.

Resets. resets[t] marks a boundary between t - 1 and t, across which nothing is seen. Let the age a[t] be the number of
steps since the last boundary at or before t, and at least P where there is none. What lies n steps before t lies on
this side of that boundary if and only if n <= a[t]. So what output t sees through tap k, and what is handed on, is

    s_k[t] = z[t + d k]  where P - d k <= a[t],  else 0
    carry'[p] = z[T + p]  where P - 1 - p <= a[T - 1],  else 0

The mask depends on t and k jointly, so no convolution does this, but the form is as trilinear as before,

    <ȳ, y> = sum_k  sum_{b, t : P - d k <= a[b, t]}  sum_{i, o}  z[b, t + d k, i]  w[k, i, o]  ȳ[b, t, o]       (4)

and its three contractions are taken tap by tap, each term that of a matrix:

    y += s_k w[k]        z̄[t + d k] += ȳ[t] w[k]ᵀ where P - d k <= a[t]        w̄[k] = sum_{b, t} s_k[t]ᵀ ȳ[t]

The mask chooses, it does not multiply: what is NaN beyond a boundary stays there. s_k is made anew for every tap, so
memory does not grow with the window.
"""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Inexact

from jaxseq import _checks, _conv, _correlation, _dense, _geometry, _precision, _sharding, _time
from jaxseq._carry_across_shards import carry_across_shards, from_one, is_first
from jaxseq._cotangents import as_jax_arrays
from jaxseq._geometry import Geometry
from jaxseq._op import op
from jaxseq._sharding import Partitioning
from jaxseq._transpose_hint import hint_at_transpose
from jaxseq._types import AnyArray


class Options(NamedTuple):
    """Static and hashable."""

    dilation: int
    groups: int
    precision: Any
    method: str
    partitioning: Partitioning = Partitioning()

    @property
    def geometry(self) -> Geometry:
        """Of the convolution of z."""
        return Geometry((1,), ((0, 0),), (self.dilation,), self.groups, self.method, self.partitioning)


# --- The rule: carry (B, P, C_in), x (B, T, C_in), kernel (K, C_in/g, C_out); with resets (*B, T), any axes *B ---


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
    """y, in the dtype of x."""
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
    """carry', in the dtype of carry.

    It is no output of the rule: under a `vmap` over kernels alone it is the same for all of them, and the cotangent of
    such an output JAX 0.10 counts once for each, while JAX 0.12 refuses.
    """
    rows, age = _prepend_carry(carry, x)[..., x.shape[-2] :, :], _steps_since_reset(resets, reach=carry.shape[-2])
    if age is not None:
        ago = jnp.arange(rows.shape[-2], dtype=age.dtype)[::-1]
        rows = _time.zero_padding(jnp.expand_dims(ago, range(age.ndim - 1)) <= age[..., -1:], rows)
    return rows.astype(carry.dtype)


def _prepend_carry(carry: jax.Array, x: jax.Array) -> jax.Array:
    """z."""
    common = _precision.promote(carry, x)
    return jnp.concatenate([carry.astype(common), x.astype(common)], -2)


# --- Boundaries ---


def _steps_since_reset(resets: jax.Array | None, *, reach: int) -> jax.Array | None:
    """a (*B, T), for a window that reaches back so many steps."""
    if resets is None:
        return None
    t = jnp.expand_dims(jnp.arange(resets.shape[-1], dtype=jnp.int32), range(resets.ndim - 1))
    return t - lax.cummax(jnp.where(resets, t, -reach), axis=resets.ndim - 1)


# --- The masked form (4), in a loop over taps: one program for all windows, and the memory of one tap ---


def _masked_output(options: Options, z: jax.Array, kernel: jax.Array, age: jax.Array) -> jax.Array:
    """y."""
    form, taps = _tap_product(options, z, kernel)
    T, time = age.shape[-1], age.ndim - 1
    P = z.shape[time] - T

    def step(y: jax.Array, at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        start, w = at
        s = _time.zero_padding(P - start <= age, lax.dynamic_slice_in_dim(z, start, T, time))
        return y + form("z,w->y", s, w), None

    y = _zeros((*age.shape, kernel.shape[-1]), z, kernel)
    return _over_taps(step, y, options, taps)[0]


def _masked_pullback(
    options: Options, z: jax.Array, kernel: jax.Array, age: jax.Array, y_bar: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(z̄, w̄)."""
    form, taps = _tap_product(options, z, kernel)
    y_bar = y_bar.astype(_precision.promote(z, kernel))
    T, time = age.shape[-1], age.ndim - 1
    P = z.shape[time] - T

    def step(z_bar: jax.Array, at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        start, w = at
        seen = P - start <= age
        s = _time.zero_padding(seen, lax.dynamic_slice_in_dim(z, start, T, time))
        rows = lax.dynamic_slice_in_dim(z_bar, start, T, time) + _time.zero_padding(seen, form("y,w->z", y_bar, w))
        return lax.dynamic_update_slice_in_dim(z_bar, rows, start, time), form("z,y->w", s, y_bar)

    z_bar, w_bar = _over_taps(step, _zeros(z.shape, z, kernel), options, taps)
    w_bar = jnp.sum(w_bar, range(1, 1 + w_bar.ndim - taps.ndim))  # over the batch, where the form has left that to do
    return z_bar, w_bar.reshape(kernel.shape)


def _over_taps(
    step: Callable[..., tuple[jax.Array, Any]], total: jax.Array, options: Options, taps: jax.Array
) -> tuple[jax.Array, Any]:
    """`total, rest = step(total, (d k, w[k]))` for every k; (total, the rest of each)."""
    starts = options.dilation * jnp.arange(taps.shape[0], dtype=jnp.int32)
    # Checkpointed for who differentiates once more: else every s_k would be kept for that.
    return lax.scan(jax.checkpoint(step, prevent_cse=False), total, (starts, taps))


def _zeros(shape: tuple[int, ...], z: jax.Array, kernel: jax.Array) -> jax.Array:
    """Where a sum of products of z and kernel starts, varying over what they vary over."""
    zeros = jnp.zeros(shape, _precision.accumulator(_precision.promote(z, kernel)))
    return _sharding.align_varying((zeros, z))[0]


# --- One term of (4) ---


def _tap_product(options: Options, z: jax.Array, kernel: jax.Array) -> tuple[Callable[..., jax.Array], jax.Array]:
    """How two of z, w and y give the third, `form("z,w->y", s, w)`, and the w[k] as it takes them."""
    if options.groups == z.shape[-1] == kernel.shape[-1]:
        return _depthwise, kernel[:, 0]
    return partial(_grouped, options), kernel


def _depthwise(which: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """No sum over channels is left. That over the batch waits for the end of the loop, where devices meet once."""
    wide = _precision.accumulator(_precision.promote(a, b))
    product = a.astype(wide) * jnp.expand_dims(b.astype(wide), range(a.ndim - b.ndim))
    return jnp.sum(product, -2) if which == "z,y->w" else product


def _grouped(options: Options, which: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """A matrix product in each group."""
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


# --- Wherever the arrays lie, and for any number of batch axes ---


def _run(options: Options, *operands: Any) -> tuple[jax.Array, jax.Array]:
    """(carry', y). On an explicit mesh batch and time of all arrays go with those of x, and each device computes its
    own part; where time is divided it goes on with what the one before it hands on.
    """
    carry, x, kernel, bias, resets = _sharding.align_varying(operands)
    home = _sharding.explicit_sharding(x)
    if home is not None:
        carry = _sharding.reshard(carry, _sharding.with_feature_sharding(home, carry, 2))
        resets = None if resets is None else _sharding.reshard(resets, _sharding.leading_axes(home, x.ndim - 1))
    kernel, bias = _sharding.unshard((kernel, bias), _sharding.sharded_axes(x, slice(-1)))
    homes = _sharding.explicit_sharding(carry), _sharding.product_sharding(x, kernel)
    groups, x, kernel, bias, of_y = _sharding.shard_by_features(options.groups, x, kernel, bias, -1)
    options = options._replace(groups=groups, partitioning=_sharding.partitioning((carry, x, kernel, bias)))
    if home is not None:
        carry = _sharding.reshard(carry, _sharding.unshard_axis(jax.typeof(x).sharding, x.ndim - 2))
    names = _sharding.mesh_axes_of(x, -2)

    def run(carry: jax.Array, x: jax.Array, kernel: jax.Array, bias: Any, resets: Any) -> tuple[jax.Array, jax.Array]:
        carry, x, resets = _sharding.align_varying((carry, x, resets))  # not the kernel: carry' is no function of it
        if names and carry.size:
            rounds = -(-carry.shape[-2] // x.shape[-2])
            carry = carry_across_shards(lambda carry: _new_carry(carry, x, resets), carry, names, rounds=rounds)
        last, batch = _new_carry(carry, x, resets), x.shape[:-2]
        if names:
            last = from_one(is_first(names, reverse=True), last, names)
        carry, x, kernel, bias, resets = _sharding.align_varying((carry, x, kernel, bias, resets))
        flat = resets is None and len(batch) != 1  # lax's convolution has one batch axis, the masked form has any
        if flat:
            carry, x = (a.reshape(prod(batch), *a.shape[-2:]) for a in (carry, x))
        y: Any = _causal_conv(options, carry, x, kernel, bias, resets)
        return last, y.reshape(*batch, *y.shape[1:]) if flat else y

    last, y = _sharding.map_shards(run, (carry, x, kernel, bias, resets), (carry, of_y))
    return _sharding.reshard(last, homes[0]), _sharding.reshard(y, homes[1])


# --- Public ---


@op
def causal_conv(
    carry: Inexact[AnyArray, "*batch reach c_in"] | None,
    x: Inexact[AnyArray, "*batch T c_in"],
    kernel: Inexact[AnyArray, "window c_in_per_group c_out"],
    bias: Inexact[AnyArray, " c_out"] | None = None,
    *,
    dilation: int = 1,
    groups: int = 1,
    resets: Bool[AnyArray, "*batch T"] | None = None,
    precision: Any = None,
    method: str = "auto",
) -> tuple[Inexact[Array, "*batch reach c_in"], Inexact[Array, "*batch T c_out"]]:
    r"""Causal 1-D convolution of a signal that comes in chunks, with a hand-derived gradient.

    With $z$ the `carry` and `x` after it, $K$ taps at distance $d$, and $P = d (K - 1)$ steps of reach,

    $$y[b, t, o] = \sum_{k, i} z[b,\; t + d k,\; i]\; w[k, i, o] + \beta[o], \qquad carry'[b, p] = z[b, T + p]$$

    for every step $0 \le t < T$, tap $k$ and channel $i$ of the group of $o$, and $0 \le p < P$. Tap $K - 1$ reads the
    present. From no carry, $y$ is that of `conv(x, kernel, bias, padding="CAUSAL")`. Chunks of any lengths, also
    shorter than the window, one or none, fed one after the other, give the values and the gradients of the whole; of
    one step each, it is the body of a loop.

    Args:
        carry: the inputs just past, `(*batch, (window - 1) * dilation, c_in)`, the latest last; None is zeros.
        x: input `(*batch, T, c_in)`: any number of batch axes, also none. Channels are last, and time before them.
        kernel: `(window, c_in // groups, c_out)`.
        bias: `(c_out,)`, or None.
        dilation: distance between taps.
        groups: channel groups; group γ of the outputs reads group γ of the inputs only. `groups=c_in` is depthwise.
        resets: booleans `(*batch, T)`, time where `x` has it, while in a recurrence it is first. `resets[..., t]` marks
            a boundary between t - 1 and t ("x_t opens a new episode"): from t on, outputs and the returned carry know
            zeros in place of what lies before, NaN included, and no gradient crosses. At t = 0 that is the carry.
            Without resets a chunk is one convolution; with them it is one product a tap.
        precision: as in `jax.lax.conv_general_dilated`.
        method: `"auto"` or `"direct"`, as in `conv`; with `resets` it is direct.

    Returns:
        `(carry, y)`: the carry for the next chunk, in the dtype of `carry` (of `x` where that is None), and
        `(*batch, T, c_out)` in the dtype of `x`; products accumulate in float32 at least.

    Raises:
        TypeError: `carry`, `x`, `kernel` or `bias` is no float (or complex) array, `resets` no boolean one, or an
            option is of the wrong kind.
        ValueError: a rank, shape, channel number or other option that does not fit.

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
        _checks.bad_value("kernel", "3 axes (window, c_in // groups, c_out)", str(kernel.ndim), kernel=kernel)
    x, kernel, bias, _ = _conv.operands(x, kernel, bias)
    K, (*batch, T, c_in) = kernel.shape[0], x.shape
    dilation = _checks.integer("dilation", dilation, at_least=1)
    dilation = dilation if K > 1 else 1  # of one tap it has no effect, and may be beyond what XLA takes
    groups = _checks.integer("groups", groups, at_least=1)
    _conv.check_channels(groups, x, kernel, bias)
    past = (*batch, (K - 1) * dilation, c_in)
    if carry is None:
        carry = _sharding.zeros(past, x)
    else:
        carry = _checks.array("carry", carry, complex_ok=True)
        if jnp.iscomplexobj(carry) != jnp.iscomplexobj(x):
            _checks.bad_type("carry", f"real or complex as `x` is, {x.dtype}", str(carry.dtype))
        _checks.shape("carry", carry, past, "(*batch, (window - 1) * dilation, c_in)", x=x, kernel=kernel)
    if resets is not None:
        resets = _checks.mask("resets", resets)
        _checks.shape("resets", resets, (*batch, T), "(*batch, T)", x=x)
        if not resets.size or K == 1:  # there is no boundary, or nothing to see across it
            resets = None
    method = _checks.choice("method", method, _geometry.METHODS)
    options = Options(dilation, groups, _checks.precision(precision), method)
    carry, y = _run(options, carry, x, kernel, bias, resets)
    return carry, hint_at_transpose("causal_conv", y)
