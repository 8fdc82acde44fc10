"""Write the tables of docs/coming-from.md from the list in `jaxseq._names`."""

from itertools import groupby
from pathlib import Path

from jaxseq import _names

PAGE = Path(__file__).parents[1] / "coming-from.md"


def page(text: str) -> str:
    """Return the introduction of the page, as it is in `text`, with all tables."""
    introduction, _, _ = text.partition("\n## ")
    parts = [introduction.rstrip("\n") + "\n"]
    for library, names in groupby(_names.NAMES, lambda name: name.library):
        rows = [f"| {name.theirs} | {name.ours} |\n" for name in names]
        parts.append(f"## {library}\n\n| {library} | jaxseq |\n|---|---|\n{''.join(rows)}")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text("utf-8")), "utf-8")
