"""Linear recurrences and linear cells of jaxseq against autodiff of scans and other libraries.

    python -m benchmarks.linear [--rounds N] [--json FILE] [--picture FILE] [--quick]

Each candidate of the first rows computes h_t = a_t h_{t-1} + x_t for factors that vary in time, and the gradient of a,
the initial state and x. Those of the other rows compute a whole layer, and the gradient of the parameters, the initial
state and xs (`linear_layers.py`). Ratios are times relative to `jaxseq`. Temporary bytes include the residuals of the
forward pass.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import jaxseq
from benchmarks import harness
from benchmarks.harness import Candidate, Problem
from benchmarks.linear_layers import (
    in_a_scan,
    in_an_associative_scan,
    in_jax,
    in_recurrentgemma,
    in_torch,
    mlstm_in_a_scan,
    mlstm_in_mlstm_kernels,
)
from jaxseq import cells

Args = tuple[jax.Array, jax.Array, jax.Array]  # a (T, B, H), carry (B, H), x (T, B, H)

MLSTM_SIZES = ((8, 512, 256, 4), (2, 2048, 128, 4))  # B, T, D, heads
SIZES = ((8, 1024, 256), (1, 16384, 64), (32, 256, 512), (4, 65536, 16))  # B, T, H

# The cell, its initializer, and the sizes B, T, D, H.
LAYERS = {
    "min_gru": (cells.min_gru, cells.min_gru_init, (8, 1024, 256, 256)),
    "lru": (cells.lru, partial(cells.lru_init, min_radius=0.9, max_radius=0.999), (8, 1024, 256, 256)),
    "s5": (cells.s5, partial(cells.s5_init, blocks=8), (8, 1024, 256, 256)),
    "rg_lru": (cells.rg_lru, partial(cells.rg_lru_init, blocks=8), (8, 1024, 256, 256)),
    "selective_ssm": (cells.selective_ssm, cells.selective_ssm_init, (4, 512, 64, 16)),
}


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
    for name in LAYERS:
        yield layer(name, quick)
    for sizes in ((2, 16, 16, 2),) if quick else MLSTM_SIZES:
        yield mlstm(sizes)


def layer(name: str, quick: bool) -> Problem:
    """Compare a whole layer. Only cells with real factors can use the scans of recurrentgemma and mambapy.

    The tolerance allows for complex factors, whose rounding in float32 grows over the steps. All candidates have the
    gradient of the phases of LRU to 1e-4.
    """
    cell, init, sizes = LAYERS[name]
    B, T, D, H = (2, 16, 16, 16) if quick else sizes
    keys = jax.random.split(jax.random.key(0), 4)
    params, xs = init(keys[0], D, H), jax.random.normal(keys[1], (T, B, D))
    f = partial(jaxseq.recurrence, cell)
    like = jax.eval_shape(f, params, None, xs)
    carry = jax.random.normal(keys[2], like[0].shape, like[0].dtype)
    bars = tuple(jax.random.normal(k, x.shape, x.dtype) for k, x in zip(jax.random.split(keys[3]), like, strict=True))
    args = params, carry, xs
    functions: dict[str, Any] = {
        "jaxseq": f,
        "scan": in_jax(name, in_a_scan),
        "associative": in_jax(name, in_an_associative_scan),
    }
    real = not jnp.iscomplexobj(carry)
    if real:
        solve = in_recurrentgemma()
        functions["recurrentgemma"] = None if solve is None else in_jax(name, solve)
    candidates = [
        Candidate(label, None if f is None else harness.with_gradient(f), (bars, *args))
        for label, f in functions.items()
    ]
    candidates += [in_torch(label, name, bars, args) for label in ("torch", "mambapy")[: 1 + real]]
    return Problem(f"{name} forward + gradient, B={B} T={T} D={D} H={H}", "jaxseq", candidates, tolerance=1e-3)


def mlstm(sizes: tuple[int, int, int, int]) -> Problem:
    """Compare the outputs of an mLSTM from a state of zeros, and their gradient."""
    B, T, D, heads = sizes
    keys = jax.random.split(jax.random.key(0), 3)
    params, xs = jaxseq.mlstm_init(keys[0], D, D, heads=heads), jax.random.normal(keys[1], (T, B, D))
    bars = jax.random.normal(keys[2], (T, B, D))
    functions = {"jaxseq": jaxseq.mlstm, "scan": mlstm_in_a_scan, "mlstm_kernels": mlstm_in_mlstm_kernels()}

    def outputs(f: Any) -> Any:
        return None if f is None else harness.with_gradient(lambda params, xs: f(params, None, xs)[1])

    candidates = [Candidate(label, outputs(f), (bars, params, xs)) for label, f in functions.items()]
    return Problem(f"mlstm forward + gradient, B={B} T={T} D={D} heads={heads}", "jaxseq", candidates, tolerance=1e-3)


def main(argv: Any = None) -> None:
    about = "Compare linear recurrences and linear cells with autodiff of scans, torch, mambapy and recurrentgemma."
    harness.main(problems, about, ["torch", "mambapy", "recurrentgemma", "mlstm_kernels"], argv)


if __name__ == "__main__":
    main()
