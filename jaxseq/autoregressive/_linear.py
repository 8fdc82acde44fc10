r"""The linear AR(τ) model, without laying out a window.

    x_t = b + sum_{j=1..τ} a_j x_{t-j} + noise

Least squares needs of the windows w_t = (x_{t-1}, ..., x_{t-τ}, 1) only the sums over t

    G = sum_t w_t w_tᵀ,      g = sum_t w_t x_t,      G (a, b) = g

each entry of which is an inner product of the series with itself, shifted: τ + 1 of them and their edges, no array of
(T, τ). The prediction for all t is a causal convolution with the kernel (a_τ, ..., a_1).

Source: P. J. Brockwell and R. A. Davis, Time series: theory and methods, section 8.1; G. U. Yule, On a method of
investigating periodicities in disturbed series (1927), who did it for the sunspots.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float

from jaxseq import _checks, _precision
from jaxseq._conv import conv
from jaxseq._types import AnyArray
from jaxseq.autoregressive._windows import longer, series


class Linear(NamedTuple):
    """A linear AR(τ) model.

    Attributes:
        coefficients: `(τ,)`, a_1 to a_τ, the nearest first.
        intercept: `()`, b.
        variance: `()`, of what is left over, the mean square on what was fitted.
    """

    coefficients: Float[Array, " order"]
    intercept: Float[Array, ""]
    variance: Float[Array, ""]


def fit(xs: Float[AnyArray, " T"], order: int) -> Linear:
    r"""Least squares of $x_t = b + \sum_j a_j x_{t-j}$ over $t = \tau, \dots, T - 1$.

    From sums over the series, as said above, of the series less its mean: no windows are laid out. In float32 take it
    for series whose windows are not nearly dependent (condition number below a thousand); else use float64, or
    `jnp.linalg.lstsq` on `lagged` windows.

    Args:
        xs: the series.
        order: τ.

    Returns:
        `Linear(coefficients, intercept, variance)`.

    Raises:
        TypeError: `xs` that is no array of floats.
        ValueError: NaN in `xs`; a series of more than one axis, or of fewer than 2τ + 1 steps, fewer equations than
            unknowns; one whose equations have no single solution, a constant.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxseq import autoregressive
        >>> model = autoregressive.fit(jnp.cos(0.7 * jnp.arange(200.0)), 2)  # x_t = 2 cos(0.7) x_{t-1} - x_{t-2}
        >>> [round(float(a), 2) for a in model.coefficients]
        [1.53, -1.0]

    Reference:
        P. J. Brockwell and R. A. Davis, Time series: theory and methods, chapters 5 and 8.
    """
    x = _one_series("xs", xs)
    order = longer(x, order)
    if x.shape[0] < 2 * order + 1:
        _checks.bad_value("order", f"at most {(x.shape[0] - 1) // 2}, as many unknowns as equations", str(order), xs=x)
    model = _precision.cast(_fit(x.astype(_precision.accumulator(x.dtype)), order), x.dtype)
    if not isinstance(x, Tracer) and not np.isfinite(np.asarray(model.coefficients, np.float64)).all():
        _checks.bad_value("xs", "a series whose past values are independent", "a constant, or too regular a one")
    return model


@partial(jax.jit, static_argnums=1)
def _fit(x: jax.Array, order: int) -> Linear:
    T, mean = x.shape[0], jnp.mean(x)
    z = x - mean
    count = T - order

    # C[i, j] = sum_{t=τ}^{T-1} z_{t-i} z_{t-j}. Its first row from shifted products; each next diagonal element loses
    # the newest product and wins one older: C[i+1, j+1] = C[i, j] + z_{τ-i-1} z_{τ-j-1} - z_{T-i-1} z_{T-j-1}.
    now = z[order:]
    first = jnp.stack([jnp.vdot(now, lax.slice_in_dim(z, order - j, T - j)) for j in range(order + 1)])
    early, late = z[:order][::-1], z[T - order :][::-1]

    def next_row(row: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        grown = row[:-1] + early[i] * early - late[i] * late
        row = jnp.concatenate([jnp.zeros((1,), row.dtype), grown])
        return row, row

    _, rows = lax.scan(next_row, first, jnp.arange(order))
    C = jnp.triu(jnp.concatenate([first[None], rows]))
    C = C + jnp.triu(C, 1).T
    sums = jnp.sum(now) + jnp.concatenate([jnp.zeros((1,), x.dtype), jnp.cumsum(early - late)])  # of z_{t-i}
    C = C - sums[:, None] * sums[None] / count  # b is the mean of what is left
    a = jnp.linalg.solve(C[1:, 1:], C[1:, 0])
    residual = jnp.maximum(C[0, 0] - jnp.vdot(a, C[1:, 0]), 0)
    b = mean + (sums[0] - jnp.vdot(a, sums[1:])) / count - mean * jnp.sum(a)
    return Linear(a, b, residual / count)


def predict(model: Linear, xs: Float[AnyArray, " T"]) -> Float[Array, " T"]:
    r"""$b + \sum_j a_j x_{t-j}$ for $t = 0, \dots, T - 1$, one step ahead from what is known: a causal convolution.

    Args:
        model: `Linear(coefficients, intercept, variance)`.
        xs: the series.

    Returns:
        `(T,)`: t is predicted from t - 1 and before. Zeros stand before the series, so that the first τ are no use.

    Raises:
        TypeError: `model` of another kind, `xs` that is no array of floats.
        ValueError: NaN in `xs`; a series of more than one axis.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxseq import autoregressive
        >>> model = autoregressive.Linear(jnp.array([2.0, -1.0]), jnp.array(0.0), jnp.array(0.0))
        >>> autoregressive.predict(model, jnp.array([1.0, 2.0, 3.0, 4.0])).tolist()
        [0.0, 2.0, 3.0, 4.0]

    Reference:
        P. J. Brockwell and R. A. Davis, Time series: theory and methods, chapters 5 and 8.
    """
    model = _checks.container("model", model, Linear)
    x = _one_series("xs", xs)
    kernel = model.coefficients[::-1, None, None].astype(x.dtype)
    before = jnp.concatenate([jnp.zeros((1,), x.dtype), x[:-1]])
    return conv(before[:, None], kernel, padding="CAUSAL")[:, 0] + model.intercept.astype(x.dtype)


def forecast(model: Linear, xs: Float[AnyArray, " T"], steps: int) -> Float[Array, " steps"]:
    """What follows the series, each value predicted from those predicted before it.

    Args:
        model: `Linear(coefficients, intercept, variance)`.
        xs: the series, of at least τ steps.
        steps: how many.

    Returns:
        `(steps,)`.

    Raises:
        TypeError: `model` of another kind, `xs` that is no array of floats.
        ValueError: NaN in `xs`; a series of more than one axis, or shorter than τ; steps below 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxseq import autoregressive
        >>> model = autoregressive.Linear(jnp.array([2.0, -1.0]), jnp.array(0.0), jnp.array(0.0))
        >>> autoregressive.forecast(model, jnp.array([3.0, 4.0]), 3).tolist()
        [5.0, 6.0, 7.0]

    Reference:
        P. J. Brockwell and R. A. Davis, Time series: theory and methods, chapters 5 and 8.
    """
    model = _checks.container("model", model, Linear)
    x, steps = _one_series("xs", xs), _checks.integer("steps", steps, at_least=0)
    order = model.coefficients.shape[0]
    if x.shape[0] < order:
        _checks.bad_value("xs", f"at least {order} steps, the order of the model", str(x.shape[0]))

    model = _precision.cast(model, x.dtype)

    def step(newest: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        x = model.intercept + jnp.vdot(model.coefficients, newest)
        return jnp.concatenate([x[None], newest[:-1]]), x

    return lax.scan(step, x[x.shape[0] - order :][::-1], None, steps)[1]


def _one_series(name: str, xs: AnyArray) -> jax.Array:
    x = _checks.array(name, series(name, xs))
    if x.ndim != 1:
        _checks.bad_value(name, "shape (T,), one series; jax.vmap over more", str(x.shape))
    return x
