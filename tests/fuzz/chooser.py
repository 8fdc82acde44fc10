"""Fuzz the choice of a rule for convolutions: its cost, beside that of lax and of every other rule.

    python tests/fuzz/chooser.py --count 200

Each trial draws a geometry (dense, grouped or depthwise, one to three axes, strides, dilations, padding of both signs,
windows that overlap, do not, or cover the input) and compiles each of the three contractions (the value, the gradient
to the input, the gradient to the kernel) by every rule that can compute it and by lax. The rule that is chosen must not
take more than 1.5 times as long as the fastest, nor more than twice the flops of lax.

Times are CPU seconds of one thread, the least of several runs in turns, so the machine need not be idle; 50
microseconds are added to each, about what a call costs before and after its arithmetic. Flops are those of
`cost_analysis`, except where a rule trades them for time on purpose: spectra and blocks, whose time alone is judged. A
geometry at which XLA may abort the process over the gradient of lax has no figure of lax.
"""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import random
import time
from collections.abc import Callable
from functools import partial
from math import prod
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import runner
from jax import lax

from jaxseq import _correlation, _geometry
from jaxseq._correlation import _blocks, _loop, _patches, _planes, _shifts, _spectrum, _xla
from jaxseq._correlation._form import Form

FLOPS, FEW_FLOPS = 2.0, 1e5  # times lax, and below how many nothing is said
SECONDS, CALL = 1.5, 50e-6  # times the fastest, and what is added to each
ELEMENTS, PRODUCTS = 2**19, 2**25  # the most elements of an array, and multiplications, of a geometry
CONTRACTIONS = ("to_output", "to_input", "to_kernel")


class Drawn(NamedTuple):
    """A convolution of x (batch, *space, groups * near), in the words of `jaxseq.conv`."""

    batch: int
    space: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    groups: int
    in_channels: int
    out_channels: int

    def form(self) -> Form:
        """What `_correlation` knows of it."""
        geometry = _geometry.resolve(self.space, self.window, self.stride, self.padding, self.dilation, self.groups)
        outputs = _geometry.output_sizes(geometry, self.space, self.window)
        return Form(geometry, None, self.space, outputs, self.window, self.in_channels, self.out_channels)


def draw(r: random.Random) -> Drawn:
    """A random convolution, small enough to be timed."""
    while True:
        axes = r.choice((1, 1, 2, 2, 2, 3))
        kind = r.choice(("dense", "grouped", "depthwise"))
        style = r.choice(("overlapping", "overlapping", "long", "patches", "whole"))
        space, window, stride, dilation, padding = zip(*(_axis(r, axes, style) for _ in range(axes)), strict=True)
        groups = {"dense": 1, "grouped": r.choice((2, 4, 8, 16, 32)), "depthwise": r.choice((1, 3, 32, 64, 128))}[kind]
        in_channels, out_channels = (
            (1, 1) if kind == "depthwise" else (r.choice((1, 3, 8, 16, 32, 64)) for _ in range(2))
        )
        drawn = Drawn(
            r.choice((1, 2, 4, 8)), space, window, stride, dilation, padding, groups, in_channels, out_channels
        )
        if min(space) >= 1 and _fits(drawn):
            return drawn


def _axis(r: random.Random, axes: int, style: str) -> tuple[int, int, int, int, tuple[int, int]]:
    """(I, K, s, d, padding)."""
    O = round(2 ** r.uniform(0, 10 / axes + 1))
    K = r.choice((9, 16, 31, 64, 128)[: 6 - axes]) if style == "long" else r.choice((1, 2, 3, 3, 4, 5, 7))
    s, d = r.choice((1, 1, 1, 2, 3)), r.choice((1, 1, 1, 2, 3))
    lo, hi = r.choice(((0, 0), (K // 2, K // 2), (d * (K - 1), 0), (r.randint(-2, K), r.randint(-2, K))))
    if style == "patches":
        K, d = r.choice((2, 4, 8, 14, 16)), 1
        s, lo, hi = r.choice((K, K, K + 1)), 0, r.choice((0, 0, r.randint(-2, 2)))
    elif style == "whole":
        O, d, lo, hi = r.choice((1, 1, 1, 2, 3)), 1, 0, 0
        K = round(2 ** r.uniform(1, 10 / axes))
    return (O - 1) * s + d * (K - 1) + 1 - lo - hi + r.randint(0, s - 1), K, s, d, (lo, hi)


def _fits(drawn: Drawn) -> bool:
    form = drawn.form()
    outputs, taps, g = prod(form.outputs), prod(drawn.window), drawn.groups
    x, w, y = (
        drawn.batch * prod(drawn.space) * g * drawn.in_channels,
        taps * drawn.in_channels * g * drawn.out_channels,
        drawn.batch * outputs,
    )
    return (
        max(x, w, y * g * drawn.out_channels) <= ELEMENTS
        and y * taps * g * drawn.in_channels * drawn.out_channels <= PRODUCTS
    )


def able(form: Form) -> list[ModuleType]:
    """The rules that can compute a form in reasonable time and memory."""
    taps, pairs = prod(form.window), form.in_channels * form.out_channels
    rules = {
        _shifts: taps * pairs <= 64,
        _patches: any(_patches.disjoint(form)),
        _spectrum: pairs == 1 and not all(_patches.disjoint(form)),
        _blocks: form.geometry.groups > 1 and pairs > 1,
        _loop: taps <= 256 and pairs == 1,
        _planes: len(form.window) == 3 and form.window[0] <= 16 and form.geometry.groups == 1,
        _xla: True,
    }
    return [rule for rule, is_able in rules.items() if is_able]


def by_lax(which: str, form: Form, x: Any, w: Any) -> Callable[..., Any]:
    """The contraction as lax and its autodiff compute it."""
    letters = "DHW"[3 - len(form.window) :]
    dims, g = (f"N{letters}C", f"{letters}IO", f"N{letters}C"), form.geometry

    def conv(x: Any, w: Any) -> Any:
        return lax.conv_general_dilated(
            x, w, g.stride, g.padding, rhs_dilation=g.dilation, dimension_numbers=dims, feature_group_count=g.groups
        )

    if which == "to_output":
        return conv
    if which == "to_input":
        return lambda w, y: jax.vjp(lambda x: conv(x, w), jnp.zeros_like(x))[1](y)[0]
    return lambda x, y: jax.vjp(lambda w: conv(x, w), jnp.zeros_like(w))[1](y)[0]


def trial(seed: int) -> tuple[str, list[str]]:
    """One geometry, its three contractions."""
    drawn = draw(random.Random(seed))
    form, g = drawn.form(), drawn.groups
    shapes = (
        (drawn.batch, *drawn.space, g * drawn.in_channels),
        (*drawn.window, drawn.in_channels, g * drawn.out_channels),
        (drawn.batch, *form.outputs, g * drawn.out_channels),
    )
    keys = jax.random.split(jax.random.key(seed), 3)
    x, w, y = (jax.random.normal(key, shape, jnp.float32) for key, shape in zip(keys, shapes, strict=True))
    found, merged = (
        [],
        g > 1 and drawn.in_channels * drawn.out_channels > 1,
    )  # groups may be merged: more flops, less time
    if not form.reaches():  # zeros, whatever the rule
        return str(drawn), []
    smaller, beyond, unused = form.in_reach()

    def by_rule(rule: ModuleType, which: str, a: Any, b: Any) -> Any:
        """The contraction by one rule, as `_correlation` calls it."""
        a = _correlation._cropped(a, unused, 0) if which == "to_input" else a
        b = _correlation._cropped(b, unused, 0) if which == "to_output" else _correlation._cropped(b, beyond, 1)
        c = _correlation._apply(rule, which, smaller, a, b)
        sides = {"to_output": (beyond, 1), "to_kernel": (unused, 0), "to_input": ([], 0)}
        return _correlation._padded(c, *sides[which])

    for which, args in zip(CONTRACTIONS, ((x, w), (w, y), (x, y)), strict=True):
        chosen = _correlation.choose(which, smaller)
        ways: dict[str, Callable[..., Any]] = {
            _name(rule): partial(by_rule, rule, which) for rule in {*able(smaller), chosen}
        }
        if _patches.xla_differentiates(form):
            ways["lax"] = by_lax(which, form, x, w)
        found += [f"{which}: {problem}" for problem in judged(_name(chosen), ways, args, merged)]
    return str(drawn), found


def _name(rule: ModuleType) -> str:
    return rule.__name__.split("._")[-1]


def judged(chosen: str, ways: dict[str, Callable[..., Any]], args: tuple[Any, ...], merged: bool) -> list[str]:
    """What the way that is chosen does too much of; `merged`: only its time is judged."""
    programs = {name: jax.jit(f).lower(*args).compile() for name, f in ways.items()}
    seconds = dict.fromkeys(programs, float("inf"))
    for _ in range(8):
        limit = 3 * min(seconds.values()) + CALL
        for name, program in programs.items():
            if name == chosen or seconds[name] == float("inf") or seconds[name] < limit:
                start = time.process_time()
                jax.block_until_ready(program(*args))
                seconds[name] = min(seconds[name], time.process_time() - start)
    found, fastest = [], min(seconds, key=lambda name: seconds[name])
    ratio = (seconds[chosen] + CALL) / (seconds[fastest] + CALL)
    if ratio > SECONDS:
        times = ", ".join(f"{name} {1e6 * s:.0f}" for name, s in seconds.items())
        found.append(f"{chosen} takes {ratio:.1f} times as long as {fastest} (in microseconds: {times})")
    flops = {name: (program.cost_analysis() or {})["flops"] for name, program in programs.items()}
    if "lax" in flops and chosen != "spectrum" and not merged and flops[chosen] > FEW_FLOPS:
        ratio = flops[chosen] / flops["lax"]
        if ratio > FLOPS:
            found.append(f"{chosen} takes {ratio:.1f} times the flops of lax, {flops['lax']:.0f}")
    return found


if __name__ == "__main__":
    runner.main(trial, count=200)
