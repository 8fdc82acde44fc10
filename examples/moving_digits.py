"""Video prediction with a convolutional LSTM: two handwritten digits that move and bounce off the walls.

    h_t    = convLSTM(x_t, h_{t-1})             `jaxseq.conv_lstm` with stride 2: one state per 2 × 2 pixels
    a_t, z = w *ᵀ h_t + b                       `jaxseq.conv_transpose` to full resolution, ten channels and one
    x̂_{t+1} = sum_k softmax(a_t)_k x_t[n + k] + softmax(a_t)_new σ(z_t)
    loss   = |x̂_{t+1} - x_{t+1}|²               per frame, from the third on: one frame does not show motion

Each pixel of the next frame is a mixture of its nine neighbours in the current frame, k from (-1, -1) to (1, 1), and of
a new pixel; the state must remember what was hidden behind the other digit. The state thus encodes motion rather than
appearance ("dynamic neural advection": C. Finn, I. Goodfellow and S. Levine, Unsupervised learning for physical
interaction through video prediction (2016)). With σ(z) only, all pixels new, the error is five times as large.

jaxseq provides the recurrence, the convolutions and their hand-derived gradients; optax trains, tqdm shows progress and
matplotlib plots. Before training, the script compares the gradient of jaxseq with `jax.grad` of the reference
implementations in `jaxseq.reference`, on the same model and videos.

The digits are from scikit-learn, 8 × 8 pixels each. A fifth of them is held out. After the last step, the model is
evaluated once on videos of held-out digits: the error of the first frame after the given ones is compared with the
error of repeating the last given frame. Then the model generates further frames from its own predictions, with
`jaxseq.conv_lstm_cell`.

    python examples/moving_digits.py                    about a minute on two cores; writes out/moving_digits.png
    python examples/moving_digits.py --seed 1           another split, initialization and other videos
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
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import jaxseq

SIZE = 20  # height and width of the canvas in pixels
DIGITS = 2  # digits per video
MOVES = np.array([(v, u) for v in (-1, 0, 1) for u in (-1, 0, 1) if v or u], np.int32)  # (down, right) per frame
GIVEN, AHEAD = 10, 6  # given frames and predicted frames
STATE = 32  # channels of the state
SOURCES = 10  # of a predicted pixel: nine neighbours and a new pixel
BATCH = 8
LEARNING_RATE = 1e-2  # initial value, with cosine decay
MEASURED, DRAWN, LAST = 256, 3, 4  # evaluated and plotted videos, plotted given frames
TOLERANCE = 1e-10  # of the gradient of jaxseq in float64, relative to the largest entry of each array

Video = Float[Array, f"T batch {SIZE} {SIZE} 1"]
Frame = Float[Array, f"*times_and_batch {SIZE} {SIZE} 1"]


# --- The videos ---


class Digits(NamedTuple):
    """Images cropped to the digit and placed in the upper left corner, and the sizes of the digits."""

    images: Float[Array, "n 8 8"]
    sizes: Int[Array, "n 2"]


def digits(seed: int) -> tuple[Digits, Digits]:
    """Return (training digits, held-out digits), cropped so that the digits bounce at their edges."""
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8) / 16
    trimmed, sizes = np.zeros_like(images), np.zeros((len(images), 2), int)
    for image, new, size in zip(images, trimmed, sizes, strict=True):
        rows, columns = (np.flatnonzero(image.any(axis)) for axis in (1, 0))
        ink = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        size[:] = ink.shape
        new[: size[0], : size[1]] = ink
    everything = Digits(jnp.asarray(trimmed, jnp.float32), jnp.asarray(sizes, jnp.int32))
    parts = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=seed)
    train, held_out = (Digits(*(a[part] for a in everything)) for part in parts)
    return train, held_out


def places(
    start: Int[Array, "*n"], velocity: Int[Array, "*n"], room: Int[Array, "*n"], frames: int
) -> Int[Array, "frames *n"]:
    """Return the positions along one axis: uniform motion between 0 and `room`, reflected at both ends."""
    t = jnp.arange(frames, dtype=jnp.int32).reshape(-1, *[1] * start.ndim)
    return room - jnp.abs(room - (start + velocity * t) % (2 * room))


def draw(image: Float[Array, "8 8"], place: Int[Array, " 2"]) -> Float[Array, "height width"]:
    """Draw an image with its corner at `place`. The margin of the canvas prevents clamping of the update."""
    canvas = jnp.zeros((SIZE + 8, SIZE + 8), image.dtype)
    return lax.dynamic_update_slice(canvas, image, tuple(place))[:SIZE, :SIZE]


def videos(key: PRNGKeyArray, digits: Digits, batch: int, frames: int) -> Video:
    """Return videos of random digits, positions and directions. Overlapping digits are combined by the maximum."""
    key_digit, key_start, key_move = jax.random.split(key, 3)
    which = jax.random.randint(key_digit, (batch, DIGITS), 0, len(digits.images))
    room = SIZE - digits.sizes[which]
    start = jax.random.randint(key_start, room.shape, 0, room + 1)
    velocity = jnp.asarray(MOVES)[jax.random.randint(key_move, (batch, DIGITS), 0, len(MOVES))]
    of_a_frame = jax.vmap(jax.vmap(draw))  # over the batch and its digits
    drawn = jax.vmap(of_a_frame, (None, 0))(digits.images[which], places(start, velocity, room, frames))
    return drawn.max(axis=2)[..., None]


# --- The model ---


class Model(NamedTuple):
    """Parameters of the recurrence and of the readout."""

    lstm: jaxseq.LSTMParams
    readout: jaxseq.ConvParams


@jax.jit
def init(key: PRNGKeyArray) -> Model:
    key_lstm, key_readout = jax.random.split(key)
    readout = jaxseq.conv_transpose_init(key_readout, (4, 4), STATE, SOURCES + 1, stride=2)
    return Model(jaxseq.conv_lstm_init(key_lstm, (3, 3), 1, STATE), readout)


def read_out(model: Model, h: Any, frame: Frame, ops: Any = jaxseq) -> Frame:
    """Predict the frame after `frame`, from the state after processing it."""
    channels = ops.conv_transpose(h, *model.readout, stride=2, padding="SAME")
    weights, new = jax.nn.softmax(channels[..., :SOURCES]), jax.nn.sigmoid(channels[..., SOURCES:])
    nine = ops.conv(frame, jnp.eye(9, dtype=frame.dtype).reshape(3, 3, 1, 9), padding="SAME")  # one channel per tap
    return jnp.sum(weights * jnp.concatenate([nine, new], axis=-1), axis=-1, keepdims=True)


def next_frames(model: Model, video: Video, ops: Any = jaxseq) -> tuple[jaxseq.LSTMState, Video]:
    """Return (the final state, the prediction of the frame after each frame). `ops`: `jaxseq` or `jaxseq.reference`."""
    state, hs = ops.conv_lstm(model.lstm, None, video, stride=2)
    return state, read_out(model, hs, video, ops)


def loss(model: Model, video: Video, ops: Any = jaxseq) -> Float[Array, ""]:
    _, predicted = next_frames(model, video[:-1], ops)
    return jnp.sum((predicted - video[1:])[1:] ** 2, axis=(2, 3, 4)).mean()


@jax.jit
def gradient_difference(model: Model, video: Video) -> Float[Array, ""]:
    """Return max |jaxseq - jax.grad| / max |jax.grad|, the largest over all parameters and the video."""
    gradient = partial(jax.grad(loss, argnums=(0, 1)), model, video)
    ours, expected = gradient(jaxseq), gradient(jaxseq.reference)
    ratios = jax.tree.map(lambda a, b: jnp.abs(a - b).max() / jnp.abs(b).max(), ours, expected)
    return jnp.stack(jax.tree.leaves(ratios)).max()


@partial(jax.jit, static_argnames="optimizer", donate_argnums=(0, 1))
def train_step(
    model: Any, state: Any, key: PRNGKeyArray, digits: Digits, *, optimizer: Any
) -> tuple[Any, Any, Float[Array, ""]]:
    """Train on a batch of newly generated videos."""
    cost, gradient = jax.value_and_grad(loss)(model, videos(key, digits, BATCH, GIVEN + 2))
    updates, state = optimizer.update(gradient, state, model)
    return optax.apply_updates(model, updates), state, cost


def generate(model: Model, video: Video, ahead: int) -> Video:
    """Predict the next `ahead` frames after the video, each from the previous predictions."""

    def step(carry: tuple[jaxseq.LSTMState, Frame], _: None) -> tuple[tuple[jaxseq.LSTMState, Frame], Frame]:
        state, frame = carry
        state, h = jaxseq.conv_lstm_cell(model.lstm, state, frame, stride=2)
        return (state, read_out(model, h, frame)), frame

    state, predicted = next_frames(model, video)
    return lax.scan(step, (state, predicted[-1]), length=ahead)[1]


# --- Evaluation ---


class Result(NamedTuple):
    """Predictions and errors on videos of GIVEN + AHEAD frames."""

    video: Video
    one_ahead: Video  # frames from the second on, each predicted from the true previous frames
    generated: Video  # the last AHEAD frames, predicted from the given frames only
    errors: Float[Array, " ahead"]  # of `generated`
    errors_of_copy: Float[Array, " ahead"]  # of repeating the last given frame


def errors(predicted: Video, truth: Video) -> Float[Array, " T"]:
    """Return the mean squared error per pixel of each frame."""
    return jnp.mean((predicted - truth) ** 2, axis=(1, 2, 3, 4))


@jax.jit
def measure(model: Model, video: Video) -> Result:
    given, truth = video[:GIVEN], video[GIVEN:]
    generated = generate(model, given, AHEAD)
    _, one_ahead = next_frames(model, video[:-1])
    return Result(video, one_ahead, generated, errors(generated, truth), errors(given[-1:], truth))


def summary(result: Result, ahead: int) -> str:
    error, of_copy = result.errors[ahead - 1], result.errors_of_copy[ahead - 1]
    return f"{error:.4f}; repeating the last given frame: {of_copy:.4f}, {of_copy / error:.1f} times as large"


def strip(frames: list[np.ndarray]) -> np.ndarray:
    """Concatenate frames horizontally, with a border around each."""
    return np.concatenate([np.pad(frame, 1, constant_values=0.3) for frame in frames], axis=1)


def picture(result: Result, path: Path) -> None:
    """Plot three strips per video, from the last given frames to the last predicted frame."""
    video, one_ahead, generated = (np.asarray(a[:, :DRAWN, :, :, 0]) for a in result[:3])
    first, width = GIVEN - LAST, SIZE + 2
    figure = Figure(figsize=(9.5, 2.8 * DRAWN + 0.7), layout="constrained")
    for i, axes in enumerate(np.atleast_1d(figure.subplots(DRAWN, 1))):
        blank = [np.full((SIZE, SIZE), 0.3)] * LAST  # nothing is generated for the given frames
        strips = [*video[first:, i]], [*one_ahead[first - 1 :, i]], [*blank, *generated[:, i]]
        axes.imshow(np.concatenate([strip(s) for s in strips]), cmap="gray", vmin=0, vmax=1)
        axes.axvline(LAST * width - 0.5, color="C1")
        axes.set_xticks(
            width * (np.arange(LAST + AHEAD) + 0.5), [f"{t:+}" if t else "0" for t in range(1 - LAST, AHEAD + 1)]
        )
        axes.set_yticks(
            width * (np.arange(3) + 0.5),
            ["true video", "predicted,\none frame\nahead", "predicted\nfrom the\ngiven frames"],
        )
        axes.tick_params(length=0)
        axes.set_xlabel("frame, counted from the last given one")
    figure.suptitle(
        "Videos of held-out digits; the frames left of the line are given\n"
        f"mean squared error, one frame ahead: {summary(result, 1)}\n{AHEAD} frames ahead: {summary(result, AHEAD)}",
        fontsize=11,
    )
    figure.savefig(path, dpi=110, format="png", bbox_inches="tight")


# --- Main program ---


def learn(model: Any, key: PRNGKeyArray, digits: Digits, *, steps: int, quiet: bool) -> Model:
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    state, mean = optimizer.init(model), math.nan
    with tqdm(jax.random.split(key, steps), unit="step", mininterval=0.5, disable=quiet) as bar:
        for key_step in bar:
            model, state, cost = train_step(model, state, key_step, digits, optimizer=optimizer)
            if not math.isfinite(cost):
                raise FloatingPointError(f"the loss is {cost} at step {bar.n + 1}")
            mean = float(cost) if math.isnan(mean) else mean + 0.05 * (float(cost) - mean)
            bar.set_postfix_str(f"loss {mean:.3f}", refresh=False)
    return model


def run(seed: int, steps: int, quiet: bool, out: Path) -> None:
    """Compare gradients, train, evaluate once, and plot."""
    started = time.perf_counter()
    train, held_out = digits(seed)
    key_model, key_train, key_check, key_measure = jax.random.split(jax.random.key(seed), 4)
    model = init(key_model)
    parameters = sum(a.size for a in jax.tree.leaves(model))
    print(f"{len(train.images)} training images, {len(held_out.images)} held out; {parameters} parameters")

    video = videos(key_check, train, 2, 4)
    with jax.enable_x64(True):
        model64, video64 = jax.tree.map(lambda a: a.astype(np.float64), (model, video))
        difference = float(gradient_difference(model64, video64))
    print(f"gradient of jaxseq against jax.grad, float64: largest relative difference {difference:.1e}")
    if not difference <= TOLERANCE:  # also true for NaN
        raise FloatingPointError(f"the gradient of jaxseq differs from jax.grad by {difference:.1e}")

    model = learn(model, key_train, train, steps=steps, quiet=quiet)
    result = measure(model, videos(key_measure, held_out, MEASURED, GIVEN + AHEAD))
    picture(result, out)
    print(f"videos: {out}; {time.perf_counter() - started:.0f} s including compilation")
    print(f"held out, mean squared error per pixel of the next frame: {summary(result, 1)}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="moving_digits.py", description="Train a ConvLSTM on videos. Defaults are in brackets."
    )
    parser.add_argument("--steps", type=int, default=1000, help="training steps [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="random seed [%(default)s]")
    parser.add_argument("--out", type=Path, default=Path("out/moving_digits.png"), metavar="FILE", help="[%(default)s]")
    parser.add_argument("--quiet", action="store_true", help="hide the progress bar")
    options = parser.parse_args(argv)
    if options.steps < 1 or not 0 <= options.seed < 2**31:
        parser.error("expected --steps >= 1 and --seed from 0 to 2**31 - 1")
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.open("ab").close()  # detect an unwritable path before training
        run(options.seed, options.steps, options.quiet, options.out)
    except OSError as error:
        print(f"moving_digits.py: error: cannot write to {options.out}: {error.strerror}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"moving_digits.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
