"""A shipped cell has what CONTRIBUTING.md requires: a case, an initializer and a row in the docs."""

import re
from pathlib import Path

import pytest

from jaxseq import Cell, cells
from jaxseq._cases import CASES

ROOT = Path(__file__).parents[1]
OF_A_FUNCTION = ("rnn", "relu_rnn", "gru", "lstm")  # these have cases, weights and docs as functions of their own
SHIPPED = [name for name in cells.__all__ if isinstance(getattr(cells, name), Cell) and name not in OF_A_FUNCTION]


def test_there_are_cells():
    assert set(OF_A_FUNCTION) <= set(cells.__all__)
    assert "mgu" in SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_cell_is_complete(name):
    cell = getattr(cells, name)
    assert cell.name == name
    assert cell.params.__name__ in cells.__all__
    assert f"{name}_init" in cells.__all__
    for op in ("recurrence", "recurrence_cell"):
        assert any(cell in variant.first for variant in CASES[op].variants.values()), f"no variant of {op}"
    assert f"`cells.{name}`" in (ROOT / "docs" / "cells.md").read_text("utf-8"), "no row in docs/cells.md"
    assert re.search(rf"^{name}\b", cells.__doc__, re.MULTILINE), "no line in the docstring of jaxseq.cells"
