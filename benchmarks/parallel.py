"""Newton iterations of `jaxseq.parallel` against the same recurrence step by step.

    python -m benchmarks.parallel [--rounds N] [--json FILE] [--picture FILE] [--quick]

The first tables have times of the states, and of states and the gradient of all arguments. Ratios are times relative to
`jaxseq.recurrence`, which computes one step after another. `deer` and `quasi-deer` solve their linear recurrences with
the algorithm of this backend, `deer tree` and `quasi-deer tree` with associative scans, as on accelerators. The last
lines have the numbers of iterations of a GRU whose recurrent weights are those of its initializer times a gain.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import jaxseq
from benchmarks import harness
from benchmarks.harness import Candidate, Problem
from jaxseq import Cell, cells, tuning

GAINS = (1, 1.5, 2, 3)
GRU = cells.gru, jaxseq.gru_init
INDRNN = cells.indrnn, partial(cells.indrnn_init, steps=1024)
# cell, initializer, B, T, size of the input and of the state
SIZES = (
    (*GRU, 1, 1024, 64),
    (*GRU, 1, 16384, 4),
    (*GRU, 1, 16384, 16),
    (*INDRNN, 1, 1024, 64),
    (*INDRNN, 1, 16384, 64),
)


def data(init: Callable[..., Any], B: int, T: int, H: int, gain: float = 1) -> tuple[Any, ...]:
    """Return parameters, an initial state and a sequence."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = init(keys[0], H, H)
    carry, xs = jax.random.normal(keys[1], (B, H)), jax.random.normal(keys[2], (T, B, H))
    return params._replace(w_h=gain * params.w_h), carry, xs


def iterations(gain: float, method: str, *, B: int = 8, T: int = 1024, H: int = 64) -> str:
    """Return the smallest and the largest number of iterations of the examples of a batch."""
    run = jax.jit(lambda *args: jaxseq.parallel(cells.gru, *args, method=method)[2])
    report = run(*data(jaxseq.gru_init, B, T, H, gain))
    if not report.converged.all():
        return f"{int(report.converged.sum())} of {B} converge"
    return f"{report.iterations.min()} to {report.iterations.max()}"


def outputs(cell: Cell, method: str, numbers: tuning.Tuning | None, *args: Any) -> Any:
    """Return the final state and the outputs, computed by `jaxseq.parallel` with these numbers of tuning."""
    with tuning.use(numbers or tuning.for_backend()):
        return jaxseq.parallel(cell, *args, method=method)[:2]


def problems(quick: bool) -> Iterator[Problem]:
    for cell, init, B, T, H in ((*GRU, 2, 64, 8),) if quick else SIZES:
        args = data(init, B, T, H)
        run = partial(jaxseq.recurrence, cell)
        bars = jax.tree.map(jnp.ones_like, jax.eval_shape(run, *args))
        functions = {"jaxseq": run} | {
            name + suffix: partial(outputs, cell, name, numbers)
            for suffix, numbers in (("", None), (" tree", tuning.ACCELERATOR))
            for name in ("deer", "quasi-deer")
        }
        title = f"{cell.name} B={B} T={T} H={H}"
        forward = [Candidate(name, f, args) for name, f in functions.items()]
        yield Problem(f"{title} forward", "jaxseq", forward, 1e-3)
        gradient = [Candidate(name, harness.with_gradient(f), (bars, *args)) for name, f in functions.items()]
        yield Problem(f"{title} forward + gradient", "jaxseq", gradient, 1e-3)


def main(argv: Any = None) -> None:
    harness.main(problems, "Compare jaxseq.parallel with a recurrence step by step.", [], argv)
    print("iterations of a GRU, T=1024 H=64, recurrent weights of the initializer times a gain")
    for gain in GAINS:
        print(
            f"  gain {gain}", *(f"{method}: {iterations(gain, method)}" for method in ("deer", "quasi-deer")), sep="   "
        )


if __name__ == "__main__":
    main()
