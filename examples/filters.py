"""Convolution as image filtering: classical, fixed kernels applied to a photograph.

    y[n, o] = sum_{k, i} x[s n + d k - lo, i] w[k, i, o]        `jaxseq.conv` with two spatial axes

The response of a kernel is largest where the image resembles the kernel. A kernel whose weights sum to 1 preserves
constant areas (blur, sharpen); one whose weights sum to 0 maps them to zero (Sobel, Laplacian, Gabor). The channels of
the kernel determine which inputs it reads: `(K, K, 1, 3)` in three groups filters each colour separately,
`(1, 1, 3, 1)` mixes the colours of one pixel, and `(K, K, 1, 4)` applies four filters to one gray image.

    python examples/filters.py                      a photograph of a dahlia, from scikit-learn
    python examples/filters.py --picture china      a photograph of a tower in Beijing, from scikit-learn
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
LUMA = np.array([0.2126, 0.7152, 0.0722])  # weights of red, green and blue in the luminance (Rec. ITU-R BT.709)
ANGLES = (0, 45, 90, 135)  # degrees, of the Gabor filters
TOLERANCE = 1e-5  # of one 2-D pass against two 1-D passes, in float32, on values from 0 to 1


# --- Kernels. k = (v, u) is relative to the central tap, v downwards and u to the right ---


def offsets(radius: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (v, u), which broadcast to the shape of the kernel."""
    v, u = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    return v, u


def box(radius: int) -> Kernel:
    """Box filter: w[v, u] = 1 / K², the mean over K × K pixels, K = 2 radius + 1."""
    K = 2 * radius + 1
    return np.full((K, K), 1 / K**2)


def gaussian_1d(sigma: float) -> Float[np.ndarray, " K"]:
    """Gaussian: g[u] = exp(-u² / 2σ²), normalized to sum 1, up to |u| = 3σ, where it is 1 % of its maximum."""
    radius = math.ceil(3 * sigma)
    g = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    return g / g.sum()


def gaussian(sigma: float) -> Kernel:
    """2-D Gaussian: w[v, u] = g[v] g[u]. It is separable, because exp(-(v² + u²) / 2σ²) is a product."""
    g = gaussian_1d(sigma)
    return np.outer(g, g)


def laplacian() -> Kernel:
    """Laplacian: w x = ∂²x/∂v² + ∂²x/∂u², with the second difference 1 -2 1 along each axis."""
    return np.array([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])


def sharpen(amount: float) -> Kernel:
    """Sharpening: w = δ - amount · Laplacian, one step of inverse diffusion."""
    w = -amount * laplacian()
    w[1, 1] += 1
    return w


def sobel() -> tuple[Kernel, Kernel]:
    """Sobel filters (∂x/∂v, ∂x/∂u): the difference -1 0 1 along one axis, the mean 1 2 1 along the other.

    The division by 8 maps a ramp of slope 1 to 1. The kernels are written for cross-correlation, the default of `conv`;
    with `flip=True` they change sign. All other kernels of this file are symmetric under a flip.
    """
    w = np.outer([-1, 0, 1], [1, 2, 1]) / 8
    return w, w.T


def gabor(angle: float, *, wavelength: float = 6, sigma: float = 3, aspect: float = 0.7) -> Kernel:
    """Gabor filter: w[v, u] = exp(-(p² + γ² q²) / 2σ²) (cos(2π p / λ) - c), a wave along p in a Gaussian envelope.

    p = u cos θ + v sin θ and q = v cos θ - u sin θ are u and v rotated by θ. The filter responds to bright lines along
    q, which are vertical for θ = 0. c makes the weights sum to 0, so constant areas map to zero. The |w| sum to 1.
    """
    v, u = offsets(math.ceil(3 * sigma))
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    p, q = u * cos + v * sin, v * cos - u * sin
    bell, wave = np.exp(-(p**2 + (aspect * q) ** 2) / (2 * sigma**2)), np.cos(2 * math.pi * p / wavelength)
    w = bell * (wave - (bell * wave).sum() / bell.sum())
    return w / np.abs(w).sum()


# --- Filtering ---


def output_size(I: int, K: int, *, stride: int, padding: int, dilation: int) -> int:
    """Return floor((I + lo + hi - d (K - 1) - 1) / s) + 1 with lo = hi = padding."""
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
    """Convolve, with the number of groups implied by the channels. Print the output size and check it."""
    groups = x.shape[-1] // kernel.shape[2]
    geometry: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
    y = jaxseq.conv(x, jnp.asarray(kernel, x.dtype), groups=groups, **geometry)
    expected = tuple(output_size(I, K, **geometry) for I, K in zip(x.shape[:2], kernel.shape[:2], strict=True))
    if y.shape[:2] != expected:
        raise ArithmeticError(f"{name}: {y.shape[:2]} outputs, expected {expected} by the formula")
    size = "x".join(map(str, kernel.shape[:2]))
    print(f"{name:20} {size:>6} {stride:>7} {padding:>8} {dilation:>9}   {y.shape[0]} x {y.shape[1]} x {y.shape[2]}")
    return y


def each_colour(kernel: Kernel) -> Float[np.ndarray, "K K 1 3"]:
    """Return a depthwise kernel that applies the same filter to red, green and blue."""
    return np.stack([kernel] * 3, axis=-1)[:, :, None]


def questions(*kernels: Kernel) -> Float[np.ndarray, "K K 1 c_out"]:
    """Return a kernel with one output channel for each filter, all of the same gray input channel."""
    return np.stack(kernels, axis=-1)[:, :, None]


class Panel(NamedTuple):
    """One image of the figure: in colour, gray from 0 to 1, or signed."""

    title: str
    picture: np.ndarray | Array
    kernel: Kernel | None = None  # drawn in the corner
    signed: bool = False


def panels(x: Float[Array, "height width 3"]) -> list[Panel]:
    """Apply all filters. Only one of them pads, because padding adds artificial edges at the border."""
    print(f"image size {x.shape[0]} x {x.shape[1]} x {x.shape[2]}\n")
    print(f"{'filter':20} {'kernel':>6} {'stride':>7} {'padding':>8} {'dilation':>9}   output")
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
    print("\noutput size: floor((I + 2 padding - dilation (K - 1) - 1) / stride) + 1")
    print(f"Gaussian, two passes of {g.size} taps against one of {bell.size}: largest difference {difference:.1e}")
    if not difference <= TOLERANCE:  # also true for NaN
        raise ArithmeticError(f"two 1-D passes differ from one 2-D pass by {difference:.1e}")

    down, right = slope[..., 0], slope[..., 1]
    steepness = jnp.hypot(down, right)
    return [
        Panel("original", x),
        Panel("luminance: 1 × 1 kernel over the colours", gray[..., 0]),
        Panel("box 9 × 9; padding 4 darkens the border", blurred, box(4)),
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
    """Encode the direction of the gradient as hue, and the square root of its magnitude as brightness."""
    steepness = np.hypot(down, right)
    hue = np.arctan2(down, right) / (2 * math.pi) % 1
    value = np.clip(steepness / np.percentile(steepness, 99), 0, 1) ** 0.5
    return hsv_to_rgb(np.stack([hue, np.ones_like(hue), value], axis=-1))


def draw(panels: list[Panel], path: Path) -> None:
    """Draw four panels per row. Signed panels are red above zero and blue below, and saturate at 1 % of the pixels."""
    columns = 4
    figure = Figure(figsize=(4 * columns, 2.95 * math.ceil(len(panels) / columns)), layout="constrained")
    figure.suptitle(
        "Filters, with their kernels in the corners. Red: positive, blue: negative, white: zero", fontsize=15
    )
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
    """Show an image without ticks."""
    colours = {"cmap": "RdBu_r" if signed else "gray", "vmin": -limit if signed else 0, "vmax": limit}
    axes.imshow(values, **colours, interpolation_stage="data")  # average values, not colours, when downsampling
    axes.set(xticks=[], yticks=[])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="filters.py", description="Filter a photograph. Defaults are in brackets.")
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
    print(f"images: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
