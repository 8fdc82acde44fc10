"""What stands against a gradient: the contradictions between it and differences, or the truth, at one point.

A check of numbers asks one question of its evidence: what contradicts this result? The same question, asked of a result
that is known to be wrong (zeroed, sign-flipped, shifted), tells whether the evidence has any power here. If nothing
contradicts that one either, its silence on the first means nothing.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import cycle, zip_longest
from typing import Any

import numpy as np

from jaxseq._types import ArrayOrScalar
from jaxseq.testing._compare import DECIDES, compare, largest
from jaxseq.testing._numbers import PROBES, Numbers
from jaxseq.testing._point import normal, zeros
from jaxseq.testing._report import Failure

# Relative to S = ||c * D_u f||_2; ten times the error of the differences is added.
DIFFER = 1e-7
# Elements of a leaf that differences look at one by one where nothing else knows them.
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
    """What contradicts a leaf of the result. What rounding does is measured only where something seems wrong."""

    def __init__(self, numbers: Numbers):
        self.numbers = numbers
        self.excused: dict[int, float] = {}  # leaf -> what rounding and kinks move it by, where that was asked for

    @abstractmethod
    def contradictions(self, leaf: int, change: Change, rounding: float) -> Iterator[Failure]:
        """To that leaf, once changed: what rounding does not explain."""

    def moved_by(self, leaf: int) -> float:
        """What a right result may be off by for reasons that are not its own."""
        return self.numbers.rounding_of(leaf)

    def against(self, leaf: int, change: Change = unchanged, pattern: str | None = None) -> Failure | None:
        """The worst of them, for any pattern or for one."""
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
    """Products of the result with probes, against differences of f in the direction of the probes."""

    def __init__(self, numbers: Numbers, rounds: Iterable[Sequence[list[ArrayOrScalar]]], message: str):
        super().__init__(numbers)
        self.message = message
        self.rounds = [(probes, numbers.measured(probes)) for probes in rounds]

    @classmethod
    def random(cls, numbers: Numbers) -> "ByDifferences":
        """Random probes, which see every element."""
        probes = numbers.probes(lambda n: normal(numbers.rng, numbers.like[n]))
        return cls(numbers, [probes], "its inner product with a random direction is not what differences say")

    @classmethod
    def of_elements(cls, numbers: Numbers) -> "ByDifferences":
        """One element at a time: the first, the last, and others at random, by turns where the result is zero and where
        it is not: were all of them zero, a result of nothing but zeros would pass.
        """
        indices = []
        for n, a in enumerate(numbers.like):
            places = list(np.ndindex(a.shape))
            drawn = [places[k] for k in numbers.rng.permutation(len(places))]
            says = np.any([result[n] != 0 for result in numbers.by_hand.values()], 0)
            turns = zip_longest((p for p in drawn if says[p]), (p for p in drawn if not says[p]))
            between = [p for turn in turns for p in turn if p is not None]
            indices.append(cycle([*places[:1], *places[-1:], *between[:COORDINATES]] or [None]))
        rounds = range(COORDINATES // PROBES)
        probes = [numbers.probes(lambda n: one_hot(numbers.like[n], next(indices[n]))) for _ in rounds]
        return cls(numbers, probes, "an element is not what differences say")

    def kink(self, leaf: int | None = None) -> float:
        """The largest kink in the directions of a leaf, or of any."""
        rows = slice(None) if leaf is None else slice(leaf * PROBES, (leaf + 1) * PROBES)
        return max(float(measured.kink[rows].max(initial=0)) for _, measured in self.rounds)

    def contradictions(self, leaf: int, change: Change, rounding: float) -> Iterator[Failure]:
        """As differences have it."""
        for probes, measured in self.rounds:
            for k in range(leaf * PROBES, (leaf + 1) * PROBES):
                probe = probes[k][leaf]
                for p, (pattern, result) in enumerate(self.numbers.by_hand.items()):
                    got = float(np.sum(change(result[leaf]) * probe).real)
                    value, error, S = (float(a[k, p]) for a in (measured.value, measured.error, measured.scale))
                    bound = differ(self.numbers.given, S, error) + 10 * rounding * float(np.linalg.norm(probe))
                    blunt = bound > DECIDES * S and change is not unchanged
                    if blunt or abs(got - value) <= bound:
                        continue
                    yield Failure(
                        "",
                        self.message,
                        pattern=pattern,
                        index=_only_index(probe),
                        by_hand=got,
                        by_differences=value,
                        error=error,
                        ratio=got / value if value else None,
                        tolerance=bound,
                        origin=DIFFER_ORIGIN,
                    )


class ByTruth(Evidence):
    """Every element of the result, against the derivative that JAX takes of what defines f.

    At a kink there are several, and `kink(leaf)` says how far they are apart.
    """

    def __init__(self, numbers: Numbers, kink: Callable[[int], float]):
        super().__init__(numbers)
        self.kink = kink

    def moved_by(self, leaf: int) -> float:
        """By rounding, and by the choice that is left at a kink."""
        return super().moved_by(leaf) + self.kink(leaf)

    def contradictions(self, leaf: int, change: Change, rounding: float) -> Iterator[Failure]:
        """As the truth has it."""
        assert self.numbers.true is not None
        tolerance = self.numbers.tolerance_of(leaf)
        if rounding:
            tolerance = tolerance.widened(rounding)
        message = f"an element is not the derivative of {self.numbers.subject.source}"
        for pattern, result in self.numbers.by_hand.items():
            expected = self.numbers.true[pattern][leaf]
            if change is not unchanged and tolerance.bound(expected) > DECIDES * largest(expected):
                continue
            got = change(result[leaf])
            found = compare("", None, got, expected, tolerance, message, pattern=pattern, diagnosis=None)
            if found.failure:
                yield found.failure


def differ(given: float | None, S: float, error: float) -> float:
    """How far a product may be from differences with that S and that error."""
    return max(DIFFER, given or 0) * S + 10 * error


DIFFER_ORIGIN = f"{DIFFER:.0e} ||c * D_u f||, ten times the error of the differences, and ten times that of rounding"


def powerless(numbers: Numbers, leaf: int, evidence: Sequence[Evidence]) -> list[str]:
    """The changes that no evidence contradicts. A leaf that is the same when shifted does not count."""
    blind = [name for name, change in CHANGES.items() if not any(e.against(leaf, change) for e in evidence)]
    results = [result[leaf] for result in numbers.by_hand.values()]
    moves = any(largest(CHANGES["shifted"](r) - r) > DECIDES * largest(r) for r in results)
    return [name for name in blind if name != "shifted" or moves]


def _worst(failures: Iterable[Failure]) -> Failure | None:
    def excess(f: Failure) -> float:
        right = f.by_reference if f.by_reference is not None else f.by_differences
        if f.by_hand is None or right is None or not f.tolerance or not np.isfinite(f.by_hand):
            return np.inf
        return abs(f.by_hand - right) / f.tolerance

    return max(failures, key=excess, default=None)


def one_hot(like: Any, index: tuple[int, ...] | None) -> ArrayOrScalar:
    """One at the index, zero elsewhere; zero throughout for no index."""
    (probe,) = zeros([like])
    if index is not None:
        probe[index] = 1
    return probe


def _only_index(probe: ArrayOrScalar) -> tuple[int, ...] | None:
    """Where a probe looks, if that is one element."""
    return tuple(map(int, np.argwhere(probe)[0])) if np.count_nonzero(probe) == 1 else None
