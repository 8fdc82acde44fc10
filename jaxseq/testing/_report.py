"""Report of a gradient check: the verdict of each check on each leaf, the failures, and their formatting."""

import dataclasses
import enum
import html
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

CHECKS = {
    "contract": "what bwd returns: arity, tree, shapes, dtypes, finite values, no None for a floating-point argument",
    "primal": "fwd returns the same values as f: to 64 eps without jit, within rounding under jit",
    "engagement": "the rule runs, under every transformation",
    "value": "inner products with random directions, against finite differences",
    "elements": "every element, against the derivative of the reference",
    "linearity": "linear in the cotangent, at any scale; zero for zero",
    "determinism": "two equal calls give bitwise equal results, with a call for other arguments in between",
    "jit": "jit, donation, leaks, debug_nans, strict dtype and rank promotion",
    "vmap": "vmap inside, outside, and over cotangents only, for every subset of the arguments",
    "composition": "under remat, inside scan and cond, of a jitted function, in shard_map",
    "order 2": "reverse over reverse and forward over reverse, against finite differences of the gradient",
    "alone": "each argument and each output on its own gives the same result as all of them jointly",
    "dtypes": "float32, bfloat16, float16, mixed, complex",
    "integers": "integers and booleans give float0; repeated and distinct integers",
    "sizes": "axes of size one, of size zero, one entry longer, and of sizes that are all different",
    "power": "the checks would have detected a zeroed, sign-flipped or shifted gradient",
    "truncation": "no gradient crosses a window boundary; a window of the full length gives the full gradient",
    "transpose": "forward mode and reverse mode are each other's transpose",
}
"""The names of all checks, with descriptions."""


class Verdict(enum.StrEnum):
    """The outcome of a check, from worst to best. The verdict of a report is the worst verdict in it.

    INCONCLUSIVE: no error was found, but the check would not have detected a wrong gradient at this point either.
    """

    FAIL = "FAIL"
    INCONCLUSIVE = "INCONCLUSIVE"
    PASS = "PASS"
    SKIP = "SKIP"

    @staticmethod
    def worst(verdicts: Iterable["Verdict"]) -> "Verdict":
        """Return the first verdict in the order above, or SKIP if `verdicts` is empty."""
        return min(verdicts, key=list(Verdict).index, default=Verdict.SKIP)


SYMBOLS = {Verdict.FAIL: "FAIL", Verdict.INCONCLUSIVE: "?", Verdict.PASS: "ok", Verdict.SKIP: "-"}
COLORS = {Verdict.FAIL: "#d32f2f", Verdict.INCONCLUSIVE: "#b08000", Verdict.PASS: "#2e7d32", Verdict.SKIP: "#888"}
LEGEND = "ok passed, FAIL failed, ? inconclusive: a wrong gradient would also have passed here, - skipped"


class GradientCheckError(AssertionError):
    """Raised if a gradient check did not pass. The message is the report."""


@dataclass(frozen=True)
class Failure:
    """One error that a check found. Entries that do not apply are None.

    Attributes:
        check: the check that found the error, a key of CHECKS.
        message: a description of the error.
        argument: the leaf of the result that is wrong.
        pattern: the cotangent (or tangent) with the largest error.
        index: the index of the worst element in that leaf.
        by_rule: the value of the rule at that index.
        by_reference: the value of the reference there, or the value without the transformation.
        by_differences: the value by finite differences.
        error: the estimated error of `by_differences`.
        ratio: `by_rule` divided by the expected value.
        tolerance: the largest difference that would have passed.
        origin: the origin of the tolerance.
        diagnosis: the mistake that explains the wrong gradient.
        seed: the seed of the random numbers.
        repro: code that prints `by_rule`, given `f` and `args`.
    """

    check: str
    message: str
    argument: str | None = None
    pattern: str | None = None
    index: tuple[int, ...] | None = None
    by_rule: float | complex | None = None
    by_reference: float | complex | None = None
    by_differences: float | complex | None = None
    error: float | None = None
    ratio: float | complex | None = None
    tolerance: float | None = None
    origin: str | None = None
    diagnosis: str | None = None
    seed: int | None = None
    repro: str | None = None

    def __str__(self) -> str:
        lines = [f"FAIL {self.check}" + (f", {self.argument}" if self.argument else "") + f": {self.message}"]
        differences = self.by_differences is not None and f"{number(self.by_differences)} ± {self.error:.1e}"
        entries = {
            "cotangent": self.pattern,
            "worst element": self.index is not None and (list(self.index) or "the only element"),
            "by rule": number(self.by_rule),
            "by reference": number(self.by_reference),
            "by differences": differences,
            "ratio": number(self.ratio),
            "tolerance": self.tolerance is not None and f"{self.tolerance:.1e}, {self.origin}",
            "diagnosis": self.diagnosis,
            "seed": str(self.seed) if self.seed is not None else None,
        }
        lines += [f"    {name:<16}{value}" for name, value in entries.items() if value]
        if self.repro:
            lines += ["    to reproduce:", *(f"        {line}" for line in self.repro.splitlines())]
        return "\n".join(lines)


class Result(NamedTuple):
    """The verdict of one check on one leaf, or on all leaves jointly (leaf None), and the reason."""

    check: str
    leaf: str | None
    verdict: Verdict
    note: str = ""
    failure: Failure | None = None


class Report:
    """The results of all checks of one function at one point. A notebook displays it as HTML.

    Attributes:
        title: a readable name of the function.
        leaves: the names of the leaves of the derivative, the columns of the table.
        results: a `Result` for each check and leaf.
        failures: all failures.
        notes: changes made to the arguments, and what could not be checked.
        where: device, versions, dtype, seed, level and run time in seconds.
    """

    def __init__(
        self,
        title: str,
        leaves: Sequence[str],
        results: Iterable[Result],
        notes: Iterable[str],
        where: dict[str, str | int | float],
    ):
        self.title = title
        self.leaves = tuple(leaves)
        self.results = tuple(results)
        self.failures = tuple(r.failure for r in self.results if r.failure is not None)
        self.notes = tuple(notes)
        self.where = where

    @property
    def verdict(self) -> Verdict:
        """The worst of all checks."""
        return Verdict.worst(r.verdict for r in self.results)

    def of(self, check: str, leaf: str | None = None) -> Verdict:
        """Return the worst verdict of one check, for one leaf or for all leaves; SKIP if it did not run."""
        return Verdict.worst(r.verdict for r in self.results if r.check == check and leaf in (None, r.leaf))

    def raise_if_failed(self, strict: bool = False) -> None:
        """Raise a GradientCheckError with the report as its message if any check failed.

        Args:
            strict: also raise if the verdict is INCONCLUSIVE.
        """
        __tracebackhide__ = True  # pytest then shows only the calling line and the report
        if self.verdict is Verdict.FAIL or (strict and self.verdict is Verdict.INCONCLUSIVE):
            raise GradientCheckError(f"{self}")

    def __repr__(self) -> str:
        return f"<Report {self.title}: {self.verdict}>"

    def __str__(self) -> str:
        where = "   ".join(f"{key}: {value}" for key, value in self.where.items())
        parts = [f"{self.title}: {self.verdict}", where, "", *self._tables(), LEGEND]
        parts += [f"\n{failure}" for failure in self.failures]
        remarks = [*self.notes, *self._remarks()]
        return "\n".join([*parts, *(["", "Notes"] if remarks else []), *(f"  {remark}" for remark in remarks)])

    def to_json(self) -> str:
        """Return the report as JSON."""
        results = [{"check": r.check, "leaf": r.leaf, "verdict": r.verdict, "note": r.note} for r in self.results]
        failures = [{key: _plain(value) for key, value in dataclasses.asdict(f).items()} for f in self.failures]
        whole = {"title": self.title, "verdict": self.verdict, "where": self.where, "leaves": self.leaves}
        return json.dumps({**whole, "results": results, "failures": failures, "notes": self.notes}, indent=1)

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(name)}</th>" for name in ("", "all", *self.leaves))
        rows = ""
        for check, cells in self._rows():
            row = f"<td style='text-align:left' title='{html.escape(CHECKS[check], quote=True)}'>{check}</td>"
            for cell in cells:
                color = COLORS[cell] if cell else "inherit"
                row += f"<td style='color:{color}'>{SYMBOLS[cell] if cell else ''}</td>"
            rows += f"<tr>{row}</tr>"
        details = "".join(f"<pre>{html.escape(str(failure))}</pre>" for failure in self.failures)
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in [*self.notes, *self._remarks()])
        color = COLORS[self.verdict]
        return (
            f"<b>{html.escape(self.title)}: <span style='color:{color}'>{self.verdict}</span></b>"
            f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
            f"<small>{LEGEND}</small>{details}<ul>{notes}</ul>"
        )

    def _rows(self) -> list[tuple[str, list[Verdict | None]]]:
        """Return each check that ran, in CHECKS order, with its overall verdict and that of each leaf, or None."""
        ran = {(r.check, r.leaf) for r in self.results}
        checks = [check for check in CHECKS if any(check == ran_check for ran_check, _ in ran)]
        return [
            (c, [self.of(c), *(self.of(c, leaf) if (c, leaf) in ran else None for leaf in self.leaves)]) for c in checks
        ]

    def _remarks(self) -> list[str]:
        """Return the reasons for checks that were skipped or inconclusive, with leaves of the same reason grouped."""
        leaves: dict[tuple[str, str], list[str]] = {}
        for r in self.results:
            if r.note and r.verdict is not Verdict.FAIL:
                leaves.setdefault((r.check, r.note), []).extend([r.leaf] if r.leaf else [])
        return [
            f"{check}{' of ' if names else ''}{', '.join(dict.fromkeys(names))}: {note}"
            for (check, note), names in leaves.items()
        ]

    def _tables(self, width: int = 112) -> list[str]:
        """Format the verdicts with checks as rows and leaves as columns, split into several tables if too wide."""
        blocks: list[list[str]] = [["all"]]
        for leaf in self.leaves:
            if 16 + sum(len(name) + 2 for name in [*blocks[-1], leaf]) > width:
                blocks.append([])
            blocks[-1].append(leaf)
        lines = []
        for block in blocks:
            first = sum(map(len, blocks[: blocks.index(block)]))
            widths = [max(len(name), 4) for name in block]
            lines.append(" " * 16 + "  ".join(f"{n:>{w}}" for n, w in zip(block, widths, strict=True)))
            for check, cells in self._rows():
                shown = cells[first : first + len(block)]
                words = [f"{SYMBOLS[c] if c else '':>{w}}" for c, w in zip(shown, widths, strict=True)]
                lines.append(f"  {check:<14}" + "  ".join(words))
            lines.append("")
        return lines


def number(value: float | complex | None) -> str | None:
    """Format a number with twelve digits."""
    if value is None:
        return None
    value = complex(value)
    return f"{value.real:.12g}" if value.imag == 0 else f"{value:.12g}"


def _plain(value: object) -> object:
    """Replace a complex number by a list of two floats for JSON."""
    return [value.real, value.imag] if isinstance(value, complex) else value


def explain(error: BaseException) -> str:
    """Format an exception on one line."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text if len(text) <= 240 else text[:240] + '…'}"
