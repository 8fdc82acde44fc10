"""Train two models from the same initial parameters and compare them. Used by the four examples of this folder.

    θ_{k+1} = θ_k - Adam(∇loss(θ_k, batch_k)),    k = 0, 1, ...         for both models, on the same batches

θ_0 is drawn by the framework; `jaxseq.convert` converts it to the layout of jaxseq. Equal gradients keep the losses
equal, up to the order of float32 sums, whose effect grows during training. The models alternate step by step in random
order, so that other load on the machine affects both.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jaxtyping import PRNGKeyArray

DISTANCE = 1e-4  # tolerated relative difference of the losses, due to rounding over some dozen steps

Params = Any  # a tree of arrays, with nodes of the framework
Batch = Any


class Side(NamedTuple):
    """A model as a loss function and parameters."""

    name: str
    loss: Callable[[Params, Batch], jax.Array]
    params: Params  # initial


class Run(NamedTuple):
    """Results of both models: the framework in column 0, jaxseq in column 1."""

    losses: np.ndarray  # (steps, 2)
    seconds: np.ndarray  # (steps, 2)
    temp_bytes: tuple[int | None, ...]  # of a step, as reported by the compiler
    params: tuple[Params, ...]  # final

    @property
    def distance(self) -> float:
        """The largest relative difference between the losses of a step."""
        theirs, ours = self.losses.T
        return float(np.max(np.abs(ours - theirs) / np.abs(theirs)))

    @property
    def ratio(self) -> tuple[float, float, float]:
        """Time of the framework over time of jaxseq: lower quartile, median and upper quartile over the steps."""
        theirs, ours = self.seconds.T
        low, median, high = np.quantile(theirs / ours, (0.25, 0.5, 0.75))
        return float(low), float(median), float(high)


def train(
    sides: tuple[Side, Side], batch: Callable[[PRNGKeyArray], Batch], key: PRNGKeyArray, *, steps: int, rate: float
) -> Run:
    """Train both models, step k on `batch(fold_in(key, k))`."""
    optimizer = optax.adam(rate)

    def step(loss: Callable[..., jax.Array], state: Any, batch: Batch) -> Any:
        params, memory = state
        cost, gradient = jax.value_and_grad(loss)(params, batch)
        updates, memory = optimizer.update(gradient, memory, params)
        return (optax.apply_updates(params, updates), memory), cost

    draw = jax.jit(batch)
    states = [(side.params, optimizer.init(side.params)) for side in sides]
    programs = [
        jax.jit(partial(step, side.loss)).lower(state, draw(key)).compile()
        for side, state in zip(sides, states, strict=True)
    ]
    for program, state in zip(programs, states, strict=True):
        jax.block_until_ready(program(state, draw(key)))  # warm up; the result is discarded

    losses, seconds = np.empty((2, steps, 2))
    turns, shuffle = [0, 1], random.Random(0).shuffle
    for k in range(steps):
        data = jax.block_until_ready(draw(jax.random.fold_in(key, k)))
        shuffle(turns)
        for i in turns:
            start = time.perf_counter()
            states[i], cost = jax.block_until_ready(programs[i](states[i], data))
            seconds[k, i] = time.perf_counter() - start
            losses[k, i] = cost
    memory = [program.memory_analysis() for program in programs]
    return Run(
        losses,
        seconds,
        tuple(None if m is None else m.temp_size_in_bytes for m in memory),
        tuple(params for params, _ in states),
    )


def report(names: tuple[str, str], run: Run) -> None:
    steps = len(run.losses)
    print(f"{'step':>6}{names[0]:>16}{names[1]:>16}")
    for k in sorted({*range(0, steps, max(1, steps // 5)), steps - 1}):
        print(f"{k:6}{run.losses[k, 0]:16.7f}{run.losses[k, 1]:16.7f}")
    print(f"largest relative difference in {steps} steps: {run.distance:.0e}")
    theirs, ours = 1e3 * np.median(run.seconds, 0)
    low, median, high = run.ratio
    print(f"time per step: {theirs:.1f} and {ours:.1f} ms, ratio {median:.2f} (quartiles {low:.2f} to {high:.2f})")
    if None not in run.temp_bytes:
        print("temporary bytes: {:.1f} and {:.1f} MB".format(*(b / 1e6 for b in run.temp_bytes)))  # type: ignore


def main(
    about: str,
    sides: Callable[[PRNGKeyArray], tuple[Side, Side]],
    batch: Callable[[PRNGKeyArray], Batch],
    *,
    rate: float,
    argv: list[str] | None = None,
) -> int:
    """Run the command line of an example. Return 0 if the losses agree, and 1 if they do not."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--steps", type=int, default=50, help="training steps [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="random seed [%(default)s]")
    options = parser.parse_args(argv)
    if options.steps < 1 or not 0 <= options.seed < 2**31:
        parser.error("expected --steps >= 1 and --seed from 0 to 2**31 - 1")
    key_weights, key_batches = jax.random.split(jax.random.key(options.seed))
    both = sides(key_weights)
    print(about)
    run = train(both, batch, key_batches, steps=options.steps, rate=rate)
    report((both[0].name, both[1].name), run)
    if not run.distance <= DISTANCE:  # also true for NaN
        print(f"error: the losses differ by {run.distance:.0e}, expected at most {DISTANCE:.0e}", file=sys.stderr)
        return 1
    return 0
