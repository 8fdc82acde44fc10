"""Second order inside JAX's loops, whose partial evaluation drops `jax.custom_jvp` rules."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxseq

T, B, H = 5, 2, 3
XS = np.random.default_rng(0).normal(size=(T, B, H))
LENGTHS, RESETS = jnp.array([5, 4]), np.arange(T * B).reshape(T, B) == 4
PARAMS = jax.tree.map(lambda a: a + 0.1, jaxseq.rnn_init(jax.random.key(0), H, H, dtype=jnp.float64))


def rnn(p, c, **time):
    return jnp.sum(jnp.sin(jaxseq.rnn(p, None, XS * c, **time)[1]))


def scan(p, c, **time):
    def step(s, x):
        s = jnp.tanh(x @ p.w_x + s @ p.w_h)
        return s, s

    return jnp.sum(jnp.sin(jaxseq.scan(step, jnp.zeros((B, H)), XS * c, **time)[1]))


def in_scan(f):
    return lambda p, q: jax.lax.scan(lambda s, c: (s + q * f(p, c), None), 0.0, jnp.ones(1))[0]


def in_map(f):
    return lambda p, q: jnp.sum(jax.lax.map(jax.checkpoint(lambda c: q * f(p, c)), jnp.ones(1)))


def in_vmapped_scan(f):
    """A `lax.scan` inside a `jaxseq.scan`, under vmap."""
    inner = lambda p, q: jaxseq.scan(lambda s, c: (s, in_scan(f)(p, q * c)), 0.0, jnp.ones(1), truncation=1)[1]  # noqa: E731
    return lambda p, q: jnp.sum(jax.vmap(lambda q: inner(p, q))(q[None]))


def hvp(f):
    """Forward over reverse."""
    g = jax.grad(lambda p: f(p, jnp.float64(0.5)))
    return jax.jit(lambda p: jax.jvp(g, (p,), (p,))[1])(PARAMS)


def mixed(f):
    """Reverse over reverse. The first derivative is with respect to the factor of f, so f is not differentiated yet."""
    return jax.jit(jax.grad(lambda p: jax.grad(f, 1)(p, jnp.float64(0.5))))(PARAMS)


FORMS = {
    "masks": (rnn, in_scan, hvp, {"truncation": 2, "reverse": True, "lengths": LENGTHS, "resets": RESETS}),
    "nested": (rnn, in_vmapped_scan, hvp, {"truncation": (2, 3), "checkpoint": 2}),
    "not differentiated yet": (rnn, in_scan, mixed, {"truncation": 2}),
    "scan": (scan, in_map, mixed, {"truncation": 2, "reverse": True}),
    "scan nested": (scan, in_vmapped_scan, hvp, {"truncation": (1, 2)}),
}


@pytest.mark.parametrize("form", FORMS)
def test_truncated(form):
    f, loop, derivative, options = FORMS[form]
    f = partial(f, **options)
    found, want = derivative(loop(f)), derivative(lambda p, q: q * f(p, 1.0))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9), found, want)


def test_backward_alone():
    """A pullback in a loop whose only loop-dependent input is the cotangent, without truncation."""

    def pulled(p, c):
        return jnp.sum(jnp.sin(jax.vjp(rnn, p, jnp.float64(1.0))[1](jnp.float64(c))[0].w_h))

    found, want = mixed(in_scan(pulled)), mixed(lambda p, q: q * pulled(p, 1.0))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9), found, want)
