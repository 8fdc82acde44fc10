"""Where the arrays of a recurrence lie: on an explicit mesh time and batch of all of them as those of xs do.

Mesh axes over which features lie are the compiler's for the length of the rule (`_sharding.handed_over`): a product in
every step of states that are divided is a collective in every step, which no rule can take out of the loop.

Time that is divided is run stretch by stretch, each device its own. The state with which a stretch begins comes by
`jaxseq.relay`, one stretch after the other. Truncation whose windows end where stretches do stops gradients there, and
all devices go back at once, each with the windows of its own stretch side by side; without it gradients take the relay
back. Windows that reach back further, or across the end of a stretch, are left to the compiler, which gathers xs and
divides what is kept for backward.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxseq import _sharding, _time
from jaxseq._recurrence._cell import Cell, Inputs, State, h_of
from jaxseq._relay import from_one, is_first, relay
from jaxseq._time import Options

Rule = Callable[[Cell, Options, Inputs], tuple[State, jax.Array]]


def run(rule: Any, cell: Cell, options: Options, batch: int, inputs: Inputs) -> tuple[State, jax.Array]:
    """`rule`, for so many axes of batch."""
    inputs = _alike(_sharding.together(inputs), batch, options.axis)
    weights, carry, xs, _, _, hold, _ = inputs
    of_features = [(a, slice(None)) for a in jax.tree.leaves(weights._replace(drop=None))]
    of_features += [(a, slice(batch, None)) for a in jax.tree.leaves((weights.drop, carry))]
    of_features += [(a, slice(batch + 1, None)) for a in jax.tree.leaves((xs, hold))]
    names = frozenset().union(*(_sharding.dividing(a, axes) for a, axes in of_features))
    if not _fit(options, xs):
        names |= _sharding.dividing(xs, options.axis)
    home = _sharding.of(xs)
    of_ys = home and _sharding.with_features(home, h_of(carry), xs.ndim - batch - 1)
    results = jax.tree.map(_sharding.of, carry), of_ys
    result: tuple[State, jax.Array] = _sharding.handed_over(partial(_apart, rule, cell, options), names, results)(
        inputs
    )
    return result


def beside(xs: jax.Array, axis: int, lengths: Any, resets: Any) -> tuple[Any, Any]:
    """Lengths and resets with their batch divided as that of xs, from which masks are made: there time is whole."""
    home = _sharding.of(xs)
    if home is None:
        return lengths, resets
    lay = lambda a, home: None if a is None else _sharding.laid_out(a, _sharding.head(home, a.ndim))  # noqa: E731
    return lay(lengths, _sharding.dropped(home, axis)), lay(resets, _sharding.without(home, axis))


def _alike(inputs: Inputs, batch: int, axis: int) -> Inputs:
    weights, carry, xs, live, stop, hold, idle = inputs
    home = _sharding.of(xs)
    if home is None:
        return inputs
    features = xs.ndim - batch - 1
    of_batch = _sharding.dropped(home, axis)

    def lay(tree: Any, home: Any, features: int = features) -> Any:
        return jax.tree.map(lambda a: _sharding.laid_out(a, _sharding.with_features(home, a, features)), tree)

    live, stop, idle = lay((live, stop, idle), _sharding.head(home, batch + 1), 0)
    weights = _sharding.freed(weights, _sharding.dividing(xs, slice(batch + 1)))._replace(
        drop=lay(weights.drop, of_batch)
    )
    return Inputs(weights, lay(carry, of_batch), xs, live, stop, lay(hold, home), idle)


# --- Stretches of time ---


def _fit(options: Options, xs: jax.Array) -> bool:
    """Whether time can be run stretch by stretch."""
    steps, devices = xs.shape[options.axis], _sharding.devices(xs, options.axis)
    if devices == 1:
        return True
    k1, k2 = _time.window(options, steps)
    return k1 >= steps or (k1 == k2 and steps // devices % k1 == 0)


def _apart(rule: Rule, cell: Cell, options: Options, inputs: Inputs) -> tuple[State, jax.Array]:
    """`rule`, each device its own part of the batch, and its own stretch of time."""
    xs, axis = inputs.xs, options.axis
    names, steps = _sharding.names_of(xs, axis), xs.shape[axis]

    def run(inputs: Inputs) -> tuple[State, jax.Array]:
        inputs = _sharding.together(inputs)
        decided = _with_partitioning(cell, options, inputs)
        here = lambda carry: rule(*decided, inputs._replace(carry=carry))  # noqa: E731
        if not names:
            return here(inputs.carry)
        start = relay(lambda carry: here(carry)[0], inputs.carry, names, reverse=options.reverse)
        if _time.window(options, steps)[0] < steps:
            first = is_first(names, reverse=options.reverse)
            start = jax.tree.map(lambda a, b: jnp.where(first, a, b), inputs.carry, lax.stop_gradient(start))
        last, ys = here(start)
        return from_one(_ends_here(options, inputs, names), last, names), ys

    result: tuple[State, jax.Array] = _sharding.apart(run, (inputs,), (inputs.carry, xs))
    return result


def _with_partitioning(cell: Cell, options: Options, inputs: Inputs) -> tuple[Cell, Options]:
    """Return both with what the compiler may do with the arrays of the rule, whose axes differ from those of the op."""
    known = _sharding.partitioning(inputs)
    maps = {name: getattr(cell, name).with_partitioning(known) for name in ("input", "recurrent")}
    return cell._replace(**maps), options._replace(partitioning=known)


def _ends_here(options: Options, inputs: Inputs, names: tuple[str, ...]) -> jax.Array:
    """Whether the state that is returned is this device's: for all sequences, or for each, whose padding no gradient
    has to cross then.
    """
    if inputs.live is None or options.reverse:
        return is_first(names, reverse=not options.reverse)
    steps = inputs.xs.shape[options.axis]
    length = lax.psum(jnp.sum(inputs.live, options.axis, dtype=jnp.int32), names)
    return jnp.maximum(length - 1, 0) // steps == lax.axis_index(names)
