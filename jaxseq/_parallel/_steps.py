"""The steps of a cell at all times at once, and the state as a vector.

All arrays have time first, in processing order. The vector of a state has the leaves of the state one after another on
its last axis, h first: s (T, *B, N).
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import PyTree

from jaxseq import _precision
from jaxseq._recurrence._cell import Cell, State, h_of, pre_activations
from jaxseq._recurrence._inputs import Inputs, Masks
from jaxseq._recurrence._step import Sweep, forward_step, make_sweep
from jaxseq._time_options import Options


class Vectors(NamedTuple):
    """The layout of the vector of a state: the size and the dtype of every leaf. Static."""

    structure: Any  # of the state, as a pytree
    sizes: tuple[int, ...]
    dtypes: tuple[np.dtype, ...]

    @property
    def size(self) -> int:
        """N, the size of the vector."""
        return sum(self.sizes)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the vector, the widest of the leaves."""
        widest = self.dtypes[0]
        for dtype in self.dtypes[1:]:
            widest = _precision.common(widest, dtype)
        return widest

    def join(self, state: State) -> jax.Array:
        return jnp.concatenate([leaf.astype(self.dtype) for leaf in jax.tree.leaves(state)], -1)

    def parts(self, s: jax.Array) -> Iterator[jax.Array]:
        """Yield the leaves of a vector, in its dtype."""
        start = 0
        for size in self.sizes:
            yield lax.slice_in_dim(s, start, start + size, axis=s.ndim - 1)
            start += size

    def split(self, s: jax.Array) -> State:
        leaves = [part.astype(dtype) for part, dtype in zip(self.parts(s), self.dtypes, strict=True)]
        return self.structure.unflatten(leaves)


def vectors_of(carry: State) -> Vectors:
    leaves, structure = jax.tree.flatten(carry)
    return Vectors(structure, tuple(a.shape[-1] for a in leaves), tuple(a.dtype for a in leaves))


def before(first: jax.Array, s: jax.Array) -> jax.Array:
    """Return the state before each step, given the state before the first one and those after all of them."""
    return jnp.concatenate([first[None], s[:-1]])


def step_all(cell: Cell, options: Options, vectors: Vectors, s: jax.Array, inputs: Inputs) -> jax.Array:
    """Return the state after each step, given the states `s` after all of them, of which the last is not read."""
    sweep = make_sweep(cell, options, inputs)
    s_prev = vectors.split(before(vectors.join(inputs.carry), s))
    return vectors.join(forward_step(sweep, s_prev, inputs.xs, Masks(side=inputs.masks.side)).state)


class Steps(NamedTuple):
    """All steps of one recurrence, with the product of the input map computed once."""

    sweep: Sweep
    vectors: Vectors
    first: jax.Array  # the vector of the initial state, (*B, N)
    u: jax.Array
    side: tuple[PyTree, ...]

    def phi(self, r: jax.Array, s_prev: jax.Array) -> jax.Array:
        """Return the states after all steps, given the results of the recurrent map and the states before."""
        state = self.vectors.split(s_prev)
        a = pre_activations(self.sweep.cell, self.u, r)
        result = self.sweep.phi.step(a, _precision.cast(state, self.sweep.accumulator), self.side)
        return self.vectors.join(_precision.cast_like(result.state, state))

    def r(self, s_prev: jax.Array) -> jax.Array:
        """Return the results of the recurrent map."""
        sweep, h = self.sweep, h_of(self.vectors.split(s_prev))
        h = h.astype(_precision.common(h.dtype, sweep.product))
        return sweep.cell.recurrent.apply(sweep.options.precision, sweep.weights.w_h, sweep.weights.b_h, h)

    def rows(self) -> jax.Array:
        """Return the recurrent map of every unit vector of the state, (N, G H), zero for those beyond h."""
        sweep, (P, *_) = self.sweep, self.vectors.sizes
        eye = jnp.eye(P, dtype=_precision.common(self.vectors.dtypes[0], sweep.product))
        rows = sweep.cell.recurrent.product(lax.Precision.HIGHEST, sweep.weights.w_h, eye)
        return jnp.pad(rows, ((0, self.vectors.size - P), (0, 0))).astype(sweep.accumulator)


def make_steps(cell: Cell, options: Options, inputs: Inputs) -> Steps:
    sweep, vectors = make_sweep(cell, options, inputs), vectors_of(inputs.carry)
    weights = inputs.weights
    u = cell.input.apply(options.precision, weights.w_x, weights.b_x, inputs.xs.astype(sweep.product))
    return Steps(sweep, vectors, vectors.join(inputs.carry), u, inputs.masks.side)


Push = Callable[[jax.Array, jax.Array], jax.Array]


def push_of(steps: Steps, s_prev: jax.Array) -> Push:
    """Return the derivative of all steps: (e, e') -> e J of every step, for a unit vector e and its row e'."""
    r = steps.r(s_prev)

    def push(direction: jax.Array, row: jax.Array) -> jax.Array:
        tangents = jnp.broadcast_to(row.astype(r.dtype), r.shape), jnp.broadcast_to(direction, s_prev.shape)
        return jax.jvp(partial(Steps.phi, steps), (r, s_prev), tangents)[1]

    return push
