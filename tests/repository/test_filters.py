"""`make filters`: kernels that are what their formulas say, sizes, and the picture that is left."""

import math
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import script

SCRIPT = Path(__file__).parents[2] / "examples" / "filters.py"
pytest.importorskip("matplotlib", reason="the examples need the extra `examples`: matplotlib, scikit-learn")
pytest.importorskip("sklearn", reason="the examples need the extra `examples`: matplotlib, scikit-learn")
ndimage = pytest.importorskip("scipy.ndimage")

pytestmark = pytest.mark.usefixtures("as_users_have_jax")


@pytest.fixture(scope="module")
def filters():
    return script(SCRIPT)


@pytest.fixture(scope="module")
def gray():
    """Noise, smaller than a photograph and as good: no two neighbourhoods are alike."""
    return np.random.default_rng(0).random((21, 26), np.float32)


def kernels(filters):
    down, right = filters.sobel()
    return {
        1: [filters.box(4), filters.gaussian(1), filters.gaussian(3), filters.sharpen(1), filters.sharpen(0.3)],
        0: [filters.laplacian(), down, right, *map(filters.gabor, (0, 45, 90, 135, 20))],
    }


def test_kernels_leave_a_flat_area_as_it_is_or_nothing_of_it(filters):
    flat = jnp.full((20, 21, 1), 0.3)
    for total, group in kernels(filters).items():
        for kernel in group:
            assert kernel.sum() == pytest.approx(total, abs=1e-12)
            y = filters.filtered("", flat, filters.questions(kernel))
            np.testing.assert_allclose(y, 0.3 * total, atol=1e-6)


def test_all_but_sobel_are_the_same_turned_round(filters):
    for kernel in [k for group in kernels(filters).values() for k in group]:
        is_sobel = any(np.array_equal(kernel, w) for w in filters.sobel())
        np.testing.assert_allclose(kernel[::-1, ::-1], -kernel if is_sobel else kernel, atol=1e-15)


def test_against_scipy(filters, gray):
    """In the inside, where no frame reaches."""

    def of(kernel):
        return filters.filtered("", jnp.asarray(gray)[..., None], filters.questions(kernel))[..., 0]

    down, right = filters.sobel()
    inside = np.s_[1:-1, 1:-1]
    for kernel, expected in (
        (down, ndimage.sobel(gray, axis=0) / 8),
        (right, ndimage.sobel(gray, axis=1) / 8),
        (filters.laplacian(), ndimage.laplace(gray)),
        (filters.sharpen(0.5), gray - 0.5 * ndimage.laplace(gray)),
        (filters.box(1), ndimage.uniform_filter(gray, 3)),
    ):
        np.testing.assert_allclose(of(kernel), expected[inside], atol=1e-6)
    expected = ndimage.gaussian_filter(gray, 2, radius=6)
    np.testing.assert_allclose(of(filters.gaussian(2)), expected[6:-6, 6:-6], atol=1e-6)


def test_sobel_of_a_ramp_is_its_slope(filters):
    v, u = np.mgrid[:6, :7]
    ramp = jnp.asarray(3.0 * v - 2.0 * u, jnp.float32)[..., None]
    y = filters.filtered("", ramp, filters.questions(*filters.sobel()))
    np.testing.assert_allclose(y, np.broadcast_to([3, -2], (4, 5, 2)), atol=1e-6)


def test_a_gaussian_is_the_product_of_two(filters, gray):
    g, w = filters.gaussian_1d(1.5), filters.gaussian(1.5)
    assert w.shape == (11, 11)
    assert np.linalg.matrix_rank(w) == 1
    variance = (g * np.arange(-5, 6) ** 2).sum()
    assert variance == pytest.approx(1.5**2, rel=0.03)  # the tails beyond 3σ are cut off
    x = jnp.asarray(np.stack([gray, gray**2, 1 - gray], axis=-1))
    once = filters.filtered("", x, filters.each_colour(w))
    rows = filters.filtered("", x, filters.each_colour(g[None, :]))
    np.testing.assert_allclose(filters.filtered("", rows, filters.each_colour(g[:, None])), once, atol=1e-6)
    # Each colour by itself.
    for channel in range(3):
        alone = filters.filtered("", x[..., channel, None], filters.questions(w))
        np.testing.assert_allclose(once[..., channel], alone[..., 0], atol=1e-6)


def test_gabor_answers_to_its_own_angle_and_wavelength(filters):
    v, u = np.mgrid[:40, :40]

    def answers(angle, wavelength):
        """How far each of the four filters swings on a wave."""
        p = u * math.cos(math.radians(angle)) + v * math.sin(math.radians(angle))
        wave = jnp.asarray(np.cos(2 * math.pi * p / wavelength), jnp.float32)[..., None]
        y = filters.filtered("", wave, filters.questions(*map(filters.gabor, filters.ANGLES)))
        return np.asarray(jnp.abs(y).max((0, 1)))

    for i, angle in enumerate(filters.ANGLES):
        own = answers(angle, 6)
        assert own.argmax() == i
        assert own[i] > 5 * np.delete(own, i).max()
        assert own[i] > 3 * answers(angle, 3)[i]
        assert own[i] > 3 * answers(angle, 20)[i]


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("dilation", [1, 2])
def test_sizes(filters, stride, padding, dilation):
    """As many windows as there are places for one."""
    height, width, kernel_size = 21, 26, (3, 5)
    x, kernel = jnp.ones((height, width, 1)), np.ones((*kernel_size, 1, 2))
    y = filters.filtered("", x, kernel, stride=stride, padding=padding, dilation=dilation)
    places = [
        len(range(-padding, I + padding - dilation * (K - 1), stride))
        for I, K in zip((height, width), kernel_size, strict=True)
    ]
    assert y.shape == (*places, 2)


def test_a_size_that_is_not_the_formula_s_stops_it(filters, monkeypatch):
    monkeypatch.setattr(filters, "output_size", lambda *_, **__: 1)
    with pytest.raises(ArithmeticError, match=r"blur: \(19, 19\) outputs, expected \(1, 1\) by the formula"):
        filters.filtered("blur", jnp.ones((21, 21, 1)), filters.questions(filters.box(1)))


def test_it_says_what_it_does_and_leaves_a_picture(filters, tmp_path, capsys):
    path = tmp_path / "new" / "before_and_after.png"
    assert filters.main([f"--out={path}"]) == 0
    said = capsys.readouterr().out
    (difference,) = re.findall(r"largest difference (\S+)", said)
    assert float(difference) < 1e-5
    for line in (
        r"image size 427 x 640 x 3",
        r"box +9x9 +1 +4 +1 +427 x 640 x 3",
        r"Gaussian +7x7 +2 +0 +1 +211 x 317 x 3",
        r"Laplacian +3x3 +1 +0 +2 +423 x 636 x 1",
        r"Gabor, 4 angles +19x19 +1 +0 +1 +409 x 622 x 4",
    ):
        assert re.search(line, said), line
    picture = pytest.importorskip("matplotlib.image").imread(path)
    assert min(picture.shape[:2]) > 1000
    assert picture[..., :3].std() > 0.1, "the picture is blank"


def test_a_place_that_cannot_be_written_costs_one_line(filters, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(filters, "panels", lambda _: pytest.fail("it went on"))
    (tmp_path / "file").write_text("")
    assert filters.main([f"--out={tmp_path / 'file' / 'out.png'}"]) == 2
    assert re.fullmatch(r"filters\.py: error: cannot write to .*out\.png: .+\n", capsys.readouterr().err)
