"""MkDocs hook for links from docs/ to files outside docs/.

In the repository, `../README.md` and `../jaxseq/_lstm.py` are links to files. This hook generates a page for each such
target and rewrites the links.

    README.md             index.md
    CHANGELOG.md          changelog.md, and the same for every other Markdown file of the root
    jaxseq/_lstm.py       source/jaxseq/_lstm.py.md, the file with line numbers
    examples/             source/examples/index.md, the list of its files

`jaxseq.scan` in code font becomes a link to its entry in the API reference.

A page includes a section of the README, selected by its heading, with `<!-- README.md: Example -->`.
"""

import posixpath
import re
from functools import cache
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
LANGUAGES = {".py": "python", ".toml": "toml", "": "text"}  # the empty suffix is that of Makefile and LICENSE

# Splits off code blocks, in which names are not linked.
TEXT = re.compile(r"(^```.*?^```$)", flags=re.DOTALL | re.MULTILINE)
NAME = re.compile(r"(?<![`\[])`(jaxseq(?:\.[A-Za-z]\w*)+)`(?![`\]])")
LINK = re.compile(r"\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)")
SECTION = re.compile(r"<!-- README\.md: (.+?) -->")

META = "search:\n  exclude: true\nhide: [navigation, toc]\n"


@cache
def sources() -> list[Path]:
    """Return the paths of all files with a page: those of the package, and those that Markdown pages link to."""
    found = set(ROOT.glob("jaxseq/**/*.py"))
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        for target, _ in LINK.findall(page.read_text(encoding="utf-8")):
            path = (page.parent / target).resolve()
            found |= set(path.glob("**/*.py")) if path.is_dir() else {path}
    paths = (f.relative_to(ROOT) for f in found if f.is_file() and f.is_relative_to(ROOT))
    return sorted(path for path in paths if path.suffix in LANGUAGES)


def prose() -> dict[str, str]:
    """Return the site page of each Markdown file of the root, by file name."""
    pages = (f.name for f in ROOT.glob("*.md") if f.name != "README.md")
    return {name: name.lower() for name in pages}


def page_of(path: str) -> str | None:
    """Return the site page for a path relative to the root of the repository, or None."""
    if path == "README.md":
        return "index.md"
    if path in prose():
        return prose()[path]
    if path.startswith("docs/") and not path.endswith(".py"):
        return path.removeprefix("docs/")
    if (ROOT / path).is_dir():
        return f"source/{path}/index.md"
    return f"source/{path}.md" if Path(path) in sources() else None


def relinked(markdown: str, place: str, page: str) -> str:
    """Rewrite the links of Markdown from the folder `place` of the repository, relative to `page` of the site."""

    def link(match: re.Match[str]) -> str:
        target, fragment = match.groups(default="")
        path = posixpath.normpath(posixpath.join(place, target))
        target = page_of(path) if (ROOT / path).exists() else None
        return f"]({posixpath.relpath(target, posixpath.dirname(page))}{fragment})" if target else match[0]

    return LINK.sub(link, markdown)


def section(title: str) -> str:
    """Return a section of the README, including its heading."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", text, flags=re.DOTALL | re.MULTILINE)
    if not found:
        raise PluginError(f"README.md has no section {title!r}, which a page of docs/ includes")
    return found[0]


def on_files(files, config):
    """Add pages for files outside docs/."""
    for name, page in prose().items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=relinked(text, "", page)))
    paths = sources()
    for path in paths:
        files.append(File.generated(config, f"source/{path}.md", content=listing(path)))
    for folder in sorted({f for path in paths for f in path.parents if f != Path()}):
        files.append(File.generated(config, f"source/{folder}/index.md", content=contents(folder, paths)))
    return files


def listing(path: Path) -> str:
    """Return a page that shows a file. Its anchor is the path, or the folder for an `__init__.py`."""
    code = (ROOT / path).read_text(encoding="utf-8")
    fence = "`" * 6
    title, anchor = str(path).replace("__", r"\_\_"), str(path).removesuffix("/__init__.py")
    numbered = f'{fence}{{.{LANGUAGES[path.suffix]} linenums="1"}}\n{code}{fence}\n'
    return f"---\ntitle: '{path}'\n{META}---\n# {title} {{ #{anchor} }}\n\n{numbered}"


def contents(folder: Path, paths: list[Path]) -> str:
    """Return a page that lists the files of a folder, then those of its subfolders."""
    names = [path.relative_to(folder) for path in paths if folder in path.parents]
    lines = (f"- [{name}]({name}.md)" for name in sorted(names, key=lambda name: (len(name.parts), name)))
    return "\n".join([f"---\ntitle: '{folder}/'\n{META}---\n# {folder}/\n", *lines])


def on_page_markdown(markdown, page, config, files):
    """Include sections of the README, and rewrite links to files outside docs/."""
    uri = page.file.src_uri
    if page.file.generated_by is not None:
        return markdown
    place = posixpath.normpath(posixpath.join("docs", posixpath.dirname(uri)))
    markdown = relinked(markdown, place, uri)
    markdown = SECTION.sub(lambda match: relinked(section(match[1]), "", uri), markdown)
    parts = TEXT.split(markdown)
    parts[::2] = (NAME.sub(r"[`\1`][\1]", part) for part in parts[::2])
    return "".join(parts)
