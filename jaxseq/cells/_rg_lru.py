"""RG-LRU: the real-gated linear recurrent unit of Griffin. Its gates read the input only.

    r = σ(u_r)     i = σ(u_i)               u = x W_x + b, a block-diagonal map
    a = σ(Λ)^(8 r)
    h' = a h + sqrt(1 - a²) (i x)

In the form of `jaxseq.LinearCell`, v = sqrt(1 - a²) (i x). From log a, with log σ(Λ) = -log(1 + exp(-Λ)),

    1 - a² = -expm1(2 log a)

is accurate where a is close to 1. At a = 1 the derivative of the root is infinite, and is zero here.

    code    here
    rate    Λ

Source: S. De et al., Griffin: Mixing gated linear recurrences with local attention for efficient language models
(2024), section 2.4 and appendix A.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from jaxseq import _checks, _dense, _init, _precision
from jaxseq._op import with_hints
from jaxseq._pointwise import log_sigmoid
from jaxseq._recurrence import LinearCell, LinearProduct
from jaxseq._types import RGLRUParams
from jaxseq.linear_maps import BlockDiagonal

_EXPONENT = 8


def _coefficients(p: RGLRUParams, x: jax.Array, L: LinearProduct) -> tuple[jax.Array, jax.Array]:
    u_r, u_i = jnp.split(_dense.add_bias(L(p.w_x, x, BlockDiagonal()), p.b), 2, -1)
    log_sigma = jnp.expand_dims(log_sigmoid(p.rate), range(x.ndim - 1))
    log_a = _EXPONENT * jax.nn.sigmoid(u_r) * log_sigma
    squared = -jnp.expm1(2 * log_a)
    positive = squared > 0
    root = jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, 1)), 0)
    return jnp.exp(log_a), root * jax.nn.sigmoid(u_i) * x


rg_lru = LinearCell("rg_lru", coefficients=_coefficients, params=RGLRUParams)


@with_hints
def rg_lru_init(
    key: PRNGKeyArray,
    input_size: int,
    hidden_size: int,
    *,
    blocks: int = 1,
    use_bias: bool = True,
    w_x_init: _init.Initializer | None = None,
    dtype: DTypeLike = jnp.float32,
) -> RGLRUParams:
    r"""Initialize `cells.rg_lru`: $\sigma(\Lambda)^8$ uniform in [0.9, 0.999], normal blocks, zero bias.

    Args:
        key: a JAX random key.
        input_size: D, the number of input features.
        hidden_size: D as well: each feature has one state.
        blocks: N, the number of blocks of the map of the gates, a divisor of D.
        use_bias: if False, `b` is None.
        w_x_init: replaces the initializer of `w_x`, normal of variance N / D: a function
            `(key, shape, dtype) -> array`, as in `jax.nn.initializers`, called for each gate and block with the shape
            (D / N, D / N).
        dtype: floating dtype of the parameters.

    Returns:
        `RGLRUParams(rate (D,), w_x (N, D / N, 2, D / N), b (2 D,))`.

    Raises:
        TypeError: if a size is not an integer, `dtype` is not a floating dtype, or an initializer is not a function.
        ValueError: if a size is less than 1, the two sizes differ, or `blocks` does not divide D.

    Example:
        >>> import jax, jax.numpy as jnp, jaxseq
        >>> params = jaxseq.cells.rg_lru_init(jax.random.key(0), 6, 6, blocks=2)
        >>> h, ys = jaxseq.recurrence(jaxseq.cells.rg_lru, params, None, jnp.ones((7, 2, 6)))
        >>> ys.shape
        (7, 2, 6)

    Reference:
        S. De et al., Griffin: Mixing gated linear recurrences with local attention for efficient language models
        (2024), section 2.4.
    """
    D, H, dtype = _init.sizes(input_size, hidden_size, dtype)
    if D != H:
        _checks.bad_value("hidden_size", f"`input_size`, {D}: each feature has one state", str(H))
    n = _checks.integer("blocks", blocks, at_least=1)
    if D % n:
        _checks.bad_value("blocks", f"a divisor of `input_size`, {D}", str(n))
    size, (key_rate, key_x) = D // n, jax.random.split(key)
    blocks_of_x = [_init.input_map(w_x_init, k, (size, size), 2, dtype) for k in jax.random.split(key_x, n)]
    w_x = jnp.stack(blocks_of_x).reshape(n, size, 2, size)
    log_sigma = jnp.log(jax.random.uniform(key_rate, (D,), _precision.accumulator(dtype), 0.9, 0.999)) / _EXPONENT
    rate = (log_sigma - jnp.log(-jnp.expm1(log_sigma))).astype(dtype)  # log(p / (1 - p)), the inverse of σ
    return RGLRUParams(rate, w_x, jnp.zeros(2 * D, dtype) if _checks.boolean("use_bias", use_bias) else None)
