"""Pytest plugin: JAX's persistent compilation cache in the ignored folder .cache/, and a limit on what stays in memory.

JAX writes an entry in place, so that a process may read what another has not written to its end. Therefore every
process has a folder of its own: it starts with hard links to the common entries, and at the end links its new ones
back, which is atomic. `JAX_ENABLE_COMPILATION_CACHE=0` turns the cache off, `make clean` empties it.

PYTEST_DONT_REWRITE: the process of eight devices has imported it before pytest does.
"""

import contextlib
import ctypes
import gc
import os
import resource
import shutil
import time
from pathlib import Path

import jax
import pytest

FOLDER = Path(__file__).parents[2] / ".cache" / "jax"
LIMIT = 2**30  # bytes of common entries, beyond which the older half goes
MEMORY = 7 * 2**27  # bytes of a process, from which on it drops its programs
GROWTH = 2**27  # bytes by which it grows at least before it drops them again
STALE = 24 * 3600  # seconds after which the folder of a process that was killed goes


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Memory(), "memory")
    # Not in the controller of pytest-xdist, which compiles nothing, nor where a cache is configured already.
    if not config.getoption("numprocesses", None) and folder() is None:
        config.pluginmanager.register(CompilationCache(), "compilation-cache")


def folder() -> str | None:
    """Return the folder of the cache that is in use."""
    return jax.config.values["jax_compilation_cache_dir"]


def use(folder: str | None) -> None:
    """Keep every program, however small, in that folder; None: keep none."""
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


class CompilationCache:
    """The folders of one process."""

    def __init__(self) -> None:
        self.own, self.common = FOLDER / f"process-{os.getpid()}", FOLDER / "common"

    def pytest_sessionstart(self) -> None:
        self.common.mkdir(parents=True, exist_ok=True)
        for folder in FOLDER.glob("process-*"):
            if folder == self.own or time.time() - folder.stat().st_mtime > STALE:
                shutil.rmtree(folder, ignore_errors=True)
        self.own.mkdir()
        prune(self.common, LIMIT)
        link(self.common, self.own)
        use(str(self.own))

    def pytest_sessionfinish(self) -> None:
        link(self.own, self.common)
        shutil.rmtree(self.own, ignore_errors=True)


class Memory:
    """Compiled programs that are dropped."""

    def __init__(self) -> None:
        self.limit = MEMORY

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self) -> None:
        """Drop compiled programs where they take much memory."""
        if resident_bytes() > self.limit:
            jax.clear_caches()
            gc.collect()
            return_free_memory()
            self.limit = max(MEMORY, resident_bytes() + GROWTH)


def resident_bytes() -> int:
    """Memory of this process; 0 where the system has no /proc."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except FileNotFoundError:
        return 0


def return_free_memory() -> None:
    """Have glibc return what is free, half a gigabyte after some hundred programs; other libraries do so unasked."""
    with contextlib.suppress(AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def link(source: Path, target: Path) -> None:
    """Link every entry of one folder in another; what is there already stays."""
    for entry in source.glob("*-cache"):
        # Another process may have linked or removed it in between.
        with contextlib.suppress(FileExistsError, FileNotFoundError):
            os.link(entry, target / entry.name)


def prune(folder: Path, limit: int) -> None:
    """Remove the older half of the entries where all together are larger than the limit."""
    entries = sorted(folder.glob("*-cache"), key=lambda entry: entry.stat().st_mtime)
    if sum(entry.stat().st_size for entry in entries) > limit:
        for entry in entries[: len(entries) // 2]:
            entry.unlink(missing_ok=True)
