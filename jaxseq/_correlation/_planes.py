"""Convolution over three axes: the taps of the first axis unrolled, with a convolution over the other two for each.

Write n = (z, ν), k = (κ, k') and m = (ζ, μ) for the first axis and the rest. With s, d and lo those of the first axis,
and C the form over the rest,

    y[b, z] = sum_κ  C(x[b, s z + d κ - lo], w[κ])                                             (1)
    x̄[b, ζ] = sum_{z, κ : s z + d κ - lo = ζ}  Cᵀ(w[κ], ȳ[b, z])                                (2)
    w̄[κ] = the contraction (3) of C, of x[b, s z + d κ - lo] and ȳ[b, z], with the pairs (b, z) as the batch

XLA's CPU backend has fast code for one and two axes. Its convolution over three axes is 3 to 100 times slower than this
rule: docs/measured-convolution.md.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxseq._correlation._form import Contraction, Form, padded
from jaxseq._correlation._rule import Rule, by_chosen_rule


@dataclass(frozen=True)
class _Planes(Rule):
    """The taps of the first of three axes, unrolled."""

    name = "planes"
    backends = frozenset({"cpu"})

    def applies(self, which: Contraction, form: Form) -> bool:
        return form.is_known() and len(form.kernel_size) == 3

    def to_output(self, form: Form, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """Return y of (1)."""
        total: Any = None
        for kappa, plane in enumerate(_inputs_of_plane(form, x)):
            term = by_chosen_rule(Contraction.TO_OUTPUT, _rest(form), plane, kernel[kappa])
            total = term if total is None else total + term
        return total.reshape(x.shape[0], -1, *total.shape[1:])

    def to_input(self, form: Form, kernel: jax.Array, y_bar: jax.Array) -> jax.Array:
        """Return x̄ of (2)."""
        total: Any = None
        I, O, K, s, d, (lo, _) = next(form.axes())
        for kappa in range(K):
            planes = by_chosen_rule(Contraction.TO_INPUT, _rest(form), kernel[kappa], _flat(y_bar))
            planes = planes.reshape(y_bar.shape[0], O, *planes.shape[1:])
            first = d * kappa - lo
            term = padded(planes, [(first, I - (first + (O - 1) * s + 1), s - 1)])
            total = term if total is None else total + term
        return total

    def to_kernel(self, form: Form, x: jax.Array, y_bar: jax.Array) -> jax.Array:
        """Return w̄ of (3)."""
        contract = partial(by_chosen_rule, Contraction.TO_KERNEL, _rest(form))
        return jnp.stack([contract(plane, _flat(y_bar)) for plane in _inputs_of_plane(form, x)])


PLANES = _Planes()


def _rest(form: Form) -> Form:
    """Return the form over all axes but the first."""
    g = form.geometry
    return form._replace(
        geometry=g._replace(stride=g.stride[1:], padding=g.padding[1:], dilation=g.dilation[1:]),
        space=form.space[1:],
        outputs=form.outputs[1:],
        kernel_size=form.kernel_size[1:],
    )


def _inputs_of_plane(form: Form, x: jax.Array) -> Iterator[jax.Array]:
    """Yield the planes x[b, s z + d κ - lo], (N O_z, ...), for each tap κ of the first axis."""
    _, O, K, s, d, pads = next(form.axes())
    x = padded(x, [(*pads, 0)])
    for kappa in range(K):
        yield _flat(x[:, d * kappa : d * kappa + (O - 1) * s + 1 : s])


def _flat(x: jax.Array) -> jax.Array:
    """Merge the batch and the first axis."""
    return x.reshape(-1, *x.shape[2:])
