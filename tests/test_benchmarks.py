"""The harness refuses what does not compare, takes turns, and counts; and the first table runs. No test looks at a clock."""

import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ is no part of the installed package

from benchmarks import harness, lstm
from benchmarks.harness import Candidate, Problem, measure

X = np.linspace(-1, 2, 12, dtype=np.float32).reshape(3, 4)
FIGURES = {"name", "median_s", "min_s", "ratio", "quartiles", "compile_s", "temp_bytes", "apart"}


def doubled(x):
    return {"y": x + x}


def against(run, args=(X,), rounds=2, **options):
    """The row of a candidate held against `doubled`."""
    candidates = [Candidate("sum", doubled, (X,)), Candidate("suspect", run, args, **options)]
    return measure(Problem("doubling", "sum", candidates), rounds)[1]


def test_equal_candidates_give_every_figure():
    row = against(lambda x: {"y": 2 * x})
    assert set(row) == FIGURES
    assert row["apart"] == 0
    assert 0 < row["min_s"] <= row["median_s"]
    assert row["quartiles"][0] <= row["ratio"] <= row["quartiles"][1]


@pytest.mark.parametrize(
    ("run", "complaint"),
    [
        pytest.param(lambda x: {"y": 2 * x.at[1, 2].add(1e-3)}, "result['y'] is 2.0e-03 apart", id="one element"),
        pytest.param(lambda x: {"y": (2 * x).at[0, 0].set(jnp.nan)}, "result['y'] is nan apart", id="nan"),
        pytest.param(lambda x: {"y": 2 * x[:1]}, "float32(1, 4), expected float32(3, 4)", id="broadcastable"),
        pytest.param(lambda x: {"y": (2 * x).astype(jnp.bfloat16)}, "is bfloat16(3, 4), expected", id="dtype"),
        pytest.param(lambda x: 2 * x, "PyTreeDef(*), expected PyTreeDef({'y': *})", id="structure"),
    ],
)
def test_a_wrong_candidate_is_refused_by_name(run, complaint):
    with pytest.raises(ValueError, match=re.escape(complaint)) as caught:
        against(run)
    assert str(caught.value).startswith("doubling: `suspect` does not compute what `sum` does: ")


def test_a_wrong_gradient_is_refused():
    @jax.custom_vjp
    def wrong(x):
        return jnp.sin(x)

    wrong.defvjp(lambda x: (jnp.sin(x), x), lambda x, ȳ: (ȳ * jnp.sin(x),))
    sines = [Candidate(n, harness.with_gradient(f), (X, X)) for n, f in (("sin", jnp.sin), ("wrong", wrong))]
    with pytest.raises(ValueError, match=r"`wrong` .* result\[1\]\[0\] is .* apart"):
        measure(Problem("sine", "sin", sines), 2)


@pytest.mark.parametrize(("run", "args"), [(lambda x: doubled(jnp.asarray(BIG)[:3, :4] * 0 + x), (X,)), (lambda: doubled(X), ())])
def test_data_that_could_be_folded_is_refused(run, args):
    with pytest.raises(ValueError, match="`suspect` closes over its data"):
        against(run, args)
