"""Convolution as a filter: classical kernels, written down rather than learnt, on a photograph.

    y[n, o] = sum_{k, i} x[s n + d k - lo, i] w[k, i, o]        what `jaxseq.conv` computes, with two axes of space

A kernel answers loudest where the picture looks like the kernel. One whose weights sum to 1 leaves a flat area as it is
(blur, sharpen), one whose weights sum to 0 leaves nothing of it (Sobel, Laplacian, Gabor). Nothing but the kernel's
channels decides what it reads: `(K, K, 1, 3)` in three groups filters each colour by itself, `(1, 1, 3, 1)` mixes
colours and no neighbours, `(K, K, 1, 4)` asks one gray picture four questions at once.

    python examples/filters.py                      a dahlia, which scikit-learn carries
    python examples/filters.py --picture china      a tower in Beijing, likewise
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from sklearn.datasets import load_sample_image

import jaxseq

Kernel = Float[np.ndarray, "K K"]
LUMA = np.array([0.2126, 0.7152, 0.0722])  # what red, green and blue add to the brightness (Rec. ITU-R BT.709)
ANGLES = (0, 45, 90, 135)  # degrees, of the Gabor filters
TOLERANCE = 1e-5  # between one pass in two dimensions and two passes in one, in float32 and on values from 0 to 1


# --- The kernels; k = (v, u) counts from the middle tap, v downwards and u to the right ---


def offsets(radius: int) -> tuple[np.ndarray, np.ndarray]:
    """(v, u), which broadcast to the whole window."""
    v, u = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    return v, u


def box(radius: int) -> Kernel:
    """w[v, u] = 1 / K², the mean of the window, K = 2 radius + 1."""
    K = 2 * radius + 1
    return np.full((K, K), 1 / K**2)


def gaussian_1d(sigma: float) -> Float[np.ndarray, " K"]:
    """g[u] = exp(-u² / 2σ²) / sum of the same, up to |u| = 3σ, where 1 % of its peak is left."""
    radius = math.ceil(3 * sigma)
    g = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    return g / g.sum()


def gaussian(sigma: float) -> Kernel:
    """w[v, u] = g[v] g[u]: exp(-(v² + u²) / 2σ²) is a product, so the kernel is separable."""
    g = gaussian_1d(sigma)
    return np.outer(g, g)


def laplacian() -> Kernel:
    """w x = ∂²x/∂v² + ∂²x/∂u², each second difference being 1 -2 1."""
    return np.array([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])


def sharpen(amount: float) -> Kernel:
    """w = δ - amount · Laplacian: takes away what a little diffusion would do to the picture."""
    w = -amount * laplacian()
    w[1, 1] += 1
    return w


def sobel() -> tuple[Kernel, Kernel]:
    """(∂x/∂v, ∂x/∂u): the difference -1 0 1 along one axis, the mean 1 2 1 along the other.

    Over 8, so that a ramp of slope one gives one. These are for cross-correlation, as `conv` has it: turned round in
    space, `flip=True`, they change their sign. All other kernels here are the same turned round.
    """
    w = np.outer([-1, 0, 1], [1, 2, 1]) / 8
    return w, w.T


def gabor(angle: float, *, wavelength: float = 6, sigma: float = 3, aspect: float = 0.7) -> Kernel:
    """w[v, u] = exp(-(p² + γ² q²) / 2σ²) (cos(2π p / λ) - c), a wave across p under a bell.

    p = u cos θ + v sin θ and q = v cos θ - u sin θ are u and v turned by θ, so it answers to bright lines along q: with
    θ = 0 to upright ones. c makes the weights sum to 0, so that it is blind to brightness. The |w| sum to 1.
    """
    v, u = offsets(math.ceil(3 * sigma))
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    p, q = u * cos + v * sin, v * cos - u * sin
    bell, wave = np.exp(-(p**2 + (aspect * q) ** 2) / (2 * sigma**2)), np.cos(2 * math.pi * p / wavelength)
    w = bell * (wave - (bell * wave).sum() / bell.sum())
    return w / np.abs(w).sum()


# --- Their use ---


def output_size(I: int, K: int, *, stride: int, padding: int, dilation: int) -> int:
    """floor((I + lo + hi - d (K - 1) - 1) / s) + 1, here with lo = hi = padding."""
    return (I + 2 * padding - dilation * (K - 1) - 1) // stride + 1


def filtered(
    name: str,
    x: Float[Array, "height width c_in"],
    kernel: Num[np.ndarray, "K_v K_u c_in_per_group c_out"],
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
) -> Float[Array, "new_height new_width c_out"]:
    """The convolution, in as many groups as the channels ask for. Says its size, and holds it against the formula."""
    groups = x.shape[-1] // kernel.shape[2]
    geometry: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
    y = jaxseq.conv(x, jnp.asarray(kernel, x.dtype), groups=groups, **geometry)
    expected = tuple(output_size(I, K, **geometry) for I, K in zip(x.shape[:2], kernel.shape[:2], strict=True))
    if y.shape[:2] != expected:
        raise ArithmeticError(f"{name}: {y.shape[:2]} outputs, where the formula says {expected}")
    window = "x".join(map(str, kernel.shape[:2]))
    print(f"{name:20} {window:>6} {stride:>7} {padding:>8} {dilation:>9}   {y.shape[0]} x {y.shape[1]} x {y.shape[2]}")
    return y


def each_colour(kernel: Kernel) -> Float[np.ndarray, "K K 1 3"]:
    """Depthwise: the same kernel for red, green and blue, each in a group of its own."""
    return np.stack([kernel] * 3, axis=-1)[:, :, None]


def questions(*kernels: Kernel) -> Float[np.ndarray, "K K 1 c_out"]:
    """One output channel for each kernel, all of them reading the one gray channel."""
    return np.stack(kernels, axis=-1)[:, :, None]


class Panel(NamedTuple):
    """One picture of the figure: in colour, gray from 0 to 1, or signed."""

    title: str
    picture: np.ndarray | Array
    kernel: Kernel | None = None  # drawn in the corner
    signed: bool = False


def panels(x: Float[Array, "height width 3"]) -> list[Panel]:
    """Filters the picture in every way. No padding but once: the zeros of a frame are edges that nobody drew."""
    print(f"a picture of {x.shape[0]} x {x.shape[1]} x {x.shape[2]}\n")
    print(f"{'filter':20} {'window':>6} {'stride':>7} {'padding':>8} {'dilation':>9}   output")
    gray = filtered("luma", x, LUMA[None, None, :, None])
    blurred = filtered("box", x, each_colour(box(4)), padding=4)
    g, bell = gaussian_1d(3), gaussian(3)
    smooth = filtered("Gaussian", x, each_colour(bell))
    rows = filtered("  along u", x, each_colour(g[None, :]))
    twice = filtered("  then along v", rows, each_colour(g[:, None]))
    half = filtered("Gaussian", x, each_colour(gaussian(1)), stride=2)
    sharp = filtered("sharpen", x, each_colour(sharpen(1)))
    second = filtered("Laplacian", gray, questions(laplacian()))
    wide = filtered("Laplacian", gray, questions(laplacian()), dilation=2)
    slope = filtered("Sobel, both", gray, questions(*sobel()))
    bank = filtered(f"Gabor, {len(ANGLES)} angles", gray, questions(*map(gabor, ANGLES)))

    difference = float(jnp.abs(twice - smooth).max())
    print("\neach size is floor((I + 2 padding - dilation (K - 1) - 1) / stride) + 1")
    print(f"Gaussian in two passes of {g.size} taps for one of {bell.size}: largest difference {difference:.1e}")
    if not difference <= TOLERANCE:  # so written, a NaN fails too
        raise ArithmeticError(f"the two passes differ from the one by {difference:.1e}")

    down, right = slope[..., 0], slope[..., 1]
    steepness = jnp.hypot(down, right)
    return [
        Panel("before", x),
        Panel("luma: 1 × 1 over the colours", gray[..., 0]),
        Panel("box 9 × 9; padding 4 lets in a dark frame", blurred, box(4)),
        Panel("Gaussian, σ = 3", smooth, bell),
        Panel("sharpen: δ - Laplacian", sharp, sharpen(1)),
        Panel("Gaussian, σ = 1, stride 2: half the size", half, gaussian(1)),
        Panel("Laplacian", second[..., 0], laplacian(), signed=True),
        Panel("Laplacian, dilation 2", wide[..., 0], laplacian(), signed=True),
        Panel("Sobel, left to right", right, sobel()[1], signed=True),
        Panel("Sobel, top to bottom", down, sobel()[0], signed=True),
        Panel("Sobel, magnitude", steepness / jnp.percentile(steepness, 99)),
        Panel("Sobel, direction as hue", direction(down, right)),
        *(Panel(f"Gabor, {angle}°", bank[..., i], gabor(angle), signed=True) for i, angle in enumerate(ANGLES)),
    ]


def direction(down: Float[Array, "height width"], right: Float[Array, "height width"]) -> np.ndarray:
    """The way uphill as a hue, the brighter the steeper; the root lifts what is faint."""
    steepness = np.hypot(down, right)
    hue = np.arctan2(down, right) / (2 * math.pi) % 1
    value = np.clip(steepness / np.percentile(steepness, 99), 0, 1) ** 0.5
    return hsv_to_rgb(np.stack([hue, np.ones_like(hue), value], axis=-1))


def draw(panels: list[Panel], path: Path) -> None:
    """Four panels a row. Signed ones are white at zero, red above, blue below, and saturate at 1 % of the pixels."""
    columns = 4
    figure = Figure(figsize=(4 * columns, 2.95 * math.ceil(len(panels) / columns)), layout="constrained")
    for place, (title, picture, kernel, signed) in enumerate(panels, start=1):
        axes = figure.add_subplot(math.ceil(len(panels) / columns), columns, place)
        values = np.asarray(picture)
        limit = np.percentile(np.abs(values), 99) if signed else 1
        show(axes, np.clip(values, -limit if signed else 0, limit), limit, signed=signed)
        axes.set_title(title, fontsize=12)
        if kernel is not None:
            inset = axes.inset_axes((0.8, 0.68, 0.18, 0.3))
            show(inset, kernel, np.abs(kernel).max(), signed=True)
    figure.savefig(path, dpi=110, format="png")


def show(axes: Any, values: np.ndarray, limit: float, *, signed: bool) -> None:
    """Without ticks: a pixel's number says nothing here."""
    colours = {"cmap": "RdBu_r" if signed else "gray", "vmin": -limit if signed else 0, "vmax": limit}
    axes.imshow(values, **colours, interpolation_stage="data")  # where it shrinks, + and - cancel to white
    axes.set(xticks=[], yticks=[])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="filters.py", description="Filters a photograph. Defaults stand in brackets.")
    parser.add_argument("--picture", choices=("flower", "china"), default="flower", help="[%(default)s]")
    parser.add_argument("--out", type=Path, default=Path("out/filters.png"), metavar="FILE", help="[%(default)s]")
    options = parser.parse_args(argv)

    x = jnp.asarray(load_sample_image(f"{options.picture}.jpg"), jnp.float32) / 255
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        draw(panels(x), options.out)
    except OSError as error:
        print(f"filters.py: error: cannot write to {options.out}: {error.strerror}", file=sys.stderr)
        return 2
    print(f"before and after: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
