"""Results of a subject at one point, shared by several checks, and their comparison."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np

from jaxseq._types import ArrayOrScalar
from jaxseq.testing import _differences, _point
from jaxseq.testing._compare import Tolerance, compare, distance, largest
from jaxseq.testing._point import Args, Arrays, wide, zeros
from jaxseq.testing._report import Result, explain
from jaxseq.testing._subject import Subject, like

# Relative to the largest element of a leaf, in float64.
AGREE = 1e-10
# In lower precision, in units of eps sqrt(T), T the longest axis. Calibrated on the rules of jaxseq, 32 variants at 20
# seeds in float32, bfloat16 and float16: the maximum was 7.8, for a plain RNN without a bias; most were below 2.
LOW = 8.0
# Random probes for each leaf of the result.
PROBES = 2


def _finite(arrays: Sequence[ArrayOrScalar]) -> bool:
    return all(np.isfinite(a).all() for a in arrays)


class Numbers:
    """A subject at one point, with the results that several checks use.

    Attributes:
        x, rest: the differentiated and the other leaves of the arguments.
        patterns: the seeds by name; "joint" is the first and "zero" the last.
        primals: arrays with the shapes and dtypes of a seed.
        like: arrays with the shapes and dtypes of a result.
        asked: the differentiated leaves as passed, zeros included; x itself if there are no zeros.
        filled: the positions of the arguments in which random numbers replaced zeros.
        notes: remarks for the report.
    """

    def __init__(self, subject: Subject, args: Args, seed: int, tolerance: float | None):
        self.subject, self.seed, self.given = subject, seed, tolerance
        self.notes: list[str] = []
        self.rng = np.random.default_rng([seed, 3])
        self.x, self.rest = subject.ins.split(args)
        self.asked = self.x
        self.filled: tuple[int, ...] = ()
        outputs = jax.eval_shape(subject.on(self.rest), self.x)
        self.primals, self.like = (outputs, self.x) if subject.mode == "vjp" else (self.x, outputs)
        self.patterns = _point.patterns(self.primals, subject.seeds.names, seed)

    @property
    def leaves(self) -> tuple[str, ...]:
        """Names of the leaves of the result."""
        return self.subject.results.names

    @property
    def arguments(self) -> dict[int, str]:
        """Positions and names of the differentiated arguments."""
        return dict(zip(self.subject.ins.groups, self.subject.ins.arguments, strict=True))

    def random_seed(self) -> list[ArrayOrScalar]:
        return [_point.normal(self.rng, primal) for primal in self.primals]

    # --- Numbers ---

    @cached_property
    def by_rule(self) -> dict[str, list[ArrayOrScalar]]:
        """The result of the rule for each pattern."""
        return {name: wide(self.subject.by_rule(self.x, self.rest, s)[1]) for name, s in self.patterns.items()}

    @cached_property
    def true(self) -> dict[str, list[ArrayOrScalar]] | None:
        """The expected value of `by_rule`; None if there is no reference derivative."""
        if self.subject.source is None:
            return None
        try:
            return {name: wide(self.subject.by_truth(self.x, self.rest, s)[1]) for name, s in self.patterns.items()}
        except Exception as error:
            if self.subject.reference is not None:
                raise
            self.notes.append(
                f"JAX can't differentiate f without its rules, so only finite differences are used: {explain(error)}"
            )
            return None

    @cached_property
    def outputs(self) -> list[ArrayOrScalar]:
        """F(x) as computed together with the derivative, compiled."""
        return wide(self.subject.by_rule(self.x, self.rest, self.patterns["joint"])[0])

    @cached_property
    def true_outputs(self) -> list[ArrayOrScalar] | None:
        """The expected value of `outputs`; None if there is no reference."""
        if self.subject.reference is None:
            return None
        return wide(self.subject.by_truth(self.x, self.rest, self.patterns["joint"])[0])

    @cached_property
    def eager(self) -> tuple[list[ArrayOrScalar], list[ArrayOrScalar]] | None:
        """(F(x), result) for the joint seed, under `jax.disable_jit`; None if f does not run that way."""
        try:
            outputs, result = self.subject.eagerly(self.x, self.rest, self.patterns["joint"])
        except Exception as error:
            self.notes.append(f"f does not run under disable_jit: {explain(error)}")
            return None
        return wide(outputs), wide(result)

    @cached_property
    def rounding(self) -> tuple[list[float], list[float]]:
        """Changes of outputs and results by rounding, relative to their largest elements, here and at nearby points."""
        x, joint = wide(self.x), self.patterns["joint"]
        points = [self.x, *(like(self.x, _point.varied(self.rng, x)) for _ in range(2))]
        found = [self.rounding_at(point, joint) for point in points]
        outputs, results = ([max(leaf) for leaf in zip(*side, strict=True)] for side in zip(*found, strict=True))
        return outputs, results

    def rounding_at(self, x: Arrays, seed: Arrays) -> tuple[list[float], list[float]]:
        """Return `rounding` at x only. Perturbing x by a few eps changes the directions in `otherwise_rounded`."""
        s, eps = self.subject, max(float(jnp.finfo(a.dtype).eps) for a in x)
        exact = (s.by_rule if self.true is None else s.by_truth)(x, self.rest, seed)
        draws = [x, *(like(x, _point.varied(self.rng, wide(x), by=4 * eps)) for _ in range(2))]
        moved = [s.rounded(draw, self.rest, seed) for draw in draws]
        outputs, results = (
            [max(distance(e, m) for m in leaf) for e, *leaf in zip(*map(wide, sides), strict=True)]
            for sides in zip(exact, *moved, strict=True)
        )
        return outputs, results

    @cached_property
    def finite(self) -> bool:
        """Whether f is finite. True if its derivative raises, which other checks report."""
        try:
            return _finite(self.outputs)
        except Exception:
            return True

    @cached_property
    def undefined(self) -> str | None:
        """The reason if no rule can be checked here: f or its derivative by JAX raises or is not finite; else None.

        Used at points that the caller did not pass, where f need not be defined.
        """
        s, joint = self.subject, self.patterns["joint"]
        try:
            outputs, result = map(wide, s.by_rule(self.x, self.rest, joint))
        except Exception:
            return self.raising(self.x, joint)
        if not _finite(outputs):
            return "f is not finite"
        right = result if s.source is None and s.mode == "vjp" else (self.true or {}).get("joint", [])
        return None if _finite(right) else "the derivative that JAX computes is not finite"

    def raising(self, x: Arrays, seed: Arrays) -> str | None:
        """Describe what raises besides the rule: f itself or its derivative by JAX; None if neither raises."""
        s = self.subject
        by_jax = s.by_rule if s.source is None and s.mode == "vjp" else s.by_jax
        for what, run in (
            ("f itself", lambda: s.value(x, self.rest)),
            ("the derivative that JAX computes", lambda: by_jax(x, self.rest, seed)),
        ):
            try:
                run()
            except Exception as error:
                return f"{what} raises {explain(error)}"
        return None

    def measured(self, probes: Sequence[list[ArrayOrScalar]]) -> _differences.Differences:
        """Return <probe, result(seed)> for each probe and each pattern, by finite differences."""
        s, seeds = self.subject, list(self.patterns.values())
        if s.mode == "vjp":
            return s.differences("f", s.judged, self.x, self.rest, probes, seeds)
        found = s.differences("f", s.judged, self.x, self.rest, seeds, probes)
        return _differences.Differences(*(part.T for part in found))

    def probes(self, draw: Callable[[int], ArrayOrScalar]) -> list[list[ArrayOrScalar]]:
        """Return PROBES probes for each leaf n of the result: `draw(n)` on that leaf and zero on all others."""
        nothing = zeros(self.like)
        each = range(len(nothing))
        return [[draw(n) if m == n else nothing[m] for m in each] for n in each for _ in range(PROBES)]

    # --- Comparison ---

    def agree_on_outputs(
        self, check: str, got: Arrays, expected: Arrays, message: str, *, exact: Tolerance | None = None
    ) -> Iterator[Result]:
        """Compare outputs; `message` may contain {output}. Outputs are columns of the table in forward mode only.

        `exact` is a tolerance that rounding does not widen.
        """
        for n, (name, a, e) in enumerate(zip(self.subject.outs.names, wide(got), wide(expected), strict=True)):
            rounding = lambda n=n, e=e: self.rounding[0][n] * largest(e)  # noqa: E731
            text, tolerance = message.format(output=name), exact or self.tolerance()
            result = compare(check, name, a, e, tolerance, text, rounding=None if exact else rounding, seed=self.seed)
            yield result if name in self.leaves else result._replace(leaf=None)

    def tolerance(self, dtype: np.dtype | None = None) -> Tolerance:
        """Return the tolerance between two ways to compute the same leaf."""
        dtype = self.subject.dtype if dtype is None else np.dtype(dtype)
        if dtype == np.float64:
            base = Tolerance(AGREE, f"{AGREE:.0e} of the leaf's largest element")
        else:
            longest = max((n for a in (*self.x, *self.primals) for n in a.shape), default=1)
            c = LOW * max(longest, 1) ** 0.5
            base = Tolerance(c * float(jnp.finfo(dtype).eps), f"{c:.0f} eps of {dtype} of the leaf's largest element")
        if self.given is not None and self.given > base.relative:
            return Tolerance(self.given, "`tolerance` times the leaf's largest element")
        return base

    def gross(self, leaf: int) -> float:
        """Return the largest element of a leaf of the result, over all patterns."""
        return max(largest(result[leaf]) for result in (self.true or self.by_rule).values())

    def rounding_of(self, leaf: int) -> float:
        """Return the change of a leaf of the result by rounding."""
        return self.rounding[1][leaf] * self.gross(leaf)

    def tolerance_of(self, leaf: int) -> Tolerance:
        """Return the tolerance of a leaf at this point. The floor is eps times its largest element over all seeds."""
        return self.tolerance()._replace(floor=float(jnp.finfo(self.subject.dtype).eps) * self.gross(leaf))

    def agree(
        self,
        check: str,
        got: Arrays,
        expected: Arrays,
        message: str,
        rounding: Callable[[int], float] | None = None,
    ) -> Iterator[Result]:
        """Compare two results leaf by leaf. `rounding(leaf)` replaces the effect of rounding at this point."""
        for n, (a, e) in enumerate(zip(wide(got), wide(expected), strict=True)):
            yield self.agree_on(n, check, a, e, message, rounding)

    def agree_on(
        self,
        leaf: int,
        check: str,
        got: ArrayOrScalar,
        expected: ArrayOrScalar,
        message: str,
        rounding: Callable[[int], float] | None = None,
    ) -> Result:
        """Compare one leaf of two results."""
        return compare(
            check,
            self.leaves[leaf],
            got,
            expected,
            self.tolerance_of(leaf),
            message,
            rounding=lambda: (rounding or self.rounding_of)(leaf),
            seed=self.seed,
        )
