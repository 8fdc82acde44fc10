r"""The linear AR(τ) model, fitted without an array of windows.

    x_t = b + sum_{j=1..τ} a_j x_{t-j} + noise

With the windows w_t = (x_{t-1}, ..., x_{t-τ}, 1), least squares needs only the sums over t

    G = sum_t w_t w_tᵀ,      g = sum_t w_t x_t,      G (a, b) = g

Each entry is an inner product of the series with a shifted copy of itself. τ + 1 inner products and corrections at the
edges give all entries, without an array (T, τ). The predictions for all t are a causal convolution with the kernel
(a_τ, ..., a_1).

Source: P. J. Brockwell and R. A. Davis, Time series: theory and methods, section 8.1; G. U. Yule, On a method of
investigating periodicities in disturbed series (1927), which fits the sunspot numbers.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float

from jaxseq import _checks, _precision
from jaxseq._conv import conv
from jaxseq._types import AnyArray, Linear
from jaxseq.autoregressive._windows import longer, series


def fit(xs: Float[AnyArray, " T"], order: int) -> Linear:
    r"""Fit $x_t = b + \sum_j a_j x_{t-j}$ for $t = \tau, \dots, T - 1$ by least squares.

    The normal equations are computed from sums over the series minus its mean, without an array of windows. In float32,
    use it only if the windows are well conditioned (condition number below a thousand). Otherwise use float64, or
    `jnp.linalg.lstsq` on `lagged` windows.

    Args:
        xs: the series.
        order: τ.

    Returns:
        `Linear(coefficients, intercept, variance)`.

    Raises:
        TypeError: if `xs` is not a float array.
        ValueError: if `xs` is not finite, has more than one axis, or has fewer than 2τ + 1 steps, which gives fewer
            equations than unknowns; or if the solution is not unique, as for a constant series.

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
        expected = f"at most {(x.shape[0] - 1) // 2}, so that there are no more unknowns than equations"
        _checks.bad_value("order", expected, str(order), xs=x)
    model = _precision.cast(_fit(x.astype(_precision.accumulator(x.dtype)), order), x.dtype)
    if not isinstance(x, Tracer) and not np.isfinite(np.asarray(model.coefficients, np.float64)).all():
        _checks.bad_value("xs", "a series with linearly independent windows", "a constant or too regular series")
    return model


@partial(jax.jit, static_argnums=1)
def _fit(x: jax.Array, order: int) -> Linear:
    T, mean = x.shape[0], jnp.mean(x)
    z = x - mean
    count = T - order

    # C[i, j] = sum_{t=τ}^{T-1} z_{t-i} z_{t-j}. The first row consists of inner products. Along a diagonal, the newest
    # product is removed and an older one is added:
    #     C[i+1, j+1] = C[i, j] + z_{τ-i-1} z_{τ-j-1} - z_{T-i-1} z_{T-j-1}
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
    sums = jnp.sum(now) + jnp.concatenate([jnp.zeros((1,), x.dtype), jnp.cumsum(early - late)])  # sum_t z_{t-i}
    C = C - sums[:, None] * sums[None] / count  # eliminate b, the mean of x_t - sum_j a_j x_{t-j}
    a = jnp.linalg.solve(C[1:, 1:], C[1:, 0])
    residual = jnp.maximum(C[0, 0] - jnp.vdot(a, C[1:, 0]), 0)
    b = mean + (sums[0] - jnp.vdot(a, sums[1:])) / count - mean * jnp.sum(a)
    return Linear(a, b, residual / count)


def predict(model: Linear, xs: Float[AnyArray, " T"]) -> Float[Array, " T"]:
    r"""Return the one-step predictions $b + \sum_j a_j x_{t-j}$ for $t = 0, \dots, T - 1$, by a causal convolution.

    Args:
        model: `Linear(coefficients, intercept, variance)`.
        xs: the series.

    Returns:
        `(T,)`: entry t is predicted from the values up to t - 1. The first τ predictions are not meaningful, because
        values before the series count as zero.

    Raises:
        TypeError: if `model` is not a `Linear`, or `xs` is not a float array.
        ValueError: if `xs` is not finite, or has more than one axis.

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
    """Predict the values after the end of a series, using earlier predictions as inputs.

    Args:
        model: `Linear(coefficients, intercept, variance)`.
        xs: the series, with at least τ steps.
        steps: the number of values to predict.

    Returns:
        `(steps,)`.

    Raises:
        TypeError: if `model` is not a `Linear`, or `xs` is not a float array.
        ValueError: if `xs` is not finite, has more than one axis or fewer than τ steps, or `steps` is negative.

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
        _checks.bad_value(name, "shape (T,); use jax.vmap for several series", str(x.shape))
    return x
