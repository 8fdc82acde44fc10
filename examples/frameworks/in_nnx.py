# pyright: reportMissingImports=false
"""Flax nnx: GRU over symbols, `nnx.RNN(nnx.GRUCell(...))` against `jaxseq.gru`.

    s_{t+1} = (s_t + s_{t-1}) mod K               or uniformly random, with probability 1/8
    loss    = mean -log softmax(h_t W + b)[s_{t+1}],  h_t = GRU(h_{t-1}, E[s_t])

`jaxseq.integrations.nnx.GRU` takes the place of `nnx.RNN(cell)`. Each array is a separate `nnx.Param`, as
`nnx.Optimizer` requires. The GRU of nnx has no recurrent bias, so `b_h` is None here.

    python examples/frameworks/in_nnx.py          about half a minute
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray
from side_by_side import Batch, Side, main

from jaxseq import convert
from jaxseq.integrations import nnx as layers

B, T, D, H, K = 32, 128, 96, 128, 11  # batch, steps, embedding size, hidden size, symbols
RATE = 3e-3


class Theirs(nnx.Module):
    """Flax model: predict the next symbol."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(K, D, rngs=rngs)
        self.rnn = nnx.RNN(nnx.GRUCell(D, H, rngs=rngs))
        self.read = nnx.Linear(H, K, rngs=rngs)

    def __call__(self, s: Array) -> Array:
        hs: Any = self.rnn(self.embed(s), initial_carry=jnp.zeros((len(s), H)))
        return self.read(hs)


class Ours(nnx.Module):
    """The same model with the GRU of jaxseq."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(K, D, rngs=rngs)
        self.gru = layers.GRU(D, H, rngs=rngs)
        self.read = nnx.Linear(H, K, rngs=rngs)

    def __call__(self, s: Array) -> Array:
        return self.read(self.gru(self.embed(s)))


def sides(key: PRNGKeyArray) -> tuple[Side, Side]:
    """Return both models with the same initial parameters, drawn by Flax."""
    theirs, ours = Theirs(rngs=nnx.Rngs(key)), Ours(rngs=nnx.Rngs(key))
    params = convert.from_nnx("gru", theirs.rnn.cell)
    nnx.update(ours.gru, {name: a for name, a in params._asdict().items() if a is not None})
    ours.embed, ours.read = theirs.embed, theirs.read

    def side(name: str, model: nnx.Module) -> Side:
        graph, params, rest = nnx.split(model, nnx.Param, ...)  # a module is a graph and its arrays

        def loss(params: Any, s: Batch) -> Float[Array, ""]:
            logits: Any = nnx.merge(graph, params, rest)(s[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, s[:, 1:]).mean()

        return Side(name, loss, params)

    return side("Flax nnx", theirs), side("jaxseq", ours)


def batch(key: PRNGKeyArray) -> Batch:
    """Return symbols (B, T + 1)."""
    key_first, key_drawn, key_which = jax.random.split(key, 3)
    drawn = jax.random.randint(key_drawn, (T + 1, B), 0, K)
    anew = jax.random.bernoulli(key_which, 1 / 8, (T + 1, B))

    def follow(last: Any, now: Any) -> Any:
        s = jnp.where(now[0], now[1], sum(last) % K)
        return (last[1], s), s

    _, s = lax.scan(follow, tuple(jax.random.randint(key_first, (2, B), 0, K)), (anew, drawn))
    return s.T


if __name__ == "__main__":
    sys.exit(main(f"Flax nnx, GRU: B, T, D, H = {B}, {T}, {D}, {H}", sides, batch, rate=RATE))
