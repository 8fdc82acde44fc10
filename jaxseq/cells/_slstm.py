"""sLSTM: exponential gates with a stabilizer, and a separate recurrent map for each head.

    z = tanh(a_z)     o = σ(a_o)     ℓ = log σ(a_f)

    m' = max(ℓ + m, a_i)             stabilizer: the largest exponent so far, subtracted from both exponents
    i  = exp(a_i - m')
    f  = exp(ℓ + m - m')

    c' = f c + i z                   memory
    n' = f n + i                     normalizer
    h' = o c' / n'

n = 0 marks the initial state: there, m' = a_i and f = 0 for any m. In exact arithmetic h' does not depend on m', but c'
and n' do. The recurrent map is block diagonal, with one block for each head.

Pullback, with the residuals (i, f, z, o), σ(-a_f) = 1 - σ(a_f) and k = [ℓ + m > a_i, n ≠ 0]:

    q = c' / n'                      q̄ = h̄' o
    c̄ := c̄' + q̄ / n'                 n̄ := n̄' - q̄ q / n'         the total cotangents of c' and n'
    ī = (c̄ z + n̄) i                  the cotangent of the exponent a_i - m'
    f̄ = (c̄ c + n̄ n) f                the cotangent of the exponent ℓ + m - m'
    m̄ := m̄' - ī - f̄                  the total cotangent of m'
    δi = ī + m̄ (1 - k)               ℓ̄ = f̄ + m̄ k
    δf = ℓ̄ σ(-a_f)                   δz = c̄ i (1 - z²)           δo = h̄' q o (1 - o)
    c̄_prev = c̄ f                     n̄_prev = n̄ f                 m̄_prev = ℓ̄

Source: M. Beck et al., xLSTM: Extended long short-term memory (2024), section 2.2 and appendix A.2.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray, PyTree

from jaxseq import _checks, _init
from jaxseq._op import with_hints
from jaxseq._pointwise import log_sigmoid
from jaxseq._recurrence import Cell, Gates, Pullback, StepResult
from jaxseq._types import SLSTMParams, SLSTMState
from jaxseq.linear_maps import BlockDiagonal


def _step(a: Gates, s_prev: SLSTMState) -> StepResult:
    a_i, a_f, a_z, a_o = a
    _, c, n, m = s_prev
    z, o = jnp.tanh(a_z), jax.nn.sigmoid(a_o)
    forget_exponent = log_sigmoid(a_f) + m  # ℓ + m
    started = n != 0
    larger = started & (forget_exponent > a_i)
    m = jnp.where(larger, forget_exponent, a_i)
    i = jnp.exp(a_i - m)
    f = jnp.where(started, jnp.exp(jnp.where(started, forget_exponent - m, 0)), 0)
    c, n = f * c + i * z, f * n + i
    residuals = i, f, z, o, jax.nn.sigmoid(-a_f), larger.astype(f.dtype)
    return StepResult(SLSTMState(o * (c / n), c, n, m), residuals)


def _pullback(residuals: PyTree, s_prev: SLSTMState, s_bar: SLSTMState) -> Pullback:
    i, f, z, o, sigma_minus, k = residuals
    n = f * s_prev.n + i
    q = (f * s_prev.c + i * z) / n
    q_bar = s_bar.h * o
    c_bar, n_bar = s_bar.c + q_bar / n, s_bar.n - q_bar * q / n
    i_bar = (c_bar * z + n_bar) * i
    f_bar = (c_bar * s_prev.c + n_bar * s_prev.n) * f
    m_bar = s_bar.m - i_bar - f_bar
    ell_bar = f_bar + m_bar * k
    delta = i_bar + m_bar * (1 - k), ell_bar * sigma_minus, c_bar * i * (1 - z * z), s_bar.h * q * o * (1 - o)
    return Pullback(delta, SLSTMState(jnp.zeros_like(q_bar), c_bar * f, n_bar * f, ell_bar))


def _replay(residuals: PyTree, s_prev: SLSTMState) -> SLSTMState:
    i, f, z, *_ = residuals
    return s_prev._replace(c=f * s_prev.c + i * z, n=f * s_prev.n + i)  # the pullback does not read m


slstm = Cell(
    name="slstm",
    gates="ifzo",
    step=_step,
    pullback=_pullback,
    replay=_replay,
    params=SLSTMParams,
    state=SLSTMState,
    recurrent=BlockDiagonal(),
)


@with_hints
def slstm_init(
    key: PRNGKeyArray,
    input_size: int,
    hidden_size: int,
    *,
    heads: int = 1,
    use_bias: bool = True,
    w_x_init: _init.Initializer | None = None,
    w_h_init: _init.Initializer | None = None,
    dtype: DTypeLike = jnp.float32,
) -> SLSTMParams:
    """Initialize `cells.slstm`: normal `w_x` of variance 1 / D, an orthogonal recurrent block for each gate and head, a
    forget bias that increases from 3 to 6 over the units of each head, for a range of memory lengths, and zero bias
    elsewhere.

    Args:
        key: a JAX random key.
        input_size: D.
        hidden_size: H.
        heads: N, a divisor of H.
        use_bias: if False, `b` is None.
        w_x_init: replaces the initializer of `w_x`: a function `(key, shape, dtype) -> array`, as in
            `jax.nn.initializers`, called for each gate with the shape (D, H).
        w_h_init: the same for `w_h`, called for each gate and head, with the shape (H / N, H / N).
        dtype: floating dtype of the parameters.

    Returns:
        `SLSTMParams(w_x (D, 4 H), w_h (N, H / N, 4, H / N), b (4 H,))`.

    Raises:
        TypeError: if a size is not an integer, `dtype` is not a floating dtype, or an initializer is not a function.
        ValueError: if a size is less than 1, or `heads` does not divide H.

    Example:
        >>> import jax, jax.numpy as jnp, jaxseq
        >>> params = jaxseq.cells.slstm_init(jax.random.key(0), 3, 6, heads=2)
        >>> state, ys = jaxseq.recurrence(jaxseq.cells.slstm, params, None, jnp.ones((7, 2, 3)))
        >>> ys.shape
        (7, 2, 6)

    Reference:
        M. Beck et al., xLSTM: Extended long short-term memory (2024), section 2.2 and appendix A.2.
    """
    rows, hidden, dtype = _init.sizes(input_size, hidden_size, dtype)
    n = _checks.integer("heads", heads, at_least=1)
    if hidden % n:
        _checks.bad_value("heads", f"a divisor of `hidden_size`, {hidden}", str(n))
    key_x, key_h = jax.random.split(key)
    w_x = _init.input_map(w_x_init, key_x, (rows, hidden), 4, dtype)
    blocks = [_init.recurrent_map(w_h_init, k, hidden // n, 4, dtype) for k in jax.random.split(key_h, n)]
    w_h = jnp.stack(blocks).reshape(n, hidden // n, 4, hidden // n)
    b = jnp.zeros((4, n, hidden // n), dtype).at[1].set(jnp.linspace(3, 6, hidden // n, dtype=dtype))
    return SLSTMParams(w_x, w_h, b.reshape(-1) if _checks.boolean("use_bias", use_bias) else None)
