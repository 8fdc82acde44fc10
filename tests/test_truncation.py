"""What the backward sweep does about truncation. What it means is for `jaxseq.testing.check_truncation` to say."""

import jax
import pytest
from helpers import SEQUENCES, arguments, assert_close, bound, scans

from jaxseq._cases import CASES

K = 3  # the window; T = 8 makes windows of 3, 3 and 2


@pytest.mark.parametrize("name", SEQUENCES)
def test_values_do_not_change(name, key):
    args = arguments(name, "plain", key, length=8)
    f = CASES[name].op
    assert_close(f(*args, truncation=K), f(*args), relative=1e-15)


@pytest.mark.parametrize(
    ("truncation", "sweeps"), [(None, [12]), (12, [12]), (4, [4]), (5, [2, 5]), (1, [1]), (7, [5, 7])]
)
@pytest.mark.parametrize("reverse", [False, True])
def test_the_backward_sweep_runs_its_windows_side_by_side(truncation, sweeps, reverse, key):
    """Sequential steps of the sweep: k, and those of a ragged last window. One product with W_h each, no more."""
    args = arguments("lstm", "plain", key, length=12)
    outputs = bound("lstm", "plain")(*args)
    f = lambda args, ȳ: jax.vjp(lambda *a: CASES["lstm"].op(*a, truncation=truncation, reverse=reverse), *args)[1](ȳ)  # noqa: E731
    forward, *backward = scans(f, args, outputs)
    assert forward.params["length"] == 12
    assert [e.params["length"] for e in backward] == sweeps
    for sweep in backward:
        products = [e for e in sweep.params["jaxpr"].jaxpr.eqns if e.primitive.name == "dot_general"]
        assert len(products) == 1
        # The carry is the state's cotangent: no weight-shaped sum is dragged through time.
        body = sweep.params["jaxpr"].jaxpr.outvars
        carried = [v.aval for v, o in zip(body, sweep.outvars, strict=True) if v.aval.shape == o.aval.shape]
        assert [a.shape[-2:] for a in carried] == [(2, 5), (2, 5)]
