r"""The product of Jacobians over l steps, P_l = J_T J_{T-1} ... J_{T-l+1} = ∂s_T/∂s_{T-l}, N x N.

All singular values: P_0 = 1 and P_{l+1} = P_l J_{T-l}. One backward pass pulls the N rows of P_l back through one more
step at a time. It covers all lags and forms no J.

The leading k singular values, if N is large: power iteration needs only P v and Pᵀ u, which are l steps of forward mode
and of reverse mode, for k vectors in parallel:

    V <- orth(Pᵀ (P V))          V (N, k) converges to the leading right singular vectors, |P v_i| -> σ_i

Source: G. H. Golub and C. F. Van Loan, Matrix computations, section 8.2 (orthogonal iteration).
"""

from collections.abc import Iterable
from typing import SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import PRNGKeyArray, PyTree

from jaxseq import _checks
from jaxseq._types import JacobianProducts
from jaxseq.diagnostics._step import Step, VectorState, VectorStep, flat, forward_mode_hint, on_vectors, steps_of

ITERATIONS = 20  # steps of the power iteration
OVERSAMPLING = 4  # vectors beyond k, for faster convergence

StateAndInput = tuple[VectorState, PyTree]


@forward_mode_hint("jacobian_products")
def jacobian_products(
    f: Step,
    init: PyTree[ArrayLike],
    xs: PyTree[ArrayLike] | None,
    *,
    length: int | None = None,
    lags: Iterable[SupportsIndex] | None = None,
    k: int | None = None,
    key: PRNGKeyArray | None = None,
) -> JacobianProducts:
    r"""Return the singular values of $\partial s_T / \partial s_{T-l}$, by which a gradient grows over l steps.

    $$\frac{\partial s_T}{\partial s_{T-l}} = J_T J_{T-1} \cdots J_{T-l+1}, \qquad
      J_t = \frac{\partial s_t}{\partial s_{t-1}}$$

    If the largest singular value is below 1e-7, no gradient in float32 reaches back l steps. If it grows with l,
    gradients explode. A batch of states counts as one large state, with the union of their singular values. Use
    `jax.vmap` for separate results.

    Args:
        f: `(carry, x) -> (carry, y)`, any step function, such as a cell of jaxseq. With `k`, it has to support forward
            mode.
        init: the initial carry. Its float leaves, of total size N, are the state. None is zeros, for a step that
            accepts None.
        xs: the inputs, a pytree of leaves `(T, ...)`, or None with `length`.
        length: T, if `xs` is None.
        lags: the lags l, static integers from 0 to T. None is all of them.
        k: the number of singular values. Power iteration with forward and reverse mode takes about 40 k steps for each
            step of each lag, so use it for few lags. None computes all N from one backward pass with N rows.
        key: a JAX random key for the initial vectors of the power iteration. None is a fixed key.

    Returns:
        `JacobianProducts(lags, singular_values)`.

    Raises:
        TypeError: if `jax.lax.scan` raises it for `f`, `init` and `xs`, the state has no float leaves, or `k` or a lag
            is not an integer.
        ValueError: if a lag is more than T, or `k` is more than N.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxseq import diagnostics
        >>> step = lambda s, x: (0.5 * s, s)
        >>> diagnostics.jacobian_products(step, jnp.ones(2), None, length=3).norms.tolist()
        [1.0, 0.5, 0.25, 0.125]

    Reference:
        R. Pascanu, T. Mikolov and Y. Bengio, On the difficulty of training recurrent neural networks (2013), section 2.
    """
    init, steps = steps_of(f, init, xs, length)
    state = flat(init)
    F, N = on_vectors(f, state), state.v.size
    asked = list(range(steps + 1)) if lags is None else [_checks.integer("lags", lag, at_least=0) for lag in lags]
    if beyond := [lag for lag in asked if lag > steps]:
        _checks.bad_value("lags", f"lags from 0 to {steps}, the number of steps", str(beyond[0]))
    if k is not None and _checks.integer("k", k, at_least=1) > N:
        _checks.bad_value("k", f"at most {N}, the size of the state", str(k))

    def forwards(s: VectorState, x: PyTree) -> tuple[VectorState, VectorState]:
        v, rest = s
        return F(v, rest, x), s

    _, states = lax.scan(forwards, (state.v, state.rest), xs, steps)
    if k is None:
        values = _all_singular_values(F, states, xs, max(asked, default=0), N, state.v.dtype)
        return JacobianProducts(jnp.asarray(asked, int), values[jnp.asarray(asked, int)])
    first = jax.random.normal(jax.random.key(0) if key is None else key, (N, min(N, k + OVERSAMPLING)), state.v.dtype)
    values = [_leading_singular_values(F, states, xs, steps, lag, first)[:k] for lag in asked]
    return JacobianProducts(jnp.asarray(asked, int), jnp.stack(values) if values else jnp.zeros((0, k), first.dtype))


def _all_singular_values(
    F: VectorStep, states: VectorState, xs: PyTree, longest: int, N: int, dtype: np.dtype
) -> jax.Array:
    """Return the singular values (longest + 1, N) for all lags, from one backward pass with the rows of P."""

    def step(P: jax.Array, at: StateAndInput) -> tuple[jax.Array, jax.Array]:
        (v, rest), x = at
        _, pull = jax.vjp(lambda v: F(v, rest, x)[0], v)
        P = jax.vmap(lambda row: pull(row)[0])(P)
        return P, jnp.linalg.svd(P, compute_uv=False)

    last = jax.tree.map(lambda a: a[a.shape[0] - longest :], (states, xs))
    _, values = lax.scan(step, jnp.eye(N, dtype=dtype), last, longest, reverse=True)
    return jnp.concatenate([jnp.ones((1, N), dtype), values[::-1]])


def _leading_singular_values(
    F: VectorStep, states: VectorState, xs: PyTree, steps: int, lag: int, V: jax.Array
) -> jax.Array:
    """Return the leading singular values of P at one lag, in descending order, by power iteration."""
    at = jax.tree.map(lambda a: a[steps - lag :], (states, xs))

    def push(v: jax.Array) -> jax.Array:
        def step(v: jax.Array, at: StateAndInput) -> tuple[jax.Array, None]:
            (v_0, rest), x = at
            return jax.jvp(lambda v: F(v, rest, x)[0], (v_0,), (v,))[1], None

        return lax.scan(step, v, at, lag)[0]

    def pull(u: jax.Array) -> jax.Array:
        def step(u: jax.Array, at: StateAndInput) -> tuple[jax.Array, None]:
            (v_0, rest), x = at
            return jax.vjp(lambda v: F(v, rest, x)[0], v_0)[1](u)[0], None

        return lax.scan(step, u, at, lag, reverse=True)[0]

    columns = lambda f: jax.vmap(f, 1, 1)  # noqa: E731

    def iteration(_: jax.Array, V: jax.Array) -> jax.Array:
        U = jnp.linalg.qr(columns(push)(jnp.linalg.qr(V)[0]))[0]
        return columns(pull)(U)

    V = jnp.linalg.qr(lax.fori_loop(0, ITERATIONS, iteration, V))[0]
    return jnp.linalg.svd(columns(push)(V), compute_uv=False)
