"""The long short-term memory.

    i = σ(a_i)    f = σ(a_f)    g = tanh(a_g)    o = σ(a_o),       a = u + r
    c' = f c + i g
    h' = o tanh(c')

Pullback, with σ' = σ (1 - σ), tanh' = 1 - tanh² and the residuals (i, f, g, o); c' is recomputed from c:

    ō = h̄' tanh(c')            c̄ := c̄' + h̄' o (1 - tanh²(c'))      the total cotangent of c'
    δi = c̄ g i (1 - i)
    δf = c̄ c f (1 - f)
    δg = c̄ i (1 - g²)
    δo = ō o (1 - o)
    c̄_prev = c̄ f               h̄_prev = 0: h reaches the next step only through the recurrent map

Source: S. Hochreiter and J. Schmidhuber, Long short-term memory (1997); for the forget gate, F. A. Gers,
J. Schmidhuber and F. Cummins, Learning to forget (2000).
"""

from typing import Unpack

import jax
import jax.numpy as jnp
from jax.lax import PrecisionLike
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxseq import _checks, _init, _recurrence
from jaxseq._op import op, with_hints
from jaxseq._recurrence import Gates, Pullback, StepResult
from jaxseq._time_options import TimeOptions
from jaxseq._types import AnyArray, LSTMParams, LSTMState


def step(a: Gates, s_prev: LSTMState) -> StepResult:
    a_i, a_f, a_g, a_o = a
    i, f, g, o = jax.nn.sigmoid(a_i), jax.nn.sigmoid(a_f), jnp.tanh(a_g), jax.nn.sigmoid(a_o)
    c = f * s_prev.c + i * g
    return StepResult(LSTMState(o * jnp.tanh(c), c), (i, f, g, o))


def pullback(residuals: PyTree, s_prev: LSTMState, s_bar: LSTMState) -> Pullback:
    i, f, g, o = residuals
    tanh_c = jnp.tanh(f * s_prev.c + i * g)
    o_bar = s_bar.h * tanh_c
    c_bar = s_bar.c + s_bar.h * o * (1 - tanh_c * tanh_c)
    delta_i = c_bar * g * i * (1 - i)
    delta_f = c_bar * s_prev.c * f * (1 - f)
    delta_g = c_bar * i * (1 - g * g)
    delta_o = o_bar * o * (1 - o)
    return Pullback((delta_i, delta_f, delta_g, delta_o), LSTMState(jnp.zeros_like(s_bar.h), c_bar * f))


def replay(residuals: PyTree, s_prev: LSTMState) -> LSTMState:
    i, f, g, o = residuals
    c = f * s_prev.c + i * g
    return LSTMState(o * jnp.tanh(c), c)


CELL = _recurrence.Cell(
    name="lstm", gates="ifgo", step=step, pullback=pullback, replay=replay, params=LSTMParams, state=LSTMState
)


@op
def lstm(
    params: LSTMParams,
    carry: LSTMState | None,
    xs: Float[AnyArray, "*time_and_batch D"],
    **time: Unpack[TimeOptions],
) -> tuple[LSTMState, Float[Array, "*time_and_batch H"]]:
    r"""Apply a long short-term memory (LSTM) to a sequence, with a hand-derived gradient.

    $$\begin{aligned}
    (i_t, f_t, g_t, o_t) &= (\sigma, \sigma, \tanh, \sigma)(x_t W_x + h_{t-1} W_h + b) \\
    c_t &= f_t \odot c_{t-1} + i_t \odot g_t \\
    h_t &= o_t \odot \tanh(c_t), \qquad y_t = h_t
    \end{aligned}$$

    The cell adds no constant to the forget gate. `lstm_init` sets the forget bias in `b` to one.

    Args:
        params: `LSTMParams(w_x (D, 4H), w_h (H, 4H), b (4H,) or None)`, gates in the order i, f, g, o.
        carry: the initial state `LSTMState(h, c)`, each `(*batch, H)`, or None for zeros.
        xs: the sequence `(T, *batch, D)`: time, then any number of batch axes, then features.
        **time: time options, `jaxseq.TimeOptions`.

    Returns:
        `(carry, ys)`: the final state in the dtypes of `carry` (at least float32 for None), and h of all steps
        `(T, *batch, H)` in the dtype of `xs`.

    Raises:
        TypeError: if `params` belongs to another cell, an array is not a float array, or an option has the wrong type.
        ValueError: if a rank or size does not match, or an option is out of range.

    Example:
        >>> import jax, jax.numpy as jnp, jaxseq
        >>> params = jaxseq.lstm_init(jax.random.key(0), 3, 5)
        >>> (h, c), ys = jaxseq.lstm(params, None, jnp.ones((7, 2, 3)))
        >>> c.shape, ys.shape
        ((2, 5), (7, 2, 5))

    Reference:
        S. Hochreiter and J. Schmidhuber, Long short-term memory (1997); F. A. Gers, J. Schmidhuber and F. Cummins,
        Learning to forget (2000).
    """
    return _recurrence.sequence(CELL, params, carry, xs, **time)


@op
def lstm_cell(
    params: LSTMParams, carry: LSTMState | None, x: Float[AnyArray, "*batch D"], *, precision: PrecisionLike = None
) -> tuple[LSTMState, Float[Array, "*batch H"]]:
    """Apply one step of `lstm`. `partial(lstm_cell, params)` is a body for `jax.lax.scan`.

    Args:
        params: `LSTMParams(w_x (D, 4H), w_h (H, 4H), b (4H,) or None)`, gates in the order i, f, g, o.
        carry: the previous state `LSTMState(h, c)`, each `(*batch, H)`, or None for zeros.
            The new state has the dtype of `carry` (at least float32 for None). In bfloat16 it is rounded at every step.
        x: one input `(*batch, D)`.
        precision: the precision of matrix products, as in `jax.lax.dot_general`.

    Returns:
        `(carry, y)`: the new state, and its h.

    Raises:
        TypeError: if `params` belongs to another cell, an array is not a float array, or an option has the wrong type.
        ValueError: if a rank or size does not match.

    Example:
        >>> import jax, jax.numpy as jnp, jaxseq
        >>> params = jaxseq.lstm_init(jax.random.key(0), 3, 5)
        >>> (h, c), y = jaxseq.lstm_cell(params, None, jnp.ones((2, 3)))
        >>> y.shape
        (2, 5)

    Reference:
        S. Hochreiter and J. Schmidhuber, Long short-term memory (1997); F. A. Gers, J. Schmidhuber and F. Cummins,
        Learning to forget (2000).
    """
    return _recurrence.one_step(CELL, params, carry, x, precision=precision)


@with_hints
def lstm_init(
    key: PRNGKeyArray,
    input_size: int,
    hidden_size: int,
    *,
    use_bias: bool = True,
    w_x_init: _init.Initializer | None = None,
    w_h_init: _init.Initializer | None = None,
    dtype: DTypeLike = jnp.float32,
) -> LSTMParams:
    """Initialize `lstm`: normal `w_x` of variance 1 / D, an orthogonal block of `w_h` for each gate, and a bias that is
    one for the forget gate, so that the memory decays slowly at first, and zero elsewhere.

    Args:
        key: a JAX random key.
        input_size: D.
        hidden_size: H.
        use_bias: if False, `b` is None.
        w_x_init: replaces the initializer of `w_x`: a function `(key, shape, dtype) -> array`, as in
            `jax.nn.initializers`, called for each gate with the shape (D, H).
        w_h_init: the same for `w_h`, with the shape (H, H).
        dtype: floating dtype of the parameters.

    The variance of `w_x` assumes inputs of unit variance in each feature. One-hot inputs have far less: embed them or
    multiply `w_x` by sqrt(D).

    Returns:
        `LSTMParams(w_x, w_h, b)`.

    Raises:
        TypeError: if a size is not an integer, `dtype` is not a floating dtype, or an initializer is not a function.
        ValueError: if a size is less than 1.

    Example:
        >>> import jax, jaxseq
        >>> jaxseq.lstm_init(jax.random.key(0), 3, 2).b
        Array([0., 0., 1., 1., 0., 0., 0., 0.], dtype=float32)

    Reference:
        A. M. Saxe, J. L. McClelland and S. Ganguli, Exact solutions to the nonlinear dynamics of learning in deep
        linear neural networks (2014), section 3; for the forget bias, R. Jozefowicz, W. Zaremba and I. Sutskever, An
        empirical exploration of recurrent network architectures (2015), section 3.
    """
    w_x, w_h, b = _init.matrices(key, input_size, hidden_size, 4, dtype, w_x_init=w_x_init, w_h_init=w_h_init)
    b = b.at[hidden_size : 2 * hidden_size].set(1)
    return LSTMParams(w_x, w_h, b if _checks.boolean("use_bias", use_bias) else None)
