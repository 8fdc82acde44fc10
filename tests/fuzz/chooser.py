"""Fuzz the choice of the rule for convolutions: compare its cost with that of lax and of all other rules.

    python tests/fuzz/chooser.py --count 200

Each trial draws a geometry: dense, grouped or depthwise, one to three axes, strides, dilations, padding of both signs,
and receptive fields that overlap, do not overlap, or cover the input. It compiles each of the three contractions (the
value, the input gradient, the kernel gradient) by every rule that can compute it, and by lax. The chosen rule must take
at most 1.5 times as long as the fastest, and at most twice the flops of lax.

A time is the CPU time of one thread, the minimum over several interleaved runs, so the machine need not be idle. The
overhead of a call, about 50 microseconds, is added to each. Flops are those of `cost_analysis`. Rules that trade flops
for time on purpose (`_spectrum` and merged groups) are judged by time only. lax is left out of geometries for which XLA
may abort while compiling its gradient.
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

FLOPS, FEW_FLOPS = 2.0, 1e5  # limit relative to lax, and flops below which it is not applied
SECONDS, CALL = 1.5, 50e-6  # limit relative to the fastest, and overhead added to each time
ELEMENTS, PRODUCTS = 2**19, 2**25  # limits on the elements of an array and the multiplications of a geometry
CONTRACTIONS = ("to_output", "to_input", "to_kernel")


class Drawn(NamedTuple):
    """A convolution of x (batch, *space, groups * in_channels), with the parameters of `jaxseq.conv`."""

    batch: int
    space: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    groups: int
    in_channels: int
    out_channels: int

    def form(self) -> Form:
        """Return the convolution as a `Form`."""
        geometry = _geometry.resolve(
            self.space, self.kernel_size, self.stride, self.padding, self.dilation, self.groups
        )
        outputs = _geometry.output_sizes(geometry, self.space, self.kernel_size)
        return Form(geometry, None, self.space, outputs, self.kernel_size, self.in_channels, self.out_channels)


def draw(r: random.Random) -> Drawn:
    """Draw a random convolution that is small enough to be timed."""
    while True:
        axes = r.choice((1, 1, 2, 2, 2, 3))
        kind = r.choice(("dense", "grouped", "depthwise"))
        style = r.choice(("overlapping", "overlapping", "long", "patches", "whole"))
        space, kernel_size, stride, dilation, padding = zip(*(_axis(r, axes, style) for _ in range(axes)), strict=True)
        groups = {"dense": 1, "grouped": r.choice((2, 4, 8, 16, 32)), "depthwise": r.choice((1, 3, 32, 64, 128))}[kind]
        in_channels, out_channels = (
            (1, 1) if kind == "depthwise" else (r.choice((1, 3, 8, 16, 32, 64)) for _ in range(2))
        )
        drawn = Drawn(
            r.choice((1, 2, 4, 8)), space, kernel_size, stride, dilation, padding, groups, in_channels, out_channels
        )
        if min(space) >= 1 and _fits(drawn):
            return drawn


def _axis(r: random.Random, axes: int, style: str) -> tuple[int, int, int, int, tuple[int, int]]:
    """Draw (I, K, s, d, padding) of one axis."""
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
    outputs, taps, g = prod(form.outputs), prod(drawn.kernel_size), drawn.groups
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
    """Return the rules that can compute a form in reasonable time and memory."""
    taps, pairs = prod(form.kernel_size), form.in_channels * form.out_channels
    rules = {
        _shifts: taps * pairs <= 64,
        _patches: any(_patches.disjoint(form)),
        _spectrum: pairs == 1 and not all(_patches.disjoint(form)),
        _blocks: form.geometry.groups > 1 and pairs > 1,
        _loop: taps <= 256 and pairs == 1,
        _planes: len(form.kernel_size) == 3 and form.kernel_size[0] <= 16 and form.geometry.groups == 1,
        _xla: True,
    }
    return [rule for rule, is_able in rules.items() if is_able]


def by_lax(which: str, form: Form, x: Any, w: Any) -> Callable[..., Any]:
    """Return the contraction as computed by lax and autodiff."""
    letters = "DHW"[3 - len(form.kernel_size) :]
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
    """Judge the three contractions of one geometry."""
    drawn = draw(random.Random(seed))
    form, g = drawn.form(), drawn.groups
    shapes = (
        (drawn.batch, *drawn.space, g * drawn.in_channels),
        (*drawn.kernel_size, drawn.in_channels, g * drawn.out_channels),
        (drawn.batch, *form.outputs, g * drawn.out_channels),
    )
    keys = jax.random.split(jax.random.key(seed), 3)
    x, w, y = (jax.random.normal(key, shape, jnp.float32) for key, shape in zip(keys, shapes, strict=True))
    # Groups may be merged, which takes more flops and less time.
    found, merged = [], g > 1 and drawn.in_channels * drawn.out_channels > 1
    if not form.reaches():  # the result is zero and uses no rule
        return str(drawn), []
    smaller, *_ = form.in_reach()
    for which, args in zip(CONTRACTIONS, ((x, w), (w, y), (x, y)), strict=True):
        chosen = _correlation.choose(which, smaller)
        ways: dict[str, Callable[..., Any]] = {
            _name(rule): partial(_correlation.within_reach, partial(_correlation._apply, rule, which), which, form)
            for rule in {*able(smaller), chosen}
        }
        if _patches.xla_differentiates(form):
            ways["lax"] = by_lax(which, form, x, w)
        found += [f"{which}: {problem}" for problem in judged(_name(chosen), ways, args, merged)]
    return str(drawn), found


def _name(rule: ModuleType) -> str:
    return rule.__name__.split("._")[-1]


def judged(chosen: str, ways: dict[str, Callable[..., Any]], args: tuple[Any, ...], merged: bool) -> list[str]:
    """Return the limits that the chosen program exceeds. With `merged`, judge only its time."""
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
