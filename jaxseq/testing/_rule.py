"""Checks of the rule itself: contract and engagement."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import core, lax

from jaxseq.testing import _surgery
from jaxseq.testing._compare import largest
from jaxseq.testing._point import Arrays, Shaped, wide
from jaxseq.testing._report import Failure, Result, Verdict, explain
from jaxseq.testing._subject import Function, derivative
from jaxseq.testing._trial import Trial


def contract(trial: Trial) -> Iterator[Result]:
    """Check what bwd returns before JAX replaces None and casts, and the derivative that the user gets."""
    s, check = trial.subject, "contract"
    calls: list[_surgery.Call] = []
    watched = s.flat(_surgery.watched(s.f, calls.append) if s.rules else s.f, trial.rest)
    try:
        _, result = jax.eval_shape(derivative(s.mode, watched), trial.x, trial.patterns["joint"])
    except Exception as error:
        found = [w for call in calls for w in _violations(call)]
        message = "; ".join(found) or f"the derivative raises {explain(error)}"
        yield Result(check, None, Verdict.FAIL, failure=Failure(check, message))
        return
    for name, output in zip(s.outs.names, trial.outputs, strict=True):
        if not np.isfinite(output).all():
            message = f"{name} of f is not finite at `args`, so its derivative can't be checked: pass another point"
            yield Result(check, None, Verdict.FAIL, failure=Failure(check, message))
            return
    for message in dict.fromkeys(w for call in calls for w in _violations(call)):
        yield Result(check, None, Verdict.FAIL, failure=Failure(check, message))
    undefined = _undefined(trial)
    for leaf, got, primal, numbers in zip(trial.leaves, result, trial.like, trial.by_rule["joint"], strict=True):
        if (got.shape, got.dtype) != (primal.shape, primal.dtype):
            message = f"expected {_type(primal)}, got {_type(got)}"
        elif not np.isfinite(numbers).all():
            message = "it is not finite for a finite cotangent"
        elif leaf in undefined:
            message = "it is NaN at the arguments as passed, zeros included, where f is finite"
        else:
            yield Result(check, leaf, Verdict.PASS)
            continue
        yield Result(check, leaf, Verdict.FAIL, failure=Failure(check, message, leaf, seed=trial.seed))


def _undefined(trial: Trial) -> list[str]:
    """Return the leaves of the result with NaN at the arguments as passed, zeros included, if f is finite there."""
    if trial.asked is trial.x:
        return []
    outputs, result = map(wide, trial.subject.by_rule(trial.asked, trial.rest, trial.patterns["joint"]))
    if not all(np.isfinite(a).all() for a in outputs):
        return []
    return [leaf for leaf, numbers in zip(trial.leaves, result, strict=True) if np.isnan(numbers).any()]


def _violations(call: _surgery.Call) -> Iterator[str]:
    """Describe the errors in what one run of bwd returned."""
    if call.structure is None:
        return
    arguments, returned = call.structure.unflatten(range(len(call.primals))), call.returned
    if not isinstance(returned, tuple | list) or len(returned) != len(arguments):
        what = f"{len(returned)} entries" if isinstance(returned, tuple | list) else type(returned).__name__
        expected = f"a tuple of {len(arguments)} entries, one for each argument"
        yield f"bwd of {call.rule}: expected {expected}, got {what}"
        return
    for got, argument in zip(returned, arguments, strict=True):
        places, tree = jax.tree.flatten(argument, is_leaf=_is_none)
        leaves, got_tree = ([None] * len(places), tree) if got is None else jax.tree.flatten(got, is_leaf=_is_none)
        if got_tree != tree:
            names = ", ".join(call.names[n] for n in places if n is not None)
            spread = ", and JAX silently uses one array for all leaves" if len(leaves) == 1 else ""
            yield f"bwd of {call.rule}, for {names}: expected the tree {tree}, got {got_tree}{spread}"
            continue
        for n, leaf in zip(places, leaves, strict=True):
            if n is not None:
                yield from _leaf_violations(call, n, leaf)


def _leaf_violations(call: _surgery.Call, n: int, leaf: Any) -> Iterator[str]:
    primal, where = call.primals[n], f"bwd of {call.rule}, for {call.names[n]}"
    if not jnp.issubdtype(primal.dtype, jnp.inexact):
        return
    if leaf is None:
        if call.wanted is None or call.wanted[n]:
            yield f"{where}: expected {_type(primal)}, got None, which JAX takes as zero (`argnums` excludes arguments)"
    elif hasattr(leaf, "dtype") and (leaf.shape, leaf.dtype) != (primal.shape, primal.dtype):
        yield f"{where}: expected {_type(primal)}, got {_type(leaf)}"


def engagement(trial: Trial) -> Iterator[Result]:
    """Check that the rule runs: doubling its cotangents changes the gradient, and every transformation calls it."""
    s, check = trial.subject, "engagement"
    if s.mode != "vjp" or not s.rules:
        yield Result(check, None, Verdict.SKIP, "f calls no custom_vjp: JAX differentiates it")
        return
    run = s.program("doubled", lambda x, rest, c: derivative("vjp", s.flat(_surgery.doubled(s.f), rest))(x, c)[1])
    doubled = wide(run(trial.x, trial.rest, trial.patterns["joint"]))
    moved = [not np.array_equal(a, b) for a, b in zip(doubled, trial.by_rule["joint"], strict=True)]
    for leaf, moves in zip(trial.leaves, moved, strict=True):
        if moves:
            yield Result(check, leaf, Verdict.PASS)
        elif any(moved):
            yield Result(check, leaf, Verdict.SKIP, "its gradient is zero here, or is not computed by a rule")
    if not any(largest(numbers) for numbers in trial.by_rule["joint"]):
        yield Result(check, None, Verdict.INCONCLUSIVE, "all gradients are zero here")
    elif not any(moved):
        message = f"no gradient changes if the cotangents that the rules ({', '.join(s.rules)}) return are doubled"
        yield Result(check, None, Verdict.FAIL, failure=Failure(check, message))
    without_rule = []
    for name, transform in TRANSFORMATIONS.items():
        try:
            F = transform(s.on(trial.rest))
            outputs = jax.eval_shape(F, trial.x)
        except Exception:
            continue  # f does not support this transformation; the check of the transformation reports it
        calls: list[str] = []
        seed = [jnp.zeros(y.shape, y.dtype) for y in outputs]
        try:
            jax.eval_shape(derivative("vjp", _surgery.counted(F, calls.append)), trial.x, seed)
        except Exception as error:
            trial.notes.append(f"engagement under {name} could not be checked: {explain(error)}")
            continue
        if not calls:
            without_rule.append(name)
    if without_rule:
        message = f"the rule does not run under {', '.join(without_rule)}: JAX differentiates f itself there"
        yield Result(check, None, Verdict.FAIL, failure=Failure(check, message))


def _vmapped(F: Function) -> Function:
    def run(x: Arrays) -> Arrays:
        return jax.vmap(F)([jnp.stack([a, a]) for a in x])

    return run


def _scanned(F: Function) -> Function:
    return lambda x: lax.scan(lambda carry, _: (carry, F(x)), 0, None, length=1)[1]


def _in_cond(F: Function) -> Function:
    def run(x: Arrays) -> Arrays:
        return lax.cond(jnp.sum(jnp.real(x[0])) > 0, F, lambda x: [2 * y for y in F(x)], x)

    return run


TRANSFORMATIONS: dict[str, Callable[[Function], Function]] = {
    "jit": jax.jit,
    "vmap": _vmapped,
    "remat": jax.checkpoint,
    "scan": _scanned,
    "cond": _in_cond,
}


def _is_none(leaf: object) -> bool:
    return leaf is None


def _type(a: Shaped | core.ShapedArray) -> str:
    return f"{a.dtype}{list(a.shape)}"
