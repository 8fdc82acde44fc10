"""The gated recurrent unit, with the reset gate applied after the recurrent product.

    r  = σ(u_r + r_r)                  reset
    z  = σ(u_z + r_z)                  update
    n  = tanh(u_n + r m),  m = r_n     candidate; u_n and m are separate because r scales only m
    h' = (1 - z) n + z h

where u = x W_x + b_x and (r_r, r_z, r_n) = h W_h + b_h. This is the variant of cuDNN, PyTorch and Flax: r also scales
the bias of m, which is part of b_h.

Pullback, with σ' = σ (1 - σ), tanh' = 1 - tanh² and the residuals (r, z, n, m):

    n̄ = h̄' (1 - z)         z̄ = h̄' (h - n)         s̄_prev = h̄' z
    δn = n̄ (1 - n²)        the cotangent of u_n
    δm = δn r              the cotangent of m
    δr = δn m r (1 - r)
    δz = z̄ z (1 - z)

Source: K. Cho et al., Learning phrase representations using RNN encoder-decoder (2014), section 2.3.
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
from jaxseq._types import AnyArray, GRUParams


def step(a: Gates, h_prev: jax.Array) -> StepResult:
    a_r, a_z, (u_n, m) = a
    r, z = jax.nn.sigmoid(a_r), jax.nn.sigmoid(a_z)
    n = jnp.tanh(u_n + r * m)
    return StepResult((1 - z) * n + z * h_prev, (r, z, n, m))


def pullback(residuals: PyTree, h_prev: jax.Array, h_bar: jax.Array) -> Pullback:
    r, z, n, m = residuals
    n_bar, z_bar = h_bar * (1 - z), h_bar * (h_prev - n)
    delta_n = n_bar * (1 - n * n)
    delta_m = delta_n * r
    delta_r = delta_n * m * r * (1 - r)
    delta_z = z_bar * z * (1 - z)
    return Pullback((delta_r, delta_z, (delta_n, delta_m)), h_bar * z)


CELL = _recurrence.Cell(name="gru", gates="rzn", split_gates="n", step=step, pullback=pullback, params=GRUParams)


@op
def gru(
    params: GRUParams,
    carry: Float[AnyArray, "*batch H"] | None,
    xs: Float[AnyArray, "*time_and_batch D"],
    **time: Unpack[TimeOptions],
) -> tuple[Float[Array, "*batch H"], Float[Array, "*time_and_batch H"]]:
    r"""Apply a gated recurrent unit (GRU) to a sequence, with a hand-derived gradient.

    $$\begin{aligned}
    r_t &= \sigma(x_t W_{xr} + b_{xr} + h_{t-1} W_{hr} + b_{hr}) \\
    z_t &= \sigma(x_t W_{xz} + b_{xz} + h_{t-1} W_{hz} + b_{hz}) \\
    n_t &= \tanh(x_t W_{xn} + b_{xn} + r_t \odot (h_{t-1} W_{hn} + b_{hn})) \\
    h_t &= (1 - z_t) \odot n_t + z_t \odot h_{t-1}, \qquad y_t = h_t
    \end{aligned}$$

    The reset gate acts after the recurrent product, as in cuDNN, PyTorch and Flax.

    Args:
        params: `GRUParams(w_x (D, 3H), w_h (H, 3H), b_x, b_h)`, gates in the order r, z, n; each bias `(3H,)` or None.
        carry: the initial state `(*batch, H)`, or None for zeros.
        xs: the sequence `(T, *batch, D)`: time, then any number of batch axes, then features.
        **time: time options, `jaxseq.TimeOptions`.

    Returns:
        `(carry, ys)`: the final state `(*batch, H)` in the dtype of `carry` (at least float32 for None), and the states
        of all steps `(T, *batch, H)` in the dtype of `xs`.

    Raises:
        TypeError: if `params` belongs to another cell, an array is not a float array, or an option has the wrong type.
        ValueError: if a rank or size does not match, or an option is out of range.

    Example:
        >>> import jax, jax.numpy as jnp, jaxseq
        >>> params = jaxseq.gru_init(jax.random.key(0), 3, 5)
        >>> h, ys = jaxseq.gru(params, None, jnp.ones((7, 2, 3)), truncation=4)
        >>> h.shape, ys.shape
        ((2, 5), (7, 2, 5))

    Reference:
        K. Cho et al., Learning phrase representations using RNN encoder-decoder (2014), section 2.3.
    """
    return _recurrence.sequence(CELL, params, carry, xs, **time)


@op
def gru_cell(
    params: GRUParams,
    carry: Float[AnyArray, "*batch H"] | None,
    x: Float[AnyArray, "*batch D"],
    *,
    precision: PrecisionLike = None,
) -> tuple[Float[Array, "*batch H"], Float[Array, "*batch H"]]:
    """Apply one step of `gru`. `partial(gru_cell, params)` is a body for `jax.lax.scan`.

    Args:
        params: `GRUParams(w_x (D, 3H), w_h (H, 3H), b_x, b_h)`, gates in the order r, z, n; each bias `(3H,)` or None.
        carry: the previous state `(*batch, H)`, or None for zeros.
            The new state has the dtype of `carry` (at least float32 for None). In bfloat16 it is rounded at every step.
        x: one input `(*batch, D)`.
        precision: the precision of matrix products, as in `jax.lax.dot_general`.

    Returns:
        `(carry, y)`, both the new state `(*batch, H)`.

    Raises:
        TypeError: if `params` belongs to another cell, an array is not a float array, or an option has the wrong type.
        ValueError: if a rank or size does not match.

    Example:
        >>> import jax, jax.numpy as jnp, jaxseq
        >>> params = jaxseq.gru_init(jax.random.key(0), 3, 5)
        >>> h, y = jaxseq.gru_cell(params, None, jnp.ones((2, 3)))
        >>> y.shape
        (2, 5)

    Reference:
        K. Cho et al., Learning phrase representations using RNN encoder-decoder (2014), section 2.3.
    """
    return _recurrence.one_step(CELL, params, carry, x, precision=precision)


@with_hints
def gru_init(
    key: PRNGKeyArray,
    input_size: int,
    hidden_size: int,
    *,
    use_bias: bool = True,
    w_x_init: _init.Initializer | None = None,
    w_h_init: _init.Initializer | None = None,
    dtype: DTypeLike = jnp.float32,
) -> GRUParams:
    """Initialize `gru`: normal `w_x` of variance 1 / D, an orthogonal block of `w_h` for each gate, zero biases.

    Args:
        key: a JAX random key.
        input_size: D.
        hidden_size: H.
        use_bias: if False, `b_x` and `b_h` are None.
        w_x_init: replaces the initializer of `w_x`: a function `(key, shape, dtype) -> array`, as in
            `jax.nn.initializers`, called for each gate with the shape (D, H).
        w_h_init: the same for `w_h`, with the shape (H, H).
        dtype: floating dtype of the parameters.

    The variance of `w_x` assumes inputs of unit variance in each feature. One-hot inputs have far less: embed them or
    multiply `w_x` by sqrt(D).

    Returns:
        `GRUParams(w_x, w_h, b_x, b_h)`.

    Raises:
        TypeError: if a size is not an integer, `dtype` is not a floating dtype, or an initializer is not a function.
        ValueError: if a size is less than 1.

    Example:
        >>> import jax, jaxseq
        >>> jaxseq.gru_init(jax.random.key(0), 3, 5).w_h.shape
        (5, 15)

    Reference:
        A. M. Saxe, J. L. McClelland and S. Ganguli, Exact solutions to the nonlinear dynamics of learning in deep
        linear neural networks (2014), section 3.
    """
    w_x, w_h, b = _init.matrices(key, input_size, hidden_size, 3, dtype, w_x_init=w_x_init, w_h_init=w_h_init)
    return GRUParams(w_x, w_h, *((b, jnp.zeros_like(b)) if _checks.boolean("use_bias", use_bias) else (None, None)))
