"""Three axes: the taps of the first written out, each a convolution over the other two.

With n = (z, ν), k = (κ, k'), m = (ζ, μ), first axis and the rest, s, d and lo those of the first axis and C the form
over the rest,

    y[b, z] = sum_κ  C(x[b, s z + d κ - lo], w[κ])                                             (1)
    x̄[b, ζ] = sum_{z, κ : s z + d κ - lo = ζ}  Cᵀ(w[κ], ȳ[b, z])                                (2)
    w̄[κ] = the contraction (3) of C with the pairs (b, z) as its batch, of x[b, s z + d κ - lo] and ȳ[b, z]

XLA's CPU backend has fast code for one and two axes; its own three are 3 to 100 times slower than this.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxseq._correlation._form import Contraction, Form, padded


def to_output(again: Contraction, form: Form, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """y of (1)."""
    total: Any = None
    for kappa, plane in enumerate(_inputs_of_plane(form, x)):
        term = again(_rest(form), plane, kernel[kappa])
        total = term if total is None else total + term
    return total.reshape(x.shape[0], -1, *total.shape[1:])


def to_input(again: Contraction, form: Form, kernel: jax.Array, y_bar: jax.Array) -> jax.Array:
    """x̄ of (2)."""
    total: Any = None
    I, O, K, s, d, (lo, _) = next(form.axes())
    for kappa in range(K):
        planes = again(_rest(form), kernel[kappa], _flat(y_bar))
        planes = planes.reshape(y_bar.shape[0], O, *planes.shape[1:])
        first = d * kappa - lo
        term = padded(planes, [(first, I - (first + (O - 1) * s + 1), s - 1)])
        total = term if total is None else total + term
    return total


def to_kernel(again: Contraction, form: Form, x: jax.Array, y_bar: jax.Array) -> jax.Array:
    """w̄ of (3)."""
    return jnp.stack([again(_rest(form), plane, _flat(y_bar)) for plane in _inputs_of_plane(form, x)])


def _rest(form: Form) -> Form:
    """The form over all axes but the first."""
    g = form.geometry
    return form._replace(
        geometry=g._replace(stride=g.stride[1:], padding=g.padding[1:], dilation=g.dilation[1:]),
        space=form.space[1:],
        outputs=form.outputs[1:],
        window=form.window[1:],
    )


def _inputs_of_plane(form: Form, x: jax.Array) -> Iterator[jax.Array]:
    """For each tap κ of the first axis the planes x[b, s z + d κ - lo], (N O_z, ...)."""
    _, O, K, s, d, pads = next(form.axes())
    x = padded(x, [(*pads, 0)])
    for kappa in range(K):
        yield _flat(x[:, d * kappa : d * kappa + (O - 1) * s + 1 : s])


def _flat(x: jax.Array) -> jax.Array:
    """Batch and first axis in one."""
    return x.reshape(-1, *x.shape[2:])
