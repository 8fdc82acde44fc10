"""A subject at one point: the numbers that several checks look at, and when two of them agree."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxseq._types import ArrayOrScalar
from jaxseq.testing import _differences, _point
from jaxseq.testing._compare import Tolerance, compare, distance, largest
from jaxseq.testing._point import Arrays, wide, zeros
from jaxseq.testing._report import Result, explain
from jaxseq.testing._subject import Subject, like

# Relative to the largest element of a leaf, in float64.
AGREE = 1e-10
# In lower precision, in units of eps sqrt(T), T the longest axis. Calibrated on the rules of this library, 32 variants
# at 20 seeds in float32, bfloat16 and float16: 7.8 at most, of a plain RNN without a bias; mostly below 2.
LOW = 8.0
# Random probes for each leaf of the result.
PROBES = 2


def _finite(arrays: Sequence[ArrayOrScalar]) -> bool:
    return all(np.isfinite(a).all() for a in arrays)


class Numbers:
    """A subject at one point, with the numbers that several checks look at.

    Attributes:
        x, rest: the differentiated and the other leaves of the arguments.
        patterns: the seeds by name, "joint" the first and "zero" the last.
        primals: what a seed looks like; `like`: what a result looks like.
        asked: the same leaves as the caller gave them, zeros and all; x itself where there are none.
        filled: the arguments in which random numbers took the place of zeros, by position.
        notes: what a reader should know besides verdicts.
    """

    def __init__(self, subject: Subject, args: tuple[Any, ...], seed: int, tolerance: float | None):
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
        """The names of the leaves of the result."""
        return self.subject.results.names

    @property
    def arguments(self) -> dict[int, str]:
        """The arguments that are differentiated, by position, and their names."""
        return dict(zip(self.subject.ins.groups, self.subject.ins.arguments, strict=True))

    def random_seed(self) -> list[ArrayOrScalar]:
        return [_point.normal(self.rng, primal) for primal in self.primals]

    # --- Numbers ---

    @cached_property
    def by_hand(self) -> dict[str, list[ArrayOrScalar]]:
        """The result for each pattern."""
        return {name: wide(self.subject.by_hand(self.x, self.rest, s)[1]) for name, s in self.patterns.items()}

    @cached_property
    def true(self) -> dict[str, list[ArrayOrScalar]] | None:
        """What `by_hand` has to equal; None where there is nothing to hold it against."""
        if self.subject.source is None:
            return None
        try:
            return {name: wide(self.subject.by_truth(self.x, self.rest, s)[1]) for name, s in self.patterns.items()}
        except Exception as error:
            if self.subject.reference is not None:
                raise
            self.notes.append(f"JAX can't differentiate what f computes; differences judge alone: {explain(error)}")
            return None

    @cached_property
    def outputs(self) -> list[ArrayOrScalar]:
        """F(x) as it comes beside the derivative, compiled."""
        return wide(self.subject.by_hand(self.x, self.rest, self.patterns["joint"])[0])

    @cached_property
    def true_outputs(self) -> list[ArrayOrScalar] | None:
        """What `outputs` have to equal, where there is a reference."""
        if self.subject.reference is None:
            return None
        return wide(self.subject.by_truth(self.x, self.rest, self.patterns["joint"])[0])

    @cached_property
    def eager(self) -> tuple[list[ArrayOrScalar], list[ArrayOrScalar]] | None:
        """(F(x), result) for the joint seed, one operation after the other; None where f can't run so."""
        try:
            outputs, result = self.subject.eagerly(self.x, self.rest, self.patterns["joint"])
        except Exception as error:
            self.notes.append(f"f does not run one operation after the other, under disable_jit: {explain(error)}")
            return None
        return wide(outputs), wide(result)

    @cached_property
    def rounding(self) -> tuple[list[float], list[float]]:
        """What rounding moves outputs and results by, here and nearby, relative to their largest elements."""
        x, joint = wide(self.x), self.patterns["joint"]
        points = [self.x, *(like(self.x, _point.varied(self.rng, x)) for _ in range(2))]
        found = [self.rounding_at(point, joint) for point in points]
        outputs, results = ([max(leaf) for leaf in zip(*side, strict=True)] for side in zip(*found, strict=True))
        return outputs, results

    def rounding_at(self, x: Arrays, seed: Arrays) -> tuple[list[float], list[float]]:
        """The same at one point, for one seed. The coin of `otherwise_rounded` hangs on the arguments' last bits."""
        s, eps = self.subject, max(float(jnp.finfo(a.dtype).eps) for a in x)
        exact = (s.by_hand if self.true is None else s.by_truth)(x, self.rest, seed)
        draws = [x, *(like(x, _point.varied(self.rng, wide(x), by=4 * eps)) for _ in range(2))]
        moved = [s.rounded(draw, self.rest, seed) for draw in draws]
        outputs, results = (
            [max(distance(e, m) for m in leaf) for e, *leaf in zip(*map(wide, sides), strict=True)]
            for sides in zip(exact, *moved, strict=True)
        )
        return outputs, results

    @cached_property
    def finite(self) -> bool:
        """Whether f is. A derivative that raises is for other checks to tell."""
        try:
            return _finite(self.outputs)
        except Exception:
            return True

    @cached_property
    def undefined(self) -> str | None:
        """Why no rule can be judged here: f, or the derivative that JAX takes of it, does not exist. None if both do.

        For points other than those of the caller, who may know that f is never called there.
        """
        s, joint = self.subject, self.patterns["joint"]
        try:
            outputs, result = map(wide, s.by_hand(self.x, self.rest, joint))
        except Exception:
            return self.raising(self.x, joint)
        if not _finite(outputs):
            return "f is not finite"
        right = result if s.source is None and s.mode == "vjp" else (self.true or {}).get("joint", [])
        return None if _finite(right) else "the derivative that JAX takes is not finite"

    def raising(self, x: Arrays, seed: Arrays) -> str | None:
        """What raises where the rule does: f by itself, or the derivative that JAX takes; None if neither does."""
        s = self.subject
        by_jax = s.by_hand if s.source is None and s.mode == "vjp" else s.by_jax
        for what, run in (
            ("f by itself", lambda: s.value(x, self.rest)),
            ("the derivative that JAX takes", lambda: by_jax(x, self.rest, seed)),
        ):
            try:
                run()
            except Exception as error:
                return f"{what} raises {explain(error)}"
        return None

    def measured(self, probes: Sequence[list[ArrayOrScalar]]) -> _differences.Differences:
        """<probe, result(seed)> for each probe and each pattern, by differences."""
        s, seeds = self.subject, list(self.patterns.values())
        if s.mode == "vjp":
            return s.differences("f", s.judged, self.x, self.rest, probes, seeds)
        found = s.differences("f", s.judged, self.x, self.rest, seeds, probes)
        return _differences.Differences(*(part.T for part in found))

    def probes(self, draw: Callable[[int], ArrayOrScalar]) -> list[list[ArrayOrScalar]]:
        """Probes for each leaf n of the result, `draw(n)` there and zero on all other leaves."""
        nothing = zeros(self.like)
        each = range(len(nothing))
        return [[draw(n) if m == n else nothing[m] for m in each] for n in each for _ in range(PROBES)]

    # --- When two of them agree ---

    def agree_on_outputs(
        self, check: str, got: Sequence[Any], expected: Sequence[Any], message: str, **known: Any
    ) -> Iterator[Result]:
        """Whether outputs agree, which are columns of the table in forward mode only; `message` names {output}."""
        for n, (name, a, e) in enumerate(zip(self.subject.outs.names, wide(got), wide(expected), strict=True)):
            rounding = lambda n=n, e=e: self.rounding[0][n] * largest(e)  # noqa: E731
            known_ = {"tolerance": self.tolerance(), "rounding": rounding, "seed": self.seed, **known}
            result = compare(check, name, a, e, message=message.format(output=name), **known_)
            yield result if name in self.leaves else result._replace(leaf=None)

    def tolerance(self, dtype: Any = None) -> Tolerance:
        """How far two ways to compute the same leaf may be apart."""
        dtype = self.subject.dtype if dtype is None else np.dtype(dtype)
        if dtype == np.float64:
            base = Tolerance(AGREE, f"{AGREE:.0e} of the leaf's largest element")
        else:
            longest = max((n for a in (*self.x, *self.primals) for n in a.shape), default=1)
            c = LOW * max(longest, 1) ** 0.5
            base = Tolerance(c * float(jnp.finfo(dtype).eps), f"{c:.0f} eps of {dtype} of the leaf's largest element")
        if self.given is not None and self.given > base.relative:
            return Tolerance(self.given, "the tolerance given, times the leaf's largest element")
        return base

    def gross(self, leaf: int) -> float:
        """The largest element of a leaf of the result, for any pattern."""
        return max(largest(result[leaf]) for result in (self.true or self.by_hand).values())

    def rounding_of(self, leaf: int) -> float:
        """What rounding moves a leaf of the result by."""
        return self.rounding[1][leaf] * self.gross(leaf)

    def tolerance_of(self, leaf: int) -> Tolerance:
        """For one leaf of the result at this point: what is zero for one seed may be off by eps of what others give."""
        return self.tolerance()._replace(floor=float(jnp.finfo(self.subject.dtype).eps) * self.gross(leaf))

    def agree(
        self,
        check: str,
        got: Sequence[Any],
        expected: Sequence[Any],
        message: str,
        rounding: Callable[[int], float] | None = None,
    ) -> Iterator[Result]:
        """Whether two results agree, leaf by leaf, but for rounding: here, or as `rounding(leaf)` has it elsewhere."""
        for n, (a, e) in enumerate(zip(wide(got), wide(expected), strict=True)):
            yield self.agree_on(n, check, a, e, message, rounding)

    def agree_on(
        self,
        leaf: int,
        check: str,
        got: Any,
        expected: Any,
        message: str,
        rounding: Callable[[int], float] | None = None,
    ) -> Result:
        """Whether one leaf of two results agrees, but for rounding."""
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
