"""The harness refuses what does not compare, takes turns, and counts; the first table runs. Nothing here is timed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxseq
from benchmarks import cells, conv, gain, harness, linear, parallel, recurrence
from benchmarks.harness import Candidate, Problem, measure

pytestmark = pytest.mark.usefixtures("as_users_have_jax")

ROOT = Path(__file__).parents[2]
ONE_DEVICE = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}

X = np.linspace(-1, 2, 12, dtype=np.float32).reshape(3, 4)
TINY = recurrence.TINY
FIGURES = {"name", "median_s", "min_s", "ratio", "quartiles", "compile_s", "temp_bytes", "error"}


def doubled(x):
    return {"y": x + x}


def against(run, args=(X,), rounds=2, **options):
    """The row of a candidate compared with `doubled`."""
    candidates = [Candidate("sum", doubled, (X,)), Candidate("suspect", run, args, **options)]
    return measure(Problem("doubling", "sum", candidates), rounds)[1]


def test_equal_candidates_give_every_figure():
    row = against(lambda x: {"y": 2 * x})
    assert set(row) == FIGURES
    assert row["error"] == 0
    assert 0 < row["min_s"] <= row["median_s"]
    assert row["quartiles"][0] <= row["ratio"] <= row["quartiles"][1]


@pytest.mark.parametrize(
    ("run", "complaint"),
    [
        pytest.param(lambda x: {"y": 2 * x.at[1, 2].add(1e-3)}, "result['y'] differs by 2.0e-03", id="one element"),
        pytest.param(lambda x: {"y": (2 * x).at[0, 0].set(jnp.nan)}, "result['y'] differs by nan", id="nan"),
        pytest.param(lambda x: {"y": 2 * x[:1]}, "float32(1, 4), expected float32(3, 4)", id="broadcastable"),
        pytest.param(lambda x: {"y": (2 * x).astype(jnp.bfloat16)}, "is bfloat16(3, 4), expected", id="dtype"),
        pytest.param(lambda x: 2 * x, "PyTreeDef(*), expected PyTreeDef({'y': *})", id="structure"),
    ],
)
def test_a_wrong_candidate_is_refused_by_name(run, complaint):
    with pytest.raises(ValueError, match=re.escape(complaint)) as caught:
        against(run)
    assert str(caught.value).startswith("doubling: `suspect` and `sum` compute different results: ")


def test_a_wrong_gradient_is_refused():
    @jax.custom_vjp
    def wrong(x):
        return jnp.sin(x)

    wrong.defvjp(lambda x: (jnp.sin(x), x), lambda x, y_bar: (y_bar * jnp.sin(x),))
    sines = [Candidate(n, harness.with_gradient(f), (X, X)) for n, f in (("sin", jnp.sin), ("wrong", wrong))]
    with pytest.raises(ValueError, match=r"`wrong` .* result\[1\]\[0\] differs by "):
        measure(Problem("sine", "sin", sines), 2)


@pytest.mark.parametrize("args", [(X,), ()])
def test_data_that_could_be_folded_is_refused(args):
    big = jnp.ones(1000, jnp.float32)
    with pytest.raises(ValueError, match="doubling: `suspect` closes over its data"):
        against(lambda *_: {"y": jnp.sum(big)}, args)


def test_candidates_take_turns_in_a_changing_order():
    calls = []
    names, rounds = ("a", "b", "c"), 8

    def recorder(name):
        return Candidate(name, lambda x: calls.append(name) or x, (X,), jit=False)

    rows = measure(Problem("nothing", "b", [recorder(n) for n in names]), rounds)
    assert [row["name"] for row in rows] == list(names)  # the table keeps its order
    assert all(row["compile_s"] is None and row["temp_bytes"] is None for row in rows)

    turns = calls[len(names) :]  # after one call each, to compare
    assert turns[::2] == turns[1::2]  # an untimed call, then the timed one
    orders = [tuple(turns[::2][k * 3 : k * 3 + 3]) for k in range(rounds)]
    assert all(sorted(order) == list(names) for order in orders)
    assert len(set(orders)) > 3


def test_a_candidate_is_traced_once():
    traces = []
    against(lambda x: traces.append(x) or {"y": 2 * x}, rounds=4)
    assert len(traces) == 1


def test_another_library_in_another_layout():
    row = against(lambda x: x.T * np.float32(2), common=lambda out: {"y": out.T}, jit=False)
    assert set(row) == FIGURES
    assert row["compile_s"] is None


def test_temporary_bytes_are_those_of_the_array_between():
    n = 512
    square = Candidate("square", lambda x: (m := jnp.outer(x, x) + 1) @ (m @ x), (jnp.ones(n, jnp.float32) / n,))
    (row,) = measure(Problem("m m x", "square", [square]), 2)
    assert 4 * n * n <= row["temp_bytes"] < 3 * 4 * n * n


def test_a_ratio_is_taken_within_each_round(monkeypatch):
    # The machine is ten times slower in two rounds of five, and a burst hits `a` alone in the first. The medians
    # then come from different spells (10 and 3); the ratio within most rounds is 3 all the same.
    clock = {"a": iter([10, 10, 1, 1, 10, 10, 10, 10, 1, 1]), "b": iter([3, 3, 3, 3, 30, 30, 30, 30, 3, 3])}
    monkeypatch.setattr(harness, "_time", lambda call: float(next(clock[str(call())])))
    named = [Candidate(name, np.array, (name,), lambda _: X, jit=False) for name in clock]
    rows = measure(Problem("clock", "a", named), 5)
    assert [row["median_s"] for row in rows] == [10, 3]
    assert [row["min_s"] for row in rows] == [1, 3]
    assert [row["ratio"] for row in rows] == [1, 3]


@pytest.fixture
def written(tmp_path, capsys, monkeypatch):
    """Runs two problems of the first benchmark at a tiny size: what it printed and what it wrote."""

    def problems(quick):
        assert quick
        yield recurrence.truncated(TINY, 2)
        yield recurrence.checkpointed(TINY)

    def run(*argv):
        path = tmp_path / "recurrence.json"
        recurrence.main(["--quick", "--rounds", "2", "--json", str(path), *argv])
        return capsys.readouterr().out, json.loads(path.read_text("utf-8"))

    monkeypatch.setattr(recurrence, "problems", problems)
    return run


def test_the_first_table(written, tmp_path):
    pytest.importorskip("flax", reason="needs Flax, to compare with")
    out, found = written("--picture", str(tmp_path / "recurrence.png"))
    assert (tmp_path / "recurrence.png").stat().st_size > 10_000
    header, *lines = [line for line in out.splitlines() if line.startswith(" ")]
    assert re.split(r"\s{2,}", header.strip()) == harness.COLUMNS
    assert {len(line) for line in lines} == {len(header)}  # aligned
    names = [re.split(r"\s{2,}", line.strip())[0] for line in lines]
    assert names == ["jaxseq", "stop_gradient", "jaxseq", "jaxseq, checkpoint", "flax"]

    assert found["versions"]["jax"] == jax.__version__
    assert set(found) == {"device", "cores", "date", "versions", "tables"}  # neither host nor path
    assert [table["baseline"] for table in found["tables"]] == ["jaxseq"] * 2
    for table in found["tables"]:
        assert table["title"] in out
        assert table["rounds"] == 2
        assert all(set(row) == FIGURES for row in table["rows"])
        assert all(row["error"] < 1e-5 for row in table["rows"])


def names_of_equal(problem):
    """Its candidates, which give the same."""
    rows = measure(problem, 2)
    assert all(row["error"] < 1e-5 for row in rows)
    return [row["name"] for row in rows]


@pytest.mark.parametrize("kind", recurrence.KINDS)
def test_every_library_computes_the_same_recurrence(kind):
    for library in recurrence.LIBRARIES:
        pytest.importorskip(library, reason=f"needs {library}, to compare with")
    forward, gradient = recurrence.plain(kind, TINY)
    haiku = ["haiku"] if kind == "lstm" else []
    names = ["jaxseq", "reference", "flax", "equinox", *haiku, "keras", "torch"]
    assert names_of_equal(forward) == names_of_equal(gradient) == names


@pytest.mark.parametrize("kind", recurrence.KINDS)
def test_nothing_that_is_compared_is_zero(kind):
    """Else a wrong conversion could pass."""
    _, problem = recurrence.plain(kind, TINY)
    hand = problem.candidates[0]
    assert all(np.any(a) for a in jax.tree.leaves(hand.common(jax.jit(hand.run)(*hand.args))))


def test_features_of_recurrence_are_compared_with_what_one_would_write():
    pytest.importorskip("flax", reason="needs Flax, to compare with")
    lengths, against_whole = recurrence.with_lengths(TINY)
    assert names_of_equal(lengths) == ["jaxseq", "flax"]
    assert names_of_equal(against_whole) == ["jaxseq", "jaxseq, without"]
    resets, _ = recurrence.with_resets(TINY)
    assert names_of_equal(resets) == ["jaxseq", "where in a scan"]
    assert names_of_equal(recurrence.batch_major(TINY)) == ["jaxseq", "jaxseq, swapped"]


@pytest.mark.parametrize("name", ["depthwise 1-D, dilated", "groups of 8, 2-D", "transposed 3-D"])
def test_every_library_computes_the_same_convolution(name, monkeypatch):
    pytest.importorskip("torch", reason="needs torch, to compare with")
    pytest.importorskip("flax", reason="needs Flax, to compare with")
    assert len({shape.name for shape in conv.SHAPES}) == len(conv.SHAPES) >= 16
    monkeypatch.setattr(conv, "SHAPES", [shape for shape in conv.SHAPES if shape.name == name])
    found = list(conv.problems(quick=True))
    assert [problem.title.partition(", ")[0] for problem in found] == ["forward", "forward + gradient"]
    for problem in found:
        rows = measure(problem, 2)
        assert [row["name"] for row in rows] == ["jaxseq", "lax", "flax", "torch"]
        assert all(row["error"] < 1e-5 for row in rows)


def test_every_scan_computes_the_same_linear_recurrence():
    problem = next(linear.problems(quick=True))
    assert names_of_equal(problem) == ["jaxseq", "scan", "associative"]


@pytest.mark.parametrize("name", linear.LAYERS)
def test_every_library_computes_the_same_linear_layer(name):
    """Libraries that are not installed have no figures."""
    problem = linear.layer(name, quick=True)
    rows = measure(problem, 2)
    assert all(row.get("error", 0) < 1e-5 for row in rows)
    real = name not in ("lru", "s5")
    others = ["recurrentgemma", "torch", "mambapy"] if real else ["torch"]
    assert [row["name"] for row in rows] == ["jaxseq", "scan", "associative", *others]


def test_every_method_computes_the_same_states():
    names = ["jaxseq", "deer", "quasi-deer", "deer tree", "quasi-deer tree"]
    for problem in parallel.problems(quick=True):
        assert names_of_equal(problem) == names
    assert re.fullmatch(r"[2-6] to [2-6]", parallel.iterations(1, "deer", B=2, T=32, H=8))


def test_every_shipped_cell_is_measured():
    """Cells that are functions of their own by `benchmarks.recurrence`, the others by `benchmarks.cells`."""
    shipped = {name for name in jaxseq.cells.__all__ if isinstance(getattr(jaxseq.cells, name), jaxseq.Cell)}
    measured = {cell.name for cell, _ in cells.CELLS.values()}
    assert measured - {"leaky"} == shipped - {"rnn", "relu_rnn", "gru", "lstm"}


def test_without_flax_its_rows_say_so(written, monkeypatch):
    monkeypatch.setitem(sys.modules, "flax", None)
    monkeypatch.setitem(sys.modules, "flax.linen", None)
    out, found = written()
    assert out.count("not installed") == 1
    assert "flax" not in found["versions"]
    assert found["tables"][1]["rows"][-1] == {"name": "flax"}


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--rounds", "1"], "--rounds must be at least 2"),
        (["--json", "no/such/folder/recurrence.json"], "--json: no such folder: no/such/folder"),
        (["--picture", "no/such/folder/recurrence.png"], "--picture: no such folder: no/such/folder"),
    ],
)
def test_mistakes_on_the_command_line(argv, complaint, capsys):
    with pytest.raises(SystemExit) as caught:
        recurrence.main([*argv, "--quick"])
    assert caught.value.code == 2
    assert complaint in capsys.readouterr().err.replace("\\", "/")


# --- The one table ---

MEASURED = Path(__file__).parents[2] / "docs" / "measured"


def table(title, **ratios):
    """As the harness writes it; a candidate's bytes are a tenth of its ratio."""
    rows = [
        {"name": name, "ratio": ratio, "median_s": ratio, "temp_bytes": ratio / 10} for name, ratio in ratios.items()
    ]
    return {
        "title": title,
        "baseline": "jaxseq",
        "rows": [{"name": "jaxseq", "ratio": 1, "median_s": 1, "temp_bytes": 0.1}, *rows],
    }


def test_a_row_is_the_geometric_mean_over_sizes():
    tables = [
        table("lstm forward + gradient, B=1", reference=2, torch=0.5),
        table("lstm forward + gradient, B=2", reference=8, flax=3),
        table("lstm forward, B=1", reference=100),
        table("forward + gradient, depthwise 1-D: 8", lax=5, torch=1),
    ]
    found = gain.gains(tables, "median_s")
    assert found["`lstm`"]["plain JAX"] == pytest.approx((4, 2, 8))
    assert found["`lstm`"]["Flax"] == pytest.approx((3, 3, 3))
    assert found["`lstm`"]["torch"] == pytest.approx((0.5, 0.5, 0.5))
    assert found["`gru`"]["torch"] is None
    lines = gain.markdown(tables).splitlines()
    assert (
        lines[2 + list(gain.ROWS).index("`lstm`")]
        == "| `lstm` | 4.0 (2.0 to 8.0) | 3.0 |  |  |  | 0.50 | 4.0 (2.0 to 8.0) |"
    )


def test_every_problem_is_in_one_row():
    """Of those with a gradient, but for what compares us with ourselves."""
    tables = gain.read(sorted(MEASURED.glob("*.json")))
    with_gradient = [t["title"] for t in tables if "gradient" in t["title"] or t["title"].startswith("lstm with")]
    assert with_gradient
    for title in with_gradient:
        rows = [row for row, pattern in gain.ROWS.items() if re.match(pattern, title)]
        assert len(rows) == (0 if "time only" in title else 1), title


def test_the_pages_show_what_was_measured(tmp_path):
    files = sorted(MEASURED.glob("*.json"))
    table = gain.markdown(gain.read(files))
    assert table in (MEASURED.parent / "measured.md").read_text("utf-8")
    lines = (MEASURED.parents[1] / "README.md").read_text("utf-8").splitlines()
    shown = [line for line in lines if line.startswith("|")]  # some rows of the table, in its order
    header, rule, *rows = table.splitlines()
    assert shown == [header, rule, *(row for row in rows if row in shown)]
    assert len(shown) > 2
    gain.main([*map(str, files), "--picture", str(tmp_path / "gain.svg")])
    drawn, kept = ((folder / "gain.svg").read_text("utf-8") for folder in (tmp_path, MEASURED))
    assert drawn.count("<path") == kept.count("<path"), "run python -m benchmarks.gain again"


@pytest.mark.parametrize(
    ("name", "functions", "depth"), [("lstm", 135, 18), ("conv", 75, 16), ("conv(groups=4)", 80, 20)]
)
def test_a_call_on_one_device_runs_few_functions_and_none_for_devices(name, functions, depth):
    code = (
        "import sys; from benchmarks import calls; f, *args = calls.problems()[sys.argv[1]]; "
        "found = calls.measure(f, *args); print(found.functions, found.depth, found.closures); "
        "print(*{code.co_filename for code in found.codes})"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, name], cwd=ROOT, capture_output=True, text=True, check=True, env=ONE_DEVICE
    )
    counts, files = run.stdout.splitlines()
    found, deepest, _ = map(int, counts.split())
    assert 30 < found <= functions
    assert deepest <= depth
    assert "_distributed" not in files
