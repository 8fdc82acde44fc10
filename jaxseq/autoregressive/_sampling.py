r"""Sequences from a model, one value after the other.

    s_t, a_t = step(s_{t-1}, x_{t-1}),      x_t ~ softmax(a_t / temperature), cut to what is likely

The step carries all of the past, so that a value costs one step, however long the sequence has become.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from jaxseq import _checks, _precision
from jaxseq._types import AnyArray

Step = Callable[[Any, Any], tuple[Any, Any]]
Draw = Callable[[PRNGKeyArray, Any], Any]


def draw(
    key: PRNGKeyArray,
    logits: Float[AnyArray, "*batch V"],
    *,
    temperature: float | int = 1.0,
    top_k: int | None = None,
    top_p: float | int | None = None,
) -> Int[Array, "*batch"]:
    r"""A value from $\operatorname{softmax}(a / \text{temperature})$, cut to what is likely.

    Args:
        key: of the random numbers.
        logits: a.
        temperature: below one keeps to what is likely, above one strays; zero is the likeliest value itself.
        top_k: only the k likeliest values, and those that tie with the last of them.
        top_p: only the likeliest values that together just reach this probability (nucleus sampling), after the cut
            to k; at least one.

    Returns:
        `(*batch,)` integers; -1 where the logits hold NaN, of which nothing can be drawn.

    Raises:
        TypeError: logits that hold no floats; options of other kinds.
        ValueError: a temperature below 0, a top_k outside of 1 to V, a top_p outside of 0 to 1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxseq import autoregressive
        >>> int(autoregressive.draw(jax.random.key(0), jnp.array([0.0, 3.0, 1.0]), top_k=1))
        1

    Reference:
        A. Holtzman et al., The curious case of neural text degeneration (2020), for top_p.
    """
    a = _checks.array("logits", logits)
    if not a.ndim or not a.shape[-1]:
        _checks.bad_value("logits", "shape (*batch, V)", str(a.shape))
    temperature, top_k, top_p = _options(temperature, top_k, top_p)
    if top_k is not None and top_k > a.shape[-1]:
        _checks.bad_value("top_k", f"at most {a.shape[-1]}, the values there are", str(top_k), logits=a)
    return _drawn(key, a, temperature, top_k, top_p)


def _options(temperature: Any, top_k: Any, top_p: Any) -> tuple[float | int, int | None, float | int | None]:
    for name, value, low, high in (("temperature", temperature, 0, None), ("top_p", top_p, 0, 1)):
        if value is None and name == "top_p":
            continue
        expected = f"a number of at least {low}" if high is None else f"a number above {low}, at most {high}"
        if isinstance(value, bool) or not isinstance(value, int | float):
            _checks.bad_type(name, expected, _checks.describe(value))
        if not value >= low or value == float("inf") or (high is not None and not low < value <= high):
            _checks.bad_value(name, expected, str(value))
    return temperature, None if top_k is None else _checks.integer("top_k", top_k, at_least=1), top_p


def _drawn(key: Any, a: jax.Array, temperature: float | int, top_k: int | None, top_p: float | int | None) -> jax.Array:
    a = a.astype(_precision.accumulator(a.dtype))  # in 16 bits what is rare would never come
    bad = jnp.any(jnp.isnan(a), -1)
    if temperature == 0:
        return jnp.where(bad, -1, jnp.argmax(a, -1))
    a = a / temperature
    if top_k is not None:
        a = jnp.where(a < lax.top_k(a, top_k)[0][..., -1:], -jnp.inf, a)
    if top_p is not None:
        ordered = jnp.flip(jnp.sort(a, -1), -1)
        p = jax.nn.softmax(ordered, -1)
        before = jnp.cumsum(p, -1) - p  # of all that are likelier
        least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), -1, keepdims=True)
        a = jnp.where(a < least, -jnp.inf, a)
    return jnp.where(bad, -1, jax.random.categorical(key, a, -1))


def sample(
    key: PRNGKeyArray,
    step: Step,
    carry: PyTree[ArrayLike],
    first: PyTree[ArrayLike],
    length: int,
    *,
    temperature: float | int = 1.0,
    top_k: int | None = None,
    top_p: float | int | None = None,
    draw: Draw | None = None,
) -> tuple[PyTree[Array], PyTree[Array]]:
    r"""A sequence from a model: $x_t \sim P(x_t \mid x_{<t})$, by its step function, in one loop under jit.

    Args:
        key: of the random numbers; step t takes `fold_in(key, t)`.
        step: `(carry, x) -> (carry, a)`: a cell with its embedding before and its output layer behind, of any library.
        carry: the state so far: zeros, or what reading a prompt has left.
        first: x_{-1}, what the first step reads: the last value of the prompt. One for each sequence of a batch.
        length: how many values.
        temperature: as in `draw`.
        top_k: as in `draw`.
        top_p: as in `draw`.
        draw: `(key, a) -> x` in place of that: how x comes from what `step` gives, for densities for instance.

    Returns:
        `(carry, xs)`, xs `(length, *batch)`.

    Raises:
        TypeError: a step that is no function, or whose carry changes its type (as `lax.scan` says); a `first` of
            another type than what is drawn; `draw` beside one of the options that it replaces.
        ValueError: options as in `draw`; a length below 0.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxseq import autoregressive
        >>> table = jnp.log(jnp.array([[0.1, 0.9], [0.9, 0.1]]))  # a chain that mostly alternates
        >>> step = lambda s, x: (s, table[x])
        >>> _, xs = autoregressive.sample(jax.random.key(0), step, None, jnp.array(0), 6, temperature=0)
        >>> xs.tolist()
        [1, 0, 1, 0, 1, 0]

    Reference:
        A. Graves, Generating sequences with recurrent neural networks (2013), section 2.
    """
    length, pick = _checks.integer("length", length, at_least=0), _chooser(step, temperature, top_k, top_p, draw)
    first = _as_drawn(step, pick, key, carry, first)

    def body(state: Any, t: jax.Array) -> Any:
        carry, x = state
        carry, a = step(carry, x)
        x = pick(jax.random.fold_in(key, t), a)
        return (carry, x), x

    (carry, _), xs = lax.scan(body, (carry, first), jnp.arange(length))
    return carry, xs


def stream(
    key: PRNGKeyArray,
    step: Step,
    carry: PyTree[ArrayLike],
    first: PyTree[ArrayLike],
    *,
    temperature: float | int = 1.0,
    top_k: int | None = None,
    top_p: float | int | None = None,
    draw: Draw | None = None,
) -> Iterator[PyTree[Array]]:
    """The values of `sample` one by one, as they come, without end: the same for the same key.

    Args:
        key: as in `sample`.
        step: as in `sample`; it is compiled once.
        carry: as in `sample`.
        first: as in `sample`.
        temperature: as in `draw`.
        top_k: as in `draw`.
        top_p: as in `draw`.
        draw: as in `sample`.

    Returns:
        an iterator over x_0, x_1, ...

    Raises:
        TypeError: as `sample`.
        ValueError: as `sample`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from itertools import islice
        >>> from jaxseq import autoregressive
        >>> table = jnp.log(jnp.array([[0.1, 0.9], [0.9, 0.1]]))
        >>> values = autoregressive.stream(jax.random.key(0), lambda s, x: (s, table[x]), None, jnp.array(0), top_k=1)
        >>> [int(x) for x in islice(values, 4)]
        [1, 0, 1, 0]

    Reference:
        A. Graves, Generating sequences with recurrent neural networks (2013), section 2.
    """
    pick = _chooser(step, temperature, top_k, top_p, draw)
    first = _as_drawn(step, pick, key, carry, first)

    @jax.jit
    def next_one(carry: Any, x: Any, t: Any) -> Any:
        carry, a = step(carry, x)
        return carry, pick(jax.random.fold_in(key, t), a)

    def values(carry: Any, x: Any) -> Iterator[Any]:
        t = 0
        while True:
            carry, x = next_one(carry, x, t)
            yield x
            t += 1

    return values(carry, first)


def _chooser(step: Any, temperature: Any, top_k: Any, top_p: Any, of_user: Draw | None) -> Draw:
    if not callable(step):
        _checks.bad_type("step", "a function (carry, x) -> (carry, logits)", _checks.describe(step))
    if of_user is None:
        _options(temperature, top_k, top_p)
        return partial(draw, temperature=temperature, top_k=top_k, top_p=top_p)
    if not callable(of_user):
        _checks.bad_type("draw", "a function (key, a) -> x", _checks.describe(of_user))
    if (temperature, top_k, top_p) != (1.0, None, None):
        _checks.bad_type("draw", "None beside temperature, top_k or top_p", _checks.describe(of_user))
    return of_user


def _as_drawn(step: Step, pick: Draw, key: Any, carry: Any, first: Any) -> Any:
    """`first` in the dtype of what is drawn. Shapes, and the carry of the step, have to be right already."""
    drawn = jax.eval_shape(lambda key, s, x: pick(key, step(s, x)[1]), key, carry, first)
    shapes = lambda tree: jax.tree.map(lambda a: tuple(jnp.shape(a)), tree)  # noqa: E731
    if jax.tree.structure(first) != jax.tree.structure(drawn) or shapes(first) != shapes(drawn):
        _checks.bad_type("first", f"{shapes(drawn)}, the shape of what is drawn", str(shapes(first)))
    kinds = (jnp.integer, jnp.floating)
    for a, like in zip(jax.tree.leaves(first), jax.tree.leaves(drawn), strict=True):
        if not all(jnp.issubdtype(jnp.result_type(a), kind) == jnp.issubdtype(like.dtype, kind) for kind in kinds):
            _checks.bad_type("first", f"{like.dtype}, the dtype of what is drawn", _checks.describe(a))
    first = jax.tree.map(lambda a, like: jnp.asarray(a, like.dtype), first, drawn)
    one = lambda s, _: (step(s, first)[0], None)  # noqa: E731
    jax.eval_shape(lambda s: lax.scan(one, s, None, 1), carry)  # a carry that changes its type is told by lax
    return first
