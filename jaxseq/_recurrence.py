"""Time: one forward sweep and one backward sweep for every cell.

A recurrence is a pointwise cell φ between two linear maps. With state s_t, of which h_t is the first leaf,

    u_t = x_t W_x + b_x            the input map,      (*B, D) -> (*B, G H)
    r_t = h_{t-1} W_h + b_h        the recurrent map,  (*B, H) -> (*B, G H)
    s_t = φ(u_t, r_t, s_{t-1})     the cell, pointwise
    y_t = h_t

Let s̄_t be the cotangent of s_t: what the loss says to y_t directly, plus all that comes back from later
steps. The cell's pullback turns s̄_t into the cotangents of its three arguments; those of the
pre-activations are called δ:

    (δu_t, δr_t, s̃_{t-1}) = φ*(s̄_t)                                   pointwise
    s̄_{t-1} = s̃_{t-1} + (δr_t W_hᵀ + ȳ_{t-1}) on its leaf h            the sweep, backwards in t     (1)

Only (1) is sequential. The sweep carries the state's cotangent alone and emits δ; everything else is one
contraction over a stretch of time:

    W̄_x = sum_t x_tᵀ δu_t        b̄_x = sum_t δu_t        x̄_t = δu_t W_xᵀ
    W̄_h = sum_t h_{t-1}ᵀ δr_t    b̄_h = sum_t δr_t                                                    (2)

Masks (`_time.py`). With live_t and stop_t, and ŝ the state as a step finds it,

    ŝ_t = 0 where stop_t, else s_{t-1}          s_t = φ(u_t, r_t, ŝ_t) where live_t, else s_{t-1}
    y_t = h_t where live_t, else 0

so that φ* gets s̄_t where live_t, else zero, whence δ_t = 0, and

    s̄_{t-1} = s̄_t where not live_t, else 0 where stop_t, else (1)                                      (1')

with h_{t-1} in (2) the leaf of ŝ_t, and x_t in padding taken as zero: 0 times a NaN would be one.

Truncation (k1, k2). A window of k1 steps says to its state what its own losses say, as far back as k2 - k1
steps before it. (1) is linear in s̄, so the cotangents of different windows can travel apart, and where one
begins does not wait for what another has to say: all windows are swept side by side, as one more batch axis
W = T // k1, k1 sequential steps in place of T:

    (T, *B, H) -> (W, k1, *B, H)

    stage 0       every window with its own ȳ
    stage 1, ...  every window with no ȳ, and s̄ at its end what the window behind it sent to its beginning
                  in the stage before, until k2 steps are gone

and the δ of all stages add up in (2). truncation = k is stage 0 alone; the full gradient is one window, k1 = T.

What is kept. The forward sweep keeps of every step what the cell wants for φ*, and of the state ŝ only what
it is at the beginning of each chunk of steps: its leaf h is y of the step before, and the others the cell can
`replay` from what it has kept, pointwise. A chunk of the backward sweep makes its ŝ again, runs (1), contracts
(2), and what it needed is gone. With `checkpoint` nothing is kept but the states at the beginning of chunks, and
a chunk runs the forward sweep again.

On several devices that the compiler may divide a batch over, each contraction (2) is a sum over devices. There a
chunk is a whole window, unless `checkpoint` asks for shorter ones, and no loop has a collective in it.

Second order is JAX's own, of the plain forward sweep `_plain`, in which truncation is `stop_gradient`.
"""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxseq import _checks, _dense, _precision, _sharding, _time
from jaxseq._time import Block, Options

State = Any  # an array h, or a NamedTuple of arrays whose first is h
Gates = tuple[Any, ...]  # one entry a gate, each an array (*B, H) or a pair of them


class Cell(NamedTuple):
    """The equations of one step: no matrix, no time.

    The pre-activations `a` hold one entry for each gate: the sum u + r, or for a gate named in `apart`, where
    the two do not enter as a sum, the pair (u, r). Their cotangent δ has the same structure.

    Attributes:
        gates: one letter a gate, in the order in which the weights hold them.
        apart: those gates that get u and r apart.
        step: `(a, s_prev) -> (s, saved)`; `saved` is what the pullback wants to know, any pytree.
        pullback: `(saved, s_prev, s̄) -> (δ, s̄_prev)`.
        replay: `(saved, s_prev) -> s`, as `step` made it; None where the state is h alone.
        params: the NamedTuple of the parameters: w_x, w_h, and either b or b_x and b_h.
        state: the NamedTuple of the state, h first; None where the state is the array h.
    """

    gates: str
    step: Callable[[Gates, State], tuple[State, Any]]
    pullback: Callable[[Any, State, State], tuple[Gates, State]]
    params: type
    state: type | None = None
    apart: str = ""
    replay: Callable[[Any, State], State] | None = None


class Weights(NamedTuple):
    """The two linear maps: w_x (D, G H), w_h (H, G H), and their biases (G H,) or None."""

    w_x: jax.Array
    w_h: jax.Array
    b_x: jax.Array | None
    b_h: jax.Array | None


class Inputs(NamedTuple):
    """All that a recurrence depends on. Time is at axis `Options.axis` of xs and of the masks, which may be None."""

    weights: Weights
    carry: State
    xs: jax.Array
    live: jax.Array | None
    stop: jax.Array | None


class Kept(NamedTuple):
    """What the forward sweep leaves for the backward one; time first, but for ys."""

    ys: jax.Array
    starts: State  # (N, *B, H): the state before each chunk, in reading order
    states: State | None  # ŝ of every step, where it can't be made again
    saved: Any  # of every step, for the pullback; None with `checkpoint`


class _H(NamedTuple):
    """Stands in what was saved where h itself was: y holds it."""


def _with_y(saved: Any, y: jax.Array) -> Any:
    """What was saved, y where `_H` stands."""
    return jax.tree.map(lambda a: y if isinstance(a, _H) else a, saved, is_leaf=lambda a: isinstance(a, _H))


# --- The forward sweep ---


def _step(
    cell: Cell, precision: Any, weights: Weights, s_prev: State, x: Any, live: Any, stop: Any, share: bool = False
) -> Any:
    """(s, (y, ŝ, saved)) of one step, x (*B, D); with `share` what y holds is not saved."""
    product, acc = _dtypes(weights, s_prev, x)
    ŝ = _time.zeroed(stop, s_prev)
    u = _dense.apply(precision, weights.w_x, weights.b_x, _seen(live, x).astype(product))
    r = _dense.apply(precision, weights.w_h, weights.b_h, _h(ŝ).astype(product))
    s, saved = cell.step(_join(cell, u, r), _precision.cast(ŝ, acc))
    if share:
        saved = jax.tree.map(lambda a: _H() if a is _h(s) else a, saved)
    s = _precision.cast_like(s, ŝ)
    y = _seen(live, _h(s).astype(x.dtype))
    return _time.chosen(live, s, s_prev), (y, ŝ, _precision.cast(saved, product))


def _run(cell: Cell, options: Options, inputs: Inputs, parts: list[Block] | None) -> tuple[Any, Kept | None]:
    """((s_T, ys), what is kept of it for a backward sweep through `parts`)."""
    weights, carry, xs, *masks = inputs
    steps = xs.shape[options.axis]
    number = None if parts is None else _time.chunk_of_step(options, parts, steps)
    chunks = 0 if parts is None else sum(part.windows * part.chunks for part in parts)
    every = parts is not None and options.checkpoint is None
    again = _can_replay(cell, inputs)

    def step(state: Any, at: Any) -> Any:
        s_prev, ends = state
        t, n, *known = at
        if options.axis:
            known = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, t, options.axis, False), (xs, *masks))
        s, (y, ŝ, saved) = _step(cell, options.precision, weights, s_prev, *known, share=again)
        if chunks > 1:  # overwritten until the chunk ends
            ends = jax.tree.map(lambda a, b: lax.dynamic_update_index_in_dim(a, b, n, 0), ends, s)
        return (s, ends), (y, None if again or not every else ŝ, saved if every else None)

    ends = jax.tree.map(lambda a: jnp.broadcast_to(a[None], (chunks, *a.shape)), carry) if chunks > 1 else None
    clock = jnp.arange(steps) if options.axis else None
    at = (clock, number, *((None,) * 3 if options.axis else (xs, *masks)))
    (s, ends), (ys, states, saved) = lax.scan(
        step, (carry, ends), at, length=steps, reverse=options.reverse, unroll=options.unroll
    )
    ys = jnp.moveaxis(ys, 0, options.axis)
    if parts is None:
        return (s, ys), None
    first = jax.tree.map(lambda a: a[None], carry)
    starts = first if ends is None else jax.tree.map(lambda a, b: jnp.concatenate([a, b[:-1]]), first, ends)
    return (s, ys), Kept(ys, starts, states, saved)


def _plain(cell: Cell, options: Options, inputs: Inputs) -> tuple[State, jax.Array]:
    """(s_T, ys) by one scan, or under truncation by one for each window, from k2 - k1 steps before it on: its losses
    see no further back. This is what second order differentiates.
    """
    weights, carry, *known = inputs
    steps = inputs.xs.shape[options.axis]
    known = jax.tree.map(lambda a: jnp.moveaxis(a, options.axis, 0), known)
    if options.reverse:
        known = jax.tree.map(lambda a: jnp.flip(a, 0), known)
    k1, k2 = _time.window(options, steps)

    def read(s: State, known: Any) -> tuple[State, jax.Array]:
        def step(s: State, at: Any) -> tuple[State, jax.Array]:
            s, (y, *_) = _step(cell, options.precision, weights, s, *at)
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
            known[1] = jnp.ones(jax.tree.leaves(known)[0].shape[:-1], bool)
        windows = jax.tree.map(lambda a: pad(a)[spans], known)

        def one(s: State, at: Any) -> tuple[State, Any]:
            is_cut, known = at
            s = jax.tree.map(lambda a: jnp.where(is_cut, lax.stop_gradient(a), a), s)
            early, late = (jax.tree.map(lambda a, p=p: a[p], known) for p in (slice(k1), slice(k1, None)))
            s, ys = read(s, early)
            end, more = read(s, late)
            return s, (end, jnp.concatenate([ys, more])[before:])

        _, (ends, ys) = lax.scan(one, carry, (jnp.arange(count) * k1 > before, windows))
        last = _time.last_window(options._replace(axis=0), k1, None if inputs.live is None else known[1])
        if last is None:
            s = jax.tree.map(lambda a: a[-1], ends)
        else:
            s = jax.tree.map(lambda a: jnp.take_along_axis(a, _time.over(last[None], a), 0)[0], ends)
        ys = ys.reshape(count * k1, *ys.shape[2:])[:steps]
    return s, jnp.moveaxis(jnp.flip(ys, 0) if options.reverse else ys, 0, options.axis)


def _join(cell: Cell, u: jax.Array, r: jax.Array) -> Gates:
    """u, r (*B, G H) as the pre-activations of the gates."""
    # One sum before the split: XLA's CPU backend takes 1.25 times as long over a sum for each gate (B=64, H=256).
    us, rs, sums = (jnp.split(a, len(cell.gates), -1) for a in (u, r, u + r))
    return tuple((us[g], rs[g]) if gate in cell.apart else sums[g] for g, gate in enumerate(cell.gates))


# --- The backward sweep ---


def _sweep(cell: Cell, options: Options, inputs: Inputs, kept: Kept, cotangents: Any) -> Any:
    """The cotangents of weights, carry and xs."""
    weights, carry, xs, *_ = inputs
    _, acc = _dtypes(weights, carry, xs)
    s̄, ȳs = cotangents
    s̄ = _precision.cast(s̄, acc)
    nothing = jax.tree.map(jnp.zeros_like, s̄)
    w̄ = _sharding.zeros_like(_precision.cast(weights, acc))
    main, *rest = _parts(options, inputs)
    view, *rest_view = _views(options, [main, *rest], inputs, kept, ȳs)
    stage = partial(_stage, cell, options, weights)

    k1, k2 = _time.window(options, xs.shape[options.axis])
    last = _time.last_window(options, k1, inputs.live)
    entering, x̄_rest = nothing, []  # `entering`: the end of the main block's last window, in the next stage
    for block, its_view in zip(rest, rest_view, strict=True):
        at_end = jax.tree.map(lambda a: a[None], s̄ if last is None else _time.chosen(last == main.windows, s̄, nothing))
        s̄s, w̄, x̄ = stage(block, its_view, at_end, w̄, _blank(its_view))
        entering, x̄_rest = jax.tree.map(lambda a: a[0], s̄s), [x̄]

    # Stage 0.
    if last is None:
        s̄s = jax.tree.map(lambda a: jnp.broadcast_to(a, (main.windows, *a.shape)), nothing)
        s̄s = _pushed(options, s̄s, nothing if rest else s̄)
    else:
        number = jnp.arange(main.windows)[:: -1 if options.reverse else 1]
        ends = jnp.expand_dims(number, range(1, last.ndim + 1)) == last[None]
        s̄s = jax.tree.map(lambda a: jnp.where(_time.over(ends, a[None]), a[None], jnp.zeros((), a.dtype)), s̄)
    s̄s, w̄, x̄ = stage(main, view, s̄s, w̄, _blank(view))
    c̄arry = _first(options, s̄s)

    def another(_: Any, state: Any) -> Any:
        s̄s, entering, c̄arry, w̄, x̄ = state
        s̄s, w̄, x̄ = stage(main, view, _pushed(options, s̄s, entering), w̄, x̄, losses=False)
        return s̄s, nothing, jax.tree.map(jnp.add, c̄arry, _first(options, s̄s)), w̄, x̄

    # Stages 1, 2, ...: whole windows, and part of one. From the first window s̄ goes to the carry.
    further, part = min(k2 // k1 - 1, main.windows), k2 % k1
    if further and (main.windows > 1 or rest):
        s̄s, entering, c̄arry, w̄, x̄ = lax.fori_loop(0, further, another, (s̄s, entering, c̄arry, w̄, x̄))
    if part and (main.windows > 1 or rest):
        _, w̄, x̄ = stage(main, view, _pushed(options, s̄s, entering), w̄, x̄, losses=False, cut=k1 - part)

    x̄ = _in_one(x̄, options.axis, main.windows)
    if rest:
        x̄ = jnp.concatenate([*x̄_rest, x̄] if options.reverse else [x̄, *x̄_rest], options.axis)
    return _precision.cast_like((w̄, c̄arry, x̄), (weights, carry, xs))


class _View(NamedTuple):
    """What is known of a block of W windows of k steps, time (W, k) at its axis; of W = 1 it is (k,) alone."""

    xs: jax.Array
    live: jax.Array | None
    stop: jax.Array | None
    ȳs: jax.Array
    ys: jax.Array
    starts: State  # (W, chunks, *B, H)
    states: State | None
    saved: Any


def _views(options: Options, parts: list[Block], inputs: Inputs, kept: Kept, ȳs: jax.Array) -> list[_View]:
    views, offset = [], 0
    for block in parts:
        count = block.windows * block.chunks

        def of(tree: Any, axis: int, first: int, length: int, windows: int = block.windows) -> Any:
            piece = partial(lax.slice_in_dim, start_index=first, limit_index=first + length, axis=axis)
            return jax.tree.map(lambda a: _in_two(piece(a), axis, windows), tree)

        starts = of(kept.starts, 0, offset, count)
        if options.reverse and block.windows > 1:
            starts = jax.tree.map(lambda a: jnp.flip(a, 0), starts)
        steps = block.first, block.windows * block.steps
        xs, live, stop, ȳ, y = of((inputs.xs, inputs.live, inputs.stop, ȳs, kept.ys), options.axis, *steps)
        states, saved = of((kept.states, kept.saved), 0, *steps)
        views.append(_View(xs, live, stop, ȳ, y, starts, states, saved))
        offset += count
    return views


def _blank(view: _View) -> jax.Array:
    """Zeros for x̄ in the accumulator's dtype."""
    return _sharding.zeros_like(view.xs.astype(_precision.accumulator(view.xs.dtype)))


def _stage(
    cell: Cell,
    options: Options,
    weights: Weights,
    block: Block,
    view: _View,
    s̄: State,
    w̄: Weights,
    x̄: jax.Array,
    losses: bool = True,
    cut: int = 0,
) -> tuple[State, Weights, jax.Array]:
    """All windows of a block, from their ends to their step `cut`, in reading order.

    s̄ (W, *B, H) is the cotangent at the end of each window, and comes back as that at its beginning. ȳ counts in the
    first stage only, `losses`; the others add to what x̄ holds.
    """
    c, last = block.chunk, block.steps - (block.chunks - 1) * block.chunk

    def chunk(w: Any, i: Any, length: int, state: Any) -> Any:
        """The i-th of each window of the group from w on, in reading order."""
        s̄, w̄, x̄ = state
        t = block.steps - i * c - length if options.reverse else i * c
        take = partial(_take, block=block, w=w, t=t, length=length)
        x, live, stop, ȳ, y = jax.tree.map(lambda a: take(a, options.axis), tuple(view[:5]))
        pick = lambda tree, t: jax.tree.map(lambda a: _take(a, 0, block, w, t, 1)[0], tree)  # noqa: E731
        start = pick(view.starts, i)
        if options.checkpoint is None:
            saved_at = lambda j: _with_y(pick(view.saved, t + j[0]), j[1])  # noqa: E731
            if view.states is None:
                states = _replayed(cell, options, start, y, live, stop, saved_at)
            else:
                states = jax.tree.map(lambda a: take(a, 0), view.states)
            known = jnp.arange(length), y
        else:
            states, known = _recomputed(cell, options, weights, start, x, live, stop)
            saved_at = lambda saved: saved  # noqa: E731
        stops_at = (block.steps - 1 - cut if options.reverse else cut) - t if cut else None
        s̄, δu, δr = _cotangents(
            cell, options, weights, s̄, ȳ if losses else None, live, stop, states, known, saved_at, stops_at
        )
        product = δu.dtype
        found = Weights(
            w_x=_dense.pull_weight(options.precision, _seen(live, x).astype(product), δu, _sharding.of(weights.w_x)),
            w_h=_dense.pull_weight(options.precision, _h(states).astype(product), δr, _sharding.of(weights.w_h)),
            b_x=None if weights.b_x is None else _dense.pull_bias(δu),
            b_h=None if weights.b_h is None else _dense.pull_bias(δr),
        )
        piece = _dense.pull_input(options.precision, weights.w_x, δu)
        piece = piece if losses else piece + take(x̄, options.axis)
        return s̄, jax.tree.map(jnp.add, w̄, found), _put(x̄, piece.astype(x̄.dtype), options.axis, block, w, t)

    def group(w: Any, state: Any) -> Any:
        """Chunk after chunk from the last one on, which may be shorter than the others."""
        first, count = cut // c, block.chunks
        if last < c or count == 1:
            count -= 1
            state = chunk(w, count, last, state)
        if count > first:
            state = lax.fori_loop(first, count, lambda i, state: chunk(w, count - 1 + first - i, c, state), state)
        return state

    if block.group == block.windows:
        return group(0, (s̄, w̄, x̄))

    def one_group(g: Any, state: Any) -> Any:
        s̄, w̄, x̄ = state
        w = g * block.group
        here = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, w, block.group, 0), s̄)
        here, w̄, x̄ = group(w, (here, w̄, x̄))
        return jax.tree.map(lambda a, b: lax.dynamic_update_slice_in_dim(a, b, w, 0), s̄, here), w̄, x̄

    return lax.fori_loop(0, block.windows // block.group, one_group, (s̄, w̄, x̄))


def _recomputed(cell: Cell, options: Options, weights: Weights, start: State, x: Any, live: Any, stop: Any) -> Any:
    """(ŝ, saved) of every step of a chunk, by the forward sweep."""

    def step(s: State, at: Any) -> Any:
        s, (_, ŝ, saved) = _step(cell, options.precision, weights, s, *at)
        return s, (ŝ, saved)

    return lax.scan(step, start, (x, live, stop), reverse=options.reverse, unroll=options.unroll)[1]


def _replayed(cell: Cell, options: Options, start: State, y: Any, live: Any, stop: Any, saved_at: Any) -> State:
    """ŝ of every step of a chunk: h is y of the step before, all else the cell makes again."""
    h = _after(options, _h(start), y)
    if live is not None:  # before the first live step, when reading backwards
        h = _time.chosen(_after(options, jnp.zeros_like(live[0]), live), h, jnp.broadcast_to(_h(start), h.shape))
    h = _time.zeroed(stop, h)
    if cell.replay is None:
        return jax.tree.unflatten(jax.tree.structure(start), [h])
    replay = cell.replay

    def step(s: State, at: Any) -> tuple[State, State]:
        j, h, live, stop = at
        ŝ = _with_h(_time.zeroed(stop, s), h)
        return _time.chosen(live, replay(saved_at(j), ŝ), s), ŝ

    at = (jnp.arange(h.shape[0]), y), h, live, stop
    return lax.scan(step, start, at, reverse=options.reverse, unroll=options.unroll)[1]


def _cotangents(
    cell: Cell,
    options: Options,
    weights: Weights,
    s̄: State,
    ȳ: jax.Array | None,
    live: jax.Array | None,
    stop: jax.Array | None,
    states: State,
    known: Any,
    saved_at: Callable[[Any], Any],
    stops_at: Any,
) -> tuple[State, jax.Array, jax.Array]:
    """Equation (1') over a chunk: (s̄ at its beginning, δu, δr). `saved_at` makes of each of `known` what was saved."""
    acc = _h(s̄).dtype
    product = _precision.promote(weights.w_x, weights.w_h, *jax.tree.leaves(states))
    # Transposed once, and kept so: XLA's CPU backend takes 1.2 times as long over a transposed operand in every step.
    w_hT = lax.optimization_barrier(weights.w_h.T)

    def step(s̄: State, at: Any) -> tuple[State, Any]:
        j, known, ȳ, live, stop, ŝ = at
        into = s̄ if ȳ is None else _add_to_h(s̄, ȳ.astype(acc))
        if live is not None:
            into = _time.zeroed(~live, into)
        saved, ŝ = _precision.cast((saved_at(known), ŝ), acc)
        δ, s̃ = cell.pullback(saved, ŝ, into)
        distinct = _distinct(δ).astype(product)
        out = _add_to_h(s̃, _dense.apply(options.precision, w_hT, None, _sides(cell, distinct)[1]))
        out = _time.chosen(live, _time.zeroed(stop, out), s̄)
        if stops_at is not None:
            out = jax.tree.map(lambda a: jnp.where(j == stops_at, jnp.zeros((), a.dtype), a), out)
        return out, distinct

    at = jnp.arange(_h(states).shape[0]), known, ȳ, live, stop, states
    s̄, distinct = lax.scan(step, s̄, at, reverse=not options.reverse, unroll=options.unroll)
    return s̄, *_sides(cell, distinct)


# --- Windows, chunks, and the axes of time ---


def _parts(options: Options, inputs: Inputs) -> list[Block]:
    shape = inputs.xs.shape
    rows = prod((*shape[: options.axis], *shape[options.axis + 1 : -1]))
    return _time.blocks(options, shape[options.axis], max(1, rows), whole=not _sharding.undivided())


def _in_two(a: jax.Array, axis: int, windows: int) -> jax.Array:
    """Time W k as (W, k). One window stays as it is: over axes of one XLA may copy whole arrays."""
    if windows == 1:
        return a
    return a.reshape(*a.shape[:axis], windows, a.shape[axis] // windows, *a.shape[axis + 1 :])


def _in_one(a: jax.Array, axis: int, windows: int) -> jax.Array:
    """The inverse of `_in_two`."""
    return a if windows == 1 else a.reshape(*a.shape[:axis], a.shape[axis] * a.shape[axis + 1], *a.shape[axis + 2 :])


def _take(a: jax.Array, axis: int, block: Block, w: Any, t: Any, length: int) -> jax.Array:
    """(..., W, k, ...) to (length, group, ...): those steps of the group of windows from w on, time first."""
    if block.windows == 1:
        return jnp.moveaxis(lax.dynamic_slice_in_dim(a, t, length, axis), axis, 0)[:, None]
    starts, sizes = [0] * a.ndim, list(a.shape)
    starts[axis : axis + 2], sizes[axis : axis + 2] = [w, t], [block.group, length]
    return jnp.moveaxis(lax.dynamic_slice(a, starts, sizes), (axis + 1, axis), (0, 1))


def _put(a: jax.Array, piece: jax.Array, axis: int, block: Block, w: Any, t: Any) -> jax.Array:
    """The inverse of `_take`: a with those steps of those windows."""
    if block.windows == 1:
        return lax.dynamic_update_slice_in_dim(a, jnp.moveaxis(piece[:, 0], 0, axis), t, axis)
    starts = [0] * a.ndim
    starts[axis : axis + 2] = [w, t]
    return lax.dynamic_update_slice(a, jnp.moveaxis(piece, (0, 1), (axis + 1, axis)), starts)


def _after(options: Options, first: jax.Array, a: jax.Array) -> jax.Array:
    """Of each step what `a` holds for the one read before it, and of the one read first, `first`."""
    parts = [a[1:], first[None]] if options.reverse else [first[None], a[:-1]]
    return jnp.concatenate(parts)


def _pushed(options: Options, s̄: State, last: State) -> State:
    """(W, *B, H): to the end of each window what was at the beginning of the one read after it; to the last, `last`."""

    def push(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.concatenate([b[None], a[:-1]] if options.reverse else [a[1:], b[None]])

    return jax.tree.map(push, s̄, last)


def _first(options: Options, s̄: State) -> State:
    """That of the window which is read first."""
    return jax.tree.map(lambda a: a[-1 if options.reverse else 0], s̄)


# --- What both sweeps say of states, gates and dtypes ---


def _h(state: State) -> jax.Array:
    """The leaf of the state that the recurrent map reads and that leaves as y."""
    return jax.tree.leaves(state)[0]


def _with_h(state: State, h: jax.Array) -> State:
    leaves, structure = jax.tree.flatten(state)
    return jax.tree.unflatten(structure, [h, *leaves[1:]])


def _add_to_h(state: State, h: jax.Array) -> State:
    return _with_h(state, _h(state) + h)


def _seen(live: jax.Array | None, a: jax.Array) -> jax.Array:
    """a where live, else zero."""
    return a if live is None else jnp.where(_time.over(live, a), a, jnp.zeros((), a.dtype))


def _distinct(δ: Gates) -> jax.Array:
    """δ as one array (*B, G H + ...): every gate, u's side of a pair, then r's side of each pair."""
    u_side = [gate[0] if isinstance(gate, tuple) else gate for gate in δ]
    return jnp.concatenate([*u_side, *(gate[1] for gate in δ if isinstance(gate, tuple))], -1)


def _sides(cell: Cell, δ: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(δu, δr), each (*B, G H), of what `_distinct` made.

    One array leaves the loop, not these two: two concatenations of the same gates took XLA's CPU backend 67 us a step
    in place of 39 for the GRU at B = 128, H = 32, and 70 in place of 64 at B = 32, H = 128.
    """
    if not cell.apart:
        return δ, δ
    count = len(cell.gates)
    gates = jnp.split(δ, count + len(cell.apart), -1)
    beyond = iter(gates[count:])
    r_side = [next(beyond) if gate in cell.apart else gates[g] for g, gate in enumerate(cell.gates)]
    return jnp.concatenate(gates[:count], -1), jnp.concatenate(r_side, -1)


def _dtypes(weights: Weights, carry: State, xs: jax.Array) -> tuple[Any, Any]:
    """Products multiply in, and gates are kept in, the widest dtype of what is multiplied; a bias is only added. And
    the dtype in which they accumulate.
    """
    product = _precision.promote(weights.w_x, weights.w_h, *jax.tree.leaves(carry), xs)
    return product, _precision.accumulator(product)


def _can_replay(cell: Cell, inputs: Inputs) -> bool:
    """Whether ŝ can be made again exactly: no dtype rounds what another holds."""
    leaves = jax.tree.leaves(inputs.carry)
    product, acc = _dtypes(inputs.weights, inputs.carry, inputs.xs)
    alike = {product, acc, inputs.xs.dtype, *(leaf.dtype for leaf in leaves)}
    return len(alike) == 1 and (len(leaves) == 1 or cell.replay is not None)


# --- The rule ---


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _recurrence(cell: Cell, options: Options, inputs: Inputs) -> Any:
    return _run(cell, options, inputs, None)[0]


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _forward(cell: Cell, options: Options, inputs: Inputs) -> tuple[Any, Kept]:
    out, kept = _run(cell, options, inputs, _parts(options, inputs))
    assert kept is not None
    return out, kept


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _backward(cell: Cell, options: Options, inputs: Inputs, kept: Kept, cotangents: Any) -> Any:
    return _sweep(cell, options, inputs, kept, cotangents)


@_forward.defjvp
def _forward_jvp(cell: Cell, options: Options, primals: Any, tangents: Any) -> Any:
    """What was kept is no one's business but the backward sweep's, whose derivative does not ask for it."""
    (inputs,), (directions,) = primals, tangents
    out, kept = _forward(cell, options, inputs)
    _, moved = jax.jvp(partial(_of_floats, cell, options, inputs), inputs[:3], directions[:3])
    return (out, kept), (moved, jax.tree.map(jnp.zeros_like, kept))


@_backward.defjvp
def _backward_jvp(cell: Cell, options: Options, primals: Any, tangents: Any) -> Any:
    (inputs, _, cotangents), (directions, _, turned) = primals, tangents
    plain = partial(_of_floats, cell, options, inputs)
    pull = lambda floats, cotangents: jax.vjp(plain, *floats)[1](cotangents)  # noqa: E731
    return jax.jvp(pull, (inputs[:3], cotangents), (directions[:3], turned))


def _of_floats(cell: Cell, options: Options, inputs: Inputs, weights: Weights, carry: State, xs: jax.Array) -> Any:
    """`_plain` of what can be differentiated; the masks are those of `inputs`."""
    return _plain(cell, options, inputs._replace(weights=weights, carry=carry, xs=xs))


def _recurrence_fwd(cell: Cell, options: Options, inputs: Inputs) -> Any:
    out, kept = _forward(cell, options, inputs)
    return out, (inputs, kept)


def _recurrence_bwd(cell: Cell, options: Options, residuals: Any, cotangents: Any) -> tuple[Inputs]:
    w̄, c̄arry, x̄s = _backward(cell, options, *residuals, cotangents)
    return (Inputs(w̄, c̄arry, x̄s, None, None),)


_recurrence.defvjp(_recurrence_fwd, _recurrence_bwd)


# --- What the public functions of every cell call ---


def sequence(
    cell: Cell,
    params: Any,
    carry: State | None,
    xs: Any,
    *,
    lengths: Any = None,
    resets: Any = None,
    reverse: Any = False,
    truncation: Any = None,
    checkpoint: Any = None,
    time_axis: Any = 0,
    unroll: Any = 1,
    precision: Any = None,
) -> tuple[State, jax.Array]:
    """A checked run over xs, whose axis `time_axis` is time."""
    xs = _checks.array("xs", xs)
    if xs.ndim < 2:
        _checks.bad_value("xs", "at least 2 axes (time, *batch, features)", str(xs.ndim), xs=xs)
    axis = _checks.axis("time_axis", time_axis, xs.ndim - 1, xs=xs)
    options = Options(
        reverse=_checks.boolean("reverse", reverse),
        truncation=_checks.truncation(truncation),
        checkpoint=_checks.checkpoint(checkpoint),
        axis=axis,
        unroll=_checks.integer("unroll", unroll, at_least=1),
        precision=_checks.precision(precision),
    )
    steps, batch = xs.shape[axis], (*xs.shape[:axis], *xs.shape[axis + 1 : -1])
    weights, carry, xs = _operands(cell, params, carry, "xs", xs, axis, batch)
    if lengths is not None:
        lengths = _checks.lengths("lengths", lengths, batch, steps)
    if resets is not None:
        resets = _checks.mask("resets", resets)
        _checks.shape("resets", resets, xs.shape[:-1], "that of xs without features", xs=xs)
    if steps == 0:
        return carry, jnp.zeros((*xs.shape[:-1], weights.w_h.shape[0]), xs.dtype)
    live, stop, last = _time.masks(options, steps, lengths, resets)
    # Windows are counted from where each sequence is begun to be read.
    turned = lambda tree: tree  # noqa: E731
    if options.reverse and lengths is not None and options.truncation is not None:
        options = options._replace(reverse=False)
        turned = partial(jax.tree.map, partial(_time.turned, lengths=lengths, axis=axis))
    inputs = _sharding.together(Inputs(weights, carry, *turned((xs, live, stop))))
    run = _of_one if prod(batch) == 1 else _recurrence
    result: tuple[State, jax.Array] = run(cell, options, inputs)
    return _time.zeroed(last, result[0]), turned(result[1])


def _of_one(cell: Cell, options: Options, inputs: Inputs) -> tuple[State, jax.Array]:
    """A batch of one as none: over axes of one XLA's CPU backend copies whole arrays, and takes up to 1.5 times as
    long. Where it may lie on several devices it stays.
    """
    weights, carry, xs, *masks = inputs
    if not _sharding.undivided():
        return _recurrence(cell, options, inputs)
    steps = xs.shape[options.axis]
    one = Inputs(
        weights,
        jax.tree.map(lambda a: a.reshape(a.shape[-1]), carry),
        xs.reshape(steps, xs.shape[-1]),
        *(a if a is None else a.reshape(steps) for a in masks),
    )
    result: tuple[State, jax.Array] = _recurrence(cell, options._replace(axis=0), one)
    out, ys = result
    return jax.tree.map(lambda a, like: a.reshape(like.shape), out, carry), ys.reshape(*xs.shape[:-1], ys.shape[-1])


def one_step(cell: Cell, params: Any, carry: State | None, x: Any, *, precision: Any) -> tuple[State, jax.Array]:
    """A checked sequence of one step, for x (*B, D): the body of somebody's own loop."""
    x = _checks.array("x", x)
    if x.ndim < 1:
        _checks.bad_value("x", "at least 1 axis (*batch, features)", "a scalar")
    options = Options(precision=_checks.precision(precision))
    weights, carry, x = _operands(cell, params, carry, "x", x, None, x.shape[:-1])
    inputs = _sharding.together(Inputs(weights, carry, x[None], None, None))
    out: tuple[State, jax.Array] = _recurrence(cell, options, inputs)
    return out[0], out[1][0]


def _operands(
    cell: Cell, params: Any, carry: State | None, name: str, x: jax.Array, axis: int | None, batch: tuple[int, ...]
) -> tuple[Weights, State, jax.Array]:
    """The linear maps, the first state and x (*batch, D), with time at `axis` if any, checked against each other."""
    _checks.container("params", params, cell.params)
    w_x, w_h = _checks.array("params.w_x", params.w_x), _checks.array("params.w_h", params.w_h)
    gates = len(cell.gates)
    if w_h.ndim != 2 or w_h.shape[1] != gates * w_h.shape[0]:
        expected = f"shape (H, {gates} H), one block of H columns for each gate {', '.join(cell.gates)}"
        _checks.bad_value("params.w_h", expected, str(w_h.shape))
    hidden, width = w_h.shape
    if w_x.ndim != 2 or w_x.shape[1] != width:
        _checks.bad_value("params.w_x", f"shape (D, {width}) to go with `params.w_h`", str(w_x.shape), w_h=w_h)
    if x.shape[-1] != w_x.shape[0]:
        expected = f"{w_x.shape[0]} features on the last axis, the rows of `params.w_x`"
        _checks.bad_value(name, expected, str(x.shape[-1]), **{name: x, "w_x": w_x})
    biases = {
        f: None if b is None else _checks.array(f"params.{f}", b) for f, b in params._asdict().items() if f[0] == "b"
    }
    for field, bias in biases.items():
        if bias is not None:
            _checks.shape(f"params.{field}", bias, (width,), f"({gates} H,)", w_h=w_h)
    weights = Weights(w_x, w_h, biases.get("b", biases.get("b_x")), biases.get("b_h"))

    fields = ("",) if cell.state is None else tuple(f".{f}" for f in cell.state._fields)
    if carry is None:
        leaves = [_sharding.zeros((*batch, hidden), x, axis) for _ in fields]
    else:
        if cell.state is not None:
            _checks.container("carry", carry, cell.state)
        parts = (carry,) if cell.state is None else carry
        leaves = [_checks.array(f"carry{f}", part) for f, part in zip(fields, parts, strict=True)]
        for field, leaf in zip(fields, leaves, strict=True):
            _checks.shape(f"carry{field}", leaf, (*batch, hidden), "(*batch, H)", **{name: x, "w_h": w_h})
    return weights, leaves[0] if cell.state is None else cell.state(*leaves), x
