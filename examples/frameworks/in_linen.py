# pyright: reportMissingImports=false
"""Flax linen: LSTM over padded sequences, `nn.RNN(nn.OptimizedLSTMCell(...))` against `jaxseq.lstm`.

    x_t  = sin(ω_k t + φ) + noise,  t < length     a wave with one of K frequencies, of random length and padded
    loss = -log softmax(h_length W + b)[k]         classify the frequency from the final state

`jaxseq.integrations.linen.LSTM` takes the place of `nn.RNN(cell)`. Its parameters are one entry of the tree, and it
accepts the options of `jaxseq.lstm`. `sides` shows how to convert weights with `jaxseq.convert`.

    python examples/frameworks/in_linen.py         about half a minute
"""

import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray
from side_by_side import Batch, Side, main

from jaxseq import convert
from jaxseq.integrations import linen

B, T, H, K = 16, 512, 64, 5  # batch, maximal length, hidden size, frequencies
RATE = 3e-3


class Theirs(nn.Module):
    """Flax model: a linear readout of the final state of each sequence."""

    @nn.compact
    def __call__(self, xs: Array, lengths: Array) -> Array:
        rnn = nn.RNN(nn.OptimizedLSTMCell(H, name="cell"), return_carry=True)
        (_, h), _ = rnn(xs, seq_lengths=lengths)
        return nn.Dense(K, name="which")(h)


class Ours(nn.Module):
    """The same model with the LSTM of jaxseq."""

    @nn.compact
    def __call__(self, xs: Array, lengths: Array) -> Array:
        (_, h), _ = linen.LSTM(H, name="lstm")(xs, seq_lengths=lengths, return_carry=True)
        return nn.Dense(K, name="which")(h)


def sides(key: PRNGKeyArray) -> tuple[Side, Side]:
    """Return both models with the same initial parameters, drawn by Flax."""
    theirs: Any = jax.jit(Theirs().init)(key, *batch(key)[:2])["params"]
    ours = {"which": theirs["which"], "lstm": {"weights": convert.from_flax("lstm", theirs["cell"])}}

    def side(name: str, model: nn.Module, params: Any) -> Side:
        def loss(params: Any, batch: Batch) -> Float[Array, ""]:
            xs, lengths, k = batch
            logits: Any = model.apply({"params": params}, xs, lengths)
            return optax.softmax_cross_entropy_with_integer_labels(logits, k).mean()

        return Side(name, loss, params)

    return side("Flax linen", Theirs(), theirs), side("jaxseq", Ours(), ours)


def batch(key: PRNGKeyArray) -> Batch:
    """Return (xs (B, T, 1), lengths (B,), frequencies (B,))."""
    keys = jax.random.split(key, 4)
    k = jax.random.randint(keys[0], (B,), 0, K)
    lengths = jax.random.randint(keys[1], (B,), T // 4, T + 1)
    phi = jax.random.uniform(keys[2], (B,), maxval=2 * jnp.pi)
    waves = jnp.sin(0.2 * (k[:, None] + 1) * jnp.arange(T) + phi[:, None])
    xs = waves + 0.3 * jax.random.normal(keys[3], (B, T))
    return jnp.where(jnp.arange(T) < lengths[:, None], xs, 0)[..., None], lengths, k


if __name__ == "__main__":
    sys.exit(main(f"Flax linen, LSTM with lengths: B, T, H = {B}, {T}, {H}", sides, batch, rate=RATE))
