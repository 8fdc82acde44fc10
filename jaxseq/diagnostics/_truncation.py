r"""How far a truncated gradient is from the full one, window by window.

g_k is the gradient in which the state's cotangent is zero at t = k, 2k, ...; g, that of k >= T. For many k at once the
boundary is a number, not a structure of the program, and no value hangs on it: they share one forward sweep and what it
keeps, and go back side by side,

    gate(s, open) = s,      s̄ = open · s̄_after,      open_t = 0 where t is a multiple of k, else 1
"""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PyTree

from jaxseq import _checks, _precision
from jaxseq.diagnostics._step import euclidean, steps_of

DOUBLE = 2  # from window to window where none are named


class TruncationBias(NamedTuple):
    r"""What windows of several lengths lose.

    Attributes:
        windows: `(W,)`, k.
        relative_error: `(W,)`, $\lVert g_k - g \rVert / \lVert g \rVert$ over all parameters.
        cosine: `(W,)`, of the angle between $g_k$ and g.
    """

    windows: Int[Array, " W"]
    relative_error: Float[Array, " W"]
    cosine: Float[Array, " W"]


def truncation_bias(
    f: Callable[[Any, Any, Any], tuple[Any, Any]],
    params: PyTree[ArrayLike],
    init: PyTree[ArrayLike],
    xs: PyTree[ArrayLike] | None,
    loss: Callable[[Any, Any], Float[Array, ""]],
    *,
    windows: Sequence[int] | None = None,
    length: int | None = None,
) -> TruncationBias:
    r"""How far the gradient to the parameters is off when it is truncated every k steps, for many k at once.

    $$\frac{\lVert g_k - g \rVert}{\lVert g \rVert}, \qquad
      \cos = \frac{\langle g_k, g \rangle}{\lVert g_k \rVert \lVert g \rVert}$$

    Boundaries are at t = k, 2k, ... from the first step of xs, so that an error also says where they happen to fall: a
    loss on the last step alone sees the last of them only.

    Args:
        f: `(params, carry, x) -> (carry, y)`: a cell, for instance `jaxseq.gru_cell`, or any step with its parameters.
        params: any pytree of floats.
        init: the first carry; None is zeros, for a step that takes none.
        xs: what is read, `(T, ...)` leaves; None with `length`.
        loss: `(carry, ys) -> L`, a number made of what the scan of f returns.
        windows: which k; None is 1, 2, 4, ... and T.
        length: T, where there are no xs.

    Returns:
        `TruncationBias(windows, relative_error, cosine)`.

    Raises:
        TypeError: as `jax.lax.scan` does, of f, init and xs; a window that is no integer.
        ValueError: a window that is below one or longer than the series; no windows.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxseq import diagnostics
        >>> f = lambda a, s, x: (a * s + x, s)
        >>> bias = flow.truncation_bias(f, 0.5, 0.0, jnp.ones(64), lambda s, ys: s)
        >>> [round(float(e), 3) for e in bias.relative_error[:3]]
        [0.5, 0.25, 0.062]

    Reference:
        C. Tallec and Y. Ollivier, Unbiasing truncated backpropagation through time (2017).
    """
    init, steps = steps_of(lambda s, x: f(params, s, x), init, xs, length)
    if windows is None:
        powers = (DOUBLE**n for n in range(max(1, steps).bit_length()))
        asked = [*(k for k in powers if k < steps), max(1, steps)]
    else:
        asked = [_checks.integer("windows", k, at_least=1) for k in windows]
        if not asked:
            _checks.bad_value("windows", "at least one", "none")
        if max(asked) > max(1, steps):
            _checks.bad_value("windows", f"windows no longer than the series, {steps} steps", str(max(asked)))

    def gradient(k: Any) -> Any:
        def of(params: Any) -> jax.Array:
            def step(s: Any, at: Any) -> tuple[Any, Any]:
                t, x = at
                return f(params, _gate(s, (t == 0) | (t % k != 0)), x)

            return loss(*lax.scan(step, init, (jnp.arange(steps), xs), steps))

        return jax.grad(of)(params)

    found = jax.vmap(gradient)(jnp.asarray([*asked, max(1, steps)], int))
    cut, full = (jax.tree.map(part, found) for part in (lambda a: a[:-1], lambda a: a[-1]))

    size = euclidean(jax.tree.leaves(full))

    def compared(g_k: Any) -> tuple[jax.Array, jax.Array]:
        own, off = (euclidean(jax.tree.leaves(g)) for g in (g_k, jax.tree.map(jnp.subtract, g_k, full)))
        dtype = _precision.accumulator(size.dtype)
        unit = lambda g, n: [a.astype(dtype) / n.astype(dtype) for a in jax.tree.leaves(g)]  # noqa: E731
        pairs = zip(unit(g_k, own), unit(full, size), strict=True)
        return off / size, reduce(jnp.add, [jnp.sum(a * b) for a, b in pairs]).astype(size.dtype)

    return TruncationBias(jnp.asarray(asked, int), *jax.vmap(compared)(cut))


def suggest_truncation(bias: TruncationBias, tolerance: float | int = 0.1) -> int:
    """The shortest window from which on no measured one has a relative error above `tolerance`.

    Args:
        bias: what `truncation_bias` has found, not traced.
        tolerance: of the relative error, above 0.

    Returns:
        k, for `truncation=k`.

    Raises:
        TypeError: a `bias` of another kind.
        ValueError: a tolerance that is not above 0, or none of the windows that holds it.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxseq import diagnostics
        >>> f = lambda a, s, x: (a * s + x, s)
        >>> bias = flow.truncation_bias(f, 0.5, 0.0, jnp.ones(64), lambda s, ys: s)
        >>> flow.suggest_truncation(bias, tolerance=0.1)
        4

    Reference:
        C. Tallec and Y. Ollivier, Unbiasing truncated backpropagation through time (2017).
    """
    bias = _checks.container("bias", bias, TruncationBias)
    if not tolerance > 0:
        _checks.bad_value("tolerance", "a number above 0", _checks.describe(tolerance))
    k, error, first = within(bias, tolerance)
    if first == k.size:
        expected = f"above {error[-1]:.2g}, the error of the longest window measured, {k[-1]}"
        _checks.bad_value("tolerance", expected, _checks.describe(tolerance))
    return int(k[first])


def within(bias: TruncationBias, tolerance: float | int) -> tuple[np.ndarray, np.ndarray, int]:
    """(windows, the shortest first; their errors; the place from which on no error is above the tolerance, or NaN)."""
    k, error = np.asarray(bias.windows), np.asarray(bias.relative_error, float)
    order = np.argsort(k, kind="stable")
    bad = np.flatnonzero(~(error[order] <= tolerance))
    return k[order], error[order], int(bad[-1]) + 1 if bad.size else 0


@jax.custom_vjp
def _gate(s: Any, is_open: jax.Array) -> Any:
    return s


def _gate_fwd(s: Any, is_open: jax.Array) -> Any:
    return s, is_open


def _gate_bwd(is_open: jax.Array, s_bar: Any) -> Any:
    return jax.tree.map(lambda a: a if a.dtype == jax.dtypes.float0 else jnp.where(is_open, a, 0), s_bar), None


_gate.defvjp(_gate_fwd, _gate_bwd)
