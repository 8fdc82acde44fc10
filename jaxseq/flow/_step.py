"""A step function, looked at as a map from one vector of numbers to the next."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from jaxseq import _checks

Step = Callable[[Any, Any], tuple[Any, Any]]


class Flat(NamedTuple):
    """s as one vector v (N,) of its real floats; what else it holds, a counter or a key, is carried along."""

    v: jax.Array
    rest: list[Any]
    join: Callable[[jax.Array, list[Any]], Any]


def flat(state: Any) -> Flat:
    leaves, structure = jax.tree.flatten(state)
    floats = [jnp.issubdtype(jnp.result_type(leaf), jnp.floating) for leaf in leaves]
    v, unravel = ravel_pytree([leaf for leaf, is_float in zip(leaves, floats, strict=True) if is_float])

    def join(v: jax.Array, rest: list[Any]) -> Any:
        numbers, others = iter(unravel(v)), iter(rest)
        return structure.unflatten([next(numbers) if is_float else next(others) for is_float in floats])

    return Flat(v, [leaf for leaf, is_float in zip(leaves, floats, strict=True) if not is_float], join)


def on_vectors(f: Step, state: Flat) -> Callable[[jax.Array, list[Any], Any], tuple[jax.Array, list[Any]]]:
    """F(v, rest, x) = (v', rest')."""

    def F(v: jax.Array, rest: list[Any], x: Any) -> tuple[jax.Array, list[Any]]:
        new = flat(f(state.join(v, rest), x)[0])
        return new.v, new.rest

    return F


def steps_of(f: Step, init: Any, xs: Any, length: int | None) -> tuple[Any, int]:
    """(init as lax.scan types it, T). What is wrong with f, init or xs is told by lax."""
    if not callable(f):
        _checks.bad_type("f", "a step function (carry, x) -> (carry, y)", _checks.describe(f))
    carry, ys = jax.eval_shape(lambda s, xs: lax.scan(f, s, xs, length), init, xs)
    init = jax.tree.map(lambda a, like: lax.convert_element_type(a, like.dtype), init, carry)
    steps = next((leaf.shape[0] for leaf in jax.tree.leaves((xs, ys))), length)
    assert steps is not None
    if not flat(init).v.size:
        _checks.bad_type("init", "a state that holds floats", str(jax.tree.map(_checks.describe, init)))
    return init, steps
