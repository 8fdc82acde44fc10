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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import runner
from jax import lax

from jaxseq import _geometry
from jaxseq._correlation import RULES, Contraction, Form, Rule, _patches, choose, contract
from jaxseq._correlation._blocks import BLOCKS
from jaxseq._correlation._loop import LOOP
from jaxseq._correlation._planes import PLANES
from jaxseq._correlation._shifts import SHIFTS
from jaxseq._correlation._spectrum import SPECTRUM
from jaxseq._correlation._taps import TAPS
from jaxseq.tuning import CPU

FLOPS, FEW_FLOPS = 2.0, 1e5  # limit relative to lax, and flops below which it is not applied
SECONDS, CALL = 1.5, 50e-6  # limit relative to the fastest, and overhead added to each time
ELEMENTS, PRODUCTS = 2**19, 2**25  # limits on the elements of an array and the multiplications of a geometry


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


def able(which: Contraction, form: Form) -> list[Rule]:
    """Return the rules that can compute a contraction in reasonable time and memory."""
    taps, pairs = prod(form.kernel_size), form.in_channels * form.out_channels
    slow = {
        SHIFTS: taps * pairs > CPU.conv.terms,
        SPECTRUM: pairs > 1 or all(_patches.disjoint(form)),
        BLOCKS: pairs == 1,
        LOOP: taps > CPU.conv.whole_taps or pairs > 1,
        PLANES: form.kernel_size[0] > CPU.conv.planes or form.geometry.groups > 1,
        TAPS: True,
    }
    return [rule for rule in RULES if rule.applies(which, form) and not slow.get(rule, False)]


def by_lax(which: Contraction, form: Form, x: Any, w: Any) -> Callable[..., Any]:
    """Return the contraction as computed by lax and autodiff."""
    letters = "DHW"[3 - len(form.kernel_size) :]
    dims, g = (f"N{letters}C", f"{letters}IO", f"N{letters}C"), form.geometry

    def conv(x: Any, w: Any) -> Any:
        return lax.conv_general_dilated(
            x, w, g.stride, g.padding, rhs_dilation=g.dilation, dimension_numbers=dims, feature_group_count=g.groups
        )

    if which is Contraction.TO_OUTPUT:
        return conv
    if which is Contraction.TO_INPUT:
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
    reach = form.in_reach()
    if reach is None:  # the result is zero and uses no rule
        return str(drawn), []
    for which, args in zip(Contraction, ((x, w), (w, y), (x, y)), strict=True):
        chosen = choose(which, reach[0], "cpu").rule
        ways: dict[str, Callable[..., Any]] = {
            rule.name: partial(contract, which, form, by=rule.contract) for rule in {*able(which, reach[0]), chosen}
        }
        if _patches.xla_differentiates(form):
            ways["lax"] = by_lax(which, form, x, w)
        found += [f"{which.name}: {problem}" for problem in judged(chosen.name, ways, args, merged)]
    return str(drawn), found


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
