"""Checks of the domain: other dtypes, integers and sizes than those of the arguments given."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxseq._types import ArrayOrScalar
from jaxseq.testing import _surgery, _value
from jaxseq.testing._compare import Tolerance, compare, distance, largest
from jaxseq.testing._point import Arrays, inexact, leaf_names, varied, wide, wide_dtype
from jaxseq.testing._report import Failure, Result, Verdict, explain
from jaxseq.testing._subject import Subject, like
from jaxseq.testing._trial import Trial

# --- Dtypes ---

# A bound of low precision that is wider than this decides nothing: a gradient of the wrong sign must not pass.
DECIDES_LOW = 0.5


def dtypes(trial: Trial) -> Iterator[Result]:
    """Lower precision, mixed dtypes, complex numbers where f takes them."""
    count = len(trial.x)
    if any(wide_dtype(a) == np.complex128 for a in trial.x):
        lower = [np.complex64 if wide_dtype(a) == np.complex128 else np.float32 for a in trial.x]
        yield from _lower(trial, "complex64", lower)
    else:
        lower = [(np.dtype(dtype).name, [dtype] * count) for dtype in (jnp.float32, jnp.bfloat16, jnp.float16)]
        groups = trial.subject.ins.groups
        for group in sorted(set(groups)) if len(set(groups)) > 1 else ():
            mixed = [jnp.bfloat16 if g == group else jnp.float32 for g in groups]
            leaf = trial.subject.ins.names[groups.index(group)]
            lower.append((f"float32 with {leaf} and its siblings in bfloat16", mixed))
        for name, each in lower:
            found = list(_lower(trial, name, each))
            yield from found
            if any(result.note.startswith(ANOTHER) for result in found):
                break  # nor is it the same function in the other dtypes
        yield from _complex(trial)


# In low precision a number next to a kink falls on its other side, and nothing can be said: look elsewhere then.
ATTEMPTS = 3
ANOTHER = "f is another function in"


def _lower(trial: Trial, name: str, dtypes: Sequence[Any]) -> Iterator[Result]:
    """The rule at rounded arguments, against the truth in float64 at the same rounded numbers."""
    found: list[Result] = []
    x = wide(trial.x)
    for _ in range(ATTEMPTS):
        found = list(_lower_at(trial, name, x, dtypes))
        if all(result.verdict is not Verdict.INCONCLUSIVE for result in found):
            break
        x = varied(trial.rng, x, by=0.2)
    yield from found


def _lower_at(trial: Trial, name: str, exact: Arrays, dtypes: Sequence[Any]) -> Iterator[Result]:
    s, check, joint = trial.subject, "dtypes", trial.patterns["joint"]
    with np.errstate(over="ignore", under="ignore"):
        rounded = [np.asarray(a).astype(d) for a, d in zip(exact, dtypes, strict=True)]
    if any(((r == 0) != (a == 0)).any() or not np.isfinite(r).all() for r, a in zip(rounded, exact, strict=True)):
        yield Result(check, None, Verdict.SKIP, f"the arguments are out of the range of {name}")
        return
    with jax.enable_x64(False):
        x = [jnp.asarray(a) for a in rounded]
        try:
            outputs = jax.eval_shape(s.on(trial.rest), x)
        except Exception as error:
            yield Result(check, None, Verdict.SKIP, f"f does not take {name}: {explain(error)}")
            return
        primals, results = (outputs, x) if s.mode == "vjp" else (x, outputs)
        seed = wide(like(primals, joint))
        try:
            got = s.by_hand(x, trial.rest, seed)
        except Exception as error:
            if reason := trial.raising(x, seed):
                yield Result(check, None, Verdict.SKIP, f"for {name}, {reason}")
                return
            failure = Failure(check, f"f takes {name}, but its derivative raises {explain(error)}")
            yield Result(check, None, Verdict.FAIL, failure=failure)
            return
    wrong = [
        Failure(check, f"for {name} it is {a.dtype}{list(a.shape)}, expected {r.dtype}{list(r.shape)}", leaf)
        for leaf, a, r in zip(trial.leaves, got[1], results, strict=True)
        if (a.dtype, a.shape) != (r.dtype, r.shape)
    ]
    if wrong:
        yield from (Result(check, failure.argument, Verdict.FAIL, failure=failure) for failure in wrong)
        return

    # A gradient that is wrong in float64 has failed already; here it has to be the same one.
    true = trial.true is not None and not trial.wrong
    expected = (s.by_truth if true else s.by_hand)([jnp.asarray(a) for a in wide(x)], trial.rest, seed)
    tolerance = trial.tolerance(max((a.dtype for a in x), key=lambda d: float(jnp.finfo(d).eps)))

    @cache
    def own() -> tuple[list[ArrayOrScalar], list[ArrayOrScalar]] | None:
        """`(outputs, result)` of what JAX derives in that dtype; None where it derives nothing."""
        with jax.enable_x64(False):
            try:
                outputs, result = s.by_jax(x, trial.rest, seed)
            except Exception:
                return None
            return wide(outputs), wide(result)

    @cache
    def rounding() -> tuple[list[float], list[float]]:
        with jax.enable_x64(False):
            return trial.rounding_at(x, seed)

    def allowed(side: int, n: int, e: ArrayOrScalar) -> Tolerance:
        """What is asked of no rule is to be better than JAX in that dtype, or than rounding lets any be."""
        theirs = own()
        off = max(4 * distance(e, theirs[side][n]), 10 * rounding()[side][n]) if theirs else np.inf
        off = off if np.isfinite(off) else np.inf
        return Tolerance(max(off, tolerance.relative), "four times the error of JAX's own, or ten times rounding's")

    def another_function(n: int, e: ArrayOrScalar) -> str | None:
        """Why values in that dtype, those without the rule, are not those of float64."""
        if (theirs := own()) is None:
            return None
        if not np.isfinite(theirs[0][n]).all():
            return f"f leaves the range of {name}: its values are not finite"
        off = distance(e, theirs[0][n])
        if off <= max(tolerance.relative, 10 * rounding()[0][n]):
            return None
        return (
            f"{ANOTHER} {name}: its values alone differ from those in float64 by {off:.0e} of the largest, more than "
            "rounding explains. Random numbers drawn from a fixed key do so, which depend on the dtype"
        )

    known = {"decides": DECIDES_LOW, "seed": trial.seed, "pattern": "joint"}
    found: list[Result] = []
    for side, names in enumerate((s.outs.names, trial.leaves)):
        message = f"at arguments rounded to {name}, {'a value' if side == 0 else 'it'} is not what it is in float64"
        for n, (leaf, a, e) in enumerate(zip(names, got[side], wide(expected[side]), strict=True)):
            (value,) = wide([a])
            if reason := _out_of_range(e, a.dtype):
                result = Result(check, leaf, Verdict.SKIP, f"for {name}, {reason}")
            else:
                result = compare(check, leaf, value, e, tolerance, message, **known)
            if result.verdict is Verdict.FAIL and not trial.wrong:
                if side == 0 and (reason := another_function(n, e)):
                    yield Result(check, None, Verdict.SKIP, reason)
                    return
                wider = allowed(side, n, e)
                if np.isinf(wider.relative):
                    verdict = Verdict.INCONCLUSIVE if np.isfinite(value).all() else Verdict.SKIP
                    result = Result(check, leaf, verdict, f"the derivative that JAX takes is not finite in {name}")
                else:
                    result = compare(check, leaf, value, e, wider, message, **known)
            found.append(result if leaf in trial.leaves else result._replace(leaf=None))
    yield from found


def _out_of_range(a: ArrayOrScalar, dtype: Any) -> str | None:
    """Why a dtype can't hold an array; None where it can, and for an array that is not finite to begin with."""
    info, size = jnp.finfo(dtype), largest(a)
    if 0 < size < float(info.tiny):
        return f"its numbers are below the smallest normal one of {np.dtype(dtype)}"
    if float(info.max) < size < np.inf:
        return f"its numbers are above the largest of {np.dtype(dtype)}"
    return None


def _complex(trial: Trial) -> Iterator[Result]:
    """The elements once more with an imaginary part, where f takes complex numbers."""
    s, check = trial.subject, "dtypes"
    x = [jnp.asarray(a + 1j * b) for a, b in zip(wide(trial.x), varied(trial.rng, wide(trial.x), by=0.5), strict=True)]
    try:
        jax.eval_shape(s.on(trial.rest), x)
    except Exception as error:
        yield Result(check, None, Verdict.SKIP, f"f takes no complex numbers: {explain(error)}")
        return
    yield from _elsewhere(trial, check, s.ins.join(x, trial.rest), "for complex arguments")


# --- Integers ---


def integers(trial: Trial) -> Iterator[Result]:
    """Integers and booleans get float0; the rule is right where integers repeat and where none does."""
    s, check = trial.subject, "integers"
    args = s.ins.join(trial.x, trial.rest)
    leaves, tree = jax.tree.flatten(args)
    if all(map(inexact, leaves)):
        yield Result(check, None, Verdict.SKIP, "there are no integers or booleans among the arguments")
        return
    if s.mode == "vjp":
        yield _float0(trial, args)
    names = leaf_names(s.f, args)
    for where, change in (("with repeated integers in", _repeated), ("with distinct integers in", _distinct)):
        changed = [change(leaf) for leaf in leaves]
        which = [name for name, old, new in zip(names, leaves, changed, strict=True) if new is not old]
        if which:
            # The shapes are the same, and so are the programs: there is nothing to compile.
            point = tree.unflatten(changed)
            yield from _elsewhere(trial, check, point, f"{where} {' and '.join(which)}", trial.subject)


def _repeated(leaf: Any) -> Any:
    """The leaf with each second number replaced by the one before; the leaf itself if it holds repeated numbers.

    A permutation of 0 .. n - 1 stays too: a function of permutations may be defined for them alone.
    """
    if not jnp.issubdtype(leaf.dtype, jnp.integer) or np.unique(leaf).size < leaf.size or leaf.size < 2:
        return leaf
    flat = np.asarray(leaf).ravel()
    if (np.sort(flat) == np.arange(flat.size)).all():
        return leaf
    return jnp.asarray(flat[np.arange(flat.size) // 2 * 2].reshape(leaf.shape))


def _distinct(leaf: Any) -> Any:
    """The leaf with distinct numbers in the same range and order; the leaf itself if there are too few, or no need."""
    if not jnp.issubdtype(leaf.dtype, jnp.integer) or np.unique(leaf).size == leaf.size:
        return leaf
    flat = np.asarray(leaf).ravel()
    low, high = int(flat.min()), int(flat.max())
    if high - low + 1 < flat.size:
        return leaf
    spread = low + np.arange(flat.size) * (high - low) // (flat.size - 1)
    ranks = np.argsort(np.argsort(flat, kind="stable"))
    return jnp.asarray(spread[ranks].reshape(leaf.shape).astype(leaf.dtype))


def _float0(trial: Trial, args: Any) -> Result:
    """Whether cotangents of integers and booleans have the dtype float0."""
    s, check = trial.subject, "integers"

    def whole(args: Any) -> Any:
        outputs, pull = jax.vjp(lambda args: s.outs.split(s.f(*args))[0], args)
        return pull(like(outputs, trial.patterns["joint"]))[0]

    try:
        result = jax.eval_shape(whole, args)
    except Exception as error:
        message = f"with integers among what is differentiated it raises {explain(error)}"
        return Result(check, None, Verdict.FAIL, failure=Failure(check, message))
    cotangents = [
        c for c, leaf in zip(jax.tree.leaves(result), jax.tree.leaves(args), strict=True) if not inexact(leaf)
    ]
    wrong = {str(c.dtype) for c in cotangents} - {str(np.dtype(jax.dtypes.float0))}
    failure = Failure(check, f"the cotangent of an integer is {', '.join(wrong)}, expected float0") if wrong else None
    return Result(check, None, Verdict.FAIL if wrong else Verdict.PASS, failure=failure)


# --- Sizes ---

Axes = frozenset[tuple[int, int]]  # (leaf, axis): axes that f wants to have one and the same size

# How many guesses at what sizes f takes are worth their time.
GUESSES = 150


def sizes(trial: Trial) -> Iterator[Result]:
    """Each size that f leaves free at one and at none, all with one more, all different where some are equal."""
    s, check = trial.subject, "sizes"
    args = s.ins.join(trial.x, trial.rest)
    leaves, tree = jax.tree.flatten(args)
    free = _free_axes(trial, leaves, tree)
    if not free:
        yield Result(check, None, Verdict.SKIP, "f takes no other sizes than these")
        return
    names = leaf_names(s.f, args)
    size = lambda axes: leaves[min(axes)[0]].shape[min(axes)[1]]  # noqa: E731
    points = {}
    for axes in free:
        name = " and ".join(f"axis {axis} of {names[leaf]}" for leaf, axis in sorted(axes))
        points |= {f"with {n} along {name}": {axes: n} for n in (1, 0) if size(axes) > n}
    full = [axes for axes in free if size(axes)]  # an empty axis has nothing to be continued with
    if apart := _apart([(axes, size(axes)) for axes in full], {n for leaf in leaves for n in np.shape(leaf)}):
        points["with sizes that are all different"] = apart
    more: dict[Axes, int] = {}
    for axes in full:
        wider = {**more, axes: size(axes) + 1}
        more = wider if _takes(trial, _shaped(leaves, wider), tree) else more
    if more:
        points["with one more along every axis"] = more  # even sizes are odd there, odd ones even
    for name, change in points.items():
        changed = _resized(trial, leaves, change)
        if _takes(trial, changed, tree):
            yield from _elsewhere(trial, check, tree.unflatten(changed), name)


def _apart(free: list[tuple[Axes, int]], taken: set[int]) -> dict[Axes, int]:
    """A new size for each axis whose size another has too. The others stay: the work is a product of all sizes."""
    new = (n for n in itertools.count(2) if n not in taken)
    sizes = [n for _, n in free]
    return {axes: next(new) for place, (axes, n) in enumerate(free) if n in sizes[:place]}


def _free_axes(trial: Trial, leaves: list[Any], tree: Any) -> list[Axes]:
    """The smallest sets of axes of one size that f takes with one more: found by trying, on shapes alone."""
    by_size: dict[int, list[tuple[int, int]]] = {}
    for n, leaf in enumerate(leaves):
        for axis, size in enumerate(np.shape(leaf)):
            by_size.setdefault(size, []).append((n, axis))
    found: list[Axes] = []
    guesses = itertools.count()
    for size, axes in by_size.items():
        waiting = list(axes)
        while waiting:
            first, *others = waiting
            candidates = (
                frozenset((first, *more)) for k in range(len(others) + 1) for more in itertools.combinations(others, k)
            )
            grown = (c for c in candidates if _takes(trial, _shaped(leaves, {c: size + 1}), tree))
            match = next(itertools.takewhile(lambda _: next(guesses) < GUESSES, grown), frozenset())
            found += [match] if match else []
            waiting = [a for a in others if a not in match]
    return found


def _shaped(leaves: list[Any], change: dict[Axes, int]) -> list[Any]:
    """The shapes of the leaves, those axes of other sizes."""
    shapes = [list(np.shape(leaf)) for leaf in leaves]
    for axes, size in change.items():
        for leaf, axis in axes:
            shapes[leaf][axis] = size
    return [jax.ShapeDtypeStruct(tuple(shape), leaf.dtype) for shape, leaf in zip(shapes, leaves, strict=True)]


def _takes(trial: Trial, leaves: list[Any], tree: Any) -> bool:
    """Whether f runs at these shapes, and the reference with the same result."""
    s, args = trial.subject, tree.unflatten(leaves)
    try:
        shapes = jax.eval_shape(s.f, *args)
        if s.reference is not None and jax.eval_shape(s.reference, *args) != shapes:
            return False
    except Exception:
        return False
    return jax.tree.structure(shapes) == s.outs.tree


def _resized(trial: Trial, leaves: list[Any], change: dict[Axes, int]) -> list[Any]:
    """The leaves cut, or continued with numbers like those that are there."""
    out = []
    for n, leaf in enumerate(leaves):
        for axes, size in change.items():
            for axis in (axis for of, axis in axes if of == n):
                grows = size > leaf.shape[axis] and trial.subject.ins.chosen[n]
                leaf = np.take(np.asarray(leaf), np.arange(size) % max(leaf.shape[axis], 1), axis)  # noqa: PLW2901
                if grows:
                    (leaf,) = varied(trial.rng, [leaf], by=0.3)  # noqa: PLW2901
        out.append(jnp.asarray(leaf))
    return out


def _elsewhere(trial: Trial, check: str, args: Any, where: str, subject: Subject | None = None) -> Iterator[Result]:
    """The check of elements at other arguments, under another name. Power is asked for at the first point only.

    It is skipped where f, or the derivative that JAX takes of it, does not exist: nobody said that f is called there.
    """
    if trial.wrong:
        yield Result(check, None, Verdict.SKIP, "it is wrong to begin with")
        return
    there = Trial(subject or trial.subject.unoptimised, args, trial.seed, trial.given)
    if reason := there.undefined:
        yield Result(check, None, Verdict.SKIP, f"{where}, {reason}")
        return
    try:
        found = list(_value.elements(there))
    except Exception as error:
        yield Result(check, None, Verdict.FAIL, failure=Failure(check, f"{where}, it raises {explain(error)}"))
        return
    failed = any(result.failure is not None for result in found)
    # A custom_jvp in f that is meant for real numbers, such as that of a projection, runs for complex ones as well.
    primitives = (_surgery.RULE,) if check == "dtypes" and trial.subject.mode == "vjp" else _surgery.RULES
    blameless = failed and not _surgery.rules(trial.subject.f, *args, primitives=primitives)
    for result in found:
        if result.failure is not None and blameless:
            note = f"{where}, the derivative is that of JAX alone, and not what differences say"
            yield result._replace(check=check, verdict=Verdict.SKIP, note=note, failure=None)
        elif result.failure is not None:
            failure = replace(result.failure, check=check, message=f"{where}, {result.failure.message}", repro=None)
            yield result._replace(check=check, failure=failure)
        else:
            yield Result(check, result.leaf, Verdict.PASS)
