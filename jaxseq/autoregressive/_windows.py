r"""Sliding windows over a series: the values x_{t-τ}, ..., x_{t-1} before each target x_t.

An array of all windows is τ times as large as the series. For a NumPy array it is a view, without a copy. For a JAX
array it is one gather of the requested windows: use `every`, or a slice of the targets at each training step. A linear
model needs no windows, see `_linear.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int, Integer, Num

from jaxseq import _checks, _sizes
from jaxseq._op import with_hints
from jaxseq._types import AnyArray


def series(name: str, xs: object) -> AnyArray:
    """Return `xs` if it is an array of numbers `(T, ...)`. Concrete values must be finite."""
    passed, xs = xs, _checks.converted(xs)
    if not isinstance(xs, jax.Array | np.ndarray) or xs.dtype == bool or xs.ndim < 1:
        _checks.not_an_array(name, "an array of numbers (T, ...)", passed)
    if not isinstance(xs, Tracer) and jnp.issubdtype(xs.dtype, jnp.inexact):
        bad = np.argwhere(~np.isfinite(np.asarray(xs)))
        if bad.size:
            where = ", ".join(map(str, bad[0]))
            _checks.bad_value(name, "finite numbers", f"{np.asarray(xs)[tuple(bad[0])]} at [{where}]")
    return xs


@with_hints
def lagged(
    xs: Num[AnyArray, "T *features"], order: int, *, every: int = 1, horizon: int | None = None
) -> tuple[Num[AnyArray, "N order *features"], Num[AnyArray, "N *horizon_and_features"]]:
    r"""Return the windows of an AR(τ) model and their targets: $(x_{t-\tau}, \dots, x_{t-1})$ and $x_t$.

    With a horizon h, the targets are the next h values, $(x_t, \dots, x_{t+h-1})$.

    Args:
        xs: the series, time first. For a NumPy array, the windows are a view.
        order: τ, the size of the windows.
        every: the number of steps between the starts of windows.
        horizon: h, the number of values in a target. None is one value, without an axis.

    Returns:
        `(windows, targets)`: `(N, τ, ...)`, the oldest value first, and `(N, ...)`, for t = τ, τ + every, ... With a
        horizon, targets are `(N, h, ...)`.

    Raises:
        TypeError: if `xs` is not an array of numbers, or `order` is not an integer.
        ValueError: if `xs` is not finite, or has fewer than τ + 1 steps, or τ + h with a horizon.

    Example:
        >>> import numpy as np
        >>> from jaxseq import autoregressive
        >>> windows, targets = autoregressive.lagged(np.arange(5), 3)
        >>> windows.tolist(), targets.tolist()
        ([[0, 1, 2], [1, 2, 3]], [3, 4])
        >>> windows, targets = autoregressive.lagged(np.arange(5), 2, horizon=2)
        >>> windows.tolist(), targets.tolist()
        ([[0, 1], [1, 2]], [[2, 3], [3, 4]])

    Reference:
        A. Zhang, Z. C. Lipton, M. Li and A. J. Smola, Dive into deep learning, section 9.1.
    """
    xs, order, every = series("xs", xs), longer(xs, order), _checks.integer("every", every, at_least=1)
    size = 1 if horizon is None else _checks.integer("horizon", horizon, at_least=1)
    if _sizes.is_concrete(xs.shape[0]) and xs.shape[0] < order + size:
        _checks.bad_value("horizon", f"at most {xs.shape[0] - order}, the steps after a window", str(size), xs=xs)
    last = xs.shape[0] - order - size + 1
    if isinstance(xs, np.ndarray):
        view = np.lib.stride_tricks.sliding_window_view
        windows, targets = (np.moveaxis(view(a, n, 0), -1, 1) for a, n in ((xs, order), (xs[order:], size)))
        targets = targets[:last:every]
        return windows[:last:every], targets[:, 0] if horizon is None else targets
    first = jnp.arange(0, last, every)
    windows = xs[first[:, None] + jnp.arange(order)[None]]
    if horizon is None:
        return windows, xs[order::every]
    return windows, xs[order + first[:, None] + jnp.arange(size)[None]]


def longer(xs: AnyArray, order: object, name: str = "order") -> int:
    """Return τ as an integer. The series must have one window and a value after it."""
    order = _checks.integer(name, order, at_least=1)
    if _sizes.is_concrete(xs.shape[0]) and xs.shape[0] <= order:
        _checks.bad_value(name, f"less than {xs.shape[0]}, the number of steps", str(order), xs=xs)
    return order


@with_hints
def histories(
    xs: Num[AnyArray, "T *features"], order: int | Integer[AnyArray, " T"], *, longest: int | None = None
) -> tuple[Num[Array, "T longest *features"], Int[Array, " T"]]:
    r"""Return the values before every step, in windows of variable length.

    The window of step t is $x_{t-\tau_t}, \dots, x_{t-1}$ with $\tau_t = \min(\tau, t)$, padded with zeros at the end.
    The two results are a batch and its `lengths` for a recurrence: `rnn(params, None, windows, lengths=lengths,
    time_axis=1)`. The targets are `xs`.

    Args:
        xs: the series, time first.
        order: τ, or `(T,)` integers, one for each step. Larger values than `longest` count as `longest`.
        longest: the largest τ, a static integer. It is required if `order` is a traced array.

    Returns:
        `(windows, lengths)`: `(T, longest, ...)` and `(T,)`.

    Raises:
        TypeError: if `xs` is not an array of numbers, or `order` is not an integer or an array of integers.
        ValueError: if `xs` is not finite, `order` has another shape or is negative, or a window is not shorter than the
            series.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxseq import autoregressive
        >>> windows, lengths = autoregressive.histories(jnp.array([1, 2, 3, 4]), 2)
        >>> windows.tolist(), lengths.tolist()
        ([[0, 0], [1, 0], [1, 2], [2, 3]], [0, 1, 2, 2])

    Reference:
        A. Zhang, Z. C. Lipton, M. Li and A. J. Smola, Dive into deep learning, section 9.1.
    """
    xs, order = jnp.asarray(series("xs", xs)), _checks.converted(order)
    T = xs.shape[0]
    if isinstance(order, jax.Array | np.ndarray) and order.ndim:
        if not jnp.issubdtype(order.dtype, jnp.integer):
            _checks.bad_type("order", "an integer, or an array of integers", _checks.describe(order))
        _checks.shape("order", jnp.asarray(order), (T,), "(T,)", xs=xs)
        if isinstance(order, Tracer):
            if longest is None:
                _checks.bad_type("longest", "an integer, since `order` is traced", "None")
        else:
            if T and int(np.asarray(order).min()) < 0:
                _checks.bad_value("order", "integers >= 0", str(int(np.asarray(order).min())))
            longest = int(np.asarray(order).max(initial=1)) if longest is None else longest
        lengths = jnp.asarray(order)
    else:
        order = _checks.integer("order", order, at_least=1)
        longest = order if longest is None else longest
        lengths = jnp.full((T,), order, jnp.int32)
    most = longer(xs, longest, "order" if longest is order else "longest")
    t, j = (jnp.arange(n, dtype=jnp.int32) for n in (T, most))
    lengths = jnp.minimum(jnp.clip(lengths, 0, most).astype(jnp.int32), t)
    index, valid = (t - lengths)[:, None] + j[None], j[None] < lengths[:, None]
    windows = xs[jnp.clip(index, 0, T - 1)]
    return jnp.where(valid.reshape(*valid.shape, *(1,) * (xs.ndim - 1)), windows, jnp.zeros((), xs.dtype)), lengths
