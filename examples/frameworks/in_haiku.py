# pyright: reportMissingImports=false
"""Haiku: LSTM with resets, `hk.dynamic_unroll(hk.ResetCore(hk.LSTM(...)))` against jaxseq.

    first_t   true if step t starts an episode, at random
    x_t       K random numbers
    loss      = mean (h_t W + b - (mean of x since the start of the episode))²

As in reinforcement learning, a sequence consists of several episodes. Neither the state nor a gradient may cross the
boundary between two episodes.

Haiku adds 1 to the forget gate in every step; `jaxseq.integrations.haiku.LSTM` includes it in the bias, which
`jaxseq.lstm_init` and `convert.from_haiku` set accordingly.

    python examples/frameworks/in_haiku.py        about half a minute
"""

import sys
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray
from side_by_side import Batch, Side, main

from jaxseq import convert
from jaxseq.integrations.haiku import LSTM

T, B, H, K = 512, 16, 64, 5  # steps, batch, hidden size, input size
EPISODE = 20  # mean length in steps
RATE = 3e-3


def theirs(xs: Array, first: Array) -> Array:
    core = hk.ResetCore(hk.LSTM(H, name="lstm"))
    hs, _ = hk.dynamic_unroll(core, (xs, first), core.initial_state(xs.shape[1]))
    return hk.Linear(K, name="read")(hs)


def ours(xs: Array, first: Array) -> Array:
    hs, _ = LSTM(H, name="lstm")(xs, resets=first)
    return hk.Linear(K, name="read")(hs)


def sides(key: PRNGKeyArray) -> tuple[Side, Side]:
    """Return both models with the same initial parameters, drawn by Haiku."""
    params = jax.jit(hk.transform(theirs).init)(key, *batch(key)[:2])
    lstm = convert.from_haiku("lstm", params, name="lstm")

    def side(name: str, model: Any, params: Any) -> Side:
        apply = hk.without_apply_rng(hk.transform(model)).apply

        def loss(params: Any, batch: Batch) -> Float[Array, ""]:
            xs, first, means = batch
            return jnp.mean((apply(params, xs, first) - means) ** 2)

        return Side(name, loss, params)

    ours_params = {"lstm": lstm._asdict(), "read": params["read"]}
    return side("Haiku", theirs, params), side("jaxseq", ours, ours_params)


def batch(key: PRNGKeyArray) -> Batch:
    """Return (xs (T, B, K), first (T, B), means (T, B, K))."""
    key_xs, key_first = jax.random.split(key)
    xs = jax.random.normal(key_xs, (T, B, K))
    first = jax.random.bernoulli(key_first, 1 / EPISODE, (T, B))

    def mean(so_far: Any, now: Any) -> Any:
        (n, m), (x, opens) = so_far, now
        n = jnp.where(opens, 1, n + 1)
        m = m * (1 - 1 / n)[:, None] + x / n[:, None]
        return (n, m), m

    _, means = lax.scan(mean, (jnp.zeros(B), jnp.zeros((B, K))), (xs, first))
    return xs, first, means


if __name__ == "__main__":
    sys.exit(main(f"Haiku, LSTM with resets: T, B, H = {T}, {B}, {H}", sides, batch, rate=RATE))
