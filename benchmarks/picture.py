"""Plot of a benchmark: for each problem, the time of each candidate relative to the baseline."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def draw(where: dict[str, Any], tables: Sequence[dict[str, Any]], file: Path) -> None:
    """Plot the ratios of each problem on a logarithmic axis: bars are quartiles over rounds, dots are medians."""
    import matplotlib  # noqa: PLC0415

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    names = list(dict.fromkeys(row["name"] for table in tables for row in table["rows"]))
    figure, axes = plt.subplots(figsize=(11, 1.5 + 0.3 * len(tables)), layout="constrained")
    for n, name in enumerate(names):
        at, ratios = [], []
        for place, table in enumerate(tables):
            rows = [row["name"] for row in table["rows"]]
            row = table["rows"][rows.index(name)] if name in rows else {}
            if "ratio" in row:
                at.append(place + 0.12 * (rows.index(name) - (len(rows) - 1) / 2))
                ratios.append((row["ratio"], *row["quartiles"]))
                axes.plot(ratios[-1][1:], (at[-1],) * 2, color=f"C{n}", linewidth=3, alpha=0.4)
        axes.plot([ratio for ratio, *_ in ratios], at, "o", color=f"C{n}", markersize=4, label=name)
    axes.set_xscale("log")
    axes.margins(y=0.01)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(tables)), [table["title"] for table in tables], fontsize=7)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel(f"time relative to {tables[0]['baseline']}  ({where['device']}, {where['cores']} cores)")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(len(names), 4), frameon=False)
    figure.savefig(file, dpi=130)
    plt.close(figure)
