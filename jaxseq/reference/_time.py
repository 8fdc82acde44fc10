"""Time options of the reference implementations: one scan, or for a truncation (k1, k2) a scan for each window."""

from collections.abc import Callable
from functools import partial, reduce
from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import PyTree

from jaxseq._precision import accumulator, cast_like, common, promote, wider
from jaxseq._time_options import TimeOptions, with_defaults


def through_time(
    cell: Callable[..., tuple[PyTree, jax.Array]],
    carry: PyTree,
    xs: PyTree,
    *,
    features: int = 1,
    takes_valid_mask: bool = False,
    output: Callable[[PyTree, PyTree], jax.Array] | None = None,
    output_of_cell: bool = False,
    **time: Unpack[TimeOptions],
) -> tuple[PyTree, jax.Array]:
    """Apply `cell` to the steps of xs, an array or a pair (array, side inputs).

    j = 0 .. T - 1 counts the steps in processing order. `checkpoint` is ignored: it affects residuals, not results.

    At a skipped step (padding, or all of the state kept by boolean zoneout) the arguments of the cell are zeros. For a
    cell whose derivative may be infinite there, set `takes_valid_mask`: it is called with a mask `valid` `(*batch,)`,
    False where its result is unused.

    `output(state, x)` is y of a step. None is the first leaf of the state, or with `output_of_cell` the second
    result of the cell, for functions without zoneout.
    """
    options = with_defaults(time)
    lengths, resets, reverse, truncation = options.lengths, options.resets, options.reverse, options.truncation
    unroll, dtype, zoneout = options.unroll, options.state_dtype, options.zoneout
    apply = partial(cell, precision=options.precision, recurrent_dropout_mask=options.recurrent_dropout_mask)
    x, others = xs if isinstance(xs, tuple) else (xs, None)
    time_axis = options.time_axis % x.ndim
    join = lambda x, others: (x, others) if isinstance(xs, tuple) else x  # noqa: E731

    def as_state(tree: PyTree) -> PyTree:
        def cast(a: jax.Array) -> jax.Array:
            if dtype is None:
                return a.astype(accumulator(a.dtype))
            return a.astype(common(dtype, np.dtype(np.complex64)) if jnp.iscomplexobj(a) else dtype)

        return jax.tree.map(cast, tree)

    if carry is None:  # shapes only: T may be 0
        shape = lambda a: jax.ShapeDtypeStruct(a.shape[:time_axis] + a.shape[time_axis + 1 :], a.dtype)  # noqa: E731
        one_step = jax.tree.map(shape, join(x, others))
        carry = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(apply, None, one_step)[0])
        carry = as_state(carry)
    initial, carry, output_dtype = carry, as_state(carry), x.dtype
    state_dtype = promote(*jax.tree.leaves(carry), x)
    if not jnp.iscomplexobj(x):
        state_dtype = jnp.finfo(state_dtype).dtype  # of its real part
    if wider(state_dtype, accumulator(output_dtype)):
        x = x.astype(state_dtype)

    T, batch = x.shape[time_axis], x.shape[:time_axis] + x.shape[time_axis + 1 : -features]
    xs = jax.tree.map(lambda a: jnp.moveaxis(a, time_axis, 0), join(x, others))
    valid = reset = last = zoned_out = None
    t = order = jnp.broadcast_to(jnp.arange(T).reshape(T, *(1 for _ in batch)), (T, *batch))
    amounts = []  # zoneout of each leaf of the state
    fresh = jax.tree.map(jnp.zeros_like, carry)  # the state after a reset
    if options.reset_state is not None:
        fresh = jax.tree.map(
            lambda a, like: jnp.stack([a.astype(like.dtype)] * (like.size // a.size)).reshape(like.shape),
            options.reset_state,
            carry,
        )
    leaves = jax.tree.leaves(carry) if zoneout is not None else []
    weights = [zoneout] * len(leaves) if isinstance(zoneout, int | float | np.floating) else jax.tree.leaves(zoneout)
    for k, a in zip(weights, leaves, strict=True):
        amount = jnp.moveaxis(k, time_axis, 0) if jnp.ndim(k) else jnp.full((T, *a.shape), k, a.dtype)
        amounts.append(lax.stop_gradient(amount))
    if amounts and all(k.dtype == bool for k in amounts):
        zoned_out = reduce(jnp.logical_and, (jnp.all(k, range(k.ndim - features, k.ndim)) for k in amounts))
    if lengths is not None:
        lengths = jnp.clip(lengths, 0, T).astype(t.dtype)
        valid = t < lengths[None]
    if resets is not None:
        reset = jnp.moveaxis(resets, time_axis, 0)
        reset = reset if valid is None else reset & valid
    if reverse:
        # In reverse, step t follows step t + 1: the boundary before it is resets[t + 1], and resets[0] is a boundary
        # after the final step.
        if reset is not None:
            last = jnp.any(reset[:1], 0)
            reset = jnp.concatenate([reset[1:], jnp.zeros_like(reset[:1])])
        # The step at each position in processing order. Padding comes last in both directions.
        order = T - 1 - t if lengths is None else jnp.where(t < lengths[None], lengths[None] - 1 - t, t)
        xs, reset, zoned_out, amounts = jax.tree.map(
            lambda a: jnp.take_along_axis(a, expand_mask(order, a), 0), (xs, reset, zoned_out, amounts)
        )

    def where(mask: jax.Array | None, yes: PyTree, no: PyTree) -> PyTree:
        return no if mask is None else jax.tree.map(lambda a, b: jnp.where(expand_mask(mask, a), a, b), yes, no)

    def mix(k: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        """Return the fraction k of a plus the fraction 1 - k of b."""
        return jnp.where(k, a, b) if k.dtype == bool else a * k.astype(a.dtype) + b * (1 - k.astype(a.dtype))

    def run(state: PyTree, first: int, stop: int, every: int | None) -> tuple[PyTree, tuple[PyTree, PyTree]]:
        """Process steps first .. stop - 1 from `state`. Return the final state, then all states, and the pair
        (y, state) of every step, which is zero in the padding.

        With an integer `every`, stop the gradient of the state every so many steps.
        """

        def body(state: PyTree, at: PyTree) -> PyTree:
            j, x, padding, reset, zoned_out, amounts = at
            if every is not None:
                cut = jnp.broadcast_to((j > 0) & (j % every == 0), batch)
                cut = cut if padding is None else cut & ~padding
                state = where(cut, lax.stop_gradient(state), state)
            before = where(reset, fresh, state)
            skipped = zoned_out if padding is None else padding if zoned_out is None else padding | zoned_out
            more = {"valid": ~skipped} if takes_valid_mask and skipped is not None else {}
            new, y_of_cell = apply(where(skipped, zeros(before), before), where(skipped, zeros(x), x), **more)
            if amounts:
                amounts = where(padding, zeros(amounts), amounts)
                mixed = map(mix, amounts, jax.tree.leaves(before), jax.tree.leaves(new))
                new = jax.tree.unflatten(jax.tree.structure(new), mixed)
            if output is None:
                y = y_of_cell if output_of_cell else jax.tree.leaves(new)[0]
            else:
                y = output(new, where(skipped, zeros(x), x))
            y = y.astype(output_dtype)
            state = where(padding, state, new)
            return state, (state, (where(padding, zeros(y), y), where(padding, zeros(state), state)))

        per_step = (xs, None if valid is None else ~valid, reset, zoned_out, amounts)
        at = (jnp.arange(first, stop), *jax.tree.map(lambda a: a[first:stop], per_step))
        return lax.scan(body, state, at, unroll=unroll)

    zeros = partial(jax.tree.map, jnp.zeros_like)
    k1, k2 = truncation if isinstance(truncation, tuple) else (truncation or T + 1, truncation or T + 1)
    end, (states, results) = run(carry, 0, T, k1 if k1 == k2 <= T else None)
    if k1 < k2 and k1 < T:
        # Process each window again from k2 - k1 steps before its start, with the state there as a constant.
        parts, end = [], carry
        for window in range(0, T, k1):
            first = max(0, window - (k2 - k1))
            state = jax.tree.map(lambda a, i=first: lax.stop_gradient(a[i - 1]), states) if first else carry
            last_state, (_, part) = run(state, first, min(window + k1, T), None)
            end = last_state if valid is None else where(valid[window], last_state, end)
            parts.append(jax.tree.map(lambda a, n=window - first: a[n:], part))
        results = jax.tree.map(lambda *a: jnp.concatenate(a), *parts)
    if reverse:
        results = jax.tree.map(lambda a: jnp.take_along_axis(a, expand_mask(order, a), 0), results)
    ys, returned = jax.tree.map(lambda a: jnp.moveaxis(a, 0, time_axis), results)
    return cast_like(returned if options.return_states else where(last, fresh, end), initial), ys


def expand_mask(mask: jax.Array, a: jax.Array) -> jax.Array:
    """Append axes of size 1 to `mask` until it has as many axes as `a`."""
    return jnp.expand_dims(mask, range(mask.ndim, a.ndim))
