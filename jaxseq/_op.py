"""What every public op wears: its name in profiles, the options of time in its signature, and a way out for who tries
forward mode.
"""

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

from jaxseq._time import Given, Time

P = ParamSpec("P")
R = TypeVar("R")


def op(f: Callable[P, R]) -> Callable[P, R]:
    """Runs `f` under the scope `jaxseq.<name>`; points forward mode to the plain twin."""
    name = f.__name__
    signature = timed(f)

    @functools.wraps(f)
    def public(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"jaxseq.{name}: {error}") from None
        try:
            with jax.named_scope(f"jaxseq.{name}"):
                return f(*args, **kwargs)
        except TypeError as error:
            if "forward-mode" in str(error):
                error.add_note(
                    f"jaxseq.{name} has a hand-derived reverse rule. For jvp, jacfwd or linearize through it, "
                    f"use its plain twin with the same signature: jaxseq.reference.{name}."
                )
            raise

    public.__signature__ = signature  # type: ignore[attr-defined]
    return public


def timed(f: Callable[..., object]) -> inspect.Signature:
    """The signature of f, `**time` written out as what `Time` holds."""
    signature = inspect.signature(f)
    *parameters, last = signature.parameters.values()
    if last.kind is not last.VAR_KEYWORD:
        return signature
    for option, default in Given._field_defaults.items():
        kind = Time.__annotations__[option]
        parameters.append(inspect.Parameter(option, last.KEYWORD_ONLY, default=default, annotation=kind))
    return signature.replace(parameters=parameters)
