r"""The states of all steps as a fixed point, and their gradient.

The states s_1 .. s_T of a recurrence are the root of a system of equations, one for each step:

    F_t(s) = s_t - f(s_{t-1}, x_t; w) = 0              t = 1 .. T, s_0 the carry

Newton iterations. With the Jacobian A_t = ∂f/∂s at (s_{t-1}, x_t), whose rows are the inputs (a state is a row vector),
the linearized system for the change d of a guess s is a linear recurrence:

    d_t - d_{t-1} A_t = f(s_{t-1}, x_t) - s_t          d_0 = 0
    s_t <- s_t + d_t

With s_t + d_t written as the new state, this is the iteration of the literature,
s_t <- s_{t-1} A_t + (f(s^guess_{t-1}, x_t) - s^guess_{t-1} A_t). "deer" (Lim et al.) uses the whole of A_t, and
converges quadratically near the root. "quasi-deer" (Gonzalez et al.) keeps the diagonal of A_t, and converges linearly,
with cheaper iterations. Damping multiplies A_t by κ < 1 in the iterations only, so the solution stays the same. The
trust region of Gonzalez et al. (ELK), which solves a damped system with a Kalman smoother, is not implemented.

Gradient. At the root, dF = 0 (the implicit function theorem). With ȳ_t the cotangent of s_t,

    ds_t = ds_{t-1} A_t + ∂f/∂x dx_t + ∂f/∂w dw        forward mode
    g_t  = ȳ_t + g_{t+1} A_{t+1}ᵀ,    g_T = ȳ_T        reverse mode                                         (1)
    (w̄, x̄_t, s̄_0) = the pullback of f(s_{t-1}, x_t; w) at all t at once, for the cotangents g_t               (2)

So the backward pass is one linear recurrence in the opposite direction, with the whole of A_t for either method, and
one pullback, with every product with weights a contraction over time and batch. g_t is what backpropagation through
time computes step by step. Nothing is differentiated through iterations, and only the inputs and the states are stored.
The backward pass forms the A_t again. (1) takes as many operations as the linear recurrence of an iteration: in
parallel, O(log T) depth and O(T N³) operations.

Where the iterations of an example have not converged, its states are NaN, and so are its gradients. The gradients of
the weights are a sum over examples, and are then NaN as a whole. They are multiplied by NaN, because the derivative of
a cell at a state of NaN may be zero, as that of relu is.

Forward mode and second derivatives are JAX's own, of the recurrence step by step. The iterations run for the report.

    code       here
    s, s_bar   s_1 .. s_T as vectors, (T, *B, N), and their cotangents ȳ
    a, d, g    A, d and g
    keep       κ = 1 - damping

Sources: Y. H. Lim, Q. Zhu, J. Selfridge and M. F. Kasim, Parallelizing non-linear sequential models over the sequence
length (2024), section 3; X. Gonzalez, A. Warrington, J. T. H. Smith and S. W. Linderman, Towards scalable and stable
parallelization of nonlinear RNNs (2024), sections 3 and 4.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxseq._both_modes import Rule, call_in_both_modes
from jaxseq._parallel import _newton
from jaxseq._parallel._jacobian import jacobian
from jaxseq._parallel._newton import Iterations, Solution
from jaxseq._parallel._solve import solve
from jaxseq._parallel._steps import before, make_steps, step_all, vectors_of
from jaxseq._recurrence._cell import Cell
from jaxseq._recurrence._forward import forward_without_residuals
from jaxseq._recurrence._inputs import Inputs, Masks, with_float_leaves
from jaxseq._time_options import Options as TimeOptions


class Options(NamedTuple):
    """What is decided once per call. Static and hashable. Arrays have time first, in processing order."""

    how: Iterations
    time: TimeOptions


def run(cell: Cell, options: Options, inputs: Inputs) -> Solution:
    """Return the states after all steps, NaN for an example that has not converged, and how the iterations ended."""
    hand, forward, pull, plain = (partial(f, cell, options) for f in (_states, _forward, _pull, _plain))
    rule = Rule(hand, forward, pull, plain, parts=(cell.step,))
    return Solution(*call_in_both_modes(rule, inputs))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _states(cell: Cell, options: Options, inputs: Inputs) -> Solution:
    found = _newton.solve(options.how, make_steps(cell, options.time, inputs))
    return found._replace(s=_nan_unless(found.converged[None], found.s))


def _forward(cell: Cell, options: Options, inputs: Inputs) -> tuple[Solution, tuple[Inputs, jax.Array, jax.Array]]:
    found: Any = _states(cell, options, inputs)
    return found, (inputs, found.s, found.converged)


def _pull(
    cell: Cell, options: Options, residuals: tuple[Inputs, jax.Array, jax.Array], cotangents: Any
) -> tuple[Inputs]:
    inputs, s, converged = residuals
    s_bar = jnp.asarray(cotangents[0])
    steps = make_steps(cell, options.time, inputs)
    a = jacobian(steps, before(steps.first, s))
    transposed = a if a.ndim == s.ndim else jnp.swapaxes(a, -1, -2)
    next_a = jnp.concatenate([transposed[1:], jnp.zeros_like(a[:1])])  # A_{T+1} meets g_{T+1} = 0
    g = solve(next_a, s_bar, reverse=True)

    def all_steps(weights: Any, carry: Any, xs: jax.Array, floats: Any) -> jax.Array:
        masks = Masks(side=with_float_leaves(inputs.masks.side, floats))
        return step_all(cell, options.time, vectors_of(inputs.carry), s, Inputs(weights, carry, xs, masks))

    w_bar, carry_bar, xs_bar, side_bar = jax.vjp(all_steps, *inputs.floats)[1](g)
    w_bar = jax.tree.map(partial(_nan_unless, jnp.all(converged)), w_bar)
    carry_bar = jax.tree.map(partial(_nan_unless, converged), carry_bar)
    xs_bar, side_bar = jax.tree.map(partial(_nan_unless, converged[None]), (xs_bar, side_bar))
    side = inputs.masks.side and with_float_leaves(inputs.masks.side, side_bar, others=False)
    return (Inputs(w_bar, carry_bar, xs_bar, Masks(side=side)),)


_states.defvjp(_forward, _pull)


def _plain(cell: Cell, options: Options, inputs: Inputs) -> Solution:
    """Return the same states, computed step by step for JAX to differentiate, and how the iterations ended."""
    found = _newton.solve(options.how, make_steps(cell, options.time, lax.stop_gradient(inputs)))
    states, _ = forward_without_residuals(cell, options.time._replace(return_states=True), inputs)
    s = vectors_of(inputs.carry).join(states)
    return found._replace(s=_nan_unless(found.converged[None], s))


def _nan_unless(converged: jax.Array, a: jax.Array) -> jax.Array:
    """Return `a`, NaN where an example has not converged. `converged` has the first axes of `a`, some of size one.

    A product, unlike a selection, makes the derivative NaN as well.
    """
    factor = jnp.where(converged, 1, jnp.nan).astype(a.dtype)
    return a * factor.reshape(*factor.shape, *(1,) * (a.ndim - factor.ndim))
