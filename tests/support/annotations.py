"""Pytest plugin: runs with `--jaxtyping-packages=jaxseq,beartype.beartype`, in which annotations are executed.

jaxtyping then checks the arguments and the result of every function of the library. Tests marked `other_types` pass
what annotations forbid; such a run leaves them out.

PYTEST_DONT_REWRITE: the process of eight devices has imported it before pytest does.
"""

import pytest
from jaxtyping import install_import_hook


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if packages(config):
        left_out = [item for item in items if item.get_closest_marker("other_types")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def packages(config: pytest.Config) -> str | None:
    """Return the value of the option: packages, and last the type checker."""
    return config.getoption("jaxtyping_packages", None)


def execute(packages: str | None) -> None:
    """Check these packages in a process that has not imported them yet; None: check nothing."""
    if packages:
        *names, checker = packages.split(",")
        install_import_hook(names, checker)
