"""Each broken rule fails its named check, and the correct rule passes all checks."""

import functools

import jax
import jax.numpy as jnp
import pytest
from helpers import assert_close

from jaxseq.testing import CHECKS, Verdict, check_vjp, mutate
from jaxseq.testing._check import Session
from tests.support.broken_rules import BROKEN, arguments, broken, plain


@pytest.fixture(autouse=True)
def as_users_have_it():
    """Allow promotion of dtypes and ranks, since some of these rules have to fail a check because of it."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def args():
    return arguments(jax.random.key(3))


# Rules that fail a check in several comparisons, and the message of each comparison.
MESSAGES = {
    "nondeterministic at 1e-7": ("a different result, under jit", "a different result, under disable_jit"),
    "right in first order only": (
        "differs from the second derivative of",
        "differs from finite differences of the rule",
    ),
}


@pytest.mark.parametrize("wrong", BROKEN)
def test_fails_by_its_named_check(wrong, args):
    report = Session(broken(wrong), args).report(args, only=("contract", BROKEN[wrong]))
    assert report.of(BROKEN[wrong]) is Verdict.FAIL
    assert BROKEN[wrong] in {failure.check for failure in report.failures}
    for words in MESSAGES.get(wrong, ()):
        assert any(words in failure.message for failure in report.failures)


LEVELS = ["quick", pytest.param("full", marks=pytest.mark.long)]


@pytest.mark.parametrize("level", LEVELS)
def test_passes_where_nothing_is_broken(level, args):
    check_vjp(broken(), args, level=level).raise_if_failed(strict=True)


@pytest.mark.parametrize("level", LEVELS)
def test_a_broken_rule_fails_with_a_reference_too(level, args):
    report = check_vjp(broken("recurrent weight not transposed"), args, reference=plain, level=level)
    assert report.of("value") is report.of("elements") is Verdict.FAIL
    # Checks that would fail for the same reason are not reported.
    assert {failure.check for failure in report.failures} == {"value", "elements"}


# --- Mutants of a function with several outputs, a matrix, a container among its arguments, and integers ---


def pooled(params, xs, lengths):
    """Apply a linear map and a gate, and sum up to a length."""
    a = jnp.tanh(xs @ params["w"]) * jnp.broadcast_to(params["b"], (*xs.shape[:-1], xs.shape[-1]))
    inside = jnp.arange(xs.shape[0], dtype=lengths.dtype)[:, None] < lengths[None]
    return {"last": a[-1], "sum": jnp.where(inside[..., None], a, 0).sum(0)}, jnp.sum(lengths)


@pytest.fixture(scope="module")
def mixed():
    keys = jax.random.split(jax.random.key(5), 3)
    params = {"w": jax.random.normal(keys[0], (3, 3)) * 0.6, "b": 1 + jax.random.normal(keys[1], (3,)) * 0.3}
    return params, jax.random.normal(keys[2], (5, 2, 3)), jnp.array([4, 2], jnp.int32)


@functools.cache
def mutants():
    return mutate(pooled)


# The first mutant for each check, except for the two most expensive ones. The long tests run all mutants.
FIRST = set({mutant.check: name for name, mutant in reversed(mutants().items())}.values()) - {"axis of one", "low"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FIRST else [pytest.mark.long]) for name in mutants()]
)
def test_each_mutant_is_killed_by_its_check(name, mixed):
    mutant = mutants()[name]
    assert mutant.applies(*mixed)
    report = Session(mutant, mixed).report(mixed, only=("contract", mutant.check))
    assert report.of(mutant.check) is Verdict.FAIL, f"{mutant.description} passed:\n{report}"


@pytest.mark.parametrize("level", LEVELS)
def test_the_function_that_is_mutated_passes(level, mixed):
    check_vjp(pooled, mixed, level=level).raise_if_failed(strict=True)


def test_mutants_compute_what_the_function_does(mixed):
    expected = pooled(*mixed)
    for mutant in mutants().values():
        assert_close(mutant(*mixed), expected, relative=1e-14)
        assert mutant.check in CHECKS
        assert mutant.__name__ == f"pooled with {mutant.description}"


def test_a_mistake_that_can_not_be_made_says_so():
    x = (jnp.arange(1.0, 4.0),)
    applicable = {name for name, mutant in mutate(jnp.sin).items() if mutant.applies(*x)}
    assert {"sign", "stopped"} <= applicable
    assert not {"transposed", "spread", "output", "alone", "ranks promoted"} & applicable


@pytest.mark.other_types
def test_mutate_takes_functions_only():
    with pytest.raises(TypeError, match=r"`f`: expected a function, got int 3"):
        mutate(3)
