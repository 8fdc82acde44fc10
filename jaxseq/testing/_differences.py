"""Derivatives by finite differences: <c, D_u f> for directions u and projections c, with an error estimate.

The central difference

    q(h) = <c, f(x + h u) - f(x - h u)> / 2h  =  <c, D_u f> + a_1 h² + a_2 h⁴ + ...

is even in h, so the values at h, h/β, h/β² extrapolate to h = 0 by Neville's scheme in h²,

    T[0][i] = q(h_i)        T[j][i] = (β^{2j} T[j-1][i] - T[j-1][i-1]) / (β^{2j} - 1)

and the differences between neighbouring entries of the table estimate the error of an entry. This is Ridders' method.
If f is chaotic, a single table can be self-consistent and wrong by a factor of a thousand. `FIRST_STEPS` therefore
starts several tables, from large to small first steps. The result is the best entry of all tables. Its error is the sum
of the estimate of its table, the round-off floor of its step, and its difference from the second-best table.

At a kink of f, central differences converge to the mean of the two one-sided slopes. The kink shows in the difference
of these slopes,

    k(h) = <c, f(x + h u) + f(x - h u) - 2 f(x)> / 2h  =  half the jump in slope + b_1 h + b_3 h³ + ...

which tends to zero if f is smooth. A jump that all tables show is added to the error.

Source: C. J. F. Ridders, Accurate computation of F'(x) and F'(x) F''(x) (1982).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxseq._types import ArrayOrScalar
from jaxseq.testing._point import Arrays, Leaf

# Flat lists of arrays in compiled code.
Tracers = Sequence[jax.Array]
# A function of a projection, which reduces arrays like f(x) to a number.
Reduction = Callable[[Tracers], ArrayLike]

FIRST_STEPS = (1e-1, 3e-3, 1e-4, 3e-6)
beta = 1.4
ROWS = 8
STEPS = np.array([[first / beta**row for row in range(ROWS)] for first in FIRST_STEPS])  # (tables, rows)


class Differences(NamedTuple):
    """<c, D_u f> for each direction u and projection c, each (directions, projections).

    Attributes:
        value: the finite-difference estimate.
        error: the estimated error of `value`.
        kink: half the jump in slope, a part of `error`; exactly zero if rounding explains the measured jump.
        scale: S = ||c * D_u f||_2, the scale to which errors are compared.
    """

    value: ArrayOrScalar
    error: ArrayOrScalar
    kink: ArrayOrScalar
    scale: ArrayOrScalar


def quotients(
    f: Callable[[Arrays], Arrays], x: Arrays, directions: Tracers, projections: Tracers
) -> tuple[jax.Array, ...]:
    """Return q(h), k(h), S and the round-off floor at every step, the input of `extrapolated`. This part is compiled.

    Args:
        f: from a list of arrays to a list of arrays.
        x: the point.
        directions: arrays like x, stacked along a new first axis (d, ...).
        projections: arrays like f(x), stacked along a new first axis (p, ...).

    Returns:
        Four arrays (d, tables, rows, p).
    """
    steps = jnp.asarray(STEPS.reshape(-1))
    y = f(x)

    def along(u: Tracers) -> tuple[jax.Array, ...]:
        # Steps are relative: the largest entry of u changes x by h times the RMS of its leaf.
        sizes = [_size(a) for a in x]
        alpha = 1 / jnp.max(jnp.stack([jnp.max(jnp.abs(v), initial=0) / s for v, s in zip(u, sizes, strict=True)]))
        alpha = jnp.where(jnp.isfinite(alpha), alpha, 1)

        def at(h: jax.Array) -> tuple[ArrayLike, ...]:
            shifted = lambda h: f([a + _times(h * alpha, v) for a, v in zip(x, u, strict=True)])  # noqa: E731
            both = lax.map(shifted, jnp.stack([h, -h]))  # sequential: evaluates f itself, not its vmap
            slopes = [_times(1 / (2 * h * alpha), b[0] - b[1]) for b in both]
            bends = [_times(1 / (2 * h * alpha), b[0] - m + (b[1] - m)) for b, m in zip(both, y, strict=True)]
            # A bound on the change of the numerator by rounding: 2 eps max|f| for each element and each side.
            floors = [jnp.max(jnp.abs(b), axis=0) * (4 * jnp.finfo(jnp.float64).eps / (h * alpha)) for b in both]
            return tuple(jax.vmap(reduction)(projections) for reduction in _reductions(slopes, bends, floors))

        return lax.map(at, steps)

    found = lax.map(along, directions)
    return tuple(a.reshape(a.shape[0], *STEPS.shape, -1) for a in found)


def _size(a: Leaf) -> jax.Array:
    rms = jnp.sqrt(jnp.sum(jnp.abs(a) ** 2) / max(a.size, 1))
    return jnp.where(rms > 0, rms, 1)


def _times(scalar: jax.Array, a: jax.Array) -> jax.Array:
    return scalar.astype(a.dtype) * a


def _reductions(slopes: Tracers, bends: Tracers, floors: Tracers) -> tuple[Reduction, ...]:
    """Return <c, slope>, <c, bend> and the norms of c * slope and c * floor, as functions of c."""

    def inner_with(arrays: Tracers) -> Reduction:
        return lambda c: sum(jnp.sum((a * s).real) for a, s in zip(c, arrays, strict=True))

    def norm_with(arrays: Tracers) -> Reduction:
        def norm(c: Tracers) -> jax.Array:
            return jnp.sqrt(sum(jnp.sum((jnp.abs(a) * jnp.abs(s)) ** 2) for a, s in zip(c, arrays, strict=True)))

        return norm

    return inner_with(slopes), inner_with(bends), norm_with(slopes), norm_with(floors)


def extrapolated(q: ArrayOrScalar, k: ArrayOrScalar, S: ArrayOrScalar, floor: ArrayOrScalar) -> Differences:
    """Extrapolate the result of `quotients` to h = 0. S is taken at the smallest step of the best table."""
    tables = range(len(FIRST_STEPS))
    values, errors = (np.stack(part) for part in zip(*(_ridders(q[:, t], floor[:, t]) for t in tables), strict=True))
    order = np.argsort(errors, axis=0)
    best, second = (np.take_along_axis(values, order[k : k + 1], 0)[0] for k in (0, 1))
    kink = _jump(k, floor)
    error = np.take_along_axis(errors, order[:1], 0)[0] + np.abs(best - second) + kink
    scale = np.take_along_axis(S[:, :, -1].swapaxes(0, 1), order[:1], 0)[0]
    return Differences(best, np.where(np.isfinite(error), error, np.inf), kink, scale)


def _jump(k: ArrayOrScalar, floor: ArrayOrScalar) -> ArrayOrScalar:
    """Return |k(0)| from the last two steps less the bound on rounding, the minimum over tables: (d, p)."""
    limit = (beta * k[:, :, -1] - k[:, :, -2]) / (beta - 1)
    rounding = (beta * floor[:, :, -1] + floor[:, :, -2]) / (beta - 1)
    return np.nan_to_num(np.maximum(np.abs(limit) - rounding, 0), nan=0.0, posinf=0.0).min(1)


def _ridders(q: ArrayOrScalar, floor: ArrayOrScalar) -> tuple[ArrayOrScalar, ArrayOrScalar]:
    """Return the best entry of one table and its error, both (d, p); q and floor are (d, rows, p)."""
    level, values, errors = q, [], []  # level holds T[j][i] for i = j, ..., ROWS - 1
    with np.errstate(all="ignore"):  # entries with NaN, from outside the domain of f, get an infinite error
        for j in range(1, ROWS):
            factor = beta ** (2 * j)
            finer, coarser = level[:, 1:], level[:, :-1]
            level = (factor * finer - coarser) / (factor - 1)
            apart = np.maximum(np.abs(level - finer), np.abs(level - coarser))
            values.append(level)
            errors.append(np.where(np.isfinite(apart), apart + floor[:, j:], np.inf))
    value, error = np.concatenate(values, 1), np.concatenate(errors, 1)
    best = np.argmin(error, 1)[:, None]
    return np.take_along_axis(value, best, 1)[:, 0], np.take_along_axis(error, best, 1)[:, 0]
