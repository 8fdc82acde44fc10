"""The backward pass: equation (1) chunk by chunk, in parallel over windows, and the contractions (2) of each chunk.

Residuals of a chunk are read in place, its states are recomputed, and each contraction is over one chunk, because that
was fastest or used the least memory; see `docs/measured-recurrence.md`.
"""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxseq import _dense, _precision, _sizes, _time
from jaxseq._recurrence._cell import (
    Cell,
    Inputs,
    State,
    Weights,
    add_to_h,
    apply_zoneout,
    concatenate_delta,
    dtypes,
    h_of,
    pre_activations,
    recurrent_input,
    split_delta,
    with_h,
    zoneout_pullback,
)
from jaxseq._recurrence._forward import Plan, Residuals, forward_step, only_residual_is_h, restore_y
from jaxseq._recurrence._phi import make_phi
from jaxseq._time import Block, Options

# Gates are recomputed, not stored, where that is as fast: the state is h only, there are at least GATES gates and no
# product inside the step, and a pre-activation takes at most SMALL multiplications (D + H for a matrix). A single input
# feature is an exception: XLA recomputes its product wherever a gate is read, which takes 1.5 to 1.8 times as long.
# Measurements: docs/measured-recurrence.md.
GATES, SMALL = 3, 128


def make_plan(cell: Cell, options: Options, inputs: Inputs) -> Plan:
    """Return how the backward pass runs: its blocks of time, and what the forward pass stores for it."""
    weights, carry, xs, *_ = inputs
    leaves, rows = jax.tree.leaves(carry), _sizes.at_least(prod(h_of(carry).shape[:-1]), 1)
    blocks = _time.blocks(options, xs.shape[options.axis], rows)
    exact = len({*dtypes(weights, carry, xs), xs.dtype, *(a.dtype for a in leaves)}) == 1
    width = max(1, len(cell.gates) * leaves[0].shape[-1])
    small = width < weights.w_x.size <= SMALL * width - weights.w_h.size
    cheap = exact and len(leaves) == 1 and small and len(cell.gates) >= GATES and weights.w_q is None
    replays = cell.pullback is None or cell.replay is not None
    saved = (options.checkpoint is None and not cheap) or (exact and only_residual_is_h(cell, options, inputs))
    return Plan(blocks, exact, saved, saved and not (exact and (len(leaves) == 1 or replays)))


def backward(cell: Cell, options: Options, inputs: Inputs, residuals: Residuals, cotangents: Any) -> Any:
    """Return the cotangents of weights, carry and xs."""
    weights, carry, xs, *_ = inputs
    _, acc = dtypes(weights, carry, xs)
    s_bar, ys_bar = cotangents
    s_bar = _precision.cast(s_bar, acc)
    zero_state = jax.tree.map(jnp.zeros_like, s_bar)
    w_bar = jax.tree.map(jnp.zeros_like, _precision.cast(inputs.floats[0], acc))
    plan = make_plan(cell, options, inputs)
    main, *rest = plan.blocks
    view, *rest_view = _views(options, [main, *rest], inputs, residuals, ys_bar)
    stage = partial(_backward_stage, cell, options, plan, weights)

    k1, k2 = _time.window_lengths(options, xs.shape[options.axis])
    last = _time.last_window_of_sequence(options, k1, inputs.valid)
    entering, x_rest_bar = zero_state, []  # `entering`: s_bar at the end of the main block in the next stage
    for block, its_view in zip(rest, rest_view, strict=True):
        at_end = jax.tree.map(
            lambda a: a[None], s_bar if last is None else _time.select(last == main.windows, s_bar, zero_state)
        )
        ss_bar, w_bar, x_bar = stage(block, its_view, at_end, w_bar, _zeros_of_view(its_view))
        entering, x_rest_bar = jax.tree.map(lambda a: a[0], ss_bar), [x_bar]

    if last is None:
        ss_bar = jax.tree.map(lambda a: jnp.broadcast_to(a, (main.windows, *a.shape)), zero_state)
        ss_bar = _time.shift_to_previous_window(options, ss_bar, zero_state if rest else s_bar)
    else:
        number = jnp.arange(main.windows)[:: -1 if options.reverse else 1]
        ends = jnp.expand_dims(number, range(1, last.ndim + 1)) == last[None]
        ss_bar = jax.tree.map(
            lambda a: jnp.where(_time.expand_mask(ends, a[None]), a[None], jnp.zeros((), a.dtype)), s_bar
        )
    ss_bar, w_bar, x_bar = stage(main, view, ss_bar, w_bar, _zeros_of_view(view))
    carry_bar = _time.first_window(options, ss_bar)

    def later_stage(_: Any, state: Any) -> Any:
        ss_bar, entering, carry_bar, w_bar, x_bar = state
        ss_bar, w_bar, x_bar = stage(
            main, view, _time.shift_to_previous_window(options, ss_bar, entering), w_bar, x_bar, losses=False
        )
        return ss_bar, zero_state, jax.tree.map(jnp.add, carry_bar, _time.first_window(options, ss_bar)), w_bar, x_bar

    # Stages 1, 2, ...: whole windows, then part of one. The s̄ of the first window is part of carry_bar.
    further, part = min(k2 // k1 - 1, main.windows), k2 % k1
    if further and (main.windows > 1 or rest):
        ss_bar, entering, carry_bar, w_bar, x_bar = lax.fori_loop(
            0, further, later_stage, (ss_bar, entering, carry_bar, w_bar, x_bar)
        )
    if part and (main.windows > 1 or rest):
        _, w_bar, x_bar = stage(
            main,
            view,
            _time.shift_to_previous_window(options, ss_bar, entering),
            w_bar,
            x_bar,
            losses=False,
            cut=k1 - part,
        )

    x_bar = _time.merge_time(x_bar, options.axis, main.windows)
    if rest:
        x_bar = jnp.concatenate([*x_rest_bar, x_bar] if options.reverse else [x_bar, *x_rest_bar], options.axis)
    return _precision.cast_like((w_bar, carry_bar, x_bar), inputs.floats)


class _View(NamedTuple):
    """The arrays of a block of W windows of k steps, with time (W, k) at its axis; with W = 1, time is (k,)."""

    xs: jax.Array
    valid: jax.Array | None
    reset: jax.Array | None
    ys_bar: jax.Array
    ys: jax.Array
    zoneout: State | None
    zoned_out: jax.Array | None
    starts: State  # (W, chunks, *B, H)
    states: State | None
    saved: Any


def _views(
    options: Options, parts: list[Block], inputs: Inputs, residuals: Residuals, ys_bar: jax.Array
) -> list[_View]:
    views, offset = [], 0
    for block in parts:
        count = block.windows * block.chunks

        def of(tree: Any, axis: int, first: int, length: int, windows: int = block.windows) -> Any:
            piece = partial(lax.slice_in_dim, start_index=first, limit_index=first + length, axis=axis)
            return jax.tree.map(lambda a: _time.split_time(piece(a), axis, windows), tree)

        starts = of(residuals.starts, 0, offset, count)
        if options.reverse and block.windows > 1:
            starts = jax.tree.map(lambda a: jnp.flip(a, 0), starts)
        steps = block.first, block.windows * block.steps
        over_time = inputs.xs, inputs.valid, inputs.reset, ys_bar, residuals.ys, inputs.zoneout, inputs.zoned_out
        xs, valid, reset, y_bar, y, zoneout, zoned_out = of(over_time, options.axis, *steps)
        states, saved = of((residuals.states, residuals.saved), 0, *steps)
        views.append(_View(xs, valid, reset, y_bar, y, zoneout, zoned_out, starts, states, saved))
        offset += count
    return views


def _zeros_of_view(view: _View) -> jax.Array:
    """Return zeros with the shape of x̄, in the dtype of the accumulator."""
    return jnp.zeros_like(view.xs.astype(_precision.accumulator(view.xs.dtype)))


def _backward_stage(
    cell: Cell,
    options: Options,
    plan: Plan,
    weights: Weights,
    block: Block,
    view: _View,
    s_bar: State,
    w_bar: Weights,
    x_bar: jax.Array,
    losses: bool = True,
    cut: int = 0,
) -> tuple[State, Weights, jax.Array]:
    """Run one stage over all windows of a block, from their ends back to their step `cut`, counted in processing order.

    s̄ (W, *B, H) is the cotangent at the end of each window; the result is that at its start. ȳ is added only in the
    first stage, `losses`. Other stages add to `x_bar`.
    """
    c, last = block.chunk, block.steps - (block.chunks - 1) * block.chunk

    def chunk(w: Any, i: Any, length: int, state: Any) -> Any:
        """Process chunk i, in processing order, of each window in the group from w."""
        s_bar, w_bar, x_bar = state
        t = block.steps - i * c - length if options.reverse else i * c
        take = partial(_time.take_chunk, block=block, w=w, t=t, length=length)
        x, valid, reset, y_bar, y, zoneout, zoned_out = jax.tree.map(lambda a: take(a, options.axis), tuple(view[:7]))
        read = _time.reads_input(valid, zoned_out)
        pick = lambda tree, t: jax.tree.map(lambda a: _time.take_chunk(a, 0, block, w, t, 1)[0], tree)  # noqa: E731
        start = pick(view.starts, i)
        if plan.saved:
            saved_at = lambda j: restore_y(pick(view.saved, t + j[0]), j[1])  # noqa: E731
            if plan.states:
                states = jax.tree.map(lambda a: take(a, 0), view.states)
            else:
                states = _replay(cell, options, weights, start, y, valid, reset, zoneout, saved_at)
            known = jnp.arange(length), y
        else:
            recompute = _recompute_in_bulk if plan.exact else _recompute_step_by_step
            states, known = recompute(cell, options, weights, start, x, y, valid, reset, zoneout, zoned_out)
            saved_at = lambda saved: saved  # noqa: E731
        stops_at = (block.steps - 1 - cut if options.reverse else cut) - t if cut else None
        product, _ = dtypes(weights, states, x)
        s_bar, delta_u, delta_r, p_bar, inner = _chunk_cotangents(
            cell,
            options,
            weights,
            product,
            s_bar,
            y_bar if losses else None,
            valid,
            read,
            reset,
            zoneout,
            states,
            known,
            saved_at,
            stops_at,
        )
        x, h, w_q_bar = (
            _time.zero_padding(read, x),
            recurrent_input(weights, _time.zero_padding(read, h_of(states))),
            None,
        )
        if weights.w_q is not None:
            w_q_bar = _dense.pull_weight(options.precision, *inner, partitioned=options.partitioning.implicit)
        found = Weights(
            w_x=cell.input.pull_weight(options.precision, x.astype(product), delta_u, weights.w_x),
            w_h=cell.recurrent.pull_weight(options.precision, h.astype(product), delta_r, weights.w_h),
            b_x=None if weights.b_x is None else _dense.pull_bias(delta_u),
            b_h=None if weights.b_h is None else _dense.pull_bias(delta_r),
            w_q=w_q_bar,
            cell_params=jax.tree.map(
                lambda p_bar, p: jnp.sum(p_bar, range(p_bar.ndim - p.ndim)), p_bar, weights.cell_params
            ),
        )
        piece = cell.input.pull_input(options.precision, weights.w_x, delta_u, cell.input.space_of(weights.w_x, x))
        piece = piece if losses else piece + take(x_bar, options.axis)
        return (
            s_bar,
            jax.tree.map(jnp.add, w_bar, found),
            _time.put_chunk(x_bar, piece.astype(x_bar.dtype), options.axis, block, w, t),
        )

    def group(w: Any, state: Any) -> Any:
        """Process the chunks from the last one, which may be shorter, to the first."""
        first, count = cut // c, block.chunks
        if last < c or count == 1:
            count -= 1
            state = chunk(w, count, last, state)
        if count > first:
            state = lax.fori_loop(first, count, lambda i, state: chunk(w, count - 1 + first - i, c, state), state)
        return state

    if block.group == block.windows:
        return group(0, (s_bar, w_bar, x_bar))

    def one_group(g: Any, state: Any) -> Any:
        s_bar, w_bar, x_bar = state
        w = g * block.group
        here = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, w, block.group, 0), s_bar)
        here, w_bar, x_bar = group(w, (here, w_bar, x_bar))
        return jax.tree.map(lambda a, b: lax.dynamic_update_slice_in_dim(a, b, w, 0), s_bar, here), w_bar, x_bar

    return lax.fori_loop(0, block.windows // block.group, one_group, (s_bar, w_bar, x_bar))


def _recompute_step_by_step(
    cell: Cell, options: Options, weights: Weights, start: State, x: Any, _: Any, *masks: Any
) -> tuple[State, Any]:
    """Return (ŝ, saved) of every step of a chunk by running the forward pass."""

    def step(s: State, at: Any) -> Any:
        s, (_, s_hat, saved) = forward_step(cell, options.precision, weights, s, *at)
        return s, (s_hat, saved)

    return lax.scan(step, start, (x, *masks), reverse=options.reverse, unroll=options.unroll)[1]


def _recompute_in_bulk(
    cell: Cell, options: Options, weights: Weights, start: State, x: Any, y: Any, *masks: Any
) -> tuple[State, Any]:
    """Return (ŝ, saved) of every step of a chunk.

    h is known, so each map is one product for the chunk. Only the other leaves of the state are sequential, pointwise.
    """
    valid, reset, zoneout, zoned_out = masks
    h = _h_before(options, start, y, valid, reset)
    u = cell.input.apply(
        options.precision, weights.w_x, weights.b_x, _time.zero_padding(_time.reads_input(valid, zoned_out), x)
    )
    r = cell.recurrent.apply(options.precision, weights.w_h, weights.b_h, recurrent_input(weights, h))
    phi = make_phi(cell, options.precision, weights, x.dtype).step
    if len(jax.tree.leaves(start)) == 1:
        s_hat = with_h(start, h)
        return s_hat, phi(pre_activations(cell, u, r), s_hat)[1]

    def step(s: State, at: Any) -> Any:
        u, r, h, valid, reset, zoneout = at
        s_hat = with_h(_time.zero_where(reset, s), h)
        into, saved = phi(pre_activations(cell, u, r), s_hat)
        return _time.select(valid, apply_zoneout(zoneout, s_hat, into), s), (s_hat, saved)

    return lax.scan(step, start, (u, r, h, valid, reset, zoneout), reverse=options.reverse, unroll=options.unroll)[1]


def _replay(
    cell: Cell,
    options: Options,
    weights: Weights,
    start: State,
    y: Any,
    valid: Any,
    reset: Any,
    zoneout: Any,
    saved_at: Any,
) -> State:
    """Return ŝ of every step of a chunk: h is known, and the cell recomputes the rest from its residuals."""
    h = _h_before(options, start, y, valid, reset)
    if len(jax.tree.leaves(start)) == 1:
        return with_h(start, h)
    replay = make_phi(cell, options.precision, weights, y.dtype).replay
    assert replay is not None

    def step(s: State, at: Any) -> tuple[State, State]:
        j, h, valid, reset, zoneout = at
        s_hat = with_h(_time.zero_where(reset, s), h)
        return _time.select(valid, apply_zoneout(zoneout, s_hat, replay(saved_at(j), s_hat)), s), s_hat

    at = (jnp.arange(h.shape[0]), y), h, valid, reset, zoneout
    return lax.scan(step, start, at, reverse=options.reverse, unroll=options.unroll)[1]


def _h_before(options: Options, start: State, y: Any, valid: Any, reset: Any) -> jax.Array:
    """Return the leaf h of ŝ of every step of a chunk: y of the step before."""
    h = _time.previous_steps(options, h_of(start), y)
    if valid is not None:  # in reverse, padding is processed first
        h = _time.select(
            _time.previous_steps(options, jnp.zeros_like(valid[0]), valid), h, jnp.broadcast_to(h_of(start), h.shape)
        )
    return _time.zero_where(reset, h)


def _chunk_cotangents(
    cell: Cell,
    options: Options,
    weights: Weights,
    product: Any,
    s_bar: State,
    y_bar: jax.Array | None,
    valid: jax.Array | None,
    read: jax.Array | None,
    reset: jax.Array | None,
    zoneout: State | None,
    states: State,
    known: Any,
    saved_at: Callable[[Any], Any],
    stops_at: Any,
) -> tuple[State, jax.Array, jax.Array, Any, Any]:
    """Run equation (1') over a chunk.

    Returns s̄ at its start, and of every step δu, δr (in the dtype of products), p̄ and (q, v̄). `saved_at` maps an
    entry of `known` to the residuals of its step.
    """
    acc = h_of(s_bar).dtype
    dimensions = cell.recurrent.dimensions(weights.w_h)
    to_h = cell.recurrent.pull_in_a_loop(
        options.precision, weights.w_h, h_of(s_bar).shape[h_of(s_bar).ndim - 1 - dimensions : -1]
    )
    phi = make_phi(cell, options.precision, weights, product)

    def step(s_bar: State, at: Any) -> tuple[State, Any]:
        j, known, y_bar, valid, read, reset, zoneout, s_hat = at
        into = s_bar if y_bar is None else add_to_h(s_bar, y_bar.astype(acc))
        saved, s_hat = _precision.cast((saved_at(known), s_hat), acc)
        to_previous, to_cell = (None, into) if zoneout is None else zoneout_pullback(zoneout, into)
        # Select in the results, not in s̄: 0 times an infinite or NaN derivative is NaN.
        delta, s_tilde, p_bar, inner = _time.zero_padding(read, phi.pullback(saved, s_hat, to_cell))
        delta = concatenate_delta(delta).astype(product)
        out = add_to_h(s_tilde, recurrent_input(weights, to_h(split_delta(cell, delta)[1])))
        out = out if to_previous is None else jax.tree.map(jnp.add, out, to_previous)
        out = _time.select(valid, _time.zero_where(reset, out), s_bar)
        if stops_at is not None:
            out = jax.tree.map(lambda a: jnp.where(j == stops_at, jnp.zeros((), a.dtype), a), out)
        return out, (delta, p_bar, _precision.cast(inner, product))

    at = jnp.arange(h_of(states).shape[0]), known, y_bar, valid, read, reset, zoneout, states
    s_bar, (delta, p_bar, inner) = lax.scan(step, s_bar, at, reverse=not options.reverse, unroll=options.unroll)
    return s_bar, *split_delta(cell, delta), p_bar, inner
