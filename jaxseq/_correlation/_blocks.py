"""Groups: merged to blocks of some width, then one dense convolution for each block.

A block is several groups side by side, its kernel W that of the groups on the diagonal and zero off it: with the
channels (μ, i') of a block, μ the group within it,

    W[k, (μ, i'), (ν, o')] = w[k, i', (μ, o')]  if μ = ν,  else 0.

Then (1) and (2) are those of W, and w̄ is the diagonal of W̄. This multiplies by zeros, as many times more as there are
groups in a block, which is faster than narrow products up to some width; and XLA's CPU backend takes longer over groups
than over the same groups one by one. In ms, two cores, (1) / (2) / (3):

                        (4, 56, 56, 64), 3x3    (4, 28, 28, 128), 3x3    (8, 512, 128), 5 taps
                        8 groups                32 groups                16 groups
    XLA                 12.5 / 11.1 / 617       11.0 / 11.1 / 1614       2.2 / 2.2 / 50
    group by group       4.9 /  4.4 / 11.7       9.4 /  6.8 / 5.6        2.0 / 1.8 / 2.0
    blocks of 16         3.4 /  3.3 / 10.4       2.6 /  2.6 / 5.7        1.3 / 1.4 / 1.9
    blocks of 32         6.2 /  6.1 / 7.2        3.3 /  3.6 / 3.3        1.5 / 1.5 / 2.3

torch, where it has the machine to itself, takes a third of the time over the first of these, with narrow products
written for it; no arrangement of XLA's own products was found that does.

A NaN or an infinity in one group reaches the others of its block.
"""

import jax
import jax.numpy as jnp

from jaxseq._correlation._form import Contraction, Form

# Channels of a block on its narrower side, for (1) and (2) and for (3), and the most blocks that are written out.
WIDTH, KERNEL_WIDTH = 16, 32
BLOCKS = 32


def to_output(again: Contraction, form: Form, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """y of (1)."""
    m = _merged(form)
    pairs = zip(_split(form, m, x), _split(form, m, _widened(form, m, kernel)), strict=True)
    return jnp.concatenate([again(_block(form, m), x_, w_) for x_, w_ in pairs], -1)


def to_input(again: Contraction, form: Form, kernel: jax.Array, ȳ: jax.Array) -> jax.Array:
    """x̄ of (2)."""
    m = _merged(form)
    pairs = zip(_split(form, m, _widened(form, m, kernel)), _split(form, m, ȳ), strict=True)
    return jnp.concatenate([again(_block(form, m), w_, ȳ_) for w_, ȳ_ in pairs], -1)


def to_kernel(again: Contraction, form: Form, x: jax.Array, ȳ: jax.Array) -> jax.Array:
    """w̄ of (3)."""
    m, axes = _merged(form, KERNEL_WIDTH), len(form.window)
    W̄s = []
    for x_, ȳ_ in zip(_split(form, m, x), _split(form, m, ȳ), strict=True):
        W̄ = again(_block(form, m), x_, ȳ_).reshape(*form.window, m, form.near, m, form.far)
        W̄ = jnp.diagonal(W̄, axis1=axes, axis2=axes + 2)  # (*K, I', O', m)
        W̄s.append(W̄.swapaxes(-1, -2).reshape(*form.window, form.near, -1))
    return jnp.concatenate(W̄s, -1)


def _merged(form: Form, width: int = WIDTH) -> int:
    """Groups in a block: as many as the width holds, or more where there would be too many blocks."""
    g = form.geometry.groups
    fits = max(1, width // min(form.near, form.far), -(-g // BLOCKS))
    return max(m for m in range(1, min(fits, g) + 1) if g % m == 0)


def _block(form: Form, m: int) -> Form:
    return form._replace(geometry=form.geometry._replace(groups=1), near=m * form.near, far=m * form.far)


def _split(form: Form, m: int, a: jax.Array) -> list[jax.Array]:
    return jnp.split(a, form.geometry.groups // m, -1)


def _widened(form: Form, m: int, kernel: jax.Array) -> jax.Array:
    """(*K, I', g O') to the kernels W of the blocks side by side, (*K, m I', g O')."""
    if m == 1:
        return kernel
    w = kernel.reshape(*form.window, 1, form.near, -1, m, form.far)
    W = jnp.where(jnp.eye(m, dtype=bool)[:, None, None, :, None], w, jnp.zeros((), kernel.dtype))
    return W.reshape(*form.window, m * form.near, -1)
