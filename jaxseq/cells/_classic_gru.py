"""The original gated recurrent unit, with the reset gate applied before the recurrent product, as in Haiku and ONNX.

    r  = σ(u_r + r_r)              reset
    z  = σ(u_z + r_z)              update
    n  = tanh(u_n + (r h) W_q)     candidate, with a second recurrent product inside the step
    h' = (1 - z) n + z h

The recurrent map computes r_r and r_z only. Pullback, with the residuals (r, z, n) and q = r h:

    δn = h̄' (1 - z) (1 - n²)       the cotangent of u_n and of v = q W_q
    q̄  = δn W_qᵀ                   W̄_q = sum q ⊗ δn
    δr = q̄ h r (1 - r)
    δz = h̄' (h - n) z (1 - z)
    s̄_prev = h̄' z + q̄ r

Source: K. Cho et al., Learning phrase representations using RNN encoder-decoder (2014), section 2.3.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray, PyTree

from jaxseq import _checks, _init
from jaxseq._op import with_hints
from jaxseq._recurrence import Cell, Gates, Inner, Pullback, StepResult
from jaxseq._types import ClassicGRUParams


def _step(a: Gates, h_prev: jax.Array, L: Callable[[jax.Array], jax.Array]) -> StepResult:
    a_r, a_z, u_n = a
    r, z = jax.nn.sigmoid(a_r), jax.nn.sigmoid(a_z)
    n = jnp.tanh(u_n + L(r * h_prev))
    return StepResult((1 - z) * n + z * h_prev, (r, z, n))


def _pullback(residuals: PyTree, h_prev: jax.Array, h_bar: jax.Array, L: Inner) -> Pullback:
    r, z, n = residuals
    delta_n = h_bar * (1 - z) * (1 - n * n)
    q_bar = L.T(delta_n)
    delta_r = q_bar * h_prev * r * (1 - r)
    delta_z = h_bar * (h_prev - n) * z * (1 - z)
    h_prev_bar = h_bar * z + q_bar * r
    return Pullback((delta_r, delta_z, delta_n), h_prev_bar, inner=(r * h_prev, delta_n))


classic_gru = Cell(
    name="classic_gru", gates="rzn", input_only_gates="n", step=_step, pullback=_pullback, params=ClassicGRUParams
)


@with_hints
def classic_gru_init(
    key: PRNGKeyArray,
    input_size: int,
    hidden_size: int,
    *,
    use_bias: bool = True,
    w_x_init: _init.Initializer | None = None,
    w_h_init: _init.Initializer | None = None,
    dtype: DTypeLike = jnp.float32,
) -> ClassicGRUParams:
    """Initialize `cells.classic_gru`: normal `w_x` of variance 1 / D, an orthogonal recurrent block for each gate, zero
    bias.

    Args:
        key: a JAX random key.
        input_size: D.
        hidden_size: H.
        use_bias: if False, `b` is None.
        w_x_init: replaces the initializer of `w_x`: a function `(key, shape, dtype) -> array`, as in
            `jax.nn.initializers`, called for each gate with the shape (D, H).
        w_h_init: the same for `w_h` and `w_q`, with the shape (H, H).
        dtype: floating dtype of the parameters.

    Returns:
        `ClassicGRUParams(w_x, w_h, b, w_q)`.

    Raises:
        TypeError: if a size is not an integer, `dtype` is not a floating dtype, or an initializer is not a function.
        ValueError: if a size is less than 1.

    Example:
        >>> import jax, jax.numpy as jnp, jaxseq
        >>> params = jaxseq.cells.classic_gru_init(jax.random.key(0), 3, 5)
        >>> h, ys = jaxseq.recurrence(jaxseq.cells.classic_gru, params, None, jnp.ones((7, 2, 3)))
        >>> ys.shape
        (7, 2, 5)

    Reference:
        K. Cho et al., Learning phrase representations using RNN encoder-decoder (2014), section 2.3.
    """
    w_x, w_h, b = _init.matrices(key, input_size, hidden_size, 3, dtype, w_x_init=w_x_init, w_h_init=w_h_init)
    b = b if _checks.boolean("use_bias", use_bias) else None
    return ClassicGRUParams(w_x, w_h[:, : 2 * hidden_size], b, w_h[:, 2 * hidden_size :])
