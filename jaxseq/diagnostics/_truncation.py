r"""The error of truncated gradients, as a function of the window.

g_k is the gradient computed with the cotangent of the state set to zero at t = k, 2k, ...; g is the full gradient, with
k >= T. The window is an array argument of the program, and values do not depend on it. So all windows share one forward
pass and its residuals, and their backward passes run in parallel:

    gate(s, open) = s,      s̄ = open · s̄_after,      open_t = 0 where t is a positive multiple of k, else 1
"""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from jaxseq import _checks, _precision
from jaxseq._types import AnyArray, TruncationBias
from jaxseq.diagnostics._step import euclidean, steps_of

Tree = TypeVar("Tree")

GROWTH = 2  # the ratio of successive default windows


def truncation_bias(
    f: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]],
    params: PyTree[ArrayLike],
    init: PyTree[ArrayLike],
    xs: PyTree[ArrayLike] | None,
    loss: Callable[[PyTree, PyTree], Float[Array, ""]],
    *,
    windows: Sequence[int] | None = None,
    length: int | None = None,
) -> TruncationBias:
    r"""Return the error of the gradient of the parameters when it is truncated every k steps, for several k.

    $$\frac{\lVert g_k - g \rVert}{\lVert g \rVert}, \qquad
      \cos = \frac{\langle g_k, g \rangle}{\lVert g_k \rVert \lVert g \rVert}$$

    Boundaries are at t = k, 2k, ... from the first step of `xs`. The error depends on these positions: for a loss
    on the last step, only the last boundary matters.

    Args:
        f: `(params, carry, x) -> (carry, y)`, a cell such as `jaxseq.gru_cell`, or any step function with parameters.
        params: the parameters, any pytree of floats.
        init: the initial carry. None is zeros, for a step that accepts None.
        xs: the inputs, a pytree of leaves `(T, ...)`, or None with `length`.
        loss: `(carry, ys) -> L`, a scalar function of the results of the scan.
        windows: the windows k. None is 1, 2, 4, ... and T.
        length: T, if `xs` is None.

    Returns:
        `TruncationBias(windows, relative_error, cosine)`.

    Raises:
        TypeError: if `jax.lax.scan` raises it for `f`, `init` and `xs`, or a window is not an integer.
        ValueError: if a window is less than 1 or more than T, or `windows` is empty.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxseq import diagnostics
        >>> f = lambda a, s, x: (a * s + x, s)
        >>> bias = diagnostics.truncation_bias(f, 0.5, 0.0, jnp.ones(64), lambda s, ys: s)
        >>> [round(float(e), 3) for e in bias.relative_error[:3]]
        [0.5, 0.25, 0.062]

    Reference:
        C. Tallec and Y. Ollivier, Unbiasing truncated backpropagation through time (2017).
    """
    init, steps = steps_of(lambda s, x: f(params, s, x), init, xs, length)
    if windows is None:
        powers = (GROWTH**n for n in range(max(1, steps).bit_length()))
        asked = [*(k for k in powers if k < steps), max(1, steps)]
    else:
        asked = [_checks.integer("windows", k, at_least=1) for k in windows]
        if not asked:
            _checks.bad_value("windows", "at least one", "none")
        if max(asked) > max(1, steps):
            _checks.bad_value("windows", f"windows of at most {steps}, the number of steps", str(max(asked)))

    def gradient(k: jax.Array) -> PyTree[Array]:
        def of(params: PyTree[ArrayLike]) -> jax.Array:
            def step(s: PyTree[Array], at: tuple[jax.Array, PyTree]) -> tuple[PyTree, PyTree]:
                t, x = at
                return f(params, _gate(s, (t == 0) | (t % k != 0)), x)

            return loss(*lax.scan(step, init, (jnp.arange(steps), xs), steps))

        return jax.grad(of)(params)

    found = jax.vmap(gradient)(jnp.asarray([*asked, max(1, steps)], int))
    cut, full = (jax.tree.map(part, found) for part in (lambda a: a[:-1], lambda a: a[-1]))

    size = euclidean(jax.tree.leaves(full))

    def compared(g_k: PyTree[Array]) -> tuple[jax.Array, jax.Array]:
        size_k, error = (euclidean(jax.tree.leaves(g)) for g in (g_k, jax.tree.map(jnp.subtract, g_k, full)))
        dtype = _precision.accumulator(size.dtype)
        unit = lambda g, n: [a.astype(dtype) / n.astype(dtype) for a in jax.tree.leaves(g)]  # noqa: E731
        pairs = zip(unit(g_k, size_k), unit(full, size), strict=True)
        return error / size, reduce(jnp.add, [jnp.sum(a * b) for a, b in pairs]).astype(size.dtype)

    return TruncationBias(jnp.asarray(asked, int), *jax.vmap(compared)(cut))


def suggest_truncation(bias: TruncationBias, tolerance: float | int = 0.1) -> int:
    """Return the shortest window for which the relative error, and that of all longer windows, is at most `tolerance`.

    Args:
        bias: the result of `truncation_bias`, not traced.
        tolerance: the largest relative error, > 0.

    Returns:
        k, for `truncation=k`.

    Raises:
        TypeError: if `bias` is not a `TruncationBias`.
        ValueError: if `tolerance` is not > 0, or the longest window exceeds it.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxseq import diagnostics
        >>> f = lambda a, s, x: (a * s + x, s)
        >>> bias = diagnostics.truncation_bias(f, 0.5, 0.0, jnp.ones(64), lambda s, ys: s)
        >>> diagnostics.suggest_truncation(bias, tolerance=0.1)
        4

    Reference:
        C. Tallec and Y. Ollivier, Unbiasing truncated backpropagation through time (2017).
    """
    bias = _checks.container("bias", bias, TruncationBias)
    if not tolerance > 0:
        _checks.bad_value("tolerance", "a number > 0", _checks.describe(tolerance))
    k, error, first = within(bias, tolerance)
    if first == k.size:
        expected = f"more than {error[-1]:.2g}, the error of the longest window, {k[-1]}"
        _checks.bad_value("tolerance", expected, _checks.describe(tolerance))
    return int(k[first])


def within(bias: TruncationBias, tolerance: float | int) -> tuple[np.ndarray, np.ndarray, int]:
    """Return the windows in ascending order, their errors, and the first index from which on all errors are at most
    `tolerance`. A NaN error counts as too large.
    """
    k, error = np.asarray(bias.windows), np.asarray(bias.relative_error, float)
    order = np.argsort(k, kind="stable")
    bad = np.flatnonzero(~(error[order] <= tolerance))
    return k[order], error[order], int(bad[-1]) + 1 if bad.size else 0


@jax.custom_vjp
def _gate(s: Tree, is_open: jax.Array) -> Tree:
    return s


def _gate_fwd(s: Tree, is_open: jax.Array) -> tuple[Tree, jax.Array]:
    return s, is_open


def _gate_bwd(is_open: jax.Array, s_bar: PyTree[AnyArray]) -> tuple[PyTree[AnyArray], None]:
    return jax.tree.map(lambda a: a if a.dtype == jax.dtypes.float0 else jnp.where(is_open, a, 0), s_bar), None


_gate.defvjp(_gate_fwd, _gate_bwd)
