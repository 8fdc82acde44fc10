"""The forward pass: its values, its residuals, and its plain form, which JAX differentiates for second order.

Each step computes x W_x + h W_h as two products. Of the forms with correct gradients, none is faster at every size; see
`docs/measured-recurrence.md`.
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
    """How the backward pass splits time, and which residuals it needs."""

    blocks: list[Block]
    exact: bool  # y is h, not rounded: h need not be stored
    saved: bool  # store the residuals of every step; else recompute them
    states: bool  # store ŝ of every step; else recompute it


class Residuals(NamedTuple):
    """The residuals of the forward pass, time first, except for ys."""

    ys: jax.Array
    starts: State  # (N, *B, H): the state before each chunk, in processing order
    states: State | None  # ŝ of every step, or None if it is recomputed
    saved: Any  # residuals of the pullback, of every step, or None if they are recomputed


class SavedAsY(NamedTuple):
    """Placeholder for a residual that is h itself, and can be read back from y."""


def restore_y(saved: Any, y: jax.Array) -> Any:
    """Replace `SavedAsY` by y in the residuals of a step."""
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
    """Return (s, (y, ŝ, saved)) of one step, x (*B, *features). With `share`, residuals equal to y are not stored.

    With `select`, for JAX to differentiate, the arguments of the step are selected as well as its results. In a masked
    step, the derivative, which may be infinite or NaN, then meets no cotangent.
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
    if share and zoneout is None:  # with zoneout, y is not the result of the cell
        saved = jax.tree.map(lambda a: SavedAsY() if a is h_of(s) else a, saved)
    s = apply_zoneout(zoneout, s_hat, _precision.cast_like(s, s_hat))
    y = _time.zero_padding(valid, h_of(s).astype(x.dtype))
    return _time.select(valid, s, s_prev), (y, s_hat, _precision.cast(saved, product))


def only_residual_is_h(cell: Cell, options: Options, inputs: Inputs) -> bool:
    """True if the only residual is h, which can be read back from ys."""

    def saved(inputs: Inputs) -> Any:
        x = inputs.xs.sum(options.axis)
        return forward_step(cell, options.precision, inputs.weights, inputs.carry, x, share=True)[1][2]

    return inputs.zoneout is None and not jax.tree.leaves(jax.eval_shape(saved, inputs))


def forward(cell: Cell, options: Options, inputs: Inputs, plan: Plan | None) -> tuple[Any, Residuals | None]:
    """Return ((s_T, ys), residuals for a backward pass by `plan`, or None without one)."""
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
        if chunks > 1:  # each step overwrites; the last of the chunk remains
            ends = jax.tree.map(lambda a, b: lax.dynamic_update_index_in_dim(a, b, n, 0), ends, s)
        # h is rounded like the gates: the backward pass multiplies it in that dtype.
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
    """Return (s_T, ys). JAX differentiates this for second order.

    It is one scan. With truncation it is one scan for each window, from k2 - k1 steps before the window on, because its
    losses are backpropagated no further.
    """
    weights, carry, *known = inputs
    steps = inputs.xs.shape[options.axis]
    known = jax.tree.map(lambda a: jnp.moveaxis(a, options.axis, 0), known)
    if options.reverse:
        known = jax.tree.map(lambda a: jnp.flip(a, 0), known)
    k1, k2 = _time.window_lengths(options, steps)

    def run(s: State, known: Any) -> tuple[State, jax.Array]:
        def step(s: State, at: Any) -> tuple[State, jax.Array]:
            s, (y, *_) = forward_step(cell, options.precision, weights, s, *at, select=True)
            return s, y

        return lax.scan(step, s, known)

    if k1 == steps:
        s, ys = run(carry, known)
    else:
        # Padding before and behind makes all windows equally long. The carry does not change in it.
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
            s, ys = run(s, early)
            end, more = run(s, late)
            return s, (end, jnp.concatenate([ys, more])[before:])

        _, (ends, ys) = lax.scan(one, carry, (jnp.arange(count) * k1 > before, windows))
        last = _time.last_window_of_sequence(options._replace(axis=0), k1, None if inputs.valid is None else known[1])
        if last is None:
            s = jax.tree.map(lambda a: a[-1], ends)
        else:
            s = jax.tree.map(lambda a: jnp.take_along_axis(a, _time.expand_mask(last[None], a), 0)[0], ends)
        ys = ys.reshape(count * k1, *ys.shape[2:])[:steps]
    return s, jnp.moveaxis(jnp.flip(ys, 0) if options.reverse else ys, 0, options.axis)
