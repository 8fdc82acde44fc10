"""The definition of a cell, and operations on states, gates and dtypes that both passes use."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxseq import _precision
from jaxseq.linear_maps import Dense, LinearMap

State = Any  # an array h, or a NamedTuple of arrays whose first is h
Gates = tuple[Any, ...]  # one entry for each gate, an array (*B, H) or a pair of arrays

# The fields of parameters that are maps or their biases. All others are cell parameters.
MAPS = ("w_x", "w_h", "w_q", "b", "b_x", "b_h")


class Cell(NamedTuple):
    """The equations of one step, without matrices and without time.

    The pre-activations `a` have one entry for each gate: the sum u + r of the results of the input map and the
    recurrent map, or for a gate in `split_gates`, where the two do not enter as a sum, the pair (u, r). Every array has
    any number of batch axes, or none, before its features.

    `step` takes two optional additional arguments, in this order:

        p    if `params` has fields other than those of the maps (peepholes, gains): the parameters without their maps
        L    if `params` has the field w_q, one more product inside the step: L(q) is q w_q

    A hand-derived `pullback` gets the residuals that `step` returns and the same additional arguments, where L.T(v̄) is
    v̄ w_qᵀ. It returns the cotangents (δ, s̄_prev), with δ in the structure of a; then p̄ of each example, if there is
    p, with the batch axes first; then the pair (q, v̄), if there is L. Without a pullback, JAX differentiates the step
    only.

    Attributes:
        name: the name of the cell, for errors and profiles.
        gates: one letter for each gate, in the order of the gates in the weights.
        step: `(a, s_prev) -> s`, or with a pullback `-> (s, saved)`, where `saved` is the residuals, any pytree.
        params: the NamedTuple of the parameters: w_x, w_h, either b or b_x and b_h, and any others.
        state: the NamedTuple of the state, h first; None if the state is the array h.
        split_gates: the gates that get u and r as a pair.
        input_only_gates: the gates that get u only, which must be the last ones: the recurrent map does not serve them.
        input: the map from x to u.
        recurrent: the map from h to r.
        pullback: `(saved, s_prev, s̄) -> (δ, s̄_prev)`, or None.
        replay: `(saved, s_prev) -> s`, as computed by `step`; for a state with more leaves than h, with a pullback.
    """

    name: str
    gates: str
    step: Callable[..., Any]
    params: type
    state: type | None = None
    split_gates: str = ""
    input_only_gates: str = ""
    input: LinearMap = Dense()
    recurrent: LinearMap = Dense()
    pullback: Callable[..., Any] | None = None
    replay: Callable[..., State] | None = None

    @property
    def recurrent_gates(self) -> int:
        """The number of gates that the recurrent map serves."""
        return len(self.gates) - len(self.input_only_gates)

    @property
    def cell_params(self) -> tuple[str, ...]:
        """The fields of the parameters that are passed to the step."""
        return tuple(f for f in self.params._fields if f not in MAPS)  # type: ignore[attr-defined]


class Weights(NamedTuple):
    """The inputs of a recurrence that are constant in time.

    These are the linear maps, their biases (G H,) or None, the cell parameters (`params` without the maps), and the
    recurrent dropout mask, which is not a parameter.
    """

    w_x: jax.Array
    w_h: jax.Array
    b_x: jax.Array | None
    b_h: jax.Array | None
    w_q: jax.Array | None = None
    cell_params: Any = None
    recurrent_dropout_mask: jax.Array | None = None


class Inputs(NamedTuple):
    """All inputs of a recurrence. Time is at axis `Options.axis` of xs, of the masks and of the leaves of `zoneout`.

    The masks and `zoneout` may be None.
    """

    weights: Weights
    carry: State
    xs: jax.Array
    valid: jax.Array | None
    reset: jax.Array | None
    zoneout: State | None = None
    zoned_out: jax.Array | None = None  # True where booleans keep all of the state of a batch entry

    @property
    def floats(self) -> tuple[Weights, State, jax.Array]:
        """The inputs that have a gradient."""
        return self.weights._replace(recurrent_dropout_mask=None), self.carry, self.xs


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


def add_to_h(state: State, h: jax.Array) -> State:
    return with_h(state, h_of(state) + h)


def recurrent_input(weights: Weights, h: jax.Array) -> jax.Array:
    """Apply the recurrent dropout mask to h, with any axes before the batch. This is its own transpose."""
    if weights.recurrent_dropout_mask is None:
        return h
    return h * jnp.expand_dims(
        weights.recurrent_dropout_mask.astype(h.dtype), range(h.ndim - weights.recurrent_dropout_mask.ndim)
    )


def apply_zoneout(zoneout: State | None, before: State, after: State) -> State:
    """Mix the states before and after a step, with the weight `zoneout` of the former; booleans select."""
    if zoneout is None:
        return after

    def mix(k: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        if k.dtype == bool:
            return jnp.where(k, a, b)
        k = k.astype(b.dtype)
        return k * a + (1 - k) * b  # not b + k (a - b), which is not a at k = 1 where b is large

    return jax.tree.map(mix, zoneout, before, after)


def zoneout_pullback(zoneout: State | None, s_bar: State) -> tuple[State, State]:
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


def dtypes(weights: Weights, carry: State, xs: jax.Array) -> tuple[Any, Any]:
    """Return the dtype of the operands of products, and the dtype in which products accumulate.

    The first is the widest of weights and inputs, and gates are stored in it; a bias is only added. A state wider than
    the accumulator widens both. The product of the state itself is an exception, `cast_for_product`.
    """
    multiplied = [*jax.tree.leaves((weights.w_x, weights.w_h, weights.w_q)), xs]
    product = _precision.promote(*multiplied)
    state = _precision.promote(*jax.tree.leaves(carry))
    if _precision.wider(state, _precision.accumulator(product)):
        product = _precision.promote(*multiplied, *jax.tree.leaves(carry))
    return product, _precision.accumulator(product)


def cast_for_product(h: jax.Array, product: Any) -> jax.Array:
    """Cast h for the recurrent map, without rounding it to the dtype of products if its own dtype is wider.

    Otherwise every step would round h again. With weights and inputs in bfloat16, the gradient of an LSTM (T = 2000,
    H = 32, forget bias 4) has an error of 72 % if h is rounded for its product, and 5 % if not.
    """
    return h.astype(_precision.common(h.dtype, product))
