"""A check of traced lengths that only `jax.experimental.checkify` performs.

`checkify.debug_check` adds an effect to every program, and `jax.export` cannot serialize a program with an effect. This
primitive is an identity without effects, compiled programs do not contain it, and checkify has a rule for it.
"""

from collections.abc import Callable, Sequence
from typing import Any, SupportsInt

import jax
import jax.numpy as jnp
from jax._src import checkify  # the rule table has no public name
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir


def checked_lengths(n: jax.Array, *, steps: SupportsInt, message: str) -> jax.Array:
    """Return `n`. Under checkify, report `message` unless 0 <= n <= steps, which may be a symbolic size."""
    return _checked_p.bind(n, steps=steps, message=message)


_checked_p = Primitive("checked_lengths")
_checked_p.def_impl(lambda n, *, steps, message: n)
_checked_p.def_abstract_eval(lambda n, *, steps, message: n)
mlir.register_lowering(_checked_p, lambda ctx, n, *, steps, message: [n])


def _batch(
    operands: Sequence[jax.Array], dims: Sequence[int | None], *, steps: SupportsInt, message: str
) -> tuple[jax.Array, int | None]:
    return _checked_p.bind(*operands, steps=steps, message=message), dims[0]


def _checkify(*args: Any, steps: SupportsInt, message: str) -> tuple[checkify.Error, jax.Array]:
    """Check the lengths. Checkify calls this with (error, enabled, n), since jax 0.12 with a context before these."""
    *context, error, enabled, n = args
    if checkify.FailedCheckError in enabled:
        wrong = jnp.any((n < 0) | (n > jnp.asarray(steps, n.dtype)))
        report = checkify.FailedCheckError(checkify.get_traceback(), message, lengths=n)
        assert_func: Callable[..., checkify.Error] = checkify.assert_func
        error = assert_func(*context, error, wrong, report)
    return error, n


batching.primitive_batchers[_checked_p] = _batch
checkify.error_checks[_checked_p] = _checkify
