"""Examples in docstrings run and print what they say; code in the README runs as it stands."""

import doctest
import inspect
import re
from pathlib import Path

import jax
import pytest

import jaxseq

README = Path(__file__).parents[1] / "README.md"
FUNCTIONS = [name for name in jaxseq.__all__ if inspect.isfunction(getattr(jaxseq, name))]


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
    f = inspect.unwrap(getattr(jaxseq, name))
    (test,) = doctest.DocTestFinder(recurse=False).find(f, name, globs={})
    assert test.examples, f"jaxseq.{name} has no example"
    results = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test)
    assert results.failed == 0


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstring_says_what_a_user_needs(name):
    text = inspect.getdoc(getattr(jaxseq, name))
    for section in ("Args:", "Returns:", "Raises:", "Example:", "Reference:"):
        assert f"\n{section}\n" in text, f"jaxseq.{name} lacks {section}"
    for argument in inspect.signature(getattr(jaxseq, name)).parameters:
        assert f"\n    {argument}: " in text, f"jaxseq.{name} does not describe `{argument}`"


@pytest.mark.usefixtures("as_users_have_it")
def test_readme_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_readme_names_exist():
    for name in re.findall(r"`jaxseq\.([a-z_.]+)[`(]", README.read_text(encoding="utf-8")):
        target = jaxseq
        for part in name.split("."):
            target = getattr(target, part)
