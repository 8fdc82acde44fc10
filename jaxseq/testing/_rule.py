"""Checks of the rule itself: contract and engagement."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxseq.testing import _surgery
from jaxseq.testing._compare import largest
from jaxseq.testing._point import Arrays, wide
from jaxseq.testing._report import Failure, Result, Verdict, explain
from jaxseq.testing._subject import Function, derivative
from jaxseq.testing._trial import Trial


def contract(trial: Trial) -> Iterator[Result]:
    """What bwd returns, before JAX fills gaps and casts, and what a user gets in the end."""
    s, check = trial.subject, "contract"
    calls: list[_surgery.Call] = []
    watched = s.flat(_surgery.watched(s.f, calls.append) if s.rules else s.f, trial.rest)
    try:
        _, result = jax.eval_shape(derivative(s.mode, watched), trial.x, trial.patterns["joint"])
    except Exception as error:
        found = [w for call in calls for w in _violations(call)]
        message = "; ".join(found) or f"the derivative can't be taken: {explain(error)}"
        yield Result(check, None, Verdict.FAIL, failure=Failure(check, message))
        return
    for name, output in zip(s.outs.names, trial.outputs, strict=True):
        if not np.isfinite(output).all():
            message = f"{name} of f is NaN or infinite at `args`, where no derivative can be judged: take another point"
            yield Result(check, None, Verdict.FAIL, failure=Failure(check, message))
            return
    for message in dict.fromkeys(w for call in calls for w in _violations(call)):
        yield Result(check, None, Verdict.FAIL, failure=Failure(check, message))
    undefined = _undefined(trial)
    for leaf, got, primal, numbers in zip(trial.leaves, result, trial.like, trial.by_hand["joint"], strict=True):
        if (got.shape, got.dtype) != (primal.shape, primal.dtype):
            message = f"{_type(got)} came for {_type(primal)}"
        elif not np.isfinite(numbers).all():
            message = "it is not finite for a finite cotangent"
        elif leaf in undefined:
            message = "it is NaN at the arguments as they were given, with their zeros, where f is finite"
        else:
            yield Result(check, leaf, Verdict.PASS)
            continue
        yield Result(check, leaf, Verdict.FAIL, failure=Failure(check, message, leaf, seed=trial.seed))


def _undefined(trial: Trial) -> list[str]:
    """The leaves of the result with NaNs at the point with its zeros, where f is finite."""
    if trial.asked is trial.x:
        return []
    outputs, result = map(wide, trial.subject.by_hand(trial.asked, trial.rest, trial.patterns["joint"]))
    if not all(np.isfinite(a).all() for a in outputs):
        return []
    return [leaf for leaf, numbers in zip(trial.leaves, result, strict=True) if np.isnan(numbers).any()]


def _violations(call: _surgery.Call) -> Iterator[str]:
    """What is wrong with what one run of bwd returned."""
    if call.structure is None:
        return
    arguments, returned = call.structure.unflatten(range(len(call.primals))), call.returned
    if not isinstance(returned, tuple | list) or len(returned) != len(arguments):
        what = f"{len(returned)} entries" if isinstance(returned, tuple | list) else type(returned).__name__
        yield f"bwd of {call.rule} must return a tuple of {len(arguments)} entries, one an argument; it returned {what}"
        return
    for got, argument in zip(returned, arguments, strict=True):
        places, tree = jax.tree.flatten(argument, is_leaf=_nothing)
        leaves, got_tree = ([None] * len(places), tree) if got is None else jax.tree.flatten(got, is_leaf=_nothing)
        if got_tree != tree:
            names = ", ".join(call.names[n] for n in places if n is not None)
            spread = ", and JAX spreads one array over all leaves without a word" if len(leaves) == 1 else ""
            yield f"bwd of {call.rule}, for {names}: the tree {got_tree} came for {tree}{spread}"
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
            yield f"{where}: None for {_type(primal)}, which JAX takes for zero (argnums leaves an argument out)"
    elif hasattr(leaf, "dtype") and (leaf.shape, leaf.dtype) != (primal.shape, primal.dtype):
        yield f"{where}: {_type(leaf)} for {_type(primal)}"


def engagement(trial: Trial) -> Iterator[Result]:
    """Whether the rule is what runs: twice its cotangents must move the gradient, and every transformation call it."""
    s, check = trial.subject, "engagement"
    if s.mode != "vjp" or not s.rules:
        yield Result(check, None, Verdict.SKIP, "no custom_vjp is in f: JAX differentiates it")
        return
    run = s.program("doubled", lambda x, rest, c: derivative("vjp", s.flat(_surgery.doubled(s.f), rest))(x, c)[1])
    doubled = wide(run(trial.x, trial.rest, trial.patterns["joint"]))
    moved = [not np.array_equal(a, b) for a, b in zip(doubled, trial.by_hand["joint"], strict=True)]
    for leaf, moves in zip(trial.leaves, moved, strict=True):
        if moves:
            yield Result(check, leaf, Verdict.PASS)
        elif any(moved):
            yield Result(check, leaf, Verdict.SKIP, "its gradient is zero here, or does not come from a rule")
    if not any(largest(numbers) for numbers in trial.by_hand["joint"]):
        yield Result(check, None, Verdict.INCONCLUSIVE, "every gradient is zero here, doubled or not")
    elif not any(moved):
        message = f"no gradient changes when what the rules return ({', '.join(s.rules)}) is doubled"
        yield Result(check, None, Verdict.FAIL, failure=Failure(check, message))
    silent = []
    for name, transform in TRANSFORMATIONS.items():
        try:
            F = transform(s.on(trial.rest))
            outputs = jax.eval_shape(F, trial.x)
        except Exception:
            continue  # f can't be transformed so: the checks of that transformation say it
        calls: list[_surgery.Call] = []
        seed = [jnp.zeros(y.shape, y.dtype) for y in outputs]
        try:
            jax.eval_shape(derivative("vjp", _surgery.watched(F, calls.append)), trial.x, seed)
        except Exception as error:
            trial.notes.append(f"engagement under {name} is not known: {explain(error)}")
            continue
        if not calls:
            silent.append(name)
    if silent:
        message = f"the rule does not run under {', '.join(silent)}: JAX differentiates there by itself"
        yield Result(check, None, Verdict.FAIL, failure=Failure(check, message))


def _vmapped(F: Function) -> Function:
    def run(x: Arrays) -> Arrays:
        return jax.vmap(F)([jnp.stack([a, a]) for a in x])

    return run


def _scanned(F: Function) -> Function:
    return lambda x: lax.scan(lambda carry, _: (carry, F(x)), 0, None, length=1)[1]


def _in_cond(F: Function) -> Function:
    def run(x: Arrays) -> Arrays:
        return lax.cond(jnp.sum(x[0].real) > 0, F, lambda x: [2 * y for y in F(x)], x)

    return run


TRANSFORMATIONS: dict[str, Callable[[Function], Function]] = {
    "jit": jax.jit,
    "vmap": _vmapped,
    "remat": jax.checkpoint,
    "scan": _scanned,
    "cond": _in_cond,
}


def _nothing(leaf: Any) -> bool:
    return leaf is None


def _type(a: Any) -> str:
    return f"{a.dtype}{list(a.shape)}"
