"""What a cell is, and what both sweeps say of its states, gates and dtypes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxseq import _precision

State = Any  # an array h, or a NamedTuple of arrays whose first is h
Gates = tuple[Any, ...]  # one entry a gate, each an array (*B, H) or a pair of them


class Cell(NamedTuple):
    """The equations of one step: no matrix, no time.

    The pre-activations `a` hold one entry for each gate: the sum u + r, or for a gate named in `apart`, where
    the two do not enter as a sum, the pair (u, r). Their cotangent δ has the same structure.

    Attributes:
        gates: one letter a gate, in the order in which the weights hold them.
        apart: those gates that get u and r apart.
        step: `(a, s_prev) -> (s, saved)`; `saved` is what the pullback wants to know, any pytree.
        pullback: `(saved, s_prev, s̄) -> (δ, s̄_prev)`.
        replay: `(saved, s_prev) -> s`, as `step` made it; None where the state is h alone.
        params: the NamedTuple of the parameters: w_x, w_h, and either b or b_x and b_h.
        state: the NamedTuple of the state, h first; None where the state is the array h.
    """

    gates: str
    step: Callable[[Gates, State], tuple[State, Any]]
    pullback: Callable[[Any, State, State], tuple[Gates, State]]
    params: type
    state: type | None = None
    apart: str = ""
    replay: Callable[[Any, State], State] | None = None


class Weights(NamedTuple):
    """The two linear maps: w_x (D, G H), w_h (H, G H), and their biases (G H,) or None."""

    w_x: jax.Array
    w_h: jax.Array
    b_x: jax.Array | None
    b_h: jax.Array | None


class Inputs(NamedTuple):
    """All that a recurrence depends on. Time is at axis `Options.axis` of xs and of the masks, which may be None."""

    weights: Weights
    carry: State
    xs: jax.Array
    live: jax.Array | None
    stop: jax.Array | None


def join(cell: Cell, u: jax.Array, r: jax.Array) -> Gates:
    """u, r (*B, G H) as the pre-activations of the gates."""
    # One sum before the split: XLA's CPU backend takes 1.25 times as long over a sum for each gate (B=64, H=256).
    us, rs, sums = (jnp.split(a, len(cell.gates), -1) for a in (u, r, u + r))
    return tuple((us[g], rs[g]) if gate in cell.apart else sums[g] for g, gate in enumerate(cell.gates))


def h_of(state: State) -> jax.Array:
    """The leaf of the state that the recurrent map reads and that leaves as y."""
    return jax.tree.leaves(state)[0]


def with_h(state: State, h: jax.Array) -> State:
    leaves, structure = jax.tree.flatten(state)
    return jax.tree.unflatten(structure, [h, *leaves[1:]])


def add_to_h(state: State, h: jax.Array) -> State:
    return with_h(state, h_of(state) + h)


def distinct(δ: Gates) -> jax.Array:
    """δ as one array (*B, G H + ...): every gate, u's side of a pair, then r's side of each pair."""
    u_side = [gate[0] if isinstance(gate, tuple) else gate for gate in δ]
    return jnp.concatenate([*u_side, *(gate[1] for gate in δ if isinstance(gate, tuple))], -1)


def sides(cell: Cell, δ: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(δu, δr), each (*B, G H), of what `distinct` made.

    One array leaves the loop, not these two: two concatenations of the same gates took XLA's CPU backend 67 us a step
    in place of 39 for the GRU at B = 128, H = 32, and 70 in place of 64 at B = 32, H = 128.
    """
    if not cell.apart:
        return δ, δ
    count = len(cell.gates)
    gates = jnp.split(δ, count + len(cell.apart), -1)
    beyond = iter(gates[count:])
    r_side = [next(beyond) if gate in cell.apart else gates[g] for g, gate in enumerate(cell.gates)]
    return jnp.concatenate(gates[:count], -1), jnp.concatenate(r_side, -1)


def dtypes(weights: Weights, carry: State, xs: jax.Array) -> tuple[Any, Any]:
    """Products multiply in, and gates are kept in, the widest dtype of what is multiplied; a bias is only added. And
    the dtype in which they accumulate.
    """
    product = _precision.promote(weights.w_x, weights.w_h, *jax.tree.leaves(carry), xs)
    return product, _precision.accumulator(product)
