"""check_jvp: correct custom_jvp rules pass, wrong ones fail their named checks."""

import jax
import jax.numpy as jnp
import pytest

import jaxseq
from jaxseq.testing import Verdict, check_jvp, check_vjp


def ruled(jvp):
    """Return f(x, w) = (y, sum(y)) with y = sin(x) w, under a forward-mode rule."""

    @jax.custom_jvp
    def f(x, w):
        y = jnp.sin(x) * w
        return y, jnp.sum(y)

    f.defjvp(jvp)
    return f


def right(primals, tangents):
    (x, w), (x_dot, w_dot) = primals, tangents
    y, y_dot = jnp.sin(x) * w, jnp.cos(x) * x_dot * w + jnp.sin(x) * w_dot
    return (y, jnp.sum(y)), (y_dot, jnp.sum(y_dot))


def spoiled(change):
    def jvp(primals, tangents):
        y, (y_dot, total) = right(primals, tangents)
        return y, change(y_dot, total, primals, tangents)

    return jvp


WRONG = {
    "sign": ("value", spoiled(lambda y_dot, total, p, t: (-y_dot, total))),
    "an argument forgotten": ("value", spoiled(lambda y_dot, total, p, t: (jnp.cos(p[0]) * t[0] * p[1], total))),
    "off by 1e-4": ("elements", spoiled(lambda y_dot, total, p, t: (y_dot, total * (1 + 1e-4)))),
    "not linear": ("linearity", spoiled(lambda y_dot, total, p, t: (y_dot * jnp.abs(y_dot), total))),
    "a constant": ("linearity", spoiled(lambda y_dot, total, p, t: (y_dot + 1e-3, total))),
    "stopped": ("order 2", spoiled(lambda y_dot, total, p, t: tuple(right(jax.lax.stop_gradient(p), t)[1]))),
    "primal": ("primal", lambda p, t: (jax.tree.map(lambda y: y * (1 + 1e-7), right(p, t)[0]), right(p, t)[1])),
}


@pytest.fixture
def args(key):
    x, w = jax.random.normal(key, (2, 4))
    return x, w


def test_a_right_rule_passes(args):
    report = check_jvp(ruled(right), args)
    report.raise_if_failed(strict=True)
    assert report.leaves == ("output[0]", "output[1]")
    assert report.of("transpose") is Verdict.PASS
    assert report.of("engagement") is Verdict.SKIP


@pytest.mark.parametrize("reference", [None, lambda x, w: (jnp.sin(x) * w, jnp.sum(jnp.sin(x) * w))])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_rule_fails_by_its_named_check(wrong, reference, args):
    check, jvp = WRONG[wrong]
    report = check_jvp(ruled(jvp), args, reference=reference, level="full" if check == "order 2" else "quick")
    assert report.of(check) is Verdict.FAIL


def test_a_function_without_a_reverse_mode_says_so(args):
    f = lambda x, w: jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.sin(s[1]) * w), (0, x))[1]  # noqa: E731
    report = check_jvp(f, args, level="quick")
    report.raise_if_failed(strict=True)
    assert report.of("transpose") is Verdict.SKIP
    assert "transpose: f has no reverse mode: ValueError" in str(report)


def test_a_rule_with_fewer_outputs_than_inputs(args):
    """Of `check_jvp`, also under vmap."""
    check_jvp(lambda x, w: ruled(right)(x, w)[0], args).raise_if_failed(strict=True)


# --- Functions with both modes ---


def hand(pull):
    @jax.custom_vjp
    def f(x, w):
        return jnp.sin(x) * w

    f.defvjp(lambda x, w: (f(x, w), (x, w)), lambda kept, y_bar: pull(y_bar, *kept))
    return f


def right_pull(y_bar, x, w):
    return (y_bar * w * jnp.cos(x)).astype(x.dtype), (y_bar * jnp.sin(x)).astype(w.dtype)


def sine(x, w):
    return jnp.sin(x) * w


def test_a_function_of_both_modes_passes(args):
    f = jaxseq.both_modes(hand(right_pull), sine)
    report = check_vjp(f, args)
    report.raise_if_failed(strict=True)
    assert report.of("engagement") is report.of("transpose") is Verdict.PASS
    check_jvp(f, args, level="quick").raise_if_failed(strict=True)
    alone = check_vjp(hand(right_pull), args, level="quick")  # without a forward mode
    assert not [result for result in alone.results if result.check == "transpose"]


@pytest.mark.parametrize(
    ("check", "pull", "plain"),
    [
        ("elements", lambda y_bar, x, w: (y_bar * w, y_bar * jnp.sin(x)), sine),
        ("contract", lambda y_bar, x, w: right_pull(y_bar, x, w)[:1], sine),
        ("transpose", right_pull, lambda x, w: sine(x, w) + x - jax.lax.stop_gradient(x)),
    ],
    ids=["pullback", "structure", "plain function"],
)
def test_a_wrong_function_of_both_modes_fails(check, pull, plain, args):
    report = check_vjp(jaxseq.both_modes(hand(pull), plain), args, level="quick")
    assert report.of(check) is Verdict.FAIL
