"""`examples/sequential_digits.py`: what a sequence contains, what the models read, and what they learn."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import script

SCRIPT = Path(__file__).parents[2] / "examples" / "sequential_digits.py"
EXTRA = "the examples need the extra `examples`: optax, matplotlib, scikit-learn"
for needed in ("optax", "matplotlib", "sklearn"):
    pytest.importorskip(needed, reason=EXTRA)

pytestmark = pytest.mark.usefixtures("as_users_have_jax")


@pytest.fixture(scope="module")
def digits():
    return script(SCRIPT)


def test_what_is_held_out(digits):
    data = digits.load(0)
    assert data.images.shape == (1437, 8, 8)
    assert data.unseen.shape == (360, 8, 8)
    assert (data.images.min(), data.images.max()) == (0, 1)
    everything = np.concatenate([data.images, data.unseen]).reshape(1797, 64)
    raw = pytest.importorskip("sklearn.datasets").load_digits().data.astype(np.float32) / 16
    np.testing.assert_array_equal(np.unique(everything, axis=0), np.unique(raw, axis=0))
    assert (digits.load(0).unseen == data.unseen).all()
    assert not (digits.load(1).unseen == data.unseen).all()


def test_a_sequence_is_the_image_row_by_row(digits, key):
    """In the middle between two pixel centres, linear interpolation returns their mean."""
    images = jax.random.uniform(key, (3, 8, 8))
    xs = digits.sequences(images)
    assert xs.shape == (784, 3, 1)
    enlarged = np.asarray(xs[:, 1, 0]).reshape(28, 28)
    centres = (np.arange(28) + 0.5) * 8 / 28 - 0.5
    columns = np.stack([np.interp(centres, np.arange(8), row) for row in np.asarray(images[1])])
    expected = np.stack([np.interp(centres, np.arange(8), column) for column in columns.T], 1)
    np.testing.assert_allclose(enlarged, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["S5", "LRU 0.9", "LRU 0.99", "GRU"])
def test_the_decision_depends_on_the_first_pixel(digits, key, name):
    """In a short sequence: after 784 steps, a GRU forgets the first pixel before training."""
    model = digits.init(key, name=name)
    xs = jax.random.uniform(key, (9, 2, 1))
    gradient = jax.grad(lambda xs: digits.scores(model, xs, name).var())(xs)
    assert (gradient != 0).all()


def test_the_models_have_about_as_many_parameters(digits, key):
    counts = [sum(a.size for a in jax.tree.leaves(digits.init(key, name=name))) for name in digits.LAYERS]
    assert max(counts) < 1.01 * min(counts)


def test_memory_at_initialization(digits, key):
    """The share of states that take more than 100 steps to decay by the factor e, as the script states."""

    def share(name):
        if name == "S5":
            p = digits.LAYERS[name].init(key, 32, 400)
            rate = -p.real * jnp.exp(p.log_step)
        else:
            rate = jnp.exp(digits.LAYERS[name].init(key, 32, 400).nu)
        return float((rate < 1 / 100).mean())

    assert share("S5") == pytest.approx(2 / 3, abs=0.06)
    assert share("LRU 0.9") == pytest.approx(1 / 10, abs=0.05)
    assert share("LRU 0.99") > 0.97


def test_norm(digits, key):
    h = digits.norm(3 + 2 * jax.random.normal(key, (4, 5, 32)))
    np.testing.assert_allclose(h.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(h.var(-1), 1, rtol=1e-4)


def test_a_classifier_without_order_is_worse(digits):
    data = digits.load(0)
    assert digits.linear_accuracy(data, in_order=True) > 0.9
    assert 0.15 < digits.linear_accuracy(data, in_order=False) < 0.4


@pytest.mark.parametrize(("steps", "expected"), [(2, [1, 2]), (8, [*range(1, 9)]), (400, [*range(50, 401, 50)])])
def test_evaluations(digits, steps, expected):
    assert digits.evaluated(steps) == expected


def test_s5_learns_from_the_last_step(digits, tmp_path, capsys, monkeypatch):
    """Chance is 10 %; with the 400 steps of the default it is above 90 %."""
    monkeypatch.setattr(digits, "LAYERS", {"S5": digits.LAYERS["S5"]})
    path = tmp_path / "new" / "digits.png"
    assert digits.main(["--steps=100", f"--out={path}"]) == 0
    printed = capsys.readouterr().out
    assert "1437 training images, 360 held out, 784 steps each; parameters: S5 " in printed
    accuracies = [float(a) for a in re.findall(r"^step \d+ +(\S+)%$", printed, re.MULTILINE)]
    assert len(accuracies) == 8
    assert accuracies[-1] > 50
    assert re.search(r"S5: \d+ ms per training step \(median\), first step \d+\.\d s", printed)
    assert re.search(r"\d+ s including compilation", printed)
    picture = pytest.importorskip("matplotlib.image").imread(path)
    assert min(picture.shape[:2]) > 600
    assert picture[..., :3].std() > 0.05, "the picture is blank"


def test_a_loss_that_is_not_finite_stops_it(digits, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(digits, "train_step", lambda model, state, *_, **__: (model, state, jnp.float32(jnp.nan)))
    assert digits.main(["--steps=3", f"--out={tmp_path / 'a.png'}"]) == 1
    assert capsys.readouterr().err == "sequential_digits.py: error: the loss of S5 is nan at step 1\n"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--steps=1", "expected --steps >= 2"),
        ("--seed=-1", "expected --steps >= 2"),
        (f"--seed={2**31}", "expected --steps >= 2"),
        ("--out=.", "cannot write to .: Is a directory"),
    ],
)
def test_a_mistake_ends_with_status_2(digits, option, message, monkeypatch, capsys):
    monkeypatch.setattr(digits, "run", lambda *_: pytest.fail("it went on"))
    with pytest.raises(SystemExit) as stop:
        digits.main([option])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
