r"""Log-likelihood of a sequence, log P(x_1, ..., x_T) = sum_t log P(x_t | x_<t), from the outputs of a model.

    categorical    log p[x] = a[x] - log sum_v exp a[v]                       with logits a
    normal         log p(x) = -(x - μ)² / 2σ² - log σ - log(2π) / 2           summed over features

Probabilities that do not sum to one raise an error if they are concrete, and give NaN if they are traced. A value out
of range gives NaN.
"""

from math import log, pi

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Integer

from jaxseq import _checks, _precision
from jaxseq._time import zero_padding
from jaxseq._types import AnyArray


def log_probability(
    xs: Integer[AnyArray, "*steps"],
    *,
    logits: Float[AnyArray, "*steps V"] | None = None,
    probabilities: Float[AnyArray, "*steps V"] | None = None,
) -> Float[Array, "*steps"]:
    r"""Return $\log P(x_t \mid x_{<t})$ of every step from the logits or probabilities of V values.

    Args:
        xs: the observed values, integers from 0 to V - 1. Values in the padding are arbitrary.
        logits: $a$, with $P = \operatorname{softmax}(a)$.
        probabilities: P, which sums to one.

    Returns:
        An array with the shape of `xs`. It is NaN where x is out of range, or where probabilities do not sum to one.

    Raises:
        TypeError: if both or neither of `logits` and `probabilities` are passed, or an array has another dtype.
        ValueError: if shapes do not match, or concrete probabilities are negative or do not sum to one within 1e-3
            (1e-2 in 16 bits). Under jit, such a step is NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxseq import autoregressive
        >>> autoregressive.log_probability(jnp.array([1]), probabilities=jnp.array([[0.5, 0.5]])).tolist()
        [-0.6931471824645996]

    Reference:
        C. M. Bishop, Pattern recognition and machine learning (2006), sections 2.3 and 13.1.
    """
    if (logits is None) == (probabilities is None):
        _checks.bad_type("logits", "either logits or probabilities", "both" if logits is not None else "neither")
    name, given = ("logits", logits) if logits is not None else ("probabilities", probabilities)
    a = _checks.array(name, given)
    passed, xs = xs, _checks.converted(xs)
    if not isinstance(xs, jax.Array | np.ndarray) or not jnp.issubdtype(xs.dtype, jnp.integer):
        _checks.not_an_array("xs", "an array of integers", passed)
    if not a.ndim or a.shape[:-1] != xs.shape or not a.shape[-1]:
        _checks.bad_value(name, f"shape {(*xs.shape, 'V')} = (*steps, V)", str(a.shape), xs=xs)
    x = jnp.asarray(xs)
    x = x.astype(jnp.int32) if x.dtype.itemsize < 4 else x  # in 8 bits V may overflow
    known = (x >= 0) & (x < a.shape[-1])
    if logits is not None:
        scores = a - jax.nn.logsumexp(a, -1, keepdims=True)
    else:
        bound = 1e-3 if jnp.finfo(a.dtype).bits > 16 else 1e-2
        total = jnp.sum(a.astype(_precision.accumulator(a.dtype)), -1)
        right = (jnp.abs(total - 1) <= bound) & jnp.all(a >= 0, -1)
        if not isinstance(right, Tracer) and not bool(jnp.all(right)):
            at = tuple(map(int, np.argwhere(~np.asarray(right))[0]))
            got = f"a sum of {float(total[at]):.6g}, the smallest {float(a[at].min()):.3g}, at {list(at)}"
            _checks.bad_value("probabilities", "numbers >= 0 that sum to one", got)
        known, scores = known & right, jnp.log(jnp.where(a > 0, a, 1)) + jnp.where(a > 0, 0, -jnp.inf).astype(a.dtype)
    picked = jnp.take_along_axis(scores, jnp.clip(x, 0, a.shape[-1] - 1)[..., None], -1)[..., 0]
    return jnp.where(known, picked, jnp.asarray(jnp.nan, a.dtype))


def log_normal(
    xs: Float[AnyArray, "*steps D"], mean: Float[AnyArray, "*steps D"], log_scale: Float[AnyArray, "..."]
) -> Float[Array, "*steps"]:
    r"""Return $\log p(x_t \mid x_{<t})$ of every step, the log density of independent normal features.

    $$\log p(x) = -\sum_d \frac{(x_d - \mu_d)^2}{2 \sigma_d^2} + \log \sigma_d + \tfrac12 \log 2 \pi$$

    Args:
        xs: the observed values, with features on the last axis.
        mean: μ, with the shape of `xs`.
        log_scale: log σ, with a shape that broadcasts to that of `xs`.

    Returns:
        An array with the shape of `xs` without its last axis.

    Raises:
        TypeError: if an array is not a float array.
        ValueError: if shapes do not match.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxseq import autoregressive
        >>> one = jnp.ones((1, 1))
        >>> autoregressive.log_normal(one, one, 0 * one).tolist()
        [-0.9189385175704956]

    Reference:
        C. M. Bishop, Pattern recognition and machine learning (2006), sections 2.3 and 13.1.
    """
    x, mu, log_sigma = (_checks.array(n, a) for n, a in (("xs", xs), ("mean", mean), ("log_scale", log_scale)))
    if not x.ndim:
        _checks.bad_value("xs", "shape (*steps, D)", "()")
    _checks.shape("mean", mu, x.shape, "(*steps, D)", xs=x)
    try:
        log_sigma = jnp.broadcast_to(log_sigma, x.shape)
    except ValueError:
        _checks.bad_value(
            "log_scale", f"shape {x.shape} = (*steps, D), or one that broadcasts", str(log_sigma.shape), xs=x
        )
    return -jnp.sum(((x - mu) * jnp.exp(-log_sigma)) ** 2 / 2 + log_sigma + log(2 * pi) / 2, -1)


def log_likelihood(
    log_probabilities: Float[AnyArray, "*time_and_batch"],
    *,
    lengths: Integer[AnyArray, "*batch"] | None = None,
    time_axis: int = 0,
) -> Float[Array, "*batch"]:
    r"""Return $\log P(x_1, \dots, x_T) = \sum_t \log P(x_t \mid x_{<t})$ of each sequence, up to its length.

    Args:
        log_probabilities: the log-probability of every step, for example from `log_probability` or `log_normal`.
        lengths: the length of each sequence, `(*batch,)` integers from 0 to T. The content of the padding, NaN
            included, affects no value and no gradient.
        time_axis: the axis of time.

    Returns:
        `(*batch,)`. The negative of its sum, divided by the sum of the lengths, is the mean cross-entropy per step, and
        the exponential of that is the perplexity.

    Raises:
        TypeError: if `log_probabilities` is not a float array, or `lengths` is not an integer array.
        ValueError: if `lengths` has another shape, or is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxseq import autoregressive
        >>> steps = jnp.array([[-1.0, -2.0], [-4.0, jnp.nan]])  # (T, batch)
        >>> autoregressive.log_likelihood(steps, lengths=jnp.array([2, 1])).tolist()
        [-5.0, -2.0]

    Reference:
        C. M. Bishop, Pattern recognition and machine learning (2006), sections 2.3 and 13.1.
    """
    a = _checks.array("log_probabilities", log_probabilities)
    if not a.ndim:
        _checks.bad_value("log_probabilities", "shape (T, *batch)", "()")
    axis = _checks.axis("time_axis", time_axis, a.ndim, 0)
    a = jnp.moveaxis(a, axis, 0)
    if lengths is not None:
        n = _checks.lengths("lengths", lengths, a.shape[1:], a.shape[0])
        a = zero_padding(jnp.arange(a.shape[0], dtype=n.dtype).reshape(-1, *(1,) * n.ndim) < n[None], a)
    return jnp.sum(a, 0, dtype=_precision.accumulator(a.dtype)).astype(a.dtype)
