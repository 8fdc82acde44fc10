"""Diagnosis of a wrong gradient: compare it with the correct one under each of a list of common mistakes."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from jaxseq._types import ArrayOrScalar

# A mistake explains an error if the remainder is at most this fraction of it.
EXPLAINED = 1e-3


def fit(got: ArrayOrScalar, right: ArrayOrScalar) -> str | None:
    """Describe the mistake that turns `right` into `got`; None if the shapes differ or the arrays are empty."""
    if got.shape != right.shape or not right.size:
        return None
    if not np.isfinite(got).all():
        return f"{np.count_nonzero(~np.isfinite(got))} of {got.size} elements are not finite"
    if not got.any():
        return "all elements are zero"
    for mistake, result in _mistakes(right):
        if _explains(result, got, right):
            return mistake
    constant = np.vdot(right, got) / np.vdot(right, right) if right.any() else 0
    if constant and _explains(constant * right, got, right):
        return _times(constant, right.shape)
    off = np.abs(got - right)
    return f"{np.count_nonzero(off > EXPLAINED * off.max())} of {off.size} elements are wrong, by no simple mistake"


def fit_seed(
    got: ArrayOrScalar,
    right: Callable[[list[ArrayOrScalar]], ArrayOrScalar],
    seed: Sequence[ArrayOrScalar],
    names: Sequence[str],
) -> str | None:
    """Describe the part of the seed that a wrong rule ignores; None if ignoring no part explains the error.

    Args:
        got: the wrong leaf.
        right: maps a seed to the correct leaf.
        seed: the seed of `got`.
        names: the names of the leaves of the seed.
    """
    whole = right(list(seed))
    for n, (leaf, name) in enumerate(zip(seed, names, strict=True)):

        def explained_by(value: ArrayOrScalar, n: int = n) -> bool:
            return _explains(right([value if m == n else other for m, other in enumerate(seed)]), got, whole)

        if len(seed) > 1 and leaf.any() and explained_by(np.zeros_like(leaf)):
            return f"the cotangent of {name} is ignored"
        for axis in range(leaf.ndim):
            for place, index in (("first", 0), ("last", -1)) if leaf.shape[axis] > 1 else ():
                one = np.zeros_like(leaf)
                at = (slice(None),) * axis + (index,)
                one[at] = leaf[at]
                if explained_by(leaf - one):
                    return f"the {place} entry of {name} along axis {axis} is ignored"
                if explained_by(one):
                    return f"a sum over axis {axis} of {name} is missing: only the {place} entry is used"
    return None


def _mistakes(right: ArrayOrScalar) -> Iterator[tuple[str, ArrayOrScalar]]:
    yield "it is the correct one times -1", -right
    if right.ndim >= 2 and right.shape[-1] == right.shape[-2]:
        yield "it is the correct one transposed", right.swapaxes(-1, -2)
        yield "it is the correct one transposed, times -1", -right.swapaxes(-1, -2)
    if np.iscomplexobj(right):
        yield "it is the correct one conjugated", right.conj()
    for axis in range(right.ndim):
        if right.shape[axis] < 2:
            continue
        at = (slice(None),) * axis
        for place, index in (("first", 0), ("last", -1)):
            less = right.copy()
            less[(*at, index)] = 0
            yield f"its {place} entry along axis {axis} is missing", less
        for step, where in ((1, "later"), (-1, "earlier")):
            rolled = np.roll(right, step, axis)
            yield f"it is shifted to the {where} entry along axis {axis}, and wraps around", rolled
            rolled = rolled.copy()
            rolled[(*at, 0 if step == 1 else -1)] = 0
            yield f"it is shifted to the {where} entry along axis {axis}", rolled


def _explains(result: ArrayOrScalar, got: ArrayOrScalar, right: ArrayOrScalar) -> bool:
    return bool(np.abs(got - result).max(initial=0) <= EXPLAINED * np.abs(got - right).max(initial=0))


def _times(constant: float | complex, shape: tuple[int, ...]) -> str:
    real = constant.real if abs(constant.imag) < EXPLAINED * abs(constant) else constant
    text = f"it is the correct one times {real:.9g}"
    for size in sorted(set(shape)):
        if size > 1 and np.isclose(constant, 1 / size):
            return f"{text}, one over the size of an axis: a mean instead of a sum?"
        if size > 1 and np.isclose(constant, size):
            return f"{text}, the size of an axis: summed {size} times?"
    return text
