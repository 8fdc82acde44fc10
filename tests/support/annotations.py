"""Pytest plugin: check annotations at run time, with `--jaxtyping-packages=jaxseq,beartype.beartype`.

jaxtyping then checks the arguments and the result of every function of the library. Tests marked `other_types` violate
annotations on purpose and are deselected.

PYTEST_DONT_REWRITE: the process with eight devices imports this module before pytest does.
"""

import pytest
from jaxtyping import install_import_hook


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if packages(config):
        left_out = [item for item in items if item.get_closest_marker("other_types")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def packages(config: pytest.Config) -> str | None:
    """Return the value of the option: packages, followed by the type checker."""
    return config.getoption("jaxtyping_packages", None)


def execute(packages: str | None) -> None:
    """Check the annotations of `packages`, which must not be imported yet; None checks nothing."""
    if packages:
        *names, checker = packages.split(",")
        install_import_hook(names, checker)
