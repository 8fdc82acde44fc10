"""Step functions as maps between vectors: flattening of the state, and checks of the arguments."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree

from jaxseq import _checks, _precision
from jaxseq._scan import as_pytree_function

Step = Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]  # (state, x) -> (state, y)
Rest = list[ArrayLike]  # the leaves of a state that are not floats
VectorState = tuple[jax.Array, Rest]  # a state as (v, rest), the first two fields of `Flat`
VectorStep = Callable[[jax.Array, Rest, PyTree], VectorState]  # (v, rest, x) -> (v, rest)


@contextmanager
def forward_mode_hint(name: str) -> Iterator[None]:
    """Add a hint to the error of a step function that does not support forward mode."""
    try:
        yield
    except TypeError as error:
        if "forward-mode" in str(error):
            error.add_note(
                f"jaxseq.diagnostics.{name} uses forward mode, but `f` calls a jax.custom_vjp, which has a rule for "
                "reverse mode only. Wrap that function in jaxseq.both_modes(hand, plain), where `plain` computes the "
                "same values in plain JAX."
            )
        raise


class Flat(NamedTuple):
    """A state as one vector v (N,) of its real floats, in at least float32, and the list of its other leaves.

    `join(v, rest)` restores the state.
    """

    v: jax.Array
    rest: Rest
    join: Callable[[jax.Array, Rest], PyTree]


def flat(state: PyTree[ArrayLike]) -> Flat:
    leaves, structure = jax.tree.flatten(state)
    is_float = [is_float_leaf(leaf) for leaf in leaves]
    floats = [jnp.asarray(leaf) for leaf, chosen in zip(leaves, is_float, strict=True) if chosen]
    dtype = _precision.accumulator(_precision.promote(*floats)) if floats else np.dtype(np.float32)
    v, split = ravel_pytree([leaf.astype(dtype) for leaf in floats])

    def join(v: jax.Array, rest: Rest) -> PyTree[ArrayLike]:
        new_floats = iter(a.astype(leaf.dtype) for a, leaf in zip(split(v), floats, strict=True))
        others = iter(rest)
        return structure.unflatten([next(new_floats) if chosen else next(others) for chosen in is_float])

    return Flat(v, [leaf for leaf, chosen in zip(leaves, is_float, strict=True) if not chosen], join)


def is_float_leaf(leaf: ArrayLike) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def euclidean(leaves: list[jax.Array], leading: int = 0) -> jax.Array:
    """Return the norm over all leaves and all axes except the first `leading`.

    Values are divided by the largest magnitude first, so that their squares neither underflow nor overflow.
    """
    dtype = _precision.promote(*leaves)
    wide = [a.astype(_precision.accumulator(dtype)) for a in leaves]
    largest = [jnp.max(jnp.abs(a), range(leading, a.ndim), initial=0) for a in wide]
    top = lax.stop_gradient(reduce(jnp.maximum, largest))
    top = jnp.where(top > 0, top, jnp.ones((), top.dtype))
    squares = [jnp.sum((a / jnp.expand_dims(top, range(leading, a.ndim))) ** 2, range(leading, a.ndim)) for a in wide]
    return (jnp.sqrt(reduce(jnp.add, squares)) * top).astype(dtype)


def on_vectors(f: Step, state: Flat) -> VectorStep:
    """Return F with F(v, rest, x) = (v', rest'), the step `f` on flattened states."""

    def F(v: jax.Array, rest: Rest, x: PyTree) -> VectorState:
        new = flat(f(state.join(v, rest), x)[0])
        return new.v, new.rest

    return F


def steps_of(f: Step, init: PyTree[ArrayLike], xs: PyTree[ArrayLike], length: int | None) -> tuple[PyTree[Array], int]:
    """Return (init with the types that `lax.scan` gives it, T). `lax.scan` raises the errors about f, init and xs.

    If `init` is None, return zeros with the shapes of the carry that `f` returns.
    """
    if not callable(f):
        _checks.bad_type("f", "a step function (carry, x) -> (carry, y)", _checks.describe(f))
    if init is None and xs is not None:
        shapes = jax.eval_shape(lambda xs: f(None, jax.tree.map(lambda a: a[0], xs))[0], xs)
        init = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    init, steps = as_pytree_function(partial(lax.scan, f, length=length), init, xs, length)
    if not any(is_float_leaf(leaf) and leaf.size for leaf in jax.tree.leaves(init)):
        _checks.bad_type("init", "a state with float leaves", str(jax.tree.map(_checks.describe, init)))
    return init, steps
