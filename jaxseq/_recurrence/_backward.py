"""The backward pass: equation (1) chunk by chunk, in parallel over windows, and the contractions (2) of each chunk.

`backward` runs a stage for each part of time, a stage runs its chunks from the last to the first, and each chunk
recomputes its states, runs the loop (1) and contracts (2). Residuals of a chunk are read in place, its states are
recomputed, and each contraction is over one chunk, because that was fastest or used the least memory; see
`docs/measured-recurrence.md`.
"""

from functools import partial
from operator import itemgetter
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import PyTree

from jaxseq import _dense, _precision, _time, _windows
from jaxseq._recurrence._cell import (
    Cell,
    State,
    apply_zoneout,
    concatenate_delta,
    fill_h,
    h_of,
    pre_activations,
    split_delta,
    with_h,
    zoneout_pullback,
)
from jaxseq._recurrence._inputs import Inputs, Masks, Weights, float_leaves, recurrent_input
from jaxseq._recurrence._plan import Plan, Residuals
from jaxseq._recurrence._step import Sweep, forward_step, make_sweep
from jaxseq._time import Index
from jaxseq._time_options import Options
from jaxseq._windows import Block
from jaxseq.linear_maps import Dense


class Cotangents(NamedTuple):
    """What a stage accumulates: the cotangents of the state, of the weights, and of the inputs of a block."""

    state: State  # (W, *B, H): at the end of each window; after a stage, at its start
    weights: Weights
    inputs: PyTree  # (x̄, those of the float side inputs)


class BlockData(NamedTuple):
    """The arrays of a block of W windows of k steps. Time is (W, k) at its axis, or (k,) if W = 1."""

    xs: jax.Array
    masks: Masks
    y: jax.Array
    y_bar: jax.Array
    states_bar: State | None  # the cotangents of the states that `return_states` returns
    starts: State  # (W, chunks, *B, H)
    states: State | None
    residuals: PyTree
    zeros: PyTree  # the initial sums of the cotangents of xs and of the float side inputs


class Stage(NamedTuple):
    """One pass backwards over all windows of a block, from their ends to their step `cut` in processing order."""

    sweep: Sweep
    plan: Plan
    block: Block
    data: BlockData
    adds_losses: bool = True  # ȳ, and the cotangents of returned states, are added in the first stage only
    cut: int = 0


class Chunk(NamedTuple):
    """The position of a chunk: of each window in the group from `window`, the steps from `first` on."""

    window: Index
    number: Index  # in processing order
    first: Index
    length: int


class ChunkSteps(NamedTuple):
    """What the loop (1) reads, with time first: the steps of a chunk, or one step."""

    t: jax.Array  # from the first step of the chunk, in storage order
    masks: Masks
    y: jax.Array
    y_bar: jax.Array | None
    states_bar: State | None
    s_hat: State | None
    residuals: PyTree  # None if they are read in place


class Deltas(NamedTuple):
    """What the loop (1) returns of every step of a chunk, for the contractions (2)."""

    delta: jax.Array  # as in `concatenate_delta`
    params_bar: PyTree
    inner: tuple[jax.Array, jax.Array] | None
    side_bar: tuple[jax.Array, ...]  # of the float side inputs


def backward(cell: Cell, options: Options, inputs: Inputs, residuals: Residuals, cotangents: PyTree) -> PyTree:
    """Return the cotangents of weights, carry, xs and the float side inputs."""
    sweep = make_sweep(cell, options, inputs)
    s_bar, ys_bar = cotangents
    s_bar, states_bar = _precision.cast(s_bar, sweep.accumulator), None
    if options.return_states:  # the final state is one of them
        states_bar, s_bar = s_bar, jax.tree.map(jnp.zeros_like, _precision.cast(inputs.carry, sweep.accumulator))
    zero_state = jax.tree.map(jnp.zeros_like, s_bar)
    w_bar = jax.tree.map(jnp.zeros_like, _precision.cast(inputs.floats[0], sweep.accumulator))
    main, *rest = _stages(sweep, inputs, residuals, (ys_bar, states_bar))
    first = itemgetter(-1 if options.reverse else 0)  # first window
    windows, (k1, k2) = main.block.windows, _windows.window_lengths(options.truncation, inputs.xs.shape[options.axis])
    last = None if inputs.masks.valid is None else _time.last_window_of_sequence(inputs.masks.valid, options.axis, k1)

    # The rest of time is the last window in processing order. Its start is where the main block ends.
    entering, rest_bar = zero_state, None
    for stage in rest:
        end = s_bar if last is None else _time.select(last == windows, s_bar, zero_state)
        end = jax.tree.map(lambda a: a[None], end)
        found = _run_stage(stage, Cotangents(end, w_bar, stage.data.zeros))
        entering, w_bar, rest_bar = jax.tree.map(lambda a: a[0], found.state), found.weights, found.inputs

    ends = _cotangents_at_ends(main, zero_state if rest and last is None else s_bar, last)
    found = _run_stage(main, Cotangents(ends, w_bar, main.data.zeros))
    carry_bar = jax.tree.map(first, found.state)

    # Stages 1, 2, ...: whole windows, then part of one. The s̄ of the first window is part of carry_bar.
    later = main._replace(adds_losses=False)

    def later_stage(_: Index, state: tuple[Cotangents, State, State]) -> tuple[Cotangents, State, State]:
        found, entering, carry_bar = state
        ends = _time.shift_to_previous_window(options, found.state, entering)
        found = _run_stage(later, found._replace(state=ends))
        return found, zero_state, jax.tree.map(jnp.add, carry_bar, jax.tree.map(first, found.state))

    further, part = min(k2 // k1 - 1, windows), k2 % k1
    if further and (windows > 1 or rest):
        found, entering, carry_bar = lax.fori_loop(0, further, later_stage, (found, entering, carry_bar))
    if part and (windows > 1 or rest):
        ends = _time.shift_to_previous_window(options, found.state, entering)
        found = _run_stage(later._replace(cut=k1 - part), found._replace(state=ends))

    bars = found.inputs
    if windows > 1:
        bars = jax.tree.map(lambda a: _time.merge_time(a, options.axis), bars)
    if rest:
        parts = (rest_bar, bars) if options.reverse else (bars, rest_bar)
        bars = jax.tree.map(lambda a, b: jnp.concatenate([a, b], options.axis), *parts)
    return _precision.cast_like((found.weights, carry_bar, *bars), inputs.floats)


def _cotangents_at_ends(stage: Stage, s_bar: State, last: jax.Array | None) -> State:
    """Return (W, *B, H): `s_bar` at the end of the window in which each sequence ends, else zero."""
    windows, options = stage.block.windows, stage.sweep.options
    if last is None and windows == 1:
        return jax.tree.map(partial(jnp.expand_dims, axis=0), s_bar)
    if last is None:
        zeros = jax.tree.map(lambda a: jnp.broadcast_to(jnp.zeros_like(a), (windows, *a.shape)), s_bar)
        return _time.shift_to_previous_window(options, zeros, s_bar)
    numbers = jnp.arange(windows)[:: -1 if options.reverse else 1]
    is_end = jnp.expand_dims(numbers, range(1, last.ndim + 1)) == last[None]
    return jax.tree.map(lambda a: jnp.where(_time.expand_mask(is_end, a[None]), a[None], jnp.zeros((), a.dtype)), s_bar)


def _stages(sweep: Sweep, inputs: Inputs, residuals: Residuals, losses: tuple[jax.Array, State | None]) -> list[Stage]:
    """Return the first stage of each block, given the cotangents of ys and of the returned states."""
    stages, chunks, axis = [], 0, sweep.options.axis
    for block in residuals.plan.blocks:
        count, stop = block.windows * block.chunks, block.first + block.windows * block.steps

        def of_block(a: jax.Array, axis: int = axis, first: int = block.first, stop: int = stop, block: Block = block):
            return _time.split_time(lax.slice_in_dim(a, first, stop, axis=axis), axis, block.windows)

        of_starts = partial(of_block, axis=0, first=chunks, stop=chunks + count)
        starts = jax.tree.map(of_starts, residuals.starts)
        if sweep.options.reverse and block.windows > 1:
            starts = jax.tree.map(lambda a: jnp.flip(a, 0), starts)
        xs, masks, y, (y_bar, states_bar) = jax.tree.map(of_block, (inputs.xs, inputs.masks, residuals.ys, losses))
        states, of_cell = jax.tree.map(partial(of_block, axis=0), (residuals.states, residuals.of_cell))
        zeros = jax.tree.map(jnp.zeros_like, _precision.cast((xs, float_leaves(masks.side)), sweep.accumulator))
        data = BlockData(xs, masks, y, y_bar, states_bar, starts, states, of_cell, zeros)
        stages.append(Stage(sweep, residuals.plan, block, data))
        chunks += count
    return stages


def _run_stage(stage: Stage, cotangents: Cotangents) -> Cotangents:
    """Run a stage, given s̄ at the end of each window."""
    block = stage.block
    if block.group == block.windows:
        return _run_group(stage, 0, cotangents)

    def run(g: Index, all_: Cotangents) -> Cotangents:
        w = g * block.group
        here = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, w, block.group, 0), all_.state)
        found = _run_group(stage, w, all_._replace(state=here))
        state = jax.tree.map(lambda a, b: lax.dynamic_update_slice_in_dim(a, b, w, 0), all_.state, found.state)
        return found._replace(state=state)

    return lax.fori_loop(0, block.windows // block.group, run, cotangents)


def _run_group(stage: Stage, window: Index, cotangents: Cotangents) -> Cotangents:
    """Process the chunks of a group of windows from the last one, which may be shorter, to the first."""
    block, reverse = stage.block, stage.sweep.options.reverse
    size, first, count = block.chunk, stage.cut // block.chunk, block.chunks
    last = block.steps - (count - 1) * size

    def run(number: Index, cotangents: Cotangents, length: int = size) -> Cotangents:
        t = block.steps - number * size - length if reverse else number * size
        return _run_chunk(stage, Chunk(window, number, t, length), cotangents)

    if last < size or count == 1:
        count -= 1
        cotangents = run(count, cotangents, last)
    if count > first:
        cotangents = lax.fori_loop(first, count, lambda i, found: run(count - 1 + first - i, found), cotangents)
    return cotangents


def _run_chunk(stage: Stage, chunk: Chunk, cotangents: Cotangents) -> Cotangents:
    """Process one chunk: recompute its states, run the loop (1), contract (2)."""
    options, block, data = stage.sweep.options, stage.block, stage.data
    take = partial(_time.take_chunk, block=block, w=chunk.window, t=chunk.first, length=chunk.length)
    of_axis = partial(take, axis=options.axis)
    x, masks, y = jax.tree.map(of_axis, (data.xs, data.masks, data.y))
    y_bar, states_bar = jax.tree.map(of_axis, (data.y_bar, data.states_bar)) if stage.adds_losses else (None, None)
    start = _read_in_place(stage, chunk.window, chunk.number, data.starts)
    residuals = None
    if not stage.plan.stores_residuals:
        recompute = _recompute_in_bulk if stage.plan.y_is_h else _recompute_step_by_step
        states, residuals = recompute(stage.sweep, start, x, masks, y)
    elif stage.plan.stores_states:
        states = jax.tree.map(partial(take, axis=0), data.states)
    else:
        states = _replay(stage, chunk, start, masks, y)
    at = ChunkSteps(jnp.arange(chunk.length), masks, y, y_bar, states_bar, states, residuals)
    (s_bar, reset_bar), deltas = _run_loop(stage, chunk, cotangents.state, at)
    w_bar, x_bar = _contract(stage.sweep, x, masks.reads_x, states, deltas)
    w_bar = w_bar._replace(reset_state=jax.tree.map(lambda a: jnp.sum(a, 0), reset_bar))  # over windows
    bars = x_bar, deltas.side_bar
    if not stage.adds_losses:
        bars = jax.tree.map(lambda a, b: a + of_axis(b), bars, cotangents.inputs)
    bars = _precision.cast_like(bars, cotangents.inputs)
    put = partial(_time.put_chunk, axis=options.axis, block=block, w=chunk.window, t=chunk.first)
    return Cotangents(
        s_bar,
        jax.tree.map(jnp.add, cotangents.weights, w_bar),
        jax.tree.map(put, cotangents.inputs, bars),
    )


def _read_in_place(stage: Stage, window: Index, t: Index, tree: PyTree) -> PyTree:
    """Return entry t of the windows of a group, (group, *B, ...), from arrays (W, k, *B, ...)."""
    take = partial(_time.take_chunk, axis=0, block=stage.block, w=window, t=t, length=1)
    return jax.tree.map(itemgetter(0), jax.tree.map(take, tree))


def _run_loop(stage: Stage, chunk: Chunk, s_bar: State, at: ChunkSteps) -> tuple[tuple[State, State | None], Deltas]:
    """Run equation (1') over a chunk. Return s̄ at its start, that of `reset_state`, and the deltas of every step."""
    cell, options, weights, phi, product, accumulator = stage.sweep
    h_bar, dimensions = h_of(s_bar), cell.recurrent.dimensions(weights.w_h)
    to_h = cell.recurrent.pull_in_a_loop(options.precision, weights.w_h, h_bar.shape[h_bar.ndim - 1 - dimensions : -1])
    stops_at = (stage.block.steps - 1 - stage.cut if options.reverse else stage.cut) - chunk.first

    def step(bars: tuple[State, State | None], at: ChunkSteps) -> tuple[tuple[State, State | None], Deltas]:
        s_bar, reset_bar = bars
        if at.states_bar is not None:
            s_bar = jax.tree.map(jnp.add, s_bar, _time.zero_padding(at.masks.valid, at.states_bar))
        valid, zoneout = at.masks.valid, at.masks.zoneout
        residuals = at.residuals
        if stage.plan.stores_residuals:
            residuals = _read_in_place(stage, chunk.window, chunk.first + at.t, stage.data.residuals)
        residuals, s_hat = _precision.cast((fill_h(residuals, at.y), at.s_hat), accumulator)
        into = s_bar if at.y_bar is None else with_h(s_bar, h_of(s_bar) + at.y_bar.astype(accumulator))
        to_previous, to_cell = (None, into) if zoneout is None else zoneout_pullback(zoneout, into)
        # Select in the results, not in s̄: 0 times an infinite or NaN derivative is NaN.
        found = _time.zero_padding(at.masks.reads_x, phi.pullback(residuals, s_hat, to_cell, at.masks.side))
        delta = concatenate_delta(found.delta).astype(product)
        h_prev_bar = recurrent_input(weights, to_h(split_delta(cell, delta)[1]))
        out = with_h(found.state_bar, h_of(found.state_bar) + h_prev_bar)
        out = out if to_previous is None else jax.tree.map(jnp.add, out, to_previous)
        if reset_bar is not None:
            reset_bar = jax.tree.map(jnp.add, reset_bar, _time.zero_padding(at.masks.reset, out))
        out = _time.select(valid, _time.replace_where(at.masks.reset, out), s_bar)
        if stage.cut:
            out = jax.tree.map(lambda a: jnp.where(at.t == stops_at, jnp.zeros((), a.dtype), a), out)
        return (out, reset_bar), Deltas(
            delta, found.params_bar, _precision.cast(found.inner, product), float_leaves(found.side_bar)
        )

    reset_bar = None if weights.reset_state is None else jax.tree.map(jnp.zeros_like, s_bar)
    return lax.scan(step, (s_bar, reset_bar), at, reverse=not options.reverse, unroll=options.unroll)


def _contract(
    sweep: Sweep, x: jax.Array, read: jax.Array | None, states: State, deltas: Deltas
) -> tuple[Weights, jax.Array]:
    """Return the contractions (2) of a chunk: w̄ and x̄."""
    cell, options, weights, product = sweep.cell, sweep.options, sweep.weights, sweep.product
    precision = options.precision
    delta_u, delta_r = split_delta(cell, deltas.delta)
    x, h = _time.zero_padding(read, x), recurrent_input(weights, _time.zero_padding(read, h_of(states)))
    w_bar = Weights(
        w_x=cell.input.pull_weight(precision, x.astype(product), delta_u, weights.w_x),
        w_h=cell.recurrent.pull_weight(precision, h.astype(product), delta_r, weights.w_h),
        b_x=None if weights.b_x is None else _dense.pull_bias(delta_u),
        b_h=None if weights.b_h is None else _dense.pull_bias(delta_r),
    )
    if deltas.inner is not None:
        assert weights.w_q is not None
        inner_map = Dense(partitioning=options.partitioning)
        w_bar = w_bar._replace(w_q=inner_map.pull_weight(precision, *deltas.inner, weights.w_q))
    if weights.cell_params is not None:
        sum_examples = lambda p_bar, p: jnp.sum(p_bar, range(p_bar.ndim - p.ndim))  # noqa: E731
        w_bar = w_bar._replace(cell_params=jax.tree.map(sum_examples, deltas.params_bar, weights.cell_params))
    return w_bar, cell.input.pull_input(precision, weights.w_x, delta_u, cell.input.space_of(weights.w_x, x))


# --- The states of a chunk ---


def _recompute_step_by_step(
    sweep: Sweep, start: State, x: jax.Array, masks: Masks, _: jax.Array
) -> tuple[State, PyTree]:
    """Return (ŝ, residuals) of every step of a chunk by running the forward pass."""

    def step(s: State, at: tuple[jax.Array, Masks]) -> tuple[State, PyTree]:
        out = forward_step(sweep, s, *at)
        return out.state, (out.s_hat, out.residuals)

    return lax.scan(step, start, (x, masks), reverse=sweep.options.reverse, unroll=sweep.options.unroll)[1]


def _recompute_in_bulk(sweep: Sweep, start: State, x: jax.Array, masks: Masks, y: jax.Array) -> tuple[State, PyTree]:
    """Return (ŝ, residuals) of every step of a chunk.

    h is known, so each map is one product for the chunk. Only the other leaves of the state are sequential, pointwise.
    """
    cell, options, weights, phi, *_ = sweep
    h = _h_before(sweep, start, masks, y)
    u = cell.input.apply(options.precision, weights.w_x, weights.b_x, _time.zero_padding(masks.reads_x, x))
    r = cell.recurrent.apply(options.precision, weights.w_h, weights.b_h, recurrent_input(weights, h))
    if len(jax.tree.leaves(start)) == 1:
        s_hat = with_h(start, h)
        result = phi.step(pre_activations(cell, u, r), s_hat, masks.side)
        return s_hat, fill_h(result.residuals, h_of(result.state))

    def step(s: State, at: tuple[jax.Array, jax.Array, jax.Array, Masks]) -> tuple[State, PyTree]:
        u, r, h, masks = at
        s_hat = with_h(_time.replace_where(masks.reset, s, weights.reset_state), h)
        result = phi.step(pre_activations(cell, u, r), s_hat, masks.side)
        new = result.state if masks.zoneout is None else apply_zoneout(masks.zoneout, s_hat, result.state)
        return _time.select(masks.valid, new, s), (s_hat, fill_h(result.residuals, h_of(result.state)))

    over_time = u, r, h, masks
    return lax.scan(step, start, over_time, reverse=options.reverse, unroll=options.unroll)[1]


def _replay(stage: Stage, chunk: Chunk, start: State, masks: Masks, y: jax.Array) -> State:
    """Return ŝ of every step of a chunk: h is known, and the cell recomputes the rest from its residuals."""
    options, phi, reset_state = stage.sweep.options, stage.sweep.phi, stage.sweep.weights.reset_state
    h = _h_before(stage.sweep, start, masks, y)
    if len(jax.tree.leaves(start)) == 1:
        return with_h(start, h)

    def step(s: State, at: tuple[jax.Array, jax.Array, jax.Array, Masks]) -> tuple[State, State]:
        j, y, h, masks = at
        s_hat = with_h(_time.replace_where(masks.reset, s, reset_state), h)
        residuals = _read_in_place(stage, chunk.window, chunk.first + j, stage.data.residuals)
        new = phi.replay(fill_h(residuals, y), s_hat, masks.side)
        new = new if masks.zoneout is None else apply_zoneout(masks.zoneout, s_hat, new)
        return _time.select(masks.valid, new, s), s_hat

    over_time = jnp.arange(chunk.length), y, h, masks
    return lax.scan(step, start, over_time, reverse=options.reverse, unroll=options.unroll)[1]


def _h_before(sweep: Sweep, start: State, masks: Masks, y: jax.Array) -> jax.Array:
    """Return the leaf h of ŝ of every step of a chunk: y of the step before."""
    options, reset_state = sweep.options, sweep.weights.reset_state
    h = _time.previous_steps(h_of(start), y, reverse=options.reverse)
    if masks.valid is not None:  # in reverse, padding is processed first
        follows_step = _time.previous_steps(jnp.zeros_like(masks.valid[0]), masks.valid, reverse=options.reverse)
        h = _time.select(follows_step, h, jnp.broadcast_to(h_of(start), h.shape))
    return _time.replace_where(masks.reset, h, None if reset_state is None else h_of(reset_state))
