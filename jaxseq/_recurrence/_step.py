"""One step of a recurrence: both linear maps, φ, the masks and zoneout."""

from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax import lax
from jaxtyping import PyTree

from jaxseq import _precision, _time
from jaxseq._recurrence._cell import Cell, State, apply_zoneout, fill_h, h_of, pre_activations
from jaxseq._recurrence._inputs import Inputs, Masks, Weights, dtypes, recurrent_input
from jaxseq._recurrence._phi import Phi, make_phi
from jaxseq._time_options import Options


class Sweep(NamedTuple):
    """What every step of a pass over time uses."""

    cell: Cell
    options: Options
    weights: Weights
    phi: Phi
    product: np.dtype  # dtype of the operands of products
    accumulator: np.dtype  # dtype in which products accumulate


def make_sweep(cell: Cell, options: Options, inputs: Inputs) -> Sweep:
    """Return what the steps over these inputs use."""
    product, accumulator = dtypes(inputs.weights, inputs.carry, inputs.xs)
    phi = make_phi(cell, options.precision, inputs.weights, product)
    return Sweep(cell, options, inputs.weights, phi, product, accumulator)


class StepOutput(NamedTuple):
    """What one step returns."""

    state: State
    y: jax.Array
    s_hat: State  # the state that φ read: zero or `reset_state` after a reset
    residuals: PyTree


def forward_step(
    sweep: Sweep, s_prev: State, x: jax.Array, masks: Masks, *, without_h: bool = False, select: bool = False
) -> StepOutput:
    """Run one step, x (*B, *features). With `without_h`, a residual that is h stays a placeholder.

    With `select`, for JAX to differentiate, the arguments of the step are selected as well as its results. In a masked
    step, the derivative, which may be infinite or NaN, then meets no cotangent.
    """
    cell, precision, weights, phi = sweep.cell, sweep.options.precision, sweep.weights, sweep.phi
    read, zoneout, step, dtype = masks.reads_x, masks.zoneout, phi.step, x.dtype
    s_hat = given = _time.replace_where(masks.reset, s_prev, weights.reset_state)
    if select and read is not None:
        given, zoneout = _time.zero_padding(read, s_hat), _time.zero_padding(masks.valid, zoneout)
        step = partial(phi.step_where, read)
    x = _time.zero_padding(read, x).astype(sweep.product)
    # h is not rounded to the dtype of products if its own is wider, because every step would round it again: with
    # weights and inputs in bfloat16, the gradient of an LSTM (T = 2000, H = 32, forget bias 4) would have an error of
    # 72 % instead of 5 %.
    h = h_of(given)
    h = recurrent_input(weights, h.astype(_precision.common(h.dtype, sweep.product)))
    u = cell.input.apply(precision, weights.w_x, weights.b_x, x)
    r = cell.recurrent.apply(precision, weights.w_h, weights.b_h, h)
    result = step(pre_activations(cell, u, r), _precision.cast(given, sweep.accumulator), masks.side)
    residuals = result.residuals
    if not without_h or zoneout is not None:  # with zoneout, y is not h of the step
        residuals = fill_h(residuals, h_of(result.state))
    s = _precision.cast_like(result.state, s_hat)
    if zoneout is not None:
        s = apply_zoneout(zoneout, s_hat, s)
    y = _time.zero_padding(masks.valid, h_of(s).astype(dtype))
    return StepOutput(_time.select(masks.valid, s, s_prev), y, s_hat, _precision.cast(residuals, sweep.product))


def only_residual_is_h(sweep: Sweep, inputs: Inputs) -> bool:
    """Return True if the only residual is h, which can be read back from ys."""

    def residuals(inputs: Inputs) -> PyTree:
        x, first = inputs.xs.sum(sweep.options.axis), partial(lax.index_in_dim, axis=sweep.options.axis, keepdims=False)
        side = jax.tree.map(lambda a: first(a, 0), inputs.masks.side)
        own = make_sweep(sweep.cell, sweep.options, inputs)
        return forward_step(own, inputs.carry, x, Masks(side=side), without_h=True).residuals

    return inputs.masks.zoneout is None and not jax.tree.leaves(jax.eval_shape(residuals, inputs))
