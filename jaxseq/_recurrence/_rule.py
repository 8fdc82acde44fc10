"""The custom rule. Second derivatives are JAX's own, of the plain forward pass.

Both halves are `jax.custom_jvp` functions. JAX's partial evaluation may inline either or both without their rules, for
example inside `lax.scan`. Each therefore computes values that have the same derivative (`_derivative.py`).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import PyTree

from jaxseq._derivative import with_derivative_of
from jaxseq._recurrence._backward import backward
from jaxseq._recurrence._cell import Cell
from jaxseq._recurrence._forward import forward, forward_without_residuals
from jaxseq._recurrence._inputs import Inputs, Masks, with_float_leaves
from jaxseq._recurrence._plan import Residuals
from jaxseq._time_options import Options


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def rule(cell: Cell, options: Options, inputs: Inputs) -> PyTree:
    return forward(cell, options, inputs, store=False)[0]


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _forward(cell: Cell, options: Options, inputs: Inputs) -> tuple[PyTree, Residuals]:
    out, residuals = forward(cell, options, lax.stop_gradient(inputs), store=True)
    assert residuals is not None
    return with_derivative_of(partial(_forward_of_floats, cell, options), out, inputs, *inputs.floats), residuals


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _backward(cell: Cell, options: Options, inputs: Inputs, residuals: Residuals, cotangents: PyTree) -> PyTree:
    found = backward(cell, options, *lax.stop_gradient((inputs, residuals, cotangents)))
    return with_derivative_of(partial(_pull_back, cell, options), found, inputs, inputs.floats, cotangents)


@_forward.defjvp
def _forward_jvp(cell: Cell, options: Options, primals: PyTree, tangents: PyTree) -> PyTree:
    """Return zero tangents of the residuals: only the backward pass reads them, and its rule ignores these tangents."""
    (inputs,), (directions,) = primals, tangents
    out, residuals = _forward(cell, options, inputs)
    _, tangents_out = jax.jvp(partial(_forward_of_floats, cell, options, inputs), inputs.floats, directions.floats)
    return (out, residuals), (tangents_out, jax.tree.map(jnp.zeros_like, residuals))


@_backward.defjvp
def _backward_jvp(cell: Cell, options: Options, primals: PyTree, tangents: PyTree) -> PyTree:
    (inputs, _, cotangents), (directions, _, cotangent_directions) = primals, tangents
    pull = partial(_pull_back, cell, options, inputs)
    return jax.jvp(pull, (inputs.floats, cotangents), (directions.floats, cotangent_directions))


def _pull_back(cell: Cell, options: Options, inputs: Inputs, floats: PyTree, cotangents: PyTree) -> PyTree:
    """Compute the result of the backward pass with JAX's derivative of `forward_without_residuals`."""
    return jax.vjp(partial(_forward_of_floats, cell, options, inputs), *floats)[1](cotangents)


def _forward_of_floats(cell: Cell, options: Options, inputs: Inputs, *floats: PyTree) -> PyTree:
    """Run `forward_without_residuals` on the differentiable inputs; the others are those of `inputs`."""
    weights, carry, xs, side = floats
    weights = weights._replace(recurrent_dropout_mask=inputs.weights.recurrent_dropout_mask)
    masks = inputs.masks._replace(side=with_float_leaves(inputs.masks.side, side))
    return forward_without_residuals(cell, options, Inputs(weights, carry, xs, masks))


def _recurrence_fwd(cell: Cell, options: Options, inputs: Inputs) -> PyTree:
    out, residuals = _forward(cell, options, inputs)
    return out, (inputs, residuals)


def _recurrence_bwd(cell: Cell, options: Options, stored: PyTree, cotangents: PyTree) -> tuple[Inputs]:
    inputs, residuals = stored
    cotangents = jax.tree.map(jnp.asarray, cotangents)  # the pullback of `jax.vjp` passes NumPy arrays through
    w_bar, carry_bar, xs_bar, side_bar = _backward(cell, options, inputs, residuals, cotangents)
    w_bar = w_bar._replace(recurrent_dropout_mask=jax.tree.map(jnp.zeros_like, inputs.weights.recurrent_dropout_mask))
    zoneout = jax.tree.map(lambda k: None if k.dtype == bool else jnp.zeros_like(k), inputs.masks.zoneout)
    side = inputs.masks.side and with_float_leaves(inputs.masks.side, side_bar, others=False)
    return (Inputs(w_bar, carry_bar, xs_bar, Masks(zoneout=zoneout, side=side)),)


rule.defvjp(_recurrence_fwd, _recurrence_bwd)
