"""MkDocs hook that gives every page the address at which its source is edited.

The repository has no public address. Whoever hosts the site sets `DOCS_REPOSITORY` to that of a copy, and every page
gets an edit button. Without it there are none.

    time.md                       docs/time.md
    api/lstm.md                   jaxseq/_lstm.py, which has the docstring of its first entry
    api/cells.md                  docs/api/cells.md: a list of pages
    changelog.md                  CHANGELOG.md
    source/jaxseq/_lstm.py.md     jaxseq/_lstm.py
    source/jaxseq/index.md        none
"""

import re
from functools import cache
from pathlib import Path

import griffe

ROOT = Path(__file__).parents[2]
ENTRY = re.compile(r"^::: jaxseq\.(\S+)", flags=re.MULTILINE)


def on_config(config):
    """Leave out the edit links of a site without a repository, which MkDocs would report as invalid."""
    if not config.repo_url:
        config.edit_uri = None
    return config


def on_files(files, config):
    """Set the file that is edited for each page, relative to the root of the repository."""
    for file in files.documentation_pages():
        file.edit_uri = edited(file.src_uri)
    return files


def edited(uri: str) -> str | None:
    """Return the file from which a page is made, relative to the root of the repository, or None."""
    page = ROOT / "docs" / uri
    if page.exists():
        entry = ENTRY.search(page.read_text(encoding="utf-8"))
        file = str(package()[entry[1]].relative_package_filepath) if entry else "__init__.py"
        return f"docs/{uri}" if file.endswith("__init__.py") else file
    if uri.startswith("source/"):
        path = uri.removeprefix("source/").removesuffix(".md")
        return path if (ROOT / path).is_file() else None
    return next((f.name for f in ROOT.glob("*.md") if f.name.lower() == uri), None)


@cache
def package() -> griffe.Module:
    """Return the names of jaxseq, with the files that define them."""
    return griffe.load("jaxseq", search_paths=[ROOT], resolve_aliases=True)
