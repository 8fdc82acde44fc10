"""Processing order, masks, and slices of time.

Storage order is t = 0 .. T - 1, as in the arrays. Processing order is the same, or with `reverse` the opposite. Two
masks control each step:

    valid_t   t < length: else the state does not change, and y_t = 0
    reset_t   the boundary that is crossed into step t is a reset: the state is set to zero, and no gradient crosses

Both are False in padding. `resets[t]` is the boundary between t - 1 and t. In forward order it is crossed into step t.
In reverse order it is crossed into step t - 1, and the one at 0 is crossed last, by the returned carry.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import PyTree

from jaxseq._time_options import Options
from jaxseq._windows import Block

Tree = TypeVar("Tree")
Index = int | jax.Array  # a position in time: static, or that of a loop


def last_window_of_sequence(valid: jax.Array, axis: int, k: int) -> jax.Array:
    """Return (*B,) the number, in processing order, of the window of k steps in which each sequence ends.

    The cotangent of the returned carry enters the backward pass at the end of that window, however much padding
    follows.
    """
    return jnp.maximum(jnp.sum(valid, axis) - 1, 0) // k


def masks(
    options: Options, steps: int, lengths: jax.Array | None, resets: jax.Array | None
) -> tuple[jax.Array | None, jax.Array | None, jax.Array | None]:
    """Return (valid, reset, last): both masks with the axes of xs, and (*B,) True where the returned carry is reset."""
    valid, last = None, None
    axis = options.axis
    if lengths is not None:
        valid = valid_steps(steps, lengths, axis)
    if resets is None:
        return valid, None, None
    reset = resets if valid is None else resets & valid
    if options.reverse:
        at = lambda a, lo, hi: lax.slice_in_dim(a, lo, hi, axis=axis)  # noqa: E731
        below = at(reset, 0, 1)
        last = jnp.squeeze(below, axis)
        reset = jnp.concatenate([at(reset, 1, steps), jnp.zeros_like(below)], axis)
    return valid, reset, last


def valid_steps(steps: int, lengths: jax.Array, axis: int) -> jax.Array:
    """Return the mask of t < length, with t along `axis`."""
    return _step_index(steps, lengths, axis) < jnp.expand_dims(lengths, axis)


def reverse_within_length(a: jax.Array, lengths: jax.Array, axis: int) -> jax.Array:
    """Reverse each sequence within its length, and the padding within itself. This is its own inverse."""
    steps = a.shape[axis]
    index = (jnp.expand_dims(lengths, axis) - 1 - _step_index(steps, lengths, axis)) % steps
    return jnp.take_along_axis(a, index.reshape(index.shape + (1,) * (a.ndim - index.ndim)), axis)


def _step_index(steps: int, lengths: jax.Array, axis: int) -> jax.Array:
    """Return t along `axis` of an array with one axis more than `lengths`."""
    return jnp.arange(steps, dtype=lengths.dtype).reshape((1,) * axis + (-1,) + (1,) * (lengths.ndim - axis))


def select(mask: jax.Array | None, yes: Tree, no: Tree) -> Tree:
    """Select, leaf by leaf, `yes` where the mask (*B,) is True, else `no`. None is True everywhere."""
    if mask is None:
        return yes
    return jax.tree.map(lambda a, b: jnp.where(expand_mask(mask, a), a, b), yes, no)


def replace_where(mask: jax.Array | None, tree: Tree, new: Tree | None = None) -> Tree:
    """Replace every leaf by that of `new`, or by zero, where the mask is True. None is False everywhere.

    The leaves of `new` are (*B, ...). Those of the tree, and the mask, may have more axes before the batch.
    """
    if mask is None:
        return tree
    if new is None:
        return select(mask, jax.tree.map(jnp.zeros_like, tree), tree)
    broadcast = lambda b, a: jnp.broadcast_to(jnp.expand_dims(b, range(a.ndim - b.ndim)), a.shape)  # noqa: E731
    return select(mask, jax.tree.map(broadcast, new, tree), tree)


def zero_padding(valid: jax.Array | None, tree: Tree) -> Tree:
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


def merge_time(a: jax.Array, axis: int) -> jax.Array:
    """Merge time (W, k) into W k, the inverse of `split_time`."""
    return a.reshape(*a.shape[:axis], a.shape[axis] * a.shape[axis + 1], *a.shape[axis + 2 :])


def take_chunk(a: jax.Array, axis: int, block: Block, w: Index, t: Index, length: int) -> jax.Array:
    """Slice (..., W, k, ...) to (length, group, ...), time first.

    The slice has the steps from t to t + length, of the group of windows from w.
    """
    if block.windows == 1:
        return jnp.moveaxis(lax.dynamic_slice_in_dim(a, t, length, axis), axis, 0)[:, None]
    starts: list[Index] = [0] * a.ndim
    sizes = list(a.shape)
    starts[axis : axis + 2], sizes[axis : axis + 2] = [w, t], [block.group, length]
    return jnp.moveaxis(lax.dynamic_slice(a, starts, sizes), (axis + 1, axis), (0, 1))


def put_chunk(a: jax.Array, piece: jax.Array, axis: int, block: Block, w: Index, t: Index) -> jax.Array:
    """Return `a` with the result of `take_chunk` replaced by `piece`."""
    if block.windows == 1:
        return lax.dynamic_update_slice_in_dim(a, jnp.moveaxis(piece[:, 0], 0, axis), t, axis)
    starts: list[Index] = [0] * a.ndim
    starts[axis : axis + 2] = [w, t]
    return lax.dynamic_update_slice(a, jnp.moveaxis(piece, (0, 1), (axis + 1, axis)), starts)


def scan_chunks(
    chunk: Callable[[Tree, PyTree], tuple[Tree, PyTree]],
    rest_chunk: Callable[[Tree, PyTree], tuple[Tree, PyTree]],
    carry: Tree,
    arrays: PyTree,
    size: int,
    *,
    reverse: bool,
) -> tuple[Tree, PyTree]:
    """Scan over chunks of `size` steps, then run `rest_chunk` on fewer steps, if there is a rest.

    Both functions take the carry and a chunk of the arrays, time first, and return the carry and results, which are
    joined along their first axis, in the order of time.
    With `reverse`, the chunks are processed from the last one on, and the rest is at the beginning.
    """
    total = jax.tree.leaves(arrays)[0].shape[0]
    count, rest = divmod(total, size)
    take = lambda start, stop: jax.tree.map(lambda a: a[start:stop], arrays)  # noqa: E731
    main, other = (take(rest, total), take(0, rest)) if reverse else (take(0, total - rest), take(total - rest, total))
    split = jax.tree.map(lambda a: a.reshape(count, size, *a.shape[1:]), main)
    carry, found = lax.scan(chunk, carry, split, reverse=reverse)
    found = jax.tree.map(lambda a: a.reshape(a.shape[0] * a.shape[1], *a.shape[2:]), found)
    if not rest:
        return carry, found
    carry, last = rest_chunk(carry, other)
    join = lambda a, b: jnp.concatenate([b, a] if reverse else [a, b])  # noqa: E731
    return carry, jax.tree.map(join, found, last)


def previous_steps(first: jax.Array, a: jax.Array, *, reverse: bool) -> jax.Array:
    """Shift `a` by one step in processing order: each step gets the value of the step before, the first one `first`."""
    parts = [a[1:], first[None]] if reverse else [first[None], a[:-1]]
    return jnp.concatenate(parts)


def shift_to_previous_window(options: Options, s_bar: Tree, last: Tree) -> Tree:
    """Shift (W, *B, H) by one window: the value at the start of each window moves to the end of the window before.

    The last window in processing order gets `last`.
    """
    if options.reverse:
        return jax.tree.map(lambda a, b: jnp.concatenate([b[None], a[:-1]]), s_bar, last)
    return jax.tree.map(lambda a, b: jnp.concatenate([a[1:], b[None]]), s_bar, last)
