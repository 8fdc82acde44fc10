"""Tests of what surrounds the package: benchmarks, examples, documentation, site and release.

They take minutes, hence the marker `long`: `make test-all` runs them, `make test` does not.
"""

import pytest


def pytest_itemcollected(item):
    item.add_marker(pytest.mark.long)


def pytest_ignore_collect(config):
    """Do not import these files where all of them would be deselected."""
    return True if config.option.markexpr == "not long" else None
