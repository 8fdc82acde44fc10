r"""`lax.scan` with truncation and checkpoints, for any step function.

The recurrence and its gradient, f any function of one step:

    s_t, y_t = f(s_{t-1}, x_t)                      t = 1 .. T
    s̄_{t-1}  = (∂s_t/∂s_{t-1})ᵀ s̄_t + (∂y_t/∂s_{t-1})ᵀ ȳ_t

Truncation sets s̄_t = 0 at the boundaries t = k, 2k, ... between windows. Then nothing links the windows but the values
of the states s*_w at their beginnings, which the forward sweep has found, and

    ys, s_T  =  windows(s*_0, ..., s*_{W-1}; x),    W = T / k windows, each a scan of k steps from a constant

has the gradient that is asked for. Windows do not wait for each other, so that this is one scan of k steps over W
states at a time: `_windows`. Its values are known already. It is differentiated only, and that by JAX, forwards or
backwards and any number of times: values come from the plain scan, derivatives from the windows.

For (k1, k2) a window is read from `before` = k2 - k1 steps ahead of it, whose outputs do not count. Those that reach
back to t = 0 or farther are one full scan together, the head. What T leaves over, less than a window, is the tail.

    | head, E steps from init       | windows of k1 steps, each from its own s*    | tail |

That costs one more reading of time, which is cheap where a step is small, and pays: at T = 1024 and k = 64 a scan with
`stop_gradient` takes 1.0 to 1.8 times as long, forward and gradient, for states of up to 2048 numbers (two cores, XLA
on CPU, jax 0.10.2). Steps that keep a processor busy by themselves win nothing by it, 0.5 to 0.9 at 4096 and 8192
numbers, and are scanned just so: `SMALL`. On an accelerator no step is large enough, for each waits for its launch.

With `checkpoint=n`, windows go side by side in groups of n steps, of which only the first state is kept, and a window
of more than n steps is read in segments of n, of which also only the first state is kept.
"""

from collections.abc import Callable
from functools import partial
from math import isqrt
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import eval_jaxpr
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Jaxpr
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree

from jaxseq import _checks, _sizes
from jaxseq._derivative import with_derivative_of
from jaxseq._op import op

Step = Callable[[Any, Any], tuple[Any, Any]]

# How many numbers a state may hold that a processor reads windows of it side by side.
SMALL = 2048


@op
def scan(
    f: Step,
    init: PyTree[ArrayLike],
    xs: PyTree[ArrayLike] | None = None,
    length: int | None = None,
    reverse: bool = False,
    unroll: int | bool = 1,
    *,
    truncation: int | tuple[int, int] | None = None,
    checkpoint: int | str | None = None,
) -> tuple[PyTree[Array], PyTree[Array]]:
    r"""`jax.lax.scan` with truncated gradients and little memory, for any step function.

    $$s_t, y_t = f(s_{t-1}, x_t), \qquad
      \bar s_{t-1} = \Bigl(\frac{\partial s_t}{\partial s_{t-1}}\Bigr)^{\!\top} \bar s_t
                   + \Bigl(\frac{\partial y_t}{\partial s_{t-1}}\Bigr)^{\!\top} \bar y_t$$

    f may be a cell of Flax, Equinox or Haiku, a simulator, anything that `lax.scan` takes, and may close over what is
    differentiated. Without `truncation` and `checkpoint` this is `lax.scan`.

    With `truncation=k` the gradient of the carry stops at t = k, 2k, ... of reading. Values are those of `lax.scan`,
    and are computed as there; derivatives are taken of windows of k steps side by side, f under `jax.vmap`, so that
    backward takes k steps in place of T (large states on a CPU are faster one by one, and go so).
    All derivatives, forward mode among them, see the carry stopped.

    Args:
        f: `(carry, x) -> (carry, y)`.
        init: the first carry, any pytree.
        xs: what is read, any pytree of arrays `(T, ...)`; None where `length` says how many steps there are.
        length: T, where there are no xs.
        reverse: read from the last step to the first.
        unroll: as in `lax.scan`.
        truncation: k; or (k1, k2), what each window of k1 steps says reaches back k2 steps from its end. A last window
            may be shorter.
        checkpoint: keep for backward the carry every so many steps only, and compute the rest again; `"auto"` is about
            sqrt(T), and so is memory then, besides xs and ys. With `truncation`, so many steps' windows are read side
            by side.

    Returns:
        `(carry, ys)`, as `lax.scan` returns them.

    Raises:
        TypeError: as `lax.scan` does, where f changes the structure or the type of its carry among them.
        ValueError: as `lax.scan` does; a truncation or checkpoint below one, or k2 < k1.

    Example:
        >>> import jax, jax.numpy as jnp, jaxseq
        >>> def loss(a, xs):
        ...     step = lambda s, x: (jnp.tanh(a * s + x), s)
        ...     return jaxseq.scan(step, 0.0, xs, truncation=10)[1].sum()
        >>> jax.grad(loss)(0.9, jnp.linspace(-1.0, 1.0, 1000)).shape
        ()

    Reference:
        R. J. Williams and J. Peng, An efficient gradient-based algorithm for on-line training of recurrent network
        trajectories (1990), section 4, for (k1, k2); T. Chen et al., Training deep nets with sublinear memory cost
        (2016), for checkpoints.
    """
    window, every = _checks.truncation(truncation), _checks.checkpoint(checkpoint)
    whole = partial(lax.scan, f, length=length, reverse=reverse, unroll=unroll)
    if window is None and every is None:
        return whole(init, xs)
    init, steps = as_pytree_function(whole, init, xs, length)
    unrolled = max(1, steps) if unroll is True else max(1, int(unroll))

    turn = (lambda a: jnp.flip(a, 0)) if reverse else jnp.asarray
    xs = jax.tree.map(turn, xs)
    plan = _plan(steps, window, every, unrolled)
    if plan.head == steps:
        end, ys = _scan_in_segments(f, init, xs, steps, plan)
    elif not plan.before and every is None and (not _sizes.known(steps) or _is_large(init)):
        end, ys = _one_by_one(f, init, xs, plan)
    else:
        # All that f closes over becomes an argument, that a rule may say what it is differentiated by.
        at = init, jax.tree.map(lambda a: a[0], xs)
        closed, shapes = jax.make_jaxpr(f, return_shape=True)(*at)
        # Traced again, because a jaxpr may hold what was closed over (jax 0.12), and `step` is static.
        call = lambda closed_over, *leaves: eval_jaxpr(closed.jaxpr, closed_over, *leaves)  # noqa: E731
        program = jax.make_jaxpr(call)(closed.consts, *jax.tree.leaves(at))
        step = _Step(program.jaxpr, jax.tree.structure(shapes))
        (end, ys), _ = _forward(step, plan, [*program.consts, *closed.consts], init, xs)
    return end, jax.tree.map(turn, ys)


def as_pytree_function(scan: Callable[[Any, Any], Any], init: Any, xs: Any, length: int | None) -> tuple[Any, int]:
    """(init as lax.scan types it, T). Whatever is wrong with f, init or xs is told by lax."""
    carry, ys = jax.eval_shape(scan, init, xs)
    init = jax.tree.map(lambda a, like: lax.convert_element_type(a, like.dtype), init, carry)
    steps = next((leaf.shape[0] for leaf in jax.tree.leaves((xs, ys))), length)
    assert steps is not None
    return init, steps


class _Step(NamedTuple):
    """f as a program of what it closed over and its two arguments, and the structure of its result."""

    program: Jaxpr
    result: Any

    def __call__(self, consts: list[Any], s: Any, x: Any) -> tuple[Any, Any]:
        own = len(self.program.constvars)
        leaves = eval_jaxpr(self.program, consts[:own], *consts[own:], *jax.tree.leaves((s, x)))
        return jax.tree.unflatten(self.result, leaves)


class _Plan(NamedTuple):
    """Into which pieces T steps fall, in order of reading."""

    steps: int
    k1: int  # of a window
    before: int  # from how many steps ahead of it a window is read
    segment: int | None  # of a scan whose steps are computed again
    head: int  # steps of the head; all of T where nothing is truncated
    groups: tuple[tuple[int, int], ...]  # of windows: how many groups, of how many windows
    unroll: int

    @property
    def tail(self) -> int:
        """Steps of the tail."""
        return (self.steps - self.head) % self.k1


def _plan(steps: int, window: tuple[int, int] | None, every: int | str | None, unroll: int) -> _Plan:
    if not _sizes.known(steps):
        return _symbolic(steps, window, every, unroll)
    k1, k2 = window or (max(1, steps), max(1, steps))
    n = isqrt(max(0, steps - 1)) + 1 if isinstance(every, str) else every
    if -(-steps // k1) * k1 <= k2:  # the last window reaches back to t = 0, and so do all
        return _Plan(steps, max(1, steps), 0, n, steps, (), unroll)
    before = k2 - k1
    head = (before // k1 + 1) * k1 if before else 0
    windows = (steps - head) // k1
    side_by_side = windows if n is None else max(1, n // k1)
    whole, rest = divmod(windows, max(1, side_by_side))
    groups = tuple((count, size) for count, size in ((whole, side_by_side), (1, rest)) if count and size)
    return _Plan(steps, k1, before, n, head, groups, unroll)


def _symbolic(steps: Any, window: tuple[int, int] | None, every: int | str | None, unroll: int) -> _Plan:
    """The plan where T is symbolic: one scan, since there may be no whole window and no whole segment."""
    if every is not None:
        _checks.bad_value("checkpoint", "None, since the number of steps is symbolic", repr(every))
    k1, k2 = window or (steps, steps)
    if k1 != k2:
        _checks.bad_value("truncation", "an integer, since the number of steps is symbolic", repr(window))
    return _Plan(steps, k1, 0, None, 0, (), unroll)


def _scan_in_segments(f: Step, s: Any, xs: Any, steps: int, plan: _Plan) -> tuple[Any, Any]:
    """One scan, in segments of about equal length where its steps are to be computed again."""
    over = partial(lax.scan, f, unroll=plan.unroll)
    if plan.segment is None or plan.segment >= steps:
        return over(s, xs, steps)
    size = -(-steps // -(-steps // plan.segment))
    count, rest = divmod(steps, size)
    again = partial(jax.checkpoint, prevent_cse=False)  # a scan around it is barrier enough
    s, ys = lax.scan(again(lambda s, x: over(s, x, size)), s, _slice_steps(xs, 0, count, size), count)
    ys = _merge_windows(ys)
    if rest:
        s, more = again(lambda s, x: over(s, x, rest))(s, _scan_piece(xs, count * size, rest))
        ys = _concatenate([ys, more])
    return s, ys


def _is_large(s: Any) -> bool:
    """Whether a step of this state has enough to do."""
    numbers = sum(a.size for a in jax.tree.leaves(s) if jnp.issubdtype(a.dtype, jnp.inexact))
    return jax.default_backend() == "cpu" and _sizes.known(numbers) and numbers > SMALL


def _one_by_one(f: Step, s: Any, xs: Any, plan: _Plan) -> tuple[Any, Any]:
    """Window after window in one scan."""

    def step(s: Any, at: Any) -> tuple[Any, Any]:
        t, x = at
        cut = (t > 0) & (t % plan.k1 == 0)
        stop = lambda a: jnp.where(cut, lax.stop_gradient(a), a) if jnp.issubdtype(a.dtype, jnp.inexact) else a  # noqa: E731
        return f(jax.tree.map(stop, s), x)

    return lax.scan(step, s, (jnp.arange(plan.steps), xs), unroll=plan.unroll)


# --- Values, and the states from which windows are read ---


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _forward(step: _Step, plan: _Plan, consts: list[Any], init: Any, xs: Any) -> Any:
    """((s_T, ys), states): for each of `plan.groups` the states (count, ...) at the beginnings of its groups, or,
    where all windows go side by side, of its windows; then the state from which the tail is read.
    """
    args = consts, init, xs
    consts, init, xs = lax.stop_gradient(args)
    f, k1 = partial(step, consts), plan.k1
    first = plan.head - plan.before if plan.head else 0
    parts = [(1, first)]
    parts += [(count * size, k1) if plan.segment is None else (count, size * k1) for count, size in plan.groups]
    read = sum(count * size for count, size in parts)
    (end, ys), states = _emitting(f, init, xs, [*parts, (1, plan.steps - read)], plan.unroll)
    states = states[1:-1], jax.tree.map(lambda a: a[0], states[-1])
    # JAX may drop the rule below (`_derivative.py`).
    return with_derivative_of(partial(_windows, step, plan), (end, ys), states, *args), states


def _emitting(f: Step, s: Any, xs: Any, parts: list[tuple[int, int]], unroll: int) -> tuple[Any, list[Any]]:
    """((s, ys), the state at the beginning of every part): parts are `count` pieces of `size` steps each."""
    at, found, outputs = 0, [], []
    for count, size in parts:
        if not size:
            found.append(jax.tree.map(lambda a: a[None], s))
            continue

        def piece(s: Any, x: Any, size: int = size) -> tuple[Any, Any]:
            end, ys = lax.scan(f, s, x, size, unroll=unroll)
            return end, (s, ys)

        s, (states, ys) = lax.scan(piece, s, _slice_steps(xs, at, count, size), count)
        found.append(states)
        outputs.append(_merge_windows(ys))
        at += count * size
    return (s, _concatenate(outputs)), found


@partial(_forward.defjvp, symbolic_zeros=True)
def _forward_jvp(step: _Step, plan: _Plan, primals: Any, tangents: Any) -> Any:
    """Values of the scan, derivatives of the windows. What does not move is not differentiated by."""
    out, states = _forward(step, plan, *primals)
    leaves, structure = jax.tree.flatten(primals)
    moves = jax.tree.leaves(tangents, is_leaf=lambda a: isinstance(a, SymbolicZero))
    moving = [n for n, move in enumerate(moves) if not isinstance(move, SymbolicZero)]

    def windows(*moved: Any) -> Any:
        known = list(leaves)
        for n, leaf in zip(moving, moved, strict=True):
            known[n] = leaf
        return _windows(step, plan, lax.stop_gradient(states), *jax.tree.unflatten(structure, known))

    _, moved = jax.jvp(windows, [leaves[n] for n in moving], [moves[n] for n in moving])
    still = jax.tree.map(lambda a: SymbolicZero(jax.typeof(a).to_tangent_aval()), states)
    return (out, states), (moved, still)


def _windows(step: _Step, plan: _Plan, states: Any, consts: list[Any], init: Any, xs: Any) -> tuple[Any, Any]:
    """(s_T, ys) again, from states that are known."""
    f, k1, before = partial(step, consts), plan.k1, plan.before
    s, outputs, at = init, [], plan.head
    if plan.head:
        s, ys = _scan_in_segments(f, init, _scan_piece(xs, 0, plan.head), plan.head, plan)
        outputs.append(ys)

    def window(s: Any, x: Any) -> tuple[Any, Any]:
        s, ys = _scan_in_segments(f, s, x, before + k1, plan)
        return s, jax.tree.map(lambda a: a[before:], ys)

    def group(size: int, s: Any, x: Any) -> tuple[Any, Any]:
        """Windows side by side, x their size k1 steps and those before them; the states between are made again."""
        starts = jax.tree.map(lambda a: a[None], s)
        if size > 1:
            known = _scan_piece(lax.stop_gradient(x), 0, (size - 1) * k1)
            blind = lambda s, x: lax.stop_gradient(f(s, x))  # noqa: E731
            (last, _), (between,) = _emitting(blind, lax.stop_gradient(s), known, [(size - 1, k1)], plan.unroll)
            starts = _concatenate(
                [starts, jax.tree.map(lambda a: a[1:], between), jax.tree.map(lambda a: a[None], last)]
            )
        ends, ys = jax.vmap(window)(starts, _slice_steps(x, 0, size, k1, before))
        return jax.tree.map(lambda a: a[-1], ends), _merge_windows(ys)

    for (count, size), starts in zip(plan.groups, states[0], strict=True):
        if not plan.head and at == 0:  # the first window has the gradient of init
            starts = jax.tree.map(lambda a, s: jnp.concatenate([a[None], s[1:]]), init, starts)  # noqa: PLW2901
        if plan.segment is None:
            ends, ys = jax.vmap(window)(starts, _slice_steps(xs, at - before, count * size, k1, before))
        else:
            again = jax.checkpoint(partial(group, size), prevent_cse=False)
            ends, ys = lax.map(lambda a: again(*a), (starts, _slice_steps(xs, at - before, count, size * k1, before)))  # noqa: B023
        s = jax.tree.map(lambda a: a[-1], ends)
        outputs.append(_merge_windows(ys))
        at += count * size * k1
    if plan.tail:
        s, ys = _scan_in_segments(
            f, states[1], _scan_piece(xs, at - before, before + plan.tail), before + plan.tail, plan
        )
        outputs.append(jax.tree.map(lambda a: a[before:], ys))
    return s, _concatenate(outputs)


# --- Pieces of time, the first axis of every leaf ---


def _scan_piece(xs: Any, at: int, size: int) -> Any:
    return jax.tree.map(lambda a: lax.slice_in_dim(a, at, at + size), xs)


def _slice_steps(xs: Any, at: int, count: int, size: int, before: int = 0) -> Any:
    """(count, before + size, ...): pieces of `size` steps one after the other, each with those before it, from `at`."""

    def cut(a: jax.Array) -> jax.Array:
        if not before:
            return lax.slice_in_dim(a, at, at + count * size).reshape(count, size, *a.shape[1:])
        return a[at + size * jnp.arange(count)[:, None] + jnp.arange(before + size)[None]]

    return jax.tree.map(cut, xs)


def _merge_windows(pieces: Any) -> Any:
    """(count, size, ...) to (count size, ...)."""
    return jax.tree.map(lambda a: a.reshape(a.shape[0] * a.shape[1], *a.shape[2:]), pieces)


def _concatenate(parts: list[Any]) -> Any:
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *a: jnp.concatenate(a), *parts)
