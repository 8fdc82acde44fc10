"""List, observe, double or remove the custom_vjp rules inside a function.

A jaxpr contains each call of a custom_vjp function as one equation, `custom_vjp_call`, with the jaxpr of the
undifferentiated function and the two functions of its rule. This module edits such equations in a copy of the jaxpr, at
any depth (inside jit, scan, cond, remat), and runs the edited copy in place of the function. This also works for jitted
functions, and the original function does not change.

A function of `jaxseq.both_modes` is a `custom_jvp_call` named `in_both_modes`. It calls its custom_vjp function on
constants, and its rule has one `tangent_call` equation. The linear map of its `op` has the pullback as transpose.

Only this file depends on the internal format of jaxprs (JAX 0.10 to 0.12).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
BOTH_MODES = "in_both_modes"

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
        return _call_of(eqn, eqn.params["call_jaxpr"])

    return _rewritten(f, inline, RULES if jvps else (RULE,), unwrapped=True)


def doubled(f: TreeFunction) -> TreeFunction:
    """Return f with the cotangents that its rules return doubled."""

    def twice(leaf: Any) -> Any:
        # None and the float0 zeros of integer arguments stay as they are.
        return leaf * 2 if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf

    def edit(eqn: core.JaxprEqn) -> core.JaxprEqn:
        if eqn.primitive.name != RULE:
            return _with_transpose(eqn, lambda pull: lambda *args: jax.tree.map(twice, list(pull(*args))))
        bwd = eqn.params["bwd"]
        return _with(eqn, bwd=_on(bwd, lambda *args: jax.tree.map(twice, bwd.f(*args))))

    return _rewritten(f, edit, RULES)


def counted(f: TreeFunction, see: Callable[[str], None]) -> TreeFunction:
    """Return f with rules that call `see` with their name each time that one is transposed."""

    def edit(eqn: core.JaxprEqn) -> core.JaxprEqn:
        def noted(pull: TreeFunction) -> TreeFunction:
            def run(*args: PyTree) -> PyTree:
                see(_name(eqn))
                return pull(*args)

            return run

        if eqn.primitive.name != RULE:
            return _with_transpose(eqn, noted)
        bwd = eqn.params["bwd"]
        return _with(eqn, bwd=_on(bwd, noted(bwd.f)))

    return _rewritten(f, edit, RULES)


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

    return _rewritten(f, edit, unwrapped=True)


@dataclass(frozen=True, eq=False)
class _Changed:
    """The operation of a `tangent_call`, with another pullback."""

    op: Any
    change: Callable[[TreeFunction], TreeFunction]

    def both(self, *args: PyTree) -> PyTree:
        return self.op.both(*args)

    def split(self, xs: Sequence[ArrayLike]) -> PyTree:
        values, constants, linear = self.op.split(xs)
        return values, constants, linear._replace(transpose=self.change(linear.transpose))


# --- Jaxprs ---


def _rewritten(
    f: TreeFunction, edit: Edit, primitives: Sequence[str] = (RULE,), *, unwrapped: bool = False
) -> TreeFunction:
    def run(*args: PyTree) -> PyTree:
        program, shapes = jax.make_jaxpr(f, return_shape=True)(*args)
        program = _edit(program, _unwrapped, RULES) if unwrapped else program
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


def _call_of(eqn: core.JaxprEqn, program: Program) -> core.JaxprEqn:
    """Return the equation of a jitted call of a program, in this version of JAX, in place of `eqn`."""
    jitted = jax.make_jaxpr(jax.jit(core.jaxpr_as_fun(program)))(*[v.aval for v in eqn.invars])
    (call,) = opened(jitted)[0].eqns
    (name,) = (name for name, value in call.params.items() if isinstance(value, JAXPR))
    # The program itself and not what was traced, which no longer has the transformations of its rules.
    return eqn.replace(primitive=call.primitive, params={**call.params, name: program})


def _unwrapped(eqn: core.JaxprEqn) -> core.JaxprEqn:
    """Return a call of the custom_vjp function in place of an equation of `both_modes`."""
    if not _in_both_modes(eqn):
        return eqn
    program = eqn.params["call_jaxpr"]
    body, _ = opened(program)
    body = body.replace(eqns=list(map(_differentiable, body.eqns)))
    return _call_of(eqn, body if isinstance(program, core.Jaxpr) else program.replace(jaxpr=body))


def _differentiable(eqn: core.JaxprEqn) -> core.JaxprEqn:
    """Return an equation through which derivatives pass, for those around the custom_vjp function."""
    if eqn.primitive.name == "transposable":
        return _call_of(eqn, eqn.params["program"])
    if eqn.primitive.name in ("stop_gradient", "with_derivative_of"):
        count = eqn.params.get("count", 1)
        return _call_of(eqn, jax.make_jaxpr(lambda *a: list(map(jnp.copy, a[:count])))(*[v.aval for v in eqn.invars]))
    return eqn


def _in_both_modes(eqn: core.JaxprEqn) -> bool:
    return eqn.primitive.name == RULES[1] and _name(eqn) == BOTH_MODES


def _with_transpose(eqn: core.JaxprEqn, change: Callable[[TreeFunction], TreeFunction]) -> core.JaxprEqn:
    """Change the pullback of an equation of `both_modes`; return any other equation as it is."""
    if not _in_both_modes(eqn):
        return eqn

    def changed(inner: core.JaxprEqn) -> core.JaxprEqn:
        if inner.primitive.name != "tangent_call":
            return inner
        return _with(inner, op=_Changed(inner.params["op"], change))

    thunk = eqn.params["jvp_jaxpr_fun"]

    def jvp(*zeros: bool) -> tuple[core.Jaxpr, Any, Any]:
        jaxpr, consts, out_zeros = thunk.f(*zeros)
        return jaxpr.replace(eqns=list(map(changed, jaxpr.eqns))), consts, out_zeros

    return _with(eqn, jvp_jaxpr_fun=_on(thunk, jvp))


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
