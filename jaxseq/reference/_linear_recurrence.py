"""Reference implementation of the linear recurrence: its equation, step by step."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Inexact, Integer, PyTree

from jaxseq._precision import accumulator
from jaxseq.reference._time import through_time


def linear_recurrence(
    a: Inexact[Array, "..."],
    carry: Inexact[Array, "*batch H"] | None,
    x: Inexact[Array, "*time_and_batch H"],
    *,
    lengths: Integer[Array, "*batch"] | None = None,
    resets: Bool[Array, "*time_and_batch"] | None = None,
    reverse: bool = False,
    truncation: int | tuple[int, int] | None = None,
    checkpoint: int | str | None = None,
    time_axis: int = 0,
    unroll: int = 1,
) -> tuple[Inexact[Array, "*batch H"], Inexact[Array, "*time_and_batch H"]]:
    """Reference implementation of `jaxseq.linear_recurrence`."""
    a = jnp.broadcast_to(jnp.expand_dims(a, range(x.ndim - jnp.ndim(a))), x.shape)
    return through_time(
        _step,
        carry,
        (x, a),
        lengths=lengths,
        resets=resets,
        reverse=reverse,
        truncation=truncation,
        checkpoint=checkpoint,
        time_axis=time_axis,
        unroll=unroll,
    )


def _step(carry: jax.Array | None, at: PyTree, **_: object) -> tuple[jax.Array, jax.Array]:
    x, a = at
    h = jnp.zeros(x.shape, accumulator(x.dtype)) if carry is None else carry
    new = a.astype(h.dtype) * h + x.astype(h.dtype)
    return new, new.astype(x.dtype)
