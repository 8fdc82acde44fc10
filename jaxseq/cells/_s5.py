"""S5: a diagonal state space model in continuous time, discretized with a learned step for each state.

    dh/dt = Λ h + B x,     y = 2 Re(C h) + d ⊙ x,     Δ = exp(log_step)

The states are those of one half of the eigenvalues of a real matrix. The other half are their conjugates, hence the
factor 2. With zero-order hold (`s5`), x is constant over a step:

    a = exp(Λ Δ)                          v = (exp(Λ Δ) - 1) / Λ ⊙ (B x)

With the bilinear rule (`s5_bilinear`), the derivative over a step is that at its middle:

    a = (1 + Λ Δ / 2) / (1 - Λ Δ / 2)     v = Δ / (1 - Λ Δ / 2) ⊙ (B x)

    code         here
    real, imag   Re Λ, Im Λ
    skip         d
    w_x, w_y     [Re B, Im B], and [Re C, Im C], one above the other

Initial values. Λ are eigenvalues of the normal part of the HiPPO-LegS matrix, V Λ V*. It is -1/2 on the diagonal, plus
a skew matrix with entries sqrt(2 n + 1) sqrt(2 k + 1) / 2. B = V* B₀ and C = C₀ V, with real normal B₀ and complex
normal C₀.

Source: J. T. H. Smith, A. Warrington and S. W. Linderman, Simplified state space layers for sequence modeling (2023),
sections 2.2, 3.2 and 4.1, and appendix B.1.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from jaxseq import _checks, _init, _precision
from jaxseq._op import with_hints
from jaxseq._pointwise import add_skip
from jaxseq._recurrence import LinearCell, LinearProduct
from jaxseq._types import S5Params
from jaxseq.cells._diagonal import complex_input, real_output


def _zero_order_hold(p: S5Params, x: jax.Array, L: LinearProduct) -> tuple[jax.Array, jax.Array]:
    eigenvalues = lax.complex(p.real, p.imag)
    step = jnp.exp(p.log_step).astype(eigenvalues.dtype)
    gain = jnp.expm1(eigenvalues * step) / eigenvalues
    return jnp.exp(eigenvalues * step), _driven(gain, p, x, L)


def _bilinear(p: S5Params, x: jax.Array, L: LinearProduct) -> tuple[jax.Array, jax.Array]:
    eigenvalues = lax.complex(p.real, p.imag)
    step = jnp.exp(p.log_step).astype(eigenvalues.dtype)
    half = eigenvalues * step / 2
    return (1 + half) / (1 - half), _driven(step / (1 - half), p, x, L)


def _driven(gain: jax.Array, p: S5Params, x: jax.Array, L: LinearProduct) -> jax.Array:
    """Return v, the gain times B x."""
    u = complex_input(L, p.w_x, x)
    return jnp.expand_dims(gain, range(u.ndim - 1)) * u


def _output(p: S5Params, h: jax.Array, x: jax.Array, L: LinearProduct) -> jax.Array:
    return add_skip(2 * real_output(L, p.w_y, h), p.skip, x)


s5 = LinearCell("s5", coefficients=_zero_order_hold, params=S5Params, output=_output)
s5_bilinear = LinearCell("s5_bilinear", coefficients=_bilinear, params=S5Params, output=_output)


@with_hints
def s5_init(
    key: PRNGKeyArray,
    input_size: int,
    hidden_size: int,
    *,
    blocks: int = 1,
    min_step: float = 0.001,
    max_step: float = 0.1,
    use_skip: bool = True,
    dtype: DTypeLike = jnp.float32,
) -> S5Params:
    """Initialize `cells.s5` and `cells.s5_bilinear`: HiPPO-N eigenvalues, steps log-uniform between two bounds.

    Args:
        key: a JAX random key.
        input_size: D, the number of input and output features.
        hidden_size: H, the number of complex states: those of one half of the eigenvalues of 2 H real states.
        blocks: the number of HiPPO-N matrices on the diagonal, a divisor of H. Each is decomposed on the host. Large
            ones have large eigenvalues, whose gradients are less accurate in float32.
        min_step: the smallest step, > 0.
        max_step: the largest step.
        use_skip: if False, `skip` is None.
        dtype: floating dtype of the parameters.

    Returns:
        `S5Params(real, imag, log_step, w_x, w_y, skip)`.

    Raises:
        TypeError: if a size is not an integer, or `dtype` is not a floating dtype.
        ValueError: if a size is less than 1, `blocks` does not divide H, or the bounds of the steps are out of order.

    Example:
        >>> import jax, jax.numpy as jnp, jaxseq
        >>> params = jaxseq.cells.s5_init(jax.random.key(0), 3, 8, blocks=2)
        >>> h, ys = jaxseq.recurrence(jaxseq.cells.s5, params, None, jnp.ones((7, 2, 3)))
        >>> h.shape, ys.shape
        ((2, 8), (7, 2, 3))

    Reference:
        J. T. H. Smith, A. Warrington and S. W. Linderman, Simplified state space layers for sequence modeling (2023),
        section 4.1 and appendix B.1.
    """
    D, H, dtype = _init.sizes(input_size, hidden_size, dtype)
    n = _checks.integer("blocks", blocks, at_least=1)
    if H % n:
        _checks.bad_value("blocks", f"a divisor of `hidden_size`, {H}", str(n))
    if not 0 < min_step <= max_step:
        _checks.bad_value("min_step", "0 < min_step <= max_step", f"{min_step} and {max_step}")
    wide, (key_b, key_c, key_step, key_skip) = _precision.accumulator(dtype), jax.random.split(key, 4)
    imaginary, vectors = _hippo_normal(2 * H // n)
    half = slice(H // n, None)  # the eigenvalues with positive imaginary parts
    of_block = jnp.asarray(vectors[:, half], _precision.common(wide, np.dtype(np.complex64)))
    draws = jax.random.normal(key_b, (n, 2 * H // n, D), wide) * D**-0.5
    b = jnp.einsum("kp,nkd->dnp", of_block.conj(), draws.astype(of_block.dtype)).reshape(D, H)
    draws = jax.random.normal(key_c, (2, D, n, 2 * H // n), wide) * (4 * H) ** -0.5
    c = jnp.einsum("dnk,kp->npd", lax.complex(*draws), of_block).reshape(H, D)
    log_step = jax.random.uniform(key_step, (H,), wide, float(np.log(min_step)), float(np.log(max_step)))
    params = S5Params(
        real=jnp.full(H, -0.5, wide),
        imag=jnp.tile(jnp.asarray(imaginary[half], wide), n),
        log_step=log_step,
        w_x=jnp.concatenate([b.real, b.imag], 1),
        w_y=jnp.concatenate([c.real, c.imag], 0),
        skip=jax.random.normal(key_skip, (D,), wide) if _checks.boolean("use_skip", use_skip) else None,
    )
    return _precision.cast(params, dtype)


def _hippo_normal(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return eigenvalues of the normal part of HiPPO-LegS, their imaginary parts in order, and its eigenvectors."""
    root = np.sqrt(2 * np.arange(size) + 1)
    skew = np.tril(np.outer(root, root), -1) / 2
    imaginary, vectors = np.linalg.eigh(1j * (skew - skew.T))
    return imaginary, vectors
