"""The public function: check the arguments, put time first in processing order, run the rule, report."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.lax import PrecisionLike
from jaxtyping import Array, Float, PyTree

from jaxseq import _checks, _mesh, _precision, tuning
from jaxseq._any_cell import checked_cell
from jaxseq._explain import RECORDED, Decision
from jaxseq._op import op
from jaxseq._parallel._jacobian import is_diagonal
from jaxseq._parallel._newton import Iterations, Solution
from jaxseq._parallel._pointwise import is_pointwise
from jaxseq._parallel._rule import Options, run
from jaxseq._parallel._solve import chunk_of
from jaxseq._parallel._steps import make_steps, vectors_of
from jaxseq._recurrence import Cell, LinearCell
from jaxseq._recurrence._arguments import (
    PAIRS,
    check_carry,
    check_params,
    check_side_inputs,
    split_side_inputs,
    state_between_steps,
)
from jaxseq._recurrence._inputs import Inputs, Masks
from jaxseq._recurrence._inspect import inspect
from jaxseq._time_options import Options as TimeOptions
from jaxseq._types import AnyArray, ParallelReport

METHODS = ("deer", "quasi-deer")
TOLERANCE = 128  # the default tolerance, in units of the machine epsilon of the state


@op
def parallel(
    cell: Cell,
    params: PyTree,
    carry: PyTree | None,
    xs: Float[AnyArray, "*time_and_batch D"] | tuple[PyTree, PyTree],
    *,
    method: str = "deer",
    tolerance: float | None = None,
    max_iterations: int = 100,
    damping: float = 0.0,
    reverse: bool = False,
    time_axis: int = 0,
    precision: PrecisionLike = None,
) -> tuple[PyTree, Float[Array, "*time_and_batch H"], ParallelReport]:
    r"""Compute all steps of `recurrence` in parallel, by Newton iterations, each of which is a linear recurrence.

    $$s_t = f(s_{t-1}, x_t), \quad t = 1, \dots, T: \qquad
    d_t = d_{t-1} A_t + f(s_{t-1}, x_t) - s_t, \quad s_t \leftarrow s_t + d_t, \qquad
    A_t = \frac{\partial f}{\partial s}(s_{t-1}, x_t)$$

    This is a tool for research: for long sequences, small states and accelerators. It converges in few iterations if
    the recurrence forgets its past, and not at all if the recurrence is chaotic. The result is that of `recurrence` up
    to the tolerance, or NaN. Its gradient is one linear recurrence backwards, for both methods with all of $A_t$, and
    one pullback of all steps. Forward mode and second derivatives run step by step.

    Args:
        cell: the equations of one step and the maps around it, a `jaxseq.Cell`, without spatial axes. JAX
            differentiates its step in forward mode; its pullback is not used.
        params: the parameters of the cell, a `cell.params`.
        carry: the initial state, a `cell.state` or the array h, each leaf `(*batch, H)`, or None for zeros. The
            first guess is one step from it, at all times.
        xs: the sequence `(T, *batch, D)`. For a cell with `side_inputs=True`, the pair of this sequence and a pytree of
            arrays `(T, *batch, ...)`.
        method: `"deer"` uses the Jacobians $A_t$, of T N² elements for each example, where N is the size of the state
            of all leaves. `"quasi-deer"` uses their diagonals in the iterations. It takes more iterations, each of
            which takes less time and memory. The diagonals are cheap if the step of the cell is pointwise. Otherwise,
            as with layer normalization or a product inside the step, they take N passes over all steps.
        tolerance: an example has converged if $\max |f(s_{t-1}, x_t) - s_t|$ is at most `tolerance` times $\max |s_t|$,
            for every leaf of the state. None is 128 times the machine epsilon of the state, 1.5e-5 for float32. It has
            to be larger than the rounding errors of a step: with products in TF32 or bfloat16, the default of JAX on
            accelerators, pass a larger tolerance or `precision="highest"`.
        max_iterations: the maximum number of iterations. T are enough for any recurrence in exact arithmetic.
        damping: a number >= 0 and < 1. The Jacobians in the iterations are multiplied by 1 - `damping`, which keeps
            their products from growing. The iterations are then more, and may converge where they otherwise do not.
        reverse: if True, process each sequence from its last step to its first. `ys[t]` still belongs to `xs[t]`, and
            the returned carry is the state after step 0.
        time_axis: the axis of time in `xs`, the side inputs and `ys`.
        precision: the precision of the matrix products of a step, as in `jax.lax.dot_general`. Products of Jacobians
            have the highest precision.

    Returns:
        `(carry, ys, report)`: the final state in the dtypes of `carry` (at least float32 for None), h of all steps
            in the dtype of `xs`, and `jaxseq.ParallelReport(iterations, residual, converged)`. Where an example has
            not converged, its states and gradients are NaN, and the gradients of the parameters are.

    Raises:
        FloatingPointError: if an example does not converge and the result is a concrete array, as outside of `jax.jit`
            and transformations. Inside, the result is NaN: read `report.converged`.
        TypeError: if `cell` is not a Cell, `params` belongs to another cell, an array is not a float array, or an
            option has the wrong type.
        ValueError: if a rank or size does not match, the cell has spatial axes, the arrays are on an explicit mesh, or
            an option is out of range.

    Example:
        >>> import jax, jax.numpy as jnp, jaxseq
        >>> params = jaxseq.gru_init(jax.random.key(0), 3, 5)
        >>> xs = jax.random.normal(jax.random.key(1), (100, 2, 3))
        >>> h, ys, report = jaxseq.parallel(jaxseq.cells.gru, params, None, xs)
        >>> report.converged
        Array([ True,  True], dtype=bool)
        >>> bool(jnp.allclose(ys, jaxseq.gru(params, None, xs)[1], atol=1e-4))
        True

    Reference:
        Y. H. Lim, Q. Zhu, J. Selfridge and M. F. Kasim, Parallelizing non-linear sequential models over the sequence
        length (2024); quasi-DEER: X. Gonzalez, A. Warrington, J. T. H. Smith and S. W. Linderman, Towards scalable and
        stable parallelization of nonlinear RNNs (2024).
    """
    if isinstance(checked_cell(cell), LinearCell):
        expected = "a jaxseq.Cell; a linear cell needs no iterations, use jaxseq.recurrence"
        _checks.bad_type("cell", expected, _checks.describe(cell))
    weights = check_params(cell, params)
    side: tuple[PyTree, ...] = ()
    if cell.side_inputs or isinstance(xs, PAIRS):
        xs, side = split_side_inputs(cell, "xs", xs)
    x = _checks.array("xs", xs)
    if cell.input.dimensions(weights.w_x) or cell.recurrent.dimensions(weights.w_h):
        _checks.bad_value("cell", "a cell without spatial axes; use jaxseq.recurrence", f"{cell.name} of a convolution")
    if x.ndim < 2:
        _checks.bad_value("xs", "at least 2 axes (time, *batch, features)", str(x.ndim), xs=x)
    axis = _checks.axis("time_axis", time_axis, x.ndim - 1, 1, xs=x)
    backwards = _checks.boolean("reverse", reverse)
    time = TimeOptions(precision=_checks.precision(precision), tuning=tuning.for_backend().recurrence)
    sizes, steps = x.shape[:-1], x.shape[axis]
    side = check_side_inputs(side, sizes, xs=x) if side else side
    first = check_carry(cell, weights, carry, "xs", x, axis)
    between = state_between_steps(first, None)
    first = between if carry is None else first
    how = _iterations(method, tolerance, max_iterations, damping, between)
    inspect(cell, time.precision, Inputs(weights, between, x, Masks(side=side)), x.ndim - 2)
    if _mesh.is_distributed(weights, between, x, side):
        _checks.bad_value("xs", "arrays that are not on an explicit mesh or in `jax.shard_map`", str(jax.typeof(x)))

    def in_order(a: jax.Array) -> jax.Array:
        """Put time first, in processing order."""
        a = jnp.moveaxis(a, axis, 0)
        return jnp.flip(a, 0) if backwards else a

    batch = (*sizes[:axis], *sizes[axis + 1 :])
    vectors = vectors_of(between)
    if steps == 0 or 0 in batch:
        s = jnp.zeros((steps, *batch, vectors.size), vectors.dtype)
        done = jnp.zeros(batch, jnp.int32), jnp.zeros(batch, vectors.dtype), jnp.ones(batch, bool)
        found = Solution(s, *done)
    else:
        inputs = Inputs(weights, between, *jax.tree.map(in_order, (x, Masks(side=side))))
        _explain(cell, how, time, inputs)
        found = run(cell, Options(how, time), inputs)
        _check_converged(how, found)
    last = first if steps == 0 else _precision.cast_like(vectors.split(found.s[-1]), first)
    ys = next(vectors.parts(found.s)).astype(x.dtype)
    ys = jnp.moveaxis(jnp.flip(ys, 0) if backwards else ys, 0, axis)
    return last, ys, ParallelReport(*found[1:])


def _iterations(method: object, tolerance: object, maximum: object, damping: object, carry: PyTree) -> Iterations:
    """Return the checked options of the iterations."""
    chosen = _checks.choice("method", method, METHODS)
    if tolerance is None:
        bound = TOLERANCE * max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(carry))
    else:
        bound = _checks.rate("tolerance", tolerance)
    return Iterations(
        chosen,
        bound,
        _checks.integer("max_iterations", maximum, at_least=1),
        _checks.rate("damping", damping),
    )


def _explain(cell: Cell, how: Iterations, time: TimeOptions, inputs: Inputs) -> None:
    """Record the method and the algorithm of its linear recurrences, for `jaxseq.explain`."""
    recorded = RECORDED.get()
    if recorded is None:
        return
    steps, total = make_steps(cell, time, inputs), inputs.xs.shape[0]
    N, size = steps.vectors.size, steps.first.size
    diagonal = is_diagonal(steps)
    if diagonal or (how.method == "quasi-deer" and is_pointwise(steps)):
        why = "the step is pointwise" + (", and the recurrent map diagonal" if diagonal else "")
        recorded.append(Decision("Jacobians", "diagonals, in one pass for each leaf of the state", why))
    elif how.method == "quasi-deer":
        recorded.append(Decision("Jacobians", f"diagonals, in {N} passes", "the step is not pointwise"))
    else:
        recorded.append(Decision("Jacobians", "all elements", "method='deer'"))
    for part, rows in (("iteration", 1 if how.method == "quasi-deer" or diagonal else N + 1), ("gradient", N + 1)):
        chunk = chunk_of(total, size, 1 if diagonal else rows)
        choice = "step by step" if chunk is None else f"in chunks of {chunk} steps, each by an associative scan"
        recorded.append(Decision(f"linear recurrence of the {part}", choice, "`LinearTuning.elements`"))


def _check_converged(how: Iterations, found: Solution) -> None:
    """Raise a FloatingPointError if a concrete result has not converged."""
    converged: Any = found.converged
    if isinstance(converged, Tracer) or bool(jnp.all(converged)):
        return
    failed, worst = int(jnp.sum(~converged)), float(jnp.max(found.residual))
    raise FloatingPointError(
        f"jaxseq.parallel: {failed} of {converged.size} examples did not converge: after {how.maximum} iterations of "
        f"{how.method}, the residual is {worst:.1e}, with a tolerance of {how.tolerance:.1e}. Pass a larger "
        "`max_iterations`, `damping` or `tolerance`, or use jaxseq.recurrence. Under `jax.jit` the result is NaN, with "
        "the report"
    )
