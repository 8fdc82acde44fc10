"""Tasks that truncation makes unlearnable: the target at the end depends on inputs from long before.

    adding     x_t = (u_t, m_t),  u_t uniform in [0, 1],  m_t = 1 at two steps a < 5 <= b < 10, else 0
               target u_a + u_b at the last step, t = lag + 9; error: mean square
               baseline: the constant 1 has the variance of the sum as its error, 2 / 12 = 1/6
    copying    x_0, x_1, x_2 one of K = 8 symbols each, then blanks, then from t = lag - 1 on "go" and blanks
               target x_i at t = lag + i; error: nats per symbol
               baseline: the uniform distribution has the error log K

Truncated backpropagation, `truncation=k`, cuts the gradient of the state at t = k, 2k, ..., counted from the first step
of a sequence. A dependence of step t on step s can be learnt only if there is no cut between them, s < n k <= t. So it
is not sufficient that the window exceeds the lag. With k = lag + 5, the copying task ends before the first cut, but in
the adding task the cut is between the marks and the target. (`truncation=(k1, k2)` reaches k2 steps back from the end
of each window.)

Values still cross a cut: the state may contain information that no gradient has trained it to store, and the readout
can learn to use it. This explains errors below the baseline despite cuts; they are lower for cells with a longer memory
at initialization. Without cuts, the gradient may still vanish, or training may need more steps than given here.

    python examples/long_memory.py                  about a minute and a half; writes out/long_memory.png
    python examples/long_memory.py --lag 40         twice the lag

Source: S. Hochreiter and J. Schmidhuber, Long short-term memory (1997), section 5, for adding; M. Arjovsky, A. Shah and
Y. Bengio, Unitary evolution recurrent neural networks (2016), section 5, for this version of copying.
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

FIRST, SECOND = (0, 5), (5, 10)  # ranges of the two marks of the adding task
S, K = 3, 8  # number of symbols to copy, and size of the alphabet
BLANK, GO = K, K + 1
H, BATCH, LEARNING_RATE = 64, 64, 1e-2  # initial learning rate of Adam, with cosine decay
LAST = 0.05  # the final error is the mean over this fraction of the steps
CELLS = {
    "RNN": (jaxseq.rnn_init, jaxseq.rnn),
    "GRU": (jaxseq.gru_init, jaxseq.gru),
    "LSTM": (jaxseq.lstm_init, jaxseq.lstm),
}


# --- Tasks ---


class Task(NamedTuple):
    """A task whose sequences are drawn anew for every training step, so that each error is on unseen data."""

    draw: Callable[..., tuple[Any, Any]]  # (key, batch, lag) -> (xs (T, batch, inputs), targets)
    error: Callable[..., Float[Array, ""]]  # (outputs (T, batch, outputs), targets)
    inputs: int
    outputs: int
    baseline: float
    dependencies: Callable[[int], list[tuple[int, int]]]  # lag -> (s, t): the target at t depends on the input at s


def draw_adding(key: PRNGKeyArray, batch: int, lag: int) -> tuple[Float[Array, "T batch 2"], Float[Array, " batch"]]:
    key_u, key_a, key_b = jax.random.split(key, 3)
    t = jnp.arange(lag + SECOND[1])[:, None]
    u = jax.random.uniform(key_u, (t.size, batch))
    a, b = jax.random.randint(key_a, (batch,), *FIRST), jax.random.randint(key_b, (batch,), *SECOND)
    m = ((t == a) | (t == b)).astype(u.dtype)
    return jnp.stack([u, m], -1), (u * m).sum(0)


def draw_copying(key: PRNGKeyArray, batch: int, lag: int) -> tuple[Float[Array, "T batch K+2"], Int[Array, "S batch"]]:
    symbols = jax.random.randint(key, (S, batch), 0, K)
    tokens = jnp.full((lag + S, batch), BLANK).at[:S].set(symbols).at[lag - 1].set(GO)
    # The factor gives each feature the variance that *_init expects.
    return jax.nn.one_hot(tokens, K + 2) * (K + 2) ** 0.5, symbols


def squared(z: Float[Array, "T batch 1"], y: Float[Array, " batch"]) -> Float[Array, ""]:
    return jnp.mean((z[-1, :, 0] - y) ** 2)


def cross_entropy(z: Float[Array, "T batch K"], y: Int[Array, "S batch"]) -> Float[Array, ""]:
    return optax.softmax_cross_entropy_with_integer_labels(z[-S:], y).mean()


TASKS = {
    "adding": Task(draw_adding, squared, 2, 1, 1 / 6, lambda lag: [(s, lag + SECOND[1] - 1) for s in range(SECOND[1])]),
    "copying": Task(draw_copying, cross_entropy, K + 2, K, math.log(K), lambda lag: [(i, lag + i) for i in range(S)]),
}


GOALS = {"adding": "add the two red numbers at the end", "copying": "output the three red symbols at the end"}


def windows(lag: int) -> tuple[int | None, ...]:
    """Return the truncation windows to compare: none, longer than the lag, and shorter."""
    return None, lag + 5, lag // 2


def cuts(window: int | None, T: int) -> list[int]:
    """Return the steps before which `truncation=window` cuts the gradient, in a sequence of T steps."""
    return list(range(window, T, window)) if window else []


def crosses(task: Task, window: int | None, lag: int) -> bool:
    """Return True if the gradient of each target reaches the inputs that it depends on."""
    pairs = task.dependencies(lag)
    T = 1 + max(t for _, t in pairs)
    return not any(s < cut <= t for s, t in pairs for cut in cuts(window, T))


# --- Training ---


@partial(jax.jit, static_argnames=("task", "cell", "window", "lag", "steps"))
def train(
    key: PRNGKeyArray, *, task: str, cell: str, window: int | None, lag: int, steps: int
) -> Float[Array, " steps"]:
    """Train a model and return the error at each step."""
    draw, error, inputs, outputs, *_ = TASKS[task]
    init, op = CELLS[cell]
    key_cell, key_W, key_data = jax.random.split(key, 3)
    params = init(key_cell, inputs, H), jax.random.normal(key_W, (H, outputs)) * H**-0.5, jnp.zeros(outputs)
    # Clipping limits the effect of a step with an exploding gradient.
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
    """Return the mean error of the last steps."""
    return float(np.mean(np.asarray(errors)[-max(1, round(LAST * len(errors))) :]))


# --- Plot ---


def layout(axes: Any, task: str, lag: int, key: PRNGKeyArray) -> None:
    """Plot one sequence, and the steps at which the gradient is cut."""
    xs, y = (np.asarray(a) for a in TASKS[task].draw(key, 1, lag))
    T = len(xs)
    if task == "adding":
        u, m = xs[:, 0].T
        axes.bar(range(T), u, color=np.where(m > 0, "tab:red", "0.8"), width=0.8)
        axes.text(T - 0.4, 0.5, f"sum of\nthe red:\n{y[0]:.2f}", va="center", color="tab:red")
        first, last = int(np.flatnonzero(m)[1]), T - 1
    else:
        heights = (y[:, 0] + 1) / K  # solid bars are symbols, dotted bars are targets
        axes.bar(range(S), heights, color="tab:red", width=0.8)
        axes.bar(range(lag, T), heights, facecolor="none", edgecolor="tab:red", width=0.7, ls=":", lw=1.5)
        axes.text(lag - 1, 0, "go", ha="center", va="bottom", color="0.3")
        axes.text(T - 0.4, 0.5, "the same\nthree", va="center", color="tab:red")
        first, last = 0, lag
    axes.annotate("", (last, 1.12), (first, 1.12), arrowprops={"arrowstyle": "<->", "color": "0.3"})
    axes.text((first + last) / 2, 1.15, f"{last - first} steps", ha="center", va="bottom", color="0.3")
    for row, (colour, window) in enumerate(zip(("C2", "C1", "C0"), windows(lag), strict=True)):
        y_row = -0.2 - 0.17 * row  # windows are drawn below the sequence
        edges = [0, *cuts(window, T), T]
        for start, end in pairwise(edges):
            axes.plot((start - 0.3, end - 0.7), (y_row, y_row), color=colour, lw=5, solid_capstyle="butt")
        for cut in edges[1:-1]:
            axes.plot((cut - 0.5,) * 2, (y_row, 1.05), color=colour, lw=1.2, ls="--")
        axes.text(T - 0.4, y_row, f"windows of {window}" if window else "full gradient", va="center", color=colour)
    axes.set(xlim=(-1, T + 7), ylim=(-0.75, 1.35), xlabel="time step", title=f"{task}: {GOALS[task]}")
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.set_yticks([])


def draw_all(found: dict[tuple[str, str, int | None], Any], lag: int, seed: int, path: Path) -> None:
    figure = Figure(figsize=(19, 8.5), layout="constrained")
    claim = "A dependence is not learnt if truncation cuts the gradient between the input and the target"
    figure.suptitle(f"{claim} (dashed: cuts; numbers in the legends: error at the end)")
    rows: Any = figure.subplots(len(TASKS), 1 + len(CELLS), squeeze=False, width_ratios=[1.5] + [1] * len(CELLS))
    for row, (name, task) in zip(rows, TASKS.items(), strict=True):
        layout(row[0], name, lag, jax.random.key(seed))
        for axes, cell in zip(row[1:], CELLS, strict=True):
            for window, colour in zip(windows(lag), ("C2", "C1", "C0"), strict=True):
                errors = np.asarray(found[name, cell, window])
                span = max(1, len(errors) // 50)
                means = errors[: len(errors) // span * span].reshape(-1, span).mean(1)
                label = f"windows of {window} steps" if window else "full gradient"
                axes.plot(
                    span * (np.arange(len(means)) + 0.5),
                    means,
                    label=f"{label}: {final(errors):.2g}",
                    color=colour,
                    lw=1.5 if window else 4,
                )
            axes.axhline(task.baseline, color="0.25", ls="--", lw=1, label=f"without memory: {task.baseline:.2g}")
            axes.set(yscale="log", ylim=(task.baseline / 3000, task.baseline * 3), xlabel="training step")
            axes.set_title(f"{name}: error of the {cell}")
            axes.grid(color="0.85", lw=0.5)
            axes.legend(frameon=False, loc="best")
        row[1].set_ylabel("mean square error" if name == "adding" else "nats per symbol")
    figure.savefig(path, dpi=90, format="png")


# --- Main program ---


def run(lag: int, steps: int, seed: int, out: Path) -> None:
    started = time.perf_counter()
    found: dict[tuple[str, str, int | None], Any] = {}
    print(f"lag {lag}, {steps} training steps, batch size {BATCH}; final errors\n")
    print(f"task     window  cuts at t =       separate?  {''.join(f'{cell:>8}' for cell in CELLS)}  baseline")
    for name, task in TASKS.items():
        T = 1 + task.dependencies(lag)[-1][1]
        for window in windows(lag):
            for cell in CELLS:
                if window and not cuts(window, T):  # no cut: the same as the full gradient
                    found[name, cell, window] = found[name, cell, None]
                    continue
                errors = train(jax.random.key(seed), task=name, cell=cell, window=window, lag=lag, steps=steps)
                if not math.isfinite(final(errors)):
                    raise FloatingPointError(f"the error of {cell} in {name} is {final(errors)}")
                found[name, cell, window] = errors
            where = ", ".join(map(str, cuts(window, T))) or "none"
            separate = "no" if crosses(task, window, lag) else "yes"
            figures = "".join(f"{final(found[name, cell, window]):8.4f}" for cell in CELLS)
            shown = window or "full"
            print(f"{name:8} {shown:>6}  {where:17} {separate:10} {figures}  {task.baseline:8.4f}", flush=True)
    draw_all(found, lag, seed, out)
    print(f"\n{time.perf_counter() - started:.0f} s including compilation; curves: {out}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("long_memory.py", description="Memory tasks. Defaults are in brackets.")
    parser.add_argument("--lag", type=int, default=20, help="steps between input and target [%(default)s]")
    parser.add_argument("--steps", type=int, default=800, help="training steps [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="random seed [%(default)s]")
    parser.add_argument("--out", type=Path, default=Path("out/long_memory.png"), metavar="FILE", help="[%(default)s]")
    options = parser.parse_args(argv)
    if not 10 <= options.lag <= 1000 or options.steps < 1 or not 0 <= options.seed < 2**31:
        parser.error("expected --lag from 10 to 1000, --steps >= 1 and --seed from 0 to 2**31 - 1")
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.open("ab").close()  # detect an unwritable path before training
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
