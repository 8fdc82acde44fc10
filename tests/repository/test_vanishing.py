"""`examples/vanishing.py`: norms and exponents against numpy, clipping by arithmetic, and what training changes."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import script

SCRIPT = Path(__file__).parents[2] / "examples" / "vanishing.py"
optax = pytest.importorskip("optax", reason="the examples need the extra `examples`: optax, matplotlib")
pytest.importorskip("matplotlib", reason="the examples need the extra `examples`: optax, matplotlib")

pytestmark = pytest.mark.usefixtures("as_users_have_jax")

SMALL = {"D": 3, "H": 4, "BATCH": 2, "T": 5, "EXAMPLES": 2, "LONG": 60, "BURN_IN": 20, "EXPONENTS": 3}


@pytest.fixture
def vanishing(monkeypatch):
    """A small one, traced anew."""
    module = script(SCRIPT)
    for name, value in SMALL.items():
        monkeypatch.setattr(module, name, value)
    return module


@pytest.fixture
def text(key):
    return jax.random.randint(key, (200,), 0, 6)


def test_norms_are_those_of_the_product_of_jacobians(vanishing, key, text):
    """h' = tanh(x W_x + h W_h): J = diag(1 - h'²) W_hᵀ."""
    model = vanishing.init("RNN", key, 6)
    found = vanishing.measure("RNN", model, text).norms
    s = np.asarray(vanishing.pieces(text, jax.random.key(0), 2, 11))
    E, w_x, w_h = (np.asarray(a, float) for a in (model.E, model.cell.w_x, model.cell.w_h))
    logs = np.zeros((2, 6))
    for i in range(2):
        h, Js = np.zeros(4), []
        for x in E[s[:-1, i]]:
            h = np.tanh(x @ w_x + h @ w_h)
            Js.append(np.diag(1 - h**2) @ w_h.T)
        P = np.eye(4)
        for lag, J in enumerate(Js[:-6:-1], 1):
            P = P @ J
            logs[i, lag] = np.log(np.linalg.norm(P, 2))
    np.testing.assert_allclose(found, np.exp(logs.mean(0)), rtol=1e-4)


@pytest.mark.parametrize("gain", [0.5, 1.0])
def test_exponents_where_they_are_known(vanishing, key, text, gain):
    """Without inputs h stays zero, tanh' is 1, and each step scales every direction by the gain."""
    model = vanishing.init("RNN", key, 6, gain)._replace(E=jnp.zeros((6, 3)))
    np.testing.assert_allclose(vanishing.exponents("RNN", model, text).exponents, [np.log(gain)] * 3, atol=1e-5)


def test_a_cell_of_two_states_is_measured_alike(vanishing, key, text):
    found = vanishing.measure("LSTM", vanishing.init("LSTM", key, 6), text)
    assert found.norms.shape == (6,)
    assert found.norms[0] == 1
    assert found.lyapunov.exponents[0] < 0
    assert found.bias.windows.tolist() == [1, 2, 4, 8, 10]
    assert found.bias.relative_error[-1] == 0
    assert (found.bias.relative_error[:-1] > 0).all()


def test_how_long_a_gradient_lasts(vanishing):
    assert vanishing.lasts([1.0, 0.5, 0.002, 0.0009, 0.0001]) == 2
    assert vanishing.lasts([1.0, 0.0009, 0.002, 0.0009]) == 2, "the last time that it falls"
    assert vanishing.lasts([1.0, 10.0, 0.009, 0.009]) == 1, "below a thousandth of the largest"
    assert vanishing.lasts([1.0, 0.5]) is None


def test_clipping_shortens_the_step_to_one(vanishing, key, text):
    """Plain descent at rate 1 moves the weights by the gradient itself."""
    model = vanishing.init("RNN", key, 6)
    model = model._replace(W=100 * model.W)  # loud enough for a gradient above one
    lengths = []
    for clip in (1e9, 1.0):
        optimizer = optax.chain(optax.clip_by_global_norm(clip), optax.sgd(1.0))
        after, costs, norms = vanishing.train("RNN", model, key, text, optimizer=optimizer, steps=1)
        assert costs.shape == norms.shape == (1,)
        lengths.append(float(optax.tree.norm(jax.tree.map(jnp.subtract, after, model))))
    assert float(norms[0]) > 1.1
    assert lengths == pytest.approx([float(norms[0]), 1.0], rel=1e-3)


def test_a_run_leaves_a_table_and_a_picture(vanishing, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(vanishing, "CELLS", {name: vanishing.CELLS[name] for name in ("RNN", "GRU")})
    monkeypatch.setattr(vanishing, "characters", lambda: (jnp.arange(2000) * 7 % 11, 11))
    path = tmp_path / "new" / "vanishing.png"
    assert vanishing.main(["--steps=2", "--gain=2", f"--out={path}"]) == 0
    said = capsys.readouterr().out
    assert re.findall(r"^(RNN|GRU|LSTM) .* -> .* -> .* -> .* -> \d+$", said, re.MULTILINE) == ["RNN", "GRU"]
    assert re.findall(r"^(not clipped|clipped) +first gradient", said, re.MULTILINE) == ["not clipped", "clipped"]
    picture = pytest.importorskip("matplotlib.image").imread(path)
    assert min(picture.shape[:2]) > 600
    assert picture[..., :3].std() > 0.05, "the picture is blank"


def test_the_text(vanishing):
    text, vocabulary = vanishing.characters()
    assert text.size > 100_000
    assert (int(text.min()), int(text.max())) == (0, vocabulary - 1)


@pytest.mark.parametrize("option", ["--steps=0", "--gain=0", "--gain=nan", "--seed=-1", f"--seed={2**31}"])
def test_a_mistake_ends_with_status_2(vanishing, option, monkeypatch, capsys):
    monkeypatch.setattr(vanishing, "run", lambda *_: pytest.fail("it went on"))
    with pytest.raises(SystemExit) as stop:
        vanishing.main([option])
    assert stop.value.code == 2
    assert "expected --steps >= 1" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_costs_one_line(vanishing, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(vanishing, "run", lambda *_: pytest.fail("it went on"))
    (tmp_path / "file").write_text("")
    assert vanishing.main([f"--out={tmp_path / 'file' / 'out.png'}"]) == 2
    assert re.fullmatch(r"vanishing\.py: error: cannot write to .*out\.png: .+\n", capsys.readouterr().err)


def test_a_loss_that_is_not_finite_stops_it(vanishing):
    vanishing.finite("RNN", np.array([1.0, 2.0]))
    with pytest.raises(FloatingPointError, match="the loss of GRU is nan"):
        vanishing.finite("GRU", np.array([1.0, np.nan]))


def test_training_lengthens_the_memory_of_the_lstm_and_clipping_saves_the_rnn(tmp_path, capsys):
    assert script(SCRIPT).main([f"--out={tmp_path / 'out.png'}"]) == 0
    said = capsys.readouterr().out
    row = r"^(RNN|GRU|LSTM) +(\S+) -> (\S+) +(?:> )?(\d+) -> +(?:> )?(\d+) +(\S+) -> (\S+) +(\d+) -> (\d+)$"
    rows = {name: list(map(float, figures)) for name, *figures in re.findall(row, said, re.MULTILINE)}
    losses, lasts, rates = ({name: r[i : i + 2] for name, r in rows.items()} for i in (0, 2, 4))
    assert all(before > 4 and after < 2 for before, after in losses.values())
    assert all(rate < 0 for pair in rates.values() for rate in pair), "all gradients vanish in the end"
    for when in (0, 1):
        assert lasts["RNN"][when] < lasts["GRU"][when] < lasts["LSTM"][when]
        assert rates["RNN"][when] < rates["GRU"][when] < rates["LSTM"][when]
    assert lasts["LSTM"][1] > lasts["LSTM"][0]
    ((exponent,),) = [re.findall(r"recurrent weights x 3: Lyapunov exponent (\S+);", said)]
    assert float(exponent) > 0
    (torn, saved) = (
        float(a) for a in re.findall(r"clipped +first gradient \S+, nats \S+ -> (\S+)$", said, re.MULTILINE)
    )
    assert saved < torn - 0.3
