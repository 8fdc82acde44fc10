"""What truncation makes unlearnable: two tasks that ask, at the end, for what was said long before.

    adding     x_t = (u_t, m_t),  u_t uniform in [0, 1],  m_t = 1 at two steps a < 5 <= b < 10, else 0
               target u_a + u_b at the last step, t = lag + 9; error: mean square
               always to say 1 costs the variance of the sum, 2 / 12 = 1/6
    copying    x_0, x_1, x_2 one of K = 8 symbols each, then blanks, then from t = lag - 1 on "go" and blanks
               target x_i at t = lag + i; error: nats per symbol
               to guess costs log K

Truncated backpropagation cuts the gradient of the state at t = k, 2k, ..., counted from the first step of a sequence:
`truncation=k`. What step t asks of step s is learnt only if no cut lies between, s < n k <= t. So it does not do that k
exceeds the lag, as it does below in both tasks with k = lag + 5: copying is over before the first cut comes, in adding
the cut falls between marks and answer. (`truncation=(k1, k2)` reaches k2 steps back, wherever the cuts fall.)

Values cross a cut all the same: the state may happen to hold what no gradient has asked it to hold, and a readout may
learn to use that. An error below the baseline in spite of cuts is such luck; it grows with the memory a cell has from
the start. And without any cut the gradient may still vanish by itself, or the search take longer than there is time.

    python examples/long_memory.py                  about a minute and a half; leaves out/long_memory.png
    python examples/long_memory.py --lag 40         twice as far

Source: S. Hochreiter and J. Schmidhuber, Long short-term memory (1997), section 5, for adding; M. Arjovsky, A. Shah and
Y. Bengio, Unitary evolution recurrent neural networks (2016), section 5, for copying as it is posed here.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray
from matplotlib.figure import Figure

import jaxseq

FIRST, SECOND = (0, 5), (5, 10)  # where the two marks of adding may be
S, K = 3, 8  # symbols to copy, out of so many
BLANK, GO = K, K + 1
H, BATCH, LEARNING_RATE = 64, 64, 1e-2  # Adam's at first; it decays as a cosine
LAST = 0.05  # of the steps, over which the final error is the mean
CELLS = {
    "RNN": (jaxseq.rnn_init, jaxseq.rnn),
    "GRU": (jaxseq.gru_init, jaxseq.gru),
    "LSTM": (jaxseq.lstm_init, jaxseq.lstm),
}


# --- The tasks ---


class Task(NamedTuple):
    """Sequences that are drawn anew for every step of training, so that each error is one on unseen data."""

    draw: Callable[..., tuple[Any, Any]]  # (key, batch, lag) -> (xs (T, batch, inputs), targets)
    error: Callable[..., Float[Array, ""]]  # (outputs (T, batch, outputs), targets)
    inputs: int
    outputs: int
    baseline: float
    asks: Callable[[int], list[tuple[int, int]]]  # lag -> (s, t): at step t it asks what step s has said


def draw_adding(key: PRNGKeyArray, batch: int, lag: int) -> tuple[Float[Array, "T batch 2"], Float[Array, " batch"]]:
    key_u, key_a, key_b = jax.random.split(key, 3)
    t = jnp.arange(lag + SECOND[1])[:, None]
    u = jax.random.uniform(key_u, (t.size, batch))
    a, b = jax.random.randint(key_a, (batch,), *FIRST), jax.random.randint(key_b, (batch,), *SECOND)
    m = ((t == a) | (t == b)).astype(u.dtype)
    return jnp.stack([u, m], -1), (u * m).sum(0)


def draw_copying(key: PRNGKeyArray, batch: int, lag: int) -> tuple[Float[Array, "T batch K+2"], Int[Array, "S batch"]]:
    symbols = jax.random.randint(key, (S, batch), 0, K)
    said = jnp.full((lag + S, batch), BLANK).at[:S].set(symbols).at[lag - 1].set(GO)
    return jax.nn.one_hot(said, K + 2) * (
        K + 2
    ) ** 0.5, symbols  # each feature then has the variance that *_init expects


def squared(z: Float[Array, "T batch 1"], y: Float[Array, " batch"]) -> Float[Array, ""]:
    return jnp.mean((z[-1, :, 0] - y) ** 2)


def cross_entropy(z: Float[Array, "T batch K"], y: Int[Array, "S batch"]) -> Float[Array, ""]:
    return optax.softmax_cross_entropy_with_integer_labels(z[-S:], y).mean()


TASKS = {
    "adding": Task(draw_adding, squared, 2, 1, 1 / 6, lambda lag: [(s, lag + SECOND[1] - 1) for s in range(SECOND[1])]),
    "copying": Task(draw_copying, cross_entropy, K + 2, K, math.log(K), lambda lag: [(i, lag + i) for i in range(S)]),
}


def windows(lag: int) -> tuple[int | None, ...]:
    """None, longer than the lag, and shorter."""
    return None, lag + 5, lag // 2


def cuts(window: int | None, T: int) -> list[int]:
    """Where in T steps `truncation=window` stops the gradient: before each of these steps."""
    return list(range(window, T, window)) if window else []


def crosses(task: Task, window: int | None, lag: int) -> bool:
    """Whether the gradient gets from each answer to what it is about."""
    pairs = task.asks(lag)
    T = 1 + max(t for _, t in pairs)
    return not any(s < cut <= t for s, t in pairs for cut in cuts(window, T))


# --- Training ---


@partial(jax.jit, static_argnames=("task", "cell", "window", "lag", "steps"))
def train(
    key: PRNGKeyArray, *, task: str, cell: str, window: int | None, lag: int, steps: int
) -> Float[Array, " steps"]:
    """The error at each step."""
    draw, error, inputs, outputs, *_ = TASKS[task]
    init, op = CELLS[cell]
    key_cell, key_W, key_data = jax.random.split(key, 3)
    params = init(key_cell, inputs, H), jax.random.normal(key_W, (H, outputs)) * H**-0.5, jnp.zeros(outputs)
    # A full gradient may explode: one such step should not undo the others.
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    def loss(params: Any, key: PRNGKeyArray) -> Float[Array, ""]:
        recurrence, W, b = params
        xs, y = draw(key, BATCH, lag)
        _, hs = op(recurrence, None, xs, truncation=window)
        return error(hs @ W + b, y)

    def step(state: Any, key: PRNGKeyArray) -> Any:
        params, memory = state
        cost, gradient = jax.value_and_grad(loss)(params, key)
        updates, memory = optimizer.update(gradient, memory, params)
        return (optax.apply_updates(params, updates), memory), cost

    return lax.scan(step, (params, optimizer.init(params)), jax.random.split(key_data, steps))[1]


def final(errors: Any) -> float:
    """The mean over the last steps."""
    return float(np.mean(np.asarray(errors)[-max(1, round(LAST * len(errors))) :]))


# --- The picture ---


def layout(axes: Any, task: str, lag: int, key: PRNGKeyArray) -> None:
    """One sequence, and where the gradient is cut."""
    xs, y = (np.asarray(a) for a in TASKS[task].draw(key, 1, lag))
    T = len(xs)
    if task == "adding":
        u, m = xs[:, 0].T
        axes.bar(range(T), u, color=np.where(m > 0, "tab:red", "0.8"), width=0.8)
        axes.text(T - 0.4, 0.5, f"sum of\nthe red?\n{y[0]:.2f}", va="center", color="tab:red")
        first, last = int(np.flatnonzero(m)[1]), T - 1
    else:
        heights = (y[:, 0] + 1) / K  # a symbol is drawn as a bar, an answer as an empty one
        axes.bar(range(S), heights, color="tab:red", width=0.8)
        axes.bar(range(lag, T), heights, facecolor="none", edgecolor="tab:red", width=0.7, ls=":", lw=1.5)
        axes.text(lag - 1, 0, "go", ha="center", va="bottom", color="0.3")
        axes.text(T - 0.4, 0.5, "the same\nthree?", va="center", color="tab:red")
        first, last = 0, lag
    axes.annotate("", (last, 1.12), (first, 1.12), arrowprops={"arrowstyle": "<->", "color": "0.3"})
    axes.text((first + last) / 2, 1.15, f"{last - first} steps", ha="center", va="bottom", color="0.3")
    for row, (colour, window) in enumerate(zip(("C2", "C1", "C0"), windows(lag), strict=True)):
        y_row = -0.2 - 0.17 * row  # below the sequence: the windows, end to end
        edges = [0, *cuts(window, T), T]
        for start, end in pairwise(edges):
            axes.plot((start - 0.3, end - 0.7), (y_row, y_row), color=colour, lw=5, solid_capstyle="butt")
        for cut in edges[1:-1]:
            axes.plot((cut - 0.5,) * 2, (y_row, 1.05), color=colour, lw=1.2, ls="--")
        axes.text(T - 0.4, y_row, f"k = {window}" if window else "full", va="center", color=colour)
    axes.set(xlim=(-1, T + 5), ylim=(-0.75, 1.35), xlabel="t", title=f"{task}: one sequence, and windows of k steps")
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.set_yticks([])


def draw_all(found: dict[tuple[str, str, int | None], Any], lag: int, seed: int, path: Path) -> None:
    figure = Figure(figsize=(19, 8.5), layout="constrained")
    figure.suptitle("Where the gradient is cut between what was said and the question, nothing teaches to remember it")
    rows: Any = figure.subplots(len(TASKS), 1 + len(CELLS), squeeze=False, width_ratios=[1.5] + [1] * len(CELLS))
    for row, (name, task) in zip(rows, TASKS.items(), strict=True):
        layout(row[0], name, lag, jax.random.key(seed))
        for axes, cell in zip(row[1:], CELLS, strict=True):
            for window, colour in zip(windows(lag), ("C2", "C1", "C0"), strict=True):
                errors = np.asarray(found[name, cell, window])
                span = max(1, len(errors) // 50)
                means = errors[: len(errors) // span * span].reshape(-1, span).mean(1)
                label = f"k = {window}" if window else "full gradient"
                axes.plot(
                    span * (np.arange(len(means)) + 0.5),
                    means,
                    label=f"{label}: {final(errors):.2g}",
                    color=colour,
                    lw=1.5 if window else 4,
                )
            axes.axhline(task.baseline, color="0.25", ls="--", lw=1, label=f"knows nothing: {task.baseline:.2g}")
            axes.set(yscale="log", ylim=(task.baseline / 3000, task.baseline * 3), xlabel="step of training")
            axes.set_title(f"{name}, {cell}")
            axes.grid(color="0.85", lw=0.5)
            axes.legend(frameon=False, loc="best")
        row[1].set_ylabel("mean square error" if name == "adding" else "nats per symbol")
    figure.savefig(path, dpi=90, format="png")


# --- The job ---


def run(lag: int, steps: int, seed: int, out: Path) -> None:
    started = time.perf_counter()
    found: dict[tuple[str, str, int | None], Any] = {}
    print(f"lag {lag}, {steps} steps of {BATCH} sequences; final errors\n")
    print(f"task     window  cuts at t =       between?   {''.join(f'{cell:>8}' for cell in CELLS)}  baseline")
    for name, task in TASKS.items():
        T = 1 + task.asks(lag)[-1][1]
        for window in windows(lag):
            for cell in CELLS:
                if window and not cuts(window, T):  # the full gradient, which has been seen
                    found[name, cell, window] = found[name, cell, None]
                    continue
                errors = train(jax.random.key(seed), task=name, cell=cell, window=window, lag=lag, steps=steps)
                if not math.isfinite(final(errors)):
                    raise FloatingPointError(f"the error of {cell} in {name} is {final(errors)}")
                found[name, cell, window] = errors
            where = ", ".join(map(str, cuts(window, T))) or "none"
            between = "no" if crosses(task, window, lag) else "yes"
            figures = "".join(f"{final(found[name, cell, window]):8.4f}" for cell in CELLS)
            print(
                f"{name:8} {window or 'full'!s:>6}  {where:17} {between:10} {figures}  {task.baseline:8.4f}", flush=True
            )
    draw_all(found, lag, seed, out)
    print(f"\n{time.perf_counter() - started:.0f} s with compilation; curves: {out}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("long_memory.py", description="Adding and copying. Defaults stand in brackets.")
    parser.add_argument("--lag", type=int, default=20, help="steps from what is said to the answer [%(default)s]")
    parser.add_argument("--steps", type=int, default=800, help="batches to train on [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of weights and sequences [%(default)s]")
    parser.add_argument("--out", type=Path, default=Path("out/long_memory.png"), metavar="FILE", help="[%(default)s]")
    options = parser.parse_args(argv)
    if not 10 <= options.lag <= 1000 or options.steps < 1 or not 0 <= options.seed < 2**31:
        parser.error("expected --lag from 10 to 1000, --steps from 1 on and --seed from 0 to 2**31 - 1")
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.open("ab").close()  # to learn now, not after training, that it can't be written
        run(options.lag, options.steps, options.seed, options.out)
    except OSError as error:
        print(f"long_memory.py: error: cannot write to {options.out}: {error.strerror}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"long_memory.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
