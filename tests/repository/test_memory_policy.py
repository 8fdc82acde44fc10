"""`examples/memory_policy.py`: the maze by hand, acting and learning agree, gradients end at resets, what is learnt."""

import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import script

SCRIPT = Path(__file__).parents[2] / "examples" / "memory_policy.py"
pytest.importorskip("optax", reason="the examples need the extra `examples`: optax, matplotlib")
pytest.importorskip("matplotlib", reason="the examples need the extra `examples`: optax, matplotlib")

pytestmark = pytest.mark.usefixtures("as_users_have_jax")

# plan, return, right turns, steps until the return is 0.9, steps a second
ROW = r"^(memory|none|window|early resets|no resets) +(-?\d+\.\d+) +(\d+\.\d+) +([\d,]+|never) +([\d,]+)$"


@pytest.fixture(scope="module")
def example():
    return script(SCRIPT)


@pytest.fixture(scope="module")
def small():
    """Short corridors, so that many episodes end within few steps."""
    module = script(SCRIPT)
    for name, value in {"SHORTEST": 1, "LONGEST": 3, "LIMIT": 9, "H": 5, "MAZES": 12, "T": 6, "SPAN": 2}.items():
        assert hasattr(module, name)
        setattr(module, name, value)
    return module


@pytest.fixture(scope="module")
def played(small):
    """By a GRU, as `acted` says."""
    return acted(small, "gru", "memory")


# --- The maze ---


def test_mazes_by_hand(example, key):
    mazes = jax.vmap(example.enter)(jax.random.split(key, 2000))
    lengths, counts = np.unique(mazes.length, return_counts=True)
    assert lengths.tolist() == list(range(10, 21))
    assert counts.min() > 2000 / 11 * 0.7
    assert np.mean(mazes.lit) == pytest.approx(0.5, abs=0.05)
    assert not np.any(mazes.place)
    assert not np.any(mazes.steps)
    xs = jax.vmap(example.see)(mazes)
    assert xs.shape == (2000, 3 + 4)
    np.testing.assert_array_equal(xs[:, :3].argmax(-1), np.where(mazes.lit, example.LAMP, example.CORRIDOR))


@pytest.mark.parametrize("lit", [False, True])
@pytest.mark.parametrize("turn", ["LEFT", "RIGHT"])
def test_an_episode_by_hand(example, key, lit, turn):
    """A corridor of two steps, and every useless action once."""
    forward, turned = example.FORWARD, getattr(example, turn)
    maze, walk = example.enter(key)._replace(length=jnp.int32(2), lit=jnp.bool(lit)), jax.jit(example.walk)
    walked = []
    for n, action in enumerate([turned, forward, turned, forward, forward, turned]):
        seen = int(example.see(maze)[:3].argmax())
        maze, reward, done = walk(jax.random.fold_in(key, n), maze, jnp.int32(action))
        walked.append((seen, float(reward), bool(done)))
    entrance = example.LAMP if lit else example.CORRIDOR
    stay = pytest.approx(-0.1)
    assert walked == [
        (entrance, stay, False),  # no turn at the entrance,
        (entrance, 0, False),
        (example.CORRIDOR, stay, False),  # nor in the corridor
        (example.CORRIDOR, 0, False),
        (example.FORK, stay, False),  # the fork is the end of it
        (example.FORK, float(lit == (turn == "RIGHT")), True),
    ]
    assert (int(maze.place), int(maze.steps)) == (0, 0), "the next episode has begun"
    assert 10 <= maze.length <= 20


def test_who_never_turns_is_stopped_and_hears_new_noise_at_each_step(small, key):
    def step(maze, key):
        maze, reward, done = small.walk(key, maze, jnp.int32(small.FORWARD))
        return maze, (reward, done, maze.noise)

    _, (rewards, done, noise) = jax.jit(partial(jax.lax.scan, step))(small.enter(key), jax.random.split(key, 30 * 9))
    np.testing.assert_array_equal(np.flatnonzero(done), np.arange(30) * 9 + 8)
    np.testing.assert_allclose(rewards[done], -0.1)
    assert len(np.unique(noise)) == 30 * 9 * 4
    assert np.std(noise) == pytest.approx(1, abs=0.1)


def test_with_the_lamp_in_mind_the_return_is_one_and_without_a_half(example, key):
    """Two players by rule: one remembers the lamp in NumPy, the other always turns left."""
    count, steps = 400, 21  # each maze once, and some twice
    mazes = jax.vmap(example.enter)(jax.random.split(key, count))
    again, walk, see = mazes, jax.jit(jax.vmap(example.walk)), jax.jit(jax.vmap(example.see))
    memory = np.zeros(count, bool)
    got = {"memory": [], "left": []}
    for n in range(steps):
        keys = jax.random.split(jax.random.fold_in(key, n), count)
        seen = np.asarray(see(mazes))[:, :3].argmax(-1)
        memory |= seen == example.LAMP
        action = np.where(seen == example.FORK, np.where(memory, example.RIGHT, example.LEFT), example.FORWARD)
        mazes, reward, done = walk(keys, mazes, action)
        memory &= ~np.asarray(done)
        got["memory"] += np.asarray(reward)[done].tolist()
        at_fork = np.asarray(see(again))[:, :3].argmax(-1) == example.FORK
        again, reward, done = walk(keys, again, np.where(at_fork, example.LEFT, example.FORWARD))
        got["left"] += np.asarray(reward)[done].tolist()
    assert len(got["memory"]) >= count
    assert set(got["memory"]) == {1}
    assert np.mean(got["left"]) == pytest.approx(0.5, abs=0.08)


# --- Acting and learning ---


def acted(small, cell, plan):
    """A policy of random weights throughout, its world before, after, and what it did between."""
    key_policy, key_world, key_before, key_act = jax.random.split(jax.random.key(21), 4)
    leaves, structure = jax.tree.flatten(small.init_policy(key_policy, cell))
    keys = jax.random.split(key_policy, len(leaves))
    policy = structure.unflatten([0.7 * jax.random.normal(k, a.shape) for k, a in zip(keys, leaves, strict=True)])
    world = small.init_world(key_world, cell, policy, 6)
    act = jax.jit(partial(small.act, cell=cell, plan=small.PLANS[plan], policy=policy, steps=11))
    world, _ = act(key_before, world=world)  # so that there is a carry to begin with, and not every maze opens
    return policy, world, *act(key_act, world=world)


@pytest.mark.parametrize(("cell", "plan"), [("gru", "memory"), ("gru", "none"), ("lstm", "memory")])
def test_learning_sees_what_acting_saw(small, cell, plan):
    policy, before, _, rollout = acted(small, cell, plan)
    resets = small.PLANS[plan].learning(rollout.first, rollout.done)
    logits, values = jax.jit(partial(small.replay, cell))(policy, before.carry, rollout.xs, resets)
    np.testing.assert_allclose(values, rollout.values, atol=2e-6)
    carry, one = before.carry, jax.jit(partial(small.one, cell))
    for t in range(11):
        carry, by_step, _ = one(policy, carry, rollout.xs[t], small.PLANS[plan].acting(rollout.first[t]))
        np.testing.assert_allclose(logits[t], by_step, atol=2e-6)


@pytest.mark.parametrize("plan", ["early resets", "no resets"])
def test_under_wrong_resets_it_does_not(small, played, plan):
    policy, before, _, rollout = played
    assert rollout.first[1:].any()
    resets = small.PLANS[plan].learning(rollout.first, rollout.done)
    _, values = jax.jit(partial(small.replay, "gru"))(policy, before.carry, rollout.xs, resets)
    assert np.abs(values - rollout.values).max() > 0.01


def test_resets_follow_from_what_has_ended(played):
    """Across the boundary of two rollouts as within one."""
    _, before, after, rollout = played
    first = np.concatenate([rollout.first, after.first[None]])
    np.testing.assert_array_equal(first[1:], rollout.done)
    np.testing.assert_array_equal(first[0], before.first)
    assert len(np.unique(np.asarray(rollout.done).argmax(0))) > 1, "episodes end at different steps"


def test_the_carry_goes_on_into_the_next_iteration(small, played, key):
    """Two rollouts as one sequence, from the carry of the first."""
    policy, before, between, first = played
    plan = small.PLANS["memory"]
    _, second = jax.jit(partial(small.act, cell="gru", plan=plan, policy=policy, steps=7))(key, world=between)
    assert not second.first[0].all()
    xs, resets = (jnp.concatenate(pair) for pair in ((first.xs, second.xs), (first.first, second.first)))
    _, values = jax.jit(partial(small.replay, "gru"))(policy, before.carry, xs, resets)
    np.testing.assert_allclose(values, jnp.concatenate([first.values, second.values]), atol=2e-6)
    np.testing.assert_allclose(first.beyond, second.values[0], atol=2e-6)


def test_no_gradient_crosses_a_reset(small, played):
    """∂ value_t / ∂ x_s is zero where an episode opens at s < u <= t, and to the carry where one opens at u <= t."""
    policy, before, _, rollout = played
    resets = np.asarray(rollout.first)

    def values(carry, xs):
        return small.replay("gru", policy, carry, xs, rollout.first)[1].sum(1)  # mazes do not meet

    to_carry, to_xs = jax.jit(jax.jacobian(values, (0, 1)))(before.carry, rollout.xs)
    to_carry, to_xs = np.asarray(to_carry).any(-1), np.asarray(to_xs).any(-1)  # (t, maze), (t, s, maze)
    T, mazes = resets.shape
    for t in range(T):
        for maze in range(mazes):
            assert to_carry[t, maze] == (not resets[: t + 1, maze].any())
            for s in range(T):
                assert to_xs[t, s, maze] == (s <= t and not resets[s + 1 : t + 1, maze].any())


def test_advantages_by_hand(small, played):
    """The sum over what follows in the same episode, (γ λ)^k times the surprise of k steps later."""
    *_, rollout = played
    r, done, v = (np.asarray(a, np.float64) for a in (rollout.rewards, rollout.done, rollout.values))
    v = np.concatenate([v, np.asarray(rollout.beyond, np.float64)[None]])
    wanted = np.zeros_like(r)
    for t in range(len(r)):
        for maze in range(r.shape[1]):
            for k, u in enumerate(range(t, len(r))):
                ended = done[u, maze]
                following = 0 if ended else v[u + 1, maze]
                wanted[t, maze] += (0.98 * 0.95) ** k * (r[u, maze] + 0.98 * following - v[u, maze])
                if ended:
                    break
    np.testing.assert_allclose(small.advantages(rollout), wanted, atol=1e-5)


def test_the_loss_leads_to_better_actions(small, played):
    """Its gradient to the logits, where values are right and entropy counts nothing, is that of the policy gradient:
    A_t (π - chosen) / steps.
    """
    policy, before, _, rollout = played
    plan = small.PLANS["memory"]
    A = np.asarray(small.advantages(rollout))
    logits, _ = jax.jit(partial(small.replay, "gru"))(policy, before.carry, rollout.xs, rollout.first)
    pi = np.asarray(jax.nn.softmax(logits))
    entropy = -(pi * np.log(pi)).sum(-1, keepdims=True)
    chosen = np.eye(3)[np.asarray(rollout.actions)]
    by_hand = A[..., None] * (pi - chosen) + 0.01 * pi * (np.log(pi) + entropy)
    gradient = jax.jit(jax.grad(lambda p: small.loss(p, "gru", plan, before.carry, rollout)))(policy)
    np.testing.assert_allclose(gradient.b[:3], by_hand.mean((0, 1)), atol=1e-6)
    np.testing.assert_allclose(gradient.b[3], -A.mean(), atol=1e-6)  # to v*, which is held constant


def test_a_window_cuts_gradients_and_no_values(small, played):
    policy, before, _, rollout = played
    plans = small.PLANS["memory"], small.PLANS["memory"]._replace(window=2)
    both = jax.jit(lambda p: [jax.value_and_grad(small.loss)(p, "gru", plan, before.carry, rollout) for plan in plans])
    whole, cut = both(policy)
    assert float(whole[0]) == pytest.approx(float(cut[0]), rel=1e-5)
    assert np.abs(whole[1].recurrence.w_h - cut[1].recurrence.w_h).max() > 1e-3
    np.testing.assert_allclose(whole[1].b, cut[1].b, atol=1e-6)


# --- The script ---


def test_curves(example):
    ended, right, reward = np.array([9.0, 1, 3, 0, 4]), np.array([7.0, 1, 1, 0, 1]), np.array([3.0, -1, 2, -1, 1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example, "SPAN", 2)
        returns, turned = example.spans(example.Score(ended, right, reward))
    np.testing.assert_allclose(returns, [1 / 4, 0])  # the oldest, alone, is left out
    np.testing.assert_allclose(turned, [2 / 4, 1 / 4])


def test_a_run_leaves_a_table_and_a_picture(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(small, "PLANS", {"early resets": small.PLANS["early resets"]})
    path = tmp_path / "new" / "policy.png"
    assert small.main(["--iterations=4", "--cell=lstm", f"--out={path}"]) == 0
    rows = re.findall(ROW, capsys.readouterr().out, re.MULTILINE)
    assert [row[0] for row in rows] == ["early resets"]
    picture = pytest.importorskip("matplotlib.image").imread(path)
    assert min(picture.shape[:2]) > 400
    assert picture[..., :3].std() > 0.05, "the picture is blank"


@pytest.mark.parametrize("option", ["--iterations=0", "--seed=-1", f"--seed={2**31}"])
def test_a_mistake_ends_with_status_2(example, option, monkeypatch, capsys):
    monkeypatch.setattr(example, "run", lambda *_: pytest.fail("it went on"))
    with pytest.raises(SystemExit) as stop:
        example.main([option])
    assert stop.value.code == 2
    assert "expected --iterations >= 1 and --seed from 0" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_costs_one_line(example, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(example, "run", lambda *_: pytest.fail("it went on"))
    (tmp_path / "file").write_text("")
    assert example.main([f"--out={tmp_path / 'file' / 'out.png'}"]) == 2
    assert re.fullmatch(r"memory_policy\.py: error: cannot write to .*out\.png: .+\n", capsys.readouterr().err)


def test_what_is_remembered_is_what_is_not_forgotten(example, tmp_path, capsys, monkeypatch):
    """Not what happens without resets: that differs from seed to seed."""
    plans = {name: plan for name, plan in example.PLANS.items() if name not in ("no resets", "none")}
    monkeypatch.setattr(example, "PLANS", plans)
    assert example.main([f"--out={tmp_path / 'out.png'}"]) == 0
    found = {row[0]: row for row in re.findall(ROW, capsys.readouterr().out, re.MULTILINE)}
    returns, right = ({name: float(row[n]) for name, row in found.items()} for n in (1, 2))
    assert returns["memory"] > 0.98
    assert returns["early resets"] < 0.54, "it knows nothing of the lamp at the fork"
    assert right["early resets"] == pytest.approx(0.5, abs=0.04)
    assert returns["window"] < returns["memory"]
