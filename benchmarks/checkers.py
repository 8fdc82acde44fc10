"""Checkers of gradients side by side: which finds what mistake, and which raises a false alarm.

    python -m benchmarks.checkers --markdown docs/checkers.md

Rows are rules with one mistake each: the hand-derived Elman network of `broken_rules`, and the mutants that `mutate`
makes of the same network. Each checker gets the same function at the same point, with its own default tolerances.
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
RIGHT = "none"  # the name of the rule with no mistake in it
FOUND, PASSED, UNSURE = "found", "–", "unsure"


class Suspect(NamedTuple):
    """A gradient of `truth`: what is wrong with it, if anything, and the check of ours that has to find it."""

    name: str
    check: str
    f: Function
    truth: Function
    args: tuple[Any, ...]


class Checker(NamedTuple):
    """`run(suspect)` says PASSED, UNSURE, or FOUND and by what; raising an error is finding."""

    name: str
    run: Callable[[Suspect], str]


# --- The rules ---


def network(params: Any, h: Any, xs: Any) -> Any:
    """The network of `broken_rules`, its parameters in a container: some mistakes are made in containers only."""
    return broken_rules.plain(params["w_x"], params["w_h"], params["b"], h, xs)


def by_hand(**point: Any) -> Iterator[Suspect]:
    """The hand-derived rule as it should be, then with each mistake of a derivation."""
    args = broken_rules.arguments(jax.random.key(3), **point)
    for name, check in {RIGHT: "", **broken_rules.BROKEN}.items():
        yield Suspect(name, check, broken_rules.broken(name), broken_rules.plain, args)


def mutants() -> Iterator[Suspect]:
    """The network as JAX differentiates it, then its mutants."""
    w_x, w_h, b, h, xs = broken_rules.arguments(jax.random.key(3))
    args = {"w_x": w_x, "w_h": w_h, "b": b}, h, xs
    yield Suspect(RIGHT, "", network, network, args)
    for mutant in mutate(network).values():
        if mutant.applies(*args):
            yield Suspect(mutant.what, mutant.check, mutant, network, args)


# --- The checkers ---


def jax_alone(suspect: Suspect) -> str:
    """Whether jax.vjp itself objects."""
    outputs, pull = jax.vjp(suspect.f, *suspect.args)
    jax.block_until_ready(pull(jax.tree.map(jnp.ones_like, outputs)))
    return PASSED


def by_check_grads(suspect: Suspect) -> str:
    """jax.test_util.check_grads to second order, in the one mode that a custom_vjp has."""
    np.random.seed(0)  # noqa: NPY002  (it draws from there)
    check_grads(suspect.f, suspect.args, order=2, modes=("rev",))
    return PASSED


def by_gradcheck(name: str, suspect: Suspect, **options: Any) -> str:
    """torch.autograd's `gradcheck` or `gradgradcheck`."""
    torch = importlib.import_module("torch")
    torch.manual_seed(0)
    leaves, tree = jax.tree.flatten(suspect.args)

    def flat(*leaves: Any) -> tuple[Any, ...]:
        return tuple(jax.tree.leaves(suspect.f(*tree.unflatten(leaves))))

    tensors = [torch.tensor(np.asarray(leaf), requires_grad=True) for leaf in leaves]
    getattr(torch.autograd, name)(in_torch(torch, flat), tensors, **options)
    return PASSED


def in_torch(torch: Any, f: Function) -> Function:
    """A JAX function of arrays to a tuple of arrays, as a torch function whose derivatives, of any order, are JAX's.

    The pullback `(*x, *ȳ) -> x̄` is such a function too, so it crosses the same bridge.
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
    """What ChainRulesTestUtils.test_rrule asks, retold from its source (1.13.1): Julia's own code does not run here.

    One call: the primal equals f, and for one random cotangent of all outputs together the cotangent of each argument
    equals the right one, found by JAX here and by differences there, `isapprox` at 1e-9. Type inference, thunks and
    `add!!` have no counterpart in JAX.
    """
    outputs, pull = jax.vjp(suspect.f, *suspect.args)
    true, true_pull = jax.vjp(suspect.truth, *suspect.args)
    rng = np.random.default_rng(0)
    c = jax.tree.map(lambda y: jnp.asarray(rng.standard_normal(y.shape), y.dtype), true)
    close(outputs, true)
    close(pull(c), true_pull(c))
    return PASSED


def close(actual: Any, expected: Any) -> None:
    """Julia's isapprox for each leaf: the norm of the difference within 1e-9, or within 1e-9 of the larger norm."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        apart, scale = np.linalg.norm(a - e), max(np.linalg.norm(a), np.linalg.norm(e))
        if not apart <= max(1e-9, 1e-9 * scale):
            raise ValueError(f"{apart:.1e} apart")


def ours(suspect: Suspect) -> str:
    """jaxseq.testing.check_vjp, with no reference; of the checks that fail, the one that is named for the mistake."""
    report = check_vjp(suspect.f, suspect.args)
    if report.verdict is Verdict.INCONCLUSIVE:
        return UNSURE
    failed = list(dict.fromkeys(failure.check for failure in report.failures))
    named = suspect.check if suspect.check in failed else ", ".join(failed)
    return f"{FOUND}: {named}" if failed else PASSED


def checkers() -> list[Checker]:
    """Those that can run here."""
    torch = []
    if importlib.util.find_spec("torch"):
        torch = [
            Checker("gradcheck", partial(by_gradcheck, "gradcheck")),
            Checker("gradcheck, fast", partial(by_gradcheck, "gradcheck", fast_mode=True)),
            Checker("gradgradcheck", partial(by_gradcheck, "gradgradcheck")),
        ]
    return [
        Checker("JAX alone", jax_alone),
        Checker("check_grads", by_check_grads),
        *torch,
        Checker("test_rrule", as_test_rrule),
        Checker("check_vjp", ours),
    ]


# --- The tables ---


class Row(NamedTuple):
    """What each checker said of a rule, and how long it took."""

    name: str
    said: dict[str, str]
    seconds: dict[str, float]


def ask(suspect: Suspect, panel: Sequence[Checker]) -> Row:
    """All checkers about one rule."""
    said, seconds = {}, {}
    for checker in panel:
        start = time.perf_counter()
        try:
            said[checker.name] = checker.run(suspect)
        except Exception:  # whatever a checker raises is its way to say that something is wrong
            said[checker.name] = FOUND
        seconds[checker.name] = time.perf_counter() - start
    return Row(suspect.name, said, seconds)


def one_by_one(title: str, rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    """A table with a line for each rule, and below it how many were found and how long it took."""
    lines = [*heading(title, names), *(line(row.name, [row.said[n] for n in names]) for row in rows)]
    wrong = [row for row in rows if row.name != RIGHT]
    found = [sum(row.said[n].startswith(FOUND) for row in wrong) for n in names]
    lines += [line(f"**found, of {len(wrong)}**", [f"**{n}**" for n in found])]
    return [*lines, line("median seconds", [f"{statistics.median(r.seconds[n] for r in rows):.1f}" for n in names]), ""]


def in_short(title: str, rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    """A table of how often each thing was said: of the right rule, which comes first, and of the wrong ones."""
    right, *wrong = rows
    lines = [*heading(title, names), line("the right rule is", [right.said[n].split(":")[0] for n in names])]
    for said in (FOUND, UNSURE, PASSED):
        counts = [sum(row.said[n].split(":")[0] == said for row in wrong) for n in names]
        lines.append(line(f"wrong ones {said}, of {len(wrong)}", [str(count) for count in counts]))
    return [*lines, ""]


def heading(title: str, names: Sequence[str]) -> list[str]:
    return [f"## {title}", "", line("", names), line("---", ["---"] * len(names))]


def line(first: str, cells: Sequence[str]) -> str:
    return "| " + " | ".join([first.replace("|", "\\|"), *cells]) + " |"


def page(panel: Sequence[Checker], quick: bool) -> Iterator[str]:
    """The page, line by line, as it is found out."""
    names = [checker.name for checker in panel]

    def asked(suspects: Iterable[Suspect]) -> list[Row]:
        return [ask(suspect, panel) for suspect in itertools.islice(suspects, 2 if quick else None)]

    installed = [name for name in ("jax", "torch") if importlib.util.find_spec(name)]
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in installed)
    yield from ABOUT.format(versions=versions, date=f"{datetime.now(UTC):%Y-%m-%d}").splitlines()
    yield from one_by_one("An Elman network's rule, derived by hand", asked(by_hand()), names)
    yield from one_by_one("The same network's gradient by JAX, spoiled by `mutate`", asked(mutants()), names)
    for title, point in POINTS.items():
        yield from in_short(title, asked(by_hand(**point)), names)


POINTS = {
    "Saturated: gain 60, where most derivatives are nearly zero": {"gain": 60.0},
    "Chaotic: gain 5 over 60 steps, where derivatives grow by orders of magnitude": {"gain": 5.0, "T": 60},
}

ABOUT = """\
# Checkers of gradients, mistake by mistake

Written by `python -m benchmarks.checkers --markdown docs/checkers.md` ({date}, {versions}).

Each row is a gradient with one mistake. Each column is a checker with its default tolerances, called once, in float64,
at the same point: *found* is a complaint of any kind, – is none. The row *none* is the right gradient, where a
complaint is a false alarm; *unsure* is a checker that says that a wrong gradient would have looked the same.

- **JAX alone**: a call of `jax.vjp`, which refuses some of what a rule can return.
- **check_grads**: `jax.test_util`, order 2, reverse mode (its default asks for forward mode, which raises on any
  `custom_vjp`).
- **gradcheck**, **gradgradcheck**: `torch.autograd`, over a bridge whose derivatives of any order are those of JAX,
  compiled. What goes wrong under `vmap`, in another dtype or at another size they can not see from there; someone who
  calls them there might.
- **test_rrule**: of Julia's ChainRulesTestUtils. **It was not run**: what it asks is retold in Python from the source
  of version 1.13.1, its differences taken to be exact.
- **check_vjp**: `jaxseq.testing`, without a reference, at its full level. It names the check that found the mistake.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the page there as well")
    parser.add_argument("--quick", action="store_true", help="two rules for each table: whether it runs")
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
