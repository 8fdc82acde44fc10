"""Evidence against a gradient: contradictions with finite differences or with the expected derivative at one point.

A numerical check asks its evidence for contradictions with the result. It asks the same for results that are known to
be wrong (zeroed, sign-flipped, shifted), which measures the power of the evidence at this point. If the evidence does
not contradict a wrong result, then its agreement with the actual result proves nothing.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import cycle, zip_longest

import numpy as np

from jaxseq._types import ArrayOrScalar
from jaxseq.testing._compare import DECIDES, compare, largest
from jaxseq.testing._numbers import PROBES, Numbers
from jaxseq.testing._point import Shaped, normal, zeros
from jaxseq.testing._report import Failure

# Relative to S = ||c * D_u f||_2, in addition to ten times the error of the finite differences.
DIFFER = 1e-7
# Number of elements of a leaf that are checked by finite differences one by one if there is no other reference.
COORDINATES = 16

Change = Callable[[ArrayOrScalar], ArrayOrScalar]


def unchanged(a: ArrayOrScalar) -> ArrayOrScalar:
    return a


CHANGES: Mapping[str, Change] = {
    "zeroed": np.zeros_like,
    "sign-flipped": np.negative,
    "shifted": lambda a: np.roll(a, 1, 0) if a.ndim else a,
}


class Evidence(ABC):
    """Contradictions to a leaf of the result. Rounding is measured only if there is a contradiction."""

    def __init__(self, numbers: Numbers):
        self.numbers = numbers
        self.excused: dict[int, float] = {}  # leaf -> its change by rounding and kinks, where measured

    @abstractmethod
    def contradictions(self, leaf: int, change: Change, rounding: float) -> Iterator[Failure]:
        """Yield the contradictions to `change` of that leaf, beyond ten times `rounding`."""

    def moved_by(self, leaf: int) -> float:
        """Return the error that a correct result may have from rounding and kinks."""
        return self.numbers.rounding_of(leaf)

    def against(self, leaf: int, change: Change = unchanged, pattern: str | None = None) -> Failure | None:
        """Return the worst contradiction, over all patterns or for one pattern."""
        found = _worst(
            failure
            for failure in self.contradictions(leaf, change, self.excused.get(leaf, 0.0))
            if pattern in (None, failure.pattern)
        )
        if found is None or change is not unchanged or leaf in self.excused:
            return found
        self.excused[leaf] = self.moved_by(leaf)
        return _worst(self.contradictions(leaf, change, self.excused[leaf]))


class ByDifferences(Evidence):
    """Inner products of the result with probes, against finite differences of f in the direction of the probes."""

    def __init__(self, numbers: Numbers, rounds: Iterable[Sequence[list[ArrayOrScalar]]], message: str):
        super().__init__(numbers)
        self.message = message
        self.rounds = [(probes, numbers.measured(probes)) for probes in rounds]

    @classmethod
    def random(cls, numbers: Numbers) -> "ByDifferences":
        """Use random probes, which weight every element."""
        probes = numbers.probes(lambda n: normal(numbers.rng, numbers.like[n]))
        return cls(numbers, [probes], "its inner product with a random direction differs from finite differences")

    @classmethod
    def of_elements(cls, numbers: Numbers) -> "ByDifferences":
        """Probe single elements: the first, the last, and random others, alternately where the result is nonzero and
        where it is zero. If all probed elements were zero, a result of zeros would pass.
        """
        indices = []
        for n, a in enumerate(numbers.like):
            places = list(np.ndindex(a.shape))
            drawn = [places[k] for k in numbers.rng.permutation(len(places))]
            nonzero = np.any([result[n] != 0 for result in numbers.by_rule.values()], 0)
            turns = zip_longest((p for p in drawn if nonzero[p]), (p for p in drawn if not nonzero[p]))
            between = [p for turn in turns for p in turn if p is not None]
            indices.append(cycle([*places[:1], *places[-1:], *between[:COORDINATES]] or [None]))
        rounds = range(COORDINATES // PROBES)
        probes = [numbers.probes(lambda n: one_hot(numbers.like[n], next(indices[n]))) for _ in rounds]
        return cls(numbers, probes, "an element differs from finite differences")

    def kink(self, leaf: int | None = None) -> float:
        """Return the largest kink in the directions of a leaf, or of all leaves."""
        rows = slice(None) if leaf is None else slice(leaf * PROBES, (leaf + 1) * PROBES)
        return max(float(measured.kink[rows].max(initial=0)) for _, measured in self.rounds)

    def contradictions(self, leaf: int, change: Change, rounding: float) -> Iterator[Failure]:
        """Compare with the finite differences."""
        for probes, measured in self.rounds:
            for k in range(leaf * PROBES, (leaf + 1) * PROBES):
                probe = probes[k][leaf]
                for p, (pattern, result) in enumerate(self.numbers.by_rule.items()):
                    got = float(np.sum(change(result[leaf]) * probe).real)
                    value, error, S = (float(a[k, p]) for a in (measured.value, measured.error, measured.scale))
                    bound = differ(self.numbers.given, S, error) + 10 * rounding * float(np.linalg.norm(probe))
                    too_wide = bound > DECIDES * S and change is not unchanged
                    if too_wide or abs(got - value) <= bound:
                        continue
                    yield Failure(
                        "",
                        self.message,
                        pattern=pattern,
                        index=_only_index(probe),
                        by_rule=got,
                        by_differences=value,
                        error=error,
                        ratio=got / value if value else None,
                        tolerance=bound,
                        origin=DIFFER_ORIGIN,
                    )


class ByTruth(Evidence):
    """Every element of the result, against the derivative that JAX computes of the reference.

    At a kink there are several valid derivatives; `kink(leaf)` returns how far they differ.
    """

    def __init__(self, numbers: Numbers, kink: Callable[[int], float]):
        super().__init__(numbers)
        self.kink = kink

    def moved_by(self, leaf: int) -> float:
        """Add the difference between the valid derivatives at a kink."""
        return super().moved_by(leaf) + self.kink(leaf)

    def contradictions(self, leaf: int, change: Change, rounding: float) -> Iterator[Failure]:
        """Compare with the expected derivative."""
        assert self.numbers.true is not None
        tolerance = self.numbers.tolerance_of(leaf)
        if rounding:
            tolerance = tolerance.widened(rounding)
        message = f"an element differs from the derivative of {self.numbers.subject.source}"
        for pattern, result in self.numbers.by_rule.items():
            expected = self.numbers.true[pattern][leaf]
            if change is not unchanged and tolerance.bound(expected) > DECIDES * largest(expected):
                continue
            got = change(result[leaf])
            found = compare("", None, got, expected, tolerance, message, pattern=pattern, diagnosis=None)
            if found.failure:
                yield found.failure


def differ(given: float | None, S: float, error: float) -> float:
    """Return the accepted difference from finite differences with this S and this error."""
    return max(DIFFER, given or 0) * S + 10 * error


DIFFER_ORIGIN = f"{DIFFER:.0e} ||c * D_u f||, plus ten times the errors of the finite differences and of rounding"


def powerless(numbers: Numbers, leaf: int, evidence: Sequence[Evidence]) -> list[str]:
    """Return the changes that no evidence contradicts, without a shift that does not change the leaf."""
    blind = [name for name, change in CHANGES.items() if not any(e.against(leaf, change) for e in evidence)]
    results = [result[leaf] for result in numbers.by_rule.values()]
    moves = any(largest(CHANGES["shifted"](r) - r) > DECIDES * largest(r) for r in results)
    return [name for name in blind if name != "shifted" or moves]


def _worst(failures: Iterable[Failure]) -> Failure | None:
    def excess(f: Failure) -> float:
        right = f.by_reference if f.by_reference is not None else f.by_differences
        if f.by_rule is None or right is None or not f.tolerance or not np.isfinite(f.by_rule):
            return np.inf
        return abs(f.by_rule - right) / f.tolerance

    return max(failures, key=excess, default=None)


def one_hot(like: Shaped, index: tuple[int, ...] | None) -> ArrayOrScalar:
    """Return an array with one at the index and zeros elsewhere, or only zeros if the index is None."""
    (probe,) = zeros([like])
    if index is not None:
        probe[index] = 1
    return probe


def _only_index(probe: ArrayOrScalar) -> tuple[int, ...] | None:
    """Return the index of the only nonzero element of a probe, or None if there are several."""
    return tuple(map(int, np.argwhere(probe)[0])) if np.count_nonzero(probe) == 1 else None
