"""The check "order 2": the derivative of the derivative.

With G(x) the result for one seed, three numbers must agree for a direction u and any d with the shape of the result:

    <d, D_u G>            by finite differences of G
    <d, G'(x) u>          forward over the rule
    <G'(x)ᵀ d, u>         reverse over the rule

A rule that stops the gradient of its residuals, or whose fwd calls the decorated function, passes every check of order
1 and fails this one. For a truncated gradient, G is not the derivative of f; the finite differences then use the
substitute for f (`Subject.judged`).
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache

import jax
import numpy as np

from jaxseq._types import ArrayOrScalar
from jaxseq.testing._compare import DECIDES, compare, largest
from jaxseq.testing._evidence import DIFFER_ORIGIN, differ
from jaxseq.testing._point import Arrays, normal, wide, zeros
from jaxseq.testing._report import Failure, Result, Verdict, explain
from jaxseq.testing._rounding import otherwise_rounded
from jaxseq.testing._subject import Function, derivative, like
from jaxseq.testing._trial import Trial

CHECK = "order 2"


def order_2(trial: Trial) -> Iterator[Result]:
    """Compare forward and reverse over the rule with finite differences and with the expected second derivative."""
    s, x, seed = trial.subject, trial.x, trial.patterns["joint"]
    d = [normal(trial.rng, a) for a in trial.like]

    def result(F: Function, c: Arrays) -> Function:
        return lambda x: derivative(s.mode, F)(x, c)[1]

    def forward(x: Arrays, rest: Arrays, c: Arrays, u: Arrays) -> tuple[Arrays, Arrays]:
        # Include the outputs: their tangents come from fwd, and raise if fwd calls the decorated function.
        return jax.jvp(lambda x: derivative(s.mode, s.on(rest))(x, c), (x,), (like(x, u),))[1]

    def reverse(x: Arrays, rest: Arrays, c: Arrays, d: Arrays) -> tuple[Arrays, Arrays]:
        G, pull = jax.vjp(lambda x, c: result(s.on(rest), c)(x), x, like(trial.primals, c))
        return pull(like(G, d))

    def true(x: Arrays, rest: Arrays, c: Arrays, d: Arrays) -> Arrays:
        G, pull = jax.vjp(result(s.truth(x, rest) if s.source else s.on(rest), c), x)
        return pull(like(G, d))[0]

    # One direction for each leaf of the arguments, zero on all other leaves.
    directions = [zeros(x) for _ in x]
    for n, u in enumerate(directions):
        u[n] = normal(trial.rng, x[n])
    at = x, trial.rest, seed
    found = {}
    for name, run in (
        ("forward", lambda: [_inner(s.program("forward", forward)(*at, u)[1], d) for u in directions]),
        ("reverse", lambda: s.program("reverse", reverse)(*at, d)),
    ):
        try:
            found[name] = run()
        except Exception as error:
            message = f"{name} over the rule raises {explain(error)} (order=1 skips this check)"
            yield Result(CHECK, None, Verdict.FAIL, failure=Failure(CHECK, message))

    @cache
    def rounding() -> list[float]:
        """Return the change of each leaf of the second derivative by rounding."""
        exact, moved = (wide(run(*at, d)) for run in (s.program("true", true), s.program("moved", moved_true)))
        return [largest(a - b) for a, b in zip(exact, moved, strict=True)]

    moved_true = otherwise_rounded(true)
    if "reverse" in found:
        to_x, to_c = (wide(part) for part in found["reverse"])
        yield _to_seed(trial, to_c, d)
        if trial.true is not None and not trial.wrong:
            yield from _as_truth(trial, to_x, wide(s.program("true", true)(*at, d)), rounding)
        found["reverse"] = [float(np.sum(to_x[n] * u[n]).real) for n, u in enumerate(directions)]
    if s.dtype == np.float64 and found:
        G = lambda x, given: result(s.judged(x, given[0]), given[1])  # noqa: E731
        measured = s.differences("the derivative", G, x, (trial.rest, seed), directions, [d])
        for n, leaf in enumerate(s.ins.names):
            excuse = lambda n=n: rounding()[n] * float(np.linalg.norm(directions[n][n]))  # noqa: E731
            for name, values in found.items():
                against = [float(a[n, 0]) for a in (measured.value, measured.error, measured.scale)]
                yield _by_differences(trial, leaf, name, values[n], against, excuse)


def _by_differences(
    trial: Trial, leaf: str, name: str, got: float, measured: Sequence[float], rounding: Callable[[], float]
) -> Result:
    value, error, S = measured
    column = leaf if leaf in trial.leaves else None
    bound = differ(trial.given, S, error)
    if not abs(got - value) <= bound:
        bound += 10 * rounding()
    if not abs(got - value) <= bound:
        failure = Failure(
            CHECK,
            f"{name} over the rule, in the direction of {leaf}, differs from finite differences of the rule",
            column,
            pattern="joint",
            by_rule=got,
            by_differences=value,
            error=error,
            ratio=got / value if value else None,
            tolerance=bound,
            origin=DIFFER_ORIGIN,
            seed=trial.seed,
        )
        return Result(CHECK, column, Verdict.FAIL, failure=failure)
    # If the rule does not depend on the leaf, S is zero and there is no gradient to miss.
    if S and bound > DECIDES * S:
        return Result(
            CHECK, column, Verdict.INCONCLUSIVE, f"finite differences of the rule in {leaf} are too inaccurate here"
        )
    return Result(CHECK, column, Verdict.PASS)


def _to_seed(trial: Trial, to_c: list[ArrayOrScalar], d: list[ArrayOrScalar]) -> Result:
    """Check the cotangent of the seed. result is linear, so <d, result(c)> = <cotangent of the seed, c> for all c."""
    message = "the cotangent of the seed, by reverse over the rule, is not the transpose of the rule"
    results = []
    for pattern, seed in trial.patterns.items():
        got, expected = (np.array(_inner(a, b)) for a, b in ((to_c, seed), (trial.by_rule[pattern], d)))
        # Products may cancel, so the tolerance is relative to their absolute values.
        gross = sum(float(np.sum(np.abs(a * b))) for a, b in zip(trial.by_rule[pattern], d, strict=True))
        tolerance = trial.tolerance()._replace(floor=trial.tolerance().relative * gross)
        rounding = lambda: sum(trial.rounding_of(n) * float(np.linalg.norm(leaf)) for n, leaf in enumerate(d))  # noqa: E731
        known = {"rounding": rounding, "pattern": pattern, "seed": trial.seed}
        results.append(compare(CHECK, None, got, expected, tolerance, message, **known))
    return min(results, key=lambda result: list(Verdict).index(result.verdict))


def _as_truth(
    trial: Trial, got: list[ArrayOrScalar], expected: list[ArrayOrScalar], rounding: Callable[[], list[float]]
) -> Iterator[Result]:
    message = f"reverse over the rule differs from the second derivative of {trial.subject.source}"
    base = trial.tolerance()
    tolerance = base._replace(relative=10 * base.relative, origin=f"ten times {base.origin}")
    for n, (leaf, a, e) in enumerate(zip(trial.subject.ins.names, got, expected, strict=True)):
        known = {"rounding": lambda n=n: rounding()[n], "seed": trial.seed, "pattern": "joint"}
        result = compare(CHECK, leaf, a, e, tolerance, message, **known)
        yield result if leaf in trial.leaves else result._replace(leaf=None)


def _inner(a: Arrays, b: list[ArrayOrScalar]) -> float:
    return float(sum(np.sum(p * q).real for p, q in zip(wide(a), b, strict=True)))
