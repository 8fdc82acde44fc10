"""Where measuring lives: candidates that must compute the same thing, timed in turns in one process.

A benchmark states its problems and calls `main`. On a shared machine believe the ratios only.
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

Row = dict[str, Any]  # what `measure` says of one candidate; of a missing one, its name only
LINE = "  {:<18}{:>11}{:>10}{:>8}{:>14}{:>11}{:>10}{:>9}"
COLUMNS = ["median ms", "min ms", "ratio", "quartiles", "compile s", "temp MB", "apart"]


class Candidate(NamedTuple):
    """One way to compute it: `common(run(*args))` is what all candidates of a problem have to agree on.

    A `run` in JAX is compiled here. With `jit=False` it is called as it is, and returns when it is done: another
    library, or JAX's own dispatch. None stands for a library that is not installed.
    """

    name: str
    run: Callable[..., Any] | None
    args: tuple[Any, ...] = ()
    common: Callable[[Any], Any] = lambda out: out
    jit: bool = True


class Problem(NamedTuple):
    """Candidates, the one they are held against, and how far they may differ, in units of a leaf's largest element."""

    title: str
    baseline: str
    candidates: Sequence[Candidate]
    tolerance: float = 1e-4


def with_gradient(f: Callable[..., Any]) -> Callable[..., Any]:
    """`(cotangents, *args) -> (outputs, gradients of all args)`: all of it leaves, so none of it is optimised away."""

    def both(cotangents: Any, *args: Any) -> Any:
        outputs, pull = jax.vjp(f, *args)
        return outputs, pull(cotangents)

    return both


def peer(module: str) -> Any:
    """Another library, or None where it is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in (module, module.partition(".")[0]):
            raise  # it is there, and broken
        return None


def measure(problem: Problem, rounds: int) -> list[Row]:
    """Compiles, compares, then times. Raises ValueError, naming the candidate, where they do not compare."""
    calls, known, outputs = {}, {}, {}
    for candidate in problem.candidates:
        name = candidate.name
        if candidate.run is not None:
            calls[name], known[name] = _compile(problem.title, candidate, candidate.run)
            outputs[name] = jax.tree.map(np.asarray, candidate.common(calls[name]()))
    for name, actual in outputs.items():
        known[name]["apart"] = _apart(problem, name, actual, outputs[problem.baseline])
    del outputs

    # Shuffled: in a rotation each would always find the caches that the same other one left.
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        turns = list(calls)
        shuffle(turns)
        for name in turns:
            # The first call is not counted: cold caches and a peer's threads, still spinning, are not this one's
            # cost. A training loop runs the same program again and again.
            _time(calls[name])
            seconds[name].append(_time(calls[name]))

    # The median of the ratios of each round, not the ratio of the medians. A neighbour who slows the machine for a
    # while slows both sides of a round, and cancels; on a machine that is slow half the time one median may come from
    # a slow round and the other from a fast. What hits one call alone is one outlier, which the median leaves out.
    for name, times in seconds.items():
        ratios = [own / base for own, base in zip(times, seconds[problem.baseline], strict=True)]
        low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
        known[name] |= {"median_s": statistics.median(times), "min_s": min(times)}
        known[name] |= {"ratio": ratio, "quartiles": [low, high]}
    return [{"name": c.name, **known.get(c.name, {})} for c in problem.candidates]


def _compile(title: str, candidate: Candidate, run: Callable[..., Any]) -> tuple[Callable[[], Any], Row]:
    """What to call, which never traces again, and what compiling it says."""
    if not candidate.jit:
        return lambda: run(*candidate.args), {"compile_s": None, "temp_bytes": None}
    args = jax.device_put(candidate.args)  # else each call would copy NumPy's arrays
    start = time.perf_counter()
    traced = jax.jit(run).trace(*args)
    executable = traced.lower().compile()
    compile_s = time.perf_counter() - start
    if not jax.tree.leaves(args) or sum(c.nbytes for c in traced.jaxpr.consts) > 1024:
        raise ValueError(f"{title}: `{candidate.name}` closes over its data, which XLA may fold; pass it in `args`")
    memory = executable.memory_analysis()
    temp_bytes = None if memory is None else memory.temp_size_in_bytes
    return lambda: executable(*args), {"compile_s": compile_s, "temp_bytes": temp_bytes}


def _apart(problem: Problem, name: str, actual: Any, expected: Any) -> float:
    """The largest difference of any element, in units of the largest element of its leaf."""
    refusal = f"{problem.title}: `{name}` does not compute what `{problem.baseline}` does: "
    if jax.tree.structure(actual) != jax.tree.structure(expected):
        raise ValueError(f"{refusal}{jax.tree.structure(actual)}, expected {jax.tree.structure(expected)}")
    worst = 0.0
    for (path, e), a in zip(jax.tree.leaves_with_path(expected), jax.tree.leaves(actual), strict=True):
        where = "result" + jax.tree_util.keystr(path)
        if (a.shape, a.dtype) != (e.shape, e.dtype):
            raise ValueError(f"{refusal}{where} is {a.dtype}{a.shape}, expected {e.dtype}{e.shape}")
        wide = complex if np.iscomplexobj(e) else float
        apart, scale = np.abs(a.astype(wide) - e.astype(wide)).max(initial=0), np.abs(e.astype(wide)).max(initial=0)
        if not apart <= problem.tolerance * scale:  # so put, NaN is refused too
            raise ValueError(f"{refusal}{where} is {apart:.1e} apart at a scale of {scale:.1e}")
        worst = max(worst, float(apart / scale) if scale else 0.0)
    return worst


def _time(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    out = jax.block_until_ready(call())
    seconds = time.perf_counter() - start
    del out  # freed here, not while the next one is timed
    return seconds


def line(row: Row) -> str:
    """One candidate as a line below COLUMNS."""
    if "median_s" not in row:
        return f"  {row['name']:<18}{'not installed':>21}"
    times = [f"{1e3 * row[key]:.2f}" for key in ("median_s", "min_s")]
    ratios = [f"{row['ratio']:.2f}", "{:.2f}-{:.2f}".format(*row["quartiles"])]
    compiled = [
        "-" if row[key] is None else f"{row[key] / unit:.2f}" for key, unit in (("compile_s", 1), ("temp_bytes", 1e6))
    ]
    return LINE.format(row["name"], *times, *ratios, *compiled, f"{row['apart']:.0e}")


def main(problems: Callable[[bool], Iterable[Problem]], about: str, peers: Sequence[str], argv: Any = None) -> None:
    """The command line of a benchmark. `problems(quick)` makes its problems, one at a time."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--rounds", type=int, metavar="N", help="turns of each candidate, at least 2 (default 20)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there as well")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the ratios there as well")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and 3 rounds: whether it runs, not how fast")
    options = parser.parse_args(argv)
    rounds = (3 if options.quick else 20) if options.rounds is None else options.rounds
    if rounds < 2:
        parser.error("--rounds must be at least 2")
    for name, file in (("--json", options.json), ("--picture", options.picture)):
        if file and not file.absolute().parent.is_dir():
            parser.error(f"{name}: no folder {file.parent}")

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
