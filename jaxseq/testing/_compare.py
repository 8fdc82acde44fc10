"""Comparison of arrays, with tolerances that record their origin and do not grow with the size of an array."""

from collections.abc import Callable
from typing import NamedTuple, TypedDict, Unpack

import numpy as np

from jaxseq._types import ArrayOrScalar
from jaxseq.testing._diagnosis import fit
from jaxseq.testing._report import Failure, Result, Verdict

# A check with a bound wider than this, relative to the bounded values, is inconclusive.
DECIDES = 1e-3


class Details(TypedDict, total=False):
    """Fields of a `Failure` that the caller of `compare` knows."""

    pattern: str | None
    diagnosis: str | None
    seed: int


class Tolerance(NamedTuple):
    """The largest accepted error of a leaf, and the origin of this bound.

    Attributes:
        relative: the error relative to the largest expected element.
        origin: a description of the bound for reports.
        floor: an absolute error, for a leaf that is zero up to rounding.
    """

    relative: float
    origin: str
    floor: float = 0.0

    def widened(self, rounding: float) -> "Tolerance":
        """Add ten times the change of the leaf that rounding causes."""
        origin = f"{self.origin}, plus ten times {rounding:.0e}, the change of this leaf by rounding or at a kink"
        return self._replace(floor=self.floor + 10 * rounding, origin=origin)

    def bound(self, expected: ArrayOrScalar) -> float:
        """Return the largest accepted absolute error of an element."""
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
    **known: Unpack[Details],
) -> Result:
    """Compare `got` with `expected`, element by element.

    If an element exceeds the tolerance, `rounding()` measures the effect of rounding on the leaf and the tolerance is
    widened by it. An error within the widened tolerance passes, or is INCONCLUSIVE if the widened tolerance would also
    accept a wrong gradient. `known` holds further fields of the failure.
    """
    if got.shape != expected.shape:
        wrong = f"{message}: expected shape {expected.shape}, got {got.shape}"
        return Result(check, leaf, Verdict.FAIL, failure=Failure(check, wrong, leaf, **known))
    if not np.isfinite(expected).all():
        return Result(check, leaf, Verdict.INCONCLUSIVE, "the expected value is not finite")
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
            by_rule=got[index].item(),
            by_reference=expected[index].item(),
            ratio=(got[index] / expected[index]).item() if expected[index] else None,
            tolerance=bound,
            origin=tolerance.origin,
            **known,
        )
        return Result(check, leaf, Verdict.FAIL, failure=failure)
    if (excused or tolerance.relative > decides) and bound > decides * largest(expected):
        note = f"the tightest possible bound here is {bound:.0e}, for values up to {largest(expected):.0e}"
        return Result(check, leaf, Verdict.INCONCLUSIVE, note)
    return Result(check, leaf, Verdict.PASS)


def worst(got: ArrayOrScalar, expected: ArrayOrScalar) -> tuple[int, ...] | None:
    """Return the index of the element with the largest error (NaN is the largest), or None for an empty array."""
    if not got.size:
        return None
    with np.errstate(all="ignore"):
        error = np.abs(got - expected)
    return tuple(int(i) for i in np.unravel_index(np.argmax(np.where(np.isnan(error), np.inf, error)), got.shape))


def largest(a: ArrayOrScalar) -> float:
    return float(np.max(np.abs(a), initial=0))


def distance(a: ArrayOrScalar, b: ArrayOrScalar) -> float:
    """Return the largest difference relative to the largest element of a. NaN and infinity propagate."""
    with np.errstate(all="ignore"):
        return largest(a - b) / largest(a) if a.size and largest(a) else 0.0
