"""`python -m jaxseq verify`: check every public op with `jaxseq.testing` on this machine, device and version of JAX."""

import json
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, runtime_checkable

import jax
from jaxtyping import PyTree

from jaxseq._cases import CASES, Op
from jaxseq.testing import CHECKS, Report, Verdict, _check, _truncation
from jaxseq.testing._report import LEGEND, SYMBOLS

Variant = tuple[str, str]  # the name of an op, and the label of one of its variants
WORKERS = 2  # variants checked in parallel; XLA compilation takes most of the time and releases the GIL


def session(name: str, label: str) -> Callable[..., Report]:
    """Return `(seed, level, only) -> Report`, which checks one variant of an op against its reference implementation.

    All seeds share the compiled functions.
    """
    case, variant = CASES[name], CASES[name].variants[label]
    options = dict(variant.options)
    k = options.pop("truncation", None)
    reverse = options.pop("reverse", False) if k else False
    op, reference = map(variant._replace(options=options).bound, (case.op, case.reference))
    arguments = variant.arguments
    if k and variant.arrays:  # arrays along the time axis are part of the sequence
        op, reference = map(_of_sequence, (op, reference))
        arguments = lambda key: _as_sequence(*variant.arguments(key))  # noqa: E731
    args = arguments(jax.random.key(0))
    if k:
        checker = _truncation.session(op, args, truncation=k, reverse=reverse, reference=reference)
    else:
        checker = _check.Session(op, args, reference=reference)

    def report(seed: int = 0, level: str = "full", only: Collection[str] | None = None) -> Report:
        return checker.report(arguments(jax.random.key(seed)), seed=seed, level=level, only=only)

    return report


def _of_sequence(f: Op) -> Op:
    return lambda params, carry, sequence, **options: f(params, carry, *sequence, **options)


def _as_sequence(params: PyTree, carry: PyTree, *sequence: PyTree) -> tuple[PyTree, PyTree, tuple[PyTree, ...]]:
    return params, carry, sequence


def main(op: str | None, level: str, file: Path | None) -> int:
    """Check one op or all, print a table of ops by checks, and return the exit status."""
    variants = [
        (name, label)
        for name, case in CASES.items()
        if op in (None, name)
        for label in (case.quick if level == "quick" else case.variants)
    ]
    start = time.perf_counter()
    with ThreadPoolExecutor(WORKERS) as pool:
        running = pool.map(lambda variant: session(*variant)(level=level), variants)
        reports = dict(zip(_progress(variants), running, strict=True))
    print(*_matrix(reports), sep="\n")
    for (name, label), report in reports.items():
        if report.verdict in (Verdict.FAIL, Verdict.INCONCLUSIVE):
            print(f"\n{name}, {label}\n{report}")
    verdict = Verdict.worst(report.verdict for report in reports.values())
    device = jax.devices()[0]
    print(
        f"\n{verdict}: {len(reports)} variants of {len({name for name, _ in reports})} ops in "
        f"{time.perf_counter() - start:.0f} s on {device.platform} ({device.device_kind}), jax {jax.__version__}"
    )
    if file is not None:
        whole = [{"op": n, "variant": v, **json.loads(report.to_json())} for (n, v), report in reports.items()]
        file.write_text(json.dumps({"verdict": verdict, "reports": whole}, indent=1) + "\n", "utf-8")
    return int(verdict is Verdict.FAIL)


def _matrix(reports: Mapping[Variant, Report]) -> Iterator[str]:
    """Yield the lines of a table with a row per op and a column per check. A cell shows the worst variant of the op."""
    checks = [c for c in CHECKS if any(r.check == c for report in reports.values() for r in report.results)]
    width = max(map(len, CASES)) + 2
    yield " " * width + "  ".join(checks)
    for name in dict.fromkeys(name for name, _ in reports):
        of_op = [report for (other, _), report in reports.items() if other == name]
        cells = [SYMBOLS[Verdict.worst(report.of(check) for report in of_op)] for check in checks]
        yield f"{name:<{width}}" + "  ".join(f"{cell:<{len(check)}}" for cell, check in zip(cells, checks, strict=True))
    yield LEGEND


def _progress(variants: Iterable[Variant]) -> Iterable[Variant]:
    """Iterate over `variants` and show progress: a tqdm bar if tqdm is installed, or else lines on stderr."""
    variants = list(variants)
    try:
        from tqdm import tqdm  # noqa: PLC0415
    except ModuleNotFoundError:
        return _lines(variants)
    return _bar(tqdm(variants, unit="variant", disable=None))


@runtime_checkable
class ProgressBar(Protocol):
    """The used part of `tqdm.tqdm`, which need not be installed."""

    def __iter__(self) -> Iterator[Variant]:
        """Iterate over the variants and count them."""
        ...

    def set_description(self, desc: str, /) -> None:
        """Set the text before the bar."""


def _bar(bar: ProgressBar) -> Iterator[Variant]:
    for name, label in bar:
        bar.set_description(f"{name}, {label}")
        yield name, label


def _lines(variants: list[Variant]) -> Iterator[Variant]:
    for n, (name, label) in enumerate(variants, 1):
        print(f"{n}/{len(variants)} {name}, {label}", file=sys.stderr, flush=True)
        yield name, label
