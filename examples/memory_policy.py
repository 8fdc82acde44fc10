"""A recurrent policy in a T-maze: a lamp at the entrance indicates which way to turn at the fork, many steps later.

    episode      a corridor of N steps, N drawn from SHORTEST to LONGEST, with a fork at the end. A lamp at the entrance
                 is lit or unlit; an unlit lamp looks like the corridor
    x_t          one of three observations, lit lamp, corridor or fork, and NOISE uninformative numbers
    a_t          one of three actions: forward, which has no effect at the fork; left; right
    reward       at the fork: 1 for right if the lamp was lit and for left if it was not, 0 for the other turn; both end
                 the episode. -0.1 for any action without effect. After LIMIT steps the episode ends in any case
    return       at most 1, and at most 1/2 without memory, because the fork always looks the same

Many mazes run in parallel. Each starts a new episode as soon as its episode ends, so their episodes are not aligned.
The state must be reset at the start of an episode, and only there:

    first[t] = done[t-1]                           x_t is the first observation of an episode: the meaning of `resets`
    h_t      = cell(x_t, 0 if first[t] else h_{t-1})

The recurrence runs twice. Acting applies the cell step by step, with h set to zero where `first`. Learning processes
the same steps as one sequence, `gru(params, carry, xs, resets=first)`, from the initial carry of acting. Both agree up
to rounding. The final carry is passed to the next iteration, because most episodes continue.

Learning uses advantage actor-critic, with one step of Adam per T steps of all mazes. The readout of h_t is a policy π
and a value v_t. With γ_t = γ (1 - done[t]):

    A_t   = r_t + γ_t v_{t+1} - v_t + λ γ_t A_{t+1}                    generalized advantage, with the values of acting
    loss  = mean of -A_t log π(a_t) + (v_t - v*_t)² / 2 - β entropy(π),   v*_t = A_t + v_t; A and v* are constants

The script trains the same network with five plans, which differ in the resets or in the truncation of the gradient:

    memory         as above
    none           reset at every step, in acting and in learning: π depends on x_t only
    window         as `memory`, but with truncation=WINDOW in learning
    early resets   learning resets at done[t] instead of done[t-1]: one step too early
    no resets      learning does not reset, although acting does

`memory` reaches the best return. `none` and `early resets` stay at chance, because they have no information at the
fork. `window` learns later and less reliably: values cross a cut, and the readout can use what the state happens to
contain. `no resets` learns too, because the observations reveal where an episode starts; but its gradient belongs to a
policy other than the one that acts, and returns collapse repeatedly, for some seeds permanently.

    python examples/memory_policy.py               about a minute; writes out/memory_policy.png
    python examples/memory_policy.py --cell lstm   the same with an LSTM

Source: B. Bakker, Reinforcement learning with long short-term memory (2001), for the maze; V. Mnih et al., Asynchronous
methods for deep reinforcement learning (2016), and J. Schulman et al., High-dimensional continuous control using
generalized advantage estimation (2015), for the learning.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

import jaxseq

SHORTEST, LONGEST, LIMIT, NOISE = 10, 20, 60, 4
LAMP, CORRIDOR, FORK = range(3)
FORWARD, LEFT, RIGHT = range(3)
STAY = -0.1
MAZES, T, H = 128, 32, 32  # parallel mazes, steps per update, hidden size
GAMMA, LAMBDA, BETA = 0.98, 0.95, 0.01
LEARNING_RATE, CLIP = 1e-2, 0.5  # initial learning rate of Adam, with linear decay to zero
WINDOW = 4
SPAN = 20  # iterations per mean, for printed numbers and plotted points
LABELS = {  # of the plans, in the plot
    "memory": "with memory",
    "none": "without memory: the state is reset at every step",
    "window": f"with memory, but gradients reach back {WINDOW} steps only",
    "early resets": "a mistake: learning resets the state one step too early",
    "no resets": "a mistake: learning does not reset the state",
}
CELLS = {
    "gru": (jaxseq.gru_init, jaxseq.gru, jaxseq.gru_cell),
    "lstm": (jaxseq.lstm_init, jaxseq.lstm, jaxseq.lstm_cell),
}


# --- Maze: pure functions of its state and a key ---


class Maze(NamedTuple):
    """State of one episode."""

    place: Int[Array, ""]  # 0 at the entrance, `length` at the fork
    length: Int[Array, ""]
    lit: Bool[Array, ""]
    steps: Int[Array, ""]
    noise: Float[Array, " NOISE"]  # of the current step


def enter(key: PRNGKeyArray) -> Maze:
    key_length, key_lit, key_noise = jax.random.split(key, 3)
    length, lit = jax.random.randint(key_length, (), SHORTEST, LONGEST + 1), jax.random.bernoulli(key_lit)
    return Maze(jnp.zeros_like(length), length, lit, jnp.zeros_like(length), jax.random.normal(key_noise, (NOISE,)))


def see(maze: Maze) -> Float[Array, " D"]:
    at_lamp = (maze.place == 0) & maze.lit
    seen = jnp.where(maze.place == maze.length, FORK, jnp.where(at_lamp, LAMP, CORRIDOR))
    return jnp.concatenate([jax.nn.one_hot(seen, 3) * 3**0.5, maze.noise])  # the variance that *_init expects


def walk(key: PRNGKeyArray, maze: Maze, action: Int[Array, ""]) -> tuple[Maze, Float[Array, ""], Bool[Array, ""]]:
    """Return (maze, reward, done). If done, the maze is that of the next episode."""
    at_fork = maze.place == maze.length
    turns, moves = at_fork & (action != FORWARD), ~at_fork & (action == FORWARD)
    right = turns & ((action == RIGHT) == maze.lit)
    reward = jnp.where(right, 1.0, jnp.where(turns | moves, 0.0, STAY))
    following = enter(key)
    after = Maze(maze.place + moves, maze.length, maze.lit, maze.steps + 1, following.noise)
    done = turns | (after.steps == LIMIT)
    return jax.tree.map(partial(jnp.where, done), following, after), reward, done


# --- Policy: one step for acting, a sequence for learning ---


class Policy(NamedTuple):
    """Parameters of the recurrence, and of the linear readout: logits of three actions and a value."""

    recurrence: Any
    W: Float[Array, "H 4"]
    b: Float[Array, " 4"]


def init_policy(key: PRNGKeyArray, cell: str) -> Policy:
    """Return a policy with nearly uniform action probabilities and values close to zero."""
    key_cell, key_W = jax.random.split(key)
    W = 0.01 * jax.random.normal(key_W, (H, 4)) * H**-0.5
    return Policy(CELLS[cell][0](key_cell, 3 + NOISE, H), W, jnp.zeros(4))


def read(policy: Policy, h: Float[Array, "*batch H"]) -> tuple[Float[Array, "*batch 3"], Float[Array, "*batch"]]:
    """Return (logits, values)."""
    z = h @ policy.W + policy.b
    return z[..., :3], z[..., 3]


def forget(carry: Any, resets: Bool[Array, " mazes"]) -> Any:
    return jax.tree.map(lambda c: jnp.where(resets[:, None], 0, c), carry)


def one(cell: str, policy: Policy, carry: Any, x: Float[Array, "mazes D"], resets: Bool[Array, " mazes"]) -> Any:
    """Return (carry, logits, values) after one step."""
    carry, h = CELLS[cell][2](policy.recurrence, forget(carry, resets), x)
    return carry, *read(policy, h)


def replay(
    cell: str,
    policy: Policy,
    carry: Any,
    xs: Float[Array, "T mazes D"],
    resets: Bool[Array, "T mazes"],
    window: int | None = None,
) -> tuple[Float[Array, "T mazes 3"], Float[Array, "T mazes"]]:
    """Return (logits, values) of all steps. They equal those of `one` for the same carry and resets."""
    _, hs = CELLS[cell][1](policy.recurrence, carry, xs, resets=resets, truncation=window)
    return read(policy, hs)


# --- Plans: resets in acting and in learning, and truncation ---


class Plan(NamedTuple):
    """The resets of acting, and the `resets` and `truncation` of learning."""

    acting: Callable[[Any], Any]  # first -> resets
    learning: Callable[[Any, Any], Any]  # first, done -> resets
    window: int | None = None


PLANS = {
    "memory": Plan(lambda first: first, lambda first, done: first),
    "none": Plan(jnp.ones_like, lambda first, done: jnp.ones_like(first)),
    "window": Plan(lambda first: first, lambda first, done: first, WINDOW),
    "early resets": Plan(lambda first: first, lambda first, done: done),
    "no resets": Plan(lambda first: first, lambda first, done: jnp.zeros_like(first)),
}


# --- Acting ---


class World(NamedTuple):
    """State of the environments between iterations, with one entry per maze."""

    mazes: Maze
    carry: Any
    first: Bool[Array, " mazes"]  # True if the current observation is the first of an episode


class Rollout(NamedTuple):
    """Observations, actions, rewards and values of T steps."""

    xs: Float[Array, "T mazes D"]
    first: Bool[Array, "T mazes"]
    actions: Int[Array, "T mazes"]
    rewards: Float[Array, "T mazes"]
    done: Bool[Array, "T mazes"]
    values: Float[Array, "T mazes"]
    beyond: Float[Array, " mazes"]  # the value of the observation after the last step


def init_world(key: PRNGKeyArray, cell: str, policy: Policy, mazes: int) -> World:
    started = jax.vmap(enter)(jax.random.split(key, mazes))
    state = jax.eval_shape(lambda x: CELLS[cell][2](policy.recurrence, None, x)[0], jax.vmap(see)(started))
    return World(started, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), state), jnp.ones(mazes, bool))


def act(key: PRNGKeyArray, cell: str, plan: Plan, policy: Policy, world: World, steps: int) -> tuple[World, Rollout]:
    count = len(world.first)

    def step(world: World, key: PRNGKeyArray) -> tuple[World, Any]:
        key_action, key_maze = jax.random.split(key)
        x = jax.vmap(see)(world.mazes)
        carry, logits, values = one(cell, policy, world.carry, x, plan.acting(world.first))
        actions = jax.random.categorical(key_action, logits)
        mazes, rewards, done = jax.vmap(walk)(jax.random.split(key_maze, count), world.mazes, actions)
        return World(mazes, carry, done), (x, world.first, actions, rewards, done, values)

    world, taken = lax.scan(step, world, jax.random.split(key, steps))
    _, _, beyond = one(cell, policy, world.carry, jax.vmap(see)(world.mazes), plan.acting(world.first))
    return world, Rollout(*taken, beyond=beyond)


# --- Learning ---


def advantages(rollout: Rollout) -> Float[Array, "T mazes"]:
    gamma = GAMMA * (1 - rollout.done)
    following = jnp.concatenate([rollout.values[1:], rollout.beyond[None]])
    surprise = rollout.rewards + gamma * following - rollout.values

    def back(A: Any, at: Any) -> Any:
        surprise, gamma = at
        A = surprise + LAMBDA * gamma * A
        return A, A

    return lax.scan(back, jnp.zeros_like(rollout.beyond), (surprise, gamma), reverse=True)[1]


def loss(policy: Policy, cell: str, plan: Plan, carry: Any, rollout: Rollout) -> Float[Array, ""]:
    resets = plan.learning(rollout.first, rollout.done)
    logits, values = replay(cell, policy, carry, rollout.xs, resets, plan.window)
    log_pi = jax.nn.log_softmax(logits)
    A = advantages(rollout)
    chosen = jnp.take_along_axis(log_pi, rollout.actions[..., None], -1)[..., 0]
    entropy = -jnp.sum(jnp.exp(log_pi) * log_pi, -1)
    return jnp.mean(-A * chosen + (values - (A + rollout.values)) ** 2 / 2 - BETA * entropy)


class Score(NamedTuple):
    """Per iteration: the number of completed episodes, the number of correct turns, and the sum of rewards.

    The mean return of an episode is the quotient of the sums over many iterations.
    """

    ended: Any
    right: Any
    reward: Any


@partial(jax.jit, static_argnames=("name", "cell", "iterations"))
def train(key: PRNGKeyArray, *, name: str, cell: str, iterations: int) -> tuple[Policy, World, Score]:
    """Run all iterations of acting and learning as one program."""
    plan = PLANS[name]
    key_policy, key_world, key_steps = jax.random.split(key, 3)
    policy = init_policy(key_policy, cell)
    schedule = optax.linear_schedule(LEARNING_RATE, 0.0, iterations)
    optimizer = optax.chain(optax.clip_by_global_norm(CLIP), optax.adam(schedule))

    def iteration(state: Any, key: PRNGKeyArray) -> Any:
        policy, memory, world = state
        after, rollout = act(key, cell, plan, policy, world, T)
        gradient = jax.grad(loss)(policy, cell, plan, world.carry, rollout)
        updates, memory = optimizer.update(gradient, memory, policy)
        score = Score(rollout.done.sum(), (rollout.rewards == 1).sum(), rollout.rewards.sum())
        return (optax.apply_updates(policy, updates), memory, after), score

    first = policy, optimizer.init(policy), init_world(key_world, cell, policy, MAZES)
    (policy, _, world), score = lax.scan(iteration, first, jax.random.split(key_steps, iterations))
    return policy, world, score


def spans(score: Score) -> tuple[Any, Any]:
    """Return (mean return, fraction of correct turns) per episode, over blocks of SPAN iterations.

    The last block is always complete.
    """
    whole = jax.tree.map(np.asarray, score)
    size = min(SPAN, len(whole.ended))
    count = len(whole.ended) // size
    ended, right, reward = (a[-count * size :].reshape(count, size).sum(1) for a in whole)
    ended = np.maximum(ended, 1)  # 0 only in very short runs, because LIMIT is less than the steps of a block
    return reward / ended, right / ended


@partial(jax.jit, static_argnames=("name", "cell", "longest"))
def straight(key: PRNGKeyArray, policy: Policy, *, name: str, cell: str, longest: int) -> Float[Array, " longest"]:
    """Return the probability of the correct turn at a fork 1, 2, ... steps after the entrance, after going straight."""
    forget_at, endless = PLANS[name].acting, longest + 1
    key_world, key = jax.random.split(key)
    world = init_world(key_world, cell, policy, MAZES)
    world = world._replace(mazes=world.mazes._replace(length=jnp.full(MAZES, endless)))

    def step(world: World, key: PRNGKeyArray) -> tuple[World, Any]:
        carry, *_ = one(cell, policy, world.carry, jax.vmap(see)(world.mazes), forget_at(world.first))
        mazes, *_ = jax.vmap(walk)(jax.random.split(key, MAZES), world.mazes, jnp.full(MAZES, FORWARD))
        world = World(mazes._replace(steps=jnp.zeros(MAZES, int)), carry, jnp.zeros(MAZES, bool))
        fork = jax.vmap(see)(mazes._replace(length=mazes.place))
        _, logits, _ = one(cell, policy, carry, fork, forget_at(world.first))
        turns = jax.nn.softmax(logits[:, LEFT:])
        return world, jnp.mean(jnp.where(mazes.lit, turns[:, RIGHT - LEFT], turns[:, 0]))

    return lax.scan(step, world, jax.random.split(key, longest))[1]


# --- Plot ---


def draw_mazes(axes: Any, rollout: Rollout) -> None:
    """Plot the observations, one maze per row, and mark the starts of episodes."""
    seen, first = np.asarray(rollout.xs)[..., :3].argmax(-1).T, np.asarray(rollout.first).T
    colours = {"lit lamp": "tab:orange", "corridor": "0.88", "fork": "tab:blue"}
    axes.pcolormesh(seen, cmap=ListedColormap(list(colours.values())), vmin=0, vmax=2, edgecolors="white", lw=0.3)
    for row, t in zip(*np.nonzero(first), strict=True):
        axes.plot((t, t), (row, row + 1), color="black", lw=2.5)
    for label, colour in colours.items():
        axes.plot([], [], "s", color=colour, label=label, ms=9)
    axes.plot([], [], color="black", lw=2.5, label="a new episode begins")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, frameon=False)
    axes.set(xlabel="time step", ylabel="maze", title="What a trained policy sees in 12 of the mazes")
    axes.invert_yaxis()


def draw_all(found: dict[str, tuple[Any, Any, Any]], rollout: Rollout, path: Path) -> None:
    figure = Figure(figsize=(18, 5.8), layout="constrained")
    question = f"A lamp at the entrance shows which way to turn at the fork, {SHORTEST} to {LONGEST} steps later"
    figure.suptitle(f"{question}: lit means right, unlit means left", fontsize=15)
    mazes, curves, corridors = figure.subplots(1, 3)
    draw_mazes(mazes, rollout)
    for colour, (name, (returns, steps, chances)) in enumerate(found.items()):
        style = {"color": f"C{colour}", "lw": 3.5 if name == "memory" else 1.5, "label": LABELS[name]}
        curves.plot(steps / 1e6, returns, **style)
        corridors.plot(np.arange(1, len(chances) + 1), chances, **style)
    for level, label in ((1, "best"), (0.5, "best without memory: a guess at the fork")):
        curves.axhline(level, color="0.25", ls="--", lw=1)
        curves.text(1, level + 0.03, label, color="0.25", ha="right", transform=curves.get_yaxis_transform())
    curves.set(
        xlabel="steps in mazes (millions)",
        ylabel="mean reward per episode",
        title="Reward during training",
        ylim=(-1, 1.15),
    )
    corridors.axvspan(SHORTEST, LONGEST, color="0.92")
    corridors.text((SHORTEST + LONGEST) / 2, 1.03, "lengths in training", ha="center", color="0.4")
    corridors.set(xlabel="steps from the lamp to the fork", ylabel="probability of the correct turn", ylim=(0, 1.1))
    corridors.set_title("After training: longer corridors too")
    for axes in (curves, corridors):
        axes.grid(color="0.85", lw=0.5)
    curves.legend(frameon=False, loc="lower right")  # the same colours in both plots
    figure.savefig(path, dpi=90, format="png")


# --- Main program ---


def run(cell: str, iterations: int, seed: int, out: Path) -> None:
    started = time.perf_counter()
    found: dict[str, tuple[Any, Any, Any]] = {}
    per_iteration = MAZES * T
    print(
        f"{cell}, {MAZES} mazes, corridors of {SHORTEST} to {LONGEST} steps, {iterations} updates of {T} steps each\n"
    )
    print("plan          return      correct  return 0.9 after     steps/second")
    rollout = None
    for name, plan in PLANS.items():
        key = jax.random.key(seed)
        compiled = train.lower(key, name=name, cell=cell, iterations=iterations).compile()
        begun = time.perf_counter()
        policy, world, score = jax.block_until_ready(compiled(key))
        seconds = time.perf_counter() - begun
        returns, right = spans(score)
        if not math.isfinite(returns[-1]):
            raise FloatingPointError(f"the return of {name!r} is {returns[-1]}")
        steps = (iterations - SPAN * np.arange(len(returns))[::-1]) * per_iteration
        found[name] = returns, steps, straight(key, policy, name=name, cell=cell, longest=3 * LONGEST)
        if rollout is None:  # `memory` is the first plan
            _, rollout = act(key, cell, plan, policy, jax.tree.map(lambda a: a[:12], world), 3 * LONGEST)
        after = f"{steps[returns >= 0.9][0]:,}" if (returns >= 0.9).any() else "never"
        rate = iterations * per_iteration / seconds
        print(f"{name:13}{returns[-1]:7.3f}  {right[-1]:11.3f}  {after:>16}  {rate:15,.0f}", flush=True)
    assert rollout is not None
    draw_all(found, rollout, out)
    print(f"\n{time.perf_counter() - started:.0f} s including compilation; curves: {out}")


def main(argv: list[str] | None = None) -> int:
    about = "Train a recurrent policy in a T-maze. Defaults are in brackets."
    parser = argparse.ArgumentParser("memory_policy.py", description=about)
    parser.add_argument("--cell", choices=CELLS, default="gru", help="[%(default)s]")
    parser.add_argument("--iterations", type=int, default=600, help="updates per plan [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="random seed [%(default)s]")
    parser.add_argument("--out", type=Path, default=Path("out/memory_policy.png"), metavar="FILE", help="[%(default)s]")
    options = parser.parse_args(argv)
    if options.iterations < 1 or not 0 <= options.seed < 2**31:
        parser.error("expected --iterations >= 1 and --seed from 0 to 2**31 - 1")
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.open("ab").close()  # detect an unwritable path before training
        run(options.cell, options.iterations, options.seed, options.out)
    except OSError as error:
        print(f"memory_policy.py: error: cannot write to {options.out}: {error.strerror}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"memory_policy.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
