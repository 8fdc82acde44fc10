"""Docstring examples run and print the documented output; code in the README and in docs/ runs unchanged."""

import doctest
import inspect
import re
from importlib.util import find_spec
from pathlib import Path

import jax
import pytest

import jaxseq
from jaxseq import autoregressive, cells, convert, diagnostics, testing
from jaxseq.testing import _check

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
# Functions that the repro of a failure calls, and functions that plot or summarize results. Their docstrings need no
# `Raises` and no `Reference`.
HELPERS = (
    "jaxseq.testing.cotangents",
    "jaxseq.testing.lifted",
    "jaxseq.diagnostics.norms",
    "jaxseq.diagnostics.plot_bias",
)
HELPERS += ("jaxseq.diagnostics.plot_norms", "jaxseq.diagnostics.plot_spectrum")
# For example `jaxseq.lstm`, `jaxseq.cells.mgu_init`, `jaxseq.testing.check_vjp`.
FUNCTIONS = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in (jaxseq, autoregressive, cells, convert, diagnostics, testing)
    for name in module.__all__
    if inspect.isfunction(getattr(module, name))
}


# The default suite runs the code of these two pages only. The code of the others takes minutes.
QUICK_PAGES = [ROOT / "README.md", ROOT / "docs" / "start.md"]


def found(pattern, *, quick=PAGES):
    """Return the pages on which a pattern occurs, with its matches. Pages that are not quick are marked as long."""
    assert set(quick) <= set(PAGES)
    matches = {page: re.findall(pattern, page.read_text(encoding="utf-8"), flags=re.DOTALL) for page in PAGES}
    devices = {"devices.md": [pytest.mark.eight_devices]}
    mark = lambda page: devices.get(page.name, []) + ([] if page in quick else [pytest.mark.long])  # noqa: E731
    name = lambda page: str(page.relative_to(ROOT))  # noqa: E731
    return [pytest.param(page, matches[page], id=name(page), marks=mark(page)) for page in PAGES if matches[page]]


@pytest.fixture
def as_users_have_it():
    """Restore JAX's default settings, and raise an error if a random key is used twice."""
    strict = {"jax_enable_x64": True, "jax_numpy_dtype_promotion": "strict", "jax_numpy_rank_promotion": "raise"}
    strict["jax_debug_key_reuse"] = jax.config.jax_debug_key_reuse
    usual = {"jax_enable_x64": False, "jax_numpy_dtype_promotion": "standard", "jax_numpy_rank_promotion": "allow"}
    usual["jax_debug_key_reuse"] = True
    for name, value in usual.items():
        jax.config.update(name, value)
    yield
    for name, value in strict.items():
        jax.config.update(name, value)


@pytest.mark.long
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.usefixtures("as_users_have_it")
def test_docstring_example(name):
    f = inspect.unwrap(FUNCTIONS[name])
    (test,) = doctest.DocTestFinder(recurse=False).find(f, name, globs={})
    assert test.examples, f"{name} has no example"
    results = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test)
    assert results.failed == 0


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstring_says_what_a_user_needs(name):
    text = inspect.getdoc(FUNCTIONS[name])
    sections = ["Args:", "Returns:", "Example:"] + ([] if name in HELPERS else ["Raises:", "Reference:"])
    for section in sections:
        assert f"\n{section}\n" in text, f"{name} lacks {section}"
    for argument in inspect.signature(FUNCTIONS[name]).parameters.values():
        stars = {argument.VAR_KEYWORD: "**", argument.VAR_POSITIONAL: "*"}.get(argument.kind, "")
        assert f"\n    {stars}{argument.name}: " in text, f"{name} does not describe `{argument.name}`"


def test_the_options_of_time_are_said_once():
    text = inspect.getdoc(jaxseq.TimeOptions)
    for option in inspect.signature(jaxseq.lstm).parameters:
        assert option in ("params", "carry", "xs") or f"\n    {option}: " in text, option


@pytest.mark.parametrize(("page", "blocks"), found(r"```python\n(.*?)```", quick=QUICK_PAGES))
@pytest.mark.usefixtures("as_users_have_it")
def test_code_runs(page, blocks):
    """Run the code blocks of a page in order, in one namespace."""
    scope = {}
    for block in blocks:
        exec(compile(block, page.name, "exec"), scope)


FRAMEWORKS = {"linen": "flax", "nnx": "flax", "equinox": "equinox", "haiku": "haiku"}


@pytest.mark.parametrize(("page", "names"), found(r"`jaxseq\.([a-z_.]+)[`(]"))
def test_names_exist(page, names):
    for name in names:
        target, parts = jaxseq, name.split(".")
        if parts[0] == "integrations" and parts[1:] and not find_spec(FRAMEWORKS[parts[1]]):
            continue  # not installed (extra `peers`)
        for part in parts:
            target = getattr(target, part)


@pytest.mark.parametrize(("page", "targets"), found(r"\]\(([^)#]+)\)"))
def test_links_lead_somewhere(page, targets):
    for target in targets:
        assert "://" in target or (page.parent / target).exists(), target


@pytest.mark.parametrize(("page", "rows"), found(r"(?m)^(\|[^\n]*)\n\|(?:[ :-]+\|)+$"))
def test_tables_have_headers(page, rows):
    """At most the first column has no name."""
    for row in rows:
        assert all(cell.strip() for cell in row.strip("|").split("|")[1:]), row


def test_every_check_is_described():
    text = (ROOT / "docs" / "gradient-checks.md").read_text(encoding="utf-8")
    for check in _check.FULL:
        assert f"\n| {check} | " in text
