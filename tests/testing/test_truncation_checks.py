"""check_truncation, with and without a reference, on correct rules and on rules that leak."""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from jax import lax

from jaxseq.testing import Verdict, check_truncation, check_vjp
from jaxseq.testing._truncation import _windows, frozen


def elman(params, carry, xs, *, truncation=None, reverse=False, leak=0, wrong=None):
    """An Elman network in plain JAX. Its gradient is cut every `truncation` steps, or as `wrong` specifies."""
    w_x, w_h = params

    def step(h, at):
        t, x = at
        if truncation is not None and wrong != "not at all":
            late = 1 if wrong == "late" else 0
            cut = (t > 0) & ((t - late) % truncation == 0)
            h = jnp.where(cut, lax.stop_gradient(h) + leak * (h - lax.stop_gradient(h)), h)
        h = jnp.tanh(x @ w_x + h @ w_h)
        return h, h

    xs = jnp.flip(xs, 0) if reverse else xs
    last, ys = lax.scan(step, carry, (jnp.arange(xs.shape[0]), xs))
    return last, jnp.flip(ys, 0) if reverse else ys


@pytest.fixture(scope="module")
def args():
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (3, 5), (5, 5), (2, 5), (7, 2, 3)
    w_x, w_h, h, xs = (0.6 * jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))
    return (w_x, w_h), h, xs


# Windows of some steps and of all steps. The long tests add windows of one step, longer windows, and all combinations.
FIRST = [(3, elman, True), (7, None, False)]
REST = [case for case in product((1, 3, 7, 9), (None, elman), (False, True)) if case not in FIRST]


@pytest.mark.parametrize(
    ("k", "reference", "reverse"), [*FIRST, *(pytest.param(*case, marks=pytest.mark.long) for case in REST)]
)
def test_stop_gradient_on_the_carry_passes(k, reference, reverse, args):
    report = check_truncation(elman, args, truncation=k, reverse=reverse, reference=reference, level="quick")
    report.raise_if_failed(strict=True)
    assert report.of("truncation") is Verdict.PASS
    assert report.of("value") is Verdict.PASS


@pytest.mark.long
@pytest.mark.parametrize("reverse", [False, True])
def test_all_checks_pass_without_a_reference(reverse, args):
    """Other lengths of the sequence, too, which have other windows."""
    report = check_truncation(elman, args, truncation=3, reverse=reverse)
    report.raise_if_failed()
    assert report.of("sizes") is Verdict.PASS


def test_plain_differences_do_not_see_a_stop(args):
    """check_vjp fails a correct truncated gradient, which is why check_truncation exists."""
    assert check_vjp(partial(elman, truncation=3), args, level="quick").of("value") is Verdict.FAIL


@pytest.mark.parametrize("reference", [pytest.param(None, marks=pytest.mark.long), elman])
def test_a_leak_of_a_millionth_is_found(reference, args):
    report = check_truncation(partial(elman, leak=1e-6), args, truncation=3, reference=reference, level="quick")
    assert report.of("truncation", "carry") is Verdict.FAIL
    assert report.of("truncation", "xs") is Verdict.FAIL
    (message,) = {
        f.message
        for f in report.failures
        if f.check == "truncation" and f.argument == "carry" and "window 1" in f.message
    }
    assert message == "a loss on window 1 only has a nonzero gradient in carry outside of that window"


@pytest.mark.parametrize("wrong", ["not at all", "late"])
def test_a_truncation_elsewhere_is_found(wrong, args):
    report = check_truncation(partial(elman, wrong=wrong), args, truncation=3, level="quick")
    assert report.of("truncation") is report.of("value") is Verdict.FAIL
    reported = any("nothing is truncated" in failure.message for failure in report.failures)
    assert reported == (wrong == "not at all")


def test_a_window_as_long_as_time_has_to_be_the_full_gradient(args):
    def f(params, carry, xs, *, truncation=None):
        return elman(params, carry, xs, truncation=truncation and 3)

    report = check_truncation(f, args, truncation=3, level="quick")
    assert {f.check for f in report.failures} == {"truncation"}
    assert "a window as long as the sequence does not give the full gradient" in str(report)


def test_where_truncation_changes_nothing_the_check_has_no_power(args):
    """Without a recurrence, no gradient crosses a boundary."""
    (w_x, w_h), h, xs = args
    report = check_truncation(elman, ((w_x, 1e-30 * w_h), h, xs), truncation=3, level="quick")
    assert report.of("truncation") is Verdict.INCONCLUSIVE


@pytest.mark.long
@pytest.mark.parametrize("reverse", [False, True])
def test_the_frozen_function_has_the_truncated_gradient(reverse, args):
    """The frozen function has the value of f and the truncated gradient of f, at first and second order."""
    f = partial(elman, reverse=reverse)
    g = frozen(f, _windows(7, 3, 3, reverse), reverse, args)
    assert_close(g(*args), f(*args), relative=1e-14)
    loss = lambda f: lambda *args: sum(jnp.sum(jnp.sin(leaf)) for leaf in f(*args))  # noqa: E731
    gradient = lambda f: jax.grad(loss(f), (0, 1, 2))  # noqa: E731
    assert_close(gradient(g)(*args), gradient(partial(f, truncation=3))(*args), relative=1e-13)

    def second(f):
        squares = lambda xs: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradient(f)(*args[:2], xs)))  # noqa: E731
        return jax.grad(squares)(args[2])

    assert_close(second(g), second(partial(f, truncation=3)), relative=1e-12)
    assert np.abs(second(g) - second(f)).max() > 1e-6
