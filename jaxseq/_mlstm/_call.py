"""The public functions of the mLSTM, and the maps before and after its recurrence.

    q = x W_q     k = x W_k / sqrt(K)     v = x W_v                    for each of N heads
    i = exp(x w_i + b_i)     f = σ(x w_f + b_f)     o = σ(x W_o + b_o)

    C' = f C + i k vᵀ     n' = f n + i k
    y = o (C'ᵀ q) / max(|n'·q|, 1)

C', n' and 1 are scaled by exp(-m'), as in `_chunks.py`.

Source: M. Beck et al., xLSTM: Extended long short-term memory (2024), section 2.3. There is no bias of q, k and v, as
in the authors' implementation.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.lax import PrecisionLike
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Integer, PRNGKeyArray

from jaxseq import _checks, _composed, _dense, _init, _precision, _sizes, _time, _windows, tuning
from jaxseq._annotations import check_annotated
from jaxseq._explain import RECORDED, Decision
from jaxseq._mlstm import _chunks
from jaxseq._op import op, with_hints
from jaxseq._pointwise import log_sigmoid
from jaxseq._types import AnyArray, MLSTMParams, MLSTMState


@op
def mlstm(
    params: MLSTMParams,
    carry: MLSTMState | None,
    xs: Float[AnyArray, "*time_and_batch D"],
    *,
    lengths: Integer[AnyArray, "*batch"] | None = None,
    resets: Bool[AnyArray, "*time_and_batch"] | None = None,
    reverse: bool = False,
    truncation: int | tuple[int, int] | None = None,
    checkpoint: int | str | None = None,
    time_axis: int = 0,
    precision: PrecisionLike = None,
) -> tuple[MLSTMState, Float[Array, "*time_and_batch H"]]:
    r"""LSTM with a matrix memory and exponential input gates, which read the input only.

    Each of N heads has a query $q_t$, a key $k_t$ and a value $v_t$, products of $x_t$ with `w_q`, `w_k` / sqrt(K) and
    `w_v`, and the gates $i_t = \exp(x_t w_i + b_i)$, $f_t = \sigma(x_t w_f + b_f)$ and
    $o_t = \sigma(x_t W_o + b_o)$:

    $$C_t = f_t C_{t-1} + i_t k_t v_t^\top, \qquad n_t = f_t n_{t-1} + i_t k_t, \qquad
    y_t = o_t \odot \frac{C_t^\top q_t}{\max(|n_t^\top q_t|, 1)}$$

    The state stores C and n times $e^{-m_t}$, with $m_t = \max(\log f_t + m_{t-1}, \log i_t)$, so that no exponential
    overflows. Steps are computed in chunks, by matrix products. Only the states before chunks are stored, not the
    memory of every step.

    Args:
        params: `MLSTMParams` of `mlstm_init`: `w_q` and `w_k` `(D, N, K)`, `w_v` and `w_o` `(D, N, V)`, `w_i` and `w_f`
            `(D, N)`, and `b_i` and `b_f` `(N,)` and `b_o` `(N, V)` or None.
        carry: `MLSTMState(c, n, m)`: `(*batch, N, K, V)`, `(*batch, N, K)` and `(*batch, N)`. None is zeros.
        xs: input `(T, *batch, D)`.
        lengths: the length of each sequence, `(*batch,)` integers from 0 to T. Beyond its length, a sequence is
            padding: `ys` is zero there, the carry does not change, and the content of `xs`, NaN included, affects no
            value and no gradient.
        resets: `(T, *batch)` booleans. `resets[t]` marks a boundary between steps t - 1 and t. Across it, the state is
            set to zero, in either direction, and no gradient flows. A NaN in the carry does not reach the values after
            it, but the gradients of the same chunk. A NaN in `xs` may reach the later values of the same chunk.
        reverse: if True, process each sequence from its last step to its first. `ys[t]` still belongs to `xs[t]`, and
            the returned carry is the state after step 0.
        truncation: truncated backpropagation through time. With an integer k, the gradient of the state is cut every k
            steps. With a pair (k1, k2), the loss in each window of k1 steps is backpropagated through k2 steps. Windows
            run in parallel, after a pass that computes the states between them.
        checkpoint: the number of steps in a chunk. `"auto"` is about sqrt(T). None is `LinearTuning.memory_steps`.
        time_axis: the axis of time in `xs`, `resets` and `ys`.
        precision: the precision of matrix products, as in `jax.lax.dot_general`.

    Returns:
        `(carry, ys)`: the final state, in the dtype of `carry` (at least float32 for None), and the outputs
        `(T, *batch, N V)` in the dtype of `xs`.

    Raises:
        TypeError: if `params` or `carry` is of another type, an array is not a float array, or an option has the wrong
            type.
        ValueError: if a rank or size does not match, or an option is out of range.

    Example:
        >>> import jax, jax.numpy as jnp, jaxseq
        >>> params = jaxseq.mlstm_init(jax.random.key(0), 3, 8, heads=2)
        >>> carry, ys = jaxseq.mlstm(params, None, jnp.ones((7, 5, 3)))
        >>> ys.shape, carry.c.shape
        ((7, 5, 8), (5, 2, 4, 4))

    Reference:
        M. Beck et al., xLSTM: Extended long short-term memory (2024), section 2.3 and appendix A.3.
    """
    params = check_annotated("params", params, MLSTMParams)
    given = {"reverse": reverse, "truncation": truncation, "time_axis": time_axis}
    xs, lengths, resets, options = _composed.check_steps(xs, lengths, resets, **given)
    checkpoint, precision = _checks.checkpoint(checkpoint), _checks.precision(precision)
    carry = _check_carry(params, carry, xs, options.axis)
    chunk = _chunk_length(xs.shape[options.axis], checkpoint)
    arrays = _composed.Arrays(params, carry, xs, lengths, resets)
    return _composed.run(partial(_run, precision, chunk), options, arrays)


def _chunk_length(steps: int, checkpoint: int | str | None) -> int | None:
    """Return the number of steps of a chunk, or None for a single one."""
    if not _sizes.is_concrete(steps):  # a chunk of fixed length may be longer
        _windows.reject_checkpoint_of_symbolic(checkpoint)
        chunk, why = None, "the number of steps is symbolic"
    elif checkpoint is None:
        chunk, why = tuning.for_backend().linear.memory_steps, "`LinearTuning.memory_steps`"
    else:
        chunk, why = _windows.checkpoint_interval(checkpoint, steps), f"checkpoint={checkpoint!r}"
    recorded = RECORDED.get()
    if recorded is not None:
        choice = "all steps at once" if chunk is None else f"{min(chunk, steps)} steps at once, by matrix products"
        recorded.append(Decision("memory", choice, why))
    return chunk


def _run(
    precision: PrecisionLike, chunk: int | None, params: MLSTMParams, carry: MLSTMState, steps: _composed.Steps
) -> tuple[MLSTMState, jax.Array]:
    """Run the layer forward."""
    xs, lengths, reset = steps
    valid = None if lengths is None else _time.valid_steps(xs.shape[0], lengths, 0)
    dtype = _precision.accumulator(_precision.promote(*jax.tree.leaves(params), xs, *carry))
    x = _time.zero_padding(valid, xs)
    linear = lambda w: _dense.contract(precision, x, w, (x.ndim - 1,), (0,)).astype(dtype)  # noqa: E731
    q, k, v = linear(params.w_q), linear(params.w_k) * params.w_k.shape[-1] ** -0.5, linear(params.w_v)
    a = _dense.add_bias(linear(params.w_i), params.b_i)
    decay = log_sigmoid(_dense.add_bias(linear(params.w_f), params.b_f))
    terms = _chunks.Steps(q, k, v, a, decay, valid, reset)
    options = _chunks.Options(xs.shape[0] if chunk is None else min(chunk, xs.shape[0]), precision)
    end, (numerator, denominator, m) = _chunks.run(options, _precision.cast(carry, dtype), terms)
    gate = linear(params.w_o)
    if params.b_o is not None:
        gate = gate + jnp.expand_dims(params.b_o.astype(dtype), range(gate.ndim - 2))
    y = jax.nn.sigmoid(gate) * _quotient(numerator, denominator, m)
    ys = y.reshape(*xs.shape[:-1], y.shape[-2] * y.shape[-1]).astype(xs.dtype)
    return _precision.cast_like(end, carry), _time.zero_padding(valid, ys)


def _quotient(numerator: jax.Array, denominator: jax.Array, m: jax.Array) -> jax.Array:
    """Return numerator / max(|denominator|, exp(-m)).

    The derivative of a quotient has the square of its denominator, which underflows from m = 44 on in float32. So both
    parts are divided by the denominator first, as a constant. The derivative of a maximum compares for equality, which
    fails where XLA computes an operand twice and rounds it differently.
    """
    positive = jnp.where(denominator < 0, -denominator, denominator)
    least = jnp.exp(-m)
    least = jnp.where(least > jnp.finfo(m.dtype).tiny, least, jnp.finfo(m.dtype).tiny)
    size = jnp.where(positive > least, positive, least)
    scale = lax.stop_gradient(1 / size)
    return numerator * scale[..., None] / (size * scale)[..., None]


@op
def mlstm_cell(
    params: MLSTMParams,
    carry: MLSTMState | None,
    x: Float[AnyArray, "*batch D"],
    *,
    precision: PrecisionLike = None,
) -> tuple[MLSTMState, Float[Array, "*batch H"]]:
    """One step of `mlstm`, for the caller's own loop.

    Args:
        params: as in `mlstm`.
        carry: as in `mlstm`.
        x: input `(*batch, D)`.
        precision: as in `mlstm`.

    Returns:
        `(carry, y)`: the new state, and the output `(*batch, N V)` in the dtype of `x`.

    Raises:
        TypeError: as in `mlstm`.
        ValueError: as in `mlstm`.

    Example:
        >>> import jax, jax.numpy as jnp, jaxseq
        >>> params = jaxseq.mlstm_init(jax.random.key(0), 3, 8, heads=2)
        >>> carry, y = jaxseq.mlstm_cell(params, None, jnp.ones((5, 3)))
        >>> y.shape
        (5, 8)

    Reference:
        M. Beck et al., xLSTM: Extended long short-term memory (2024), section 2.3.
    """
    params, x = check_annotated("params", params, MLSTMParams), _composed.check_step(x)
    carry = _check_carry(params, carry, x, None)
    return _composed.run_step(partial(_run, _checks.precision(precision), 1), params, carry, x)


def state_of(params: MLSTMParams) -> _composed.StateShapes:
    """Return the shapes of the state of an example."""
    _, N, K = params.w_q.shape
    return _composed.StateShapes(MLSTMState, {"c": (N, K, params.w_v.shape[-1]), "n": (N, K), "m": (N,)})


def _check_carry(params: MLSTMParams, carry: object, x: jax.Array, axis: int | None) -> MLSTMState:
    """Check the sizes of x, with time at `axis` if not None, and the carry."""
    D = params.w_q.shape[0]
    state: MLSTMState = _composed.check_carry(carry, x, axis, input_size=D, state=state_of(params))
    return state


@with_hints
def mlstm_init(
    key: PRNGKeyArray,
    input_size: int,
    hidden_size: int,
    *,
    heads: int = 1,
    key_size: int | None = None,
    use_bias: bool = True,
    w_x_init: _init.Initializer | None = None,
    dtype: DTypeLike = jnp.float32,
) -> MLSTMParams:
    """Initialize `mlstm`: normal maps of variance 1 / D, and gates i and f that read their bias only.

    The forget biases increase from 3 to 6 over the heads, for a range of memory lengths. The input biases are normal,
    with standard deviation 0.1.

    Args:
        key: a JAX random key.
        input_size: D.
        hidden_size: N V, the number of output features.
        heads: N, a divisor of `hidden_size`.
        key_size: K, the number of rows of the memory of a head. None is V.
        use_bias: if False, `b_i`, `b_f` and `b_o` are None.
        w_x_init: replaces the initializer of `w_q`, `w_k`, `w_v` and `w_o`: a function `(key, shape, dtype) -> array`,
            as in `jax.nn.initializers`, called with the shape (D, N K) or (D, N V).
        dtype: floating dtype of the parameters.

    Returns:
        `MLSTMParams(w_q, w_k, w_v, w_i, w_f, w_o, b_i, b_f, b_o)`.

    Raises:
        TypeError: if a size is not an integer, `dtype` is not a floating dtype, or an initializer is not a function.
        ValueError: if a size is less than 1, or `heads` does not divide `hidden_size`.

    Example:
        >>> import jax, jaxseq
        >>> params = jaxseq.mlstm_init(jax.random.key(0), 3, 8, heads=2, key_size=5)
        >>> params.w_q.shape, params.w_v.shape
        ((3, 2, 5), (3, 2, 4))

    Reference:
        M. Beck et al., xLSTM: Extended long short-term memory (2024), section 2.3; the biases are those of the authors'
        implementation.
    """
    D, H, dtype = _init.sizes(input_size, hidden_size, dtype)
    N = _checks.integer("heads", heads, at_least=1)
    if H % N:
        _checks.bad_value("heads", f"a divisor of `hidden_size`, {H}", str(N))
    V = H // N
    K = V if key_size is None else _checks.integer("key_size", key_size, at_least=1)
    key_i, *keys = jax.random.split(key, 5)
    q, k, v, o = (
        _init.input_map(w_x_init, k, (D, N * size), 1, dtype).reshape(D, N, size)
        for k, size in zip(keys, (K, K, V, V), strict=True)
    )
    w_i, w_f = (jnp.zeros((D, N), dtype) for _ in range(2))  # two buffers, so that they can be donated
    b_i = (0.1 * jax.random.normal(key_i, (N,), _precision.accumulator(dtype))).astype(dtype)
    b_f, b_o = jnp.linspace(3, 6, N, dtype=dtype), jnp.zeros((N, V), dtype)
    biases = (b_i, b_f, b_o) if _checks.boolean("use_bias", use_bias) else (None, None, None)
    return MLSTMParams(q, k, v, w_i, w_f, o, *biases)
