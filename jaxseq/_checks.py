"""All validation of arguments, in one wording.

Every message names the argument in backticks, says what was expected and what came, and ends
with the shapes involved. Checks look at shapes and dtypes only, so they cost nothing under jit.
"""

import operator
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax
from jax.core import Tracer

from jaxseq._lengths_check import checked_lengths

# What counts as an array. Tracers are instances of jax.Array.
ARRAYS = jax.Array | np.ndarray | np.generic


def describe(value: Any) -> str:
    """A short word for what came: dtype and shape of an array, the repr of anything small."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}{list(value.shape)}"
    text = repr(value)
    return f"{type(value).__name__} {text}" if len(text) <= 60 else type(value).__name__


def _message(name: str, expected: str, got: str, arrays: dict[str, Any]) -> str:
    shapes = ", ".join(f"{key} {tuple(np.shape(value))}" for key, value in arrays.items())
    return f"`{name}`: expected {expected}, got {got}" + (f" ({shapes})" if shapes else "")


def bad_value(name: str, expected: str, got: str, **arrays: Any) -> NoReturn:
    raise ValueError(_message(name, expected, got, arrays))


def bad_type(name: str, expected: str, got: str, **arrays: Any) -> NoReturn:
    raise TypeError(_message(name, expected, got, arrays))


def converted(value: Any) -> Any:
    """Return the array that `value` stands for: the result of `__jax_array__` (a parameter of Flax NNX, for example),
    and a NumPy array in the byte order of the machine. Return anything else unchanged.
    """
    if isinstance(value, jax.Array):
        return value
    if hasattr(type(value), "__jax_array__"):
        value = value.__jax_array__()
    if isinstance(value, np.ndarray | np.generic) and not value.dtype.isnative:
        value = value.astype(value.dtype.newbyteorder("="))
    return value


def not_an_array(name: str, expected: str, value: Any) -> NoReturn:
    """Raise a TypeError that names the type of what was passed in place of an array, or the dtype of the array."""
    got = describe(value)
    if isinstance(value, jax.ShapeDtypeStruct):
        got = f"jax.ShapeDtypeStruct {got}, which holds no values: pass an array, or call through `jax.eval_shape`"
    elif not isinstance(value, ARRAYS) and hasattr(value, "shape") and hasattr(value, "dtype"):
        got = f"{type(value).__module__.partition('.')[0]}.{type(value).__name__} {got}"
    bad_type(name, expected, got)


def array(name: str, value: Any, *, complex_ok: bool = False) -> jax.Array:
    """A JAX array of floats (or complex numbers, where they make sense) from a JAX or NumPy array."""
    kind = "a float or complex array" if complex_ok else "a float array"
    found = converted(value)
    if not isinstance(found, ARRAYS) or not jnp.issubdtype(found.dtype, jnp.inexact if complex_ok else jnp.floating):
        not_an_array(name, kind, value)
    return jnp.asarray(found)


def arrays(name: str, tree: Any) -> Any:
    """`array` of every leaf of a pytree; an object with `__jax_array__` is a leaf."""
    return jax.tree.map(lambda a: array(name, a), tree, is_leaf=lambda a: hasattr(type(a), "__jax_array__"))


def mask(name: str, value: Any) -> jax.Array:
    """A JAX array of booleans, traced or not, from a JAX or NumPy array."""
    found = converted(value)
    if not isinstance(found, ARRAYS) or found.dtype != bool:
        not_an_array(name, "a boolean array", value)
    return jnp.asarray(found)


def shape(name: str, value: jax.Array, expected: tuple[int, ...], meaning: str, **arrays: Any) -> None:
    if value.shape != expected:
        bad_value(name, f"shape {expected} = {meaning}", str(value.shape), **arrays)


def container(name: str, value: Any, kind: type) -> Any:
    """Return a NamedTuple of exactly this class: parameters of another cell never slip through by their length.

    A mapping from exactly its fields is converted: Orbax restores a NamedTuple as a dict where it is given no target.
    """
    if isinstance(value, kind):
        return value
    fields: tuple[str, ...] = getattr(kind, "_fields", ())
    expected = f"{kind.__name__}({', '.join(fields)})"
    if not isinstance(value, Mapping):
        other = type(value)
        whose = f"that of {other.__module__.partition('.')[0]}, " if other.__name__ == kind.__name__ else ""
        bad_type(name, expected, whose + describe(value))
    missing = [field for field in fields if field not in value]
    unknown = [key for key in value if key not in fields]
    if missing or unknown:
        found = [f"without {', '.join(missing)}"] if missing else []
        found += [f"with {', '.join(map(repr, unknown))}, which is no field"] if unknown else []
        bad_type(name, f"{expected}, or a mapping from exactly these fields", "a mapping " + " and ".join(found))
    return kind(**value)


def integer(name: str, value: Any, *, at_least: int | None = None) -> int:
    """A static Python (or NumPy) integer; a bool or a traced value is none."""
    expected = "an integer" if at_least is None else f"an integer >= {at_least}"
    if isinstance(value, bool | np.bool_ | jax.Array):
        bad_type(name, expected + ", known when the function is traced", describe(value))
    try:
        number = operator.index(value)
    except TypeError:
        bad_type(name, expected, describe(value))
    if at_least is not None and number < at_least:
        bad_value(name, expected, str(number))
    return number


def axis(name: str, value: Any, axes: int, features: int, **arrays: Any) -> int:
    """One of the first `axes` axes of an array that has `features` more, counted from either end of it."""
    number = integer(name, value)
    place = number + axes + features if number < 0 else number
    if not 0 <= place < axes:
        last = "the last, the features" if features == 1 else f"the last {features}, space and channels"
        bad_value(name, f"an axis before {last}, from {-axes - features} to {axes - 1}", str(number), **arrays)
    return place


def truncation(value: Any) -> tuple[int, int] | None:
    """(k1, k2) of `truncation=k` or `truncation=(k1, k2)`."""
    if value is None:
        return None
    if not isinstance(value, tuple | list):
        k = integer("truncation", value, at_least=1)
        return k, k
    if len(value) != 2:
        bad_value("truncation", "an integer or a pair (k1, k2)", describe(value))
    k1, k2 = (integer(f"truncation[{i}]", k, at_least=1) for i, k in enumerate(value))
    if k2 < k1:
        bad_value("truncation", "(k1, k2) with k2 >= k1", describe(value))
    return k1, k2


def checkpoint(value: Any) -> int | str | None:
    """None, "auto", or after how many steps."""
    if isinstance(value, str):
        return choice("checkpoint", value, ("auto",))
    return None if value is None else integer("checkpoint", value, at_least=1)


def lengths(name: str, value: Any, batch: tuple[int, ...], steps: int) -> jax.Array:
    """An array of integers (*batch,) from 0 to `steps`, in int32.

    Lengths that are known are checked. Traced ones are clamped to that range: what runs on a device cannot raise. Under
    `checkify.checkify` with `user_checks` they are checked as well.
    """
    found = converted(value)
    if not isinstance(found, ARRAYS) or not jnp.issubdtype(found.dtype, jnp.integer):
        not_an_array(name, "an array of integers", value)
    shape(name, jnp.asarray(found), batch, "*batch")
    expected = f"lengths from 0 to {steps}, the steps of `xs`"
    if not isinstance(found, Tracer) and not export.is_symbolic_dim(steps):
        if found.size:
            low, high = int(np.asarray(found).min()), int(np.asarray(found).max())
            if low < 0 or high > steps:
                bad_value(name, expected, f"{low} to {high}")
        return jnp.asarray(found, jnp.int32)
    # Compared before the cast to int32, in which large numbers would wrap around.
    n = jnp.asarray(found, jnp.int32) if found.dtype.itemsize < 4 else jnp.asarray(found)
    limit = jnp.asarray(steps, n.dtype)
    n = checked_lengths(n, steps=steps, message=f"`{name}`: expected {expected}, got {{lengths}}")
    return jnp.clip(n, 0, limit).astype(jnp.int32)


def rate(name: str, value: Any) -> float:
    """A probability below one, known when the function is traced."""
    if isinstance(value, bool | np.bool_ | jax.Array) or not isinstance(value, int | float | np.number):
        bad_type(name, "a number from 0 to 1, known when the function is traced", describe(value))
    if not 0 <= value < 1:
        bad_value(name, "at least 0 and less than 1", str(value))
    return float(value)


def boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        bad_type(name, "True or False, known when the function is traced", describe(value))
    return bool(value)


def choice(name: str, value: Any, options: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in options:
        bad_value(name, "one of " + ", ".join(map(repr, options)), describe(value))
    return value


def dtype(name: str, value: Any) -> np.dtype:
    """A floating dtype, as jax would store it: float64 becomes float32 unless x64 is on."""
    try:
        result = jax.dtypes.canonicalize_dtype(value)
    except TypeError:
        bad_type(name, "a floating dtype", describe(value))
    if not jnp.issubdtype(result, jnp.floating):
        bad_type(name, "a floating dtype", str(result))
    return np.dtype(result)


def precision(value: Any) -> Any:
    """What `jax.lax` takes as `precision`, or an error in our words."""
    presets = (type(None), lax.Precision, lax.DotAlgorithm, lax.DotAlgorithmPreset)
    for part in value if isinstance(value, tuple) and len(value) == 2 else (value,):
        if isinstance(part, presets):
            continue
        try:
            lax.Precision(part)
        except ValueError:
            bad_value("precision", "what jax.lax takes, such as None, 'high' or 'highest'", describe(value))
    return value
