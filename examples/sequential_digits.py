"""Classify handwritten digits pixel by pixel: one scalar per step, 784 steps, and one decision after the last.

    x_t                                                 pixel t of an image of 28 × 28 pixels, row by row
    h   = w x + b                                       D features per step
    h   = h + W gelu(layer(norm(h)))                    two blocks; layer: S5, LRU or GRU
    z   = V norm(h_T)                                   ten logits, from the last step only
    loss = -log softmax(z)[digit]

The images are the 1797 of scikit-learn, of 8 × 8 pixels, enlarged by linear interpolation. So a sequence has 784 steps
but only 64 independent numbers, and a linear classifier that gets these at once solves the task. What is difficult is
that they come one after the other: the first row of the image is 750 steps before the decision. One of the baselines
shows that the order matters: a linear classifier of the sorted pixels, which have no order.

The models differ in the layers only. The hidden sizes are such that they have about as many parameters. They are
trained for the same number of steps on the same batches, with the same optimizer, and take turns at each step, so that
other processes on the machine slow all of them down alike. The number of steps is small; longer training was not tried.

The result depends on the memory at initialization. A state decays by the factor e in 1 / -log|a| steps, if a is its
factor. With the initial values of S5, this takes more than 100 steps for two thirds of the states. LRU is trained
twice, with initial factors in a ring of radius 0.9 to 0.999 and of 0.99 to 0.999. For the wider ring, it takes more
than 100 steps for a tenth of the states, and for the narrower ring for all of them.

    python examples/sequential_digits.py                two minutes on two cores; writes out/sequential_digits.png
    python examples/sequential_digits.py --steps 1200   three times as long

Source: Q. V. Le, N. Jaitly and G. E. Hinton, A simple way to initialize recurrent networks of rectified linear units
(2015), section 4.2, for digits pixel by pixel; A. Orvieto et al., Resurrecting recurrent neural networks for long
sequences (2023), for LRU and its blocks; J. T. H. Smith, A. Warrington and S. W. Linderman, Simplified state space
layers for sequence modeling (2023), for S5.
"""

import argparse
import math
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

import jaxseq

SIZE = 28  # height and width of an image
D, BLOCKS = 32, 2  # features between layers, and number of blocks
BATCH, LEARNING_RATE = 16, 2e-2  # peak learning rate of Adam: linear warm-up, then cosine decay
EVALUATIONS = 8  # of each model during training
EPSILON = 1e-6  # of the normalization

Sequences = Float[Array, "T batch 1"]
Digits = Int[Array, " batch"]


# --- The digits ---


class Data(NamedTuple):
    """Images and their digits, for training and held out."""

    images: Float[np.ndarray, "train 8 8"]
    unseen: Float[np.ndarray, "test 8 8"]
    digits: Int[np.ndarray, " train"]
    unseen_digits: Int[np.ndarray, " test"]


def load(seed: int) -> Data:
    """Return the images, from 0 to 1. A stratified fifth is held out."""
    pixels, digits = load_digits(return_X_y=True)
    images = (pixels.reshape(-1, 8, 8) / 16).astype(np.float32)
    digits = np.asarray(digits, np.int32)
    train, unseen = train_test_split(np.arange(len(digits)), test_size=0.2, stratify=digits, random_state=seed)
    return Data(images[train], images[unseen], digits[train], digits[unseen])


@jax.jit
def sequences(images: Float[Array, "batch 8 8"]) -> Sequences:
    """Enlarge the images and return their pixels, row by row."""
    enlarged = jax.image.resize(images, (len(images), SIZE, SIZE), "linear")
    return enlarged.reshape(-1, SIZE**2).T[:, :, None]


def linear_accuracy(data: Data, *, in_order: bool) -> float:
    """Return the held-out accuracy of a linear classifier of the 64 original pixels, in order or sorted."""
    flat = [images.reshape(-1, 64) for images in (data.images, data.unseen)]
    train, test = flat if in_order else (np.sort(pixels, 1) for pixels in flat)
    return float(LogisticRegression(max_iter=3000).fit(train, data.digits).score(test, data.unseen_digits))


# --- The models ---


class Layer(NamedTuple):
    """A recurrent layer from D to D features."""

    cell: Any
    init: Any  # (key, input size, hidden size) -> parameters
    hidden: int


# A ring close to the unit circle, and small phases, as the LRU paper recommends for long sequences.
lru_init = partial(jaxseq.cells.lru_init, max_radius=0.999, max_phase=math.pi / 10)
LAYERS = {
    "S5": Layer(jaxseq.cells.s5, jaxseq.cells.s5_init, 48),
    "LRU 0.9": Layer(jaxseq.cells.lru, partial(lru_init, min_radius=0.9), 48),
    "LRU 0.99": Layer(jaxseq.cells.lru, partial(lru_init, min_radius=0.99), 48),
    "GRU": Layer(jaxseq.cells.gru, jaxseq.gru_init, D),
}


class Block(NamedTuple):
    """Parameters of h + W gelu(layer(norm(h)))."""

    scale: Float[Array, " D"]
    shift: Float[Array, " D"]
    layer: Any
    w: Float[Array, "D D"]
    b: Float[Array, " D"]


class Model(NamedTuple):
    """Parameters of a model."""

    w_in: Float[Array, "1 D"]
    b_in: Float[Array, " D"]
    blocks: list[Block]
    w_out: Float[Array, "D 10"]
    b_out: Float[Array, " 10"]


@partial(jax.jit, static_argnames="name")
def init(key: PRNGKeyArray, *, name: str) -> Model:
    layer = LAYERS[name]
    key_in, key_b, key_out, *keys = jax.random.split(key, 3 + 2 * BLOCKS)
    blocks = [
        Block(
            scale=jnp.ones(D),
            shift=jnp.zeros(D),
            layer=layer.init(key_layer, D, layer.hidden),
            w=jax.random.normal(key_w, (D, D)) * D**-0.5,
            b=jnp.zeros(D),
        )
        for key_layer, key_w in zip(keys[::2], keys[1::2], strict=True)
    ]
    # Random biases: without them, the normalization would remove the brightness of a pixel.
    w_in, b_in = jax.random.normal(key_in, (1, D)), 0.5 * jax.random.normal(key_b, (D,))
    return Model(w_in, b_in, blocks, jax.random.normal(key_out, (D, 10)) * D**-0.5, jnp.zeros(10))


def norm(h: Float[Array, "*axes D"]) -> Float[Array, "*axes D"]:
    """Normalize the features of each step to mean 0 and variance 1."""
    centred = h - h.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + EPSILON)


def scores(model: Model, xs: Sequences, name: str) -> Float[Array, "batch 10"]:
    h = xs * model.w_in + model.b_in
    for block in model.blocks:
        _, ys = jaxseq.recurrence(LAYERS[name].cell, block.layer, None, norm(h) * block.scale + block.shift)
        h = h + jax.nn.gelu(ys) @ block.w + block.b
    return norm(h[-1]) @ model.w_out + model.b_out


# --- Training ---


@partial(jax.jit, static_argnames=("name", "optimizer"), donate_argnums=(0, 1))
def train_step(
    model: Any, state: Any, key: PRNGKeyArray, xs: Sequences, digits: Digits, *, name: str, optimizer: Any
) -> tuple[Any, Any, Float[Array, ""]]:
    """Train on a random batch."""

    def loss(model: Model) -> Float[Array, ""]:
        logits = scores(model, xs[:, batch], name)
        return optax.softmax_cross_entropy_with_integer_labels(logits, digits[batch]).mean()

    batch = jax.random.randint(key, (BATCH,), 0, len(digits))
    cost, gradient = jax.value_and_grad(loss)(model)
    updates, state = optimizer.update(gradient, state, model)
    return optax.apply_updates(model, updates), state, cost


@partial(jax.jit, static_argnames="name")
def accuracy(model: Model, xs: Sequences, digits: Digits, *, name: str) -> Float[Array, ""]:
    return jnp.mean(scores(model, xs, name).argmax(-1) == digits)


class Course(NamedTuple):
    """What is measured of one model."""

    parameters: int
    accuracies: list[float]  # held out, at each evaluation
    seconds: list[float]  # of each training step but the first, which includes compilation
    first: list[float]  # seconds of the first step


def evaluated(steps: int) -> list[int]:
    """Return the numbers of steps after which the models are evaluated."""
    return sorted({round(steps * (i + 1) / EVALUATIONS) for i in range(EVALUATIONS)} - {0})


def train(data: Data, seed: int, steps: int) -> dict[str, Course]:
    """Train all models step by step, in turn."""
    xs, unseen = sequences(data.images), sequences(data.unseen)
    digits, unseen_digits = jnp.asarray(data.digits), jnp.asarray(data.unseen_digits)
    schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, max(1, steps // 10), max(2, steps))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    key_model, key_train = jax.random.split(jax.random.key(seed))
    models: dict[str, Any] = {name: init(key_model, name=name) for name in LAYERS}
    states = {name: optimizer.init(model) for name, model in models.items()}
    courses = {name: Course(sum(a.size for a in jax.tree.leaves(m)), [], [], []) for name, m in models.items()}
    sizes = ", ".join(f"{name} {course.parameters}" for name, course in courses.items())
    print(f"{len(digits)} training images, {len(unseen_digits)} held out, {len(xs)} steps each; parameters: {sizes}\n")
    print(f"held-out accuracy  {''.join(f'{name:>10}' for name in LAYERS)}")
    for n, key in enumerate(jax.random.split(key_train, steps), 1):
        for name, course in courses.items():
            started = time.perf_counter()
            models[name], states[name], cost = train_step(
                models[name], states[name], key, xs, digits, name=name, optimizer=optimizer
            )
            cost = float(cost)  # waits for the result
            (course.seconds if n > 1 else course.first).append(time.perf_counter() - started)
            if not math.isfinite(cost):
                raise FloatingPointError(f"the loss of {name} is {cost} at step {n}")
        if n in evaluated(steps):
            for name, course in courses.items():
                course.accuracies.append(float(accuracy(models[name], unseen, unseen_digits, name=name)))
            shown = "".join(f"{course.accuracies[-1]:10.1%}" for course in courses.values())
            print(f"step {n:<14}{shown}", flush=True)
    return courses


# --- Plot ---


def draw(data: Data, courses: dict[str, Course], steps: int, baselines: dict[str, float]) -> Figure:
    figure = Figure(figsize=(14, 8), layout="constrained")
    figure.suptitle(f"Digits pixel by pixel: {SIZE**2} steps, and one decision after the last")
    parts: Any = figure.subfigures(2, 1, height_ratios=(1, 1.8))
    top, bottom = parts
    left, right = top.subplots(1, 2, width_ratios=(1, 4))
    series = np.asarray(sequences(data.unseen[:1]))[:, 0, 0]
    left.imshow(series.reshape(SIZE, SIZE), cmap="gray_r", vmin=0, vmax=1)
    left.set(xticks=[], yticks=[], title=f"a held-out {data.unseen_digits[0]}")
    right.fill_between(range(SIZE**2), series, color="0.3", lw=0)
    for row in range(0, SIZE**2 + 1, SIZE):
        right.axvline(row - 0.5, color="0.85", lw=0.5, zorder=0)
    right.set(xlim=(0, SIZE**2), ylim=(0, 1.05), yticks=[0, 1], xlabel="step (grey lines: rows of the image)")
    right.set_title("the same image as the models get it")
    left, right = bottom.subplots(1, 2, width_ratios=(2, 1))
    colours = {name: f"C{i}" for i, name in enumerate(courses)}
    for name, course in courses.items():
        label = f"{name}, {course.parameters} parameters: {course.accuracies[-1]:.1%}"
        percent = 100 * np.array(course.accuracies)
        left.plot(evaluated(steps), percent, color=colours[name], marker="o", lw=2, label=label)
    for style, (label, value) in zip(("--", ":"), baselines.items(), strict=True):
        left.axhline(100 * value, color="0.4", ls=style, lw=1.2, label=f"{label}: {value:.1%}")
    left.set(ylim=(0, 100), xlim=(0, None), xlabel="training step", title="Held-out accuracy in percent")
    left.grid(color="0.9", lw=0.5)
    left.legend(frameon=False, fontsize=9)
    times = {name: 1e3 * np.array(course.seconds) for name, course in courses.items()}
    medians = np.array([np.median(t) for t in times.values()])
    low, high = np.array([np.percentile(t, (10, 90)) for t in times.values()]).T
    ticks = [f"{name}: {median:.0f}" for name, median in zip(times, medians, strict=True)]
    right.bar(ticks, medians, color=list(colours.values()))
    right.errorbar(ticks, medians, (medians - low, high - medians), fmt="none", ecolor="0.3", capsize=4)
    right.set(ylim=(0, None), title="Milliseconds per training step\n(median; lines: 10 to 90 %)")
    for axes in (left, right):
        axes.spines[["right", "top"]].set_visible(False)
    return figure


# --- Main program ---


def run(seed: int, steps: int, out: Path) -> None:
    """Train the models, compare accuracies and times, and plot."""
    started = time.perf_counter()
    data = load(seed)
    courses = train(data, seed, steps)
    baselines = {
        "linear classifier of the sorted pixels": linear_accuracy(data, in_order=False),
        "linear classifier of all pixels at once": linear_accuracy(data, in_order=True),
    }
    print()
    for label, value in baselines.items():
        print(f"{label}: {value:.1%}")
    for name, course in courses.items():
        milliseconds = 1e3 * np.median(course.seconds)
        print(f"{name}: {milliseconds:.0f} ms per training step (median), first step {course.first[0]:.1f} s")
    draw(data, courses, steps, baselines).savefig(out, dpi=90, format="png")
    print(f"{out}; {time.perf_counter() - started:.0f} s including compilation")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="sequential_digits.py", description="Classify digits pixel by pixel. Defaults are in brackets."
    )
    parser.add_argument("--steps", type=int, default=400, help="training steps of each model [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="random seed [%(default)s]")
    parser.add_argument(
        "--out", type=Path, default=Path("out/sequential_digits.png"), metavar="FILE", help="[%(default)s]"
    )
    options = parser.parse_args(argv)
    if options.steps < 2 or not 0 <= options.seed < 2**31:
        parser.error("expected --steps >= 2 and --seed from 0 to 2**31 - 1")
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.open("ab").close()  # detect an unwritable path before training
    except OSError as error:
        parser.error(f"cannot write to {options.out}: {error.strerror}")
    try:
        run(options.seed, options.steps, options.out)
    except FloatingPointError as error:
        print(f"sequential_digits.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
