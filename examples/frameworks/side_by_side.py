"""Two models with the same weights, trained side by side: what the four examples beside this file share.

    θ_{k+1} = θ_k - Adam(∇loss(θ_k, batch_k)),    k = 0, 1, ...         for either, on the same batches

θ_0 is the framework's own draw, which `jaxseq.convert` has put into our layout for the other. Equal gradients keep the
losses together; float32 sums in another order make them differ in the last digits, and training widens that. The two
take turns, step by step and in random order, so that a slow moment of the machine meets both.
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

APART = 1e-4  # of a loss: what rounding may make of it in some dozen steps

Params = Any  # a tree of arrays; what it is made of is the framework's
Batch = Any


class Side(NamedTuple):
    """A model as plain JAX sees it."""

    name: str
    loss: Callable[[Params, Batch], jax.Array]
    params: Params  # the first ones


class Run(NamedTuple):
    """What came of both sides, theirs in column 0 and ours in column 1."""

    losses: np.ndarray  # (steps, 2)
    seconds: np.ndarray  # (steps, 2)
    temp_bytes: tuple[int | None, ...]  # of a step, as the compiler has planned them
    params: tuple[Params, ...]  # the last ones

    @property
    def apart(self) -> float:
        """The largest difference of the two losses of a step, in units of theirs."""
        theirs, ours = self.losses.T
        return float(np.max(np.abs(ours - theirs) / np.abs(theirs)))

    @property
    def ratio(self) -> tuple[float, float, float]:
        """How many times as long theirs takes: lower quartile, median and upper quartile over the steps."""
        theirs, ours = self.seconds.T
        low, median, high = np.quantile(theirs / ours, (0.25, 0.5, 0.75))
        return float(low), float(median), float(high)


def train(
    sides: tuple[Side, Side], batch: Callable[[PRNGKeyArray], Batch], key: PRNGKeyArray, *, steps: int, rate: float
) -> Run:
    """Both for so many steps, step k on `batch(fold_in(key, k))`."""
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
        jax.block_until_ready(program(state, draw(key)))  # the first call finds cold caches; nothing of it is kept

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
    print(f"largest difference in {steps} steps: {run.apart:.0e} of the loss")
    theirs, ours = 1e3 * np.median(run.seconds, 0)
    low, median, high = run.ratio
    print(f"a step: {theirs:.1f} and {ours:.1f} ms, {median:.2f} times as long (quartiles {low:.2f} to {high:.2f})")
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
    """The command line of an example: 0 where the losses stay together, 1 where they do not."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--steps", type=int, default=50, help="of training [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches [%(default)s]")
    options = parser.parse_args(argv)
    if options.steps < 1 or not 0 <= options.seed < 2**31:
        parser.error("expected --steps from 1 on and --seed from 0 to 2**31 - 1")
    key_weights, key_batches = jax.random.split(jax.random.key(options.seed))
    both = sides(key_weights)
    print(about)
    run = train(both, batch, key_batches, steps=options.steps, rate=rate)
    report((both[0].name, both[1].name), run)
    if not run.apart <= APART:  # so put, NaN is refused too
        print(f"error: the losses are {run.apart:.0e} apart, expected at most {APART:.0e}", file=sys.stderr)
        return 1
    return 0
