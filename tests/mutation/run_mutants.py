"""Apply the mutants of `table.py` to the library, one at a time, and report whether the suite detects them.

    python tests/mutation/run_mutants.py --only gru-update-gate-sign --baseline

Each mutant gets a folder in which `jaxseq/` is a copy with one replacement, and everything else is a link to the
repository. A child process runs the mutant's tests there.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from table import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
# Prefixes of names in the root of the repository that no test reads.
UNUSED = (".cache", ".git", ".hypothesis", ".venv", "dist", "out")

PAGE = """\
# Mutation testing

Written by `make mutants ARGS="--markdown docs/mutants.md"` ({date}, jax {jax}).

A mutant is the library with one intentional mistake: a wrong sign, a missing term, an index off by one, a mask that is
not applied, a missing cast, two swapped arguments, a missing check. If no test of the default suite fails, a test is
missing.

- *killed*: a test failed.
- *survived*: all of the mutant's tests passed.
- *error*: no test ran, the time limit was exceeded, or the tests also fail without the mutant.

`make mutants` runs all mutants in sequence. This takes about an hour and is not part of CI.
`make mutants ARGS="--only NAME"` runs one, `--list` prints the names, `--baseline` runs the unmutated tests first,
`--suite` runs the whole default suite instead of the mutant's own tests.

The mutants are in [table.py](../tests/mutation/table.py). An entry names a file, a text that occurs in it exactly once,
its replacement, and the tests that have to detect the mistake. If the source changes, `tests/mutation/test_table.py`
reports the entries whose text no longer exists: update the text, or delete the entry if its code was deleted. If tests
change, update the paths of the entries that name them. If you add a rule or a check, add a mutant for it.

{summary}

Before `tests/contract.py` replaced overlapping grids of tests, 161 of 187 mutants were killed, and one could not be
judged (`separable-precision`). These 25 survived, and a test was added for each: `backward-output-cotangent-replaces`,
`inner-product-called-twice`, `truncation-second-order-carry`, `scan-head-too-short`, `scan-checkpoint-parameters`,
`indrnn-initial-bound`, `conv-map-stride`, `taps-output-dilation`, `shifts-kernel-blocks`, `patches-output-dilation`,
`causal-carry-rounds`, `halo-divisible-check`, `time-shards-last-state`, `shards-groups-divided`,
`stack-masks-of-dropout-key`, `convert-use-bias-check`, `check-recurrent-weights`, `check-dropout-mask-shape`,
`check-hold-shape`, `dtype-state-rounded-before-product`, `testing-nan-passes`, `testing-differences-extrapolation`,
`testing-rounding-in-loops`, `testing-determinism`, `testing-second-order`. `stack-masks-of-one-key` has replaced
`stack-masks-of-dropout-key`, which no caller can observe.

| mutant | area | what is broken | result | CPU seconds |
| --- | --- | --- | --- | ---: |
{rows}
"""


class Selection(NamedTuple):
    """Tests to run: paths from the root of the repository, and an expression for pytest's `-k`."""

    paths: tuple[str, ...]
    expression: str


class Outcome(NamedTuple):
    """The outcome of one run of tests."""

    result: str  # "killed", "survived" or "error"
    detail: str
    seconds: float  # CPU time of child processes


def main() -> int:
    """Run the mutants named on the command line; return 1 if any mutant survived or could not be judged."""
    args = _arguments()
    mutants = _selected(args.only)
    if args.list:
        print(*(f"{m.name:<44} {m.what}" for m in mutants), sep="\n")
        return 0
    for mutant in mutants:  # fail early if the table is out of date
        mutated(mutant, _source(mutant))
    with tempfile.TemporaryDirectory(prefix="mutants-cache-") as args.cache:
        broken = _baseline(mutants, args) if args.baseline else {}
        outcomes = _run_all(mutants, broken, args)
    print(_summary(outcomes.values()))
    for mutant, outcome in outcomes.items():
        if outcome.result != "killed":
            print(f"{outcome.result}: {mutant.name}: {outcome.detail}")
    if args.markdown is not None:
        args.markdown.write_text(_page(outcomes), "utf-8")
    return int(any(outcome.result != "killed" for outcome in outcomes.values()))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="mutation testing of the suite")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run these mutants only (default: all)")
    parser.add_argument("--list", action="store_true", help="print the names and run nothing")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="parallel mutants; above 1, CPU seconds mix")
    parser.add_argument("--limit", type=float, default=900, metavar="SECONDS", help="time limit for each run of tests")
    parser.add_argument("--baseline", action="store_true", help="first run all selected tests without any mutant")
    parser.add_argument("--suite", action="store_true", help="run the whole default suite for each mutant")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the results to this file, as a docs page")
    return parser.parse_args()


def _selected(names: Sequence[str] | None) -> list[Mutant]:
    known = {mutant.name: mutant for mutant in MUTANTS}
    if unknown := [name for name in names or () if name not in known]:
        sys.exit(f"no mutant is named {', '.join(unknown)}; --list prints the names")
    return [known[name] for name in names] if names else list(MUTANTS)


def _source(mutant: Mutant) -> str:
    return (ROOT / mutant.file).read_text("utf-8")


def mutated(mutant: Mutant, source: str) -> str:
    """Return the source with the mutant's replacement; raise if the text does not occur exactly once."""
    count = source.count(mutant.old)
    if count != 1:
        raise ValueError(
            f"mutant {mutant.name}: {mutant.old!r} occurs {count} times in {mutant.file}, expected once; "
            "update tests/mutation/table.py"
        )
    return source.replace(mutant.old, mutant.new)


def selection(mutant: Mutant, *, suite: bool = False) -> Selection:
    """Return the tests of a mutant, or those of the whole suite."""
    return Selection(("tests",), "") if suite else Selection(mutant.tests, mutant.expression)


def _baseline(mutants: Iterable[Mutant], args: argparse.Namespace) -> dict[Selection, str]:
    """Run every distinct selection without a mutant; return those that do not pass, with the reason."""
    broken = {}
    selections = dict.fromkeys(selection(mutant, suite=args.suite) for mutant in mutants)
    for n, tests in enumerate(selections, 1):
        outcome = _run(tests, None, args)
        passed = outcome.result == "survived"
        print(f"[{n}/{len(selections)}] {'passed' if passed else 'failed':<9} {outcome.seconds:5.0f} s  {tests}")
        if not passed:
            broken[tests] = f"the tests do not pass without the mutant: {outcome.detail}"
    return broken


def _run_all(
    mutants: Sequence[Mutant], broken: dict[Selection, str], args: argparse.Namespace
) -> dict[Mutant, Outcome]:
    def run(mutant: Mutant) -> Outcome:
        tests = selection(mutant, suite=args.suite)
        return Outcome("error", broken[tests], 0) if tests in broken else _run(tests, mutant, args)

    outcomes = {}
    with ThreadPoolExecutor(args.jobs) as pool:
        for n, (mutant, outcome) in enumerate(zip(mutants, pool.map(run, mutants), strict=True), 1):
            place = f"[{n}/{len(mutants)}]"
            print(
                f"{place:<9} {outcome.result:<8} {outcome.seconds:5.0f} s  {mutant.name}: {outcome.detail}", flush=True
            )
            outcomes[mutant] = outcome
    return outcomes


def _run(tests: Selection, mutant: Mutant | None, args: argparse.Namespace) -> Outcome:
    """Run tests in a child process on a tree with the mutant."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        tree = Path(name)
        _grow(tree, mutant, args.cache)
        start = _child_seconds()
        try:
            child = subprocess.run(
                _command(tests),
                cwd=tree,
                env=_environment(tree),
                capture_output=True,
                text=True,
                timeout=args.limit,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Outcome("error", f"more than {args.limit:.0f} s", _child_seconds() - start)
        report, seconds = tree / "report.json", _child_seconds() - start
        ran = json.loads(report.read_text("utf-8")) if report.exists() else None
    return Outcome(*judged(child.returncode, ran, child.stdout + child.stderr), seconds)


def _grow(tree: Path, mutant: Mutant | None, cache: str) -> None:
    """Fill a folder with the mutated package, the compilation cache of this run, and links to everything else."""
    for entry in ROOT.iterdir():
        if entry.name != "jaxseq" and not entry.name.startswith(UNUSED):
            (tree / entry.name).symlink_to(entry)
    (tree / ".cache").symlink_to(cache)
    shutil.copytree(ROOT / "jaxseq", tree / "jaxseq", ignore=shutil.ignore_patterns("__pycache__"))
    if mutant is not None:
        (tree / mutant.file).write_text(mutated(mutant, _source(mutant)), "utf-8")


def _command(tests: Selection) -> list[str]:
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "tests.mutation.mutation_plugin"]
    options += ["-k", tests.expression] if tests.expression else []
    # tests/mutation would detect the mutant in the source, not in the behaviour of the library.
    return [sys.executable, "-m", "pytest", *options, "--ignore", "tests/mutation", *tests.paths]


def _environment(tree: Path) -> dict[str, str]:
    paths = [str(tree), *filter(None, [os.environ.get("PYTHONPATH")])]
    # Otherwise Python would write bytecode with paths of this tree next to the original files.
    mutation = {"MUTANT_TREE": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    return os.environ | mutation | {"PYTHONPATH": os.pathsep.join(paths)}


def _child_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def judged(code: int, report: dict[str, Any] | None, output: str) -> tuple[str, str]:
    """Return the result and its detail, from pytest's exit status and the report of the plugin."""
    if report is not None and code == 1 and report["failed"]:
        return "killed", report["failed"][0]
    if report is not None and code == 0 and report["passed"]:
        skipped = f", {report['skipped']} skipped" if report["skipped"] else ""
        return "survived", f"{report['passed']} passed{skipped}"
    if report is not None and code == 0 and report["skipped"]:
        return "error", f"all {report['skipped']} tests were skipped"
    lines = [line for line in output.splitlines() if line.strip()]
    return "error", f"pytest exited with {code}: {' / '.join(lines[-3:])[:300]}"


def _summary(outcomes: Iterable[Outcome]) -> str:
    results = [outcome.result for outcome in outcomes]
    counts = (f"{results.count(result)} {result}" for result in ("killed", "survived", "error"))
    return f"{len(results)} mutants: {', '.join(counts)}."


def _page(outcomes: dict[Mutant, Outcome]) -> str:
    rows = (
        f"| {mutant.name} | {mutant.area} | {mutant.what} | {outcome.result} | {outcome.seconds:.0f} |"
        for mutant, outcome in outcomes.items()
    )
    return PAGE.format(date=date.today(), jax=version("jax"), summary=_summary(outcomes.values()), rows="\n".join(rows))


if __name__ == "__main__":
    sys.exit(main())
