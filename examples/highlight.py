"""Highlight Python source: classify each character as code, part of a string or part of a comment.

    z_t  = h_t W + b                                       logits of the classes y_t, from the characters s_1 ... s_t
    loss = -1/T sum_t log softmax(z_t)[y_t]

    linear window    h_t = c + sum_{k=0..K-1} E[s_{t-K+1+k}] w_k      the last K characters: `jaxseq.conv`
    hidden layer     the same with relu, and about as many parameters as the GRU
    GRU              h_t = GRU(E[s_t]; h_{t-1})                       a state: `jaxseq.gru`

The class depends on the last quote or `#` that had an effect, and on what was open before it. This may be hundreds of
characters back: a docstring reads like a comment, and an example in a docstring reads like code. A window that does not
reach back that far guesses from the style of the text. A state stores the fact for as long as it is needed.

The text is the standard library: the top-level modules in the order of their names, a to r for training, t to z held
out. (The modules with s were used to choose the sizes and the learning rate.) The lexer of Python, `tokenize`, provides
the classes. Every model sees the same characters in the same order. The state, or the last K - 1 characters, is carried
from one training step to the next, and the gradient is cut between them.

    python examples/highlight.py                a minute on two cores; writes out/highlight.png
    python examples/highlight.py --window 64    twice the window
"""

import argparse
import io
import sys
import sysconfig
import time
import tokenize
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import jaxseq

COLOURS = {"code": "black", "string": "tab:green", "comment": "tab:blue"}
CODE, STRING, COMMENT = range(3)
OTHER = 127  # stands for all characters beyond ASCII
EMBEDDING, HIDDEN, CHANNELS = 16, 64, 32  # hidden size of the GRU, channels of the hidden layer
BATCH, T, LEARNING_RATE = 128, 128, 1e-2  # T characters per step; initial learning rate of Adam, with cosine decay
FIRST = 2**15  # held-out characters per module
MODELS = {"linear window": "tab:gray", "hidden layer": "tab:orange", "GRU": "tab:purple"}
LINES, WIDTH = 15, 79  # size of the plotted source


# --- Text and classes ---


def classes(source: str) -> Int[np.ndarray, " n"]:
    """Return the class of each character. A string begins at its quote, after a prefix such as r or f."""
    lines = np.cumsum([0, *map(len, io.StringIO(source))])  # `splitlines` would also split at a form feed
    found, nested, begin = np.full(len(source), CODE), 0, 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        name = tokenize.tok_name[token.type]
        start, end = (int(lines[min(row, len(lines)) - 1]) + column for row, column in (token.start, token.end))
        if name == "COMMENT":
            found[start:end] = COMMENT
        elif "STRING" in name:  # from Python 3.12 on, an f-string consists of tokens FSTRING_START ... FSTRING_END
            begin = begin if nested else start + len(token.string) - len(token.string.lstrip("bfrtuBFRTU"))
            nested += name.endswith("START") - name.endswith("END")
            if not nested:
                found[begin:end] = STRING
    return found


def modules() -> dict[str, tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]]:
    """Return the characters and their classes of each top-level module of the standard library, in order of names."""
    found = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py")):
        with tokenize.open(path) as file:
            source = file.read()
        characters = np.frombuffer(source.encode("utf-32-le"), "<u4")
        found[path.stem] = np.minimum(characters, OTHER).astype(np.int32), classes(source).astype(np.int32)
    return found


def streams(text: Int[np.ndarray, " n"]) -> Int[Array, "L batch"]:
    """Split the text into BATCH streams of equal length. Drop the remaining characters."""
    return jnp.asarray(text[: len(text) // BATCH * BATCH].reshape(BATCH, -1).T)


def padded(texts: list[Int[np.ndarray, " n"]]) -> Int[np.ndarray, "FIRST batch"]:
    """Return the first characters of each text, and -1 beyond its end."""
    return np.stack([np.pad(text[:FIRST], (0, max(0, FIRST - len(text))), constant_values=-1) for text in texts], 1)


# --- Models ---


class Model(NamedTuple):
    """The parameters, named as in the equations above."""

    E: Float[Array, "128 D"]
    layer: Any  # `ConvParams` or `GRUParams`
    W: Float[Array, "H 3"]
    b: Float[Array, " 3"]


def init(key: PRNGKeyArray, name: str, window: int) -> Model:
    key_E, key_layer, key_W = jax.random.split(key, 3)
    H = {"linear window": len(COLOURS), "hidden layer": CHANNELS, "GRU": HIDDEN}[name]
    gru = name == "GRU"
    layer = jaxseq.gru_init(key_layer, EMBEDDING, H) if gru else jaxseq.conv_init(key_layer, window, EMBEDDING, H)
    W = jax.random.normal(key_W, (H, len(COLOURS))) * H**-0.5
    return Model(jax.random.normal(key_E, (OTHER + 1, EMBEDDING)), layer, W, jnp.zeros(len(COLOURS)))


def beginning(name: str, window: int, batch: int) -> Array:
    """Return what precedes the first character: a zero state, or K - 1 null characters."""
    return jnp.zeros((batch, HIDDEN)) if name == "GRU" else jnp.zeros((window - 1, batch), jnp.int32)


def logits(name: str, model: Model, past: Array, s: Int[Array, "T batch"]) -> tuple[Array, Float[Array, "T batch 3"]]:
    """Return the state, or the last K - 1 characters, after s, and the logits of each character."""
    if name == "GRU":
        past, h = jaxseq.gru(model.layer, past, model.E[s])
    else:
        s, begin = jnp.concatenate([past, s]), len(s)
        h = jaxseq.conv(model.E[s].swapaxes(0, 1), *model.layer).swapaxes(0, 1)  # padding "VALID"
        past, h = s[begin:], jax.nn.relu(h) if name == "hidden layer" else h
    return past, h @ model.W + model.b


@partial(jax.jit, static_argnames=("name", "window", "steps"))
def train(
    key: PRNGKeyArray, s: Int[Array, "L batch"], y: Int[Array, "L batch"], *, name: str, window: int, steps: int
) -> tuple[Model, Float[Array, " steps"]]:
    """Return a trained model and the loss of each step. The text wraps around at its end."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))
    )

    def loss(model: Model, past: Array, s: Int[Array, "T batch"], y: Int[Array, "T batch"]) -> tuple[Array, Array]:
        past, z = logits(name, model, past, s)
        return optax.softmax_cross_entropy_with_integer_labels(z, y).mean(), past

    def step(state: Any, n: Int[Array, ""]) -> tuple[Any, Array]:
        model, memory, past = state
        now = (lax.dynamic_slice_in_dim(a, n % (len(s) // T) * T, T) for a in (s, y))
        (cost, past), gradient = jax.value_and_grad(loss, has_aux=True)(model, past, *now)
        updates, memory = optimizer.update(gradient, memory, model)
        return (optax.apply_updates(model, updates), memory, past), cost

    model: Any = init(key, name, window)
    first = model, optimizer.init(model), beginning(name, window, s.shape[1])
    (model, _, _), costs = lax.scan(step, first, jnp.arange(steps))
    return model, costs


@partial(jax.jit, static_argnames=("name", "window"))
def predict(model: Model, s: Int[Array, "L batch"], *, name: str, window: int) -> Int[Array, "L batch"]:
    """Return the most probable class of each character. T must divide L."""

    def some(past: Array, s: Int[Array, "T batch"]) -> tuple[Array, Array]:
        past, z = logits(name, model, past, s)
        return past, z.argmax(-1)

    return lax.scan(some, beginning(name, window, s.shape[1]), s.reshape(-1, T, s.shape[1]))[1].reshape(s.shape)


# --- Evaluation and plot ---


def ages(y: Int[np.ndarray, "L batch"]) -> Int[np.ndarray, "L batch"]:
    """Return the number of characters since the class changed: 1 for the first character of a string."""
    t = np.arange(1, len(y) + 1)[:, None]
    changed = np.pad(y[1:] != y[:-1], ((1, 0), (0, 0)))
    return t - np.maximum.accumulate(np.where(changed, t - 1, 0), axis=0)


def by_age(wrong: Bool[np.ndarray, " n"], age: Int[np.ndarray, " n"]) -> tuple[np.ndarray, np.ndarray]:
    """Return (ages, percentage of errors from each age to twice this age), for ages with at least 1000 characters."""
    octave = np.log2(age).astype(int)
    counts, errors = np.bincount(octave), np.bincount(octave, wrong)
    kept = np.flatnonzero(counts >= 1000)
    return 2**kept, 100 * errors[kept] / counts[kept]


def excerpt(s: Int[np.ndarray, " n"], y: Int[np.ndarray, " n"]) -> tuple[int, slice]:
    """Return the LINES lines that contain the most characters of their rarest class, after the number of these.

    They begin in code, and are at most WIDTH characters long. The choice does not depend on predictions.
    """
    ends, best = np.append(0, np.flatnonzero(s == ord("\n")) + 1), (0, slice(0))
    for first in range(len(ends) - LINES):
        edges = ends[first : first + LINES + 1]
        span = slice(edges[0], edges[-1])
        if np.diff(edges).max() <= WIDTH + 1 and y[edges[0]] == CODE:
            best = max(best, (int(np.bincount(y[span], minlength=3).min()), span), key=lambda found: found[0])
    return best


def draw_source(axes: Any, s: Any, y: Any, truth: Any, title: str) -> None:
    """Write source in the colours of the classes y, with a red background where they differ from the truth."""
    axes.set(xlim=(0, WIDTH), ylim=(LINES, 0), xticks=[], yticks=[])
    axes.set_title(title, loc="left", fontsize=11)
    ends = np.append(0, np.flatnonzero(s == ord("\n")) + 1)
    for row, line in enumerate(map(slice, ends, ends[1:])):
        for column in np.flatnonzero(y[line] != truth[line]).tolist():
            axes.add_patch(Rectangle((column, row), 1, 1, color="tab:red", alpha=0.3, linewidth=0))
        for kind, colour in enumerate(COLOURS.values()):
            text = "".join(chr(c) if c > 32 and of == kind else " " for c, of in zip(s[line], y[line], strict=True))
            style = {"family": "monospace", "fontsize": 8.2, "va": "center", "parse_math": False}
            axes.text(0, row + 0.5, text, color=colour, **style)


def draw(
    sources: dict[str, Any], s: Any, curves: dict[str, Any], errors: dict[str, list[float]], window: int
) -> Figure:
    """Plot an excerpt in its true and its predicted colours, the errors by age, and the errors of all models."""
    figure = Figure(figsize=(13.2, 8.6), layout="constrained")
    parts: Any = figure.subfigures(1, 2, width_ratios=(1.15, 1))
    panels, (over, bars) = parts[0].subplots(len(sources), 1), parts[1].subplots(2, 1, height_ratios=(1.3, 1))
    truth = next(iter(sources.values()))
    for axes, (title, y) in zip(panels, sources.items(), strict=True):
        draw_source(axes, s, y, truth, title)
    for place, (name, colour) in enumerate([*COLOURS.items(), ("wrong class", "salmon")]):
        panels[-1].text(WIDTH * (0.1 + 0.2 * place), LINES + 0.9, f"■ {name}", color=colour, va="center")

    colours = dict(zip(curves, MODELS.values(), strict=True))
    for name, curve in curves.items():
        over.plot(*curve, "o-", color=colours[name], markersize=4, label=name.replace("\n", " "))
    over.set_xscale("log", base=2)
    over.xaxis.set_major_formatter("{x:.0f}")
    top = 1.4 * max(max(rate) for _, rate in curves.values())
    over.axvline(window, ymax=0.8, color="0.4", linestyle="--", linewidth=1)
    note = f" beyond {window}, the window\n does not contain the quote"
    over.text(window, 0.78 * top, note, va="top", fontsize=9, color="0.4")
    over.set(ylim=(0, top), ylabel="characters with a wrong class (%)")
    over.set_xlabel("characters since the string, the comment or the code began")
    over.set_title("Held-out modules: errors by distance", loc="left")
    over.grid(color="0.9")
    over.legend(frameon=False, loc="upper left", fontsize=9)
    means = [float(np.mean(each)) for each in errors.values()]
    rows = bars.barh(list(errors), means, color=[colours.get(name, "0.8") for name in errors], height=0.6)
    spread = [f" ({min(each):.2f} to {max(each):.2f})" if len(each) > 1 else "" for each in errors.values()]
    bars.bar_label(rows, [f"{mean:.2f}{of_seeds}" for mean, of_seeds in zip(means, spread, strict=True)], padding=3)
    bars.set(xlim=(0, 1.5 * max(means)), xlabel="characters with a wrong class (%), mean (range over seeds)")
    bars.invert_yaxis()
    bars.set_title("Held-out modules: all errors", loc="left")
    for axes in (over, bars):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


# --- Main program ---


def run(seeds: int, steps: int, window: int, out: Path) -> None:
    """Train each model with each seed, evaluate once, and plot."""
    started = time.perf_counter()
    texts = modules()
    train_s, train_y = (streams(np.concatenate(a)) for a in zip(*[texts[n] for n in texts if n < "s"], strict=True))
    names = [name for name in texts if name >= "t"]
    s, y = (padded(list(a)) for a in zip(*[texts[name] for name in names], strict=True))
    valid, age = s >= 0, ages(y)
    print(f"{train_s.size} characters for training, {valid.sum()} held out from {len(names)} modules\n")

    errors = {
        "always code": [100 * float((y != CODE)[valid].mean())],
        "true class of the previous\ncharacter, repeated": [100 * float((y[1:] != y[:-1])[valid[1:]].mean())],
    }
    titles = (
        f"last {window} characters,\nlinear",
        f"last {window} characters,\nhidden layer",
        "all characters so far,\nGRU",
    )
    predicted, curves = {}, {}
    for name, title in zip(MODELS, titles, strict=True):
        errors[title] = []
        for seed in range(seeds):
            model, costs = train(jax.random.key(seed), train_s, train_y, name=name, window=window, steps=steps)
            if not np.isfinite(costs).all():
                raise FloatingPointError(f"the loss of the {name} is not finite")
            found = np.asarray(predict(model, jnp.maximum(s, 0), name=name, window=window))
            errors[title].append(100 * float((found != y)[valid].mean()))
            if seed == 0:
                predicted[title] = found
                curves[title] = by_age((found != y)[valid], age[valid])
    print(f"{'held-out characters with a wrong class':47}   mean   each seed")
    for title, each in errors.items():
        print(f"{title.replace(chr(10), ' '):47} {np.mean(each):5.2f}%  {' '.join(f'{error:.2f}' for error in each)}")

    best = max(range(len(names)), key=lambda column: excerpt(s[:, column], y[:, column])[0])
    span = excerpt(s[:, best], y[:, best])[1]
    sources = {f"{names[best]}.py, in its true colours": y[span, best]}
    for title in titles[1:]:
        sources[f"predicted from: {title}".replace("\n", " ")] = predicted[title][span, best]
    draw(sources, s[span, best], curves, errors, window).savefig(out, dpi=100, format="png")
    print(f"\n{out}; {time.perf_counter() - started:.0f} s including compilation")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("highlight.py", description="Highlight Python source. Defaults are in brackets.")
    parser.add_argument("--steps", type=int, default=300, help="training steps per model [%(default)s]")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0 on [%(default)s]")
    parser.add_argument("--window", type=int, default=32, help="characters that the windows see [%(default)s]")
    parser.add_argument("--out", type=Path, default=Path("out/highlight.png"), metavar="FILE", help="[%(default)s]")
    options = parser.parse_args(argv)
    if options.steps < 1 or options.seeds < 1 or not 1 <= options.window <= 1000:
        parser.error("expected --steps >= 1, --seeds >= 1 and --window from 1 to 1000")
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.open("ab").close()  # detect an unwritable path before training
    except OSError as error:
        parser.error(f"cannot write to {options.out}: {error.strerror}")
    try:
        run(options.seeds, options.steps, options.window, options.out)
    except FloatingPointError as error:
        print(f"highlight.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
