"""Long windows: products of spectra.

Write the form on one axis of padded positions, 0 <= p < P = I + lo + hi: x̃[p] = x[p - lo], the window with its gaps
w̃[d k] = w[k], the cotangent ỹ[s n] = ȳ[n], all zero in between. Then (1) to (3) are correlations and a convolution,

    y~[p] = sum_q x̃[p + q] w̃[q]        x̄~[p] = sum_q ỹ[p - q] w̃[q]        w̄~[q] = sum_p x̃[p + q] ỹ[p]

of which y[n] = y~[s n], x̄[m] = x̄~[m + lo] and w̄[k] = w̄~[d k] are wanted. Over a circle of at least P positions
nothing that is wanted goes round: s n + d k < P. So with F the discrete Fourier transform on such a circle and
X = F x̃, W = F w̃, Y = F ỹ,

    y~ = F⁻¹(X W*)        x̄~ = F⁻¹(Y W)        w̄~ = F⁻¹(X Y*)

with the sums over channels, and over the batch in the last, inside. A star is the conjugate of the spectrum of a real
array; of a complex one, which the form does not conjugate, it is the spectrum read backwards, F⁻¹ being linear.

Forward and backward share X, W and Y where they are compiled together. The work does not depend on the window. Three
things differ from the other rules: rounding is relative to the largest outputs and not to each, spectra take memory
(one complex number for two of the array padded), and a NaN or an infinity reaches all positions of its channel.

The compiler does not split a Fourier transform over devices, not even by its batch: on a mesh of automatic axes it
gathers the batch first. Under `shard_map` and on an explicit mesh each device transforms its own part.

J. W. Cooley and J. W. Tukey, An algorithm for the machine calculation of complex Fourier series (1965); T. G. Stockham,
High-speed convolution and correlation (1966).
"""

import jax
import jax.numpy as jnp

from jaxseq import _precision
from jaxseq._correlation._form import Form, padded
from jaxseq._geometry import extent


def to_output(form: Form, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """y of (1)."""
    X, W = _of_x(form, x), _of_w(form, kernel)
    y = _inverse(form, _products(form, "n...gi,...igo->n...go", X, _backwards(form, W, x, first=0)), x, first=1)
    return y[(slice(None), *[slice(0, s * (O - 1) + 1, s) for _, O, _, s, _, _ in form.axes()])]


def to_input(form: Form, kernel: jax.Array, ȳ: jax.Array) -> jax.Array:
    """x̄ of (2)."""
    W, Y = _of_w(form, kernel), _of_y(form, ȳ)
    x̄ = _inverse(form, _products(form, "n...go,...igo->n...gi", Y, W), ȳ, first=1)
    places = [(-lo, I + lo - n, 0) for (I, *_, (lo, _)), n in zip(form.axes(), x̄.shape[1:-1], strict=True)]
    return padded(x̄, places)


def to_kernel(form: Form, x: jax.Array, ȳ: jax.Array) -> jax.Array:
    """w̄ of (3)."""
    X, Y = _of_x(form, x), _backwards(form, _of_y(form, ȳ), ȳ, first=1)
    w̄ = _inverse(form, _products(form, "n...gi,n...go->...igo", X, Y), x, first=0)
    return w̄[tuple(slice(0, d * (K - 1) + 1, d) for _, _, K, _, d, _ in form.axes())]


def positions(form: Form) -> list[int]:
    """P of each axis."""
    return [I + lo + hi for I, *_, (lo, hi) in form.axes()]


def _circle(form: Form) -> list[int]:
    """Positions of the circle: P, or a little more where P has large prime factors."""
    return [_smooth(max(P, extent(K, d))) for P, (_, _, K, _, d, _) in zip(positions(form), form.axes(), strict=True)]


def _smooth(n: int) -> int:
    """The least number from n on that is even and has no prime factor beyond 5."""
    odd = [3**b * 5**c for b in range(n.bit_length()) for c in range(n.bit_length()) if 3**b * 5**c < 2 * n]
    return min(f * 2 ** max(1, (-(-n // f) - 1).bit_length()) for f in odd)


# --- There: (N, *I, C) -> (N, *F, C), the kernel (*K, I', C) -> (*F, I', C) ---


def _of_x(form: Form, x: jax.Array) -> jax.Array:
    return _forward(form, x, [(lo, hi, 0) for lo, hi in form.geometry.padding], first=1)


def _of_w(form: Form, kernel: jax.Array) -> jax.Array:
    return _forward(form, kernel, [(0, 0, d - 1) for d in form.geometry.dilation], first=0)


def _of_y(form: Form, ȳ: jax.Array) -> jax.Array:
    return _forward(form, ȳ, [(0, 0, s - 1) for s in form.geometry.stride], first=1)


def _forward(form: Form, a: jax.Array, places: list[tuple[int, int, int]], first: int) -> jax.Array:
    """The spectrum over the spatial axes, which begin at `first`."""
    a = padded(a.astype(_precision.accumulator(a.dtype)), places, first)
    transform = jnp.fft.fftn if jnp.iscomplexobj(a) else jnp.fft.rfftn
    return transform(a, _circle(form), range(first, first + len(form.window)))


# --- In between ---


def _backwards(form: Form, A: jax.Array, a: jax.Array, first: int) -> jax.Array:
    """A* for the spectrum A of a."""
    if not jnp.iscomplexobj(a):
        return A.conj()
    axes = tuple(range(first, first + len(form.window)))
    return jnp.roll(jnp.flip(A, axes), 1, axes)  # frequency -f at the place of f


def _products(form: Form, letters: str, A: jax.Array, B: jax.Array) -> jax.Array:
    """At each frequency the sum over the channels of a group, or over the batch n, `letters` naming axes.

    The sum over one channel is none, and a product of arrays is faster than that many products of matrices.
    """
    g = form.geometry.groups
    if form.near * form.far == 1:
        if "n" not in letters.split("->")[1]:
            return jnp.sum(A * B, 0)[..., None, :]
        return A * jnp.expand_dims(B[..., 0, :], 0)
    C = jnp.einsum(letters, *(a.reshape(*a.shape[:-1], g, -1) for a in (A, B)), precision=form.precision)
    return C.reshape(*C.shape[:-2], -1)


# --- And back ---


def _inverse(form: Form, A: jax.Array, like: jax.Array, first: int) -> jax.Array:
    inverse = jnp.fft.ifftn if jnp.iscomplexobj(like) else jnp.fft.irfftn
    return inverse(A, _circle(form), range(first, first + len(form.window)))
