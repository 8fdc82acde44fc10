"""The table of checkers: each column passes the right gradient and finds a wrong one; the page says what they said."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import checkers
from benchmarks.checkers import FOUND, PASSED, Checker


@pytest.fixture(autouse=True)
def as_users_have_it():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def suspects(*names):
    found = {s.name: s for s in [*checkers.mutants(), *checkers.hand_derived()]}  # of the two right rules, that by hand
    return [found[name] for name in names]


def said(checker, *names):
    return [checkers.run_checkers(suspect, [checker]).results[checker.name] for suspect in suspects(*names)]


@pytest.mark.parametrize(
    ("name", "finds", "misses"),
    [
        ("jax.vjp", "a cotangent with an extra axis", "sign flipped"),
        ("check_grads", "sign flipped", "fwd primal off by 1e-7"),
        ("gradcheck", "sign flipped", "g |g|"),
        ("gradcheck, fast", "sign flipped", "weight gradient off by 1e-4"),
        ("gradgradcheck", "right in first order only", "sign flipped"),
        ("test_rrule", "fwd primal off by 1e-7", "right in first order only"),
    ],
)
def test_a_checker_finds_what_it_can(name, finds, misses):
    if "gradcheck" in name or "gradgrad" in name:
        pytest.importorskip("torch", reason="needs torch, whose checker it is")
    (checker,) = [c for c in checkers.checkers() if c.name == name]
    assert said(checker, checkers.RIGHT, finds, misses) == [PASSED, FOUND, PASSED]


def test_ours_names_the_check():
    assert said(Checker("check_vjp", checkers.ours), "initial-state gradient None") == ["found: contract"]


def test_the_bridge_to_torch_carries_derivatives_of_any_order():
    torch = pytest.importorskip("torch", reason="needs torch, to build a bridge to")
    f = lambda x, y: (jnp.sin(x) * y, jnp.sum(x * y**3))  # noqa: E731
    x, y = np.array([0.3, -1.0]), np.array([2.0, 0.5])
    leaves = [torch.tensor(a, requires_grad=True) for a in (x, y)]
    product, total = checkers.in_torch(torch, f)(*leaves)
    np.testing.assert_allclose(product.detach(), np.sin(x) * y)
    (first,) = torch.autograd.grad(product.sum() + total, leaves[:1], create_graph=True)
    np.testing.assert_allclose(first.detach(), np.cos(x) * y + y**3)
    (second,) = torch.autograd.grad(first.sum(), leaves[1:], create_graph=True)
    np.testing.assert_allclose(second.detach(), np.cos(x) + 3 * y**2)
    (third,) = torch.autograd.grad(second.sum(), leaves[1:])
    np.testing.assert_allclose(third, 6 * y)


def test_the_page():
    panel = [
        Checker("deaf", lambda s: PASSED),
        Checker("nervous", lambda s: f"{FOUND}: all"),
        Checker("broken", lambda s: s.nothing),
    ]
    lines = "\n".join(checkers.page(panel, quick=True))
    assert "| sign flipped | – | found: all | found |\n" in lines
    assert lines.count("| **found, of 1** | **0** | **1** | **1** |") == 2  # the right rule does not count
    assert lines.count("| correct rule | – | found | found |\n| incorrect rules: found, of 1 | 0 | 1 | 1 |") == 2


def test_a_bar_in_a_name_is_no_column():
    assert checkers.line("g |g|", ["found"]) == r"| g \|g\| | found |"
