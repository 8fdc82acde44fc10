"""Checks at other points of the domain: other dtypes, integers and sizes than those of the arguments."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree

from jaxseq._types import ArrayOrScalar
from jaxseq.testing import _surgery, _value
from jaxseq.testing._compare import Tolerance, compare, distance, largest
from jaxseq.testing._point import (
    Args,
    Arrays,
    Leaf,
    Shapes,
    Structure,
    inexact,
    leaf_names,
    varied,
    wide,
    wide_dtype,
)
from jaxseq.testing._report import Failure, Result, Verdict, explain
from jaxseq.testing._subject import Subject, like
from jaxseq.testing._trial import Trial

# --- Dtypes ---

# In low precision, a wider bound than this is inconclusive: it could accept a gradient of the wrong sign.
DECIDES_LOW = 0.5


def dtypes(trial: Trial) -> Iterator[Result]:
    """Check lower precision, mixed dtypes, and complex numbers if f accepts them."""
    count = len(trial.x)
    if any(wide_dtype(a) == np.complex128 for a in trial.x):
        lower = [np.complex64 if wide_dtype(a) == np.complex128 else np.float32 for a in trial.x]
        yield from _lower(trial, "complex64", lower)
    else:
        lower = [(np.dtype(dtype).name, [dtype] * count) for dtype in (jnp.float32, jnp.bfloat16, jnp.float16)]
        groups = trial.subject.ins.groups
        for group in sorted(set(groups)) if len(set(groups)) > 1 else ():
            mixed = [jnp.bfloat16 if g == group else jnp.float32 for g in groups]
            argument = trial.subject.ins.arguments[groups.index(group)]
            lower.append((f"float32 with {argument} in bfloat16", mixed))
        for name, each in lower:
            found = list(_lower(trial, name, each))
            yield from found
            if any(result.note.startswith(ANOTHER) for result in found):
                break  # f also differs in the other dtypes
        yield from _complex(trial)


# In low precision, a value near a kink may be rounded across it, which is inconclusive: try another point.
ATTEMPTS = 3
ANOTHER = "f is a different function in"


def _lower(trial: Trial, name: str, dtypes: Sequence[DTypeLike]) -> Iterator[Result]:
    """Compare the rule at rounded arguments with the expected derivative in float64 at the same rounded values."""
    found: list[Result] = []
    x = wide(trial.x)
    for _ in range(ATTEMPTS):
        found = list(_lower_at(trial, name, x, dtypes))
        if all(result.verdict is not Verdict.INCONCLUSIVE for result in found):
            break
        x = varied(trial.rng, x, by=0.2)
    yield from found


def _lower_at(trial: Trial, name: str, exact: Arrays, dtypes: Sequence[DTypeLike]) -> Iterator[Result]:
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
            yield Result(check, None, Verdict.SKIP, f"f does not accept {name}: {explain(error)}")
            return
        primals, results = (outputs, x) if s.mode == "vjp" else (x, outputs)
        seed = wide(like(primals, joint))
        try:
            got = s.by_rule(x, trial.rest, seed)
        except Exception as error:
            if reason := trial.raising(x, seed):
                yield Result(check, None, Verdict.SKIP, f"for {name}, {reason}")
                return
            failure = Failure(check, f"f accepts {name}, but its derivative raises {explain(error)}")
            yield Result(check, None, Verdict.FAIL, failure=failure)
            return
    wrong = [
        Failure(check, f"for {name}: expected {r.dtype}{list(r.shape)}, got {a.dtype}{list(a.shape)}", leaf)
        for leaf, a, r in zip(trial.leaves, got[1], results, strict=True)
        if (a.dtype, a.shape) != (r.dtype, r.shape)
    ]
    if wrong:
        yield from (Result(check, failure.argument, Verdict.FAIL, failure=failure) for failure in wrong)
        return

    # A gradient that is wrong in float64 has failed already; here it is compared with itself.
    true = trial.true is not None and not trial.wrong
    expected = (s.by_truth if true else s.by_rule)([jnp.asarray(a) for a in wide(x)], trial.rest, seed)
    tolerance = trial.tolerance(max((a.dtype for a in x), key=lambda d: float(jnp.finfo(d).eps)))
    first = tolerance._replace(relative=min(tolerance.relative, DECIDES_LOW))  # it is wider along very long axes

    @cache
    def jax_results() -> tuple[list[ArrayOrScalar], list[ArrayOrScalar]] | None:
        """Return `(outputs, result)` by JAX in that dtype; None if it raises."""
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
        """Return a tolerance from the errors of JAX in that dtype and of rounding: no rule has to be more accurate."""
        by_jax = jax_results()
        off = max(4 * distance(e, by_jax[side][n]), 10 * rounding()[side][n]) if by_jax else np.inf
        off = off if np.isfinite(off) else np.inf
        return Tolerance(
            max(off, tolerance.relative), "four times the error of the derivative by JAX, or ten times that of rounding"
        )

    def another_function(n: int, e: ArrayOrScalar) -> str | None:
        """Return the reason if the values of f without its rule differ between that dtype and float64, else None."""
        if (by_jax := jax_results()) is None:
            return None
        if not np.isfinite(by_jax[0][n]).all():
            return f"f leaves the range of {name}: its values are not finite"
        off = distance(e, by_jax[0][n])
        if off <= max(tolerance.relative, 10 * rounding()[0][n]):
            return None
        return (
            f"{ANOTHER} {name}: its values differ from those in float64 by {off:.0e} of the largest, more than "
            "rounding explains. One cause is random numbers from a fixed key, which depend on the dtype"
        )

    known = {"decides": DECIDES_LOW, "seed": trial.seed, "pattern": "joint"}
    found: list[Result] = []
    for side, names in enumerate((s.outs.names, trial.leaves)):
        message = f"at arguments rounded to {name}, {'an output' if side == 0 else 'it'} differs from that in float64"
        for n, (leaf, a, e) in enumerate(zip(names, got[side], wide(expected[side]), strict=True)):
            (value,) = wide([a])
            if reason := _out_of_range(e, a.dtype):
                result = Result(check, leaf, Verdict.SKIP, f"for {name}, {reason}")
            else:
                result = compare(check, leaf, value, e, first, message, **known)
            if result.verdict is Verdict.FAIL and not trial.wrong:
                if side == 0 and (reason := another_function(n, e)):
                    yield Result(check, None, Verdict.SKIP, reason)
                    return
                wider = allowed(side, n, e)
                if np.isinf(wider.relative):
                    verdict = Verdict.INCONCLUSIVE if np.isfinite(value).all() else Verdict.SKIP
                    result = Result(check, leaf, verdict, f"the derivative that JAX computes is not finite in {name}")
                else:
                    result = compare(check, leaf, value, e, wider, message, **known)
            found.append(result if leaf in trial.leaves else result._replace(leaf=None))
    yield from found


def _out_of_range(a: ArrayOrScalar, dtype: np.dtype) -> str | None:
    """Return the reason if a finite array is out of the range of a dtype, else None."""
    info, size = jnp.finfo(dtype), largest(a)
    if 0 < size < float(info.tiny):
        return f"its values are below the smallest normal number of {np.dtype(dtype)}"
    if float(info.max) < size < np.inf:
        return f"its values are above the largest number of {np.dtype(dtype)}"
    return None


def _complex(trial: Trial) -> Iterator[Result]:
    """Repeat the check of elements at complex arguments, if f accepts them."""
    s, check = trial.subject, "dtypes"
    x = [jnp.asarray(a + 1j * b) for a, b in zip(wide(trial.x), varied(trial.rng, wide(trial.x), by=0.5), strict=True)]
    try:
        jax.eval_shape(s.on(trial.rest), x)
    except Exception as error:
        yield Result(check, None, Verdict.SKIP, f"f does not accept complex numbers: {explain(error)}")
        return
    yield from _elements_at(trial, check, s.ins.join(x, trial.rest), "for complex arguments")


# --- Integers ---


def integers(trial: Trial) -> Iterator[Result]:
    """Check that integers and booleans have float0 cotangents, and the rule at repeated and at distinct integers."""
    s, check = trial.subject, "integers"
    args = s.ins.join(trial.x, trial.rest)
    leaves, tree = jax.tree.flatten(args)
    if all(map(inexact, leaves)):
        yield Result(check, None, Verdict.SKIP, "no argument has integers or booleans")
        return
    if s.mode == "vjp":
        yield _float0(trial, args)
    names = leaf_names(s.f, args)
    for where, change in (("with repeated integers in", _repeated), ("with distinct integers in", _distinct)):
        changed = [change(leaf) for leaf in leaves]
        which = [name for name, old, new in zip(names, leaves, changed, strict=True) if new is not old]
        if which:
            # The shapes do not change, so the compiled programs of the subject are reused.
            point = tree.unflatten(changed)
            yield from _elements_at(trial, check, point, f"{where} {' and '.join(which)}", trial.subject)


def _repeated(leaf: Leaf) -> Leaf:
    """Replace every second number by the one before it; return the leaf unchanged if it has repeated numbers.

    A permutation of 0 .. n - 1 is also unchanged, since f may be defined only for permutations.
    """
    if not jnp.issubdtype(leaf.dtype, jnp.integer) or np.unique(leaf).size < leaf.size or leaf.size < 2:
        return leaf
    flat = np.asarray(leaf).ravel()
    if (np.sort(flat) == np.arange(flat.size)).all():
        return leaf
    return jnp.asarray(flat[np.arange(flat.size) // 2 * 2].reshape(leaf.shape))


def _distinct(leaf: Leaf) -> Leaf:
    """Replace repeated numbers by distinct ones in the same range and order, unless the range is too small."""
    if not jnp.issubdtype(leaf.dtype, jnp.integer) or np.unique(leaf).size == leaf.size:
        return leaf
    flat = np.asarray(leaf).ravel()
    low, high = int(flat.min()), int(flat.max())
    if high - low + 1 < flat.size:
        return leaf
    spread = low + np.arange(flat.size) * (high - low) // (flat.size - 1)
    ranks = np.argsort(np.argsort(flat, kind="stable"))
    return jnp.asarray(spread[ranks].reshape(leaf.shape).astype(leaf.dtype))


def _float0(trial: Trial, args: Args) -> Result:
    """Check that cotangents of integers and booleans have the dtype float0."""
    s, check = trial.subject, "integers"

    def whole(args: Args) -> tuple[PyTree, ...]:
        outputs, pull = jax.vjp(lambda args: s.outs.split(s.f(*args))[0], args)
        return pull(like(outputs, trial.patterns["joint"]))[0]

    try:
        result = jax.eval_shape(whole, args)
    except Exception as error:
        message = f"with integers among the differentiated arguments, it raises {explain(error)}"
        return Result(check, None, Verdict.FAIL, failure=Failure(check, message))
    cotangents = [
        c for c, leaf in zip(jax.tree.leaves(result), jax.tree.leaves(args), strict=True) if not inexact(leaf)
    ]
    wrong = {str(c.dtype) for c in cotangents} - {str(np.dtype(jax.dtypes.float0))}
    failure = Failure(check, f"the cotangent of an integer is {', '.join(wrong)}, expected float0") if wrong else None
    return Result(check, None, Verdict.FAIL if wrong else Verdict.PASS, failure=failure)


# --- Sizes ---

Axes = frozenset[tuple[int, int]]  # (leaf, axis): axes that f requires to have the same size

# Maximum number of size changes to try on f.
GUESSES = 150


def sizes(trial: Trial) -> Iterator[Result]:
    """Check each free size at one and zero, all free sizes plus one, and with all sizes different."""
    s, check = trial.subject, "sizes"
    args = s.ins.join(trial.x, trial.rest)
    leaves, tree = jax.tree.flatten(args)
    free = _free_axes(trial, leaves, tree)
    if not free:
        yield Result(check, None, Verdict.SKIP, "f accepts only these sizes")
        return
    names = leaf_names(s.f, args)
    size = lambda axes: leaves[min(axes)[0]].shape[min(axes)[1]]  # noqa: E731
    points = {}
    for axes in free:
        name = " and ".join(f"axis {axis} of {names[leaf]}" for leaf, axis in sorted(axes))
        points |= {f"with {n} along {name}": {axes: n} for n in (1, 0) if size(axes) > n}
    full = [axes for axes in free if size(axes)]  # an empty axis can't be extended
    if different := _all_different(
        [(axes, size(axes)) for axes in full], {n for leaf in leaves for n in np.shape(leaf)}
    ):
        points["with sizes that are all different"] = different
    more: dict[Axes, int] = {}
    for axes in full:
        wider = {**more, axes: size(axes) + 1}
        more = wider if _accepts(trial, _shaped(leaves, wider), tree) else more
    if more:
        points["with one more along every axis"] = more  # this changes the parity of each size
    for name, change in points.items():
        changed = _resized(trial, leaves, change)
        if _accepts(trial, changed, tree):
            yield from _elements_at(trial, check, tree.unflatten(changed), name)


def _all_different(free: list[tuple[Axes, int]], taken: set[int]) -> dict[Axes, int]:
    """Return a new, unused size for each axis whose size occurs earlier. Small sizes keep the amount of work low."""
    new = (n for n in itertools.count(2) if n not in taken)
    sizes = [n for _, n in free]
    return {axes: next(new) for place, (axes, n) in enumerate(free) if n in sizes[:place]}


def _free_axes(trial: Trial, leaves: Shapes, tree: Structure) -> list[Axes]:
    """Return the smallest sets of axes of equal size that f accepts one longer, found by trial on shapes only."""
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
            grown = (c for c in candidates if _accepts(trial, _shaped(leaves, {c: size + 1}), tree))
            match = next(itertools.takewhile(lambda _: next(guesses) < GUESSES, grown), frozenset())
            found += [match] if match else []
            waiting = [a for a in others if a not in match]
    return found


def _shaped(leaves: Shapes, change: dict[Axes, int]) -> list[jax.ShapeDtypeStruct]:
    """Return the shapes of the leaves with the sizes in `change`."""
    shapes = [list(np.shape(leaf)) for leaf in leaves]
    for axes, size in change.items():
        for leaf, axis in axes:
            shapes[leaf][axis] = size
    return [jax.ShapeDtypeStruct(tuple(shape), leaf.dtype) for shape, leaf in zip(shapes, leaves, strict=True)]


def _accepts(trial: Trial, leaves: Shapes, tree: Structure) -> bool:
    """Return True if f runs at these shapes, and the reference too with the same output shapes."""
    s, args = trial.subject, tree.unflatten(leaves)
    try:
        shapes = jax.eval_shape(s.f, *args)
        if s.reference is not None and jax.eval_shape(s.reference, *args) != shapes:
            return False
    except Exception:
        return False
    return jax.tree.structure(shapes) == s.outs.tree


def _resized(trial: Trial, leaves: Arrays, change: dict[Axes, int]) -> list[jax.Array]:
    """Cut the leaves to the sizes in `change`, or extend them by repetition, with variations if differentiated."""
    out = []
    for n, leaf in enumerate(leaves):
        for axes, size in change.items():
            for axis in (axis for of, axis in axes if of == n):
                grows = size > leaf.shape[axis] and trial.subject.ins.differentiated[n]
                leaf = np.take(np.asarray(leaf), np.arange(size) % max(leaf.shape[axis], 1), axis)  # noqa: PLW2901
                if grows:
                    (leaf,) = varied(trial.rng, [leaf], by=0.3)  # noqa: PLW2901
        out.append(jnp.asarray(leaf))
    return out


def _elements_at(trial: Trial, check: str, args: Args, where: str, subject: Subject | None = None) -> Iterator[Result]:
    """Run the check of elements at other arguments, under the name `check`. Power is checked only at the first point.

    It is skipped if f or its derivative by JAX does not exist there, since f need not be defined at this point.
    """
    if trial.wrong:
        yield Result(check, None, Verdict.SKIP, "the gradient is already wrong at the arguments passed")
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
    # A custom_jvp that is meant for real numbers, such as that of a projection, also runs for complex ones.
    primitives = (_surgery.RULE,) if check == "dtypes" and trial.subject.mode == "vjp" else _surgery.RULES
    without_rule = failed and not _surgery.rules(trial.subject.f, *args, primitives=primitives)
    for result in found:
        if result.failure is not None and without_rule:
            note = f"{where}, f has no custom rule, and the derivative by JAX differs from finite differences"
            yield result._replace(check=check, verdict=Verdict.SKIP, note=note, failure=None)
        elif result.failure is not None:
            failure = replace(result.failure, check=check, message=f"{where}, {result.failure.message}", repro=None)
            yield result._replace(check=check, failure=failure)
        else:
            yield Result(check, result.leaf, Verdict.PASS)
