"""Linear recurrences of jaxseq against autodiff of scans.

    python -m benchmarks.linear [--rounds N] [--json FILE] [--picture FILE] [--quick]

Each candidate computes h_t = a_t h_{t-1} + x_t for factors that vary in time, and the gradient of a, the initial state
and x. Ratios are times relative to `jaxseq`. Temporary bytes include the residuals of the forward pass.
"""

from collections.abc import Iterator
from typing import Any

import jax
from jax import lax

import jaxseq
from benchmarks import harness
from benchmarks.harness import Candidate, Problem

Args = tuple[jax.Array, jax.Array, jax.Array]  # a (T, B, H), carry (B, H), x (T, B, H)

SIZES = ((8, 1024, 256), (1, 16384, 64), (32, 256, 512), (4, 65536, 16))  # B, T, H


def in_a_scan(a: jax.Array, carry: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    def step(h: jax.Array, at: Any) -> tuple[jax.Array, jax.Array]:
        a, x = at
        h = a * h + x
        return h, h

    return lax.scan(step, carry, (a, x))


def in_an_associative_scan(a: jax.Array, carry: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    def pair(left: Any, right: Any) -> Any:
        return left[0] * right[0], right[0] * left[1] + right[1]

    _, ys = lax.associative_scan(pair, (a, x.at[0].add(a[0] * carry)))
    return ys[-1], ys


def data(B: int, T: int, H: int) -> tuple[Args, tuple[jax.Array, jax.Array]]:
    """Return the arguments, with factors close to 1, and cotangents of the carry and the outputs."""
    keys = jax.random.split(jax.random.key(0), 5)
    a = jax.random.uniform(keys[0], (T, B, H), minval=0.9)
    carry, last_bar = (jax.random.normal(k, (B, H)) for k in keys[1:3])
    x, y_bar = (jax.random.normal(k, (T, B, H)) for k in keys[3:])
    return (a, carry, x), (last_bar, y_bar)


def problems(quick: bool) -> Iterator[Problem]:
    for B, T, H in ((2, 64, 8),) if quick else SIZES:
        args, bars = data(B, T, H)
        functions = {
            "jaxseq": jaxseq.linear_recurrence,
            "scan": in_a_scan,
            "associative": in_an_associative_scan,
        }
        candidates = [Candidate(name, harness.with_gradient(f), (bars, *args)) for name, f in functions.items()]
        yield Problem(f"linear recurrence forward + gradient, B={B} T={T} H={H}", "jaxseq", candidates)


def main(argv: Any = None) -> None:
    about = "Compare the linear recurrence of jaxseq with autodiff of lax.scan and of lax.associative_scan."
    harness.main(problems, about, [], argv)


if __name__ == "__main__":
    main()
