"""Newton iterations for the states of all steps at once.

With f_t(s) = step(s_{t-1}, x_t) and the residual ρ_t = f_t(s) - s_t, an iteration is (`_rule.py`)

    d_t = d_{t-1} κ A_t + ρ_t,    d_0 = 0,    s <- s + d

with all of A_t for "deer", its diagonal for "quasi-deer", and κ = 1 - damping. κ = 0 would be fixed-point iteration,
s <- f(s). The linear recurrence is solved for the change d and not for the new s, so that its rounding errors are
relative to d, which becomes small.

The first guess is f(s_0, x_t), one step from the carry for all t. If the first i states are exact, so is state i + 1
after the iteration, whatever A_t: in exact arithmetic, T iterations always suffice. In floating point, products of
large A_t overflow. Where s + d is not finite, the iteration takes f_t(s), which leaves exact states unchanged, or zero
if f_t(s) is not finite either.

An example has converged when max |ρ| <= tolerance · max |s| for every leaf of its state, the maximum over time and
units. Its states then stay, so that they do not depend on the other examples of the batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxseq._parallel import _solve
from jaxseq._parallel._jacobian import diagonal, jacobian
from jaxseq._parallel._steps import Steps, before


class Solution(NamedTuple):
    """The states after all steps, and how the iterations ended, for each example."""

    s: jax.Array  # (T, *B, N)
    iterations: jax.Array  # (*B,) int32
    residual: jax.Array  # (*B,)
    converged: jax.Array  # (*B,) bool


class Iterations(NamedTuple):
    """How to iterate. Static and hashable."""

    method: str
    tolerance: float
    maximum: int
    damping: float


class _Guess(NamedTuple):
    """The variables of the loop."""

    number: jax.Array  # of iterations so far
    s: jax.Array
    f: jax.Array  # the states after one step each, from s
    iterations: jax.Array
    residual: jax.Array


def solve(how: Iterations, steps: Steps) -> Solution:
    """Iterate until all examples have converged, or the maximum number of iterations is reached."""
    batch = steps.first.shape[:-1]
    keep = 1 - how.damping

    def all_steps(s: jax.Array) -> jax.Array:
        s_prev = before(steps.first, s)
        return steps.phi(steps.r(s_prev), s_prev)

    def is_open(guess: _Guess) -> jax.Array:
        return (guess.number < how.maximum) & ~jnp.all(guess.residual <= how.tolerance)

    def iterate(guess: _Guess) -> _Guess:
        s_prev, rho = before(steps.first, guess.s), guess.f - guess.s
        a = jacobian(steps, s_prev) if how.method == "deer" else diagonal(steps, s_prev)
        d = _solve.solve(keep * a, rho)
        s = _first_finite(guess.s + d, guess.f)
        done = guess.residual <= how.tolerance
        s = jnp.where(done[None, ..., None], guess.s, s)
        f = all_steps(s)
        iterations = guess.iterations + (~done).astype(jnp.int32)
        return _Guess(guess.number + 1, s, f, iterations, jnp.where(done, guess.residual, _residual(steps, s, f)))

    s = all_steps(jnp.broadcast_to(steps.first, (steps.u.shape[0], *steps.first.shape)))
    s = _first_finite(s, jnp.zeros_like(s))
    f = all_steps(s)
    start = _Guess(jnp.zeros((), jnp.int32), s, f, jnp.zeros(batch, jnp.int32), _residual(steps, s, f))
    end = lax.while_loop(is_open, iterate, start)
    return Solution(end.s, end.iterations, end.residual, end.residual <= how.tolerance)


def _first_finite(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(a), a, jnp.where(jnp.isfinite(b), b, 0))


def _residual(steps: Steps, s: jax.Array, f: jax.Array) -> jax.Array:
    """Return max |f - s| / max |s| over time and units, the largest of all leaves, for each example."""
    found = []
    # XLA's CPU backend does not propagate NaN in a maximum (jax 0.10): infinity takes its place.
    difference = jnp.where(jnp.isfinite(f - s), f - s, jnp.inf)
    for of_difference, part in zip(steps.vectors.parts(difference), steps.vectors.parts(s), strict=True):
        largest, scale = (jnp.max(jnp.abs(a), (0, a.ndim - 1)) for a in (of_difference, part))
        found.append(largest / jnp.maximum(scale, jnp.finfo(s.dtype).tiny))
    return jnp.max(jnp.stack(found), 0)
