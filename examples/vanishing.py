"""Vanishing and exploding gradients: the memory length of RNN, GRU and LSTM, before and after training.

    h_t   = cell(h_{t-1}, E[s_t])                            an RNN, a GRU or an LSTM processes characters s_t
    loss  = -1/T sum_t log softmax(h_t W + b)[s_{t+1}]       nats per character

    P_l   = ∂h_T/∂h_{T-l} = J_T J_{T-1} ... J_{T-l+1}        l steps of the chain rule, J_t = ∂h_t/∂h_{t-1}
    |P_l|                                                    the largest singular value of P_l, the maximal growth of a
                                                             gradient, `diagnostics.jacobian_products`
    λ_1   = lim 1/t log |J_t ... J_1|                        the asymptotic growth rate, `diagnostics.lyapunov`;
                                                             |P_l| is of the order of exp(λ_1 l)
    |g_k - g| / |g|                                          the relative error of the gradient g with truncation=k,
                                                             `diagnostics.truncation_bias`

For λ_1 < 0, gradients vanish, and long dependences cannot be learnt. For λ_1 > 0, gradients explode: one training step
can destroy the parameters, unless the gradient is clipped, g <- g min(1, c / |g|), which preserves its direction. The
script shows the first case for three cells, and the second for an RNN with large recurrent weights.

    python examples/vanishing.py                             about a minute; writes out/vanishing.png
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

D, H = 32, 48  # embedding size, hidden size
BATCH, T = 32, 64  # batch size, sequence length
ADAM_RATE, SGD_RATE = 1e-2, 1.0
CLIP = 1.0
EXAMPLES, LONG, BURN_IN, EXPONENTS = 16, 1200, 200, 24  # short texts; length, burn-in and exponents for one long text
# A gradient below this fraction of its maximum has vanished; tolerated truncation error.
VANISHED, TOLERANCE = 1e-3, 0.1
LAST = 50  # the final loss is the mean over this number of steps


class Recurrence(NamedTuple):
    """Functions of one cell."""

    init: Callable[..., Any]
    sequence: Callable[..., Any]
    step: Callable[..., Any]


CELLS = {
    "RNN": Recurrence(jaxseq.rnn_init, jaxseq.rnn, jaxseq.rnn_cell),
    "GRU": Recurrence(jaxseq.gru_init, jaxseq.gru, jaxseq.gru_cell),
    "LSTM": Recurrence(jaxseq.lstm_init, jaxseq.lstm, jaxseq.lstm_cell),
}


class Model(NamedTuple):
    """The parameters, named as in the equations above."""

    E: Float[Array, "vocabulary D"]
    cell: Any
    W: Float[Array, "H vocabulary"]
    b: Float[Array, " vocabulary"]


class Measured(NamedTuple):
    """Measurements of the gradients of one model."""

    norms: Float[Array, " T+1"]  # |P_l| by l
    lyapunov: diagnostics.Lyapunov
    bias: diagnostics.TruncationBias


# --- Model and training ---


def characters() -> tuple[Text, int]:
    """Return the language reference included in every CPython, encoded, and the size of its alphabet."""
    text = "\n\n".join(topics[k] for k in sorted(topics))
    index = {character: i for i, character in enumerate(sorted(set(text)))}
    return jnp.array([index[c] for c in text], jnp.int32), len(index)


def init(name: str, key: PRNGKeyArray, vocabulary: int, gain: float = 1.0) -> Model:
    """Initialize a model. `gain` scales the orthogonal recurrent weights; 1 preserves norms."""
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
    """Return (trained model, loss of each step, norm of each gradient before clipping)."""

    def loss(model: Model, s: Int[Array, "T+1 batch"]) -> Float[Array, ""]:
        return nats(model, CELLS[name].sequence(model.cell, None, model.E[s[:-1]])[1], s[1:])

    def step(state: Any, key: PRNGKeyArray) -> Any:
        model, memory = state
        cost, gradient = jax.value_and_grad(loss)(model, pieces(text, key, BATCH, T + 1))
        updates, memory = optimizer.update(gradient, memory, model)
        return (optax.apply_updates(model, updates), memory), (cost, optax.tree.norm(gradient))

    (model, _), (costs, norms) = lax.scan(step, (model, optimizer.init(model)), jax.random.split(key, steps))
    return model, costs, norms


# --- Measurements ---


def exponents(name: str, model: Model, text: Text) -> diagnostics.Lyapunov:
    """Return the Lyapunov exponents along one long text."""
    step = CELLS[name].step
    zero = jax.tree.map(jnp.zeros_like, step(model.cell, None, model.E[0])[0])
    return diagnostics.lyapunov(partial(step, model.cell), zero, model.E[text[:LONG]], k=EXPONENTS, burn_in=BURN_IN)


@partial(jax.jit, static_argnames="name")
def measure(name: str, model: Model, text: Text) -> Measured:
    """Measure on texts of 2 T characters. The truncation bias uses the loss on the last T of them."""
    step = CELLS[name].step
    s = pieces(text, jax.random.key(0), EXAMPLES, 2 * T + 1)
    xs = model.E[s[:-1]]
    zero = jax.tree.map(jnp.zeros_like, step(model.cell, None, xs[0])[0])

    def norms_of(state: Any, xs: Any) -> Float[Array, " T+1"]:
        return diagnostics.jacobian_products(partial(step, model.cell), state, xs, lags=range(T + 1)).norms

    norms = jax.vmap(norms_of, (0, 1))(zero, xs)  # vmap: a batch axis would count as part of the state
    bias = diagnostics.truncation_bias(step, model.cell, zero, xs, lambda _, hs: nats(model, hs[T:], s[T + 1 :]))
    return Measured(jnp.exp(jnp.log(norms).mean(0)), exponents(name, model, text), bias)


def lasts(norms: Any) -> int | None:
    """Return the largest lag with |P_l| above VANISHED times its maximum, or None if it is the last measured lag."""
    above = np.flatnonzero(np.asarray(norms) > VANISHED * np.max(norms))
    return int(above[-1]) if above.size and above[-1] + 1 < len(norms) else None


# --- Plot and main program ---


def draw(
    found: dict[str, tuple[Measured, Measured]], clipping: dict[str, Any], exploding: diagnostics.Lyapunov, path: Path
) -> None:
    figure = Figure(figsize=(19, 10), layout="constrained")
    axes: Any = figure.subplots(2, 3)
    for ax, when, title in zip(axes[0], (0, 1), ("before", "after"), strict=False):
        diagnostics.plot_norms({name: pair[when].norms for name, pair in found.items()}, ax=ax, vanished=VANISHED)
        ax.set(title=f"{title} training: gradient between states; ×: {VANISHED:g} of the maximum", ylim=(1e-9, 1e2))
        ax.set(xlabel="lag $l$ (steps)", ylabel=r"norm of $\partial h_T / \partial h_{T-l}$")
    spectra = {name: after.lyapunov for name, (_, after) in found.items()} | {"RNN, exploding": exploding}
    diagnostics.plot_spectrum(spectra, ax=axes[0, 2])
    axes[0, 2].set_title("Lyapunov exponents: gradients explode above 0 and vanish below")
    axes[0, 2].set(xlabel="number $i$ of the exponent", ylabel=r"growth rate $\lambda_i$ (per step)")
    biases = {name: after.bias for name, (_, after) in found.items()}
    diagnostics.plot_bias(biases, ax=axes[1, 0], tolerance=TOLERANCE)
    axes[1, 0].set_title(f"truncated gradient; large dots: shortest window with an error below {TOLERANCE:g}")
    axes[1, 0].set(xlabel="truncation window $k$ (steps)", ylabel="relative error of the gradient")
    titles = (("gradient", "norm of the gradient"), ("loss", "nats per character"))
    for ax, which, (what, title) in zip(axes[1, 1:], (2, 1), titles, strict=True):
        for (name, curves), colour in zip(clipping.items(), ("tab:red", "tab:purple"), strict=True):
            ax.plot(curves[which], label=name, color=colour, lw=1)
        ax.set(xlabel="training step", ylabel=title, title=f"RNN with exploding gradients: {what}")
        ax.grid(color="0.85", lw=0.5)
    axes[1, 1].set(yscale="log")
    axes[1, 1].axhline(CLIP, color="0.25", lw=0.8, ls="--", label="clipping threshold")
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

    print(f"before -> after {steps} training steps; gradients are measured on held-out text\n")
    print(
        "cell   nats per character   gradient length    Lyapunov exponent   window for a bias of " + f"{TOLERANCE:.0%}"
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
    print(f"{time.perf_counter() - started:.0f} s including compilation; pictures: {out}")


def finite(name: str, costs: Any) -> None:
    if not np.isfinite(costs).all():
        raise FloatingPointError(f"the loss of {name} is {costs[~np.isfinite(costs)][0]}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("vanishing.py", description="Measure gradients. Defaults are in brackets.")
    parser.add_argument("--steps", type=int, default=1000, help="training steps [%(default)s]")
    parser.add_argument("--gain", type=float, default=3.0, help="gain of the exploding RNN [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="random seed [%(default)s]")
    parser.add_argument("--out", type=Path, default=Path("out/vanishing.png"), metavar="FILE", help="[%(default)s]")
    options = parser.parse_args(argv)
    if options.steps < 1 or not 0 <= options.seed < 2**31 or not 0 < options.gain < math.inf:
        parser.error("expected --steps >= 1, --seed from 0 to 2**31 - 1 and --gain > 0")
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.open("ab").close()  # detect an unwritable path before training
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
