"""Effect of order: train the same model on a text, on its shuffled words and on its shuffled characters.

    P(x_1, ..., x_T)  = prod_t P(x_t | x_<t)             the chain rule
    h_t               = GRU(E[x_{t-1}]; h_{t-1})         a state that summarizes x_<t: `autoregressive.latent`
    P(x_t | x_<t)     = softmax(h_t W + b)[x_t]          `autoregressive.log_probability`
    bits              = -1/T sum_t log2 P(x_t | x_<t)    per character: `autoregressive.log_likelihood`

    H                 = -sum_v p_v log2 p_v              the unigram entropy, p_v the frequency of character v

For independent characters, P(x_t | x_<t) = P(x_t), and no model needs fewer than H bits on average. This holds for the
shuffled characters. The text itself needs far fewer, and the shuffled words are in between: a model can learn their
spelling, but not their order. Shuffling, which is harmless for i.i.d. data, removes the structure of a sequence.

The text is the language reference included in every CPython. Its last twentieth is held out. The whole text is shuffled
before the split, so that both parts have the same distribution. Without shuffling their distributions differ, but the
text quotes itself, which reduces the loss. Model, initial parameters, characters and steps are the same for all three.

    python examples/shuffled.py                  a minute on two cores; writes out/shuffled.png
    python examples/shuffled.py --steps 1600     longer: the text improves, the shuffled characters cannot
"""

import argparse
import math
import random
import re
import sys
import time
from collections import Counter
from functools import cache, partial
from pathlib import Path
from pydoc_data.topics import topics
from textwrap import fill
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray
from matplotlib.figure import Figure
from tqdm import tqdm

import jaxseq
from jaxseq import autoregressive

Past = tuple[Float[Array, "batch H"], Int[Array, " batch"]]  # the state, and the next input character
Curve = list[tuple[int, float]]  # (step, held-out bits per character)

EMBEDDING, HIDDEN = 64, 192
BATCH, WINDOW = 32, 64  # batch size, and characters per truncation window
LEARNING_RATE = 5e-3  # initial value, with cosine decay
MEASUREMENTS = 12  # evaluations on the held-out part during training
SAMPLE = 360  # characters
COLOURS = {"text": "C0", "words shuffled": "C2", "characters shuffled": "C3"}


# --- Text and order ---


def orders(text: str, seed: int) -> dict[str, str]:
    """Return the same characters in three orders. A word includes the white space that follows it."""
    generator = random.Random(seed)
    words, characters = re.findall(r"\S+\s*|\s+", text), list(text)
    generator.shuffle(words)
    generator.shuffle(characters)
    return dict(zip(COLOURS, (text, "".join(words), "".join(characters)), strict=True))


def unigram_entropy(text: str) -> float:
    """Return H in bits."""
    return -sum(n / len(text) * math.log2(n / len(text)) for n in Counter(text).values())


def streams(text: str, alphabet: list[str]) -> Int[Array, "T batch"]:
    """Encode the text and split it into streams of equal length, one per column. Drop the remaining characters."""
    index = {character: i for i, character in enumerate(alphabet)}
    tokens = np.array([index[c] for c in text], np.int32)
    return jnp.asarray(tokens[: len(text) // BATCH * BATCH].reshape(BATCH, -1).T)


# --- The model ---


class Model(NamedTuple):
    """The parameters, named as in the equations above."""

    E: Float[Array, "vocabulary D"]
    gru: jaxseq.GRUParams
    W: Float[Array, "H vocabulary"]
    b: Float[Array, " vocabulary"]


@partial(jax.jit, static_argnames="vocabulary")
def init(key: PRNGKeyArray, *, vocabulary: int) -> Model:
    keys = jax.random.split(key)
    return Model(
        E=jax.random.normal(keys[0], (vocabulary, EMBEDDING), jnp.float32),  # gru_init expects unit variance
        gru=jaxseq.gru_init(keys[1], EMBEDDING, HIDDEN),
        W=jnp.zeros((HIDDEN, vocabulary), jnp.float32),  # uniform initial distribution
        b=jnp.zeros(vocabulary, jnp.float32),
    )


def beginning(batch: int) -> Past:
    return jnp.zeros((batch, HIDDEN), jnp.float32), jnp.zeros(batch, jnp.int32)


def bits(model: Model, past: Past, xs: Int[Array, "T batch"]) -> tuple[Float[Array, ""], Past]:
    """Return (bits per character, the input of the next window)."""
    h, x = past
    h, hs = autoregressive.latent(jaxseq.gru, model.gru, h, xs, first=x, read=lambda x: model.E[x])
    each = autoregressive.log_probability(xs, logits=hs @ model.W + model.b)
    return -autoregressive.log_likelihood(each).sum() / (xs.size * math.log(2)), (h, xs[-1])


@partial(jax.jit, static_argnames="optimizer")
def train_step(
    model: Any, state: Any, past: Past, xs: Int[Array, "T batch"], *, optimizer: Any
) -> tuple[Any, Any, Past, Float[Array, ""]]:
    """Train on one window. The gradient is taken with respect to the model only, so it is cut at the carried state."""
    (cost, past), gradient = jax.value_and_grad(bits, has_aux=True)(model, past, xs)
    updates, state = optimizer.update(gradient, state, model)
    return optax.apply_updates(model, updates), state, past, cost


@jax.jit
def measure(model: Model, xs: Int[Array, "T batch"]) -> Float[Array, ""]:
    return bits(model, beginning(xs.shape[1]), xs)[0]


@partial(jax.jit, static_argnames="length")
def write(model: Model, key: PRNGKeyArray, first: int, *, length: int) -> Int[Array, " length"]:
    """Sample a text from the model, character by character."""

    def step(h: Any, x: Any) -> tuple[Any, Any]:
        h, y = jaxseq.gru_cell(model.gru, h, model.E[x])
        return h, y @ model.W + model.b

    return autoregressive.sample(key, step, beginning(1)[0][0], first, length)[1]


# --- Plot ---


def draw(curves: dict[str, Curve], samples: dict[str, str], H: float) -> Figure:
    """Plot the learning curve of each order, and a sample of each model."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, curve in curves.items():
        label = f"{name}: {curve[-1][1]:.2f}"
        left.plot(*zip(*curve, strict=True), "o-", color=COLOURS[name], markersize=4, label=label)
    left.axhline(H, color="black", linestyle="--", linewidth=1, label=f"entropy of single characters: {H:.2f}")
    left.set_title("The same model and characters, three orders", loc="left")
    left.set(xlabel="training step", ylabel="held-out bits per character", ylim=(0, None))
    left.grid(alpha=0.3)
    left.spines[["top", "right"]].set_visible(False)
    left.legend(title="at the end", loc="lower left")
    right.set_axis_off()
    right.set_title("What the models write", loc="left")
    for place, (name, sample) in enumerate(samples.items()):
        y = 1 - place / len(samples)
        right.text(0, y, name, color=COLOURS[name], va="top", weight="bold")
        right.text(0, y - 0.055, fill(sample, 72), va="top", family="monospace", size=9, parse_math=False)
    return figure


# --- Main program ---


@cache  # one object, so that `train_step` is compiled once
def rule(steps: int) -> optax.GradientTransformation:
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))


def learn(model: Any, train: Array, held_out: Array, *, steps: int, bar: Any) -> tuple[Model, Curve]:
    """Train, and return the model and its learning curve. The training text wraps around at its end."""
    optimizer = rule(steps)
    state, past, curve = optimizer.init(model), beginning(BATCH), [(0, float(measure(model, held_out)))]
    for step in range(1, steps + 1):
        begin = (step - 1) % (len(train) // WINDOW) * WINDOW
        model, state, past, cost = train_step(model, state, past, train[begin : begin + WINDOW], optimizer=optimizer)
        if not math.isfinite(cost):
            raise FloatingPointError(f"the loss is {cost} at step {step}")
        if step % math.ceil(steps / MEASUREMENTS) == 0 or step == steps:
            curve.append((step, float(measure(model, held_out))))
        bar.set_postfix_str(f"{cost:.2f} bits/char", refresh=False)
        bar.update()
    return model, curve


def run(seed: int, steps: int, out: Path, quiet: bool) -> None:
    """Train on each order, evaluate, sample, and plot."""
    started = time.perf_counter()
    text = "\n\n".join(topics[k] for k in sorted(topics))
    alphabet, H = sorted({*text}), unigram_entropy(text)
    key_model, key_sample = jax.random.split(jax.random.key(seed))
    print(f"{len(text)} characters, {len(alphabet)} different; unigram entropy {H:.3f} bits")
    curves: dict[str, Curve] = {}
    samples: dict[str, str] = {}
    for name, ordered in orders(text, seed).items():
        end = len(text) - len(text) // 20
        train, held_out = streams(ordered[:end], alphabet), streams(ordered[end:], alphabet)
        with tqdm(total=steps, desc=name, unit="step", mininterval=0.5, disable=quiet) as bar:
            first = init(key_model, vocabulary=len(alphabet))
            model, curves[name] = learn(first, train, held_out, steps=steps, bar=bar)
        written = write(model, key_sample, alphabet.index("\n"), length=SAMPLE).tolist()
        samples[name] = " ".join("".join(alphabet[i] for i in written).split())
        own = unigram_entropy(ordered[end:])
        print(f"{name}: held out {curves[name][-1][1]:.3f} bits per character; its unigram entropy is {own:.3f}")
        print(f"  {samples[name]}")
    draw(curves, samples, H).savefig(out, dpi=110, format="png", bbox_inches="tight")
    print(f"{out}; {time.perf_counter() - started:.0f} s including compilation")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("shuffled.py", description="Train on shuffled text. Defaults are in brackets.")
    parser.add_argument("--steps", type=int, default=400, help="training steps per order [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="random seed [%(default)s]")
    parser.add_argument("--out", type=Path, default=Path("out/shuffled.png"), metavar="FILE", help="[%(default)s]")
    parser.add_argument("--quiet", action="store_true", help="hide the progress bar")
    options = parser.parse_args(argv)
    if options.steps < 1 or not 0 <= options.seed < 2**31:
        parser.error("expected --steps >= 1 and --seed from 0 to 2**31 - 1")
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.open("ab").close()  # detect an unwritable path before training
    except OSError as error:
        parser.error(f"cannot write to {options.out}: {error.strerror}")
    try:
        run(options.seed, options.steps, options.out, options.quiet)
    except FloatingPointError as error:
        print(f"shuffled.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
