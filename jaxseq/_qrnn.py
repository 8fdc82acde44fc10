"""QRNN: a causal convolution computes the gates, and a linear recurrence between them the state.

    u_t = sum_k x_{t-K+1+k} W_k + b        z = tanh(u_z)    f = σ(u_f)    o = σ(u_o)
    c_t = f_t c_{t-1} + (1 - f_t) z_t
    y_t = o_t c_t

with K taps. The state is c, and the last K - 1 inputs. Both parts have hand-derived rules: `_causal_conv.py` and
`_linear_recurrence/`.

Source: J. Bradbury, S. Merity, C. Xiong and R. Socher, Quasi-recurrent neural networks (2017), section 2, pooling "fo".
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.lax import PrecisionLike
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Integer, PRNGKeyArray

from jaxseq import _checks, _composed, _init, _precision
from jaxseq._annotations import check_annotated
from jaxseq._causal_conv import causal_conv
from jaxseq._linear_recurrence import linear_recurrence
from jaxseq._op import op, with_hints
from jaxseq._types import AnyArray, ConvParams, QRNNParams, QRNNState


@op
def qrnn(
    params: QRNNParams,
    carry: QRNNState | None,
    xs: Float[AnyArray, "*time_and_batch D"],
    *,
    lengths: Integer[AnyArray, "*batch"] | None = None,
    resets: Bool[AnyArray, "*time_and_batch"] | None = None,
    reverse: bool = False,
    truncation: int | tuple[int, int] | None = None,
    checkpoint: int | str | None = None,
    time_axis: int = 0,
    unroll: int = 1,
    precision: PrecisionLike = None,
) -> tuple[QRNNState, Float[Array, "*time_and_batch H"]]:
    r"""Quasi-recurrent neural network: gates from a causal convolution, and a state that is linear between them.

    $$u_t = \sum_{k=0}^{K-1} x_{t-K+1+k} W_k + b, \qquad z, f, o = \tanh(u_z), \sigma(u_f), \sigma(u_o)$$

    $$c_t = f_t \odot c_{t-1} + (1 - f_t) \odot z_t, \qquad y_t = o_t \odot c_t$$

    Args:
        params: `QRNNParams(kernel, bias)` of `qrnn_init`, the kernel `(K, D, 3 H)` with the gates in the order z, f, o,
            the bias `(3 H,)` or None.
        carry: `QRNNState(past, c)`: the K - 1 inputs before the first step, `(*batch, K - 1, D)`, the latest last, and
            the state `(*batch, H)`. None is zeros.
        xs: input `(T, *batch, D)`.
        lengths: the length of each sequence, `(*batch,)` integers from 0 to T. Beyond its length, a sequence is
            padding: `ys` is zero there, the carry does not change, and the content of `xs`, NaN included, affects no
            value and no gradient.
        resets: `(T, *batch)` booleans. `resets[t]` marks a boundary between steps t - 1 and t. Across it, the state and
            the past inputs are set to zero, in either direction, and no gradient flows.
        reverse: if True, process each sequence from its last step to its first. `ys[t]` still belongs to `xs[t]`, and
            the returned carry is the state after step 0.
        truncation: truncated backpropagation through time. With an integer k, the gradient of the state is cut every k
            steps. With a pair (k1, k2), the loss in each window of k1 steps is backpropagated through k2 steps. Windows
            run in parallel, after a pass that computes the states between them.
        checkpoint: if not None, the gates and the states are not stored, and the backward pass computes them again.
            There is no interval: the backward pass needs no states between its steps.
        time_axis: the axis of time in `xs`, `resets` and `ys`.
        unroll: the number of steps per iteration of the compiled loop, as in `jax.lax.scan`.
        precision: the precision of matrix products, as in `jax.lax.dot_general`.

    Returns:
        `(carry, ys)`: the final state, in the dtype of `carry` (at least float32 for None), and the outputs
        `(T, *batch, H)` in the dtype of `xs`.

    Raises:
        TypeError: if `params` or `carry` is of another type, an array is not a float array, or an option has the wrong
            type.
        ValueError: if a rank or size does not match, or an option is out of range.

    Example:
        >>> import jax, jax.numpy as jnp, jaxseq
        >>> params = jaxseq.qrnn_init(jax.random.key(0), 3, 5)
        >>> carry, ys = jaxseq.qrnn(params, None, jnp.ones((7, 4, 3)))
        >>> ys.shape, carry.past.shape, carry.c.shape
        ((7, 4, 5), (4, 1, 3), (4, 5))

    Reference:
        J. Bradbury, S. Merity, C. Xiong and R. Socher, Quasi-recurrent neural networks (2017), section 2.
    """
    params = _check_params(params)
    given = {"reverse": reverse, "truncation": truncation, "time_axis": time_axis}
    xs, lengths, resets, options = _composed.check_steps(xs, lengths, resets, **given)
    unroll, precision = _checks.integer("unroll", unroll, at_least=1), _checks.precision(precision)
    checkpoint = _checks.checkpoint(checkpoint)
    carry = _check_carry(params, carry, xs, options.axis)
    layer = partial(_run, precision, unroll)
    if checkpoint is not None:
        layer = jax.checkpoint(layer)
    return _composed.run(layer, options, _composed.Arrays(params, carry, xs, lengths, resets))


def _run(
    precision: PrecisionLike, unroll: int, params: QRNNParams, carry: QRNNState, steps: _composed.Steps
) -> tuple[QRNNState, jax.Array]:
    """Run the layer forward."""
    (kernel, bias), (xs, lengths, resets) = params, steps
    dtype = _precision.accumulator(_precision.promote(kernel, xs, *carry))
    x = xs.astype(dtype)  # so that the gates are not rounded
    past = jnp.moveaxis(carry.past, -2, 0).astype(dtype)
    convolution = ConvParams(kernel, bias)
    past, u = causal_conv(convolution, past, x, lengths=lengths, resets=resets, precision=precision)
    u_z, u_f, u_o = jnp.split(u, 3, -1)
    keep = jax.nn.sigmoid(u_f)
    added = jax.nn.sigmoid(-u_f) * jnp.tanh(u_z)
    c = carry.c.astype(dtype)
    c, cs = linear_recurrence(keep, c, added, lengths=lengths, resets=resets, unroll=unroll)
    ys = (jax.nn.sigmoid(u_o) * cs).astype(xs.dtype)  # zero in padding, as cs
    return _precision.cast_like(QRNNState(jnp.moveaxis(past, 0, -2), c), carry), ys


@op
def qrnn_cell(
    params: QRNNParams,
    carry: QRNNState | None,
    x: Float[AnyArray, "*batch D"],
    *,
    precision: PrecisionLike = None,
) -> tuple[QRNNState, Float[Array, "*batch H"]]:
    """One step of `qrnn`, for the caller's own loop.

    Args:
        params: as in `qrnn`.
        carry: as in `qrnn`.
        x: input `(*batch, D)`.
        precision: as in `qrnn`.

    Returns:
        `(carry, y)`: the new state, and the output `(*batch, H)` in the dtype of `x`.

    Raises:
        TypeError: as in `qrnn`.
        ValueError: as in `qrnn`.

    Example:
        >>> import jax, jax.numpy as jnp, jaxseq
        >>> params = jaxseq.qrnn_init(jax.random.key(0), 3, 5)
        >>> carry, y = jaxseq.qrnn_cell(params, None, jnp.ones((4, 3)))
        >>> y.shape
        (4, 5)

    Reference:
        J. Bradbury, S. Merity, C. Xiong and R. Socher, Quasi-recurrent neural networks (2017), section 2.
    """
    params, x = _check_params(params), _composed.check_step(x)
    carry = _check_carry(params, carry, x, None)
    return _composed.run_step(partial(_run, _checks.precision(precision), 1), params, carry, x)


def state_of(params: QRNNParams) -> _composed.StateShapes:
    """Return the shapes of the state of an example."""
    taps, D, columns = params.kernel.shape
    return _composed.StateShapes(QRNNState, {"past": (taps - 1, D), "c": (columns // 3,)})


def _check_params(params: object) -> QRNNParams:
    checked = check_annotated("params", params, QRNNParams)
    if 0 in checked.kernel.shape:
        _checks.bad_value("params.kernel", "at least one tap and one feature", str(checked.kernel.shape))
    return checked


def _check_carry(params: QRNNParams, carry: object, x: jax.Array, axis: int | None) -> QRNNState:
    """Check the sizes of x, with time at `axis` if not None, and the carry."""
    D = params.kernel.shape[1]
    state: QRNNState = _composed.check_carry(carry, x, axis, input_size=D, state=state_of(params))
    return state


@with_hints
def qrnn_init(
    key: PRNGKeyArray,
    input_size: int,
    hidden_size: int,
    *,
    kernel_size: int = 2,
    use_bias: bool = True,
    kernel_init: _init.Initializer | None = None,
    dtype: DTypeLike = jnp.float32,
) -> QRNNParams:
    """Initialize `qrnn`: a normal kernel of variance 1 / (K D), zero bias.

    Args:
        key: a JAX random key.
        input_size: D.
        hidden_size: H.
        kernel_size: K, the number of taps of the convolution.
        use_bias: if False, `bias` is None.
        kernel_init: replaces the initializer of the kernel: a function `(key, shape, dtype) -> array`, as in
            `jax.nn.initializers`, called with the shape (K, D, 3 H).
        dtype: floating dtype of the parameters.

    Returns:
        `QRNNParams(kernel, bias)`.

    Raises:
        TypeError: if a size is not an integer, `dtype` is not a floating dtype, or an initializer is not a function.
        ValueError: if a size is less than 1.

    Example:
        >>> import jax, jaxseq
        >>> jaxseq.qrnn_init(jax.random.key(0), 3, 5).kernel.shape
        (2, 3, 15)

    Reference:
        J. Bradbury, S. Merity, C. Xiong and R. Socher, Quasi-recurrent neural networks (2017), section 2.
    """
    D, H, dtype = _init.sizes(input_size, hidden_size, dtype)
    shape = (_checks.integer("kernel_size", kernel_size, at_least=1), D, 3 * H)
    bias = jnp.zeros(3 * H, dtype) if _checks.boolean("use_bias", use_bias) else None
    if kernel_init is None:
        return QRNNParams(_init.kernel(key, shape[:1], D, 3 * H, dtype), bias)
    return QRNNParams(_init.drawn("kernel_init", kernel_init, key, shape, dtype), bias)
