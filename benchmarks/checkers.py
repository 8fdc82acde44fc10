"""Comparison of gradient checkers: which mistakes they find, and which correct gradients they reject.

    python -m benchmarks.checkers --markdown docs/checkers.md

Each row is a rule with one mistake: the hand-derived Elman network of `broken_rules`, or a mutant of the same network
by `mutate`. All checkers are called with the same function at the same point, each with its default tolerances.
"""

import argparse
import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.test_util import check_grads

from jaxseq.testing import Verdict, check_vjp, mutate
from tests.support import broken_rules

Function = Callable[..., Any]
RIGHT = "none"  # the name of the rule without a mistake
FOUND, PASSED, UNSURE = "found", "–", "unsure"


class Suspect(NamedTuple):
    """A rule for the gradient of `truth`, the name of its mistake, and the check of `check_vjp` that must find it."""

    name: str
    check: str
    f: Function
    truth: Function
    args: tuple[Any, ...]


class Checker(NamedTuple):
    """`run(suspect)` returns PASSED, UNSURE, or FOUND with the name of a check. An exception counts as FOUND."""

    name: str
    run: Callable[[Suspect], str]


# --- Rules ---


def network(params: Any, h: Any, xs: Any) -> Any:
    """The network of `broken_rules` with its parameters in a dict, because some mutants need a container."""
    return broken_rules.plain(params["w_x"], params["w_h"], params["b"], h, xs)


def hand_derived(**point: Any) -> Iterator[Suspect]:
    """Yield the correct hand-derived rule, then one rule for each mistake."""
    args = broken_rules.arguments(jax.random.key(3), **point)
    for name, check in {RIGHT: "", **broken_rules.BROKEN}.items():
        yield Suspect(name, check, broken_rules.broken(name), broken_rules.plain, args)


def mutants() -> Iterator[Suspect]:
    """Yield the network with the gradient of JAX, then its mutants."""
    w_x, w_h, b, h, xs = broken_rules.arguments(jax.random.key(3))
    args = {"w_x": w_x, "w_h": w_h, "b": b}, h, xs
    yield Suspect(RIGHT, "", network, network, args)
    for mutant in mutate(network).values():
        if mutant.applies(*args):
            yield Suspect(mutant.description, mutant.check, mutant, network, args)


# --- Checkers ---


def by_jax(suspect: Suspect) -> str:
    """Call jax.vjp, which rejects some invalid cotangents."""
    outputs, pull = jax.vjp(suspect.f, *suspect.args)
    jax.block_until_ready(pull(jax.tree.map(jnp.ones_like, outputs)))
    return PASSED


def by_check_grads(suspect: Suspect) -> str:
    """jax.test_util.check_grads to second order, in reverse mode, the only mode of a custom_vjp."""
    np.random.seed(0)  # noqa: NPY002  (check_grads uses the global generator)
    check_grads(suspect.f, suspect.args, order=2, modes=("rev",))
    return PASSED


def by_gradcheck(name: str, suspect: Suspect, **options: Any) -> str:
    """`gradcheck` or `gradgradcheck` of torch.autograd."""
    torch = importlib.import_module("torch")
    torch.manual_seed(0)
    leaves, tree = jax.tree.flatten(suspect.args)

    def flat(*leaves: Any) -> tuple[Any, ...]:
        return tuple(jax.tree.leaves(suspect.f(*tree.unflatten(leaves))))

    tensors = [torch.tensor(np.asarray(leaf), requires_grad=True) for leaf in leaves]
    getattr(torch.autograd, name)(in_torch(torch, flat), tensors, **options)
    return PASSED


def in_torch(torch: Any, f: Function) -> Function:
    """Convert a JAX function from arrays to a tuple of arrays to torch, with the derivatives of JAX to any order.

    The pullback `(*x, *ȳ) -> x̄` is such a function too, and is converted recursively.
    """
    program = jax.jit(f)

    def pullback(count: int, *leaves: Any) -> Any:
        return jax.vjp(f, *leaves[:count])[1](leaves[count:])

    @cache
    def back(count: int) -> Function:
        return in_torch(torch, partial(pullback, count))

    class Bridge(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *x: Any) -> Any:
            ctx.save_for_backward(*x)
            return tuple(torch.tensor(np.asarray(y)) for y in program(*(a.detach().numpy() for a in x)))

        @staticmethod
        def backward(ctx: Any, *y_bar: Any) -> Any:
            x = ctx.saved_tensors
            return back(len(x))(*x, *y_bar)

    return Bridge.apply


def as_test_rrule(suspect: Suspect) -> str:
    """Python version of ChainRulesTestUtils.test_rrule, after its source (1.13.1). The Julia code itself is not run.

    In one call, it checks that the primal equals f, and that for one random cotangent of all outputs, the cotangent of
    each argument equals the expected one by `isapprox` at 1e-9. The expected cotangents are from JAX here, and from
    finite differences in Julia. Type inference, thunks and `add!!` have no counterpart in JAX.
    """
    outputs, pull = jax.vjp(suspect.f, *suspect.args)
    true, true_pull = jax.vjp(suspect.truth, *suspect.args)
    rng = np.random.default_rng(0)
    c = jax.tree.map(lambda y: jnp.asarray(rng.standard_normal(y.shape), y.dtype), true)
    close(outputs, true)
    close(pull(c), true_pull(c))
    return PASSED


def close(actual: Any, expected: Any) -> None:
    """Apply Julia's isapprox to each leaf: the difference is at most 1e-9, absolute or relative, in norm."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        difference, scale = np.linalg.norm(a - e), max(np.linalg.norm(a), np.linalg.norm(e))
        if not difference <= max(1e-9, 1e-9 * scale):
            raise ValueError(f"the difference is {difference:.1e}")


def ours(suspect: Suspect) -> str:
    """jaxseq.testing.check_vjp without a reference. Report the expected check if it fails, else all failed checks."""
    report = check_vjp(suspect.f, suspect.args)
    if report.verdict is Verdict.INCONCLUSIVE:
        return UNSURE
    failed = list(dict.fromkeys(failure.check for failure in report.failures))
    names = suspect.check if suspect.check in failed else ", ".join(failed)
    return f"{FOUND}: {names}" if failed else PASSED


def checkers() -> list[Checker]:
    """Return the checkers whose libraries are installed."""
    torch = []
    if importlib.util.find_spec("torch"):
        torch = [
            Checker("gradcheck", partial(by_gradcheck, "gradcheck")),
            Checker("gradcheck, fast", partial(by_gradcheck, "gradcheck", fast_mode=True)),
            Checker("gradgradcheck", partial(by_gradcheck, "gradgradcheck")),
        ]
    return [
        Checker("jax.vjp", by_jax),
        Checker("check_grads", by_check_grads),
        *torch,
        Checker("test_rrule", as_test_rrule),
        Checker("check_vjp", ours),
    ]


# --- Tables ---


class Row(NamedTuple):
    """Result and time of each checker for one rule."""

    name: str
    results: dict[str, str]
    seconds: dict[str, float]


def run_checkers(suspect: Suspect, panel: Sequence[Checker]) -> Row:
    """Run all checkers on one rule."""
    results, seconds = {}, {}
    for checker in panel:
        start = time.perf_counter()
        try:
            results[checker.name] = checker.run(suspect)
        except Exception:  # a checker reports a mistake by any exception
            results[checker.name] = FOUND
        seconds[checker.name] = time.perf_counter() - start
    return Row(suspect.name, results, seconds)


def detailed_table(title: str, rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    """Return a table with a line per rule, followed by the number of mistakes found and the median time."""
    lines = [*heading(title, names), *(line(row.name, [row.results[n] for n in names]) for row in rows)]
    wrong = [row for row in rows if row.name != RIGHT]
    found = [sum(row.results[n].startswith(FOUND) for row in wrong) for n in names]
    lines += [line(f"**found, of {len(wrong)}**", [f"**{n}**" for n in found])]
    return [*lines, line("median seconds", [f"{statistics.median(r.seconds[n] for r in rows):.1f}" for n in names]), ""]


def summary_table(title: str, rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    """Return a table with the result for the correct rule and the counts of results for the incorrect rules."""
    right, *wrong = rows
    lines = [*heading(title, names), line("correct rule", [right.results[n].split(":")[0] for n in names])]
    for result in (FOUND, UNSURE, PASSED):
        counts = [sum(row.results[n].split(":")[0] == result for row in wrong) for n in names]
        lines.append(line(f"incorrect rules: {result}, of {len(wrong)}", [str(count) for count in counts]))
    return [*lines, ""]


def heading(title: str, names: Sequence[str]) -> list[str]:
    return [f"## {title}", "", line("", names), line("---", ["---"] * len(names))]


def line(first: str, cells: Sequence[str]) -> str:
    return "| " + " | ".join([first.replace("|", "\\|"), *cells]) + " |"


def page(panel: Sequence[Checker], quick: bool) -> Iterator[str]:
    """Yield the lines of the page."""
    names = [checker.name for checker in panel]

    def rows(suspects: Iterable[Suspect]) -> list[Row]:
        return [run_checkers(suspect, panel) for suspect in itertools.islice(suspects, 2 if quick else None)]

    installed = [name for name in ("jax", "torch") if importlib.util.find_spec(name)]
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in installed)
    yield from ABOUT.format(versions=versions, date=f"{datetime.now(UTC):%Y-%m-%d}").splitlines()
    yield from detailed_table("Hand-derived rule of an Elman network", rows(hand_derived()), names)
    yield from detailed_table("JAX gradient of the same network, with the mistakes of `mutate`", rows(mutants()), names)
    for title, point in POINTS.items():
        yield from summary_table(title, rows(hand_derived(**point)), names)


POINTS = {
    "Saturated: gain 60, most derivatives are nearly zero": {"gain": 60.0},
    "Chaotic: gain 5 over 60 steps, derivatives grow by orders of magnitude": {"gain": 5.0, "T": 60},
}

ABOUT = """\
# Comparison of gradient checkers

Written by `python -m benchmarks.checkers --markdown docs/checkers.md` ({date}, {versions}).

Each row is a gradient with one mistake. Each column is a checker with its default tolerances, called once at the same
point in float64: *found* means that it reported an error, – that it did not. The row *none* is the correct gradient,
for which an error is a false alarm. *unsure* means that the checker cannot distinguish a wrong gradient at this point.

- **jax.vjp**: a call of `jax.vjp`, which rejects some invalid results of a rule.
- **check_grads**: `jax.test_util`, order 2, reverse mode. Its default includes forward mode, which raises an error for
  any `custom_vjp`.
- **gradcheck**, **gradgradcheck**: `torch.autograd`, applied to a torch function with the compiled derivatives of JAX.
  This call does not cover `vmap`, other dtypes and other sizes; a user can check them in separate calls.
- **test_rrule**: of Julia's ChainRulesTestUtils. **It was not run**: its checks are implemented in Python after the
  source of version 1.13.1, with exact derivatives instead of finite differences.
- **check_vjp**: `jaxseq.testing`, without a reference, at the level `full`. It names the check that found the mistake.

"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the page to FILE")
    parser.add_argument("--quick", action="store_true", help="two rules per table, to test that it runs")
    options = parser.parse_args(argv)
    lines = []
    with jax.enable_x64(True):
        for text in page(checkers(), options.quick):
            print(text, flush=True)
            lines.append(text)
    if options.markdown:
        options.markdown.write_text("\n".join(lines).strip() + "\n", "utf-8")


if __name__ == "__main__":
    main()
