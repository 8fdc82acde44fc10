"""Numerical checks at one point: primal, value, elements, linearity, determinism, power, transpose."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxseq._types import ArrayOrScalar
from jaxseq.testing import _evidence, _point
from jaxseq.testing._compare import Tolerance, compare, largest
from jaxseq.testing._diagnosis import fit, fit_seed
from jaxseq.testing._point import wide
from jaxseq.testing._report import Failure, Result, Verdict, explain
from jaxseq.testing._subject import derivative, like
from jaxseq.testing._trial import Trial

BITWISE = Tolerance(0.0, "bitwise equality")
# The forward pass may use another algorithm (LAPACK computes singular values differently with and without vectors).
LAST_BITS = 64


def primal(trial: Trial) -> Iterator[Result]:
    """Compare f(x) with the value that is computed together with the derivative."""
    s, check = trial.subject, "primal"
    different = "{output} has another value when f is differentiated, "
    if trial.eager is not None:
        with jax.disable_jit():
            plain = wide(s.on(trial.rest)(trial.x))
        bound = Tolerance(LAST_BITS * float(jnp.finfo(s.dtype).eps), f"{LAST_BITS} eps of the leaf's largest element")
        exact = bound if trial.given is None else None
        message = f"{different}under disable_jit"
        yield from trial.agree_on_outputs(check, trial.eager[0], plain, message, exact=exact)
    else:
        plain = wide(s.value(trial.x, trial.rest))
        yield Result(check, None, Verdict.PASS, "compared only up to rounding")
    yield from trial.agree_on_outputs(check, trial.outputs, plain, f"{different}under jit")


def value(trial: Trial) -> Iterator[Result]:
    """Compare <result(seed), probe> for random probes with finite differences."""
    if trial.by_differences is None:
        yield Result("value", None, Verdict.SKIP, f"finite differences in {trial.subject.dtype} are too inaccurate")
    else:
        yield from _verdicts(trial, "value", trial.by_differences)


def elements(trial: Trial) -> Iterator[Result]:
    """Compare every element with the expected derivative, or without one, some elements with finite differences."""
    if trial.by_elements is None:
        yield Result("elements", None, Verdict.SKIP, "there is no reference, and finite differences need float64")
    else:
        yield from _verdicts(trial, "elements", trial.by_elements)
    if trial.true_outputs is not None:
        message = "{output} differs from that of the reference"
        yield from trial.agree_on_outputs("elements", trial.outputs, trial.true_outputs, message)


def power(trial: Trial) -> Iterator[Result]:
    """Check that `value` and `elements` would have detected a wrong gradient."""
    for n, leaf in enumerate(trial.leaves):
        yield _pass_or_inconclusive("power", trial, n, leaf, trial.evidence)
    for seed in trial.subject.seeds.names if len(trial.primals) > 1 else ():
        results = trial.by_rule[f"{seed} alone"]
        found = [e.against(n, np.zeros_like, f"{seed} alone") for n in range(len(results)) for e in trial.evidence]
        if not any(found) and any(primal.size for primal in trial.primals):
            note = f"a rule that ignores {seed} would also have passed"
            yield Result("power", None, Verdict.INCONCLUSIVE, note)


def linearity(trial: Trial) -> Iterator[Result]:
    """Check result(2a - b/2) = 2 result(a) - result(b)/2 for joint seeds a and b, and result(0) = 0."""
    s, check = trial.subject, "linearity"
    a, b = trial.random_seed(), trial.random_seed()
    of_a, of_b, of_sum = (
        wide(s.by_rule(trial.x, trial.rest, seed)[1])
        for seed in (a, b, [2 * left - right / 2 for left, right in zip(a, b, strict=True)])
    )
    for n, leaf in enumerate(trial.leaves):
        expected = 2 * of_a[n] - of_b[n] / 2
        # Terms may cancel, so the tolerance is relative to their absolute values.
        floor = trial.tolerance_of(n).relative * (2 * largest(of_a[n]) + largest(of_b[n]) / 2)
        tolerance = trial.tolerance_of(n)._replace(floor=floor)
        message = "result(2a - b/2) differs from 2 result(a) - result(b)/2 for random a and b"
        rounding = lambda n=n: trial.rounding_of(n)  # noqa: E731
        yield compare(check, leaf, of_sum[n], expected, tolerance, message, rounding=rounding, seed=trial.seed)
        zero, message = trial.by_rule["zero"][n], "the result for a cotangent of zero is not zero"
        yield compare(check, leaf, zero, np.zeros_like(zero), BITWISE, message, seed=trial.seed, pattern="zero")
    yield from _scaled(trial, a, of_a)


# Exponents of two: a correct rule scales exactly by powers of two, except through logarithms and similar functions. The
# outer ones exceed the eps of float64, a common threshold, and the range of lower dtypes.
SCALES = (-60, -20, 20, 60)


def _scaled(trial: Trial, seed: list[ArrayOrScalar], result: list[ArrayOrScalar]) -> Iterator[Result]:
    """Check result(2^k c) = 2^k result(c): the cotangents of a loss may have any scale."""
    s, check = trial.subject, "linearity"
    info = np.finfo(s.dtype)
    for k in SCALES if s.dtype == np.float64 else SCALES[1:3]:
        scaled = wide(s.by_rule(trial.x, trial.rest, [c * 2.0**k for c in seed])[1])
        for n, (leaf, got, expected) in enumerate(zip(trial.leaves, scaled, result, strict=True)):
            size = largest(expected) * 2.0**k
            if size and not float(info.tiny / info.eps) < size < float(info.max):
                yield Result(
                    check, leaf, Verdict.SKIP, f"for cotangents times 2^{k} it is out of the range of {s.dtype}"
                )
                continue
            message = f"result(2^{k} c) differs from 2^{k} result(c) for a random c: does the rule clip or threshold?"
            rounding = lambda n=n: trial.rounding_of(n)  # noqa: E731
            tolerance = trial.tolerance_of(n)
            yield compare(check, leaf, got * 2.0**-k, expected, tolerance, message, rounding=rounding, seed=trial.seed)


def determinism(trial: Trial) -> Iterator[Result]:
    """Check that two equal calls give bitwise equal results, with a call for other arguments in between."""
    s, check, seed = trial.subject, "determinism", trial.patterns["joint"]
    other = like(trial.x, _point.varied(trial.rng, wide(trial.x)))
    s.by_rule(other, trial.rest, seed)
    message = "the second of two equal calls gives a different result, under jit"
    # On accelerators, the order of atomic additions is not fixed.
    exact = BITWISE if jax.default_backend() == "cpu" else trial.tolerance()
    again = wide(s.by_rule(trial.x, trial.rest, seed)[1])
    for leaf, now, before in zip(trial.leaves, again, trial.by_rule["joint"], strict=True):
        yield compare(check, leaf, now, before, exact, message, seed=trial.seed, pattern="joint")
    if trial.eager is None:
        return
    with jax.disable_jit():
        F = s.on(trial.rest)
        first, _, second = (wide(F(x)) for x in (trial.x, other, trial.x))
        if s.mode == "vjp":
            # Detects a rule that uses state from its last call instead of its residuals.
            outputs, pull = jax.vjp(F, trial.x)
            jax.vjp(F, other)
            again = wide(pull(like(outputs, seed))[0])
        else:
            derivative(s.mode, F)(other, seed)
            again = wide(derivative(s.mode, F)(trial.x, seed)[1])
    message = "the second of two equal calls gives a different result, under disable_jit"
    for leaf, now, before in zip(trial.leaves, again, trial.eager[1], strict=True):
        yield compare(check, leaf, now, before, exact, message, seed=trial.seed, pattern="joint")
    message = "f itself returns a different {output} when it is called again: does it have side effects?"
    yield from trial.agree_on_outputs(check, second, first, message, exact=exact)


def transpose(trial: Trial) -> Iterator[Result]:
    """Check <c, jvp(u)> = <vjp(c), u> for random c and u: one of the two is the mode under test.

    A `jax.custom_vjp` has no forward mode, and no result.
    """
    s, check = trial.subject, "transpose"
    seed, probe = trial.random_seed(), [_point.normal(trial.rng, a) for a in trial.like]
    mode, word = ("vjp", "reverse") if s.mode == "jvp" else ("jvp", "forward")
    other = s.program(f"{word} mode", lambda x, rest, seed: derivative(mode, s.on(rest))(x, seed)[1])
    try:
        by_other = wide(other(trial.x, trial.rest, probe))
    except Exception as error:
        if mode == "vjp" or "forward-mode" not in str(error):
            yield Result(check, None, Verdict.SKIP, f"f has no {word} mode: {explain(error)}")
        return
    by_rule = wide(s.by_rule(trial.x, trial.rest, seed)[1])
    left = np.array([np.sum(a * b).real for a, b in zip(by_rule, probe, strict=True)])
    right = np.array([np.sum(a * b).real for a, b in zip(by_other, seed, strict=True)])
    tolerance = trial.tolerance()
    floor = tolerance.relative * float(np.abs(left).sum() + np.abs(right).sum())
    message = "<c, jvp(u)> differs from <vjp(c), u> for random c and u"
    yield compare(check, None, left.sum(), right.sum(), tolerance._replace(floor=floor), message, seed=trial.seed)


# --- From evidence to verdicts ---


def _verdicts(trial: Trial, check: str, evidence: _evidence.Evidence) -> Iterator[Result]:
    for n, leaf in enumerate(trial.leaves):
        failure = evidence.against(n)
        if failure is None:
            yield _pass_or_inconclusive(check, trial, n, leaf, [evidence])
        else:
            yield _complete(trial, n, replace(failure, check=check, argument=leaf, seed=trial.seed))


def _pass_or_inconclusive(check: str, trial: Trial, n: int, leaf: str, evidence: list[_evidence.Evidence]) -> Result:
    """Return PASS if the evidence would have contradicted a wrong gradient, else INCONCLUSIVE."""
    if not trial.by_rule["joint"][n].size:
        return Result(check, leaf, Verdict.SKIP, "it has no elements")
    blind = _evidence.powerless(trial, n, evidence)
    if not blind:
        return Result(check, leaf, Verdict.PASS)
    return Result(check, leaf, Verdict.INCONCLUSIVE, f"a {' or '.join(blind)} gradient would also have passed")


def _complete(trial: Trial, n: int, failure: Failure) -> Result:
    """Complete a failure with a diagnosis, finite differences and code to reproduce it.

    Return PASS if finite differences confirm the rule and contradict the derivative by JAX.
    """
    s, check, leaf, pattern = trial.subject, failure.check, failure.argument, failure.pattern
    assert pattern is not None
    got = trial.by_rule[pattern][n]
    if trial.true is None:
        diagnosis = failure.diagnosis
    else:
        diagnosis = fit_seed(got, _truth_of(trial, n), trial.patterns[pattern], s.seeds.names) or fit(
            got, trial.true[pattern][n]
        )
    failure = replace(failure, diagnosis=diagnosis)
    if failure.by_rule is None or failure.by_reference is None or failure.index is None or not trial.by_differences:
        return Result(check, leaf, Verdict.FAIL, failure=failure)

    # Compute the worst element by finite differences as well.
    found = trial.measured(trial.probes(lambda m: _evidence.one_hot(trial.like[m], failure.index if m == n else None)))
    at = n * _evidence.PROBES, list(trial.patterns).index(pattern)
    by_differences, error, S = (float(part[at]) for part in (found.value, found.error, found.scale))
    hand, reference = complex(failure.by_rule).real, complex(failure.by_reference).real
    allowed = _evidence.differ(trial.given, S, error)
    if s.reference is None and abs(hand - by_differences) <= allowed < abs(reference - by_differences):
        note = "finite differences agree with the rule; the derivative by JAX of what f computes is inaccurate here"
        return Result(check, leaf, Verdict.PASS, note)
    failure = replace(failure, by_differences=by_differences, error=error, repro=_repro(trial, n, failure))
    return Result(check, leaf, Verdict.FAIL, failure=failure)


def _truth_of(trial: Trial, n: int) -> Callable[[list[ArrayOrScalar]], ArrayOrScalar]:
    """Return a function from seeds to leaf n of the expected result."""
    return lambda seed: wide(trial.subject.by_truth(trial.x, trial.rest, seed)[1])[n]


def _repro(trial: Trial, n: int, failure: Failure) -> str | None:
    """Return code that prints the value of the rule at the worst element."""
    if trial.subject.mode != "vjp" or failure.index is None:
        return None
    index = ", ".join(map(str, failure.index)) or "..."
    whole = trial.filled and not any(map(_point.inexact, trial.rest))
    only = "" if whole else f", argnums={tuple(trial.filled)}"
    return (
        "import jax\n"
        "from jaxseq.testing import cotangents, lifted\n"
        "with jax.enable_x64(True):\n"
        f"    outputs, pull = jax.vjp(f, *lifted(args, seed={trial.seed}{only}))\n"
        f"    gradients = pull(cotangents(outputs, {failure.pattern!r}, seed={trial.seed}))\n"
        f"    print(gradients{trial.subject.ins.places[n]}[{index}])"
    )
