r"""The Lyapunov spectrum by the QR method.

The Jacobians act on k orthonormal directions Q_0 (N, k). A QR factorization makes them orthonormal again, before they
all align with the fastest growing one:

    J_t Q_{t-1} = Q_t R_t          λ_i = 1 / (T dt) sum_t log |R_t|_ii

Since J_T ... J_1 Q_0 = Q_T R_T ... R_1, the R_t contain all growth. Forward mode computes the k columns of J_t Q_{t-1}
without forming J_t.

Source: G. Benettin, L. Galgani, A. Giorgilli and J.-M. Strelcyn, Lyapunov characteristic exponents (1980); R. Engelken,
F. Wolf and L. F. Abbott, Lyapunov spectra of chaotic recurrent neural networks (2023), for networks.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import PRNGKeyArray, PyTree

from jaxseq import _checks
from jaxseq._types import Lyapunov
from jaxseq.diagnostics._step import Rest, Step, flat, forward_mode_hint, on_vectors, steps_of

TangentState = tuple[jax.Array, Rest, jax.Array]  # the state as (v, rest), and the directions Q (N, k)


@forward_mode_hint("lyapunov")
def lyapunov(
    f: Step,
    init: PyTree[ArrayLike],
    xs: PyTree[ArrayLike] | None,
    *,
    length: int | None = None,
    k: int | None = None,
    burn_in: int = 0,
    every: int = 1,
    dt: float | int = 1.0,
    key: PRNGKeyArray | None = None,
) -> Lyapunov:
    r"""Return the k leading Lyapunov exponents of a recurrence, the rates at which nearby states diverge.

    $$J_t Q_{t-1} = Q_t R_t, \qquad \lambda_i = \frac{1}{T \, dt} \sum_t \log |R_t|_{ii}$$

    With `dt=1`, a gradient over l steps is of the order of $e^{\lambda_1 l}$. If $\lambda_1 < 0$, gradients vanish, and
    memory lasts about $-1 / \lambda_1$ steps. If $\lambda_1 > 0$, gradients explode, and the state is chaotic.

    Args:
        f: `(carry, x) -> (carry, y)`, any step function that supports forward mode: a cell of jaxseq, a map, or one
            step of an integrator.
        init: the initial carry. Its float leaves, of total size N, are the state. A batch of states counts as one large
            state; use `jax.vmap` for separate results. None is zeros, for a step that accepts None.
        xs: the inputs, a pytree of leaves `(T, ...)`, or None with `length`.
        length: T, if `xs` is None.
        k: the number of exponents. None is all N.
        burn_in: the number of initial steps to discard, so that the state reaches its attractor and the directions
            converge.
        every: the number of steps between QR factorizations. It must be small enough that the directions do not align,
            and divide T - `burn_in`.
        dt: the time of one step.
        key: a JAX random key for the initial directions. None is a fixed key.

    Returns:
        `Lyapunov(exponents, history, final)`.

    Raises:
        TypeError: if `jax.lax.scan` raises it for `f`, `init` and `xs`, or the state has no float leaves.
        ValueError: if `k` is more than N, or T - `burn_in` is not a positive multiple of `every`.

    Example:
        >>> from jaxseq import diagnostics
        >>> logistic = lambda s, _: (4 * s * (1 - s), None)  # λ = log 2
        >>> round(float(diagnostics.lyapunov(logistic, 0.3, None, length=20000).exponents[0]), 2)
        0.69

    Reference:
        Benettin et al. (1980); Engelken, Wolf and Abbott (2023).
    """
    init, steps = steps_of(f, init, xs, length)
    state = flat(init)
    F, N = on_vectors(f, state), state.v.size
    k = N if k is None else _checks.integer("k", k, at_least=1)
    if k > N:
        _checks.bad_value("k", f"at most {N}, the size of the state", str(k))
    burn_in, every = _checks.integer("burn_in", burn_in, at_least=0), _checks.integer("every", every, at_least=1)
    counted = steps - burn_in
    if counted <= 0 or counted % every:
        expected = f"burn_in = {burn_in} plus a positive multiple of every = {every} steps"
        _checks.bad_value("length" if xs is None else "xs", expected, f"{steps} steps")
    if not dt > 0:
        _checks.bad_value("dt", "a number > 0", _checks.describe(dt))

    def step(s: TangentState, x: PyTree) -> tuple[TangentState, None]:
        v, rest, Q = s
        v, push, rest = jax.linearize(lambda v: F(v, rest, x), v, has_aux=True)
        return (v, rest, jax.vmap(push, 1, 1)(Q)), None

    def segment(s: TangentState, x: PyTree) -> tuple[TangentState, jax.Array]:
        """Apply `every` steps and a QR factorization. Return the logarithmic growth of the directions."""
        v, rest, Q = lax.scan(step, s, x, every)[0]
        Q, R = jnp.linalg.qr(Q)
        return (v, rest, Q), jnp.log(jnp.abs(jnp.diagonal(R)))

    Q = jax.random.normal(jax.random.key(0) if key is None else key, (N, k), state.v.dtype)
    s = (state.v, state.rest, jnp.linalg.qr(Q)[0])

    def settling(s: TangentState, x: PyTree) -> tuple[TangentState, None]:
        (v, rest, Q), _ = step(s, x)
        return (v, rest, jnp.linalg.qr(Q)[0]), None

    s, _ = lax.scan(settling, s, jax.tree.map(lambda a: a[:burn_in], xs), burn_in)
    rest = jax.tree.map(lambda a: a[burn_in:].reshape(counted // every, every, *a.shape[1:]), xs)
    (v, others, _), growth = lax.scan(segment, s, rest, counted // every)
    time = dt * every * jnp.arange(1, counted // every + 1, dtype=growth.dtype)
    history = jnp.cumsum(growth, 0) / time[:, None]
    order = jnp.argsort(-history[-1])
    return Lyapunov(history[-1][order], history[:, order], state.join(v, others))
