"""A character model of real prose: an LSTM learns, letter by letter, what comes next.

    x_t      = E[s_t]                                    the embedding of character s_t
    h_t, c_t = LSTM(x_t; h_{t-1}, c_{t-1})
    p_t      = softmax(h_t W + b)                        what the model expects of s_{t+1}
    loss     = -1/T sum_t log2 p_t[s_{t+1}]              bits per character

The text is read in windows of T characters. The gradient stops at the edge of a window, the state flows on into the
next one: truncated backpropagation through time. jaxseq gives the recurrence, with a gradient derived by hand, and no
more than that: optax trains, tqdm shows progress, matplotlib draws. Before it trains, the script holds the gradient by
hand against `jax.grad` through the plain twin `jaxseq.reference.lstm`, on this very model and text.

    python examples/char_lm.py                      the language reference that every CPython carries
    python examples/char_lm.py --text novel.txt     your own
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped
from matplotlib.figure import Figure
from tqdm import tqdm

import jaxseq
from jaxseq import autoregressive

Options = argparse.Namespace

EMBEDDING = 64  # features of a character
UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # stands for every character that the training part lacks
TOLERANCE = {"float64": 1e-10, "float32": 1e-3}  # of the gradient by hand, relative to the largest entry of each array
RUN = 40  # characters that two texts share by quoting, no longer by chance
MEASUREMENTS = 8  # of the held-out part during training


# --- The text ---


def new_characters(train: str, held_out: str, run: int = RUN) -> np.ndarray:
    """Marks the characters of `held_out` outside every run of so many characters that `train` holds word for word.

    The topics of `help()` quote each other at length, and what is only recalled should not pass for foreseen.
    """
    runs = [held_out[i : i + run] for i in range(len(held_out) - run + 1)]
    quoted = set(runs).intersection(train[i : i + run] for i in range(len(train) - run + 1))
    new = np.ones(len(held_out), bool)
    for i, characters in enumerate(runs):
        if characters in quoted:
            new[i : i + run] = False
    return new


def windows(text: Shaped[Array, " n"], step: Int[Array, ""] | int, batch: int, T: int) -> Shaped[Array, "T+1 batch"]:
    """What one step reads: the inputs [:-1] and the targets [1:] at `batch` places spread over the text.

    Each step goes on where the one before it stopped. The text is a circle, so it can do so for ever.
    """
    places = jnp.arange(batch) * ((text.size - 1) // batch) + step * T
    return text[(places + jnp.arange(T + 1)[:, None]) % text.size]


# --- The model ---


class Model(NamedTuple):
    """The parameters, named as in the equations above."""

    E: Float[Array, "vocabulary D"]
    lstm: jaxseq.LSTMParams
    W: Float[Array, "H vocabulary"]
    b: Float[Array, " vocabulary"]


@partial(jax.jit, static_argnames=("vocabulary", "hidden"))
def init(key: PRNGKeyArray, *, vocabulary: int, hidden: int) -> Model:
    keys = jax.random.split(key, 3)
    return Model(
        E=jax.random.normal(keys[0], (vocabulary, EMBEDDING), jnp.float32),  # lstm_init expects unit variance
        lstm=jaxseq.lstm_init(keys[1], EMBEDDING, hidden),
        W=jax.random.normal(keys[2], (hidden, vocabulary), jnp.float32) * hidden**-0.5,
        b=jnp.zeros(vocabulary, jnp.float32),
    )


def zero_state(batch: int, hidden: int) -> jaxseq.LSTMState:
    return jaxseq.LSTMState(*jnp.zeros((2, batch, hidden), jnp.float32))


def bits(
    model: Model,
    carry: jaxseq.LSTMState | None,
    tokens: Int[Array, "T+1 batch"],
    lstm: Callable[..., Any] = jaxseq.lstm,
) -> tuple[Float[Array, "T batch"], jaxseq.LSTMState]:
    """The bits that each character costs, and the state after the last."""
    last, hs = lstm(model.lstm, carry, model.E[tokens[:-1]])
    nats = optax.softmax_cross_entropy_with_integer_labels(hs @ model.W + model.b, tokens[1:])
    return nats / math.log(2), last


def loss(model: Model, carry: jaxseq.LSTMState, tokens: Int[Array, "T+1 batch"], lstm: Callable[..., Any]) -> Any:
    costs, carry = bits(model, carry, tokens, lstm)
    return costs.mean(), carry


@partial(jax.jit, static_argnames=("batch", "T", "dtype"))
def gradient_difference(model: Model, text: Int[Array, " n"], *, batch: int, T: int, dtype: str) -> Float[Array, ""]:
    """max |by hand - by jax.grad| / max |by jax.grad|, the worst over all parameters and the first state.

    At the second window, where the state is no longer zero: so the comparison misses no term.
    """
    model = jax.tree.map(lambda a: a.astype(dtype), model)
    _, carry = bits(model, None, windows(text, 0, batch, T))
    gradient = partial(jax.grad(loss, argnums=(0, 1), has_aux=True), model, carry, windows(text, 1, batch, T))
    (by_hand, _), (by_jax, _) = gradient(jaxseq.lstm), gradient(jaxseq.reference.lstm)
    ratios = jax.tree.map(lambda a, b: jnp.abs(a - b).max() / jnp.abs(b).max(), by_hand, by_jax)
    return jnp.stack(jax.tree.leaves(ratios)).max()


@partial(jax.jit, static_argnames=("optimizer", "T"), donate_argnums=(0, 1, 2))
def train_step(
    model: Any, state: Any, carry: jaxseq.LSTMState, text: Int[Array, " n"], step: int, *, optimizer: Any, T: int
) -> tuple[Any, Any, jaxseq.LSTMState, Float[Array, ""]]:
    """One window. The gradient is that of the model alone, so it stops at the carry."""
    tokens = windows(text, step, carry.h.shape[0], T)
    (cost, carry), gradient = jax.value_and_grad(loss, has_aux=True)(model, carry, tokens, jaxseq.lstm)
    updates, state = optimizer.update(gradient, state, model)
    return optax.apply_updates(model, updates), state, carry, cost


@partial(jax.jit, static_argnames=("batch", "T"))
def evaluate(
    model: Model, text: Int[Array, " n"], new: Shaped[Array, " n"], *, batch: int, T: int
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean bits per character of a text read once, in `batch` streams: of all its characters, and of the new ones."""

    def read(carry: jaxseq.LSTMState, step: Int[Array, ""]) -> Any:
        costs, carry = bits(model, carry, windows(text, step, batch, T))
        return carry, (costs, windows(new, step, batch, T)[1:])

    steps = jnp.arange((text.size - 1) // batch // T)
    _, (costs, marks) = lax.scan(read, zero_state(batch, model.W.shape[0]), steps)
    return costs.mean(), costs.mean(where=marks)


@partial(jax.jit, static_argnames=("temperature", "length"))
def write(
    model: Model, key: PRNGKeyArray, prompt: Int[Array, " T"], temperature: float, *, length: int
) -> Int[Array, " length"]:
    """Reads the prompt, then goes on by itself: each character is drawn from p_t^(1/temperature) and read in turn."""
    carry, _ = jaxseq.lstm(model.lstm, None, model.E[prompt[:-1]])

    def step(carry: jaxseq.LSTMState, token: Int[Array, ""]) -> Any:
        carry, h = jaxseq.lstm_cell(model.lstm, carry, model.E[token])
        return carry, h @ model.W + model.b

    return autoregressive.sample(key, step, carry, prompt[-1], length, temperature=temperature)[1]


# --- Options, mistakes, and the curve that stays ---


class Parser(argparse.ArgumentParser):
    """A mistake costs its user one line, not a page of usage."""

    def error(self, message: str) -> NoReturn:  # noqa: D102
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(word: str, kind: type = int, least: float = 1, most: float = 2**31 - 1) -> Any:
    try:
        value = kind(word)
    except ValueError:
        value = math.nan
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"expected {kind.__name__} from {least} to {most}, got {word!r}")
    return value


def arguments(argv: list[str] | None) -> tuple[Options, str, str]:
    """The options, the training part of the text, and the held-out one. Every mistake ends here, with status 2."""
    parser = Parser(prog="char_lm.py", description="Trains an LSTM character model. Defaults stand in brackets.")
    add, natural, real = parser.add_argument, partial(number, least=0), partial(number, kind=float, least=1e-6)
    add("--text", type=Path, metavar="FILE", help="a text in UTF-8 [the language reference of this Python]")
    add("--steps", type=number, default=1600, help="windows to train on [%(default)s]")
    add("--hidden", type=number, default=256, help="units of the LSTM [%(default)s]")
    add("--window", type=number, default=64, help="characters that the gradient reaches back [%(default)s]")
    add("--batch", type=number, default=32, help="places of the text that are read side by side [%(default)s]")
    add("--learning-rate", type=real, default=4e-3, help="at its peak; it decays as a cosine [%(default)s]")
    add("--seed", type=natural, default=0, help="of all that is random [%(default)s]")
    add("--sample", type=natural, default=600, help="characters to write at the end [%(default)s]")
    add("--temperature", type=real, default=0.7, help="of the sample: below 1, likelier is commoner [%(default)s]")
    add("--out", type=Path, default=Path("out/char_lm"), metavar="DIR", help="for curve and sample [%(default)s]")
    add("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(argv)

    try:
        text = options.text.read_text("utf-8-sig") if options.text else "\n\n".join(topics[k] for k in sorted(topics))
    except OSError as error:
        parser.error(f"cannot read {options.text}: {error.strerror}")
    except UnicodeDecodeError as error:
        parser.error(f"{options.text} is not UTF-8: {error.reason} at byte {error.start}")
    least = options.batch * options.window + 1  # characters that one step reads
    if not text:
        parser.error(f"{options.text} is empty")
    if len(text) < 2 * least:
        parser.error(
            f"the text is too short: {len(text)} characters, where one step in training and one held out read "
            f"{2 * least}; try a smaller --batch or --window"
        )
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=options.out).close()
    except OSError as error:
        parser.error(f"cannot write to {options.out}: {error.strerror}")
    held_out = max(least, min(len(text) // 20, 2**16))
    return options, text[:-held_out], text[-held_out:]


def save(curve: dict[str, Any], out: Path) -> None:
    """Leaves the curve as figures and as a picture."""
    (out / "curve.json").write_text(json.dumps(curve, default=str, indent=1), "utf-8")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    span = max(1, min(50, len(curve["steps"]) // 10))  # of the running mean
    smooth = np.convolve(curve["train_bits"], np.ones(span) / span, "valid")
    axes.plot(curve["steps"], curve["train_bits"], color="C0", alpha=0.25, linewidth=0.8)
    middle = curve["steps"][span // 2 :][: smooth.size]
    axes.plot(middle, smooth, color="C0", label="training")
    axes.plot(curve["held_out_steps"], curve["held_out_bits"], "o-", color="C1", markersize=4, label="held out")
    axes.set(xlabel="step", ylabel="bits per character", title="An LSTM learns to read")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out / "curve.png", dpi=150)


# --- The job ---


def learn(options: Options, model: Any, text: Int[Array, " n"], measure: Callable[[Any], Any], curve: Any) -> Model:
    """Trains, and notes the curve on the way."""
    batch, T, steps = options.batch, options.window, options.steps
    schedule = optax.cosine_decay_schedule(options.learning_rate, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    state, carry = optimizer.init(model), zero_state(batch, options.hidden)
    measured = ""
    with tqdm(total=steps * batch * T, unit="char", unit_scale=True, mininterval=0.5, disable=options.quiet) as bar:
        for step in range(1, steps + 1):
            model, state, carry, cost = train_step(model, state, carry, text, step - 1, optimizer=optimizer, T=T)
            if not math.isfinite(cost):
                raise FloatingPointError(f"the loss is {cost} at step {step}: try a smaller --learning-rate")
            curve["steps"].append(step)
            curve["train_bits"].append(float(cost))
            if step % math.ceil(steps / MEASUREMENTS) == 0 or step == steps:
                curve["held_out_steps"].append(step)
                curve["held_out_bits"].append(measure(model)[0])
                measured = f", held out {curve['held_out_bits'][-1]:.3f}"
            bar.set_postfix_str(f"{np.mean(curve['train_bits'][-50:]):.3f} bits/char{measured}", refresh=False)
            bar.update(batch * T)
    return model


def run(options: Options, train: str, held_out: str, curve: dict[str, Any]) -> None:
    """Compares, trains, measures, writes; `curve` is filled on the way."""
    started = time.perf_counter()
    batch, T = options.batch, options.window
    key_model, key_sample = jax.random.split(jax.random.key(options.seed))
    vocabulary = [UNKNOWN, *sorted({*train} - {UNKNOWN})]
    index = {character: i for i, character in enumerate(vocabulary)}
    text, unseen = (jnp.array(np.array([index.get(c, 0) for c in part], np.int32)) for part in (train, held_out))
    new = jnp.array(new_characters(train, held_out))
    model = init(key_model, vocabulary=len(vocabulary), hidden=options.hidden)
    print(f"text: {len(train)} characters to train on, {len(vocabulary) - 1} different; {len(held_out)} held out")

    for dtype, tolerance in TOLERANCE.items():
        with jax.enable_x64(dtype == "float64"):
            difference = float(gradient_difference(model, text, batch=batch, T=T, dtype=dtype))
        curve["gradient_difference"][dtype] = difference
        print(f"gradient by hand against jax.grad, {dtype}: largest relative difference {difference:.1e}")
        if not difference <= tolerance:  # so written, a NaN fails too
            raise FloatingPointError(f"the gradient by hand is not that of jax.grad: {difference:.1e} in {dtype}")

    def measure(model: Model) -> list[float]:
        return [float(cost) for cost in evaluate(model, unseen, new, batch=batch, T=T)]

    training = time.perf_counter()
    model = learn(options, model, text, measure, curve)
    seconds = time.perf_counter() - training
    total, of_new = measure(model)
    tokens = write(model, key_sample, unseen[:T], options.temperature, length=options.sample)
    sample = "".join(vocabulary[token] for token in tokens.tolist())
    (options.out / "sample.txt").write_text(sample, "utf-8")
    quoted, speed = 1 - float(new.mean()), options.steps * batch * T / seconds
    curve |= {"held_out": total, "held_out_new": None if math.isnan(of_new) else of_new, "held_out_quoted": quoted}
    curve |= {"characters_per_second": speed, "seconds": time.perf_counter() - started}
    save(curve, options.out)
    print(f"held out: {total:.3f} bits per character")
    if 0 < quoted < 1:
        print(f"  ({quoted:.0%} of it is in the training part too, word for word; the rest costs {of_new:.3f} bits)")
    print(f"{curve['seconds']:.0f} s; in training {speed:.0f} characters a second")
    print(f"after {held_out[:T]!r} it writes:\n\n{sample}\n\ncurve.png, curve.json and sample.txt are in {options.out}")


def main(argv: list[str] | None = None) -> int:
    options, train, held_out = arguments(argv)
    curve: dict[str, Any] = {"options": vars(options), "gradient_difference": {}}
    curve |= {name: [] for name in ("steps", "train_bits", "held_out_steps", "held_out_bits")}
    try:
        run(options, train, held_out, curve)
    except FloatingPointError as error:
        print(f"char_lm.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if curve["steps"]:
            save(curve, options.out)
        print(f"interrupted after {len(curve['steps'])} of {options.steps} steps", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
