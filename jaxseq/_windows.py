"""How T steps are split into windows, groups of windows, and chunks or segments: the plans of the recurrences and of
`jaxseq.scan`.

Truncation (k1, k2): windows of k1 steps in processing order. The loss in each window is backpropagated through k2
steps, that is to k2 - k1 steps before the window. truncation = k is (k, k). Windows run in parallel: all of them, or
with `checkpoint`, groups of about `checkpoint` steps.

The backward pass of a recurrence splits time into

    blocks    W = T // k windows of k = k1 steps in parallel, and the remaining T mod k steps; without truncation, one
              block of T steps
    groups    of windows that run in parallel
    chunks    of c steps in every window of a group: their states are computed together, with one contraction per
              weight

`scan` splits it into

    head      all windows that reach back to t = 0 or further: one full scan
    groups    of windows of k1 steps in parallel, each from `before` = k2 - k1 steps earlier
    tail      the remaining steps, less than a window
    segments  between checkpoints, within a window
"""

from collections.abc import Sequence
from math import isqrt
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxseq import _checks, _sizes
from jaxseq._time_options import Options


def window_lengths(truncation: tuple[int, int] | None, steps: int) -> tuple[int, int]:
    """Return (k1, k2): the steps of a window, at most T, and how many steps back from its end gradients reach."""
    if not _sizes.is_concrete(steps):
        return truncation or (steps, steps)
    if truncation is None or truncation[0] >= steps:
        return max(1, steps), max(1, steps)
    return truncation


def checkpoint_interval(checkpoint: int | str, steps: int) -> int:
    """Return the number of steps between checkpoints; "auto" is about sqrt(T)."""
    return isqrt(max(0, steps - 1)) + 1 if isinstance(checkpoint, str) else checkpoint


def equal_length(steps: int, longest: int) -> int:
    """Return the length of the fewest pieces of at most `longest` steps that are about equally long."""
    return -(-steps // -(-steps // longest))


def reject_checkpoint_of_symbolic(checkpoint: int | str | None) -> None:
    """Raise an error for a checkpoint interval, if the number of steps is symbolic."""
    if checkpoint is not None:
        _checks.bad_value("checkpoint", "None, since the number of steps is symbolic", repr(checkpoint))


# --- The backward pass of a recurrence ---


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


def blocks(options: Options, steps: int, rows: int) -> tuple[Block, ...]:
    """Return the blocks of T steps, in processing order, for batches of `rows` examples.

    A batch that the compiler may partition gets a single chunk, unless `checkpoint` asks for more: the contraction of
    each chunk would be a sum over devices.
    """
    if not _sizes.is_concrete(steps):  # one chunk, since a chunk of fixed length may be longer than T
        reject_checkpoint_of_symbolic(options.checkpoint)
        return (Block(0, 1, steps, 1, steps),)
    k, _ = window_lengths(options.truncation, steps)
    count, rest = divmod(steps, k)
    group, chunk = _group_and_chunk(options, count, k, steps, rows)
    main = Block(rest if options.reverse else 0, count, k, group, chunk)
    if not rest:
        return (main,)
    group, chunk = _group_and_chunk(options, 1, rest, steps, rows)
    return main, Block(0 if options.reverse else steps - rest, 1, rest, group, chunk)


def _group_and_chunk(options: Options, windows: int, k: int, steps: int, rows: int) -> tuple[int, int]:
    """Return the number of windows that run in parallel, and the steps of a chunk."""
    tuning, group = options.tuning, windows
    if not _sizes.is_concrete(rows):
        rows = tuning.rows // tuning.least_steps
    if options.checkpoint is not None:
        longest = checkpoint_interval(options.checkpoint, steps)
        group = max(g for g in range(1, windows + 1) if windows % g == 0 and g <= max(1, longest // k))
    elif options.partitioning.implicit:
        longest = k
    else:
        rows = max(1, rows) * windows
        least = max(min(tuning.least_steps, -(-4 * tuning.rows // rows)), -(-tuning.least_rows // rows))
        longest = max(least, min(-(-tuning.rows // rows), -(-k // tuning.parts)))
    return group, equal_length(k, min(longest, k))


def chunk_of_step(options: Options, parts: Sequence[Block], steps: int) -> jax.Array:
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


# --- `scan` ---


class ScanPlan(NamedTuple):
    """How T steps of `scan` are split, in processing order."""

    steps: int
    k1: int  # steps of a window
    before: int  # k2 - k1, the number of steps that a window starts early
    segment: int | None  # steps between checkpoints
    head: int  # steps of the head; T without truncation
    groups: tuple[tuple[int, int], ...]  # (number of groups, windows per group)
    unroll: int

    @property
    def tail(self) -> int:
        """The number of steps in the tail."""
        return (self.steps - self.head) % self.k1


def scan_plan(steps: int, truncation: tuple[int, int] | None, checkpoint: int | str | None, unroll: int) -> ScanPlan:
    """Return the plan of `scan`."""
    k1, k2 = window_lengths(truncation, steps)
    if not _sizes.is_concrete(steps):  # one scan, since there may be no whole window and no whole segment
        reject_checkpoint_of_symbolic(checkpoint)
        if truncation is not None and k1 != k2:
            _checks.bad_value("truncation", "an integer, since the number of steps is symbolic", repr(truncation))
        return ScanPlan(steps, k1, 0, None, 0, (), unroll)
    n = None if checkpoint is None else checkpoint_interval(checkpoint, steps)
    if -(-steps // k1) * k1 <= k2:  # the last window reaches back to t = 0, and so do all
        return ScanPlan(steps, max(1, steps), 0, n, steps, (), unroll)
    before = k2 - k1
    head = (before // k1 + 1) * k1 if before else 0
    windows = (steps - head) // k1
    parallel = windows if n is None else max(1, n // k1)
    whole, rest = divmod(windows, max(1, parallel))
    groups = tuple((count, size) for count, size in ((whole, parallel), (1, rest)) if count and size)
    return ScanPlan(steps, k1, before, n, head, groups, unroll)
