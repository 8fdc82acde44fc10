"""What every public op wears: its name in profiles, and a way out for who tries forward mode."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")


def op(f: Callable[P, R]) -> Callable[P, R]:
    """Runs `f` under the scope `jaxseq.<name>`; points forward mode to the plain twin."""
    name = f.__name__

    @functools.wraps(f)
    def public(*args: P.args, **kwargs: P.kwargs) -> R:
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

    return public
