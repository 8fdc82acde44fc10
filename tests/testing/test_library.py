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


# Under which the backward sweep of a recurrence goes each of its ways.
WAYS = ("plain", "truncation, reverse", "checkpoint, windows that reach back", "lengths, resets, reverse", "drop, hold")


def later(name, label):
    if name == "lstm":
        return label not in WAYS
    return name in DERIVED or (name not in FAMILIES and (name, label) not in FIRST)


@pytest.mark.parametrize(("name", "label"), [p for p in GRID if not later(*p.values)])
def test_every_check_passes(name, label):
    """Those of the others are among all checks, below."""
    level = "full" if name != "lstm" and name in FAMILIES and (name, label) in FIRST else "quick"
    passes(session(name, label)(level=level), len(_check.FULL if level == "full" else _check.QUICK), name, label)


@pytest.mark.long
@pytest.mark.parametrize(("name", "label"), GRID)
def test_every_check_passes_at_several_seeds(name, label):
    """All checks for the variants of ops that own a rule and for the first variant of the others; several seeds for the
    convolutions, which compile fast, and for the first variant of each recurrence.
    """
    report, first = session(name, label), (name, label) in FIRST
    full = first or name in FAMILIES
    thorough = name in ("conv", "causal_conv") or (first and name in ("rnn", "gru", "lstm"))
    for seed in range(4 if thorough else 1):
        level = "full" if full else "quick"
        passes(report(seed, level), len(_check.FULL if full else _check.QUICK), name, label)


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


@pytest.mark.parametrize(("name", "label"), long_where(WHOLE, lambda *which: which[0] in DERIVED or which not in FIRST))
def test_forward_mode_of_every_twin(name, label, key):
    """The way out that ops point to. A truncated gradient is none of forward mode's."""
    variant = CASES[name].variants[label]
    check_jvp(bound(name, label, twin=True), variant.arguments(key), level="quick").raise_if_failed(True)
