"""python -m jaxseq verify: what it prints, writes and returns."""

import json
import subprocess
import sys

import jax.numpy as jnp
import pytest

from jaxseq import __main__, _cases, _verify
from jaxseq._cases import Case, Variant
from jaxseq.testing import _check


@pytest.fixture
def small(monkeypatch):
    """Two ops of one variant each, one with a twin that it does not equal."""
    example = lambda key, *, dtype, batch, length: (jnp.linspace(0.5, 2.0, length, dtype=dtype),)  # noqa: E731
    cases = {
        "sine": Case(jnp.sin, jnp.sin, {"plain": Variant(example, {})}),
        "tangent": Case(jnp.tan, jnp.tanh, {"plain": Variant(example, {})}),
    }
    monkeypatch.setattr(_cases, "CASES", cases)
    monkeypatch.setattr(_verify, "CASES", cases)


@pytest.mark.usefixtures("small")
def test_what_passes_is_one_row_and_status_zero(capsys, tmp_path):
    path = tmp_path / "verify.json"
    assert __main__.main(["verify", "--op", "sine", "--json", str(path)]) == 0
    header, row, legend, _, verdict = capsys.readouterr().out.splitlines()
    assert header == " " * 9 + "  ".join(_check.QUICK)
    assert row.split() == ["sine", "ok", "ok", "-", "ok", "ok", "ok", "ok", "ok"]
    assert header.index("value") == row.index("ok", header.index("value"))
    assert legend.startswith("ok passed")
    assert verdict.startswith("PASS: 1 variants of 1 ops in ")
    found = json.loads(path.read_text("utf-8"))
    assert found["verdict"] == "PASS"
    assert [(r["op"], r["variant"], r["verdict"]) for r in found["reports"]] == [("sine", "plain", "PASS")]


@pytest.mark.usefixtures("small")
def test_what_fails_is_told_in_full_and_status_one(capsys):
    assert __main__.main(["verify", "--level", "full"]) == 1
    out = capsys.readouterr().out
    assert "\ntangent, plain\ntan: FAIL" in out
    assert "an element is not the derivative of the reference" in out
    assert out.splitlines()[-1].startswith("FAIL: 2 variants of 2 ops")


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (
            ["verify", "--op", "lstn"],
            f"--op: expected one of {', '.join(_cases.CASES)}, got lstn",
        ),
        (["verify", "--level", "deep"], "invalid choice: 'deep'"),
        (["verify", "--json", "no/such/folder/x.json"], "--json: no folder no/such/folder"),
        ([], "the following arguments are required: command"),
    ],
)
def test_mistakes_on_the_command_line(argv, complaint, capsys):
    with pytest.raises(SystemExit) as caught:
        __main__.main(argv)
    assert caught.value.code == 2
    assert complaint in capsys.readouterr().err.replace("\\", "/")


def test_as_a_user_calls_it():
    """In a process of its own, with two devices made of one CPU."""
    run = subprocess.run(
        [sys.executable, "-m", "jaxseq", "verify", "--op", "rnn_cell"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "PASS: 3 variants of 1 ops" in run.stdout
    assert "rnn_cell" in run.stdout


def test_without_tqdm_it_prints_lines(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert list(_verify._progress([("a", "b"), ("c", "d")])) == [("a", "b"), ("c", "d")]
    assert capsys.readouterr().err == "1/2 a, b\n2/2 c, d\n"
