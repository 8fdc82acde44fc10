# pyright: reportMissingImports=false
"""Equinox: depthwise convolution and LSTM, `eqx.nn.Conv1d` and `eqx.nn.LSTMCell` against jaxseq.

    s_t      = 0.95 s_{t-1} + noise               a signal
    x_{t,c}  = s_{t - c % 4} + noise_{t,c}        recorded by C microphones with different delays
    loss     = mean (h_t W + b - s_t)²            estimate of the current signal

A module of Equinox processes one sequence and is mapped over the batch by `jax.vmap`. The modules of
`jaxseq.integrations.equinox` accept any number of batch axes. The hand-derived rule then sums the weight gradient over
the batch directly, whereas under `vmap` JAX first stores one gradient per sequence.

    python examples/frameworks/in_equinox.py      about half a minute
"""

import sys
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray
from side_by_side import Batch, Side, main

from jaxseq import convert
from jaxseq.integrations.equinox import LSTM, CausalConv

B, T, C, H = 16, 512, 32, 64  # batch, steps, channels, hidden size
KERNEL_SIZE = 4
RATE = 3e-3


class Theirs(eqx.Module):
    """Equinox model of one sequence."""

    conv: eqx.nn.Conv1d
    cell: eqx.nn.LSTMCell
    read: eqx.nn.Linear

    def __init__(self, *, key: PRNGKeyArray):
        keys = jax.random.split(key, 3)
        self.conv = eqx.nn.Conv1d(C, C, KERNEL_SIZE, groups=C, padding=((KERNEL_SIZE - 1, 0),), key=keys[0])
        self.cell = eqx.nn.LSTMCell(C, H, key=keys[1])
        self.read = eqx.nn.Linear(H, 1, key=keys[2])

    def __call__(self, xs: Float[Array, "T C"]) -> Float[Array, "T 1"]:
        def step(state: Any, x: Array) -> tuple[Any, Array]:
            state = self.cell(x, state)
            return state, state[0]

        _, hs = lax.scan(step, (jnp.zeros(H), jnp.zeros(H)), self.conv(xs.T).T)
        return jax.vmap(self.read)(hs)


class Ours(eqx.Module):
    """The same model with layers of jaxseq, for a batch."""

    conv: CausalConv
    lstm: LSTM
    read: eqx.nn.Linear

    def __init__(self, *, key: PRNGKeyArray):
        keys = jax.random.split(key, 3)
        self.conv = CausalConv(C, C, KERNEL_SIZE, groups=C, key=keys[0])
        self.lstm = LSTM(C, H, key=keys[1])
        self.read = eqx.nn.Linear(H, 1, key=keys[2])

    def __call__(self, xs: Float[Array, "batch T C"]) -> Float[Array, "batch T 1"]:
        _, xs = self.conv(xs)
        _, hs = self.lstm(xs)
        return jax.vmap(jax.vmap(self.read))(hs)


def sides(key: PRNGKeyArray) -> tuple[Side, Side]:
    """Return both models with the same initial parameters, drawn by Equinox."""
    theirs, ours = Theirs(key=key), Ours(key=key)
    params = convert.from_equinox("conv", theirs.conv), convert.from_equinox("lstm", theirs.cell), theirs.read
    ours = eqx.tree_at(lambda m: (m.conv.params, m.lstm.params, m.read), ours, params)

    def side(name: str, model: Any, batched: bool) -> Side:
        params, rest = eqx.partition(model, eqx.is_array)

        def loss(params: Any, batch: Batch) -> Float[Array, ""]:
            xs, s = batch
            model = eqx.combine(params, rest)
            return jnp.mean(((model if batched else jax.vmap(model))(xs) - s) ** 2)

        return Side(name, loss, params)

    return side("Equinox", theirs, batched=False), side("jaxseq", ours, batched=True)


def batch(key: PRNGKeyArray) -> Batch:
    """Return (xs (B, T, C), s (B, T, 1))."""
    key_s, key_x = jax.random.split(key)
    late = jnp.arange(C) % KERNEL_SIZE
    noise = 0.3 * jax.random.normal(key_s, (T + KERNEL_SIZE, B))
    _, s = lax.scan(lambda s, n: (0.95 * s + n, 0.95 * s + n), jnp.zeros(B), noise)
    heard = s.T[:, jnp.arange(T)[:, None] + KERNEL_SIZE - late]
    return heard + jax.random.normal(key_x, heard.shape), s.T[:, KERNEL_SIZE:, None]


if __name__ == "__main__":
    about = f"Equinox, depthwise convolution and LSTM: B, T, C, H = {B}, {T}, {C}, {H}"
    sys.exit(main(about, sides, batch, rate=RATE))
