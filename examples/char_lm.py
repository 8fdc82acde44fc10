"""Character-level language model: an LSTM predicts the next character of a text.

    x_t      = E[s_t]                                    the embedding of character s_t
    h_t, c_t = LSTM(x_t; h_{t-1}, c_{t-1})
    p_t      = softmax(h_t W + b)                        the predicted distribution of s_{t+1}
    loss     = -1/T sum_t log2 p_t[s_{t+1}]              bits per character

Training uses truncated backpropagation through time: the text is processed in windows of T characters, the state is
carried from one window to the next, and the gradient is cut between windows. jaxseq provides the recurrence and its
hand-derived gradient; optax trains, tqdm shows progress and matplotlib plots. Before training, the script compares the
gradient of jaxseq with `jax.grad` of the reference implementation `jaxseq.reference.lstm`, on the same model and text.

    python examples/char_lm.py                      train on the language reference included in every CPython
    python examples/char_lm.py --text novel.txt     train on another text
    python examples/char_lm.py --resume             write checkpoints (checkpoints.py) and resume from the last one

char_lm_processes.py runs the same model in several processes.
"""

import argparse
import hashlib
import io
import json
import math
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax
from checkpoints import CheckpointError, Checkpoints
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Sharding, SingleDeviceSharding
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped
from matplotlib.figure import Figure
from tqdm import tqdm

import jaxseq
from jaxseq import autoregressive

Options = argparse.Namespace

EMBEDDING = 64  # size of a character embedding
UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # replaces every character that does not occur in the training part
TOLERANCE = {"float64": 1e-10, "float32": 1e-3}  # of jaxseq's gradient, relative to the largest entry of each array
RUN = 40  # a common substring of at least this many characters counts as a quotation
MEASUREMENTS = 8  # evaluations on the held-out part during training
LINES, WIDTH, BITS = 11, 92, 8  # plotted lines of each text, their length, and the bits of the darkest background
CHECKPOINTS = "checkpoints"  # folder in --out
INTERVAL = 100  # default number of steps between checkpoints
DECISIVE = ("steps", "hidden", "window", "batch", "learning_rate", "dropout", "seed")  # with the text, fix every loss


# --- The text ---


def new_characters(train: str, held_out: str, run: int = RUN) -> np.ndarray:
    """Return a mask of the characters of `held_out` outside all substrings of length `run` that also occur in `train`.

    The topics of `help()` quote each other at length, and a model can predict a quotation from memory.
    """
    runs = [held_out[i : i + run] for i in range(len(held_out) - run + 1)]
    quoted = set(runs).intersection(train[i : i + run] for i in range(len(train) - run + 1))
    new = np.ones(len(held_out), bool)
    for i, characters in enumerate(runs):
        if characters in quoted:
            new[i : i + run] = False
    return new


def streams(text: Shaped[np.ndarray, " n"], batch: int) -> Shaped[np.ndarray, "batch L"]:
    """Split the text into `batch` streams of equal length, one per batch row. Drop the remaining characters."""
    return text[: text.size // batch * batch].reshape(batch, -1)


def windows(text: Shaped[Array, "batch L"], step: Int[Array, ""] | int, T: int) -> Shaped[Array, "T+1 batch"]:
    """Return the characters of one training step: of every stream, the inputs [:-1] and the targets [1:].

    Each step starts where the previous one ended. A stream wraps around at its end, so training can run for any number
    of steps. Streams are independent of each other, so each device needs only its own.
    """
    return text[:, (step * T + jnp.arange(T + 1)) % text.shape[1]].T


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


class Training(NamedTuple):
    """Training state: everything that the next step depends on. Checkpoints store it."""

    model: Any  # a `Model`; Any because the annotations of optax do not accept it
    moments: Any  # of Adam
    carry: jaxseq.LSTMState
    step: Int[Array, ""]  # number of completed steps, which determines the position in the text
    key: PRNGKeyArray  # for dropout in the following steps


def zero_state(batch: int, hidden: int) -> jaxseq.LSTMState:
    return jaxseq.LSTMState(*jnp.zeros((2, batch, hidden), jnp.float32))


def bits(
    model: Model,
    carry: jaxseq.LSTMState | None,
    tokens: Int[Array, "T+1 batch"],
    lstm: Callable[..., Any] = jaxseq.lstm,
    thin: Callable[[Array], Array] = lambda hs: hs,
) -> tuple[Float[Array, "T batch"], jaxseq.LSTMState]:
    """Return the loss of each character in bits, and the final state. `thin` applies dropout to the outputs."""
    last, hs = lstm(model.lstm, carry, model.E[tokens[:-1]])
    hs = thin(hs)
    nats = optax.softmax_cross_entropy_with_integer_labels(hs @ model.W + model.b, tokens[1:])
    return nats / math.log(2), last


def loss(model: Model, carry: jaxseq.LSTMState, tokens: Int[Array, "T+1 batch"], *how: Callable[..., Any]) -> Any:
    costs, carry = bits(model, carry, tokens, *how)
    return costs.mean(), carry


def dropout(key: PRNGKeyArray, rate: float, hs: Float[Array, "T batch H"]) -> Float[Array, "T batch H"]:
    """Set each output to 0 with probability `rate`, and scale the others by 1 / (1 - rate) to preserve the mean."""
    return jnp.where(jax.random.bernoulli(key, 1 - rate, hs.shape), hs / (1 - rate), 0) if rate else hs


@partial(jax.jit, static_argnames=("T", "dtype"))
def gradient_difference(model: Model, text: Int[Array, "batch L"], *, T: int, dtype: str) -> Float[Array, ""]:
    """Return max |jaxseq - jax.grad| / max |jax.grad|, the largest over all parameters and the initial state.

    The comparison uses the second window, where the state is not zero, so that no term of the gradient vanishes.
    """
    model = jax.tree.map(lambda a: a.astype(dtype), model)
    _, carry = bits(model, None, windows(text, 0, T))
    gradient = partial(jax.grad(loss, argnums=(0, 1), has_aux=True), model, carry, windows(text, 1, T))
    (ours, _), (expected, _) = gradient(jaxseq.lstm), gradient(jaxseq.reference.lstm)
    ratios = jax.tree.map(lambda a, b: jnp.abs(a - b).max() / jnp.abs(b).max(), ours, expected)
    return jnp.stack(jax.tree.leaves(ratios)).max()


@cache  # jit hashes an optimizer by identity; a new one would be recompiled
def adam(learning_rate: float, steps: int) -> Any:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(learning_rate, steps)))


@partial(jax.jit, static_argnames=("optimizer", "T", "rate"), donate_argnums=0)
def train_step(
    training: Training, text: Int[Array, "batch L"], *, optimizer: Any, T: int, rate: float = 0.0
) -> tuple[Training, Float[Array, ""]]:
    """Train on one window. The gradient is taken with respect to the model only, so it is cut at the carry."""
    model, moments, carry, step, key = training
    key, now = jax.random.split(key)
    how = jaxseq.lstm, partial(dropout, now, rate)
    (cost, carry), gradient = jax.value_and_grad(loss, has_aux=True)(model, carry, windows(text, step, T), *how)
    updates, moments = optimizer.update(gradient, moments, model)
    return Training(optax.apply_updates(model, updates), moments, carry, step + 1, key), cost


@partial(jax.jit, static_argnames="T")
def evaluate(
    model: Model, text: Int[Array, "batch L"], new: Shaped[Array, "batch L"], *, T: int
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return the mean bits per character of one pass over the text: of all its characters, and of the new ones."""

    def window(carry: jaxseq.LSTMState, step: Int[Array, ""]) -> Any:
        costs, carry = bits(model, carry, windows(text, step, T))
        return carry, (costs, windows(new, step, T)[1:])

    batch, L = text.shape
    _, (costs, marks) = lax.scan(window, zero_state(batch, model.W.shape[0]), jnp.arange((L - 1) // T))
    return costs.mean(), costs.mean(where=marks)


@jax.jit
def surprise(model: Model, text: Int[Array, "n+1"]) -> Float[Array, " n"]:
    """Return the bits that each character after the first costs."""
    return bits(model, None, text[:, None])[0][:, 0]


@partial(jax.jit, static_argnames=("temperature", "length"))
def write(
    model: Model, key: PRNGKeyArray, prompt: Int[Array, " T"], temperature: float, *, length: int
) -> Int[Array, " length"]:
    """Process the prompt, then generate: sample each character from p_t^(1/temperature) and feed it back as input."""
    carry, _ = jaxseq.lstm(model.lstm, None, model.E[prompt[:-1]])

    def step(carry: jaxseq.LSTMState, token: Int[Array, ""]) -> Any:
        carry, h = jaxseq.lstm_cell(model.lstm, carry, model.E[token])
        return carry, h @ model.W + model.b

    return autoregressive.sample(key, step, carry, prompt[-1], length, temperature=temperature)[1]


# --- Placement of arrays ---


class Placement(NamedTuple):
    """Shardings of the training state: data parallel, with the parameters replicated on every device."""

    rows: Sharding  # of arrays with a batch axis
    whole: Sharding  # of all other arrays

    def start(self, seed: int, optimizer: Any, *, vocabulary: int, hidden: int, batch: int) -> Training:
        """Return the initial training state, created with its sharding."""

        def make() -> Training:
            key, _, key_dropout = jax.random.split(jax.random.key(seed), 3)
            model = init(key, vocabulary=vocabulary, hidden=hidden)
            return Training(
                model, optimizer.init(model), zero_state(batch, hidden), jnp.zeros((), jnp.int32), key_dropout
            )

        where: list[Any] = [self.whole, self.whole, self.rows, self.whole, self.whole]
        return jax.jit(make, out_shardings=Training(*where))()

    def lay(self, parts: Shaped[np.ndarray, "batch L"]) -> Shaped[Array, "batch L"]:
        """Return the streams as a sharded array. Each process contributes the rows of its own devices."""
        indices = self.rows.addressable_devices_indices_map(parts.shape).values()
        mine = sorted({index[0].indices(len(parts))[:2] for index in indices if index})
        here = np.concatenate([parts[start:stop] for start, stop in mine])
        return jax.make_array_from_process_local_data(self.rows, here, parts.shape)


def one_device() -> Placement:
    return Placement(*[SingleDeviceSharding(jax.local_devices()[0])] * 2)


# --- Options, errors and the learning curve ---


class Stopped(Exception):  # noqa: N818  # a request by the user, not an error
    """Raised after SIGTERM or Ctrl-C has stopped the training between two steps."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def signals() -> Iterator[Callable[[], int]]:
    """Defer the first SIGTERM or Ctrl-C: yield a function that returns its number, or 0 if none arrived.

    The second signal is handled as usual.
    """
    arrived: list[int] = []

    def note(number: int, _: Any) -> None:
        arrived.append(number)
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, note) or signal.SIG_DFL for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: arrived[0] if arrived else 0
    finally:
        restore()


def agreed(number: int) -> int:
    """Return the largest signal number over all processes, so that all of them stop after the same step."""
    if jax.process_count() == 1:
        return number
    return int(np.max(multihost_utils.process_allgather(np.int32(number))))


def escape_output() -> None:
    """Escape characters that the encoding of the terminal does not support; the text may contain any character."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class Parser(argparse.ArgumentParser):
    """Argument parser that reports an error in one line, without the usage."""

    def error(self, message: str) -> NoReturn:  # noqa: D102
        self.exit(2, f"{self.prog}: error: {message}\n")


class Mistake(Exception):  # noqa: N818  # an error of the user, not of the program
    """Invalid options that are detected after parsing."""


def number(word: str, kind: type = int, least: float = 1, most: float = 2**31 - 1) -> Any:
    try:
        value = kind(word)
    except ValueError:
        value = math.nan
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"expected {kind.__name__} from {least} to {most}, got {word!r}")
    return value


def parser(prog: str = "char_lm.py") -> Parser:
    parser = Parser(prog=prog, description="Train an LSTM character model. Defaults are in brackets.")
    add, natural, real = parser.add_argument, partial(number, least=0), partial(number, kind=float, least=1e-6)
    share = partial(number, kind=float, least=0, most=0.99)
    add("--text", type=Path, metavar="FILE", help="text file in UTF-8 [the Python language reference]")
    add("--steps", type=number, default=1600, help="training steps, one window each [%(default)s]")
    add("--hidden", type=number, default=256, help="hidden size of the LSTM [%(default)s]")
    add("--window", type=number, default=64, help="characters in a truncation window [%(default)s]")
    add("--batch", type=number, default=32, help="batch size [%(default)s]")
    add("--learning-rate", type=real, default=4e-3, help="initial learning rate, with cosine decay [%(default)s]")
    add("--dropout", type=share, default=0.0, help="dropout rate of the LSTM outputs [%(default)s]")
    add("--seed", type=natural, default=0, help="random seed [%(default)s]")
    add("--sample", type=natural, default=600, help="characters to generate after training [%(default)s]")
    add("--temperature", type=real, default=0.7, help="sampling temperature [%(default)s]")
    add("--out", type=Path, default=Path("out/char_lm"), metavar="DIR", help="output folder [%(default)s]")
    add("--quiet", action="store_true", help="hide the progress bar")
    add("--checkpoint-every", type=number, metavar="N", help=f"steps per checkpoint [none; with --resume {INTERVAL}]")
    add("--keep", type=number, default=3, metavar="N", help="number of latest checkpoints to keep [%(default)s]")
    add("--resume", action="store_true", help="resume from the latest checkpoint in --out, if there is one")
    return parser


def arguments(argv: list[str] | None, parser: Parser) -> tuple[Options, str, str]:
    """Return the options, the training part of the text and the held-out part. Exit with status 2 on an error."""
    options = parser.parse_args(argv)
    if options.resume and options.checkpoint_every is None:
        options.checkpoint_every = INTERVAL
    try:
        text = options.text.read_text("utf-8-sig") if options.text else "\n\n".join(topics[k] for k in sorted(topics))
    except OSError as error:
        parser.error(f"cannot read {options.text}: {error.strerror}")
    except UnicodeDecodeError as error:
        parser.error(f"{options.text} is not UTF-8: {error.reason} at byte {error.start}")
    least = options.batch * (options.window + 1)  # characters in one step
    if not text:
        parser.error(f"{options.text} is empty")
    if len(text) < 2 * least:
        parser.error(
            f"the text is too short: it has {len(text)} characters, and one training step and one held-out step need "
            f"{2 * least}; use a smaller --batch or --window"
        )
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=options.out).close()
    except OSError as error:
        parser.error(f"cannot write to {options.out}: {error.strerror}")
    earlier = options.out / CHECKPOINTS
    if options.checkpoint_every and not options.resume and earlier.is_dir() and any(earlier.iterdir()):
        parser.error(f"{earlier} is not empty: pass --resume to continue that run, or another --out to start a new one")
    held_out = max(least, min(len(text) // 20, 2**16))
    return options, text[:-held_out], text[-held_out:]


def page(axes: Any, text: str, costs: Any, title: str) -> None:
    """Write a text, with a background that is darker red where a character costs more bits."""
    shades, row, column = np.zeros((LINES, WIDTH)), 0, 0
    for c, cost in zip(text, costs, strict=False):
        if c == "\n" or column == WIDTH:
            row, column = row + 1, 0
        if row == LINES:
            break
        if c != "\n":
            shades[row, column] = min(1, cost / BITS)
            shown = (
                c if c in "‘’“”–—…" or (ord(c) < 0x250 and c.isprintable()) else "□"
            )  # others may not be in the font
            style = {"family": "monospace", "fontsize": 10, "ha": "center", "va": "center", "parse_math": False}
            axes.text(column, row, shown, **style)
            column += 1
    axes.imshow(1 - 0.75 * shades[..., None] * (0, 1, 1), aspect="auto")  # from white to red
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, loc="left", fontsize=11)


def save(curve: dict[str, Any], out: Path, held_out: str = "", costs: Any = (), sample: str = "") -> None:
    """Write the learning curve as JSON, and a plot of it. After training, the plot contains two texts."""
    (out / "curve.json").write_text(json.dumps(curve, default=str, indent=1), "utf-8")
    figure = Figure(figsize=(11, 10) if sample else (11, 4.5), layout="constrained")
    axes, *pages = figure.subplots(3, 1, height_ratios=(1.6, 1, 1)) if sample else [figure.subplots()]
    span = max(1, min(50, len(curve["steps"]) // 10))  # of the running mean
    smooth = np.convolve(curve["train_bits"], np.ones(span) / span, "valid")
    axes.plot(curve["steps"], curve["train_bits"], color="C0", alpha=0.25, linewidth=0.8)
    middle = curve["steps"][span // 2 :][: smooth.size]
    axes.plot(middle, smooth, color="C0", label=f"training text, mean of {span} steps")
    if curve["held_out_bits"]:
        label = f"held-out text: {curve['held_out_bits'][-1]:.2f} at the end"
        axes.plot(curve["held_out_steps"], curve["held_out_bits"], "o-", color="C1", markersize=4, label=label)
    axes.set(xlabel="training step", ylabel="bits per character", ylim=(0, None))
    axes.set_title("An LSTM learns to predict the next character of a text", loc="left")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    if sample:
        page(
            pages[0],
            held_out,
            costs,
            f"Held-out text: the bits that each character costs (white: 0, red: {BITS} or more)",
        )
        page(pages[1], sample, np.zeros(len(sample)), "Text written by the model, one character after the other")
    figure.savefig(out / "curve.png", dpi=110)


# --- Main program ---


def identity(options: Options, train: str, held_out: str) -> dict[str, Any]:
    """Return the options and the hash of the text; runs with equal values have equal losses."""
    text = hashlib.sha256(json.dumps([train, held_out]).encode()).hexdigest()
    return {name: getattr(options, name) for name in DECISIVE} | {"text": text}


def is_note_of(notes: Any, step: int, run: dict[str, Any], curve: dict[str, Any]) -> bool:
    """Return True if the notes of a checkpoint have the structure that `run` writes."""
    try:
        lists = [notes["curve"][name] for name, value in curve.items() if isinstance(value, list)]
        return {*notes["run"]} == {*run} and all(isinstance(a, list) for a in lists) and len(lists[0]) == step
    except (KeyError, TypeError):
        return False


def resumed(checkpoints: Checkpoints, run: dict[str, Any], training: Training, curve: dict[str, Any]) -> Training:
    """Return the training state of the latest checkpoint and update `curve` from it; unchanged if there is none."""
    step = checkpoints.newest()
    if step is None:
        return training
    notes = checkpoints.notes(step)
    if not is_note_of(notes, step, run, curve):
        hint = f"the checkpoints in {checkpoints.folder} were not written by this program"
        raise Mistake(f"cannot resume: {hint}; use another --out")
    for name, value in run.items():
        if notes["run"][name] != value:
            option = "--" + name.replace("_", "-")
            was = "another text" if name == "text" else f"{option} {notes['run'][name]}, not {value}"
            hint = f"the checkpoints in {checkpoints.folder} are from a run with {was}"
            raise Mistake(f"cannot resume: {hint}; pass the same {option}, or use another --out")
    curve |= notes["curve"]
    return checkpoints.arrays(step, training)


def learn(
    options: Options,
    training: Training,
    text: Int[Array, "batch L"],
    optimizer: Any,
    measure: Callable[[Any], Any],
    curve: dict[str, Any],
    *,
    save: Callable[[int, Training], None] | None = None,
) -> tuple[Training, int]:
    """Train, and append to `curve`. Return the training state and the number of the signal that stopped it, or 0."""
    T, steps, done = options.window, options.steps, int(training.step)
    each, measured, stop = options.batch * T, "", 0
    silent = options.quiet or jax.process_index() > 0
    bar = tqdm(total=steps * each, initial=done * each, unit="char", unit_scale=True, mininterval=0.5, disable=silent)
    with bar, signals() as asked:
        for step in range(done + 1, steps + 1):
            training, cost = train_step(training, text, optimizer=optimizer, T=T, rate=options.dropout)
            if not math.isfinite(cost):
                raise FloatingPointError(f"the loss is {cost} at step {step}; use a smaller --learning-rate")
            curve["steps"].append(step)
            curve["train_bits"].append(float(cost))
            if step % math.ceil(steps / MEASUREMENTS) == 0 or step == steps:
                curve["held_out_steps"].append(step)
                curve["held_out_bits"].append(measure(training.model)[0])
                measured = f", held out {curve['held_out_bits'][-1]:.3f}"
            bar.set_postfix_str(f"{np.mean(curve['train_bits'][-50:]):.3f} bits/char{measured}", refresh=False)
            bar.update(each)
            stop = agreed(asked())
            if save and (stop or step == steps or step % options.checkpoint_every == 0):
                save(step, training)
            if stop:
                break
    return training, stop


def run(
    options: Options, train: str, held_out: str, curve: dict[str, Any], placement: Placement, say: Callable[[str], None]
) -> None:
    """Compare gradients, train, evaluate and generate text. Fill `curve` during training."""
    started = time.perf_counter()
    batch, T = options.batch, options.window
    vocabulary = [UNKNOWN, *sorted({*train} - {UNKNOWN})]
    index = {character: i for i, character in enumerate(vocabulary)}
    train_tokens, held_out_tokens = (np.array([index.get(c, 0) for c in part], np.int32) for part in (train, held_out))
    marks = new_characters(train, held_out)
    text, unseen, new = (placement.lay(streams(part, batch)) for part in (train_tokens, held_out_tokens, marks))
    optimizer = adam(options.learning_rate, options.steps)
    training = placement.start(options.seed, optimizer, vocabulary=len(vocabulary), hidden=options.hidden, batch=batch)
    say(f"text: {len(train)} characters to train on, {len(vocabulary) - 1} different; {len(held_out)} held out")

    checkpoints = None
    if options.checkpoint_every:
        checkpoints = Checkpoints(options.out / CHECKPOINTS, options.keep)
        training = resumed(checkpoints, identity(options, train, held_out), training, curve)
    begun = len(curve["steps"])
    if begun:
        say(f"resuming after step {begun} of {options.steps}")

    for dtype, tolerance in TOLERANCE.items() if not begun else ():
        with jax.enable_x64(dtype == "float64"):
            difference = float(gradient_difference(training.model, text, T=T, dtype=dtype))
        curve["gradient_difference"][dtype] = difference
        say(f"gradient of jaxseq against jax.grad, {dtype}: largest relative difference {difference:.1e}")
        if not difference <= tolerance:  # also true for NaN
            raise FloatingPointError(f"the gradient of jaxseq differs from jax.grad by {difference:.1e} in {dtype}")

    def measure(model: Model) -> list[float]:
        return [float(cost) for cost in evaluate(model, unseen, new, T=T)]

    def save_checkpoint(step: int, training: Training) -> None:
        assert checkpoints
        noted = {name: value for name, value in curve.items() if name != "options"}
        # Copy: training appends to the curve while the checkpoint is written.
        notes = json.loads(json.dumps({"run": identity(options, train, held_out), "curve": noted}))
        checkpoints.save(step, training, notes)

    going = time.perf_counter()
    with checkpoints or nullcontext():
        keep = save_checkpoint if checkpoints else None
        training, stop = learn(options, training, text, optimizer, measure, curve, save=keep)
    if stop:
        raise Stopped(stop)
    seconds, model = time.perf_counter() - going, training.model
    total, of_new = measure(model)
    key_sample = jax.random.split(jax.random.key(options.seed))[1]
    tokens = write(model, key_sample, held_out_tokens[:T], options.temperature, length=options.sample)
    sample = "".join(vocabulary[token] for token in tokens.tolist())
    costs = np.asarray(surprise(model, held_out_tokens[-LINES * WIDTH :]))
    quoted, speed = 1 - float(marks.mean()), (options.steps - begun) * batch * T / seconds
    curve |= {"held_out": total, "held_out_new": None if math.isnan(of_new) else of_new, "held_out_quoted": quoted}
    curve |= {"characters_per_second": speed, "seconds": time.perf_counter() - started}
    if jax.process_index() == 0:
        (options.out / "sample.txt").write_text(sample, "utf-8")
        save(curve, options.out, held_out[-len(costs) :], costs, sample)
    say(f"held out: {total:.3f} bits per character")
    if 0 < quoted < 1:
        say(f"  ({quoted:.0%} of it also occurs verbatim in the training part; the rest: {of_new:.3f} bits per char)")
    say(f"{curve['seconds']:.0f} s; training: {speed:.0f} characters per second")
    say(f"sample after the prompt {held_out[:T]!r}:\n\n{sample}\n")
    say(f"curve.png, curve.json and sample.txt are in {options.out}")


def job(options: Options, train: str, held_out: str, placement: Placement, prog: str) -> int:
    """Run the program and return the exit status: 0, 1 after a failure, 2 for invalid options, 128 + n after signal n.

    Every error is reported in one line.
    """
    escape_output()
    first = jax.process_index() == 0
    curve: dict[str, Any] = {"options": vars(options), "gradient_difference": {}}
    curve |= {name: [] for name in ("steps", "train_bits", "held_out_steps", "held_out_bits")}
    try:
        run(options, train, held_out, curve, placement, print if first else lambda _: None)
    except (FloatingPointError, CheckpointError, Mistake) as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, Mistake) else 1
    except OSError as error:
        print(f"{prog}: error: cannot write to {options.out}: {error.strerror}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, Stopped) as interruption:
        saved = isinstance(interruption, Stopped) and options.checkpoint_every
        if first:
            if curve["steps"]:
                save(curve, options.out)
            how = "; pass --resume to continue" if saved else ""
            print(f"interrupted after {len(curve['steps'])} of {options.steps} steps{how}", file=sys.stderr)
        return 128 + (interruption.number if isinstance(interruption, Stopped) else signal.SIGINT)
    return 0


def main(argv: list[str] | None = None) -> int:
    options, train, held_out = arguments(argv, parser())
    return job(options, train, held_out, one_device(), "char_lm.py")


if __name__ == "__main__":
    sys.exit(main())
