"""Linear recurrent unit (LRU): a complex diagonal recurrence between linear maps.

    λ = exp(-exp(ν) + i exp(θ))
    h' = λ h + exp(γ) (B x)
    y = Re(C h') + d ⊙ x

|λ| < 1 for every ν, so the recurrence is stable. exp(γ) is a learned normalization. Initially it is sqrt(1 - |λ|²), so
that the variance of the state does not depend on |λ|. In the form of `jaxseq.LinearCell`, a = λ and v = exp(γ) (B x).

    code    here
    skip    d
    w_x     [Re B, Im B]
    w_y     [Re C, Im C], one above the other

Source: A. Orvieto et al., Resurrecting recurrent neural networks for long sequences (2023), sections 3.2 to 3.4 and
appendix A.
"""

from math import pi

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from jaxseq import _checks, _init, _precision
from jaxseq._op import with_hints
from jaxseq._pointwise import add_skip
from jaxseq._recurrence import LinearCell, LinearProduct
from jaxseq._types import LRUParams
from jaxseq.cells._diagonal import complex_input, real_output


def _coefficients(p: LRUParams, x: jax.Array, L: LinearProduct) -> tuple[jax.Array, jax.Array]:
    factor = jnp.exp(lax.complex(-jnp.exp(p.nu), jnp.exp(p.theta)))
    u = complex_input(L, p.w_x, x)
    return factor, jnp.expand_dims(jnp.exp(p.gamma), range(u.ndim - 1)).astype(u.dtype) * u


def _output(p: LRUParams, h: jax.Array, x: jax.Array, L: LinearProduct) -> jax.Array:
    return add_skip(real_output(L, p.w_y, h), p.skip, x)


lru = LinearCell("lru", coefficients=_coefficients, params=LRUParams, output=_output)


@with_hints
def lru_init(
    key: PRNGKeyArray,
    input_size: int,
    hidden_size: int,
    *,
    min_radius: float = 0.0,
    max_radius: float = 1.0,
    max_phase: float = 2 * pi,
    use_skip: bool = True,
    dtype: DTypeLike = jnp.float32,
) -> LRUParams:
    r"""Initialize `cells.lru`: factors $\lambda$ uniform in a ring of the complex plane, normal maps.

    Long sequences need a ring close to the unit circle and small phases, such as `min_radius=0.9, max_radius=0.999` and
    `max_phase=math.pi / 10`. A state decays by the factor e in -1 / log r steps, for a radius r: 100 steps for 0.99.

    Args:
        key: a JAX random key.
        input_size: D, the number of input and output features.
        hidden_size: H, the number of complex states.
        min_radius: the inner radius of the ring, >= 0.
        max_radius: the outer radius, > `min_radius` and at most 1.
        max_phase: the largest phase of a factor, in radians.
        use_skip: if False, `skip` is None.
        dtype: floating dtype of the parameters.

    Returns:
        `LRUParams(nu, theta, gamma, w_x, w_y, skip)`.

    Raises:
        TypeError: if a size is not an integer, or `dtype` is not a floating dtype.
        ValueError: if a size is less than 1, or the ring is empty or not in the unit circle.

    Example:
        >>> import jax, jax.numpy as jnp, jaxseq
        >>> params = jaxseq.cells.lru_init(jax.random.key(0), 3, 5, min_radius=0.9, max_radius=0.99)
        >>> h, ys = jaxseq.recurrence(jaxseq.cells.lru, params, None, jnp.ones((7, 2, 3)))
        >>> h.shape, h.dtype, ys.shape
        ((2, 5), dtype('complex64'), (7, 2, 3))

    Reference:
        A. Orvieto et al., Resurrecting recurrent neural networks for long sequences (2023), lemma 3.2 and appendix A.
    """
    D, H, dtype = _init.sizes(input_size, hidden_size, dtype)
    if not 0 <= min_radius < max_radius <= 1:
        _checks.bad_value("min_radius", "0 <= min_radius < max_radius <= 1", f"{min_radius} and {max_radius}")
    if not max_phase > 0:
        _checks.bad_value("max_phase", "a positive number", repr(max_phase))
    wide = _precision.accumulator(dtype)
    keys = jax.random.split(key, 5)
    # The area of a ring grows with the square of the radius. An area of zero would be a factor of zero.
    least = max(min_radius**2, 1e-6 * max_radius**2)
    log_radius = 0.5 * jnp.log(jax.random.uniform(keys[0], (H,), wide, least, max_radius**2))
    log_radius = jnp.minimum(log_radius, -1e-6)  # a draw may be rounded to the outer radius of 1
    phase = jax.random.uniform(keys[1], (H,), wide, 1e-6 * max_phase, max_phase)
    w_x = jax.random.normal(keys[2], (D, 2 * H), wide) * (2 * D) ** -0.5
    w_y = jax.random.normal(keys[3], (2 * H, D), wide) * H**-0.5
    skip = jax.random.normal(keys[4], (D,), wide) if _checks.boolean("use_skip", use_skip) else None
    params = LRUParams(
        nu=jnp.log(-log_radius),
        theta=jnp.log(phase),
        gamma=0.5 * jnp.log(-jnp.expm1(2 * log_radius)),
        w_x=w_x,
        w_y=w_y,
        skip=skip,
    )
    return _precision.cast(params, dtype)
