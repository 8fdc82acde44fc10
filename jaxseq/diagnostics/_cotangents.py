r"""∂L/∂s_t for all t, in one backward sweep.

A zero e_t is added to the state after every step, s_t + e_t. What L says to e_t is all that L says to s_t by what reads
it later; and reverse mode finds it for all t on its one way back:

    s_t = f(s_{t-1} + e_{t-1}, x_t)          ∂L/∂e_t = ∂L/∂s_t
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from jaxseq import _checks
from jaxseq._types import AnyArray
from jaxseq.diagnostics._step import Step, euclidean, is_float_leaf, steps_of


def state_cotangents(
    f: Step,
    init: PyTree[ArrayLike],
    xs: PyTree[ArrayLike] | None,
    loss: Callable[[Any, Any], Float[Array, ""]],
    *,
    length: int | None = None,
) -> PyTree[Array]:
    r"""The gradient of a loss to the state at every step, $\partial L / \partial s_t$ for $t = 0 \dots T$.

    One forward and one backward sweep, whatever T. Where it is small, the loss does not reach: nothing that happened
    before can be learnt from it. The cotangent at t is all that steps after t, and the carry that is returned, say of
    $s_t$; what the output $y_t$ says of step t itself is in that at t - 1.

    Args:
        f: `(carry, x) -> (carry, y)`, any step function.
        init: the first carry, any pytree; None is zeros, for a step that takes none.
        xs: what is read, `(T, ...)` leaves; None with `length`.
        loss: `(carry, ys) -> L`, a number made of what the scan of f returns.
        length: T, where there are no xs.

    Returns:
        of each float leaf of the carry, `(T + 1, ...)`: t = 0 is `init`, T the carry that is returned. In the place of
        other leaves, a counter or a key, stands None.

    Raises:
        TypeError: as `jax.lax.scan` does, of f, init and xs; a loss that is no real number.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxseq import diagnostics
        >>> step = lambda s, x: (0.5 * s + x, s)
        >>> flow.state_cotangents(step, 0.0, jnp.ones(3), lambda s, ys: s).tolist()
        [0.125, 0.25, 0.5, 1.0]

    Reference:
        S. Hochreiter, Untersuchungen zu dynamischen neuronalen Netzen (1991); Y. Bengio, P. Simard and P. Frasconi,
        Learning long-term dependencies with gradient descent is difficult (1994).
    """
    init, steps = steps_of(f, init, xs, length)
    leaves, structure = jax.tree.flatten(init)
    floats = [is_float_leaf(leaf) for leaf in leaves]

    def moved(s: Any, e: list[Any]) -> Any:
        pairs = zip(structure.flatten_up_to(s), e, strict=True)
        return structure.unflatten([a if e is None else a + e for a, e in pairs])

    def loss_of(e: list[Any]) -> jax.Array:
        def step(s: Any, at: Any) -> tuple[Any, Any]:
            x, e = at
            s, y = f(s, x)
            return moved(s, e), y

        first, after = ([None if a is None else a[part] for a in e] for part in (0, slice(1, None)))
        L = loss(*lax.scan(step, moved(init, first), (xs, after), steps))
        if jnp.shape(L) != () or not jnp.issubdtype(jnp.result_type(L), jnp.floating):
            _checks.bad_type("loss", "a function whose result is one real number", _checks.describe(L))
        return L

    pairs = zip(leaves, floats, strict=True)
    zeros = [jnp.zeros((steps + 1, *a.shape), a.dtype) if is_float else None for a, is_float in pairs]
    return structure.unflatten(jax.grad(loss_of)(zeros))


def norms(tree: PyTree[AnyArray], *, batch: int = 0) -> Float[Array, "T *batch"]:
    r"""$\lVert a_t \rVert_2$ over all leaves and axes, but the first, time, and the `batch` axes that follow it.

    Args:
        tree: leaves `(T, *batch, ...)`, such as `state_cotangents` returns.
        batch: how many axes after time are kept: norms of single examples.

    Returns:
        `(T, *batch)`.

    Raises:
        TypeError: a leaf that holds no floats, a `batch` that is no integer.
        ValueError: a leaf of too few axes.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxseq import diagnostics
        >>> flow.norms((jnp.full((2, 3, 1), 3.0), jnp.full((2, 3, 1), 4.0)), batch=1).tolist()
        [[5.0, 5.0, 5.0], [5.0, 5.0, 5.0]]
    """
    kept = 1 + _checks.integer("batch", batch, at_least=0)
    leaves = [_checks.array("tree", leaf) for leaf in jax.tree.leaves(tree)]
    if not leaves:
        _checks.bad_type("tree", "at least one array", "none")
    for a in leaves:
        if a.ndim < kept:
            _checks.bad_value("tree", f"leaves of at least {kept} axes, time and batch", str(a.shape))
    return euclidean(leaves, kept)
