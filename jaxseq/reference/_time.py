"""Time as the twins read it: one scan, or under windows that reach back one for each."""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jax import lax

from jaxseq._precision import accumulator, cast_like, promote, wider
from jaxseq._time_options import TimeOptions, with_defaults


def through_time(
    cell: Callable[..., tuple[Any, jax.Array]],
    carry: Any,
    xs: jax.Array,
    features: int = 1,
    takes_valid_mask: bool = False,
    **time: Unpack[TimeOptions],
) -> tuple[Any, jax.Array]:
    """Reads xs step by step, j = 0 .. T - 1 in the order of reading. `checkpoint` has no meaning here: it says what is
    kept, not what is computed.

    Where a step does not count (padding, or all of the state held by booleans) the cell reads zeros. A cell whose
    derivative may be infinite there `takes_valid_mask`: a mask (*batch,), False where its result is not used.
    """
    options = with_defaults(time)
    lengths, resets, reverse, truncation = options.lengths, options.resets, options.reverse, options.truncation
    unroll, dtype, zoneout = options.unroll, options.state_dtype, options.zoneout
    read = partial(cell, precision=options.precision, recurrent_dropout_mask=options.recurrent_dropout_mask)
    time_axis = options.time_axis % xs.ndim
    held_in = lambda tree: jax.tree.map(lambda a: a.astype(dtype or accumulator(a.dtype)), tree)  # noqa: E731
    if carry is None:  # shapes only: there may be no step
        carry = jax.tree.map(jnp.zeros_like, jax.eval_shape(read, None, jnp.sum(xs, time_axis))[0])
        carry = held_in(carry)
    given, carry, of_xs = carry, held_in(carry), xs.dtype
    state_dtype = promote(*jax.tree.leaves(carry))
    if wider(state_dtype, accumulator(of_xs)):
        xs = xs.astype(state_dtype)

    xs = jnp.moveaxis(xs, time_axis, 0)
    T, batch = xs.shape[0], xs.shape[1:-features]
    valid = reset = last = zoned_out = None
    t = order = jnp.broadcast_to(jnp.arange(T).reshape(T, *(1 for _ in batch)), (T, *batch))
    holds = []  # of each leaf of the state
    for k, a in zip(jax.tree.leaves(zoneout), jax.tree.leaves(carry) if zoneout is not None else (), strict=True):
        every = jnp.moveaxis(k, time_axis, 0) if jnp.ndim(k) else jnp.full((T, *a.shape), k, a.dtype)
        holds.append(lax.stop_gradient(every))
    if holds and all(k.dtype == bool for k in holds):
        zoned_out = reduce(jnp.logical_and, (jnp.all(k, range(k.ndim - features, k.ndim)) for k in holds))
    if lengths is not None:
        lengths = jnp.clip(lengths, 0, T).astype(t.dtype)
        valid = t < lengths[None]
    if resets is not None:
        reset = jnp.moveaxis(resets, time_axis, 0)
        reset = reset if valid is None else reset & valid
    if reverse:
        if reset is not None:  # into a step goes the boundary above it, and out of the last one that below it
            last = jnp.any(reset[:1], 0)
            reset = jnp.concatenate([reset[1:], jnp.zeros_like(reset[:1])])
        # Which step is read as the j-th: padding comes last, either way.
        order = T - 1 - t if lengths is None else jnp.where(t < lengths[None], lengths[None] - 1 - t, t)
        xs = jnp.take_along_axis(xs, expand_mask(order, xs), 0)
        reset, zoned_out, holds = jax.tree.map(
            lambda a: jnp.take_along_axis(a, expand_mask(order, a), 0), (reset, zoned_out, holds)
        )

    def where(mask: jax.Array | None, yes: Any, no: Any) -> Any:
        return no if mask is None else jax.tree.map(lambda a, b: jnp.where(expand_mask(mask, a), a, b), yes, no)

    def mix(k: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        """What is held of a, and the rest of b."""
        return jnp.where(k, a, b) if k.dtype == bool else a * k.astype(a.dtype) + b * (1 - k.astype(a.dtype))

    def run(state: Any, first: int, stop: int, every: int | None) -> tuple[Any, tuple[Any, jax.Array]]:
        """Steps first .. stop - 1 from `state`: the last state, and every state and output."""

        def body(state: Any, at: Any) -> Any:
            j, x, dead, reset, zoned_out, holds = at
            if every is not None:
                cut = jnp.broadcast_to((j > 0) & (j % every == 0), batch)
                cut = cut if dead is None else cut & ~dead
                state = where(cut, lax.stop_gradient(state), state)
            before = where(reset, zeros(state), state)
            skipped = zoned_out if dead is None else dead if zoned_out is None else dead | zoned_out
            more = {"valid": ~skipped} if takes_valid_mask and skipped is not None else {}
            new, _ = read(where(skipped, zeros(before), before), where(skipped, zeros(x), x), **more)
            if holds:
                holds = where(dead, zeros(holds), holds)
                held = map(mix, holds, jax.tree.leaves(before), jax.tree.leaves(new))
                new = jax.tree.unflatten(jax.tree.structure(new), held)
            y = jax.tree.leaves(new)[0].astype(of_xs)
            state = where(dead, state, new)
            return state, (state, where(dead, zeros(y), y))

        known = (xs, None if valid is None else ~valid, reset, zoned_out, holds)
        at = (jnp.arange(first, stop), *jax.tree.map(lambda a: a[first:stop], known))
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
            end = last_state if valid is None else where(valid[window], last_state, end)
            parts.append(part[window - first :])
        ys = jnp.concatenate(parts)
    if reverse:
        ys = jnp.take_along_axis(ys, expand_mask(order, ys), 0)
    return cast_like(where(last, zeros(end), end), given), jnp.moveaxis(ys, 0, time_axis)


def expand_mask(mask: jax.Array, a: jax.Array) -> jax.Array:
    """The mask with axes of one for those of a that it lacks."""
    return jnp.expand_dims(mask, range(mask.ndim, a.ndim))
