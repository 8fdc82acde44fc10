"""Plots of the diagnostics. Matplotlib is imported only here, when a plot is made."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from jaxseq import _checks
from jaxseq._types import AnyArray
from jaxseq.diagnostics._lyapunov import Lyapunov
from jaxseq.diagnostics._truncation import TruncationBias, within

# Annotations are executed in tests, and must not import matplotlib.
if TYPE_CHECKING:
    from matplotlib.axes import Axes
else:
    Axes = object

Result = TypeVar("Result")
Numbers = AnyArray | Sequence[float | int]

VANISHED = 1e-3  # fraction of the largest norm below which a gradient counts as vanished
INK, FAINT = "0.25", "0.85"


def _axes(ax: Axes | None) -> Axes:
    """Return `ax`, or the axes of a new figure if it is None."""
    if ax is not None:
        return ax
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ModuleNotFoundError as error:
        error.add_note("The plots need matplotlib: pip install matplotlib.")
        raise
    return Figure(figsize=(7, 4), layout="constrained").add_subplot()


def _named(argument: str, value: Result | Mapping[str, Result], kind: type[Result]) -> Mapping[str, Result]:
    """Return a mapping from names to results. The name of a single result is empty."""
    named = value if isinstance(value, Mapping) else {"": value}
    for one in named.values():
        _checks.container(argument, one, kind)
    return named


def _finished(ax: Axes) -> Axes:
    ax.grid(color=FAINT, lw=0.5)
    ax.legend(frameon=False)
    return ax


def _log_scale(ax: Axes) -> None:
    """Use a logarithmic y axis if any plotted value is positive."""
    drawn = [np.asarray(line.get_ydata(), float) for line in ax.lines]
    if any((y > 0).any() for y in drawn):
        ax.set_yscale("log")


def plot_norms(
    curves: Mapping[str, Numbers],
    *,
    lags: Numbers | None = None,
    ax: Axes | None = None,
    vanished: float | int = VANISHED,
) -> Axes:
    """Plot norms by lag, and mark the last lag at which each curve is above the fraction `vanished` of its maximum.

    Args:
        curves: a mapping from names to norms `(L,)`, such as `jacobian_products(...).norms`, starting at lag 0. For the
            result of `state_cotangents`, pass `norms(...)[::-1]`.
        lags: the lags `(L,)`. None is 0, 1, 2, ...
        ax: the axes to plot on. None creates a figure, `ax.figure`.
        vanished: the fraction of its maximum below which a curve counts as vanished.

    Returns:
        The axes.

    Raises:
        TypeError: if `curves` is not a mapping.
        ValueError: if `curves` is empty, or a curve is not one-dimensional or has another length than `lags`.

    Example:
        >>> from jaxseq import diagnostics
        >>> ax = diagnostics.plot_norms({"half": [1.0, 0.5, 0.25]})
        >>> ax.get_xlabel()
        'lag (steps)'
    """
    if not isinstance(curves, Mapping):
        _checks.bad_type("curves", "a mapping from names to norms", _checks.describe(curves))
    if not curves:
        _checks.bad_value("curves", "at least one", "none")
    ax = _axes(ax)
    for name, values in curves.items():
        y = np.asarray(values, float)
        x = np.arange(y.size) if lags is None else np.asarray(lags)
        if y.ndim != 1 or y.shape != x.shape or not y.size:
            _checks.bad_value(f"curves[{name!r}]", f"shape {x.shape} = (lags,)", str(y.shape))
        order = np.argsort(x)
        x, y = x[order], y[order]
        (line,) = ax.plot(x, np.where(y > 0, y, np.nan), label=name)
        alive = np.flatnonzero(y > vanished * np.max(y, initial=0, where=np.isfinite(y)))
        if alive.size and alive[-1] + 1 < y.size:
            end = alive[-1]
            ax.plot(x[end], y[end], "x", color=line.get_color(), markersize=9, markeredgewidth=2)
            line.set_label(f"{name}, vanished after {x[end]}")
    _log_scale(ax)
    ax.set_xlabel("lag (steps)")
    ax.set_ylabel("norm of the gradient")
    ax.set_title(f"×: the last lag with a norm above {vanished:g} of the maximum", fontsize="medium")
    return _finished(ax)


def plot_bias(
    biases: TruncationBias | Mapping[str, TruncationBias], *, tolerance: float | int = 0.1, ax: Axes | None = None
) -> Axes:
    """Plot the relative error of the truncated gradient by window, and a line at the tolerance.

    Args:
        biases: a `TruncationBias`, or a mapping from names to several.
        tolerance: the largest relative error. A dot marks the window that `suggest_truncation` returns for it.
        ax: the axes to plot on. None creates a figure, `ax.figure`.

    Returns:
        The axes.

    Raises:
        TypeError: if a value is not a `TruncationBias`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxseq import diagnostics
        >>> f = lambda a, s, x: (a * s + x, s)
        >>> bias = diagnostics.truncation_bias(f, 0.5, 0.0, jnp.ones(64), lambda s, ys: s)
        >>> diagnostics.plot_bias(bias).get_xlabel()
        'window k (steps)'
    """
    named, ax = _named("biases", biases, TruncationBias), _axes(ax)
    for name, bias in named.items():
        k, error, first = within(bias, tolerance)
        (line,) = ax.plot(k, np.where(error > 0, error, np.nan), "o-", markersize=3, label=name)
        if first < k.size:
            if error[first] > 0:  # the window T has no error, which a logarithmic axis cannot show
                ax.plot(k[first], error[first], "o", color=line.get_color(), markersize=8)
            line.set_label(f"{name}: k = {k[first]}".removeprefix(": "))
        else:
            line.set_label(f"{name}: no window".removeprefix(": "))
    ax.axhline(tolerance, color=INK, lw=0.8, ls="--")
    windows = np.concatenate([np.asarray(bias.windows) for bias in named.values()])
    ax.set_xlim(windows.min() / 1.2, windows.max() * 1.2)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xlabel("window k (steps)")
    ax.set_ylabel(r"$\|g_k - g\| \,/\, \|g\|$")
    ax.set_title(f"error of truncation; dots: the shortest window within {tolerance:g}", fontsize="medium")
    return _finished(ax)


def plot_spectrum(spectra: Lyapunov | Mapping[str, Lyapunov], *, ax: Axes | None = None) -> Axes:
    """Plot Lyapunov exponents in descending order. Gradients explode above zero and vanish below.

    Args:
        spectra: a `Lyapunov`, or a mapping from names to several.
        ax: the axes to plot on. None creates a figure, `ax.figure`.

    Returns:
        The axes.

    Raises:
        TypeError: if a value is not a `Lyapunov`.

    Example:
        >>> from jaxseq import diagnostics
        >>> logistic = lambda s, _: (4 * s * (1 - s), None)
        >>> diagnostics.plot_spectrum(diagnostics.lyapunov(logistic, 0.3, None, length=100)).get_xlabel()
        'i'
    """
    named, ax = _named("spectra", spectra, Lyapunov), _axes(ax)
    for name, spectrum in named.items():
        exponents = np.asarray(spectrum.exponents, float)
        label = f"{name}: $\\lambda_1$ = {exponents[0]:.3g}".removeprefix(": ")
        ax.plot(np.arange(1, exponents.size + 1), exponents, "o-", markersize=3, label=label)
    ax.axhline(0, color=INK, lw=0.8)
    ax.set_xlabel("i")
    ax.set_ylabel(r"$\lambda_i$")
    ax.set_title("gradients explode above zero and vanish below", fontsize="medium")
    return _finished(ax)
