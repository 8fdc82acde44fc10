"""The recurrence of a linear cell: its coefficients in bulk, a linear recurrence, its outputs in bulk.

    (a_t, v_t) = coefficients(x_t)        h_t = a_t h_{t-1} + v_t        y_t = output(h_t, x_t)

Only the middle one is sequential. Its rule is derived in `_linear_recurrence/_rule.py`: g_t, the cotangent of h_t, is a
linear recurrence in the opposite direction, and

    v̄_t = g_t        ā_t = g_t h_{t-1}

JAX pulls these back through the coefficients, and ȳ_t through the outputs, for many steps at once. So the gradient of
each weight is one contraction over these steps, outside of any loop over steps.

Time is split into chunks, one after the other. A chunk stores the state before it and nothing else, unless it is the
only one. The backward pass computes its coefficients and states again, then their cotangents, so the working memory is
that of one chunk, and stays in the cache. This takes a fraction of the memory of JAX's gradient, and less time
(`docs/measured.md`).

The other time options change a and v. With the masks and the zoneout k_t of `_recurrence/__init__.py`:

    zoneout          a_t becomes k_t + (1 - k_t) a_t, and v_t becomes (1 - k_t) v_t
    reset to s⁰      h_{t-1} is replaced by zero, and v_t becomes v_t + a_t s⁰
    padding, reset, truncation, shards of time: as in `_linear_recurrence/`

    code             here
    coefficients     (a_t, v_t)
    carry            h before the first step of a chunk
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxseq import _linear_recurrence as linear
from jaxseq import _precision, _sizes, _time, _windows
from jaxseq._explain import RECORDED, Decision
from jaxseq._recurrence._cell import apply_zoneout
from jaxseq._recurrence._inputs import Inputs, Masks, Weights
from jaxseq._recurrence._linear_cell import LinearCell, with_params
from jaxseq._time_options import Options

Outputs = tuple[jax.Array, jax.Array | None]  # ys, and the states with `return_states`


class ChunkSteps(NamedTuple):
    """What the steps of a chunk read, time first."""

    xs: jax.Array
    masks: Masks
    start: jax.Array | None  # as in `linear.Inputs`


class Sweep(NamedTuple):
    """What all chunks of a call use. Static."""

    cell: LinearCell
    options: Options
    linear: linear.Options
    overlapping: tuple[int, int] | None  # truncation (k1, k2), if k1 < k2


def rule(
    cell: LinearCell, options: Options, inputs: Inputs, shards: tuple[str, ...] = ()
) -> tuple[jax.Array, jax.Array]:
    """Return (h_T, ys), or with `return_states` (states, ys). Time is sharded over the mesh axes `shards`."""
    axis, weights, carry = options.axis, inputs.weights, inputs.carry
    time_first = lambda a: jnp.moveaxis(a, axis, 0)  # noqa: E731
    xs, masks = jax.tree.map(time_first, (inputs.xs, inputs.masks))
    steps = xs.shape[0]
    k1, k2 = _windows.window_lengths(options.truncation, steps)
    truncated = options.truncation is not None and not (_sizes.is_concrete(steps) and k1 >= steps)
    overlapping = (k1, k2) if truncated and k1 != k2 else None
    algorithm = linear.Algorithm(carry.dtype, options.linear.chunk_of(steps, carry.size), options.unroll)
    of_rule = linear.Options(algorithm, reverse=options.reverse, stores_states=True, shards=shards)
    start = linear.window_starts(k1, xs, reverse=options.reverse) if truncated and k1 == k2 else None
    sweep = Sweep(cell, options, of_rule, overlapping)
    # Windows overlap across chunks, and each chunk would exchange states or sum the gradients of weights over devices.
    whole = bool(shards) or overlapping is not None or options.partitioning.implicit
    chunk = steps if whole else _chunk_length(options, steps, carry)
    # A device that computed its part of time again would exchange its state again.
    stores = chunk == steps and options.checkpoint is None and (bool(shards) or not whole)
    _explain(options, chunk, whole=whole, stores=stores)
    at = ChunkSteps(xs, masks, start)
    if stores:
        end, outputs = _run_chunk(sweep, weights, carry, at)
    else:
        end, outputs = _run_chunks(sweep, weights, carry, at, chunk)
    ys, states = jax.tree.map(lambda a: jnp.moveaxis(a, 0, axis), outputs)
    return states if options.return_states else end, ys


def _chunk_length(options: Options, steps: int, carry: jax.Array) -> int:
    """Return the number of steps in a chunk."""
    if not _sizes.is_concrete(steps):
        _windows.reject_checkpoint_of_symbolic(options.checkpoint)
        return steps
    if options.checkpoint is not None:
        longest = _windows.checkpoint_interval(options.checkpoint, steps)
    else:
        tuning = options.linear
        state = carry.size if _sizes.is_concrete(carry.size) else tuning.chunk_elements // tuning.chunk_steps
        longest = max(tuning.chunk_steps, tuning.chunk_elements // max(1, state))
    if longest >= steps:
        return steps
    # Chunks of equal length need one compiled program, those and a shorter one need two.
    return next((n for n in range(longest, longest // 2, -1) if steps % n == 0), longest)


def _explain(options: Options, chunk: int, *, whole: bool, stores: bool) -> None:
    """Record how time is split, for `jaxseq.explain`."""
    recorded = RECORDED.get()
    if recorded is None:
        return
    why = "`LinearTuning.chunk_elements`" if options.checkpoint is None else f"checkpoint={options.checkpoint!r}"
    if whole:
        why = "windows overlap, time is sharded, or the compiler may partition the batch"
    choice = "stored" if stores else f"computed again in the backward pass, {chunk} steps at a time"
    recorded.append(Decision("coefficients and states", choice, why))


def _run_chunks(
    sweep: Sweep, weights: Weights, carry: jax.Array, at: ChunkSteps, chunk: int
) -> tuple[jax.Array, Outputs]:
    """Run chunks of equal length, then the rest. Only the state before each is stored."""

    def run(carry: jax.Array, at: ChunkSteps, *, prevent_cse: bool = False) -> tuple[jax.Array, Outputs]:
        # A loop separates the two computations of a chunk already.
        return jax.checkpoint(partial(_run_chunk, sweep), prevent_cse=prevent_cse)(weights, carry, at)

    if chunk == at.xs.shape[0]:
        return run(carry, at, prevent_cse=True)
    return _time.scan_chunks(run, partial(run, prevent_cse=True), carry, at, chunk, reverse=sweep.options.reverse)


def _run_chunk(sweep: Sweep, weights: Weights, carry: jax.Array, at: ChunkSteps) -> tuple[jax.Array, Outputs]:
    """Run the steps of a chunk: return the state after it, and its outputs."""
    (cell, options, of_rule, overlapping), masks = sweep, at.masks
    bound = with_params(cell, weights.cell_params, at.xs, options.precision)
    x = _time.zero_padding(masks.reads_x, at.xs.astype(bound.dtype))
    a, v = bound.coefficients(x)
    a, v = _precision.cast((jnp.expand_dims(a, range(v.ndim - a.ndim)), v), _precision.promote(a, v, carry))
    if masks.zoneout is not None:
        zoneout = _time.zero_padding(masks.valid, masks.zoneout)
        a = apply_zoneout(zoneout, jnp.ones_like(v), jnp.broadcast_to(a, v.shape))
        v = apply_zoneout(zoneout, jnp.zeros_like(v), v)
    if weights.reset_state is not None and masks.reset is not None:
        after_reset = a * weights.reset_state.astype(v.dtype)[None]
        v = v + _time.zero_padding(masks.reset, jnp.broadcast_to(after_reset, v.shape))
    with_feature = lambda m: None if m is None else jnp.expand_dims(m, -1)  # noqa: E731
    inputs = linear.Inputs(a, carry, v, with_feature(masks.valid), with_feature(masks.reset), at.start)
    if overlapping is None:
        end, states = linear.run(of_rule, inputs)
    else:
        end, states = linear.run_truncated(of_rule, overlapping, inputs, None)
    y = _time.zero_padding(masks.valid, bound.output(states, x).astype(at.xs.dtype))
    return end, (y, states.astype(carry.dtype) if options.return_states else None)
