"""Classify handwritten digits with a convolutional network, on the 1797 images of 8 × 8 pixels in scikit-learn.

    h_0 = x                                             the image, one channel, from 0 to 1
    h_l = relu(w_l * h_{l-1} + b_l)                     `jaxseq.conv`; stride 2 halves the size
    z   = w_L * h_{L-1} + b_L                           the last kernel covers the whole map: ten logits
    loss = -log softmax(z)[digit]

jaxseq provides the convolution and its hand-derived gradient; optax trains, tqdm shows progress and matplotlib plots.
Before training, the script compares the gradient of jaxseq with `jax.grad` of the reference implementation
`jaxseq.reference.conv`, on the same model and images.

A stratified fifth of the images is held out and evaluated once, after the last step. The same thirteen people wrote
both parts, so the result measures generalization to new images, not to new writers. The plot shows held-out digits, the
wrong ones first, and how the probabilities of the ten digits change while the image is uncovered from top to bottom.

    python examples/digits.py                           about half a minute on two cores; writes out/digits.png
    python examples/digits.py --seed 1                  another split, initialization and batch order
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import jaxseq

Model = list[jaxseq.ConvParams]
Images = Float[Array, "batch 8 8 1"]
Digits = Int[Array, " batch"]

# (kernel size, channels, stride, padding) of each layer; the output sizes are 8 × 8, 8 × 8, 4 × 4, 2 × 2 and 1 × 1
LAYERS = ((3, 32, 1, "SAME"), (3, 32, 1, "SAME"), (3, 64, 2, "SAME"), (3, 64, 2, "SAME"), (2, 10, 1, "VALID"))
BATCH = 128
LEARNING_RATE = 1e-2  # initial value, with cosine decay
SHOWN = 8  # misclassified images to print
ROWS, COLUMNS = 3, 4  # plotted images, of which at most half are misclassified
TOLERANCE = 1e-10  # of the gradient of jaxseq in float64, relative to the largest entry of each array


# --- The digits ---


def digits(seed: int) -> tuple[Images, Images, Digits, Digits]:
    """Return (training images, held-out images, training labels, held-out labels)."""
    images, labels = load_digits(return_X_y=True)
    train, held_out = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=seed)
    x, digit = jnp.asarray(images.reshape(-1, 8, 8, 1) / 16, jnp.float32), jnp.asarray(labels, jnp.int32)
    return x[train], x[held_out], digit[train], digit[held_out]


def shifted(key: PRNGKeyArray, images: Images) -> Images:
    """Shift each image by -1, 0 or 1 pixels along both axes."""
    corners = jax.random.randint(key, (len(images), 2), 0, 3)
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return jax.vmap(lambda image, corner: lax.dynamic_slice(image, (*corner, 0), (8, 8, 1)))(padded, corners)


# --- The model ---


@jax.jit
def init(key: PRNGKeyArray) -> Model:
    channels = [1, *(c_out for _, c_out, _, _ in LAYERS)]
    keys = jax.random.split(key, len(LAYERS))
    return [
        jaxseq.conv_init(key, (K, K), c_in, c_out)
        for key, (K, c_out, _, _), c_in in zip(keys, LAYERS, channels, strict=False)
    ]


def scores(model: Model, images: Images, conv: Callable[..., Any] = jaxseq.conv) -> Float[Array, "batch 10"]:
    h = images
    for layer, (params, (_, _, stride, padding)) in enumerate(zip(model, LAYERS, strict=True)):
        h = conv(jax.nn.relu(h) if layer else h, *params, stride=stride, padding=padding)
    return h[:, 0, 0]


def loss(model: Model, images: Images, labels: Digits, conv: Callable[..., Any] = jaxseq.conv) -> Float[Array, ""]:
    return optax.softmax_cross_entropy_with_integer_labels(scores(model, images, conv), labels).mean()


@jax.jit
def gradient_difference(model: Model, images: Images, labels: Digits) -> Float[Array, ""]:
    """Return max |jaxseq - jax.grad| / max |jax.grad|, the largest over all parameters and the images."""
    gradient = partial(jax.grad(loss, argnums=(0, 1)), model, images, labels)
    ours, expected = gradient(jaxseq.conv), gradient(jaxseq.reference.conv)
    ratios = jax.tree.map(lambda a, b: jnp.abs(a - b).max() / jnp.abs(b).max(), ours, expected)
    return jnp.stack(jax.tree.leaves(ratios)).max()


@partial(jax.jit, static_argnames="optimizer", donate_argnums=(0, 1))
def train_step(
    model: Any, state: Any, key: PRNGKeyArray, images: Images, labels: Digits, *, optimizer: Any
) -> tuple[Any, Any, Float[Array, ""]]:
    """Train on a random batch of shifted images."""
    key_batch, key_shift = jax.random.split(key)
    batch = jax.random.randint(key_batch, (BATCH,), 0, len(images))
    cost, gradient = jax.value_and_grad(loss)(model, shifted(key_shift, images[batch]), labels[batch])
    updates, state = optimizer.update(gradient, state, model)
    return optax.apply_updates(model, updates), state, cost


@jax.jit
def read(model: Model, images: Images) -> Digits:
    """Return the digit with the highest score."""
    return scores(model, images).argmax(-1)


@jax.jit
def by_rows(model: Model, images: Images) -> Float[Array, "batch 8 10"]:
    """Return the probabilities of the digits if only the first 1, 2, ..., 8 rows are shown."""
    shown = jnp.tril(jnp.ones((8, 8)))[:, :, None, None]
    return jax.vmap(lambda rows: jax.nn.softmax(scores(model, images * rows)), out_axes=1)(shown)


# --- Plot ---


def selected(truth: np.ndarray, answers: np.ndarray) -> list[int]:
    """Return the images to plot: misclassified ones, then a correct one of each digit, then others."""
    wrong, right = np.flatnonzero(truth != answers)[: ROWS * COLUMNS // 2], np.flatnonzero(truth == answers)
    _, first = np.unique(truth[right], return_index=True)
    return [*wrong, *right[first], *np.delete(right, first)][: ROWS * COLUMNS]


def draw(images: Images, probabilities: Float[Array, "batch 8 10"], truth: Any, answers: Any, title: str) -> Figure:
    """Plot each image beside its probabilities, which have one row for each uncovered row of the image."""
    figure = Figure(figsize=(3.2 * COLUMNS, 1.8 * ROWS + 1), layout="constrained")
    explanation = (
        "Each image is uncovered row by row. On its right: the probabilities of 0 to 9 so far (white: 0, blue: 1)"
    )
    figure.suptitle(f"{title}\n{explanation}")
    grid: Any = figure.subplots(ROWS, 3 * COLUMNS, width_ratios=(8, 10, 1) * COLUMNS, squeeze=False)
    for (left, right, _), i in zip(grid.reshape(-1, 3), range(len(images)), strict=False):
        left.imshow(images[i, :, :, 0], cmap="gray_r", vmin=0, vmax=1)
        right.imshow(probabilities[i], cmap="Blues", vmin=0, vmax=1)
        correct = truth[i] == answers[i]
        verdict = f"{truth[i]}, correct" if correct else f"{truth[i]}, wrong: read as {answers[i]}"
        left.set_title(verdict, loc="left", color="tab:green" if correct else "tab:red", fontsize=11)
        left.set(xticks=[], yticks=[])
        right.set(yticks=[], xticks=range(10))
        right.tick_params(length=0, labelsize=8)
    for axes in grid.flat:
        axes.set_visible(bool(axes.images))  # the third of each triple separates the pairs
    return figure


# --- Main program ---


def learn(model: Any, key: PRNGKeyArray, images: Images, labels: Digits, *, steps: int, quiet: bool) -> Model:
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))
    state, mean = optimizer.init(model), math.log(10)
    with tqdm(jax.random.split(key, steps), unit="step", mininterval=0.5, disable=quiet) as bar:
        for key_step in bar:
            model, state, cost = train_step(model, state, key_step, images, labels, optimizer=optimizer)
            if not math.isfinite(cost):
                raise FloatingPointError(f"the loss is {cost} at step {bar.n + 1}")
            mean += 0.05 * (float(cost) - mean)
            bar.set_postfix_str(f"loss {mean:.4f}", refresh=False)
    return model


def run(seed: int, steps: int, quiet: bool, out: Path) -> None:
    """Compare gradients, train, evaluate once, and plot."""
    started = time.perf_counter()
    images, unseen, labels, unseen_labels = digits(seed)
    key_model, key_train = jax.random.split(jax.random.key(seed))
    model = init(key_model)
    parameters = sum(a.size for a in jax.tree.leaves(model))
    print(f"{len(images)} training images, {len(unseen)} held out; {parameters} parameters")

    with jax.enable_x64(True):
        model64, images64 = jax.tree.map(lambda a: a.astype(np.float64), (model, images[:BATCH]))
        difference = float(gradient_difference(model64, images64, labels[:BATCH]))
    print(f"gradient of jaxseq against jax.grad, float64: largest relative difference {difference:.1e}")
    if not difference <= TOLERANCE:  # also true for NaN
        raise FloatingPointError(f"the gradient of jaxseq differs from jax.grad by {difference:.1e}")

    model = learn(model, key_train, images, labels, steps=steps, quiet=quiet)
    answers = np.asarray(read(model, unseen))
    truth = np.asarray(unseen_labels)
    wrong = [f"{t} classified as {a}" for t, a in zip(truth, answers, strict=True) if t != a]
    result = f"accuracy {1 - len(wrong) / len(truth):.2%}, {len(wrong)} of {len(truth)} wrong"
    print(f"held out: {result}")
    if wrong:
        print(f"  {', '.join(wrong[:SHOWN])}{', ...' * (len(wrong) > SHOWN)}")
    shown = np.array(selected(truth, answers))
    figure = draw(
        unseen[shown], by_rows(model, unseen[shown]), truth[shown], answers[shown], f"Held-out digits: {result}"
    )
    figure.savefig(out, dpi=110, format="png")
    print(f"{out}; {time.perf_counter() - started:.0f} s including compilation")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="digits.py", description="Train a CNN on handwritten digits. Defaults are in brackets."
    )
    parser.add_argument("--steps", type=int, default=500, help="training steps [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="random seed [%(default)s]")
    parser.add_argument("--out", type=Path, default=Path("out/digits.png"), metavar="FILE", help="[%(default)s]")
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
        run(options.seed, options.steps, options.quiet, options.out)
    except FloatingPointError as error:
        print(f"digits.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
