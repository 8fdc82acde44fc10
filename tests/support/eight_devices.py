"""Pytest plugin: run tests marked `eight_devices` in a second process, whose CPU is split into eight devices.

The second process runs one pytest session for each file. It collects the file once, and runs a test when the first
process requests it.

PYTEST_DONT_REWRITE: the process with eight devices imports this module before pytest does.
"""

import multiprocessing
from functools import cache

import jax
import pytest

from tests.support import annotations, compilation, usage

OPTIONS = ("--override-ini=addopts=", "--strict-markers", "-pno:cacheprovider", "-pno:terminal", "-pno:xdist")
OPTIONS += ("-Wignore:Module already imported:pytest.PytestAssertRewriteWarning",)  # this module imports jaxtyping


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    if pyfuncitem.get_closest_marker("eight_devices") and jax.device_count() < 8:
        run(pyfuncitem)
        return True
    return None


def pytest_sessionfinish(session):
    if other_process.cache_info().currsize:
        other_process(annotations.packages(session.config)).close()
        other_process.cache_clear()


def run(item):
    """Run the test in the other process, and skip or fail as it does there."""
    try:
        request = str(item.path), item.nodeid.partition("::")[2]
        outcome, reason, seconds, peak_bytes = other_process(annotations.packages(item.config)).run(request)
        usage.add_process(seconds, peak_bytes)
    except EOFError:
        other_process.cache_clear()  # start a new process for the next test
        raise
    if outcome == "skipped":
        pytest.skip(reason)
    if outcome == "failed":
        pytest.fail(reason, pytrace=False)


@cache
def other_process(annotated):
    """Return the other process. It is started once, so that tests share compiled programs."""
    return OtherProcess(annotated)


class OtherProcess:
    """Client for the process with eight devices."""

    def __init__(self, annotated):
        context = multiprocessing.get_context("spawn")
        self.connection, end = context.Pipe()
        self.process = context.Process(target=serve, args=(end, 8, compilation.folder(), annotated))
        self.process.start()
        end.close()  # only the child keeps it open, so `recv` raises EOFError when the child dies

    def run(self, request):
        """Run a test (path, name). Return "passed", "skipped" or "failed", the reason, CPU seconds and peak memory."""
        self.connection.send(request)
        return self.connection.recv()

    def close(self):
        self.connection.close()
        self.process.join()


def configure(devices, cache=None, annotated=None):
    """Split the CPU into devices, use the compilation cache of the first process, and check the same annotations.

    Sharing the cache is safe, since the first process waits while this one compiles.
    """
    annotations.execute(annotated)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    compilation.use(cache)


# --- In the second process ---


def serve(connection, devices, cache, annotated):
    """Run tests on request, until the first process closes the connection."""
    configure(devices, cache, annotated)
    server = Server(connection)
    server.receive()
    while server.request is not None:
        asked = server.request
        status = pytest.main([asked[0], *OPTIONS], plugins=[server])
        if server.request == asked:  # the file cannot be collected
            server.answer("failed", f"pytest did not run {asked[0]}: {status!r}")
            server.receive()


class Server:
    """Pytest plugin: a session for one file, which ends when a test of another file is requested."""

    def __init__(self, connection):
        self.connection = connection
        self.request: tuple[str, str] | None = None  # path and name of a test; None at the end
        self.reports: list[pytest.TestReport] = []  # setup, call and teardown of one test
        self.start = 0.0

    def receive(self):
        try:
            self.request = self.connection.recv()
        except EOFError:
            self.request = None
        self.reports, self.start = [], usage.cpu_seconds()

    def answer(self, outcome, reason):
        self.connection.send((outcome, reason, usage.cpu_seconds() - self.start, usage.peak_bytes()))

    def pytest_runtest_logreport(self, report):
        self.reports.append(report)

    def pytest_runtestloop(self, session):
        assert self.request is not None
        path = self.request[0]
        items = {item.nodeid.partition("::")[2]: item for item in session.items}
        while self.request is not None and self.request[0] == path:
            item = items.get(self.request[1])
            if item is None:
                self.answer("failed", f"{path} has no test {self.request[1]}")
            else:
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=sibling(item, items.values()))
                self.answer(*outcome_of(self.reports))
            self.receive()
        return True


def sibling(item, items):
    """Return another test of the file, so that module-scoped fixtures are not torn down between requests."""
    others = (other for other in items if other is not item and isinstance(other.parent, pytest.Module))
    return next(others, None)


def outcome_of(reports):
    for report in reports:
        if report.skipped:
            return "skipped", report.longrepr[2]
        if report.failed:
            return "failed", f"{report.longreprtext}\n{report.capstdout}{report.capstderr}"
    return ("passed", "") if reports else ("failed", "pytest ran no test")
