"""Few channels per group: sums of shifted products.

With I' inputs and O' outputs in each of g groups, channel i = (γ, i') and o = (γ, o'), collect channel i' (or o') of
every group into one array with g channels. The three contractions are then sums over taps and over i' (or o') of
elementwise products:

    y_o'[b, n, γ] = sum_{k, i'}  x_i'[b, s n + d k - lo, γ]  w[k, i', o'][γ]                   (1)
    x̄_i'[b, m, γ] = sum_{k, o'}  ȳ_o'[b, (m - d k + lo) / s, γ]  w[k, i', o'][γ]               (2)
    w̄[k, i', o'][γ] = sum_{b, n}  x_i'[b, s n + d k - lo, γ]  ȳ_o'[b, n, γ]                     (3)

where (2) runs over the taps k for which s divides m - d k + lo. These are the same for all m = s q + r of a residue r,

    x̄_i'[b, s q + r, γ] = sum_{k : s | r + lo - d k, o'}  ȳ_o'[b, q + (r + lo - d k) / s, γ]  w[k, i', o'][γ]

so each residue is a separate sum of shifted products, and no product involves the zeros between the elements of ȳ.

A depthwise convolution has I' = O' = 1. The compiler makes one pass over the arrays of (1) and of (2), whereas XLA's
CPU convolution treats each group as a separate convolution. The terms are unrolled, so their number is limited.

(3) sums over all elements of x and ȳ, K I' O' times. On CPU, XLA would write the products to memory, one array per
term, before summing them. There, ȳ is processed in blocks of R rows, few enough that the partial sums

    a[k, i', o'][b, r, γ] += x_i'[b, s (R t + r) + d k - lo, γ]  ȳ_o'[b, R t + r, γ],    block t, row r < R

stay in the cache. These are summed over b and r at the end.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxseq import _mesh, _precision, _sizes
from jaxseq._correlation._form import Contraction, Form, padded
from jaxseq._correlation._rule import Rule
from jaxseq._geometry import extent


@dataclass(frozen=True)
class _Shifts(Rule):
    """Sums of shifted products."""

    name = "shifts"

    def applies(self, which: Contraction, form: Form) -> bool:
        return form.is_known()

    def to_output(self, form: Form, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """Return y of (1)."""
        geometry = form.geometry
        x = padded(x, [(lo, hi, 0) for lo, hi in geometry.padding])
        views = [
            list(_inputs_of_tap(x_, form.kernel_size, form.outputs, geometry.stride, geometry.dilation))
            for x_ in _split_channels(x, form.in_channels)
        ]
        ys = [
            _sum(
                (part, kernel[(*tap, i, slice(o, None, form.out_channels))])
                for i, parts in enumerate(views)
                for tap, part in parts
            )
            for o in range(form.out_channels)
        ]
        return _stack_channels(ys)

    def to_input(self, form: Form, kernel: jax.Array, y_bar: jax.Array) -> jax.Array:
        """Return x̄ of (2)."""
        stride, outputs = form.geometry.stride, form.outputs
        if prod(stride) > form.tuning.residues:  # most residues would be zero: dilate ȳ by the stride instead
            y_bar = padded(y_bar, [(0, 0, s - 1) for s in stride])
            stride, outputs = (1,) * len(stride), y_bar.shape[1:-1]
        taps, counts, places = [], [], []
        for (I, _, K, _, d, (lo, _)), s, O in zip(form.axes(), stride, outputs, strict=True):
            by_residue = [[(k, (r + lo - d * k) // s) for k in range(K) if (r + lo - d * k) % s == 0] for r in range(s)]
            shifts = [shift for pairs in by_residue for _, shift in pairs]
            count, before = -(-I // s), max(0, -min(shifts))
            taps.append([[(k, before + shift) for k, shift in pairs] for pairs in by_residue])
            counts.append(count)
            places.append((before, max(0, max(shifts) + count - O), 0))
        ys_bar = _split_channels(padded(y_bar, places), form.out_channels)

        def part(i: int, residues: tuple[int, ...]) -> jax.Array:
            shifted_taps = [*product(*(by_residue[r] for by_residue, r in zip(taps, residues, strict=True)))]
            if not shifted_taps:
                zeros = jnp.zeros((y_bar.shape[0], *counts, form.geometry.groups), _precision.accumulator(y_bar.dtype))
                return _mesh.align_varying((zeros, y_bar))[0]
            return _sum(
                (
                    y_bar_[
                        (slice(None), *(slice(start, start + n) for (_, start), n in zip(tap, counts, strict=True)))
                    ],
                    kernel[(*(k for k, _ in tap), i, slice(o, None, form.out_channels))],
                )
                for o, y_bar_ in enumerate(ys_bar)
                for tap in shifted_taps
            )

        xs_bar = [
            _interleave([part(i, r) for r in product(*map(range, stride))], stride) for i in range(form.in_channels)
        ]
        return _stack_channels([x_bar[(slice(None), *map(slice, form.space))] for x_bar in xs_bar])

    def to_kernel(self, form: Form, x: jax.Array, y_bar: jax.Array) -> jax.Array:
        """Return w̄ of (3)."""
        x = padded(x, [(lo, hi, 0) for lo, hi in form.geometry.padding])
        w_bar = _by_blocks(form, x, y_bar).reshape(
            *form.kernel_size, form.in_channels, form.out_channels, form.geometry.groups
        )
        return w_bar.swapaxes(-1, -2).reshape(*form.kernel_size, form.in_channels, -1)


SHIFTS = _Shifts()


def _interleave(parts: list[jax.Array], stride: tuple[int, ...]) -> jax.Array:
    """Return the array over positions s q + r from an array over q for each residue r."""
    if len(parts) == 1:
        return parts[0]
    axes = range(1, 1 + len(stride))
    x = jnp.stack(parts, -1).reshape(*parts[0].shape, *stride)  # (N, *Q, g, *s)
    x = x.transpose([0, *(axis for q in axes for axis in (q, len(stride) + 1 + q)), len(stride) + 1])
    return x.reshape(x.shape[0], *(n * s for n, s in zip(parts[0].shape[1:-1], stride, strict=True)), x.shape[-1])


def _by_blocks(form: Form, x: jax.Array, y_bar: jax.Array) -> jax.Array:
    """Return the sums of (3), (K I' O', g), computed in blocks of rows. `x` is padded."""
    O, s, span = form.outputs[0], form.geometry.stride[0], extent(form.kernel_size[0], form.geometry.dilation[0])
    batch = y_bar.shape[0] if _sizes.is_concrete(y_bar.shape[0]) else 1
    terms, row = (
        prod(form.kernel_size) * form.in_channels * form.out_channels,
        batch * prod(y_bar.shape[2:]) // form.out_channels * 4,
    )
    blocks = -(-O // max(1, form.tuning.cache // (terms * row)))
    rows = -(-O // blocks)
    if blocks == 1:
        return jnp.stack([_sum_positions(a) for a in _terms(form, x, y_bar)])
    # Pad the last block with zeros: blocks of equal size are compiled once.
    missing = s * (rows * blocks - 1) + span - x.shape[1]
    x, y_bar = padded(x, [(0, max(0, missing), 0)]), padded(y_bar, [(0, rows * blocks - O, 0)])

    def block(t: Any) -> list[jax.Array]:
        x_block = lax.dynamic_slice_in_dim(x, t * rows * s, (rows - 1) * s + span, 1)
        return _terms(form, x_block, lax.dynamic_slice_in_dim(y_bar, t * rows, rows, 1))

    def add(partial_sums: list[jax.Array], t: jax.Array) -> tuple[list[jax.Array], None]:
        return [a + term for a, term in zip(partial_sums, block(t), strict=True)], None

    zeros = [jnp.zeros(term.shape, term.dtype) for term in jax.eval_shape(block, 0)]
    partial_sums, _ = lax.scan(add, _mesh.align_varying((zeros, x, y_bar))[0], jnp.arange(blocks))
    return jnp.stack([_sum_positions(a) for a in partial_sums])


def _terms(form: Form, x: jax.Array, y_bar: jax.Array) -> list[jax.Array]:
    """Return the products of (3) for each tap and pair of channels, each of the size of ȳ_o'. `x` is padded."""
    geometry, outputs = form.geometry, y_bar.shape[1:-1]
    wide = _precision.accumulator(y_bar.dtype)
    views = [
        _inputs_of_tap(x_, form.kernel_size, outputs, geometry.stride, geometry.dilation)
        for x_ in _split_channels(x, form.in_channels)
    ]
    by_tap = zip(*views, strict=True)
    ys_bar = [y_bar_.astype(wide) for y_bar_ in _split_channels(y_bar, form.out_channels)]
    return [part.astype(wide) * y_bar_ for parts in by_tap for _, part in parts for y_bar_ in ys_bar]


def _sum_positions(a: jax.Array) -> jax.Array:
    return jnp.sum(a, range(a.ndim - 1))


def _inputs_of_tap(
    x: jax.Array,
    kernel_size: tuple[int, ...],
    outputs: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Iterator[tuple[tuple[int, ...], jax.Array]]:
    """Yield each tap k with x[s n + d k], the inputs that the outputs read through it. `x` is padded."""
    for tap in product(*map(range, kernel_size)):
        places = [
            slice(d * k, d * k + s * O, s)  # x[s n + d k], n = 0 .. O - 1
            for k, O, s, d in zip(tap, outputs, stride, dilation, strict=True)
        ]
        yield tap, x[(slice(None), *places)]


def _sum(pairs: Iterator[tuple[jax.Array, jax.Array]]) -> jax.Array:
    """Return the sum of the products of inputs (N, *O, g) and one weight per group."""
    total: Any = None
    for part, w in pairs:
        wide = _precision.accumulator(part.dtype)
        term = part.astype(wide) * jnp.expand_dims(w.astype(wide), range(part.ndim - 1))
        total = term if total is None else total + term
    return total


def _split_channels(x: jax.Array, channels: int) -> list[jax.Array]:
    """Split (..., g c) into c arrays (..., g), one for each channel of a group."""
    return [x] if channels == 1 else [x[..., c::channels] for c in range(channels)]


def _stack_channels(parts: list[jax.Array]) -> jax.Array:
    """Invert `_split_channels`."""
    return parts[0] if len(parts) == 1 else jnp.stack(parts, -1).reshape(*parts[0].shape[:-1], -1)
