"""What a cell is, and what both sweeps say of its states, gates and dtypes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxseq import _precision
from jaxseq.linear_maps import Dense, LinearMap

State = Any  # an array h, or a NamedTuple of arrays whose first is h
Gates = tuple[Any, ...]  # one entry a gate, each an array (*B, H) or a pair of them

# The fields of parameters that are maps or their biases; all others are the cell's own.
MAPS = ("w_x", "w_h", "w_q", "b", "b_x", "b_h")


class Cell(NamedTuple):
    """The equations of one step: no matrix, no time.

    The pre-activations `a` hold one entry for each gate: the sum u + r of what the input map and the recurrent map
    give, or for a gate named in `split_gates`, where the two do not enter as a sum, the pair (u, r). Everything has any
    number of batch axes, also none, before its features.

    Three things may be added to the arguments of `step`, in this order:

        p    if `params` has fields besides those of the maps (peepholes, gains): the parameters, their maps left out
        L    if `params` has the field w_q, one more product inside of the step: L(q) is q w_q

    A hand-derived `pullback` gets what `step` has saved, and the same things, L.T(v̄) for v̄ w_qᵀ. It returns the
    cotangents (δ, s̄_prev), δ laid out as a; then p̄ of each example, if there is p, with the batch axes first; then
    the pair (q, v̄), if there is L. Without one JAX differentiates the step, and nothing else.

    Attributes:
        name: of the cell, in errors and profiles.
        gates: one letter a gate, in the order in which the weights hold them.
        step: `(a, s_prev) -> s`, or, where there is a pullback, `-> (s, saved)`: what that wants to know, any pytree.
        params: the NamedTuple of the parameters: w_x, w_h, either b or b_x and b_h, and what else there is.
        state: the NamedTuple of the state, h first; None where the state is the array h.
        apart: those gates that get u and r apart.
        alone: those that get u alone, the last ones: the recurrent map has no part in them.
        input: the map from x to u.
        recurrent: the map from h to r.
        pullback: `(saved, s_prev, s̄) -> (δ, s̄_prev)`, or None.
        replay: `(saved, s_prev) -> s`, as `step` made it: for a state of more than h, with a pullback.
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
        """How many gates the recurrent map serves."""
        return len(self.gates) - len(self.input_only_gates)

    @property
    def cell_params(self) -> tuple[str, ...]:
        """The fields of parameters that go to the step."""
        return tuple(f for f in self.params._fields if f not in MAPS)  # type: ignore[attr-defined]


class Weights(NamedTuple):
    """The linear maps, their biases (G H,) or None, what belongs to the cell, its `params` without the maps, and what
    multiplies h on its way into the recurrent map: no parameter, but as constant in time.
    """

    w_x: jax.Array
    w_h: jax.Array
    b_x: jax.Array | None
    b_h: jax.Array | None
    w_q: jax.Array | None = None
    cell_params: Any = None
    recurrent_dropout_mask: jax.Array | None = None


class Inputs(NamedTuple):
    """All that a recurrence depends on. Time is at axis `Options.axis` of xs, of the masks and of how much of each leaf
    of the state is held; masks and `zoneout` may be None.
    """

    weights: Weights
    carry: State
    xs: jax.Array
    valid: jax.Array | None
    reset: jax.Array | None
    zoneout: State | None = None
    zoned_out: jax.Array | None = None  # True where booleans hold all of the state of a batch entry

    @property
    def floats(self) -> tuple[Weights, State, jax.Array]:
        """What has a gradient."""
        return self.weights._replace(recurrent_dropout_mask=None), self.carry, self.xs


def pre_activations(cell: Cell, u: jax.Array, r: jax.Array) -> Gates:
    """u, r (*B, G H) as the pre-activations of the gates."""
    # One sum before the split: XLA's CPU backend takes 1.25 times as long over a sum for each gate (B=64, H=256).
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
    """The leaf of the state that the recurrent map reads and that leaves as y."""
    return jax.tree.leaves(state)[0]


def with_h(state: State, h: jax.Array) -> State:
    leaves, structure = jax.tree.flatten(state)
    return jax.tree.unflatten(structure, [h, *leaves[1:]])


def add_to_h(state: State, h: jax.Array) -> State:
    return with_h(state, h_of(state) + h)


def recurrent_input(weights: Weights, h: jax.Array) -> jax.Array:
    """h as the recurrent map gets it, with any axes before those of the batch; and back, as its own transpose."""
    if weights.recurrent_dropout_mask is None:
        return h
    return h * jnp.expand_dims(
        weights.recurrent_dropout_mask.astype(h.dtype), range(h.ndim - weights.recurrent_dropout_mask.ndim)
    )


def apply_zoneout(zoneout: State | None, before: State, after: State) -> State:
    """ŝ where held, the cell's new state where not; or as much of each."""
    if zoneout is None:
        return after

    def mix(k: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        if k.dtype == bool:
            return jnp.where(k, a, b)
        k = k.astype(b.dtype)
        return k * a + (1 - k) * b  # not b + k (a - b), which is not a at k = 1 where b is large

    return jax.tree.map(mix, zoneout, before, after)


def zoneout_pullback(zoneout: State | None, s_bar: State) -> tuple[State, State]:
    """The pullback of `held`: (to what was before, to what the cell has made)."""
    nothing = jax.tree.map(jnp.zeros_like, s_bar)
    return apply_zoneout(zoneout, s_bar, nothing), apply_zoneout(zoneout, nothing, s_bar)


def concatenate_delta(delta: Gates) -> jax.Array:
    """δ as one array (*B, G H + ...): every gate, u's side of a pair, then r's side of each pair."""
    u_side = [gate[0] if isinstance(gate, tuple) else gate for gate in delta]
    return jnp.concatenate([*u_side, *(gate[1] for gate in delta if isinstance(gate, tuple))], -1)


def split_delta(cell: Cell, delta: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(δu, δr), each (*B, G H), of what `distinct` made.

    One array leaves the loop, not these two: two concatenations of the same gates took XLA's CPU backend 67 us a step
    in place of 39 for the GRU at B = 128, H = 32, and 70 in place of 64 at B = 32, H = 128.
    """
    if not cell.split_gates and not cell.input_only_gates:
        return delta, delta
    count = len(cell.gates)
    gates = jnp.split(delta, count + len(cell.split_gates), -1)
    beyond = iter(gates[count:])
    r_side = [next(beyond) if gate in cell.split_gates else gates[g] for g, gate in enumerate(cell.gates)]
    return jnp.concatenate(gates[:count], -1), jnp.concatenate(r_side[: cell.recurrent_gates], -1)


def dtypes(weights: Weights, carry: State, xs: jax.Array) -> tuple[Any, Any]:
    """The dtype in which products multiply and gates are kept, the widest of weights and inputs; a bias is only added.
    And the dtype in which products accumulate. A state that is wider than that widens both.

    The product of the state itself is an exception, `as_multiplied`.
    """
    multiplied = [*jax.tree.leaves((weights.w_x, weights.w_h, weights.w_q)), xs]
    product = _precision.promote(*multiplied)
    state = _precision.promote(*jax.tree.leaves(carry))
    if _precision.wider(state, _precision.accumulator(product)):
        product = _precision.promote(*multiplied, *jax.tree.leaves(carry))
    return product, _precision.accumulator(product)


def cast_for_product(h: jax.Array, product: Any) -> jax.Array:
    """h for the recurrent map: not rounded to the dtype of products if it is held in a wider one.

    What is lost of h is lost again in every step. With weights and inputs in bfloat16, the gradient of an LSTM
    (T = 2000, H = 32, forget bias 4) is off by 72 % where h is rounded for its product, else by 5 %.
    """
    return h.astype(_precision.common(h.dtype, product))
