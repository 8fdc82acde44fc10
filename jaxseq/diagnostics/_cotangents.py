r"""∂L/∂s_t for all t, in one backward pass.

Add a zero e_t to the state after every step. Its cotangent is that of the state, and reverse mode computes it for all t
in one pass:

    s_t = f(s_{t-1} + e_{t-1}, x_t)          ∂L/∂e_t = ∂L/∂s_t
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from jaxseq import _checks
from jaxseq._types import AnyArray
from jaxseq.diagnostics._step import Step, euclidean, is_float_leaf, steps_of

Perturbation = list[jax.Array | None]  # of the leaves of the state; None for a leaf that is not a float


def state_cotangents(
    f: Step,
    init: PyTree[ArrayLike],
    xs: PyTree[ArrayLike] | None,
    loss: Callable[[PyTree, PyTree], Float[Array, ""]],
    *,
    length: int | None = None,
) -> PyTree[Array]:
    r"""Return the gradient of a loss with respect to the state at every step, $\partial L / \partial s_t$.

    It takes one forward and one backward pass. Where the gradient is small, earlier steps contribute little to the
    gradient of the parameters. The cotangent at t accounts for all steps after t and for the returned carry. The
    contribution of the output $y_t$ is part of the cotangent at t - 1, because step t computes $y_t$ from $s_{t-1}$.

    Args:
        f: `(carry, x) -> (carry, y)`, any step function.
        init: the initial carry, any pytree. None is zeros, for a step that accepts None.
        xs: the inputs, a pytree of leaves `(T, ...)`, or None with `length`.
        loss: `(carry, ys) -> L`, a scalar function of the results of the scan.
        length: T, if `xs` is None.

    Returns:
        A pytree with the structure of the carry. Float leaves are `(T + 1, ...)`, for t = 0 (`init`) to T (the returned
        carry). Other leaves, such as a counter or a key, are None.

    Raises:
        TypeError: if `jax.lax.scan` raises it for `f`, `init` and `xs`, or the loss is not a real scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxseq import diagnostics
        >>> step = lambda s, x: (0.5 * s + x, s)
        >>> diagnostics.state_cotangents(step, 0.0, jnp.ones(3), lambda s, ys: s).tolist()
        [0.125, 0.25, 0.5, 1.0]

    Reference:
        S. Hochreiter, Untersuchungen zu dynamischen neuronalen Netzen (1991); Y. Bengio, P. Simard and P. Frasconi,
        Learning long-term dependencies with gradient descent is difficult (1994).
    """
    init, steps = steps_of(f, init, xs, length)
    leaves, structure = jax.tree.flatten(init)
    floats = [is_float_leaf(leaf) for leaf in leaves]

    def perturbed(s: PyTree[Array], e: Perturbation) -> PyTree[Array]:
        pairs = zip(structure.flatten_up_to(s), e, strict=True)
        return structure.unflatten([a if e is None else a + e for a, e in pairs])

    def loss_of(e: Perturbation) -> jax.Array:
        def step(s: PyTree[Array], at: tuple[PyTree, Perturbation]) -> tuple[PyTree[Array], PyTree]:
            x, e = at
            s, y = f(s, x)
            return perturbed(s, e), y

        first, after = ([None if a is None else a[part] for a in e] for part in (0, slice(1, None)))
        L = loss(*lax.scan(step, perturbed(init, first), (xs, after), steps))
        if jnp.shape(L) != () or not jnp.issubdtype(jnp.result_type(L), jnp.floating):
            _checks.bad_type("loss", "a function that returns a real scalar", _checks.describe(L))
        return L

    pairs = zip(leaves, floats, strict=True)
    zeros = [jnp.zeros((steps + 1, *a.shape), a.dtype) if is_float else None for a, is_float in pairs]
    return structure.unflatten(jax.grad(loss_of)(zeros))


def norms(tree: PyTree[AnyArray], *, batch: int = 0) -> Float[Array, "T *batch"]:
    r"""Return the norms $\lVert a_t \rVert_2$ over all leaves and all axes except time and batch.

    Args:
        tree: leaves `(T, *batch, ...)`, for example from `state_cotangents`.
        batch: the number of batch axes, which follow the time axis. 0 gives norms over all examples together.

    Returns:
        `(T, *batch)`.

    Raises:
        TypeError: if a leaf is not a float array, or `batch` is not an integer.
        ValueError: if a leaf has too few axes.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxseq import diagnostics
        >>> diagnostics.norms((jnp.full((2, 3, 1), 3.0), jnp.full((2, 3, 1), 4.0)), batch=1).tolist()
        [[5.0, 5.0, 5.0], [5.0, 5.0, 5.0]]
    """
    leading = 1 + _checks.integer("batch", batch, at_least=0)
    leaves = [_checks.array("tree", leaf) for leaf in jax.tree.leaves(tree)]
    if not leaves:
        _checks.bad_type("tree", "at least one array", "none")
    for a in leaves:
        if a.ndim < leading:
            _checks.bad_value("tree", f"leaves with at least {leading} axes, time and batch", str(a.shape))
    return euclidean(leaves, leading)
