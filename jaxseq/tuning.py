"""Numbers that were measured on some machine: chunk lengths, thresholds and crossovers.

No number changes what an op computes, only how fast, and how much it stores. Every op takes them once per call, for the
backend on which it runs, and passes them down to its rule. To try others:

    >>> import dataclasses, jax.numpy as jnp, jaxseq
    >>> from jaxseq import tuning
    >>> recurrence = dataclasses.replace(tuning.CPU.recurrence, rows=2048)
    >>> with tuning.use(dataclasses.replace(tuning.CPU, recurrence=recurrence)):
    ...     ys = jaxseq.scan(lambda s, x: (s + x, s), 0.0, jnp.arange(9.0), truncation=3)[1]

A function under `jax.jit` keeps the numbers with which it was traced. docs/measured-recurrence.md and
docs/measured-convolution.md have the measurements, and the commands that repeat them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from math import inf

import jax

from jaxseq import _checks, _sizes

__all__ = [
    "ACCELERATOR",
    "CPU",
    "ConvTuning",
    "LinearTuning",
    "RecurrenceTuning",
    "ScanTuning",
    "Tuning",
    "for_backend",
    "use",
]


class _Numbers:
    """Base of the classes of numbers: each is positive, and an integer unless its default is not one."""

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            numbers = value if isinstance(value, tuple) else (value,)
            kind = int if isinstance(field.default, int) or field.default is None else (int, float)
            fits = all(isinstance(n, kind) and not isinstance(n, bool) and n > 0 for n in numbers)
            if isinstance(value, tuple) != isinstance(field.default, tuple) or not (fits or value is field.default):
                like = "three positive numbers" if isinstance(field.default, tuple) else "a positive integer"
                _checks.bad_value(field.name, f"{like}, as {field.default!r}", repr(value))


@dataclass(frozen=True)
class RecurrenceTuning(_Numbers):
    """How the backward pass of a recurrence splits time, and what is stored for it.

    The working memory of a chunk is about 12 arrays (c, B, H). A chunk is therefore only part of a window.

    Attributes:
        parts: a chunk is at most 1 / `parts` of a window.
        rows: a chunk has at most this many rows (steps x batch): more do not make its contraction faster.
        least_rows: a chunk has at least this many rows, because the contraction of fewer is slow.
        least_steps: a chunk has at least this many steps if rows are few, to amortize its overhead.
        recompute_gates: gates are recomputed, not stored, for cells with at least this many of them, whose state is h
            only and which have no product inside the step. This is as fast, if `recompute_products` holds as well.
        recompute_products: the same, if a pre-activation takes at most this many multiplications (D + H for a matrix).
            A single input feature is an exception: XLA recomputes its product wherever a gate is read, which takes 1.5
            to 1.8 times as long.
    """

    parts: int = 8
    rows: int = 1024
    least_rows: int = 128
    least_steps: int = 16
    recompute_gates: int = 3
    recompute_products: int = 128


@dataclass(frozen=True)
class ScanTuning(_Numbers):
    """How `jaxseq.scan` runs truncated windows.

    Attributes:
        parallel_state: the largest state, in elements, of which windows run in parallel; None for any state.
    """

    parallel_state: int | None = None


@dataclass(frozen=True)
class LinearTuning(_Numbers):
    """How `jaxseq.linear_recurrence` and linear cells compute their states.

    Attributes:
        elements: the maximum size of the states of a chunk, in elements. The states of a chunk are computed together,
            by an associative scan. None computes all states step by step.
        least_steps: the minimum number of steps of a chunk. If fewer fit, states are computed step by step.
        chunk_elements: a linear cell computes its coefficients and outputs for a chunk of steps at once. This is the
            maximum size of the states of such a chunk, in elements. More do not fit in the cache.
        chunk_steps: the minimum number of steps of such a chunk.
        memory_steps: the number of steps of a chunk of `jaxseq.mlstm`.
    """

    elements: int | None = None
    least_steps: int = 8
    chunk_elements: int = 2**18
    chunk_steps: int = 16
    memory_steps: int = 32

    def chunk_of(self, steps: int, state: int) -> int | None:
        """Return the number of steps in a chunk, for a state of this size, or None."""
        if self.elements is None or not (_sizes.is_concrete(steps) and _sizes.is_concrete(state)):
            return None
        fitting = self.elements // max(1, state)
        return None if fitting < self.least_steps else min(steps, fitting)


@dataclass(frozen=True)
class ConvTuning(_Numbers):
    """Crossovers between rules, and limits of what a rule unrolls. Static and hashable.

    `jaxseq/_correlation/` describes the rules. A triple has one number each for the output, the input and the kernel
    gradient. With K taps, O outputs and P padded positions, the sections are those of docs/measured-convolution.md.

    Attributes:
        terms: maximum number of terms that `_shifts` unrolls, taps x pairs of channels. The times of `_shifts`
            and `_spectrum` cross between 48 and 96 taps. Section "Depthwise kernels: unrolled terms or Fourier
            transforms".
        loop_work: maximum work of `_loop` for a depthwise kernel, K O, as a multiple of the work P log2 P of a
            Fourier transform. Below it, spectra took 1.6 to 8 times as long. No table is recorded.
        short_taps: minimum number of taps at which `_loop` beats `_shifts`, by a factor of 3 to 5, if there are
            few outputs. Never for the output. Section "Depthwise kernels with few outputs".
        short_outputs: maximum number of outputs over all groups to which `short_taps` applies. Same section.
        whole_outputs: maximum number of outputs at which `_loop` beats `_patches` for a depthwise kernel that
            covers the input. XLA transposes the operands of the latter. Same section.
        whole_taps: maximum number of taps of such a kernel. Same section.
        lanes: minimum number of groups at which `_shifts` pays off for groups of several channels. Its vectors
            have one element per group. No table is recorded.
        patch_outputs: maximum number of outputs at which `_patches` beats `_blocks` for groups with disjoint
            receptive fields. Section "Groups whose receptive fields do not overlap".
        single_outputs: maximum number of outputs at which XLA computes the output of a large grouped kernel
            faster than `_patches` and `_blocks`, which transpose the kernel. Same section.
        large_kernel: minimum number of elements of such a kernel, weighted by O' / I'. Same section.
        long_kernel: minimum ratio of taps x outputs to padded positions at which `_spectrum` beats XLA where
            channels are contracted. Section "Contracted channels: XLA or Fourier transforms".
        planes: maximum number of taps along the first of three axes that `_planes` unrolls. Section "Three
            axes".
        residues: maximum number of residues of the strides, over all axes together, that `_shifts` unrolls.
            With more, most would be zero. No table is recorded.
        cache: maximum size in bytes of the partial sums of `_shifts`, so that they stay in the cache. No table
            is recorded.
        block_width: channels of a block of `_blocks` on its narrower side, for the output and the input.
            Section "Groups: XLA, one convolution per group, or merged blocks".
        kernel_block_width: the same for the kernel. Same section.
        blocks: maximum number of blocks of `_blocks`. Same section.
        unrolled_blocks: maximum number of blocks that are unrolled. Over three axes each block is several
            convolutions, and unrolled blocks take long to compile. Same section.
    """

    terms: int = 64
    loop_work: tuple[float, float, float] = (4.0, 4.0, 1.5)
    short_taps: tuple[float, float, float] = (inf, 32.0, 10.0)
    short_outputs: int = 2**12
    whole_outputs: int = 2
    whole_taps: int = 256
    lanes: int = 8
    patch_outputs: int = 128
    single_outputs: int = 4
    large_kernel: int = 2**18
    long_kernel: int = 192
    planes: int = 16
    residues: int = 16
    cache: int = 2**18
    block_width: int = 16
    kernel_block_width: int = 32
    blocks: int = 32
    unrolled_blocks: int = 8


@dataclass(frozen=True)
class Tuning:
    """All measured numbers for one backend."""

    recurrence: RecurrenceTuning = RecurrenceTuning()
    scan: ScanTuning = ScanTuning()
    linear: LinearTuning = LinearTuning()
    conv: ConvTuning = ConvTuning()


CPU = Tuning(scan=ScanTuning(parallel_state=2048))
"""The numbers for CPUs."""

ACCELERATOR = Tuning(linear=LinearTuning(elements=2**22, chunk_elements=2**22))
"""The numbers for all other platforms. These were not measured: no state is large enough for windows one at a time,
because each step waits for its kernel launch, for the same reason linear recurrences run in chunks, and most numbers of
convolutions are for rules that only CPUs use."""


_used: ContextVar[Tuning | None] = ContextVar("jaxseq.tuning", default=None)


def for_backend() -> Tuning:
    """Return the numbers for the default backend of JAX, or those of `use`."""
    return _used.get() or (CPU if jax.default_backend() == "cpu" else ACCELERATOR)


def used_for_convolutions() -> ConvTuning | None:
    """Return the numbers of `use`. None are those of the platform for which the convolution is lowered."""
    used = _used.get()
    return None if used is None else used.conv


@contextmanager
def use(tuning: Tuning) -> Iterator[None]:
    """Use other numbers in all ops that are called, or traced, in this context, on every backend.

    Args:
        tuning: the numbers. `dataclasses.replace(jaxseq.tuning.CPU, ...)` changes some of them.

    Raises:
        TypeError: if `tuning` is not a `Tuning`.

    Example:
        >>> from jaxseq import tuning
        >>> with tuning.use(tuning.Tuning(scan=tuning.ScanTuning(parallel_state=100))):
        ...     tuning.for_backend().scan.parallel_state
        100
    """
    if not isinstance(tuning, Tuning):
        _checks.bad_type("tuning", "a jaxseq.tuning.Tuning", repr(tuning))
    token = _used.set(tuning)
    try:
        yield
    finally:
        _used.reset(token)
