"""The backward sweep under truncation. `jaxseq.testing.check_truncation` tests its meaning."""

from contextlib import nullcontext
from functools import partial

import jax
import pytest
from helpers import SEQUENCES, arguments, assert_close, bound, cotangents_for, in_chunks, pullback, scans

from jaxseq._cases import CASES

K = 3  # the window; T = 8 makes windows of 3, 3 and 2


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("truncation", [K, (K, 5)])
def test_values_do_not_change(name, truncation, key):
    args = arguments(name, "plain", key, length=8)
    f = CASES[name].op
    assert_close(f(*args, truncation=truncation), f(*args), relative=1e-15)


@pytest.mark.parametrize(
    ("truncation", "sweeps"),
    [
        (None, [12]),
        (12, [12]),
        (4, [4]),
        (5, [2, 5]),
        (1, [1]),
        (7, [5, 7]),
        ((4, 8), [4, 4]),  # the second sweep continues the gradient into the previous window
        ((4, 9), [4, 4, 4]),
        ((5, 5), [2, 5]),
    ],
)
@pytest.mark.parametrize("reverse", [False, True])
def test_the_backward_sweep_runs_its_windows_side_by_side(truncation, sweeps, reverse, key):
    """A sweep has k sequential steps, and one more sweep covers a ragged window. Each step has one product with W_h."""
    args = arguments("lstm", "plain", key, length=12)
    outputs = bound("lstm", "plain")(*args)
    op = partial(CASES["lstm"].op, truncation=truncation, reverse=reverse)
    f = lambda args, y_bar: jax.vjp(op, *args)[1](y_bar)  # noqa: E731
    products = lambda scan: sum(e.primitive.name == "dot_general" for e in scan.params["jaxpr"].jaxpr.eqns)  # noqa: E731
    forward, *others = scans(f, args, outputs)
    assert (forward.params["length"], products(forward)) == (12, 2)
    backward = [e for e in others if products(e) == 1]
    assert [e.params["length"] for e in backward] == sweeps
    # The other loops are the cell's replay, which has no product, and the loop over stages with its contractions.
    assert {products(e) for e in others} <= {0, 1, 3}
    for sweep in backward:
        # The loop carries only the cotangent of the state, and no sum with the shape of a weight.
        body = sweep.params["jaxpr"].jaxpr.outvars
        carried = [v.aval for v, o in zip(body, sweep.outvars, strict=True) if v.aval.shape == o.aval.shape]
        assert [a.shape[-2:] for a in carried] == [(2, 5), (2, 5)]


@pytest.mark.parametrize(
    ("truncation", "checkpoint", "chunks", "reverse"),
    [
        ((3, 4), None, 1, True),  # a stage of one step
        pytest.param((3, 7), None, 3, False, marks=pytest.mark.long),
        ((3, 7), None, 3, True),
        pytest.param((3, 7), 2, 1, True, marks=pytest.mark.long),
        ((4, 12), 2, 1, False),  # reaches back over all windows
        pytest.param((5, 50), None, 1, True, marks=pytest.mark.long),
        pytest.param((1, 3), 7, 1, False, marks=pytest.mark.long),
        ((3, 3), 7, 1, True),  # groups of two windows
        pytest.param((3, 3), None, 3, False, marks=pytest.mark.long),
    ],
)
def test_any_windows_in_any_pieces(truncation, checkpoint, chunks, reverse, key):
    """Stages that end within a window or reach beyond the first; groups of windows; chunks of unequal length."""
    name = "lstm" if checkpoint is None else "gru"
    args = arguments(name, "plain", key, length=13)
    cotangents = cotangents_for(bound(name, "plain"), args, jax.random.fold_in(key, 1))

    def run(f, **more):
        return pullback(lambda *a: f(*a, truncation=truncation, reverse=reverse, **more))(args, cotangents)

    with in_chunks(chunks) if chunks > 1 else nullcontext():
        actual = jax.jit(lambda: run(CASES[name].op, checkpoint=checkpoint))()
    assert_close(actual, expected(name, truncation, reverse, run))


REFERENCES = {}


def expected(name, truncation, reverse, run):
    """Return the result of the reference implementation, computed once for all ways to split time."""
    at = name, truncation, reverse
    if at not in REFERENCES:
        REFERENCES[at] = jax.jit(lambda: run(CASES[name].reference))()
    return REFERENCES[at]
