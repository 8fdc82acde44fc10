"""Compositions of layers: `bidirectional` and `stack`.

A layer is any function with the signature of a recurrence, `(params, carry, xs, **time) -> (carry, ys)`: `lstm`,
`partial(conv_lstm, stride=2)`, `partial(bidirectional, gru)`. A `Cell` stands for `partial(recurrence, cell)`. The
parameters and carries of several layers are sequences of those of one layer, plain pytrees.

Masks of `stack`. Layer i of L layers draws booleans with these keys, where j counts the draws of the layer, first those
of recurrent dropout and then those of zoneout. `jaxseq.reference` implements this rule separately.

    option               key                               draws                                   probability of True
    dropout, i >= 1      fold_in(key, i)                   one, of the shape of its input          1 - dropout
    recurrent dropout    fold_in(fold_in(key, L + i), j)   one per state, of the shape of its h    1 - recurrent_dropout
    zoneout              fold_in(fold_in(key, L + i), j)   one per leaf of the carry, and step     zoneout

True keeps the element; zoneout keeps its previous value.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import Any, Unpack, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxseq import _checks, _time
from jaxseq._any_cell import recurrence
from jaxseq._op import op, with_hints
from jaxseq._recurrence import AnyCell, Cell, LinearCell
from jaxseq._recurrence._arguments import check_params, output_size
from jaxseq._time_options import Options, TimeOptions, with_defaults
from jaxseq._types import AnyArray
from jaxseq._zero_state import cell_of

Layer = Callable[..., tuple[PyTree, jax.Array]]
Init = Callable[..., PyTree]


@op
def bidirectional(
    layer: Layer | Cell | LinearCell | Sequence[Layer | Cell | LinearCell],
    params: Sequence[PyTree],
    carry: Sequence[PyTree] | None,
    xs: Float[AnyArray, "*time_batch_and_space D"] | tuple[PyTree, PyTree],
    **time: Unpack[TimeOptions],
) -> tuple[tuple[PyTree, PyTree], Float[Array, "*time_batch_and_outputs H"]]:
    r"""Process a sequence in both directions and concatenate the outputs of each step.

    $$y_t = [\overrightarrow{h}_t,\; \overleftarrow{h}_t]$$

    With `lengths`, the backward direction of each sequence starts at its last valid step. `reverse` must be False.
    `recurrent_dropout_mask`, `reset_state` and `zoneout` are pairs, with one entry for each direction; `zoneout` may be
    one number for both.

    Args:
        layer: the layer for both directions, or a pair (forward, backward): functions, or cells (`jaxseq.Cell`).
        params: the pair of parameters, (forward, backward).
        carry: the pair of initial states. None in place of a state, or of the pair, is zeros.
        xs: the sequence, as the layer takes it; with side inputs, the pair.
        **time: time options, `jaxseq.TimeOptions`.

    Returns:
        `(carries, ys)`: the pair of final states, where that of the backward direction is the state after step 0, and
        the outputs of both directions, concatenated along the last axis, forward first.

    Raises:
        TypeError: if `layer` is not a layer, or a layer rejects an argument.
        ValueError: if an argument is not a pair, if `reverse` is True, or if a layer rejects an argument.

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
        _checks.bad_value("reverse", "False, since `bidirectional` processes both directions", "True")
    layers = _layers("layer", layer, 2)
    states = _sequence_of("carry", [None, None] if carry is None else carry, 2)
    ends, ys = [], []
    zoneout = time.get("zoneout")
    zoneout = (zoneout, zoneout) if isinstance(zoneout, int | float | np.floating) else zoneout
    given = {option: time.get(option) for option in ("recurrent_dropout_mask", "reset_state")} | {"zoneout": zoneout}
    pairs = {option: _sequence_of(option, value, 2) for option, value in given.items() if value is not None}
    for i, (f, p, state) in enumerate(zip(layers, _sequence_of("params", params, 2), states, strict=True)):
        options = {**time, "reverse": i == 1, **{option: pair[i] for option, pair in pairs.items()}}
        with _note_on_errors(f"in the {'backward' if i else 'forward'} direction of jaxseq.bidirectional"):
            end, y = f(p, state, xs, **options)
        ends.append(end)
        ys.append(y)
    return (ends[0], ends[1]), jnp.concatenate(ys, -1)


@op
def stack(
    layer: Layer | Cell | LinearCell | Sequence[Layer | Cell | LinearCell],
    params: Sequence[PyTree],
    carry: Sequence[PyTree] | None,
    xs: Float[AnyArray, "*time_batch_and_space D"] | tuple[PyTree, PyTree],
    *,
    residual: bool = False,
    dropout: float | int = 0.0,
    recurrent_dropout: float | int = 0.0,
    key: PRNGKeyArray | None = None,
    **time: Unpack[TimeOptions],
) -> tuple[tuple[PyTree, ...], Float[Array, "*time_batch_and_outputs H"]]:
    r"""Apply layers in sequence: the input of each layer is the output of the previous one.

    $$y^{(0)} = x, \qquad y^{(l)} = \mathrm{layer}_l(y^{(l-1)}) \;[\, + \; y^{(l-1)}\,], \qquad
    y^{(l-1)} \to \frac{m \odot y^{(l-1)}}{1 - p}$$

    The last formula is dropout, applied between layers: each element of $m$ is one with probability 1 - p, else zero.

    All layers get the same time options, but `reset_state` is a sequence with one for each layer, and `zoneout` is a
    number. With a `key`, it is the probability that an element of the state keeps its value, drawn for each layer, step
    and element. Without a key, it is the weight of the previous state, which is the mean.

    Args:
        layer: the layer at every position, or a sequence of layers, one for each entry of `params`: functions, or cells
            (`jaxseq.Cell`).
        params: the parameters, from the first layer to the last.
        carry: the initial states. None in place of a state, or of the sequence, is zeros.
        xs: the sequence, as the first layer takes it; with side inputs, the pair.
        residual: if True, add the input of each layer to its output. Both have the same shape.
        dropout: p, the probability that an element between layers is set to zero; 0 for evaluation.
        recurrent_dropout: the probability that an element of h is set to zero before the recurrent map, drawn for each
            layer, with the same mask at every step; 0 for evaluation.
        key: a JAX random key; required with dropout.
        **time: time options, `jaxseq.TimeOptions`.

    Returns:
        `(carries, ys)`: the final states, one for each layer, and the outputs of the last layer.

    Raises:
        TypeError: if `layer` is not a layer, or a layer rejects an argument.
        ValueError: if the numbers of layers, parameters and states differ, if a rate is outside [0, 1), if `key` is
            missing with dropout, if `residual` is True and a layer has another output size than input size, or if a
            layer rejects an argument. A note names the layer.

    Example:
        >>> import jax, jax.numpy as jnp, jaxseq
        >>> keys = jax.random.split(jax.random.key(0), 3)
        >>> params = [jaxseq.gru_init(keys[0], 3, 5), jaxseq.gru_init(keys[1], 5, 4)]
        >>> carries, ys = jaxseq.stack(jaxseq.gru, params, None, jnp.ones((7, 2, 3)), dropout=0.1, key=keys[2])
        >>> ys.shape
        (7, 2, 4)

    Reference:
        A. Graves, A. Mohamed and G. Hinton, Speech recognition with deep recurrent neural networks (2013), section 2.
        Dropout between layers: W. Zaremba, I. Sutskever and O. Vinyals, Recurrent neural network regularization (2014).
        Recurrent dropout: Y. Gal and Z. Ghahramani, A theoretically grounded application of dropout in recurrent neural
        networks (2016). Zoneout: D. Krueger et al., Zoneout (2017).
    """
    residual, rate = _checks.boolean("residual", residual), _checks.rate("dropout", dropout)
    recurrent = _checks.rate("recurrent_dropout", recurrent_dropout)
    fresh = time.pop("reset_state", None)
    of_states: TimeOptions = {"return_states": time.pop("return_states")} if "return_states" in time else {}
    zoneout = time.pop("zoneout", None)
    zoneout = 0.0 if zoneout is None else _checks.rate("zoneout", zoneout)
    _checks.key("key", key)
    if (rate or recurrent) and key is None:
        _checks.bad_value("key", "a JAX random key, since a dropout rate is not zero", "None")
    if not isinstance(params, list | tuple) or hasattr(params, "_fields") or not params:
        _checks.bad_type("params", "a sequence with the parameters of each layer", _checks.describe(params))
    number = len(params)
    layers = _layers("layer", layer, number)
    states = _sequence_of("carry", [None] * number if carry is None else carry, number)
    resets_to = None if fresh is None else _sequence_of("reset_state", fresh, number)
    ends = []
    y: Any = _checks.converted(xs)  # then the outputs of the layer before
    for i, (f, p, state) in enumerate(zip(layers, params, states, strict=True)):
        if i and rate and key is not None:
            kept = bernoulli(jax.random.fold_in(key, i), 1 - rate, y.shape)
            y = jnp.where(kept, y / (1 - rate), jnp.zeros((), y.dtype))
        with _note_on_errors(f"in layer {i} of jaxseq.stack, counted from 0"):
            masks = {}
            if recurrent or zoneout:
                shapes = jax.eval_shape(lambda f=f, p=p, state=state, y=y: f(p, state, y, **time)[0])
                layer_key = None if key is None else jax.random.fold_in(key, number + i)
                axis = with_defaults(time).time_axis % main_input(y).ndim
                masks = dropout_masks(
                    layer_key, shapes, main_input(y), axis, recurrent_dropout=recurrent, zoneout=zoneout
                )
            if resets_to is not None:
                masks["reset_state"] = resets_to[i]
            end, out = f(p, state, y, **time, **masks, **of_states)
            if residual and out.shape != main_input(y).shape:
                expected = f"False, or layers with outputs of the shape of their inputs, {main_input(y).shape}"
                _checks.bad_value("residual", expected, f"True and outputs {out.shape}")
        shortcut = y if i or not residual else zero_padded_steps(main_input(y), time)  # ys is zero in the padding
        y = out + shortcut if residual else out
        ends.append(end)
    return tuple(ends), cast(jax.Array, y)


@with_hints
def bidirectional_init(
    init: Init | Sequence[Init], key: PRNGKeyArray, input_size: int, hidden_size: int, **options: object
) -> tuple[PyTree, PyTree]:
    """Initialize `bidirectional`: the parameters of both directions.

    Args:
        init: the initializer of a direction, such as `lstm_init`, or a pair (forward, backward). It is called as
            `init(key, input_size, hidden_size, **options)`.
        key: a JAX random key.
        input_size: D.
        hidden_size: H of each direction; the outputs have 2 H features.
        **options: options of `init`, such as `dtype`.

    Returns:
        The pair of parameters (forward, backward).

    Raises:
        TypeError: if `init` is not a function or a pair of functions, or rejects an argument.
        ValueError: if `init` rejects an argument.

    Example:
        >>> import jax, jax.numpy as jnp, jaxseq
        >>> params = jaxseq.bidirectional_init(jaxseq.gru_init, jax.random.key(0), 3, 5)
        >>> carries, ys = jaxseq.bidirectional(jaxseq.gru, params, None, jnp.ones((7, 2, 3)))
        >>> ys.shape
        (7, 2, 10)

    Reference:
        M. Schuster and K. K. Paliwal, Bidirectional recurrent neural networks (1997).
    """
    inits = _inits(init, 2)
    first, second = (
        f(k, input_size, hidden_size, **options) for f, k in zip(inits, jax.random.split(key), strict=True)
    )
    return first, second


@with_hints
def stack_init(
    init: Init | Sequence[Init], key: PRNGKeyArray, input_size: int, hidden_sizes: Sequence[PyTree], **options: object
) -> list[PyTree]:
    """Initialize `stack`: the parameters of each layer, whose input is the output of the layer before.

    Args:
        init: the initializer of every layer, such as `lstm_init` or `partial(bidirectional_init, gru_init)`, or a
            sequence of one for each layer. It is called as `init(key, input_size, hidden_size, **options)`.
        key: a JAX random key.
        input_size: D of the first layer.
        hidden_sizes: H of each layer.
        **options: options of `init`, such as `dtype`.

    Returns:
        The list of parameters, from the first layer to the last.

    Raises:
        TypeError: if `hidden_sizes` is not a sequence, `init` is not a function, or rejects an argument.
        ValueError: if there is no layer, or `init` rejects an argument.

    Example:
        >>> import jax, jax.numpy as jnp, jaxseq
        >>> from functools import partial
        >>> both = partial(jaxseq.bidirectional_init, jaxseq.gru_init)
        >>> params = jaxseq.stack_init(both, jax.random.key(0), 3, [5, 4])
        >>> layer = partial(jaxseq.bidirectional, jaxseq.gru)
        >>> carries, ys = jaxseq.stack(layer, params, None, jnp.ones((7, 2, 3)))
        >>> ys.shape
        (7, 2, 8)

    Reference:
        A. Graves, A. Mohamed and G. Hinton, Speech recognition with deep recurrent neural networks (2013), section 2.
    """
    if not isinstance(hidden_sizes, Sequence | np.ndarray) or isinstance(hidden_sizes, str):
        _checks.bad_type("hidden_sizes", "a sequence with the size of each layer", _checks.describe(hidden_sizes))
    sizes = [*hidden_sizes]
    if not sizes:
        _checks.bad_value("hidden_sizes", "at least one layer", "none")
    inits = _inits(init, len(sizes))
    params, size = [], input_size
    for f, k, hidden_size in zip(inits, jax.random.split(key, len(inits)), sizes, strict=True):
        params.append(f(k, size, hidden_size, **options))
        size = _output_size(params[-1], hidden_size)
    return params


def _output_size(params: PyTree, hidden_size: PyTree) -> int:
    """Return the number of output features of a layer; that of a cell that is not of jaxseq is its hidden size.

    A list has the layers of a stack, as `stack_init` returns them, and a tuple the directions of `bidirectional_init`.
    """
    if isinstance(params, list):
        return _output_size(params[-1], hidden_size)
    if isinstance(params, tuple) and not hasattr(params, "_fields"):
        return sum(_output_size(p, hidden_size) for p in params)
    cell = cell_of(params)
    return hidden_size if cell is None else output_size(cell, check_params(cell, params))


def bernoulli(key: PRNGKeyArray, p: float | int, shape: tuple[int, ...]) -> jax.Array:
    """Draw booleans that are True with probability `p`.

    They are drawn in float32, so that masks do not change with `jax_enable_x64`.
    """
    return jax.random.bernoulli(key, jnp.float32(p), shape)


def dropout_masks(
    key: PRNGKeyArray | None,
    carry: PyTree,
    xs: AnyArray,
    axis: int,
    *,
    recurrent_dropout: float | int,
    zoneout: float | int,
) -> dict[str, PyTree]:
    """Draw `recurrent_dropout_mask` and `zoneout` of one layer, for a carry of shapes, with time at `axis` of `xs`.

    The result has no entry for a rate of zero. Without a key, zoneout is its rate.
    """
    keys = (jax.random.fold_in(key, i) for i in count() if key is not None)

    def draw_dropout_mask(h: PyTree) -> jax.Array:
        kept = bernoulli(next(keys), 1 - recurrent_dropout, h.shape)
        return kept.astype(h.dtype) / (1 - recurrent_dropout)

    def draw_zoneout(a: PyTree) -> PyTree:
        shape = (*a.shape[:axis], xs.shape[axis], *a.shape[axis:])
        return zoneout if key is None else bernoulli(next(keys), zoneout, shape)

    def map_states(f: Callable[[PyTree], PyTree], state: PyTree) -> PyTree:
        """Apply `f` to every state in a carry; a plain tuple is a sequence of states."""
        if isinstance(state, tuple) and not hasattr(state, "_fields"):
            return tuple(map_states(f, part) for part in state)
        return f(state)

    found = {}
    if recurrent_dropout:
        found["recurrent_dropout_mask"] = map_states(lambda state: draw_dropout_mask(jax.tree.leaves(state)[0]), carry)
    if zoneout:
        found["zoneout"] = map_states(lambda state: jax.tree.map(draw_zoneout, state), carry)
    return found


def main_input(xs: PyTree) -> AnyArray:
    """Return the input of the first layer without side inputs, or `xs`."""
    return _checks.converted(xs[0] if isinstance(xs, tuple | list) else xs)


def zero_padded_steps(xs: AnyArray, time: TimeOptions) -> AnyArray:
    """Return `xs` with zeros in the padding of each sequence."""
    given = with_defaults(time)
    if given.lengths is None:
        return xs
    axis = given.time_axis % xs.ndim
    steps = xs.shape[axis]
    lengths = _checks.lengths("lengths", given.lengths, _checks.converted(given.lengths).shape, steps)
    valid, _, _ = _time.masks(Options(axis=axis), steps, lengths, None)
    return _time.zero_padding(valid, xs)


def _layers(name: str, value: object, count: int) -> list[Layer]:
    """Return `count` layers, given one for all of them or a sequence of `count`. A cell becomes its recurrence."""
    one = isinstance(value, AnyCell)
    values = [value] * count if one or callable(value) else _sequence_of(name, value, count)
    layers = [partial(recurrence, layer) if isinstance(layer, AnyCell) else layer for layer in values]
    for layer in layers:
        suffix = next((suffix for suffix in ("_cell", "_init") if _name(layer).endswith(suffix)), None)
        if suffix and _is_of_jaxseq(layer):
            right = _name(layer).removesuffix(suffix)
            _checks.bad_type(name, f"a function of a sequence, such as {right}", f"{_name(layer)}, which is not one")
    return _functions(name, layers, count, "a function (params, carry, xs, **time) -> (carry, ys), or a jaxseq.Cell")


def _inits(value: object, count: int) -> list[Init]:
    """Return `count` initializers, given one for all of them or a sequence of `count`."""
    expected = "a function (key, input_size, hidden_size) -> params"
    for one in value if isinstance(value, list | tuple) and not isinstance(value, AnyCell) else [value]:
        if isinstance(one, AnyCell) or (_is_of_jaxseq(one) and not _name(one).endswith("_init")):
            name = one.name if isinstance(one, AnyCell) else _name(one)
            _checks.bad_type("init", f"an initializer, such as {name}_init", name)
    return _functions("init", value, count, expected)


def _name(function: object) -> str:
    """Return the name of a function, also within `functools.partial`."""
    return getattr(function.func if isinstance(function, partial) else function, "__name__", "")


def _is_of_jaxseq(function: object) -> bool:
    module = getattr(function.func if isinstance(function, partial) else function, "__module__", None) or ""
    return module.startswith("jaxseq.")


def _functions(name: str, value: object, count: int, expected: str) -> list[Callable[..., PyTree]]:
    """Return `count` functions, given one for all of them or a sequence of `count`."""
    functions = [value] * count if callable(value) else _sequence_of(name, value, count)
    for function in functions:
        if not callable(function):
            _checks.bad_type(name, expected, _checks.describe(function))
    return cast(list[Callable[..., PyTree]], [*functions])


@contextmanager
def _note_on_errors(note: str) -> Iterator[None]:
    """Add a note to errors about the arguments of a layer."""
    try:
        yield
    except (TypeError, ValueError) as error:
        error.add_note(note)
        raise


def _sequence_of(name: str, value: object, count: int) -> Sequence[PyTree]:
    """Return `value` if it is a list or tuple of `count` entries; a NamedTuple, the parameters of one layer, is not."""
    if not isinstance(value, list | tuple) or hasattr(value, "_fields"):
        _checks.bad_type(name, f"a sequence of {count}, one for each layer", _checks.describe(value))
    if len(value) != count:
        _checks.bad_value(name, f"a sequence of {count}, one for each layer", f"{len(value)}")
    return value
