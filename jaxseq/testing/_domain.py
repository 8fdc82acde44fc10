"""Checks of the domain: other dtypes and other sizes than those of the arguments given."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxseq.testing import _value
from jaxseq.testing._compare import Tolerance, apart, compare
from jaxseq.testing._point import Arrays, inexact, leaf_names, varied, wide, wide_dtype
from jaxseq.testing._report import Failure, Result, Verdict, explain
from jaxseq.testing._subject import like
from jaxseq.testing._trial import Trial

# --- Dtypes ---

# A bound of low precision that is wider than this decides nothing: a gradient of the wrong sign must not pass.
DECIDES_LOW = 0.5


def dtypes(trial: Trial) -> Iterator[Result]:
    """Lower precision, mixed dtypes, complex numbers where f takes them; integers give float0."""
    count = len(trial.x)
    if any(wide_dtype(a) == np.complex128 for a in trial.x):
        lower = [np.complex64 if wide_dtype(a) == np.complex128 else np.float32 for a in trial.x]
        yield from _lower(trial, "complex64", lower)
    else:
        for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
            yield from _lower(trial, np.dtype(dtype).name, [dtype] * count)
        groups = trial.subject.ins.groups
        for group in sorted(set(groups)) if len(set(groups)) > 1 else ():
            mixed = [jnp.bfloat16 if g == group else jnp.float32 for g in groups]
            leaf = trial.subject.ins.names[groups.index(group)]
            yield from _lower(trial, f"float32 with {leaf} and its siblings in bfloat16", mixed)
        yield from _complex(trial)
    if trial.subject.mode == "vjp":
        yield from _integers(trial)


# In low precision a number next to a kink falls on its other side, and nothing can be said: look elsewhere then.
ATTEMPTS = 3


def _lower(trial: Trial, name: str, dtypes: Sequence[Any]) -> Iterator[Result]:
    """The rule at rounded arguments, against the truth in float64 at the same rounded numbers."""
    found: list[Result] = []
    x = wide(trial.x)
    for _ in range(ATTEMPTS):
        found = list(_lower_at(trial, name, [np.asarray(a).astype(d) for a, d in zip(x, dtypes, strict=True)]))
        if all(result.verdict is not Verdict.INCONCLUSIVE for result in found):
            break
        x = varied(trial.rng, x, by=0.2)
    yield from found


def _lower_at(trial: Trial, name: str, x: Arrays) -> Iterator[Result]:
    s, check, joint = trial.subject, "dtypes", trial.patterns["joint"]
    with jax.enable_x64(False):
        x = [jnp.asarray(a) for a in x]
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

    def allowed(side: int, n: int, e: np.ndarray) -> Tolerance:
        """What is asked of no rule is to be better than JAX in that dtype, or than rounding lets any be."""
        with jax.enable_x64(False):
            (own,) = wide([s.by_truth(x, trial.rest, seed)[side][n]])
            off = max(4 * apart(e, own), 10 * trial.rounding_at(x, seed)[side][n])
        off = off if np.isfinite(off) else np.inf
        return Tolerance(max(off, tolerance.relative), "four times the error of JAX's own, or ten times rounding's")

    for side, names in enumerate((s.outs.names, trial.leaves)):
        message = f"at arguments rounded to {name}, {'a value' if side == 0 else 'it'} is not what it is in float64"
        for n, (leaf, a, e) in enumerate(zip(names, *map(wide, (got[side], expected[side])), strict=True)):
            known = {"decides": DECIDES_LOW, "seed": trial.seed, "pattern": "joint"}
            result = compare(check, leaf, a, e, tolerance, message, **known)
            if result.verdict is Verdict.FAIL and true:
                wider = allowed(side, n, e)
                if np.isinf(wider.relative):
                    result = Result(check, leaf, Verdict.INCONCLUSIVE, f"JAX's own numbers overflow in {name}")
                else:
                    result = compare(check, leaf, a, e, wider, message, **known)
            yield result if leaf in trial.leaves else result._replace(leaf=None)


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


def _integers(trial: Trial) -> Iterator[Result]:
    """Cotangents of integers and booleans have the dtype float0."""
    s, check = trial.subject, "dtypes"
    args = s.ins.join(trial.x, trial.rest)
    others = [leaf for leaf in jax.tree.leaves(args) if not inexact(leaf)]
    if not others:
        return

    def whole(args: Any) -> Any:
        outputs, pull = jax.vjp(lambda args: s.outs.split(s.f(*args))[0], args)
        return pull(like(outputs, trial.patterns["joint"]))[0]

    try:
        result = jax.eval_shape(whole, args)
    except Exception as error:
        message = f"with integers among what is differentiated it raises {explain(error)}"
        yield Result(check, None, Verdict.FAIL, failure=Failure(check, message))
        return
    cotangents = [
        c for c, leaf in zip(jax.tree.leaves(result), jax.tree.leaves(args), strict=True) if not inexact(leaf)
    ]
    wrong = {str(c.dtype) for c in cotangents} - {str(np.dtype(jax.dtypes.float0))}
    failure = Failure(check, f"the cotangent of an integer is {', '.join(wrong)}, expected float0") if wrong else None
    yield Result(check, None, Verdict.FAIL if wrong else Verdict.PASS, failure=failure)


# --- Sizes ---

Axes = frozenset[tuple[int, int]]  # (leaf, axis): axes that f wants to have one and the same size

# How many guesses at what sizes f takes are worth their time.
GUESSES = 150


def sizes(trial: Trial) -> Iterator[Result]:
    """Each size that f leaves free at one and at none, and all of them different where some are equal."""
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
    if apart := _apart([(axes, size(axes)) for axes in free], {n for leaf in leaves for n in np.shape(leaf)}):
        points["with sizes that are all different"] = apart
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
            grown = (c for c in candidates if _takes(trial, _grown(leaves, c, size + 1), tree))
            match = next(itertools.takewhile(lambda _: next(guesses) < GUESSES, grown), frozenset())
            found += [match] if match else []
            waiting = [a for a in others if a not in match]
    return found


def _grown(leaves: list[Any], axes: Axes, size: int) -> list[Any]:
    """The shapes of the leaves, those axes of another size."""
    shapes = [list(np.shape(leaf)) for leaf in leaves]
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
                grows = size > leaf.shape[axis]
                leaf = np.take(np.asarray(leaf), np.arange(size) % max(leaf.shape[axis], 1), axis)  # noqa: PLW2901
                if grows and inexact(leaf):
                    (leaf,) = varied(trial.rng, [leaf], by=0.3)  # noqa: PLW2901
        out.append(jnp.asarray(leaf))
    return out


def _elsewhere(trial: Trial, check: str, args: Any, where: str) -> Iterator[Result]:
    """The check of elements at other arguments, under another name. Power is asked for at the first point only."""
    if trial.wrong:
        yield Result(check, None, Verdict.SKIP, "it is wrong to begin with")
        return
    there = Trial(trial.subject.unoptimised, args, trial.seed, trial.given)
    try:
        found = list(_value.elements(there))
    except Exception as error:
        yield Result(check, None, Verdict.FAIL, failure=Failure(check, f"{where}, it raises {explain(error)}"))
        return
    for result in found:
        if result.failure is not None:
            failure = replace(result.failure, check=check, message=f"{where}, {result.failure.message}", repro=None)
            yield result._replace(check=check, failure=failure)
        else:
            yield Result(check, result.leaf, Verdict.PASS)
