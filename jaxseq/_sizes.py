"""Symbolic sizes, which are unknown when a function is traced.

Under `jax.export` an axis may have a symbolic size, such as `t` or `2 * b`. Symbolic sizes can be added and multiplied.
A comparison raises an error if its result depends on the value, and so do `max`, `min` and `range`. Code that branches
on a size therefore calls `known` first. For symbolic sizes it takes the general branch: a rule that works for every
size, or one chunk for all of time. The programs for known sizes do not change.
"""

from typing import Any

from jax import export
from jax.core import max_dim


def is_concrete(*sizes: Any) -> bool:
    """Return True if no size is symbolic."""
    return not any(map(export.is_symbolic_dim, sizes))


def at_least(size: Any, least: int) -> Any:
    """Return max(size, least), symbolic if `size` is."""
    return max_dim(size, least)
