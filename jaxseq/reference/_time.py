"""Time as the twins read it: one scan, or under windows that reach back one for each."""

from collections.abc import Callable
from functools import partial
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jax import lax

from jaxseq._time import Given, Time


def through_time(
    cell: Callable[..., tuple[Any, jax.Array]], carry: Any, xs: jax.Array, features: int = 1, **time: Unpack[Time]
) -> tuple[Any, jax.Array]:
    """Reads xs step by step, j = 0 .. T - 1 in the order of reading. `checkpoint` has no meaning here: it says what is
    kept, not what is computed.
    """
    lengths, resets, reverse, truncation, _, time_axis, unroll, precision, drop, hold = tuple(Given(**time))
    read, time_axis = partial(cell, precision=precision, drop=drop), time_axis % xs.ndim
    if carry is None:  # shapes only: there may be no step
        carry = jax.tree.map(jnp.zeros_like, jax.eval_shape(read, None, jnp.sum(xs, time_axis))[0])
    hold = jax.tree.map(lambda k: jnp.moveaxis(k, time_axis, 0) if jnp.ndim(k) else k, hold)

    def step(state: Any, x: jax.Array, j: jax.Array) -> tuple[Any, jax.Array]:
        """A step, of which the part that is held is taken back."""
        new, y = read(state, x)
        if hold is None:
            return new, y
        held = [jnp.take_along_axis(k, _like(j[None], k), 0)[0] if jnp.ndim(k) else k for k in jax.tree.leaves(hold)]
        pairs = zip(held, jax.tree.leaves(state), jax.tree.leaves(new), strict=True)
        amount = lambda k, a: lax.stop_gradient(jnp.asarray(k, a.dtype))  # noqa: E731
        leaves = [a * amount(k, a) + b * (1 - amount(k, a)) for k, a, b in pairs]
        return jax.tree.unflatten(jax.tree.structure(new), leaves), leaves[0].astype(y.dtype)

    xs = jnp.moveaxis(xs, time_axis, 0)
    T, batch = xs.shape[0], xs.shape[1:-features]
    live = reset = last = None
    t = order = jnp.broadcast_to(jnp.arange(T).reshape(T, *(1 for _ in batch)), (T, *batch))
    if lengths is not None:
        lengths = jnp.clip(lengths, 0, T)
        live = t < lengths[None]
    if resets is not None:
        reset = jnp.moveaxis(resets, time_axis, 0)
        reset = reset if live is None else reset & live
    if reverse:
        if reset is not None:  # into a step goes the boundary above it, and out of the last one that below it
            last = jnp.any(reset[:1], 0)
            reset = jnp.concatenate([reset[1:], jnp.zeros_like(reset[:1])])
        # Which step is read as the j-th: padding comes last, either way.
        order = T - 1 - t if lengths is None else jnp.where(t < lengths[None], lengths[None] - 1 - t, t)
        xs = jnp.take_along_axis(xs, _like(order, xs), 0)
        reset = reset if reset is None else jnp.take_along_axis(reset, order, 0)

    def where(mask: jax.Array | None, yes: Any, no: Any) -> Any:
        return no if mask is None else jax.tree.map(lambda a, b: jnp.where(_like(mask, a), a, b), yes, no)

    def run(state: Any, first: int, stop: int, every: int | None) -> tuple[Any, tuple[Any, jax.Array]]:
        """Steps first .. stop - 1 from `state`: the last state, and every state and output."""

        def body(state: Any, at: Any) -> Any:
            j, x, dead, reset = at
            if every is not None:
                cut = jnp.broadcast_to((j > 0) & (j % every == 0), batch)
                cut = cut if dead is None else cut & ~dead
                state = where(cut, lax.stop_gradient(state), state)
            new, y = step(where(reset, zeros(state), state), where(dead, zeros(x), x), order[j])
            state = where(dead, state, new)
            return state, (state, where(dead, zeros(y), y))

        known = (xs, None if live is None else ~live, reset)
        at = (jnp.arange(first, stop), *(a if a is None else a[first:stop] for a in known))
        return lax.scan(body, state, at, unroll=unroll)

    zeros = partial(jax.tree.map, jnp.zeros_like)
    k1, k2 = truncation if isinstance(truncation, tuple) else (truncation or T + 1, truncation or T + 1)
    end, (states, ys) = run(carry, 0, T, k1 if k1 == k2 <= T else None)
    if k1 < k2 and k1 < T:
        # Every window is run again, from k2 - k1 steps before it on.
        parts, end = [], carry
        for window in range(0, T, k1):
            first = max(0, window - (k2 - k1))
            state = jax.tree.map(lambda a, i=first: lax.stop_gradient(a[i - 1]), states) if first else carry
            last_state, (_, part) = run(state, first, min(window + k1, T), None)
            end = last_state if live is None else where(live[window], last_state, end)
            parts.append(part[window - first :])
        ys = jnp.concatenate(parts)
    if reverse:
        ys = jnp.take_along_axis(ys, _like(order, ys), 0)
    return where(last, zeros(end), end), jnp.moveaxis(ys, 0, time_axis)


def _like(mask: jax.Array, a: jax.Array) -> jax.Array:
    """The mask with axes of one for those of a that it lacks."""
    return jnp.expand_dims(mask, range(mask.ndim, a.ndim))
