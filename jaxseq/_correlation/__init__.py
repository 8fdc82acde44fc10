"""Convolution as a trilinear form <ȳ, C(x, w)>: its three contractions, and the choice of a rule for each.

Let b be the batch, i an input channel, o an output channel, n an output position, m an input position and k a tap.
Positions and taps stand for one index per spatial axis, with the geometry of `_geometry.py`:

    y[b, n, o] = sum_{k, i}  x[b, s n + d k - lo, i]  w[k, i, o]                              (1)

x is zero outside its bounds. (1) is linear in x and in w, so both pullbacks follow from the scalar <ȳ, y>.

Input cotangent. Collect the terms of <ȳ, y> that contain x[b, m, i]:

    x̄[b, m, i] = sum_{n, k, o : s n + d k - lo = m}  ȳ[b, n, o]  w[k, i, o]                    (2)

Insert s - 1 zeros between the elements of ȳ, so that ỹ[s n] = ȳ[n], and reverse the kernel, k = K - 1 - j. The
constraint becomes  s n = m + d j - (d (K - 1) - lo),  so

    x̄[b, m, i] = sum_{j, o}  ỹ[b, m + d j - lo', o]  w[K - 1 - j, i, o],    lo' = d (K - 1) - lo

which is (1) with stride 1, dilation d and left padding lo', on an input dilated by s, with the kernel reversed and the
channels exchanged. The right padding hi' makes the output size I (solve the formula for O):
hi' = I + d (K - 1) - ((O - 1) s + 1) - lo'.

Kernel cotangent. Collect the terms that contain w[k, i, o]:

    w̄[k, i, o] = sum_{b, n}  x[b, d k + s n - lo, i]  ȳ[b, n, o]                               (3)

which is (1) again, with k as the output position, n as the tap and the batch as the contracted channel: ȳ is the
kernel, and stride and dilation are exchanged. The left padding stays lo. The right padding
hi'' = d (K - 1) + s (O - 1) + 1 - I - lo makes the output size K.

Groups. With g groups, channel i = (γ, i') and o = (γ, o'), where γ is the group, (1) to (3) hold within each group. The
kernel is stored as w[k, i', (γ, o')]. (2) needs w[k, o', (γ, i')], so it exchanges i' and o' within each group. (3)
contracts x and ȳ group by group.

`conv` computes (1), and (2) and (3) in its backward pass. `conv_transpose` computes (2), and (1) and (3) in its
backward pass. All three contractions return the accumulator's dtype.

Rules. Each rule computes the three contractions in one way (`Rule` in `_rule.py`). `choose` selects a rule from what is
known about the form when it is traced, and says why. The numbers are in `jaxseq/tuning.py`, and their measurements
in docs/measured-convolution.md.

    `_shifts`    few channels per group: sums of shifted products, one term per tap and pair of channels; (3) on CPUs
                 only, because it is a reduction for each term
    `_patches`   receptive fields that do not overlap along some axis: a smaller form, or a product
    `_spectrum`  large kernels: products of Fourier transforms (spectra)
    `_blocks`    groups: merged into wider blocks, one dense convolution per block                      CPU only
    `_loop`      depthwise with few outputs, or groups with the method "direct": a loop over taps       CPU only
    `_planes`    three axes: the taps of the first unrolled, a convolution over the other two for each  CPU only
    `_taps`      a mesh axis that may be idle, over which XLA partitions its convolution incorrectly: a product per tap
    `_xla`       everything else: XLA's convolution, with (2) and (3) written in the form of (1)

`_blocks`, `_loop` and `_planes` avoid slow paths of XLA's CPU backend. Other platforms have their own libraries for
these convolutions. `_patches`, `_blocks` and `_planes` reduce a form to smaller ones, for which a rule is chosen again.
"""

from typing import Any

import jax

from jaxseq._correlation._choose import RULES, Choice, choose
from jaxseq._correlation._form import Backend, Contraction, Form
from jaxseq._correlation._rule import Rule, contract
from jaxseq._geometry import Geometry

__all__ = [
    "RULES",
    "Backend",
    "Choice",
    "Contraction",
    "Form",
    "Rule",
    "choose",
    "contract",
    "to_input",
    "to_kernel",
    "to_output",
]

# x (N, *I, C_in), kernel (*K, C_in/g, C_out), y (N, *O, C_out)


def to_output(
    geometry: Geometry, precision: Any, x: jax.Array, kernel: jax.Array, outputs: tuple[int, ...]
) -> jax.Array:
    """Return y of (1), of spatial size `outputs`."""
    out_channels = kernel.shape[-1] // geometry.groups
    form = Form(geometry, precision, x.shape[1:-1], outputs, kernel.shape[:-2], kernel.shape[-2], out_channels)
    return contract(Contraction.TO_OUTPUT, form, x, kernel)


def to_input(
    geometry: Geometry, precision: Any, kernel: jax.Array, y_bar: jax.Array, space: tuple[int, ...]
) -> jax.Array:
    """Return x̄ of (2), for an input of spatial size `space`."""
    in_channels, out_channels = kernel.shape[-2], kernel.shape[-1] // geometry.groups
    form = Form(geometry, precision, space, y_bar.shape[1:-1], kernel.shape[:-2], in_channels, out_channels)
    return contract(Contraction.TO_INPUT, form, kernel, y_bar)


def to_kernel(
    geometry: Geometry, precision: Any, x: jax.Array, y_bar: jax.Array, kernel_size: tuple[int, ...]
) -> jax.Array:
    """Return w̄ of (3), for a kernel of spatial size `kernel_size`."""
    in_channels, out_channels = x.shape[-1] // geometry.groups, y_bar.shape[-1] // geometry.groups
    form = Form(geometry, precision, x.shape[1:-1], y_bar.shape[1:-1], kernel_size, in_channels, out_channels)
    return contract(Contraction.TO_KERNEL, form, x, y_bar)
