"""The custom rule, in both modes. Second derivatives are JAX's own, of the plain forward pass."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import PyTree

from jaxseq._both_modes import Rule, call_in_both_modes
from jaxseq._recurrence._backward import backward
from jaxseq._recurrence._cell import Cell
from jaxseq._recurrence._forward import forward, forward_without_residuals
from jaxseq._recurrence._inputs import Inputs, Masks, with_float_leaves
from jaxseq._time_options import Options


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _recurrence(cell: Cell, options: Options, inputs: Inputs) -> PyTree:
    return forward(cell, options, inputs, store=False)[0]


def _fwd(cell: Cell, options: Options, inputs: Inputs) -> PyTree:
    out, residuals = forward(cell, options, inputs, store=True)
    return out, (inputs, residuals)


def _bwd(cell: Cell, options: Options, stored: PyTree, cotangents: PyTree) -> tuple[Inputs]:
    inputs, residuals = stored
    cotangents = jax.tree.map(jnp.asarray, cotangents)  # the pullback of `jax.vjp` passes NumPy arrays through
    w_bar, carry_bar, xs_bar, side_bar = backward(cell, options, inputs, residuals, cotangents)
    w_bar = w_bar._replace(recurrent_dropout_mask=jax.tree.map(jnp.zeros_like, inputs.weights.recurrent_dropout_mask))
    zoneout = jax.tree.map(lambda k: None if k.dtype == bool else jnp.zeros_like(k), inputs.masks.zoneout)
    side = inputs.masks.side and with_float_leaves(inputs.masks.side, side_bar, others=False)
    return (Inputs(w_bar, carry_bar, xs_bar, Masks(zoneout=zoneout, side=side)),)


_recurrence.defvjp(_fwd, _bwd)


def _plain(cell: Cell, options: Options, inputs: Inputs) -> PyTree:
    """Return what JAX differentiates. The recurrent dropout mask and zoneout have no derivative."""
    dropout, zoneout = lax.stop_gradient((inputs.weights.recurrent_dropout_mask, inputs.masks.zoneout))
    weights, masks = inputs.weights._replace(recurrent_dropout_mask=dropout), inputs.masks._replace(zoneout=zoneout)
    return forward_without_residuals(cell, options, inputs._replace(weights=weights, masks=masks))


def rule(cell: Cell, options: Options, inputs: Inputs) -> PyTree:
    """Return (s_T, ys), or with `return_states` (states, ys)."""
    hand, forward, pull, plain = (partial(f, cell, options) for f in (_recurrence, _fwd, _bwd, _plain))
    rule = Rule(hand, forward, pull, plain, parts=(cell.step, cell.pullback, cell.replay))
    return call_in_both_modes(rule, inputs)
