"""Pytest plugin: tests marked `eight_devices` run in a second process, whose CPU is split into eight devices.

PYTEST_DONT_REWRITE: the process of eight devices has imported it before pytest does.
"""

from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from multiprocessing import get_context

import jax
import pytest

from tests.support import annotations, compilation, usage


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    if pyfuncitem.get_closest_marker("eight_devices") and jax.device_count() < 8:
        run(pyfuncitem)
        return True
    return None


def run(item):
    """Run the test in the other process; skip or fail as it does there."""
    test = f"{item.path}::{item.nodeid.partition('::')[2]}"
    try:
        other = process(annotations.packages(item.config))
        outcome, reason, seconds, peak_bytes = other.submit(outcome_of, test).result()
        usage.add_process(seconds, peak_bytes)
    except BrokenProcessPool:
        process.cache_clear()  # the next test gets another process
        raise
    if outcome == "skipped":
        pytest.skip(reason)
    if outcome == "failed":
        pytest.fail(reason, pytrace=False)


@cache
def process(annotated):
    """Return the other process: started once, it runs one test after the other and keeps what it has compiled."""
    return ProcessPoolExecutor(1, get_context("spawn"), configure, (8, compilation.folder(), annotated))


def configure(devices, cache=None, annotated=None):
    """Split the CPU; share the compilation cache of the first process, which waits while this one compiles; execute
    the annotations of the same packages.
    """
    annotations.execute(annotated)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    compilation.use(cache)


class Reports(list):
    """Of a test's setup, call and teardown."""

    def pytest_runtest_logreport(self, report):
        self.append(report)


def outcome_of(test):
    """Run a test by its name: return "passed", "skipped" or "failed", the reason, CPU seconds and peak memory."""
    start = usage.cpu_seconds()
    outcome, reason = report_of(test)
    return outcome, reason, usage.cpu_seconds() - start, usage.peak_bytes()


def report_of(test):
    reports = Reports()
    options = "--override-ini=addopts=", "--strict-markers", "-pno:cacheprovider", "-pno:terminal", "-pno:xdist"
    status = pytest.main([test, *options], plugins=[reports])
    for report in reports:
        if report.skipped:
            return "skipped", report.longrepr[2]
        if report.failed:
            return "failed", f"{report.longreprtext}\n{report.capstdout}{report.capstderr}"
    return ("passed", "") if status == 0 else ("failed", f"pytest does not run {test}: {status!r}")
