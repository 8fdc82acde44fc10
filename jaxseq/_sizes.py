"""Sizes that are not known when a function is traced.

Under `jax.export` an axis may have a symbolic size, such as `t` or `2 * b`. It can be added and multiplied, but a
comparison raises where its result depends on the value, and so do `max`, `min` and `range`. Whatever decides by a size
asks `known` first, and takes the general way where a size is symbolic: the rule that serves every size, or one chunk
for all of time. Programs for known sizes stay as they are.
"""

from typing import Any

from jax import export
from jax.core import max_dim


def known(*sizes: Any) -> bool:
    """True if every size is a number when the function is traced."""
    return not any(map(export.is_symbolic_dim, sizes))


def at_least(size: Any, least: int) -> Any:
    """max(size, least), symbolic where the size is."""
    return max_dim(size, least)
