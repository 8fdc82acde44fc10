"""minGRU: a GRU whose gates read the input only, so that it is linear in its state.

    z = σ(u_z)               u = x W_x + b
    h' = (1 - z) h + z u_n

In the form of `jaxseq.LinearCell`, a = 1 - z and v = z u_n.

Source: L. Feng, F. Tung, M. O. Ahmed, Y. Bengio and H. Hajimirsadeghi, Were RNNs all we needed? (2024), section 3.1.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from jaxseq import _checks, _dense, _init
from jaxseq._op import with_hints
from jaxseq._recurrence import LinearCell, LinearProduct
from jaxseq._types import MinGRUParams


def _coefficients(p: MinGRUParams, x: jax.Array, L: LinearProduct) -> tuple[jax.Array, jax.Array]:
    u_z, u_n = jnp.split(_dense.add_bias(L(p.w_x, x), p.b), 2, -1)
    return jax.nn.sigmoid(-u_z), jax.nn.sigmoid(u_z) * u_n


min_gru = LinearCell("min_gru", coefficients=_coefficients, params=MinGRUParams)


@with_hints
def min_gru_init(
    key: PRNGKeyArray,
    input_size: int,
    hidden_size: int,
    *,
    use_bias: bool = True,
    w_x_init: _init.Initializer | None = None,
    dtype: DTypeLike = jnp.float32,
) -> MinGRUParams:
    """Initialize `cells.min_gru`: normal `w_x` of variance 1 / D, zero bias.

    Args:
        key: a JAX random key.
        input_size: D.
        hidden_size: H.
        use_bias: if False, `b` is None.
        w_x_init: replaces the initializer of `w_x`: a function `(key, shape, dtype) -> array`, as in
            `jax.nn.initializers`, called for each gate with the shape (D, H).
        dtype: floating dtype of the parameters.

    Returns:
        `MinGRUParams(w_x, b)`.

    Raises:
        TypeError: if a size is not an integer, `dtype` is not a floating dtype, or an initializer is not a function.
        ValueError: if a size is less than 1.

    Example:
        >>> import jax, jax.numpy as jnp, jaxseq
        >>> params = jaxseq.cells.min_gru_init(jax.random.key(0), 3, 5)
        >>> h, ys = jaxseq.recurrence(jaxseq.cells.min_gru, params, None, jnp.ones((7, 2, 3)))
        >>> ys.shape
        (7, 2, 5)

    Reference:
        L. Feng et al., Were RNNs all we needed? (2024), section 3.1.
    """
    D, H, dtype = _init.sizes(input_size, hidden_size, dtype)
    w_x = _init.input_map(w_x_init, key, (D, H), 2, dtype)
    return MinGRUParams(w_x, jnp.zeros(2 * H, dtype) if _checks.boolean("use_bias", use_bias) else None)
