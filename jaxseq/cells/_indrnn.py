"""The independently recurrent network (IndRNN): the recurrent map is diagonal.

    h' = relu(u + w_h ⊙ h)

Pullback. Since relu'(a) = [a > 0] = [h' > 0], the only residual is h':

    δ = h̄' [h' > 0]             s̄_prev = 0: h reaches the next step only through the recurrent map

Source: S. Li, W. Li, C. Cook, C. Zhu and Y. Gao, Independently recurrent neural network (IndRNN) (2018), section 3.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from jaxseq import _checks, _init, _rnn
from jaxseq._op import with_hints
from jaxseq._recurrence import Cell
from jaxseq._types import IndRNNParams
from jaxseq.linear_maps import Diagonal

indrnn: Cell = _rnn.CELLS["relu"]._replace(name="indrnn", params=IndRNNParams, recurrent=Diagonal())


@with_hints
def indrnn_init(
    key: PRNGKeyArray,
    input_size: int,
    hidden_size: int,
    *,
    steps: int | None = None,
    use_bias: bool = True,
    w_x_init: _init.Initializer | None = None,
    w_h_init: _init.Initializer | None = None,
    dtype: DTypeLike = jnp.float32,
) -> IndRNNParams:
    r"""Initialize `cells.indrnn`: normal `w_x` of variance 1 / D, zero bias, recurrent weights uniform in [0, w].

    If `steps` is T, the bound is $w = 2^{1/T}$: over T steps, no state grows by more than a factor of two. If it is
    None, the bound is 1.

    Args:
        key: a JAX random key.
        input_size: D.
        hidden_size: H.
        steps: T, the length of the sequences, or None.
        use_bias: if False, `b` is None.
        w_x_init: replaces the initializer of `w_x`: a function `(key, shape, dtype) -> array`, as in
            `jax.nn.initializers`, called for each gate with the shape (D, H).
        w_h_init: the same for `w_h`, with the shape (1, H).
        dtype: floating dtype of the parameters.

    Returns:
        `IndRNNParams(w_x, w_h (1, H), b)`.

    Raises:
        TypeError: if a size is not an integer, `dtype` is not a floating dtype, or an initializer is not a function.
        ValueError: if a size is less than 1.

    Example:
        >>> import jax, jax.numpy as jnp, jaxseq
        >>> params = jaxseq.cells.indrnn_init(jax.random.key(0), 3, 5)
        >>> h, ys = jaxseq.recurrence(jaxseq.cells.indrnn, params, None, jnp.ones((7, 2, 3)))
        >>> ys.shape
        (7, 2, 5)

    Reference:
        S. Li, W. Li, C. Cook, C. Zhu and Y. Gao, Independently recurrent neural network (IndRNN) (2018), sections 3 and
        4.
    """
    rows, hidden, dtype = _init.sizes(input_size, hidden_size, dtype)
    top = 1.0 if steps is None else 2 ** (1 / _checks.integer("steps", steps, at_least=1))
    key_h = jax.random.fold_in(key, 1)
    if w_h_init is None:
        w_h = jax.random.uniform(key_h, (1, hidden), dtype, 0.0, top)
    else:
        w_h = _init.drawn("w_h_init", w_h_init, key_h, (1, hidden), dtype)
    if w_x_init is None:
        w_x = _init.matrix(key, rows, hidden, dtype)
    else:
        w_x = _init.drawn("w_x_init", w_x_init, key, (rows, hidden), dtype)
    return IndRNNParams(w_x, w_h, jnp.zeros(hidden, dtype) if _checks.boolean("use_bias", use_bias) else None)
