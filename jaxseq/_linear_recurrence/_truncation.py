"""Truncation: windows of k1 steps, whose losses are backpropagated through k2 steps.

If k1 = k2, the rule cuts the gradient at the starts of the windows. Otherwise windows overlap: each starts k2 - k1
steps early, from the state there, which has no gradient. They run in parallel, as another batch axis.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxseq import _time
from jaxseq._linear_recurrence._rule import Inputs, Options, run
from jaxseq._linear_recurrence._solve import forward


def run_truncated(
    options: Options, window: tuple[int, int], inputs: Inputs, lengths: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Run the rule with truncation (k1, k2)."""
    overlap = window[0] != window[1]
    if options.reverse and (lengths is not None or overlap):
        # Windows start at the first processed step of each sequence, the last one within its length.
        steps, batch = inputs.x.shape[0], inputs.x.shape[1:-1]
        lengths = jnp.full(batch, steps, jnp.int32) if lengths is None else lengths
        turn = partial(_time.reverse_within_length, lengths=lengths, axis=0)
        end, ys = run_truncated(options._replace(reverse=False), window, _in_processing_order(turn, inputs), None)
        return end, turn(ys)
    if overlap:
        return _in_windows(options, window, inputs)
    return run(options, inputs._replace(start=window_starts(window[0], inputs.x, reverse=options.reverse)))


def window_starts(k: int, x: jax.Array, *, reverse: bool) -> jax.Array:
    """Return (T, *B, 1): True at the first step of each window of k steps but the first one, in processing order."""
    total = x.shape[0]
    t = jnp.arange(total).reshape(-1, *(1,) * (x.ndim - 1))
    number = total - 1 - t if reverse else t
    return jnp.broadcast_to((number > 0) & (number % k == 0), (total, *x.shape[1:-1], 1))


def _in_processing_order(turn: Callable[[jax.Array], jax.Array], inputs: Inputs) -> Inputs:
    """Return the inputs in processing order. Padding stays at the end."""
    a, x = inputs.a, inputs.x
    if a.shape[0] != 1:
        a = turn(jnp.broadcast_to(a, (*x.shape[:-1], a.shape[-1])))
    return inputs._replace(a=a, x=turn(x), reset=None if inputs.reset is None else turn(inputs.reset))


def _in_windows(options: Options, window: tuple[int, int], inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    """Run windows of k2 steps in parallel, each from the state k2 - k1 steps before it.

    The outputs of those steps are discarded. The states at the starts have no gradient, except for h_0.
    """
    k1, k2 = window
    total, before = inputs.x.shape[0], k2 - k1
    count = -(-total // k1)
    t = jnp.arange(k2)[:, None] - before + k1 * jnp.arange(count)[None]  # (k2, W)
    take = lambda a: a[jnp.clip(t, 0, total - 1)]  # noqa: E731
    inside = ((t >= 0) & (t < total)).reshape(*t.shape, *(1,) * (inputs.x.ndim - 1))
    valid = inside if inputs.valid is None else inside & take(inputs.valid)
    fixed = lax.stop_gradient(inputs)
    _, states = forward(options.algorithm, fixed.steps, fixed.x, fixed.carry, reverse=False, emit=lambda h: h)
    first = k1 * jnp.arange(count) - before
    at_start = states[jnp.clip(first - 1, 0, total - 1)]
    starts = jnp.where(first.reshape(-1, *(1,) * (at_start.ndim - 1)) > 0, at_start, inputs.carry[None])
    windows = Inputs(
        a=inputs.a[:, None] if inputs.a.shape[0] == 1 else take(inputs.a),
        carry=starts,
        x=take(inputs.x),
        valid=jnp.broadcast_to(valid, (*t.shape, *inputs.x.shape[1:-1], 1)),
        reset=None if inputs.reset is None else take(inputs.reset),
    )
    ends, ys = run(options, windows)
    ys = jnp.moveaxis(ys[before:], 1, 0)
    ys = ys.reshape(count * k1, *ys.shape[2:])[:total]
    if inputs.valid is None:
        return ends[-1], ys
    last = _time.last_window_of_sequence(inputs.valid[..., 0], 0, k1)
    return jnp.take_along_axis(ends, last[None, ..., None], 0)[0], ys
