"""The parts behind a verdict: differences, comparison, rounding, surgery, points, patterns and sizes.

Each is compared with known results.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxseq.testing import Verdict, _differences, _domain, _point, _surgery, check_vjp, lifted
from jaxseq.testing._check import Session
from jaxseq.testing._compare import Tolerance, compare
from jaxseq.testing._rounding import otherwise_rounded
from jaxseq.testing._trial import Trial

RNG = np.random.default_rng(0)

# --- Differences ---


def differences(f, x, directions, projections):
    found = jax.jit(lambda x, u, c: _differences.quotients(f, x, u, c))(x, directions, projections)
    return _differences.extrapolated(*map(np.asarray, found))


def exact(f, x, directions, projections):
    """Return <c, f'(x) u>, computed in forward mode."""
    columns = [jax.jvp(f, (x,), ([u[d] for u in directions],))[1] for d in range(len(directions[0]))]
    return np.array(
        [
            [
                sum(np.vdot(c[p], y) for c, y in zip(projections, column, strict=True))
                for p in range(len(projections[0]))
            ]
            for column in columns
        ]
    )


def test_differences_are_as_good_as_they_say():
    def f(x):
        return [jnp.sin(x[0]) @ x[1], jnp.exp(x[1]).sum(0)]

    x = [jnp.asarray(RNG.normal(size=s)) for s in ((4, 3), (3, 2))]
    u = [RNG.normal(size=(5, *a.shape)) for a in x]
    c = [RNG.normal(size=(6, *y.shape)) for y in f(x)]
    found, true = differences(f, x, u, c), exact(f, x, u, c)
    assert (np.abs(found.value - true) <= 2 * found.error).all()
    assert (found.error <= 1e-9 * found.scale).all()


def test_differences_of_a_chaotic_recurrence_know_their_error():
    """Errors grow by a factor of 1e4 over 30 steps, and the estimates of the error remain valid."""
    w = jnp.asarray(RNG.normal(size=(8, 8))) * 1.2

    def f(x):
        return [lax.scan(lambda h, _: (jnp.tanh(h @ w),) * 2, x[0], None, length=30)[1][-1]]

    x = [jnp.asarray(RNG.normal(size=8))]
    u, c = [RNG.normal(size=(6, 8))], [RNG.normal(size=(4, 8))]
    found, true = differences(f, x, u, c), exact(f, x, u, c)
    assert (np.abs(found.value - true) <= 10 * found.error + 1e-7 * found.scale).all()


def test_differences_step_back_into_the_domain():
    f = lambda x: [jnp.log(x[0])]  # noqa: E731
    x = [jnp.array([1e-3, 2.0])]
    found = differences(f, x, [np.array([[1.0, 1.0]])], [np.array([[1.0, 0.0], [0.0, 1.0]])])
    np.testing.assert_allclose(found.value, [[1000, 0.5]], rtol=1e-7)
    assert np.isfinite(found.error).all()


def test_differences_of_a_constant_are_zero():
    found = differences(lambda x: [jnp.ones(2) + 0 * x[0]], [jnp.ones(2)], [np.ones((1, 2))], [np.ones((1, 2))])
    assert found.value == found.scale == 0
    assert 0 < found.error < 1e-12


@pytest.mark.parametrize("jump", [0.0, 1e-6, 1.0])
def test_differences_see_a_kink(jump):
    f = lambda x: [jnp.sin(x[0]) + jump * jnp.abs(x[0] - 1)]  # noqa: E731
    found = differences(f, [jnp.ones(1)], [np.ones((1, 1))], [np.ones((1, 1))])
    assert found.kink == pytest.approx(jump, rel=0.2)  # the estimate subtracts a bound on rounding
    assert found.error >= found.kink


def test_a_kink_nearby_is_none():
    f = lambda x: [jnp.abs(x[0] - 1.001) + jnp.sin(x[0])]  # noqa: E731
    found = differences(f, [jnp.ones(1)], [np.ones((1, 1))], [np.ones((1, 1))])
    assert found.kink == 0
    assert found.value == pytest.approx(np.cos(1) - 1, rel=1e-9)


def test_differences_of_an_even_polynomial_are_exact():
    """The degree is 14, so eight steps determine it. At the largest step, all terms are one."""
    h = _differences.STEPS[0] / _differences.STEPS[0, 0]
    q = 3 + sum(h ** (2 * j) for j in range(1, _differences.ROWS))
    value, _ = _differences._ridders(q[None, :, None], np.zeros((1, _differences.ROWS, 1)))
    assert value.item() == pytest.approx(3, rel=1e-10)


# --- Comparison ---


@pytest.mark.parametrize("wrong", [np.nan, np.inf, 1.1])
def test_one_wrong_element_fails(wrong):
    result = compare("value", "x", np.array([1.0, wrong]), np.ones(2), Tolerance(1e-3, "a test"), "x is wrong")
    assert result.verdict is Verdict.FAIL
    assert result.failure.index == (1,)


# --- Rounding ---

SMALL = 2.0**-40  # 1 - SMALL is exact, and so is 1 - (1 - SMALL)


def test_rounding_is_seen_where_terms_cancel():
    """1 - (1 - x) retains four digits, and 2 x all of them."""
    x = jnp.array([SMALL])
    cancelled = jax.jit(otherwise_rounded(lambda x: 1 - (1 - x)))(x)
    assert 1e-6 < abs(float(cancelled[0]) / SMALL - 1) < 1e-3
    kept = jax.jit(otherwise_rounded(lambda x: 2 * x))(x)
    assert abs(float(kept[0]) / (2 * SMALL) - 1) < 1e-15


def test_rounding_reaches_into_loops_and_branches():
    def f(x):
        y, _ = lax.scan(
            lambda y, _: (lax.cond(y[0] > 0, lambda y: 1 - (1 - y), lambda y: y, y), None), x, None, length=3
        )
        z = lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, 1 - (1 - s[1])), (jnp.int32(0), y))[1]
        return jax.jit(lambda z: z * 1)(z)

    x = jnp.array([SMALL])
    assert 1e-6 < abs(float(jax.jit(otherwise_rounded(f))(x)[0]) / SMALL - 1) < 1e-2


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex128])
def test_rounding_moves_by_one_eps_either_way(dtype):
    a = jnp.asarray(RNG.normal(size=400))
    a = lax.complex(a, a[::-1]) if dtype == jnp.complex128 else a.astype(dtype)
    eps = float(jnp.finfo(dtype).eps)
    wide = np.complex128 if dtype == jnp.complex128 else np.float64
    parts = lambda a: np.asarray(a).astype(wide).view(np.float64)  # noqa: E731
    moved = parts(otherwise_rounded(lambda a: a)(a)) / parts(a) - 1
    assert eps / 4 < np.abs(moved).min()
    assert np.abs(moved).max() <= 2 * eps
    assert moved.size / 4 < (moved > 0).sum() < 3 * moved.size / 4


# --- Surgery ---


@jax.custom_vjp
def halved(x, w):
    """A function whose rule returns half the gradient."""
    return jnp.sin(x) * w


halved.defvjp(
    lambda x, w: (halved.fun(x, w), (x, w)), lambda res, c: (c * jnp.cos(res[0]) * res[1] / 2, c * jnp.sin(res[0]) / 2)
)


def nested(f):
    def outer(x, w):
        return f(x, w)

    g = jax.custom_vjp(outer)
    g.defvjp(lambda x, w: (f(x, w), (x, w)), lambda res, c: jax.vjp(f, *res)[1](c))
    return g


WRAPPERS = {
    "bare": lambda f: f,
    "jit of jit": lambda f: jax.jit(jax.jit(f)),
    "remat": jax.checkpoint,
    "scan": lambda f: lambda x, w: lax.scan(lambda s, _: (s, f(x, w)), 0, None, length=1)[1][0],
    "cond": lambda f: lambda x, w: lax.cond(x[0] > -9, f, lambda x, w: x, x, w),
    "vmap": jax.vmap,
    "another rule around": nested,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_rules_are_found_watched_doubled_and_set_aside_wherever_they_are(wrapper):
    f = WRAPPERS[wrapper](halved)
    x, w = jnp.array([0.3, -1.2]), jnp.array([2.0, 0.7])
    assert set(_surgery.rules(f, x, w)) <= {"halved", "outer"}
    assert "halved" in _surgery.rules(f, x, w)
    gradient = lambda f: np.asarray(jax.jit(jax.grad(lambda x: f(x, w).sum()))(x))  # noqa: E731
    right = np.cos(x) * w
    np.testing.assert_allclose(gradient(f), right / 2)
    np.testing.assert_allclose(gradient(_surgery.plain(f)), right)
    if wrapper != "another rule around":
        np.testing.assert_allclose(gradient(_surgery.doubled(f)), right)
    calls = []
    np.testing.assert_allclose(gradient(_surgery.watched(f, calls.append)), right / 2)
    assert calls
    np.testing.assert_allclose(gradient(f), right / 2)  # the original is unchanged


def test_what_bwd_returned_is_seen_before_jax_fills_its_gaps():
    f = jax.custom_vjp(lambda tree, y: tree["a"] * y)
    f.defvjp(lambda tree, y: (tree["a"] * y, (tree, y)), lambda res, c: ({"a": c * res[1]}, None))
    calls = []
    run = _surgery.watched(lambda tree, y: f(tree, lax.stop_gradient(y)), calls.append)
    jax.eval_shape(lambda t, y: jax.vjp(run, t, y)[1](y), {"a": jnp.ones(3)}, jnp.ones(3))
    (call,) = calls
    assert call.returned[1] is None
    assert call.names == ("tree['a']", "y")
    assert call.wanted == (True, False)
    assert [p.shape for p in call.primals] == [(3,), (3,)]


# --- Points, patterns, sizes ---


def test_patterns_seed_every_output_alone_and_all_jointly():
    ys = [jnp.zeros((3, 2)), jnp.zeros(())]
    made = _point.patterns(ys, ["ys", "loss"], 0)
    assert list(made) == ["joint", "ys alone", "first of ys", "last of ys", "loss alone", "ones", "zero"]
    assert all(leaf.all() for leaf in made["joint"])
    assert made["ys alone"][0].all()
    assert not made["ys alone"][1].any()
    assert np.argwhere(made["last of ys"][0]).tolist() == [[2, 1]]
    assert not any(leaf.any() for leaf in made["zero"])
    again = _point.patterns(ys, ["ys", "loss"], 0)
    assert all(np.array_equal(a, b) for name in made for a, b in zip(made[name], again[name], strict=True))


def test_lifted_arguments_are_those_that_are_judged():
    args = {"a": jnp.array([3, 0, -4], jnp.bfloat16), "n": jnp.arange(3), "z": jnp.zeros((2, 2), jnp.complex64)}
    out = lifted(args, seed=3)
    assert {name: leaf.dtype for name, leaf in out.items()} == {
        "a": np.float64,
        "n": args["n"].dtype,
        "z": np.complex128,
    }
    assert out["z"].all()
    assert out["a"].all()
    np.testing.assert_array_equal(out["a"][jnp.array([0, 2])], [3, -4])
    assert _point.zeros_in((args,), (0,)) == {0: 1, 2: 4}
    assert _point.zeros_in((args,), ()) == {}
    assert not np.array_equal(out["z"], lifted(args, seed=4)["z"])


def free_sizes(f, *args):
    session = Session(f, args)
    with session.subject.context():
        trial = Trial(session.subject, session._point(args), 0, None)
        leaves, tree = jax.tree.flatten(args)
        return set(_domain._free_axes(trial, leaves, tree))


def test_sizes_that_a_function_leaves_free_are_found_by_trying():
    """In x (4, 3) @ w (3, 3), rows of x, the inner axis and columns of w are free, though three of four are equal."""
    x, w = jnp.ones((4, 3)), jnp.ones((3, 3))
    assert free_sizes(lambda x, w: x @ w, x, w) == {
        frozenset({(0, 0)}),
        frozenset({(0, 1), (1, 0)}),
        frozenset({(1, 1)}),
    }


def test_a_size_that_is_a_multiple_of_another_is_not_free():
    assert free_sizes(lambda x: x.reshape(2, -1), jnp.ones(6)) == set()


def test_only_sizes_that_another_has_too_are_changed():
    """The cost is a product of all sizes. With nine sizes changed, a small convolution took half an hour."""
    a, b, c, d = (frozenset({(leaf, 0)}) for leaf in range(4))
    assert _domain._all_different([(a, 3), (b, 4), (c, 3), (d, 3)], {2, 3, 4, 6}) == {c: 5, d: 7}
    assert _domain._all_different([(a, 3), (b, 4)], {3, 4}) == {}


def test_equal_sizes_are_pulled_apart():
    """A symmetric matrix hides a missing transpose. Different sizes reveal it."""
    f = jax.custom_vjp(jnp.matmul)
    f.defvjp(lambda x, w: (x @ w, (x, w)), lambda res, c: (c @ res[1], res[0].T @ c))
    w = RNG.normal(size=(3, 3))
    args = jnp.asarray(RNG.normal(size=(4, 3))), jnp.asarray(w + w.T)
    report = Session(f, args).report(args, only=("contract", "elements", "sizes"))
    assert {failure.check for failure in report.failures} == {"sizes"}
    assert any("with sizes that are all different, it raises TypeError" in f.message for f in report.failures)


# --- Devices ---


@pytest.mark.eight_devices
def test_an_output_of_what_is_shared_alone_needs_no_concession():
    """The output is the same on both devices, though its cotangents are not."""
    report = check_vjp(lambda a, b: (jnp.sin(a), a * b), (jnp.array([1.0, 2.0, 4.0]), jnp.array([1.0, 3.0, -1.0])))
    report.raise_if_failed(strict=True)
    assert not report.notes
