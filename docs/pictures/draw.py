"""Figures of the documentation, all plotted from results of jaxseq.

    python docs/pictures/draw.py            write the .svg files to the folder of this script
    python docs/pictures/draw.py some/dir   write them to another folder

Most figures show an influence matrix. The element in row t and column s measures how output t depends on input s,

    |∂y_t/∂x_s|     the largest absolute element of this block of the Jacobian

and is white where it is exactly zero. Text is stored as paths, and the files contain no dates, so a file changes only
if a result does, or matplotlib.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import jaxseq
from jaxseq import _windows, diagnostics
from jaxseq._time_options import Options

HERE = Path(__file__).parent
STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "font.family": "DejaVu Sans",  # included in matplotlib
    "axes.titlesize": 9.0,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "jaxseq",
    "figure.facecolor": "white",  # opaque, for the dark theme
}
BLUE, ORANGE, GREEN, GRAY = "#2563a8", "#d9791c", "#3c8d40", "#8a8f98"
T, B, D, H = 12, 3, 2, 4


def main(out: Path = HERE) -> None:
    """Write every figure of `PICTURES` to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        for name, draw in PICTURES.items():
            draw().savefig(out / f"{name}.svg", metadata={"Date": None, "Creator": None})


# --- Convolution ---


def convolution() -> Figure:
    """Plot the matrix C of y = C x for the example of the page, and its transpose, coloured by tap."""
    x = jnp.array([1.0, 2, 4, 3, 1, 5])
    kernel = jnp.array([1.0, -1, 2])

    def conv(x: Any, kernel: Any) -> Any:
        return jaxseq.conv(x[:, None], kernel[:, None, None], stride=2, padding=[(1, 0)])[:, 0]

    C = np.asarray(jax.jacobian(conv)(x, kernel))
    # The derivative of y_n by x_m and w_k is one if tap k of output n reads x_m. It gives the tap of each element.
    reads = np.asarray(jax.jacobian(jax.jacobian(conv), argnums=1)(x, kernel))
    figure = Figure(figsize=(4.8, 2.9), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(6, 3))
    _numbers(left, C, reads, "n", "m", "y = C x")
    _numbers(right, C.T, reads.swapaxes(0, 1), "m", "n", "x̄ = Cᵀ ȳ")
    handles = [Rectangle((0, 0), 1, 1, color=color) for color in (BLUE, ORANGE, GREEN)]
    figure.legend(handles, ["tap 0", "tap 1", "tap 2"], loc="outside lower center", ncols=3, frameon=False)
    return figure


def _numbers(ax: Axes, C: np.ndarray, reads: np.ndarray, row: str, column: str, title: str) -> None:
    for (i, j), value in np.ndenumerate(C):
        taps = np.flatnonzero(reads[i, j])
        color = (BLUE, ORANGE, GREEN)[taps[0]] if taps.size else "white"
        ax.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor=color, edgecolor="#d5d8dd"))
        ax.text(j, i, f"{value:g}", ha="center", va="center", color="white" if taps.size else GRAY)
    ax.set(xlim=(-0.5, C.shape[1] - 0.5), ylim=(C.shape[0] - 0.5, -0.5), aspect="equal", title=title)
    ax.set(xlabel=column, ylabel=row, xticks=range(C.shape[1]), yticks=range(C.shape[0]))
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)


# --- Time ---


def influence(example: int = 0, **time: Any) -> np.ndarray:
    """Return |∂y_t/∂x_s| (T, T) of one example in an LSTM with these time options."""
    params = jaxseq.lstm_init(jax.random.key(0), D, H)
    xs = jax.random.normal(jax.random.key(1), (T, B, D))

    def ys(xs: Any) -> Any:
        return jaxseq.lstm(params, None, xs, **time)[1]

    jacobian = jax.jit(jax.jacrev(ys))(xs)  # (T, B, H, T, B, D)
    return np.asarray(jnp.abs(jacobian[:, example, :, :, example]).max((1, 3)))


def lengths() -> Figure:
    """Plot a sequence of 8 steps, padded to 12, processed forward and in reverse."""
    given = jnp.array([8, 12, 5])
    figure, axes = _side_by_side(2)
    for ax, reverse in zip(axes, (False, True), strict=True):
        _heat(ax, influence(lengths=given, reverse=reverse), "reverse=True" if reverse else "reverse=False")
        for place in ((8 - 0.5, -0.5, 4, T), (-0.5, 8 - 0.5, 8, 4)):
            ax.add_patch(
                Rectangle(place[:2], *place[2:], facecolor="none", edgecolor="#c9ccd2", hatch="////", linewidth=0)
            )
    axes[0].text(5.5, 9.5, "padding", ha="center", va="center", color=GRAY, backgroundcolor="white")
    return figure


def resets() -> Figure:
    """Plot resets at steps 4 and 9."""
    marks = jnp.zeros((T, B), bool).at[jnp.array([4, 9]), 0].set(True)
    figure, axes = _side_by_side(2)
    for ax, reverse in zip(axes, (False, True), strict=True):
        _heat(ax, influence(resets=marks, reverse=reverse), "reverse=True" if reverse else "reverse=False")
        _edges(ax, [4, 9])
    return figure


def truncation() -> Figure:
    """Plot no truncation, truncation=4 and truncation=(3, 6)."""
    figure, axes = _side_by_side(3)
    for ax, k, edges in zip(axes, (None, 4, (3, 6)), ([], [4, 8], [3, 6, 9]), strict=True):
        _heat(ax, influence(truncation=k), f"truncation={k}")
        _edges(ax, edges)
    return figure


def _side_by_side(n: int) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(5.4, 2.75 if n == 2 else 2.2), layout="constrained")
    axes = figure.subplots(1, n, sharey=True)
    axes[0].set_ylabel("output step t")
    return figure, axes


def _heat(ax: Axes, values: np.ndarray, title: str) -> None:
    """Plot on a logarithmic scale; exact zeros are white."""
    shown = np.ma.masked_equal(values, 0)
    edges, norm = np.arange(T + 1) - 0.5, LogNorm(values.max() * 1e-5, values.max())
    ax.pcolormesh(edges, edges, shown, cmap="Blues", norm=norm, edgecolor="white", linewidth=0.5)
    ax.set(xlim=(-0.5, T - 0.5), ylim=(T - 0.5, -0.5), aspect="equal", title=title, xlabel="input step s")
    ax.set(xticks=range(0, T, 4), yticks=range(0, T, 4))


def _edges(ax: Axes, steps: Sequence[int]) -> None:
    for t in steps:
        ax.plot([-0.5, T - 0.5], [t - 0.5] * 2, color=ORANGE, linewidth=1)
        ax.plot([t - 0.5] * 2, [-0.5, T - 0.5], color=ORANGE, linewidth=1)


def checkpoint() -> Figure:
    """Plot the steps with stored states, and the order of the chunks in the backward pass, from `_windows.blocks`."""
    steps, rows = 16, 4
    plans = {
        "checkpoint=4": Options(checkpoint=4),
        "checkpoint=8": Options(checkpoint=8),
        "checkpoint=8, truncation=4": Options(checkpoint=8, truncation=(4, 4)),
    }
    figure = Figure(figsize=(5.4, 2.5), layout="constrained")
    ax = figure.subplots()
    for line, options in enumerate(plans.values()):
        order = 0
        for block in _windows.blocks(options, steps, rows):
            for first in reversed(range(0, block.windows, block.group)):
                for chunk in reversed(range(block.chunks)):
                    order += 1
                    for window in range(first, first + block.group):
                        start = block.first + window * block.steps + chunk * block.chunk
                        length = min(block.chunk, block.steps - chunk * block.chunk)
                        _chunk(ax, line, start, length, order)
    ax.set(xlim=(-0.6, steps + 0.1), ylim=(len(plans) - 0.4, -0.6), xlabel="step", xticks=range(0, steps + 1, 4))
    ax.set_yticks(range(len(plans)), [name.replace(", ", ",\n") for name in plans])
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    return figure


def _chunk(ax: Axes, line: int, start: int, length: int, order: int) -> None:
    ax.add_patch(Rectangle((start + 0.05, line - 0.3), length - 0.1, 0.6, facecolor="#dbe7f4", edgecolor="none"))
    ax.plot(start, line, "o", color=BLUE, markersize=6, clip_on=False)
    ax.text(start + length / 2, line, str(order), ha="center", va="center", color="#30343b")


# --- Truncation ---


def schedule() -> Figure:
    """Plot the iteration of the backward pass that processes each time step, for T = 12."""
    cases: dict[str, tuple[int, int]] = {"truncation=None": (T, T), "truncation=4": (4, 4), "truncation=(3, 6)": (3, 6)}
    figure = Figure(figsize=(5.4, 2.4), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for ax, (title, (k1, k2)) in zip(axes, cases.items(), strict=True):
        for window in range(T // k1):
            end = (window + 1) * k1
            for iteration, t in enumerate(range(end - 1, max(end - k2, 0) - 1, -1)):
                color = (BLUE, ORANGE, GREEN, GRAY)[window % 4]
                ax.add_patch(Rectangle((t - 0.5, iteration - 0.5), 1, 1, facecolor=color, edgecolor="white"))
        ax.set(xlim=(-0.5, T - 0.5), ylim=(T - 0.5, -0.5), title=f"{title}\n{k2} iterations", xlabel="time step")
        ax.set(xticks=range(0, T, 4), yticks=range(0, T, 4), aspect="equal")
    axes[0].set_ylabel("iteration of the backward pass")
    return figure


def bias() -> Figure:
    """Plot |g_k - g| / |g| over k for the parameter gradient, with a loss on all steps and on the last step only."""
    steps = 96
    key_p, key_x, key_r = jax.random.split(jax.random.key(3), 3)
    params = jaxseq.lstm_init(key_p, 3, 16)
    xs, r = jax.random.normal(key_x, (steps, 3)), jax.random.normal(key_r, (steps, 16))
    start = jaxseq.LSTMState(jnp.zeros(16), jnp.zeros(16))
    losses: dict[str, Callable[[Any, Any], Any]] = {
        "loss on every step": lambda carry, ys: jnp.sum(ys * r),
        "loss on the last step only": lambda carry, ys: jnp.sum(ys[-1] * r[-1]),
    }
    figure = Figure(figsize=(4.8, 2.7), layout="constrained")
    ax = figure.subplots()
    for (name, loss), color in zip(losses.items(), (BLUE, ORANGE), strict=True):
        found = diagnostics.truncation_bias(
            jaxseq.lstm_cell, params, start, xs, loss, windows=(2, 4, 8, 12, 16, 24, 32, 48)
        )
        ax.semilogy(found.windows, found.relative_error, "o-", color=color, label=name, markersize=4)
    ax.set(xlabel="truncation k", ylabel="relative error\nof the gradient")
    ax.legend(frameon=False)
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    "convolution": convolution,
    "lengths": lengths,
    "resets": resets,
    "truncation": truncation,
    "checkpoint": checkpoint,
    "schedule": schedule,
    "bias": bias,
}

if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
