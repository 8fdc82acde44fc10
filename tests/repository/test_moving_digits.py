"""`make moving`: videos whose digits bounce, what is measured on which of them, and the picture that is left."""

import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import script

import jaxseq

SCRIPT = Path(__file__).parents[2] / "examples" / "moving_digits.py"
pytest.importorskip("optax", reason="the examples need the extra `examples`: optax, tqdm, scikit-learn, matplotlib")
pytest.importorskip("tqdm", reason="the examples need the extra `examples`: optax, tqdm, scikit-learn, matplotlib")
pytest.importorskip("sklearn", reason="the examples need the extra `examples`: optax, tqdm, scikit-learn, matplotlib")
pytest.importorskip(
    "matplotlib", reason="the examples need the extra `examples`: optax, tqdm, scikit-learn, matplotlib"
)

pytestmark = pytest.mark.usefixtures("as_users_have_jax")


@pytest.fixture(scope="module")
def moving():
    return script(SCRIPT)


@pytest.fixture(scope="module")
def parts(moving):
    return moving.digits(0)


# --- The videos ---


def bounced(start, velocity, room, frames):
    """Step by step: what is beyond a wall comes back as far, and the other way."""
    path = [start]
    for _ in range(frames - 1):
        place = path[-1] + velocity
        if not 0 <= place <= room:
            place, velocity = -place if place < 0 else 2 * room - place, -velocity
        path.append(place)
    return path


@pytest.mark.parametrize("velocity", [-3, -1, 0, 1, 2])
def test_places_bounce(moving, velocity):
    rooms = 3, 12, 15
    start, room = (jnp.array(a) for a in zip(*[(s, L) for L in rooms for s in range(L + 1)], strict=True))
    path = moving.places(start, jnp.full_like(start, velocity), room, 40)
    expected = [bounced(s, velocity, L, 40) for L in rooms for s in range(L + 1)]
    np.testing.assert_array_equal(path, np.transpose(expected))


def test_a_point_moves_straight_and_bounces(moving, key, monkeypatch):
    """Each path is that of one of the eight moves, and all eight come."""
    monkeypatch.setattr(moving, "DIGITS", 1)
    point = moving.Digits(jnp.zeros((1, 8, 8)).at[0, 0, 0].set(0.5), jnp.ones((1, 2), jnp.int32))
    video = moving.videos(key, point, 200, 25)
    assert video.shape == (25, 200, 20, 20, 1)
    assert ((video == 0.5).sum((2, 3, 4)) == 1).all()
    assert (video.sum((2, 3, 4)) == 0.5).all()
    _, _, v, u, _ = np.nonzero(video)
    paths, seen = np.stack([v, u], axis=-1).reshape(25, 200, 2), set()
    for i in range(200):
        candidates = {
            (dv, du)
            for dv in (-1, 0, 1)
            for du in (-1, 0, 1)
            if np.array_equal(
                np.transpose([bounced(*a, 19, 25) for a in zip(paths[0, i], (dv, du), strict=True)]), paths[:, i]
            )
        }
        assert candidates, f"video {i} follows no move"
        seen |= candidates
    assert seen == {(v, u) for v in (-1, 0, 1) for u in (-1, 0, 1)} - {(0, 0)}


def test_no_digit_leaves_the_canvas_and_the_brighter_one_is_seen(moving, parts, key, monkeypatch):
    train, _ = parts
    pair = np.asarray(moving.videos(key, train, 8, 30))
    assert pair.dtype == np.float32
    assert 0 <= pair.min() < pair.max() <= 1
    places = moving.places
    alone = []
    for digit in range(2):  # the other one is gone to where it does not show
        off = jnp.array([0, 0]).at[1 - digit].set(moving.SIZE + 8)[None, None, :, None]
        monkeypatch.setattr(moving, "places", lambda *args, off=off: places(*args) + off)
        alone.append(np.asarray(moving.videos(key, train, 8, 30)))
    np.testing.assert_array_equal(np.maximum(*alone), pair)
    assert (pair < alone[0] + alone[1]).any(), "none overlap"


def test_what_is_held_out(moving, parts):
    """No image is in both parts, and all are there: each trimmed to its ink, and no ink lost."""
    train, held_out = parts
    images = np.concatenate([train.images, held_out.images])
    assert (train.images.shape, held_out.images.shape, images.dtype) == ((1437, 8, 8), (360, 8, 8), np.float32)
    assert len({image.tobytes() for image in images}) == 1797
    raw = pytest.importorskip("sklearn.datasets").load_digits().images / 16
    ink = sorted(tuple(image[image > 0]) for image in raw)  # row by row, wherever it lies
    assert sorted(tuple(image[image > 0].astype(float)) for image in images) == ink
    for image, (height, width) in zip(images, np.concatenate([train.sizes, held_out.sizes]), strict=True):
        assert image[0].any()
        assert image[:, 0].any()
        assert image[height - 1].any()
        assert image[:, width - 1].any()
        assert not image[height:].any()
        assert not image[:, width:].any()
    assert (moving.digits(0)[1].images == held_out.images).all()
    assert not (moving.digits(1)[1].images == held_out.images).all()


# --- The model and its measure ---


def test_the_readout_moves_pixels_and_makes_new_ones(moving, key):
    model = moving.init(key)
    frame, h = jax.random.uniform(key, (2, 20, 20, 1)), jnp.zeros((2, 10, 10, moving.STATE))
    padded = np.pad(frame, ((0, 0), (1, 1), (1, 1), (0, 0)))
    for way in range(10):
        bias = jnp.zeros(11).at[way].set(100).at[10].set(0.3)
        y = moving.read_out(model._replace(readout=model.readout._replace(bias=bias)), h, frame)
        v, u = divmod(way, 3)
        expected = padded[:, v : v + 20, u : u + 20] if way < 9 else np.full_like(frame, 1 / (1 + math.exp(-0.3)))
        np.testing.assert_allclose(y, expected, atol=1e-6)


def test_what_is_measured(moving, parts, key):
    """By hand, and going on by itself is to process its own prediction as though it had been seen."""
    model, n = moving.init(key), moving.GIVEN
    video = moving.videos(key, parts[1], 2, n + moving.AHEAD)
    result = moving.measure(model, video)
    x = np.asarray(video)
    seen = jnp.concatenate([video[:n], result.generated[:-1]])
    np.testing.assert_allclose(result.generated, moving.next_frames(model, seen)[1][n - 1 :], atol=1e-5)
    for j in range(moving.AHEAD):
        np.testing.assert_allclose(result.errors[j], ((result.generated[j] - x[n + j]) ** 2).mean(), rtol=1e-5)
        np.testing.assert_allclose(result.errors_of_copy[j], ((x[n - 1] - x[n + j]) ** 2).mean(), rtol=1e-5)
    np.testing.assert_allclose(result.one_ahead, moving.next_frames(model, video)[1][:-1], atol=1e-5)
    counted = ((result.one_ahead - x[1:]) ** 2)[1:]  # the second frame cannot be predicted
    np.testing.assert_allclose(moving.loss(model, video), counted.sum((2, 3, 4)).mean(), rtol=1e-5)


def test_the_error_of_a_copy(moving):
    """A pixel of 1 that moves is wrong where it was and where it is, two of 400; half of the videos stand still."""
    video = np.zeros((6, 2, 20, 20, 1), np.float32)
    video[:, 0, 7, 7] = 1
    for t in range(6):
        video[t, 1, 3, t] = 1
    np.testing.assert_allclose(moving.errors(video[2:3], video[2:]), [0, *[2 / 400 / 2] * 3], rtol=1e-6)


# --- The job ---


def test_it_learns_and_leaves_a_picture(moving, monkeypatch, tmp_path, capsys):
    """One digit and short videos are soon learnt; what the default learns is the long test's."""
    for name, value in (("DIGITS", 1), ("GIVEN", 5), ("MEASURED", 8)):
        monkeypatch.setattr(moving, name, value)
    moving.measure.clear_cache()  # it may have been traced with other sizes
    train_step, costs = moving.train_step, []

    def noted(*args, **options):
        *new, cost = train_step(*args, **options)
        costs.append(float(cost))
        return *new, cost

    monkeypatch.setattr(moving, "train_step", noted)
    path = tmp_path / "new" / "videos.png"
    assert moving.main(["--steps=60", "--quiet", f"--out={path}"]) == 0
    assert len(costs) == 60
    assert np.mean(costs[-5:]) < 0.8 * np.mean(costs[:5])
    said = capsys.readouterr()
    parameters = 9 * (1 + 32) * 128 + 128 + 16 * 11 * 32 + 11
    assert f"1437 training images, 360 held out; {parameters} parameters" in said.out
    (difference,) = re.findall(r"float64: largest relative difference (\S+)", said.out)
    assert 0 < float(difference) < 1e-12
    pattern = r"of the next frame: (\S+); repeating the last given frame: (\S+), (\S+) times as large\n$"
    ((error, of_copy, ratio),) = re.findall(pattern, said.out)
    assert float(ratio) == pytest.approx(float(of_copy) / float(error), abs=0.1)
    assert said.err == "", "--quiet"
    picture = pytest.importorskip("matplotlib.image").imread(path)
    assert min(picture.shape[:2]) > 800
    assert picture[..., :3].std() > 0.1, "the picture is blank"


def test_it_foresees_far_better_than_a_copy(moving, tmp_path, capsys):
    assert moving.main(["--quiet", f"--out={tmp_path / 'videos.png'}"]) == 0
    (ratio,) = re.findall(r"given frame: \S+, (\S+) times as large", capsys.readouterr().out)
    assert float(ratio) > 5


def test_a_wrong_gradient_stops_it(moving, monkeypatch, tmp_path, capsys):
    """The reference implementation's gradient does not reach the bias: the comparison has to see that."""
    reference = jaxseq.reference.conv_lstm

    def without(params, carry, xs, **options):
        return reference(params._replace(b=jax.lax.stop_gradient(params.b)), carry, xs, **options)

    monkeypatch.setattr(jaxseq.reference, "conv_lstm", without)
    monkeypatch.setattr(moving, "learn", lambda *_, **__: pytest.fail("it went on"))
    moving.gradient_difference.clear_cache()  # it may have been traced with the true reference implementation
    assert moving.main(["--quiet", f"--out={tmp_path / 'videos.png'}"]) == 1
    assert re.fullmatch(
        r"moving_digits\.py: error: the gradient of jaxseq differs from jax\.grad by \S+\n", capsys.readouterr().err
    )
    moving.gradient_difference.clear_cache()


def test_a_loss_that_is_not_finite_stops_it(moving, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(moving, "gradient_difference", lambda *_: 0.0)
    monkeypatch.setattr(moving, "train_step", lambda model, state, *_, **__: (model, state, jnp.float32(jnp.nan)))
    assert moving.main(["--quiet", "--steps=3", f"--out={tmp_path / 'videos.png'}"]) == 1
    assert capsys.readouterr().err == "moving_digits.py: error: the loss is nan at step 1\n"


@pytest.mark.parametrize("option", ["--steps=0", "--seed=-1", f"--seed={2**31}"])
def test_a_mistake_ends_with_status_2(moving, option, monkeypatch, capsys):
    monkeypatch.setattr(moving, "run", lambda *_: pytest.fail("it went on"))
    with pytest.raises(SystemExit) as stop:
        moving.main([option])
    assert stop.value.code == 2
    assert "expected --steps >= 1" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_costs_one_line(moving, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(moving, "run", lambda *_: pytest.fail("it went on"))
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "out.png", tmp_path):
        assert moving.main([f"--out={place}"]) == 2
        assert re.fullmatch(r"moving_digits\.py: error: cannot write to .*: .+\n", capsys.readouterr().err)
