"""`make digits`: what it learns, on what, and what it measures."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import script

import jaxseq

SCRIPT = Path(__file__).parents[2] / "examples" / "digits.py"
EXTRA = "the examples need the extra `examples`: optax, tqdm, matplotlib, scikit-learn"
for needed in ("optax", "tqdm", "matplotlib", "sklearn"):
    pytest.importorskip(needed, reason=EXTRA)

pytestmark = pytest.mark.usefixtures("as_users_have_jax")


@pytest.fixture(scope="module")
def digits():
    return script(SCRIPT)


def test_it_learns(digits, tmp_path, capsys):
    """Chance is 10 %; with the 500 steps of the default it is 99 %."""
    path = tmp_path / "new" / "digits.png"
    assert digits.main(["--steps=80", "--quiet", f"--out={path}"]) == 0
    said = capsys.readouterr()
    picture = pytest.importorskip("matplotlib.image").imread(path)
    assert picture.shape[0] > 500 < picture.shape[1]
    assert picture[..., :3].std() > 0.1
    sizes = 9 * 32 + 32, 9 * 32 * 32 + 32, 9 * 32 * 64 + 64, 9 * 64 * 64 + 64, 4 * 64 * 10 + 10
    assert f"1437 training images, 360 held out; {sum(sizes)} parameters" in said.out
    (difference,) = re.findall(r"float64: largest relative difference (\S+)", said.out)
    assert 0 < float(difference) < 1e-12
    ((right, wrong),) = re.findall(r"held out: accuracy (\S+)%, (\d+) of 360 wrong", said.out)
    assert float(right) == pytest.approx(100 * (1 - int(wrong) / 360), abs=0.01)
    assert float(right) >= 90
    assert re.search(r"\d+ s including compilation", said.out)
    assert said.err == "", "--quiet"


def test_a_wrong_gradient_stops_it(digits, monkeypatch, tmp_path, capsys):
    """The reference implementation's gradient does not reach the bias: the comparison has to see that."""
    reference = jaxseq.reference.conv

    def without(x, kernel, bias, **options):
        return reference(x, kernel, jax.lax.stop_gradient(bias), **options)

    monkeypatch.setattr(jaxseq.reference, "conv", without)
    monkeypatch.setattr(digits, "learn", lambda *_, **__: pytest.fail("it went on"))
    digits.gradient_difference.clear_cache()  # it may have been traced with the true reference implementation
    assert digits.main(["--quiet", f"--out={tmp_path / 'a.png'}"]) == 1
    assert re.fullmatch(
        r"digits\.py: error: the gradient of jaxseq differs from jax\.grad by \S+\n", capsys.readouterr().err
    )
    digits.gradient_difference.clear_cache()


def test_what_is_held_out(digits):
    images, unseen, labels, unseen_labels = digits.digits(0)
    assert images.shape == (1437, 8, 8, 1)
    assert unseen.shape == (360, 8, 8, 1)
    assert images.dtype == jnp.float32
    assert (float(images.min()), float(images.max())) == (0, 1)
    # A fifth of each kind, and every digit in one of the parts.
    of_each = np.bincount(unseen_labels, minlength=10) / np.bincount(np.concatenate([labels, unseen_labels]))
    np.testing.assert_allclose(of_each, 0.2, atol=0.01)
    everything = np.sort(np.concatenate([images, unseen]).reshape(1797, 64), axis=0)
    raw = pytest.importorskip("sklearn.datasets").load_digits().data / 16
    np.testing.assert_array_equal(everything, np.sort(raw, axis=0))
    assert (digits.digits(0)[1] == unseen).all()
    assert not (digits.digits(1)[1] == unseen).all()


def test_a_shift_moves_by_one_pixel_at_most_and_comes_in_all_nine(digits, key):
    point = jnp.zeros((500, 8, 8, 1)).at[:, 3, 4].set(1)
    moved = digits.shifted(key, point)
    assert (moved.sum((1, 2, 3)) == 1).all()
    _, v, u, _ = jnp.nonzero(moved)
    assert set(zip((v - 3).tolist(), (u - 4).tolist(), strict=True)) == {(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)}


def test_the_rows_below_are_not_seen(digits, key):
    """The last probabilities are those of the whole image, and the first ones depend on the first row only."""
    keys = jax.random.split(key)
    model, images = digits.init(keys[0]), jax.random.uniform(keys[1], (3, 8, 8, 1))
    found = digits.by_rows(model, images)
    assert found.shape == (3, 8, 10)
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(found[:, -1], jax.nn.softmax(digits.scores(model, images)), rtol=1e-4, atol=1e-6)
    changed = (digits.by_rows(model, images.at[:, 5].add(1)) != found).any((0, 2))
    assert changed.tolist() == [False] * 5 + [True] * 3


def test_wrong_digits_are_shown_first_and_then_one_of_each(digits):
    truth = np.array([3, 3, 1, 0, 2, 2, 4, 9, 8, 7, 6, 5, 1, 1, 1])
    answers = truth.copy()
    answers[[4, 1]] = 7
    assert digits.selected(truth, answers) == [1, 4, 3, 2, 5, 0, 6, 11, 10, 9, 8, 7]
    assert digits.selected(truth, 9 - truth) == [0, 1, 2, 3, 4, 5], "at most half are wrong"
    assert len(digits.selected(truth[:2], truth[:2])) == 2


def test_a_loss_that_is_not_finite_stops_it(digits, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(digits, "gradient_difference", lambda *_: 0.0)
    monkeypatch.setattr(digits, "train_step", lambda model, state, *_, **__: (model, state, jnp.float32(jnp.nan)))
    assert digits.main(["--quiet", "--steps=3", f"--out={tmp_path / 'a.png'}"]) == 1
    assert capsys.readouterr().err == "digits.py: error: the loss is nan at step 1\n"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--steps=0", "expected --steps >= 1"),
        ("--seed=-1", "expected --steps >= 1"),
        (f"--seed={2**31}", "expected --steps >= 1"),
        ("--out=.", "cannot write to .: Is a directory"),
    ],
)
def test_a_mistake_ends_with_status_2(digits, option, message, monkeypatch, capsys):
    monkeypatch.setattr(digits, "run", lambda *_: pytest.fail("it went on"))
    with pytest.raises(SystemExit) as stop:
        digits.main([option])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
