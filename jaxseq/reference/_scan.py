"""Reference implementation of `scan`: `lax.scan` with `stop_gradient` on the carry."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree


def scan(
    f: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
    init: PyTree[ArrayLike],
    xs: PyTree[ArrayLike] | None = None,
    length: int | None = None,
    reverse: bool = False,
    unroll: int | bool = 1,
    *,
    truncation: int | tuple[int, int] | None = None,
    checkpoint: int | str | None = None,  # ignored: affects residuals, not results
) -> tuple[PyTree[Array], PyTree[Array]]:
    """Reference implementation of `jaxseq.scan`."""
    scan_steps = partial(lax.scan, reverse=reverse, unroll=unroll)
    if truncation is None:
        return scan_steps(f, init, xs, length)
    k1, k2 = truncation if isinstance(truncation, tuple | list) else (truncation, truncation)
    T = next((leaf.shape[0] for leaf in jax.tree.leaves(xs)), length)
    assert isinstance(T, int)
    j = jnp.arange(T)[::-1] if reverse else jnp.arange(T)  # the position of each step in processing order
    if k1 == k2:

        def step(s: PyTree, at: PyTree) -> PyTree:
            j, x = at
            cut = (j > 0) & (j % k1 == 0)
            return f(jax.tree.map(lambda a: jnp.where(cut, lax.stop_gradient(a), a), s), x)

        return scan_steps(step, init, (j, xs))

    def steps_between(lo: int, hi: int) -> PyTree:
        """Return xs at the positions lo .. hi - 1 in processing order."""
        return jax.tree.map(lambda a: a[T - hi : T - lo] if reverse else a[lo:hi], xs)

    # Process each window again from k2 - k1 steps before its start, with the state there as a constant.
    end, parts = init, []
    for window in range(0, T, k1):
        first, stop = max(0, window - (k2 - k1)), min(window + k1, T)
        s = lax.stop_gradient(scan_steps(f, init, steps_between(0, first), first)[0]) if first else init
        end, ys = scan_steps(f, s, steps_between(first, stop), stop - first)
        in_window = slice(stop - window) if reverse else slice(window - first, None)
        parts.append(jax.tree.map(lambda a, at=in_window: a[at], ys))
    parts = parts[::-1] if reverse else parts
    return end, jax.tree.map(lambda *a: jnp.concatenate(a), *parts) if parts else scan_steps(f, init, xs, length)[1]
