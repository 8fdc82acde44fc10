"""Benchmark harness: candidates that must compute the same result are timed alternately in one process.

A benchmark defines its problems and calls `main`. On a shared machine, only the ratios are reliable.
"""

import argparse
import importlib
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import picture

Row = dict[str, Any]  # the result of `measure` for one candidate; only the name if its library is not installed
LINE = "  {:<18}{:>11}{:>10}{:>8}{:>14}{:>11}{:>10}{:>9}"
COLUMNS = ["median ms", "min ms", "ratio", "quartiles", "compile s", "temp MB", "error"]


class Candidate(NamedTuple):
    """One implementation of a problem. `common(run(*args))` must be equal for all candidates.

    `run` is compiled by `jax.jit`. With `jit=False`, it is called directly and must return a finished result, as other
    libraries do. None denotes a library that is not installed.
    """

    name: str
    run: Callable[..., Any] | None
    args: tuple[Any, ...] = ()
    common: Callable[[Any], Any] = lambda out: out
    jit: bool = True


class Problem(NamedTuple):
    """Candidates, the name of the baseline, and the tolerance relative to the largest element of each leaf."""

    title: str
    baseline: str
    candidates: Sequence[Candidate]
    tolerance: float = 1e-4


def with_gradient(f: Callable[..., Any]) -> Callable[..., Any]:
    """Return `(cotangents, *args) -> (outputs, gradients of all args)`. XLA cannot remove any of these results."""

    def both(cotangents: Any, *args: Any) -> Any:
        outputs, pull = jax.vjp(f, *args)
        return outputs, pull(cotangents)

    return both


def peer(module: str) -> Any:
    """Import another library, or return None if it is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in (module, module.partition(".")[0]):
            raise  # installed, but broken
        return None


def measure(problem: Problem, rounds: int) -> list[Row]:
    """Compile, compare, and time all candidates. Raises a ValueError that names a candidate with different results."""
    calls, known, outputs = {}, {}, {}
    for candidate in problem.candidates:
        name = candidate.name
        if candidate.run is not None:
            calls[name], known[name] = _compile(problem.title, candidate, candidate.run)
            outputs[name] = jax.tree.map(np.asarray, candidate.common(calls[name]()))
    for name, actual in outputs.items():
        known[name]["error"] = _error(problem, name, actual, outputs[problem.baseline])
    del outputs

    # Shuffle the order: with a fixed order, each candidate would always run after the same other one, with its caches.
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        turns = list(calls)
        shuffle(turns)
        for name in turns:
            # Do not count the first call: it includes cold caches and contention with spinning threads of the previous
            # candidate. A training loop runs the same program repeatedly.
            _time(calls[name])
            seconds[name].append(_time(calls[name]))

    # Report the median of the ratios within rounds, not the ratio of the medians. Load on the machine slows both
    # candidates of a round and cancels in their ratio, whereas the two medians could come from a slow and a fast round.
    # A disturbance of a single call is an outlier, which the median ignores.
    for name, times in seconds.items():
        ratios = [this / base for this, base in zip(times, seconds[problem.baseline], strict=True)]
        low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
        known[name] |= {"median_s": statistics.median(times), "min_s": min(times)}
        known[name] |= {"ratio": ratio, "quartiles": [low, high]}
    return [{"name": c.name, **known.get(c.name, {})} for c in problem.candidates]


def _compile(title: str, candidate: Candidate, run: Callable[..., Any]) -> tuple[Callable[[], Any], Row]:
    """Return the compiled function and its row: compile time and temporary bytes."""
    if not candidate.jit:
        return lambda: run(*candidate.args), {"compile_s": None, "temp_bytes": None}
    args = jax.device_put(candidate.args)  # otherwise each call would copy NumPy arrays
    start = time.perf_counter()
    traced = jax.jit(run).trace(*args)
    executable = traced.lower().compile()
    compile_s = time.perf_counter() - start
    if not jax.tree.leaves(args) or sum(c.nbytes for c in traced.jaxpr.consts) > 1024:
        raise ValueError(f"{title}: `{candidate.name}` closes over its data, which XLA may fold; pass it in `args`")
    memory = executable.memory_analysis()
    temp_bytes = None if memory is None else memory.temp_size_in_bytes
    return lambda: executable(*args), {"compile_s": compile_s, "temp_bytes": temp_bytes}


def _error(problem: Problem, name: str, actual: Any, expected: Any) -> float:
    """Return the largest difference, relative to the largest element of each leaf. Raise a ValueError if too large."""
    message = f"{problem.title}: `{name}` and `{problem.baseline}` compute different results: "
    if jax.tree.structure(actual) != jax.tree.structure(expected):
        raise ValueError(f"{message}{jax.tree.structure(actual)}, expected {jax.tree.structure(expected)}")
    worst = 0.0
    for (path, e), a in zip(jax.tree.leaves_with_path(expected), jax.tree.leaves(actual), strict=True):
        where = "result" + jax.tree_util.keystr(path)
        if (a.shape, a.dtype) != (e.shape, e.dtype):
            raise ValueError(f"{message}{where} is {a.dtype}{a.shape}, expected {e.dtype}{e.shape}")
        wide = complex if np.iscomplexobj(e) else float
        difference = np.abs(a.astype(wide) - e.astype(wide)).max(initial=0)
        scale = np.abs(e.astype(wide)).max(initial=0)
        if not difference <= problem.tolerance * scale:  # also true for NaN
            raise ValueError(f"{message}{where} differs by {difference:.1e}, at a scale of {scale:.1e}")
        worst = max(worst, float(difference / scale) if scale else 0.0)
    return worst


def _time(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    out = jax.block_until_ready(call())
    seconds = time.perf_counter() - start
    del out  # free memory before the next candidate is timed
    return seconds


def line(row: Row) -> str:
    """Format one candidate as a line of the table with the header COLUMNS."""
    if "median_s" not in row:
        return f"  {row['name']:<18}{'not installed':>21}"
    times = [f"{1e3 * row[key]:.2f}" for key in ("median_s", "min_s")]
    ratios = [f"{row['ratio']:.2f}", "{:.2f}-{:.2f}".format(*row["quartiles"])]
    compiled = [
        "-" if row[key] is None else f"{row[key] / unit:.2f}" for key, unit in (("compile_s", 1), ("temp_bytes", 1e6))
    ]
    return LINE.format(row["name"], *times, *ratios, *compiled, f"{row['error']:.0e}")


def main(problems: Callable[[bool], Iterable[Problem]], about: str, peers: Sequence[str], argv: Any = None) -> None:
    """Run the command line of a benchmark. `problems(quick)` yields its problems."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--rounds", type=int, metavar="N", help="timed calls per candidate, at least 2 (default 20)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table to FILE")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="also plot the ratios to FILE")
    parser.add_argument("--quick", action="store_true", help="small sizes and 3 rounds, to test that it runs")
    options = parser.parse_args(argv)
    rounds = (3 if options.quick else 20) if options.rounds is None else options.rounds
    if rounds < 2:
        parser.error("--rounds must be at least 2")
    for name, file in (("--json", options.json), ("--picture", options.picture)):
        if file and not file.absolute().parent.is_dir():
            parser.error(f"{name}: no such folder: {file.parent}")

    where = {"device": jax.devices()[0].device_kind, "cores": os.cpu_count(), "date": f"{datetime.now(UTC):%Y-%m-%d}"}
    where["versions"] = {name: metadata.version(name) for name in ("jax", *peers) if peer(name)}
    print(*(f"{key}: {value}" for key, value in where.items()), f"rounds: {rounds}", sep="   ")
    print(LINE.format("", *COLUMNS))
    tables = []
    for problem in problems(options.quick):
        rows = measure(problem, rounds)
        print(problem.title, *map(line, rows), sep="\n", flush=True)
        tables.append({"title": problem.title, "baseline": problem.baseline, "rounds": rounds, "rows": rows})
    if options.json:
        options.json.write_text(json.dumps({**where, "tables": tables}, indent=1) + "\n", "utf-8")
    if options.picture:
        picture.draw(where, tables, options.picture)
