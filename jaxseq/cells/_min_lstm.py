"""minLSTM: an LSTM whose gates read the input only and add up to one, so that it is linear in its state.

    f = σ(u_f)     i = σ(u_i)               u = x W_x + b
    h' = (f h + i u_n) / (f + i)

In the form of `jaxseq.LinearCell`, a = f / (f + i) and v = (1 - a) u_n. With d = log f - log i,

    f / (f + i) = σ(d)

which does not divide, so that both gates may underflow.

Source: L. Feng, F. Tung, M. O. Ahmed, Y. Bengio and H. Hajimirsadeghi, Were RNNs all we needed? (2024), section 3.2.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from jaxseq import _checks, _dense, _init
from jaxseq._op import with_hints
from jaxseq._pointwise import log_sigmoid
from jaxseq._recurrence import LinearCell, LinearProduct
from jaxseq._types import MinLSTMParams


def _coefficients(p: MinLSTMParams, x: jax.Array, L: LinearProduct) -> tuple[jax.Array, jax.Array]:
    u_f, u_i, u_n = jnp.split(_dense.add_bias(L(p.w_x, x), p.b), 3, -1)
    d = log_sigmoid(u_f) - log_sigmoid(u_i)
    return jax.nn.sigmoid(d), jax.nn.sigmoid(-d) * u_n


min_lstm = LinearCell("min_lstm", coefficients=_coefficients, params=MinLSTMParams)


@with_hints
def min_lstm_init(
    key: PRNGKeyArray,
    input_size: int,
    hidden_size: int,
    *,
    use_bias: bool = True,
    w_x_init: _init.Initializer | None = None,
    dtype: DTypeLike = jnp.float32,
) -> MinLSTMParams:
    """Initialize `cells.min_lstm`: normal `w_x` of variance 1 / D, zero bias.

    Args:
        key: a JAX random key.
        input_size: D.
        hidden_size: H.
        use_bias: if False, `b` is None.
        w_x_init: replaces the initializer of `w_x`: a function `(key, shape, dtype) -> array`, as in
            `jax.nn.initializers`, called for each gate with the shape (D, H).
        dtype: floating dtype of the parameters.

    Returns:
        `MinLSTMParams(w_x, b)`.

    Raises:
        TypeError: if a size is not an integer, `dtype` is not a floating dtype, or an initializer is not a function.
        ValueError: if a size is less than 1.

    Example:
        >>> import jax, jax.numpy as jnp, jaxseq
        >>> params = jaxseq.cells.min_lstm_init(jax.random.key(0), 3, 5)
        >>> h, ys = jaxseq.recurrence(jaxseq.cells.min_lstm, params, None, jnp.ones((7, 2, 3)))
        >>> ys.shape
        (7, 2, 5)

    Reference:
        L. Feng et al., Were RNNs all we needed? (2024), section 3.2.
    """
    D, H, dtype = _init.sizes(input_size, hidden_size, dtype)
    w_x = _init.input_map(w_x_init, key, (D, H), 3, dtype)
    return MinLSTMParams(w_x, jnp.zeros(3 * H, dtype) if _checks.boolean("use_bias", use_bias) else None)
