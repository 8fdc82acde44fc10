"""What was measured, drawn: one function for each kind, on axes of matplotlib, which is imported only here."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxseq import _checks
from jaxseq.diagnostics._lyapunov import Lyapunov
from jaxseq.diagnostics._truncation import TruncationBias, within

DEAD = 1e-3  # of the largest: what arrives there teaches nothing beside it
INK, FAINT = "0.25", "0.85"


def _axes(ax: Any) -> Any:
    """The axes given, or those of a new figure, which is `ax.figure`."""
    if ax is not None:
        return ax
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ModuleNotFoundError as error:
        error.add_note("Pictures are drawn with matplotlib: pip install 'jaxseq[plot]'.")
        raise
    return Figure(figsize=(7, 4), layout="constrained").add_subplot()


def _named(argument: str, value: Any, kind: type) -> Mapping[str, Any]:
    """Several by name, or one without."""
    named = value if isinstance(value, Mapping) else {"": value}
    for one in named.values():
        _checks.container(argument, one, kind)
    return named


def _finished(ax: Any) -> Any:
    ax.grid(color=FAINT, lw=0.5)
    ax.legend(frameon=False)
    return ax


def _log_scale(ax: Any) -> None:
    """On y, where anything that is drawn can be there."""
    drawn = [np.asarray(line.get_ydata(), float) for line in ax.lines]
    if any((y > 0).any() for y in drawn):
        ax.set_yscale("log")


def plot_norms(curves: Mapping[str, Any], *, lags: Any = None, ax: Any = None, dead: float | int = DEAD) -> Any:
    """Norms by lag, one curve a name, and where each dies: the last lag at which it is above `dead` of its largest.

    Args:
        curves: name to `(L,)` norms, those of lag 0 first, as `jacobian_products(...).norms` are; of
            `state_cotangents`, `norms(...)[::-1]`.
        lags: `(L,)`; None is 0, 1, 2, ...
        ax: axes to draw on; None makes a figure, `ax.figure`.
        dead: below what part of its largest a curve is dead.

    Returns:
        the axes.

    Raises:
        TypeError: curves that are no mapping.
        ValueError: curves that are none, of no or more than one axis, or of another length than `lags`.

    Example:
        >>> from jaxseq import diagnostics
        >>> ax = flow.plot_norms({"half": [1.0, 0.5, 0.25]})
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
        alive = np.flatnonzero(y > dead * np.max(y, initial=0, where=np.isfinite(y)))
        if alive.size and alive[-1] + 1 < y.size:
            end = alive[-1]
            ax.plot(x[end], y[end], "x", color=line.get_color(), markersize=9, markeredgewidth=2)
            line.set_label(f"{name}, gone after {x[end]}")
    _log_scale(ax)
    ax.set_xlabel("lag (steps)")
    ax.set_ylabel("norm of the gradient")
    ax.set_title(f"where the gradient dies: × the last above {dead:g} of the largest", fontsize="medium")
    return _finished(ax)


def plot_bias(
    biases: TruncationBias | Mapping[str, TruncationBias], *, tolerance: float | int = 0.1, ax: Any = None
) -> Any:
    """Relative error of the truncated gradient by window, and the tolerance that a window has to come below.

    Args:
        biases: one `TruncationBias`, or several by name.
        tolerance: drawn as a line; a dot marks the shortest window that holds it.
        ax: axes to draw on; None makes a figure, `ax.figure`.

    Returns:
        the axes.

    Raises:
        TypeError: what is no `TruncationBias`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxseq import diagnostics
        >>> f = lambda a, s, x: (a * s + x, s)
        >>> bias = flow.truncation_bias(f, 0.5, 0.0, jnp.ones(64), lambda s, ys: s)
        >>> flow.plot_bias(bias).get_xlabel()
        'window k (steps)'
    """
    named, ax = _named("biases", biases, TruncationBias), _axes(ax)
    for name, bias in named.items():
        k, error, held = within(bias, tolerance)
        (line,) = ax.plot(k, np.where(error > 0, error, np.nan), "o-", markersize=3, label=name)
        if held < k.size:
            if error[held] > 0:  # that of all of time has none, and no place on this axis
                ax.plot(k[held], error[held], "o", color=line.get_color(), markersize=8)
            line.set_label(f"{name}: k = {k[held]}".removeprefix(": "))
        else:
            line.set_label(f"{name}: none of these".removeprefix(": "))
    ax.axhline(tolerance, color=INK, lw=0.8, ls="--")
    windows = np.concatenate([np.asarray(bias.windows) for bias in named.values()])
    ax.set_xlim(windows.min() / 1.2, windows.max() * 1.2)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xlabel("window k (steps)")
    ax.set_ylabel(r"$\|g_k - g\| \,/\, \|g\|$")
    ax.set_title(f"what truncation loses; dots: the shortest window within {tolerance:g}", fontsize="medium")
    return _finished(ax)


def plot_spectrum(spectra: Lyapunov | Mapping[str, Lyapunov], *, ax: Any = None) -> Any:
    """Lyapunov exponents, the largest first. Above zero gradients explode, below they vanish.

    Args:
        spectra: one `Lyapunov`, or several by name.
        ax: axes to draw on; None makes a figure, `ax.figure`.

    Returns:
        the axes.

    Raises:
        TypeError: what is no `Lyapunov`.

    Example:
        >>> from jaxseq import diagnostics
        >>> logistic = lambda s, _: (4 * s * (1 - s), None)
        >>> flow.plot_spectrum(flow.lyapunov(logistic, 0.3, None, length=100)).get_xlabel()
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
    ax.set_title("above zero gradients explode, below they vanish", fontsize="medium")
    return _finished(ax)
