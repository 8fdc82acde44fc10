"""Decorators for public functions: named scope, expanded signature and docstring, messages for wrong arguments."""

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

import jax

from jaxseq import _checks, _time_options

P = ParamSpec("P")
R = TypeVar("R")

PACKAGE = str(Path(__file__).parent)


def op(f: Callable[P, R]) -> Callable[P, R]:
    """Run `f` under the scope `jaxseq.<name>`, with messages for wrong arguments.

    Where `f` takes `**time`, the signature and the docstring of the result list every time option.
    """
    name = f.__name__
    signature = signature_with_time_options(f)

    @functools.wraps(f)
    def public(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(wrong_arguments(name, signature, kwargs, error)) from None
        try:
            with jax.named_scope(f"jaxseq.{name}"):
                return f(*args, **kwargs)
        except Exception as error:
            if any(type(a).__name__ == "JetTracer" for a in jax.tree.leaves((args, kwargs))):
                message = f"jaxseq.{name}: expected arrays, got tracers of jax.experimental.jet, which has no rule for "
                raise TypeError(f"{message}jax.custom_jvp; nest jax.jvp for higher derivatives") from None
            raise error.with_traceback(without_own_frames(error.__traceback__)) from error.__cause__

    public.__signature__ = signature  # type: ignore[attr-defined]
    public.__doc__ = _time_options.described_in(f.__doc__) if f.__doc__ else None
    return public


def with_hints(f: Callable[P, R]) -> Callable[P, R]:
    """Answer unknown and missing arguments of `f`, and trim tracebacks, as `op` does."""
    module = f.__module__.split(".")[1]
    name = f.__name__ if module.startswith("_") else f"{module}.{f.__name__}"
    signature = inspect.signature(f)

    @functools.wraps(f)
    def public(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise TypeError(wrong_arguments(name, signature, kwargs, error)) from None
        try:
            _checks.key("key", given.get("key"))
            return f(*args, **kwargs)
        except Exception as error:
            raise error.with_traceback(without_own_frames(error.__traceback__)) from error.__cause__

    return public


# --- Wrong arguments ---


def wrong_arguments(name: str, signature: inspect.Signature, kwargs: Mapping[str, object], error: TypeError) -> str:
    """Return the message for arguments that do not fit the signature: what to use instead, and the options."""
    unknown = next((argument for argument in kwargs if argument not in signature.parameters), None)
    kinds: dict[bool, list[str]] = {True: [], False: []}
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            continue
        kinds[parameter.kind is parameter.KEYWORD_ONLY].append(parameter.name)
    if unknown is None:
        carry = ", where a carry of None is zeros" if "carry" in signature.parameters else ""
        problem = f"{error}; the arguments are ({', '.join(kinds[False])}){carry}"
    else:
        hint = suggestion(unknown, signature)
        problem = f"got an unexpected keyword argument {unknown!r}" + (f"; use {hint}" if hint else "")
    return f"jaxseq.{name}: {problem}. Options: {', '.join(kinds[True]) or 'none'}"


def suggestion(unknown: str, signature: inspect.Signature) -> str:
    """Return what to use instead of the argument `unknown`, or an empty string."""
    from jaxseq import _names  # noqa: PLC0415  # only errors need it

    hint = _names.hint_for_argument(unknown, signature.parameters)
    if hint or unknown in _time_options.DEFAULTS:  # an option of recurrences has no near match elsewhere
        return hint
    close = difflib.get_close_matches(unknown, signature.parameters, n=1, cutoff=0.7)
    return f"`{close[0]}`" if close else ""


def without_own_frames(traceback: TracebackType | None) -> TracebackType | None:
    """Return a traceback without the frames of this package, as JAX removes its own.

    Frames of a function that the caller passed stay. The setting of JAX applies: `jax_traceback_filtering="off"` keeps
    all frames.
    """
    settings: Any = jax.config
    if settings.jax_traceback_filtering == "off":
        return traceback
    frames = []
    while traceback is not None:
        if not traceback.tb_frame.f_code.co_filename.startswith(PACKAGE):
            frames.append(traceback)
        traceback = traceback.tb_next
    kept: TracebackType | None = None
    for frame in reversed(frames):
        kept = TracebackType(kept, frame.tb_frame, frame.tb_lasti, frame.tb_lineno)
    return kept


# --- Time options in signatures ---


def signature_with_time_options(f: Callable[..., Any]) -> inspect.Signature:
    """Return the signature of `f`, with every time option in place of `**time`."""
    signature = inspect.signature(f)
    *parameters, last = signature.parameters.values()
    if last.kind is not last.VAR_KEYWORD:
        return signature
    for option, default in _time_options.DEFAULTS.items():
        annotation = _time_options.TYPES[option]
        parameters.append(inspect.Parameter(option, last.KEYWORD_ONLY, default=default, annotation=annotation))
    return signature.replace(parameters=parameters)
