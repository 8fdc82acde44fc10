"""`jaxseq.scan` against `lax.scan` with `stop_gradient`, and against the checkpointed scan of Equinox, for cells of
other libraries and for a simulator.

    python -m benchmarks.scan [--rounds N] [--json FILE] [--picture FILE] [--quick]

Each candidate computes the outputs and the gradient of all parameters, the initial state and the input.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jaxseq
from benchmarks import harness
from benchmarks.harness import Candidate, Problem, with_gradient
from benchmarks.recurrence import Size
from jaxseq import reference
from jaxseq._init import normal

TRUNCATED = (
    (Size(1, 1024, 64, 64), 64),
    (Size(4, 1024, 64, 64), 64),
    (Size(16, 1024, 64, 64), (32, 64)),
    (Size(32, 512, 128, 128), 32),
)
LONG = (Size(8, 4096, 64, 64), Size(1, 16384, 32, 32))
TINY = Size(2, 12, 3, 4)


class Model(NamedTuple):
    """A step function `(params, carry, x) -> (carry, y)` and its inputs."""

    step: Callable[..., Any]
    params: Any
    carry: Any
    xs: jax.Array


def in_flax(size: Size) -> Model | None:
    nn = harness.peer("flax.linen")
    if nn is None:
        return None
    B, T, D, H = size
    cell, xs = nn.OptimizedLSTMCell(H), normal(jax.random.key(1), (T, B, D))
    carry = cell.initialize_carry(jax.random.key(0), (B, D))
    return Model(cell.apply, cell.init(jax.random.key(0), carry, xs[0]), carry, xs)


def in_equinox(size: Size) -> Model | None:
    eqx = harness.peer("equinox")
    if eqx is None:
        return None
    B, T, D, H = size
    params, static = eqx.partition(eqx.nn.GRUCell(D, H, key=jax.random.key(0)), eqx.is_array)

    def step(params: Any, h: jax.Array, x: jax.Array) -> Any:
        h = jax.vmap(eqx.combine(params, static))(x, h)
        return h, h

    return Model(step, params, jnp.zeros((B, H)), normal(jax.random.key(1), (T, B, D)))


def neurons(size: Size) -> Model:
    """A simulator: H coupled FitzHugh-Nagumo neurons, driven by D currents, with the Euler method."""
    B, T, D, H = size
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"in": normal(keys[0], (D, H)) * 0.3, "coupling": normal(keys[1], (H, H)) * 0.1, "rate": jnp.full(H, 0.08)}

    def step(params: Any, s: Any, x: jax.Array) -> Any:
        v, w = s
        current = x @ params["in"] + jnp.tanh(v) @ params["coupling"]
        dt = 0.1
        v, w = v + dt * (v - v**3 / 3 - w + current), w + dt * params["rate"] * (v + 0.7 - 0.8 * w)
        return (v, w), v

    return Model(step, params, (jnp.zeros((B, H)), jnp.zeros((B, H))), normal(keys[2], (T, B, D)))


MODELS = {"Flax LSTM": in_flax, "Equinox GRU": in_equinox, "neurons": neurons}


def run(scan: Callable[..., Any], model: Model, **options: Any) -> Callable[..., Any]:
    return with_gradient(lambda params, carry, xs: scan(partial(model.step, params), carry, xs, **options))


def problems(quick: bool) -> Iterator[Problem]:
    for size, k in [(TINY, 4), (TINY, (4, 6))] if quick else TRUNCATED:
        for name, make in MODELS.items():
            model = make(size)
            if model is not None:
                yield _problem(f"{name}, {', '.join(map(str, size))}, truncation={k}", model, {"truncation": k})
    for size in [TINY] if quick else LONG:
        for name, make in MODELS.items():
            model = make(size)
            if model is not None:
                yield _problem(f"{name}, {', '.join(map(str, size))}, checkpoint", model, {"checkpoint": "auto"})


def _problem(title: str, model: Model, options: dict[str, Any]) -> Problem:
    inputs = model.params, model.carry, model.xs
    shapes = jax.eval_shape(lambda p, s, xs: jax.lax.scan(partial(model.step, p), s, xs), *inputs)
    leaves, structure = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    cotangents = structure.unflatten([normal(k, a.shape).astype(a.dtype) for k, a in zip(keys, leaves, strict=True)])
    args = cotangents, *inputs
    candidates = [
        Candidate("jaxseq.scan", run(jaxseq.scan, model, **options), args),
        Candidate("lax.scan", run(reference.scan, model, **options), args),
    ]
    if "checkpoint" in options:
        eqxi = harness.peer("equinox.internal")
        steps = model.xs.shape[0]
        checkpointed = eqxi and run(partial(eqxi.scan, kind="checkpointed", checkpoints=max(1, int(steps**0.5))), model)
        candidates.append(Candidate("Equinox", checkpointed, args))
    return Problem(title, "jaxseq.scan", candidates, tolerance=2e-3)


def main(argv: Any = None) -> None:
    about = "jaxseq.scan with truncation and checkpoints against lax.scan and Equinox."
    harness.main(problems, about, ["flax", "equinox"], argv)


if __name__ == "__main__":
    main()
