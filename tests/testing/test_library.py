"""Variants of this library pass the checks, and nothing is INCONCLUSIVE.

The default suite runs the quick level on some variants, and all checks on one of `conv`. The long tests cover each
variant of `python -m jaxseq verify`, one for each rule and each branch of an engine, some of them with all checks.
`verify --level full` runs all checks on all variants. test_contract.py tests what every variant computes.
"""

import pytest
from helpers import GRID, OPS, bound, derived, long_where

from jaxseq._cases import CASES
from jaxseq._verify import session
from jaxseq.testing import Verdict, _check, check_jvp


def passes(report, checks, name, label):
    """Assert that the report passes, and that all checks ran."""
    report.raise_if_failed(strict=True)
    ran = {result.check for result in report.results if result.verdict is Verdict.PASS}
    checks -= name == "scan"  # scan has no custom_vjp rule, so `engagement` is skipped
    checks -= any("no argument has integers" in result.note for result in report.results)
    assert len(ran) == checks + ("truncation" in CASES[name].variants[label].options)


FIRST = [p.values for p in OPS]
FAMILIES = ("conv", "causal_conv", "lstm")
DEFAULT = [
    *(("conv", "1d"), ("causal_conv", "resets, depthwise, dilated")),
    *(("lstm", "truncation, reverse"), ("scan", "plain")),
]


# Variants on which the long tests run all checks: one for each kind of rule and engine.
FULL = [
    *(("conv", "depthwise"), ("conv_transpose", "strided, dilated, causal"), ("causal_conv", "resets")),
    *(("lstm", "batch first, lengths, checkpoint"), ("recurrence", "twice"), ("scan", "checkpoint"), ("stack", "gru")),
]


@pytest.mark.parametrize(("name", "label"), [p for p in GRID if p.values in DEFAULT])
def test_every_check_passes(name, label):
    level, checks = ("full", _check.FULL) if (name, label) == DEFAULT[0] else ("quick", _check.QUICK)
    passes(session(name, label)(level=level), len(checks), name, label)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "label"), [p for p in GRID if p.values in FULL or p.values[1] in CASES[p.values[0]].quick]
)
def test_every_check_passes_at_another_seed(name, label):
    level, checks = ("full", _check.FULL) if (name, label) in FULL else ("quick", _check.QUICK)
    passes(session(name, label)(seed=1, level=level), len(checks), name, label)


@pytest.mark.eight_devices
@pytest.mark.parametrize(
    ("name", "label"),
    long_where(
        [p for p in GRID if (p.values in FIRST or p.values in DEFAULT) and not derived(*p.values)],
        lambda *which: which not in FIRST or which[0] not in ("conv", "causal_conv"),
    ),
)
def test_shard_map_over_two_devices(name, label):
    """The part of `composition` that is skipped on one device."""
    report = session(name, label)(only=("composition",))
    report.raise_if_failed(strict=True)
    assert all(result.verdict is Verdict.PASS for result in report.results)
    conceded = [note for note in report.notes if "shard_map" in note]  # notes about restrictions under shard_map
    if name == "scan":  # lax.scan requires a carry that varies over devices if xs does
        assert all("scan body function carry input and carry output" in note for note in conceded)
    else:
        assert not conceded


# Among recurrences, lstm covers all time options.
WHOLE = [
    p
    for p in GRID
    if (p.values in FIRST or p.values[0] == "lstm")
    and "truncation" not in CASES[p.values[0]].variants[p.values[1]].options
]


@pytest.mark.parametrize(
    ("name", "label"), long_where(WHOLE, lambda *which: which not in FIRST or which[0] not in FAMILIES)
)
def test_forward_mode_of_every_reference(name, label, key):
    """Reference implementations support forward mode, as ops document. Forward mode does not truncate."""
    variant = CASES[name].variants[label]
    check_jvp(bound(name, label, reference=True), variant.arguments(key), level="quick").raise_if_failed(True)
