"""Forward mode of every op against JAX's derivative of the reference implementation, and Gauss-Newton vector products.

    python -m benchmarks.forward_mode [--rounds N] [--json FILE] [--picture FILE] [--quick]

`jax.jvp`: each candidate computes the outputs and their tangent, for tangents of all arguments. A Gauss-Newton vector
product is J^T H J v, with the Jacobian J of the outputs and the Hessian H of a loss of the outputs.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import jaxseq
from benchmarks import harness
from benchmarks.harness import Candidate, Problem
from benchmarks.recurrence import Size, like
from jaxseq import reference
from jaxseq._init import normal

SIZES = (Size(16, 128, 64, 64), Size(64, 128, 256, 256), Size(1, 1024, 64, 64))
TINY = Size(2, 5, 3, 4)
KEY = jax.random.key(2)  # of the tangents
OPTIONS: tuple[dict[str, Any], ...] = ({}, {"truncation": 32})

CONVOLUTIONS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "conv 16 x 256 x 64, 5 taps": ("conv", (16, 256, 64), (5, 64, 64), {"padding": "SAME"}),
    "conv 8 x 32 x 32 x 32, 3 x 3": ("conv", (8, 32, 32, 32), (3, 3, 32, 64), {"padding": "SAME"}),
    "depthwise 8 x 1024 x 64, 128 taps": ("conv", (8, 1024, 64), (128, 1, 64), {"padding": "CAUSAL", "groups": 64}),
    "transposed 8 x 256 x 64, 4 taps, stride 2": ("conv_transpose", (8, 256, 64), (4, 64, 64), {"stride": 2}),
}


def with_tangent(f: Callable[..., Any]) -> Callable[..., Any]:
    """Return `(tangents, *args) -> (outputs, tangent of the outputs)`."""
    return lambda tangents, *args: jax.jvp(f, args, tangents)


def tangent_of_sequence(options: dict[str, Any], f: Callable[..., Any]) -> Callable[..., Any]:
    return with_tangent(lambda params, xs: f(params, None, xs, **options))


def gauss_newton(f: Callable[..., Any]) -> Callable[..., Any]:
    """Return `(v, params, xs) -> J^T H J v` for the loss sum(cos(ys)), with H = -diag(cos(ys))."""

    def product(v: Any, params: Any, xs: jax.Array) -> Any:
        outputs = lambda params: f(params, None, xs)[1]  # noqa: E731
        ys, linear = jax.linearize(outputs, params)
        return jax.linear_transpose(linear, params)(-jnp.cos(ys) * linear(v))

    return product


def recurrent(name: str, size: Size) -> tuple[Any, jax.Array]:
    """Return parameters and input."""
    B, T, D, H = size
    params = getattr(jaxseq, f"{name}_init")(jax.random.key(0), D, H)
    return params, normal(jax.random.key(1), (T, B, D))


def compared(title: str, make: Callable[[Any], Any], name: str, args: tuple[Any, ...]) -> Problem:
    candidates = [Candidate(n, make(getattr(m, name)), args) for n, m in (("jaxseq", jaxseq), ("reference", reference))]
    return Problem(title, "reference", candidates, tolerance=2e-3)


def problems(quick: bool) -> Iterator[Problem]:
    for size in [TINY] if quick else SIZES:
        where = ", ".join(map(str, size))
        for name in ("rnn", "gru", "lstm"):
            params, xs = recurrent(name, size)
            for options in OPTIONS[: 2 if name == "lstm" else 1]:
                title = ", ".join([f"jvp, {name}, {where}", *(f"{k}={v}" for k, v in options.items())])
                yield compared(
                    title, partial(tangent_of_sequence, options), name, (like(KEY, (params, xs)), params, xs)
                )
        params, xs = recurrent("lstm", size)
        yield compared(f"Gauss-Newton, lstm, {where}", gauss_newton, "lstm", (like(KEY, params), params, xs))
    for title, (name, x_shape, kernel_shape, options) in list(CONVOLUTIONS.items())[: 1 if quick else None]:
        x, kernel = normal(jax.random.key(0), x_shape), normal(jax.random.key(1), kernel_shape)
        run = lambda f, options=options: with_tangent(partial(f, **options))  # noqa: E731
        yield compared(f"jvp, {title}", run, name, (like(KEY, (x, kernel)), x, kernel))


def main(argv: Any = None) -> None:
    about = "Forward mode and Gauss-Newton vector products against the reference implementations."
    harness.main(problems, about, [], argv)


if __name__ == "__main__":
    main()
