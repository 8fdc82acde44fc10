"""What a shipped cell has to have, as CONTRIBUTING.md says: a case, first weights, a row in the docs, a measurement."""

import re
from pathlib import Path

import pytest

from benchmarks.cells import CELLS as MEASURED
from jaxseq import Cell, cells
from jaxseq._cases import CASES

ROOT = Path(__file__).parents[1]
OF_A_FUNCTION = ("rnn", "relu_rnn", "gru", "lstm")  # these have cases, weights and docs as functions of their own
SHIPPED = [name for name in cells.__all__ if isinstance(getattr(cells, name), Cell) and name not in OF_A_FUNCTION]


def test_there_are_cells():
    assert set(OF_A_FUNCTION) <= set(cells.__all__)
    assert "mgu" in SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_cell_has_its_five_steps(name):
    cell = getattr(cells, name)
    assert cell.name == name
    assert cell.params.__name__ in cells.__all__
    assert f"{name}_init" in cells.__all__
    for op in ("recurrence", "recurrence_cell"):
        assert any(cell in variant.first for variant in CASES[op].variants.values()), f"no variant of {op}"
    assert f"`cells.{name}`" in (ROOT / "docs" / "cells.md").read_text("utf-8"), "no row in docs/cells.md"
    assert any(cell is measured for measured, _ in MEASURED.values()), "no entry in benchmarks/cells.py"
    assert re.search(rf"^{name}\b", cells.__doc__, re.MULTILINE), "no line in the docstring of jaxseq.cells"
