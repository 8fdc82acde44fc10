"""The LSTM with peephole connections: the gates of each unit read the memory of that unit.

    i = σ(a_i + p_i c)    f = σ(a_f + p_f c)    g = tanh(a_g)
    c' = f c + i g
    o = σ(a_o + p_o c')
    h' = o tanh(c')

Pullback, with the residuals (i, f, g, o); c' is recomputed from c:

    ō = h̄' tanh(c')             δo = ō o (1 - o)
    c̄ := c̄' + h̄' o (1 - tanh²(c')) + δo p_o       the total cotangent of c'
    δi = c̄ g i (1 - i)          δf = c̄ c f (1 - f)          δg = c̄ i (1 - g²)
    c̄_prev = c̄ f + δi p_i + δf p_f
    p̄_i = δi c                  p̄_f = δf c                  p̄_o = δo c'

Source: F. A. Gers and J. Schmidhuber, Recurrent nets that time and count (2000).
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray, PyTree

from jaxseq import _init, _lstm
from jaxseq._op import with_hints
from jaxseq._recurrence import Cell, Gates, Pullback, StepResult
from jaxseq._types import LSTMState, PeepholeLSTMParams


def _step(a: Gates, s_prev: LSTMState, p: PeepholeLSTMParams) -> StepResult:
    a_i, a_f, a_g, a_o = a
    c = s_prev.c
    i, f, g = jax.nn.sigmoid(a_i + _scale(p.p_i, c)), jax.nn.sigmoid(a_f + _scale(p.p_f, c)), jnp.tanh(a_g)
    c = f * c + i * g
    o = jax.nn.sigmoid(a_o + _scale(p.p_o, c))
    return StepResult(LSTMState(o * jnp.tanh(c), c), (i, f, g, o))


def _pullback(residuals: PyTree, s_prev: LSTMState, s_bar: LSTMState, p: PeepholeLSTMParams) -> Pullback:
    i, f, g, o = residuals
    c = f * s_prev.c + i * g
    tanh_c = jnp.tanh(c)
    delta_o = s_bar.h * tanh_c * o * (1 - o)
    c_bar = s_bar.c + s_bar.h * o * (1 - tanh_c * tanh_c) + _scale(p.p_o, delta_o)
    delta_i = c_bar * g * i * (1 - i)
    delta_f = c_bar * s_prev.c * f * (1 - f)
    delta_g = c_bar * i * (1 - g * g)
    c_prev_bar = c_bar * f + _scale(p.p_i, delta_i) + _scale(p.p_f, delta_f)
    p_bar = p._replace(p_i=delta_i * s_prev.c, p_f=delta_f * s_prev.c, p_o=delta_o * c)
    s_prev_bar = LSTMState(jnp.zeros_like(s_bar.h), c_prev_bar)
    return Pullback((delta_i, delta_f, delta_g, delta_o), s_prev_bar, p_bar)


def _scale(p: jax.Array, a: jax.Array) -> jax.Array:
    """Multiply a (*B, H) by p (H,) elementwise."""
    return jnp.expand_dims(p, range(a.ndim - 1)) * a


def _replay(residuals: PyTree, s_prev: LSTMState, _: PeepholeLSTMParams) -> LSTMState:
    return _lstm.replay(residuals, s_prev)


peephole_lstm = Cell(
    name="peephole_lstm",
    gates="ifgo",
    step=_step,
    pullback=_pullback,
    replay=_replay,
    params=PeepholeLSTMParams,
    state=LSTMState,
)


@with_hints
def peephole_lstm_init(
    key: PRNGKeyArray,
    input_size: int,
    hidden_size: int,
    *,
    use_bias: bool = True,
    w_x_init: _init.Initializer | None = None,
    w_h_init: _init.Initializer | None = None,
    dtype: DTypeLike = jnp.float32,
) -> PeepholeLSTMParams:
    """Initialize `cells.peephole_lstm`: `w_x`, `w_h` and `b` as `jaxseq.lstm_init` does, peepholes zero.

    Args:
        key: a JAX random key.
        input_size: D.
        hidden_size: H.
        use_bias: if False, `b` is None.
        w_x_init: replaces the initializer of `w_x`: a function `(key, shape, dtype) -> array`, as in
            `jax.nn.initializers`, called for each gate with the shape (D, H).
        w_h_init: the same for `w_h`, with the shape (H, H).
        dtype: floating dtype of the parameters.

    Returns:
        `PeepholeLSTMParams(w_x, w_h, b, p_i, p_f, p_o)`.

    Raises:
        TypeError: if a size is not an integer, `dtype` is not a floating dtype, or an initializer is not a function.
        ValueError: if a size is less than 1.

    Example:
        >>> import jax, jax.numpy as jnp, jaxseq
        >>> params = jaxseq.cells.peephole_lstm_init(jax.random.key(0), 3, 5)
        >>> (h, c), ys = jaxseq.recurrence(jaxseq.cells.peephole_lstm, params, None, jnp.ones((7, 2, 3)))
        >>> ys.shape
        (7, 2, 5)

    Reference:
        F. A. Gers and J. Schmidhuber, Recurrent nets that time and count (2000).
    """
    w_x, w_h, b = _lstm.lstm_init(
        key, input_size, hidden_size, use_bias=use_bias, w_x_init=w_x_init, w_h_init=w_h_init, dtype=dtype
    )
    return PeepholeLSTMParams(w_x, w_h, b, *(jnp.zeros(hidden_size, w_x.dtype) for _ in "ifo"))
