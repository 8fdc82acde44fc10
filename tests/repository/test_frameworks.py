"""`examples/frameworks/`: inside Flax, Equinox and Haiku our layers train as their own do. Needs the extra `peers`."""

import importlib
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import script

import jaxseq

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "frameworks"
optax = pytest.importorskip("optax", reason="the examples need the extra `examples`: optax")

pytestmark = pytest.mark.usefixtures("as_users_have_jax")

PACKAGES = {"in_linen": "flax.linen", "in_nnx": "flax.nnx", "in_equinox": "equinox", "in_haiku": "haiku"}
SMALL = {
    "in_linen": {"B": 16, "T": 40, "H": 12, "K": 2},
    "in_nnx": {"B": 8, "T": 21, "D": 6, "H": 10, "K": 3},
    "in_equinox": {"B": 3, "T": 19, "C": 6, "H": 7},
    "in_haiku": {"B": 3, "T": 25, "H": 7, "EPISODE": 6},
}
RATE = 3e-2  # so few units learn little in fifty steps at the rate of the examples


def loaded(name, patch):
    """The example, small."""
    pytest.importorskip(PACKAGES[name], reason=f"{PACKAGES[name]} is not installed (extra `peers`)")
    module = script(FOLDER / f"{name}.py")
    for size, value in SMALL[name].items():
        patch.setattr(module, size, value)
    return module


@pytest.fixture(params=PACKAGES)
def example(request, monkeypatch):
    return loaded(request.param, monkeypatch)


@pytest.fixture
def side_by_side():
    return script(FOLDER / "side_by_side.py")


def changed(params, i):
    """The i-th array a tenth off."""
    leaves, structure = jax.tree.flatten(jax.tree.map(np.asarray, params))
    off = 0.1 * np.cos(np.arange(leaves[i].size)).reshape(leaves[i].shape)
    return structure.unflatten([*leaves[:i], leaves[i] + off.astype(leaves[i].dtype), *leaves[i + 1 :]])


def test_fifty_steps_with_the_same_losses(example, side_by_side, key):
    sides = example.sides(key)
    # One more, a second bias say, would be trained beside those that the framework has.
    assert len({sum(leaf.size for leaf in jax.tree.leaves(side.params)) for side in sides}) == 1

    run = side_by_side.train(sides, example.batch, key, steps=50, rate=RATE)
    assert run.losses.shape == run.seconds.shape == (50, 2)
    assert run.distance <= side_by_side.DISTANCE
    assert (run.losses[-10:].mean(0) < 0.95 * run.losses[:10].mean(0)).all(), "nothing was learnt"
    assert (run.seconds > 0).all()
    assert min(run.temp_bytes) > 0

    # And they would not stay together if any array of ours were another one.
    data = example.batch(key)
    loss, params = jax.jit(sides[1].loss), sides[1].params
    cost = float(loss(params, data))
    for i, (path, _) in enumerate(jax.tree.leaves_with_path(params)):
        distance = abs(float(loss(changed(params, i), data)) / cost - 1)
        assert distance > 3 * side_by_side.DISTANCE, jax.tree_util.keystr(path)


def toys(name, slope=2.0):
    """(theirs, ours): a parabola of one weight."""
    module = script(FOLDER / "side_by_side.py")
    loss = lambda a: lambda w, x: a * (w - x) ** 2 + 1  # noqa: E731
    return tuple(module.Side(who, loss(a), jnp.float32(3)) for who, a in ((name, 2.0), ("jaxseq", slope)))


def test_a_run_leaves_a_table(side_by_side, capsys):
    assert side_by_side.main("here", lambda _: toys("there"), jax.random.uniform, rate=RATE, argv=["--steps=7"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^here\n +step +there +jaxseq$", said, re.MULTILINE)
    rows = re.findall(r"^ +(\d+) +(\d+\.\d{7}) +(\d+\.\d{7})$", said, re.MULTILINE)
    assert [int(step) for step, _, _ in rows] == list(range(7))
    assert len({cost for _, cost, _ in rows}) == 7
    assert re.search(r"^largest relative difference in 7 steps: 0e\+00$", said, re.MULTILINE)
    assert re.search(r"^time per step: [\d.]+ and [\d.]+ ms, ratio [\d.]+ \(quartiles .*\)$", said, re.MULTILINE)
    assert re.search(r"^temporary bytes: [\d.]+ and [\d.]+ MB$", said, re.MULTILINE)


def test_losses_that_part_end_with_status_1(side_by_side, capsys):
    sides = toys("there", slope=2.001)
    assert side_by_side.main("here", lambda _: sides, jax.random.uniform, rate=RATE, argv=["--steps=2"]) == 1
    assert re.search(r"^error: the losses differ by \de-04, expected at most 1e-04$", capsys.readouterr().err)


def test_losses_that_are_no_numbers_end_with_status_1(side_by_side):
    side = side_by_side.Side("nowhere", lambda params, batch: jnp.log(params) * batch, jnp.float32(-1))
    assert side_by_side.main("nowhere", lambda _: (side, side), jax.random.uniform, rate=RATE, argv=["--steps=2"]) == 1


@pytest.mark.parametrize("option", ["--steps=0", "--seed=-1", f"--seed={2**31}"])
def test_a_mistake_ends_with_status_2(side_by_side, option, capsys):
    with pytest.raises(SystemExit) as stopped:
        side_by_side.main("here", lambda _: pytest.fail("it went on"), jax.random.uniform, rate=RATE, argv=[option])
    assert stopped.value.code == 2
    assert "expected --steps >= 1" in capsys.readouterr().err


def test_numbers_of_a_run(side_by_side):
    losses = np.array([[2.0, 2.0], [4.0, 3.0], [1.0, 1.125]])
    seconds = np.array([[3.0, 1.0], [8.0, 4.0], [5.0, 5.0]])
    run = side_by_side.Run(losses, seconds, (1, 2), ())
    assert run.distance == 0.25
    assert run.ratio == (1.5, 2.0, 2.5)


# --- The models, as users of the frameworks train them ---


def test_nnx_trains_it_with_its_own_optimizer(side_by_side, monkeypatch, key):
    """The loop that users of nnx write gives the losses of the one that plain JAX has."""
    module = loaded("in_nnx", monkeypatch)
    nnx = module.nnx
    _, ours = module.sides(key)
    model = module.Ours(rngs=nnx.Rngs(7))
    nnx.update(model, ours.params)
    optimizer = nnx.Optimizer(model, optax.adam(RATE), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, s):
        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(s[:, :-1]), s[:, 1:]).mean()

        cost, gradient = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradient)
        return cost

    batches = [module.batch(jax.random.fold_in(key, k)) for k in range(4)]
    costs = [float(step(model, optimizer, s)) for s in batches]
    run = side_by_side.train((ours, ours), module.batch, key, steps=4, rate=RATE)
    np.testing.assert_allclose(run.losses, np.stack([costs, costs], 1), rtol=1e-6)


def test_linen_serialises_it(monkeypatch, key):
    """A NamedTuple is an entry of the tree of parameters as any other."""
    module = loaded("in_linen", monkeypatch)
    serialization = importlib.import_module("flax.serialization")
    _, ours = module.sides(key)
    read = serialization.from_bytes(jax.tree.map(jnp.zeros_like, ours.params), serialization.to_bytes(ours.params))
    jax.tree.map(np.testing.assert_array_equal, read, ours.params)
    assert isinstance(read["lstm"]["weights"], jaxseq.LSTMParams)


def test_the_page_shows_what_stands_in_the_files():
    shown = re.findall(r"```py\n(.*?)```", (ROOT / "docs" / "frameworks.md").read_text("utf-8"), flags=re.DOTALL)
    files = {name: (FOLDER / f"{name}.py").read_text("utf-8") for name in PACKAGES}
    held = [[name for name, text in files.items() if f"\n{excerpt}\n" in text] for excerpt in shown]
    assert held == [[name] for name in PACKAGES]
