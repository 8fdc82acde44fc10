"""The linear recurrence d_t = d_{t-1} A_t + b_t from d_0 = 0, with a matrix A_t for each step, and with a diagonal one.

Two steps in sequence are one again, as in `jaxseq/_linear_recurrence/_solve.py`, where the factors are elementwise:

    (A, b) then (A', b')  =  (A A', b A' + b')

An associative scan of such pairs has the depth log2 T and takes O(T N³) operations; step by step it is T products of a
vector and a matrix, O(T N²). `jaxseq.tuning.LinearTuning` decides, as for `jaxseq.linear_recurrence`, with N + 1 rows
for each state: step by step on a CPU, in chunks of steps elsewhere. Products are computed with the highest precision.

Source of the tree: G. E. Blelloch, Prefix sums and their applications (1990), section 1.4.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxseq import tuning
from jaxseq._linear_recurrence import _solve as elementwise

Pair = tuple[jax.Array, jax.Array]


def chunk_of(steps: int, size: int, rows: int) -> int | None:
    """Return the number of steps that are computed together, or None, for `size` elements of a state."""
    return tuning.for_backend().linear.chunk_of(steps, size * rows)


def solve(a: jax.Array, b: jax.Array, *, reverse: bool = False) -> jax.Array:
    """Return d (T, *B, N) for matrices a (T, *B, N, N), or for diagonals (T, *B, N).

    With `reverse`, d_t = d_{t+1} A_t + b_t from d_{T+1} = 0.
    """
    return (solve_diagonal if a.ndim == b.ndim else solve_matrices)(a, b, reverse=reverse)


def solve_diagonal(a: jax.Array, b: jax.Array, *, reverse: bool) -> jax.Array:
    first = jnp.zeros_like(b[0])
    algorithm = elementwise.Algorithm(b.dtype, chunk_of(b.shape[0], first.size, 1))
    factors = elementwise.Steps(a, None, None)
    found: jax.Array = elementwise.forward(algorithm, factors, b, first, reverse=reverse, emit=lambda d: d)[1]
    return found


def solve_matrices(a: jax.Array, b: jax.Array, *, reverse: bool) -> jax.Array:
    first, total = jnp.zeros_like(b[0]), b.shape[0]
    size = chunk_of(total, first.size, first.shape[-1] + 1)
    if size is None:
        return lax.scan(_step, first, (a, b), reverse=reverse)[1]
    chunk = partial(_chunk, reverse=reverse)
    if size >= total:
        return chunk(first, (a, b))[1]
    # Zeros behind the last step make all chunks equally long. They change no state: with `reverse`, d is zero there.
    count = -(-total // size)
    size = -(-total // count)
    behind = lambda v: jnp.pad(v, ((0, count * size - total), *((0, 0),) * (v.ndim - 1)))  # noqa: E731
    chunks = jax.tree.map(lambda v: behind(v).reshape(count, size, *v.shape[1:]), (a, b))
    d = lax.scan(chunk, first, chunks, reverse=reverse)[1]
    return d.reshape(count * size, *b.shape[1:])[:total]


def _step(d: jax.Array, at: Pair) -> Pair:
    a, b = at
    d = _product(d, a) + b
    return d, d


def _chunk(d: jax.Array, at: Pair, *, reverse: bool) -> Pair:
    """Return the last state of a chunk and all of its states, from the state before it."""
    (a, b), first = at, -1 if reverse else 0
    b = b.at[first].add(_product(d, a[first]))
    d = lax.associative_scan(_then, (a, b), reverse=reverse)[1]
    return d[0 if reverse else -1], d


def _then(left: Pair, right: Pair) -> Pair:
    """Return the pair of two pairs in sequence."""
    (a, b), (next_a, next_b) = left, right
    return jnp.matmul(a, next_a, precision=lax.Precision.HIGHEST), _product(b, next_a) + next_b


def _product(d: jax.Array, a: jax.Array) -> jax.Array:
    return jnp.matmul(d[..., None, :], a, precision=lax.Precision.HIGHEST)[..., 0, :]
