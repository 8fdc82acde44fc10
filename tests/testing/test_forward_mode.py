"""check_jvp: correct custom_jvp rules pass, wrong ones fail their named checks."""

import jax
import jax.numpy as jnp
import pytest

from jaxseq.testing import Verdict, check_jvp


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
