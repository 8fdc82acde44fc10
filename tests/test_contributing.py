"""What CONTRIBUTING.md requires: a case, an initializer and docs for each shipped cell, and a complete map."""

import re
from pathlib import Path

import pytest

from jaxseq import Cell, LinearCell, cells
from jaxseq._cases import CASES

ROOT = Path(__file__).parents[1]
OF_A_FUNCTION = ("rnn", "relu_rnn", "gru", "lstm")  # covered by the cases and docs of public functions
SHIPPED = [
    name for name in cells.__all__ if isinstance(getattr(cells, name), Cell | LinearCell) and name not in OF_A_FUNCTION
]


def test_there_are_cells():
    assert set(OF_A_FUNCTION) <= set(cells.__all__)
    assert "mgu" in SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_cell_is_complete(name):
    cell = getattr(cells, name)
    assert cell.name == name
    assert cell.params.__name__ in cells.__all__
    assert f"{name.removesuffix('_bilinear')}_init" in cells.__all__
    for op in ("recurrence", "recurrence_cell"):
        assert any(cell in variant.first for variant in CASES[op].variants.values()), f"no variant of {op}"
    assert f"`cells.{name}`" in (ROOT / "docs" / "cells.md").read_text("utf-8"), "no row in docs/cells.md"
    assert re.search(rf"^(\w+, )?{name}\b", cells.__doc__, re.MULTILINE), "no line in the docstring of jaxseq.cells"


def test_the_map_of_the_tree_is_complete():
    """Every file and folder of the package is on it, and all that is on it exists."""
    block = re.search(
        r"\n## Map of the tree\n.*?```text\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.DOTALL
    )
    folder, found = "", []
    for line in block[1].splitlines():
        names = re.split(r"\s{2,}", line.strip())
        if line.startswith(" "):
            found += [folder + name for name in names[:-1]]  # the last column describes them
        else:
            folder = names[0]
    assert len(found) == len(set(found))
    for path in found:
        assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file(), path
    package = {f"jaxseq/{p.name}" for p in (ROOT / "jaxseq").glob("*.py")}
    package |= {f"jaxseq/{p.parent.name}/" for p in (ROOT / "jaxseq").glob("*/__init__.py")}
    assert {path for path in found if path.startswith("jaxseq/")} == package
