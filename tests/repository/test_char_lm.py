"""`make demo`: what it measures, what it leaves, what it says to mistakes. Its checkpoints: test_checkpoints.py."""

import argparse
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import script

import jaxseq

SCRIPT = Path(__file__).parents[2] / "examples" / "char_lm.py"
pytest.importorskip("optax", reason="the examples need the extra `examples`: optax, tqdm, matplotlib")
pytest.importorskip("tqdm", reason="the examples need the extra `examples`: optax, tqdm, matplotlib")
pytest.importorskip("matplotlib", reason="the examples need the extra `examples`: optax, tqdm, matplotlib")
pytest.importorskip("orbax.checkpoint", reason="the examples need the extra `examples`: orbax-checkpoint")

CYCLE = "0123456789\n"
TINY = ["--quiet", "--batch=3", "--window=7", "--hidden=16"]

pytestmark = pytest.mark.usefixtures("as_users_have_jax")


@pytest.fixture(scope="module")
def char_lm():
    return script(SCRIPT)


@pytest.fixture(scope="module")
def prose(tmp_path_factory):
    """The shortest text that will do for TINY: one window to train on and one held out, of 3 · (7 + 1) characters each.

    The last holds characters that the first lacks.
    """
    path = tmp_path_factory.mktemp("prose") / "prose.txt"
    path.write_text("Été and a 🙂, so;\nso onto" + " until Ω, then the end.\r\n", encoding="utf-8", newline="")
    return path


def train(char_lm, path, out, *options):
    """The curve of one run in a fresh process's stead."""
    assert char_lm.main([f"--text={path}", f"--out={out}", *TINY, *options]) == 0
    return json.loads((out / "curve.json").read_text("utf-8"))


# --- What it learns and leaves ---


def test_it_learns_a_text_that_repeats_itself_and_goes_on_with_it(char_lm, tmp_path, capsys):
    path, out = tmp_path / "cycle.txt", tmp_path / "new" / "folder"
    path.write_text(CYCLE * 80)
    options = "--steps=150", "--learning-rate=0.03", "--temperature=0.2", "--sample=40"
    curve = train(char_lm, path, out, *options)

    assert curve["steps"] == list(range(1, 151))
    assert np.isfinite(curve["train_bits"]).all()
    # Before it has learnt anything it costs about log2 of 12, the 11 characters and the unknown one.
    assert curve["train_bits"][0] == pytest.approx(np.log2(12), abs=1)
    assert max(curve["train_bits"][-10:]) < 0.1
    assert curve["held_out_steps"][-1] == 150
    assert curve["held_out_bits"][0] > curve["held_out_bits"][-1]
    assert curve["held_out"] == curve["held_out_bits"][-1] < 0.1
    assert curve["held_out_quoted"] == 1
    assert curve["held_out_new"] is None
    assert curve["options"]["steps"] == 150

    # The prompt is the first window of the held-out part, which is the last twentieth.
    told = (CYCLE * 80)[-44:][:7]
    start = (CYCLE * 9).index(told) + len(told)
    sample = (out / "sample.txt").read_text("utf-8")
    assert sample == (CYCLE * 9)[start : start + 40]

    picture = pytest.importorskip("matplotlib.image").imread(out / "curve.png")
    assert picture.shape[0] > 900, "with the texts"
    assert picture.std() > 0.05, "the picture is blank"

    said = capsys.readouterr()
    for dtype, limit in ("float64", 1e-10), ("float32", 1e-3):
        (printed,) = re.findall(rf"{dtype}: largest relative difference (\S+)", said.out)
        assert float(printed) == pytest.approx(curve["gradient_difference"][dtype], rel=0.1)
        assert float(printed) < limit
    assert f"held out: {curve['held_out']:.3f} bits per character" in said.out
    assert sample in said.out
    assert said.err == "", "--quiet"


def test_each_character_of_the_page_has_its_bits(char_lm, key):
    """A line ends at a line break and at its full width; characters that the font lacks are boxes."""
    tokens = jax.random.randint(key, (9,), 0, 12)
    model = char_lm.init(key, vocabulary=12, hidden=8)
    _, hs = jaxseq.reference.lstm(model.lstm, None, model.E[tokens[:-1]])
    p = np.exp(np.asarray(hs @ model.W + model.b, np.float64))
    expected = -np.log2((p / p.sum(-1, keepdims=True))[np.arange(8), tokens[1:]])
    np.testing.assert_allclose(char_lm.surprise(model, tokens), expected, rtol=1e-4)

    axes = char_lm.Figure().subplots()
    text = "ab\n\n" + "c" * (char_lm.WIDTH + 1) + "🙂“" + "\n" * char_lm.LINES + "d"
    char_lm.page(axes, text, np.where(np.array([*text]) == "b", 99, 0), "title")
    written = {artist.get_position(): artist.get_text() for artist in axes.texts}
    w = char_lm.WIDTH
    assert written == {(0, 0): "a", (1, 0): "b", (0, 3): "c", (1, 3): "□", (2, 3): "“"} | {
        (i, 2): "c" for i in range(w)
    }
    red = np.asarray(axes.images[0].get_array())
    assert red.shape == (char_lm.LINES, w, 3)
    assert np.argwhere((red != 1).any(-1)).tolist() == [[0, 1]]


def test_the_same_seed_gives_the_same_curve(char_lm, prose, tmp_path):
    first, again, other = (
        train(char_lm, prose, tmp_path / name, "--steps=5", f"--seed={seed}")
        for name, seed in (("first", 3), ("again", 3), ("other", 4))
    )
    assert len(first["train_bits"]) == 5
    for name in "train_bits", "held_out_bits", "held_out_new", "gradient_difference":
        assert first[name] == again[name] != other[name], name
    assert np.isfinite(first["held_out"])  # with a character that training never met
    samples = [(tmp_path / name / "sample.txt").read_text("utf-8") for name in ("first", "again", "other")]
    assert samples[0] == samples[1] != samples[2]
    assert len(samples[0]) == 600


def test_a_wrong_gradient_stops_it(char_lm, prose, tmp_path, monkeypatch, capsys):
    """The reference's gradient stops at every second step: the comparison has to see that."""
    reference = jaxseq.reference.lstm
    monkeypatch.setattr(jaxseq.reference, "lstm", lambda *args: reference(*args, truncation=2))
    status = char_lm.main([f"--text={prose}", f"--out={tmp_path}", *TINY, "--window=6"])
    assert status == 1
    error = capsys.readouterr().err
    assert error.startswith("char_lm.py: error: the gradient of jaxseq differs from jax.grad by ")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_it_measures_the_held_out_part(char_lm, prose, tmp_path, monkeypatch):
    """Characters that the training part lacks are all one, number 0."""
    measured = []
    monkeypatch.setattr(char_lm, "train_step", lambda training, *_, **__: (training, 1.0))
    monkeypatch.setattr(char_lm, "evaluate", lambda model, text, *_, **__: measured.append(text) or (1.0, 1.0))
    train(char_lm, prose, tmp_path, "--steps=10")
    train_part, held_out = prose.read_text("utf-8")[:24], prose.read_text("utf-8")[24:]
    assert [c not in train_part for c in held_out] == [number == 0 for number in measured[0].ravel().tolist()]
    assert len(measured) == 5 + 1  # every second step, and at the end


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_keeps_the_curve_so_far(char_lm, prose, tmp_path, monkeypatch, capsys, *, number, status):
    """The step that is running is finished."""
    step, calls = char_lm.train_step, iter(range(4))

    def interrupted(*args, **options):
        if next(calls) == 2:
            os.kill(os.getpid(), number)
        return step(*args, **options)

    before = signal.getsignal(number)
    monkeypatch.setattr(char_lm, "train_step", interrupted)
    assert char_lm.main([f"--text={prose}", f"--out={tmp_path}", *TINY, "--steps=9"]) == status
    assert signal.getsignal(number) is before
    assert capsys.readouterr().err == "interrupted after 3 of 9 steps\n"
    assert len(json.loads((tmp_path / "curve.json").read_text("utf-8"))["train_bits"]) == 3
    assert (tmp_path / "curve.png").exists()


@pytest.fixture
def interruptible():
    """A shell starts jobs in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_second_interrupt_does_not_wait(char_lm, prose, tmp_path, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGINT)

    def interrupted_twice(*_, **__):
        os.kill(os.getpid(), signal.SIGINT)
        while signal.getsignal(signal.SIGINT) is not before:  # Python hears of two at once as of one
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
        pytest.fail("it went on")

    monkeypatch.setattr(char_lm, "train_step", interrupted_twice)
    assert char_lm.main([f"--text={prose}", f"--out={tmp_path}", *TINY, "--steps=9"]) == 130
    assert capsys.readouterr().err == "interrupted after 0 of 9 steps\n"
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_stops_it(char_lm, prose, tmp_path, monkeypatch, capsys):
    step = char_lm.train_step
    monkeypatch.setattr(char_lm, "train_step", lambda *a, **k: (step(*a, **k)[0], jnp.float32(jnp.nan)))
    assert char_lm.main([f"--text={prose}", f"--out={tmp_path}", *TINY]) == 1
    assert capsys.readouterr().err == ("char_lm.py: error: the loss is nan at step 1; use a smaller --learning-rate\n")


def test_a_curve_that_cannot_be_written_costs_one_line(char_lm, prose, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(char_lm, "save", full)
    assert char_lm.main([f"--text={prose}", f"--out={tmp_path}", *TINY, "--steps=1"]) == 1
    assert capsys.readouterr().err == f"char_lm.py: error: cannot write to {tmp_path}: No space left on device\n"


# --- Its parts ---


def test_windows_read_every_place_on_and_on(char_lm):
    text, T = char_lm.streams(np.arange(23), 2), 4
    assert text.shape == (2, 11)
    read = [np.asarray(char_lm.windows(jnp.array(text), step, T)) for step in range(9)]
    for now, later in pairwise(read):
        np.testing.assert_array_equal(now[-1], later[0])  # the last target is the next input
    for place, start in enumerate((0, 11)):
        inputs = np.concatenate([window[:-1, place] for window in read])
        np.testing.assert_array_equal(inputs, start + np.arange(36) % 11)


def test_dropout_keeps_the_mean_and_is_drawn_anew_each_step(char_lm, key):
    hs = 1 + jax.random.uniform(key, (50, 20, 30), jnp.float32)
    thinned = char_lm.dropout(key, 0.25, hs)
    kept = thinned != 0
    assert np.mean(kept) == pytest.approx(0.75, abs=0.01)
    np.testing.assert_allclose(thinned[kept], hs[kept] / 0.75, rtol=1e-6)
    assert char_lm.dropout(key, 0.0, hs) is hs

    optimizer = char_lm.adam(1e-9, 2)  # weights that hardly move: what differs is what is dropped
    start = char_lm.one_device().start(0, optimizer, vocabulary=5, hidden=8, batch=2)
    text = jnp.tile(jax.random.randint(key, (2, 4), 0, 5), (1, 3))  # each window reads the same
    again = partial(jax.tree.map, jnp.copy)  # a step consumes what it starts from
    step = partial(char_lm.train_step, text=text, optimizer=optimizer, T=4)
    without = float(step(again(start))[1])
    training, first = step(again(start), rate=0.5)
    second = float(step(training._replace(carry=again(start).carry), rate=0.5)[1])
    assert len({without, float(first), second}) == 3
    assert float(step(again(start), rate=0.5)[1]) == float(first)


def plain_bits(model, stream):
    """What each character of a stream but the first costs, computed by
    the reference implementation and in float64, the stream read in one piece.
    """
    _, hs = jaxseq.reference.lstm(model.lstm, None, model.E[stream[:-1]])
    logits = np.asarray(hs @ model.W + model.b, np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return -np.log2(probabilities[np.arange(stream.size - 1), stream[1:]])


def test_held_out_bits_are_those_of_the_reference(char_lm):
    model = char_lm.init(jax.random.key(1), vocabulary=5, hidden=3)
    text = jax.random.randint(jax.random.key(2), (2, 19), 0, 5)
    new = jax.random.bernoulli(jax.random.key(3), 0.5, (2, 19))
    mean, mean_of_new = char_lm.evaluate(model, text, new, T=4)

    costs = np.concatenate([plain_bits(model, part[:17]) for part in text])  # 4 whole windows of 4 characters
    marks = np.asarray(new)[:, 1:17].ravel()
    assert float(mean) == pytest.approx(costs.mean(), rel=1e-5)
    assert float(mean_of_new) == pytest.approx(costs[marks].mean(), rel=1e-5)


def test_the_state_flows_on_from_window_to_window(char_lm):
    """Training that hardly moves costs, window by window, what the text costs in one piece."""
    optimizer = char_lm.adam(1e-9, 4)
    training = char_lm.one_device().start(1, optimizer, vocabulary=5, hidden=3, batch=2)
    text = jax.random.randint(jax.random.key(2), (2, 19), 0, 5)
    expected = np.mean([plain_bits(training.model, row[:17]).reshape(4, 4).mean(1) for row in text], axis=0)
    curve = {name: [] for name in ("steps", "train_bits", "held_out_steps", "held_out_bits")}
    options = argparse.Namespace(batch=2, window=4, steps=4, dropout=0.0, quiet=True)
    char_lm.learn(options, training, text, optimizer, lambda _: [0.0, 0.0], curve)
    np.testing.assert_allclose(curve["train_bits"], expected, rtol=1e-5)


def test_new_characters_are_those_outside_every_shared_run(char_lm):
    new = char_lm.new_characters("the cat sat on the mat", "a cat sits on the hat", run=4)
    # " cat s" and " on the " are in both, with runs of four; "sits" and "hat" are not.
    assert "".join("^" if mark else c for c, mark in zip("a cat sits on the hat", new, strict=True)) == (
        "^ cat s^^^ on the ^^^"
    )
    assert char_lm.new_characters("abc", "ab", run=4).all()


def test_characters_that_the_terminal_lacks_are_escaped(char_lm, prose, tmp_path, monkeypatch):
    monkeypatch.setattr(char_lm, "run", lambda *args: args[-1]("Été, 🙂"))
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii", write_through=True))
    assert char_lm.main([f"--text={prose}", f"--out={tmp_path}", *TINY]) == 0
    assert written.getvalue() == b"\\xc9t\\xe9, \\U0001f642\n"


# --- Mistakes ---


def a_folder_under_a_file(path):
    (path / "file").write_text("")
    return ["--out", str(path / "file" / "out")]


def a_file(name, content):
    def make(path):
        (path / name).write_bytes(content)
        return ["--text", str(path / name)]

    return make


MISTAKES = {
    "missing": (lambda path: ["--text", str(path / "none.txt")], r"cannot read .*none\.txt: No such file"),
    "folder": (lambda path: ["--text", str(path)], r"cannot read .*: Is a directory"),
    "empty": (a_file("empty.txt", b""), r"empty\.txt is empty"),
    "only a mark of byte order": (a_file("bom.txt", b"\xef\xbb\xbf"), r"bom\.txt is empty"),
    "undecodable": (a_file("latin.txt", b"caf\xe9 " * 999), r"latin\.txt is not UTF-8: .* at byte 3"),
    "too short": (a_file("short.txt", b"x" * 47), r"too short: it has 47 characters, .* need 48"),
    "out is a file": (lambda path: ["--out", str(SCRIPT)], r"cannot write to .*char_lm\.py: File exists"),
    "out under a file": (a_folder_under_a_file, r"cannot write to .*out: Not a directory"),
    "no steps": (lambda path: ["--steps=0"], r"--steps: expected int from 1 to \d+, got '0'"),
    "half a unit": (lambda path: ["--hidden=1.5"], r"--hidden: expected int from 1 to \d+, got '1.5'"),
    "negative seed": (lambda path: ["--seed=-1"], r"--seed: expected int from 0 to \d+, got '-1'"),
    "rate": (lambda path: ["--learning-rate=nan"], r"--learning-rate: expected float from 1e-06 to \d+, got 'nan'"),
    "cold": (lambda path: ["--temperature=0"], r"--temperature: expected float from 1e-06 to \d+, got '0'"),
    "all dropped": (lambda path: ["--dropout=1"], r"--dropout: expected float from 0 to 0.99, got '1'"),
    "none kept": (lambda path: ["--keep=0"], r"--keep: expected int from 1 to \d+, got '0'"),
    "unknown": (lambda path: ["--layers=2"], r"unrecognized arguments: --layers=2"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_costs_one_line_and_status_2(char_lm, name, prose, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(char_lm, "run", lambda *_: pytest.fail("it went on"))
    mistake, expected = MISTAKES[name]
    with pytest.raises(SystemExit) as stop:
        char_lm.main([f"--text={prose}", f"--out={tmp_path / 'out'}", *TINY, *mistake(tmp_path)])
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert re.fullmatch(rf"char_lm\.py: error: .*{expected}.*\n", said.err), said.err


def test_what_is_held_out(char_lm, prose, tmp_path):
    """The last twentieth, but a window at least and 2¹⁶ characters at most."""

    def parts(path):
        return char_lm.arguments([f"--text={path}", f"--out={tmp_path}", *TINY], char_lm.parser())[1:]

    path = tmp_path / "text.txt"
    assert parts(prose) == ("Été and a 🙂, so;\nso onto", " until Ω, then the end.\n")
    for length, last in (1000, 50), (3_000_000, 2**16):
        path.write_text("x" * (length - last) + "y" * last)
        train, held_out = parts(path)
        assert ({*train}, {*held_out}) == ({"x"}, {"y"})


def test_as_a_command(tmp_path):
    """A mistake and the help, from another folder: one line on stderr, no traceback."""
    command = [sys.executable, str(SCRIPT)]
    mistake = subprocess.run(
        [*command, "--text", "none.txt"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert mistake.returncode == 2
    assert mistake.stderr == "char_lm.py: error: cannot read none.txt: No such file or directory\n"
    assert not list(tmp_path.iterdir())
    with_help = subprocess.run([*command, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "[1600]" in with_help.stdout
