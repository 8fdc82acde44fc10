"""List, observe, double or remove the custom_vjp rules inside a function.

A jaxpr contains each call of a custom_vjp function as one equation, `custom_vjp_call`, with the jaxpr of the
undifferentiated function and the two functions of its rule. This module edits such equations in a copy of the jaxpr, at
any depth (inside jit, scan, cond, remat), and runs the edited copy in place of the function. This also works for jitted
functions, and the original function does not change.

Only this file depends on the internal format of jaxprs (JAX 0.10 to 0.12).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend import core, linear_util
from jax.typing import ArrayLike
from jaxtyping import PyTree

from jaxseq.testing._point import Structure, TreeFunction

JAXPR = (core.ClosedJaxpr, core.Jaxpr)
RULE = "custom_vjp_call"
RULES = (RULE, "custom_jvp_call")

# A jaxpr with or without its constants.
Program = core.ClosedJaxpr | core.Jaxpr
# Returns an equation in place of another one.
Edit = Callable[[core.JaxprEqn], core.JaxprEqn]


class Call(NamedTuple):
    """What one run of the backward function of a rule returned, before JAX processes it.

    Attributes:
        rule: the name of the custom_vjp function.
        returned: the returned object.
        structure: the tree structure of the arguments of the rule, a tuple.
        primals: shape and dtype of each leaf of the arguments.
        names: a name for each leaf.
        wanted: for each leaf, True if its cotangent is used; None if that is not known.
    """

    rule: str
    returned: object
    structure: Structure | None
    primals: tuple[ShapedArray, ...]
    names: tuple[str, ...]
    wanted: tuple[bool, ...] | None


def rules(f: TreeFunction, *args: PyTree, primitives: Sequence[str] = (RULE,)) -> list[str]:
    """Return the names of the functions with custom rules (`primitives`) that f(*args) calls, one for each call."""
    found: list[str] = []

    def note(eqn: core.JaxprEqn) -> core.JaxprEqn:
        found.append(_name(eqn))
        return eqn

    _edit(jax.make_jaxpr(f)(*args), note, primitives)
    return found


def plain(f: TreeFunction, *, jvps: bool = False) -> TreeFunction:
    """Return f with each custom_vjp function replaced by its undecorated function, which JAX differentiates.

    Args:
        f: any function.
        jvps: also replace custom_jvp functions.
    """

    def inline(eqn: core.JaxprEqn) -> core.JaxprEqn:
        program = eqn.params["call_jaxpr"]
        # The equation of a jitted call in this version of JAX.
        traced = jax.make_jaxpr(jax.jit(core.jaxpr_as_fun(program)))(*program.in_avals)
        (call,) = opened(traced)[0].eqns
        return eqn.replace(primitive=call.primitive, params=call.params)

    return _rewritten(f, inline, RULES if jvps else (RULE,))


def doubled(f: TreeFunction) -> TreeFunction:
    """Return f with the cotangents that its rules return doubled."""

    def twice(leaf: Any) -> Any:
        # None and the float0 zeros of integer arguments stay as they are.
        return leaf * 2 if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf

    def edit(eqn: core.JaxprEqn) -> core.JaxprEqn:
        bwd = eqn.params["bwd"]
        return _with(eqn, bwd=_on(bwd, lambda *args: jax.tree.map(twice, bwd.f(*args))))

    return _rewritten(f, edit)


def watched(f: TreeFunction, see: Callable[[Call], None]) -> TreeFunction:
    """Return f with rules that call `see` with what their backward functions return, each time that one runs."""

    def edit(eqn: core.JaxprEqn) -> core.JaxprEqn:
        bwd, fwd = eqn.params["bwd"], eqn.params["fwd_jaxpr_thunk"]
        wanted: list[tuple[bool, ...]] = []
        # In a rule that nothing has transformed yet, the outermost transformation flattens the trees.
        flattening = bwd.transforms[0][1] if bwd.transforms else ()
        structure, primals = flattening[:2] if len(flattening) >= 2 else (None, ())

        def forward(*perturbed: bool) -> PyTree:
            wanted.append(tuple(bool(p) for p in perturbed))
            return fwd.f(*perturbed)

        def backward(*args: PyTree) -> object:
            returned = bwd.f(*args)
            names = fwd.debug_info.arg_names or ()
            if len(names) != len(primals):
                names = tuple(f"argument {n}" for n in range(len(primals)))
            see(Call(_name(eqn), returned, structure, tuple(primals), names, wanted[-1] if wanted else None))
            return returned

        return _with(eqn, bwd=_on(bwd, backward), fwd_jaxpr_thunk=_on(fwd, forward))

    return _rewritten(f, edit)


# --- Jaxprs ---


def _rewritten(f: TreeFunction, edit: Edit, primitives: Sequence[str] = (RULE,)) -> TreeFunction:
    def run(*args: PyTree) -> PyTree:
        program, shapes = jax.make_jaxpr(f, return_shape=True)(*args)
        outputs = core.jaxpr_as_fun(_edit(program, edit, primitives))(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    return run


def _edit(jaxpr: Program, edit: Edit, primitives: Sequence[str] = (RULE,)) -> Program:
    """Return a copy of the jaxpr with `edit` applied to each equation of one of these primitives."""
    if not isinstance(jaxpr, core.Jaxpr):
        return jaxpr.replace(jaxpr=_edit(jaxpr.jaxpr, edit, primitives))

    def edited(eqn: core.JaxprEqn) -> core.JaxprEqn:
        eqn = eqn.replace(params=with_inner(eqn.params, lambda inner: _edit(inner, edit, primitives)))
        return edit(eqn) if eqn.primitive.name in primitives else eqn

    return jaxpr.replace(eqns=[edited(eqn) for eqn in jaxpr.eqns])


def with_inner(params: dict[str, object], change: Callable[[Program], Program]) -> dict[str, object]:
    """Apply `change` to each jaxpr in the parameters of an equation, also inside tuples, NamedTuples and lists."""

    def changed(value: object) -> object:
        if isinstance(value, JAXPR):
            return change(value)
        if isinstance(value, tuple | list) and any(isinstance(v, JAXPR) for v in value):
            # The class of a NamedTuple takes one argument per field; its `_make` takes an iterable.
            return getattr(type(value), "_make", type(value))([changed(v) for v in value])
        return value

    return {name: changed(value) for name, value in params.items()}


def opened(jaxpr: Program) -> tuple[core.Jaxpr, Sequence[ArrayLike]]:
    """Return the open jaxpr and its constants, whether or not this version of JAX wraps closed jaxprs."""
    return (jaxpr, getattr(jaxpr, "consts", ())) if isinstance(jaxpr, core.Jaxpr) else (jaxpr.jaxpr, jaxpr.consts)


def _with(eqn: core.JaxprEqn, **params: object) -> core.JaxprEqn:
    return eqn.replace(params={**eqn.params, **params})


def _name(eqn: core.JaxprEqn) -> str:
    return opened(eqn.params["call_jaxpr"])[0].debug_info.func_name


def _on(wrapped: linear_util.WrappedFun, f: TreeFunction) -> linear_util.WrappedFun:
    """Apply the transformations of the wrapped function `wrapped` to f instead."""
    new = linear_util.wrap_init(f, debug_info=wrapped.debug_info)
    for (transformation, static), store in reversed(list(zip(wrapped.transforms, wrapped.stores, strict=True))):
        new = new.wrap(transformation, static, store)
    return new
