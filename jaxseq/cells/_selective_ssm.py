"""Selective state space model, the S6 layer of Mamba: N states for each feature, with step, input and output maps that
depend on the input.

    Δ = softplus(x W_step W_up + b)     (D,)       the step of each feature
    B = x W_in,  C = x W_out            (N,)       from a feature to its states, and back
    A = -exp(log_rate)                  (D, N)
    h' = exp(Δ A) h + Δ x B             (D, N)     zero-order hold for A, and Euler's rule for B
    y = h' C + d ⊙ x                    (D,)

In the form of `jaxseq.LinearCell`, a = exp(Δ A) and v = Δ x B. They have N numbers for each feature and step, so they
are computed for a chunk of steps only. The state is (D N,), the states of each feature side by side.

    code    here
    skip    d

Source: A. Gu and T. Dao, Mamba: Linear-time sequence modeling with selective state spaces (2023), algorithm 2 and
section 3.6.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from jaxseq import _checks, _dense, _init, _precision
from jaxseq._op import with_hints
from jaxseq._pointwise import add_skip, softplus
from jaxseq._recurrence import LinearCell, LinearProduct
from jaxseq._types import SelectiveSSMParams


def _coefficients(p: SelectiveSSMParams, x: jax.Array, L: LinearProduct) -> tuple[jax.Array, jax.Array]:
    step = softplus(_dense.add_bias(L(p.w_up, L(p.w_step, x)), p.b))
    rate = jnp.expand_dims(-jnp.exp(p.log_rate), range(x.ndim - 1))
    a = jnp.exp(step[..., None] * rate)
    v = (step * x)[..., None] * L(p.w_in, x)[..., None, :]
    flat = lambda states: states.reshape(*x.shape[:-1], p.log_rate.size)  # noqa: E731
    return flat(a), flat(v)


def _output(p: SelectiveSSMParams, h: jax.Array, x: jax.Array, L: LinearProduct) -> jax.Array:
    states = h.reshape(*x.shape, p.log_rate.shape[1])
    return add_skip(jnp.sum(states * L(p.w_out, x)[..., None, :], -1), p.skip, x)


selective_ssm = LinearCell("selective_ssm", coefficients=_coefficients, params=SelectiveSSMParams, output=_output)


@with_hints
def selective_ssm_init(
    key: PRNGKeyArray,
    input_size: int,
    hidden_size: int,
    *,
    rank: int | None = None,
    min_step: float = 0.001,
    max_step: float = 0.1,
    use_skip: bool = True,
    dtype: DTypeLike = jnp.float32,
) -> SelectiveSSMParams:
    """Initialize `cells.selective_ssm`: A = -1, -2, ..., -N for each feature, and steps log-uniform between two bounds.

    Args:
        key: a JAX random key.
        input_size: D, the number of input and output features.
        hidden_size: N, the number of states of each feature.
        rank: R, the rank of the map from x to the steps. None is D / 16, rounded up.
        min_step: the smallest step for x = 0, > 0.
        max_step: the largest step for x = 0.
        use_skip: if False, `skip` is None. Otherwise it is initially one.
        dtype: floating dtype of the parameters.

    Returns:
        `SelectiveSSMParams(w_step, w_up, b, w_in, w_out, log_rate, skip)`.

    Raises:
        TypeError: if a size is not an integer, or `dtype` is not a floating dtype.
        ValueError: if a size is less than 1, or the bounds of the steps are out of order.

    Example:
        >>> import jax, jax.numpy as jnp, jaxseq
        >>> params = jaxseq.cells.selective_ssm_init(jax.random.key(0), 3, 4)
        >>> h, ys = jaxseq.recurrence(jaxseq.cells.selective_ssm, params, None, jnp.ones((7, 2, 3)))
        >>> h.shape, ys.shape
        ((2, 12), (7, 2, 3))

    Reference:
        A. Gu and T. Dao, Mamba: Linear-time sequence modeling with selective state spaces (2023), section 3.6.
    """
    D, N, dtype = _init.sizes(input_size, hidden_size, dtype)
    R = -(-D // 16) if rank is None else _checks.integer("rank", rank, at_least=1)
    if not 0 < min_step <= max_step:
        _checks.bad_value("min_step", "0 < min_step <= max_step", f"{min_step} and {max_step}")
    wide, keys = _precision.accumulator(dtype), jax.random.split(key, 5)
    step = jnp.exp(jax.random.uniform(keys[0], (D,), wide, float(np.log(min_step)), float(np.log(max_step))))
    return SelectiveSSMParams(
        w_step=_init.matrix(keys[1], D, R, dtype),
        w_up=jax.random.uniform(keys[2], (R, D), wide, -(R**-0.5), R**-0.5).astype(dtype),
        b=(step + jnp.log(-jnp.expm1(-step))).astype(dtype),  # the inverse of softplus
        w_in=_init.matrix(keys[3], D, N, dtype),
        w_out=_init.matrix(keys[4], D, N, dtype),
        log_rate=jnp.broadcast_to(jnp.log(jnp.arange(1, N + 1, dtype=wide)), (D, N)).astype(dtype),
        skip=jnp.ones(D, dtype) if _checks.boolean("use_skip", use_skip) else None,
    )
