"""What truncation means, and what the backward sweep does about it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SEQUENCES, arguments, assert_close, bound, scans
from jax import lax

from jaxseq._cases import CASES

K = 3  # the window; T = 8 makes windows of 3, 3 and 2


def gradient(name, args, weight, **options):
    """Gradients to (params, carry, xs) of sum_t weight[t] ys[t]² + 2 (last carry)²."""
    f = CASES[name].op

    def loss(*args):
        carry, ys = f(*args, **options)
        return jnp.einsum("t,tbh->", weight, ys**2) + 2 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(carry))

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*args)


def only_ys(name, args, weight, **options):
    """As above without the last carry, gradients to (carry, xs)."""
    f = CASES[name].op
    loss = lambda p, c, x: jnp.einsum("t,tbh->", weight, f(p, c, x, **options)[1] ** 2)  # noqa: E731
    carry, xs = jax.jit(jax.grad(loss, argnums=(1, 2)))(*args)
    return jax.tree.leaves(carry), np.asarray(xs)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", SEQUENCES)
def test_exactly_nothing_crosses_a_window_edge(name, reverse, key):
    """A loss on the second window of reading says nothing to the first, and what it says stays in its own steps."""
    args = arguments(name, "plain", key, length=8)
    read = np.arange(8)[::-1] if reverse else np.arange(8)
    first, second, third = read[:3], read[3:6], read[6:]
    weight = jnp.zeros(8).at[second].set(1.0)
    carry, xs = only_ys(name, args, weight, truncation=K, reverse=reverse)
    assert not any(leaf.any() for leaf in carry)
    assert not xs[first].any()
    assert not xs[third].any()
    assert np.abs(xs[second]).min() > 0
    carry, xs = only_ys(name, args, weight, reverse=reverse)
    assert all(leaf.any() for leaf in carry)
    assert np.abs(xs[first]).min() > 0


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", SEQUENCES)
def test_equals_stop_gradient_between_runs_over_the_windows(name, reverse, key):
    """Each window run by itself, the carry handed on through stop_gradient: nothing here knows of `truncation`."""
    params, carry, xs = args = arguments(name, "plain", key, length=8)
    weight = jnp.linspace(0.5, 2.0, 8)
    windows = [slice(5, 8), slice(2, 5), slice(0, 2)] if reverse else [slice(0, 3), slice(3, 6), slice(6, 8)]

    def loss(params, carry, xs):
        total = 0.0
        for n, window in enumerate(windows):
            if n:
                carry = jax.tree.map(lax.stop_gradient, carry)
            carry, ys = CASES[name].op(params, carry, xs[window], reverse=reverse)
            total += jnp.einsum("t,tbh->", weight[window], ys**2)
        return total + 2 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(carry))

    expected = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(params, carry, xs)
    assert_close(gradient(name, args, weight, truncation=K, reverse=reverse), expected)


@pytest.mark.parametrize("name", SEQUENCES)
def test_a_window_as_long_as_the_sequence_is_the_full_gradient(name, key):
    args = arguments(name, "plain", key, length=8)
    weight = jnp.linspace(0.5, 2.0, 8)
    full = gradient(name, args, weight)
    for k in (8, 9, 10**9):
        assert_close(gradient(name, args, weight, truncation=k), full, relative=1e-14)
    short = gradient(name, args, weight, truncation=7)
    for a, b in zip(jax.tree.leaves(short[:2]), jax.tree.leaves(full[:2]), strict=True):
        assert np.abs(a - b).max() > 1e-6 * np.abs(b).max()


@pytest.mark.parametrize("name", SEQUENCES)
def test_values_do_not_change(name, key):
    args = arguments(name, "plain", key, length=8)
    f = CASES[name].op
    assert_close(f(*args, truncation=K), f(*args), relative=1e-15)


@pytest.mark.parametrize(
    ("truncation", "sweeps"), [(None, [12]), (12, [12]), (4, [4]), (5, [2, 5]), (1, [1]), (7, [5, 7])]
)
@pytest.mark.parametrize("reverse", [False, True])
def test_the_backward_sweep_runs_its_windows_side_by_side(truncation, sweeps, reverse, key):
    """Sequential steps of the sweep: k, and those of a ragged last window. One product with W_h each, no more."""
    args = arguments("lstm", "plain", key, length=12)
    outputs = bound("lstm", "plain")(*args)
    f = lambda args, ȳ: jax.vjp(lambda *a: CASES["lstm"].op(*a, truncation=truncation, reverse=reverse), *args)[1](ȳ)  # noqa: E731
    forward, *backward = scans(f, args, outputs)
    assert forward.params["length"] == 12
    assert [e.params["length"] for e in backward] == sweeps
    for sweep in backward:
        products = [e for e in sweep.params["jaxpr"].jaxpr.eqns if e.primitive.name == "dot_general"]
        assert len(products) == 1
        # The carry is the state's cotangent: no weight-shaped sum is dragged through time.
        body = sweep.params["jaxpr"].jaxpr.outvars
        carried = [v.aval for v, o in zip(body, sweep.outvars, strict=True) if v.aval.shape == o.aval.shape]
        assert [a.shape[-2:] for a in carried] == [(2, 5), (2, 5)]
