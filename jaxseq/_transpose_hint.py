"""An identity primitive whose transpose raises an error with a hint.

A convolution is linear in its input, but `jax.linear_transpose` does not support `jax.custom_vjp`, and JAX's error does
not say so. The identity is applied to the result of an op. Every other transformation passes through it, and compiled
programs do not contain it.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, NoReturn

import jax
import numpy as np
from jax.core import Tracer
from jax.interpreters import ad, batching, mlir

Tangent = jax.Array | np.ndarray | ad.Zero  # a NumPy array has the dtype float0


def hint_at_transpose(name: str, y: jax.Array) -> jax.Array:
    """Return `y`. Its `jax.linear_transpose` raises an error that names `jaxseq.reference.<name>`."""
    return _primitive().bind(y, name=name) if isinstance(y, Tracer) else y


@cache
def _primitive() -> Any:
    """Return the identity primitive. It is made at its first use: `jax.extend` is slow to import."""
    from jax.extend.core import Primitive  # noqa: PLC0415

    primitive = Primitive("hint_at_transpose")
    primitive.def_impl(lambda y, *, name: y)
    primitive.def_abstract_eval(lambda y, *, name: y)
    mlir.register_lowering(primitive, lambda ctx, y, *, name: [y])
    ad.primitive_jvps[primitive] = _jvp
    ad.primitive_transposes[primitive] = _transpose
    batching.primitive_batchers[primitive] = _batch
    return primitive


def _jvp(primals: Sequence[jax.Array], tangents: Sequence[Tangent], *, name: str) -> tuple[jax.Array, Tangent]:
    return _primitive().bind(*primals, name=name), tangents[0]


def _batch(operands: Sequence[jax.Array], dims: Sequence[int | None], *, name: str) -> tuple[jax.Array, int | None]:
    return _primitive().bind(*operands, name=name), dims[0]


def _transpose(cotangent: object, y: object, *, name: str) -> NoReturn:
    error = TypeError(f"jaxseq.{name} has no linear transpose: its gradient is a hand-derived rule")
    error.add_note(
        f"Use jax.vjp, or jax.linear_transpose of the reference implementation with the same signature: "
        f"jaxseq.reference.{name}."
    )
    raise error
