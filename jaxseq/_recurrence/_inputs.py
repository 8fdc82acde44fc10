"""The inputs of a recurrence, by name, and the dtypes of its products."""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxseq import _precision
from jaxseq._mesh import Partitioning
from jaxseq._recurrence._cell import State
from jaxseq._recurrence._linear_cell import AnyCell, LinearCell
from jaxseq._time_options import Options


class Weights(NamedTuple):
    """The inputs of a recurrence that are constant in time.

    These are the linear maps, their biases (G H,) or None, the cell parameters (`params` without the maps), the
    recurrent dropout mask, which has no gradient, and the state after a reset, whose leaves are (*B, H). A linear cell
    has cell parameters only, and None in place of maps.
    """

    w_x: jax.Array
    w_h: jax.Array
    b_x: jax.Array | None
    b_h: jax.Array | None
    w_q: jax.Array | None = None
    cell_params: PyTree = None
    recurrent_dropout_mask: jax.Array | None = None
    reset_state: State | None = None  # None is zero, or that there are no resets


class Masks(NamedTuple):
    """How the steps of a sequence are read, or those of a chunk, or one step, and their side inputs.

    A sequence has time at axis `Options.axis` of every array, a chunk on the first axis, and one step has none.
    """

    valid: jax.Array | None = None  # False in padding; None is True everywhere
    reset: jax.Array | None = None  # True where the state before the step is replaced; None is False everywhere
    zoneout: State | None = None  # the weight of the previous state; None is no zoneout
    read: jax.Array | None = None  # False in padding, and where zoneout keeps all of the state; None is `valid`
    side: tuple[PyTree, ...] = ()  # (e,), what reaches the step of the cell as it is, or () without side inputs

    @property
    def reads_x(self) -> jax.Array | None:
        """The mask of steps that read their input; None is True everywhere."""
        return self.valid if self.read is None else self.read


class Inputs(NamedTuple):
    """All inputs of a recurrence. Time is at axis `Options.axis` of xs and of the masks."""

    weights: Weights
    carry: State
    xs: jax.Array
    masks: Masks = Masks()

    @property
    def floats(self) -> tuple[Weights, State, jax.Array, tuple[jax.Array, ...]]:
        """The inputs that have a gradient; the last are the float leaves of the side inputs."""
        weights = self.weights._replace(recurrent_dropout_mask=None)
        return weights, self.carry, self.xs, float_leaves(self.masks.side)


def float_leaves(tree: PyTree) -> tuple[jax.Array, ...]:
    """Return the leaves of `tree` that have a gradient."""
    return tuple(a for a in jax.tree.leaves(tree) if jnp.issubdtype(a.dtype, jnp.inexact))


def with_float_leaves(tree: PyTree, floats: Iterable[jax.Array], *, others: bool = True) -> PyTree:
    """Return `tree` with its float leaves replaced. Without `others`, all other leaves are None."""
    found = iter(floats)
    return jax.tree.map(lambda a: next(found) if jnp.issubdtype(a.dtype, jnp.inexact) else a if others else None, tree)


def recurrent_input(weights: Weights, h: jax.Array) -> jax.Array:
    """Apply the recurrent dropout mask to h, with any axes before the batch. This is its own transpose."""
    if weights.recurrent_dropout_mask is None:
        return h
    return h * jnp.expand_dims(
        weights.recurrent_dropout_mask.astype(h.dtype), range(h.ndim - weights.recurrent_dropout_mask.ndim)
    )


def dtypes(weights: Weights, carry: State, xs: jax.Array) -> tuple[np.dtype, np.dtype]:
    """Return the dtype of the operands of products, and the dtype in which products accumulate.

    The first is the widest of weights and inputs, and gates are stored in it; a bias is only added. A state wider than
    the accumulator widens both. The product of the state itself is an exception, see
    `forward_step`.
    """
    multiplied = [*jax.tree.leaves((weights.w_x, weights.w_h, weights.w_q)), xs]
    product = _precision.promote(*multiplied)
    state = _precision.promote(*jax.tree.leaves(carry))
    if _precision.wider(state, _precision.accumulator(product)):
        product = _precision.promote(*multiplied, *jax.tree.leaves(carry))
    return product, _precision.accumulator(product)


def with_partitioning(cell: AnyCell, options: Options, known: Partitioning) -> tuple[AnyCell, Options]:
    """Return both with what the compiler may do with the arrays of the rule."""
    if isinstance(cell, LinearCell):
        return cell, options._replace(partitioning=known)
    maps = {"input": cell.input.with_partitioning(known), "recurrent": cell.recurrent.with_partitioning(known)}
    return cell._replace(**maps), options._replace(partitioning=known)
