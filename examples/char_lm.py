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
    python examples/char_lm.py --resume             saves as it goes (checkpoints.py), and goes on after a crash

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

EMBEDDING = 64  # features of a character
UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # stands for every character that the training part lacks
TOLERANCE = {"float64": 1e-10, "float32": 1e-3}  # of the gradient by hand, relative to the largest entry of each array
RUN = 40  # characters that two texts share by quoting, no longer by chance
MEASUREMENTS = 8  # of the held-out part during training
CHECKPOINTS = "checkpoints"  # the folder in --out
INTERVAL = 100  # steps from checkpoint to checkpoint, where nothing else is asked for
DECISIVE = ("steps", "hidden", "window", "batch", "learning_rate", "dropout", "seed")  # with the text, of every loss


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


def stretches(text: Shaped[np.ndarray, " n"], batch: int) -> Shaped[np.ndarray, "batch L"]:
    """The text in as many parts as are read side by side. The few characters over are left out."""
    return text[: text.size // batch * batch].reshape(batch, -1)


def windows(text: Shaped[Array, "batch L"], step: Int[Array, ""] | int, T: int) -> Shaped[Array, "T+1 batch"]:
    """What one step reads: of every stretch, the inputs [:-1] and the targets [1:].

    Each step goes on where the one before it stopped. A stretch is a circle, so it can do so for ever; and
    whoever holds some of the stretches needs nothing of the others.
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
    """All that the next step depends on, and so what a checkpoint holds."""

    model: Any  # a `Model`, of which the types of optax know nothing
    moments: Any  # of Adam
    carry: jaxseq.LSTMState
    step: Int[Array, ""]  # how many are done: the place in the text
    key: PRNGKeyArray  # of the dropout to come


def zero_state(batch: int, hidden: int) -> jaxseq.LSTMState:
    return jaxseq.LSTMState(*jnp.zeros((2, batch, hidden), jnp.float32))


def bits(
    model: Model,
    carry: jaxseq.LSTMState | None,
    tokens: Int[Array, "T+1 batch"],
    lstm: Callable[..., Any] = jaxseq.lstm,
    thin: Callable[[Array], Array] = lambda hs: hs,
) -> tuple[Float[Array, "T batch"], jaxseq.LSTMState]:
    """The bits that each character costs, and the state after the last. `thin` is what dropout does to the outputs."""
    last, hs = lstm(model.lstm, carry, model.E[tokens[:-1]])
    hs = thin(hs)
    nats = optax.softmax_cross_entropy_with_integer_labels(hs @ model.W + model.b, tokens[1:])
    return nats / math.log(2), last


def loss(model: Model, carry: jaxseq.LSTMState, tokens: Int[Array, "T+1 batch"], *how: Callable[..., Any]) -> Any:
    costs, carry = bits(model, carry, tokens, *how)
    return costs.mean(), carry


def dropout(key: PRNGKeyArray, rate: float, hs: Float[Array, "T batch H"]) -> Float[Array, "T batch H"]:
    """Each output is 0 with probability `rate`, and else 1 / (1 - rate) times what it was, so that the mean stays."""
    return jnp.where(jax.random.bernoulli(key, 1 - rate, hs.shape), hs / (1 - rate), 0) if rate else hs


@partial(jax.jit, static_argnames=("T", "dtype"))
def gradient_difference(model: Model, text: Int[Array, "batch L"], *, T: int, dtype: str) -> Float[Array, ""]:
    """max |by hand - by jax.grad| / max |by jax.grad|, the worst over all parameters and the first state.

    At the second window, where the state is no longer zero: so the comparison misses no term.
    """
    model = jax.tree.map(lambda a: a.astype(dtype), model)
    _, carry = bits(model, None, windows(text, 0, T))
    gradient = partial(jax.grad(loss, argnums=(0, 1), has_aux=True), model, carry, windows(text, 1, T))
    (by_hand, _), (by_jax, _) = gradient(jaxseq.lstm), gradient(jaxseq.reference.lstm)
    ratios = jax.tree.map(lambda a, b: jnp.abs(a - b).max() / jnp.abs(b).max(), by_hand, by_jax)
    return jnp.stack(jax.tree.leaves(ratios)).max()


@cache  # jit knows an optimizer by its identity
def adam(learning_rate: float, steps: int) -> Any:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(learning_rate, steps)))


@partial(jax.jit, static_argnames=("optimizer", "T", "rate"), donate_argnums=0)
def train_step(
    training: Training, text: Int[Array, "batch L"], *, optimizer: Any, T: int, rate: float = 0.0
) -> tuple[Training, Float[Array, ""]]:
    """One window. The gradient is that of the model alone, so it stops at the carry."""
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
    """Mean bits per character of a text read once, stretch by stretch: of all its characters, and of the new ones."""

    def read(carry: jaxseq.LSTMState, step: Int[Array, ""]) -> Any:
        costs, carry = bits(model, carry, windows(text, step, T))
        return carry, (costs, windows(new, step, T)[1:])

    batch, L = text.shape
    _, (costs, marks) = lax.scan(read, zero_state(batch, model.W.shape[0]), jnp.arange((L - 1) // T))
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


# --- Where arrays are ---


class Placement(NamedTuple):
    """On one device all is in one place. On several, each holds rows of the batch, and all of the rest."""

    rows: Sharding  # of what has a row for each place of the batch
    whole: Sharding

    def start(self, seed: int, optimizer: Any, *, vocabulary: int, hidden: int, batch: int) -> Training:
        """The first step's training, made where it will be needed."""

        def make() -> Training:
            key, _, key_dropout = jax.random.split(jax.random.key(seed), 3)
            model = init(key, vocabulary=vocabulary, hidden=hidden)
            return Training(
                model, optimizer.init(model), zero_state(batch, hidden), jnp.zeros((), jnp.int32), key_dropout
            )

        where: list[Any] = [self.whole, self.whole, self.rows, self.whole, self.whole]
        return jax.jit(make, out_shardings=Training(*where))()

    def lay(self, parts: Shaped[np.ndarray, "batch L"]) -> Shaped[Array, "batch L"]:
        """Each process takes of the stretches what its own devices are to hold."""
        indices = self.rows.addressable_devices_indices_map(parts.shape).values()
        mine = sorted({index[0].indices(len(parts))[:2] for index in indices if index})
        here = np.concatenate([parts[start:stop] for start, stop in mine])
        return jax.make_array_from_process_local_data(self.rows, here, parts.shape)


def one_device() -> Placement:
    return Placement(*[SingleDeviceSharding(jax.local_devices()[0])] * 2)


# --- Options, mistakes, and the curve that stays ---


class Stopped(Exception):  # noqa: N818  # no error: somebody asked for it
    """SIGTERM or Ctrl-C has ended the training between two steps."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def signals() -> Iterator[Callable[[], int]]:
    """Turns the first SIGTERM or Ctrl-C into a number to ask for between steps, 0 until then. A second one strikes."""
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
    """What any of the processes has been sent: all have to stop after the same step."""
    if jax.process_count() == 1:
        return number
    return int(np.max(multihost_utils.process_allgather(np.int32(number))))


def escape_output() -> None:
    """Escape what the encoding of the terminal lacks: text and sample may hold any character."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class Parser(argparse.ArgumentParser):
    """A mistake costs its user one line, not a page of usage."""

    def error(self, message: str) -> NoReturn:  # noqa: D102
        self.exit(2, f"{self.prog}: error: {message}\n")


class Mistake(Exception):  # noqa: N818  # it is not the program's
    """Options that cannot be meant so, found after they were read."""


def number(word: str, kind: type = int, least: float = 1, most: float = 2**31 - 1) -> Any:
    try:
        value = kind(word)
    except ValueError:
        value = math.nan
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"expected {kind.__name__} from {least} to {most}, got {word!r}")
    return value


def parser(prog: str = "char_lm.py") -> Parser:
    parser = Parser(prog=prog, description="Trains an LSTM character model. Defaults stand in brackets.")
    add, natural, real = parser.add_argument, partial(number, least=0), partial(number, kind=float, least=1e-6)
    share = partial(number, kind=float, least=0, most=0.99)
    add("--text", type=Path, metavar="FILE", help="a text in UTF-8 [the language reference of this Python]")
    add("--steps", type=number, default=1600, help="windows to train on [%(default)s]")
    add("--hidden", type=number, default=256, help="units of the LSTM [%(default)s]")
    add("--window", type=number, default=64, help="characters that the gradient reaches back [%(default)s]")
    add("--batch", type=number, default=32, help="places of the text that are read side by side [%(default)s]")
    add("--learning-rate", type=real, default=4e-3, help="at its peak; it decays as a cosine [%(default)s]")
    add("--dropout", type=share, default=0.0, help="share of the LSTM's outputs that training drops [%(default)s]")
    add("--seed", type=natural, default=0, help="of all that is random [%(default)s]")
    add("--sample", type=natural, default=600, help="characters to write at the end [%(default)s]")
    add("--temperature", type=real, default=0.7, help="of the sample: below 1, likelier is commoner [%(default)s]")
    add("--out", type=Path, default=Path("out/char_lm"), metavar="DIR", help="for curve and sample [%(default)s]")
    add("--quiet", action="store_true", help="no progress bar")
    add("--checkpoint-every", type=number, metavar="N", help=f"steps [no checkpoints; with --resume {INTERVAL}]")
    add("--keep", type=number, default=3, metavar="N", help="that many checkpoints, the last ones [%(default)s]")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out; without one, begin")
    return parser


def arguments(argv: list[str] | None, parser: Parser) -> tuple[Options, str, str]:
    """The options, the training part of the text, and the held-out one. Every mistake ends here, with status 2."""
    options = parser.parse_args(argv)
    if options.resume and options.checkpoint_every is None:
        options.checkpoint_every = INTERVAL
    try:
        text = options.text.read_text("utf-8-sig") if options.text else "\n\n".join(topics[k] for k in sorted(topics))
    except OSError as error:
        parser.error(f"cannot read {options.text}: {error.strerror}")
    except UnicodeDecodeError as error:
        parser.error(f"{options.text} is not UTF-8: {error.reason} at byte {error.start}")
    least = options.batch * (options.window + 1)  # characters that one step reads
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
    earlier = options.out / CHECKPOINTS
    if options.checkpoint_every and not options.resume and earlier.is_dir() and any(earlier.iterdir()):
        parser.error(f"{earlier} is not empty: --resume goes on with that run; for a new one take another --out")
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


def identity(options: Options, train: str, held_out: str) -> dict[str, Any]:
    """What two runs must have in common to have every loss in common."""
    text = hashlib.sha256(json.dumps([train, held_out]).encode()).hexdigest()
    return {name: getattr(options, name) for name in DECISIVE} | {"text": text}


def is_note_of(notes: Any, step: int, run: dict[str, Any], curve: dict[str, Any]) -> bool:
    """True if the notes of a checkpoint have the form that `run` writes, and not that of another program."""
    try:
        lists = [notes["curve"][name] for name, value in curve.items() if isinstance(value, list)]
        return {*notes["run"]} == {*run} and all(isinstance(a, list) for a in lists) and len(lists[0]) == step
    except (KeyError, TypeError):
        return False


def resumed(checkpoints: Checkpoints, run: dict[str, Any], training: Training, curve: dict[str, Any]) -> Training:
    """The training and the curve of the last checkpoint; as they were, if there is none."""
    step = checkpoints.newest()
    if step is None:
        return training
    notes = checkpoints.notes(step)
    if not is_note_of(notes, step, run, curve):
        hint = f"the checkpoints in {checkpoints.folder} are not of this program"
        raise Mistake(f"cannot resume: {hint}; take another --out")
    for name, value in run.items():
        if notes["run"][name] != value:
            option = "--" + name.replace("_", "-")
            was = "another text" if name == "text" else f"{option} {notes['run'][name]}, not {value}"
            hint = f"the checkpoints in {checkpoints.folder} are of a run with {was}"
            raise Mistake(f"cannot resume: {hint}; give the same {option}, or take another --out")
    curve |= notes["curve"]
    return checkpoints.arrays(step, training)


def learn(
    options: Options,
    training: Training,
    text: Int[Array, "batch L"],
    optimizer: Any,
    measure: Callable[[Any], Any],
    curve: dict[str, Any],
    save: Callable[[int, Training], None] | None = None,
) -> tuple[Training, int]:
    """Trains, and notes the curve on the way. Returns with it the number of the signal that ended it early, or 0."""
    T, steps, done = options.window, options.steps, int(training.step)
    each, measured, stop = options.batch * T, "", 0
    silent = options.quiet or jax.process_index() > 0
    bar = tqdm(total=steps * each, initial=done * each, unit="char", unit_scale=True, mininterval=0.5, disable=silent)
    with bar, signals() as asked:
        for step in range(done + 1, steps + 1):
            training, cost = train_step(training, text, optimizer=optimizer, T=T, rate=options.dropout)
            if not math.isfinite(cost):
                raise FloatingPointError(f"the loss is {cost} at step {step}: try a smaller --learning-rate")
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
    """Compares, trains, measures, writes; `curve` is filled on the way."""
    started = time.perf_counter()
    batch, T = options.batch, options.window
    vocabulary = [UNKNOWN, *sorted({*train} - {UNKNOWN})]
    index = {character: i for i, character in enumerate(vocabulary)}
    told, untold = (np.array([index.get(c, 0) for c in part], np.int32) for part in (train, held_out))
    marks = new_characters(train, held_out)
    text, unseen, new = (placement.lay(stretches(part, batch)) for part in (told, untold, marks))
    optimizer = adam(options.learning_rate, options.steps)
    training = placement.start(options.seed, optimizer, vocabulary=len(vocabulary), hidden=options.hidden, batch=batch)
    say(f"text: {len(train)} characters to train on, {len(vocabulary) - 1} different; {len(held_out)} held out")

    checkpoints = None
    if options.checkpoint_every:
        checkpoints = Checkpoints(options.out / CHECKPOINTS, options.keep)
        training = resumed(checkpoints, identity(options, train, held_out), training, curve)
    begun = len(curve["steps"])
    if begun:
        say(f"going on after step {begun} of {options.steps}")

    for dtype, tolerance in TOLERANCE.items() if not begun else ():
        with jax.enable_x64(dtype == "float64"):
            difference = float(gradient_difference(training.model, text, T=T, dtype=dtype))
        curve["gradient_difference"][dtype] = difference
        say(f"gradient by hand against jax.grad, {dtype}: largest relative difference {difference:.1e}")
        if not difference <= tolerance:  # so written, a NaN fails too
            raise FloatingPointError(f"the gradient by hand is not that of jax.grad: {difference:.1e} in {dtype}")

    def measure(model: Model) -> list[float]:
        return [float(cost) for cost in evaluate(model, unseen, new, T=T)]

    def save_checkpoint(step: int, training: Training) -> None:
        assert checkpoints
        noted = {name: value for name, value in curve.items() if name != "options"}
        # A copy: the curve grows on while the checkpoint is written.
        notes = json.loads(json.dumps({"run": identity(options, train, held_out), "curve": noted}))
        checkpoints.save(step, training, notes)

    going = time.perf_counter()
    with checkpoints or nullcontext():
        training, stop = learn(
            options, training, text, optimizer, measure, curve, save_checkpoint if checkpoints else None
        )
    if stop:
        raise Stopped(stop)
    seconds, model = time.perf_counter() - going, training.model
    total, of_new = measure(model)
    key_sample = jax.random.split(jax.random.key(options.seed))[1]
    tokens = write(model, key_sample, untold[:T], options.temperature, length=options.sample)
    sample = "".join(vocabulary[token] for token in tokens.tolist())
    quoted, speed = 1 - float(marks.mean()), (options.steps - begun) * batch * T / seconds
    curve |= {"held_out": total, "held_out_new": None if math.isnan(of_new) else of_new, "held_out_quoted": quoted}
    curve |= {"characters_per_second": speed, "seconds": time.perf_counter() - started}
    if jax.process_index() == 0:
        (options.out / "sample.txt").write_text(sample, "utf-8")
        save(curve, options.out)
    say(f"held out: {total:.3f} bits per character")
    if 0 < quoted < 1:
        say(f"  ({quoted:.0%} of it is in the training part too, word for word; the rest costs {of_new:.3f} bits)")
    say(f"{curve['seconds']:.0f} s; in training {speed:.0f} characters a second")
    say(f"after {held_out[:T]!r} it writes:\n\n{sample}\n\ncurve.png, curve.json and sample.txt are in {options.out}")


def job(options: Options, train: str, held_out: str, placement: Placement, prog: str) -> int:
    """All of it, to the status: 0; 1 for what went wrong, 2 for a mistake, 128 + n for signal n, each in one line."""
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
            how = "; --resume goes on from there" if saved else ""
            print(f"interrupted after {len(curve['steps'])} of {options.steps} steps{how}", file=sys.stderr)
        return 128 + (interruption.number if isinstance(interruption, Stopped) else signal.SIGINT)
    return 0


def main(argv: list[str] | None = None) -> int:
    options, train, held_out = arguments(argv, parser())
    return job(options, train, held_out, one_device(), "char_lm.py")


if __name__ == "__main__":
    sys.exit(main())
