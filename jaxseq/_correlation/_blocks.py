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

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxseq._correlation._form import Contraction, Form

# Channels of a block on its narrower side, for (1) and (2) and for (3), the most blocks, and the most that are written
# out: over three axes each of them is several convolutions, and 32 blocks took 22 s to compile.
WIDTH, KERNEL_WIDTH = 16, 32
BLOCKS, WRITTEN = 32, 8


def to_output(again: Contraction, form: Form, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """y of (1)."""
    m = _merged(form)
    return _block_by_block(partial(again, _block(form, m)), form, m, x, _widened(form, m, kernel))


def to_input(again: Contraction, form: Form, kernel: jax.Array, y_bar: jax.Array) -> jax.Array:
    """x̄ of (2)."""
    m = _merged(form)
    return _block_by_block(partial(again, _block(form, m)), form, m, _widened(form, m, kernel), y_bar)


def to_kernel(again: Contraction, form: Form, x: jax.Array, y_bar: jax.Array) -> jax.Array:
    """w̄ of (3)."""
    m, axes = _merged(form, KERNEL_WIDTH), len(form.window)

    def diagonal(x: jax.Array, y_bar: jax.Array) -> jax.Array:
        W_bar = again(_block(form, m), x, y_bar).reshape(*form.window, m, form.in_channels, m, form.out_channels)
        W_bar = jnp.diagonal(W_bar, axis1=axes, axis2=axes + 2)  # (*K, I', O', m)
        return W_bar.swapaxes(-1, -2).reshape(*form.window, form.in_channels, -1)

    return _block_by_block(diagonal, form, m, x, y_bar)


def _block_by_block(f: Callable[..., jax.Array], form: Form, m: int, a: jax.Array, b: jax.Array) -> jax.Array:
    """f of the channels of each block, side by side: written out, or in a loop, which compiles once."""
    blocks = form.geometry.groups // m
    if blocks <= WRITTEN:
        return jnp.concatenate([f(*pair) for pair in zip(*(jnp.split(c, blocks, -1) for c in (a, b)), strict=True)], -1)
    a, b = (jnp.moveaxis(c.reshape(*c.shape[:-1], blocks, c.shape[-1] // blocks), -2, 0) for c in (a, b))
    c = jnp.moveaxis(lax.map(lambda pair: f(*pair), (a, b)), 0, -2)
    return c.reshape(*c.shape[:-2], -1)


def _merged(form: Form, width: int = WIDTH) -> int:
    """Groups in a block: as many as the width holds, or more where there would be too many blocks."""
    g = form.geometry.groups
    fits = max(1, width // min(form.in_channels, form.out_channels), -(-g // BLOCKS))
    return max(m for m in range(1, min(fits, g) + 1) if g % m == 0)


def _block(form: Form, m: int) -> Form:
    return form._replace(
        geometry=form.geometry._replace(groups=1), in_channels=m * form.in_channels, out_channels=m * form.out_channels
    )


def _widened(form: Form, m: int, kernel: jax.Array) -> jax.Array:
    """(*K, I', g O') to the kernels W of the blocks side by side, (*K, m I', g O')."""
    if m == 1:
        return kernel
    w = kernel.reshape(*form.window, 1, form.in_channels, -1, m, form.out_channels)
    W = jnp.where(jnp.eye(m, dtype=bool)[:, None, None, :, None], w, jnp.zeros((), kernel.dtype))
    return W.reshape(*form.window, m * form.in_channels, -1)
