"""One matrix product per tap, for arrays that the compiler may partition over several mesh axes.

With x[b, s n + d k - lo] the inputs that the outputs read through tap k, zero outside the bounds of x,

    y[b, n, o] = sum_k  sum_i  x[b, s n + d k - lo, i]  w[k, i, o]                             (1)
    x_bar[b, s n + d k - lo, i] += sum_o  y_bar[b, n, o]  w[k, i, o]    for each k             (2)
    w_bar[k, i, o] = sum_{b, n}  x[b, s n + d k - lo, i]  y_bar[b, n, o]                       (3)

XLA (jax 0.10 to 0.12) partitions its own convolution incorrectly if space is sharded over one mesh axis while another
axis is idle: it sums the partial results of all devices, and so multiplies the result by the number of idle ones. This
affects (3), with groups also for a sharded batch, and (1) and (2) if the kernel or the result is sharded too. XLA
partitions slices and matrix products correctly.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxseq import _precision
from jaxseq._correlation._form import Contraction, Form, padded
from jaxseq._correlation._rule import Rule


@dataclass(frozen=True)
class _Taps(Rule):
    """One matrix product per tap."""

    name = "taps"

    def applies(self, which: Contraction, form: Form) -> bool:
        return True

    def to_output(self, form: Form, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """Return y of (1)."""
        total: Any = None
        for tap, inputs in _inputs_of_taps(form, x):
            term = _product(form, "x,w->y", inputs, kernel[tap])
            total = term if total is None else total + term
        return total

    def to_input(self, form: Form, kernel: jax.Array, y_bar: jax.Array) -> jax.Array:
        """Return x_bar of (2)."""
        total: Any = None
        for tap in _all_taps(form):
            places = []
            for k, (I, O, _, s, d, (lo, _)) in zip(tap, form.axes(), strict=True):
                first = d * k - lo
                places.append((first, I - (first + (O - 1) * s + 1), s - 1))
            term = padded(_product(form, "y,w->x", y_bar, kernel[tap]), places)
            total = term if total is None else total + term
        return total

    def to_kernel(self, form: Form, x: jax.Array, y_bar: jax.Array) -> jax.Array:
        """Return w_bar of (3)."""
        w_bar = [_product(form, "x,y->w", inputs, y_bar) for _, inputs in _inputs_of_taps(form, x)]
        return jnp.stack(w_bar).reshape(*form.kernel_size, *w_bar[0].shape)


TAPS = _Taps()


def _inputs_of_taps(form: Form, x: jax.Array) -> Iterator[tuple[tuple[int, ...], jax.Array]]:
    """Yield each tap k with x[b, s n + d k - lo]."""
    x = padded(x, [(lo, hi, 0) for lo, hi in form.geometry.padding])
    for tap in _all_taps(form):
        places = [(d * k, d * k + s * (O - 1) + 1, s) for k, (_, O, _, s, d, _) in zip(tap, form.axes(), strict=True)]
        first, last, step = zip((0, x.shape[0], 1), *places, (0, x.shape[-1], 1), strict=True)
        yield tap, lax.slice(x, first, last, step)


def _all_taps(form: Form) -> Iterator[tuple[int, ...]]:
    return product(*map(range, form.kernel_size))


def _product(form: Form, which: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the matrix product of one tap in each group.

    Leading axes are contracted without a reshape, because each of them may be sharded.
    """
    g, leading = form.geometry.groups, "stuv"[: 1 + len(form.kernel_size)]
    if g > 1:  # the last axis of all three is (g, channels of a group)
        a, b = (part.reshape(*part.shape[:-1], g, -1) for part in (a, b))
        letters = {"x": f"{leading}gi", "w": "igo", "y": f"{leading}go"}
    else:
        letters = {"x": f"{leading}i", "w": "io", "y": f"{leading}o"}
    result = jnp.einsum(
        which.translate(str.maketrans(letters)),
        a,
        b,
        precision=form.precision,
        preferred_element_type=_precision.accumulator(a.dtype),
    )
    return result.reshape(*result.shape[:-2], -1) if g > 1 else result
