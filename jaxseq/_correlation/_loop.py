"""Grouped convolution as a loop over taps, with one matrix product per tap and group.

With S_k the slice of padded x that the outputs read through tap k, S_k[b, n] = x[b, s n + d k - lo],

    y = sum_k S_k w[k]
    x_bar[b, s n + d k - lo] += y_bar[b, n] w[k]^T    for each k
    w_bar[k] = sum_{b, n} S_k[b, n]^T y_bar[b, n]

in each group. Any kernel size needs the memory of one tap only. Unlike in `_spectrum` and `_blocks`, each output is a
sum over its own receptive field and group, and nothing else.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxseq import _mesh, _precision
from jaxseq._correlation._form import Contraction, Form, padded
from jaxseq._correlation._rule import Rule
from jaxseq._geometry import extent


@dataclass(frozen=True)
class _Loop(Rule):
    """A loop over taps."""

    name = "loop"
    backends = frozenset({"cpu"})

    def applies(self, which: Contraction, form: Form) -> bool:
        return form.is_known()

    def to_output(self, form: Form, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """Return y of (1)."""
        x = padded(x, [(lo, hi, 0) for lo, hi in form.geometry.padding])

        def add(y: jax.Array, at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            start, w = at
            return y + _product(form, "...gi,igo->...go", _inputs_of_tap(form, x, start), w), None

        shape = (x.shape[0], *form.outputs, kernel.shape[-1])
        return _scan_taps(form, add, _zeros(shape, x, kernel), _merge_taps(form, kernel))[0]

    def to_input(self, form: Form, kernel: jax.Array, y_bar: jax.Array) -> jax.Array:
        """Return x_bar of (2)."""
        spans = [s * (O - 1) + extent(K, d) for _, O, K, s, d, _ in form.axes()]

        def add(x_bar: jax.Array, at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            start, w = at
            term = padded(_product(form, "...go,igo->...gi", y_bar, w), [(0, 0, s - 1) for s in form.geometry.stride])
            at_start = _indices(start)
            total = lax.dynamic_slice(x_bar, at_start, term.shape) + term
            return lax.dynamic_update_slice(x_bar, total, at_start), None

        shape = (y_bar.shape[0], *spans, form.in_channels * form.geometry.groups)
        x_bar = _scan_taps(form, add, _zeros(shape, y_bar, kernel), _merge_taps(form, kernel))[0]
        return padded(x_bar, [(-lo, I + lo - P, 0) for (I, *_, (lo, _)), P in zip(form.axes(), spans, strict=True)])

    def to_kernel(self, form: Form, x: jax.Array, y_bar: jax.Array) -> jax.Array:
        """Return w_bar of (3)."""
        x = padded(x, [(lo, hi, 0) for lo, hi in form.geometry.padding])
        letters = "stuvw"[: y_bar.ndim - 1]  # batch and space, which the product sums over

        def term(_: None, at: tuple[jax.Array, None]) -> tuple[None, jax.Array]:
            return None, _product(form, f"{letters}gi,{letters}go->igo", _inputs_of_tap(form, x, at[0]), y_bar)

        return _scan_taps(form, term, None, None)[1].reshape(*form.kernel_size, form.in_channels, y_bar.shape[-1])


LOOP = _Loop()


def _scan_taps(form: Form, step: Any, total: Any, weights: jax.Array | None) -> tuple[Any, Any]:
    """Run `total, term = step(total, (d k, w[k]))` for every tap k. Return the last total and all terms."""
    starts = np.array([*np.ndindex(*form.kernel_size)], np.int32) * np.array(form.geometry.dilation, np.int32)
    # Without the checkpoint, a second derivative would store every S_k.
    return lax.scan(jax.checkpoint(step, prevent_cse=False), total, (jnp.asarray(starts), weights))


def _inputs_of_tap(form: Form, x: jax.Array, start: jax.Array) -> jax.Array:
    """Return S_k for d k = `start`. `x` is padded."""
    sizes = [s * (O - 1) + 1 for _, O, _, s, *_ in form.axes()]
    rows = lax.dynamic_slice(x, _indices(start), (x.shape[0], *sizes, x.shape[-1]))
    return rows[(slice(None), *(slice(None, None, s) for s in form.geometry.stride))]


def _indices(start: jax.Array) -> tuple[jax.Array, ...]:
    """Return the start indices into an array (N, *space, C)."""
    zero = jnp.zeros((), start.dtype)
    return zero, *start, zero


def _product(form: Form, letters: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Return one term: a matrix product per group, or an elementwise product for one channel on either side."""
    g, wide = form.geometry.groups, _precision.accumulator(a.dtype)
    if form.in_channels * form.out_channels == 1:
        a, b = a.astype(wide), b.astype(wide)
        if letters.endswith("->igo"):
            return jnp.sum(a * b, range(a.ndim - 1))[None]
        return a * jnp.expand_dims(b[0], range(a.ndim - 1))
    a, b = (part.reshape(*part.shape[:-1], g, -1) for part in (a, b))
    result = jnp.einsum(letters, a, b, precision=form.precision, preferred_element_type=wide)
    return result.reshape(*result.shape[:-2], -1)


def _merge_taps(form: Form, kernel: jax.Array) -> jax.Array:
    return kernel.reshape(-1, *kernel.shape[len(form.kernel_size) :])


def _zeros(shape: tuple[int, ...], a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the initial value of a sum of products of `a` and `b`, varying over the same mesh axes."""
    zeros = jnp.zeros(shape, _precision.accumulator(a.dtype))
    return _mesh.align_varying((zeros, a, b))[0]
