"""Processing order, masks, windows and chunks of time.

Storage order is t = 0 .. T - 1, as in the arrays. Processing order is the same, or with `reverse` the opposite. Two
masks control each step:

    valid_t   t < length: else the state does not change, and y_t = 0
    reset_t   the boundary that is crossed into step t is a reset: the state is set to zero, and no gradient crosses

Both are False in padding. `resets[t]` is the boundary between t - 1 and t. In forward order it is crossed into step t.
In reverse order it is crossed into step t - 1, and the one at 0 is crossed last, by the returned carry.

Truncation (k1, k2): windows of k1 steps in processing order. The loss in each window is backpropagated through k2
steps, that is to k2 - k1 steps before the window. truncation = k is (k, k).

The backward pass splits time into:

    blocks    W = T // k windows of k = k1 steps in parallel, and the remaining T mod k steps; without truncation, one
              block of T steps
    groups    of windows that run in parallel: all of them, or with `checkpoint` as many as it allows
    chunks    of c steps in every window of a group: their states are computed together, with one contraction per
              weight

Only the state at the start of each chunk is always stored.
"""

from math import isqrt
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxseq import _checks, _sizes
from jaxseq._mesh import Partitioning

# The working memory of a chunk is about 12 arrays (c, B, H). A chunk is therefore at most 1 / PARTS of a window, and
# at most ROWS rows (steps x batch): more do not make its contraction faster. It has at least FEWEST_ROWS rows, because
# the contraction of fewer is slow, and at least FEWEST_STEPS steps if rows are few, to amortize its overhead.
# Measurements: docs/measured-recurrence.md.
PARTS, ROWS, FEWEST_ROWS, FEWEST_STEPS = 8, 1024, 128, 16


class Options(NamedTuple):
    """`TimeOptions` after validation, without arrays, and what the compiler may do with these. Static and hashable."""

    reverse: bool = False
    truncation: tuple[int, int] | None = None
    checkpoint: int | str | None = None
    axis: int = 0  # the axis of time in xs, ys and the masks
    unroll: int = 1
    precision: Any = None
    partitioning: Partitioning = Partitioning()


class Block(NamedTuple):
    """W windows of k steps from step `first` in storage order, `group` windows at a time, in chunks of c steps."""

    first: int
    windows: int
    steps: int
    group: int
    chunk: int

    @property
    def chunks(self) -> int:
        """The number of chunks in each window; the last in processing order may be shorter."""
        return -(-self.steps // self.chunk)


def blocks(options: Options, steps: int, rows: int) -> list[Block]:
    """Return the blocks of T steps, in processing order.

    A batch that the compiler may partition gets a single chunk, unless `checkpoint` asks for more: the contraction of
    each chunk would be a sum over devices.
    """
    if not _sizes.is_concrete(steps):  # one chunk, since a chunk of fixed length may be longer than T
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
    if not _sizes.is_concrete(rows):
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
    """Return (k1, k2): the steps of a window, at most T, and how many steps back from its end gradients reach."""
    if not _sizes.is_concrete(steps):
        return options.truncation or (steps, steps)
    if options.truncation is None or options.truncation[0] >= steps:
        return max(1, steps), max(1, steps)
    return options.truncation


def last_window_of_sequence(options: Options, k: int, valid: jax.Array | None) -> jax.Array | None:
    """Return (*B,) the number, in processing order, of the window in which each sequence ends; None is the last window.

    The cotangent of the returned carry enters the backward pass at the end of that window, however much padding
    follows.
    """
    if valid is None:
        return None
    return jnp.maximum(jnp.sum(valid, options.axis) - 1, 0) // k


def chunk_of_step(options: Options, parts: list[Block], steps: int) -> jax.Array:
    """Return (T,) in storage order: the number, in processing order, of the chunk of each step."""
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
    """Return (valid, reset, last): both masks with the axes of xs, and (*B,) True where the returned carry is reset."""
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
    """Reverse each sequence within its length, and the padding within itself. This is its own inverse."""
    steps = a.shape[axis]
    index = (jnp.expand_dims(lengths, axis) - 1 - _step_index(steps, lengths, axis)) % steps
    return jnp.take_along_axis(a, index.reshape(index.shape + (1,) * (a.ndim - index.ndim)), axis)


def _step_index(steps: int, lengths: jax.Array, axis: int) -> jax.Array:
    """Return t along `axis` of an array with one axis more than `lengths`."""
    return jnp.arange(steps, dtype=lengths.dtype).reshape((1,) * axis + (-1,) + (1,) * (lengths.ndim - axis))


def select(mask: jax.Array | None, yes: Any, no: Any) -> Any:
    """Select, leaf by leaf, `yes` where the mask (*B,) is True, else `no`. None is True everywhere."""
    if mask is None:
        return yes
    return jax.tree.map(lambda a, b: jnp.where(expand_mask(mask, a), a, b), yes, no)


def reads_input(valid: jax.Array | None, zoned_out: jax.Array | None) -> jax.Array | None:
    """Return the mask of steps that read their input: not padding, and not all of the state kept by zoneout.

    None is True everywhere.
    """
    if zoned_out is None:
        return valid
    return ~zoned_out if valid is None else valid & ~zoned_out


def zero_where(mask: jax.Array | None, tree: Any) -> Any:
    """Set every leaf to zero where the mask (*B,) is True. None is False everywhere."""
    return tree if mask is None else select(mask, jax.tree.map(jnp.zeros_like, tree), tree)


def zero_padding(valid: jax.Array | None, tree: Any) -> Any:
    """Set every leaf to zero in the padding."""
    return tree if valid is None else select(valid, tree, jax.tree.map(jnp.zeros_like, tree))


def expand_mask(mask: jax.Array, a: jax.Array) -> jax.Array:
    """Append axes of size one to the mask until it has as many as `a`."""
    return jnp.expand_dims(mask, range(mask.ndim, a.ndim))


# --- Windows and chunks, and the axes of time ---


def split_time(a: jax.Array, axis: int, windows: int) -> jax.Array:
    """Split time W k into (W, k). One window is left as it is: XLA may copy arrays to add axes of size one."""
    if windows == 1:
        return a
    return a.reshape(*a.shape[:axis], windows, a.shape[axis] // windows, *a.shape[axis + 1 :])


def merge_time(a: jax.Array, axis: int, windows: int) -> jax.Array:
    """The inverse of `split_time`."""
    return a if windows == 1 else a.reshape(*a.shape[:axis], a.shape[axis] * a.shape[axis + 1], *a.shape[axis + 2 :])


def take_chunk(a: jax.Array, axis: int, block: Block, w: Any, t: Any, length: int) -> jax.Array:
    """Slice (..., W, k, ...) to (length, group, ...), time first.

    The slice has the steps from t to t + length, of the group of windows from w.
    """
    if block.windows == 1:
        return jnp.moveaxis(lax.dynamic_slice_in_dim(a, t, length, axis), axis, 0)[:, None]
    starts, sizes = [0] * a.ndim, list(a.shape)
    starts[axis : axis + 2], sizes[axis : axis + 2] = [w, t], [block.group, length]
    return jnp.moveaxis(lax.dynamic_slice(a, starts, sizes), (axis + 1, axis), (0, 1))


def put_chunk(a: jax.Array, piece: jax.Array, axis: int, block: Block, w: Any, t: Any) -> jax.Array:
    """Return `a` with the result of `take_chunk` replaced by `piece`."""
    if block.windows == 1:
        return lax.dynamic_update_slice_in_dim(a, jnp.moveaxis(piece[:, 0], 0, axis), t, axis)
    starts = [0] * a.ndim
    starts[axis : axis + 2] = [w, t]
    return lax.dynamic_update_slice(a, jnp.moveaxis(piece, (0, 1), (axis + 1, axis)), starts)


def previous_steps(options: Options, first: jax.Array, a: jax.Array) -> jax.Array:
    """Shift `a` by one step in processing order: each step gets the value of the step before, the first one `first`."""
    parts = [a[1:], first[None]] if options.reverse else [first[None], a[:-1]]
    return jnp.concatenate(parts)


def shift_to_previous_window(options: Options, s_bar: Any, last: Any) -> Any:
    """Shift (W, *B, H) by one window: the value at the start of each window moves to the end of the window before.

    The last window in processing order gets `last`.
    """

    def push(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.concatenate([b[None], a[:-1]] if options.reverse else [a[1:], b[None]])

    return jax.tree.map(push, s_bar, last)


def first_window(options: Options, s_bar: Any) -> Any:
    """Return the entry of the first window in processing order."""
    return jax.tree.map(lambda a: a[-1 if options.reverse else 0], s_bar)
