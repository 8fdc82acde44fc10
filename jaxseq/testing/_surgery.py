"""The custom_vjp rules inside any function: listed, watched, doubled or set aside.

JAX writes the call of a custom_vjp function into a jaxpr as one equation, `custom_vjp_call`, which holds the program of
the undifferentiated function and the two functions of its rule. Here such equations are edited where they stand, at any
depth (below jit, scan, cond, remat), and the edited jaxpr runs in place of the function. A function that is jitted
already hides nothing, and nothing outside of the copy is touched.

This is the one file that knows how JAX writes its jaxprs down (0.10 to 0.12).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core, linear_util

JAXPR = (core.ClosedJaxpr, core.Jaxpr)
RULE = "custom_vjp_call"
RULES = (RULE, "custom_jvp_call")


class Call(NamedTuple):
    """What one run of a rule's backward function returned, before JAX made anything of it.

    Attributes:
        rule: the name of the custom_vjp function.
        returned: the object as it came.
        structure: the tree of the rule's arguments, a tuple of them.
        primals: shape and dtype of each of its leaves.
        names: a name for each of its leaves.
        wanted: for each of its leaves, whether its cotangent goes anywhere; None where that is not known.
    """

    rule: str
    returned: Any
    structure: Any
    primals: tuple[Any, ...]
    names: tuple[str, ...]
    wanted: tuple[bool, ...] | None


def rules(f: Callable[..., Any], *args: Any, primitives: Sequence[str] = (RULE,)) -> list[str]:
    """The names of the custom_vjp functions that f(*args) calls, as often as it writes them down; or of others."""
    found: list[str] = []

    def note(eqn: Any) -> Any:
        found.append(_name(eqn))
        return eqn

    _edit(jax.make_jaxpr(f)(*args), note, primitives)
    return found


def plain(f: Callable[..., Any], *, jvps: bool = False) -> Callable[..., Any]:
    """f with each custom_vjp function replaced by what it computes, so that JAX differentiates that.

    Args:
        f: any function.
        jvps: replace custom_jvp functions as well.
    """

    def inline(eqn: Any) -> Any:
        program = eqn.params["call_jaxpr"]
        # The equation that this version of JAX writes for a jitted call.
        traced = jax.make_jaxpr(jax.jit(core.jaxpr_as_fun(program)))(*program.in_avals)
        (call,) = opened(traced)[0].eqns
        return eqn.replace(primitive=call.primitive, params=call.params)

    return _rewritten(f, inline, RULES if jvps else (RULE,))


def doubled(f: Callable[..., Any]) -> Callable[..., Any]:
    """f with twice the cotangents that each of its rules returns."""

    def twice(leaf: Any) -> Any:
        # None and the float0 zeros of integer arguments stay as they are.
        return leaf * 2 if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf

    def edit(eqn: Any) -> Any:
        bwd = eqn.params["bwd"]
        return _with(eqn, bwd=_on(bwd, lambda *args: jax.tree.map(twice, bwd.f(*args))))

    return _rewritten(f, edit)


def watched(f: Callable[..., Any], see: Callable[[Call], None]) -> Callable[..., Any]:
    """f, whose rules tell `see` what their backward functions return, each time that one runs."""

    def edit(eqn: Any) -> Any:
        bwd, fwd = eqn.params["bwd"], eqn.params["fwd_jaxpr_thunk"]
        wanted: list[tuple[bool, ...]] = []
        # The outermost transformation of a rule that nothing has transformed yet is the one that flattens its trees.
        flattening = bwd.transforms[0][1] if bwd.transforms else ()
        structure, primals = flattening[:2] if len(flattening) >= 2 else (None, ())

        def forward(*perturbed: bool) -> Any:
            wanted.append(tuple(bool(p) for p in perturbed))
            return fwd.f(*perturbed)

        def backward(*args: Any) -> Any:
            returned = bwd.f(*args)
            names = fwd.debug_info.arg_names or ()
            if len(names) != len(primals):
                names = tuple(f"argument {n}" for n in range(len(primals)))
            see(Call(_name(eqn), returned, structure, tuple(primals), names, wanted[-1] if wanted else None))
            return returned

        return _with(eqn, bwd=_on(bwd, backward), fwd_jaxpr_thunk=_on(fwd, forward))

    return _rewritten(f, edit)


# --- How JAX writes it down ---


def _rewritten(
    f: Callable[..., Any], edit: Callable[[Any], Any], primitives: Sequence[str] = (RULE,)
) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        program, shapes = jax.make_jaxpr(f, return_shape=True)(*args)
        outputs = core.jaxpr_as_fun(_edit(program, edit, primitives))(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    return run


def _edit(jaxpr: Any, edit: Callable[[Any], Any], primitives: Sequence[str] = (RULE,)) -> Any:
    """A copy of the jaxpr, each call of one of these primitives in it as `edit` returns it."""
    if not isinstance(jaxpr, core.Jaxpr):
        return jaxpr.replace(jaxpr=_edit(jaxpr.jaxpr, edit, primitives))

    def edited(eqn: Any) -> Any:
        eqn = eqn.replace(params=with_inner(eqn.params, lambda inner: _edit(inner, edit, primitives)))
        return edit(eqn) if eqn.primitive.name in primitives else eqn

    return jaxpr.replace(eqns=[edited(eqn) for eqn in jaxpr.eqns])


def with_inner(params: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """The parameters of an equation, each program among them changed, also inside tuples, named ones and lists."""

    def changed(value: Any) -> Any:
        if isinstance(value, JAXPR):
            return change(value)
        if isinstance(value, tuple | list) and any(isinstance(v, JAXPR) for v in value):
            # The class of a NamedTuple takes one argument per field; its `_make` takes an iterable.
            return getattr(type(value), "_make", type(value))([changed(v) for v in value])
        return value

    return {name: changed(value) for name, value in params.items()}


def opened(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """A jaxpr and its constants, whether or not this version of JAX wraps a closed one."""
    return (jaxpr, getattr(jaxpr, "consts", ())) if isinstance(jaxpr, core.Jaxpr) else (jaxpr.jaxpr, jaxpr.consts)


def _with(eqn: Any, **params: Any) -> Any:
    return eqn.replace(params={**eqn.params, **params})


def _name(eqn: Any) -> str:
    return opened(eqn.params["call_jaxpr"])[0].debug_info.func_name


def _on(wrapped: Any, f: Callable[..., Any]) -> Any:
    """The transformations that JAX has put around one function, around another instead."""
    new = linear_util.wrap_init(f, debug_info=wrapped.debug_info)
    for (transformation, static), store in reversed(list(zip(wrapped.transforms, wrapped.stores, strict=True))):
        new = new.wrap(transformation, static, store)
    return new
