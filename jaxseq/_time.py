"""How time is read: its direction, what stands still, what is reset, where gradients stop, and what is kept.

Steps are counted in two ways. In storage order t = 0 .. T - 1 they lie in arrays; in reading order they are taken, the
same, or with `reverse` the opposite one. Two masks say what happens on the way into a step, and both are false in
padding, so that nothing in it counts:

    live_t   t < length: else the state stands still and y_t = 0
    stop_t   the boundary that is crossed into step t is a reset: the state is zero, and no gradient crosses

`resets[t]` is the boundary between t - 1 and t. Read forwards it is crossed into step t; read backwards into step
t - 1, and the one at 0 is crossed last, by the carry that is returned.

Truncation (k1, k2): windows of k1 steps in reading order. What the losses of a window say of the state reaches back
k2 - k1 steps before it; truncation = k is (k, k).

Backward goes through time in pieces:

    blocks    W = T // k windows of k = k1 steps side by side, and the T mod k steps that are left; all of T is one
    groups    of windows that are swept side by side: all of them, or with `checkpoint` as many as it allows
    chunks    of c steps in every window of a group: their states known at once, one contraction to the weights

Only the state at the beginning of each chunk is sure to be kept.
"""

from math import isqrt
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxseq import _checks, _sizes
from jaxseq._sharding import Partitioning

# A chunk holds about twelve arrays (c, B, H) of its own, so that it takes an eighth of a window at most, and no more
# rows, steps x batch, than make its contraction as fast as a longer one; but neither fewer than below which that is
# slow, nor so few steps, of few rows each, that its own overhead counts.
PARTS, ROWS, FEWEST_ROWS, FEWEST_STEPS = 8, 1024, 128, 16


class Options(NamedTuple):
    """`TimeOptions`, checked, without its arrays, and what the compiler may do with these. Static and hashable."""

    reverse: bool = False
    truncation: tuple[int, int] | None = None
    checkpoint: int | str | None = None
    axis: int = 0  # where time is in xs, ys and the masks
    unroll: int = 1
    precision: Any = None
    partitioning: Partitioning = Partitioning()


class Block(NamedTuple):
    """W windows of k steps from step `first` in storage order on, swept `group` at a time in chunks of c steps."""

    first: int
    windows: int
    steps: int
    group: int
    chunk: int

    @property
    def chunks(self) -> int:
        """Of each window; the last in reading order may be shorter."""
        return -(-self.steps // self.chunk)


def blocks(options: Options, steps: int, rows: int) -> list[Block]:
    """Return the blocks of T steps, in reading order.

    A batch that the compiler may partition gets a single chunk, unless `checkpoint` asks for more: the contraction of
    each chunk would be a sum over devices.
    """
    if not _sizes.known(steps):  # one chunk: one of a fixed length may be longer than all of T
        if options.checkpoint is not None:
            _checks.bad_value("checkpoint", "None, since the number of steps is symbolic", repr(options.checkpoint))
        return [Block(0, 1, steps, 1, steps)]
    k, _ = window_lengths(options, steps)
    count, rest = divmod(steps, k)
    main = _block(options, rest if options.reverse else 0, count, k, steps, rows)
    if not rest:
        return [main]
    return [main, _block(options, 0 if options.reverse else steps - rest, 1, rest, steps, rows)]


def _block(options: Options, first: int, windows: int, k: int, steps: int, rows: int) -> Block:
    if not _sizes.known(rows):
        rows = ROWS // FEWEST_STEPS
    if options.checkpoint is not None:
        n = isqrt(steps - 1) + 1 if isinstance(options.checkpoint, str) else options.checkpoint
        group = max(g for g in range(1, windows + 1) if windows % g == 0 and g <= max(1, n // k))
        longest = min(n, k)
    elif options.partitioning.implicit:
        group, longest = windows, k
    else:
        rows *= windows
        fewest = max(min(FEWEST_STEPS, -(-4 * ROWS // rows)), -(-FEWEST_ROWS // rows))
        group, longest = windows, max(fewest, min(-(-ROWS // rows), -(-k // PARTS)))
    longest = min(longest, k)
    return Block(first, windows, k, group, -(-k // -(-k // longest)))  # of about equal length


def window_lengths(options: Options, steps: int) -> tuple[int, int]:
    """(k, k2): the steps of a window, at most T, and how far back from its end gradients reach."""
    if not _sizes.known(steps):
        return options.truncation or (steps, steps)
    if options.truncation is None or options.truncation[0] >= steps:
        return max(1, steps), max(1, steps)
    return options.truncation


def last_window_of_sequence(options: Options, k: int, valid: jax.Array | None) -> jax.Array | None:
    """(*B,) the number, in reading order, of the window in which each sequence ends; None for the last one.

    There what the loss says to the carry that is returned has its place, however much padding follows.
    """
    if valid is None:
        return None
    return jnp.maximum(jnp.sum(valid, options.axis) - 1, 0) // k


def chunk_of_step(options: Options, parts: list[Block], steps: int) -> jax.Array:
    """(T,) in storage order: the number, in reading order, of the chunk that each step lies in."""
    t = jnp.arange(steps)
    if options.reverse:
        t = steps - 1 - t
    number, before, chunks = jnp.zeros_like(t), 0, 0
    for block in parts:
        w, j = jnp.divmod(t - before, block.steps)
        number = jnp.where(t >= before, chunks + w * block.chunks + j // block.chunk, number)
        before, chunks = before + block.windows * block.steps, chunks + block.windows * block.chunks
    return number


def masks(
    options: Options, steps: int, lengths: jax.Array | None, resets: jax.Array | None
) -> tuple[jax.Array | None, jax.Array | None, jax.Array | None]:
    """(live, stop, last): the two masks laid out as xs, and (*B,) whether the carry that is returned is reset."""
    valid, last = None, None
    axis = options.axis
    if lengths is not None:
        valid = _step_index(steps, lengths, axis) < jnp.expand_dims(lengths, axis)
    if resets is None:
        return valid, None, None
    reset = resets if valid is None else resets & valid
    if options.reverse:
        at = lambda a, lo, hi: lax.slice_in_dim(a, lo, hi, axis=axis)  # noqa: E731
        below = at(reset, 0, 1)
        last = jnp.squeeze(below, axis)
        reset = jnp.concatenate([at(reset, 1, steps), jnp.zeros_like(below)], axis)
    return valid, reset, last


def reverse_within_length(a: jax.Array, lengths: jax.Array, axis: int) -> jax.Array:
    """Each sequence read backwards within its own length, the padding within itself: its own inverse."""
    steps = a.shape[axis]
    place = (jnp.expand_dims(lengths, axis) - 1 - _step_index(steps, lengths, axis)) % steps
    return jnp.take_along_axis(a, place.reshape(place.shape + (1,) * (a.ndim - place.ndim)), axis)


def _step_index(steps: int, lengths: jax.Array, axis: int) -> jax.Array:
    """t, along that axis of an array of one axis more than `lengths`."""
    return jnp.arange(steps, dtype=lengths.dtype).reshape((1,) * axis + (-1,) + (1,) * (lengths.ndim - axis))


def select(mask: jax.Array | None, yes: Any, no: Any) -> Any:
    """Leaf by leaf `yes` where the mask (*B,) holds, else `no`; no mask holds everywhere."""
    if mask is None:
        return yes
    return jax.tree.map(lambda a, b: jnp.where(expand_mask(mask, a), a, b), yes, no)


def reads_input(valid: jax.Array | None, zoned_out: jax.Array | None) -> jax.Array | None:
    """True where the cell's step counts: not in padding, and not where all of the state is held. None is everywhere."""
    if zoned_out is None:
        return valid
    return ~zoned_out if valid is None else valid & ~zoned_out


def zero_where(mask: jax.Array | None, tree: Any) -> Any:
    """Leaf by leaf zero where the mask (*B,) holds; no mask holds nowhere."""
    return tree if mask is None else select(mask, jax.tree.map(jnp.zeros_like, tree), tree)


def zero_padding(valid: jax.Array | None, tree: Any) -> Any:
    """Leaf by leaf zero where not live."""
    return tree if valid is None else select(valid, tree, jax.tree.map(jnp.zeros_like, tree))


def expand_mask(mask: jax.Array, a: jax.Array) -> jax.Array:
    """The mask with axes of one for those of a that it lacks."""
    return jnp.expand_dims(mask, range(mask.ndim, a.ndim))


# --- Windows and chunks, and the axes of time ---


def split_time(a: jax.Array, axis: int, windows: int) -> jax.Array:
    """Time W k as (W, k). One window stays as it is: over axes of one XLA may copy whole arrays."""
    if windows == 1:
        return a
    return a.reshape(*a.shape[:axis], windows, a.shape[axis] // windows, *a.shape[axis + 1 :])


def merge_time(a: jax.Array, axis: int, windows: int) -> jax.Array:
    """The inverse of `split_time`."""
    return a if windows == 1 else a.reshape(*a.shape[:axis], a.shape[axis] * a.shape[axis + 1], *a.shape[axis + 2 :])


def take_chunk(a: jax.Array, axis: int, block: Block, w: Any, t: Any, length: int) -> jax.Array:
    """(..., W, k, ...) to (length, group, ...): those steps of the group of windows from w on, time first."""
    if block.windows == 1:
        return jnp.moveaxis(lax.dynamic_slice_in_dim(a, t, length, axis), axis, 0)[:, None]
    starts, sizes = [0] * a.ndim, list(a.shape)
    starts[axis : axis + 2], sizes[axis : axis + 2] = [w, t], [block.group, length]
    return jnp.moveaxis(lax.dynamic_slice(a, starts, sizes), (axis + 1, axis), (0, 1))


def put_chunk(a: jax.Array, piece: jax.Array, axis: int, block: Block, w: Any, t: Any) -> jax.Array:
    """The inverse of `take_chunk`: a with those steps of those windows."""
    if block.windows == 1:
        return lax.dynamic_update_slice_in_dim(a, jnp.moveaxis(piece[:, 0], 0, axis), t, axis)
    starts = [0] * a.ndim
    starts[axis : axis + 2] = [w, t]
    return lax.dynamic_update_slice(a, jnp.moveaxis(piece, (0, 1), (axis + 1, axis)), starts)


def previous_steps(options: Options, first: jax.Array, a: jax.Array) -> jax.Array:
    """Of each step what `a` holds for the one read before it, and of the one read first, `first`."""
    parts = [a[1:], first[None]] if options.reverse else [first[None], a[:-1]]
    return jnp.concatenate(parts)


def shift_to_previous_window(options: Options, s_bar: Any, last: Any) -> Any:
    """(W, *B, H): to the end of each window what was at the beginning of the one read after it; to the last, `last`."""

    def push(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.concatenate([b[None], a[:-1]] if options.reverse else [a[1:], b[None]])

    return jax.tree.map(push, s_bar, last)


def first_window(options: Options, s_bar: Any) -> Any:
    """That of the window which is read first."""
    return jax.tree.map(lambda a: a[-1 if options.reverse else 0], s_bar)
