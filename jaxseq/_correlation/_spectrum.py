"""Large kernels: products of Fourier transforms (spectra).

Write the form on padded positions, 0 <= p < P = I + lo + hi: x̃[p] = x[p - lo], the dilated kernel w̃[d k] = w[k] and
the dilated cotangent ỹ[s n] = ȳ[n], all zero elsewhere. Then (1) to (3) are correlations and a convolution,

    y~[p] = sum_q x̃[p + q] w̃[q]        x̄~[p] = sum_q ỹ[p - q] w̃[q]        w̄~[q] = sum_p x̃[p + q] ỹ[p]

of which y[n] = y~[s n], x̄[m] = x̄~[m + lo] and w̄[k] = w̄~[d k] are needed. In a circular convolution of length at
least P, none of these wraps around, because s n + d k < P. With F the discrete Fourier transform of such a length and
X = F x̃, W = F w̃, Y = F ỹ,

    y~ = F⁻¹(X W*)        x̄~ = F⁻¹(Y W)        w̄~ = F⁻¹(X Y*)

with the sum over channels, or over the batch in the last, inside F⁻¹. A star negates the frequency, W*[f] = W[-f]. For
a real array this is the complex conjugate; for a complex array it is not, because the form does not conjugate.

Scale. X and W contain sums over many positions, and X W* products of these, which overflow long before y does. Each
array is therefore multiplied by a power of two of at most 2**LARGEST, one per group (and per batch entry, except for
w), that brings its largest number near 2**LARGEST. The result is multiplied by the inverse power. Powers of two do not
change the significand. Derivatives treat the powers as constants, so tangents are scaled with their primals.

    x[n] = 2**e[n] x'[n],  w = 2**f w',  ȳ[n] = 2**h[n] ȳ'[n],    so that    y[n] = 2**(e[n] + f) y'[n],
    x̄[n] = 2**(h[n] + f) x̄'[n]    and    w̄ = 2**E sum_n 2**(e[n] + h[n] - E) w̄'[n],  E the largest e[n] + h[n]

with n the batch entry, each equation for one group, and w̄'[n] the contraction (3) of x'[n] and ȳ'[n].

The forward and the backward pass share X, W and Y if they are compiled together. The work does not depend on the kernel
size. This rule differs from the others in three ways. Rounding errors are relative to the largest outputs and not to
each output. Spectra take memory, one complex number for two numbers of the padded array. A NaN or an infinity reaches
all positions of its channel.

The compiler does not partition a Fourier transform, not even along its batch: on a mesh of automatic axes it gathers
the batch first. Under `shard_map` and on an explicit mesh, each device transforms its own shard.

J. W. Cooley and J. W. Tukey, An algorithm for the machine calculation of complex Fourier series (1965); T. G. Stockham,
High-speed convolution and correlation (1966).
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxseq import _precision
from jaxseq._correlation._form import Contraction, Form, padded
from jaxseq._correlation._rule import Rule
from jaxseq._geometry import extent

# Exponent of the largest number of each group after scaling. Products of two spectra of 2**20 positions, summed over
# 2**10 channels or batch entries, then stay below 2**127, and numbers smaller by 2**158 are not lost.
LARGEST = 32


@dataclass(frozen=True)
class _Spectrum(Rule):
    """Products of Fourier transforms."""

    name = "spectrum"

    def applies(self, which: Contraction, form: Form) -> bool:
        return form.is_known() and form.geometry.method != "direct"

    def to_output(self, form: Form, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """Return y of (1)."""
        (X, e), (W, f) = _of_x(form, x), _of_w(form, kernel)
        spectrum = _products(form, "n...gi,...igo->n...go", X, _negate_frequencies(form, W, x, first=0))
        y = _inverse(form, spectrum, x, first=1)
        y = y[(slice(None), *[slice(0, s * (O - 1) + 1, s) for _, O, _, s, _, _ in form.axes()])]
        return _times_power(y, e + f)

    def to_input(self, form: Form, kernel: jax.Array, y_bar: jax.Array) -> jax.Array:
        """Return x̄ of (2)."""
        (W, f), (Y, h) = _of_w(form, kernel), _of_y(form, y_bar)
        x_bar = _inverse(form, _products(form, "n...go,...igo->n...gi", Y, W), y_bar, first=1)
        places = [(-lo, I + lo - n, 0) for (I, *_, (lo, _)), n in zip(form.axes(), x_bar.shape[1:-1], strict=True)]
        return _times_power(padded(x_bar, places), h + f)

    def to_kernel(self, form: Form, x: jax.Array, y_bar: jax.Array) -> jax.Array:
        """Return w̄ of (3)."""
        (X, e), (Y, h) = _of_x(form, x), _of_y(form, y_bar)
        largest = jnp.max(e + h, 0, keepdims=True)
        X = _times_power(X, e + h - largest)
        spectrum = _products(form, "n...gi,n...go->...igo", X, _negate_frequencies(form, Y, y_bar, first=1))
        w_bar = _inverse(form, spectrum, x, first=0)
        w_bar = w_bar[tuple(slice(0, d * (K - 1) + 1, d) for _, _, K, _, d, _ in form.axes())]
        return _times_power(w_bar, largest)


SPECTRUM = _Spectrum()


def _positions(form: Form) -> list[int]:
    """Return P for each axis."""
    return [I + lo + hi for I, *_, (lo, hi) in form.axes()]


def _transform_lengths(form: Form) -> list[int]:
    """Return the length of the transform of each axis: P, or slightly more if P has large prime factors."""
    return [
        _smooth_length(max(P, extent(K, d)))
        for P, (_, _, K, _, d, _) in zip(_positions(form), form.axes(), strict=True)
    ]


def _smooth_length(n: int) -> int:
    """Return the least even number >= n without a prime factor above 5."""
    from scipy.fft import next_fast_len  # noqa: PLC0415 - a large import, for large kernels only

    half: Any = next_fast_len(-(-n // 2), real=True)
    return 2 * half


# --- Forward transforms: (N, *I, C) -> (N, *F, C), kernel (*K, I', C) -> (*F, I', C); exponents (N, g), (1, g) ---


def _of_x(form: Form, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _forward(form, x, [(lo, hi, 0) for lo, hi in form.geometry.padding], first=1)


def _of_w(form: Form, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _forward(form, kernel, [(0, 0, d - 1) for d in form.geometry.dilation], first=0)


def _of_y(form: Form, y_bar: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _forward(form, y_bar, [(0, 0, s - 1) for s in form.geometry.stride], first=1)


def _forward(form: Form, a: jax.Array, places: list[tuple[int, int, int]], first: int) -> tuple[jax.Array, jax.Array]:
    """Return the spectrum of a / 2**e over the spatial axes, which begin at `first`, and e."""
    a = a.astype(_precision.accumulator(a.dtype))
    exponent = _exponent(form, a, first)
    a = padded(_times_power(a, -exponent), places, first)
    transform = jnp.fft.fftn if jnp.iscomplexobj(a) else jnp.fft.rfftn
    return transform(a, _transform_lengths(form), range(first, first + len(form.kernel_size))), exponent


# --- Powers of two ---


def _exponent(form: Form, a: jax.Array, first: int) -> jax.Array:
    """Return e such that the largest number of each group of a / 2**e is near 2**LARGEST, or less if it is below one.

    e has a lower bound because a tangent is scaled with its primal, and may be of size one where the primal is zero.
    """
    a = lax.stop_gradient(a)
    a = jnp.maximum(jnp.abs(a.real), jnp.abs(a.imag)) if jnp.iscomplexobj(a) else jnp.abs(a)
    a = a.reshape(*a.shape[:-1], form.geometry.groups, -1)
    largest = jnp.max(a, (*range(first, a.ndim - 2), a.ndim - 1)).reshape(-1, form.geometry.groups)
    info = jnp.finfo(largest.dtype)
    bits = lax.bitcast_convert_type(largest, f"int{info.bits}")  # of a positive number: exponent, then significand
    return jnp.maximum((bits >> info.nmant) + info.minexp - 1, 0) - LARGEST


def _times_power(a: jax.Array, exponent: jax.Array) -> jax.Array:
    """Return 2**exponent a, exactly. Exponents are (N, g) for `a` (N, ..., C), or (1, g) for any `a`.

    The product has two steps of half the exponent, so that neither factor nor intermediate result leaves the range of
    the dtype before the result does.
    """
    exponent = jnp.repeat(exponent, a.shape[-1] // exponent.shape[-1], -1)
    exponent = exponent.reshape(-1, *(1,) * (a.ndim - 2), a.shape[-1])
    half = exponent >> 1
    return a * _power(half, a) * _power(exponent - half, a)


def _power(exponent: jax.Array, like: jax.Array) -> jax.Array:
    """Return 2**exponent in the dtype of `like`, at least its smallest normal number."""
    info = jnp.finfo(like.dtype)
    bits = (jnp.maximum(exponent, info.minexp) + 1 - info.minexp) << info.nmant
    return lax.bitcast_convert_type(bits, info.dtype).astype(like.dtype)


# --- Products of spectra ---


def _negate_frequencies(form: Form, A: jax.Array, a: jax.Array, first: int) -> jax.Array:
    """Return A* for the spectrum A of `a`."""
    if not jnp.iscomplexobj(a):
        return A.conj()
    axes = tuple(range(first, first + len(form.kernel_size)))
    return jnp.roll(jnp.flip(A, axes), 1, axes)  # frequency -f at index f


def _products(form: Form, letters: str, A: jax.Array, B: jax.Array) -> jax.Array:
    """Return, at each frequency, the sum of products over the channels of a group or over the batch n.

    `letters` is an einsum equation. For one channel, an elementwise product is faster than many tiny matrix products.
    """
    g = form.geometry.groups
    if form.in_channels * form.out_channels == 1:
        if "n" not in letters.split("->")[1]:
            return jnp.sum(A * B, 0)[..., None, :]
        return A * jnp.expand_dims(B[..., 0, :], 0)
    C = jnp.einsum(letters, *(a.reshape(*a.shape[:-1], g, -1) for a in (A, B)), precision=form.precision)
    return C.reshape(*C.shape[:-2], -1)


# --- Inverse transform ---


def _inverse(form: Form, A: jax.Array, like: jax.Array, first: int) -> jax.Array:
    inverse = jnp.fft.ifftn if jnp.iscomplexobj(like) else jnp.fft.irfftn
    return inverse(A, _transform_lengths(form), range(first, first + len(form.kernel_size)))
