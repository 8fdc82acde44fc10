"""The choice of a rule for each contraction, from what is known about the form when it is traced.

The numbers are those of `jaxseq/tuning.py`.
"""

from math import log2, prod
from typing import NamedTuple

from jaxseq._correlation import _patches
from jaxseq._correlation._blocks import BLOCKS
from jaxseq._correlation._form import Backend, Contraction, Form
from jaxseq._correlation._loop import LOOP
from jaxseq._correlation._patches import PATCHES
from jaxseq._correlation._planes import PLANES
from jaxseq._correlation._rule import Rule
from jaxseq._correlation._shifts import SHIFTS
from jaxseq._correlation._spectrum import SPECTRUM
from jaxseq._correlation._taps import TAPS
from jaxseq._correlation._xla import XLA
from jaxseq._geometry import extent

RULES: tuple[Rule, ...] = (SHIFTS, PATCHES, SPECTRUM, BLOCKS, LOOP, PLANES, TAPS, XLA)


class Choice(NamedTuple):
    """A rule, and why it was chosen."""

    rule: Rule
    reason: str


class _Facts(NamedTuple):
    """What the choice depends on."""

    taps: int
    outputs: int
    groups: int
    pairs: int  # of an input and an output channel of one group
    positions: int  # of the padded input
    disjoint: list[bool]  # for each axis, whether receptive fields do not overlap
    direct: bool  # no Fourier transforms, and no sums over several groups
    backend: Backend


def choose(which: Contraction, form: Form, backend: Backend) -> Choice:
    """Return the rule for one of the three contractions of a form, and the reason for it."""
    if form.is_known():
        facts = _Facts(
            taps=prod(form.kernel_size),
            outputs=prod(form.outputs),
            groups=form.geometry.groups,
            pairs=form.in_channels * form.out_channels,
            positions=prod(I + lo + hi for I, *_, (lo, hi) in form.axes()),
            disjoint=_patches.disjoint(form),
            direct=form.geometry.method == "direct",
            backend=backend,
        )
        choice = None
        if facts.pairs == 1:
            choice = _for_one_channel(which, form, facts)
        elif facts.groups > 1:
            choice = _for_groups(which, form, facts)
        choice = choice or _for_channels(which, form, facts)
    else:
        choice = Choice(XLA, "sizes are symbolic")
    if choice.rule is XLA and form.geometry.partitioning.idle_axes:
        return Choice(TAPS, "a mesh axis may be idle, over which XLA partitions its convolution incorrectly")
    return choice


def _for_one_channel(which: Contraction, form: Form, facts: _Facts) -> Choice | None:
    """Return the rule for one input and one output channel per group. None leaves the choice to `_for_channels`."""
    taps, outputs, tuning, whole = facts.taps, facts.outputs, form.tuning, all(facts.disjoint)
    # Over partitioned arrays, each tap of (3) would need a sum over devices.
    partitioned = which is Contraction.TO_KERNEL and form.geometry.partitioning.implicit
    loop = facts.backend in LOOP.backends and not partitioned
    if whole and (which is not Contraction.TO_OUTPUT or taps > tuning.terms):
        few = outputs <= tuning.whole_outputs and tuning.short_taps[Contraction.TO_KERNEL] <= taps <= tuning.whole_taps
        if loop and few and which is not Contraction.TO_INPUT:
            return Choice(LOOP, "one channel per group, and a kernel that covers the input")
        return Choice(PATCHES, "one channel per group, and receptive fields do not overlap")
    if loop and tuning.short_taps[which] <= taps <= tuning.terms and outputs * facts.groups <= tuning.short_outputs:
        return Choice(LOOP, "one channel per group, few outputs and many taps")
    if taps <= tuning.terms:
        if which is Contraction.TO_KERNEL and facts.backend != "cpu":
            return Choice(XLA, "elsewhere, shifts take a reduction for each tap")
        return Choice(SHIFTS, "one channel per group, and few taps")
    if loop and _loop_is_short(which, form, facts):
        return Choice(LOOP, "one channel per group, and less work than a Fourier transform")
    if not facts.direct:
        return Choice(SPECTRUM, "one channel per group, and many taps")
    if facts.groups > 1 and facts.backend in LOOP.backends and not whole:
        return Choice(LOOP, 'one channel per group, many taps, and method "direct"')
    return None


def _for_groups(which: Contraction, form: Form, facts: _Facts) -> Choice | None:
    """Return the rule for several groups of several channels. None leaves the choice to `_for_channels`."""
    taps, outputs, tuning, disjoint, cpu = (
        facts.taps,
        facts.outputs,
        form.tuning,
        facts.disjoint,
        facts.backend == "cpu",
    )
    weight = taps * facts.pairs * facts.groups * max(1, form.out_channels / form.in_channels)
    if cpu and which is Contraction.TO_OUTPUT and outputs <= tuning.single_outputs and weight >= tuning.large_kernel:
        return Choice(XLA, "groups, few outputs, and a large kernel that others transpose")
    if cpu and all(disjoint) and outputs <= tuning.patch_outputs:
        return Choice(PATCHES, "groups, few outputs, and receptive fields do not overlap")
    if taps * facts.pairs <= tuning.terms and facts.groups >= tuning.lanes:
        if which is Contraction.TO_KERNEL and not cpu:
            return Choice(XLA, "elsewhere, shifts take a reduction for each tap and pair of channels")
        return Choice(SHIFTS, "many groups of few channels, and few taps")
    if not facts.direct and taps * outputs >= tuning.long_kernel * facts.positions:
        return Choice(SPECTRUM, "a large kernel")
    if facts.direct and facts.backend in LOOP.backends and not all(disjoint):
        return Choice(LOOP, 'groups, and method "direct"')
    if not facts.direct and facts.backend in BLOCKS.backends and all(disjoint) == any(disjoint):
        return Choice(BLOCKS, "groups of few channels, which are merged")
    return None


def _for_channels(which: Contraction, form: Form, facts: _Facts) -> Choice:
    """Return the rule for contracted channels, and for the forms that the other two functions do not handle."""
    axes, disjoint, grouped = len(form.kernel_size), facts.disjoint, facts.groups > 1 and facts.backend == "cpu"
    if not grouped and all(disjoint) and facts.outputs == 1:
        return Choice(PATCHES, "a single output, which is one matrix product")
    if not facts.direct and facts.taps * facts.outputs >= form.tuning.long_kernel * facts.positions:
        return Choice(SPECTRUM, "a large kernel")
    xla_is_fast = which is Contraction.TO_OUTPUT and axes < 3 and facts.taps > 1 and not grouped
    if any(disjoint) and not (xla_is_fast and _patches.xla_differentiates(form)):
        return Choice(PATCHES, "receptive fields do not overlap along some axis")
    if facts.backend in PLANES.backends and axes == 3 and form.kernel_size[0] <= form.tuning.planes:
        return Choice(PLANES, "three axes")
    return Choice(XLA, "no faster rule is known")


def _loop_is_short(which: Contraction, form: Form, facts: _Facts) -> bool:
    """Return True if a loop over the taps of a depthwise kernel needs less work than a Fourier transform.

    The loop computes K products per element of the result. In (2), the zeros between outputs count as well.
    """
    sizes = [extent(O, s) if which is Contraction.TO_INPUT else O for _, O, _, s, *_ in form.axes()]
    work = facts.positions * log2(max(2, facts.positions))
    return facts.taps * prod(sizes) <= form.tuning.loop_work[which] * work
