"""Fuzz of the choice of a rule for convolutions: what it costs, against lax and against every other rule.

    python tests/fuzz/chooser.py [--first SEED] [--count N] [--times] [--json FILE]

For each seed a random geometry (dense, grouped or depthwise, one to three axes, strides, dilations, paddings of both
signs, windows that overlap, do not, or cover all), and for each of the three contractions (value, gradient to the
input, gradient to the kernel) the flops and the temporary bytes of the compiled program, against those of lax and its
autodiff. Flops of `cost_analysis` are not what a program does in two places, so this counts otherwise there:

    spectra     a Fourier transform is a custom call on some backends, with no flops: 5/2 P log2 P for P real positions
    blocks      multiply by zeros on purpose, because narrow products are slower: they are judged by time only

With `--times`, CPU seconds of the process (all threads; the machine need not be idle) of every rule that can compute
the form and of lax, the least of several runs in turns. Exit status 1 if a limit is exceeded: 2 times the flops, or 1.5
times the time of the fastest. Batches run in processes of their own, because XLA aborts the process over some gradients
of lax; such a geometry has no figure of lax.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from functools import partial
from math import prod
from typing import Any

CONTRACTIONS = ("to_output", "to_input", "to_kernel")
FLOPS, BYTES, TIME = 2.0, 2.0, 1.5  # times lax, or times the fastest
ELEMENTS, PRODUCTS = 2**19, 2**25  # the most elements of an array, and multiplications, of a geometry
BATCH = 10  # geometries in a process


def geometry(seed: int) -> dict[str, Any]:
    """The sizes and options of a random convolution, small enough to be timed."""
    r = random.Random(seed)
    while True:
        axes = r.choice((1, 1, 2, 2, 2, 3))
        kind = r.choice(("dense", "grouped", "depthwise"))
        style = r.choice(("overlapping", "overlapping", "long", "patches", "whole", "any"))
        options: dict[str, Any] = {"window": [], "stride": [], "dilation": [], "padding": [], "space": []}
        for _ in range(axes):
            K = r.choice((1, 2, 3, 3, 4, 5, 7)) if style != "long" else r.choice((9, 16, 31, 64, 128)[: 6 - axes])
            s, d = r.choice((1, 1, 1, 2, 3)), r.choice((1, 1, 1, 2, 3))
            O = round(2 ** r.uniform(0, 10 / axes + 1))
            lo, hi = r.choice(((0, 0), (K // 2, K // 2), (d * (K - 1), 0), (r.randint(-2, K), r.randint(-2, K))))
            if style == "patches":
                K, d = r.choice((2, 4, 8, 14, 16)), 1
                s, lo, hi = r.choice((K, K, K + 1)), 0, r.choice((0, 0, r.randint(-2, 2)))
            elif style == "whole":
                O, d, lo, hi = r.choice((1, 1, 1, 2, 3)), 1, 0, 0
                K = round(2 ** r.uniform(1, 10 / axes))
            I = (O - 1) * s + d * (K - 1) + 1 - lo - hi + r.randint(0, s - 1)
            for name, value in zip(options, (K, s, d, (lo, hi), I), strict=True):
                options[name].append(value)
        groups = (
            1 if kind == "dense" else r.choice((2, 4, 8, 16, 32)) if kind == "grouped" else r.choice((3, 32, 64, 128))
        )
        near, far = (r.choice((1, 3, 8, 16, 32, 64)) for _ in range(2)) if kind != "depthwise" else (1, 1)
        batch = r.choice((1, 2, 4, 8))
        case = {**options, "groups": groups, "near": near, "far": far, "batch": batch, "style": style}
        if min(case["space"]) >= 1 and _fits(case):
            return case


def _fits(case: dict[str, Any]) -> bool:
    g, near, far, batch = (case[name] for name in ("groups", "near", "far", "batch"))
    outputs = [
        (I + lo + hi - d * (K - 1) - 1) // s + 1
        for I, K, s, d, (lo, hi) in zip(
            *(case[n] for n in ("space", "window", "stride", "dilation", "padding")), strict=True
        )
    ]
    sizes = (
        batch * prod(case["space"]) * g * near,
        batch * prod(outputs) * g * far,
        prod(case["window"]) * near * g * far,
    )
    products = batch * prod(outputs) * prod(case["window"]) * g * near * far
    return max(sizes) <= ELEMENTS and products <= PRODUCTS


# --- In a process of its own ---


def measure(seed: int, times: bool, case: dict[str, Any] | None = None) -> dict[str, Any]:
    """What each way costs, {contraction: {way: {"flops", "bytes", "seconds"}}}, and which one is chosen."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    from jaxseq import _correlation, _geometry
    from jaxseq._correlation import _blocks, _patches, _planes, _shifts, _spectrum, _xla
    from jaxseq._correlation._form import Form

    case = case or geometry(seed)
    space, window = tuple(case["space"]), tuple(case["window"])
    g, near, far, axes = case["groups"], case["near"], case["far"], len(window)
    options = [case[name] for name in ("stride", "padding", "dilation")]
    geometry_ = _geometry.resolve(space, window, *options, g)
    outputs = _geometry.output_sizes(geometry_, space, window)
    form = Form(geometry_, None, space, outputs, window, near, far)
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = (case["batch"], *space, g * near), (*window, near, g * far), (case["batch"], *outputs, g * far)
    x, w, y = (jax.random.normal(k, shape, jnp.float32) for k, shape in zip(keys, shapes, strict=True))
    letters = "DHW"[3 - axes :]
    dims = (f"N{letters}C", f"{letters}IO", f"N{letters}C")

    def conv(x: Any, w: Any) -> Any:
        stride, padding, dilation, _ = geometry_
        return lax.conv_general_dilated(
            x, w, stride, padding, rhs_dilation=dilation, dimension_numbers=dims, feature_group_count=g
        )

    def theirs(which: str) -> Any:
        if which == "to_output":
            return conv
        if which == "to_input":
            return lambda w, y: jax.vjp(lambda x: conv(x, w), jnp.zeros(x.shape))[1](y)[0]
        return lambda x, y: jax.vjp(lambda w: conv(x, w), jnp.zeros(w.shape))[1](y)[0]

    chosen = {which: _correlation.choose(form) for which in CONTRACTIONS}
    taps = prod(window) * near * far
    rules = {
        _shifts: taps <= 128,
        _spectrum: (near * far == 1 and not all(_patches.disjoint(form))) or 32 <= prod(window) <= 64,
        _patches: any(_patches.disjoint(form)),
        _blocks: g > 1 and near * far > 1,
        _planes: axes == 3 and g == 1 and window[0] <= 16,
        _xla: True,
    }
    operands = {"to_output": (x, w), "to_input": (w, y), "to_kernel": (x, y)}
    results: dict[str, Any] = {"seed": seed, "case": case, "form": {}, "chosen": {}}
    for which, (a, b) in operands.items():
        ways = {"lax": theirs(which)}
        for rule, able in rules.items():
            if rule is chosen[which] or (times and able):
                ways[rule.__name__.split("._")[-1]] = partial(_correlation._apply, rule, which, form)
        results["chosen"][which] = chosen[which].__name__.split("._")[-1]
        compiled = {}
        row = results["form"][which] = {}
        for name, f in ways.items():
            print(json.dumps({"seed": seed, "at": [which, name]}), flush=True)
            start = time.process_time()
            compiled[name] = jax.jit(f).lower(a, b).compile()
            row[name] = {
                "flops": compiled[name].cost_analysis()["flops"],
                "bytes": compiled[name].memory_analysis().temp_size_in_bytes,
                "compile": time.process_time() - start,
            }
        if times:
            best = dict.fromkeys(ways, float("inf"))
            for _ in range(7):
                for name, f in compiled.items():
                    jax.block_until_ready(f(a, b))
                    start = time.process_time()
                    jax.block_until_ready(f(a, b))
                    best[name] = min(best[name], time.process_time() - start)
            for name, seconds in best.items():
                row[name]["seconds"] = seconds
    return results


if __name__ == "__main__":
    if sys.argv[1] == "--worker":
        for seed in map(int, sys.argv[3:]):
            print(json.dumps(measure(seed, sys.argv[2] == "times")), flush=True)
        sys.exit()
