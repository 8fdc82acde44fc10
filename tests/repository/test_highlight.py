"""`examples/highlight.py`: the classes, what each model may look at, and what it measures."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import script

EXTRA = "the examples need the extra `examples`: optax, matplotlib"
pytest.importorskip("optax", reason=EXTRA)
pytest.importorskip("matplotlib", reason=EXTRA)

pytestmark = pytest.mark.usefixtures("as_users_have_jax")
SOURCE = '''"""Doc # no 'comment'
x = 1"""
y = r'a\\'b' + f(1)  # it's "one"
z = ""  # é
'''
MARKED = """ssssssssssssssssssssss
ssssssss.
.....ssssss.........cccccccccccc.
....ss..ccc.
"""


@pytest.fixture(scope="module")
def highlight():
    return script(Path(__file__).parents[2] / "examples" / "highlight.py")


@pytest.fixture
def small(highlight, monkeypatch):
    """Few and short texts, cheap to train on."""
    monkeypatch.setattr(highlight, "BATCH", 3)
    monkeypatch.setattr(highlight, "T", 8)
    monkeypatch.setattr(highlight, "FIRST", 64)
    monkeypatch.setattr(highlight, "LINES", 2)
    compiled = highlight.train, highlight.predict
    yield highlight
    for function in compiled:
        function.clear_cache()  # traced with the sizes above


def models(highlight, window):
    keys = jax.random.split(jax.random.key(0), 3)
    return {name: highlight.init(key, name, window) for name, key in zip(highlight.MODELS, keys, strict=True)}


def logits(highlight, name, model, s, window=4, cuts=()):
    """The logits, with the text split at the given places."""
    past, found = highlight.beginning(name, window, s.shape[1]), []
    for part in jnp.split(s, cuts):
        past, z = highlight.logits(name, model, past, part)
        found.append(z)
    return np.concatenate(found)


def test_classes_by_hand(highlight):
    lines = zip(SOURCE.splitlines(keepends=True), MARKED.splitlines(), strict=True)
    expected = [".sc".index(mark) for line, marks in lines for mark in marks.ljust(len(line), marks[-1])]
    assert highlight.classes(SOURCE).tolist() == expected


def test_a_form_feed_does_not_end_a_line(highlight):
    assert highlight.classes("a\n\x0c\nb = ''\n").tolist() == [0] * 8 + [1, 1, 0]


@pytest.mark.parametrize("source", ["f'{x} and {y!r:>{w}}'", "F'''a\n{f(\"b\")}c'''", "rb'a'", "f''"])
def test_a_formatted_string_is_one_string_in_every_version(highlight, source):
    """From Python 3.12 on, it consists of many tokens."""
    whole = f"x = {source}\ny = 1\n"
    prefix = len(source) - len(source.lstrip("bfrF"))
    expected = np.zeros(len(whole), int)
    expected[4 + prefix : 4 + len(source)] = highlight.STRING
    np.testing.assert_array_equal(highlight.classes(whole), expected)


def test_the_modules_are_those_of_the_library_in_order(highlight, monkeypatch, tmp_path):
    for name, text in {"b.py": "x = 'é🙂'\n", "a.py": "# a\n", "_c.py": "c", "d.txt": "d"}.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(highlight.sysconfig, "get_path", {"stdlib": str(tmp_path)}.get)
    found = highlight.modules()
    assert list(found) == ["a", "b"]
    s, y = found["b"]
    assert s.tolist() == [*map(ord, "x = '"), highlight.OTHER, highlight.OTHER, ord("'"), ord("\n")]
    assert y.tolist() == [0] * 4 + [1] * 4 + [0]


def test_no_model_looks_ahead_and_a_window_not_far_back(highlight, key):
    s = jax.random.randint(key, (30, 2), 32, 127)
    other = s.at[12].set(s[12] % 64 + 1)
    for name, model in models(highlight, 4).items():
        changed = (logits(highlight, name, model, s) != logits(highlight, name, model, other)).any((1, 2))
        assert not changed[:12].any()
        assert changed[12:16].all()
        assert changed[16:].any() == (name == "GRU"), name


def test_what_precedes_a_cut_is_not_forgotten(highlight, key):
    s = jax.random.randint(key, (30, 2), 32, 127)
    for name, model in models(highlight, 4).items():
        whole, parts = (logits(highlight, name, model, s, cuts=cuts) for cuts in ((), (2, 11, 12)))
        np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-5)


def test_the_window_is_a_sum_over_its_characters(highlight, key):
    s = jax.random.randint(key, (9, 1), 32, 127)
    found = models(highlight, 4)
    for name in ("linear window", "hidden layer"):
        E, (kernel, bias), W, b = jax.tree.map(np.asarray, found[name])
        assert kernel.shape == (4, highlight.EMBEDDING, 3 if name == "linear window" else highlight.CHANNELS)
        h = sum(E[np.asarray(s)[5 + k, 0]] @ kernel[k] for k in range(4)) + bias  # the last of them is s_8
        h = np.maximum(h, 0) if name == "hidden layer" else h
        np.testing.assert_allclose(logits(highlight, name, found[name], s)[-1, 0], h @ W + b, rtol=1e-4, atol=1e-4)


def test_the_hidden_layer_has_about_as_many_parameters_as_the_gru(highlight):
    size = {name: sum(a.size for a in jax.tree.leaves(model)) for name, model in models(highlight, 32).items()}
    assert size["GRU"] == pytest.approx(size["hidden layer"], rel=0.1)
    assert size["linear window"] < size["GRU"]


def test_ages(highlight):
    y = np.array([[0, 1], [0, 1], [1, 0], [1, 2], [0, 2]])
    assert highlight.ages(y).tolist() == [[1, 1], [2, 2], [1, 1], [2, 1], [1, 2]]


def test_errors_by_age(highlight):
    age = np.repeat([1, 2, 3, 4, 9], [2000, 500, 500, 1500, 999])
    wrong = np.zeros(len(age), bool)
    wrong[:500] = wrong[2000:2600] = True
    ages, errors = highlight.by_age(wrong, age)
    assert ages.tolist() == [1, 2, 4], "from 8 to 16 there are too few"
    np.testing.assert_allclose(errors, [25, 60, 0])


def test_the_excerpt_has_all_classes(small):
    lines = ["x = 1", "y = 'a'  # b", "z = 'abc'  # abc", "#" + 90 * "x", "w = 2", "v = 3"]
    source = "\n".join(lines) + "\n"
    s = np.frombuffer(source.encode(), np.uint8)
    count, span = small.excerpt(s, small.classes(source))
    assert source[span] == "\n".join(lines[1:3]) + "\n"
    assert count == 6 + 1 + 1, "a # and the letters of both comments"


def test_what_is_held_out_is_not_trained_on(small, monkeypatch, tmp_path):
    seen = []
    texts = {
        name: (np.full(100, ord(name[0]), np.int32), np.zeros(100, np.int32)) for name in ("a", "r", "s", "t", "z")
    }

    def train(key, s, y, **_):
        seen.append({chr(c) for c in np.unique(s)})
        return None, np.zeros(1)

    def predict(model, s, **_):
        assert {chr(c) for c in np.unique(s)} == {"t", "z"}
        return np.zeros(s.shape, int)

    monkeypatch.setattr(small, "modules", lambda: texts)
    monkeypatch.setattr(small, "train", train)
    monkeypatch.setattr(small, "predict", predict)
    monkeypatch.setattr(small, "draw", lambda *_: small.Figure(figsize=(1, 1)))
    small.run(2, 1, 4, tmp_path / "a.png")
    assert seen == [{"a", "r"}] * 6


def test_a_short_run(small, monkeypatch, tmp_path, capsys):
    texts = {}
    for name in ("a", "t", "u"):
        source = SOURCE * (10 if name == "a" else 2)
        s = np.minimum(np.frombuffer(source.encode("utf-32-le"), "<u4"), small.OTHER).astype(np.int32)
        texts[name] = s, small.classes(source).astype(np.int32)
    monkeypatch.setattr(small, "modules", lambda: texts)
    monkeypatch.setattr(small, "by_age", lambda *_: (np.array([1, 2]), np.array([3.0, 4.0])))
    path = tmp_path / "new" / "highlight.png"
    assert small.main(["--steps=3", "--seeds=2", "--window=4", f"--out={path}"]) == 0
    said = capsys.readouterr().out
    picture = pytest.importorskip("matplotlib.image").imread(path)
    assert picture.shape[0] > 600 < picture.shape[1]
    assert picture[..., :3].std() > 0.1
    y = texts["t"][1][:64]
    rows = dict(re.findall(r"^(\S.*?) +(\d+\.\d\d)%  [\d. ]+$", said, re.M))
    assert list(rows) == [
        "always code",
        "true class of the previous character, repeated",
        "last 4 characters, linear",
        "last 4 characters, hidden layer",
        "all characters so far, GRU",
    ]
    assert float(rows["always code"]) == pytest.approx(100 * np.mean(y != 0), abs=0.006)
    repeated = rows["true class of the previous character, repeated"]
    assert float(repeated) == pytest.approx(100 * np.mean(y[1:] != y[:-1]), abs=0.006)


def test_a_loss_that_is_not_finite_stops_it(small, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(small, "modules", lambda: {name: (np.full(99, 65), np.zeros(99, int)) for name in "at"})
    monkeypatch.setattr(small, "train", lambda *_, **__: (None, np.array([1, np.nan])))
    assert small.main([f"--out={tmp_path / 'a.png'}"]) == 1
    assert capsys.readouterr().err == "highlight.py: error: the loss of the linear window is not finite\n"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--steps=0", "expected --steps >= 1"),
        ("--seeds=0", "--seeds >= 1"),
        ("--window=0", "--window from 1 to 1000"),
        ("--out=.", "cannot write to .: Is a directory"),
    ],
)
def test_a_mistake_ends_with_status_2(highlight, option, message, monkeypatch, capsys):
    monkeypatch.setattr(highlight, "run", lambda *_: pytest.fail("it went on"))
    with pytest.raises(SystemExit) as stop:
        highlight.main([option])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_memory_pays(highlight, tmp_path, capsys):
    """With fewer steps than by default, on the real text. The worst GRU is far better than the best window."""
    assert highlight.main(["--seeds=2", "--steps=200", f"--out={tmp_path / 'a.png'}"]) == 0
    said = capsys.readouterr().out
    rows = {
        row[0]: list(map(float, row[1].split())) for row in re.findall(r"^(\S.*?) +\d+\.\d\d%  ([\d. ]+)$", said, re.M)
    }
    _, (repeated,), linear, hidden, gru = rows.values()
    assert 1 < repeated < 3
    assert 5 < min(hidden) < max(hidden) < min(linear)
    assert max(gru) < min(hidden) / 3
