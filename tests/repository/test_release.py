"""What is released: versions that agree, a wheel with the package and nothing else, which works where only it is."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import jaxseq

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
RUNTIME = {"jax", "numpy", "jaxtyping"}
ENTRY = r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$"  # of the changelog: version and date
OPS = ("lstm_cell", "depthwise_conv")  # a recurrence and a convolution, of few variants: all ops take minutes


def files(*folders):
    """What is in these folders, as posix paths from the root."""
    found = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file())
    return {path.relative_to(ROOT).as_posix() for path in found if "__pycache__" not in path.parts}


def entries():
    return re.findall(ENTRY, (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)


# --- One version ---


def test_the_package_says_the_version_and_the_project_reads_it():
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert "version" not in PROJECT["project"]
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "jaxseq/__init__.py"
    assert str(Version(jaxseq.__version__)) == jaxseq.__version__, "not as PEP 440 writes it"


def test_changelog_and_citation_are_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    (version, date), *_ = [entry for entry in entries() if entry[0] != "Unreleased"]
    assert version == str(citation["version"]) == jaxseq.__version__
    assert date == str(citation["date-released"])


def test_changelog_goes_back_in_time():
    versions = [Version(version) for version, _ in entries() if version != "Unreleased"]
    dates = [date for version, date in entries() if version != "Unreleased"]
    assert versions == sorted(set(versions), reverse=True)
    assert dates == sorted(dates, reverse=True)
    assert all(dates)


def test_citation_has_what_the_format_asks_for():
    """Of the Citation File Format 1.2.0: the required keys, and what we add to them."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["type"] == "software"
    assert citation["license"] == PROJECT["project"]["license"]
    assert [{"name": author["name"]} for author in PROJECT["project"]["authors"]] == citation["authors"]


@pytest.mark.parametrize("page", ["CHANGELOG.md", "CONTRIBUTING.md"])
def test_files_and_commands_are_there(page):
    text = (ROOT / page).read_text("utf-8")
    paths = re.findall(r"`((?:jaxseq|tests|benchmarks|docs|examples)/[\w./]+)`", text)
    targets = re.findall(r"\bmake (?!it\b)([a-z][a-z-]*)", text)
    assert paths
    assert targets
    for path in paths:
        assert (ROOT / path).exists(), path
    for target in targets:
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE), target


# --- What it needs ---


def test_needs_three_packages_and_has_them():
    needed = [Requirement(line) for line in PROJECT["project"]["dependencies"]]
    assert {canonicalize_name(need.name) for need in needed} == RUNTIME
    for need in needed:
        assert need.specifier.contains(importlib.metadata.version(need.name), prereleases=True), need


def test_imports_no_more_than_it_needs():
    """At the head of its files. Inside of functions it may: `tqdm`, `matplotlib`, which it does without."""
    for path in (ROOT / "jaxseq").rglob("*.py"):
        # The module for a framework is imported by its users, who have it.
        theirs = {"flax", "equinox", "haiku"} if path.parent.name == "integrations" else set()
        for node in ast.parse(path.read_text("utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names:
                first = name.partition(".")[0]
                assert first in RUNTIME | theirs | {"jaxseq"} or first in sys.stdlib_module_names, f"{path}: {name}"


# --- The wheel ---


def python(*arguments, interpreter=sys.executable, cwd):
    """Its output; nothing of this tree is on its path."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))}
    done = subprocess.run(
        [interpreter, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{arguments}: {done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_is_the_package_and_works_alone(tmp_path):
    build = ("-m", "build", "--no-isolation", "--outdir")
    python(*build, tmp_path / "dist", ROOT, cwd=tmp_path)  # the source distribution, and from it the wheel
    python(*build, tmp_path / "direct", "--wheel", ROOT, cwd=tmp_path)
    (source,), (wheel,) = (list((tmp_path / "dist").glob(end)) for end in ("*.tar.gz", "*.whl"))
    (direct,) = (tmp_path / "direct").glob("*.whl")

    with tarfile.open(source) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    needed = files("jaxseq", "tests", "examples", "benchmarks", "docs")
    needed |= {"pyproject.toml", "README.md", "LICENSE", "Makefile", "mkdocs.yml"}
    needed |= {"CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff"}
    assert needed <= packed
    assert packed - needed <= {"PKG-INFO", ".gitignore"}

    found = contents(wheel)
    assert found == contents(direct)
    info = f"jaxseq-{jaxseq.__version__}.dist-info"
    assert set(found) == files("jaxseq") | {
        f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "licenses/LICENSE")
    }
    assert "jaxseq/py.typed" in found

    metadata = Parser().parsestr(found[f"{info}/METADATA"].decode())
    assert metadata["Version"] == jaxseq.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    always = [Requirement(line) for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert {canonicalize_name(need.name) for need in always} == RUNTIME

    venv.create(tmp_path / "alone", with_pip=True)
    alone = tmp_path / "alone" / "bin" / "python"
    python("-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel, interpreter=alone, cwd=tmp_path)
    python("-m", "pip", "check", interpreter=alone, cwd=tmp_path)
    where = python("-c", "import jaxseq; print(jaxseq.__file__)", interpreter=alone, cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(tmp_path / "alone")
    for op in OPS:
        told = python("-m", "jaxseq", "verify", "--level", "quick", "--op", op, interpreter=alone, cwd=tmp_path)
        assert re.search(r"^PASS: \d+ variants of 1 ops", told, re.MULTILINE), told
