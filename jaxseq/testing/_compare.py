"""When two arrays agree: a tolerance that says where it comes from, never scaled by the size of an array."""

from typing import Any, NamedTuple

import numpy as np

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

    def widened(self, rounding: float, floor: float = 0.0) -> "Tolerance":
        """Plus ten times what rounding was seen to do to this leaf, relative to its largest element."""
        if 10 * rounding <= self.relative / 100:
            return self._replace(floor=floor)
        origin = f"{self.origin}, and ten times the {rounding:.0e} that rounding moves this leaf by"
        return Tolerance(self.relative + 10 * rounding, origin, floor)


def compare(
    check: str,
    leaf: str | None,
    got: np.ndarray,
    expected: np.ndarray,
    tolerance: Tolerance,
    message: str,
    decides: float = DECIDES,
    **known: Any,
) -> Result:
    """The verdict on `got`, element by element; `known` is what else a failure should tell."""
    if got.shape != expected.shape:
        wrong = f"{message}: its shape is {got.shape}, expected {expected.shape}"
        return Result(check, leaf, Verdict.FAIL, failure=Failure(check, wrong, leaf, **known))
    if not np.isfinite(expected).all():
        return Result(check, leaf, Verdict.INCONCLUSIVE, "what it should equal is not finite")
    bound = tolerance.relative * largest(expected) + tolerance.floor
    index = worst(got, expected)
    if index is not None and not abs(got[index] - expected[index]) <= bound:
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
    if tolerance.relative > decides:
        return Result(check, leaf, Verdict.INCONCLUSIVE, f"no tighter bound than {tolerance.relative:.0e} holds here")
    return Result(check, leaf, Verdict.PASS)


def worst(got: np.ndarray, expected: np.ndarray) -> tuple[int, ...] | None:
    """The index of the element that is off the most, NaN the most of all; None where there is no element."""
    if not got.size:
        return None
    with np.errstate(all="ignore"):
        apart = np.abs(got - expected)
    return tuple(int(i) for i in np.unravel_index(np.argmax(np.where(np.isnan(apart), np.inf, apart)), got.shape))


def largest(a: np.ndarray) -> float:
    return float(np.max(np.abs(a), initial=0))


def apart(a: np.ndarray, b: np.ndarray) -> float:
    """How far b is from a, relative to the largest element of a."""
    return largest(a - b) / largest(a) if a.size and largest(a) else 0.0
