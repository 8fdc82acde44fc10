r"""`check_truncation`: check the gradient of truncated backpropagation through time.

Finite differences of f ignore `stop_gradient`, so they do not apply to a truncated gradient. A truncated gradient is
the exact gradient of a function g in which the state at the start of each window, except the first, is frozen:

    g(params, carry, xs) = y of window 0 from carry, y of window w from s*_w,     s*_w the state of f at w k, a constant

For truncation = (k1, k2), a window of k1 steps is processed from k2 - k1 steps before it, and s* is the state there.
The check compares the gradient of f with finite differences of g and with the derivative of g by JAX. g uses only the
values of f.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxseq import _checks
from jaxseq._types import ArrayOrScalar
from jaxseq.testing import _point, _surgery
from jaxseq.testing._check import Session
from jaxseq.testing._compare import DECIDES, largest
from jaxseq.testing._point import Args, wide
from jaxseq.testing._report import Failure, Report, Result, Verdict
from jaxseq.testing._subject import derivative
from jaxseq.testing._trial import Trial

# A function of sequences, `(params, carry, xs, **options) -> (carry, ys)`.
Sequences = Callable[..., tuple[PyTree, PyTree]]
# The steps of a window, or the pair (k1, k2).
Truncation = int | tuple[int, int]


def check_truncation(
    f: Sequences,
    args: Sequence[PyTree],
    *,
    truncation: int | tuple[int, int],
    reverse: bool = False,
    reference: Sequences | None = None,
    argnums: int | Sequence[int] | None = None,
    order: int = 2,
    seed: int = 0,
    tolerance: float | None = None,
    level: str = "full",
) -> Report:
    """Check a truncated gradient through time: all of `check_vjp`, and that no gradient crosses a window boundary.

    f is called as `f(params, carry, xs, truncation=k)` and returns `(carry, ys)`. Time is the first axis of every leaf
    of `xs` (which may include reset masks) and `ys`. With `truncation=None`, f must return the same values and have the
    full gradient. The gradient with `truncation=k` is compared with finite differences and with the derivative by JAX,
    both of f with the state at t = k, 2k, ... frozen. In addition, the gradient of a loss on one window must be exactly
    zero with respect to the others, a k of at least the sequence length must give the full gradient, and a smaller k
    must not.

    Args:
        f: the function. Bind other options with `functools.partial`.
        args: `(params, carry, xs)`. `carry` may be None if f accepts that.
        truncation: the number k of steps of a window, or a pair (k1, k2): the loss in each window of k1 steps is
            backpropagated through k2 steps.
        reverse: True if f processes the sequence from the last step to the first; f is then called with `reverse=True`.
        reference: a function like f, with the options `truncation` and `reverse` of f, which JAX differentiates.
        argnums: as in `check_vjp`.
        order: as in `check_vjp`.
        seed: as in `check_vjp`.
        tolerance: as in `check_vjp`.
        level: as in `check_vjp`. The check named truncation runs at both levels.

    Returns:
        A `Report`.

    Raises:
        TypeError: as in `check_vjp`, or `truncation` is neither an integer nor a pair of integers.
        ValueError: as in `check_vjp`, or `truncation` is below one, or the leaves of `xs` have different lengths.

    Example:
        >>> import jax, jaxseq
        >>> from jaxseq.testing import check_truncation
        >>> params = jaxseq.rnn_init(jax.random.key(0), 3, 5)
        >>> xs = jax.random.normal(jax.random.key(1), (7, 2, 3))
        >>> report = check_truncation(jaxseq.rnn, (params, None, xs), truncation=3, level="quick")
        >>> report.verdict.name
        'PASS'

    Reference:
        R. J. Williams and J. Peng, An efficient gradient-based algorithm for on-line training of recurrent network
        trajectories (1990), for truncation.
    """
    session_ = session(f, args, truncation=truncation, reverse=reverse, reference=reference, argnums=argnums)
    return session_.report(args, order=order, seed=seed, tolerance=tolerance, level=level)


def session(
    f: Sequences,
    args: Sequence[PyTree],
    *,
    truncation: Truncation,
    reverse: bool = False,
    reference: Sequences | None = None,
    argnums: int | Sequence[int] | None = None,
) -> Session:
    """Return the session that checks f with a truncated gradient against f with frozen states."""
    pair = _checks.truncation(truncation)
    k1, k2 = pair if pair else (_checks.integer("truncation", truncation),) * 2
    k = k1 if k1 == k2 else (k1, k2)
    options = {"reverse": True} if _checks.boolean("reverse", reverse) else {}
    steps = _steps(f, _point.as_arrays(args))
    full = _surgery.plain(partial(reference or f, truncation=None, **options))
    windows = _windows(steps, k1, k2, bool(options))

    def judge(args: Args) -> Sequences:
        """Return f with frozen states for these arguments, whose sequence may have another length."""
        length = jax.tree.leaves(args[2])[0].shape[0]
        return frozen(full, _windows(length, k1, k2, bool(options)), bool(options), args)

    return Session(
        partial(f, truncation=k, **options),
        args,
        reference=reference and partial(reference, truncation=k, **options),
        judge=judge,
        argnums=argnums,
        more={"truncation": partial(edges, f=partial(f, **options), steps=steps, k=k, windows=windows)},
    )


def _steps(f: Sequences, args: Args) -> int:
    """Return T, the length of the first axis of every leaf of xs."""
    if len(args) != 3:
        _checks.bad_value("args", "(params, carry, xs)", f"{len(args)} arguments")
    lengths = {np.shape(leaf)[0] if np.ndim(leaf) else -1 for leaf in jax.tree.leaves(args[2])}
    if len(lengths) != 1 or -1 in lengths:
        _checks.bad_value("args[2]", "time on the first axis of every leaf of xs", f"lengths {sorted(lengths)}")
    if not callable(f):
        _checks.bad_type("f", "a function", _checks.describe(f))
    return lengths.pop()


class Window(NamedTuple):
    """The slices of a window in storage order: the steps of its outputs, and the steps that its gradient reaches."""

    outputs: slice
    reached: slice
    before: slice  # the steps processed before `reached`


def frozen(f: Sequences, windows: list[Window], reverse: bool, args: Args) -> Sequences:
    """Return g: f with the state at which the gradient of each window ends frozen at its value for `args`."""
    params, carry, xs = args
    starts = [f(params, carry, _at(xs, w.before))[0] if _length(w.before) else carry for w in windows]

    def g(params: PyTree, carry: PyTree, xs: PyTree) -> tuple[PyTree, PyTree]:
        pieces, last = [], carry
        for n, w in enumerate(windows):
            last, ys = f(params, starts[n] if _length(w.before) else carry, _at(xs, w.reached))
            count = _length(w.outputs)
            pieces.append(_at(ys, slice(count) if reverse else slice(_length(w.reached) - count, None)))
        in_storage = pieces[::-1] if reverse else pieces
        return last, jax.tree.map(lambda *parts: jnp.concatenate(parts), *in_storage)

    return g


def _windows(steps: int, k1: int, k2: int, reverse: bool) -> list[Window]:
    """Return all windows in the order of processing; a single empty window if there are no steps."""

    def in_storage(start: int, stop: int) -> slice:
        return slice(steps - stop, steps - start) if reverse else slice(start, stop)

    windows = []
    for start in range(0, max(steps, 1), k1):
        first, stop = max(0, start - (k2 - k1)), min(start + k1, steps)
        windows.append(Window(in_storage(start, stop), in_storage(first, stop), in_storage(0, first)))
    return windows


def _length(window: slice) -> int:
    return window.stop - window.start


def _at(xs: PyTree, window: slice) -> PyTree:
    return jax.tree.map(lambda a: a[window], xs)


def edges(trial: Trial, f: Sequences, steps: int, k: Truncation, windows: list[Window]) -> Iterator[Result]:
    """Check that no gradient crosses a window boundary, and which windows give the full gradient."""
    yield from _nothing_crosses(trial, windows)
    s, check, seed = trial.subject, "truncation", trial.patterns["joint"]

    def gradient(k: Truncation | None) -> list[ArrayOrScalar]:
        F = partial(f, truncation=k)
        run = s.program(f"truncation={k}", lambda x, rest, c: derivative("vjp", s.flat(F, rest))(x, c)[1])
        return wide(run(trial.x, trial.rest, seed))

    full = gradient(None)
    message = "a window as long as the sequence does not give the full gradient"
    yield from trial.agree(check, gradient(max(steps, 1)), full, message)
    if len(windows) == 1:
        return
    # If the expected truncated gradient differs from the full one, that of the rule must differ too.
    hand, true = trial.by_rule["joint"], (trial.true or trial.by_rule)["joint"]
    differs = [largest(a - b) > DECIDES * largest(b) for a, b in zip(hand, full, strict=True)]
    should = [largest(a - b) > DECIDES * largest(b) for a, b in zip(true, full, strict=True)]
    if any(differs):
        yield Result(check, None, Verdict.PASS)
    elif any(should) or trial.true is None:
        failure = Failure(check, f"truncation={k} gives the full gradient: nothing is truncated", seed=trial.seed)
        yield Result(check, None, Verdict.FAIL, failure=failure)
    else:
        note = (
            "the full and the truncated gradient are equal here: a rule that truncates nothing would also have passed"
        )
        yield Result(check, None, Verdict.INCONCLUSIVE, note)


def _nothing_crosses(trial: Trial, windows: list[Window]) -> Iterator[Result]:
    """Check that a cotangent on one window gives exact zeros outside of the steps that its gradient reaches."""
    s, check = trial.subject, "truncation"
    outputs = s.outs.join(trial.patterns["joint"], [None] * s.outs.differentiated.count(False))
    for n, window in enumerate(windows):
        carry, ys = outputs
        own = jax.tree.map(partial(_only, window.outputs), ys)
        seed = s.outs.split((jax.tree.map(np.zeros_like, carry), own))[0]
        result = wide(s.by_rule(trial.x, trial.rest, seed)[1])
        for leaf, group, a in zip(trial.leaves, s.ins.groups, result, strict=True):
            outside = a - _only(window.reached, a) if group == 2 else a
            if group == 0 or (group == 1 and not _length(window.before)):
                continue
            if largest(outside):
                message = f"a loss on window {n} only has a nonzero gradient in {leaf} outside of that window"
                failure = Failure(check, message, leaf, by_rule=largest(outside), by_reference=0.0, seed=trial.seed)
                yield Result(check, leaf, Verdict.FAIL, failure=failure)
            else:
                yield Result(check, leaf, Verdict.PASS)


def _only(window: slice, a: ArrayOrScalar) -> ArrayOrScalar:
    """Return a with zeros outside of those steps."""
    result = np.zeros_like(a)
    result[window] = a[window]
    return result
