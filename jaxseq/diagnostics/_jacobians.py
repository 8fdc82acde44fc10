r"""The product of Jacobians over l steps, P_l = J_T J_{T-1} ... J_{T-l+1} = ∂s_T/∂s_{T-l}, N x N.

All of it: P_0 = 1 and P_{l+1} = P_l J_{T-l}, the rows of P_l pulled back through one more step, N of them at a time.
One backward sweep serves every lag, and no J is formed.

Some of it: where N is large, what P does to a few vectors says how large it is. Power iteration needs P v and Pᵀ u
only, which are l steps of forward and of reverse mode, for k vectors side by side:

    V <- orth(Pᵀ (P V))          V (N, k) turns into the leading right singular vectors, |P v_i| -> σ_i

Source: G. H. Golub and C. F. Van Loan, Matrix computations, section 8.2 (orthogonal iteration).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from jaxseq import _checks
from jaxseq.diagnostics._step import Step, flat, on_vectors, pushing_forwards, steps_of

ITERATIONS, MORE = 20, 4  # of the power iteration, and by how many vectors it leads


class JacobianProducts(NamedTuple):
    r"""$P_l = \partial s_T / \partial s_{T-l}$ by lag.

    Attributes:
        lags: `(L,)`, l.
        singular_values: `(L, k)`, of each product, the largest first; that one is its norm $\lVert P_l \rVert_2$.
    """

    lags: Int[Array, " L"]
    singular_values: Float[Array, "L k"]

    @property
    def norms(self) -> Float[Array, " L"]:
        """(L,), by how much a gradient can grow over that many steps."""
        return self.singular_values[:, 0]


@pushing_forwards("jacobian_products")
def jacobian_products(
    f: Step,
    init: PyTree[ArrayLike],
    xs: PyTree[ArrayLike] | None,
    *,
    length: int | None = None,
    lags: Any = None,
    k: int | None = None,
    key: PRNGKeyArray | None = None,
) -> JacobianProducts:
    r"""What l steps do to a gradient: singular values of $\partial s_T / \partial s_{T-l}$, lag by lag.

    $$\frac{\partial s_T}{\partial s_{T-l}} = J_T J_{T-1} \cdots J_{T-l+1}, \qquad
      J_t = \frac{\partial s_t}{\partial s_{t-1}}$$

    Where the largest falls below 1e-7, nothing in float32 reaches back so far; where it grows, gradients explode. A
    batch of states is one large state, with the union of their singular values: `jax.vmap` this over the examples.

    Args:
        f: `(carry, x) -> (carry, y)`, any step function with a forward mode (of our cells, the twins).
        init: the first carry; its float leaves, N numbers in all, are the state. None is zeros, for a step that takes
            none.
        xs: what is read, `(T, ...)` leaves; None with `length`.
        length: T, where there are no xs.
        lags: which l, from 0 to T, known when the function is traced; None is all of them.
        k: how many singular values, by power iteration with forward and reverse mode, at a cost of some forty times k
            steps for each step of each lag: few lags, then. None is all N, from one sweep that carries N rows.
        key: of the first vectors of the iteration; None is a fixed one.

    Returns:
        `JacobianProducts(lags, singular_values)`.

    Raises:
        TypeError: as `jax.lax.scan` does, of f, init and xs; a state without floats; a k that is no integer.
        ValueError: a lag beyond T, a k beyond N.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxseq import diagnostics
        >>> step = lambda s, x: (0.5 * s, s)
        >>> flow.jacobian_products(step, jnp.ones(2), None, length=3).norms.tolist()
        [1.0, 0.5, 0.25, 0.125]

    Reference:
        R. Pascanu, T. Mikolov and Y. Bengio, On the difficulty of training recurrent neural networks (2013), section 2.
    """
    init, steps = steps_of(f, init, xs, length)
    state = flat(init)
    F, N = on_vectors(f, state), state.v.size
    asked = list(range(steps + 1)) if lags is None else [_checks.integer("lags", lag, at_least=0) for lag in lags]
    if beyond := [lag for lag in asked if lag > steps]:
        _checks.bad_value("lags", f"lags from 0 to {steps}, the steps of `xs`", str(beyond[0]))
    if k is not None and _checks.integer("k", k, at_least=1) > N:
        _checks.bad_value("k", f"at most {N}, the numbers in the state", str(k))

    def forwards(s: Any, x: Any) -> Any:
        v, rest = s
        return F(v, rest, x), s

    _, states = lax.scan(forwards, (state.v, state.rest), xs, steps)
    if k is None:
        values = _all_at_once(F, states, xs, max(asked, default=0), N, state.v.dtype)
        return JacobianProducts(jnp.asarray(asked, int), values[jnp.asarray(asked, int)])
    first = jax.random.normal(jax.random.key(0) if key is None else key, (N, min(N, k + MORE)), state.v.dtype)
    values = [_iterated(F, states, xs, steps, lag, first)[:k] for lag in asked]
    return JacobianProducts(jnp.asarray(asked, int), jnp.stack(values) if values else jnp.zeros((0, k), first.dtype))


def _all_at_once(F: Any, states: Any, xs: Any, longest: int, N: int, dtype: Any) -> jax.Array:
    """(longest + 1, N): one sweep backwards with the rows of P."""

    def step(P: jax.Array, at: Any) -> tuple[jax.Array, jax.Array]:
        (v, rest), x = at
        _, pull = jax.vjp(lambda v: F(v, rest, x)[0], v)
        P = jax.vmap(lambda row: pull(row)[0])(P)
        return P, jnp.linalg.svd(P, compute_uv=False)

    last = jax.tree.map(lambda a: a[a.shape[0] - longest :], (states, xs))
    _, values = lax.scan(step, jnp.eye(N, dtype=dtype), last, longest, reverse=True)
    return jnp.concatenate([jnp.ones((1, N), dtype), values[::-1]])


def _iterated(F: Any, states: Any, xs: Any, steps: int, lag: int, V: jax.Array) -> jax.Array:
    """The leading singular values of P at one lag, the largest first."""
    at = jax.tree.map(lambda a: a[steps - lag :], (states, xs))

    def push(v: jax.Array) -> jax.Array:
        def step(v: jax.Array, at: Any) -> tuple[jax.Array, None]:
            (v_0, rest), x = at
            return jax.jvp(lambda v: F(v, rest, x)[0], (v_0,), (v,))[1], None

        return lax.scan(step, v, at, lag)[0]

    def pull(u: jax.Array) -> jax.Array:
        def step(u: jax.Array, at: Any) -> tuple[jax.Array, None]:
            (v_0, rest), x = at
            return jax.vjp(lambda v: F(v, rest, x)[0], v_0)[1](u)[0], None

        return lax.scan(step, u, at, lag, reverse=True)[0]

    columns = lambda f: jax.vmap(f, 1, 1)  # noqa: E731

    def iteration(_: Any, V: jax.Array) -> jax.Array:
        U = jnp.linalg.qr(columns(push)(jnp.linalg.qr(V)[0]))[0]
        return columns(pull)(U)

    V = jnp.linalg.qr(lax.fori_loop(0, ITERATIONS, iteration, V))[0]
    return jnp.linalg.svd(columns(push)(V), compute_uv=False)
