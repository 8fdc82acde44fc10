"""Misuse raises an error that names the argument, or is a named FAIL; it never raises inside JAX."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseq.testing import Verdict, check_jvp, check_truncation, check_vjp, cotangents

X = jnp.array([1.0, 2.0, 3.0])


def double(x):
    return x * 2


def carried(params, carry, xs, *, truncation=None):
    return jax.lax.scan(lambda h, x: ((h * params + x),) * 2, carry, xs)


ERRORS = {
    "no function": (lambda: check_vjp(3, (X,)), TypeError, r"`f`: expected a function, got int 3"),
    "a bare array": (lambda: check_vjp(double, X), TypeError, r"`args`: expected a tuple of the arguments of `f`, got"),
    "a string among the arguments": (
        lambda: check_vjp(lambda x, mode: x, (X, "same")),
        TypeError,
        r"`args\[1\]`: expected an array \(bind other arguments with functools.partial\), got str 'same'",
    ),
    "an object array": (
        lambda: check_vjp(double, (np.array([None]),)),
        TypeError,
        r"`args\[0\]`: expected an array of numbers",
    ),
    "NaN": (
        lambda: check_vjp(double, ({"a": X * jnp.nan},)),
        ValueError,
        r"`args\[0\]\['a'\]`: expected finite values",
    ),
    "nothing to differentiate in": (
        lambda: check_vjp(lambda n: 2.0 * n, (jnp.array(3),)),
        TypeError,
        r"`args`: expected at least one floating-point array to differentiate with respect to, got none",
    ),
    "integer output": (
        lambda: check_vjp(jnp.argmax, (X,)),
        TypeError,
        r"`f`: expected at least one floating-point output to differentiate, got int",
    ),
    "no output": (
        lambda: check_vjp(lambda x: None, (X,)),
        TypeError,
        r"`f`: expected at least one floating-point output .* got no array",
    ),
    "an output that is not an array": (
        lambda: check_vjp(lambda x: {"y": x, "name": "y"}, (X,)),
        TypeError,
        r"`f`: expected an output of arrays or trees of arrays, got str 'y' at output\['name'\]",
    ),
    "argnums out of range": (
        lambda: check_vjp(double, (X,), argnums=1),
        ValueError,
        r"`argnums`: expected positions of the 1 arguments, got 1",
    ),
    "argnums of integers": (
        lambda: check_vjp(lambda x, n: x * 2, (X, jnp.array(3)), argnums=(0, 1)),
        TypeError,
        r"`argnums`: expected positions of arguments with floating-point leaves, got 1, which has none",
    ),
    "no argnums": (
        lambda: check_vjp(double, (X,), argnums=()),
        ValueError,
        r"`argnums`: expected at least one position",
    ),
    "argnums by name": (
        lambda: check_vjp(double, (X,), argnums="x"),
        TypeError,
        r"`argnums`: expected an integer, got str 'x'",
    ),
    "reference of another signature": (
        lambda: check_vjp(double, (X,), reference=lambda x, y: x),
        ValueError,
        r"`reference`: expected a function that runs at `args`, as `f` does, got TypeError: .*missing 1 required",
    ),
    "reference with other outputs": (
        lambda: check_vjp(double, (X,), reference=lambda x: (x, x)),
        ValueError,
        r"`reference`: expected outputs that match those of `f`, float64\[3\], got \(float64\[3\], float64\[3\]\)",
    ),
    "reference of another shape": (
        lambda: check_vjp(double, (X,), reference=jnp.sum),
        ValueError,
        r"`reference`: expected outputs that match those of `f`, float64\[3\], got float64\[\]",
    ),
    "reference not a function": (
        lambda: check_vjp(double, (X,), reference=1),
        TypeError,
        r"`reference`: expected a function",
    ),
    "arguments that do not fit": (
        lambda: check_vjp(lambda x, w: x @ w, (X, jnp.ones((2, 2)))),
        ValueError,
        r"`f`: expected a function that runs at `args` and that jax.jit can trace, got TypeError",
    ),
    "a branch on numbers": (
        lambda: check_vjp(lambda x: x if x[0] > 0 else -x, (X,)),
        ValueError,
        r"`f`: expected a function that runs at `args` and that jax.jit can trace, got TracerBoolConversionError",
    ),
    "level": (
        lambda: check_vjp(double, (X,), level="slow"),
        ValueError,
        r"`level`: expected one of 'quick', 'full', got str 'slow'",
    ),
    "order": (lambda: check_vjp(double, (X,), order=3), ValueError, r"`order`: expected 1 or 2, got 3"),
    "seed": (lambda: check_vjp(double, (X,), seed=-1), ValueError, r"`seed`: expected an integer >= 0, got -1"),
    "tolerance": (
        lambda: check_vjp(double, (X,), tolerance=2),
        ValueError,
        r"`tolerance`: expected None, or a number between 0 and 1",
    ),
    "zero tolerance": (lambda: check_vjp(double, (X,), tolerance=0.0), ValueError, r"`tolerance`: expected None"),
    "jvp of no function": (lambda: check_jvp(None, (X,)), TypeError, r"`f`: expected a function, got NoneType None"),
    "zero truncation": (
        lambda: check_truncation(carried, (X, X, jnp.stack([X, X])), truncation=0),
        ValueError,
        r"`truncation`: expected an integer >= 1, a pair .* or None, got 0",
    ),
    "a sequence of two arguments": (
        lambda: check_truncation(carried, (X, X), truncation=2),
        ValueError,
        r"`args`: expected \(params, carry, xs\), got 2 arguments",
    ),
    "xs of two lengths": (
        lambda: check_truncation(carried, (X, X, (X, X[:2])), truncation=2),
        ValueError,
        r"`args\[2\]`: expected time on the first axis of every leaf of xs, got lengths \[2, 3\]",
    ),
    "an unknown pattern": (
        lambda: cotangents(X, "last of ys"),
        ValueError,
        r"`pattern`: expected one of 'joint', .*, got 'last of ys'",
    ),
}


@pytest.mark.other_types
@pytest.mark.parametrize("name", ERRORS)
def test_error(name):
    call, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message) as caught:
        call()
    assert caught.value.__cause__ is None


def quick(f, *args, **options):
    return check_vjp(f, args, level="quick", **options)


def test_a_rule_that_can_not_run_is_a_named_fail():
    @jax.custom_vjp
    def f(x, w):
        return x @ w

    f.defvjp(lambda x, w: (x @ w, (x, w)), lambda res, c: (c @ res[1], res[0].T @ c))
    report = quick(f, jnp.ones((2, 3)), jnp.ones((3, 4)))
    assert report.verdict is report.of("contract") is Verdict.FAIL
    (failure,) = report.failures
    assert failure.message.startswith("the derivative raises TypeError")
    assert "no other check ran" in str(report)


def test_side_effects_between_calls_are_a_named_fail():
    calls = itertools.count(1)

    def f(x):
        return x * next(calls)

    report = quick(f, X)
    assert report.of("determinism") is Verdict.FAIL
    assert any("side effects" in failure.message for failure in report.failures)


def test_forward_mode_of_a_reverse_rule_is_a_named_fail():
    f = jax.custom_vjp(jnp.sin)
    f.defvjp(lambda x: (jnp.sin(x), x), lambda x, c: (c * jnp.cos(x),))
    report = check_jvp(f, (X,), level="quick")
    assert report.of("contract") is Verdict.FAIL
    assert "forward-mode" in str(report)


def test_a_global_flag_stays_as_it_was():
    flags = (
        "jax_enable_x64",
        "jax_debug_nans",
        "jax_disable_jit",
        "jax_check_tracer_leaks",
        "jax_numpy_rank_promotion",
    )
    before = [getattr(jax.config, flag) for flag in flags]
    check_vjp(double, (X,))
    assert [getattr(jax.config, flag) for flag in flags] == before


# --- Valid use ---


def test_integers_booleans_and_bound_options():
    def f(x, lengths, mask, *, gain):
        inside = jnp.arange(x.shape[0], dtype=lengths.dtype) < lengths
        return gain * jnp.where(mask & inside, jnp.sin(x), 0), jnp.sum(lengths)

    args = X, jnp.array(2, jnp.int32), np.array([True, True, False])
    report = check_vjp(partial(f, gain=2.0), args)
    report.raise_if_failed(strict=True)
    assert report.title == "f(gain=2.0)"
    assert report.leaves == ("x",)


def test_a_function_that_is_jitted_already():
    check_vjp(jax.jit(jnp.sin), (X,)).raise_if_failed(strict=True)
    rule = jax.custom_vjp(jnp.sin)
    rule.defvjp(lambda x: (jnp.sin(x), x), lambda x, c: (c * jnp.sin(x),))
    report = quick(jax.jit(jax.jit(rule)), X)
    assert report.of("engagement") is Verdict.PASS
    assert report.of("value") is Verdict.FAIL


def test_none_is_legal_for_an_argument_that_argnums_leaves_out():
    @jax.custom_vjp
    def f(x, scale):
        return jnp.sin(x) * scale

    f.defvjp(lambda x, scale: (jnp.sin(x) * scale, (x, scale)), lambda res, c: (c * jnp.cos(res[0]) * res[1], None))
    assert quick(f, X, 2 * X).of("contract") is Verdict.FAIL
    quick(f, X, 2 * X, argnums=0).raise_if_failed(strict=True)
    assert quick(f, X, 2 * X, argnums=-1).of("contract") is Verdict.FAIL


def test_python_scalars_and_trees():
    def f(tree, gain):
        return {"y": jnp.sin(tree["a"][0]) * gain, "n": 3}

    check_vjp(f, ({"a": [X, jnp.array(1)]}, 2.0), level="quick").raise_if_failed(strict=True)


def test_a_tolerance_lets_a_rough_rule_pass():
    rough = jax.custom_vjp(jnp.sin)
    rough.defvjp(lambda x: (jnp.sin(x) * (1 + 1e-7), x), lambda x, c: (c * jnp.cos(x) * (1 + 1e-5),))
    report = quick(rough, X)
    assert {failure.check for failure in report.failures} == {"primal", "value", "elements"}
    quick(rough, X, tolerance=1e-4).raise_if_failed(strict=True)


def test_a_function_that_knows_float32_only():
    @jax.custom_vjp
    def f(x):
        if x.dtype == jnp.float64:
            raise TypeError("float32 is all I know")
        return jnp.sin(x)

    for factor, verdict in ((1.0, Verdict.PASS), (1 + 1e-3, Verdict.FAIL)):
        f.defvjp(lambda x: (jnp.sin(x), x), lambda x, c, factor=factor: (c * jnp.cos(x) * np.float32(factor),))
        report = check_vjp(f, (X.astype(jnp.float32),))
        assert report.of("elements") is verdict
        assert report.of("value") is Verdict.SKIP
        assert report.where["dtype"] == "float32"
        assert "checked in float32: TypeError: float32 is all I know" in str(report)


def test_outside_the_domain_of_f():
    report = check_vjp(jnp.log, (-X,), level="quick")
    (failure,) = report.failures
    assert failure.message.startswith("output of f is not finite at `args`")
