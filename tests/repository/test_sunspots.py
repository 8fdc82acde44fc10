"""`examples/sunspots.py`: its models against numpy, what they may look at, and what it measures."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import script

EXTRA = "the examples need the extra `examples`: optax, matplotlib, statsmodels"
pytest.importorskip("optax", reason=EXTRA)
pytest.importorskip("matplotlib", reason=EXTRA)
pytest.importorskip("statsmodels", reason=EXTRA)

pytestmark = pytest.mark.usefixtures("as_users_have_jax")
TRAIN = 221  # years, 1700 to 1920


@pytest.fixture(scope="module")
def sunspots():
    return script(Path(__file__).parents[2] / "examples" / "sunspots.py")


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def least_squares(x, order):
    """(a_1, ..., a_τ, b), each window written out."""
    windows = np.array([[*(x[t - j] for j in range(1, order + 1)), 1] for t in range(order, len(x))])
    return np.linalg.lstsq(windows, x[order:], rcond=None)[0]


def one_ahead(x, coefficients, begin=TRAIN):
    """The root mean square error from there on, each year predicted from those before it."""
    *a, b = coefficients
    predicted = [b + sum(a_j * x[t - j] for j, a_j in enumerate(a, 1)) for t in range(begin, len(x))]
    return np.sqrt(np.mean((np.array(predicted) - x[begin:]) ** 2))


def table(said):
    """name: (RMSE, log P)"""
    rows = re.findall(r"^(\S.*?)\s+(\d+\.\d\d)\s+(-\d+\.\d{3})", said, re.M)
    return {name: (float(error), float(nats)) for name, error, nats in rows}


def test_the_series(sunspots):
    years, x = sunspots.numbers()
    np.testing.assert_array_equal(years, np.arange(1700, 2009))
    assert (x[0], x[-1], x.max(), years[x.argmax()]) == (5.0, 2.9, 190.2, 1957)


def test_the_scale_is_that_of_the_years_before(sunspots, x64):
    x = sunspots.numbers()[1]
    z, mean, scale = sunspots.scaled(x, TRAIN)
    np.testing.assert_allclose(z * scale + mean, x, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose((z[:TRAIN].mean(), z[:TRAIN].std()), (0, 1), atol=1e-12)
    assert sunspots.scaled(np.where(np.arange(309) < TRAIN, x, 1e6), TRAIN)[1:] == (mean, scale)


@pytest.mark.parametrize("order", [1, 2, 9])
def test_three_ways_to_the_same_coefficients(sunspots, order, x64):
    z = sunspots.scaled(sunspots.numbers()[1], TRAIN)[0][:TRAIN]
    expected = least_squares(np.asarray(z), order)
    model = sunspots.autoregressive.fit(z, order)
    np.testing.assert_allclose([*model.coefficients, model.intercept], expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(sunspots.by_windows(z, order), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(sunspots.by_descent(z, order=order), expected, rtol=0, atol=1e-8)


def test_the_criterion_compares_the_same_years(sunspots, x64):
    z = np.asarray(sunspots.scaled(sunspots.numbers()[1], TRAIN)[0][:TRAIN])
    for order in (2, 12):
        later = z[12 - order :]
        *a, b = least_squares(later, order)
        predicted = b + sum(a_j * later[order - j : -j] for j, a_j in enumerate(a, 1))
        expected = np.log(np.mean((predicted - z[12:]) ** 2)) + 2 * (order + 1) / (TRAIN - 12)
        found = float(sunspots.criterion(jnp.asarray(z), order=order, largest=12))
        assert found == pytest.approx(expected, abs=1e-10)


def test_a_year_is_predicted_without_a_look_at_it(sunspots, key, x64):
    x = jax.random.normal(key, (50,))
    model = sunspots.learn(key, jax.random.normal(key, (80,)), steps=3)[0]
    before, after = sunspots.predict(model, x), sunspots.predict(model, x.at[30:].add(1))
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a[:31], b[:31])
        assert (a[31:] != b[31:]).all()


def test_the_density_is_normal(sunspots, key, x64):
    stats = pytest.importorskip("scipy.stats")
    x, mean, log_sigma = jax.random.normal(key, (3, 20))
    expected = stats.norm.logpdf(x, mean, np.exp(log_sigma))
    np.testing.assert_allclose(sunspots.density(x, (mean, log_sigma)), expected, rtol=1e-10)


def test_nothing_is_learnt_of_the_years_that_tell_when_to_stop(sunspots, key, x64):
    x = sunspots.scaled(sunspots.numbers()[1], TRAIN)[0][:TRAIN]
    one, stop = sunspots.learn(key, x, steps=4)
    other, other_stop = sunspots.learn(key, x.at[-60:].multiply(1.001), steps=4)
    assert int(stop) == int(other_stop) == 3, "it still improves"
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-13)
        assert np.abs(a).max() > 0


def test_a_short_run_and_that_it_learns_nothing_of_what_is_held_out(sunspots, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sunspots, "LARGEST", 3)  # fewer programs to compile
    monkeypatch.setattr(sunspots, "MODELS", 2)
    path = tmp_path / "new" / "sunspots.png"
    assert sunspots.main(["--steps=2", f"--out={path}"]) == 0
    said = capsys.readouterr().out
    picture = pytest.importorskip("matplotlib.image").imread(path)
    assert picture.shape[0] > 800 < picture.shape[1]
    assert picture[..., :3].std() > 0.1
    assert "221 training years, 1700 to 1920; 88 held out" in said

    years, x = sunspots.numbers()
    rows, order = table(said), int(re.search(r"order (\d)", said)[1])
    assert rows["naive"][0] == pytest.approx(np.sqrt(np.mean(np.diff(x)[TRAIN - 1 :] ** 2)), abs=0.006)
    for name in (f"AR({order}), least squares", f"AR({order}), convolution"):
        assert rows[name][0] == pytest.approx(one_ahead(x, least_squares(x[:TRAIN], order)), abs=0.006)
    step = np.sqrt(np.mean(np.diff(x[:TRAIN]) ** 2))
    naive = -np.mean(np.diff(x)[TRAIN - 1 :] ** 2) / (2 * step**2) - np.log(step) - np.log(2 * np.pi) / 2
    assert rows["naive"][1] == pytest.approx(naive, abs=0.0006)

    monkeypatch.setattr(sunspots, "draw", lambda *_: sunspots.Figure(figsize=(1, 1)))
    monkeypatch.setattr(sunspots, "numbers", lambda: (years, np.where(years <= 1920, x, x[::-1] + 7)))
    assert sunspots.main(["--steps=2", f"--out={path}"]) == 0
    again = capsys.readouterr().out
    assert table(again)["naive"] != rows["naive"]
    assert again.splitlines()[:4] == said.splitlines()[:4], "τ, kernel and the moment to stop are from before"


def test_a_wrong_fit_stops_it(sunspots, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sunspots, "LARGEST", 1)
    monkeypatch.setattr(sunspots, "by_windows", lambda x, order: np.zeros(order + 1))
    monkeypatch.setattr(sunspots, "learn", lambda *_, **__: pytest.fail("it went on"))
    assert sunspots.main([f"--out={tmp_path / 'a.png'}"]) == 1
    assert re.fullmatch(r"sunspots\.py: error: `fit` does not match least squares: .*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--steps=0", "expected --steps >= 1"),
        ("--seed=-1", "expected --steps >= 1"),
        ("--out=.", "cannot write to .: Is a directory"),
    ],
)
def test_a_mistake_ends_with_status_2(sunspots, option, message, monkeypatch, capsys):
    monkeypatch.setattr(sunspots, "run", lambda *_: pytest.fail("it went on"))
    with pytest.raises(SystemExit) as stop:
        sunspots.main([option])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_what_the_docstring_says_of_who_is_ahead(sunspots, tmp_path, capsys):
    assert sunspots.main([f"--out={tmp_path / 'a.png'}"]) == 0
    said = capsys.readouterr().out
    rows = table(said)
    naive, ar, convolution, gru = rows.values()
    assert "AR(9), least squares" in rows
    assert convolution == ar
    assert float(re.search(r"largest difference to `fit` after \d+ steps is (\S+)", said)[1]) < 1e-7
    assert ar[0] < gru[0] < 0.8 * naive[0], "in error"
    assert gru[1] > ar[1] > naive[1], "in probability"


def test_what_the_docstring_says_of_other_choices(sunspots, x64):
    x = sunspots.numbers()[1]
    z, *_ = sunspots.scaled(x, TRAIN)
    before = x[: TRAIN - 60]
    assert min(range(1, 13), key=lambda order: one_ahead(x[:TRAIN], least_squares(before, order), TRAIN - 60)) == 2
    assert min(range(1, 21), key=lambda order: float(sunspots.criterion(z[:TRAIN], order=order, largest=20))) == 18
    for order, error in ((2, 20.5), (18, 18.4)):
        assert one_ahead(x, least_squares(x[:TRAIN], order)) == pytest.approx(error, abs=0.05)
