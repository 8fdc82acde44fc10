"""Examples in docstrings run and print what they say; code in the README and in docs/ runs as it stands."""

import doctest
import inspect
import re
from pathlib import Path

import jax
import pytest

import jaxseq
from jaxseq import autoregressive, cells, convert, flow, testing
from jaxseq.testing import _check

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
# What the repro of a failure calls, and what draws or sums up what others have found.
HELPERS = ("jaxseq.testing.cotangents", "jaxseq.testing.lifted", "jaxseq.flow.norms", "jaxseq.flow.plot_bias")
HELPERS += ("jaxseq.flow.plot_norms", "jaxseq.flow.plot_spectrum")
# `jaxseq.lstm`, `jaxseq.cells.mgu_init`, `jaxseq.testing.check_vjp` and the like
FUNCTIONS = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in (jaxseq, autoregressive, cells, convert, flow, testing)
    for name in module.__all__
    if inspect.isfunction(getattr(module, name))
}


@pytest.fixture
def as_users_have_it():
    """Without the strict settings of this suite."""
    strict = {"jax_enable_x64": True, "jax_numpy_dtype_promotion": "strict", "jax_numpy_rank_promotion": "raise"}
    usual = {"jax_enable_x64": False, "jax_numpy_dtype_promotion": "standard", "jax_numpy_rank_promotion": "allow"}
    for name, value in usual.items():
        jax.config.update(name, value)
    yield
    for name, value in strict.items():
        jax.config.update(name, value)


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
    for argument in inspect.signature(inspect.unwrap(FUNCTIONS[name])).parameters.values():
        stars = "**" if argument.kind is argument.VAR_KEYWORD else ""
        assert f"\n    {stars}{argument.name}: " in text, f"{name} does not describe `{argument.name}`"


def test_the_options_of_time_are_said_once():
    text = inspect.getdoc(jaxseq.Time)
    for option in inspect.signature(jaxseq.lstm).parameters:
        assert option in ("params", "carry", "xs") or f"\n    {option}: " in text, option


def on_their_devices(pages):
    """The page about devices, on several."""
    marks = {"devices.md": [pytest.mark.eight_devices]}
    return [pytest.param(page, marks=marks.get(page.name, []), id=str(page.relative_to(ROOT))) for page in pages]


@pytest.mark.parametrize("page", on_their_devices(PAGES))
@pytest.mark.usefixtures("as_users_have_it")
def test_code_runs(page):
    """The blocks of a page one after the other, as a reader would type them."""
    scope = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(compile(block, page.name, "exec"), scope)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_names_exist(page):
    for name in re.findall(r"`jaxseq\.([a-z_.]+)[`(]", page.read_text(encoding="utf-8")):
        target = jaxseq
        for part in name.split("."):
            target = getattr(target, part)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), target


def test_every_check_is_described():
    text = (ROOT / "docs" / "gradient-checks.md").read_text(encoding="utf-8")
    for check in _check.FULL:
        assert f"\n| {check} | " in text
