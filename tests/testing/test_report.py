"""Reports as text, JSON and HTML; diagnosis of mistakes."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseq.testing import CHECKS, GradientCheckError, Report, Result, Verdict, _check, check_vjp
from jaxseq.testing._diagnosis import fit, fit_seed
from tests.support.broken_rules import arguments, broken, plain


@pytest.fixture(scope="module")
def args():
    return arguments(jax.random.key(3))


@pytest.fixture(scope="module")
def report(args):
    return check_vjp(broken("previous state off by one"), args, reference=plain, level="quick", seed=7)


def test_the_table_is_read_at_a_glance(report):
    text = str(report)
    first, where, *_ = text.splitlines()
    assert first == "elman: FAIL"
    assert f"jax: {jax.__version__}" in where
    assert "seed: 7" in where
    header = next(line for line in text.splitlines() if line.split()[:2] == ["all", "w_x"])
    assert header.split() == ["all", "w_x", "w_h", "b", "h", "xs"]
    row = next(line for line in text.splitlines() if line.startswith("  elements"))
    assert row.split() == ["elements", "FAIL", "ok", "FAIL", "ok", "ok", "ok"]
    assert {len(header), len(row)} == {len(header)}  # aligned


def test_a_failure_says_all_there_is_to_say(report):
    (failure,) = (f for f in report.failures if f.check == "elements")
    assert (failure.argument, failure.seed) == ("w_h", 7)
    assert failure.pattern in str(report)
    assert failure.by_differences == pytest.approx(failure.by_reference)
    assert failure.error < 1e-8 * abs(failure.by_reference)
    assert failure.ratio == pytest.approx(failure.by_rule / failure.by_reference)
    assert abs(failure.by_rule - failure.by_reference) > failure.tolerance > 0
    assert "1e-10 of the leaf's largest element" in failure.origin
    text = str(failure)
    for part in ("by rule", "by reference", "by differences", "±", "ratio", "tolerance", "diagnosis", "to reproduce:"):
        assert part in text


def test_the_repro_prints_the_number_by_hand(report, args, capsys):
    (failure,) = (f for f in report.failures if f.check == "elements")
    exec(failure.repro, {"f": broken("previous state off by one"), "args": args})
    assert float(capsys.readouterr().out) == pytest.approx(failure.by_rule, rel=1e-12)


def test_json_holds_everything(report):
    found = json.loads(report.to_json())
    assert found["verdict"] == "FAIL"
    assert found["leaves"] == list(report.leaves)
    assert {"check": "value", "leaf": "xs", "verdict": "PASS", "note": ""} in found["results"]
    assert [f["check"] for f in found["failures"]] == [f.check for f in report.failures]
    assert isinstance(found["failures"][0]["by_rule"], float)


def test_a_notebook_shows_a_table(report):
    page = report._repr_html_()
    assert page.count("<tr>") == 1 + len({r.check for r in report.results})
    assert "<th>w_h</th>" in page
    assert "FAIL" in page
    assert "previous state" not in page  # the page has only the content of the report
    assert html_is_closed(page)


def html_is_closed(page):
    return all(page.count(f"<{tag}") == page.count(f"</{tag}>") for tag in ("table", "tr", "td", "pre", "ul", "li"))


def test_html_is_escaped():
    result = Result("value", "a<b>", Verdict.INCONCLUSIVE, "x < y & z")
    page = Report("f(<lambda>)", ["a<b>"], [result], ["1 < 2"], {})._repr_html_()
    assert "f(&lt;lambda&gt;)" in page
    assert "<b>:" not in page
    assert "x &lt; y &amp; z" in page


def made_of(*verdicts):
    return Report("f", ["x"], [Result("value", "x", verdict, "why") for verdict in verdicts], [], {})


@pytest.mark.parametrize(
    ("verdicts", "worst"),
    [
        ([Verdict.PASS, Verdict.SKIP], Verdict.PASS),
        ([Verdict.PASS, Verdict.INCONCLUSIVE, Verdict.SKIP], Verdict.INCONCLUSIVE),
        ([Verdict.INCONCLUSIVE, Verdict.FAIL], Verdict.FAIL),
        ([], Verdict.SKIP),
    ],
)
def test_a_report_is_as_bad_as_the_worst_in_it(verdicts, worst):
    assert made_of(*verdicts).verdict is worst
    assert made_of(*verdicts).of("value") is worst
    assert made_of(*verdicts).of("jit") is Verdict.SKIP


def test_raise_if_failed():
    made_of(Verdict.PASS, Verdict.INCONCLUSIVE).raise_if_failed()
    with pytest.raises(GradientCheckError, match="f: INCONCLUSIVE"):
        made_of(Verdict.PASS, Verdict.INCONCLUSIVE).raise_if_failed(strict=True)
    with pytest.raises(AssertionError, match="f: FAIL"):
        made_of(Verdict.FAIL).raise_if_failed()


def test_many_leaves_go_into_several_tables():
    leaves = [f"params.layer_{n}.weight" for n in range(12)]
    text = str(Report("f", leaves, [Result("value", leaf, Verdict.PASS) for leaf in leaves], [], {}))
    assert max(map(len, text.splitlines())) <= 112
    assert all(leaf in text for leaf in leaves)


def test_a_reason_is_reported_once_for_all_leaves():
    results = [Result("power", leaf, Verdict.INCONCLUSIVE, "blind") for leaf in "abc"]
    assert "  power of a, b, c: blind" in str(Report("f", "abc", results, [], {})).splitlines()


def test_every_check_is_described():
    assert set(CHECKS) == {*_check.FULL, "truncation", "transpose"}


def test_one_line_in_somebodys_test(pytester):
    """pytest shows the report, without stack frames of the checker."""
    pytester.makepyfile(
        """
        import jax.numpy as jnp
        from jaxseq.testing import check_vjp, mutate

        def test_mine():
            check_vjp(mutate(jnp.sin)["sign"], (jnp.arange(1.0, 4.0),), level="quick").raise_if_failed()
        """
    )
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*sin with a cotangent of the wrong sign: FAIL*", "*it is the correct one times -1*"])
    assert "_report.py" not in "\n".join(line for line in result.outlines if ":" in line and "Error" not in line)


# --- Diagnosis ---

A = np.random.default_rng(0).normal(size=(4, 4))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (-A, "times -1"),
        (A.T, "transposed"),
        (-A.T, "transposed, times -1"),
        (2.5 * A, "times 2.5"),
        (A / 4, "a mean instead of a sum"),
        (4 * A, "summed 4 times"),
        (A * (1 + 1e-4), "times 1.0001"),
        (np.roll(A, 1, 0), "shifted to the later entry along axis 0, and wraps around"),
        (np.vstack([A[1:], np.zeros((1, 4))]), "shifted to the earlier entry along axis 0"),
        (np.hstack([A[:, :-1], np.zeros((4, 1))]), "its last entry along axis 1 is missing"),
        (0 * A, "all elements are zero"),
        (A + np.inf, "16 of 16 elements are not finite"),
        (A + np.eye(4), "4 of 16 elements are wrong, by no simple mistake"),
    ],
)
def test_a_mistake_is_recognised(wrong, words):
    assert words in fit(wrong, A)


def test_a_conjugate_is_recognised():
    assert "conjugated" in fit(np.conj(A + 1j * A.T), A + 1j * A.T)


def test_what_was_left_out_of_the_cotangent_is_recognised():
    """For a gradient that sums two cotangents over batch and time, the missing part is named."""
    rng = np.random.default_rng(1)
    last, ys = rng.normal(size=(2, 3)), rng.normal(size=(5, 2, 3))
    right = lambda seed: seed[0].sum(0) + 2 * seed[1].sum((0, 1))  # noqa: E731
    words = lambda got: fit_seed(got, right, [last, ys], ["last", "ys"])  # noqa: E731
    assert words(right([0 * last, ys])) == "the cotangent of last is ignored"
    assert words(right([last, 0 * ys])) == "the cotangent of ys is ignored"
    assert (
        words(right([last, np.concatenate([ys[:-1], 0 * ys[-1:]])])) == "the last entry of ys along axis 0 is ignored"
    )
    assert (
        words(right([last, np.stack([0 * ys[:, 0], ys[:, 1]], 1)])) == "the first entry of ys along axis 1 is ignored"
    )
    assert words(right([last, ys]) + 1) is None


def test_diagnoses_in_a_report(args):
    """The diagnosis names the mistake."""
    expected = {
        "sign flipped": ("w_x", "times -1"),
        "weight gradient off by 1e-4": ("w_h", "times 1.0001"),
        "bias gradient a mean": ("b", "times 0.5"),
        "initial-state gradient zero": ("h", "all elements are zero"),
        "final-state cotangent ignored": ("xs", "the cotangent of output[0] is ignored"),
    }
    for wrong, (leaf, words) in expected.items():
        failures = check_vjp(broken(wrong), args, reference=plain, level="quick").failures
        assert any(words in f.diagnosis for f in failures if f.argument == leaf), wrong


def test_complex_numbers_are_printed_whole():
    def f(z):
        return z * z

    wrong = jax.custom_vjp(f)
    wrong.defvjp(lambda z: (f(z), z), lambda z, c: (2 * z.conj() * c,))
    report = check_vjp(wrong, (jnp.array([1 + 2j, 3 - 1j]),), level="quick")
    assert any("conjugated" in failure.diagnosis for failure in report.failures)
    (failure,) = (f for f in report.failures if f.check == "elements")
    for number in ("by rule", "by reference"):
        assert re.search(rf"^ *{number} +-?[\d.]+[+-][\d.]+j$", str(failure), re.MULTILINE)
    (entry,) = (f for f in json.loads(report.to_json())["failures"] if f["check"] == "elements")
    assert len(entry["by_rule"]) == 2
