"""A linear map with a hand-derived transpose, as one operation of a program.

JAX transposes the operations inside a linear function one by one. This primitive is transposed as a whole. Its
functions are traced only when they are needed: the map itself where a program is compiled, its derivative where second
derivatives are taken.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.interpreters import ad, batching, mlir

from jaxseq._derivative import MappedAxis, call_with, vmapped, with_derivative_of
from jaxseq._types import AnyArray

Arrays = Sequence[AnyArray]
Linear = Callable[[Arrays, Arrays], Sequence[jax.Array]]  # (constants, v) -> L v


class LinearFunction(NamedTuple):
    """A map L and its transpose, functions (constants, v) -> L v and (constants, ȳ) -> L^T ȳ.

    JAX differentiates `plain` and `plain_transpose`, which compute the same, with respect to the constants. Where they
    are None, it differentiates the first two.
    """

    apply: Linear
    transpose: Linear
    plain: Linear | None = None
    plain_transpose: Linear | None = None

    def __repr__(self) -> str:
        return "LinearFunction"  # as jaxprs show it


def linear_call(maps: LinearFunction, constants: Arrays, v: Arrays, types: Sequence[Any]) -> Sequence[jax.Array]:
    """Return L v, arrays of these types (`jax.typeof`)."""
    return _primitive().bind(*constants, *v, maps=maps, count=len(constants), types=tuple(types))


@cache
def _primitive() -> Any:
    """Return the primitive. It is made at its first use: `jax.extend` is slow to import."""
    from jax.extend.core import Primitive  # noqa: PLC0415

    primitive = Primitive("linear_call")
    primitive.multiple_results = True
    primitive.def_impl(_apply)
    primitive.def_abstract_eval(lambda *operands, maps, count, types: list(types))
    mlir.register_lowering(primitive, mlir.lower_fun(_apply, multiple_results=True))
    ad.primitive_jvps[primitive] = _jvp
    ad.primitive_transposes[primitive] = transpose
    batching.fancy_primitive_batchers[primitive] = _batch
    return primitive


def _apply(*operands: AnyArray, maps: LinearFunction, count: int, types: Sequence[ShapedArray]) -> Sequence[jax.Array]:
    arrays = list(map(jnp.asarray, operands))  # not Python scalars
    return maps.apply(arrays[:count], arrays[count:])


def _jvp(
    primals: Arrays, tangents: Sequence[Any], *, maps: LinearFunction, count: int, types: Sequence[ShapedArray]
) -> tuple[Sequence[jax.Array], Sequence[jax.Array]]:
    """Return L v, and the sum of L v' and of the derivative of L v with respect to the constants."""
    bind = partial(_primitive().bind, maps=maps, count=count, types=types)
    constants, v = list(primals[:count]), primals[count:]
    out = bind(*primals)
    moving = [n for n, t in enumerate(tangents[:count]) if not isinstance(t, ad.Zero)]
    total = [jnp.zeros_like(a) for a in out]
    if not all(isinstance(t, ad.Zero) for t in tangents[count:]):
        total = bind(*constants, *map(ad.instantiate_zeros, tangents[count:]))
    if moving:
        of_moving = partial(call_with, lambda *known: (maps.plain or maps.apply)(known, v), moving, constants)
        added = jax.jvp(of_moving, [constants[n] for n in moving], [tangents[n] for n in moving])[1]
        total = list(map(jnp.add, total, added))
    return out, total


def transpose(
    cotangents: Sequence[Any], *operands: Any, maps: LinearFunction, count: int, types: Sequence[ShapedArray]
) -> list[Any]:
    constants, v = operands[:count], operands[count:]
    if all(isinstance(c, ad.Zero) for c in cotangents):
        return [None] * len(operands)
    y_bar = [jnp.asarray(ad.instantiate_zeros(c)) for c in cotangents]  # not Python scalars
    if maps.plain_transpose is None:
        v_bar = maps.transpose(constants, y_bar)
    else:
        v_bar = maps.transpose(*lax.stop_gradient((constants, y_bar)))
        v_bar = with_derivative_of(maps.plain_transpose, list(v_bar), constants, y_bar)
    return [None] * count + [bar if ad.is_undefined_primal(a) else None for a, bar in zip(v, v_bar, strict=True)]


def _batch(
    axis: MappedAxis,
    operands: Arrays,
    dims: Sequence[int | None],
    *,
    maps: LinearFunction,
    count: int,
    types: Sequence[ShapedArray],
) -> tuple[Sequence[jax.Array], Sequence[int | None]]:
    if all(dim is None for dim in dims):
        return linear_call(maps, operands[:count], operands[count:], types), [None] * len(types)
    found = mapped(maps, axis, list(dims[:count]), list(dims[count:]))
    return linear_call(found, operands[:count], operands[count:], [typed(axis, t) for t in types]), [0] * len(types)


def mapped(
    maps: LinearFunction, axis: MappedAxis, of_constants: list[int | None], of_v: list[int | None]
) -> LinearFunction:
    """Map over these axes of the constants and of v. A v that is not mapped receives the sum of the cotangents."""

    def of_map(f: Linear) -> Linear:
        run = vmapped(axis, lambda constants, v: list(f(constants, v)), in_axes=(of_constants, of_v))
        return lambda constants, v: run(list(constants), list(v))

    def of_transpose(f: Linear) -> Linear:
        run = vmapped(axis, lambda constants, y_bar: list(f(constants, y_bar)), in_axes=(of_constants, 0))

        def summed(constants: Arrays, y_bar: Arrays) -> list[jax.Array]:
            pairs = zip(run(list(constants), list(y_bar)), of_v, strict=True)
            return [jnp.sum(a, 0) if dim is None else jnp.moveaxis(a, 0, dim) for a, dim in pairs]

        return summed

    return LinearFunction(
        of_map(maps.apply),
        of_transpose(maps.transpose),
        maps.plain and of_map(maps.plain),
        maps.plain_transpose and of_transpose(maps.plain_transpose),
    )


def typed(axis: MappedAxis, t: Any) -> Any:
    """Return the type of an array with the mapped axis first."""
    from jax.extend.core import unmapped_aval  # noqa: PLC0415

    return unmapped_aval(axis.size, 0, t, axis.explicit_mesh_axis)
