"""Values of one computation with the derivatives of another, in a form that no transformation drops.

A `jax.custom_jvp` rule does this until a transformation discards it: JAX's partial evaluation inlines the function and
drops the rule, for example where `lax.scan` hoists loop-invariant work (jax 0.10). From then on the function body is
differentiated. Where the derivative of the body is not that of the rule, as under truncation, the derivative has to
belong to the values themselves. A primitive keeps its rule under every transformation. This primitive is the identity
on the values, and its derivative is traced only when it is needed.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import cache, partial
from typing import Any, NoReturn, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import ad, batching, mlir, partial_eval
from jaxtyping import PyTree

from jaxseq._types import AnyArray

Tree = TypeVar("Tree")
Operand = TypeVar("Operand")  # an array, or its type
FlatFunction = Callable[..., Sequence[jax.Array]]  # from arrays to arrays


@runtime_checkable
class MappedAxis(Protocol):
    """What JAX passes to a batching rule about the axis of a `jax.vmap`."""

    name: Hashable
    size: int
    spmd_name: Hashable
    explicit_mesh_axis: object


def with_derivative_of(like: Callable[..., PyTree], values: Tree, *args: PyTree) -> Tree:
    """Return `values`, with the derivative of `like(*args)`, a tree of the same structure, shapes and dtypes.

    Integers and booleans among the values have no derivative. `like` must not close over differentiated arrays.
    """
    leaves, structure = jax.tree.flatten(lax.stop_gradient(values))
    arrays, args_structure = jax.tree.flatten(args)
    floats = [n for n, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]

    def flat(*arrays: AnyArray) -> list[jax.Array]:
        found = jax.tree.leaves(like(*jax.tree.unflatten(args_structure, arrays)))
        return [found[n] for n in floats]

    found = _primitive().bind(*(leaves[n] for n in floats), *arrays, like=flat, count=len(floats))
    for n, leaf in zip(floats, found, strict=True):
        leaves[n] = leaf
    return jax.tree.unflatten(structure, leaves)


def call_with(f: Callable[..., Any], places: Sequence[int], arrays: Sequence[Any], *changed: Any) -> Any:
    """Return f(*arrays) with the arrays at these places changed."""
    known = list(arrays)
    for n, a in zip(places, changed, strict=True):
        known[n] = a
    return f(*known)


def vmapped(axis: MappedAxis, f: Callable[..., Any], **axes: Any) -> Callable[..., Any]:
    """Return `jax.vmap` of f over the axis that JAX passes to a batching rule."""
    return jax.vmap(f, axis_name=axis.name, axis_size=axis.size, spmd_axis_name=axis.spmd_name, **axes)


@cache
def _primitive() -> Any:
    """Return the primitive (*values, *args) -> values. It is made at its first use: `jax.extend` is slow to import."""
    from jax.extend.core import Primitive  # noqa: PLC0415

    primitive = Primitive("with_derivative_of")
    primitive.multiple_results = True
    primitive.def_impl(_values)
    primitive.def_abstract_eval(_values)
    mlir.register_lowering(primitive, lambda ctx, *operands, like, count: operands[:count])
    ad.primitive_jvps[primitive] = _jvp
    ad.primitive_transposes[primitive] = _transpose
    batching.fancy_primitive_batchers[primitive] = _batch
    partial_eval.dce_rules[primitive] = _drop_unused
    return primitive


def _values(*operands: Operand, like: FlatFunction, count: int) -> list[Operand]:
    return list(operands[:count])


def _jvp(
    primals: Sequence[AnyArray], tangents: Sequence[AnyArray | ad.Zero], *, like: FlatFunction, count: int
) -> tuple[Sequence[jax.Array], Sequence[jax.Array]]:
    out = _primitive().bind(*primals, like=like, count=count)
    args, directions = list(primals[count:]), tangents[count:]
    is_float = lambda a: jnp.issubdtype(a.dtype, jnp.inexact)  # noqa: E731
    moving = [n for n, t in enumerate(directions) if not isinstance(t, ad.Zero) and is_float(args[n])]
    if not moving:
        return out, [jnp.zeros_like(a) for a in out]

    of_moving = partial(call_with, like, moving, args)
    # The values too: where the first ones are not needed, as in a Hessian, they are then not computed.
    return jax.jvp(of_moving, [args[n] for n in moving], [directions[n] for n in moving])


def _transpose(*_: object, **__: object) -> NoReturn:
    raise TypeError(
        "jax.linear_transpose: a function with a hand-derived gradient is not transposed; use jax.vjp, or transpose "
        "the function that jax.linearize returns"
    )


def _batch(
    axis: MappedAxis, operands: Sequence[AnyArray], dims: Sequence[int | None], *, like: FlatFunction, count: int
) -> tuple[Sequence[jax.Array], Sequence[int | None]]:
    if all(dim is None for dim in dims):
        return _primitive().bind(*operands, like=like, count=count), [None] * count
    values = [
        batching.bdim_at_front(a, dim, axis.size, axis.explicit_mesh_axis)
        for a, dim in zip(operands[:count], dims[:count], strict=True)
    ]
    in_axes = tuple(dims[count:])
    mapped = vmapped(axis, like, in_axes=in_axes)
    return _primitive().bind(*values, *operands[count:], like=mapped, count=count), [0] * count


def _drop_unused(used: Sequence[bool], *rest: object) -> tuple[list[bool], Any]:
    """Drop unused values. JAX calls this with (used, eqn), since jax 0.12 with one more argument in between."""
    eqn: Any = rest[-1]
    if not any(used):
        return [False] * len(eqn.invars), None
    like, count, live = eqn.params["like"], eqn.params["count"], [n for n, is_used in enumerate(used) if is_used]
    if len(live) == count:
        return [True] * len(eqn.invars), eqn

    def of_live(*args: AnyArray) -> list[jax.Array]:
        found = like(*args)
        return [found[n] for n in live]

    invars = [eqn.invars[n] for n in live] + eqn.invars[count:]
    params = {"like": of_live, "count": len(live)}
    new = eqn.replace(invars=invars, outvars=[eqn.outvars[n] for n in live], params=params)
    return [*used, *(True for _ in eqn.invars[count:])], new
