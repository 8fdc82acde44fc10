"""When two arrays agree: a tolerance that says where it comes from, never scaled by the size of an array."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxseq._types import ArrayOrScalar
from jaxseq.testing._diagnosis import fit
from jaxseq.testing._report import Failure, Result, Verdict

# A bound wider than this, relative to what it bounds, decides nothing.
DECIDES = 1e-3


class Tolerance(NamedTuple):
    """How far a leaf may be off, relative to its largest element, and where that comes from.

    Attributes:
        relative: to the largest element of what is expected.
        origin: for readers.
        floor: absolute, for a leaf that is zero but for rounding.
    """

    relative: float
    origin: str
    floor: float = 0.0

    def widened(self, rounding: float) -> "Tolerance":
        """Plus ten times what rounding moves the leaf by."""
        origin = f"{self.origin}, and ten times the {rounding:.0e} that rounding, or a kink, moves this leaf by"
        return self._replace(floor=self.floor + 10 * rounding, origin=origin)

    def bound(self, expected: ArrayOrScalar) -> float:
        """Of the difference of any element."""
        return self.relative * largest(expected) + self.floor


def compare(
    check: str,
    leaf: str | None,
    got: ArrayOrScalar,
    expected: ArrayOrScalar,
    tolerance: Tolerance,
    message: str,
    *,
    rounding: Callable[[], float] | None = None,
    decides: float = DECIDES,
    **known: Any,
) -> Result:
    """The verdict on `got`, element by element.

    Where it is off, `rounding()` is asked what rounding does to the leaf. What that excuses passes, or is INCONCLUSIVE
    if it is so much that a wrong gradient would pass as well. `known` is what else a failure should tell.
    """
    if got.shape != expected.shape:
        wrong = f"{message}: its shape is {got.shape}, expected {expected.shape}"
        return Result(check, leaf, Verdict.FAIL, failure=Failure(check, wrong, leaf, **known))
    if not np.isfinite(expected).all():
        return Result(check, leaf, Verdict.INCONCLUSIVE, "what it should equal is not finite")
    index = worst(got, expected)
    if index is None:
        return Result(check, leaf, Verdict.PASS)
    off = abs(got[index] - expected[index])
    excused = rounding is not None and not off <= tolerance.bound(expected)
    if rounding is not None and excused:
        tolerance = tolerance.widened(rounding())
    bound = tolerance.bound(expected)
    if not off <= bound:
        known.setdefault("diagnosis", fit(got, expected))
        failure = Failure(
            check,
            message,
            leaf,
            index=index,
            by_hand=got[index].item(),
            by_reference=expected[index].item(),
            ratio=(got[index] / expected[index]).item() if expected[index] else None,
            tolerance=bound,
            origin=tolerance.origin,
            **known,
        )
        return Result(check, leaf, Verdict.FAIL, failure=failure)
    if (excused or tolerance.relative > decides) and bound > decides * largest(expected):
        note = f"no bound tighter than {bound:.0e} holds here, for numbers up to {largest(expected):.0e}"
        return Result(check, leaf, Verdict.INCONCLUSIVE, note)
    return Result(check, leaf, Verdict.PASS)


def worst(got: ArrayOrScalar, expected: ArrayOrScalar) -> tuple[int, ...] | None:
    """The index of the element that is off the most, NaN the most of all; None where there is no element."""
    if not got.size:
        return None
    with np.errstate(all="ignore"):
        apart = np.abs(got - expected)
    return tuple(int(i) for i in np.unravel_index(np.argmax(np.where(np.isnan(apart), np.inf, apart)), got.shape))


def largest(a: ArrayOrScalar) -> float:
    return float(np.max(np.abs(a), initial=0))


def distance(a: ArrayOrScalar, b: ArrayOrScalar) -> float:
    """How far b is from a, relative to the largest element of a. NaN or infinite where a or b is."""
    with np.errstate(all="ignore"):
        return largest(a - b) / largest(a) if a.size and largest(a) else 0.0
