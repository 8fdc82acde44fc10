"""Layers of layers: both directions, and one on top of the other.

A layer is whatever reads a sequence as every recurrence does, `(params, carry, xs, **time) -> (carry, ys)`: `lstm`,
`partial(recurrence, cell)`, `partial(conv_lstm, stride=2)`, `partial(bidirectional, gru)`. Parameters and carries of
several layers are sequences of those of one, plain pytrees.
"""

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxseq import _checks, _time
from jaxseq._op import op
from jaxseq._time import Options
from jaxseq._time_options import TimeOptions, with_defaults
from jaxseq._types import AnyArray

Layer = Callable[..., tuple[Any, jax.Array]]


@op
def bidirectional(
    layer: Layer | Sequence[Layer],
    params: Sequence[Any],
    carry: Sequence[Any] | None,
    xs: Float[AnyArray, "*time_batch_and_space D"],
    **time: Unpack[TimeOptions],
) -> tuple[tuple[Any, Any], Float[Array, "*time_batch_and_outputs H"]]:
    r"""A sequence read in both directions, the two outputs of a step side by side.

    $$y_t = [\overrightarrow{h}_t,\; \overleftarrow{h}_t]$$

    With `lengths`, the backward direction of each sequence begins at its own last step. `reverse` is refused, and
    `recurrent_dropout_mask` and `zoneout` are pairs, one entry for each direction.

    Args:
        layer: what reads in both directions, or a pair (forwards, backwards).
        params: the pair of parameters, (forwards, backwards).
        carry: the pair of first states, either of them None for zeros; or None for both.
        xs: the sequence, as the layer takes it.
        **time: time options, `jaxseq.TimeOptions`.

    Returns:
        `(carries, ys)`: the pair of last states, that of the backward direction after step 0, and the outputs of both,
        forwards first, along the last axis.

    Raises:
        TypeError: no layer, or an argument that a layer refuses.
        ValueError: not a pair, `reverse`, or an argument that a layer refuses.

    Example:
        >>> import jax, jax.numpy as jnp, jaxseq
        >>> params = [jaxseq.lstm_init(key, 3, 5) for key in jax.random.split(jax.random.key(0))]
        >>> carries, ys = jaxseq.bidirectional(jaxseq.lstm, params, None, jnp.ones((7, 2, 3)))
        >>> ys.shape
        (7, 2, 10)

    Reference:
        M. Schuster and K. K. Paliwal, Bidirectional recurrent neural networks (1997).
    """
    if _checks.boolean("reverse", time.get("reverse", False)):
        _checks.bad_value("reverse", "False: `bidirectional` reads both ways", "True")
    layers = _layers("layer", layer, 2)
    states = _sequence_of("carry", [None, None] if carry is None else carry, 2)
    ends, ys = [], []
    given = {"recurrent_dropout_mask": time.get("recurrent_dropout_mask"), "zoneout": time.get("zoneout")}
    own = {option: _sequence_of(option, value, 2) for option, value in given.items() if value is not None}
    for i, (read, p, state) in enumerate(zip(layers, _sequence_of("params", params, 2), states, strict=True)):
        its = {**time, "reverse": i == 1, **{option: pair[i] for option, pair in own.items()}}
        end, y = read(p, state, xs, **its)
        ends.append(end)
        ys.append(y)
    return (ends[0], ends[1]), jnp.concatenate(ys, -1)


@op
def stack(
    layer: Layer | Sequence[Layer],
    params: Sequence[Any],
    carry: Sequence[Any] | None,
    xs: Float[AnyArray, "*time_batch_and_space D"],
    *,
    residual: bool = False,
    dropout: float | int = 0.0,
    recurrent_dropout: float | int = 0.0,
    key: PRNGKeyArray | None = None,
    **time: Unpack[TimeOptions],
) -> tuple[tuple[Any, ...], Float[Array, "*time_batch_and_outputs H"]]:
    r"""Layers one on top of the other: each reads what the one below it has put out.

    $$y^{(0)} = x, \qquad y^{(l)} = \mathrm{layer}_l(y^{(l-1)}) \;[\, + \; y^{(l-1)}\,], \qquad
    y^{(l-1)} \to \frac{m \odot y^{(l-1)}}{1 - p}$$

    the last between layers, with $m$ one with probability 1 - p, else zero, drawn for each number.

    All layers get the same time options. `zoneout` is a number here: with a `key`, the probability that a number of the
    state keeps its value, drawn for each layer, step and number; without one, the weight of the previous value, which
    is the mean.

    Args:
        layer: what every layer is, or a sequence of as many as there are parameters.
        params: the parameters, from the first layer to the last.
        carry: the first states, any of them None for zeros; or None for all.
        xs: the sequence, as the first layer takes it.
        residual: whether what a layer reads is added to what it puts out, where the two are of one shape.
        dropout: p, the part of the numbers between layers that is set to zero; 0 when you do not train.
        recurrent_dropout: the part of h that is set to zero on its way into the recurrent map, drawn for each layer and
            the same in all steps; 0 when you do not train.
        key: a JAX random key, where something is drawn.
        **time: time options, `jaxseq.TimeOptions`.

    Returns:
        `(carries, ys)`: the last states, one for each layer, and what the last layer puts out.

    Raises:
        TypeError: no layer, or an argument that a layer refuses.
        ValueError: numbers of layers, parameters and states that differ, dropout outside of [0, 1) or without a key, or
            an argument that a layer refuses.

    Example:
        >>> import jax, jax.numpy as jnp, jaxseq
        >>> keys = jax.random.split(jax.random.key(0))
        >>> params = [jaxseq.gru_init(keys[0], 3, 5), jaxseq.gru_init(keys[1], 5, 4)]
        >>> carries, ys = jaxseq.stack(jaxseq.gru, params, None, jnp.ones((7, 2, 3)), dropout=0.1, key=keys[0])
        >>> ys.shape
        (7, 2, 4)

    Reference:
        A. Graves, A. Mohamed and G. Hinton, Speech recognition with deep recurrent neural networks (2013), section 2;
        dropout between layers from W. Zaremba, I. Sutskever and O. Vinyals, Recurrent neural network regularization
        (2014), of the state from Y. Gal and Z. Ghahramani, A theoretically grounded application of dropout in recurrent
        neural networks (2016), zoneout from D. Krueger et al., Zoneout (2017).
    """
    residual, rate = _checks.boolean("residual", residual), _checks.rate("dropout", dropout)
    recurrent = _checks.rate("recurrent_dropout", recurrent_dropout)
    zoneout = time.pop("zoneout", None)
    zoneout = 0.0 if zoneout is None else _checks.rate("zoneout", zoneout)
    if (rate or recurrent) and key is None:
        _checks.bad_value("key", "a JAX random key, since there is dropout", "None")
    if not isinstance(params, list | tuple) or hasattr(params, "_fields") or not params:
        _checks.bad_type("params", "a sequence with the parameters of each layer", _checks.describe(params))
    number = len(params)
    layers = _layers("layer", layer, number)
    states = _sequence_of("carry", [None] * number if carry is None else carry, number)
    ends, y = [], _checks.converted(xs)
    for i, (read, p, state) in enumerate(zip(layers, params, states, strict=True)):
        if i and rate and key is not None:
            kept = bernoulli(jax.random.fold_in(key, i), 1 - rate, y.shape)
            y = jnp.where(kept, y / (1 - rate), jnp.zeros((), y.dtype))
        masks = dropout_masks(
            None if key is None else jax.random.fold_in(key, number + i), read, p, state, y, recurrent, zoneout, time
        )
        end, out = read(p, state, y, **time, **masks)
        below = y if i or not residual else zero_padded_steps(y, time)  # of a layer it is zero there
        y = out + below if residual and out.shape == y.shape else out
        ends.append(end)
    return tuple(ends), y


def bernoulli(key: Any, p: float | int, shape: tuple[int, ...]) -> jax.Array:
    """True with probability p. In float32 whatever the default is: a mask must not change with `jax_enable_x64`."""
    return jax.random.bernoulli(key, jnp.float32(p), shape)


def dropout_masks(
    key: Any,
    read: Layer,
    params: Any,
    carry: Any,
    xs: AnyArray,
    recurrent_dropout: float | int,
    zoneout: float | int,
    time: Any,
) -> dict[str, Any]:
    """`recurrent_dropout_mask` and `zoneout` of one layer, nested as its carry is; nothing without a rate."""
    if not (recurrent_dropout or zoneout):
        return {}
    axis = with_defaults(time).time_axis % xs.ndim
    keys = (jax.random.fold_in(key, i) for i in count())

    def draw_dropout_mask(h: Any) -> jax.Array:
        kept = bernoulli(next(keys), 1 - recurrent_dropout, h.shape)
        return kept.astype(h.dtype) / (1 - recurrent_dropout)

    def draw_zoneout(a: Any) -> Any:
        shape = (*a.shape[:axis], xs.shape[axis], *a.shape[axis:])
        return zoneout if key is None else bernoulli(next(keys), zoneout, shape)

    def each(f: Callable[[Any], Any], state: Any) -> Any:
        """f of every state in a carry: plain tuples are several."""
        if isinstance(state, tuple) and not hasattr(state, "_fields"):
            return tuple(each(f, part) for part in state)
        return f(state)

    state = jax.eval_shape(lambda: read(params, carry, xs, **time)[0])
    found = {}
    if recurrent_dropout:
        found["recurrent_dropout_mask"] = each(lambda state: draw_dropout_mask(jax.tree.leaves(state)[0]), state)
    if zoneout:
        found["zoneout"] = each(lambda state: jax.tree.map(draw_zoneout, state), state)
    return found


def zero_padded_steps(xs: AnyArray, time: Any) -> AnyArray:
    """xs with zeros from each sequence's length on."""
    given = with_defaults(time)
    if given.lengths is None:
        return xs
    axis = given.time_axis % xs.ndim
    steps = xs.shape[axis]
    lengths = _checks.lengths("lengths", given.lengths, _checks.converted(given.lengths).shape, steps)
    valid, _, _ = _time.masks(Options(axis=axis), steps, lengths, None)
    zeroed: jax.Array = _time.zero_padding(valid, xs)
    return zeroed


def _layers(name: str, value: Any, count: int) -> list[Layer]:
    """That many layers, of one for all of them or of as many."""
    layers = [value] * count if callable(value) else _sequence_of(name, value, count)
    for layer in layers:
        if not callable(layer):
            _checks.bad_type(name, "a function (params, carry, xs, **time) -> (carry, ys)", _checks.describe(layer))
    return list(layers)


def _sequence_of(name: str, value: Any, count: int) -> Sequence[Any]:
    """A list or tuple of that many; the NamedTuple of one layer is none."""
    if not isinstance(value, list | tuple) or hasattr(value, "_fields"):
        _checks.bad_type(name, f"a sequence of {count}, one for each layer", _checks.describe(value))
    if len(value) != count:
        _checks.bad_value(name, f"a sequence of {count}, one for each layer", f"{len(value)}")
    return value
