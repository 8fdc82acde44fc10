"""An Elman network with a hand-derived rule, and variants of the rule with common mistakes.

    a_t = x_t W_x + h_{t-1} W_h + b        h_t = tanh(a_t)        y_t = h_t

    δ_t = (ȳ_t + δ_{t+1} W_hᵀ) (1 - h_t²)       h̄_0 = δ_1 W_hᵀ
    W̄_x = sum_t x_tᵀ δ_t     W̄_h = sum_t h_{t-1}ᵀ δ_t     b̄ = sum_t δ_t     x̄_t = δ_t W_xᵀ

`broken(name)` returns the network under a rule with one mistake. `benchmarks/checkers.py` runs the gradient checkers of
several libraries on these rules, and the tests run `jaxseq.testing` on them.
"""

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

Function = Callable[..., Any]

# The mistake, and the check of `jaxseq.testing` that has to find it.
BROKEN = {
    "sign flipped": "value",
    "wrong activation derivative": "value",
    "activation derivative at the previous state": "value",
    "recurrent weight not transposed": "value",
    "recurrence missing": "value",
    "recurrence once too often": "value",
    "previous state off by one": "value",
    "last step dropped": "value",
    "final-state cotangent ignored": "value",
    "final-state cotangent twice": "value",
    "initial-state gradient zero": "value",
    "initial-state gradient None": "contract",
    "initial state left out of W_h": "value",
    "weight gradient off by 1e-4": "value",
    "bias gradient of one example": "value",
    "bias gradient a mean": "value",
    "input gradient in reverse order": "value",
    "float32 returned for float64": "contract",
    "g |g|": "linearity",
    "nondeterministic at 1e-7": "determinism",
    "fwd primal off by 1e-7": "primal",
    "right in first order only": "order 2",
    "jit differs from eager": "jit",
}


def arguments(key: Any, *, T: int = 4, B: int = 2, D: int = 3, H: int = 5, gain: float = 0.7) -> tuple[Any, ...]:
    """Return (w_x, w_h, b, h, xs), nonzero, with pairwise different sizes."""
    keys = jax.random.split(key, 5)
    shapes = (D, H), (H, H), (H,), (B, H), (T, B, D)
    scales = gain * D**-0.5, gain * H**-0.5, 0.5, 0.5, 1.0
    return tuple(jax.random.normal(k, s) * scale for k, s, scale in zip(keys, shapes, scales, strict=True))


def plain(w_x: Any, w_h: Any, b: Any, h: Any, xs: Any) -> tuple[Any, Any]:
    """Return (h_T, ys), computed in plain JAX."""

    def step(h: Any, x: Any) -> Any:
        h = jnp.tanh(x @ w_x + h @ w_h + jnp.broadcast_to(b, h.shape))
        return h, h

    return lax.scan(step, h, xs)


def broken(wrong: str | None = None) -> Function:
    """Return the network under its rule, with the mistake `wrong` of BROKEN, or the correct rule for None."""

    @jax.custom_vjp
    def elman(w_x: Any, w_h: Any, b: Any, h: Any, xs: Any) -> Any:
        return plain(w_x, w_h, b, h, xs)

    elman.defvjp(partial(_forward, wrong), partial(_backward, wrong))
    return elman


def _forward(wrong: str | None, *args: Any) -> Any:
    last, ys = plain(*args)
    if wrong == "fwd primal off by 1e-7":
        ys = ys * (1 + 1e-7)
    return (last, ys), (args, ys)


def _backward(wrong: str | None, residuals: Any, cotangents: Any) -> Any:
    (w_x, w_h, b, h0, xs), hs = residuals
    s_bar, ys_bar = cotangents
    if wrong == "right in first order only":
        w_x, w_h, b, h0, xs, hs = map(lax.stop_gradient, (w_x, w_h, b, h0, xs, hs))
    if wrong == "g |g|":
        s_bar, ys_bar = s_bar * jnp.abs(s_bar), ys_bar * jnp.abs(ys_bar)
    if wrong == "final-state cotangent ignored":
        s_bar = jnp.zeros_like(s_bar)
    if wrong == "final-state cotangent twice":
        s_bar = 2 * s_bar
    h_prev = jnp.concatenate([h0[None], hs])[:-1]
    back = w_h if wrong == "recurrent weight not transposed" else w_h.T

    def step(s_bar: Any, known: Any) -> Any:
        y_bar, h, prev = known
        if wrong == "wrong activation derivative":
            slope = 1 - h
        elif wrong == "activation derivative at the previous state":
            slope = 1 - prev * prev
        else:
            slope = 1 - h * h
        delta = (y_bar + s_bar) * slope
        carried = delta @ back
        if wrong == "recurrence missing":
            carried = jnp.zeros_like(carried)
        if wrong == "recurrence once too often":
            carried = carried + delta
        return carried, delta

    wide = jnp.result_type(s_bar, ys_bar, w_h)
    h0_bar, delta = lax.scan(step, s_bar.astype(wide), (ys_bar.astype(wide), hs, h_prev), reverse=True)
    if wrong == "last step dropped":
        delta = delta.at[-1:].set(0)
    if wrong == "previous state off by one":
        h_prev = hs
    if wrong == "initial state left out of W_h":
        h_prev = h_prev.at[:1].set(0)
    w_x_bar, w_h_bar = jnp.einsum("tbd,tbh->dh", xs, delta), jnp.einsum("tbi,tbj->ij", h_prev, delta)
    b_bar, xs_bar = delta.sum((0, 1)), delta @ w_x.T
    if wrong == "sign flipped":
        w_x_bar = -w_x_bar
    if wrong == "initial-state gradient zero":
        h0_bar = jnp.zeros_like(h0_bar)
    if wrong == "weight gradient off by 1e-4":
        w_h_bar = w_h_bar * (1 + 1e-4)
    if wrong == "bias gradient of one example":
        b_bar = delta[:, 0].sum(0)
    if wrong == "bias gradient a mean":
        b_bar = b_bar / delta.shape[1]
    if wrong == "input gradient in reverse order":
        xs_bar = xs_bar[::-1]
    w_x_bar, w_h_bar, b_bar, xs_bar = (
        a.astype(w.dtype) for a, w in ((w_x_bar, w_x), (w_h_bar, w_h), (b_bar, b), (xs_bar, xs))
    )
    h0_bar = None if wrong == "initial-state gradient None" else h0_bar.astype(h0.dtype)
    if wrong == "float32 returned for float64":
        w_x_bar = w_x_bar.astype(jnp.float32)
    if wrong == "nondeterministic at 1e-7":
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        drawn = jax.pure_callback(lambda: np.float32(random.random()), shape, vmap_method="sequential")
        w_x_bar = w_x_bar * (1 + 1e-7 * drawn.astype(w_x_bar.dtype))
    if wrong == "jit differs from eager" and isinstance(w_x_bar, Tracer):
        w_x_bar = w_x_bar * (1 + 1e-6)
    return w_x_bar, w_h_bar, b_bar, h0_bar, xs_bar
