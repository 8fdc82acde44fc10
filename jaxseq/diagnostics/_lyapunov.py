r"""The Lyapunov spectrum by the QR method.

k orthonormal directions Q_0 (N, k) are carried by the Jacobians, and made orthonormal again before they all fall into
the fastest one:

    J_t Q_{t-1} = Q_t R_t          λ_i = 1 / (T dt) sum_t log |R_t|_ii

The product J_T ... J_1 Q_0 is Q_T R_T ... R_1, so that the R hold all growth. They are columns of forward mode, k at a
time; no J is formed.

Source: G. Benettin, L. Galgani, A. Giorgilli and J.-M. Strelcyn, Lyapunov characteristic exponents (1980); R. Engelken,
F. Wolf and L. F. Abbott, Lyapunov spectra of chaotic recurrent neural networks (2023), for networks.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxseq import _checks
from jaxseq.diagnostics._step import Step, flat, on_vectors, pushing_forwards, steps_of


class Lyapunov(NamedTuple):
    """Lyapunov exponents.

    Attributes:
        exponents: `(k,)`, the largest first, in units of 1 / (dt).
        history: `(steps / every, k)`, what they would be, had the sum been ended there: whether it has settled.
        final: the state after the last step.
    """

    exponents: Float[Array, " k"]
    history: Float[Array, "n k"]
    final: PyTree[Array]


@pushing_forwards("lyapunov")
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
    r"""The k leading Lyapunov exponents of a recurrence: at what rate nearby states part, or gradients grow.

    $$J_t Q_{t-1} = Q_t R_t, \qquad \lambda_i = \frac{1}{T \, dt} \sum_t \log |R_t|_{ii}$$

    A gradient over l steps is of the order of $e^{\lambda_1 l}$: below zero it vanishes, above it explodes, and the
    state is chaotic. $-1 / \lambda_1$ is how many steps memory lasts.

    Args:
        f: `(carry, x) -> (carry, y)`, any step function with a forward mode (of our cells, the twins): a cell, a map,
            one step of an integrator.
        init: the first carry; its float leaves, N numbers in all, are the state. A batch of states is one large state:
            `jax.vmap` this over the examples. None is zeros, for a step that takes none.
        xs: what is read, `(T, ...)` leaves; None with `length`.
        length: T, where there are no xs.
        k: how many; None is all N.
        burn_in: the first steps, of which nothing is counted, that the state reach its attractor and the directions
            their own.
        every: directions are made orthonormal every so many steps: few enough that they do not fall together. T less
            `burn_in` has to be a multiple of it.
        dt: time of one step.
        key: of the first directions; None is a fixed one.

    Returns:
        `Lyapunov(exponents, history, final)`.

    Raises:
        TypeError: as `jax.lax.scan` does, of f, init and xs; a state without floats.
        ValueError: a k beyond N, nothing left after `burn_in`, or not a multiple of `every`.

    Example:
        >>> from jaxseq import diagnostics
        >>> logistic = lambda s, _: (4 * s * (1 - s), None)  # log 2
        >>> round(float(flow.lyapunov(logistic, 0.3, None, length=20000).exponents[0]), 2)
        0.69

    Reference:
        Benettin et al. (1980); Engelken, Wolf and Abbott (2023).
    """
    init, steps = steps_of(f, init, xs, length)
    state = flat(init)
    F, N = on_vectors(f, state), state.v.size
    k = N if k is None else _checks.integer("k", k, at_least=1)
    if k > N:
        _checks.bad_value("k", f"at most {N}, the numbers in the state", str(k))
    burn_in, every = _checks.integer("burn_in", burn_in, at_least=0), _checks.integer("every", every, at_least=1)
    counted = steps - burn_in
    if counted <= 0 or counted % every:
        expected = f"steps beyond burn_in = {burn_in}, in multiples of every = {every}"
        _checks.bad_value("length" if xs is None else "xs", expected, f"{steps} steps")
    if not dt > 0:
        _checks.bad_value("dt", "a time above zero", _checks.describe(dt))

    def step(s: Any, x: Any) -> tuple[Any, None]:
        v, rest, Q = s
        v, push, rest = jax.linearize(lambda v: F(v, rest, x), v, has_aux=True)
        return (v, rest, jax.vmap(push, 1, 1)(Q)), None

    def piece(s: Any, x: Any) -> tuple[Any, jax.Array]:
        """`every` steps, and how much the directions have grown by then."""
        v, rest, Q = lax.scan(step, s, x, every)[0]
        Q, R = jnp.linalg.qr(Q)
        return (v, rest, Q), jnp.log(jnp.abs(jnp.diagonal(R)))

    Q = jax.random.normal(jax.random.key(0) if key is None else key, (N, k), state.v.dtype)
    s = (state.v, state.rest, jnp.linalg.qr(Q)[0])

    def settling(s: Any, x: Any) -> tuple[Any, None]:
        (v, rest, Q), _ = step(s, x)
        return (v, rest, jnp.linalg.qr(Q)[0]), None

    s, _ = lax.scan(settling, s, jax.tree.map(lambda a: a[:burn_in], xs), burn_in)
    rest = jax.tree.map(lambda a: a[burn_in:].reshape(counted // every, every, *a.shape[1:]), xs)
    (v, others, _), grown = lax.scan(piece, s, rest, counted // every)
    time = dt * every * jnp.arange(1, counted // every + 1, dtype=grown.dtype)
    history = jnp.cumsum(grown, 0) / time[:, None]
    order = jnp.argsort(-history[-1])
    return Lyapunov(history[-1][order], history[:, order], state.join(v, others))
