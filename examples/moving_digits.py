"""A convolutional LSTM foresees the next frame of a video: two handwritten digits that move and bounce off the walls.

    h_t    = convLSTM(x_t, h_{t-1})             `jaxseq.conv_lstm` with stride 2: a state for every 2 × 2 pixels
    a_t, z = w *ᵀ h_t + b                       `jaxseq.conv_transpose` back to every pixel, ten and one channels
    x̂_{t+1} = sum_k softmax(a_t)_k x_t[n + k] + softmax(a_t)_new σ(z_t)
    loss   = |x̂_{t+1} - x_{t+1}|²               over a frame, from the third on: a single one shows no motion

Each pixel of the next frame is one of the nine around it in this frame, k from (-1, -1) to (1, 1), or a new one: what
was hidden behind the other digit the state has to remember. So the state says where things go, not what they look like
(C. Finn, I. Goodfellow and S. Levine, Unsupervised learning for physical interaction through video prediction (2016),
"dynamic neural advection"). With σ(z) alone, every pixel drawn anew, the error is five times as large.

jaxseq gives the recurrence and the convolutions, with gradients derived by hand, and no more than that: optax trains,
tqdm shows progress, matplotlib draws. Before it trains, the script holds the gradient by hand against `jax.grad`
through the plain twins in `jaxseq.reference`, on this very model and these videos.

The digits are scikit-learn's, 8 × 8 pixels each. A fifth of them is held out, and videos of these alone are looked at,
once, after the last step; the measure is the error of the frame after the last one given, beside that of the last one
given itself. Then the model goes on by itself, `jaxseq.conv_lstm_cell` reading what it has just foreseen.

    python examples/moving_digits.py                    about a minute on two cores; leaves out/moving_digits.png
    python examples/moving_digits.py --seed 1           another split, other first weights, other videos
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

SIZE = 20  # pixels of the canvas, each way
DIGITS = 2  # in a video
MOVES = np.array([(v, u) for v in (-1, 0, 1) for u in (-1, 0, 1) if v or u], np.int32)  # pixels a frame, down and right
GIVEN, AHEAD = 10, 6  # frames that are read, and foreseen
STATE = 32  # channels
WAYS = 10  # to come by a pixel: from the nine around it, or anew
BATCH = 8
LEARNING_RATE = 1e-2  # at its peak; it decays as a cosine
MEASURED, DRAWN, LAST = 256, 3, 4  # videos to measure on; of these drawn, with so many of the frames given
TOLERANCE = 1e-10  # of the gradient by hand in float64, relative to the largest entry of each array

Video = Float[Array, f"T batch {SIZE} {SIZE} 1"]
Frame = Float[Array, f"*times_and_batch {SIZE} {SIZE} 1"]


# --- The videos ---


class Digits(NamedTuple):
    """Images whose ink begins in the upper left corner, and how far it reaches."""

    images: Float[Array, "n 8 8"]
    sizes: Int[Array, "n 2"]


def digits(seed: int) -> tuple[Digits, Digits]:
    """(to train on, held out). Trimmed: it is the ink that bounces, not an invisible margin."""
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
    """Along one axis, from 0 to `room` and back: a straight line, folded at both walls."""
    t = jnp.arange(frames, dtype=jnp.int32).reshape(-1, *[1] * start.ndim)
    return room - jnp.abs(room - (start + velocity * t) % (2 * room))


def draw(image: Float[Array, "8 8"], place: Int[Array, " 2"]) -> Float[Array, "height width"]:
    """An image with its corner there. The canvas has a margin, or the update would be moved back inside."""
    canvas = jnp.zeros((SIZE + 8, SIZE + 8), image.dtype)
    return lax.dynamic_update_slice(canvas, image, tuple(place))[:SIZE, :SIZE]


def videos(key: PRNGKeyArray, digits: Digits, batch: int, frames: int) -> Video:
    """Random digits from random places into random directions; where they overlap, the brighter one is seen."""
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
    """All that is learnt."""

    lstm: jaxseq.LSTMParams
    readout: jaxseq.ConvParams


@jax.jit
def init(key: PRNGKeyArray) -> Model:
    key_lstm, key_readout = jax.random.split(key)
    readout = jaxseq.conv_transpose_init(key_readout, (4, 4), STATE, WAYS + 1, stride=2)
    return Model(jaxseq.conv_lstm_init(key_lstm, (3, 3), 1, STATE), readout)


def read_out(model: Model, h: Any, frame: Frame, ops: Any = jaxseq) -> Frame:
    """The frame after `frame`, of the state that has read it."""
    channels = ops.conv_transpose(h, *model.readout, stride=2, padding="SAME")
    chances, new = jax.nn.softmax(channels[..., :WAYS]), jax.nn.sigmoid(channels[..., WAYS:])
    nine = ops.conv(frame, jnp.eye(9, dtype=frame.dtype).reshape(3, 3, 1, 9), padding="SAME")  # a tap, a channel
    return jnp.sum(chances * jnp.concatenate([nine, new], axis=-1), axis=-1, keepdims=True)


def next_frames(model: Model, video: Video, ops: Any = jaxseq) -> tuple[jaxseq.LSTMState, Video]:
    """(the last state, for each frame the one that is to follow). `ops` is where the functions are looked up."""
    state, hs = ops.conv_lstm(model.lstm, None, video, stride=2)
    return state, read_out(model, hs, video, ops)


def loss(model: Model, video: Video, ops: Any = jaxseq) -> Float[Array, ""]:
    _, foreseen = next_frames(model, video[:-1], ops)
    return jnp.sum((foreseen - video[1:])[1:] ** 2, axis=(2, 3, 4)).mean()


@jax.jit
def gradient_difference(model: Model, video: Video) -> Float[Array, ""]:
    """max |by hand - by jax.grad| / max |by jax.grad|, the worst over all parameters and the video."""
    gradient = partial(jax.grad(loss, argnums=(0, 1)), model, video)
    by_hand, by_jax = gradient(jaxseq), gradient(jaxseq.reference)
    ratios = jax.tree.map(lambda a, b: jnp.abs(a - b).max() / jnp.abs(b).max(), by_hand, by_jax)
    return jnp.stack(jax.tree.leaves(ratios)).max()


@partial(jax.jit, static_argnames="optimizer", donate_argnums=(0, 1))
def train_step(
    model: Any, state: Any, key: PRNGKeyArray, digits: Digits, *, optimizer: Any
) -> tuple[Any, Any, Float[Array, ""]]:
    """Videos that are made here and never come again."""
    cost, gradient = jax.value_and_grad(loss)(model, videos(key, digits, BATCH, GIVEN + 2))
    updates, state = optimizer.update(gradient, state, model)
    return optax.apply_updates(model, updates), state, cost


def go_on(model: Model, video: Video, ahead: int) -> Video:
    """The frames after the video, as many as asked for, each read in turn as though it had been seen."""

    def step(carry: tuple[jaxseq.LSTMState, Frame], _: None) -> tuple[tuple[jaxseq.LSTMState, Frame], Frame]:
        state, frame = carry
        state, h = jaxseq.conv_lstm_cell(model.lstm, state, frame, stride=2)
        return (state, read_out(model, h, frame)), frame

    state, foreseen = next_frames(model, video)
    return lax.scan(step, (state, foreseen[-1]), length=ahead)[1]


# --- What it has learnt ---


class Result(NamedTuple):
    """On videos of GIVEN + AHEAD frames."""

    video: Video
    one_ahead: Video  # of the frames from the second on, each foreseen from the true ones before it
    alone: Video  # of the last AHEAD, foreseen from the given ones
    errors: Float[Array, " ahead"]  # of `alone`
    errors_of_copy: Float[Array, " ahead"]  # of the last frame given, held still


def errors(foreseen: Video, truth: Video) -> Float[Array, " T"]:
    """Mean squared error per pixel, of each frame."""
    return jnp.mean((foreseen - truth) ** 2, axis=(1, 2, 3, 4))


@jax.jit
def measure(model: Model, video: Video) -> Result:
    given, truth = video[:GIVEN], video[GIVEN:]
    alone = go_on(model, given, AHEAD)
    _, one_ahead = next_frames(model, video[:-1])
    return Result(video, one_ahead, alone, errors(alone, truth), errors(given[-1:], truth))


def summary(result: Result, ahead: int) -> str:
    error, of_copy = result.errors[ahead - 1], result.errors_of_copy[ahead - 1]
    return f"{error:.4f}; of the last frame given, copied: {of_copy:.4f}, {of_copy / error:.1f} times as much"


def strip(frames: list[np.ndarray]) -> np.ndarray:
    """Frames side by side, with a line around each."""
    return np.concatenate([np.pad(frame, 1, constant_values=0.3) for frame in frames], axis=1)


def picture(result: Result, path: Path) -> None:
    """Three strips for each of a few videos, from the last frames given to the last foreseen."""
    video, one_ahead, alone = (np.asarray(a[:, :DRAWN, :, :, 0]) for a in result[:3])
    first, width = GIVEN - LAST, SIZE + 2
    figure = Figure(figsize=(9.5, 2.8 * DRAWN + 0.7), layout="constrained")
    for i, axes in enumerate(np.atleast_1d(figure.subplots(DRAWN, 1))):
        blank = [np.full((SIZE, SIZE), 0.3)] * LAST  # it goes on by itself where none is given
        strips = [*video[first:, i]], [*one_ahead[first - 1 :, i]], [*blank, *alone[:, i]]
        axes.imshow(np.concatenate([strip(s) for s in strips]), cmap="gray", vmin=0, vmax=1)
        axes.axvline(LAST * width - 0.5, color="C1")
        axes.set_xticks(
            width * (np.arange(LAST + AHEAD) + 0.5), [f"{t:+}" if t else "0" for t in range(1 - LAST, AHEAD + 1)]
        )
        axes.set_yticks(width * (np.arange(3) + 0.5), ["true", "foreseen from\ntrue ones", "foreseen from\nits own"])
        axes.tick_params(length=0)
    figure.suptitle(
        "Held-out digits; frames up to the line are given\n"
        f"mean squared error, one frame ahead: {summary(result, 1)}\n{AHEAD} frames ahead: {summary(result, AHEAD)}",
        fontsize=11,
    )
    figure.savefig(path, dpi=110, format="png", bbox_inches="tight")


# --- The job ---


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
    """Compares, trains, measures once, and draws."""
    started = time.perf_counter()
    train, held_out = digits(seed)
    key_model, key_train, key_check, key_measure = jax.random.split(jax.random.key(seed), 4)
    model = init(key_model)
    parameters = sum(a.size for a in jax.tree.leaves(model))
    print(f"{len(train.images)} digits to train on, {len(held_out.images)} held out; {parameters} parameters")

    video = videos(key_check, train, 2, 4)
    with jax.enable_x64(True):
        model64, video64 = jax.tree.map(lambda a: a.astype(np.float64), (model, video))
        difference = float(gradient_difference(model64, video64))
    print(f"gradient by hand against jax.grad, float64: largest relative difference {difference:.1e}")
    if not difference <= TOLERANCE:  # so written, a NaN fails too
        raise FloatingPointError(f"the gradient by hand is not that of jax.grad: {difference:.1e}")

    model = learn(model, key_train, train, steps=steps, quiet=quiet)
    result = measure(model, videos(key_measure, held_out, MEASURED, GIVEN + AHEAD))
    picture(result, out)
    print(f"videos: {out}; {time.perf_counter() - started:.0f} s with compilation")
    print(f"held out, mean squared error per pixel of the next frame: {summary(result, 1)}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="moving_digits.py", description="Trains a ConvLSTM on videos. Defaults stand in brackets."
    )
    parser.add_argument("--steps", type=int, default=1000, help="batches to train on [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights and the videos [%(default)s]")
    parser.add_argument("--out", type=Path, default=Path("out/moving_digits.png"), metavar="FILE", help="[%(default)s]")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(argv)
    if options.steps < 1 or not 0 <= options.seed < 2**31:
        parser.error("expected --steps from 1 on and --seed from 0 to 2**31 - 1")
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.open("ab").close()  # before the minute, not after it
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
