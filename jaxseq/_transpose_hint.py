"""An identity primitive whose transpose raises an error with a hint.

A convolution is linear in its input, but `jax.linear_transpose` does not support `jax.custom_vjp`, and JAX's error does
not say so. The identity is applied to the result of an op. Every other transformation passes through it, and compiled
programs do not contain it.
"""

from typing import Any, NoReturn

import jax
from jax.core import Tracer
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def hint_at_transpose(name: str, y: jax.Array) -> jax.Array:
    """Return `y`. Its `jax.linear_transpose` raises an error that names `jaxseq.reference.<name>`."""
    return _hint_p.bind(y, name=name) if isinstance(y, Tracer) else y


_hint_p = Primitive("hint_at_transpose")
_hint_p.def_impl(lambda y, *, name: y)
_hint_p.def_abstract_eval(lambda y, *, name: y)
mlir.register_lowering(_hint_p, lambda ctx, y, *, name: [y])


def _jvp(primals: Any, tangents: Any, *, name: str) -> tuple[jax.Array, Any]:
    return _hint_p.bind(*primals, name=name), tangents[0]


def _batch(operands: Any, dims: Any, *, name: str) -> tuple[jax.Array, Any]:
    return _hint_p.bind(*operands, name=name), dims[0]


def _transpose(cotangent: Any, y: Any, *, name: str) -> NoReturn:
    error = TypeError(f"jaxseq.{name} has no linear transpose: its gradient is a hand-derived rule")
    error.add_note(
        f"Use jax.vjp, or jax.linear_transpose of the reference implementation with the same signature: "
        f"jaxseq.reference.{name}."
    )
    raise error


ad.primitive_jvps[_hint_p] = _jvp
ad.primitive_transposes[_hint_p] = _transpose
batching.primitive_batchers[_hint_p] = _batch
