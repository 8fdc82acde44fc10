"""Decorator for public ops: named scope, expanded signature and docstring, forward-mode hint."""

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import ParamSpec, TypeVar

import jax

from jaxseq import _time_options

P = ParamSpec("P")
R = TypeVar("R")


def op(f: Callable[P, R]) -> Callable[P, R]:
    """Run `f` under the scope `jaxseq.<name>`, and refer users of forward mode to the reference implementation.

    Where `f` takes `**time`, the signature and the docstring of the result list every time option.
    """
    name = f.__name__
    signature = signature_with_time_options(f)

    @functools.wraps(f)
    def public(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"jaxseq.{name}: {error}{suggestion(kwargs, signature)}") from None
        try:
            with jax.named_scope(f"jaxseq.{name}"):
                return f(*args, **kwargs)
        except TypeError as error:
            if "forward-mode" in str(error):
                error.add_note(
                    f"jaxseq.{name} has a hand-derived rule for reverse mode only. For jvp, jacfwd or linearize, "
                    f"use the reference implementation, which has the same signature: jaxseq.reference.{name}."
                )
            raise

    public.__signature__ = signature  # type: ignore[attr-defined]
    public.__doc__ = _time_options.described_in(f.__doc__) if f.__doc__ else None
    return public


# Names in other libraries, and former names: what to use here.
HINTS = {
    "batch_first": "`time_axis=1`",
    "time_major": "`time_axis`",
    "seq_lengths": "`lengths`",
    "mask": "`lengths`",
    "go_backwards": "`reverse`",
    "bidirectional": "`jaxseq.bidirectional`",
    "num_layers": "`jaxseq.stack`",
    "dropout": "`jaxseq.stack(..., dropout=, key=)`",
    "drop": "`recurrent_dropout_mask`",
    "hold": "`zoneout`",
    "strides": "`stride`",
    "feature_group_count": "`groups`",
    "rhs_dilation": "`dilation`",
    "lhs_dilation": "`jaxseq.conv_transpose`",
}


def suggestion(kwargs: Mapping[str, object], signature: inspect.Signature) -> str:
    """Return what to use instead of the first keyword argument that the signature does not have, or an empty string."""
    unknown = next((name for name in kwargs if name not in signature.parameters), None)
    if unknown is None:
        return ""
    keyword_only = [name for name, p in signature.parameters.items() if p.kind is p.KEYWORD_ONLY]
    close = difflib.get_close_matches(unknown, signature.parameters, n=1)
    hint = HINTS.get(unknown) or (f"`{close[0]}`" if close else None)
    return (f"; use {hint}" if hint else "") + f". Options: {', '.join(keyword_only) or 'none'}"


def signature_with_time_options(f: Callable[..., object]) -> inspect.Signature:
    """Return the signature of `f`, with every time option in place of `**time`."""
    signature = inspect.signature(f)
    *parameters, last = signature.parameters.values()
    if last.kind is not last.VAR_KEYWORD:
        return signature
    for option, default in _time_options.DEFAULTS.items():
        annotation = _time_options.TYPES[option]
        parameters.append(inspect.Parameter(option, last.KEYWORD_ONLY, default=default, annotation=annotation))
    return signature.replace(parameters=parameters)
