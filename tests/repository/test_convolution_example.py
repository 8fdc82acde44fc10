"""`examples/convolution.py`: sums worked by hand, gradients against differences, and the picture that is left."""

import re
from pathlib import Path

import numpy as np
import pytest
from helpers import script

SCRIPT = Path(__file__).parents[2] / "examples" / "convolution.py"
pytest.importorskip("matplotlib", reason="the examples need the extra `examples`: matplotlib, scikit-learn")
pytest.importorskip("sklearn", reason="the examples need the extra `examples`: matplotlib, scikit-learn")

pytestmark = pytest.mark.usefixtures("as_users_have_jax")

X, W, Y_bar = np.array([1.0, 3, 2, 5]), np.array([1.0, 2, -1]), np.array([10.0, 1])


@pytest.fixture(scope="module")
def convolution():
    return script(SCRIPT)


def test_sums_worked_by_hand(convolution):
    y, x_bar, w_bar = convolution.sums(X, W, Y_bar)
    np.testing.assert_array_equal(y, [1 + 6 - 2, 3 + 4 - 5])
    np.testing.assert_array_equal(x_bar, [10, 20 + 1, -10 + 2, -1])
    np.testing.assert_array_equal(w_bar, [10 + 3, 30 + 2, 20 + 5])


@pytest.mark.parametrize(
    ("options", "y"),
    [
        ({"s": 2}, [5]),
        ({"lo": 1}, [2 * 1 - 3, 5, 2, 2 + 2 * 5]),  # a zero stands before the 1 and after the 5
        ({"lo": 1, "s": 2}, [-1, 2]),
        ({"lo": 1, "d": 2}, [2 * 3 - 5, 1 + 2 * 2]),
        ({"lo": 3, "s": 3}, [0, 5, 5]),
    ],
)
def test_options_worked_by_hand(convolution, options, y):
    np.testing.assert_array_equal(convolution.sums(X, W, **options)[0], y)


def test_two_axes_worked_by_hand(convolution):
    x = np.array([[1.0, 2, 4], [0, 3, 1]])
    w = np.array([[1.0, -1], [2, 0]])
    y, x_bar, w_bar = convolution.sums(x, w, np.array([[1.0, 10]]))
    np.testing.assert_array_equal(y, [[1 - 2 + 0, 2 - 4 + 6]])
    np.testing.assert_array_equal(x_bar, [[1, -1 + 10, -10], [2, 20, 0]])
    np.testing.assert_array_equal(w_bar, [[1 + 20, 2 + 40], [0 + 30, 3 + 10]])


@pytest.mark.parametrize("options", [(1, 0, 1), (2, 0, 1), (1, 2, 1), (1, 0, 2), (3, 1, 2)])
@pytest.mark.parametrize(("I", "K"), [((7,), (3,)), ((5, 6), (2, 3))])
def test_gradients_against_differences(convolution, I, K, options):
    """<ȳ, y> is linear in each entry of x and of w, so a difference of any length is exact but for rounding."""
    noise = np.random.default_rng(0).standard_normal
    x, w = noise(I), noise(K)
    y = convolution.sums(x, w, 0.0, *options)[0]
    y_bar = noise(y.shape)
    _, x_bar, w_bar = convolution.sums(x, w, y_bar, *options)
    for which, gradient in enumerate((x_bar, w_bar)):
        for place in np.ndindex(gradient.shape):
            moved = [x.copy(), w.copy()]
            moved[which][place] += 1
            difference = (y_bar * (convolution.sums(*moved, 0.0, *options)[0] - y)).sum()
            assert difference == pytest.approx(gradient[place], abs=1e-12)


@pytest.mark.parametrize(("I", "K", "options"), [((8,), (2,), (3, 1, 1)), ((7, 8), (2, 3), (2, 1, 2))])
def test_sums_convolutions_and_vjp_agree(convolution, I, K, options):
    """Where the stride leaves inputs unread, too."""
    noise = np.random.default_rng(0).standard_normal
    y_bar = noise(convolution.output_shape(I, K, *options))
    found = convolution.differences(noise(I), noise(K), y_bar, *options)
    assert len(found) == 3
    assert max(found) < 1e-13


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_it_stops_where_two_ways_differ(convolution, monkeypatch, wrong):
    right = convolution.sums

    def sums(*args):
        found = right(*args)
        found[wrong][0] += 1e-9
        return found

    monkeypatch.setattr(convolution, "sums", sums)
    with pytest.raises(ArithmeticError, match=r"differ by 1\.0e-09"):
        convolution.differences(X, W, Y_bar)


def test_a_nan_is_a_difference(convolution):
    with pytest.raises(ArithmeticError, match="differ by nan"):
        convolution.largest(np.array([1.0, np.nan]), np.array([1.0, np.nan]))


def test_it_says_what_it_does_and_leaves_a_picture(convolution, tmp_path, capsys):
    path = tmp_path / "new" / "steps.png"
    assert convolution.main([f"--out={path}"]) == 0
    said = capsys.readouterr().out
    assert "y[1] = 3·1 + 2·2 + 5·(−1) = 2\n" in said
    assert "flip=False) = 5 2 8 13 2, as numpy.correlate\n" in said
    assert "flip=True) = 7 6 12 3 −2, as numpy.convolve\n" in said
    (figures,) = re.findall(r"^all +(\S+) +(\S+) +(\S+)$", said, re.MULTILINE)
    assert max(map(float, figures)) < 1e-12
    picture = pytest.importorskip("matplotlib.image").imread(path)
    assert min(picture.shape[:2]) > 1000
    assert picture[..., :3].std() > 0.1, "the picture is blank"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--x 1 2 --w 1 2 3", "the kernel is longer than the input: it has 3 taps, the input has 2 numbers"),
        ("--x 1 2 3 4", "the kernel is longer than the input: 3 taps with dilation 2 span 5, the input has 4 numbers"),
        ("--x 1 2 3 4 5 6 7 8 9", "expected at most 8 numbers in --x and 4 in --w, from -9 to 9"),
        ("--w 10", "expected at most 8 numbers in --x and 4 in --w, from -9 to 9"),
        ("--digit 10", "--digit: invalid choice"),
    ],
)
def test_mistakes(convolution, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        convolution.main([f"--out={tmp_path / 'no.png'}", *arguments.split()])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_costs_one_line(convolution, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(convolution, "draw", lambda *_: pytest.fail("it went on"))
    (tmp_path / "file").write_text("")
    assert convolution.main([f"--out={tmp_path / 'file' / 'out.png'}"]) == 2
    assert re.fullmatch(r"convolution\.py: error: cannot write to .*out\.png: .+\n", capsys.readouterr().err)
