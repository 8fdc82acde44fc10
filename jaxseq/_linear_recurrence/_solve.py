r"""Algorithms for h_t = a_t h_{t-1} + x_t, time first, in either direction, and for its backward pass.

A step is an affine map of the state, h -> a h + x. Two of them in sequence are one again:

    (a, x) then (a', x')  =  (a' a, a' x + x')

This is associative, so all states can be computed step by step, or from a tree of such pairs, which has the depth
log2 T and about twice the operations. In padding, the map is the identity: a = 1, x = 0. At a reset, it ignores the
state. A factor of zero does not, because 0 NaN = NaN, so a pair has a third entry, which is True if a reset is among
its steps:

    (a, x, r) then (a', x', r')  =  (a' a, x' if r' else a' x + x', r or r')

The backward pass is the same recurrence in the opposite direction, with the factor of the next step:

    g_t = ȳ_t + a_{t+1} g_{t+1}

Step by step, it multiplies after it has added, so that no array is shifted. Nothing is divided by a.

Source of the tree: G. E. Blelloch, Prefix sums and their applications (1990), section 1.4.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import PyTree

from jaxseq import _time

Mask = jax.Array | None  # (T, *B, 1), or without T in a step. None is no mask.


class Steps(NamedTuple):
    """What the steps of a recurrence read, time first.

    `a` is (T or 1, *B or 1, H or 1). `valid` is False in padding. `cut` is True where the state is reset, and in the
    backward pass also where truncation cuts the gradient.
    """

    a: jax.Array
    valid: Mask
    cut: Mask


class Algorithm(NamedTuple):
    """How the states are computed. Static and hashable.

    Attributes:
        dtype: the dtype of the state between steps.
        chunk: the number of steps of which the states are computed together, by an associative scan. Chunks follow each
            other in a loop. None computes the states step by step.
        unroll: the number of steps per iteration of the loop over steps.
    """

    dtype: np.dtype
    chunk: int | None = None
    unroll: int = 1


def step(dtype: np.dtype, h: jax.Array, a: jax.Array, x: jax.Array, valid: Mask, cut: Mask) -> jax.Array:
    """Return the new state. JAX can differentiate this at steps with NaN in padding: every operand is masked."""
    operands = a.astype(dtype), _time.replace_where(cut, h), x.astype(dtype)
    a, before, x = _time.zero_padding(valid, operands)
    return _time.select(valid, a * before + x, h)


def forward(
    algorithm: Algorithm,
    steps: Steps,
    x: jax.Array,
    h: jax.Array,
    *,
    reverse: bool,
    emit: Callable[[jax.Array], PyTree],
) -> tuple[jax.Array, PyTree]:
    """Return (h_T, emit(h) of every step), where padding emits a state of zero. In padding, h does not change."""
    dtype, constant = algorithm.dtype, steps.a[0]

    def one(h: jax.Array, at: Any) -> tuple[jax.Array, PyTree]:
        a, x, valid, cut = at
        h = step(dtype, h, constant if a is None else a, x, valid, cut)
        return h, emit(_time.zero_padding(valid, h))

    def chunk(h: jax.Array, at: Any) -> tuple[jax.Array, PyTree]:
        a, x, valid, cut = at
        cut = within(valid, cut)
        maps = factors(dtype, constant if a is None else a, x, valid)
        states = _all_states(maps, _time.zero_padding(valid, x.astype(dtype)), cut, h, reverse=reverse)
        return states[0 if reverse else -1], emit(_time.zero_padding(valid, states))

    return _run(algorithm, one, chunk, h, (_varying(steps.a), x, steps.valid, steps.cut), reverse=reverse)


def backward(
    algorithm: Algorithm,
    steps: Steps,
    y_bar: jax.Array,
    h_bar: jax.Array,
    before: jax.Array | None = None,
    *,
    reverse: bool,
    emits: bool = True,
) -> tuple[jax.Array, Any, jax.Array | None]:
    """Return the cotangent of h_0, g_t of every step, which is zero in padding, and the sum of g_t h_{t-1} over time.

    `h_bar` is the cotangent of h_T, and `before` are the states h_{t-1}, or None for no sum. `reverse` is the direction
    of the forward pass. Without `emits`, g_t is None.
    """
    dtype, constant = algorithm.dtype, steps.a[0]

    def one(carry: Any, at: Any) -> tuple[Any, jax.Array | None]:
        (c, total), (a, y_bar, valid, cut, before) = carry, at
        g = c + y_bar.astype(dtype)
        c_before = _time.replace_where(cut, (constant if a is None else a).astype(dtype) * g)
        c, g = _time.select(valid, c_before, c), _time.zero_padding(valid, g)
        return (c, None if before is None else total + g * before), g if emits else None

    def chunk(carry: Any, at: Any) -> tuple[Any, jax.Array | None]:
        (c, total), (a, y_bar, valid, cut, before) = carry, at
        cut = within(valid, cut)
        maps = factors(dtype, constant if a is None else a, y_bar, valid)
        first = -1 if reverse else 0
        of_next = partial(_time.previous_steps, reverse=not reverse)
        next_cut = None if cut is None else of_next(jnp.zeros_like(cut[0]), cut)
        next_maps = of_next(jnp.ones_like(maps[0]), maps)
        y_bar = _time.zero_padding(valid, y_bar.astype(dtype))
        g = _all_states(next_maps, y_bar, next_cut, c, reverse=not reverse)
        c = _time.replace_where(None if cut is None else cut[first], maps[first] * g[first])
        g = _time.zero_padding(valid, g)
        return (c, None if before is None else total + jnp.sum(g * before, 0)), g if emits else None

    start = h_bar, None if before is None else jnp.zeros_like(h_bar)
    arrays = _varying(steps.a), y_bar, steps.valid, steps.cut, before
    (first_bar, total), g = _run(algorithm, one, chunk, start, arrays, reverse=not reverse)
    return first_bar, g, total


def _varying(a: jax.Array) -> jax.Array | None:
    """Return `a` if it varies in time. A constant is not sliced in the loop."""
    return None if a.shape[0] == 1 else a


# --- Chunks ---


def _run(
    algorithm: Algorithm,
    one: Callable[..., Any],
    chunk: Callable[..., Any],
    h: PyTree,
    arrays: Any,
    *,
    reverse: bool,
) -> tuple[Any, PyTree]:
    """Scan over steps, or over chunks of equal length and then the rest."""
    size, total = algorithm.chunk, arrays[1].shape[0]
    if size is None:
        return lax.scan(one, h, arrays, reverse=reverse, unroll=algorithm.unroll)
    if size >= total:
        return chunk(h, arrays)
    return _time.scan_chunks(chunk, chunk, h, arrays, size, reverse=reverse)


def factors(dtype: np.dtype, a: jax.Array, x: jax.Array, valid: Mask) -> jax.Array:
    """Return the factors of a chunk, with the shape of x. In padding they are 1."""
    a = jnp.broadcast_to(a.astype(dtype), x.shape)
    return _time.select(valid, a, jnp.ones_like(a))


def within(valid: Mask, cut: Mask) -> Mask:
    """Return `cut` where it is not in padding."""
    return cut if valid is None or cut is None else cut & valid


def _all_states(a: jax.Array, x: jax.Array, cut: Mask, h: jax.Array, *, reverse: bool) -> jax.Array:
    """Return the states of all steps, from h, as an associative scan of maps."""
    first = -1 if reverse else 0
    x = x.at[first].add(_time.replace_where(None if cut is None else cut[first], a[first] * h))

    return lax.associative_scan(then, (a, x) if cut is None else (a, x, cut), reverse=reverse)[1]


def then(left: tuple[jax.Array, ...], right: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Return the map of two maps in sequence: (factor, state), and True where there is a cut."""
    (a, x, *cut), (next_a, next_x, *next_cut) = left, right
    if not cut:
        return next_a * a, next_a * x + next_x
    return next_a * a, jnp.where(next_cut[0], next_x, next_a * x + next_x), cut[0] | next_cut[0]
