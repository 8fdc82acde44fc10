"""Pytest plugin for one mutant: check that the mutated package is the one imported, and report the results."""

import json
import os
from pathlib import Path

import pytest

ran = {"passed": 0, "skipped": 0, "failed": []}


def pytest_configure():
    import jaxseq

    package, tree = Path(jaxseq.__file__).parent, Path(os.environ["MUTANT_TREE"])
    if package.resolve() != (tree / "jaxseq").resolve():
        pytest.exit(f"jaxseq was imported from {package}, expected {tree / 'jaxseq'}", returncode=3)


def pytest_runtest_logreport(report):
    if report.failed:
        ran["failed"].append(report.nodeid)
    elif report.skipped:
        ran["skipped"] += 1
    elif report.when == "call":
        ran["passed"] += 1


def pytest_sessionfinish():
    (Path(os.environ["MUTANT_TREE"]) / "report.json").write_text(json.dumps(ran), "utf-8")
