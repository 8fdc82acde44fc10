"""Convolution step by step: a kernel slides over an input, and both gradients are convolutions too.

    y[n] = sum_k x[m] w[k],    m = s n + d k - lo       stride s, dilation d, lo zeros at each end: `jaxseq.conv`

n, k and m denote one index per axis. Each term connects one output to one input by one tap. With ȳ = ∂L/∂y, the chain
rule sums over the same terms, and both sums are convolutions:

    x̄[m] = sum_{n, k : s n + d k - lo = m} ȳ[n] w[k]    each ȳ[n] adds a scaled kernel over the inputs of y[n]: the full
                                                        correlation of ȳ with the flipped kernel, which is
                                                        `jaxseq.conv_transpose` with the original kernel
    w̄[k] = sum_n x[s n + d k - lo] ȳ[n]                 each tap sums over all its inputs: x correlated with ȳ

In mathematics, y is the cross-correlation; convolution flips the kernel (`flip=True`). The script computes y, x̄ and w̄
from their sums in NumPy, by the convolutions of jaxseq and by `jax.vjp`, compares the results, and plots the numbers of
two examples: a short signal, and a handwritten digit of scikit-learn with a Sobel kernel.

    python examples/convolution.py                                a few seconds; writes out/convolution.png
    python examples/convolution.py --x 0 0 0 1 0 0 0 --w 1 2 3    an impulse: y is the flipped kernel
    python examples/convolution.py --digit 7                      another digit
"""

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from textwrap import fill
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from sklearn.datasets import load_digits

import jaxseq

Input = Float[np.ndarray, "*I"]
Kernel = Float[np.ndarray, "*K"]
Output = Float[np.ndarray, "*O"]
Index = tuple[int, ...]
SOBEL = np.array([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])  # the horizontal derivative
OPTIONS = {"stride 2": (2, 0, 1), "padding 1": (1, 1, 1), "dilation 2": (1, 0, 2)}  # s, lo, d, the same for each axis
TOLERANCE = 1e-12  # of two computations in float64, relative to the largest element


# --- From the definition ---


def output_shape(I: Index, K: Index, s: int = 1, lo: int = 0, d: int = 1) -> Index:
    """Return the number of kernel positions along each axis: floor((I + 2 lo - d (K - 1) - 1) / s) + 1."""
    for size, taps in zip(I, K, strict=True):
        if d * (taps - 1) >= size + 2 * lo:
            extent = f"{taps} taps with dilation {d} span {d * (taps - 1) + 1}" if d > 1 else f"it has {taps} taps"
            raise ValueError(f"the kernel is longer than the input: {extent}, the input has {size + 2 * lo} numbers")
    return tuple((size + 2 * lo - d * (taps - 1) - 1) // s + 1 for size, taps in zip(I, K, strict=True))


def sums(x: Input, w: Kernel, y_bar: Any = 0.0, s: int = 1, lo: int = 0, d: int = 1) -> tuple[Output, Input, Kernel]:
    """Return (y, x̄, w̄), summed term by term. A scalar ȳ is broadcast."""
    y, x_bar, w_bar = np.zeros(output_shape(x.shape, w.shape, s, lo, d)), np.zeros(x.shape), np.zeros(w.shape)
    y_bar = np.broadcast_to(y_bar, y.shape)
    for n in np.ndindex(y.shape):
        for k in np.ndindex(w.shape):
            m = tuple(s * i + d * j - lo for i, j in zip(n, k, strict=True))
            if all(0 <= i < size for i, size in zip(m, x.shape, strict=True)):  # otherwise the term reads padding
                y[n] += x[m] * w[k]
                x_bar[m] += y_bar[n] * w[k]
                w_bar[k] += x[m] * y_bar[n]
    return y, x_bar, w_bar


# --- With jaxseq ---


def conv(x: Any, w: Any, op: Any = jaxseq.conv, **options: Any) -> jax.Array:
    """Apply `op` to arrays without channels."""
    return op(x[..., None], w[..., None, None], **options)[..., 0]


@partial(jax.jit, static_argnums=(3, 4, 5))
def by_jaxseq(x: jax.Array, w: jax.Array, y_bar: jax.Array, s: int, lo: int, d: int) -> tuple[list[jax.Array], ...]:
    """Compute y, x̄ and w̄, each in every available way."""
    options = {"stride": s, "padding": lo, "dilation": d}
    y, pullback = jax.vjp(lambda x, w: conv(x, w, **options), x, w)
    x_bar_vjp, w_bar_vjp = pullback(y_bar)

    # s n = m + d j - (d (K - 1) - lo) with k = K - 1 - j: ȳ dilated by the stride, correlated with the flipped kernel.
    places = output_shape(x.shape, w.shape, 1, lo, d)
    y_tilde = jnp.zeros(places, y_bar.dtype).at[(slice(None, None, s),) * x.ndim].set(y_bar)
    x_bar = conv(y_tilde, w, padding=[(d * (K - 1) - lo,) * 2 for K in w.shape], dilation=d, flip=True)

    unread = [(size - 1) % s for size in places]  # inputs at the end that no kernel position reads
    transposed = conv(y_bar, w, jaxseq.conv_transpose, **options, output_padding=unread)

    # m = d k + s n - lo with ȳ as the kernel: stride and dilation swap. Unread inputs may add elements beyond K.
    w_bar = conv(x, y_bar, stride=d, padding=lo, dilation=s)[tuple(map(slice, w.shape))]
    return [y], [x_bar, transposed, x_bar_vjp], [w_bar, w_bar_vjp]


def differences(x: Input, w: Kernel, y_bar: Output, s: int = 1, lo: int = 0, d: int = 1) -> list[float]:
    """Return the largest differences of y, x̄ and w̄ between the sums and the results of jaxseq, in float64."""
    with jax.enable_x64(True):
        ways = by_jaxseq(x, w, y_bar, s, lo, d)
    return [largest(by_sum, *others) for by_sum, others in zip(sums(x, w, y_bar, s, lo, d), ways, strict=True)]


def largest(a: np.ndarray, *others: Any) -> float:
    """Return max |a - other|. Raise an ArithmeticError if it exceeds rounding."""
    difference = max(float(np.abs(a - np.asarray(other)).max()) for other in others)
    if not difference <= TOLERANCE * max(1, np.abs(a).max()):  # also true for NaN
        raise ArithmeticError(f"two computations of the same numbers differ by {difference:.1e}")
    return difference


# --- Plots: one cell per number, one unit wide ---


def number(value: float) -> str:
    return f"{value + 0.0:.0f}".replace("-", "−")  # + 0.0 turns -0.0 into 0.0


def products(x: np.ndarray, w: np.ndarray) -> str:
    """Format a sum of products, as in 3·1 + 2·(−1) = 1, with one line per row of the kernel."""
    pairs = zip(x.flat, w.flat, strict=True)
    terms = ["·".join(number(a) if a >= 0 else f"({number(a)})" for a in pair) for pair in pairs]
    lines = [" + ".join(row) for row in np.reshape(terms, (-1, w.shape[-1]))]
    return " +\n".join(fill(line, 24) for line in lines) + f" = {number((x * w).sum())}"


def frame(axes: Any, row: float, column: float, height: int = 1, width: int = 1, **style: Any) -> None:
    """Draw a frame around `height` x `width` cells, the first of them at (row, column)."""
    style = {"facecolor": "none", "edgecolor": "tab:orange", "linewidth": 3, "zorder": 2} | style
    axes.add_patch(Rectangle((column - 0.5, row - 0.5), width, height, **style))


def cells(
    axes: Any, values: Any, row: float = 0, column: float = 0, *, step: int = 1, ink: bool = False, last: Any = None
) -> None:
    """Draw an array as cells, the first at (row, column): gray, or red above zero and blue below.

    NaN has no cell. Cells after `last` are empty.
    """
    values = np.atleast_2d(values)
    shades = values / (np.nanmax(np.abs(values)) or 1)  # light, so that the text is legible
    colours = colormaps["Greys"](shades / 2.5) if ink and (values >= 0).all() else colormaps["RdBu_r"](0.5 + shades / 4)
    for place, value in np.ndenumerate(values):
        y, x, known = row + place[0], column + step * place[1], last is None or place <= last
        if not np.isnan(value):
            text, colour = (number(value), colours[place]) if known else ("", "white")
            frame(axes, y, x, facecolor=colour, edgecolor="0.6", linewidth=0.7, zorder=1)
            axes.text(x, y, text, ha="center", va="center", fontsize=12 if len(text) < 4 else 9)


def finish(axes: Any, title: str, bottom: float, left: int, right: int, names: Any = ()) -> None:
    """Set the title, the names of the rows and the limits of the axes."""
    axes.set(xlim=(left - 0.6, right + 0.6), ylim=(bottom + 0.6, -0.6), aspect="equal", anchor="N")
    axes.set_title(title, fontsize=13)
    axes.axis("off")
    for row, name in names:
        axes.text(left - 0.8, row, name, ha="right", va="center", fontsize=14)


def move(axes: Any, x: np.ndarray, w: np.ndarray, n: int, title: str, *names: str) -> None:
    """Draw one position of the kernel in 1-D: its inputs, the products, their sum, and the output so far."""
    rows, middle, patch = (0, 1.2, 2.4, 4.2), n + (len(w) - 1) / 2, x[n : n + len(w)]
    cells(axes, x, rows[0], ink=True)
    cells(axes, w, rows[1], n)
    cells(axes, patch * w, rows[2], n)
    cells(axes, sums(x, w)[0], rows[3], middle - n, last=(0, n))  # centred below its inputs
    frame(axes, rows[0], n, 1, len(w))
    frame(axes, rows[3], middle)
    axes.annotate("", (middle, 3.7), (middle, 2.9), arrowprops={"arrowstyle": "-|>", "color": "tab:orange", "lw": 2})
    finish(axes, title + products(patch, w), rows[3], 0, len(x) - 1, zip(rows, names, strict=True))


def wires(axes: Any, x: np.ndarray, w: np.ndarray, title: str, options: Any = (1, 0, 1), turn: int = 1) -> None:
    """Draw the connections from inputs to outputs in 1-D, one colour per tap. `turn` = -1 flips the kernel."""
    (s, lo, d), y = options, sums(x, w[::turn], 0, *options)[0]
    middle = d * (len(w) - 1) / 2 - lo
    cells(axes, np.pad(x, lo), 1.4, -lo, ink=True)
    cells(axes, y, 4, middle, step=s)
    for k, tap in enumerate(range(len(w))[::turn]):
        frame(axes, 0, d * k - lo, facecolor=to_rgba(f"C{tap}", 0.3), edgecolor=f"C{tap}", linewidth=1.5)
        axes.text(d * k - lo, 0, number(w[tap]), ha="center", va="center", fontsize=12)
        for n in range(len(y)):
            axes.plot((s * n + d * k - lo, s * n + middle), (1.9, 3.5), color=f"C{tap}", linewidth=2)
    finish(axes, title, 4, -lo, len(x) + lo - 1, [(0, "$w$"), (1.4, "$x$"), (4, "$y$")])


def grid(axes: Any, values: np.ndarray, title: str, at: Any = None, w: Any = None, **how: Any) -> None:
    """Draw a 2-D array, with a frame at `at`: of one cell, or of the shape of w with its weights in the corners."""
    cells(axes, values, **how)
    if at:
        frame(axes, *at, *(() if w is None else w.shape))
    for (k, l), weight in np.ndenumerate(np.zeros((0, 0)) if w is None else w):
        style = {"fontsize": 9, "weight": "bold", "color": "tab:red", "ha": "right", "va": "bottom"}
        axes.text(at[1] + l + 0.46, at[0] + k + 0.48, f"×{number(weight)}", **style)
    finish(axes, title, len(values) - 1, 0, values.shape[1] - 1)


def draw(x: Input, w: Kernel, digit: Input, path: Path) -> None:
    """Draw five rows: forward, options and backward in 1-D; forward and backward in 2-D."""
    figure = Figure(figsize=(20, 20.5))
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.08)
    parts: Any = figure.subfigures(5, 1, height_ratios=[3.1, 3.1, 4, 5.1, 4.9])

    def panels(part: Any, title: str, *widths: int) -> Iterator[Any]:
        """Yield panels side by side, with the given widths in cells."""
        part.suptitle(title, fontsize=19, x=0.01, ha="left")
        return (part.add_subplot(place) for place in part.add_gridspec(1, len(widths), width_ratios=widths))

    y_bar = np.resize([1.0, -1, 2], output_shape(x.shape, w.shape))  # arbitrary numbers that are easy to follow
    I, K, O = len(x), len(w), len(y_bar)
    ns, ks = range(O)[-5:], range(K)[-3:]  # as many as fit into the plot
    row = panels(parts[0], r"A kernel slides over an input:   $y[n] = \sum_k\, x[n + k]\; w[k]$", *[I] * len(ns))
    for n, axes in zip(ns, row, strict=True):
        move(axes, x, w, n, f"$y[{n}]$ = ", "$x$", "$w$", "product", "$y$")

    title = r"Stride $s$, padding $lo$, dilation $d$:   $y[n] = \sum_k\, x[s\,n + d\,k - lo]\; w[k]$"
    row = panels(parts[1], title, I, I, I, I + 2, I)
    wires(next(row), x, w, "cross-correlation: one colour per tap")
    wires(next(row), x, w, "flip=True: mathematical convolution", turn=-1)
    for title, options in OPTIONS.items():
        wires(next(row), x, w, title, options)

    sums_back = r"$\bar{x}[m] = \sum_k\, \bar{y}[m - k]\; w[k]$   and   $\bar{w}[k] = \sum_n\, x[n + k]\; \bar{y}[n]$"
    title = rf"Backward pass for a given $\bar{{y}} = \partial L / \partial y$:   {sums_back}"
    row = panels(parts[2], title, I, O + 2 * K - 2, *[I] * len(ks))
    axes, band = next(row), np.full((O, I), np.nan)
    for n in range(O):
        band[n, n : n + K] = y_bar[n] * w
    cells(axes, band)
    cells(axes, sums(x, w, y_bar)[1], O + 0.4)
    names = [*((n, rf"${number(y_bar[n])}\;w$") for n in range(O)), (O + 0.4, r"sum $\bar{x}$")]
    finish(axes, r"each $\bar{y}[n]$ scales a copy of the kernel", O + 0.4, 0, I - 1, names)
    m, names = I // 2, (r"$\bar{y}$", "$w$ flipped", "product", r"$\bar{x}$")
    move(next(row), np.pad(y_bar, K - 1), w[::-1], m, f"the same as a convolution:\n$\\bar{{x}}[{m}]$ = ", *names)
    for k, axes in zip(ks, row, strict=True):
        move(axes, x, y_bar, k, rf"$\bar{{w}}[{k}]$ = ", "$x$", r"$\bar{y}$", "product", r"$\bar{w}$")

    y, here, one = sums(digit, SOBEL)[0], (2, 3), np.zeros((6, 6))
    title = r"2-D, a handwritten digit and an edge kernel:   $y[v, u] = \sum_{k, l}\, x[v + k, u + l]\; w[k, l]$"
    row = panels(parts[3], title, 3, 8, 6, 8, 6)
    grid(next(row), SOBEL, "$w$, Sobel")
    for v, u in (here, (5, 5)):
        title = f"$y[{v}, {u}]$ = " + products(digit[v : v + 3, u : u + 3], SOBEL)
        grid(next(row), digit, title, (v, u), SOBEL, ink=True)
        grid(next(row), y, f"$y$ up to $y[{v}, {u}]$", (v, u), last=(v, u))

    y_bar = np.sign(y)
    one[here] = y_bar[here]
    _, x_bar, w_bar = sums(digit, SOBEL, y_bar)
    title = r"Backward pass, $L = \sum_n\, |y[n]|$:   $\bar{y} = \partial L / \partial y = \mathrm{sign}\,y$"
    row = panels(parts[4], title, 6, 8, 8, 8, 3)
    grid(next(row), y_bar, r"$\bar{y}$", here)
    axes = next(row)
    grid(axes, sums(digit, SOBEL, one)[1], r"one term, a copy of the kernel: $\bar{y}[2, 3]\; w$")
    frame(axes, *here, *SOBEL.shape)
    grid(next(row), x_bar, r"$\bar{x}$, the sum of all terms: red where more ink increases $L$")
    title = rf"$x$ and $\bar{{y}}$: the products sum to $\bar{{w}}[1, 2]$ = {number(w_bar[1, 2])}"
    grid(next(row), digit, title, (1, 2), y_bar, ink=True)
    grid(next(row), w_bar, r"$\bar{w}$", (1, 2))
    figure.savefig(path, dpi=90, format="png")


# --- Main program ---


def compare(x: Input, w: Kernel, digit: Input) -> None:
    """Print each y[n] of the signal, and the largest differences between the computations of y, x̄ and w̄."""
    for n in range(len(x) - len(w) + 1):
        print(f"y[{n}] = {products(x[n : n + len(w)], w)}".replace("\n", " "))
    with jax.enable_x64(True):
        for flip, op in enumerate((np.correlate, np.convolve)):
            theirs = op(x, w, "valid")
            largest(theirs, conv(x, w, flip=bool(flip)))
            print(f"conv(x, w, flip={bool(flip)}) = {' '.join(map(number, theirs))}, as numpy.{op.__name__}")

    noise = np.random.default_rng(0).standard_normal
    cases: list[Any] = [("signal", x, w, 1, 0, 1)]
    cases += [(f"signal, {name}", x, w, *options) for name, options in OPTIONS.items()]
    cases += [("digit", digit, SOBEL, 1, 0, 1), ("digit, all three", digit, SOBEL, 2, 1, 2)]
    cases += [("noise, 9 × 9 taps", noise((20, 20)), noise((9, 9)), 1, 0, 1)]  # large enough for the FFT
    print("\nlargest differences    forward   input gradient   kernel gradient")
    found = {n: differences(x, w, noise(output_shape(x.shape, w.shape, *how)), *how) for n, x, w, *how in cases}
    for name, row in (found | {"all": np.max(list(found.values()), axis=0)}).items():
        print(f"{name:20}  {'{:8.1e} {:16.1e} {:17.1e}'.format(*row)}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("convolution.py", description="Plot convolution steps. Defaults are in brackets.")
    parser.add_argument("--x", type=int, nargs="+", default=[1, 3, 2, 5, 4, 0, 2], help="signal [1 3 2 5 4 0 2]")
    parser.add_argument("--w", type=int, nargs="+", default=[1, 2, -1], help="kernel [1 2 -1]")
    parser.add_argument("--digit", type=int, choices=range(10), default=3, help="[%(default)s]")
    parser.add_argument("--out", type=Path, default=Path("out/convolution.png"), metavar="FILE", help="[%(default)s]")
    options = parser.parse_args(argv)
    x, w = np.array(options.x, float), np.array(options.w, float)
    if len(x) > 8 or len(w) > 4 or np.abs([*x, *w]).max() > 9:
        parser.error("expected at most 8 numbers in --x and 4 in --w, from -9 to 9, so that they fit into the plot")
    try:
        for geometry in ((1, 0, 1), *OPTIONS.values()):
            output_shape(x.shape, w.shape, *geometry)
    except ValueError as error:
        parser.error(str(error))

    images, digits = load_digits(return_X_y=True)
    digit = images[digits == options.digit][0].reshape(8, 8)
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        draw(x, w, digit, options.out)
    except OSError as error:
        print(f"convolution.py: error: cannot write to {options.out}: {error.strerror}", file=sys.stderr)
        return 2
    compare(x, w, digit)
    print(f"plot: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
