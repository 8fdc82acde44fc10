r"""Sampling of sequences from a model, one value at a time.

    s_t, a_t = step(s_{t-1}, x_{t-1}),      x_t ~ softmax(a_t / temperature), restricted by top_k and top_p

The state summarizes the past, so the cost of a value does not depend on its position in the sequence.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Integer, PRNGKeyArray, PyTree

from jaxseq import _checks, _precision
from jaxseq._op import with_hints
from jaxseq._types import AnyArray
from jaxseq.autoregressive._prompt import (
    Draw,
    Reading,
    Step,
    are_tokens,
    counts,
    has_fewer_arrays,
    none_stands_for_arrays,
    read_prompt,
    require_arrays,
    select,
)


@with_hints
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


@with_hints
def sample(
    key: PRNGKeyArray,
    step: Step,
    carry: PyTree[ArrayLike],
    first: PyTree[ArrayLike],
    length: int,
    *,
    prompt: PyTree[ArrayLike] = None,
    prompt_lengths: Integer[AnyArray, "*batch"] | None = None,
    stop: int | Sequence[int] | None = None,
    lengths: Integer[AnyArray, "*batch"] | None = None,
    temperature: float | int = 1.0,
    top_k: int | None = None,
    top_p: float | int | None = None,
    draw: Draw | None = None,
) -> tuple[PyTree[Array], PyTree[Array]]:
    r"""Sample a sequence from a model, $x_t \sim P(x_t \mid x_{<t})$, in one `jax.lax.scan`.

    With `stop` or `lengths`, each sequence of a batch has its own end. Its carry is that of its end, and `xs` is -1
    after it (0 if values are not signed integers), so `(xs >= 0).sum(0)` are the lengths of sequences of tokens. With
    `stop`, the loop ends as soon as all sequences have ended.

    Args:
        key: a JAX random key. Step t uses `fold_in(key, t)`.
        step: `(carry, x) -> (carry, a)`, for example an embedding, a cell and an output layer, from any library.
        carry: the initial state: zeros, or the state after the values before `first`. None if `step` accepts it, as the
            cells of jaxseq do. With `prompt_lengths`, `stop` or `lengths`, its arrays start with the batch axes.
        first: x_{-1}, the input of the first step, such as a token for the start or the last value that was read. One
            for each sequence of a batch. None if there is a `prompt`, whose first value is then the first input.
        length: the number of values.
        prompt: `(P, *batch)`, values that `step` reads after `first` and before the sample begins.
        prompt_lengths: the number of values of each prompt, from 1 to P; None for P.
        stop: a token, or several, after which a sequence ends. The token itself is part of the sequence.
        lengths: the largest number of values of each sequence, from 0; None for `length`.
        temperature: as in `draw`.
        top_k: as in `draw`.
        top_p: as in `draw`.
        draw: `(key, a) -> x`, replaces `autoregressive.draw` and its options, for example to sample from a density.

    Returns:
        `(carry, xs)`, with xs `(length, *batch)`: the values after the prompt.

    Raises:
        TypeError: if `step` is not a function, or its carry changes type (raised by `lax.scan`); if the type of `first`
            or `prompt` is not that of a drawn value; if values are not tokens and `stop` is passed; or if both `draw`
            and an option it replaces are passed.
        ValueError: if an option is out of range as in `draw`, `length` is negative, both `first` and `prompt` are None,
            or lengths have another shape than the batch or are out of range.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxseq import autoregressive
        >>> table = jnp.log(jnp.array([[0.1, 0.9], [0.9, 0.1]]))  # a Markov chain that mostly alternates
        >>> step = lambda s, x: (s, table[x])
        >>> _, xs = autoregressive.sample(jax.random.key(0), step, None, jnp.array(0), 6, temperature=0)
        >>> xs.tolist()
        [1, 0, 1, 0, 1, 0]
        >>> prompt = jnp.array([0, 0, 1])
        >>> _, xs = autoregressive.sample(jax.random.key(0), step, None, None, 6, prompt=prompt, stop=1, temperature=0)
        >>> xs.tolist()
        [0, 1, -1, -1, -1, -1]

    Reference:
        A. Graves, Generating sequences with recurrent neural networks (2013), section 2.
    """
    _checks.key("key", key)
    length, pick = _checks.integer("length", length, at_least=0), _draw_function(step, temperature, top_k, top_p, draw)
    carry, first = read_prompt(Reading(step, pick, key), carry, first, prompt, prompt_lengths)
    if lengths is not None:
        require_arrays("lengths", step, carry, first)
    ends = _ends(first, stop, lengths)
    if length == 0:
        return jax.tree.map(jnp.asarray, carry), jax.tree.map(lambda a: jnp.zeros((0, *a.shape), a.dtype), first)

    def next_value(state: _State, t: jax.Array | int) -> tuple[_State, PyTree]:
        found, a = step(state.carry, state.x)
        x = pick(jax.random.fold_in(key, t), a)
        if ends is None:
            return _State(found, x, state.ended), x
        keep = partial(select, state.ended)
        out = keep(jax.tree.map(lambda a: jnp.full_like(a, _after_the_end(a)), x), x)
        carry = found if has_fewer_arrays(state.carry, found) else keep(state.carry, found)
        return _State(carry, keep(state.x, x), state.ended | ends(x, t)), out

    start = _State(carry, first, jnp.zeros((), bool) if ends is None else ends(first, -1))
    if stop is None and not none_stands_for_arrays(step, carry, first):
        last, xs = lax.scan(next_value, start, jnp.arange(length))
        return last.carry, xs
    # After the first step the carry has the structure of the state, and the loop may end early.
    state, x = next_value(start, 0)
    if stop is None:
        state, rest = lax.scan(next_value, state, jnp.arange(1, length))
        return state.carry, jax.tree.map(lambda a, rest: jnp.concatenate([a[None], rest]), x, rest)
    xs = jnp.full((length, *x.shape), _after_the_end(x)).at[0].set(x)

    def unfinished(loop: tuple[jax.Array, _State, jax.Array]) -> jax.Array:
        t, state, _ = loop
        return (t < length) & ~jnp.all(state.ended)

    def body(loop: tuple[jax.Array, _State, jax.Array]) -> tuple[jax.Array, _State, jax.Array]:
        t, state, xs = loop
        state, x = next_value(state, t)
        return t + 1, state, xs.at[t].set(x)

    _, state, xs = lax.while_loop(unfinished, body, (jnp.int32(1), state, xs))
    return state.carry, xs


class _State(NamedTuple):
    """What the loop over values carries."""

    carry: PyTree
    x: PyTree  # the last value of each sequence
    ended: jax.Array  # which sequences have ended; a scalar if all of them have `length` values


def _ends(
    first: PyTree[Array], stop: int | Sequence[int] | None, lengths: Integer[AnyArray, "*batch"] | None
) -> Callable[[PyTree, jax.Array | int], jax.Array] | None:
    """Return a function of a value and its step: whether the sequence ends after it. At step -1 there is no value."""
    if stop is None and lengths is None:
        return None
    tokens: list[int] = []
    if stop is not None:
        if not are_tokens(first):
            _checks.bad_type("stop", "None, since values are not tokens", _checks.describe(stop))
        given = stop.ravel() if isinstance(stop, np.ndarray) else stop if isinstance(stop, list | tuple) else [stop]
        tokens = [_checks.integer("stop", token) for token in given]
    most = None
    if lengths is not None:
        most = counts("lengths", lengths, first.shape if are_tokens(first) else None)

    def ends(x: PyTree, t: jax.Array | int) -> jax.Array:
        ended = jnp.zeros(x.shape if most is None else most.shape, bool)
        if tokens and not (isinstance(t, int) and t < 0):
            ended = reduce(jnp.logical_or, (x == token for token in tokens))
        return ended if most is None else ended | (jnp.asarray(t + 1, jnp.int32) >= most)

    return ends


def _after_the_end(x: jax.Array) -> int:
    """Return the value of `xs` after the end of a sequence."""
    return -1 if jnp.issubdtype(x.dtype, jnp.signedinteger) else 0


@with_hints
def stream(
    key: PRNGKeyArray,
    step: Step,
    carry: PyTree[ArrayLike],
    first: PyTree[ArrayLike],
    *,
    prompt: PyTree[ArrayLike] = None,
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
        prompt: as in `sample`. All prompts of a batch have the same length.
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
    _checks.key("key", key)
    pick = _draw_function(step, temperature, top_k, top_p, draw)
    carry, first = read_prompt(Reading(step, pick, key), carry, first, prompt, None)

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
