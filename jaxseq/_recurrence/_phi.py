"""φ and its pullback, with the parameters of the cell bound. The pullback is the cell's own if it has one, else JAX's.

JAX's pullback of a step stores only the pre-activations, and runs the step again. With an inner product v = q W_q, the
cotangent of v is computed as that of a zero added to v, so that W̄_q = sum_t q_tᵀ v̄_t is one contraction, like the
others.
"""

from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import PrecisionLike
from jaxtyping import PyTree

from jaxseq import _checks, _mesh, _precision, _time
from jaxseq._recurrence._cell import Cell, Gates, Pullback, State, StepResult, h_of
from jaxseq._recurrence._inputs import Weights, float_leaves, with_float_leaves
from jaxseq.linear_maps import Dense


class Inner(NamedTuple):
    """The product inside a step, L(q) = q w_q, and its pullback L.T(v̄) = v̄ w_qᵀ."""

    precision: PrecisionLike
    dtype: np.dtype  # of the cotangents in products
    w_q: jax.Array

    def __call__(self, q: jax.Array) -> jax.Array:
        return Dense().product(self.precision, self.w_q, q)  # not rounded, like h in `cast_for_product`

    def T(self, v_bar: jax.Array) -> jax.Array:
        return Dense().pull_input(self.precision, self.w_q, v_bar.astype(self.dtype), ())


class Phi(NamedTuple):
    """φ of one recurrence, as both passes call it: a cell with a pullback, and what its functions get as well."""

    cell: Cell
    cell_params: tuple[PyTree, ...]  # (p,), or () without cell parameters
    inner: tuple[Inner, ...]  # (L,), or () without a product inside the step

    def step(self, a: Gates, s_prev: State, side: tuple[PyTree, ...]) -> StepResult:
        """Return the new state and the residuals."""
        result: StepResult = self.cell.step(a, s_prev, *self.cell_params, *self.inner, *side)
        return result

    def step_where(self, mask: jax.Array, a: Gates, s_prev: State, side: tuple[PyTree, ...]) -> StepResult:
        """Return `step` of zeros where the mask (*B,) is False."""

        def step(mask: jax.Array, a: Gates, s_prev: State, side: tuple[PyTree, ...]) -> StepResult:
            masked = partial(_time.zero_padding, mask)
            products = [lambda q, L=L: masked(L(masked(q))) for L in self.inner]
            result: StepResult = self.cell.step(*masked((a, s_prev, *self.cell_params)), *products, *masked(side))
            return result

        for _ in range(mask.ndim if self.cell_params else 0):  # cell parameters are selected for each example
            step = jax.vmap(step)
        return step(mask, a, s_prev, side)

    def pullback(self, residuals: PyTree, s_prev: State, s_bar: State, side: tuple[PyTree, ...]) -> Pullback:
        """Return the cotangents of what the step read."""
        assert self.cell.pullback is not None
        found: Pullback = self.cell.pullback(residuals, s_prev, s_bar, *self.cell_params, *self.inner, *side)
        return found

    def replay(self, residuals: PyTree, s_prev: State, side: tuple[PyTree, ...]) -> State:
        """Return the new state, as computed by the step."""
        assert self.cell.replay is not None
        return self.cell.replay(residuals, s_prev, *self.cell_params, *self.inner, *side)


def make_phi(cell: Cell, precision: PrecisionLike, weights: Weights, product: np.dtype) -> Phi:
    """Return φ of these weights, with products in dtype `product`."""
    p, wide = weights.cell_params, _precision.accumulator(product)
    return Phi(
        with_pullback(cell, 1 + cell.recurrent.dimensions(weights.w_h)),
        () if p is None else (_precision.cast(p, wide),),
        () if weights.w_q is None else (Inner(precision, product, weights.w_q),),
    )


@lru_cache(256)
def with_pullback(cell: Cell, features: int) -> Cell:
    """Return the cell, for states with `features` feature axes, with JAX's pullback if it has none."""
    if cell.pullback is not None:
        return cell

    def step(a: Gates, s_prev: State, *more: PyTree) -> StepResult:
        return StepResult(cell.step(a, s_prev, *more), a)

    def pullback(a: Gates, s_prev: State, s_bar: State, *more: PyTree) -> Pullback:
        count = len(more) - cell.side_inputs
        p, inner, side = more[: bool(cell.cell_params)], more[bool(cell.cell_params) : count], more[count:]

        def pull_back(a: Gates, s_prev: State, s_bar: State, side: tuple[PyTree, ...]) -> Pullback:
            args = (a, s_prev, *p), float_leaves(side)
            if not inner:
                f = lambda args, floats: cell.step(*args, *with_float_leaves(side, floats))  # noqa: E731
                found, side_bar = jax.vjp(f, *args)[1](s_bar)
                return _pullback(*found, side_bar=with_float_leaves(side, side_bar, others=False))
            v = jax.eval_shape(lambda args: inner[0](_inner(cell, inner[0], *args, side=side)[1]), args[0])

            def with_zero(args: PyTree, floats: PyTree, zero: jax.Array) -> tuple[State, jax.Array]:
                return _inner(cell, inner[0], *args, side=with_float_leaves(side, floats), zero=zero)

            # The zero must vary over devices like the rest, or JAX sums v̄ over devices at every step.
            zero, _ = _mesh.align_varying((jnp.zeros(v.shape, v.dtype), s_prev))
            _, pull, q = jax.vjp(with_zero, *args, zero, has_aux=True)
            found, side_bar, v_bar = pull(s_bar)
            return _pullback(*found, inner=(q, v_bar), side_bar=with_float_leaves(side, side_bar, others=False))

        if p:  # p̄ of each example: a sum at every step would need a collective at every step
            for _ in range(h_of(s_prev).ndim - features):
                pull_back = jax.vmap(pull_back)
        return pull_back(a, s_prev, s_bar, side)

    return cell._replace(step=step, pullback=pullback, replay=cell.step)


def _pullback(delta: Gates, state_bar: State, params_bar: PyTree = None, **more: PyTree) -> Pullback:
    """Return the cotangents; those of the side inputs are in a tuple, which is empty without any."""
    (side_bar,) = more.pop("side_bar") or (None,)
    return Pullback(delta, state_bar, params_bar, side_bar=side_bar, **more)


def _inner(
    cell: Cell, inner: Inner, *args: PyTree, side: tuple[PyTree, ...], zero: jax.Array | int = 0
) -> tuple[State, jax.Array]:
    """Return (s, q) of a step, with `zero` added to v."""
    qs = []

    def L(q: jax.Array) -> jax.Array:
        qs.append(q)
        return inner(q) + zero

    s = cell.step(*args, L, *side)
    if len(qs) != 1:
        _checks.bad_value(f"{cell.name}.step", "one call of L, the product with `params.w_q`", f"{len(qs)}")
    return s, qs[0]
