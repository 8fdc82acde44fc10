"""Every op and variant of this library passes every check, and nothing is INCONCLUSIVE.

All checks of all variants at many points take minutes, and are for CI's second stage. Before that, the variants of
`conv` and `causal_conv` have to pass, some of `lstm`, for each family of rules, and the first of every other op that is
more than another of ours; all checks the first of `conv` and `causal_conv`, and the quick ones the others.
"""

import pytest
from helpers import DERIVED, GRID, OPS, bound, long_where

from jaxseq._cases import CASES
from jaxseq._verify import session
from jaxseq.testing import Verdict, _check, check_jvp


def passes(report, checks, name, label):
    """It passes, and as many checks ran as there are."""
    report.raise_if_failed(strict=True)
    ran = {result.check for result in report.results if result.verdict is Verdict.PASS}
    checks -= name == "scan"  # it has no rule of its own that could go astray: engagement
    checks -= any("no integers or booleans" in result.note for result in report.results)
    assert len(ran) == checks + ("truncation" in CASES[name].variants[label].options)


FIRST = [p.values for p in OPS]
FAMILIES = ("conv", "causal_conv", "lstm")


# The variants of each family under which its rules take another branch.
WAYS = {
    "lstm": (
        "plain",
        "truncation, reverse",
        "checkpoint, windows that reach back",
        "lengths, resets, reverse",
        "drop, hold",
    ),
    # One for each rule of the convolution.
    "conv": ("1d", "flipped, grouped", "depthwise", "2d depthwise, long", "grouped, direct", "one tap", "3d"),
    "causal_conv": ("plain", "depthwise", "resets", "resets, depthwise, dilated"),
}


def later(name, label):
    if name in WAYS:
        return label not in WAYS[name]
    return name in DERIVED or (name not in FAMILIES and (name, label) not in FIRST)


@pytest.mark.parametrize(("name", "label"), [p for p in GRID if not later(*p.values)])
def test_every_check_passes(name, label):
    """Those of the others are among all checks, below."""
    level = "full" if name != "lstm" and name in FAMILIES and (name, label) in FIRST else "quick"
    passes(session(name, label)(level=level), len(_check.FULL if level == "full" else _check.QUICK), name, label)


@pytest.mark.long
@pytest.mark.parametrize(("name", "label"), GRID)
def test_every_check_passes_at_several_seeds(name, label):
    """All checks for each branch of a rule and for the first variant of each op, at two seeds for the former."""
    report, branch = session(name, label), label in WAYS.get(name, ())
    full = branch or (name, label) in FIRST
    for seed in (1, 2) if branch else (1,):  # 0 is that of the test above
        passes(report(seed, "full" if full else "quick"), len(_check.FULL if full else _check.QUICK), name, label)


@pytest.mark.eight_devices
@pytest.mark.parametrize(
    ("name", "label"),
    long_where(
        [p for p in GRID if p.values in FIRST or p.values[0] in FAMILIES],
        lambda *which: which not in FIRST or which[0] not in ("conv", "causal_conv"),
    ),
)
def test_shard_map_over_two_devices(name, label):
    """What `composition` skips on one device."""
    report = session(name, label)(only=("composition",))
    report.raise_if_failed(strict=True)
    assert all(result.verdict is Verdict.PASS for result in report.results)
    conceded = [note for note in report.notes if "shard_map" in note]  # what other rules need
    if name == "scan":  # that of lax.scan: if xs vary over devices, the carry has to vary over them too
        assert all("scan body function carry input and carry output" in note for note in conceded)
    else:
        assert not conceded


WHOLE = [p for p in GRID if "truncation" not in CASES[p.values[0]].variants[p.values[1]].options]


@pytest.mark.parametrize(
    ("name", "label"), long_where(WHOLE, lambda *which: which not in FIRST or which[0] not in FAMILIES)
)
def test_forward_mode_of_every_twin(name, label, key):
    """The way out that ops point to. A truncated gradient is none of forward mode's."""
    variant = CASES[name].variants[label]
    check_jvp(bound(name, label, twin=True), variant.arguments(key), level="quick").raise_if_failed(True)
