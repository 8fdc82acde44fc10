"""How the backward pass runs, decided once, in the forward pass, and what is stored for it."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import jax
from jaxtyping import PyTree

from jaxseq import _windows
from jaxseq._explain import RECORDED, Decision
from jaxseq._recurrence._cell import State, h_of
from jaxseq._recurrence._inputs import Inputs
from jaxseq._recurrence._step import Sweep, only_residual_is_h
from jaxseq._time_options import Options
from jaxseq._windows import Block


@jax.tree_util.register_static
@dataclass(frozen=True)
class Plan:
    """How the backward pass splits time, and which residuals it needs. Static: a pytree without leaves."""

    blocks: tuple[Block, ...]
    y_is_h: bool  # not rounded: h need not be stored
    stores_residuals: bool  # store the residuals of the cell at every step; else recompute them
    stores_states: bool  # store ŝ of every step; else recompute it


class Residuals(NamedTuple):
    """What the forward pass stores for the backward pass, time first, except for ys."""

    ys: jax.Array
    starts: State  # (N, *B, H): the state before each chunk, in processing order
    states: State | None  # ŝ of every step, or None if it is recomputed
    of_cell: PyTree  # the residuals of the cell at every step, or None if they are recomputed
    plan: Plan


def make_plan(sweep: Sweep, inputs: Inputs) -> Plan:
    """Return how the backward pass runs: its blocks of time, and what the forward pass stores for it."""
    cell, options, weights, leaves = sweep.cell, sweep.options, inputs.weights, jax.tree.leaves(inputs.carry)
    blocks = _windows.blocks(options, inputs.xs.shape[options.axis], rows=prod(h_of(inputs.carry).shape[:-1]))
    y_is_h = len({sweep.product, sweep.accumulator, inputs.xs.dtype, *(a.dtype for a in leaves)}) == 1
    width = max(1, len(cell.gates) * leaves[0].shape[-1])
    small = width < weights.w_x.size <= options.tuning.recompute_products * width - weights.w_h.size
    enough_gates = len(cell.gates) >= options.tuning.recompute_gates
    cheap = y_is_h and len(leaves) == 1 and small and enough_gates and weights.w_q is None
    replays = cell.pullback is None or cell.replay is not None
    stores_residuals = (options.checkpoint is None and not cheap) or (y_is_h and only_residual_is_h(sweep, inputs))
    recomputes_states = y_is_h and (len(leaves) == 1 or replays)
    plan = Plan(blocks, y_is_h, stores_residuals, stores_residuals and not recomputes_states)
    recorded = RECORDED.get()
    if recorded is not None:
        recorded.extend(_explained(plan, options, cheap=cheap))
    return plan


def _explained(plan: Plan, options: Options, *, cheap: bool) -> Iterator[Decision]:
    """Explain a plan, for `jaxseq.explain`."""
    tuning = options.tuning
    for block in plan.blocks:
        groups = "" if block.group == block.windows else f", {block.group} at a time"
        many = f"{block.windows} windows of {block.steps} steps in parallel{groups}, in chunks of {block.chunk} steps"
        one = f"{block.steps} steps, in chunks of {block.chunk}"
        windows = "no truncation" if options.truncation is None else f"truncation {options.truncation}"
        chunks = f"chunks of about {tuning.rows} rows (steps x batch), at most 1 / {tuning.parts} of a window"
        if options.checkpoint is not None:
            chunks = f"checkpoint={options.checkpoint!r}"
        elif options.partitioning.implicit:
            chunks = "one contraction for each window, since the compiler may partition the batch"
        yield Decision("backward pass", one if block.windows == 1 else many, f"{windows}; {chunks}")
    if plan.stores_residuals:
        why = "the default" if options.checkpoint is None else "they are h, which is read back from the outputs"
        yield Decision("residuals of the cell", "stored at every step", why)
    else:
        why = "this is as fast for a cell of this size" if cheap else f"checkpoint={options.checkpoint!r}"
        yield Decision("residuals of the cell", "recomputed in each chunk", why)
    if plan.stores_states:
        why = "the cell has no `replay`" if plan.y_is_h else "the outputs are rounded: h cannot be read back"
        yield Decision("states", "stored at every step", why)
    else:
        yield Decision("states", "recomputed in each chunk, from its first", "h is read back from the outputs")
