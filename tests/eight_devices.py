"""Run a test in a process whose CPU is split into eight devices."""

from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from multiprocessing import get_context

import jax
import pytest


def run(item):
    """Run the test in the other process; skip or fail as it does there."""
    test = f"{item.path}::{item.nodeid.partition('::')[2]}"
    try:
        outcome, reason = process().submit(outcome_of, test).result()
    except BrokenProcessPool:
        process.cache_clear()  # the next test gets another process
        raise
    if outcome == "skipped":
        pytest.skip(reason)
    if outcome == "failed":
        pytest.fail(reason, pytrace=False)


@cache
def process():
    """Return the other process: started once, it runs one test after the other and keeps what it has compiled."""
    return ProcessPoolExecutor(1, get_context("spawn"), split_cpu)


def split_cpu():
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)


class Reports(list):
    """Of a test's setup, call and teardown."""

    def pytest_runtest_logreport(self, report):
        self.append(report)


def outcome_of(test):
    """Run a test by its name: return "passed", "skipped" or "failed", and the reason."""
    reports = Reports()
    options = "--override-ini=addopts=", "--strict-markers", "-pno:cacheprovider", "-pno:terminal", "-pno:xdist"
    status = pytest.main([test, *options], plugins=[reports])
    for report in reports:
        if report.skipped:
            return "skipped", report.longrepr[2]
        if report.failed:
            return "failed", f"{report.longreprtext}\n{report.capstdout}{report.capstderr}"
    return ("passed", "") if status == 0 else ("failed", f"pytest does not run {test}: {status!r}")
