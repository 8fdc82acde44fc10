"""Validation of arguments, and the format of all error messages.

A message names the argument in backticks, then what was expected, what was passed, and the shapes involved. Checks read
shapes, dtypes and static values. They read the content of an array only where it is concrete.
"""

import operator
from collections.abc import Mapping
from typing import NoReturn, Protocol, SupportsIndex, TypeGuard, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax
from jax.core import Tracer
from jaxtyping import Array, PyTree

from jaxseq._types import AnyArray

# The accepted array types. Tracers are instances of jax.Array.
ARRAYS = jax.Array | np.ndarray | np.generic

Value = TypeVar("Value")
Container = TypeVar("Container")  # a NamedTuple


class _ArrayLike(Protocol):
    """An array of any library, or a `jax.ShapeDtypeStruct`."""

    shape: tuple[int, ...]
    dtype: object


class _Convertible(Protocol):
    def __jax_array__(self) -> jax.Array: ...


def _is_array_like(value: object) -> TypeGuard[_ArrayLike]:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _is_convertible(value: object) -> TypeGuard[_Convertible]:
    return hasattr(type(value), "__jax_array__")


def describe(value: object) -> str:
    """Return the dtype and shape of an array, or else the type of a value and, if short, its repr."""
    if _is_array_like(value):
        return f"{value.dtype}{list(value.shape)}"
    text = repr(value)
    return f"{type(value).__name__} {text}" if len(text) <= 60 else type(value).__name__


def _message(name: str, expected: str, got: str, arrays: dict[str, AnyArray]) -> str:
    shapes = ", ".join(f"{key} {tuple(np.shape(value))}" for key, value in arrays.items())
    return f"`{name}`: expected {expected}, got {got}" + (f" ({shapes})" if shapes else "")


def bad_value(name: str, expected: str, got: str, **arrays: AnyArray) -> NoReturn:
    raise ValueError(_message(name, expected, got, arrays))


def bad_type(name: str, expected: str, got: str, **arrays: AnyArray) -> NoReturn:
    raise TypeError(_message(name, expected, got, arrays))


def converted(value: Value) -> Value | AnyArray:
    """Return the result of `__jax_array__` (of a Flax NNX parameter, for example) if `value` has one, and a NumPy array
    in native byte order. Return anything else unchanged.
    """
    if isinstance(value, jax.Array):
        return value
    found = value.__jax_array__() if _is_convertible(value) else value
    if isinstance(found, np.ndarray | np.generic) and not found.dtype.isnative:
        return found.astype(found.dtype.newbyteorder("="))
    return found


def not_an_array(name: str, expected: str, value: object) -> NoReturn:
    """Raise a TypeError that names the type of `value`, or its dtype if it is an array."""
    got = describe(value)
    if isinstance(value, jax.ShapeDtypeStruct):
        got = f"jax.ShapeDtypeStruct {got}, which holds no values: pass an array, or call through `jax.eval_shape`"
    elif not isinstance(value, ARRAYS) and _is_array_like(value):
        got = f"{type(value).__module__.partition('.')[0]}.{type(value).__name__} {got}"
    bad_type(name, expected, got)


def array(name: str, value: object, *, complex_ok: bool = False) -> jax.Array:
    """Return `value` as a JAX array. Raise a TypeError unless it is a float array, or complex where `complex_ok`."""
    kind = "a float or complex array" if complex_ok else "a float array"
    found = converted(value)
    if not isinstance(found, ARRAYS) or not jnp.issubdtype(found.dtype, jnp.inexact if complex_ok else jnp.floating):
        not_an_array(name, kind, value)
    return jnp.asarray(found)


def arrays(name: str, tree: PyTree) -> PyTree[Array]:
    """Apply `array` to every leaf of a pytree. An object with `__jax_array__` is a leaf."""
    return jax.tree.map(lambda a: array(name, a), tree, is_leaf=_is_convertible)


def mask(name: str, value: object) -> jax.Array:
    """Return `value` as a JAX array. Raise a TypeError unless it is a boolean array."""
    found = converted(value)
    if not isinstance(found, ARRAYS) or found.dtype != bool:
        if isinstance(value, ARRAYS):
            bad_type(name, "a boolean array", f"{describe(value)}; convert it with `.astype(bool)`")
        not_an_array(name, "a boolean array", value)
    return jnp.asarray(found)


def shape(name: str, value: jax.Array, expected: tuple[int, ...], meaning: str, **arrays: AnyArray) -> None:
    if value.shape != expected:
        bad_value(name, f"shape {expected} = {meaning}", str(value.shape), **arrays)


def container(name: str, value: object, kind: type[Container]) -> Container:
    """Return `value` as an instance of the NamedTuple `kind`. Another NamedTuple is an error, even of the same length.

    A mapping with exactly the fields of `kind` is converted: without a target, Orbax restores a NamedTuple as a dict.
    """
    if isinstance(value, kind):
        return value
    fields: tuple[str, ...] = getattr(kind, "_fields", ())
    expected = f"{kind.__name__}({', '.join(fields)})"
    if not isinstance(value, Mapping):
        other = type(value)
        package = f"{other.__module__.partition('.')[0]}." if other.__name__ == kind.__name__ else ""
        named = ""
        if other in (tuple, list) and len(value) == len(fields):  # type: ignore[arg-type]
            names = ", ".join(f"{field}=..." for field in fields)
            named = f"; pass {kind.__name__}({names}), because the order differs between libraries"
        bad_type(name, expected, package + describe(value) + named)
    missing = [field for field in fields if field not in value]
    unknown = [key for key in value if key not in fields]
    if missing or unknown:
        found = [f"without {', '.join(missing)}"] if missing else []
        found += [f"with unknown fields {', '.join(map(repr, unknown))}"] if unknown else []
        bad_type(name, f"{expected}, or a mapping with exactly these fields", "a mapping " + " and ".join(found))
    return kind(**value)


def integer(name: str, value: object, *, at_least: int | None = None, or_else: str = "") -> int:
    """Return `value` as a static Python integer. A bool or a JAX array is an error.

    The message says that `or_else` would be accepted as well.
    """
    expected = ("an integer" if at_least is None else f"an integer >= {at_least}") + or_else
    if isinstance(value, bool | np.bool_ | jax.Array):
        bad_type(name, expected + ", known when the function is traced", describe(value))
    try:
        number = operator.index(cast("SupportsIndex", value))
    except TypeError:
        bad_type(name, expected, describe(value))
    if at_least is not None and number < at_least:
        bad_value(name, expected, str(number))
    return number


def axis(name: str, value: object, axes: int, features: int, **arrays: AnyArray) -> int:
    """Return the non-negative index of one of the first `axes` axes of an array that has `features` more axes."""
    number = integer(name, value)
    position = number + axes + features if number < 0 else number
    if not 0 <= position < axes:
        expected = f"an axis from 0 to {axes - 1} or from {-axes - features} to {-features - 1}"
        if features:
            expected += ", before the feature axis" if features == 1 else ", before the spatial and channel axes"
        bad_value(name, expected, str(number), **arrays)
    return position


def truncation(value: object) -> tuple[int, int] | None:
    """Return the pair (k1, k2) for `truncation=k` or `truncation=(k1, k2)`."""
    if value is None:
        return None
    if not isinstance(value, tuple | list):
        k = integer("truncation", value, at_least=1, or_else=", a pair (k1, k2) or None")
        return k, k
    if len(value) != 2:
        bad_value("truncation", "an integer or a pair (k1, k2)", describe(value))
    k1, k2 = (integer(f"truncation[{i}]", k, at_least=1) for i, k in enumerate(value))
    if k2 < k1:
        bad_value("truncation", "(k1, k2) with k2 >= k1", describe(value))
    return k1, k2


def checkpoint(value: object) -> int | str | None:
    """Return `value` if it is None, "auto" or a static integer >= 1. Raise an error otherwise."""
    others = ', "auto" (about sqrt(T)) or None'
    if isinstance(value, str) and value != "auto":
        bad_value("checkpoint", f"an integer >= 1{others}", repr(value))
    if value is None or isinstance(value, str):
        return value
    return integer("checkpoint", value, at_least=1, or_else=others)


def lengths(name: str, value: object, batch: tuple[int, ...], steps: int) -> jax.Array:
    """Return `value` as an int32 array `(*batch,)` of lengths from 0 to `steps`.

    Concrete lengths out of range raise a ValueError. Traced lengths are clamped, because compiled code cannot raise.
    `checkify.checkify` with `user_checks` reports them.
    """
    found = converted(value)
    if not isinstance(found, ARRAYS) or not jnp.issubdtype(found.dtype, jnp.integer):
        not_an_array(name, "an array of integers", value)
    if found.shape != batch:
        hint = "; for arrays (batch, T, D), pass time_axis=1" if found.shape == (steps,) else ""
        bad_value(name, f"shape {batch} = *batch", f"{found.shape}{hint}")
    expected = f"lengths from 0 to {steps}, the number of steps"
    if not isinstance(found, Tracer) and not export.is_symbolic_dim(steps):
        if found.size:
            low, high = int(np.asarray(found).min()), int(np.asarray(found).max())
            if low < 0 or high > steps:
                bad_value(name, expected, f"{low} to {high}")
        return jnp.asarray(found, jnp.int32)
    # Compare before the cast to int32, which wraps large numbers around.
    n = jnp.asarray(found, jnp.int32) if found.dtype.itemsize < 4 else jnp.asarray(found)
    limit = jnp.asarray(steps, n.dtype)
    from jaxseq._lengths_check import checked_lengths  # noqa: PLC0415  # imports checkify

    n = checked_lengths(n, steps=steps, message=f"`{name}`: expected {expected}, got {{lengths}}")
    return jnp.clip(n, 0, limit).astype(jnp.int32)


def rate(name: str, value: object) -> float:
    """Return `value` as a static float. Raise an error unless it is a number >= 0 and < 1."""
    if isinstance(value, bool | np.bool_ | jax.Array) or not isinstance(value, int | float | np.number):
        bad_type(name, "a number >= 0 and < 1, known when the function is traced", describe(value))
    if not 0 <= value < 1:
        bad_value(name, "a number >= 0 and < 1", str(value))
    return float(value)


def key(name: str, value: object) -> None:
    """Raise a TypeError for a number in place of a random key."""
    if isinstance(value, int | np.integer):
        bad_type(name, "a JAX random key, such as jax.random.key(0)", describe(value))


def boolean(name: str, value: object) -> bool:
    if not isinstance(value, bool | np.bool_):
        bad_type(name, "True or False, known when the function is traced", describe(value))
    return bool(value)


def choice(name: str, value: object, options: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in options:
        bad_value(name, "one of " + ", ".join(map(repr, options)), describe(value))
    return value


def dtype(name: str, value: object) -> np.dtype:
    """Return a floating dtype in canonical form: float64 becomes float32 unless x64 is enabled."""
    try:
        result = jax.dtypes.canonicalize_dtype(value)
    except TypeError:
        bad_type(name, "a floating dtype", describe(value))
    if not jnp.issubdtype(result, jnp.floating):
        bad_type(name, "a floating dtype", str(result))
    return np.dtype(result)


def precision(value: Value) -> Value:
    """Return `value` if `jax.lax` accepts it as `precision`. Raise a ValueError otherwise."""
    presets = (type(None), lax.Precision, lax.DotAlgorithm, lax.DotAlgorithmPreset)
    for part in value if isinstance(value, tuple) and len(value) == 2 else (value,):
        if isinstance(part, presets):
            continue
        try:
            lax.Precision(part)
        except ValueError:
            bad_value("precision", "a precision of jax.lax, such as None, 'high' or 'highest'", describe(value))
    return value
