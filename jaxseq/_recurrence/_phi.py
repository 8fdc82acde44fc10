"""φ and its pullback, with the parameters of the cell bound. The pullback is the cell's own if it has one, else JAX's.

JAX's pullback of a step stores only the pre-activations, and runs the step again. With an inner product v = q W_q, the
cotangent of v is computed as that of a zero added to v, so that W̄_q = sum_t q_tᵀ v̄_t is one contraction, like the
others.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxseq import _checks, _mesh, _precision, _time
from jaxseq._recurrence._cell import Cell, Gates, State, Weights, h_of
from jaxseq.linear_maps import Dense


class Inner(NamedTuple):
    """The product inside a step, L(q) = q w_q, and its pullback L.T(v̄) = v̄ w_qᵀ."""

    precision: Any
    dtype: Any  # of the cotangents in products
    w_q: jax.Array

    def __call__(self, q: jax.Array) -> jax.Array:
        return Dense().product(self.precision, self.w_q, q)  # not rounded, like h in `cast_for_product`

    def T(self, v_bar: jax.Array) -> jax.Array:
        return Dense().pull_input(self.precision, self.w_q, v_bar.astype(self.dtype), ())


class Phi(NamedTuple):
    """φ as called by both passes. p̄ is None without cell parameters, and (q, v̄) is None without an inner product."""

    step: Callable[[Gates, State], tuple[State, Any]]
    step_where: Callable[[jax.Array, Gates, State], tuple[State, Any]]  # `step` of zeros where the mask (*B,) is False
    pullback: Callable[[Any, State, State], tuple[Gates, State, Any, Any]]
    replay: Callable[[Any, State], State] | None


def make_phi(cell: Cell, precision: Any, weights: Weights, product: Any) -> Phi:
    """Return φ of these weights, with products in dtype `product`."""
    cell_params = (
        () if weights.cell_params is None else (_precision.cast(weights.cell_params, _precision.accumulator(product)),)
    )
    inner = () if weights.w_q is None else (Inner(precision, product, weights.w_q),)
    cell = with_pullback(cell, 1 + cell.recurrent.dimensions(weights.w_h))
    pull, replay = cell.pullback, cell.replay
    assert pull is not None

    def pullback(saved: Any, s_prev: State, s_bar: State) -> Any:
        delta, s_tilde, *rest = pull(saved, s_prev, s_bar, *cell_params, *inner)
        return delta, s_tilde, rest[0] if cell_params else None, rest[-1] if inner else None

    def step_where(mask: jax.Array, a: Gates, s_prev: State) -> tuple[State, Any]:
        def one(mask: jax.Array, a: Gates, s_prev: State) -> tuple[State, Any]:
            masked = partial(_time.zero_padding, mask)
            products = [lambda q, L=L: masked(L(masked(q))) for L in inner]
            return cell.step(*masked((a, s_prev, *cell_params)), *products)

        for _ in range(mask.ndim if cell_params else 0):  # cell parameters are selected for each example
            one = jax.vmap(one)
        return one(mask, a, s_prev)

    return Phi(
        lambda a, s_prev: cell.step(a, s_prev, *cell_params, *inner),
        step_where,
        pullback,
        None if replay is None else lambda saved, s_prev: replay(saved, s_prev, *cell_params, *inner),
    )


@lru_cache(256)
def with_pullback(cell: Cell, features: int) -> Cell:
    """Return the cell, for states with `features` feature axes, with JAX's pullback if it has none."""
    if cell.pullback is not None:
        return cell

    def step(a: Gates, s_prev: State, *more: Any) -> tuple[State, Gates]:
        return cell.step(a, s_prev, *more), a

    def pullback(a: Gates, s_prev: State, s_bar: State, *more: Any) -> Any:
        p, inner = more[: bool(cell.cell_params)], more[bool(cell.cell_params) :]

        def one(a: Gates, s_prev: State, s_bar: State) -> Any:
            if not inner:
                return jax.vjp(cell.step, a, s_prev, *p)[1](s_bar)
            v = jax.eval_shape(lambda *args: inner[0](_inner(cell, inner[0], *args)[1]), a, s_prev, *p)
            f = lambda *args: _inner(cell, inner[0], *args[:-1], zero=args[-1])  # noqa: E731
            # The zero must vary over devices like the rest, or JAX sums v̄ over devices at every step.
            zero, _ = _mesh.align_varying((jnp.zeros(v.shape, v.dtype), s_prev))
            _, pull, q = jax.vjp(f, a, s_prev, *p, zero, has_aux=True)
            *found, v_bar = pull(s_bar)
            return *found, (q, v_bar)

        if p:  # p̄ of each example: a sum at every step would need a collective at every step
            for _ in range(h_of(s_prev).ndim - features):
                one = jax.vmap(one)
        return one(a, s_prev, s_bar)

    return cell._replace(step=step, pullback=pullback, replay=cell.step)


def _inner(cell: Cell, inner: Inner, *args: Any, zero: Any = 0) -> tuple[State, jax.Array]:
    """Return (s, q) of a step, with `zero` added to v."""
    qs = []

    def L(q: jax.Array) -> jax.Array:
        qs.append(q)
        return inner(q) + zero

    s = cell.step(*args, L)
    if len(qs) != 1:
        _checks.bad_value(f"{cell.name}.step", "one call of L, the product with `params.w_q`", f"{len(qs)}")
    return s, qs[0]
