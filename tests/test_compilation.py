"""The compilation cache of the suite: processes share entries, and no process reads a partly written entry."""

import os

import pytest

from tests.support import compilation


def entries(folder):
    return {entry.name: entry.read_text() for entry in folder.glob("*-cache")}


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Two processes that start at the same time."""
    monkeypatch.setattr(compilation, "FOLDER", tmp_path)
    monkeypatch.setattr(compilation.jax.config, "update", lambda *_: None)
    found = []
    for pid in (11, 12):
        monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
        found.append(compilation.CompilationCache())
    for cache in found:
        cache.pytest_sessionstart()
    return found


def test_entries_of_all_processes_come_together(caches):
    first, second = caches
    (first.own / "a-cache").write_text("A")
    (second.own / "a-cache").write_text("A")
    (second.own / "b-cache").write_text("B")
    for cache in caches:
        cache.pytest_sessionfinish()
        assert not cache.own.exists()
    assert entries(first.common) == {"a-cache": "A", "b-cache": "B"}
    first.pytest_sessionstart()
    assert entries(first.own) == {"a-cache": "A", "b-cache": "B"}


def test_nothing_is_common_before_a_process_ends(caches):
    (caches[0].own / "half-cache").write_text("ha")
    assert entries(caches[0].common) == {}
    assert entries(caches[1].own) == {}


def test_the_older_half_goes_beyond_the_limit(tmp_path):
    for age, name in enumerate("abcd"):
        entry = tmp_path / f"{name}-cache"
        entry.write_text("12345")
        os.utime(entry, (100 - age, 100 - age))
    compilation.prune(tmp_path, 20)
    assert len(entries(tmp_path)) == 4
    compilation.prune(tmp_path, 19)
    assert set(entries(tmp_path)) == {"a-cache", "b-cache"}
