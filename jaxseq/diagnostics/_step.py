"""A step function, looked at as a map from one vector of numbers to the next."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, reduce
from itertools import accumulate
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxseq import _checks, _precision
from jaxseq._scan import as_pytree_function

Step = Callable[[Any, Any], tuple[Any, Any]]


@contextmanager
def pushing_forwards(name: str) -> Iterator[None]:
    """A way out for who gives a function of forward mode a step that has none."""
    try:
        yield
    except TypeError as error:
        if "forward-mode" in str(error):
            error.add_note(
                f"jaxseq.diagnostics.{name} uses forward mode, and `f` has a rule for reverse mode only. "
                "In place of an op of jaxseq, use its reference implementation, of the same name in jaxseq.reference."
            )
        raise


class Flat(NamedTuple):
    """s as one vector v (N,) of its real floats, in float32 at least; what else it holds, a counter or a key, is
    carried along.
    """

    v: jax.Array
    rest: list[Any]
    join: Callable[[jax.Array, list[Any]], Any]


def flat(state: Any) -> Flat:
    leaves, structure = jax.tree.flatten(state)
    floats = [is_float_leaf(leaf) for leaf in leaves]
    ours = [jnp.asarray(leaf) for leaf, is_float in zip(leaves, floats, strict=True) if is_float]
    dtype = _precision.accumulator(_precision.promote(*ours)) if ours else np.dtype(np.float32)
    ends = list(accumulate(leaf.size for leaf in ours))
    v = jnp.concatenate([leaf.astype(dtype).reshape(-1) for leaf in ours]) if ours else jnp.zeros(0, dtype)

    def join(v: jax.Array, rest: list[Any]) -> Any:
        pieces = jnp.split(v, ends[:-1])
        numbers = iter(a.reshape(leaf.shape).astype(leaf.dtype) for a, leaf in zip(pieces, ours, strict=False))
        others = iter(rest)
        return structure.unflatten([next(numbers) if is_float else next(others) for is_float in floats])

    return Flat(v, [leaf for leaf, is_float in zip(leaves, floats, strict=True) if not is_float], join)


def is_float_leaf(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def euclidean(leaves: list[jax.Array], kept: int = 0) -> jax.Array:
    """The norm over all leaves and their axes but the first `kept`, by way of the largest: squares alone would be zero
    or infinite long before the numbers are.
    """
    dtype = _precision.promote(*leaves)
    wide = [a.astype(_precision.accumulator(dtype)) for a in leaves]
    largest = [jnp.max(jnp.abs(a), range(kept, a.ndim), initial=0) for a in wide]
    top = lax.stop_gradient(reduce(jnp.maximum, largest))
    top = jnp.where(top > 0, top, jnp.ones((), top.dtype))
    squares = [jnp.sum((a / jnp.expand_dims(top, range(kept, a.ndim))) ** 2, range(kept, a.ndim)) for a in wide]
    return (jnp.sqrt(reduce(jnp.add, squares)) * top).astype(dtype)


def on_vectors(f: Step, state: Flat) -> Callable[[jax.Array, list[Any], Any], tuple[jax.Array, list[Any]]]:
    """F(v, rest, x) = (v', rest')."""

    def F(v: jax.Array, rest: list[Any], x: Any) -> tuple[jax.Array, list[Any]]:
        new = flat(f(state.join(v, rest), x)[0])
        return new.v, new.rest

    return F


def steps_of(f: Step, init: Any, xs: Any, length: int | None) -> tuple[Any, int]:
    """(init as lax.scan types it, T). What is wrong with f, init or xs is told by lax. No init is zeros, of a cell that
    takes none.
    """
    if not callable(f):
        _checks.bad_type("f", "a step function (carry, x) -> (carry, y)", _checks.describe(f))
    if init is None and xs is not None:
        shapes = jax.eval_shape(lambda xs: f(None, jax.tree.map(lambda a: a[0], xs))[0], xs)
        init = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    init, steps = as_pytree_function(partial(lax.scan, f, length=length), init, xs, length)
    if not any(is_float_leaf(leaf) and leaf.size for leaf in jax.tree.leaves(init)):
        _checks.bad_type("init", "a state that holds floats", str(jax.tree.map(_checks.describe, init)))
    return init, steps
