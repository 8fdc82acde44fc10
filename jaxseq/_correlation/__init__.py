"""The trilinear form of a convolution, <ȳ, C(x, w)>, the three contractions that read off it, and by which rule.

With batch b, input channel i, output channel o, output position n, input position m and tap k, each
position and tap standing for one index per spatial axis (the geometry of `_geometry.py`):

    y[b, n, o] = sum_{k, i}  x[b, s n + d k - lo, i]  w[k, i, o]                              (1)

x is zero outside its bounds. (1) is linear in x and in w, so both pullbacks read off the scalar <ȳ, y>.

To the input. Collect the terms of <ȳ, y> that hold x[b, m, i]:

    x̄[b, m, i] = sum_{n, k, o : s n + d k - lo = m}  ȳ[b, n, o]  w[k, i, o]                    (2)

Spread ȳ out by the stride, ỹ[s n] = ȳ[n] and zero in between, and turn the window round,
k = K - 1 - j. The constraint becomes  s n = m + d j - (d (K - 1) - lo),  so

    x̄[b, m, i] = sum_{j, o}  ỹ[b, m + d j - lo', o]  w[K - 1 - j, i, o],    lo' = d (K - 1) - lo

which is (1) with stride 1, dilation d, left padding lo', on an input dilated by s, with the window
reversed and the channels exchanged. The right padding hi' is what gives I outputs (the formula for O,
solved): hi' = I + d (K - 1) - ((O - 1) s + 1) - lo'.

To the kernel. Collect the terms that hold w[k, i, o]:

    w̄[k, i, o] = sum_{b, n}  x[b, d k + s n - lo, i]  ȳ[b, n, o]                               (3)

which is (1) again with k in the role of the output position, n in that of the tap, the batch in that of
the contracted channel: ȳ is the window, and stride and dilation have changed places. The left padding
stays lo; hi'' = d (K - 1) + s (O - 1) + 1 - I - lo gives K outputs.

Groups. With g groups, channel i = (γ, i') and o = (γ, o'), γ the group: (1) to (3) hold in each group.
The kernel is stored w[k, i', (γ, o')]; (2) needs w[k, o', (γ, i')], an exchange of i' and o' within each
group; (3) contracts x and ȳ group by group.

`conv` computes (1) and pulls back by (2) and (3); `conv_transpose` computes (2) and pulls back by (1) and (3).
All three come in the accumulator's dtype.

Rules. Each file here computes the three in one way, and `choose` says which way by what is known of the form when it
is traced. docs/measured.md has the measurements.

    `_shifts`    few channels in each group: sums of shifted products, one term for each tap and pair of channels
    `_patches`   windows that do not overlap along some axis: a smaller form, or a product
    `_spectrum`  long windows: products of spectra
    `_blocks`    groups: merged to blocks of some width, then one dense convolution for each block         on CPU
    `_loop`      depthwise with few outputs for the window, groups by the method "direct": loop over taps   on CPU
    `_planes`    three axes: the taps of the first written out, each a convolution over the other two      on CPU
    `_xla`       all others: XLA's convolution, (2) and (3) in the form of (1)

The three before the last mend what XLA's CPU backend does with such convolutions. Other devices have libraries of their
own for them.
"""

from functools import partial
from math import log2, prod
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxseq import _precision, _sharding
from jaxseq._correlation import _blocks, _loop, _patches, _planes, _shifts, _spectrum, _xla
from jaxseq._correlation._form import Form, padded
from jaxseq._geometry import Geometry, extent

# The most terms that are written out, taps x pairs of channels. Depthwise windows in ms, two cores, (4, 1024, 64):
# taps                 31    48    64    96   128
# to_output  shifts   0.6   1.6   1.4   3.4    22
#            spectrum 1.7   3.9   3.5   2.8   2.4
# to_input   shifts   0.9   1.2   1.7   2.9    20
#            spectrum 2.4   3.4   2.2   2.5   2.9
# to_kernel  shifts   1.3   3.3   3.4   3.9   3.6
#            spectrum 4.1   4.9   2.9   2.7   2.2
TERMS = 64
# The most work of a loop over the taps of a depthwise window, K O for P log2 P of the spectra.
LOOP = {"to_output": 4, "to_input": 4, "to_kernel": 1.5}
# The fewest taps, and the most outputs of all groups, at which that loop beats terms that are written out in gradients:
# us, one thread                         shifts  patches  loop
# to_input   57 taps, 2 x 128 outputs       454             99
# to_kernel  57 taps, 2 x 128 outputs       184             63
# to_kernel  60 taps, 3 x 64 outputs        224      154    52
SHORT = {"to_input": 32, "to_kernel": 10}
FEW_NUMBERS = 2**12
# The most outputs, and the most taps, at which it beats one product and sum over a window that covers the input: XLA
# exchanges the axes of these. 128 taps, 128 channels: to_output 59 us and 152, to_kernel 20 and 60.
WHOLE, WHOLE_TAPS = 2, 256
# From how many groups on their vectors of one channel a group pay, where a group has several.
LANES = 8
# The most outputs at which groups whose windows do not overlap are faster as patches than as blocks, and at which XLA
# is faster than either from so large a kernel on, in elements, weighted by O' / I': the others exchange its axes.
# us, one thread                                             patches  blocks    XLA
# to_kernel  16 groups, 31 x 9 taps, 3 to 32,   1 output         573    3950  13801
# to_output                                                      572    1166    234
# to_output   8 groups, 4 x 8 x 3 taps, 3 to 64, 1 output         137     852    200
# to_output   4 groups, 4 x 4 taps, 16 to 8, 432 outputs         784     545    684
FEW_PATCHES, SINGLE, LARGE = 128, 4, 2**18
# Taps for each output, in lengths of the transform, from which on the spectrum wins where channels are contracted:
# at (4, 1024, 64 to 64) with 128 taps 39, 60 and 84 ms, XLA 32, 58 and 65; with 16 to 16 channels 2.9, 2.8 and 3.2,
# XLA 8.1, 6.0 and 5.9.
LONG = 192
# The most taps of the first of three axes that are written out.
PLANES = 16


def choose(which: str, form: Form, cpu: bool = True) -> ModuleType:
    """The rule for one of the three contractions of a form, on CPU or elsewhere."""
    if not form.is_known():  # the others write out as many terms, or as long a transform, as the sizes say
        return _xla
    if form.in_channels * form.out_channels == 1:
        return _for_one_channel(which, form, cpu) or _for_channels(which, form, cpu)
    if form.geometry.groups > 1:
        return _for_groups(which, form, cpu) or _for_channels(which, form, cpu)
    return _for_channels(which, form, cpu)


def _for_one_channel(which: str, form: Form, cpu: bool) -> ModuleType | None:
    """For one input and one output channel in each group."""
    taps, outputs, groups = prod(form.window), prod(form.outputs), form.geometry.groups
    whole, direct = all(_patches.disjoint(form)), form.geometry.method == "direct"
    loop = cpu and not (which == "to_kernel" and form.geometry.partitioning.implicit)  # a sum over devices for each tap
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
    """For several groups of several channels."""
    taps, outputs, groups, pairs = (
        prod(form.window),
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
    """For channels that are contracted, and what the others leave."""
    taps, axes, disjoint = prod(form.window), len(form.window), _patches.disjoint(form)
    grouped, direct = form.geometry.groups > 1 and cpu, form.geometry.method == "direct"
    if not grouped and all(disjoint) and prod(form.outputs) == 1:  # one product of matrices
        return _patches
    if not direct and _spectrum_is_short(form):
        return _spectrum
    xla_is_fast = which == "to_output" and axes < 3 and taps > 1 and not grouped
    if any(disjoint) and not (xla_is_fast and _patches.xla_differentiates(form)):
        return _patches
    if cpu and axes == 3 and form.window[0] <= PLANES:
        return _planes
    return _xla


def _spectrum_is_short(form: Form) -> bool:
    """True if the transform takes less work than the window, where channels are contracted."""
    return prod(form.window) * prod(form.outputs) >= LONG * prod(_spectrum.positions(form))


def _loop_is_short(which: str, form: Form) -> bool:
    """True if a loop over the taps of a depthwise window takes less work than a Fourier transform of the positions.

    The loop's is K products for each output asked for. A term of (2) has the zeros between outputs as well.
    """
    positions = prod(_spectrum.positions(form))
    sizes = [extent(O, s) if which == "to_input" else O for _, O, _, s, *_ in form.axes()]
    return prod(form.window) * prod(sizes) <= LOOP[which] * positions * log2(max(2, positions))


# x (N, *I, C_in), kernel (*K, C_in/g, C_out), y (N, *O, C_out)


def to_output(
    geometry: Geometry, precision: Any, x: jax.Array, kernel: jax.Array, outputs: tuple[int, ...]
) -> jax.Array:
    """y of (1), of size `outputs`."""
    out_channels = kernel.shape[-1] // geometry.groups
    form = Form(geometry, precision, x.shape[1:-1], outputs, kernel.shape[:-2], kernel.shape[-2], out_channels)
    if not _any_product(form, x, kernel):
        return _zeros((x.shape[0], *outputs, kernel.shape[-1]), x, kernel)
    form, beyond, unused = _in_reach(form)
    return _padded(_contract("to_output", form, x, _cropped(kernel, unused, 0)), beyond, 1)


def to_input(
    geometry: Geometry, precision: Any, kernel: jax.Array, y_bar: jax.Array, space: tuple[int, ...]
) -> jax.Array:
    """x̄ of (2), for an input of size `space`."""
    in_channels, out_channels = kernel.shape[-2], kernel.shape[-1] // geometry.groups
    form = Form(geometry, precision, space, y_bar.shape[1:-1], kernel.shape[:-2], in_channels, out_channels)
    if not _any_product(form, kernel, y_bar):
        return _zeros((y_bar.shape[0], *space, in_channels * geometry.groups), kernel, y_bar)
    form, beyond, unused = _in_reach(form)
    return _contract("to_input", form, _cropped(kernel, unused, 0), _cropped(y_bar, beyond, 1))


def to_kernel(geometry: Geometry, precision: Any, x: jax.Array, y_bar: jax.Array, window: tuple[int, ...]) -> jax.Array:
    """w̄ of (3), for a kernel of size `window`."""
    in_channels, out_channels = x.shape[-1] // geometry.groups, y_bar.shape[-1] // geometry.groups
    form = Form(geometry, precision, x.shape[1:-1], y_bar.shape[1:-1], window, in_channels, out_channels)
    if not _any_product(form, x, y_bar):
        return _zeros((*window, in_channels, y_bar.shape[-1]), x, y_bar)
    form, beyond, unused = _in_reach(form)
    return _padded(_contract("to_kernel", form, x, _cropped(y_bar, beyond, 1)), unused, 0)


Sides = list[tuple[int, int]]  # elements before and after, for each spatial axis


def _in_reach(form: Form) -> tuple[Form, Sides, Sides]:
    """The part of the form that reads the input, and the outputs and taps that do not."""
    return form.in_reach() if form.is_known() else (form, [], [])


def _cropped(a: jax.Array, sides: Sides, first: int) -> jax.Array:
    return padded(a, [(-before, -after, 0) for before, after in sides], first) if any(map(any, sides)) else a


def _padded(a: jax.Array, sides: Sides, first: int) -> jax.Array:
    return padded(a, [(before, after, 0) for before, after in sides], first) if any(map(any, sides)) else a


def _any_product(form: Form, a: jax.Array, b: jax.Array) -> bool:
    """False if the sums of all three contractions are empty."""
    return a.size != 0 and b.size != 0 and form.reaches()


def _zeros(shape: tuple[int, ...], a: jax.Array, b: jax.Array) -> jax.Array:
    zeros = jnp.zeros(shape, _precision.accumulator(_precision.promote(a, b)))
    return _sharding.align_varying((zeros, a, b))[0]


def _contract(which: str, form: Form, a: jax.Array, b: jax.Array) -> jax.Array:
    """One of the three, of operands a and b, by the rule for the form and the device."""
    common = _precision.promote(a, b)
    a, b = a.astype(common), b.astype(common)
    here, elsewhere = (choose(which, form, cpu) for cpu in (True, False))
    smaller = here is _patches and not all(_patches.disjoint(form))  # whose rule may depend on the device
    if here is elsewhere and not smaller:
        return _apply(here, which, form, a, b)
    cpu, default = (partial(_apply, rule, which, form, cpu=cpu) for rule, cpu in ((here, True), (elsewhere, False)))
    return lax.platform_dependent(a, b, cpu=cpu, default=default)


def _apply(rule: ModuleType, which: str, form: Form, a: jax.Array, b: jax.Array, cpu: bool = True) -> jax.Array:
    contraction = getattr(rule, which)
    if rule not in (_blocks, _patches, _planes):
        return contraction(form, a, b)

    def again(smaller: Form, a: jax.Array, b: jax.Array) -> jax.Array:
        return _apply(choose(which, smaller, cpu), which, smaller, a, b, cpu)

    return contraction(again, form, a, b)  # these make smaller forms of the same kind
