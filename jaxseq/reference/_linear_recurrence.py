"""Reference implementation of the linear recurrence: its equation, step by step."""

from typing import Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact, PyTree

from jaxseq._precision import accumulator
from jaxseq._time_options import TimeOptions
from jaxseq.reference._time import through_time


def linear_recurrence(
    a: Inexact[Array, "..."],
    carry: Inexact[Array, "*batch H"] | None,
    x: Inexact[Array, "*time_and_batch H"],
    **time: Unpack[TimeOptions],
) -> tuple[Inexact[Array, "*batch H"], Inexact[Array, "*time_and_batch H"]]:
    """Reference implementation of `jaxseq.linear_recurrence`."""
    return through_time(_step, carry, (x, jnp.broadcast_to(a, x.shape)), **time)


def _step(carry: jax.Array | None, at: PyTree, **_: object) -> tuple[jax.Array, jax.Array]:
    x, a = at
    h = jnp.zeros(x.shape, accumulator(x.dtype)) if carry is None else carry
    new = a.astype(h.dtype) * h + x.astype(h.dtype)
    return new, new.astype(x.dtype)
