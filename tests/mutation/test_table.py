"""The table of mutants matches the source, and the runner judges runs of tests as documented."""

import ast
from collections import Counter

import pytest
from run_mutants import ROOT, judged, mutated
from table import MUTANTS, Mutant


def without_docstrings(source):
    """Return a dump of the syntax tree of a module, without docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


def test_names_are_unique():
    assert max(Counter(mutant.name for mutant in MUTANTS).values()) == 1


def test_every_mutant_changes_the_program():
    sources = {file: (ROOT / file).read_text("utf-8") for file in {mutant.file for mutant in MUTANTS}}
    programs = {file: without_docstrings(source) for file, source in sources.items()}
    for mutant in MUTANTS:
        changed = without_docstrings(mutated(mutant, sources[mutant.file]))
        assert changed != programs[mutant.file], mutant.name


def test_the_tests_of_every_mutant_exist():
    for mutant in MUTANTS:
        assert all((ROOT / path).is_file() for path in mutant.tests), mutant.name
        assert "|" not in mutant.what, mutant.name


@pytest.mark.parametrize("source", ["a = 1", "a = b\na = b"])
def test_a_text_that_is_not_there_once_is_refused(source):
    mutant = Mutant("sign", "area", "a sign", "jaxseq/_dense.py", "a = b", "a = -b", ("tests/test_conv.py",))
    with pytest.raises(ValueError, match=r"mutant sign: 'a = b' occurs \d times in jaxseq/_dense.py, expected once"):
        mutated(mutant, source)


@pytest.mark.parametrize(
    ("code", "report", "result"),
    [
        (1, {"passed": 3, "skipped": 0, "failed": ["test_a"]}, ("killed", "test_a")),
        (0, {"passed": 3, "skipped": 1, "failed": []}, ("survived", "3 passed, 1 skipped")),
        (0, {"passed": 0, "skipped": 2, "failed": []}, ("error", "all 2 tests were skipped")),
        (5, {"passed": 0, "skipped": 0, "failed": []}, ("error", "pytest exited with 5: b")),
        (2, {"passed": 0, "skipped": 0, "failed": ["test_a.py"]}, ("error", "pytest exited with 2: b")),
        (3, None, ("error", "pytest exited with 3: b")),
    ],
)
def test_how_a_run_is_judged(code, report, result):
    assert judged(code, report, "\nb\n") == result
