"""The forward pass: its values, its residuals, and its plain form, which JAX differentiates for second order.

Each step computes x W_x + h W_h as two products. Of the forms with correct gradients, none is faster at every size; see
`docs/measured-recurrence.md`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import PyTree

from jaxseq import _time, _windows
from jaxseq._recurrence._cell import Cell, State, h_of, with_h
from jaxseq._recurrence._inputs import Inputs, Masks
from jaxseq._recurrence._plan import Plan, Residuals, make_plan
from jaxseq._recurrence._step import forward_step, make_sweep
from jaxseq._time_options import Options


def forward(
    cell: Cell, options: Options, inputs: Inputs, *, store: bool
) -> tuple[tuple[State, jax.Array], Residuals | None]:
    """Return ((s_T, ys), residuals); these are None unless `store`. With `return_states`, s_T is all states."""
    sweep, carry, count = make_sweep(cell, options, inputs), inputs.carry, inputs.xs.shape[options.axis]
    plan = make_plan(sweep, inputs) if store else Plan((), False, False, False)
    chunks = sum(block.windows * block.chunks for block in plan.blocks)

    def step(state: tuple[State, PyTree], at: PyTree) -> PyTree:
        (s_prev, ends), (t, chunk, known) = state, at
        if options.axis:
            read = partial(lax.dynamic_index_in_dim, index=t, axis=options.axis, keepdims=False)
            known = jax.tree.map(read, (inputs.xs, inputs.masks))
        out = forward_step(sweep, s_prev, *known, without_h=plan.y_is_h)
        if chunks > 1:  # each step overwrites; the last of the chunk remains
            ends = jax.tree.map(lambda a, b: lax.dynamic_update_index_in_dim(a, b, chunk, 0), ends, out.state)
        # h is rounded like the gates: the backward pass multiplies it in that dtype.
        s_hat = with_h(out.s_hat, h_of(out.s_hat).astype(sweep.product)) if plan.stores_states else None
        returned = _time.zero_padding(known[1].valid, out.state) if options.return_states else None
        return (out.state, ends), (out.y, returned, s_hat, out.residuals if plan.stores_residuals else None)

    ends = jax.tree.map(lambda a: jnp.broadcast_to(a[None], (chunks, *a.shape)), carry) if chunks > 1 else None
    chunk_of_step = _windows.chunk_of_step(options, plan.blocks, count) if chunks > 1 else None
    known = None if options.axis else (inputs.xs, inputs.masks)
    over_time = jnp.arange(count) if options.axis else None, chunk_of_step, known
    (s, ends), (ys, returned, states, of_cell) = lax.scan(
        step, (carry, ends), over_time, reverse=options.reverse, unroll=options.unroll
    )
    ys, returned = jax.tree.map(partial(jnp.moveaxis, source=0, destination=options.axis), (ys, returned))
    s = returned if options.return_states else s
    if not store:
        return (s, ys), None
    starts = jax.tree.map(partial(jnp.expand_dims, axis=0), carry)
    if chunks > 1:
        starts = jax.tree.map(lambda a, b: jnp.concatenate([a, b[:-1]]), starts, ends)
    return (s, ys), Residuals(ys, starts, states, of_cell, plan)


def forward_without_residuals(cell: Cell, options: Options, inputs: Inputs) -> tuple[State, jax.Array]:
    """Return (s_T, ys), or with `return_states` (states, ys). JAX differentiates this for second order.

    It is one scan. With truncation it is one scan for each window, from k2 - k1 steps before the window on, because its
    losses are backpropagated no further.
    """
    sweep, axis, count = make_sweep(cell, options, inputs), options.axis, inputs.xs.shape[options.axis]
    xs, masks = jax.tree.map(lambda a: jnp.moveaxis(a, axis, 0), (inputs.xs, inputs.masks))
    if options.reverse:
        xs, masks = jax.tree.map(lambda a: jnp.flip(a, 0), (xs, masks))
    k1, k2 = _windows.window_lengths(options.truncation, count)

    def run(s: State, over_time: tuple[jax.Array, Masks]) -> tuple[State, tuple[jax.Array, State | None]]:
        def step(s: State, at: tuple[jax.Array, Masks]) -> tuple[State, tuple[jax.Array, State | None]]:
            out = forward_step(sweep, s, *at, select=True)
            returned = _time.zero_padding(at[1].valid, out.state) if options.return_states else None
            return out.state, (out.y, returned)

        return lax.scan(step, s, over_time)

    if k1 == count:
        s, ys = run(inputs.carry, (xs, masks))
    else:
        # Copies of the first and the last step before and behind make all windows equally long. They are padding: the
        # carry does not change in them.
        before, windows = k2 - k1, -(-count // k1)
        spans = jnp.arange(windows)[:, None] * k1 + jnp.arange(k2)[None] - before
        if masks.valid is None:
            batch = xs.shape[: xs.ndim - 1 - cell.input.dimensions(inputs.weights.w_x)]
            masks = masks._replace(valid=jnp.ones(batch, bool))
        known = jnp.clip(spans, 0, count - 1)
        xs_in_windows, masks_in_windows = jax.tree.map(lambda a: a[known], (xs, masks))
        valid = _time.zero_padding(spans == known, masks_in_windows.valid)
        in_windows = xs_in_windows, masks_in_windows._replace(valid=valid)

        def window(s: State, at: tuple[jax.Array, tuple[jax.Array, Masks]]) -> tuple[State, PyTree]:
            is_cut, steps = at
            s = jax.tree.map(lambda a: jnp.where(is_cut, lax.stop_gradient(a), a), s)
            early, late = (jax.tree.map(lambda a, p=p: a[p], steps) for p in (slice(k1), slice(k1, None)))
            s, ys = run(s, early)
            if not before:
                return s, (s, ys)
            end, more = run(s, late)
            return s, (end, jax.tree.map(lambda a, b: jnp.concatenate([a, b])[before:], ys, more))

        _, (ends, ys) = lax.scan(window, inputs.carry, (jnp.arange(windows) * k1 > before, in_windows))
        if inputs.masks.valid is None:
            s = jax.tree.map(lambda a: a[-1], ends)
        else:
            last = _time.last_window_of_sequence(masks.valid, 0, k1)
            s = jax.tree.map(lambda a: jnp.take_along_axis(a, _time.expand_mask(last[None], a), 0)[0], ends)
        ys = jax.tree.map(lambda a: a.reshape(windows * k1, *a.shape[2:])[:count], ys)
    in_order = lambda a: jnp.moveaxis(jnp.flip(a, 0) if options.reverse else a, 0, axis)  # noqa: E731
    outputs, returned = jax.tree.map(in_order, ys)
    return returned if options.return_states else s, outputs
