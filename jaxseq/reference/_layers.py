"""Reference implementations of `bidirectional` and `stack`."""

from collections.abc import Callable, Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxseq import _layers
from jaxseq._time_options import TimeOptions


def bidirectional(
    layer: Callable[..., Any] | Sequence[Callable[..., Any]],
    params: Sequence[Any],
    carry: Sequence[Any] | None,
    xs: Float[Array, "*time_batch_and_space D"],
    **time: Unpack[TimeOptions],
) -> tuple[tuple[Any, Any], Float[Array, "*time_batch_and_outputs H"]]:
    """Reference implementation of `jaxseq.bidirectional`. `layer` is a reference implementation, too."""
    forwards, backwards = (layer, layer) if callable(layer) else layer
    first, second = (None, None) if carry is None else carry
    pairs = {
        option: value for option in ("recurrent_dropout_mask", "zoneout") if (value := time.get(option)) is not None
    }
    time_forward, time_backward = ({**time, **{option: pair[i] for option, pair in pairs.items()}} for i in range(2))
    a, ys = forwards(params[0], first, xs, **time_forward)
    b, zs = backwards(params[1], second, xs, **{**time_backward, "reverse": True})
    return (a, b), jnp.concatenate([ys, zs], -1)


def stack(
    layer: Callable[..., Any] | Sequence[Callable[..., Any]],
    params: Sequence[Any],
    carry: Sequence[Any] | None,
    xs: Float[Array, "*time_batch_and_space D"],
    *,
    residual: bool = False,
    dropout: float | int = 0.0,
    recurrent_dropout: float | int = 0.0,
    key: PRNGKeyArray | None = None,
    **time: Unpack[TimeOptions],
) -> tuple[tuple[Any, ...], Float[Array, "*time_batch_and_outputs H"]]:
    """Reference implementation of `jaxseq.stack`, with the same random numbers. `layer` is a reference implementation,
    too.
    """
    carries, y, zoneout = [], xs, time.pop("zoneout", None) or 0.0
    for i, p in enumerate(params):
        if i and dropout:
            assert key is not None
            mask = _layers.bernoulli(jax.random.fold_in(key, i), 1 - dropout, y.shape)
            y = jnp.where(mask, y / (1 - dropout), 0)
        f, state = layer if callable(layer) else layer[i], None if carry is None else carry[i]
        layer_key = None if key is None else jax.random.fold_in(key, len(params) + i)
        masks = _layers.dropout_masks(layer_key, f, p, state, y, recurrent_dropout, zoneout, time)
        end, out = f(p, state, y, **time, **masks)
        # The output of a layer is already zero in the padding; xs may not be.
        skip = y if i or not residual else _layers.zero_padded_steps(y, time)
        y = out + skip if residual and y.shape == out.shape else out
        carries.append(end)
    return tuple(carries), y
