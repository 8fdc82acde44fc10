"""A convolutional network reads handwritten digits: 1797 real ones of 8 × 8 pixels, which scikit-learn carries.

    h_0 = x                                             the image, one channel, from 0 to 1
    h_l = relu(w_l * h_{l-1} + b_l)                     `jaxseq.conv`; where the stride is 2, the image halves
    z   = w_L * h_{L-1} + b_L                           the last window is all that is left: ten scores
    loss = -log softmax(z)[digit]

jaxseq gives the convolution, with a gradient derived by hand, and no more than that: optax trains, tqdm shows progress.
Before it trains, the script holds the gradient by hand against `jax.grad` through the plain twin
`jaxseq.reference.conv`, on this very model and these digits.

A fifth of the digits, of each kind alike, is held out, and looked at once, after the last step. Both parts come from
the same thirteen hands: what is measured is how it reads new digits, not new writers.

    python examples/digits.py                           about half a minute on two cores
    python examples/digits.py --seed 1                  another split, other first weights, another order
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import jaxseq

Model = list[jaxseq.ConvParams]
Images = Float[Array, "batch 8 8 1"]
Digits = Int[Array, " batch"]

# (window, channels, stride, padding) of each layer; they leave 8 × 8, 8 × 8, 4 × 4, 2 × 2 and 1 × 1 positions
LAYERS = ((3, 32, 1, "SAME"), (3, 32, 1, "SAME"), (3, 64, 2, "SAME"), (3, 64, 2, "SAME"), (2, 10, 1, "VALID"))
BATCH = 128
LEARNING_RATE = 1e-2  # at its peak; it decays as a cosine
SHOWN = 8  # of the mistakes
TOLERANCE = 1e-10  # of the gradient by hand in float64, relative to the largest entry of each array


# --- The digits ---


def digits(seed: int) -> tuple[Images, Images, Digits, Digits]:
    """(images to train on, images held out, their digits, their digits)."""
    images, labels = load_digits(return_X_y=True)
    train, held_out = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=seed)
    x, digit = jnp.asarray(images.reshape(-1, 8, 8, 1) / 16, jnp.float32), jnp.asarray(labels, jnp.int32)
    return x[train], x[held_out], digit[train], digit[held_out]


def shifted(key: PRNGKeyArray, images: Images) -> Images:
    """Each image moved by -1, 0 or 1 pixels along either axis: it stays the same digit."""
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
    """max |by hand - by jax.grad| / max |by jax.grad|, the worst over all parameters and the images."""
    gradient = partial(jax.grad(loss, argnums=(0, 1)), model, images, labels)
    by_hand, by_jax = gradient(jaxseq.conv), gradient(jaxseq.reference.conv)
    ratios = jax.tree.map(lambda a, b: jnp.abs(a - b).max() / jnp.abs(b).max(), by_hand, by_jax)
    return jnp.stack(jax.tree.leaves(ratios)).max()


@partial(jax.jit, static_argnames="optimizer", donate_argnums=(0, 1))
def train_step(
    model: Any, state: Any, key: PRNGKeyArray, images: Images, labels: Digits, *, optimizer: Any
) -> tuple[Any, Any, Float[Array, ""]]:
    """A random batch, moved about a little."""
    key_batch, key_shift = jax.random.split(key)
    batch = jax.random.randint(key_batch, (BATCH,), 0, len(images))
    cost, gradient = jax.value_and_grad(loss)(model, shifted(key_shift, images[batch]), labels[batch])
    updates, state = optimizer.update(gradient, state, model)
    return optax.apply_updates(model, updates), state, cost


@jax.jit
def read(model: Model, images: Images) -> Digits:
    """The digit that scores highest."""
    return scores(model, images).argmax(-1)


# --- The job ---


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


def run(seed: int, steps: int, quiet: bool) -> None:
    """Compares, trains, and measures once."""
    started = time.perf_counter()
    images, unseen, labels, unseen_labels = digits(seed)
    key_model, key_train = jax.random.split(jax.random.key(seed))
    model = init(key_model)
    parameters = sum(a.size for a in jax.tree.leaves(model))
    print(f"{len(images)} digits to train on, {len(unseen)} held out; {parameters} parameters")

    with jax.enable_x64(True):
        model64, images64 = jax.tree.map(lambda a: a.astype(np.float64), (model, images[:BATCH]))
        difference = float(gradient_difference(model64, images64, labels[:BATCH]))
    print(f"gradient by hand against jax.grad, float64: largest relative difference {difference:.1e}")
    if not difference <= TOLERANCE:  # so written, a NaN fails too
        raise FloatingPointError(f"the gradient by hand is not that of jax.grad: {difference:.1e}")

    model = learn(model, key_train, images, labels, steps=steps, quiet=quiet)
    answers = np.asarray(read(model, unseen))
    truth = np.asarray(unseen_labels)
    wrong = [f"{t} read as {a}" for t, a in zip(truth, answers, strict=True) if t != a]
    print(f"held out: {1 - len(wrong) / len(truth):.2%} right, {len(wrong)} of {len(truth)} wrong")
    if wrong:
        print(f"  {', '.join(wrong[:SHOWN])}{', and so on' * (len(wrong) > SHOWN)}")
    print(f"{time.perf_counter() - started:.0f} s with compilation")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="digits.py", description="Trains a CNN on digits. Defaults stand in brackets."
    )
    parser.add_argument("--steps", type=int, default=500, help="batches to train on [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights and the order [%(default)s]")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(argv)
    if options.steps < 1 or not 0 <= options.seed < 2**31:
        parser.error("expected --steps from 1 on and --seed from 0 to 2**31 - 1")
    try:
        run(options.seed, options.steps, options.quiet)
    except FloatingPointError as error:
        print(f"digits.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
