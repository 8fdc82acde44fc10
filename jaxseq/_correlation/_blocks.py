"""Groups merged into wider blocks, with one dense convolution per block.

A block consists of several adjacent groups. Its kernel W has the kernels of these groups on the diagonal and zeros off
it. With (μ, i') the channels of a block, μ the group within it,

    W[k, (μ, i'), (ν, o')] = w[k, i', (μ, o')]  if μ = ν,  else 0.

(1) and (2) are those of W, and w̄ is the diagonal of W̄. The number of products grows by the number of groups in a
block. Up to some width this is still faster than narrow products, and XLA's CPU backend is slower for a grouped
convolution than for one convolution per group: docs/measured-convolution.md.

A NaN or an infinity in one group reaches the other groups of its block.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxseq._correlation._form import Contraction, Form
from jaxseq._correlation._rule import Rule, by_chosen_rule


@dataclass(frozen=True)
class _Blocks(Rule):
    """One dense convolution per block of groups."""

    name = "blocks"
    backends = frozenset({"cpu"})

    def applies(self, which: Contraction, form: Form) -> bool:
        return form.is_known() and form.geometry.groups > 1 and form.geometry.method != "direct"

    def to_output(self, form: Form, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """Return y of (1)."""
        m, block = _merge_groups(form, form.tuning.block_width)
        contract = partial(by_chosen_rule, Contraction.TO_OUTPUT, block)
        return _block_by_block(contract, form, m, x, _widened(form, m, kernel))

    def to_input(self, form: Form, kernel: jax.Array, y_bar: jax.Array) -> jax.Array:
        """Return x̄ of (2)."""
        m, block = _merge_groups(form, form.tuning.block_width)
        contract = partial(by_chosen_rule, Contraction.TO_INPUT, block)
        return _block_by_block(contract, form, m, _widened(form, m, kernel), y_bar)

    def to_kernel(self, form: Form, x: jax.Array, y_bar: jax.Array) -> jax.Array:
        """Return w̄ of (3)."""
        m, block = _merge_groups(form, form.tuning.kernel_block_width)
        axes = len(form.kernel_size)

        def diagonal(x: jax.Array, y_bar: jax.Array) -> jax.Array:
            W_bar = by_chosen_rule(Contraction.TO_KERNEL, block, x, y_bar)
            W_bar = W_bar.reshape(*form.kernel_size, m, form.in_channels, m, form.out_channels)
            W_bar = jnp.diagonal(W_bar, axis1=axes, axis2=axes + 2)  # (*K, I', O', m)
            return W_bar.swapaxes(-1, -2).reshape(*form.kernel_size, form.in_channels, -1)

        return _block_by_block(diagonal, form, m, x, y_bar)


BLOCKS = _Blocks()


def _block_by_block(f: Callable[..., jax.Array], form: Form, m: int, a: jax.Array, b: jax.Array) -> jax.Array:
    """Concatenate `f` of the channels of each block: unrolled, or in a loop, which compiles `f` once."""
    blocks = form.geometry.groups // m
    if blocks <= form.tuning.unrolled_blocks:
        return jnp.concatenate([f(*pair) for pair in zip(*(jnp.split(c, blocks, -1) for c in (a, b)), strict=True)], -1)
    a, b = (jnp.moveaxis(c.reshape(*c.shape[:-1], blocks, c.shape[-1] // blocks), -2, 0) for c in (a, b))
    c = jnp.moveaxis(lax.map(lambda pair: f(*pair), (a, b)), 0, -2)
    return c.reshape(*c.shape[:-2], -1)


def _merge_groups(form: Form, width: int) -> tuple[int, Form]:
    """Return the number of groups in a block, and the form of one block.

    A block has as many groups as fit the width, or more to limit the number of blocks.
    """
    g = form.geometry.groups
    fits = max(1, width // min(form.in_channels, form.out_channels), -(-g // form.tuning.blocks))
    m = max(m for m in range(1, min(fits, g) + 1) if g % m == 0)
    geometry = form.geometry._replace(groups=1)
    return m, form._replace(geometry=geometry, in_channels=m * form.in_channels, out_channels=m * form.out_channels)


def _widened(form: Form, m: int, kernel: jax.Array) -> jax.Array:
    """Return the kernels W of all blocks, (*K, m I', g O'), for a kernel (*K, I', g O')."""
    if m == 1:
        return kernel
    w = kernel.reshape(*form.kernel_size, 1, form.in_channels, -1, m, form.out_channels)
    W = jnp.where(jnp.eye(m, dtype=bool)[:, None, None, :, None], w, jnp.zeros((), kernel.dtype))
    return W.reshape(*form.kernel_size, m * form.in_channels, -1)
