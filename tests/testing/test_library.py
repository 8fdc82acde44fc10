"""Every op and variant of this library passes every check, and nothing is INCONCLUSIVE."""

import pytest
from helpers import GRID

from jaxseq._cases import CASES
from jaxseq._verify import session
from jaxseq.testing import Verdict, check_jvp


@pytest.mark.parametrize(("name", "label"), GRID)
def test_every_check_passes(name, label):
    report = session(name, label)()
    report.raise_if_failed(strict=True)
    ran = {result.check for result in report.results if result.verdict is Verdict.PASS}
    assert not any("shard_map" in note for note in report.notes)  # where other rules need a concession
    assert len(ran) == (16 if "truncation" in CASES[name].variants[label].options else 15)


@pytest.mark.long
@pytest.mark.parametrize(("name", "label"), GRID)
def test_every_check_passes_at_twenty_seeds(name, label):
    report = session(name, label)
    for seed in range(20):
        report(seed).raise_if_failed(strict=True)


@pytest.mark.parametrize(
    ("name", "label"), [p for p in GRID if "truncation" not in CASES[p.values[0]].variants[p.values[1]].options]
)
def test_forward_mode_of_every_twin(name, label, key):
    """The way out that ops point to. A truncated gradient is none of forward mode's."""
    from functools import partial

    variant = CASES[name].variants[label]
    check_jvp(partial(CASES[name].twin, **variant.options), variant.arguments(key), level="quick").raise_if_failed(True)
