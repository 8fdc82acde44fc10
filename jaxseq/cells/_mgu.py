"""The minimal gated unit: a GRU whose reset and update gates are the same, applied after the recurrent product.

    f  = σ(u_f + r_f)
    n  = tanh(u_n + f m),  m = r_n      candidate; u_n and m are separate because f scales only m
    h' = (1 - f) n + f h

Pullback, with the residuals (f, n, m):

    n̄ = h̄' (1 - f)             δn = n̄ (1 - n²)             δm = δn f
    f̄ = h̄' (h - n) + δn m      δf = f̄ f (1 - f)            s̄_prev = h̄' f

Source: G.-B. Zhou, J. Wu, C.-L. Zhang and Z.-H. Zhou, Minimal gated unit for recurrent neural networks (2016). As in
Flax, f scales the recurrent product and not its operand.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray, PyTree

from jaxseq import _checks, _init
from jaxseq._op import with_hints
from jaxseq._recurrence import Cell, Gates, Pullback, StepResult
from jaxseq._types import MGUParams


def _step(a: Gates, h_prev: jax.Array) -> StepResult:
    a_f, (u_n, m) = a
    f = jax.nn.sigmoid(a_f)
    n = jnp.tanh(u_n + f * m)
    return StepResult((1 - f) * n + f * h_prev, (f, n, m))


def _pullback(residuals: PyTree, h_prev: jax.Array, h_bar: jax.Array) -> Pullback:
    f, n, m = residuals
    delta_n = h_bar * (1 - f) * (1 - n * n)
    delta_f = (h_bar * (h_prev - n) + delta_n * m) * f * (1 - f)
    return Pullback((delta_f, (delta_n, delta_n * f)), h_bar * f)


mgu = Cell(name="mgu", gates="fn", split_gates="n", step=_step, pullback=_pullback, params=MGUParams)


@with_hints
def mgu_init(
    key: PRNGKeyArray,
    input_size: int,
    hidden_size: int,
    *,
    use_bias: bool = True,
    w_x_init: _init.Initializer | None = None,
    w_h_init: _init.Initializer | None = None,
    dtype: DTypeLike = jnp.float32,
) -> MGUParams:
    """Initialize `cells.mgu`: normal `w_x` of variance 1 / D, an orthogonal block of `w_h` for each gate, zero biases.

    Args:
        key: a JAX random key.
        input_size: D.
        hidden_size: H.
        use_bias: if False, `b_x` and `b_h` are None.
        w_x_init: replaces the initializer of `w_x`: a function `(key, shape, dtype) -> array`, as in
            `jax.nn.initializers`, called for each gate with the shape (D, H).
        w_h_init: the same for `w_h`, with the shape (H, H).
        dtype: floating dtype of the parameters.

    Returns:
        `MGUParams(w_x, w_h, b_x, b_h)`.

    Raises:
        TypeError: if a size is not an integer, `dtype` is not a floating dtype, or an initializer is not a function.
        ValueError: if a size is less than 1.

    Example:
        >>> import jax, jax.numpy as jnp, jaxseq
        >>> params = jaxseq.cells.mgu_init(jax.random.key(0), 3, 5)
        >>> h, ys = jaxseq.recurrence(jaxseq.cells.mgu, params, None, jnp.ones((7, 2, 3)))
        >>> ys.shape
        (7, 2, 5)

    Reference:
        G.-B. Zhou, J. Wu, C.-L. Zhang and Z.-H. Zhou, Minimal gated unit for recurrent neural networks (2016).
    """
    w_x, w_h, b = _init.matrices(key, input_size, hidden_size, 2, dtype, w_x_init=w_x_init, w_h_init=w_h_init)
    return MGUParams(w_x, w_h, *((b, jnp.zeros_like(b)) if _checks.boolean("use_bias", use_bias) else (None, None)))
