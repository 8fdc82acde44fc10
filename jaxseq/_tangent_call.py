"""Values and tangents in one pass, where the tangents are known; else the values, then a linear map.

In forward mode, a function is evaluated once, together with its tangent. In reverse mode, JAX evaluates it where the
tangents are not known yet, and the forward pass has to keep the residuals of the pullback. Which of the two it will be
is not known when a rule runs, for example inside `lax.scan` or `jax.checkpoint`. This primitive is both. JAX's partial
evaluation splits it if the tangents are unknown.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.interpreters import ad, batching, mlir, partial_eval

from jaxseq import _linear_call
from jaxseq._derivative import MappedAxis, call_with, vmapped
from jaxseq._linear_call import Arrays, LinearFunction, linear_call, typed

Outputs = list[jax.Array]
Types = Sequence[ShapedArray]


@runtime_checkable
class Operation(Protocol):
    """A function of arrays x with a derivative in both modes."""

    def both(self, xs: Arrays, v: Arrays) -> tuple[Outputs, Outputs]:
        """Return the values and the tangents L v. Without v there are no tangents."""
        ...

    def split(self, xs: Arrays) -> tuple[Outputs, Outputs, LinearFunction]:
        """Return the values, the constants of L, which are `xs` and residuals, and L."""
        ...


def tangent_call(op: Operation, xs: Arrays, v: Arrays, types_of_values: Callable[[], Types]) -> tuple[Outputs, Outputs]:
    """Return the values and the tangents; the function returns the types of the values (`jax.typeof`)."""
    if any(isinstance(a, partial_eval.JaxprTracer) for a in v):  # they are unknown
        found, constants, linear = op.split(xs)
        return found, list(linear_call(linear, constants, v, _types_of_tangents(map(jax.typeof, found))))
    values = types_of_values()
    found = _bind(op, xs, v, values, _types_of_tangents(values))
    return found[: len(values)], found[len(values) :]


def _types_of_tangents(values: Iterable[Any]) -> Types:
    """Return the types of the tangents of the values that have one."""
    return [t.to_tangent_aval() for t in values if jnp.issubdtype(t.dtype, jnp.inexact)]


def _bind(op: Operation, xs: Arrays, v: Arrays, values: Types, tangents: Types) -> Outputs:
    types = (*values, *tangents)
    return list(_primitive().bind(*xs, *v, op=op, count=len(xs), values=len(values), types=types))


@cache
def _primitive() -> Any:
    """Return the primitive. It is made at its first use: `jax.extend` is slow to import."""
    from jax.extend.core import Primitive  # noqa: PLC0415

    primitive = Primitive("tangent_call")
    primitive.multiple_results = True
    primitive.def_impl(_both)
    primitive.def_abstract_eval(lambda *operands, op, count, values, types: list(types))
    mlir.register_lowering(primitive, mlir.lower_fun(_both, multiple_results=True))
    ad.primitive_jvps[primitive] = _jvp
    ad.primitive_transposes[primitive] = _transpose
    batching.fancy_primitive_batchers[primitive] = _batch
    partial_eval.custom_partial_eval_rules[primitive] = _partial_eval
    partial_eval.partial_eval_jaxpr_custom_rules[primitive] = _partial_eval_of_equation
    return primitive


def _both(*operands: Any, op: Operation, count: int, values: int, types: Types) -> Outputs:
    arrays = list(map(jnp.asarray, operands))  # not Python scalars
    found, tangents = op.both(arrays[:count], arrays[count:])
    return [*found, *tangents]


# --- Derivatives ---


def _jvp(
    primals: Sequence[Any], tangents: Sequence[Any], *, op: Operation, count: int, values: int, types: Types
) -> tuple[Outputs, list[Any]]:
    params = {"op": op, "count": count, "values": values, "types": types}
    out = list(_primitive().bind(*primals, **params))
    zeros = [ad.Zero(jax.typeof(a).to_tangent_aval()) for a in out]
    moving = [n for n, t in enumerate(tangents) if not isinstance(t, ad.Zero)]
    if moving[0] >= count:  # L is linear
        v = map(ad.instantiate_zeros, tangents[count:])
        return out, [*zeros[:values], *_primitive().bind(*primals[:count], *v, **params)[values:]]

    of_moving = partial(call_with, partial(_both, **params), moving, primals)
    found = jax.jvp(of_moving, [primals[n] for n in moving], [tangents[n] for n in moving])[1]
    return out, [zero if t.dtype == jax.dtypes.float0 else t for zero, t in zip(zeros, found, strict=True)]


def _transpose(
    cotangents: Sequence[Any], *operands: Any, op: Operation, count: int, values: int, types: Types
) -> list[Any]:
    _, constants, linear = op.split(list(map(jnp.asarray, operands[:count])))
    args = *constants, *operands[count:]
    found = _linear_call.transpose(cotangents[values:], *args, maps=linear, count=len(constants), types=types[values:])
    return [None] * count + found[len(constants) :]


# --- vmap ---


@dataclass(frozen=True, eq=False)
class _Mapped:
    """An operation under `jax.vmap`, over these axes of x and v."""

    op: Operation
    axis: MappedAxis
    of_xs: list[int | None]
    of_v: list[int | None]

    @property
    def of_values(self) -> int | None:
        return None if all(dim is None for dim in self.of_xs) else 0

    def both(self, xs: Arrays, v: Arrays) -> tuple[Outputs, Outputs]:
        axes = {"in_axes": (self.of_xs, self.of_v[: len(v)]), "out_axes": (self.of_values, 0)}
        return vmapped(self.axis, self.op.both, **axes)(list(xs), list(v))

    def split(self, xs: Arrays) -> tuple[Outputs, Outputs, LinearFunction]:
        if self.of_values is None:
            values, constants, linear = self.op.split(xs)
            of_constants: list[int | None] = [None] * len(constants)
        else:
            functions = []

            def run(xs: Arrays) -> tuple[Outputs, Outputs]:
                values, constants, linear = self.op.split(xs)
                functions.append(linear)
                return values, constants[len(xs) :]

            values, residuals = vmapped(self.axis, run, in_axes=(self.of_xs,))(list(xs))
            constants, linear = [*xs, *residuals], functions[-1]
            of_constants = [*self.of_xs, *([0] * len(residuals))]
        return values, constants, _linear_call.mapped(linear, self.axis, of_constants, self.of_v)


def _batch(
    axis: MappedAxis,
    operands: Arrays,
    dims: Sequence[int | None],
    *,
    op: Operation,
    count: int,
    values: int,
    types: Types,
) -> tuple[Outputs, list[int | None]]:
    if all(dim is None for dim in dims):
        return _bind(op, operands[:count], operands[count:], types[:values], types[values:]), [None] * len(types)
    mapped = _Mapped(op, axis, list(dims[:count]), list(dims[count:]))
    of_outputs = [mapped.of_values] * values + [0] * (len(types) - values)
    new = [t if dim is None else typed(axis, t) for t, dim in zip(types, of_outputs, strict=True)]
    return _bind(mapped, operands[:count], operands[count:], new[:values], new[values:]), of_outputs


# --- Partial evaluation ---


def _partial_eval(trace: Any, *tracers: Any, op: Operation, count: int, values: int, types: Types) -> Any:
    """Split where x is known and v is not. JAX calls this in the trace of what is known."""
    from jax.extend.core import set_current_trace  # noqa: PLC0415

    xs, v = tracers[:count], tracers[count:]
    known = [all(t.is_known() for t in part) for part in (xs, v)]
    if known != [True, False]:
        params = {"op": op, "count": count, "values": values, "types": types}
        return trace.default_process_primitive(_primitive(), tracers, params)
    found, constants, linear = op.split([jnp.asarray(t.pval.get_known()) for t in xs])
    with set_current_trace(trace):
        return [*found, *linear_call(linear, constants, v, types[values:])]


def _partial_eval_of_equation(
    saveable: Callable[..., Any], unknown: Sequence[bool], instantiated: Sequence[bool], eqn: Any
) -> Any:
    """Return the equation of what is known, and that of what is evaluated again, of `jax.checkpoint`.

    The second is the whole equation. It is split where the function under `jax.checkpoint` is transposed. The values
    are stored if the policy stores the result of an operation that computes them.
    """
    from jax.extend.core import DropVar, Var  # noqa: PLC0415

    count, values, types = (eqn.params[name] for name in ("count", "values", "types"))
    stored = [a for a, known in zip(eqn.invars, instantiated, strict=True) if isinstance(a, Var) and not known]
    everything = [True] * len(types)
    if any(unknown[:count]):
        return None, eqn, everything, everything, stored
    if not any(unknown):
        return eqn, eqn, [False] * len(types), everything, stored
    params = {**eqn.params, "types": types[:values]}
    of_values = eqn.replace(invars=eqn.invars[:count], outvars=eqn.outvars[:values], params=params)
    is_tangent = [n >= values for n in range(len(types))]
    if not _stores_values(saveable, of_values):
        return of_values, eqn, is_tangent, everything, stored
    outvars = [*(DropVar(a.aval) for a in eqn.outvars[:values]), *eqn.outvars[values:]]
    return of_values, eqn.replace(outvars=outvars), is_tangent, is_tangent, stored


def _stores_values(saveable: Callable[..., Any], eqn: Any) -> bool:
    """Return whether a policy of `jax.checkpoint` stores a result of an operation of these values, outside of loops."""

    def operations(eqn: Any) -> Iterator[Any]:
        yield eqn
        if eqn.primitive.name == "scan":
            return
        for param in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            for inner in getattr(getattr(param, "jaxpr", param), "eqns", ()):
                yield from operations(inner)

    op = eqn.params["op"]
    program = jax.make_jaxpr(lambda *xs: op.both(xs, ())[0])(*(a.aval for a in eqn.invars))
    found = [
        saveable(e.primitive, *(a.aval for a in e.invars), **e.params)
        for outer in [eqn, *program.jaxpr.eqns]
        for e in operations(outer)
    ]
    return any(policy is True or type(policy).__name__ == "SaveableType" for policy in found)
