"""`examples/long_memory.py`: the tasks by hand, what truncation lets across by jax.grad, and what is learnt."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import script

import jaxseq

SCRIPT = Path(__file__).parents[2] / "examples" / "long_memory.py"
pytest.importorskip("optax", reason="the examples need the extra `examples`: optax, matplotlib")
pytest.importorskip("matplotlib", reason="the examples need the extra `examples`: optax, matplotlib")

pytestmark = pytest.mark.usefixtures("as_users_have_jax")

# task, window, cuts, whether one is between, errors and baseline
ROW = r"^(adding|copying) +(\d+|full) +((?:\d+, )*\d+|none) +(yes|no)((?: +\d+\.\d+)+)$"


@pytest.fixture(scope="module")
def long_memory():
    return script(SCRIPT)


def test_adding_by_hand(long_memory, key):
    xs, targets = long_memory.draw_adding(key, 500, 20)
    assert xs.shape == (30, 500, 2)
    u, m = np.moveaxis(np.asarray(xs), -1, 0)
    assert 0 <= u.min() < 0.01
    assert 0.99 < u.max() <= 1
    places = np.array([np.flatnonzero(marks) for marks in m.T])  # two each, or this would be no array
    assert set(places[:, 0]) == set(range(5))
    assert set(places[:, 1]) == set(range(5, 10))
    by_hand = [u[a, i] + u[b, i] for i, (a, b) in enumerate(places)]
    np.testing.assert_allclose(targets, by_hand, rtol=1e-6)


def test_copying_by_hand(long_memory, key):
    xs, symbols = long_memory.draw_copying(key, 50, 7)
    assert xs.shape == (7 + 3, 50, 8 + 2)
    said = np.asarray(xs).argmax(-1)
    np.testing.assert_array_equal(said[:3], symbols)
    assert set(np.unique(symbols)) == set(range(8))
    assert (said[3:].T == [8, 8, 8, 9, 8, 8, 8]).all(), "blanks, `go` at lag - 1 = 6, blanks"
    np.testing.assert_allclose(jnp.square(xs).mean((0, 2)), 1, rtol=1e-6)


def test_baselines(long_memory, key):
    """Always 1: the variance of u_a + u_b, 2/12. All symbols alike: log 8."""
    adding, copying = long_memory.TASKS["adding"], long_memory.TASKS["copying"]
    _, y = adding.draw(key, 50_000, 12)
    assert adding.baseline == 1 / 6
    assert float(adding.error(jnp.ones((22, 50_000, 1)), y)) == pytest.approx(1 / 6, rel=0.02)
    _, y = copying.draw(key, 20, 12)
    assert copying.baseline == pytest.approx(2.0794415)
    assert float(copying.error(jnp.zeros((15, 20, 8)), y)) == pytest.approx(2.0794415, rel=1e-6)


def test_an_answer_that_is_right_costs_nothing(long_memory, key):
    """Whatever the outputs were before the question."""
    noise = jax.random.normal(key, (22, 4, 1))
    _, y = long_memory.draw_adding(key, 4, 12)
    assert float(long_memory.squared(noise.at[-1, :, 0].set(y), y)) == 0
    noise = jax.random.normal(key, (15, 4, 8))
    _, y = long_memory.draw_copying(key, 4, 12)
    assert float(long_memory.cross_entropy(noise.at[-3:].set(50 * jax.nn.one_hot(y, 8)), y)) < 1e-6


@pytest.mark.parametrize(("task", "lag"), [("adding", 10), ("copying", 9)])
@pytest.mark.parametrize("window", [None, 5, 11, 20])
def test_what_crosses_is_what_jax_says(long_memory, key, task, lag, window):
    """The gradient of each answer to each input that it is about, through `jaxseq.rnn` itself."""
    pairs = long_memory.TASKS[task].dependencies(lag)
    xs = jax.random.normal(key, (1 + pairs[-1][1], 1))
    params = jaxseq.rnn_init(key, 1, 4)
    answers = jax.jit(jax.jacobian(lambda xs: jaxseq.rnn(params, None, xs, truncation=window)[1].sum(-1)))
    reached = answers(xs)[..., 0]
    assert long_memory.crosses(long_memory.TASKS[task], window, lag) == all(reached[t, s] != 0 for s, t in pairs)


def test_cuts(long_memory):
    assert long_memory.cuts(10, 30) == [10, 20], "at the end nothing is left to cut"
    assert long_memory.cuts(25, 30) == [25]
    assert long_memory.cuts(25, 23) == long_memory.cuts(None, 23) == []


def test_training_differs_by_the_gradient_alone(long_memory, key, monkeypatch):
    """So the first error is the same under every window, and the second is not."""
    monkeypatch.setattr(long_memory, "H", 4)
    options = {"task": "copying", "cell": "RNN", "lag": 6, "steps": 2}
    full, cut = (np.asarray(long_memory.train(key, window=window, **options)) for window in (None, 3))
    long_memory.train.clear_cache()  # it was traced with another H
    assert full[0] == pytest.approx(cut[0], rel=1e-6)
    assert full[1] != cut[1]
    assert full[0] == pytest.approx(long_memory.TASKS["copying"].baseline, rel=0.5)


def test_a_run_leaves_a_table_and_a_picture(long_memory, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(long_memory, "train", lambda *_, **__: jnp.linspace(2.0, 0.5, 40))
    path = tmp_path / "new" / "long.png"
    assert long_memory.main(["--lag=12", f"--out={path}"]) == 0
    rows = re.findall(ROW, capsys.readouterr().out, re.MULTILINE)
    assert [row[:4] for row in rows] == [
        ("adding", "full", "none", "no"),
        ("adding", "17", "17", "yes"),
        ("adding", "6", "6, 12, 18", "yes"),
        ("copying", "full", "none", "no"),
        ("copying", "17", "none", "no"),
        ("copying", "6", "6, 12", "yes"),
    ]
    assert [row[-1].split()[-1] for row in rows] == ["0.1667"] * 3 + ["2.0794"] * 3
    picture = pytest.importorskip("matplotlib.image").imread(path)
    assert min(picture.shape[:2]) > 600
    assert picture[..., :3].std() > 0.05, "the picture is blank"


@pytest.mark.parametrize("option", ["--steps=0", "--lag=9", "--lag=1001", "--seed=-1", f"--seed={2**31}"])
def test_a_mistake_ends_with_status_2(long_memory, option, monkeypatch, capsys):
    monkeypatch.setattr(long_memory, "run", lambda *_: pytest.fail("it went on"))
    with pytest.raises(SystemExit) as stop:
        long_memory.main([option])
    assert stop.value.code == 2
    assert "expected --lag from 10 to 1000, --steps >= 1" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_costs_one_line(long_memory, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(long_memory, "run", lambda *_: pytest.fail("it went on"))
    (tmp_path / "file").write_text("")
    assert long_memory.main([f"--out={tmp_path / 'file' / 'out.png'}"]) == 2
    assert re.fullmatch(r"long_memory\.py: error: cannot write to .*out\.png: .+\n", capsys.readouterr().err)


def test_an_error_that_is_not_finite_stops_it(long_memory, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(long_memory, "train", lambda *_, **__: jnp.array([1.0, jnp.nan]))
    assert long_memory.main([f"--out={tmp_path / 'out.png'}"]) == 1
    assert capsys.readouterr().err == "long_memory.py: error: the error of RNN in adding is nan\n"


def test_what_is_cut_is_not_learnt(long_memory, tmp_path, capsys, monkeypatch):
    """The first of the two problems: both take minutes."""
    monkeypatch.setattr(long_memory, "TASKS", {"adding": long_memory.TASKS["adding"]})
    assert long_memory.main([f"--out={tmp_path / 'out.png'}"]) == 0
    rows = re.findall(ROW, capsys.readouterr().out, re.MULTILINE)
    figures = {row[:2]: np.array(row[4].split(), float) for row in rows}
    errors = {which: row[:3] / row[3] for which, row in figures.items()}  # of RNN, GRU and LSTM; 1 is the baseline
    assert (errors["adding", "full"][1:] < 0.02).all(), "GRU and LSTM learn it"
    assert errors["adding", "full"][0] > 0.8, "the RNN does not, although nothing is cut"
    assert (errors["adding", "10"] > 10 * errors["adding", "full"])[1:].all()
    assert (errors["adding", "25"] > 10 * errors["adding", "full"])[1:].all(), "longer than the lag, and cut"
    for window in ("10", "25"):
        assert errors["adding", window][[0, 2]] == pytest.approx(1, rel=0.05), "RNN and LSTM stay at the baseline"
