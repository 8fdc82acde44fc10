"""python -m jaxseq verify: what it prints, writes and returns, and what its quick level reaches."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from helpers import GRID, arguments, bound, pullback

import jaxseq
from jaxseq import __main__, _annotations, _cases, _verify
from jaxseq._cases import CASES, Case, Variant
from jaxseq._correlation import RULES
from jaxseq._correlation._taps import TAPS
from jaxseq._recurrence import _inspect, _linear_cell, _phi
from jaxseq.testing import _check


@pytest.fixture
def small(monkeypatch):
    """Two ops: one with a second variant at the full level only, one that differs from its reference."""
    example = lambda key, *, dtype, batch, length: (jnp.linspace(0.5, 2.0, length, dtype=dtype),)  # noqa: E731
    cases = {
        "sine": Case(jnp.sin, jnp.sin, {"plain": Variant(example, {}), "again": Variant(example, {})}, ("plain",)),
        "tangent": Case(jnp.tan, jnp.tanh, {"plain": Variant(example, {})}, ("plain",)),
    }
    monkeypatch.setattr(_cases, "CASES", cases)
    monkeypatch.setattr(_verify, "CASES", cases)


@pytest.mark.usefixtures("small")
def test_what_passes_is_one_row_and_status_zero(capsys, tmp_path):
    path = tmp_path / "verify.json"
    assert __main__.main(["verify", "--op", "sine", "--json", str(path)]) == 0
    header, row, legend, _, verdict = capsys.readouterr().out.splitlines()
    assert header == " " * 9 + "  ".join(_check.QUICK)
    assert row.split() == ["sine", "ok", "ok", "-", "ok", "ok", "ok", "ok", "ok", "ok"]
    assert header.index("value") == row.index("ok", header.index("value"))
    assert legend.startswith("ok passed")
    assert verdict.startswith("PASS: 1 variants of 1 ops in ")
    found = json.loads(path.read_text("utf-8"))
    assert found["verdict"] == "PASS"
    assert [(r["op"], r["variant"], r["verdict"]) for r in found["reports"]] == [("sine", "plain", "PASS")]


@pytest.mark.usefixtures("small")
def test_what_fails_is_reported_in_full_and_status_one(capsys):
    assert __main__.main(["verify", "--level", "full"]) == 1
    out = capsys.readouterr().out
    assert "\ntangent, plain\ntan: FAIL" in out
    assert "an element differs from the derivative of the reference" in out
    assert out.splitlines()[-1].startswith("FAIL: 3 variants of 2 ops")


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (
            ["verify", "--op", "lstn"],
            f"--op: expected one of {', '.join(_cases.CASES)}, got lstn",
        ),
        (["verify", "--level", "deep"], "invalid choice: 'deep'"),
        (["verify", "--json", "no/such/folder/x.json"], "--json: no such directory: no/such/folder"),
        ([], "the following arguments are required: command"),
    ],
)
def test_mistakes_on_the_command_line(argv, complaint, capsys):
    with pytest.raises(SystemExit) as caught:
        __main__.main(argv)
    assert caught.value.code == 2
    assert complaint in capsys.readouterr().err.replace("\\", "/")


def test_as_a_user_calls_it():
    """Run in a child process, where one CPU is split into two devices."""
    run = subprocess.run(
        [sys.executable, "-m", "jaxseq", "verify", "--op", "rnn_cell"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "PASS: 1 variants of 1 ops" in run.stdout
    assert "rnn_cell" in run.stdout


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        __main__.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"jaxseq {jaxseq.__version__}, jax {jax.__version__}\n"


def test_without_tqdm_it_prints_lines(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert list(_verify._progress([("a", "b"), ("c", "d")])) == [("a", "b"), ("c", "d")]
    assert capsys.readouterr().err == "1/2 a, b\n2/2 c, d\n"


# --- Coverage of the quick level ---

QUICK = [(name, label) for name, case in CASES.items() for label in case.quick]
ROOT = Path(jaxseq.__file__).parent
# The rules of convolutions, the recurrence engine and its cells, `scan`, and the modules that they use.
FOLDERS = ("_correlation", "_recurrence", "cells")
FILES = ("_time", "_scan", "linear_maps", "_dense", "_conv", "_conv_transpose", "_separable", "_causal_conv")
SOURCES = {str(path) for folder in FOLDERS for path in (ROOT / folder).glob("*.py")}
SOURCES |= {str(ROOT / f"{name}.py") for name in FILES}

# Caches of properties of cells, besides the caches of JAX.
CACHED = (
    _inspect._inspect,
    _phi.with_pullback,
    _annotations._annotated_shapes,
    _annotations._optional_fields,
    _linear_cell._shapes_of,
)


def traced(name, label):
    """Trace an op and its pullback under a variant, as `verify` does, without compiling."""
    f = bound(name, label)
    args = arguments(name, label, jax.random.key(0))
    jax.eval_shape(pullback(f), args, jax.eval_shape(f, *args))


def lines(name, label):
    """Return the lines of SOURCES that run while a variant is traced."""
    found = set()

    def on_line(frame, event, arg):
        if event == "line":
            found.add((frame.f_code.co_filename, frame.f_lineno))
        return on_line

    def on_call(frame, event, arg):
        return on_line if frame.f_code.co_filename in SOURCES else None

    jax.clear_caches()  # cached functions would not be traced again
    for f in CACHED:
        f.cache_clear()
    before = sys.gettrace()
    sys.settrace(on_call)
    try:
        traced(name, label)
    finally:
        sys.settrace(before)
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_quick_level_has_a_variant_of_every_op(name):
    case = CASES[name]
    assert case.quick
    assert set(case.quick) <= set(case.variants)


def test_the_quick_level_reaches_every_rule_of_a_convolution(monkeypatch):
    """Each contraction of each rule is called when programs are traced for CPUs."""
    rules = [rule for rule in RULES if rule is not TAPS]  # TAPS: only with an idle mesh axis; see test_time_shards.py
    contractions = [(rule, which) for rule in rules for which in ("to_output", "to_input", "to_kernel")]
    reached = set()

    def watched(rule, which):
        contraction = getattr(type(rule), which)

        def call(*args):
            reached.add((rule, which))
            return contraction(*args)

        return call

    for rule, which in contractions:
        monkeypatch.setattr(type(rule), which, watched(rule, which))
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cpu, default: cpu(*args))
    for name, label in QUICK:
        traced(name, label)
    assert len(rules) >= 7
    missed = [f"{rule.name}.{which}" for rule, which in contractions if (rule, which) not in reached]
    assert not missed


@pytest.mark.long
def test_the_quick_level_reaches_every_line_that_all_variants_reach():
    found = {p.values: lines(*p.values) for p in GRID}
    missed = set().union(*found.values()) - set().union(*(found[variant] for variant in QUICK))
    assert not sorted(missed)
