"""Points where gradients vanish, explode or do not exist: correct rules never fail, wrong rules never pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseq.testing import Verdict, check_vjp
from tests.support.broken_rules import arguments, broken, plain

WRONG = ["sign flipped", "recurrence missing", "wrong activation derivative", "final-state cotangent ignored"]


@pytest.fixture(autouse=True)
def as_users_have_it():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2))])
def test_a_saturated_rule_does_not_fail_and_a_wrong_one_does_not_pass(seed):
    """At slopes of 1e-12, 1 - tanh² loses all digits to cancellation, and autodiff is as inaccurate as the rule."""
    args = arguments(jax.random.key(seed), gain=60.0)
    assert check_vjp(broken(), args, reference=plain, level="quick").verdict is not Verdict.FAIL
    for wrong in WRONG:
        assert check_vjp(broken(wrong), args, reference=plain, level="quick").verdict is not Verdict.PASS


def test_full_saturation_is_inconclusive():
    """All gradients are exactly zero, so zeroed or flipped gradients cannot be detected."""
    args = arguments(jax.random.key(0), gain=1e4)
    args = (*args[:-1], jnp.sign(args[-1]) * (1 + jnp.abs(args[-1])))
    report = check_vjp(broken(), args, level="quick")
    assert report.verdict is Verdict.INCONCLUSIVE
    assert report.of("power", "w_h") is Verdict.INCONCLUSIVE
    assert "a zeroed or sign-flipped gradient would also have passed" in str(report)


@pytest.mark.long
@pytest.mark.parametrize(("gain", "steps"), [(5.0, 40), (10.0, 80)])
def test_a_chaotic_recurrence_does_not_fail_the_right_rule(gain, steps):
    args = arguments(jax.random.key(1), gain=gain, T=steps, H=11)
    report = check_vjp(broken(), args, reference=plain, level="quick")
    assert report.verdict is not Verdict.FAIL
    assert report.of("value") is report.of("elements") is Verdict.PASS
    for wrong in (*WRONG, "weight gradient off by 1e-4"):
        assert check_vjp(broken(wrong), args, reference=plain, level="quick").verdict is Verdict.FAIL


def test_a_zero_state_is_jittered_and_said_to_be():
    """At h0 = 0, the first step does not contribute to the gradient of W_h, so its omission cannot be detected."""
    w_x, w_h, b, h, xs = arguments(jax.random.key(0))
    report = check_vjp(broken("initial state left out of W_h"), (w_x, w_h, b, jnp.zeros_like(h), xs), level="quick")
    assert report.of("value", "w_h") is report.of("elements", "w_h") is Verdict.FAIL
    assert any(note.startswith("h contains 10 zeros") for note in report.notes)


def test_at_a_kink_nothing_is_said():
    """Central differences converge to the mean of both slopes, as autodiff does for max, while the rule gives zero."""
    x, elsewhere = jnp.array([2.0, 1.0, -1.0]), jnp.array([2.1, 1.0, -1.0])

    @jax.custom_vjp
    def f(x):
        return jnp.maximum(x - 2, 0)

    f.defvjp(lambda x: (f.fun(x), x), lambda x, c: (jnp.where(x > 2, c, 0),))
    report = check_vjp(f, (x,))
    assert report.of("value") is report.of("elements") is report.verdict is Verdict.INCONCLUSIVE
    assert any("f has a kink here" in note for note in report.notes)
    check_vjp(f, (elsewhere,)).raise_if_failed(strict=True)


@pytest.mark.parametrize("f", [jax.nn.relu, jnp.abs, lambda x: jnp.maximum(x, 0)])
def test_zeros_among_the_arguments_are_moved_off_the_kink(f):
    report = check_vjp(f, (jnp.array([0.0, 1.0, -1.0]),), level="quick")
    report.raise_if_failed(strict=True)
    assert any("contains a zero" in note for note in report.notes)


def test_nan_at_the_zeros_that_were_given_is_not_hidden():
    norm = lambda x: jnp.sqrt(jnp.sum(x * x))  # noqa: E731
    report = check_vjp(norm, (jnp.zeros(3),), level="quick")
    assert "NaN at the arguments as passed" in report.failures[0].message
    check_vjp(norm, (jnp.array([0.0, 1.0, 2.0]),), level="quick").raise_if_failed(strict=True)


def test_no_steps_at_all():
    """Empty arrays are skipped, and weights that are not used are inconclusive."""
    *weights, h, xs = arguments(jax.random.key(0))
    report = check_vjp(broken(), (*weights, h, xs[:0]), level="quick")
    assert report.verdict is Verdict.INCONCLUSIVE
    assert report.of("value", "h") is Verdict.PASS
    assert report.of("value", "xs") is report.of("power", "xs") is Verdict.SKIP
    assert report.of("value", "w_h") is Verdict.INCONCLUSIVE


def test_outside_the_domain_differences_take_smaller_steps():
    """x is so close to zero that large steps leave the domain of log."""
    check_vjp(jnp.log, (jnp.array([1e-3, 0.5, 2.0]),)).raise_if_failed(strict=True)


def test_a_rule_that_is_better_than_differentiating_what_is_computed():
    """log(1 + exp(x)) overflows, and autodiff gives NaN. Finite differences confirm the rule."""

    @jax.custom_vjp
    def softplus(x):
        return jnp.log1p(jnp.exp(x))

    softplus.defvjp(lambda x: (softplus(x), x), lambda x, c: (c * jax.nn.sigmoid(x),))
    x = (jnp.array([-3.0, 0.5, 2.0, 40.0]),)
    check_vjp(softplus, x, order=1, level="quick").raise_if_failed(strict=True)


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_the_scale_of_arguments_does_not_matter(scale):
    def f(x, w):
        return jnp.tanh(x / scale @ w) * scale

    x, w = (jax.random.normal(jax.random.key(n), s) for n, s in enumerate([(4, 3), (3, 2)]))
    check_vjp(f, (x * scale, w), level="quick").raise_if_failed(strict=True)


def test_a_large_array_does_not_loosen_the_tolerance():
    """One of 40 000 elements has an error of 1e-6, relative to the largest."""

    @jax.custom_vjp
    def f(x):
        return jnp.sin(x)

    f.defvjp(lambda x: (jnp.sin(x), x), lambda x, c: ((c * jnp.cos(x)).at[150, 7].add(1e-6),))
    report = check_vjp(f, (jnp.asarray(np.random.default_rng(0).normal(size=(200, 200))),), level="quick")
    assert report.of("elements") is Verdict.FAIL
    (failure,) = (failure for failure in report.failures if failure.check == "elements")
    assert failure.index == (150, 7)
