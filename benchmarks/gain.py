"""Summary of the measurements in one table and one plot, for the README and the documentation.

    python -m benchmarks.recurrence --json docs/measured/recurrence.json
    python -m benchmarks.conv --json docs/measured/conv.json
    python -m benchmarks.gain docs/measured/*.json [--picture docs/measured/gain.svg]

Each row is a layer with its gradient, over all measured sizes: the geometric mean of (other / jaxseq), and in brackets
the smallest and the largest ratio. Bytes are the temporary bytes of the compiled program.
"""

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from math import exp, log
from pathlib import Path
from typing import Any, NamedTuple

# Rows, with a pattern for the titles of their problems.
ROWS = {
    "`rnn`": r"rnn forward \+ gradient",
    "`gru`": r"gru forward \+ gradient",
    "`lstm`": r"lstm forward \+ gradient",
    "`lstm`, padded": r"lstm with lengths, ",
    "`lstm`, episodes": r"lstm with resets, ",
    "`lstm`, truncated": r"lstm truncated",
    "`conv`, depthwise": r"forward \+ gradient, depthwise",
    "`conv`, grouped": r"forward \+ gradient, groups",
    "`conv`, three axes": r"forward \+ gradient, dense 3-D",
    "`conv`, one and two axes": r"forward \+ gradient, (dense [12]-D|strided|dilated|1×1|batch)",
    "`conv_transpose`": r"forward \+ gradient, transposed",
}
# Columns, with the names of their candidates.
COLUMNS = {
    "plain JAX": ("reference", "lax", "where in a scan", "stop_gradient"),
    "Flax": ("flax",),
    "Equinox": ("equinox",),
    "Haiku": ("haiku",),
    "Keras": ("keras",),
    "torch": ("torch",),
}


class Spread(NamedTuple):
    """Geometric mean, smallest and largest of one or more ratios."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        mean, low, high = (f"{x:.0f}" if x >= 9.95 else f"{x:.1f}" if x >= 1.995 else f"{x:.2f}" for x in self)
        return mean if low == high else f"{mean} ({low} to {high})"


def spread(ratios: Sequence[float]) -> Spread | None:
    if not ratios:
        return None
    return Spread(exp(sum(map(log, ratios)) / len(ratios)), min(ratios), max(ratios))


def gains(tables: Iterable[dict[str, Any]], key: str) -> dict[str, dict[str, Spread | None]]:
    """Return the ratios to the baseline for every row and column. `key` is `median_s` or `temp_bytes`."""
    tables, found = list(tables), {}
    for row, pattern in ROWS.items():
        ratios: dict[str, list[float]] = {column: [] for column in COLUMNS}
        for table in tables:
            if not re.match(pattern, table["title"]):
                continue
            (baseline,) = (r for r in table["rows"] if r["name"] == table["baseline"])
            for column, names in COLUMNS.items():
                for theirs in (r for r in table["rows"] if r["name"] in names and r.get(key)):
                    ratios[column].append(theirs["ratio"] if key == "median_s" else theirs[key] / baseline[key])
        found[row] = {column: spread(those) for column, those in ratios.items()}
    return found


def markdown(tables: Sequence[dict[str, Any]]) -> str:
    """Return the table."""
    time, space = gains(tables, "median_s"), gains(tables, "temp_bytes")
    lines = ["| op | " + " | ".join(COLUMNS) + " | bytes, plain JAX |", "|" + "---|" * (len(COLUMNS) + 2)]
    for row, columns in time.items():
        cells = [*columns.values(), space[row]["plain JAX"]]
        lines.append(f"| {row} | " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def draw(tables: Sequence[dict[str, Any]], file: Path) -> None:
    """Plot time and bytes: dots are means, and lines extend from the smallest to the largest ratio."""
    import matplotlib as mpl  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    style: dict[Any, Any] = {
        "font.size": 9,
        "svg.fonttype": "path",
        "svg.hashsalt": "jaxseq",
        "figure.facecolor": "white",
    }
    with mpl.rc_context({**style, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8.4, 5.2), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
        rows, columns = list(ROWS), list(COLUMNS)
        for ax, key, title in zip(panels, ("median_s", "temp_bytes"), ("Time", "Temporary bytes"), strict=True):
            found = gains(tables, key)
            for n, column in enumerate(columns):
                at = [i + 0.13 * (n - (len(columns) - 1) / 2) for i in range(len(rows))]
                seen = [(y, s) for y, row in zip(at, rows, strict=True) if (s := found[row][column]) is not None]
                for y, s in seen:
                    ax.plot([s.low, s.high], [y, y], color=f"C{n}", linewidth=1.5, alpha=0.4)
                ax.plot([s.mean for _, s in seen], [y for y, _ in seen], "o", color=f"C{n}", markersize=4, label=column)
            ax.set_xscale("log")
            ax.axvline(1, color="black", linewidth=0.8)
            ax.grid(axis="x", alpha=0.3)
            ticks = [x for x in (0.25, 0.5, 1, 2, 5, 10, 20, 50, 100, 200) if ax.get_xlim()[0] <= x <= ax.get_xlim()[1]]
            ax.set_xticks(ticks, [f"{x:g}" for x in ticks])
            ax.minorticks_off()
            ax.set_title(title)
        figure.supxlabel("values and gradients, relative to jaxseq (above 1: jaxseq is faster or smaller)", fontsize=9)
        panels[0].set_yticks(range(len(rows)), [row.replace("`", "") for row in rows])
        panels[0].invert_yaxis()
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=6, frameon=False)
        figure.savefig(file, metadata={"Date": None, "Creator": None})


def read(files: Iterable[Path]) -> list[dict[str, Any]]:
    """Return the problems of all files."""
    return [table for file in files for table in json.loads(file.read_text("utf-8"))["tables"]]


def main(argv: Any = None) -> None:
    parser = argparse.ArgumentParser(description="Summarize measurements in one table and one plot.")
    parser.add_argument("files", nargs="+", type=Path, help="files written by --json of the benchmarks")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="also draw a plot to FILE")
    options = parser.parse_args(argv)
    tables = read(options.files)
    print(markdown(tables))
    if options.picture:
        draw(tables, options.picture)


if __name__ == "__main__":
    main()
