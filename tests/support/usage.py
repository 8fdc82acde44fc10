"""Pytest plugin: print the CPU seconds of each test file, and the peak memory of the largest test process.

The time of a file covers its collection and its tests, including child processes that they waited for. Under
pytest-xdist, it is summed over the workers.

PYTEST_DONT_REWRITE: the process with eight devices imports this module before pytest does.
"""

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from operator import itemgetter
from typing import Any

import pytest

RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # the unit of `ru_maxrss` in bytes


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Usage(), "usage")


class Others:
    """Resources of processes that are not waited-for children of this one."""

    seconds: float = 0.0
    peaks: tuple[int, ...] = (0,)


OTHERS = Others()


def add_process(seconds: float, peak_bytes: int) -> None:
    """Add the CPU time that another process used for the current test, and its peak memory so far."""
    OTHERS.seconds += seconds
    OTHERS.peaks = (*OTHERS.peaks, peak_bytes)


class Usage:
    """Resources used by this process and, in the controller of pytest-xdist, by its workers."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.peak_bytes = 0

    @contextmanager
    def measure(self, path: str) -> Iterator[None]:
        """Add the CPU time of the `with` block to that of a file."""
        start = cpu_seconds() + OTHERS.seconds
        try:
            yield
        finally:
            self.seconds[path] += cpu_seconds() + OTHERS.seconds - start

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self, collector: pytest.Collector) -> Any:
        if not isinstance(collector, pytest.Module):
            return (yield)
        with self.measure(collector.nodeid):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        with self.measure(item.nodeid.partition("::")[0]):
            return (yield)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self.peak_bytes = max(self.peak_bytes, peak_bytes(), *OTHERS.peaks)
        output = getattr(session.config, "workeroutput", None)
        if output is not None:
            output["usage"] = {"seconds": dict(self.seconds), "peak_bytes": self.peak_bytes}

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Add the resources of a pytest-xdist worker; a worker that crashed reports none."""
        used = getattr(node, "workeroutput", {}).get("usage")
        if used:
            for path, seconds in used["seconds"].items():
                self.seconds[path] += seconds
            self.peak_bytes = max(self.peak_bytes, used["peak_bytes"])

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        write = terminalreporter.line
        terminalreporter.section("CPU seconds of each file")
        for path, seconds in sorted(self.seconds.items(), key=itemgetter(1), reverse=True):
            write(f"{seconds:8.1f}  {path}")
        write(f"{sum(self.seconds.values()):8.1f}  in total")
        write(f"largest process: {self.peak_bytes / 1e9:.2f} GB")


def peak_bytes() -> int:
    """Return the peak memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT


def cpu_seconds() -> float:
    """Return the user and system time of this process and of the children it waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime
