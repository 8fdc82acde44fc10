"""The LSTM with projection: the output of size P is a linear map of the H units, and the recurrent map reads it.

    i = σ(a_i)    f = σ(a_f)    g = tanh(a_g)    o = σ(a_o)
    c' = f c + i g              (*B, H)
    m  = o tanh(c')             (*B, H)
    h' = m W_q                  (*B, P), a product inside the step

Pullback: m̄ = h̄' W_qᵀ, then the pullback of the LSTM with m in place of h, and W̄_q = sum m ⊗ h̄'.

Source: H. Sak, A. Senior and F. Beaufays, Long short-term memory recurrent neural network architectures for large
scale acoustic modeling (2014), section 2.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray, PyTree

from jaxseq import _checks, _init, _lstm
from jaxseq._op import with_hints
from jaxseq._recurrence import Cell, Gates, Inner, Pullback, StepResult
from jaxseq._types import LSTMState, ProjectedLSTMParams


def _step(a: Gates, s_prev: LSTMState, L: Callable[[jax.Array], jax.Array]) -> StepResult:
    (m, c), gates = _lstm.step(a, s_prev)
    return StepResult(LSTMState(L(m), c), gates)


def _pullback(residuals: PyTree, s_prev: LSTMState, s_bar: LSTMState, L: Inner) -> Pullback:
    i, f, g, o = residuals
    m = o * jnp.tanh(f * s_prev.c + i * g)
    found = _lstm.pullback(residuals, s_prev, LSTMState(L.T(s_bar.h), s_bar.c))
    s_prev_bar = LSTMState(jnp.zeros_like(s_bar.h), found.state_bar.c)
    return Pullback(found.delta, s_prev_bar, inner=(m, s_bar.h))


def _replay(residuals: PyTree, s_prev: LSTMState, _: Inner) -> LSTMState:
    return LSTMState(s_prev.h, _lstm.replay(residuals, s_prev).c)


projected_lstm = Cell(
    name="projected_lstm",
    gates="ifgo",
    step=_step,
    pullback=_pullback,
    replay=_replay,
    params=ProjectedLSTMParams,
    state=LSTMState,
)


@with_hints
def projected_lstm_init(
    key: PRNGKeyArray,
    input_size: int,
    hidden_size: int,
    projection_size: int,
    *,
    use_bias: bool = True,
    w_x_init: _init.Initializer | None = None,
    w_h_init: _init.Initializer | None = None,
    dtype: DTypeLike = jnp.float32,
) -> ProjectedLSTMParams:
    """Initialize `cells.projected_lstm`: normal `w_x`, `w_h` and `w_q` of variance 1 / D, 1 / P and 1 / H, and a forget
    bias of one.

    Args:
        key: a JAX random key.
        input_size: D.
        hidden_size: H.
        projection_size: P, the size of the output.
        use_bias: if False, `b` is None.
        w_x_init: replaces the initializer of `w_x`: a function `(key, shape, dtype) -> array`, as in
            `jax.nn.initializers`, called for each gate with the shape (D, H).
        w_h_init: the same for `w_h`, with the shape (P, H).
        dtype: floating dtype of the parameters.

    Returns:
        `ProjectedLSTMParams(w_x, w_h, b, w_q)`.

    Raises:
        TypeError: if a size is not an integer, `dtype` is not a floating dtype, or an initializer is not a function.
        ValueError: if a size is less than 1.

    Example:
        >>> import jax, jax.numpy as jnp, jaxseq
        >>> params = jaxseq.cells.projected_lstm_init(jax.random.key(0), 3, 8, 5)
        >>> (h, c), ys = jaxseq.recurrence(jaxseq.cells.projected_lstm, params, None, jnp.ones((7, 2, 3)))
        >>> h.shape, c.shape, ys.shape
        ((2, 5), (2, 8), (7, 2, 5))

    Reference:
        H. Sak, A. Senior and F. Beaufays, Long short-term memory recurrent neural network architectures for large scale
        acoustic modeling (2014), section 2.
    """
    P = _checks.integer("projection_size", projection_size, at_least=1)
    w_x, _, b = _lstm.lstm_init(key, input_size, hidden_size, use_bias=use_bias, w_x_init=w_x_init, dtype=dtype)
    draw = lambda i, rows, columns: _init.matrix(jax.random.fold_in(key, i), rows, columns, w_x.dtype)  # noqa: E731
    if w_h_init is None:
        w_h = draw(1, P, 4 * hidden_size)
    else:
        w_h = _init.by_gate("w_h_init", w_h_init, jax.random.fold_in(key, 1), (P, hidden_size), 4, dtype=w_x.dtype)
    return ProjectedLSTMParams(w_x, w_h, b, draw(2, hidden_size, P))
