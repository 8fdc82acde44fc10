r"""Windows of the past: x_{t-τ}, ..., x_{t-1} beside x_t.

Windows overlap, so that laid out they take τ times the series. NumPy has views and so makes no copy; under JAX they are
one gather, of as few windows as are asked for (`every`, or a slice of targets in each training step). A model that is
linear in the window needs none at all: see `_linear.py`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int, Integer, Num

from jaxseq import _checks, _sizes
from jaxseq._types import AnyArray


def series(name: str, xs: Any) -> Any:
    """An array with time first, without NaN where its numbers are known."""
    given, xs = xs, _checks.converted(xs)
    if not isinstance(xs, jax.Array | np.ndarray) or xs.dtype == bool or xs.ndim < 1:
        _checks.not_an_array(name, "an array of numbers (T, ...)", given)
    if not isinstance(xs, Tracer) and jnp.issubdtype(xs.dtype, jnp.inexact):
        bad = np.argwhere(~np.isfinite(np.asarray(xs)))
        if bad.size:
            where = ", ".join(map(str, bad[0]))
            _checks.bad_value(name, "finite numbers", f"{np.asarray(xs)[tuple(bad[0])]} at [{where}]")
    return xs


def lagged(
    xs: Num[AnyArray, "T *features"], order: int, *, every: int = 1
) -> tuple[Num[AnyArray, "N order *features"], Num[AnyArray, "N *features"]]:
    r"""The windows of an AR(τ) model and what follows each: $(x_{t-\tau}, \dots, x_{t-1})$ and $x_t$.

    Args:
        xs: the series, time first: a NumPy array, of which the windows are a view, or a JAX array.
        order: τ, the same for all.
        every: from window to window, in steps.

    Returns:
        `(windows, targets)`: `(N, τ, ...)`, the oldest value first, and `(N, ...)`, for t = τ, τ + every, ...

    Raises:
        TypeError: `xs` that is no array of numbers; a τ that is no integer.
        ValueError: NaN in `xs`; a series that is not longer than the window.

    Example:
        >>> import numpy as np
        >>> from jaxseq import autoregressive
        >>> windows, targets = autoregressive.lagged(np.arange(5), 3)
        >>> windows.tolist(), targets.tolist()
        ([[0, 1, 2], [1, 2, 3]], [3, 4])

    Reference:
        A. Zhang, Z. C. Lipton, M. Li and A. J. Smola, Dive into deep learning, section 9.1.
    """
    xs, order, every = series("xs", xs), longer(xs, order), _checks.integer("every", every, at_least=1)
    if isinstance(xs, np.ndarray):
        windows = np.lib.stride_tricks.sliding_window_view(xs, order, 0)[:-1:every]
        return np.moveaxis(windows, -1, 1), xs[order::every]
    first = jnp.arange(0, xs.shape[0] - order, every)
    return xs[first[:, None] + jnp.arange(order)[None]], xs[order::every]


def longer(xs: Any, order: Any, name: str = "order") -> int:
    """τ, of which there has to be one window and one value after it."""
    order = _checks.integer(name, order, at_least=1)
    if _sizes.known(xs.shape[0]) and xs.shape[0] <= order:
        _checks.bad_value(name, f"a window shorter than the series, {xs.shape[0]} steps", str(order), xs=xs)
    return order


def histories(
    xs: Num[AnyArray, "T *features"], order: int | Integer[AnyArray, " T"], *, longest: int | None = None
) -> tuple[Num[Array, "T longest *features"], Int[Array, " T"]]:
    r"""Of every step the values before it, of which there may be fewer: τ varies.

    $x_{t-\tau_t}, \dots, x_{t-1}$ with $\tau_t = \min(\tau, t)$, or with a τ of its own for each step. They stand at
    the beginning of their row, zeros behind them, so that the second result is what recurrences take as `lengths`, for
    the first as a batch: `rnn(params, None, windows, lengths=lengths, time_axis=1)`. Targets are `xs`.

    Args:
        xs: the series, time first.
        order: τ; or `(T,)` integers, one for each step, at most `longest` of which count.
        longest: the largest τ, known when the function is traced; needed where `order` is an array that is not known.

    Returns:
        `(windows, lengths)`: `(T, longest, ...)` and `(T,)`.

    Raises:
        TypeError: `xs` that is no array of numbers; an order that holds no integers.
        ValueError: NaN in `xs`; an order of another shape, or below 0; a window longer than the series.

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
                _checks.bad_value("order", "integers of at least 0", str(int(np.asarray(order).min())))
            longest = int(np.asarray(order).max(initial=1)) if longest is None else longest
        lengths = jnp.asarray(order)
    else:
        order = _checks.integer("order", order, at_least=1)
        longest = order if longest is None else longest
        lengths = jnp.full((T,), order, jnp.int32)
    most = longer(xs, longest, "order" if longest is order else "longest")
    t, j = (jnp.arange(n, dtype=jnp.int32) for n in (T, most))
    lengths = jnp.minimum(jnp.clip(lengths, 0, most).astype(jnp.int32), t)
    place, seen = (t - lengths)[:, None] + j[None], j[None] < lengths[:, None]
    windows = xs[jnp.clip(place, 0, T - 1)]
    return jnp.where(seen.reshape(*seen.shape, *(1,) * (xs.ndim - 1)), windows, jnp.zeros((), xs.dtype)), lengths
