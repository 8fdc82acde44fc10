r"""Sampling of sequences from a model, one value at a time.

    s_t, a_t = step(s_{t-1}, x_{t-1}),      x_t ~ softmax(a_t / temperature), restricted by top_k and top_p

The state summarizes the past, so the cost of a value does not depend on its position in the sequence.
"""

from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from jaxseq import _checks, _precision
from jaxseq._types import AnyArray

Step = Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]  # (carry, x) -> (carry, a)
Draw = Callable[[PRNGKeyArray, PyTree], PyTree]  # (key, a) -> x


def draw(
    key: PRNGKeyArray,
    logits: Float[AnyArray, "*batch V"],
    *,
    temperature: float | int = 1.0,
    top_k: int | None = None,
    top_p: float | int | None = None,
) -> Int[Array, "*batch"]:
    r"""Draw a value from $\operatorname{softmax}(a / \text{temperature})$, restricted to the most likely values.

    Args:
        key: a JAX random key.
        logits: a.
        temperature: less than 1 favors likely values, more than 1 makes the distribution more uniform. 0 returns the
            most likely value.
        top_k: draw from the k most likely values and any that tie with the last of them. None is all values.
        top_p: draw from the fewest most likely values whose total probability reaches `top_p` (nucleus sampling), at
            least one. It applies after `top_k`. None is all values.

    Returns:
        `(*batch,)` integers, -1 where the logits contain NaN.

    Raises:
        TypeError: if `logits` is not a float array, or an option has the wrong type.
        ValueError: if `temperature` is negative, `top_k` is not from 1 to V, or `top_p` is not in (0, 1].

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
    temperature, top_k, top_p = _checked_options(temperature, top_k, top_p)
    if top_k is not None and top_k > a.shape[-1]:
        _checks.bad_value("top_k", f"at most {a.shape[-1]}, the number of values", str(top_k), logits=a)
    return _drawn(key, a, temperature, top_k, top_p)


def _checked_options(
    temperature: float | int, top_k: int | None, top_p: float | int | None
) -> tuple[float | int, int | None, float | int | None]:
    for name, value, low, high in (("temperature", temperature, 0, None), ("top_p", top_p, 0, 1)):
        if value is None and name == "top_p":
            continue
        expected = f"a number >= {low}" if high is None else f"a number > {low} and <= {high}"
        if isinstance(value, bool) or not isinstance(value, int | float):
            _checks.bad_type(name, expected, _checks.describe(value))
        if not value >= low or value == float("inf") or (high is not None and not low < value <= high):
            _checks.bad_value(name, expected, str(value))
    return temperature, None if top_k is None else _checks.integer("top_k", top_k, at_least=1), top_p


def _drawn(
    key: PRNGKeyArray, a: jax.Array, temperature: float | int, top_k: int | None, top_p: float | int | None
) -> jax.Array:
    a = a.astype(_precision.accumulator(a.dtype))  # in 16 bits, rare values would never be drawn
    bad = jnp.any(jnp.isnan(a), -1)
    if temperature == 0:
        return jnp.where(bad, -1, jnp.argmax(a, -1))
    a = a / temperature
    if top_k is not None:
        a = jnp.where(a < lax.top_k(a, top_k)[0][..., -1:], -jnp.inf, a)
    if top_p is not None:
        ordered = jnp.flip(jnp.sort(a, -1), -1)
        p = jax.nn.softmax(ordered, -1)
        before = jnp.cumsum(p, -1) - p  # total probability of all more likely values
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
    r"""Sample a sequence from a model, $x_t \sim P(x_t \mid x_{<t})$, in one `jax.lax.scan`.

    Args:
        key: a JAX random key. Step t uses `fold_in(key, t)`.
        step: `(carry, x) -> (carry, a)`, for example an embedding, a cell and an output layer, from any library.
        carry: the initial state: zeros, or the state after a prompt without its last value. None if `step` accepts it,
            as the cells of jaxseq do.
        first: x_{-1}, the input of the first step, such as the last value of a prompt. One for each sequence of a
            batch.
        length: the number of values.
        temperature: as in `draw`.
        top_k: as in `draw`.
        top_p: as in `draw`.
        draw: `(key, a) -> x`, replaces `autoregressive.draw` and its options, for example to sample from a density.

    Returns:
        `(carry, xs)`, with xs `(length, *batch)`.

    Raises:
        TypeError: if `step` is not a function, or its carry changes type (raised by `lax.scan`); if the type of `first`
            is not that of a drawn value; or if both `draw` and an option it replaces are passed.
        ValueError: if an option is out of range as in `draw`, or `length` is negative.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxseq import autoregressive
        >>> table = jnp.log(jnp.array([[0.1, 0.9], [0.9, 0.1]]))  # a Markov chain that mostly alternates
        >>> step = lambda s, x: (s, table[x])
        >>> _, xs = autoregressive.sample(jax.random.key(0), step, None, jnp.array(0), 6, temperature=0)
        >>> xs.tolist()
        [1, 0, 1, 0, 1, 0]

    Reference:
        A. Graves, Generating sequences with recurrent neural networks (2013), section 2.
    """
    length, pick = _checks.integer("length", length, at_least=0), _draw_function(step, temperature, top_k, top_p, draw)
    first = _as_drawn(step, pick, key, carry, first)

    def body(state: tuple[PyTree, PyTree], t: jax.Array | int) -> tuple[tuple[PyTree, PyTree], PyTree]:
        carry, x = state
        carry, a = step(carry, x)
        x = pick(jax.random.fold_in(key, t), a)
        return (carry, x), x

    if not _none_stands_for_arrays(step, carry, first):
        (carry, _), xs = lax.scan(body, (carry, first), jnp.arange(length))
        return carry, xs
    if length == 0:
        return carry, jax.tree.map(lambda a: jnp.zeros((0, *a.shape), a.dtype), first)
    state, x = body((carry, first), 0)  # after it, the carry has the structure of the state
    (carry, _), xs = lax.scan(body, state, jnp.arange(1, length))
    return carry, jax.tree.map(lambda a, rest: jnp.concatenate([a[None], rest]), x, xs)


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
    """Return an endless iterator over the values of `sample`. The same key gives the same values.

    Args:
        key: as in `sample`.
        step: as in `sample`. It is compiled once.
        carry: as in `sample`.
        first: as in `sample`.
        temperature: as in `draw`.
        top_k: as in `draw`.
        top_p: as in `draw`.
        draw: as in `sample`.

    Returns:
        An iterator over x_0, x_1, ...

    Raises:
        TypeError: as in `sample`.
        ValueError: as in `sample`.

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
    pick = _draw_function(step, temperature, top_k, top_p, draw)
    first = _as_drawn(step, pick, key, carry, first)

    @jax.jit
    def next_value(carry: PyTree, x: PyTree, t: jax.Array | int) -> tuple[PyTree, PyTree]:
        carry, a = step(carry, x)
        return carry, pick(jax.random.fold_in(key, t), a)

    def values(carry: PyTree, x: PyTree) -> Iterator[PyTree]:
        t = 0
        while True:
            carry, x = next_value(carry, x, t)
            yield x
            t += 1

    return values(carry, first)


def _draw_function(
    step: Step, temperature: float | int, top_k: int | None, top_p: float | int | None, custom_draw: Draw | None
) -> Draw:
    if not callable(step):
        _checks.bad_type("step", "a function (carry, x) -> (carry, logits)", _checks.describe(step))
    if custom_draw is None:
        _checked_options(temperature, top_k, top_p)
        return partial(draw, temperature=temperature, top_k=top_k, top_p=top_p)
    if not callable(custom_draw):
        _checks.bad_type("draw", "a function (key, a) -> x", _checks.describe(custom_draw))
    if (temperature, top_k, top_p) != (1.0, None, None):
        _checks.bad_type("draw", "None if temperature, top_k or top_p is passed", _checks.describe(custom_draw))
    return custom_draw


def _none_stands_for_arrays(step: Step, carry: PyTree[ArrayLike], first: PyTree[Array]) -> bool:
    """True if `carry` has a None where the new carry has arrays, as the cells of jaxseq accept."""
    count = lambda tree: len(jax.tree.leaves(tree))  # noqa: E731
    return count(carry) < count(jax.eval_shape(step, carry, first)[0])


def _as_drawn(
    step: Step, pick: Draw, key: PRNGKeyArray, carry: PyTree[ArrayLike], first: PyTree[ArrayLike]
) -> PyTree[Array]:
    """Return `first` in the dtype of a drawn value. Raise an error if its shape, or the carry of `step`, is wrong."""
    drawn = jax.eval_shape(lambda key, s, x: pick(key, step(s, x)[1]), key, carry, first)
    shapes = lambda tree: jax.tree.map(lambda a: tuple(jnp.shape(a)), tree)  # noqa: E731
    if jax.tree.structure(first) != jax.tree.structure(drawn) or shapes(first) != shapes(drawn):
        _checks.bad_type("first", f"{shapes(drawn)}, the shape of a drawn value", str(shapes(first)))
    kinds = (jnp.integer, jnp.floating)
    for a, like in zip(jax.tree.leaves(first), jax.tree.leaves(drawn), strict=True):
        if not all(jnp.issubdtype(jnp.result_type(a), kind) == jnp.issubdtype(like.dtype, kind) for kind in kinds):
            _checks.bad_type("first", f"{like.dtype}, the dtype of a drawn value", _checks.describe(a))
    first = jax.tree.map(lambda a, like: jnp.asarray(a, like.dtype), first, drawn)
    if _none_stands_for_arrays(step, carry, first):
        carry = jax.eval_shape(step, carry, first)[0]
    one = lambda s, _: (step(s, first)[0], None)  # noqa: E731
    jax.eval_shape(lambda s: lax.scan(one, s, None, 1), carry)  # lax raises if the carry changes type
    return first
