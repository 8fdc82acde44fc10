"""What programs for GPUs and TPUs would run, counted by their compilers on a machine without one.

    python -m benchmarks.accelerators [--targets h200 v5e v6e] [--only TEXT] [--json FILE] [--quick]

Each candidate computes outputs and gradients, with `benchmarks/ahead_of_time.py`: kernels, temporary bytes, for TPUs
XLA's estimate of cycles, and how often each loop runs, with the kernels of its body. Ratios are relative to the best
candidate besides jaxseq: of kernels, cycles and bytes. jaxseq uses `jaxseq.tuning.ACCELERATOR`.

It needs the compilers of the extra `accelerators`, in an environment of its own: there, JAX finds plugins for devices
that do not exist.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from importlib import metadata
from pathlib import Path
from statistics import geometric_mean
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

import jaxseq
from benchmarks import conv, harness, linear
from benchmarks.ahead_of_time import TARGETS, count, missing
from benchmarks.harness import with_gradient
from benchmarks.linear_layers import in_a_scan, in_an_associative_scan, in_jax, mlstm_in_a_scan
from benchmarks.recurrence import Size
from benchmarks.recurrent_peers import in_flax
from jaxseq import cells, reference, tuning

Row = dict[str, Any]
MEASURES = ("kernels", "cycles", "temp_bytes")
LINE = "  {:<14}{:>9}{:>10}{:>12}{:>18}   {}"
COLUMNS = ["kernels", "temp MB", "kilocycles", "ratios", "loops: runs x kernels"]


class Program(NamedTuple):
    """A function of arguments of these shapes, one for each candidate."""

    title: str
    candidates: dict[str, tuple[Callable[..., Any], Any]]  # the function and its arguments
    chooses: bool = False  # jaxseq chooses by the platform that the program is lowered for


SIZES = (Size(32, 128, 128, 128), Size(64, 512, 512, 512))
TINY = Size(2, 8, 4, 4)


def programs(quick: bool) -> Iterator[Program]:
    for size in [TINY] if quick else SIZES:
        for dtype in (jnp.float32,) if quick else (jnp.float32, jnp.bfloat16):
            for kind in ("rnn", "gru", "lstm"):
                yield recurrent(kind, size, dtype)
        yield recurrent("lstm", size, jnp.float32, lengths=True)
        yield recurrent("lstm", size, jnp.float32, resets=True)
        yield recurrent("lstm", size, jnp.float32, truncation=4 if quick else 32)
    for name in ("slstm", "mgu", "indrnn", "layer_norm_lstm"):
        yield of_cell(name, TINY if quick else SIZES[0])
    for name in linear.LAYERS:
        yield of_linear_cell(name, quick)
    yield of_mlstm((2, 16, 16, 2) if quick else linear.MLSTM_SIZES[0])
    for shape in conv.SHAPES[:2] if quick else conv.SHAPES:
        for dtype in (jnp.float32,) if quick else (jnp.float32, jnp.bfloat16):
            yield convolution(shape.small() if quick else shape, dtype)


def gradient(f: Callable[..., Any], *args: Any) -> tuple[Callable[..., Any], Any]:
    """Return a function that computes outputs and gradients of `f(*args)`, and its arguments."""
    bars = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(f, *args))
    return with_gradient(f), (bars, *args)


def recurrent(kind: str, size: Size, dtype: Any, **options: Any) -> Program:
    """Compare a recurrence with a scan over the cell of the reference implementation, and with Flax.

    `lengths=True` and `resets=True` stand for arrays of these options.
    """
    B, T, D, H = size
    params = getattr(jaxseq, f"{kind}_init")(jax.random.key(0), D, H, dtype=dtype)
    xs, label = jnp.zeros((T, B, D), dtype), "".join(f", {name}" for name in options)
    masks = {"lengths": jnp.full(B, T), "resets": jnp.zeros((T, B), bool)}
    arrays = {name: masks[name] for name in options if name in masks}
    static = {name: value for name, value in options.items() if name not in masks}

    def run(module: Any, params: Any, xs: jax.Array) -> Any:
        # `lax.optimization_barrier` keeps XLA from computing with the values of the masks.
        return getattr(module, kind)(params, None, xs, **lax.optimization_barrier(arrays), **static)

    found = {
        name: gradient(partial(run, module), params, xs) for name, module in (("jaxseq", jaxseq), ("scan", reference))
    }
    flax = None if set(options) - {"lengths"} else in_flax(kind, D, H)
    if flax is not None:
        carry = jax.tree.map(
            lambda a: jnp.zeros(a.shape, dtype), jax.eval_shape(found["jaxseq"][0], *found["jaxseq"][1])[0][0]
        )
        call = lambda *args: flax.run(*args, **lax.optimization_barrier(arrays))  # noqa: E731
        found["flax"] = gradient(call, flax.params[0](params), flax.carry[0](carry), xs)
    return Program(f"{kind}, {jnp.dtype(dtype).name}, {size}{label}", found)


def of_cell(name: str, size: Size) -> Program:
    """Compare a cell of `jaxseq.cells` with a scan."""
    B, T, D, H = size
    cell, params = getattr(cells, name), getattr(cells, f"{name}_init")(jax.random.key(0), D, H)
    xs = jnp.zeros((T, B, D))
    run = lambda module, params, xs: module.recurrence(cell, params, None, xs)  # noqa: E731
    found = {label: gradient(partial(run, m), params, xs) for label, m in (("jaxseq", jaxseq), ("scan", reference))}
    return Program(f"{name}, float32, {size}", found)


def of_linear_cell(name: str, quick: bool) -> Program:
    """Compare a linear cell with the same equations around a scan, and around an associative scan."""
    cell, init, sizes = linear.LAYERS[name]
    B, T, D, H = (2, 16, 16, 16) if quick else sizes
    params, xs = init(jax.random.key(0), D, H), jnp.zeros((T, B, D))
    run = partial(jaxseq.recurrence, cell)
    like = jax.eval_shape(run, params, None, xs)[0]
    functions = {"jaxseq": run, "scan": in_jax(name, in_a_scan), "associative": in_jax(name, in_an_associative_scan)}
    carry = jnp.zeros(like.shape, like.dtype)
    found = {label: gradient(f, params, carry, xs) for label, f in functions.items()}
    return Program(f"{name}, float32, B={B} T={T} D={D} H={H}", found)


def of_mlstm(sizes: tuple[int, int, int, int]) -> Program:
    B, T, D, heads = sizes
    params, xs = jaxseq.mlstm_init(jax.random.key(0), D, D, heads=heads), jnp.zeros((T, B, D))
    run = lambda f, params, xs: f(params, None, xs)[1]  # noqa: E731
    functions = {"jaxseq": jaxseq.mlstm, "scan": mlstm_in_a_scan}
    found = {label: gradient(partial(run, f), params, xs) for label, f in functions.items()}
    return Program(f"mlstm, float32, B={B} T={T} D={D} heads={heads}", found)


def convolution(shape: conv.Shape, dtype: Any) -> Program:
    """Compare a convolution with lax."""
    args = jax.tree.map(lambda a: a.astype(dtype), conv.data(shape)[0])
    ours = partial(jaxseq.conv_transpose if shape.transposed else jaxseq.conv, **shape.options)
    found = {"jaxseq": gradient(ours, *args), "lax": gradient(conv.in_lax(shape), *args)}
    return Program(f"{shape.name}, {jnp.dtype(dtype).name}", found, chooses=True)


# --- Table ---


def measured(program: Program, target: str) -> list[Row]:
    """Compile all candidates for a target."""
    rows = []
    for name, (f, args) in program.candidates.items():
        # Convolutions choose their rule for the platform that they are lowered for.
        numbers = nullcontext() if program.chooses else tuning.use(tuning.ACCELERATOR)
        with numbers:
            counts = count(f, args, target)
        loops = [[loop.runs, len(loop.kernels)] for loop in counts.loops if loop.depth]
        row = {"name": name, "kernels": counts.kernels, "loops": loops, "temp_bytes": counts.temp_bytes}
        rows.append(row | {"cycles": counts.cycles} if counts.cycles else row)
    best = {key: min((row[key] for row in rows[1:] if key in row), default=None) for key in MEASURES}
    for row in rows:
        row["ratios"] = {key: row[key] / low for key, low in best.items() if low and key in row}
    return rows


def line(row: Row) -> str:
    """Format one candidate as a line of the table with the header COLUMNS."""
    steps = " ".join(f"{runs}x{kernels}" for runs, kernels in row["loops"])
    cycles = f"{row['cycles'] / 1e3:.0f}" if "cycles" in row else "-"
    ratios = " ".join(f"{row['ratios'][key]:.2f}" for key in MEASURES if key in row["ratios"])
    return LINE.format(row["name"], row["kernels"], f"{row['temp_bytes'] / 1e6:.1f}", cycles, ratios, steps)


def means(tables: list[Row]) -> Iterator[str]:
    """Return, for each target and measure, the geometric mean and the largest of the ratios of jaxseq."""
    for target in dict.fromkeys(table["target"] for table in tables):
        rows = [table["rows"][0]["ratios"] for table in tables if table["target"] == target]
        for key in MEASURES:
            found = [row[key] for row in rows if row.get(key)]
            if found:
                yield f"{TARGETS[target]}, {key}: mean {geometric_mean(found):.2f}, largest {max(found):.2f}"


def main(argv: Any = None) -> None:
    parser = argparse.ArgumentParser(description="Count what programs for GPUs and TPUs would run.")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=[*TARGETS], help="default: all")
    parser.add_argument("--only", default="", metavar="TEXT", help="programs whose title contains TEXT")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table to FILE")
    parser.add_argument("--quick", action="store_true", help="small sizes, to test that it runs")
    options = parser.parse_args(argv)
    if options.json and not options.json.absolute().parent.is_dir():
        parser.error(f"--json: no such folder: {options.json.parent}")
    absent = {target: why for target in options.targets if (why := missing(target))}
    for why in absent.values():
        print(why)
    versions = {name: metadata.version(name) for name in ("jax", "flax") if harness.peer(name)}
    print("versions:", versions)
    print(LINE.format("", *COLUMNS))
    tables = []
    for target in options.targets:
        for program in () if target in absent else programs(options.quick):
            if options.only in program.title:
                rows = measured(program, target)
                print(f"{TARGETS[target]}: {program.title}", *map(line, rows), sep="\n", flush=True)
                tables.append({"target": target, "title": program.title, "rows": rows})
    print(*means(tables), sep="\n")
    if options.json:
        options.json.write_text(json.dumps({"versions": versions, "tables": tables}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
