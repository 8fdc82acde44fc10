r"""The linear AR(τ) model of K variables, fitted without an array of windows.

    x_t = b + sum_{j=1..τ} x_{t-j} A_j + noise                one variable: A_j = a_j, a number

With the windows w_t = (x_{t-1}, ..., x_{t-τ}, 1), least squares needs only the sums over t

    G = sum_t w_tᵀ w_t,      g = sum_t w_tᵀ x_t,      G (A, b) = g

Each block of entries is a product of the series with a shifted copy of itself. τ + 1 products and corrections at the
edges give all entries, without an array (T, τ K). The predictions for all t are a causal convolution with the kernel
(A_τ, ..., A_1).

A model for horizon h predicts x_t from x_{t-h}, ..., x_{t-h-τ+1}: its coefficients A_1 to A_{h-1} are zero.

The prediction of h steps is linear in the window. Its coefficients are the predictions from windows that are zero but
for one element, so a causal convolution gives the predictions of all t here, too.

Source: P. J. Brockwell and R. A. Davis, Time series: theory and methods, sections 8.1 and 11.5; G. U. Yule, On a method
of investigating periodicities in disturbed series (1927), which fits the sunspot numbers.
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
from jaxseq._op import with_hints
from jaxseq._types import AnyArray, Linear
from jaxseq.autoregressive._windows import longer, series


@with_hints
def fit(xs: Float[AnyArray, "T *K"], order: int, *, horizon: int = 1) -> Linear:
    r"""Fit $x_t = b + \sum_j x_{t-j} A_j$ by least squares over all t whose values on the right are in the series.

    The sum is over $j = h, \dots, h + \tau - 1$ with the horizon h, which is 1 for the value after the window.

    The normal equations are computed from sums over the series minus its mean, without an array of windows. In float32,
    use it only if the windows are well conditioned (condition number below a thousand). Otherwise use float64, or
    `jnp.linalg.lstsq` on `lagged` windows.

    Args:
        xs: the series, of one variable or of K.
        order: τ, the number of values in a window.
        horizon: h, the number of steps from the end of a window to the value that it predicts.

    Returns:
        `Linear(coefficients, intercept, variance)`, with h + τ - 1 coefficients, of which the first h - 1 are zero:
        `predict` needs no `horizon` for them.

    Raises:
        TypeError: if `xs` is not a float array.
        ValueError: if `xs` is not finite, has more than two axes, or has fewer steps than there are unknowns, which are
            1 + τ K for each variable; or if the solution is not unique, as for a constant series.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxseq import autoregressive
        >>> x = jnp.cos(0.7 * jnp.arange(200.0))
        >>> model = autoregressive.fit(x, 2)  # x_t = 2 cos(0.7) x_{t-1} - x_{t-2}
        >>> [round(float(a), 2) for a in model.coefficients]
        [1.53, -1.0]
        >>> autoregressive.fit(jnp.stack([x, x**2], -1), 1, horizon=3).coefficients.shape
        (3, 2, 2)

    Reference:
        P. J. Brockwell and R. A. Davis, Time series: theory and methods, chapters 5, 8 and 11.
    """
    x = _one_series("xs", xs)
    order, horizon = longer(x, order), _checks.integer("horizon", horizon, at_least=1)
    K = 1 if x.ndim == 1 else x.shape[1]
    if x.shape[0] < order + horizon - 1 + order * K + 1:
        most = (x.shape[0] - horizon) // (K + 1)
        if most < 1:
            _checks.bad_value("xs", f"at least {horizon + K + 1} steps, for order 1", str(x.shape[0]), xs=x)
        expected = f"at most {most}, so that there are no more unknowns than equations"
        _checks.bad_value("order", expected, str(order), xs=x)
    wide = x.astype(_precision.accumulator(x.dtype))
    model = _fit(wide[:, None] if x.ndim == 1 else wide, order, horizon)
    if x.ndim == 1:
        model = jax.tree.map(lambda a: a.reshape(a.shape[:1] if a.ndim == 3 else ()), model)
    model = _precision.cast(model, x.dtype)
    if not isinstance(x, Tracer) and not np.isfinite(np.asarray(model.coefficients, np.float64)).all():
        _checks.bad_value("xs", "a series with linearly independent windows", "a constant or too regular series")
    return model


@partial(jax.jit, static_argnums=(1, 2))
def _fit(x: jax.Array, order: int, horizon: int) -> Linear:
    """Fit a series (T, K)."""
    (T, K), mean, lags = x.shape, jnp.mean(x, 0), order + horizon - 1
    z = x - mean[None]
    count, dot = T - lags, partial(jnp.einsum, precision=lax.Precision.HIGHEST)

    # C[i, j] = sum_{t=L}^{T-1} z_{t-i}ᵀ z_{t-j} for L lags, blocks (K, K). The first row consists of products of the
    # series. Along a diagonal, the newest product is removed and an older one is added:
    #     C[i+1, j+1] = C[i, j] + z_{L-i-1}ᵀ z_{L-j-1} - z_{T-i-1}ᵀ z_{T-j-1}
    now = z[lags:]
    first = jnp.stack([dot("ta,tb->ab", now, lax.slice_in_dim(z, lags - j, T - j)) for j in range(lags + 1)])
    early, late = z[:lags][::-1], z[T - lags :][::-1]

    def next_row(row: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        grown = row[:-1] + dot("a,jb->jab", early[i], early) - dot("a,jb->jab", late[i], late)
        row = jnp.concatenate([jnp.zeros((1, K, K), row.dtype), grown])
        return row, row

    _, rows = lax.scan(next_row, first, jnp.arange(lags))
    upper = jnp.concatenate([first[None], rows])
    lower = upper.transpose(1, 0, 3, 2)
    number = jnp.arange(lags + 1)
    C = jnp.where((number[:, None] <= number[None])[..., None, None], upper, lower)
    sums = jnp.sum(now, 0)[None] + jnp.concatenate([jnp.zeros((1, K), x.dtype), jnp.cumsum(early - late, 0)])
    C = C - dot("ia,jb->ijab", sums, sums) / count  # eliminate b, the mean of x_t - sum_j x_{t-j} A_j
    G = C[horizon:, horizon:].transpose(0, 2, 1, 3).reshape(order * K, order * K)
    g = C[horizon:, 0].reshape(order * K, K)
    A = jnp.where(_is_regular(G, mean, count), jnp.linalg.solve(G, g), jnp.nan)
    residual = C[0, 0] - dot("ka,kb->ab", A, g)
    residual = jnp.where(jnp.eye(K, dtype=bool), jnp.maximum(residual, 0), residual)
    A = jnp.concatenate([jnp.zeros((horizon - 1, K, K), x.dtype), A.reshape(order, K, K)])
    b = mean + (sums[0] - dot("ja,jab->b", sums[1:], A)) / count - dot("a,jab->b", mean, A)
    return Linear(A, b, residual / count)


def _is_regular(G: jax.Array, mean: jax.Array, count: int) -> jax.Array:
    """True if the normal equations have one solution, up to rounding: nothing is constant, no windows are collinear.

    Rounding of a constant leaves differences to its mean of about eps times the mean.
    """
    eps, size = jnp.finfo(G.dtype).eps, G.shape[0]
    scale, steps = jnp.sqrt(jnp.diagonal(G)), jnp.sqrt(jnp.asarray(count).astype(G.dtype))  # `count` may be symbolic
    varies = jnp.all(scale > 4 * eps * steps * jnp.abs(jnp.tile(mean, size // mean.shape[0])))
    safe = jnp.where(scale > 0, scale, jnp.ones_like(scale))
    values = jnp.linalg.eigvalsh(jnp.where(varies, G / (safe[:, None] * safe[None]), jnp.eye(size, dtype=G.dtype)))
    return varies & (values[0] > size * eps * values[-1])


@with_hints
def predict(
    model: Linear, xs: Float[AnyArray, "T *K"], *, horizon: int | None = None
) -> Float[Array, "T *horizon_and_K"]:
    r"""Return the one-step predictions $b + \sum_j x_{t-j} A_j$ for $t = 0, \dots, T - 1$, by a causal convolution.

    Args:
        model: `Linear(coefficients, intercept, variance)`.
        xs: the series, of one variable or of K.
        horizon: h, to predict h values from the values before each t, with earlier predictions as inputs. None is one
            value, without an axis.

    Returns:
        `(T, ...)`: entry t is predicted from the values up to t - 1. With a horizon `(T, h, ...)`: the predictions of
        x_t, ..., x_{t+h-1} from the values up to t - 1. The first τ entries are not meaningful, because values before
        the series count as zero.

    Raises:
        TypeError: if `model` is not a `Linear`, or `xs` is not a float array.
        ValueError: if `xs` is not finite, has more than two axes, or another number of variables than `model`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxseq import autoregressive
        >>> model = autoregressive.Linear(jnp.array([2.0, -1.0]), jnp.array(0.0), jnp.array(0.0))
        >>> autoregressive.predict(model, jnp.array([1.0, 2.0, 3.0, 4.0])).tolist()
        [0.0, 2.0, 3.0, 4.0]
        >>> autoregressive.predict(model, jnp.array([1.0, 2.0, 3.0, 4.0]), horizon=3)[3].tolist()
        [4.0, 5.0, 6.0]

    Reference:
        P. J. Brockwell and R. A. Davis, Time series: theory and methods, chapters 5, 8 and 11.
    """
    x = _one_series("xs", xs)
    matrices = _matrices(model, x)
    steps = 1 if horizon is None else _checks.integer("horizon", horizon, at_least=1)
    order, K = matrices.coefficients.shape[:2]
    zero = jnp.zeros((order, K), x.dtype)
    intercepts = _recurse(matrices, zero, steps)  # (h, K)
    units = jnp.eye(order * K, dtype=x.dtype).reshape(order * K, order, K)
    of_units = jax.vmap(lambda window: _recurse(matrices, window, steps))(units) - intercepts[None]
    kernel = of_units.reshape(order, K, steps * K)[::-1]  # the most recent value last
    values = x.reshape(x.shape[0], K)
    before = jnp.concatenate([jnp.zeros((1, K), x.dtype), values])[:-1]
    found = conv(before, kernel, intercepts.reshape(-1), padding="CAUSAL")
    return found.reshape(x.shape[0], *(() if horizon is None else (steps,)), *x.shape[1:])


@with_hints
def forecast(model: Linear, xs: Float[AnyArray, "T *K"], steps: int) -> Float[Array, "steps *K"]:
    """Predict the values after the end of a series, using earlier predictions as inputs.

    Args:
        model: `Linear(coefficients, intercept, variance)`.
        xs: the series, of one variable or of K, with at least τ steps.
        steps: the number of values to predict.

    Returns:
        `(steps, ...)`.

    Raises:
        TypeError: if `model` is not a `Linear`, or `xs` is not a float array.
        ValueError: if `xs` is not finite, has more than two axes, another number of variables than `model` or fewer
            than τ steps, or `steps` is negative.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxseq import autoregressive
        >>> model = autoregressive.Linear(jnp.array([2.0, -1.0]), jnp.array(0.0), jnp.array(0.0))
        >>> autoregressive.forecast(model, jnp.array([3.0, 4.0]), 3).tolist()
        [5.0, 6.0, 7.0]

    Reference:
        P. J. Brockwell and R. A. Davis, Time series: theory and methods, chapters 5, 8 and 11.
    """
    x, steps = _one_series("xs", xs), _checks.integer("steps", steps, at_least=0)
    matrices = _matrices(model, x)
    order, K = matrices.coefficients.shape[:2]
    if x.shape[0] < order:
        _checks.bad_value("xs", f"at least {order} steps, the order of the model", str(x.shape[0]))
    newest = x[x.shape[0] - order :][::-1].reshape(order, K)
    return _recurse(matrices, newest, steps).reshape(steps, *x.shape[1:])


def _recurse(model: Linear, newest: jax.Array, steps: int) -> jax.Array:
    """Return `steps` predictions (steps, K) after a window (τ, K) with the most recent value first."""

    def step(newest: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        x = model.intercept + jnp.einsum("ja,jab->b", newest, model.coefficients, precision=lax.Precision.HIGHEST)
        return jnp.concatenate([x[None], newest[:-1]]), x

    return lax.scan(step, newest, None, steps)[1]


def _matrices(model: Linear, x: jax.Array) -> Linear:
    """Return the model with coefficients (τ, K, K) and intercept (K,) in the dtype of the series."""
    model = _precision.cast(jax.tree.map(jnp.asarray, _checks.container("model", model, Linear)), x.dtype)
    coefficients, intercept = model.coefficients, model.intercept
    sizes = x.shape[1:] * 2
    if not coefficients.shape[:1] > (0,) or coefficients.shape[1:] != sizes or intercept.shape != x.shape[1:]:
        got = f"coefficients {coefficients.shape} and intercept {intercept.shape}"
        expected = f"coefficients {('order', *sizes)} and intercept {x.shape[1:]}, the variables of `xs`".replace(
            "'", ""
        )
        _checks.bad_value("model", expected, got, xs=x)
    return Linear(coefficients.reshape(-1, *(sizes or (1, 1))), intercept.reshape(-1), model.variance)


def _one_series(name: str, xs: AnyArray) -> jax.Array:
    x = _checks.array(name, series(name, xs))
    if x.ndim > 2:
        _checks.bad_value(name, "shape (T,) or (T, K); use jax.vmap for several series", str(x.shape))
    return x
