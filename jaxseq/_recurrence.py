"""Time: one forward sweep and one backward sweep for every cell.

A recurrence is a pointwise cell φ between two linear maps. With state s_t, of which h_t is the first leaf,

    u_t = x_t W_x + b_x            the input map,      (*B, D) -> (*B, G H)
    r_t = h_{t-1} W_h + b_h        the recurrent map,  (*B, H) -> (*B, G H)
    s_t = φ(u_t, r_t, s_{t-1})     the cell, pointwise
    y_t = h_t

Let s̄_t be the cotangent of s_t: what the loss says to y_t directly, plus all that comes back from later
steps. The cell's pullback turns s̄_t into the cotangents of its three arguments; those of the
pre-activations are called δ:

    (δu_t, δr_t, s̃_{t-1}) = φ*(s̄_t)                                   pointwise
    s̄_{t-1} = s̃_{t-1} + (δr_t W_hᵀ + ȳ_{t-1}) on its leaf h            the sweep, backwards in t     (1)

Only (1) is sequential. The sweep carries the state's cotangent alone and emits δ; everything else is one
contraction over all of time:

    W̄_x = sum_t x_tᵀ δu_t        b̄_x = sum_t δu_t        x̄_t = δu_t W_xᵀ
    W̄_h = sum_t h_{t-1}ᵀ δr_t    b̄_h = sum_t δr_t                                                    (2)

Truncation. `truncation=k` stops the gradient of the state at t = k, 2k, ... in reading order, as
`stop_gradient` on the carry would: there s̄_{t-1} = ȳ_{t-1}. The windows of k steps between those cuts are
then independent in (1), whose data (saved states, saved gates, ȳ) is all known. So the sweep runs over them
side by side, as one more batch axis W = T // k:

    (T, *B, H) -> (k, W, *B, H)      k sequential steps in place of T

A ragged last window of T mod k steps is swept by itself. Full BPTT is one window, k = T. (2) does not
change: it sums over all t anyway.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxseq import _checks, _dense, _precision, _sharding

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
        params: the NamedTuple of the parameters: w_x, w_h, and either b or b_x and b_h.
        state: the NamedTuple of the state, h first; None where the state is the array h.
    """

    gates: str
    step: Callable[[Gates, State], tuple[State, Any]]
    pullback: Callable[[Any, State, State], tuple[Gates, State]]
    params: type
    state: type | None = None
    apart: str = ""


class Weights(NamedTuple):
    """The two linear maps: w_x (D, G H), w_h (H, G H), and their biases (G H,) or None."""

    w_x: jax.Array
    w_h: jax.Array
    b_x: jax.Array | None
    b_h: jax.Array | None


class Options(NamedTuple):
    """How time is read. Static and hashable."""

    reverse: bool
    truncation: int | None
    unroll: int
    precision: Any


# --- The forward sweep ---


def _forward(cell: Cell, options: Options, weights: Weights, carry: State, xs: jax.Array, *, save: bool) -> Any:
    """(s_T, ys), and with `save` also what the backward sweep reads: (states s_{t-1}, saved).

    The states are saved as each step finds them. To save them as it leaves them, share h with ys and shift in
    backward made the Elman network 0.65 to 0.9 times as long, but the LSTM 1.1 times at (B, T, D, H) =
    (64, 128, 256, 256): the shift is a copy.
    """
    product = _product_dtype(weights, carry, xs)
    acc = _precision.accumulator(product)
    cuts = _cuts(options, xs.shape[0])

    def step(s_prev: State, at: Any) -> Any:
        x, cut = at
        if cut is not None:
            s_prev = jax.tree.map(lambda a: jnp.where(cut, lax.stop_gradient(a), a), s_prev)
        u = _dense.apply(options.precision, weights.w_x, weights.b_x, x.astype(product))
        r = _dense.apply(options.precision, weights.w_h, weights.b_h, _h(s_prev).astype(product))
        s, saved = cell.step(_join(cell, u, r), _precision.cast(s_prev, acc))
        s = _precision.cast_like(s, s_prev)
        return s, (_h(s).astype(xs.dtype), (s_prev, _precision.cast(saved, product)) if save else None)

    s, (ys, saved) = lax.scan(step, carry, (xs, cuts), reverse=options.reverse, unroll=options.unroll)
    return (s, ys), saved


def _cuts(options: Options, steps: int) -> jax.Array | None:
    """(T,) bool: whether a truncated gradient stops before the step. None where it never does.

    The first order does not need it, for the backward sweep knows its windows. It is for who differentiates once
    more: then what was saved has to be cut off from its past as well. XLA removes it otherwise.
    """
    if options.truncation is None or options.truncation >= steps:
        return None
    read = jnp.arange(steps)[::-1] if options.reverse else jnp.arange(steps)
    return (read > 0) & (read % options.truncation == 0)


def _join(cell: Cell, u: jax.Array, r: jax.Array) -> Gates:
    """u, r (*B, G H) as the pre-activations of the gates."""
    # One sum before the split: XLA's CPU backend takes 1.25 times as long over a sum for each gate (B=64, H=256).
    us, rs, sums = (jnp.split(a, len(cell.gates), -1) for a in (u, r, u + r))
    return tuple((us[g], rs[g]) if gate in cell.apart else sums[g] for g, gate in enumerate(cell.gates))


# --- The backward sweep ---


def _backward(cell: Cell, options: Options, residuals: Any, cotangents: Any) -> tuple[Weights, State, jax.Array]:
    weights, carry, xs, (states, saved) = residuals
    s̄, ȳs = cotangents
    product = _product_dtype(weights, carry, xs)
    acc = _precision.accumulator(product)

    def step(s̄: State, known: Any) -> tuple[State, tuple[jax.Array, ...]]:
        """Equation (1)."""
        ȳ, s_prev, saved = known
        δ, s̃ = cell.pullback(*_precision.cast((saved, s_prev, _add_to_h(s̄, ȳ)), acc))
        δu, δr = _precision.cast((_side(0, δ), _side(1, δ)), product)
        return _add_to_h(s̃, _dense.pull_input(options.precision, weights.w_h, δr)), (δu, δr) if cell.apart else (δu,)

    s̄, δ = _sweep(step, options, _precision.cast(s̄, acc), (ȳs.astype(acc), states, saved))
    δu, δr = δ[0], δ[-1]

    # (2): one contraction over time and batch for each map, all gates together.
    w̄ = Weights(
        w_x=_dense.pull_weight(options.precision, xs.astype(product), δu, _sharding.of(weights.w_x)),
        w_h=_dense.pull_weight(options.precision, _h(states).astype(product), δr, _sharding.of(weights.w_h)),
        b_x=None if weights.b_x is None else _dense.pull_bias(δu),
        b_h=None if weights.b_h is None else _dense.pull_bias(δr),
    )
    x̄s = _dense.pull_input(options.precision, weights.w_x, δu)
    return _precision.cast_like((w̄, s̄, x̄s), (weights, carry, xs))


def _sweep(step: Any, options: Options, s̄: State, known: Any) -> tuple[State, Any]:
    """`step` from the end of time to its beginning, the windows of a truncated gradient side by side.

    `known` and the emitted δ are (T, *B, ·) in storage order; s̄ is the cotangent of the last state.
    """
    steps = jax.tree.leaves(known)[0].shape[0]
    window = max(1, min(options.truncation or steps, steps))
    count, rest = divmod(steps, window)
    backwards = partial(lax.scan, step, reverse=not options.reverse, unroll=options.unroll)
    δ_rest = None
    if rest:
        # The ragged last window in reading order. Its first state is cut off from what comes before.
        cut = rest if options.reverse else steps - rest
        head, tail = jax.tree.map(lambda a: a[:cut], known), jax.tree.map(lambda a: a[cut:], known)
        known, last = (tail, head) if options.reverse else (head, tail)
        s̄, δ_rest = backwards(s̄, last)
        s̄ = jax.tree.map(jnp.zeros_like, s̄)
    if count <= 1:
        s̄, δ = backwards(s̄, known)
    else:
        first, last = (-1, 0) if options.reverse else (0, -1)
        is_last = jnp.arange(count) == last % count
        cut_off = jax.tree.map(lambda a: jnp.where(jnp.expand_dims(is_last, range(1, a.ndim + 1)), a[None], 0), s̄)
        s̄, δ = backwards(cut_off, _split_time(known, count))
        s̄, δ = jax.tree.map(lambda a: a[first], s̄), _merge_time(δ)
    if δ_rest is not None:
        ends = (δ_rest, δ) if options.reverse else (δ, δ_rest)
        δ = jax.tree.map(lambda *parts: jnp.concatenate(parts), *ends)
    return s̄, δ


def _split_time(tree: Any, count: int) -> Any:
    """(W k, ...) -> (k, W, ...): step j of every window at once."""
    return jax.tree.map(lambda a: a.reshape(count, a.shape[0] // count, *a.shape[1:]).swapaxes(0, 1), tree)


def _merge_time(tree: Any) -> Any:
    """(k, W, ...) -> (W k, ...), the inverse of `_split_time`."""
    return jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(a.shape[0] * a.shape[1], *a.shape[2:]), tree)


# --- What both sweeps say of states, gates and dtypes ---


def _h(state: State) -> jax.Array:
    """The leaf of the state that the recurrent map reads and that leaves as y."""
    return jax.tree.leaves(state)[0]


def _add_to_h(state: State, h: jax.Array) -> State:
    leaves, structure = jax.tree.flatten(state)
    return jax.tree.unflatten(structure, [leaves[0] + h, *leaves[1:]])


def _side(side: int, gates: Gates) -> jax.Array:
    """What concerns the input map (0) or the recurrent map (1), (*B, G H): that half of a pair, and every sum."""
    return jnp.concatenate([gate[side] if isinstance(gate, tuple) else gate for gate in gates], -1)


def _product_dtype(weights: Weights, carry: State, xs: jax.Array) -> Any:
    """Products multiply in, and gates are kept in, the widest dtype of what is multiplied; a bias is only added."""
    return _precision.promote(weights.w_x, weights.w_h, *jax.tree.leaves(carry), xs)


# --- The rule ---


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _recurrence(cell: Cell, options: Options, weights: Weights, carry: State, xs: jax.Array) -> Any:
    return _forward(cell, options, weights, carry, xs, save=False)[0]


def _recurrence_fwd(cell: Cell, options: Options, weights: Weights, carry: State, xs: jax.Array) -> Any:
    out, saved = _forward(cell, options, weights, carry, xs, save=True)
    return out, (weights, carry, xs, saved)


_recurrence.defvjp(_recurrence_fwd, _backward)


# --- What the public functions of every cell call ---


def sequence(
    cell: Cell, params: Any, carry: State | None, xs: Any, *, reverse: Any, truncation: Any, unroll: Any, precision: Any
) -> tuple[State, jax.Array]:
    """A checked run over xs (T, *B, D)."""
    xs = _checks.array("xs", xs)
    if xs.ndim < 2:
        _checks.bad_value("xs", "at least 2 axes (time, *batch, features)", str(xs.ndim), xs=xs)
    options = Options(
        reverse=_checks.boolean("reverse", reverse),
        truncation=None if truncation is None else _checks.integer("truncation", truncation, at_least=1),
        unroll=_checks.integer("unroll", unroll, at_least=1),
        precision=_checks.precision(precision),
    )
    weights, carry, xs = _operands(cell, params, carry, "xs", xs, xs.shape[1:-1])
    return _recurrence(cell, options, weights, carry, xs)


def one_step(cell: Cell, params: Any, carry: State | None, x: Any, *, precision: Any) -> tuple[State, jax.Array]:
    """A checked sequence of one step, for x (*B, D): the body of somebody's own loop."""
    x = _checks.array("x", x)
    if x.ndim < 1:
        _checks.bad_value("x", "at least 1 axis (*batch, features)", "a scalar")
    options = Options(reverse=False, truncation=None, unroll=1, precision=_checks.precision(precision))
    weights, carry, x = _operands(cell, params, carry, "x", x, x.shape[:-1])
    out: tuple[State, jax.Array] = _recurrence(cell, options, weights, carry, x[None])
    return out[0], out[1][0]


def _operands(
    cell: Cell, params: Any, carry: State | None, name: str, x: jax.Array, batch: tuple[int, ...]
) -> tuple[Weights, State, jax.Array]:
    """The linear maps, the first state and x (..., *batch, D), checked against each other."""
    _checks.container("params", params, cell.params)
    w_x, w_h = _checks.array("params.w_x", params.w_x), _checks.array("params.w_h", params.w_h)
    gates = len(cell.gates)
    if w_h.ndim != 2 or w_h.shape[1] != gates * w_h.shape[0]:
        expected = f"shape (H, {gates} H), one block of H columns for each gate {', '.join(cell.gates)}"
        _checks.bad_value("params.w_h", expected, str(w_h.shape))
    hidden, width = w_h.shape
    if w_x.ndim != 2 or w_x.shape[1] != width:
        _checks.bad_value("params.w_x", f"shape (D, {width}) to go with `params.w_h`", str(w_x.shape), w_h=w_h)
    if x.shape[-1] != w_x.shape[0]:
        expected = f"{w_x.shape[0]} features on the last axis, the rows of `params.w_x`"
        _checks.bad_value(name, expected, str(x.shape[-1]), **{name: x, "w_x": w_x})
    biases = {
        f: None if b is None else _checks.array(f"params.{f}", b) for f, b in params._asdict().items() if f[0] == "b"
    }
    for field, bias in biases.items():
        if bias is not None:
            _checks.shape(f"params.{field}", bias, (width,), f"({gates} H,)", w_h=w_h)
    weights = Weights(w_x, w_h, biases.get("b", biases.get("b_x")), biases.get("b_h"))

    fields = ("",) if cell.state is None else tuple(f".{f}" for f in cell.state._fields)
    if carry is None:
        leaves = [_sharding.zeros((*batch, hidden), x) for _ in fields]
    else:
        if cell.state is not None:
            _checks.container("carry", carry, cell.state)
        parts = (carry,) if cell.state is None else carry
        leaves = [_checks.array(f"carry{f}", part) for f, part in zip(fields, parts, strict=True)]
        for field, leaf in zip(fields, leaves, strict=True):
            _checks.shape(f"carry{field}", leaf, (*batch, hidden), "(*batch, H)", **{name: x, "w_h": w_h})
    return _sharding.together((weights, leaves[0] if cell.state is None else cell.state(*leaves), x))
