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

Lengths. With a length L <= T, the sequence ends at L: x and y are set to zero from L on, around the rule, and the rows
of the new carry start at L,

    carry'[p] = z[L + p]  where P - 1 - p <= a[L - 1],  else 0

Resets in the padding have no effect. Without them a[t] = t - s, with s the step of the last boundary, so that
a[L - 1] = a[T - 1] - (T - L).
"""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Inexact, Integer

from jaxseq import _checks, _conv, _dense, _geometry, _mesh, _precision, _time
from jaxseq._both_modes import Rule, call_in_both_modes
from jaxseq._correlation import Contraction, Form, contract
from jaxseq._distributed import _conv as _distributed
from jaxseq._distributed import _sharding
from jaxseq._geometry import Geometry
from jaxseq._linear_transpose import Linearity
from jaxseq._op import op
from jaxseq._types import AnyArray, ConvParams
from jaxseq.tuning import used_for_convolutions

# carry (*B, P, C_in), x (*B, T, C_in), kernel, bias, resets (*B, T), lengths (*B,)
Operands = tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array | None, jax.Array | None]


# --- Custom rule: carry (B, P, C_in), x (B, T, C_in), kernel (K, C_in/g, C_out). B is any axes with resets (*B, T) ---


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _causal_conv(
    form: Form,
    carry: jax.Array,
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    resets: jax.Array | None,
) -> jax.Array:
    return _fwd(form, carry, x, kernel, bias, resets)[0]


def _fwd(form: Form, *operands: Any) -> tuple[jax.Array, Any]:
    """Return y in the dtype of x, and the residuals. `form` is that of the convolution of z."""
    carry, x, kernel, bias, resets = operands
    z, age = _prepend_carry(carry, x), _steps_since_reset(resets, reach=carry.shape[-2])
    return _dense.add_bias(_product(form, z, kernel, age), bias).astype(x.dtype), operands


def _product(form: Form, z: jax.Array, kernel: jax.Array, age: jax.Array | None) -> jax.Array:
    """Return y without the bias."""
    if age is None:
        return contract(Contraction.TO_OUTPUT, form, z, kernel)
    return _masked_output(form, z, kernel, age)


def _bwd(form: Form, operands: Any, y_bar: AnyArray) -> Any:
    carry, x, kernel, bias, resets = operands
    y_bar = jnp.asarray(y_bar)  # the pullback of `jax.vjp` passes NumPy arrays through
    z, P = _prepend_carry(carry, x), carry.shape[-2]
    age = _steps_since_reset(resets, reach=P)
    if age is None:
        z_bar = contract(Contraction.TO_INPUT, form, kernel, y_bar)
        w_bar = contract(Contraction.TO_KERNEL, form, z, y_bar)
    else:
        z_bar, w_bar = _masked_pullback(form, z, kernel, age, y_bar)
    b_bar = None if bias is None else _dense.pull_bias(y_bar)
    return *_precision.cast_like((z_bar[..., :P, :], z_bar[..., P:, :], w_bar, b_bar), operands[:4]), None


_causal_conv.defvjp(_fwd, _bwd)


def _push(form: Form, args: Any, _: Any, directions: Any) -> jax.Array:
    carry, x, kernel, _, resets = args
    carry_dot, x_dot, w_dot, b_dot, _ = directions
    age = _steps_since_reset(resets, reach=carry.shape[-2])
    product = lambda z, w: _product(form, _prepend_carry(*z), w, age)  # noqa: E731
    return _dense.push_product(product, (carry, x), kernel, ((carry_dot, x_dot), w_dot, b_dot)).astype(x.dtype)


def _causal_conv_over_batch(precision: Any, from_zero: bool, geometry: Geometry, operands: Operands) -> jax.Array:
    """Return y for any number of batch axes, on one device. With `from_zero`, the carry is zero, or depends on x."""
    carry, x, kernel, bias, resets, lengths = operands
    batch, T, (K, in_channels, c_out) = x.shape[:-2], x.shape[-2], kernel.shape
    valid = None if lengths is None else _time.valid_steps(T, lengths, len(batch))
    x = _time.zero_padding(valid, x)  # a NaN in the padding would reach the gradient of the kernel
    form = Form(geometry, precision, (carry.shape[-2] + T,), (T,), (K,), in_channels, c_out // geometry.groups)
    flat = resets is None and len(batch) != 1  # a convolution has one batch axis, (4) any number
    if flat:
        carry, x = (a.reshape(prod(batch), *a.shape[-2:]) for a in (carry, x))
    functions = (partial(f, form) for f in (_causal_conv, _fwd, _bwd, _causal_conv, _push))
    first, may_vary = ((1,), (0,)) if from_zero else ((0, 1), ())
    linearity = Linearity("causal_conv", first, (2,), () if bias is None else (3,), may_vary)
    y: Any = call_in_both_modes(Rule(*functions, linearity=linearity), carry, x, kernel, bias, resets)
    return _time.zero_padding(valid, y.reshape(*batch, *y.shape[1:]) if flat else y)


def _new_carry(operands: Operands) -> jax.Array:
    """Return carry', in the dtype of carry.

    This is not an output of the custom rule. Under a `vmap` over kernels only, carry' is the same for all of them. JAX
    0.10 counts the cotangent of such an output once per kernel, and JAX 0.12 raises an error.
    """
    carry, x, _, _, resets, lengths = operands
    z, (P, T) = _prepend_carry(carry, x), (carry.shape[-2], x.shape[-2])
    if lengths is None:
        rows, padding = z[..., T:, :], jnp.zeros((), jnp.int32)
    else:
        first = jnp.expand_dims(lengths, -1)
        rows_of_carry = first + jnp.arange(P, dtype=first.dtype).reshape((1,) * lengths.ndim + (-1,))
        rows, padding = jnp.take_along_axis(z, jnp.expand_dims(rows_of_carry, -1), -2), T - first
        resets = None if resets is None else resets & _time.valid_steps(T, lengths, lengths.ndim)
    age = _steps_since_reset(resets, reach=P)
    if age is not None:
        ago = jnp.arange(P, dtype=age.dtype)[::-1]
        rows = _time.zero_padding(jnp.expand_dims(ago, range(age.ndim - 1)) <= age[..., -1:] - padding, rows)
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


def _masked_output(form: Form, z: jax.Array, kernel: jax.Array, age: jax.Array) -> jax.Array:
    """Return y of (4), without the bias."""
    product, taps = _tap_product(form, z, kernel)
    T, time = age.shape[-1], age.ndim - 1
    P = z.shape[time] - T

    def step(y: jax.Array, at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        start, w = at
        s = _time.zero_padding(P - start <= age, lax.dynamic_slice_in_dim(z, start, T, time))
        return y + product("z,w->y", s, w), None

    y = _zeros((*age.shape, kernel.shape[-1]), z, kernel)
    return _scan_taps(form, step, y, taps)[0]


def _masked_pullback(
    form: Form, z: jax.Array, kernel: jax.Array, age: jax.Array, y_bar: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return (z̄, w̄) of (4)."""
    product, taps = _tap_product(form, z, kernel)
    y_bar = y_bar.astype(_precision.promote(z, kernel))
    T, time = age.shape[-1], age.ndim - 1
    P = z.shape[time] - T

    def step(z_bar: jax.Array, at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        start, w = at
        valid = P - start <= age
        s = _time.zero_padding(valid, lax.dynamic_slice_in_dim(z, start, T, time))
        rows = lax.dynamic_slice_in_dim(z_bar, start, T, time) + _time.zero_padding(valid, product("y,w->z", y_bar, w))
        return lax.dynamic_update_slice_in_dim(z_bar, rows, start, time), product("z,y->w", s, y_bar)

    z_bar, w_bar = _scan_taps(form, step, _zeros(z.shape, z, kernel), taps)
    w_bar = jnp.sum(w_bar, range(1, 1 + w_bar.ndim - taps.ndim))  # over the batch, which `_depthwise` does not sum
    return z_bar, w_bar.reshape(kernel.shape)


def _scan_taps(
    form: Form, step: Callable[..., tuple[jax.Array, Any]], total: jax.Array, taps: jax.Array
) -> tuple[jax.Array, Any]:
    """Run `total, term = step(total, (d k, w[k]))` for every tap k. Return the last total and all terms."""
    starts = form.geometry.dilation[0] * jnp.arange(taps.shape[0], dtype=jnp.int32)
    # Without the checkpoint, a second derivative would store every s_k.
    return lax.scan(jax.checkpoint(step, prevent_cse=False), total, (starts, taps))


def _zeros(shape: tuple[int, ...], z: jax.Array, kernel: jax.Array) -> jax.Array:
    """Return the initial value of a sum of products of `z` and `kernel`, varying over the same mesh axes."""
    zeros = jnp.zeros(shape, _precision.accumulator(_precision.promote(z, kernel)))
    return _mesh.align_varying((zeros, z))[0]


# --- One term of (4) ---


def _tap_product(form: Form, z: jax.Array, kernel: jax.Array) -> tuple[Callable[..., jax.Array], jax.Array]:
    """Return the contraction of two of z, w and y to the third, and the w[k] in its layout.

    The contraction is called as `product("z,w->y", s, w)`.
    """
    if form.geometry.groups == z.shape[-1] == kernel.shape[-1]:
        return _depthwise, kernel[:, 0]
    return partial(_grouped, form), kernel


def _depthwise(which: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Compute one term elementwise. The sum over the batch follows after the loop: devices communicate only once."""
    wide = _precision.accumulator(_precision.promote(a, b))
    terms = a.astype(wide) * jnp.expand_dims(b.astype(wide), range(a.ndim - b.ndim))
    return jnp.sum(terms, -2) if which == "z,y->w" else terms


def _grouped(form: Form, which: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Compute one term as a matrix product per group."""
    g, common = form.geometry.groups, _precision.promote(a, b)
    a, b = a.astype(common), b.astype(common)
    letters = {"z": "...i", "w": "io", "y": "...o"}
    if g > 1:  # the last axis of all three is (g, ·)
        letters = {"z": "...gi", "w": "igo", "y": "...go"}
        a, b = (part.reshape(*part.shape[:-1], g, -1) for part in (a, b))
    result = jnp.einsum(
        which.translate(str.maketrans(letters)),
        a,
        b,
        precision=form.precision,
        preferred_element_type=_precision.accumulator(common),
    )
    return result.reshape(*result.shape[:-2], -1) if g > 1 else result


# --- Public ---


@op
def causal_conv(
    params: ConvParams,
    carry: Inexact[AnyArray, "..."] | None,
    xs: Inexact[AnyArray, "..."],
    *,
    dilation: int = 1,
    groups: int = 1,
    lengths: Integer[AnyArray, "*batch"] | None = None,
    resets: Bool[AnyArray, "..."] | None = None,
    time_axis: int = 0,
    precision: Any = None,
    method: str = "auto",
) -> tuple[Inexact[Array, "..."], Inexact[Array, "..."]]:
    r"""Causal 1-D convolution of a signal in chunks, with a hand-derived gradient.

    With $z$ the `carry` followed by `xs` along time, $w, \beta$ the kernel and the bias, $K$ taps at distance $d$, and
    $P = d (K - 1)$, the number of steps that the kernel reaches back,

    $$y[t, b, o] = \sum_{k, i} z[t + d k,\; b,\; i]\; w[k, i, o] + \beta[o], \qquad carry'[p, b] = z[T + p, b]$$

    for every step $0 \le t < T$, tap $k$ and channel $i$ of the group of $o$, and $0 \le p < P$. Tap $K - 1$ reads the
    current step. Without a carry, $y$ equals `conv(xs, *params, padding="CAUSAL")` for `time_axis=-2`. Consecutive
    chunks of any length, also shorter than the kernel or empty, give the values and the gradients of the whole signal.
    With chunks of one step, the function can be the body of a loop.

    Args:
        params: `ConvParams(kernel, bias)` of `conv_init`, the kernel `(kernel_size, c_in // groups, c_out)`, the bias
            `(c_out,)` or None.
        carry: the last inputs before the chunk, `(P, *batch, c_in)`, the latest last, with the axes of `xs` and P in
            place of T. None is zeros, which an empty chunk returns as an array (`xs[:0]`).
        xs: input `(T, *batch, c_in)` with any number of batch axes, including none.
        dilation: distance between taps.
        groups: number of channel groups. Group γ of the outputs reads only group γ of the inputs. `groups=c_in` is
            depthwise.
        lengths: the length of each sequence, `(*batch,)` integers from 0 to T. Beyond it, outputs are zero, inputs are
            never read and may be NaN, and the returned carry has the last inputs within the length.
        resets: `(T, *batch)` booleans. `resets[t]` marks a boundary between t - 1 and t ("x_t opens a new episode").
            From t on, outputs and the returned carry contain zeros in place of the inputs before the boundary, NaN
            included, and no gradient flows across it. A reset at t = 0 replaces the carry. Without resets a chunk is
            one convolution; with resets it is one product per tap.
        time_axis: the time axis of `xs`, `carry`, `resets` and the output. -2 is `(*batch, T, c_in)`.
        precision: as in `jax.lax.conv_general_dilated`.
        method: `"auto"` or `"direct"`, as in `conv`. With `resets` the method is always direct.

    Returns:
        `(carry, ys)`: the carry for the next chunk, in the dtype of `carry` (of `xs` if `carry` is None), and the
        output `(T, *batch, c_out)` in the dtype of `xs`. Products accumulate in float32 at least.

    Raises:
        TypeError: if `params` is not a `ConvParams`, an array is not a float or complex array, `lengths` is not an
            array of integers, `resets` is not a boolean array, or an option has the wrong type.
        ValueError: if a rank, a shape, a number of channels, a length or an option is invalid.

    Example:
        >>> import jax.numpy as jnp, jaxseq
        >>> xs = jnp.arange(1.0, 7.0)[:, None]  # 6 steps, no batch axis, 1 channel
        >>> params = jaxseq.ConvParams(jnp.array([1.0, 10.0, 100.0])[:, None, None], None)
        >>> carry, ys = jaxseq.causal_conv(params, None, xs[:4])
        >>> ys[:, 0], carry[:, 0]
        (Array([100., 210., 321., 432.], dtype=float32), Array([3., 4.], dtype=float32))
        >>> carry, ys = jaxseq.causal_conv(params, carry, xs[4:], resets=jnp.array([False, True]))
        >>> ys[:, 0], carry[:, 0]
        (Array([543., 600.], dtype=float32), Array([0., 6.], dtype=float32))

    Reference:
        A. van den Oord et al., WaveNet: a generative model for raw audio (2016), section 2.1.
    """
    if params is None or isinstance(params, _checks.ARRAYS):
        got = f"{_checks.describe(params)}; the order is (params, carry, xs)"
        _checks.bad_type("params", "ConvParams(kernel, bias)", got)
    kernel, bias = _checks.container("params", params, ConvParams)
    kernel = _checks.array("kernel", kernel, complex_ok=True)
    if kernel.ndim != 3:
        expected = "3 axes (kernel_size, c_in // groups, c_out)"
        _checks.bad_value("kernel", expected, str(kernel.ndim), kernel=kernel)
    xs = _checks.array("xs", xs, complex_ok=True)
    if xs.ndim < 2:
        _checks.bad_value("xs", "at least 2 axes (time, *batch, channels)", str(xs.ndim), xs=xs)
    axis = _checks.axis("time_axis", time_axis, xs.ndim - 1, 1, xs=xs)
    xs, kernel, bias, _ = _conv.operands(xs, kernel, bias, name="xs")
    K, T, c_in = kernel.shape[0], xs.shape[axis], xs.shape[-1]
    sizes = xs.shape[:-1]
    dilation = _checks.integer("dilation", dilation, at_least=1)
    dilation = dilation if K > 1 else 1  # has no effect on one tap, and may exceed the 32 bits of XLA
    groups = _checks.integer("groups", groups, at_least=1)
    _conv.check_channels(groups, xs, kernel, bias, name="xs")
    past = (*sizes[:axis], (K - 1) * dilation, *sizes[axis + 1 :], c_in)
    if carry is not None:
        carry = _checks.array("carry", carry, complex_ok=True)
        if jnp.iscomplexobj(carry) != jnp.iscomplexobj(xs):
            _checks.bad_type("carry", _conv.matching_kind("xs", xs), str(carry.dtype))
        meaning = "the shape of `xs` with (kernel_size - 1) * dilation steps"
        _checks.shape("carry", carry, past, meaning, xs=xs, kernel=kernel)
    if lengths is not None:
        lengths = _checks.lengths("lengths", lengths, (*sizes[:axis], *sizes[axis + 1 :]), T)
    if resets is not None:
        resets = _checks.mask("resets", resets)
        _checks.shape("resets", resets, sizes, "the shape of `xs` without features", xs=xs)
        resets = jnp.moveaxis(resets, axis, -1)
        if not resets.size or K == 1:  # no boundary, or no tap that could read across it
            resets = None
    distributed = _mesh.is_distributed(carry, xs, kernel, bias, resets, lengths)
    x = jnp.moveaxis(xs, axis, -2)
    from_zero = carry is None
    if carry is not None:
        carry = jnp.moveaxis(carry, axis, -2)
    else:
        past = (*x.shape[:-2], (K - 1) * dilation, c_in)
        carry = _sharding.zeros(past, x) if distributed else jnp.zeros(past, x.dtype)
    method = _checks.choice("method", method, _geometry.METHODS)
    geometry = Geometry((1,), ((0, 0),), (dilation,), groups, method)  # of the convolution of z
    geometry = geometry._replace(tuning=used_for_convolutions())
    over_batch = partial(_causal_conv_over_batch, _checks.precision(precision), from_zero)
    operands = carry, x, kernel, bias, resets, lengths
    if distributed:
        last, y = _distributed.causal_conv(over_batch, _new_carry, geometry, operands)
    else:
        geometry = geometry._replace(partitioning=_mesh.partitioning((carry, x, kernel, bias)))
        last, y = _new_carry(operands), over_batch(geometry, operands)
    last, y = (jnp.moveaxis(a, -2, axis) for a in (last, y))
    return last, y
