"""The forward sweep: what it computes, what it keeps, and its plain form, which second order differentiates.

How a step is fed. LSTM, forward, all gates kept, in ms on two cores (XLA's CPU backend, jax 0.10.2, float32); the first
column is what stands below:

    (B, T, D, H)          x W_x + h W_h   [x, h] W   x W_x by chunks   one tanh of (B, 4H), [x, h] W
    (32, 128, 128, 128)            13.9       14.6              13.2       14.4
    (16, 512, 64, 64)              10.2       10.1              11.0        8.1
    (1, 1024, 64, 64)               3.4        2.9               3.1        2.8
    (64, 128, 256, 256)            60.1       63.7              76.5       65.9
    (8, 2048, 64, 64)              21.1       20.1              22.6       17.4

The input projection in one product for all of time took 0.9 to 2.2 times as long, and 4 arrays (T, B, H) of memory.
One tanh for all gates wants σ(a) = (1 + tanh(a / 2)) / 2, which is zero below a = -17 where σ is not: the gradient of
a saturated gate would be lost, for at most a tenth of the time of forward and gradient. With nothing kept, all but the
second were slower than the first by up to a factor of two. Unrolling by 2 or 4 changed nothing but the time to compile.
Two halves of the batch side by side, for two cores: 1.16 times faster at the first shape, slower at the others.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxseq import _precision, _time
from jaxseq._recurrence._cell import (
    Cell,
    Inputs,
    State,
    Weights,
    apply_zoneout,
    cast_for_product,
    dtypes,
    h_of,
    pre_activations,
    recurrent_input,
    with_h,
)
from jaxseq._recurrence._phi import make_phi
from jaxseq._time import Block, Options


class Plan(NamedTuple):
    """How backward will go through time, and what it wants to be kept."""

    blocks: list[Block]
    exact: bool  # y is h, not rounded: h need not be saved
    saved: bool  # keep of every step what the cell saves for its pullback; else it is made again
    states: bool  # keep ŝ of every step; else it is made again


class Residuals(NamedTuple):
    """What the forward sweep leaves for the backward one; time first, but for ys."""

    ys: jax.Array
    starts: State  # (N, *B, H): the state before each chunk, in reading order
    states: State | None  # ŝ of every step, where it isn't made again
    saved: Any  # of every step, for the pullback, where it isn't made again


class SavedAsY(NamedTuple):
    """Stands in what was saved where h itself was: y holds it."""


def restore_y(saved: Any, y: jax.Array) -> Any:
    """What was saved, y where `AsY` stands."""
    return jax.tree.map(lambda a: y if isinstance(a, SavedAsY) else a, saved, is_leaf=lambda a: isinstance(a, SavedAsY))


def forward_step(
    cell: Cell,
    precision: Any,
    weights: Weights,
    s_prev: State,
    x: Any,
    valid: Any = None,
    reset: Any = None,
    zoneout: Any = None,
    zoned_out: Any = None,
    *,
    share: bool = False,
    select: bool = False,
) -> Any:
    """(s, (y, ŝ, saved)) of one step, x (*B, *features); with `share` what y holds is not saved.

    With `select`, for JAX to differentiate: what the step is given is selected as well as what it returns, so that
    where it does not count its derivative, which may be infinite or NaN, meets no cotangent.
    """
    product, acc = dtypes(weights, s_prev, x)
    read = _time.reads_input(valid, zoned_out)
    s_hat = _time.zero_where(reset, s_prev)
    given, phi = s_hat, make_phi(cell, precision, weights, product)
    if select and read is not None:
        given, zoneout = _time.zero_padding(read, s_hat), _time.zero_padding(valid, zoneout)
        phi = phi._replace(step=partial(phi.step_where, read))
    u = cell.input.apply(precision, weights.w_x, weights.b_x, _time.zero_padding(read, x).astype(product))
    r = cell.recurrent.apply(
        precision, weights.w_h, weights.b_h, recurrent_input(weights, cast_for_product(h_of(given), product))
    )
    s, saved = phi.step(pre_activations(cell, u, r), _precision.cast(given, acc))
    if share and zoneout is None:  # else y is not what the cell has made
        saved = jax.tree.map(lambda a: SavedAsY() if a is h_of(s) else a, saved)
    s = apply_zoneout(zoneout, s_hat, _precision.cast_like(s, s_hat))
    y = _time.zero_padding(valid, h_of(s).astype(x.dtype))
    return _time.select(valid, s, s_prev), (y, s_hat, _precision.cast(saved, product))


def only_residual_is_h(cell: Cell, options: Options, inputs: Inputs) -> bool:
    """Whether y holds all that the cell saves."""

    def saved(inputs: Inputs) -> Any:
        x = inputs.xs.sum(options.axis)
        return forward_step(cell, options.precision, inputs.weights, inputs.carry, x, share=True)[1][2]

    return inputs.zoneout is None and not jax.tree.leaves(jax.eval_shape(saved, inputs))


def forward(cell: Cell, options: Options, inputs: Inputs, plan: Plan | None) -> tuple[Any, Residuals | None]:
    """((s_T, ys), what is kept of it for a backward sweep by `plan`)."""
    weights, carry, xs, *masks = inputs
    steps = xs.shape[options.axis]
    parts, share, saving, tracking = plan or Plan([], False, False, False)
    chunks = sum(part.windows * part.chunks for part in parts)
    product, _ = dtypes(weights, carry, xs)

    def step(state: Any, at: Any) -> Any:
        s_prev, ends = state
        t, n, *known = at
        if options.axis:
            known = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, t, options.axis, False), (xs, *masks))
        s, (y, s_hat, saved) = forward_step(cell, options.precision, weights, s_prev, *known, share=share)
        if chunks > 1:  # overwritten until the chunk ends
            ends = jax.tree.map(lambda a, b: lax.dynamic_update_index_in_dim(a, b, n, 0), ends, s)
        # h is rounded as the gates are: the backward sweep multiplies it in that dtype.
        state = with_h(s_hat, h_of(s_hat).astype(product)) if tracking else None
        return (s, ends), (y, state, saved if saving else None)

    ends = jax.tree.map(lambda a: jnp.broadcast_to(a[None], (chunks, *a.shape)), carry) if chunks > 1 else None
    number = _time.chunk_of_step(options, parts, steps) if chunks > 1 else None
    clock = jnp.arange(steps) if options.axis else None
    at = (clock, number, *((None,) * 4 if options.axis else (xs, *masks)))
    (s, ends), (ys, states, saved) = lax.scan(step, (carry, ends), at, reverse=options.reverse, unroll=options.unroll)
    ys = jnp.moveaxis(ys, 0, options.axis)
    if plan is None:
        return (s, ys), None
    first = jax.tree.map(lambda a: a[None], carry)
    starts = first if ends is None else jax.tree.map(lambda a, b: jnp.concatenate([a, b[:-1]]), first, ends)
    return (s, ys), Residuals(ys, starts, states, saved)


def forward_without_residuals(cell: Cell, options: Options, inputs: Inputs) -> tuple[State, jax.Array]:
    """(s_T, ys) by one scan, or under truncation by one for each window, from k2 - k1 steps before it on: its losses
    see no further back. This is what second order differentiates.
    """
    weights, carry, *known = inputs
    steps = inputs.xs.shape[options.axis]
    known = jax.tree.map(lambda a: jnp.moveaxis(a, options.axis, 0), known)
    if options.reverse:
        known = jax.tree.map(lambda a: jnp.flip(a, 0), known)
    k1, k2 = _time.window_lengths(options, steps)

    def read(s: State, known: Any) -> tuple[State, jax.Array]:
        def step(s: State, at: Any) -> tuple[State, jax.Array]:
            s, (y, *_) = forward_step(cell, options.precision, weights, s, *at, select=True)
            return s, y

        return lax.scan(step, s, known)

    if k1 == steps:
        s, ys = read(carry, known)
    else:
        # Dead steps before and behind make all windows alike: the carry stands still in them.
        before, count = k2 - k1, -(-steps // k1)
        pad = lambda a: jnp.pad(a, [(before, count * k1 - steps)] + [(0, 0)] * (a.ndim - 1))  # noqa: E731
        spans = jnp.arange(count)[:, None] * k1 + jnp.arange(k2)[None]
        if known[1] is None:
            xs = jax.tree.leaves(known)[0]
            known[1] = jnp.ones(xs.shape[: xs.ndim - 1 - cell.input.dimensions(weights.w_x)], bool)
        windows = jax.tree.map(lambda a: pad(a)[spans], known)

        def one(s: State, at: Any) -> tuple[State, Any]:
            is_cut, known = at
            s = jax.tree.map(lambda a: jnp.where(is_cut, lax.stop_gradient(a), a), s)
            early, late = (jax.tree.map(lambda a, p=p: a[p], known) for p in (slice(k1), slice(k1, None)))
            s, ys = read(s, early)
            end, more = read(s, late)
            return s, (end, jnp.concatenate([ys, more])[before:])

        _, (ends, ys) = lax.scan(one, carry, (jnp.arange(count) * k1 > before, windows))
        last = _time.last_window_of_sequence(options._replace(axis=0), k1, None if inputs.valid is None else known[1])
        if last is None:
            s = jax.tree.map(lambda a: a[-1], ends)
        else:
            s = jax.tree.map(lambda a: jnp.take_along_axis(a, _time.expand_mask(last[None], a), 0)[0], ends)
        ys = ys.reshape(count * k1, *ys.shape[2:])[:steps]
    return s, jnp.moveaxis(jnp.flip(ys, 0) if options.reverse else ys, 0, options.axis)
