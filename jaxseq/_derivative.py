"""Values of one computation with the derivatives of another, in a form that no transformation drops.

A `jax.custom_jvp` rule does this until a transformation discards it: JAX's partial evaluation inlines the function and
drops the rule, for example where `lax.scan` hoists loop-invariant work (jax 0.10). From then on the function body is
differentiated. Where the derivative of the body is not that of the rule, as under truncation, the derivative has to
belong to the values themselves. A primitive keeps its rule under every transformation. This primitive is the identity
on the values, and its derivative is traced only when it is needed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, partial_eval


def with_derivative_of(like: Callable[..., Any], values: Any, *args: Any) -> Any:
    """Return `values`, with the derivative of `like(*args)`, a tree of the same structure, shapes and dtypes.

    Integers and booleans among the values have no derivative. `like` must not close over differentiated arrays.
    """
    leaves, structure = jax.tree.flatten(lax.stop_gradient(values))
    arrays, args_structure = jax.tree.flatten(args)
    floats = [n for n, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]

    def flat(*arrays: Any) -> list[Any]:
        found = jax.tree.leaves(like(*jax.tree.unflatten(args_structure, arrays)))
        return [found[n] for n in floats]

    found = _values_p.bind(*(leaves[n] for n in floats), *arrays, like=flat, count=len(floats))
    for n, leaf in zip(floats, found, strict=True):
        leaves[n] = leaf
    return jax.tree.unflatten(structure, leaves)


_values_p = Primitive("with_derivative_of")  # (*values, *args) -> values
_values_p.multiple_results = True


@_values_p.def_impl
def _values(*operands: Any, like: Any, count: int) -> list[Any]:
    return list(operands[:count])


_values_p.def_abstract_eval(_values)
mlir.register_lowering(_values_p, lambda ctx, *operands, like, count: operands[:count])


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, like: Any, count: int) -> tuple[Any, Any]:
    out = _values_p.bind(*primals, like=like, count=count)
    args, directions = list(primals[count:]), tangents[count:]
    is_float = lambda a: jnp.issubdtype(a.dtype, jnp.inexact)  # noqa: E731
    moving = [n for n, t in enumerate(directions) if not isinstance(t, ad.Zero) and is_float(args[n])]
    if not moving:
        return out, [jnp.zeros_like(a) for a in out]

    def of_moving(*moved: Any) -> Any:
        known = list(args)
        for n, arg in zip(moving, moved, strict=True):
            known[n] = arg
        return like(*known)

    return out, jax.jvp(of_moving, [args[n] for n in moving], [directions[n] for n in moving])[1]


def _batch(axis: Any, operands: Sequence[Any], dims: Sequence[Any], *, like: Any, count: int) -> tuple[Any, Any]:
    if all(dim is None for dim in dims):
        return _values_p.bind(*operands, like=like, count=count), [None] * count
    values = [
        batching.bdim_at_front(a, dim, axis.size, axis.explicit_mesh_axis)
        for a, dim in zip(operands[:count], dims[:count], strict=True)
    ]
    names = {"axis_name": axis.name, "axis_size": axis.size, "spmd_axis_name": axis.spmd_name}
    mapped = jax.vmap(like, in_axes=tuple(dims[count:]), **names)
    return _values_p.bind(*values, *operands[count:], like=mapped, count=count), [0] * count


def _drop_unused(used: Sequence[bool], *rest: Any) -> tuple[list[bool], Any]:
    """Drop unused values. JAX calls this with (used, eqn), since jax 0.12 with one more argument in between."""
    eqn = rest[-1]
    if not any(used):
        return [False] * len(eqn.invars), None
    like, count, live = eqn.params["like"], eqn.params["count"], [n for n, is_used in enumerate(used) if is_used]
    if len(live) == count:
        return [True] * len(eqn.invars), eqn

    def of_live(*args: Any) -> list[Any]:
        found = like(*args)
        return [found[n] for n in live]

    invars = [eqn.invars[n] for n in live] + eqn.invars[count:]
    params = {"like": of_live, "count": len(live)}
    new = eqn.replace(invars=invars, outvars=[eqn.outvars[n] for n in live], params=params)
    return [*used, *(True for _ in eqn.invars[count:])], new


ad.primitive_jvps[_values_p] = _jvp
batching.fancy_primitive_batchers[_values_p] = _batch
partial_eval.dce_rules[_values_p] = _drop_unused
