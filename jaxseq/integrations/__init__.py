"""Modules of jaxseq for Flax linen, Flax nnx, Equinox and Haiku.

Each file imports its framework, and is itself imported only on use: `from jaxseq.integrations import linen`.
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

_MODULES = ("equinox", "haiku", "linen", "nnx")

if not TYPE_CHECKING:  # a type checker would accept any name

    def __getattr__(name: str) -> ModuleType:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}; there are {', '.join(_MODULES)}")
        return import_module(f"{__name__}.{name}")
