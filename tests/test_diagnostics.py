"""Gradient-flow diagnostics against explicit Jacobians, finite differences and known Lyapunov exponents."""

import sys
from functools import cache, partial
from io import BytesIO
from math import log

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, scans, subjaxprs
from jax import lax
from jax.flatten_util import ravel_pytree

import jaxseq
from jaxseq import diagnostics, reference
from jaxseq.testing import check_vjp

T, D, H = 5, 3, 4


def random(*shape, seed=0):
    return np.random.default_rng([len(shape), *shape, seed]).normal(size=shape)


@cache
def problem(kind, dtype=jnp.float64):
    """Return nonzero (params, init, xs) of a cell (params, s, x) -> (s', y)."""
    make = partial(getattr(jaxseq, f"{kind}_init"), input_size=D, hidden_size=H, dtype=jnp.float64)
    params = jax.tree.map(lambda a: 0.6 * random(*a.shape), jax.eval_shape(make, jax.random.key(0)))
    init = jaxseq.LSTMState(random(H, seed=1), random(H, seed=2)) if kind == "lstm" else random(H, seed=1)
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), (params, init, random(T, D)))


def cell(kind):
    return getattr(reference, f"{kind}_cell")


KINDS = pytest.mark.parametrize("kind", ["rnn", pytest.param("gru", marks=pytest.mark.long), "lstm"])


def loss(s, ys):
    """Return a loss that weights the elements of the carry and the steps of ys differently."""
    leaves = jax.tree.leaves(s)
    of_carry = sum(jnp.sum(jnp.sin(a) * jnp.arange(1, a.size + 1, dtype=a.dtype)) for a in leaves)
    weights = jnp.linspace(1.0, -0.5, ys.size, dtype=ys.dtype).reshape(ys.shape)
    return of_carry + jnp.sum(weights * ys**2)


def on_vectors(step, init):
    """Return the flattened state, the step as a function v, x -> v', y, and the inverse of flattening."""
    v, unravel = ravel_pytree(init)

    def f(v, x):
        s, y = step(unravel(v), x)
        return ravel_pytree(s)[0], y

    return v, f, unravel


@cache
def jacobians(kind):
    """Return J_t = ∂s_t/∂s_{t-1} and C_t = ∂y_t/∂s_{t-1} of each step, and the cotangents of s_T and ys."""
    params, init, xs = problem(kind)
    v, f, unravel = on_vectors(partial(cell(kind), params), init)
    both = jax.jit(lambda v, x: (f(v, x), jax.jacrev(f)(v, x)))
    J, C, ys = [], [], []
    for x in xs:
        (v, y), (j, c) = both(v, x)
        J, C, ys = [*J, np.asarray(j)], [*C, np.asarray(c)], [*ys, np.asarray(y)]
    s_bar, ys_bar = jax.jit(jax.grad(lambda v, ys: loss(unravel(v), ys), (0, 1)))(v, np.stack(ys))
    return J, C, np.asarray(s_bar), np.asarray(ys_bar)


def perturbed(kind):
    """Return the loss as a function of perturbations e_t of the state after step t, in a plain loop over steps."""
    params, init, xs = problem(kind)
    v, f, unravel = on_vectors(partial(cell(kind), params), init)

    def of(es):
        s, ys = v + es[0], []
        for x, e in zip(xs, es[1:], strict=True):
            s, y = f(s, x)
            s = s + e
            ys.append(y)
        return loss(unravel(s), jnp.stack(ys))

    return of, jnp.zeros((T + 1, v.size))


def as_vectors(tree):
    return jax.vmap(lambda s: ravel_pytree(s)[0])(tree)


@cache
def found(kind):
    """Return the result of `state_cotangents`, (T + 1, N)."""
    params, init, xs = problem(kind)
    f = partial(cell(kind), params)
    return as_vectors(jax.jit(lambda init, xs: diagnostics.state_cotangents(f, init, xs, loss))(init, xs))


# --- state_cotangents ---


@KINDS
def test_cotangents_equal_the_chain_rule(kind):
    J, C, s_bar, ys_bar = jacobians(kind)
    chain = [s_bar]
    for j, c, y_bar in zip(J[::-1], C[::-1], ys_bar[::-1], strict=True):
        chain.append(j.T @ chain[-1] + c.T @ y_bar)
    assert_close(found(kind), jnp.asarray(np.stack(chain[::-1])))


def test_cotangents_equal_those_of_pushes_in_a_plain_loop():
    f, zeros = perturbed("rnn")
    assert_close(found("rnn"), jax.jit(jax.grad(f))(zeros))


def test_cotangents_equal_differences():
    f, zeros = perturbed("rnn")
    f = jax.jit(f)
    step = 1e-5
    for t in (0, 1, 4, T - 1, T):
        for i in range(H):
            e = zeros.at[t, i].set(step)
            np.testing.assert_allclose(found("rnn")[t, i], (f(e) - f(-e)) / (2 * step), rtol=1e-6, atol=1e-8)


@KINDS
def test_the_first_is_the_gradient_of_init(kind):
    params, init, xs = problem(kind)
    of = lambda init: loss(*lax.scan(partial(cell(kind), params), init, xs))  # noqa: E731
    assert_close(found(kind)[0], ravel_pytree(jax.jit(jax.grad(of))(init))[0])


@pytest.mark.long
def test_cells_with_hand_derived_rules():
    params, init, xs = problem("lstm")
    cotangents = diagnostics.state_cotangents(partial(jaxseq.lstm_cell, params), init, xs, loss)
    assert isinstance(cotangents, jaxseq.LSTMState)
    assert cotangents.c.shape == (T + 1, H)
    assert_close(as_vectors(cotangents), found("lstm"))


def noisy(s, x):
    """A step whose state has two float leaves, a counter and a key."""
    (h, more), (count, key) = s["h"], s["rest"]
    key, use = jax.random.split(key)
    new = jnp.tanh(h * (1.0 + 0.1 * count.astype(h.dtype)) + jax.random.normal(use, h.shape) + jnp.sum(more))
    return {"h": (new, 0.5 * more * jnp.sum(h)), "rest": (count + 1, key)}, new


def noisy_state():
    return {"h": (random(3), random(2)), "rest": (jnp.array(2), jax.random.key(5, impl="unsafe_rbg"))}


@cache
def noisy_steps():
    """Return the states s_0 .. s_3, and the Jacobian of each step with respect to the floats of the state."""
    state, states, J = noisy_state(), [noisy_state()], []

    def moved(v, unravel, state):
        return ravel_pytree(noisy(state | {"h": unravel(v)}, None)[0]["h"])[0]

    for _ in range(3):
        v, unravel = ravel_pytree(state["h"])
        J.append(np.asarray(jax.jit(jax.jacfwd(moved), static_argnums=1)(v, unravel, state)))
        state, _ = jax.jit(noisy)(state, None)
        states.append(state)
    return states, J


def test_a_counter_and_a_key_are_carried_along():
    states, J = noisy_steps()
    last = lambda s, _: jnp.sin(s["h"][0]).sum()  # noqa: E731
    cotangents = jax.jit(lambda s: diagnostics.state_cotangents(noisy, s, None, last, length=3))(noisy_state())
    assert cotangents["rest"] == (None, None)
    chain = [np.concatenate([np.cos(states[3]["h"][0]), np.zeros(2)])]
    for j in J[::-1]:
        chain.append(j.T @ chain[-1])
    assert_close(as_vectors(cotangents["h"]), jnp.asarray(np.stack(chain[::-1])))


def test_numbers_of_python_and_no_xs():
    """s_t = 0.9 s_{t-1} and L = s_2 + s_1²; the cotangents are computed manually."""
    step = lambda s, _: (0.9 * s, {"y": s**2})  # noqa: E731
    got = diagnostics.state_cotangents(step, 2.0, None, lambda s, ys: s + ys["y"][1], length=2)
    np.testing.assert_allclose(got, [0.81 + 0.9 * 2 * 1.8, 0.9 + 2 * 1.8, 1.0], rtol=1e-14)
    assert diagnostics.state_cotangents(step, 2.0, None, lambda s, ys: s, length=0).tolist() == [1.0]


@pytest.mark.long
def test_cotangents_of_a_batch_under_vmap():
    params, _, _ = problem("gru")
    inits, xs = random(2, H), random(2, 4, D)
    f = lambda init, xs: diagnostics.state_cotangents(partial(cell("gru"), params), init, xs, loss)  # noqa: E731
    both = jax.jit(jax.vmap(f))(inits, xs)
    one = jax.jit(f)
    assert_close(both, jnp.stack([one(*each) for each in zip(inits, xs, strict=True)]))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_cotangents_keep_the_dtype(dtype):
    params, init, xs = problem("rnn", dtype)
    cotangents = jax.jit(lambda s: diagnostics.state_cotangents(partial(cell("rnn"), params), s, xs, loss))(init)
    assert cotangents.dtype == dtype
    assert_close(cotangents.astype(float), found("rnn"), relative=8 * float(jnp.finfo(dtype).eps))


def test_cotangents_of_a_state_in_two_dtypes():
    init = (jnp.array([0.5, 1.5], jnp.float32), jnp.array([2.0]))
    step = lambda s, _: ((0.5 * s[0], 3 * s[1]), None)  # noqa: E731
    a, b = diagnostics.state_cotangents(step, init, None, lambda s, _: s[0].sum().astype(float) + s[1].sum(), length=2)
    assert (a.dtype, a.tolist()) == (jnp.float32, [[0.25, 0.25], [0.5, 0.5], [1.0, 1.0]])
    assert (b.dtype, b.tolist()) == (jnp.float64, [[9.0], [3.0], [1.0]])


# --- norms ---


@pytest.mark.parametrize("batch", [0, 1, 2])
def test_norms_equal_numpy(batch):
    a, b = random(4, 2, 3, 5), random(4, 2, 3)
    kept = (4, 2, 3)[: 1 + batch]
    rows = np.concatenate([np.reshape(a, (*kept, -1)), np.reshape(b, (*kept, -1))], -1)
    norms = jax.jit(partial(diagnostics.norms, batch=batch))({"a": a, "none": None, "b": b})
    assert_close(norms, jnp.asarray(np.linalg.norm(rows, axis=-1)))


@pytest.mark.parametrize(("value", "dtype"), [(1e-30, jnp.float32), (1e30, jnp.float32), (300.0, jnp.float16)])
def test_norms_of_what_has_vanished_or_exploded(value, dtype):
    """The squares of the elements are out of the range of the dtype, the norms are not."""
    norms = diagnostics.norms(jnp.full((2, 4), value, dtype))
    assert norms.dtype == dtype
    np.testing.assert_allclose(np.asarray(norms, float), 2 * value, rtol=2e-3)


def test_norms_of_two_dtypes():
    tree = (jnp.full((2, 1), 3.0, jnp.float32), jnp.full((2, 1), 4.0))
    np.testing.assert_allclose(diagnostics.norms(tree), [5.0, 5.0], rtol=1e-6)


def test_the_gradient_of_norms():
    tree = (jnp.asarray(random(4, 2, 3)), jnp.asarray(random(4, 2)))
    check_vjp(partial(diagnostics.norms, batch=1), (tree,), level="quick").raise_if_failed()


# --- jacobian_products ---


def products(J):
    """Return the singular values of J_T ... J_{T-l+1} for l = 0 .. T, from explicit products."""
    P, values = np.eye(len(J[0])), []
    for j in [None, *J[::-1]]:
        P = P if j is None else P @ j
        values.append(np.linalg.svd(P, compute_uv=False))
    return np.stack(values)


@cache
def measured(kind):
    params, init, xs = problem(kind)
    return jax.jit(lambda init, xs: diagnostics.jacobian_products(partial(cell(kind), params), init, xs))(init, xs)


@KINDS
def test_singular_values_equal_those_of_explicit_products(kind):
    expected = products(jacobians(kind)[0])
    N = 2 * H if kind == "lstm" else H
    got = measured(kind)
    assert got.lags.tolist() == list(range(T + 1))
    assert got.singular_values.shape == (T + 1, N)
    assert_close(got.singular_values[0], jnp.ones(N), 1e-15)
    np.testing.assert_allclose(got.singular_values, expected, rtol=1e-9, atol=1e-13)
    np.testing.assert_allclose(got.norms, expected.max(1), rtol=1e-11)


def test_a_subset_of_lags():
    params, init, xs = problem("rnn")
    got = diagnostics.jacobian_products(partial(cell("rnn"), params), init, xs, lags=np.array([4, 0, 2]))
    assert got.lags.tolist() == [4, 0, 2]
    assert_close(got.singular_values, measured("rnn").singular_values[jnp.array([4, 0, 2])])


@pytest.mark.parametrize("kind", ["rnn", *(pytest.param(k, marks=pytest.mark.long) for k in ("gru", "lstm"))])
def test_some_singular_values_equal_the_first_of_all(kind):
    params, init, xs = problem(kind)
    f = lambda init, xs: diagnostics.jacobian_products(partial(cell(kind), params), init, xs, lags=(0, 3, T), k=2)  # noqa: E731
    got = jax.jit(f)(init, xs)
    assert got.singular_values.shape == (3, 2)
    expected = products(jacobians(kind)[0])[[0, 3, T], :2]
    np.testing.assert_allclose(got.singular_values, expected, rtol=1e-9)


N = 37


def wide(s, x):
    """A step in which each of N numbers depends on two neighbours, without an (N, N) array in its program."""
    s = jnp.tanh(jnp.linspace(0.3, 1.7, N) * s + 0.6 * jnp.roll(s, 1) - 0.4 * jnp.roll(s, -2) + x)
    return s, None


def wide_inputs():
    return 0.5 * random(N), 0.3 * random(5, 1)


def test_some_singular_values_of_many_need_no_matrix():
    init, xs = wide_inputs()
    some = partial(diagnostics.jacobian_products, wide, lags=[1, 5], k=3)

    def matrices(f):
        avals = [v.aval for eqn in subjaxprs(jax.make_jaxpr(f)(init, xs).jaxpr) for v in (*eqn.invars, *eqn.outvars)]
        assert any(a.shape[-1:] == (N,) for a in avals)
        return [a.shape for a in avals if a.shape[-2:] == (N, N)]

    assert matrices(partial(diagnostics.jacobian_products, wide, lags=[1, 5]))
    assert not matrices(some)
    J = []
    both = jax.jit(lambda s, x: (wide(s, x)[0], jax.jacfwd(lambda s: wide(s, x)[0])(s)))
    for x in xs:
        init, j = both(init, x)
        J.append(np.asarray(j))
    got = some(wide_inputs()[0], xs, key=jax.random.key(9)).singular_values
    np.testing.assert_allclose(got, products(J)[[1, 5], :3], rtol=1e-4)
    assert (np.asarray(got) <= products(J)[[1, 5], :3] * (1 + 1e-12)).all()


@pytest.mark.parametrize("k", [None, pytest.param(2, marks=pytest.mark.long)])
def test_products_beside_a_counter_and_a_key(k):
    """The Jacobians depend on the counter and the key, which advance at each step."""
    got = jax.jit(lambda s: diagnostics.jacobian_products(noisy, s, None, length=3, lags=[1, 3], k=k))(noisy_state())
    np.testing.assert_allclose(got.singular_values, products(noisy_steps()[1])[[1, 3], :k], rtol=1e-7, atol=1e-12)


@pytest.mark.long
@pytest.mark.parametrize("k", [None, 1])
def test_products_under_vmap(k):
    params, _, _ = problem("rnn")
    inits, xs = random(2, H), random(2, 3, D)
    f = lambda init, xs: diagnostics.jacobian_products(partial(cell("rnn"), params), init, xs, k=k, lags=[2]).norms  # noqa: E731
    one = jax.jit(f)
    assert_close(jax.jit(jax.vmap(f))(inits, xs), jnp.stack([one(*a) for a in zip(inits, xs, strict=True)]), 1e-9)


@pytest.mark.parametrize("k", [None, pytest.param(1, marks=pytest.mark.long)])
def test_what_is_forgotten_at_once_is_zero(k):
    got = diagnostics.jacobian_products(lambda s, x: (0 * s + x, None), jnp.ones(2), jnp.ones((3, 2)), k=k)
    np.testing.assert_allclose(got.norms, [1.0, 0.0, 0.0, 0.0], rtol=1e-14)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("k", [None, pytest.param(2, marks=pytest.mark.long)])
def test_products_in_other_dtypes(k, dtype):
    params, init, xs = problem("rnn", dtype)
    got = diagnostics.jacobian_products(partial(cell("rnn"), params), init, xs, lags=[1, 2], k=k).singular_values
    if dtype == jnp.float32:
        assert got.dtype == dtype
    expected = measured("rnn").singular_values[1:3, :k]
    assert_close(got.astype(float), expected, relative=6 * float(jnp.finfo(dtype).eps))


# --- lyapunov ---


def logistic(s, _):
    return 4 * s * (1 - s), None


def test_the_logistic_map():
    got = jax.jit(lambda s: diagnostics.lyapunov(logistic, s, None, length=4000))(0.3)
    assert abs(float(got.exponents[0]) - log(2)) < 3e-3
    assert got.exponents.shape == (1,)


@pytest.mark.parametrize(("burn_in", "every", "dt"), [(10, 1, 0.5), (4, 4, 2.0)])
def test_of_one_number_it_is_the_mean_of_logarithms(burn_in, every, dt):
    """λ = mean of log |f'(x_t)| / dt, computed with NumPy, for several options and for the whole history."""
    x, slopes = 0.3, []
    for _ in range(40):
        slopes.append(abs(4 - 8 * x))
        x = 4 * x * (1 - x)
    time = every * dt * np.arange(1, (40 - burn_in) // every + 1)
    grown = np.log(slopes[burn_in:]).cumsum()[every - 1 :: every] / time
    got = diagnostics.lyapunov(logistic, jnp.array([0.3]), None, length=40, burn_in=burn_in, every=every, dt=dt)
    np.testing.assert_allclose(got.history[:, 0], grown, rtol=1e-6)
    np.testing.assert_allclose(got.exponents, grown[-1:], rtol=1e-6)
    np.testing.assert_allclose(got.final, [x], rtol=1e-6)


def henon(s, _):
    x, y = s
    return (1 - 1.4 * x**2 + y, 0.3 * x), None


def test_the_henon_map():
    got = jax.jit(lambda s: diagnostics.lyapunov(henon, s, None, length=20000, burn_in=1000))((0.1, 0.1))
    np.testing.assert_allclose(got.exponents, [0.4192, -1.6234], atol=8e-3)
    assert abs(float(got.exponents.sum()) - log(0.3)) < 1e-6  # |det J| = 0.3 at every step
    np.testing.assert_allclose(got.history.sum(1), log(0.3), atol=1e-6)


def lorenz(dt):
    """Return one step of the fourth-order Runge-Kutta method."""

    def flow_of(s):
        x, y, z = s
        return jnp.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z])

    def step(s, _):
        a = flow_of(s)
        b = flow_of(s + dt / 2 * a)
        c = flow_of(s + dt / 2 * b)
        d = flow_of(s + dt * c)
        return s + dt / 6 * (a + 2 * b + 2 * c + d), None

    return step


def test_volumes_shrink_under_lorenz():
    """The divergence is -(10 + 1 + 8/3) everywhere, so the sum of the exponents is too, even over short times."""
    run = partial(diagnostics.lyapunov, lorenz(0.005), length=3000, burn_in=200, every=4, dt=0.005)
    got = jax.jit(lambda s: run(s, None))(jnp.array([1.0, 2.0, 20.0]))
    assert abs(float(got.exponents.sum()) + 10 + 1 + 8 / 3) < 1e-3
    assert 0.5 < float(got.exponents[0]) < 1.3


@pytest.mark.long
def test_the_lorenz_system():
    run = partial(diagnostics.lyapunov, lorenz(0.01), length=201_000, burn_in=1000, every=10, dt=0.01)
    got = jax.jit(lambda s: run(s, None))(jnp.array([1.0, 2.0, 20.0]))
    np.testing.assert_allclose(got.exponents[:2], [0.906, 0.0], atol=0.03)
    assert abs(float(got.exponents.sum()) + 10 + 1 + 8 / 3) < 1e-3


EIGENVALUES = np.array([0.5, -1.02, 0.11, 0.8])


@cache
def linear_map():
    S = np.random.default_rng(8).normal(size=(4, 4)) + 2 * np.eye(4)
    A = jnp.asarray(S @ np.diag(EIGENVALUES) @ np.linalg.inv(S))
    return jax.jit(
        lambda s, **how: diagnostics.lyapunov(lambda s, _: (A @ s, None), s, None, length=300, burn_in=150, **how),
        static_argnames=("k", "every", "dt"),
    )


@pytest.mark.parametrize("how", [{}, {"k": 2, "every": 3, "dt": 0.1}], ids=str)
def test_a_linear_map(how):
    got = linear_map()(jnp.array([1.0, 2.0, 3.0, 4.0]), **how)
    expected = np.sort(np.log(abs(EIGENVALUES)))[::-1] / how.get("dt", 1.0)
    k = how.get("k", 4)
    np.testing.assert_allclose(got.exponents, expected[:k], rtol=1e-7)
    assert got.history.shape == (150 // how.get("every", 1), k)
    np.testing.assert_allclose(got.history[-1], got.exponents, rtol=1e-14)


def test_history_is_what_had_been_found_by_then():
    run = lambda length: jax.jit(lambda s: diagnostics.lyapunov(henon, s, None, length=length, burn_in=2, every=3))  # noqa: E731
    whole, part = run(14)((0.1, 0.1)), run(8)((0.1, 0.1))
    assert whole.history.shape == (4, 2)
    np.testing.assert_allclose(np.sort(whole.history[1]), np.sort(part.exponents), rtol=1e-9)
    assert (np.diff(whole.exponents) <= 0).all()
    state = (0.1, 0.1)
    for _ in range(14):
        state, _ = henon(state, None)
    np.testing.assert_allclose(whole.final, state, rtol=1e-9)


@pytest.mark.parametrize("kind", ["lstm", pytest.param("gru", marks=pytest.mark.long)])
def test_the_sum_is_that_of_log_det(kind):
    """The sum of all N exponents is the mean of log |det J_t|, independent of the initial directions."""
    params, init, xs = problem(kind)
    got = jax.jit(lambda s: diagnostics.lyapunov(partial(cell(kind), params), s, xs, key=jax.random.key(8)))(init)
    expected = np.mean([np.linalg.slogdet(j)[1] for j in jacobians(kind)[0]])
    np.testing.assert_allclose(got.exponents.sum(), expected, rtol=1e-9)
    assert_close(got.final, lax.scan(partial(cell(kind), params), init, xs)[0])


def test_small_weights_forget_and_large_ones_are_chaos():
    w = random(30, 30) / 30**0.5

    def leading(gain):
        step = lambda s, _: (jnp.tanh(gain * (w @ s)), None)  # noqa: E731
        return diagnostics.lyapunov(step, jnp.full(30, 0.1), None, length=300, burn_in=100, k=2).exponents[0]

    small, large = map(jax.jit(leading), (0.5, 4.0))
    assert small < log(0.7)  # the spectral radius of w is about one
    assert large > 0.1


def test_exponents_beside_a_counter_and_a_key():
    states, J = noisy_steps()
    got = jax.jit(lambda s: diagnostics.lyapunov(noisy, s, None, length=3))(noisy_state())
    assert int(got.final["rest"][0]) == 5
    assert (jax.random.key_data(got.final["rest"][1]) == jax.random.key_data(states[3]["rest"][1])).all()
    assert_close(got.final["h"], states[3]["h"])
    growth = np.cumsum([np.linalg.slogdet(j)[1] for j in J]) / np.arange(1, 4)
    np.testing.assert_allclose(got.history.sum(1), growth, rtol=1e-9)


@pytest.mark.long
def test_exponents_under_vmap():
    starts = jnp.array([0.15, 0.4, 0.7])
    f = lambda s: diagnostics.lyapunov(logistic, s, None, length=20).exponents  # noqa: E731
    one = jax.jit(f)
    assert_close(jax.jit(jax.vmap(f))(starts), jnp.stack([one(s) for s in starts]), 1e-8)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_exponents_in_other_dtypes(dtype):
    params, init, xs = problem("rnn", dtype)
    got = jax.jit(lambda s: diagnostics.lyapunov(partial(cell("rnn"), params), s, xs))(init)
    assert got.final.dtype == dtype
    if dtype == jnp.float32:
        assert got.exponents.dtype == dtype
    expected = np.mean([np.linalg.slogdet(j)[1] for j in jacobians("rnn")[0]])
    total = float(got.exponents.astype(float).sum())
    np.testing.assert_allclose(total, expected, rtol=20 * float(jnp.finfo(dtype).eps))


# --- truncation_bias ---


@cache
def truncated(kind, k):
    """Return the flattened parameter gradient of `jaxseq.scan(..., truncation=k)`, or of `lax.scan` for k = None."""
    params, init, xs = problem(kind)

    def of(params):
        step = partial(cell(kind), params)
        return loss(*(lax.scan(step, init, xs) if k is None else jaxseq.scan(step, init, xs, truncation=k)))

    return np.asarray(ravel_pytree(jax.jit(jax.grad(of))(params))[0])


def compared(g_k, g):
    off = np.linalg.norm(g_k - g) / np.linalg.norm(g)
    return off, g_k @ g / np.linalg.norm(g_k) / np.linalg.norm(g)


@cache
def bias(kind, windows):
    params, init, xs = problem(kind)
    return jax.jit(lambda p: diagnostics.truncation_bias(cell(kind), p, init, xs, loss, windows=windows))(params)


@pytest.mark.parametrize(
    ("kind", "windows"),
    [
        ("rnn", (1, 2, 3, 4, 5)),
        pytest.param("gru", (3, 1), marks=pytest.mark.long),
        pytest.param("lstm", (2, T), marks=pytest.mark.long),
    ],
    ids=["rnn", "gru", "lstm"],
)
def test_bias_equals_that_of_truncated_gradients(kind, windows):
    got = bias(kind, windows)
    assert got.windows.tolist() == list(windows)
    expected = [compared(truncated(kind, k), truncated(kind, None)) for k in windows]
    for k, error, cosine, (off, angle) in zip(*got, expected, strict=True):
        np.testing.assert_allclose(float(error), off, rtol=1e-9, atol=1e-14)
        np.testing.assert_allclose(float(cosine), angle, rtol=1e-12)
        assert k == T or off > 1e-3, "expected a biased gradient for a window shorter than T"
    if T in windows:
        assert float(got.relative_error[-1]) == 0.0
        assert abs(float(got.cosine[-1]) - 1) < 1e-12


def test_windows_are_doubled_where_none_are_named():
    """For L = s_T and s' = a s + x, g_k includes the uses of a in the steps from the last multiple of k on."""
    f = lambda a, s, x: (a * s + x, None)  # noqa: E731
    a, xs = 0.8, np.linspace(1.0, 2.0, 11)
    got = diagnostics.truncation_bias(f, a, 0.5, jnp.asarray(xs), lambda s, _: s)
    assert got.windows.tolist() == [1, 2, 4, 8, 11]
    states = [0.5]
    for x in xs:
        states.append(a * states[-1] + x)
    terms = np.array([a ** (10 - t) * states[t] for t in range(11)])  # the derivative with respect to a in step t
    expected = [1 - terms[10 // k * k :].sum() / terms.sum() for k in (1, 2, 4, 8, 11)]
    np.testing.assert_allclose(got.relative_error, expected, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(got.cosine, np.ones(5), rtol=1e-12)


def test_bias_without_xs_and_of_one_step():
    f = lambda p, s, _: (p["a"] * s, None)  # noqa: E731
    got = diagnostics.truncation_bias(f, {"a": jnp.array(0.5)}, 1.0, None, lambda s, _: s, length=4, windows=[2])
    np.testing.assert_allclose(got.relative_error, [0.5], rtol=1e-14)  # each of four steps contributes equally
    one = diagnostics.truncation_bias(f, {"a": jnp.array(0.5)}, 1.0, None, lambda s, _: s, length=1)
    assert [a.tolist() for a in one] == [[1], [0.0], [1.0]]


def test_windows_share_one_forward_sweep():
    """Only the backward scan has an axis of windows; the forward scan and its residuals do not."""
    params, init, xs = problem("rnn")
    run = lambda p: diagnostics.truncation_bias(cell("rnn"), p, init, xs, loss, windows=[1, 2, 3, 4, 5, 1])  # noqa: E731
    forward, backward = scans(run, params)
    floats = lambda vs: [v.aval.shape for v in vs if jnp.issubdtype(v.aval.dtype, jnp.floating)]  # noqa: E731
    a_step = lambda eqn: floats(eqn.params["jaxpr"].jaxpr.outvars)  # noqa: E731
    assert (H,) in a_step(forward)
    assert all(7 not in shape for shape in floats(forward.outvars)), "expected residuals without an axis of windows"
    assert (7, H) in a_step(backward)  # six windows, and one that covers the whole series
    assert forward.params["length"] == backward.params["length"] == T
    assert (forward.params["reverse"], backward.params["reverse"]) == (False, True)


@pytest.mark.long
def test_bias_beside_a_counter_and_a_key():
    def f(p, s, x):
        return noisy(s | {"h": (p * s["h"][0], s["h"][1])}, x)

    def last(s, _=None):
        return jnp.sin(s["h"][0]).sum()

    got = diagnostics.truncation_bias(f, jnp.array(1.3), noisy_state(), None, last, length=3, windows=[2, 3])

    def g(p, k):
        s = noisy_state()
        for t in range(3):
            s, _ = f(p, s | {"h": lax.stop_gradient(s["h"])} if t and t % k == 0 else s, None)
        return last(s)

    g_2, g_3 = (float(jax.jit(jax.grad(partial(g, k=k)))(1.3)) for k in (2, 3))
    np.testing.assert_allclose(got.relative_error, [abs(g_2 - g_3) / abs(g_3), 0.0], rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(got.cosine, [np.sign(g_2 * g_3), 1.0], rtol=1e-9)


@pytest.mark.long
def test_bias_under_vmap():
    params, _, _ = problem("rnn")
    inits, xs = random(2, H), random(2, 4, D)
    f = lambda init, xs: diagnostics.truncation_bias(cell("rnn"), params, init, xs, loss, windows=[1, 2])[1:]  # noqa: E731
    one = jax.jit(f)
    each = [one(*a) for a in zip(inits, xs, strict=True)]
    assert_close(jax.jit(jax.vmap(f))(inits, xs), jax.tree.map(lambda *a: jnp.stack(a), *each))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_bias_in_other_dtypes(dtype):
    params, init, xs = problem("rnn", dtype)
    got = jax.jit(lambda p: diagnostics.truncation_bias(cell("rnn"), p, init, xs, loss, windows=[1, 3]))(params)
    expected = [compared(truncated("rnn", k), truncated("rnn", None)) for k in (1, 3)]
    np.testing.assert_allclose(
        np.asarray(jnp.stack(got[1:], 1), float), expected, rtol=20 * float(jnp.finfo(dtype).eps)
    )


def test_bias_of_parameters_in_two_dtypes():
    f = lambda p, s, x: (p[0] * s + x, s.astype(jnp.float32) * p[1])  # noqa: E731
    params = (jnp.array(0.5), jnp.array(2.0, jnp.float32))
    got = diagnostics.truncation_bias(
        f, params, 0.0, jnp.ones(8), lambda s, ys: s + ys.sum().astype(float), windows=[2, 8]
    )
    double = lambda p, s, x: (p[0] * s + x, s * p[1])  # noqa: E731
    single = diagnostics.truncation_bias(
        double, (0.5, 2.0), 0.0, jnp.ones(8), lambda s, ys: s + ys.sum(), windows=[2, 8]
    )
    np.testing.assert_allclose(got.relative_error, single.relative_error, rtol=1e-5)
    assert float(single.relative_error[0]) > 1e-3


def test_bias_of_gradients_whose_squares_are_beyond_float32():
    f = lambda a, s, x: (a * s + x, None)  # noqa: E731
    args = (f, jnp.float32(0.5), jnp.float32(0), jnp.ones(16, jnp.float32))
    got = [diagnostics.truncation_bias(*args, lambda s, _, size=size: size * s) for size in (1.0, 1e-25, 1e25)]
    for other in got[1:]:
        np.testing.assert_allclose(other.relative_error, got[0].relative_error, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(other.cosine, got[0].cosine, rtol=1e-5)


# --- suggest_truncation ---


def bias_of(windows, errors):
    return diagnostics.TruncationBias(jnp.asarray(windows), jnp.asarray(errors), jnp.ones(len(windows)))


@pytest.mark.parametrize(
    ("windows", "errors", "tolerance", "k"),
    [
        ([1, 2, 4, 8], [0.5, 0.2, 0.05, 0.0], 0.1, 4),
        ([1, 2, 4, 8], [0.5, 0.2, 0.05, 0.0], 0.5, 1),  # an error equal to the tolerance is accepted
        ([1, 2, 4, 8], [0.5, 0.2, 0.05, 0.0], 0.01, 8),
        ([1, 2, 4, 8, 16], [0.5, 0.05, 0.2, 0.08, 0.0], 0.1, 8),  # the error at 2 is small by chance
        ([1, 2, 4, 8, 16], [0.5, 0.05, 0.2, 0.08, 0.0], 0.3, 2),
        ([16, 2, 8, 4, 1], [0.0, 0.05, 0.08, 0.2, 0.5], 0.1, 8),
        ([1, 2, 4], [0.05, float("nan"), 0.01], 0.1, 4),
        ([3], [0.1], 0.2, 3),
    ],
)
def test_the_window_that_is_suggested(windows, errors, tolerance, k):
    got = diagnostics.suggest_truncation(bias_of(windows, errors), tolerance)
    assert (type(got), got) == (int, k)


def test_a_suggestion_for_a_network():
    """By default, the shortest window such that errors are at most 0.1 for it and all longer windows."""
    errors = [compared(truncated("rnn", k), truncated("rnn", None))[0] for k in range(1, T + 1)]
    k = diagnostics.suggest_truncation(bias("rnn", (1, 2, 3, 4, 5)))
    assert max(errors[k - 1 :]) <= 0.1
    assert k == 1 or errors[k - 2] > 0.1


# --- Plots ---


def drawn(ax):
    """Draw the axes, and return their lines and the texts of the legend."""
    ax.figure.savefig(BytesIO(), format="png", dpi=30)
    return ax.get_lines(), [text.get_text() for text in ax.get_legend().get_texts()]


def test_a_picture_of_norms():
    pytest.importorskip("matplotlib")
    curves = {"short": [2.0, 1.0, 1e-3, 0.0], "long": jnp.array([1.0, 0.5, 0.25, 0.125])}
    ax = diagnostics.plot_norms(curves)
    (short, mark, long), texts = drawn(ax)
    assert texts == ["short, vanished after 1", "long"]
    np.testing.assert_array_equal(short.get_xdata(), [0, 1, 2, 3])
    np.testing.assert_array_equal(short.get_ydata(), [2.0, 1.0, 1e-3, np.nan])
    np.testing.assert_array_equal(long.get_ydata(), [1.0, 0.5, 0.25, 0.125])
    assert (list(mark.get_xdata()), list(mark.get_ydata())) == ([1], [1.0])
    assert mark.get_color() == short.get_color() != long.get_color()
    assert (ax.get_yscale(), ax.get_xlabel(), ax.get_ylabel()) == ("log", "lag (steps)", "norm of the gradient")


def test_a_picture_of_norms_at_some_lags_on_given_axes():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    ax = figure.add_subplot()
    assert diagnostics.plot_norms({"a": np.array([8.0, 4.0, 1.0])}, lags=[0, 10, 40], ax=ax, vanished=0.2) is ax
    (line, mark), texts = drawn(ax)
    np.testing.assert_array_equal(line.get_xdata(), [0, 10, 40])
    assert texts == ["a, vanished after 10"]
    assert list(mark.get_xdata()) == [10]


def test_a_picture_of_norms_that_are_all_zero():
    pytest.importorskip("matplotlib")
    lines, texts = drawn(diagnostics.plot_norms({"a": np.zeros(3), "b": np.ones(3)}))
    assert np.isnan(lines[0].get_ydata()).all()
    assert len(texts) == 2


def test_a_picture_of_what_was_measured():
    pytest.importorskip("matplotlib")
    (line, *_), _ = drawn(diagnostics.plot_norms({"gru": measured("gru").norms}))
    np.testing.assert_array_equal(line.get_ydata(), measured("gru").norms)


def test_a_picture_of_bias():
    pytest.importorskip("matplotlib")
    bias = bias_of([4, 1, 2, 8], [0.05, 0.5, 0.2, 0.0])
    ax = diagnostics.plot_bias({"a": bias, "worse": bias_of([1, 2], [0.9, 0.8])}, tolerance=0.1)
    (line, dot, worse, level), texts = drawn(ax)
    assert texts == ["a: k = 4", "worse: no window"]
    np.testing.assert_array_equal(line.get_xdata(), [1, 2, 4, 8])
    np.testing.assert_array_equal(line.get_ydata(), [0.5, 0.2, 0.05, np.nan])
    assert (list(dot.get_xdata()), list(dot.get_ydata())) == ([4], [0.05])
    np.testing.assert_array_equal(worse.get_ydata(), [0.9, 0.8])
    assert set(level.get_ydata()) == {0.1}
    assert (ax.get_xscale(), ax.get_yscale(), ax.get_xlabel()) == ("log", "log", "window k (steps)")
    assert int(texts[0].split()[-1]) == diagnostics.suggest_truncation(bias, 0.1)


@pytest.mark.parametrize("errors", [[0.0], [0.3], [float("nan")]])
def test_a_picture_of_one_bias(errors):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    ax = figure.add_subplot()
    assert diagnostics.plot_bias(bias_of([7], errors), ax=ax) is ax
    ax.figure.savefig(BytesIO(), format="png", dpi=30)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["k = 7" if errors == [0.0] else "no window"]


def test_a_picture_of_exponents():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    spectrum = diagnostics.Lyapunov(jnp.array([0.5, -0.25, -2.0]), jnp.zeros((1, 3)), None)
    ax = diagnostics.plot_spectrum({"a": spectrum, "b": spectrum._replace(exponents=jnp.array([-1.0]))})
    (a, b, zero), texts = drawn(ax)
    assert texts == ["a: $\\lambda_1$ = 0.5", "b: $\\lambda_1$ = -1"]
    np.testing.assert_array_equal(a.get_xdata(), [1, 2, 3])
    np.testing.assert_array_equal(a.get_ydata(), [0.5, -0.25, -2.0])
    np.testing.assert_array_equal(b.get_ydata(), [-1.0])
    assert set(zero.get_ydata()) == {0}
    assert (ax.get_xlabel(), ax.get_yscale()) == ("i", "linear")
    own = figure.add_subplot()
    assert diagnostics.plot_spectrum(spectrum, ax=own) is own
    assert drawn(own)[1] == ["$\\lambda_1$ = 0.5"]


@pytest.mark.parametrize("draw", ["plot_norms", "plot_bias", "plot_spectrum"])
def test_pictures_say_what_they_need(draw, monkeypatch):
    given = {
        "plot_norms": {"a": [1.0]},
        "plot_bias": bias_of([1], [0.1]),
        "plot_spectrum": diagnostics.Lyapunov(jnp.ones(1), jnp.ones((1, 1)), None),
    }
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match="matplotlib") as caught:
        getattr(diagnostics, draw)(given[draw])
    assert any("pip install matplotlib" in note for note in caught.value.__notes__)


# --- Mistakes ---

STEP = lambda s, x: (0.5 * s, s)  # noqa: E731
WITH = lambda p, s, x: (p * s, s)  # noqa: E731
S, XS = jnp.ones(2), jnp.ones((3, 2))
END = lambda s, ys: s.sum()  # noqa: E731
BIAS = bias_of([1, 2, 4], [0.5, 0.3, 0.2])


@pytest.mark.other_types
@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        # --- the step function, its state and its inputs ---
        (
            lambda: diagnostics.state_cotangents("f", S, XS, END),
            TypeError,
            r"`f`: expected a step function .* got str 'f'",
        ),
        (lambda: diagnostics.jacobian_products(None, S, XS), TypeError, r"`f`: expected a step function"),
        (lambda: diagnostics.lyapunov(3, S, XS), TypeError, r"`f`: expected a step function .* got int 3"),
        (
            lambda: diagnostics.state_cotangents(lambda s, x: (s > 1, s), jnp.arange(2), None, END, length=3),
            TypeError,
            "(?s)carry",
        ),
        (lambda: diagnostics.state_cotangents(lambda s, x: ((s, s), s), S, XS, END), TypeError, "(?s)carry"),
        (lambda: diagnostics.jacobian_products(lambda s, x: (s[:1], s), S, XS), TypeError, "(?s)carry"),
        (lambda: diagnostics.lyapunov(lambda s, x: (s[:1], s), S, XS), TypeError, "(?s)carry"),
        (lambda: diagnostics.truncation_bias(lambda p, s, x: (s[:1], s), 0.5, S, XS, END), TypeError, "(?s)carry"),
        (
            lambda: diagnostics.jacobian_products(lambda s, x: (s + 1, s), jnp.array(1), None, length=3),
            TypeError,
            r"`init`: expected a state with float leaves, got int64\[\]",
        ),
        (
            lambda: diagnostics.lyapunov(lambda s, x: (s, s), (), None, length=3),
            TypeError,
            r"`init`: expected a state with",
        ),
        (lambda: diagnostics.jacobian_products(STEP, S, None), (TypeError, ValueError), "scan"),
        (lambda: diagnostics.jacobian_products(STEP, S, XS, length=4), ValueError, "scan"),
        # --- state_cotangents, norms ---
        (
            lambda: diagnostics.state_cotangents(STEP, S, XS, lambda s, ys: s),
            TypeError,
            r"`loss`: expected a function that returns a real scalar, got float64\[2\]",
        ),
        (lambda: diagnostics.state_cotangents(STEP, S, XS, lambda s, ys: 1), TypeError, r"`loss`: .* got int 1"),
        (
            lambda: diagnostics.state_cotangents(STEP, S, XS, lambda s, ys: lax.complex(s, s).sum()),
            TypeError,
            r"`loss`: .* got complex128\[\]",
        ),
        (lambda: diagnostics.norms(jnp.arange(3)), TypeError, r"`tree`: expected a float array, got int64\[3\]"),
        (lambda: diagnostics.norms([None]), TypeError, r"`tree`: expected at least one array, got none"),
        (lambda: diagnostics.norms(XS, batch=1.0), TypeError, r"`batch`: expected an integer >= 0, got float 1\.0"),
        (lambda: diagnostics.norms(XS, batch=-1), ValueError, r"`batch`: expected an integer >= 0, got -1"),
        (
            lambda: diagnostics.norms((XS, S), batch=1),
            ValueError,
            r"`tree`: expected leaves with at least 2 axes.* got \(2,\)",
        ),
        # --- jacobian_products ---
        (
            lambda: diagnostics.jacobian_products(STEP, S, XS, lags=[1, 4]),
            ValueError,
            r"`lags`: expected lags from 0 to 3, the number of steps, got 4",
        ),
        (
            lambda: diagnostics.jacobian_products(STEP, S, XS, lags=[-1]),
            ValueError,
            r"`lags`: expected an integer >= 0, got -1",
        ),
        (lambda: diagnostics.jacobian_products(STEP, S, XS, lags=[0.5]), TypeError, r"`lags`: expected an integer"),
        (
            lambda: diagnostics.jacobian_products(STEP, S, XS, k=3),
            ValueError,
            r"`k`: expected at most 2, the size of the state, got 3",
        ),
        (lambda: diagnostics.jacobian_products(STEP, S, XS, k=0), ValueError, r"`k`: expected an integer >= 1, got 0"),
        (lambda: diagnostics.jacobian_products(STEP, S, XS, k=1.5), TypeError, r"`k`: expected an integer >= 1"),
        # --- lyapunov ---
        (
            lambda: diagnostics.lyapunov(STEP, S, XS, k=3),
            ValueError,
            r"`k`: expected at most 2, the size of the state, got 3",
        ),
        (lambda: diagnostics.lyapunov(STEP, S, XS, k="all"), TypeError, r"`k`: expected an integer >= 1"),
        (lambda: diagnostics.lyapunov(STEP, S, XS, burn_in=3), ValueError, r"`xs`: expected burn_in = 3 plus"),
        (
            lambda: diagnostics.lyapunov(STEP, S, None, length=5, every=2),
            ValueError,
            r"`length`: expected burn_in = 0 plus a positive multiple of every = 2 steps, got 5 steps",
        ),
        (
            lambda: diagnostics.lyapunov(STEP, S, XS, burn_in=-1),
            ValueError,
            r"`burn_in`: expected an integer >= 0, got -1",
        ),
        (lambda: diagnostics.lyapunov(STEP, S, XS, every=0), ValueError, r"`every`: expected an integer >= 1, got 0"),
        (
            lambda: diagnostics.lyapunov(STEP, S, XS, dt=0.0),
            ValueError,
            r"`dt`: expected a number > 0, got float 0\.0",
        ),
        (lambda: diagnostics.lyapunov(STEP, S, XS, dt=float("nan")), ValueError, r"`dt`: expected a number > 0"),
        # --- truncation_bias, suggest_truncation ---
        (
            lambda: diagnostics.truncation_bias(WITH, 0.5, S, XS, END, windows=[1, 4]),
            ValueError,
            r"`windows`: expected windows of at most 3, the number of steps, got 4",
        ),
        (
            lambda: diagnostics.truncation_bias(WITH, 0.5, S, XS, END, windows=[]),
            ValueError,
            r"`windows`: expected at least one",
        ),
        (
            lambda: diagnostics.truncation_bias(WITH, 0.5, S, XS, END, windows=[0]),
            ValueError,
            r"`windows`: expected an integer >= 1, got 0",
        ),
        (
            lambda: diagnostics.truncation_bias(WITH, 0.5, S, XS, END, windows=[1.0]),
            TypeError,
            r"`windows`: expected an integer",
        ),
        (
            lambda: diagnostics.suggest_truncation((1, 2, 3)),
            TypeError,
            r"`bias`: expected TruncationBias\(windows, relative",
        ),
        (
            lambda: diagnostics.suggest_truncation(BIAS),
            ValueError,
            r"`tolerance`: expected more than 0\.2, the error of the longest window, 4, got float 0\.1",
        ),
        (lambda: diagnostics.suggest_truncation(BIAS, 0.0), ValueError, r"`tolerance`: expected a number > 0"),
        (
            lambda: diagnostics.suggest_truncation(BIAS, float("nan")),
            ValueError,
            r"`tolerance`: expected a number > 0",
        ),
        # --- plots ---
        (lambda: diagnostics.plot_norms([1.0, 0.5]), TypeError, r"`curves`: expected a mapping from names to norms"),
        (lambda: diagnostics.plot_norms({}), ValueError, r"`curves`: expected at least one, got none"),
        (
            lambda: diagnostics.plot_norms({"a": [1.0, 0.5]}, lags=[0, 1, 2]),
            ValueError,
            r"`curves\['a'\]`: expected shape \(3,\) = \(lags,\), got \(2,\)",
        ),
        (lambda: diagnostics.plot_norms({"a": np.ones((2, 2))}), ValueError, r"`curves\['a'\]`: expected shape"),
        (lambda: diagnostics.plot_norms({"a": []}), ValueError, r"`curves\['a'\]`: expected"),
        (lambda: diagnostics.plot_bias({"a": 1.0}), TypeError, r"`biases`: expected TruncationBias"),
        (
            lambda: diagnostics.plot_spectrum(jnp.ones(2)),
            TypeError,
            r"`spectra`: expected Lyapunov\(exponents, history, final\)",
        ),
    ],
)
def test_mistakes(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize(
    "f", [diagnostics.lyapunov, partial(diagnostics.jacobian_products, k=2)], ids=["lyapunov", "k"]
)
def test_a_step_with_a_custom_vjp_is_pointed_to_both_modes(f):
    tanh = jax.custom_vjp(jnp.tanh)
    tanh.defvjp(lambda x: (jnp.tanh(x),) * 2, lambda y, y_bar: (y_bar * (1 - y**2),))
    step_with = lambda g: lambda s, x: (g(s + x), None)  # noqa: E731
    state, xs = jnp.zeros(4), jax.random.normal(jax.random.key(0), (5, 4))
    with pytest.raises(TypeError, match="forward-mode") as info:
        f(step_with(tanh), state, xs)
    assert "jaxseq.both_modes" in "".join(info.value.__notes__)
    found, expected = (f(step_with(g), state, xs) for g in (jaxseq.both_modes(tanh, jnp.tanh), jnp.tanh))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9), found, expected)


@pytest.mark.parametrize(
    "f", [diagnostics.lyapunov, partial(diagnostics.jacobian_products, k=2)], ids=["lyapunov", "k"]
)
def test_cells_of_jaxseq_have_the_forward_mode_that_diagnostics_need(f):
    params = jaxseq.gru_init(jax.random.key(0), 3, 4, dtype=jnp.float64)
    xs = jax.random.normal(jax.random.key(1), (5, 3))
    found, expected = (f(partial(cell, params), None, xs) for cell in (jaxseq.gru_cell, jaxseq.reference.gru_cell))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9), found, expected)


def test_no_state_is_one_of_zeros():
    params = jaxseq.lstm_init(jax.random.key(0), 3, 4, dtype=jnp.float64)
    step, xs = partial(jaxseq.reference.lstm_cell, params), jax.random.normal(jax.random.key(1), (5, 3))
    zeros = jaxseq.LSTMState(jnp.zeros(4), jnp.zeros(4))
    found, expected = (diagnostics.jacobian_products(step, s, xs).singular_values for s in (None, zeros))
    np.testing.assert_array_equal(found, expected)
