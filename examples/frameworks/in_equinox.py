# pyright: reportMissingImports=false
"""Equinox: a depthwise convolution and an LSTM, `eqx.nn.Conv1d`, `eqx.nn.LSTMCell` and `jaxseq.depthwise_conv`, `lstm`.

    s_t      = 0.95 s_{t-1} + noise               a signal
    x_{t,c}  = s_{t - c % 4} + noise_{t,c}        that C microphones hear, each some steps late
    loss     = mean (h_t W + b - s_t)²            what is it now, as far as can be told?

The classes `CausalConv` and `LSTM` are the modules to copy. A module of Equinox takes one sequence and is mapped over
the batch by `jax.vmap`; these take the batch as it is, of one axis, several or none. Then the rule by hand sums the
gradient of the weights over the batch at once, where under `vmap` JAX would hold one for each sequence first.

    python examples/frameworks/in_equinox.py      half a minute
"""

import sys
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray
from side_by_side import Batch, Side, main

import jaxseq
from jaxseq import convert

B, T, C, H = 16, 512, 32, 64  # batch, steps, microphones, units
WINDOW = 4
RATE = 3e-3


class CausalConv(eqx.Module):
    """`(*batch, T, C) -> (*batch, T, C)`: each channel with a window of its own, over what has been."""

    params: jaxseq.ConvParams

    def __init__(self, channels: int, window: int, *, key: PRNGKeyArray):
        self.params = jaxseq.conv_init(key, window, channels, channels, groups=channels)

    def __call__(self, xs: Array) -> Array:
        return jaxseq.depthwise_conv(xs, *self.params, padding="CAUSAL")


class LSTM(eqx.Module):
    """`(*batch, T, D) -> (LSTMState(h, c), (*batch, T, H))`."""

    params: jaxseq.LSTMParams

    def __init__(self, input_size: int, hidden_size: int, *, key: PRNGKeyArray):
        self.params = jaxseq.lstm_init(key, input_size, hidden_size)

    def __call__(self, xs: Array, *, carry: Any = None, **time: Any) -> tuple[jaxseq.LSTMState, Array]:
        return jaxseq.lstm(self.params, carry, xs, time_axis=-2, **time)


class Theirs(eqx.Module):
    """Of one sequence."""

    conv: eqx.nn.Conv1d
    cell: eqx.nn.LSTMCell
    read: eqx.nn.Linear

    def __init__(self, *, key: PRNGKeyArray):
        keys = jax.random.split(key, 3)
        self.conv = eqx.nn.Conv1d(C, C, WINDOW, groups=C, padding=((WINDOW - 1, 0),), key=keys[0])
        self.cell = eqx.nn.LSTMCell(C, H, key=keys[1])
        self.read = eqx.nn.Linear(H, 1, key=keys[2])

    def __call__(self, xs: Float[Array, "T C"]) -> Float[Array, "T 1"]:
        def step(state: Any, x: Array) -> tuple[Any, Array]:
            state = self.cell(x, state)
            return state, state[0]

        _, hs = lax.scan(step, (jnp.zeros(H), jnp.zeros(H)), self.conv(xs.T).T)
        return jax.vmap(self.read)(hs)


class Ours(eqx.Module):
    """Of a batch."""

    conv: CausalConv
    lstm: LSTM
    read: eqx.nn.Linear

    def __init__(self, *, key: PRNGKeyArray):
        keys = jax.random.split(key, 3)
        self.conv = CausalConv(C, WINDOW, key=keys[0])
        self.lstm = LSTM(C, H, key=keys[1])
        self.read = eqx.nn.Linear(H, 1, key=keys[2])

    def __call__(self, xs: Float[Array, "batch T C"]) -> Float[Array, "batch T 1"]:
        _, hs = self.lstm(self.conv(xs))
        return jax.vmap(jax.vmap(self.read))(hs)


def sides(key: PRNGKeyArray) -> tuple[Side, Side]:
    """Equinox' first weights, and the same as ours."""
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
    """(xs (B, T, C), s (B, T, 1))."""
    key_s, key_x = jax.random.split(key)
    late = jnp.arange(C) % WINDOW
    noise = 0.3 * jax.random.normal(key_s, (T + WINDOW, B))
    _, s = lax.scan(lambda s, n: (0.95 * s + n, 0.95 * s + n), jnp.zeros(B), noise)
    heard = s.T[:, jnp.arange(T)[:, None] + WINDOW - late]
    return heard + jax.random.normal(key_x, heard.shape), s.T[:, WINDOW:, None]


if __name__ == "__main__":
    about = f"Equinox, depthwise convolution and LSTM: B, T, C, H = {B}, {T}, {C}, {H}"
    sys.exit(main(about, sides, batch, rate=RATE))
