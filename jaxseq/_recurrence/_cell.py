"""The definition of a cell, and operations on states and gates that both passes use."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jaxseq.linear_maps import Dense, LinearMap

State = PyTree  # an array h, or a NamedTuple of arrays whose first is h
Gates = tuple[PyTree, ...]  # one entry for each gate, an array (*B, H) or a pair of arrays

# The fields of parameters that are maps or their biases. All others are cell parameters.
MAPS = ("w_x", "w_h", "w_q", "b", "b_x", "b_h")


class SameAsH(NamedTuple):
    """Placeholder for a residual that is h of the new state: it is read back from the outputs where they are h."""


SAME_AS_H = SameAsH()


class StepResult(NamedTuple):
    """The result of the step of a cell with a pullback.

    Attributes:
        state: the new state.
        residuals: what the pullback needs, any pytree of arrays. A leaf that is h of the new state may be
            `jaxseq.SAME_AS_H`, which is not stored if the outputs are h; the pullback gets h in its place.
    """

    state: State
    residuals: PyTree


class Pullback(NamedTuple):
    """The result of the pullback of a cell: the cotangents of what the step read.

    Attributes:
        delta: δ, the cotangents of the pre-activations, in their structure.
        state_bar: the cotangent of the previous state, without the contribution of the recurrent map.
        params_bar: the cotangents of the cell parameters for each example, with the batch axes first; None without any.
        inner: the pair (q, v̄) of the product inside the step, v = q w_q; None without it.
        side_bar: the cotangents of the side inputs, in their structure, with None in place of a leaf that is not a
            float array; None without side inputs.
    """

    delta: Gates
    state_bar: State
    params_bar: PyTree = None
    inner: tuple[jax.Array, jax.Array] | None = None
    side_bar: PyTree = None


class Cell(NamedTuple):
    """The equations of one step, without matrices and without time.

    The pre-activations `a` have one entry for each gate: the sum u + r of the results of the input map and the
    recurrent map, or for a gate in `split_gates`, where the two do not enter as a sum, the pair (u, r). Every array has
    any number of batch axes, or none, before its features.

    `step` takes three optional additional arguments, in this order:

        p    if `params` has fields other than those of the maps (peepholes, gains): the parameters without their maps
        L    if `params` has the field w_q, one more product inside the step: L(q) is q w_q
        e    with `side_inputs`: those of this step (time differences, actions), each leaf `(*B, ...)`. `xs` is then a
             pair (x, e) of the sequence for the input map and a pytree of arrays `(T, *B, ...)` of any dtypes

    Without a pullback, `step` returns the new state, and JAX differentiates the step only. With a hand-derived
    `pullback`, `step` returns `jaxseq.StepResult(state, residuals)`. The pullback gets these residuals and the same
    additional arguments, where L.T(v̄) is v̄ w_qᵀ, and returns `jaxseq.Pullback(delta, state_bar)`, with `params_bar` if
    there is p, `inner` if there is L, and `side_bar` if there is e.

    Attributes:
        name: the name of the cell, for errors and profiles.
        gates: one letter for each gate, in the order of the gates in the weights.
        step: `(a, s_prev) -> s`, or with a pullback `-> StepResult(s, residuals)`.
        params: the NamedTuple of the parameters: w_x, w_h, either b or b_x and b_h, and any others.
        state: the NamedTuple of the state, h first; None if the state is the array h.
        split_gates: the gates that get u and r as a pair.
        input_only_gates: the gates that get u only, which must be the last ones: the recurrent map does not serve them.
        input: the map from x to u.
        recurrent: the map from h to r.
        pullback: `(residuals, s_prev, s̄) -> Pullback(δ, s̄_prev)`, or None.
        replay: `(residuals, s_prev) -> s`, as computed by `step`; for a state with more leaves than h, with a pullback.
        side_inputs: if True, `xs` is a pair, and the step gets the second part as it is.
    """

    name: str
    gates: str
    step: Callable[..., PyTree]
    params: type
    state: type | None = None
    split_gates: str = ""
    input_only_gates: str = ""
    input: LinearMap = Dense()
    recurrent: LinearMap = Dense()
    pullback: Callable[..., Pullback] | None = None
    replay: Callable[..., State] | None = None
    side_inputs: bool = False

    @property
    def recurrent_gates(self) -> int:
        """The number of gates that the recurrent map serves."""
        return len(self.gates) - len(self.input_only_gates)

    @property
    def cell_params(self) -> tuple[str, ...]:
        """The fields of the parameters that are passed to the step."""
        return tuple(f for f in self.params._fields if f not in MAPS)  # type: ignore[attr-defined]


def pre_activations(cell: Cell, u: jax.Array, r: jax.Array) -> Gates:
    """Return the pre-activations of the gates, given u and r (*B, G H)."""
    # One sum before the split: on XLA's CPU backend, a sum for each gate takes 1.25 times as long (B=64, H=256).
    us, sums, rs = jnp.split(u, len(cell.gates), -1), [], []
    if cell.recurrent_gates:
        served = u[..., : r.shape[-1]] if cell.input_only_gates else u
        sums, rs = (jnp.split(a, cell.recurrent_gates, -1) for a in (served + r, r))
    entries = enumerate(cell.gates)
    return tuple(
        (us[g], rs[g]) if e in cell.split_gates else us[g] if e in cell.input_only_gates else sums[g]
        for g, e in entries
    )


def h_of(state: State) -> jax.Array:
    """Return the leaf of the state that the recurrent map reads and that is the output y."""
    return jax.tree.leaves(state)[0]


def with_h(state: State, h: jax.Array) -> State:
    leaves, structure = jax.tree.flatten(state)
    return jax.tree.unflatten(structure, [h, *leaves[1:]])


def fill_h(residuals: PyTree, h: jax.Array) -> PyTree:
    """Replace `SAME_AS_H` by h in the residuals of a step."""
    is_placeholder = lambda leaf: isinstance(leaf, SameAsH)  # noqa: E731
    leaves, structure = jax.tree.flatten(residuals, is_leaf=is_placeholder)
    return structure.unflatten(h if is_placeholder(leaf) else leaf for leaf in leaves)


def apply_zoneout(zoneout: State, before: State, after: State) -> State:
    """Mix the states before and after a step, with the weight `zoneout` of the former; booleans select."""

    def mix(k: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        if k.dtype == bool:
            return jnp.where(k, a, b)
        k = k.astype(b.dtype)
        return k * a + (1 - k) * b  # not b + k (a - b), which is not a at k = 1 where b is large

    return jax.tree.map(mix, zoneout, before, after)


def zoneout_pullback(zoneout: State, s_bar: State) -> tuple[State, State]:
    """Return the pullback of `apply_zoneout`: the cotangents of the state before, and of the new state."""
    nothing = jax.tree.map(jnp.zeros_like, s_bar)
    return apply_zoneout(zoneout, s_bar, nothing), apply_zoneout(zoneout, nothing, s_bar)


def concatenate_delta(delta: Gates) -> jax.Array:
    """Return δ as one array (*B, G H + ...): u's side of every gate, then r's side of each pair."""
    u_side = [gate[0] if isinstance(gate, tuple) else gate for gate in delta]
    return jnp.concatenate([*u_side, *(gate[1] for gate in delta if isinstance(gate, tuple))], -1)


def split_delta(cell: Cell, delta: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return (δu, δr), each (*B, G H), given the result of `concatenate_delta`.

    The loop returns one array instead of these two, because two concatenations of the same gates are slower on XLA's
    CPU backend; see `docs/measured-recurrence.md`.
    """
    if not cell.split_gates and not cell.input_only_gates:
        return delta, delta
    count = len(cell.gates)
    gates = jnp.split(delta, count + len(cell.split_gates), -1)
    r_sides = iter(gates[count:])
    r_side = [next(r_sides) if gate in cell.split_gates else gates[g] for g, gate in enumerate(cell.gates)]
    return jnp.concatenate(gates[:count], -1), jnp.concatenate(r_side[: cell.recurrent_gates], -1)
