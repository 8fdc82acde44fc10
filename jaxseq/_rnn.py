"""The Elman network: h' = act(u + r).

    a  = u + r                  pre-activation
    h' = tanh(a)  or  relu(a)  or  act(a) for another function

Pullback. Since tanh' = 1 - tanh² and relu'(a) = [a > 0] = [h' > 0], the only residual is h':

    δ = h̄' (1 - h'²)   or   h̄' [h' > 0]
    s̄_prev = 0: h reaches the next step only through the recurrent map, whose pullback the engine computes.

JAX differentiates another function. The gradients of the maps are hand-derived for any function.

Source: J. L. Elman, Finding structure in time (1990).
"""

from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.lax import PrecisionLike
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from jaxseq import _checks, _init, _recurrence
from jaxseq._op import op, with_hints
from jaxseq._recurrence import SAME_AS_H, Gates, Pullback, StepResult
from jaxseq._time_options import TimeOptions
from jaxseq._types import AnyArray, RNNParams

Activation = Callable[[jax.Array], jax.Array]


def _relu(a: jax.Array) -> jax.Array:
    # Not jnp.maximum: its derivative at 0 is 1/2. The comparison a <= 0 propagates NaN.
    return jnp.where(a <= 0, 0, a)


def _cell(activation: Activation, derivative: Activation) -> _recurrence.Cell:
    def step(a: Gates, h_prev: jax.Array) -> StepResult:
        return StepResult(activation(a[0]), SAME_AS_H)

    def pullback(h: jax.Array, h_prev: jax.Array, h_bar: jax.Array) -> Pullback:
        return Pullback((h_bar * derivative(h),), jnp.zeros_like(h_bar))

    return _recurrence.Cell(name="rnn", gates="h", step=step, pullback=pullback, params=RNNParams)


CELLS = {
    "tanh": _cell(jnp.tanh, lambda h: 1 - h * h),
    "relu": _cell(_relu, lambda h: (h > 0).astype(h.dtype)),
}


# Functions whose derivative is known. JAX's relu has the derivative 0 at 0, as `_relu` has.
_KNOWN: dict[object, str] = {jnp.tanh: "tanh", jax.lax.tanh: "tanh", np.tanh: "tanh", jax.nn.relu: "relu"}


@lru_cache
def _cell_of(activation: Activation) -> _recurrence.Cell:
    def step(a: Gates, h_prev: jax.Array) -> jax.Array:
        return activation(a[0])

    return _recurrence.Cell(name="rnn", gates="h", step=step, params=RNNParams)


def _with_activation(activation: str | Activation) -> _recurrence.Cell:
    if not isinstance(activation, str) and callable(activation):
        if any(isinstance(part.cell_contents, Tracer) for part in getattr(activation, "__closure__", None) or ()):
            expected = "a function without traced values of its own; pass them in the parameters of a `jaxseq.Cell`"
            _checks.bad_type("activation", expected, _checks.describe(activation))
        if not isinstance(activation, Hashable):
            return _cell_of.__wrapped__(activation)
        name = _KNOWN.get(activation)
        return CELLS[name] if name else _cell_of(activation)
    if not isinstance(activation, str) or activation not in CELLS:
        names = ", ".join(map(repr, CELLS))
        _checks.bad_value("activation", f"one of {names}, or a function of one array", _checks.describe(activation))
    return CELLS[activation]


@op
def rnn(
    params: RNNParams,
    carry: Float[AnyArray, "*batch H"] | None,
    xs: Float[AnyArray, "*time_and_batch D"],
    *,
    activation: str | Callable[[jax.Array], jax.Array] = "tanh",
    **time: Unpack[TimeOptions],
) -> tuple[Float[Array, "*batch H"], Float[Array, "*time_and_batch H"]]:
    r"""Apply an Elman network to a sequence, with a hand-derived gradient.

    $$h_t = \mathrm{act}(x_t W_x + h_{t-1} W_h + b), \qquad y_t = h_t$$

    Args:
        params: `RNNParams(w_x (D, H), w_h (H, H), b (H,) or None)`.
        carry: the initial state `(*batch, H)`, or None for zeros.
        xs: the sequence `(T, *batch, D)`: time, then any number of batch axes, then features.
        activation: `"tanh"`, `"relu"`, or a function of one array, such as `jax.nn.gelu`, which JAX differentiates. The
            function is static under jit: create it once, without traced values of its own. The derivative of relu at 0
            is 0, as in `jax.nn.relu`.
        **time: time options, `jaxseq.TimeOptions`.

    Returns:
        `(carry, ys)`: the final state `(*batch, H)` in the dtype of `carry` (at least float32 for None), and the states
        of all steps `(T, *batch, H)` in the dtype of `xs`.

    Raises:
        TypeError: if `params` belongs to another cell, an array is not a float array, or an option has the wrong type.
        ValueError: if a rank or size does not match, or an option is out of range.

    Example:
        >>> import jax, jax.numpy as jnp, jaxseq
        >>> params = jaxseq.rnn_init(jax.random.key(0), 3, 5)
        >>> h, ys = jaxseq.rnn(params, None, jnp.ones((7, 2, 3)), activation="relu")
        >>> h.shape, ys.shape
        ((2, 5), (7, 2, 5))

    Reference:
        J. L. Elman, Finding structure in time (1990).
    """
    return _recurrence.sequence(_with_activation(activation), params, carry, xs, **time)


@op
def rnn_cell(
    params: RNNParams,
    carry: Float[AnyArray, "*batch H"] | None,
    x: Float[AnyArray, "*batch D"],
    *,
    activation: str | Callable[[jax.Array], jax.Array] = "tanh",
    precision: PrecisionLike = None,
) -> tuple[Float[Array, "*batch H"], Float[Array, "*batch H"]]:
    """Apply one step of `rnn`. `partial(rnn_cell, params)` is a body for `jax.lax.scan`.

    Args:
        params: `RNNParams(w_x (D, H), w_h (H, H), b (H,) or None)`.
        carry: the previous state `(*batch, H)`, or None for zeros.
            The new state has the dtype of `carry` (at least float32 for None). In bfloat16 it is rounded at every step.
        x: one input `(*batch, D)`.
        activation: `"tanh"`, `"relu"`, or a function of one array, as in `rnn`.
        precision: the precision of matrix products, as in `jax.lax.dot_general`.

    Returns:
        `(carry, y)`, both the new state `(*batch, H)`.

    Raises:
        TypeError: if `params` belongs to another cell, an array is not a float array, or an option has the wrong type.
        ValueError: if a rank or size does not match.

    Example:
        >>> import jax, jax.numpy as jnp, jaxseq
        >>> params = jaxseq.rnn_init(jax.random.key(0), 3, 5)
        >>> h, y = jaxseq.rnn_cell(params, None, jnp.ones((2, 3)))
        >>> y.shape
        (2, 5)

    Reference:
        J. L. Elman, Finding structure in time (1990).
    """
    return _recurrence.one_step(_with_activation(activation), params, carry, x, precision=precision)


@with_hints
def rnn_init(
    key: PRNGKeyArray,
    input_size: int,
    hidden_size: int,
    *,
    use_bias: bool = True,
    w_x_init: _init.Initializer | None = None,
    w_h_init: _init.Initializer | None = None,
    dtype: DTypeLike = jnp.float32,
) -> RNNParams:
    """Initialize `rnn`: normal `w_x` of variance 1 / D, orthogonal `w_h`, zero bias.

    Args:
        key: a JAX random key.
        input_size: D.
        hidden_size: H.
        use_bias: if False, `b` is None.
        w_x_init: replaces the initializer of `w_x`: a function `(key, shape, dtype) -> array`, as in
            `jax.nn.initializers`, called for each gate with the shape (D, H).
        w_h_init: the same for `w_h`, with the shape (H, H).
        dtype: floating dtype of the parameters.

    The variance of `w_x` assumes inputs of unit variance in each feature. One-hot inputs have far less: embed them or
    multiply `w_x` by sqrt(D).

    Returns:
        `RNNParams(w_x, w_h, b)`.

    Raises:
        TypeError: if a size is not an integer, `dtype` is not a floating dtype, or an initializer is not a function.
        ValueError: if a size is less than 1.

    Example:
        >>> import jax, jaxseq
        >>> jaxseq.rnn_init(jax.random.key(0), 3, 5).w_x.shape
        (3, 5)

    Reference:
        A. M. Saxe, J. L. McClelland and S. Ganguli, Exact solutions to the nonlinear dynamics of learning in deep
        linear neural networks (2014), section 3.
    """
    w_x, w_h, b = _init.matrices(key, input_size, hidden_size, 1, dtype, w_x_init=w_x_init, w_h_init=w_h_init)
    return RNNParams(w_x, w_h, b if _checks.boolean("use_bias", use_bias) else None)
