"""`examples/shuffled.py`: what the shuffles keep, what is measured, and that shuffled characters teach nothing."""

import re
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import script

import jaxseq

EXTRA = "the examples need the extra `examples`: optax, tqdm, matplotlib"
pytest.importorskip("optax", reason=EXTRA)
pytest.importorskip("tqdm", reason=EXTRA)
pytest.importorskip("matplotlib", reason=EXTRA)

pytestmark = pytest.mark.usefixtures("as_users_have_jax")
TEXT = "The quick brown  fox\n\njumps over the lazy dog, $x_t$ and all.\n" * 100


@pytest.fixture(scope="module")
def shuffled():
    return script(Path(__file__).parents[2] / "examples" / "shuffled.py")


@pytest.fixture
def small(shuffled, monkeypatch):
    monkeypatch.setattr(shuffled, "HIDDEN", 16)


def reported(said):
    """name: (bits, the unigram entropy of what is held out)"""
    found = re.findall(r"^(\S.*): held out (\S+) bits .* entropy is (\S+)$", said, re.M)
    return {name: (float(bits), float(H)) for name, bits, H in found}


def test_shuffles_keep_what_they_should(shuffled):
    text, words, characters = shuffled.orders(TEXT, 0).values()
    assert text == TEXT
    assert Counter(text) == Counter(words) == Counter(characters)
    assert Counter(text.split()) == Counter(words.split()) != Counter(characters.split())
    assert len({text, words, characters}) == 3
    assert shuffled.orders(TEXT, 0) == shuffled.orders(TEXT, 0)
    assert shuffled.orders(TEXT, 0)["words shuffled"] != shuffled.orders(TEXT, 1)["words shuffled"]
    assert shuffled.orders("  a", 0)["text"] == "  a"
    assert sorted(shuffled.orders("  a", 0)["words shuffled"]) == [" ", " ", "a"]


def test_the_unigram_entropy_by_hand(shuffled):
    assert shuffled.unigram_entropy("abab") == pytest.approx(1)
    assert shuffled.unigram_entropy("aaab") == pytest.approx(0.25 * 2 + 0.75 * np.log2(4 / 3))
    assert shuffled.unigram_entropy("a") == 0
    entropy = pytest.importorskip("scipy.stats").entropy
    assert shuffled.unigram_entropy(TEXT) == pytest.approx(entropy(np.unique([*TEXT], return_counts=True)[1], base=2))


def test_streams_read_on(shuffled):
    alphabet = sorted({*TEXT})
    xs = np.asarray(shuffled.streams(TEXT, alphabet))
    assert xs.shape == (len(TEXT) // shuffled.BATCH, shuffled.BATCH)
    assert "".join(alphabet[i] for i in xs.T.ravel()) == TEXT[: xs.size]


def test_bits_against_a_loop(shuffled, small, key):
    """The cell step by step, the softmax by numpy; and a second window goes on where the first has stopped."""
    model = shuffled.init(key, vocabulary=7)
    model = model._replace(W=jax.random.normal(key, model.W.shape), b=jnp.arange(7.0))
    xs = jax.random.randint(key, (10, 3), 0, 7)
    h, costs, cell = jnp.zeros((3, shuffled.HIDDEN)), [], jax.jit(jaxseq.reference.gru_cell)
    for before, x in zip([jnp.zeros(3, jnp.int32), *xs[:-1]], xs, strict=True):
        h, _ = cell(model.gru, h, model.E[before])
        p = np.exp(np.asarray(h @ model.W + model.b, np.float64))
        costs.append(-np.log2((p / p.sum(-1, keepdims=True))[np.arange(3), x]))
    assert float(shuffled.measure(model, xs)) == pytest.approx(np.mean(costs), rel=1e-5)
    first, past = shuffled.bits(model, shuffled.beginning(3), xs[:4])
    second, _ = shuffled.bits(model, past, xs[4:])
    assert float(first) == pytest.approx(np.mean(costs[:4]), rel=1e-5)
    assert float(second) == pytest.approx(np.mean(costs[4:]), rel=1e-5)


def test_it_begins_where_all_characters_are_alike(shuffled, key):
    xs = jax.random.randint(key, (10, 3), 0, 7)
    assert float(shuffled.measure(shuffled.init(key, vocabulary=7), xs)) == pytest.approx(np.log2(7), rel=1e-6)


def test_what_is_held_out_is_not_trained_on(shuffled, small, monkeypatch, tmp_path):
    """Both parts of each order together are that order, less what does not fill a row."""
    seen, alphabet = [], sorted({*TEXT})

    def learn(model, train, held_out, **_):
        seen.append(["".join(alphabet[i] for i in np.asarray(part).T.ravel()) for part in (train, held_out)])
        return model, [(0, 1.0)]

    monkeypatch.setattr(shuffled, "topics", {"topic": TEXT})
    monkeypatch.setattr(shuffled, "learn", learn)
    shuffled.run(3, 1, tmp_path / "a.png", True)
    end = len(TEXT) - len(TEXT) // 20
    for (train, held_out), ordered in zip(seen, shuffled.orders(TEXT, 3).values(), strict=True):
        assert ordered[:end].startswith(train)
        assert ordered[end:].startswith(held_out)
        assert len(train) > len(held_out) > 0


def test_a_short_run(shuffled, small, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(shuffled, "topics", {"a": TEXT, "b": TEXT})
    path = tmp_path / "new" / "shuffled.png"
    assert shuffled.main(["--steps=3", "--quiet", f"--out={path}"]) == 0
    said = capsys.readouterr()
    picture = pytest.importorskip("matplotlib.image").imread(path)
    assert picture.shape[0] > 400 < picture.shape[1]
    assert picture[..., :3].std() > 0.1
    whole = f"{TEXT}\n\n{TEXT}"
    H = shuffled.unigram_entropy(whole)
    assert f"{len(whole)} characters, {len({*whole})} different; unigram entropy {H:.3f} bits" in said.out
    found = reported(said.out)
    assert list(found) == ["text", "words shuffled", "characters shuffled"]
    for (bits, own), ordered in zip(found.values(), shuffled.orders(whole, 0).values(), strict=True):
        assert own == pytest.approx(shuffled.unigram_entropy(ordered[-(len(whole) // 20) :]), abs=6e-4)
        assert 0 < bits < np.log2(len({*whole}))
    assert said.err == "", "--quiet"


def test_a_loss_that_is_not_finite_stops_it(shuffled, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(shuffled, "topics", {"topic": TEXT})
    monkeypatch.setattr(shuffled, "measure", lambda *_: 0.0)
    monkeypatch.setattr(shuffled, "train_step", lambda model, state, past, *_, **__: (model, state, past, np.nan))
    assert shuffled.main(["--quiet", f"--out={tmp_path / 'a.png'}"]) == 1
    assert capsys.readouterr().err == "shuffled.py: error: the loss is nan at step 1\n"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--steps=0", "expected --steps >= 1"),
        (f"--seed={2**31}", "expected --steps >= 1"),
        ("--out=.", "cannot write to .: Is a directory"),
    ],
)
def test_a_mistake_ends_with_status_2(shuffled, option, message, monkeypatch, capsys):
    monkeypatch.setattr(shuffled, "run", lambda *_: pytest.fail("it went on"))
    with pytest.raises(SystemExit) as stop:
        shuffled.main([option])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_order_is_what_is_learnt(shuffled, tmp_path, capsys):
    assert shuffled.main(["--quiet", f"--out={tmp_path / 'a.png'}"]) == 0
    text, words, characters = reported(capsys.readouterr().out).values()
    assert characters[0] > characters[1] - 0.02, "nothing beats the unigram entropy where order is destroyed"
    assert characters[0] < characters[1] + 0.05, "and a model that learns reaches it"
    assert text[0] < 2.1
    assert text[0] + 0.1 < words[0] < 2.6
