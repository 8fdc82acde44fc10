"""Checks of numbers at one point: primal, value, elements, linearity, determinism, power."""

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

BITWISE = Tolerance(0.0, "equal to the bit")
# A forward pass may compute the same outputs in another way (LAPACK's singular values with and without vectors).
LAST_BITS = 64


def primal(trial: Trial) -> Iterator[Result]:
    """f(x) as it stands, and as it comes with the derivative."""
    s, check = trial.subject, "primal"
    different = "{output} is another number when f is differentiated, "
    if trial.eager is not None:
        with jax.disable_jit():
            plain = wide(s.on(trial.rest)(trial.x))
        bound = Tolerance(LAST_BITS * float(jnp.finfo(s.dtype).eps), f"{LAST_BITS} eps of the leaf's largest element")
        exact = {"tolerance": bound, "rounding": None} if trial.given is None else {}
        message = f"{different}run one operation after the other"
        yield from trial.agree_on_outputs(check, trial.eager[0], plain, message, **exact)
    else:
        plain = wide(s.value(trial.x, trial.rest))
        yield Result(check, None, Verdict.PASS, "compared within rounding only")
    yield from trial.agree_on_outputs(check, trial.outputs, plain, f"{different}under jit")


def value(trial: Trial) -> Iterator[Result]:
    """<result(seed), probe> for random probes, against differences."""
    if trial.by_differences is None:
        yield Result("value", None, Verdict.SKIP, f"differences of {trial.subject.dtype} numbers decide nothing")
    else:
        yield from _weigh(trial, "value", trial.by_differences)


def elements(trial: Trial) -> Iterator[Result]:
    """Every element of the result for every seed, against the truth; without one, some elements by differences."""
    if trial.by_elements is None:
        yield Result("elements", None, Verdict.SKIP, "there is no reference, and no float64 to take differences in")
    else:
        yield from _weigh(trial, "elements", trial.by_elements)
    if trial.true_outputs is not None:
        message = "{output} is not what the reference computes"
        yield from trial.agree_on_outputs("elements", trial.outputs, trial.true_outputs, message)


def power(trial: Trial) -> Iterator[Result]:
    """Whether the two checks above would have seen a wrong gradient."""
    for n, leaf in enumerate(trial.leaves):
        yield _powered("power", trial, n, leaf, trial.evidence)
    for seed in trial.subject.seeds.names if len(trial.primals) > 1 else ():
        results = trial.by_hand[f"{seed} alone"]
        seen = [e.against(n, np.zeros_like, f"{seed} alone") for n in range(len(results)) for e in trial.evidence]
        if not any(seen) and any(primal.size for primal in trial.primals):
            note = f"a rule that ignores {seed} would have passed too"
            yield Result("power", None, Verdict.INCONCLUSIVE, note)


def linearity(trial: Trial) -> Iterator[Result]:
    """result(2a - b/2) = 2 result(a) - result(b)/2 for seeds of all leaves jointly, and zero gives zero."""
    s, check = trial.subject, "linearity"
    a, b = trial.random_seed(), trial.random_seed()
    of_a, of_b, of_sum = (
        wide(s.by_hand(trial.x, trial.rest, seed)[1])
        for seed in (a, b, [2 * left - right / 2 for left, right in zip(a, b, strict=True)])
    )
    for n, leaf in enumerate(trial.leaves):
        expected = 2 * of_a[n] - of_b[n] / 2
        # Terms may cancel; what counts is how large they are.
        floor = trial.tolerance_of(n).relative * (2 * largest(of_a[n]) + largest(of_b[n]) / 2)
        tolerance = trial.tolerance_of(n)._replace(floor=floor)
        message = "result(2a - b/2) is not 2 result(a) - result(b)/2 for random a and b"
        rounding = lambda n=n: trial.rounding_of(n)  # noqa: E731
        yield compare(check, leaf, of_sum[n], expected, tolerance, message, rounding=rounding, seed=trial.seed)
        zero, message = trial.by_hand["zero"][n], "the result for a cotangent of zero is not zero"
        yield compare(check, leaf, zero, np.zeros_like(zero), BITWISE, message, seed=trial.seed, pattern="zero")
    yield from _scaled(trial, a, of_a)


# Powers of two, by which every right rule scales to the bit, but for logarithms and the like. The outer ones lie beyond
# the eps of float64, which some thresholds are made of; lower dtypes have no room for them.
SCALES = (-60, -20, 20, 60)


def _scaled(trial: Trial, seed: list[ArrayOrScalar], result: list[ArrayOrScalar]) -> Iterator[Result]:
    """result(2^k c) = 2^k result(c): cotangents of a loss may be of any size, not of about one alone."""
    s, check = trial.subject, "linearity"
    info = np.finfo(s.dtype)
    for k in SCALES if s.dtype == np.float64 else SCALES[1:3]:
        scaled = wide(s.by_hand(trial.x, trial.rest, [c * 2.0**k for c in seed])[1])
        for n, (leaf, got, expected) in enumerate(zip(trial.leaves, scaled, result, strict=True)):
            size = largest(expected) * 2.0**k
            if size and not float(info.tiny / info.eps) < size < float(info.max):
                yield Result(check, leaf, Verdict.SKIP, f"for cotangents of 2^{k} it leaves the range of {s.dtype}")
                continue
            message = f"result(2^{k} c) is not 2^{k} result(c) for a random c: is it cut off at some size?"
            rounding = lambda n=n: trial.rounding_of(n)  # noqa: E731
            tolerance = trial.tolerance_of(n)
            yield compare(check, leaf, got * 2.0**-k, expected, tolerance, message, rounding=rounding, seed=trial.seed)


def determinism(trial: Trial) -> Iterator[Result]:
    """Twice the same, bit for bit, with a call for other arguments in between."""
    s, check, seed = trial.subject, "determinism", trial.patterns["joint"]
    other = like(trial.x, _point.varied(trial.rng, wide(trial.x)))
    s.by_hand(other, trial.rest, seed)
    message = "the second of two equal calls gives another result, under jit"
    # On an accelerator atomic sums may come in any order.
    exact = BITWISE if jax.default_backend() == "cpu" else trial.tolerance()
    again = wide(s.by_hand(trial.x, trial.rest, seed)[1])
    for leaf, now, before in zip(trial.leaves, again, trial.by_hand["joint"], strict=True):
        yield compare(check, leaf, now, before, exact, message, seed=trial.seed, pattern="joint")
    if trial.eager is None:
        return
    with jax.disable_jit():
        F = s.on(trial.rest)
        first, _, second = (wide(F(x)) for x in (trial.x, other, trial.x))
        if s.mode == "vjp":
            # A rule that remembers its last call instead of its residuals is found out here.
            outputs, pull = jax.vjp(F, trial.x)
            jax.vjp(F, other)
            again = wide(pull(like(outputs, seed))[0])
        else:
            derivative(s.mode, F)(other, seed)
            again = wide(derivative(s.mode, F)(trial.x, seed)[1])
    message = "the second of two equal calls gives another result, run one operation after the other"
    for leaf, now, before in zip(trial.leaves, again, trial.eager[1], strict=True):
        yield compare(check, leaf, now, before, exact, message, seed=trial.seed, pattern="joint")
    message = "f itself gives another {output} when it is called again: does it have side effects?"
    yield from trial.agree_on_outputs(check, second, first, message, tolerance=exact, rounding=None)


def transpose(trial: Trial) -> Iterator[Result]:
    """<c, jvp(u)> = <vjp(c), u> for random c and u."""
    s, check = trial.subject, "transpose"
    u, c = trial.random_seed(), [_point.normal(trial.rng, a) for a in trial.like]
    reverse = s.program("reverse mode", lambda x, rest, c: derivative("vjp", s.on(rest))(x, c)[1])
    try:
        backward = wide(reverse(trial.x, trial.rest, c))
    except Exception as error:
        yield Result(check, None, Verdict.SKIP, f"f has no reverse mode: {explain(error)}")
        return
    forward = wide(s.by_hand(trial.x, trial.rest, u)[1])
    left = np.array([np.sum(a * b).real for a, b in zip(forward, c, strict=True)])
    right = np.array([np.sum(a * b).real for a, b in zip(backward, u, strict=True)])
    tolerance = trial.tolerance()
    floor = tolerance.relative * float(np.abs(left).sum() + np.abs(right).sum())
    message = "<c, jvp(u)> is not <vjp(c), u> for random c and u"
    yield compare(check, None, left.sum(), right.sum(), tolerance._replace(floor=floor), message, seed=trial.seed)


# --- How evidence becomes a verdict ---


def _weigh(trial: Trial, check: str, evidence: _evidence.Evidence) -> Iterator[Result]:
    for n, leaf in enumerate(trial.leaves):
        failure = evidence.against(n)
        if failure is None:
            yield _powered(check, trial, n, leaf, [evidence])
        else:
            yield _convicted(trial, n, replace(failure, check=check, argument=leaf, seed=trial.seed))


def _powered(check: str, trial: Trial, n: int, leaf: str, evidence: list[_evidence.Evidence]) -> Result:
    """PASS where the evidence would have seen a wrong gradient, else INCONCLUSIVE."""
    if not trial.by_hand["joint"][n].size:
        return Result(check, leaf, Verdict.SKIP, "it has no element")
    blind = _evidence.powerless(trial, n, evidence)
    if not blind:
        return Result(check, leaf, Verdict.PASS)
    return Result(check, leaf, Verdict.INCONCLUSIVE, f"a {' or '.join(blind)} gradient would have passed too")


def _convicted(trial: Trial, n: int, failure: Failure) -> Result:
    """The failure with all that can be said about it."""
    s, check, leaf, pattern = trial.subject, failure.check, failure.argument, failure.pattern
    assert pattern is not None
    got = trial.by_hand[pattern][n]
    if trial.true is None:
        diagnosis = failure.diagnosis
    else:
        diagnosis = fit_seed(got, _truth_of(trial, n), trial.patterns[pattern], s.seeds.names) or fit(
            got, trial.true[pattern][n]
        )
    failure = replace(failure, diagnosis=diagnosis)
    if failure.by_hand is None or failure.by_reference is None or failure.index is None or not trial.by_differences:
        return Result(check, leaf, Verdict.FAIL, failure=failure)

    # Ask differences about the worst element as well.
    found = trial.measured(trial.probes(lambda m: _evidence.one_hot(trial.like[m], failure.index if m == n else None)))
    at = n * _evidence.PROBES, list(trial.patterns).index(pattern)
    by_differences, error, S = (float(part[at]) for part in (found.value, found.error, found.scale))
    hand, reference = complex(failure.by_hand).real, complex(failure.by_reference).real
    allowed = _evidence.differ(trial.given, S, error)
    if s.reference is None and abs(hand - by_differences) <= allowed < abs(reference - by_differences):
        note = "differences agree with the rule where JAX, differentiating what f computes, is off"
        return Result(check, leaf, Verdict.PASS, note)
    failure = replace(failure, by_differences=by_differences, error=error, repro=_repro(trial, n, failure))
    return Result(check, leaf, Verdict.FAIL, failure=failure)


def _truth_of(trial: Trial, n: int) -> Callable[[list[ArrayOrScalar]], ArrayOrScalar]:
    """The right leaf n of the result, for any seed."""
    return lambda seed: wide(trial.subject.by_truth(trial.x, trial.rest, seed)[1])[n]


def _repro(trial: Trial, n: int, failure: Failure) -> str | None:
    """Code that prints the number by hand once more."""
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
