"""No false alarms: correct rules never fail, and rules that are right only for some inputs do.

Such inputs are particular cotangents, sizes or integers. The functions are small, and each test runs the checks that it
is about.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseq.testing import Verdict, _domain, lifted
from jaxseq.testing._check import Session
from jaxseq.testing._trial import Trial

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32)
INDEX = jnp.array([1, 4, 2], jnp.int32)


@pytest.fixture(autouse=True)
def as_users_have_it(as_users_have_jax):
    pass


def ask(f, args, *checks, **options):
    return Session(f, args, **options).report(args, only=("contract", *checks))


def ruled(f, bwd):
    """Return f under the rule `bwd(pull, args, c)`, where `pull` is the correct pullback."""
    g = jax.custom_vjp(f)
    g.defvjp(lambda *args: (f(*args), args), lambda args, c: bwd(jax.vjp(f, *args)[1], args, c))
    return g


def right(pull, args, c):
    return pull(c)


# --- Crashes ---


def test_float0_for_an_integer_argument_is_what_jax_asks_for():
    f = jax.custom_vjp(lambda x, i: x * i)
    f.defvjp(lambda x, i: (x * i, i), lambda i, c: (c * i, np.zeros(i.shape, jax.dtypes.float0)))
    report = ask(f, (X[0], jnp.arange(4)), "engagement", "integers")
    assert report.of("engagement", "x") is report.of("integers") is Verdict.PASS


def test_programs_in_named_tuples():
    """`custom_linear_solve` stores its four programs in a NamedTuple."""
    a = jnp.asarray(3 * np.eye(3) + 0.1 * RNG.normal(size=(3, 3)), jnp.float32)
    ask(ruled(jnp.linalg.solve, right), (a, X[:, :2]), "value", "elements").raise_if_failed(strict=True)


# --- Other dtypes ---


def dropped(x):
    return jnp.where(jax.random.bernoulli(jax.random.key(1), 0.5, x.shape), x / 0.5, 0)


def noisy(x):
    return jnp.sin(x) + 0.1 * jax.random.normal(jax.random.key(1), x.shape)


def lower(f, x, dtype):
    """Return the results of the check `dtypes` for one dtype."""
    trial = trial_of(f, x)
    with trial.subject.context():
        return list(_domain._lower(trial, dtype.__name__, [dtype]))


def worst(results):
    return Verdict.worst(result.verdict for result in results)


def trial_of(f, x):
    session = Session(f, (x,))
    with session.subject.context():
        return Trial(session.subject, session._point((x,)), 0, None)


@pytest.mark.parametrize("f", [dropped, ruled(noisy, right)])
def test_random_numbers_from_a_fixed_key_depend_on_the_dtype(f):
    """A function that differs in float32 is not checked in lower dtypes."""
    report = ask(f, (X,), "dtypes")
    assert report.verdict is Verdict.PASS
    assert "f is a different function in float32: its values differ from those in float64" in str(report)
    assert "bfloat16" not in str(report)


def test_long_axes_decide_in_low_precision():
    """The tolerance grows with the length. An error that is small anyway decides, and a wrong sign fails."""
    x = np.linspace(0.5, 1.5, 300)
    assert worst(lower(ruled(jnp.sin, right), x, jnp.bfloat16)) is Verdict.PASS
    in_bfloat16 = lambda f, args, c: tuple(-g if g.dtype == jnp.bfloat16 else g for g in right(f, args, c))  # noqa: E731
    assert worst(lower(ruled(jnp.sin, in_bfloat16), x, jnp.bfloat16)) is Verdict.FAIL


def pooled(x):
    return jax.lax.reduce_window(x, -np.inf, jax.lax.max, (2, 2), (1, 1), "VALID")


@pytest.mark.parametrize(
    ("f", "x", "dtype", "reason"),
    [
        (jnp.square, 1e-20 * X, jnp.float32, "below the smallest normal number of float32"),
        (jnp.square, 1e-20 * X, jnp.float16, "the arguments are out of the range of float16"),
        (jnp.exp, 12 + X, jnp.float16, "its values are above the largest number of float16"),
        (lambda x: jnp.exp(x + 12) * 6e-6, X, jnp.float16, "f leaves the range of float16: its values are not finite"),
        (lambda x: jnp.exp(x + 10) / jnp.exp(x + 9).sum(), X, jnp.float16, "not finite"),
        (lambda a: jnp.linalg.eigvalsh(a @ a.T), X, jnp.bfloat16, "Error: "),  # raised by JAX
    ],
    ids=["below", "lost", "above", "overflow", "overflow on the way", "unsupported"],
)
def test_what_a_dtype_can_not_hold_is_skipped(f, x, dtype, reason):
    found = lower(f, x, dtype)
    assert worst(found) in {Verdict.PASS, Verdict.SKIP}
    assert any(reason in result.note for result in found if result.verdict is Verdict.SKIP)


@pytest.mark.parametrize(
    ("f", "x", "reason"),
    [
        (pooled, X, "for complex arguments, the derivative that JAX computes raises"),
        (
            jnp.linalg.eigh,
            jnp.diag(jnp.arange(1.0, 4.0)) + 0.1,
            "for complex arguments, f has no custom rule",
        ),
    ],
    ids=["order", "free phases"],
)
def test_complex_arguments_that_nobody_gave(f, x, reason):
    trial = trial_of(f, x)
    with trial.subject.context():
        found = list(_domain._complex(trial))
    assert worst(found) in {Verdict.PASS, Verdict.SKIP}
    assert any(reason in result.note for result in found)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_rule_that_is_wrong_in_one_dtype_still_fails(dtype):
    f = ruled(jnp.sin, lambda pull, args, c: jax.tree.map(lambda g: g * (1.5 if g.dtype == dtype else 1), pull(c)))
    assert worst(lower(f, X, dtype)) is Verdict.FAIL


def test_a_custom_jvp_that_raises_in_a_lower_dtype_still_fails():
    f = jax.custom_jvp(jnp.sin)
    f.defjvp(lambda x, u: (jnp.sin(*x), (u[0] * jnp.cos(*x)).astype(jnp.promote_types(x[0].dtype, jnp.float32))))
    report = ask(f, (X,), "dtypes", mode="jvp")
    assert "f accepts bfloat16, but its derivative raises TypeError" in report.failures[0].message


# --- Points chosen by the checker ---


@pytest.mark.parametrize(
    ("f", "args", "reason"),
    [
        (lambda x: jnp.log(jnp.sum(x * x)), (X[0],), "with 0 along axis 0 of x, f is not finite"),
        (jnp.fft.rfft, (X[0],), "with 0 along axis 0 of a, f itself raises"),
        (lambda x: jnp.take(x, jnp.array([0, 2])), (X[0],), "with 1 along axis 0 of x, f is not finite"),
    ],
    ids=["minus infinity", "raises", "an index out of bounds"],
)
def test_sizes_at_which_f_does_not_exist_are_skipped(f, args, reason):
    report = ask(f, args, "sizes")
    assert report.verdict is Verdict.PASS
    assert reason in str(report)


def test_zeros_stay_in_arguments_that_are_not_differentiated():
    """Labels, for example: a label other than zero or one makes this loss NaN."""

    def loss(x, labels):
        p = jax.nn.sigmoid(x)
        return jnp.sqrt(labels * (1 - p) + (1 - labels) * p)

    labels = jnp.eye(3, 4)
    assert ask(loss, (X, labels), argnums=0).verdict is Verdict.PASS
    wrong = ruled(loss, lambda pull, args, c: (2 * pull(c)[0], None))
    (failure, *_) = ask(wrong, (X, labels), "elements", argnums=0).failures
    assert "lifted(args, seed=0, argnums=(0,))" in failure.repro
    point = lifted((X, labels), argnums=0)
    np.testing.assert_array_equal(point[1], labels)


def test_zeros_among_positive_numbers_become_positive():
    report = ask(jax.scipy.special.entr, (jnp.array([0.0, 0.2, 0.8]),), "value")
    assert report.of("value") is Verdict.PASS


def test_zeros_stay_where_f_needs_them():
    def f(x):
        return jnp.where(x[-1] == 0, jnp.sin(x), jnp.nan)

    report = ask(f, (jnp.array([1.0, -2.0, 0.0]),))
    assert report.verdict is Verdict.PASS
    assert any("not replaced" in note for note in report.notes)


# --- Rules that are right for some inputs by chance ---


@pytest.mark.parametrize(
    "bwd",
    [
        lambda pull, args, c: (jnp.clip(pull(c)[0], -100, 100),),
        lambda pull, args, c: pull(jnp.where(jnp.abs(c) < 1e-4, 0, c)),
        lambda pull, args, c: pull(jnp.where(jnp.abs(c) < jnp.finfo(c.dtype).eps, 0, c)),
        lambda pull, args, c: pull(jnp.minimum(c, 1e6)),
    ],
    ids=["clipped", "dropped", "below eps dropped", "clipped cotangents"],
)
def test_cotangents_of_any_size(bwd):
    assert ask(ruled(jnp.sin, bwd), (X / 8,), "linearity").of("linearity") is Verdict.FAIL


def test_scales_at_which_float64_ends_are_no_mistake():
    report = ask(lambda x: x * 1e295, (X,), "linearity")
    assert report.verdict is Verdict.PASS
    assert "for cotangents times 2^60 it is out of the range of float64" in str(report)


def test_odd_and_even_sizes():
    f = ruled(lambda x: jnp.cumsum(x, 0), lambda pull, args, c: (pull(c)[0] * (1 + (len(args[0]) in (3, 5, 7))),))
    x = jnp.asarray(RNG.normal(size=(6, 3)), jnp.float32)
    (failure,) = {failure.message for failure in ask(f, (x,), "sizes").failures}
    assert failure.startswith("with one more along every axis, an element differs from the derivative")


def take(x, i):
    return x[i]


GATHERS = {
    "set for add": (INDEX, lambda pull, args, c: (jnp.zeros_like(args[0]).at[args[1]].set(c), None), "repeated"),
    "mean for sum": (
        jnp.array([1, 4, 4], jnp.int32),
        lambda pull, args, c: (pull(c)[0] * (2 - jnp.any(args[1][1:] == args[1][:-1])), None),
        "distinct",
    ),
}


@pytest.mark.parametrize("name", GATHERS)
def test_integers_that_repeat_and_that_do_not(name):
    index, bwd, which = GATHERS[name]
    x = jnp.asarray(RNG.normal(size=(6, 3)), jnp.float32)
    report = ask(ruled(take, bwd), (x, index), "elements", "integers")
    assert {failure.check for failure in report.failures} == {"integers"}
    assert report.failures[0].message.startswith(f"with {which} integers in i, ")
    ask(ruled(take, right), (x, index), "integers").raise_if_failed(strict=True)


def test_integers_keep_their_range_and_order():
    repeated, distinct = _domain._repeated, _domain._distinct
    np.testing.assert_array_equal(repeated(INDEX), [1, 1, 2])
    np.testing.assert_array_equal(distinct(jnp.array([9, 2, 2, 4])), [9, 2, 4, 6])
    for unchanged in (jnp.array([0, 0, 1]), jnp.array([True, True]), jnp.array(3), X):
        assert repeated(unchanged) is unchanged
        assert distinct(unchanged) is unchanged
