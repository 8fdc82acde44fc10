"""Gradients that vanish, and gradients that explode: how far back a recurrence can learn, before and after training.

    h_t   = cell(h_{t-1}, E[s_t])                            an RNN, a GRU or an LSTM reads characters s_t
    loss  = -1/T sum_t log softmax(h_t W + b)[s_{t+1}]       nats per character

    P_l   = ∂h_T/∂h_{T-l} = J_T J_{T-1} ... J_{T-l+1}        l steps of the chain rule, J_t = ∂h_t/∂h_{t-1}
    |P_l|                                                    by how much they can stretch a gradient: its largest
                                                             singular value, `flow.jacobian_products`
    λ_1   = lim 1/t log |J_t ... J_1|                        at what rate they do in the long run, `flow.lyapunov`;
                                                             |P_l| is of the order of exp(λ_1 l)
    |g_k - g| / |g|                                          what is lost of the gradient g where it is cut every k
                                                             steps, `flow.truncation_bias`

Below zero λ_1 means that gradients vanish: what is long past cannot be learnt. Above zero they explode: one step of
training throws the weights away, unless the gradient is clipped, g <- g min(1, c / |g|), which keeps its direction.
The script shows the first for three cells, and the second for an RNN whose recurrent weights are made too large.

    python examples/vanishing.py                             about a minute; leaves out/vanishing.png
    python examples/vanishing.py --gain 3                    even larger recurrent weights

Source: Y. Bengio, P. Simard and P. Frasconi, Learning long-term dependencies with gradient descent is difficult (1994);
R. Pascanu, T. Mikolov and Y. Bengio, On the difficulty of training recurrent neural networks (2013).
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray
from matplotlib.figure import Figure

import jaxseq
from jaxseq import diagnostics

Text = Int[Array, " n"]

D, H = 32, 48  # features of a character, units of a cell
BATCH, T = 32, 64  # places of the text that are read side by side, and characters that a gradient reaches back
ADAM_RATE, SGD_RATE = 1e-2, 1.0  # a step of plain descent is as large as the gradient, one of Adam's is not
CLIP = 1.0
EXAMPLES, LONG, BURN_IN, EXPONENTS = 16, 1200, 200, 24  # pieces of text, and one long one, to measure gradients on
DEAD, TOLERANCE = 1e-3, 0.1  # below what part of its largest a gradient teaches nothing; what truncation may lose
LAST = 50  # steps, of which the final loss is the mean


class Recurrence(NamedTuple):
    """One cell in its four forms. jaxseq's own have reverse mode only; forward mode is for the twin."""

    init: Callable[..., Any]
    sequence: Callable[..., Any]
    step: Callable[..., Any]
    twin: Callable[..., Any]


CELLS = {
    "RNN": Recurrence(jaxseq.rnn_init, jaxseq.rnn, jaxseq.rnn_cell, jaxseq.reference.rnn_cell),
    "GRU": Recurrence(jaxseq.gru_init, jaxseq.gru, jaxseq.gru_cell, jaxseq.reference.gru_cell),
    "LSTM": Recurrence(jaxseq.lstm_init, jaxseq.lstm, jaxseq.lstm_cell, jaxseq.reference.lstm_cell),
}


class Model(NamedTuple):
    """The parameters, named as in the equations above."""

    E: Float[Array, "vocabulary D"]
    cell: Any
    W: Float[Array, "H vocabulary"]
    b: Float[Array, " vocabulary"]


class Measured(NamedTuple):
    """How gradients flow in one model."""

    norms: Float[Array, " T+1"]  # |P_l| by l
    lyapunov: diagnostics.Lyapunov
    bias: diagnostics.TruncationBias


# --- The model and its training ---


def characters() -> tuple[Text, int]:
    """The language reference that every CPython carries, and how many different characters it has."""
    text = "\n\n".join(topics[k] for k in sorted(topics))
    index = {character: i for i, character in enumerate(sorted(set(text)))}
    return jnp.array([index[c] for c in text], jnp.int32), len(index)


def init(name: str, key: PRNGKeyArray, vocabulary: int, gain: float = 1.0) -> Model:
    """`gain` multiplies the recurrent map, which is orthogonal: 1 keeps the norm of what it carries."""
    key_E, key_cell, key_W = jax.random.split(key, 3)
    cell = CELLS[name].init(key_cell, D, H)
    return Model(
        E=jax.random.normal(key_E, (vocabulary, D)),
        cell=cell._replace(w_h=gain * cell.w_h),
        W=jax.random.normal(key_W, (H, vocabulary)) * H**-0.5,
        b=jnp.zeros(vocabulary),
    )


def pieces(text: Text, key: PRNGKeyArray, batch: int, length: int) -> Int[Array, "length batch"]:
    places = jax.random.randint(key, (batch,), 0, text.size - length)
    return text[places + jnp.arange(length)[:, None]]


def nats(model: Model, hs: Float[Array, "T *batch H"], following: Int[Array, "T *batch"]) -> Float[Array, ""]:
    return optax.softmax_cross_entropy_with_integer_labels(hs @ model.W + model.b, following).mean()


@partial(jax.jit, static_argnames=("name", "optimizer", "steps"))
def train(
    name: str, model: Model, key: PRNGKeyArray, text: Text, *, optimizer: Any, steps: int
) -> tuple[Model, Float[Array, " steps"], Float[Array, " steps"]]:
    """(what is learnt, the loss of each step, and the norm of its gradient before the optimizer has touched it)."""

    def loss(model: Model, s: Int[Array, "T+1 batch"]) -> Float[Array, ""]:
        return nats(model, CELLS[name].sequence(model.cell, None, model.E[s[:-1]])[1], s[1:])

    def step(state: Any, key: PRNGKeyArray) -> Any:
        model, memory = state
        cost, gradient = jax.value_and_grad(loss)(model, pieces(text, key, BATCH, T + 1))
        updates, memory = optimizer.update(gradient, memory, model)
        return (optax.apply_updates(model, updates), memory), (cost, optax.tree.norm(gradient))

    (model, _), (costs, norms) = lax.scan(step, (model, optimizer.init(model)), jax.random.split(key, steps))
    return model, costs, norms


# --- How gradients flow ---


def exponents(name: str, model: Model, text: Text) -> diagnostics.Lyapunov:
    """Along one long piece of text. Its directions go forwards, so this takes the twin."""
    zero = jax.tree.map(jnp.zeros_like, CELLS[name].step(model.cell, None, model.E[0])[0])
    return diagnostics.lyapunov(
        partial(CELLS[name].twin, model.cell), zero, model.E[text[:LONG]], k=EXPONENTS, burn_in=BURN_IN
    )


@partial(jax.jit, static_argnames="name")
def measure(name: str, model: Model, text: Text) -> Measured:
    """On pieces of 2 T characters, of which the first T are the past and the others cost something."""
    step = CELLS[name].step
    s = pieces(text, jax.random.key(0), EXAMPLES, 2 * T + 1)
    xs = model.E[s[:-1]]
    zero = jax.tree.map(jnp.zeros_like, step(model.cell, None, xs[0])[0])

    def stretched(state: Any, xs: Any) -> Float[Array, " T+1"]:
        return diagnostics.jacobian_products(partial(step, model.cell), state, xs, lags=range(T + 1)).norms

    norms = jax.vmap(stretched, (0, 1))(zero, xs)  # one by one: a batch would be one large state
    bias = diagnostics.truncation_bias(step, model.cell, zero, xs, lambda _, hs: nats(model, hs[T:], s[T + 1 :]))
    return Measured(jnp.exp(jnp.log(norms).mean(0)), exponents(name, model, text), bias)


def lasts(norms: Any) -> int | None:
    """The last lag at which |P_l| is above DEAD of its largest; None, if that is the last measured."""
    alive = np.flatnonzero(np.asarray(norms) > DEAD * np.max(norms))
    return int(alive[-1]) if alive.size and alive[-1] + 1 < len(norms) else None


# --- The picture and the job ---


def draw(
    found: dict[str, tuple[Measured, Measured]], clipping: dict[str, Any], exploding: diagnostics.Lyapunov, path: Path
) -> None:
    figure = Figure(figsize=(19, 10), layout="constrained")
    axes: Any = figure.subplots(2, 3)
    for ax, when, title in zip(axes[0], (0, 1), ("before", "after"), strict=False):
        diagnostics.plot_norms({name: pair[when].norms for name, pair in found.items()}, ax=ax, dead=DEAD)
        what = r"$\|\,\partial h_T / \partial h_{T-l}\,\|$"
        ax.set(title=f"{title} training: {what}, gone (×) below {DEAD:g} of its largest", ylim=(1e-9, 1e2))
    spectra = {name: after.lyapunov for name, (_, after) in found.items()} | {"RNN that explodes": exploding}
    diagnostics.plot_spectrum(spectra, ax=axes[0, 2])
    axes[0, 2].set_title("Lyapunov exponents: above 0 it explodes, below 0 it vanishes")
    biases = {name: after.bias for name, (_, after) in found.items()}
    diagnostics.plot_bias(biases, ax=axes[1, 0], tolerance=TOLERANCE)
    axes[1, 0].set_title(f"what truncation loses: dots, the shortest window within {TOLERANCE:g}")
    for ax, which, title in zip(axes[1, 1:], (2, 1), ("norm of the gradient", "nats per character"), strict=True):
        for (name, curves), colour in zip(clipping.items(), ("tab:red", "tab:purple"), strict=True):
            ax.plot(curves[which], label=name, color=colour, lw=1)
        ax.set(xlabel="step of training", title=f"the RNN that explodes: {title}")
        ax.grid(color="0.85", lw=0.5)
    axes[1, 1].set(yscale="log")
    axes[1, 1].axhline(CLIP, color="0.25", lw=0.8, ls="--", label="where it is clipped")
    for ax in axes[1, 1:]:
        ax.legend(frameon=False)
    figure.savefig(path, dpi=90, format="png")


def run(seed: int, steps: int, gain: float, out: Path) -> None:
    started = time.perf_counter()
    text, vocabulary = characters()
    text, unseen = text[: -len(text) // 10], text[-len(text) // 10 :]
    key_model, key_train = jax.random.split(jax.random.key(seed))
    clip = optax.clip_by_global_norm(CLIP)
    adam, sgd = optax.chain(clip, optax.adam(ADAM_RATE)), optax.sgd(SGD_RATE)

    print(f"before -> after {steps} steps of training; gradients are measured on text not trained on\n")
    print(
        "cell   nats per character   gradient lasts     Lyapunov exponent   window that loses at most "
        + f"{TOLERANCE:.0%}"
    )
    found: dict[str, tuple[Measured, Measured]] = {}
    for name in CELLS:
        model = init(name, key_model, vocabulary)
        before = measure(name, model, unseen)
        model, costs, _ = train(name, model, key_train, text, optimizer=adam, steps=steps)
        found[name] = before, measure(name, model, unseen)
        finite(name, costs)
        last = [f"{lasts(m.norms) or f'> {T}'}" for m in found[name]]
        lam = [f"{m.lyapunov.exponents[0]:.3f}" for m in found[name]]
        k = [diagnostics.suggest_truncation(m.bias, TOLERANCE) for m in found[name]]
        print(
            f"{name:5}  {costs[0]:6.2f} -> {costs[-LAST:].mean():.2f}  {last[0]:>9} -> {last[1]:>4}"
            f"  {lam[0]:>11} -> {lam[1]}  {k[0]:>11} -> {k[1]}",
            flush=True,
        )

    model = init("RNN", key_model, vocabulary, gain)
    exploding = jax.jit(exponents, static_argnums=0)("RNN", model, unseen)
    print(
        f"\nRNN, recurrent weights x {gain:g}: Lyapunov exponent {exploding.exponents[0]:.3f}; plain gradient descent"
    )
    clipping = {}
    for name, optimizer in {"not clipped": sgd, "clipped": optax.chain(clip, sgd)}.items():
        clipping[name] = train("RNN", model, key_train, text, optimizer=optimizer, steps=steps)
        _, costs, norms = clipping[name]
        print(f"{name:12} first gradient {norms[0]:.1e}, nats {costs[0]:.2f} -> {costs[-LAST:].mean():.2f}")
    draw(found, clipping, exploding, out)
    print(f"{time.perf_counter() - started:.0f} s with compilation; pictures: {out}")


def finite(name: str, costs: Any) -> None:
    if not np.isfinite(costs).all():
        raise FloatingPointError(f"the loss of {name} is {costs[~np.isfinite(costs)][0]}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("vanishing.py", description="How gradients flow. Defaults stand in brackets.")
    parser.add_argument("--steps", type=int, default=1000, help="windows to train on [%(default)s]")
    parser.add_argument("--gain", type=float, default=3.0, help="of the RNN that explodes [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of weights and windows [%(default)s]")
    parser.add_argument("--out", type=Path, default=Path("out/vanishing.png"), metavar="FILE", help="[%(default)s]")
    options = parser.parse_args(argv)
    if options.steps < 1 or not 0 <= options.seed < 2**31 or not 0 < options.gain < math.inf:
        parser.error("expected --steps from 1 on, --seed from 0 to 2**31 - 1 and --gain above 0")
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.open("ab").close()  # to learn now, not after training, that it can't be written
        run(options.seed, options.steps, options.gain, options.out)
    except OSError as error:
        print(f"vanishing.py: error: cannot write to {options.out}: {error.strerror}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"vanishing.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
