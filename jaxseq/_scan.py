r"""`lax.scan` with truncation and checkpointing, for any step function.

The recurrence and its gradient, for any step function f:

    s_t, y_t = f(s_{t-1}, x_t)                      t = 1 .. T
    s̄_{t-1}  = (∂s_t/∂s_{t-1})ᵀ s̄_t + (∂y_t/∂s_{t-1})ᵀ ȳ_t

Truncation sets s̄_t = 0 at the boundaries t = k, 2k, ... between windows. The windows then depend on each other only
through the values of the states s*_w at their starts, which the forward pass has computed, and

    ys, s_T  =  windows(s*_0, ..., s*_{W-1}; x),    W = T / k windows, each a scan of k steps from a constant

has the truncated gradient. Windows do not wait for each other, so this is a single scan of k steps over W states at a
time: `_windows`. Its values are already known, so it is only differentiated. JAX differentiates it, in forward or
reverse mode and to any order: values come from the plain scan, derivatives from the windows.

For (k1, k2), each window starts `before` = k2 - k1 steps earlier, and the outputs of these steps are discarded. All
windows that reach back to t = 0 or further form one full scan, the head. The remainder of T, less than a window, is the
tail.

    | head, E steps from init       | windows of k1 steps, each from its own s*    | tail |

This runs the step function over the sequence once more, which is faster than a scan with `stop_gradient` for small
states only. Larger states on CPU use that scan: `ScanTuning`. Measurements: `docs/measured-recurrence.md`.

With `checkpoint=n`, windows run in parallel in groups of n steps, and a window of more than n steps runs in segments of
n steps. Only the initial state of each group and segment is stored.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import eval_jaxpr
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree

from jaxseq import _checks, _sizes, tuning
from jaxseq._derivative import with_derivative_of
from jaxseq._op import op
from jaxseq._windows import ScanPlan, equal_length, scan_plan
from jaxseq.tuning import ScanTuning

Step = Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]


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
    r"""`jax.lax.scan` with truncated backpropagation and checkpointing, for any step function.

    $$s_t, y_t = f(s_{t-1}, x_t), \qquad
      \bar s_{t-1} = \Bigl(\frac{\partial s_t}{\partial s_{t-1}}\Bigr)^{\!\top} \bar s_t
                   + \Bigl(\frac{\partial y_t}{\partial s_{t-1}}\Bigr)^{\!\top} \bar y_t$$

    `f` is any function that `lax.scan` takes: a cell of Flax, Equinox or Haiku, or a simulator, for example. It may
    close over arrays that are differentiated. Without `truncation` and `checkpoint` this is `lax.scan`.

    With `truncation=k`, the gradient of the carry is cut at t = k, 2k, ... in processing order. Values are those of
    `lax.scan`, and are computed by it. Derivatives are computed from windows of k steps in parallel, with `f` under
    `jax.vmap`, so that the backward pass takes k sequential steps instead of T. Large states on a CPU are faster one
    window at a time, and run so. All derivatives, forward mode included, are truncated.

    Args:
        f: the step function, `(carry, x) -> (carry, y)`.
        init: the initial carry, a pytree.
        xs: the inputs, a pytree of arrays `(T, ...)`, or None if `length` is passed.
        length: T, required if `xs` is None.
        reverse: if True, process the steps from the last to the first.
        unroll: as in `lax.scan`.
        truncation: truncated backpropagation through time. With an integer k, the gradient of the carry is cut every k
            steps. With a pair (k1, k2), the loss in each window of k1 steps is backpropagated through k2 steps. The
            last window may be shorter.
        checkpoint: store the carry only every `checkpoint` steps for the backward pass, and recompute the rest.
            `"auto"` is about sqrt(T); the residual memory, besides xs and ys, is then proportional to it. With
            `truncation`, only about `checkpoint` steps of windows run in parallel.

    Returns:
        `(carry, ys)`, as `lax.scan` returns them.

    Raises:
        TypeError: as in `lax.scan`, for example if `f` changes the structure or a dtype of the carry.
        ValueError: as in `lax.scan`, and if `truncation` or `checkpoint` is less than one, or k2 < k1.

    Example:
        >>> import jax, jax.numpy as jnp, jaxseq
        >>> def loss(a, xs):
        ...     step = lambda s, x: (jnp.tanh(a * s + x), s)
        ...     return jaxseq.scan(step, 0.0, xs, truncation=10)[1].sum()
        >>> jax.grad(loss)(0.9, jnp.linspace(-1.0, 1.0, 1000)).shape
        ()

    Reference:
        R. J. Williams and J. Peng, An efficient gradient-based algorithm for on-line training of recurrent network
        trajectories (1990), section 4, for (k1, k2). T. Chen et al., Training deep nets with sublinear memory cost
        (2016), for checkpointing.
    """
    window, every = _checks.truncation(truncation), _checks.checkpoint(checkpoint)
    whole = partial(lax.scan, f, length=length, reverse=reverse, unroll=unroll)
    if window is None and every is None:
        return whole(init, xs)
    init, steps = as_pytree_function(whole, init, xs, length)
    unrolled = max(1, steps) if unroll is True else max(1, int(unroll))

    flip = (lambda a: jnp.flip(a, 0)) if reverse else jnp.asarray
    xs = jax.tree.map(flip, xs)
    plan, numbers = scan_plan(steps, window, every, unrolled), tuning.for_backend().scan
    if plan.head == steps:
        end, ys = _scan_in_segments(f, init, xs, steps, plan)
    elif not plan.before and every is None and (not _sizes.is_concrete(steps) or _is_large(numbers, init)):
        end, ys = _scan_with_cuts(f, init, xs, plan)
    else:
        # Arrays that f closes over become arguments: a custom rule is differentiated with respect to arguments only.
        at = init, jax.tree.map(lambda a: a[0], xs)
        closed, shapes = jax.make_jaxpr(f, return_shape=True)(*at)
        # Traced twice: a jaxpr may contain closed-over arrays (jax 0.12), but `step` is static and must not.
        call = lambda closed_over, *leaves: eval_jaxpr(closed.jaxpr, closed_over, *leaves)  # noqa: E731
        program = jax.make_jaxpr(call)(closed.consts, *jax.tree.leaves(at))
        step = _Step(program.jaxpr, jax.tree.structure(shapes))
        (end, ys), _ = _forward(step, plan, [*program.consts, *closed.consts], init, xs)
    return end, jax.tree.map(flip, ys)


def as_pytree_function(
    scan: Callable[[PyTree, PyTree], PyTree], init: PyTree, xs: PyTree, length: int | None
) -> tuple[PyTree, int]:
    """Return (init with the dtypes of the carry of `scan`, T). `lax` raises the errors about f, init and xs."""
    carry, ys = jax.eval_shape(scan, init, xs)
    init = jax.tree.map(lambda a, like: lax.convert_element_type(a, like.dtype), init, carry)
    steps = next((leaf.shape[0] for leaf in jax.tree.leaves((xs, ys))), length)
    assert steps is not None
    return init, steps


class _Step(NamedTuple):
    """The step function as a jaxpr whose inputs include the arrays that it closed over, and the structure of its
    result.
    """

    program: Any  # a jaxpr, whose type is in `jax.extend`, which is slow to import
    result: PyTree

    def __call__(self, consts: list[PyTree], s: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
        count = len(self.program.constvars)
        leaves = eval_jaxpr(self.program, consts[:count], *consts[count:], *jax.tree.leaves((s, x)))
        return jax.tree.unflatten(self.result, leaves)


def _scan_in_segments(f: Step, s: PyTree, xs: PyTree, steps: int, plan: ScanPlan) -> tuple[PyTree, PyTree]:
    """Scan; if `plan.segment` is set, in segments of about equal length that are recomputed in the backward pass."""
    run = partial(lax.scan, f, unroll=plan.unroll)
    if plan.segment is None or plan.segment >= steps:
        return run(s, xs, steps)
    size = equal_length(steps, plan.segment)
    count, rest = divmod(steps, size)
    # Inside a scan, no barrier against common subexpression elimination is needed.
    recomputed = partial(jax.checkpoint, prevent_cse=False)
    s, ys = lax.scan(recomputed(lambda s, x: run(s, x, size)), s, _slice_steps(xs, 0, count, size), count)
    ys = _merge_windows(ys)
    if rest:
        s, more = recomputed(lambda s, x: run(s, x, rest))(s, _scan_piece(xs, count * size, rest))
        ys = _concatenate([ys, more])
    return s, ys


def _is_large(tuning: ScanTuning, s: PyTree) -> bool:
    """Return whether windows of this state run faster one at a time."""
    elements = sum(a.size for a in jax.tree.leaves(s) if jnp.issubdtype(a.dtype, jnp.inexact))
    return tuning.parallel_state is not None and _sizes.is_concrete(elements) and elements > tuning.parallel_state


def _scan_with_cuts(f: Step, s: PyTree, xs: PyTree, plan: ScanPlan) -> tuple[PyTree, PyTree]:
    """Scan over the steps one window at a time, with the gradient cut between windows."""

    def step(s: PyTree, at: PyTree) -> tuple[PyTree, PyTree]:
        t, x = at
        cut = (t > 0) & (t % plan.k1 == 0)
        detach = lambda a: jnp.where(cut, lax.stop_gradient(a), a) if jnp.issubdtype(a.dtype, jnp.inexact) else a  # noqa: E731
        return f(jax.tree.map(detach, s), x)

    return lax.scan(step, s, (jnp.arange(plan.steps), xs), unroll=plan.unroll)


# --- Values, and the states at the starts of windows ---


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _forward(step: _Step, plan: ScanPlan, consts: list[PyTree], init: PyTree, xs: PyTree) -> PyTree:
    """Return ((s_T, ys), starts).

    `starts` has two parts. For each entry of `plan.groups`, the states (count, ...) at the starts of its groups, or of
    its windows if all windows run in parallel. Then the state at the start of the tail.
    """
    args = consts, init, xs
    consts, init, xs = lax.stop_gradient(args)
    f, k1 = partial(step, consts), plan.k1
    first = plan.head - plan.before if plan.head else 0
    parts = [(1, first)]
    parts += [(count * size, k1) if plan.segment is None else (count, size * k1) for count, size in plan.groups]
    done = sum(count * size for count, size in parts)
    (end, ys), states = _scan_with_starts(f, init, xs, [*parts, (1, plan.steps - done)], plan.unroll)
    states = states[1:-1], jax.tree.map(lambda a: a[0], states[-1])
    # JAX may drop the rule `_forward_jvp` (see `_derivative.py`), so the values have the same derivative.
    return with_derivative_of(partial(_windows, step, plan), (end, ys), states, *args), states


def _scan_with_starts(
    f: Step, s: PyTree, xs: PyTree, parts: list[tuple[int, int]], unroll: int
) -> tuple[PyTree, list[PyTree]]:
    """Return ((s, ys), states at the starts of the parts). A part (count, size) is `count` pieces of `size` steps."""
    at, found, outputs = 0, [], []
    for count, size in parts:
        if not size:
            found.append(jax.tree.map(lambda a: a[None], s))
            continue

        def piece(s: PyTree, x: PyTree, size: int = size) -> tuple[PyTree, PyTree]:
            end, ys = lax.scan(f, s, x, size, unroll=unroll)
            return end, (s, ys)

        s, (states, ys) = lax.scan(piece, s, _slice_steps(xs, at, count, size), count)
        found.append(states)
        outputs.append(_merge_windows(ys))
        at += count * size
    return (s, _concatenate(outputs)), found


@partial(_forward.defjvp, symbolic_zeros=True)
def _forward_jvp(step: _Step, plan: ScanPlan, primals: PyTree, tangents: PyTree) -> PyTree:
    """Take values from the scan and derivatives from the windows; arguments with zero tangents are constants."""
    out, states = _forward(step, plan, *primals)
    leaves, structure = jax.tree.flatten(primals)
    directions = jax.tree.leaves(tangents, is_leaf=lambda a: isinstance(a, SymbolicZero))
    moving = [n for n, direction in enumerate(directions) if not isinstance(direction, SymbolicZero)]

    def windows(*moved: PyTree) -> PyTree:
        known = list(leaves)
        for n, leaf in zip(moving, moved, strict=True):
            known[n] = leaf
        return _windows(step, plan, lax.stop_gradient(states), *jax.tree.unflatten(structure, known))

    _, moved = jax.jvp(windows, [leaves[n] for n in moving], [directions[n] for n in moving])
    still = jax.tree.map(lambda a: SymbolicZero(jax.typeof(a).to_tangent_aval()), states)
    return (out, states), (moved, still)


def _windows(
    step: _Step, plan: ScanPlan, states: PyTree, consts: list[PyTree], init: PyTree, xs: PyTree
) -> tuple[PyTree, PyTree]:
    """Compute (s_T, ys) again, from the known states at the starts of windows."""
    f, k1, before = partial(step, consts), plan.k1, plan.before
    s, outputs, at = init, [], plan.head
    if plan.head:
        s, ys = _scan_in_segments(f, init, _scan_piece(xs, 0, plan.head), plan.head, plan)
        outputs.append(ys)

    def window(s: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
        s, ys = _scan_in_segments(f, s, x, before + k1, plan)
        return s, jax.tree.map(lambda a: a[before:], ys)

    def group(size: int, s: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
        """Run `size` windows in parallel.

        `x` is their size k1 steps and the `before` steps ahead of them. The states between windows are recomputed.
        """
        starts = jax.tree.map(lambda a: a[None], s)
        if size > 1:
            known = _scan_piece(lax.stop_gradient(x), 0, (size - 1) * k1)
            detached = lambda s, x: lax.stop_gradient(f(s, x))  # noqa: E731
            (last, _), (between,) = _scan_with_starts(
                detached, lax.stop_gradient(s), known, [(size - 1, k1)], plan.unroll
            )
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


# --- Slices of time, the first axis of every leaf ---


def _scan_piece(xs: PyTree, at: int, size: int) -> PyTree:
    return jax.tree.map(lambda a: lax.slice_in_dim(a, at, at + size), xs)


def _slice_steps(xs: PyTree, at: int, count: int, size: int, before: int = 0) -> PyTree:
    """Slice `xs` from `at` into (count, before + size, ...), each piece with the `before` steps ahead of it."""

    def cut(a: jax.Array) -> jax.Array:
        if not before:
            return lax.slice_in_dim(a, at, at + count * size).reshape(count, size, *a.shape[1:])
        return a[at + size * jnp.arange(count)[:, None] + jnp.arange(before + size)[None]]

    return jax.tree.map(cut, xs)


def _merge_windows(pieces: PyTree) -> PyTree:
    """Reshape (count, size, ...) to (count size, ...)."""
    return jax.tree.map(lambda a: a.reshape(a.shape[0] * a.shape[1], *a.shape[2:]), pieces)


def _concatenate(parts: list[PyTree]) -> PyTree:
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *a: jnp.concatenate(a), *parts)
