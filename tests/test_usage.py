"""The table of CPU seconds at the end of a run of the suite."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# 0.2 CPU seconds each in a fixture, in a child process and in a test, which also allocates 0.4 GB.
BUSY = """
import subprocess, sys, time
import pytest

SPIN = "import time\\nend = time.process_time() + 0.2\\nwhile time.process_time() < end: pass"

@pytest.fixture
def busy():
    exec(SPIN)

def test_fixture(busy):
    pass

def test_child():
    subprocess.run([sys.executable, "-c", SPIN], check=True)

def test_body():
    exec(SPIN)
    b"x" * 400_000_000
"""
IDLE = "def test_nothing(): pass"


@pytest.mark.parametrize("options", [pytest.param(("-p", "no:xdist"), marks=pytest.mark.long), ("-n", "2")])
def test_files_are_listed_by_their_cpu_seconds(pytester, monkeypatch, options):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makepyfile(test_a_idle=IDLE, test_busy=BUSY, test_c_idle=IDLE)
    result = pytester.runpytest_subprocess("-p", "tests.support.usage", *options)
    result.assert_outcomes(passed=5)
    table = [re.fullmatch(r" +([\d.]+)  (\w+\.py|in total)", line) for line in result.outlines]
    seconds = {found[2]: float(found[1]) for found in table if found}
    assert next(iter(seconds)) == "test_busy.py"
    assert set(seconds) == {"test_busy.py", "test_a_idle.py", "test_c_idle.py", "in total"}
    assert seconds["test_busy.py"] > 0.55  # 0.6, but clocks differ
    assert seconds["in total"] == pytest.approx(sum(seconds.values()) / 2, abs=0.15)
    (memory,) = re.findall(r"largest process: ([\d.]+) GB", result.stdout.str())
    assert float(memory) > 0.4
