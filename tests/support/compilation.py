"""Pytest plugin: JAX's persistent compilation cache in .cache/, and a limit on the memory of compiled programs.

JAX writes cache entries in place, so one process may read an entry that another has not finished writing. Therefore
every process uses a separate folder. It starts with hard links to the common entries, and at the end the process links
its new entries back, which is atomic. `JAX_ENABLE_COMPILATION_CACHE=0` turns the cache off, `make clean` empties it.

PYTEST_DONT_REWRITE: the process with eight devices imports this module before pytest does.
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
LIMIT = 2**30  # bytes of common entries beyond which the older half is removed
MEMORY = 7 * 2**27  # resident bytes beyond which a process drops its compiled programs
GROWTH = 2**27  # least growth in bytes before it drops them again
STALE = 24 * 3600  # seconds after which the folder of a killed process is removed


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Memory(), "memory")
    # Not in the controller of pytest-xdist, which compiles nothing, nor where a cache is configured already.
    if not config.getoption("numprocesses", None) and folder() is None:
        config.pluginmanager.register(CompilationCache(), "compilation-cache")


def folder() -> str | None:
    """Return the folder of the current compilation cache."""
    return jax.config.values["jax_compilation_cache_dir"]


def use(folder: str | None) -> None:
    """Cache all programs in `folder`, however small; None caches nothing."""
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


class CompilationCache:
    """Pytest plugin that manages the cache folder of one process."""

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
    """Pytest plugin that limits the memory of compiled programs."""

    def __init__(self) -> None:
        self.limit = MEMORY

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self) -> None:
        """Drop all compiled programs if the process exceeds its memory limit."""
        if resident_bytes() > self.limit:
            jax.clear_caches()
            gc.collect()
            return_free_memory()
            self.limit = max(MEMORY, resident_bytes() + GROWTH)


def resident_bytes() -> int:
    """Return the resident memory of this process; 0 on a system without /proc."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except FileNotFoundError:
        return 0


def return_free_memory() -> None:
    """Return free heap memory to the system. glibc otherwise retains half a gigabyte after some hundred programs."""
    with contextlib.suppress(AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def link(source: Path, target: Path) -> None:
    """Hard-link every entry of `source` into `target`; do not replace existing entries."""
    for entry in source.glob("*-cache"):
        # Another process may have linked or removed it in between.
        with contextlib.suppress(FileExistsError, FileNotFoundError):
            os.link(entry, target / entry.name)


def prune(folder: Path, limit: int) -> None:
    """Remove the older half of the entries if their total size exceeds `limit`."""
    entries = sorted(folder.glob("*-cache"), key=lambda entry: entry.stat().st_mtime)
    if sum(entry.stat().st_size for entry in entries) > limit:
        for entry in entries[: len(entries) // 2]:
            entry.unlink(missing_ok=True)
