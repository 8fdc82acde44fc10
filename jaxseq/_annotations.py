"""Checks of the shapes of parameters against each other, as their annotations of jaxtyping state them.

A dimension is a letter, a number, a multiple of a letter (`4*H`), or a quotient of two letters (`H/N`).
"""

import re
from functools import lru_cache
from typing import Any, TypeVar, get_args, get_type_hints

from jaxseq import _checks

Params = TypeVar("Params")


def check_annotated(name: str, params: object, kind: type[Params]) -> Params:
    """Return the argument `name` with arrays, whose shapes agree with each other as far as the annotations of `kind`
    state them. `kind` is a NamedTuple.
    """
    given: dict[str, object] = _checks.container(name, params, kind)._asdict()  # type: ignore[attr-defined]
    arrays = {f: None if a is None else _checks.array(f"{name}.{f}", a) for f, a in given.items()}
    sizes: dict[str, int] = {}
    for field, dimensions in _annotated_shapes(kind).items():
        array = arrays[field]
        if array is None and field not in _optional_fields(kind):
            _checks.bad_type(f"{name}.{field}", f"an array of shape ({', '.join(dimensions)})", "None")
        if array is not None and not _fits(dimensions, array.shape, sizes):
            known = ", ".join(f"{letter} = {size}" for letter, size in sizes.items())
            expected = f"shape ({', '.join(dimensions)}{',' * (len(dimensions) == 1)})"
            _checks.bad_value(f"{name}.{field}", f"{expected} with {known}" if known else expected, str(array.shape))
    return kind(**arrays)


def input_size(params: Any) -> int | None:
    """Return D, the number of features of the input, or None if no annotation states it."""
    for field, dimensions in _annotated_shapes(type(params)).items():
        array = getattr(params, field)
        if array is not None and "D" in dimensions:
            size: int = array.shape[dimensions.index("D")]
            return size
    return None


@lru_cache(256)
def _annotated_shapes(params: type) -> dict[str, list[str]]:
    """Return the dimensions in the annotations of the parameters, those with quotients last."""
    try:
        hints = get_type_hints(params)
    except NameError:  # names that are local to a function
        return {}
    found = {}
    for field in params._fields:  # type: ignore[attr-defined]
        hint = hints.get(field)
        texts = [text for kind in (hint, *get_args(hint)) if isinstance(text := getattr(kind, "dim_str", None), str)]
        if texts and all(_DIMENSION.fullmatch(dimension) for dimension in texts[0].split()):
            found[field] = texts[0].split()
    return dict(sorted(found.items(), key=lambda item: any("/" in dimension for dimension in item[1])))


@lru_cache(256)
def _optional_fields(params: type) -> frozenset[str]:
    """Return the fields whose annotations allow None."""
    return frozenset(field for field, hint in get_type_hints(params).items() if type(None) in get_args(hint))


_DIMENSION = re.compile(r"(?:(\d+)\*)?([A-Za-z]+)(?:/([A-Za-z]+))?|(\d+)")


def _fits(dimensions: list[str], shape: tuple[int, ...], sizes: dict[str, int]) -> bool:
    """Return whether a shape is that of an annotation. Letters that occur for the first time enter `sizes`."""
    if len(dimensions) != len(shape):
        return False
    for dimension, size in zip(dimensions, shape, strict=True):
        match = _DIMENSION.fullmatch(dimension)
        assert match is not None
        factor, letter, divisor, number = match.groups()
        if number is not None:
            expected = int(number)
        elif divisor is not None:
            expected = sizes[letter] // sizes[divisor] if {letter, divisor} <= {*sizes} else size
        else:
            expected = int(factor or 1) * sizes.setdefault(letter, size // int(factor or 1))
        if size != expected:
            return False
    return True
