"""The values before a sample: a first value or a prompt, read by the step of the model."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Integer, PRNGKeyArray, PyTree

from jaxseq import _checks
from jaxseq._types import AnyArray

Step = Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]  # (carry, x) -> (carry, a)
Draw = Callable[[PRNGKeyArray, PyTree], PyTree]  # (key, a) -> x


class Reading(NamedTuple):
    """What decides the type of a value: it is drawn by `pick` from the result of `step`."""

    step: Step
    pick: Draw
    key: PRNGKeyArray


def read_prompt(
    reading: Reading,
    carry: PyTree[ArrayLike],
    first: PyTree[ArrayLike],
    prompt: PyTree[ArrayLike],
    prompt_lengths: Integer[AnyArray, "*batch"] | None,
) -> tuple[PyTree, PyTree]:
    """Return the carry after all values before the last one of the prompt, and that value, the next input."""
    step, prompt = reading.step, np.asarray(prompt) if isinstance(prompt, list) else prompt
    if prompt is None:
        if first is None:
            _checks.bad_value("first", "a value, since there is no `prompt`", "None")
        if prompt_lengths is not None:
            _checks.bad_value("prompt", "values (P, *batch), since there are `prompt_lengths`", "None")
        return carry, as_drawn(reading, carry, first)
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(prompt)}
    if len(sizes) != 1 or sizes & {(), (0,)}:
        shapes = jax.tree.map(lambda a: tuple(jnp.shape(a)), prompt)
        _checks.bad_value("prompt", "at least one value (P, *batch)", str(shapes))
    drawn = as_drawn(reading, carry, jax.tree.map(lambda a: jnp.asarray(a)[0], prompt), "prompt")
    xs = jax.tree.map(lambda a, like: jnp.asarray(a, like.dtype), prompt, drawn)
    ((P,),), more = sizes, 0
    if first is not None:
        start, more = as_drawn(reading, carry, first), 1
        xs = jax.tree.map(lambda x, rest: jnp.concatenate([x[None], rest]), start, xs)
    if prompt_lengths is None:
        if P + more > 1 and none_stands_for_arrays(step, carry, drawn):
            carry, xs = step(carry, jax.tree.map(lambda a: a[0], xs))[0], jax.tree.map(lambda a: a[1:], xs)
        before, last = jax.tree.map(lambda a: a[:-1], xs), jax.tree.map(lambda a: a[-1], xs)
        return lax.scan(lambda s, x: (step(s, x)[0], None), carry, before)[0], last

    require_arrays("prompt_lengths", step, carry, drawn)
    batch = drawn.shape if are_tokens(drawn) else None
    number = jnp.clip(counts("prompt_lengths", prompt_lengths, batch, low=1, high=P), 1, P)
    index = number + more - 1  # of the last value

    def read(carry: PyTree, at: tuple[jax.Array, PyTree]) -> tuple[PyTree, None]:
        t, x = at
        return select(t >= index, carry, step(carry, x)[0]), None

    carry, _ = lax.scan(read, carry, (jnp.arange(P + more, dtype=jnp.int32), xs))

    def last_value(a: jax.Array) -> jax.Array:
        return jnp.take_along_axis(a, jnp.expand_dims(index, (0, *range(index.ndim + 1, a.ndim))), 0)[0]

    return carry, jax.tree.map(last_value, xs)


def as_drawn(
    reading: Reading, carry: PyTree[ArrayLike], first: PyTree[ArrayLike], name: str = "first"
) -> PyTree[Array]:
    """Return `first` in the dtype of a drawn value. Raise an error if its shape, or the carry of `step`, is wrong."""
    step, pick, key = reading
    drawn = jax.eval_shape(lambda key, s, x: pick(key, step(s, x)[1]), key, carry, first)
    shapes = lambda tree: jax.tree.map(lambda a: tuple(jnp.shape(a)), tree)  # noqa: E731
    if jax.tree.structure(first) != jax.tree.structure(drawn) or shapes(first) != shapes(drawn):
        _checks.bad_type(name, f"{shapes(drawn)}, the shape of a drawn value", str(shapes(first)))
    kinds = (jnp.integer, jnp.floating)
    for a, like in zip(jax.tree.leaves(first), jax.tree.leaves(drawn), strict=True):
        if not all(jnp.issubdtype(jnp.result_type(a), kind) == jnp.issubdtype(like.dtype, kind) for kind in kinds):
            _checks.bad_type(name, f"{like.dtype}, the dtype of a drawn value", _checks.describe(a))
    first = jax.tree.map(lambda a, like: jnp.asarray(a, like.dtype), first, drawn)
    new = jax.eval_shape(step, carry, first)[0]
    carry = new if has_fewer_arrays(carry, new) else carry
    one = lambda s, _: (step(s, first)[0], None)  # noqa: E731
    jax.eval_shape(lambda s: lax.scan(one, s, None, 1), carry)  # lax raises if the carry changes type
    return first


def are_tokens(x: PyTree[Array]) -> bool:
    """True if a value is one array of integers, whose axes are batch axes. Other values may have more axes."""
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.integer)


def none_stands_for_arrays(step: Step, carry: PyTree[ArrayLike], first: PyTree[Array]) -> bool:
    """True if `carry` has a None where the new carry has arrays, as the cells of jaxseq accept."""
    return has_fewer_arrays(carry, jax.eval_shape(step, carry, first)[0])


def has_fewer_arrays(carry: PyTree, new: PyTree) -> bool:
    """True if a None of `carry` stands for arrays, or shapes of arrays, of `new`."""
    return len(jax.tree.leaves(carry)) < len(jax.tree.leaves(new))


def require_arrays(option: str, step: Step, carry: PyTree[ArrayLike], first: PyTree[Array]) -> None:
    """Raise an error if `carry` is a None that stands for arrays: some sequences take no step at first."""
    if none_stands_for_arrays(step, carry, first):
        _checks.bad_type("carry", f"arrays with `{option}`, such as those of `jaxseq.zero_state`", "None")


def counts(
    name: str, value: Integer[AnyArray, "*batch"], batch: tuple[int, ...] | None, low: int = 0, high: int | None = None
) -> jax.Array:
    """Return numbers of values, one for each sequence, checked where they are concrete."""
    found = _checks.converted(np.asarray(value) if isinstance(value, int) else value)
    if not isinstance(found, _checks.ARRAYS) or not jnp.issubdtype(found.dtype, jnp.integer):
        _checks.not_an_array(name, "an array of integers", value)
    if batch is not None and found.shape != batch:
        _checks.bad_value(name, f"shape {batch} = *batch", str(found.shape))
    if not isinstance(found, Tracer) and found.size:
        least, most = int(np.asarray(found).min()), int(np.asarray(found).max())
        if least < low or (high is not None and most > high):
            expected = f"integers >= {low}" if high is None else f"integers from {low} to {high}, the steps of `prompt`"
            _checks.bad_value(name, expected, f"{least} to {most}")
    if found.dtype.itemsize >= 4:  # the cast to int32 would wrap large numbers around
        found = (jnp if isinstance(found, Tracer) else np).minimum(found, np.asarray(2**31 - 1, found.dtype))
    return jnp.asarray(found, jnp.int32)


def select(mask: jax.Array, a: PyTree, b: PyTree) -> PyTree:
    """Return `a` where the mask `(*batch,)` is True, else `b`: trees of arrays `(*batch, ...)`."""

    def of_leaf(a: jax.Array, b: jax.Array) -> jax.Array:
        if jnp.shape(b)[: mask.ndim] != mask.shape:
            expected = f"arrays that start with the batch axes {mask.shape}, since sequences have different lengths"
            _checks.bad_value("carry", expected, str(jnp.shape(b)))
        return jnp.where(jnp.expand_dims(mask, range(mask.ndim, jnp.ndim(b))), a, b)

    return jax.tree.map(of_leaf, a, b)
