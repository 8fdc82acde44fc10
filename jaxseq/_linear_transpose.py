"""A call that `jax.linear_transpose` can transpose, for functions that are linear in some of their arguments.

A convolution is linear in its input and in its kernel, but JAX transposes no `jax.custom_vjp`. This primitive is such a
call as one operation of a program. Its transpose is the hand-derived pullback.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.interpreters import ad, batching, mlir

from jaxseq._derivative import MappedAxis, call_with, vmapped
from jaxseq._types import AnyArray

Function = Callable[..., jax.Array]  # of arrays


class Linearity(NamedTuple):
    """The arguments, by position, in which a function is linear.

    It is z w + b, which is linear in all of `first` (z) and the bias together, and in `second` (w) and the bias.
    """

    name: str
    first: tuple[int, ...]
    second: tuple[int, ...]
    bias: tuple[int, ...] = ()
    may_vary: tuple[int, ...] = ()  # arguments that are known to be zero where they are not transposed


def transposable(linearity: Linearity, value: Function, f: Function, arrays: Sequence[AnyArray]) -> jax.Array:
    """Return `value(*arrays)`, with the derivatives of `f(*arrays)`, the same function with its rule."""
    if not any(isinstance(a, Tracer) for a in arrays):
        return value(*arrays)
    return _bind(linearity, value, f, arrays)


def _bind(linearity: Linearity, value: Function, f: Function, arrays: Sequence[AnyArray]) -> jax.Array:
    return _primitive().bind(*arrays, program=jax.make_jaxpr(value)(*arrays), f=f, linearity=linearity)


@cache
def _primitive() -> Any:
    """Return the primitive. It is made at its first use: `jax.extend` is slow to import."""
    from jax.extend.core import Primitive  # noqa: PLC0415

    primitive = Primitive("transposable")
    primitive.def_impl(_run)
    primitive.def_abstract_eval(lambda *arrays, program, f, linearity: program.out_avals[0])
    mlir.register_lowering(primitive, mlir.lower_fun(_run, multiple_results=False))
    ad.primitive_jvps[primitive] = _jvp
    ad.primitive_transposes[primitive] = _transpose
    batching.fancy_primitive_batchers[primitive] = _batch
    return primitive


def _run(*arrays: AnyArray, program: Any, f: Function, linearity: Linearity) -> jax.Array:
    from jax.extend.core import jaxpr_as_fun  # noqa: PLC0415

    return jaxpr_as_fun(program)(*arrays)[0]


def _jvp(
    primals: Sequence[AnyArray], tangents: Sequence[Any], *, program: Any, f: Function, linearity: Linearity
) -> tuple[jax.Array, jax.Array]:
    moving = [n for n, t in enumerate(tangents) if not isinstance(t, ad.Zero)]
    of_moving = partial(call_with, f, moving, primals)
    return jax.jvp(of_moving, [primals[n] for n in moving], [tangents[n] for n in moving])


def _transpose(y_bar: Any, *arrays: Any, program: Any, f: Function, linearity: Linearity) -> list[jax.Array | None]:
    unknown = [n for n, a in enumerate(arrays) if ad.is_undefined_primal(a)]
    _, first, second, bias, may_vary = linearity
    if not any(set(unknown) - set(may_vary) == {*factor, *bias} for factor in (first, second)):
        also = ", each together with the bias" if bias else ""
        carry = "; pass carry=None, or transpose the input and the carry together" if len(first) > 1 else ""
        raise TypeError(
            f"jaxseq.{linearity.name} is linear in its input (and carry), or in its kernel{also}, but not in what the "
            f"function of jax.linear_transpose takes{carry}"
        )
    if isinstance(y_bar, ad.Zero):
        return [None] * len(arrays)
    zeros = [jnp.zeros_like(arrays[n].aval) for n in unknown]
    found = iter(jax.vjp(partial(call_with, f, unknown, arrays), *zeros)[1](y_bar))
    return [next(found) if n in unknown else None for n in range(len(arrays))]


def _batch(
    axis: MappedAxis,
    arrays: Sequence[AnyArray],
    dims: Sequence[int | None],
    *,
    program: Any,
    f: Function,
    linearity: Linearity,
) -> tuple[jax.Array, int | None]:
    if all(dim is None for dim in dims):
        return _primitive().bind(*arrays, program=program, f=f, linearity=linearity), None
    run = partial(_run, program=program, f=f, linearity=linearity)
    value, with_rule = (vmapped(axis, g, in_axes=tuple(dims)) for g in (run, f))
    return _bind(linearity, value, with_rule, arrays), 0
