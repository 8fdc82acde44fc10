"""Reference implementations of `bidirectional` and `stack`."""

from collections.abc import Callable, Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxseq._time_options import TimeOptions, with_defaults
from jaxseq.reference._time import expand_mask


def bidirectional(
    layer: Callable[..., PyTree] | Sequence[Callable[..., PyTree]],
    params: Sequence[PyTree],
    carry: Sequence[PyTree] | None,
    xs: Float[Array, "*time_batch_and_space D"] | tuple[PyTree, PyTree],
    **time: Unpack[TimeOptions],
) -> tuple[tuple[PyTree, PyTree], Float[Array, "*time_batch_and_outputs H"]]:
    """Reference implementation of `jaxseq.bidirectional`. `layer` is a reference implementation, too."""
    forwards, backwards = (layer, layer) if callable(layer) else layer
    first, second = (None, None) if carry is None else carry
    if isinstance(time.get("zoneout"), int | float | np.floating):
        time["zoneout"] = (time.get("zoneout"),) * 2
    pairs = {
        option: value
        for option in ("recurrent_dropout_mask", "zoneout", "reset_state")
        if (value := time.get(option)) is not None
    }
    time_forward, time_backward = ({**time, **{option: pair[i] for option, pair in pairs.items()}} for i in range(2))
    a, ys = forwards(params[0], first, xs, **time_forward)
    b, zs = backwards(params[1], second, xs, **{**time_backward, "reverse": True})
    return (a, b), jnp.concatenate([ys, zs], -1)


def stack(
    layer: Callable[..., PyTree] | Sequence[Callable[..., PyTree]],
    params: Sequence[PyTree],
    carry: Sequence[PyTree] | None,
    xs: Float[Array, "*time_batch_and_space D"] | tuple[PyTree, PyTree],
    *,
    residual: bool = False,
    dropout: float | int = 0.0,
    recurrent_dropout: float | int = 0.0,
    key: PRNGKeyArray | None = None,
    **time: Unpack[TimeOptions],
) -> tuple[tuple[PyTree, ...], Float[Array, "*time_batch_and_outputs H"]]:
    """Reference implementation of `jaxseq.stack`, with the same random numbers. `layer` is a reference implementation,
    too.
    """
    carries, zoneout = [], time.pop("zoneout", None) or 0.0
    y: Any = xs  # then the outputs of the layer before
    reset_state, return_states = time.pop("reset_state", None), time.pop("return_states", False)
    main = lambda xs: xs[0] if isinstance(xs, tuple) else xs  # noqa: E731  # without side inputs
    for i, p in enumerate(params):
        if i and dropout:
            kept = _draw(key, i, 1 - dropout, y.shape)
            y = jnp.where(kept, y / (1 - dropout), 0)
        f, state = layer if callable(layer) else layer[i], None if carry is None else carry[i]
        layer_key = None if key is None else jax.random.fold_in(key, len(params) + i)
        masks = {}
        if recurrent_dropout or zoneout:
            end = jax.eval_shape(lambda f=f, p=p, state=state, y=y: f(p, state, y, **time)[0])
            masks = _masks(layer_key, end, main(y), recurrent_dropout, zoneout, with_defaults(time).time_axis)
        masks["reset_state"] = None if reset_state is None else reset_state[i]
        end, out = f(p, state, y, **time, **masks, return_states=return_states)
        # The output of a layer is already zero in the padding; xs may not be.
        skip = y if i or not residual else _zero_padding(main(y), time)
        y = out + skip if residual else out
        carries.append(end)
    return tuple(carries), y


def _masks(
    key: PRNGKeyArray | None,
    carry: PyTree,
    xs: jax.Array,
    recurrent_dropout: float | int,
    zoneout: float | int,
    time_axis: int,
) -> dict[str, PyTree]:
    """Draw the options `recurrent_dropout_mask` and `zoneout` of one layer, for a carry of shapes.

    Draw j uses the key `fold_in(key, j)`. With recurrent dropout, the first draws are the elements of h that are kept,
    with probability 1 - p, for each state in the carry; the same mask holds at all steps. With zoneout and a key, the
    next draws are the elements that keep their previous value, for each leaf of the carry and each step.
    """
    states, of_states = jax.tree.flatten(carry, is_leaf=lambda s: not isinstance(s, tuple) or hasattr(s, "_fields"))
    masks, drawn = {}, 0
    if recurrent_dropout:
        kept = []
        for drawn, state in enumerate(states, 1):
            h = jax.tree.leaves(state)[0]
            mask = _draw(key, drawn - 1, 1 - recurrent_dropout, h.shape)
            kept.append(mask.astype(h.dtype) / (1 - recurrent_dropout))
        masks["recurrent_dropout_mask"] = of_states.unflatten(kept)
    if zoneout and key is None:
        masks["zoneout"] = jax.tree.map(lambda a: zoneout, carry)
    elif zoneout:
        leaves, of_leaves = jax.tree.flatten(carry)
        axis, T = time_axis % xs.ndim, xs.shape[time_axis]
        shapes = [(*a.shape[:axis], T, *a.shape[axis:]) for a in leaves]
        masks["zoneout"] = of_leaves.unflatten(_draw(key, drawn + j, zoneout, shape) for j, shape in enumerate(shapes))
    return masks


def _draw(key: PRNGKeyArray | None, count: int, p: float | int, shape: tuple[int, ...]) -> jax.Array:
    """Return draw `count` of `key`: booleans that are True with probability `p`, in float32 also if x64 is enabled."""
    assert key is not None
    return jax.random.bernoulli(jax.random.fold_in(key, count), jnp.float32(p), shape)


def _zero_padding(xs: jax.Array, time: TimeOptions) -> jax.Array:
    """Return `xs` with zeros in the padding of each sequence."""
    options = with_defaults(time)
    if options.lengths is None:
        return xs
    lengths, axis = jnp.asarray(options.lengths), options.time_axis % xs.ndim
    t = jnp.arange(xs.shape[axis]).reshape(-1, *(1 for _ in lengths.shape))
    valid = jnp.moveaxis(t < lengths.astype(t.dtype)[None], 0, axis)
    return jnp.where(expand_mask(valid, xs), xs, 0)
