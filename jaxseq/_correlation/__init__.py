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

Rules. Each module of this package computes the three contractions in one way. `choose` selects a module from what is
known about the form when it is traced. docs/measured-convolution.md has the measurements.

    `_shifts`    few channels per group: sums of shifted products, one term per tap and pair of channels
    `_patches`   receptive fields that do not overlap along some axis: a smaller form, or a product
    `_spectrum`  large kernels: products of Fourier transforms (spectra)
    `_blocks`    groups: merged into wider blocks, one dense convolution per block                      CPU only
    `_loop`      depthwise with few outputs, or groups with the method "direct": a loop over taps       CPU only
    `_planes`    three axes: the taps of the first unrolled, a convolution over the other two for each  CPU only
    `_xla`       everything else: XLA's convolution, with (2) and (3) written in the form of (1)

`_blocks`, `_loop` and `_planes` avoid slow paths of XLA's CPU backend. Other platforms have their own libraries for
these convolutions.
"""

from collections.abc import Sequence
from functools import partial
from math import log2, prod
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxseq import _mesh, _precision
from jaxseq._correlation import _blocks, _loop, _patches, _planes, _shifts, _spectrum, _xla
from jaxseq._correlation._form import Contraction, Form, padded
from jaxseq._geometry import Geometry, extent

# The reason for each constant is stated here. docs/measured-convolution.md has the measurements.

# Maximum number of terms that `_shifts` unrolls, taps x pairs of channels. The times of `_shifts` and `_spectrum` cross
# between 48 and 96 taps.
TERMS = 64
# Maximum work of `_loop` for a depthwise kernel, K O, as a multiple of the work P log2 P of a Fourier transform.
LOOP = {"to_output": 4, "to_input": 4, "to_kernel": 1.5}
# Minimum number of taps, and maximum number of outputs over all groups, at which `_loop` beats `_shifts` in gradients.
# It is 3 to 5 times as fast there.
SHORT = {"to_input": 32, "to_kernel": 10}
FEW_NUMBERS = 2**12
# Maximum number of outputs and of taps at which `_loop` beats `_patches` for a depthwise kernel that covers the input.
# XLA transposes the operands of the latter.
WHOLE, WHOLE_TAPS = 2, 256
# Minimum number of groups at which `_shifts` pays off for groups of several channels. Its vectors have one element per
# group.
LANES = 8
# Groups with disjoint receptive fields: `_patches` beats `_blocks` up to FEW_PATCHES outputs. Up to SINGLE outputs, XLA
# computes the output faster than either if the kernel has at least LARGE elements, weighted by O' / I': the others
# transpose it.
FEW_PATCHES, SINGLE, LARGE = 128, 4, 2**18
# Minimum ratio of taps x outputs to padded positions at which `_spectrum` beats XLA where channels are contracted.
LONG = 192
# Maximum number of taps along the first of three axes that `_planes` unrolls.
PLANES = 16


def choose(which: str, form: Form, cpu: bool = True) -> ModuleType:
    """Return the rule for one of the three contractions of a form, on CPU or on another platform."""
    if not form.is_known():  # the other rules unroll loops or choose a transform length by the sizes
        return _xla
    if form.in_channels * form.out_channels == 1:
        return _for_one_channel(which, form, cpu) or _for_channels(which, form, cpu)
    if form.geometry.groups > 1:
        return _for_groups(which, form, cpu) or _for_channels(which, form, cpu)
    return _for_channels(which, form, cpu)


def _for_one_channel(which: str, form: Form, cpu: bool) -> ModuleType | None:
    """Return the rule for one input and one output channel per group. None leaves the choice to `_for_channels`."""
    taps, outputs, groups = prod(form.kernel_size), prod(form.outputs), form.geometry.groups
    whole, direct = all(_patches.disjoint(form)), form.geometry.method == "direct"
    # Over partitioned arrays, each tap of (3) would need a sum over devices.
    loop = cpu and not (which == "to_kernel" and form.geometry.partitioning.implicit)
    if whole and (which != "to_output" or taps > TERMS):
        few = outputs <= WHOLE and SHORT["to_kernel"] <= taps <= WHOLE_TAPS
        return _loop if loop and few and which != "to_input" else _patches
    if loop and which in SHORT and SHORT[which] <= taps <= TERMS and outputs * groups <= FEW_NUMBERS:
        return _loop
    if taps <= TERMS:
        return _shifts
    if loop and _loop_is_short(which, form):
        return _loop
    if not direct:
        return _spectrum
    return _loop if groups > 1 and cpu and not whole else None


def _for_groups(which: str, form: Form, cpu: bool) -> ModuleType | None:
    """Return the rule for several groups of several channels. None leaves the choice to `_for_channels`."""
    taps, outputs, groups, pairs = (
        prod(form.kernel_size),
        prod(form.outputs),
        form.geometry.groups,
        form.in_channels * form.out_channels,
    )
    disjoint, direct = _patches.disjoint(form), form.geometry.method == "direct"
    weight = taps * pairs * groups * max(1, form.out_channels / form.in_channels)
    if cpu and which == "to_output" and outputs <= SINGLE and weight >= LARGE:
        return _xla
    if cpu and all(disjoint) and outputs <= FEW_PATCHES:
        return _patches
    if taps * pairs <= TERMS and groups >= LANES:
        return _shifts
    if not direct and _spectrum_is_short(form):
        return _spectrum
    if cpu and direct and not all(disjoint):
        return _loop
    return _blocks if cpu and not direct and all(disjoint) == any(disjoint) else None


def _for_channels(which: str, form: Form, cpu: bool) -> ModuleType:
    """Return the rule for contracted channels, and for the forms that the other two functions do not handle."""
    taps, axes, disjoint = prod(form.kernel_size), len(form.kernel_size), _patches.disjoint(form)
    grouped, direct = form.geometry.groups > 1 and cpu, form.geometry.method == "direct"
    if not grouped and all(disjoint) and prod(form.outputs) == 1:  # a single matrix product
        return _patches
    if not direct and _spectrum_is_short(form):
        return _spectrum
    xla_is_fast = which == "to_output" and axes < 3 and taps > 1 and not grouped
    if any(disjoint) and not (xla_is_fast and _patches.xla_differentiates(form)):
        return _patches
    if cpu and axes == 3 and form.kernel_size[0] <= PLANES:
        return _planes
    return _xla


def _spectrum_is_short(form: Form) -> bool:
    """Return True if the transform needs less work than the direct sum, where channels are contracted."""
    return prod(form.kernel_size) * prod(form.outputs) >= LONG * prod(_spectrum.positions(form))


def _loop_is_short(which: str, form: Form) -> bool:
    """Return True if a loop over the taps of a depthwise kernel needs less work than a Fourier transform.

    The loop computes K products per element of the result. In (2), the zeros between outputs count as well.
    """
    positions = prod(_spectrum.positions(form))
    sizes = [extent(O, s) if which == "to_input" else O for _, O, _, s, *_ in form.axes()]
    return prod(form.kernel_size) * prod(sizes) <= LOOP[which] * positions * log2(max(2, positions))


# x (N, *I, C_in), kernel (*K, C_in/g, C_out), y (N, *O, C_out)


def to_output(
    geometry: Geometry, precision: Any, x: jax.Array, kernel: jax.Array, outputs: tuple[int, ...]
) -> jax.Array:
    """Return y of (1), of spatial size `outputs`."""
    out_channels = kernel.shape[-1] // geometry.groups
    form = Form(geometry, precision, x.shape[1:-1], outputs, kernel.shape[:-2], kernel.shape[-2], out_channels)
    return _contract("to_output", form, x, kernel, (x.shape[0], *outputs, kernel.shape[-1]))


def to_input(
    geometry: Geometry, precision: Any, kernel: jax.Array, y_bar: jax.Array, space: tuple[int, ...]
) -> jax.Array:
    """Return x̄ of (2), for an input of spatial size `space`."""
    in_channels, out_channels = kernel.shape[-2], kernel.shape[-1] // geometry.groups
    form = Form(geometry, precision, space, y_bar.shape[1:-1], kernel.shape[:-2], in_channels, out_channels)
    return _contract("to_input", form, kernel, y_bar, (y_bar.shape[0], *space, in_channels * geometry.groups))


def to_kernel(
    geometry: Geometry, precision: Any, x: jax.Array, y_bar: jax.Array, kernel_size: tuple[int, ...]
) -> jax.Array:
    """Return w̄ of (3), for a kernel of spatial size `kernel_size`."""
    in_channels, out_channels = x.shape[-1] // geometry.groups, y_bar.shape[-1] // geometry.groups
    form = Form(geometry, precision, x.shape[1:-1], y_bar.shape[1:-1], kernel_size, in_channels, out_channels)
    return _contract("to_kernel", form, x, y_bar, (*kernel_size, in_channels, y_bar.shape[-1]))


def _contract(which: str, form: Form, a: jax.Array, b: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Compute one contraction, whose result has this shape. It is zero if no tap of any output reads an input."""
    common = _precision.promote(a, b)
    if a.size == 0 or b.size == 0 or not form.reaches():
        zeros = jnp.zeros(shape, _precision.accumulator(common))
        return _mesh.align_varying((zeros, a, b))[0]
    return within_reach(partial(_by_chosen_rule, which), which, form, a.astype(common), b.astype(common))


def within_reach(contract: Contraction, which: str, form: Form, a: jax.Array, b: jax.Array) -> jax.Array:
    """Return `contract(form, a, b)`, computed without the outputs and taps that read padding only.

    Crop them from the operands, and pad the result with zeros.
    """
    if not form.is_known():
        return contract(form, a, b)
    form, outputs, taps = form.in_reach()
    x, w, y = ([], 1), (taps, 0), (outputs, 1)
    first, second, result = {"to_output": (x, w, y), "to_input": (w, y, x), "to_kernel": (x, y, w)}[which]
    return _resize(contract(form, _resize(a, *first, sign=-1), _resize(b, *second, sign=-1)), *result, sign=1)


def _resize(a: jax.Array, sides: Sequence[tuple[int, int]], first: int, *, sign: int) -> jax.Array:
    """Pad (sign 1) or crop (sign -1) the axes from `first` on by (before, after)."""
    if not any(map(any, sides)):
        return a
    return padded(a, [(sign * before, sign * after, 0) for before, after in sides], first)


def _by_chosen_rule(which: str, form: Form, a: jax.Array, b: jax.Array) -> jax.Array:
    """Compute one contraction by the rule for the form and the platform."""
    on_cpu, elsewhere = (choose(which, form, cpu) for cpu in (True, False))
    # The rule for the smaller form that `_patches` makes may depend on the platform.
    has_smaller_form = on_cpu is _patches and not all(_patches.disjoint(form))
    if on_cpu is elsewhere and not has_smaller_form:
        return _apply(on_cpu, which, form, a, b)
    cpu, default = (partial(_apply, rule, which, form, cpu=cpu) for rule, cpu in ((on_cpu, True), (elsewhere, False)))
    return lax.platform_dependent(a, b, cpu=cpu, default=default)


def _apply(rule: ModuleType, which: str, form: Form, a: jax.Array, b: jax.Array, cpu: bool = True) -> jax.Array:
    contraction = getattr(rule, which)
    if rule not in (_blocks, _patches, _planes):
        return contraction(form, a, b)

    def recurse(smaller: Form, a: jax.Array, b: jax.Array) -> jax.Array:
        return _apply(choose(which, smaller, cpu), which, smaller, a, b, cpu)

    return contraction(recurse, form, a, b)  # these rules reduce the form to smaller ones
