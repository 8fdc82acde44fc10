"""Counting what a compiled program runs. The programs are written out, as compilers for GPUs and TPUs print them."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from benchmarks import accelerators, ahead_of_time
from benchmarks.ahead_of_time import count, loops_of

pytestmark = pytest.mark.usefixtures("as_users_have_jax")

# A loop of 5 steps with 2 kernels, in a loop of 3 whose count is only in its condition, with a call of one kernel.
PROGRAM = """
%inner (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[], f32[4]{0}) parameter(0)
  %x = f32[4]{0} get-tuple-element(%p), index=1
  %a = f32[4]{0} fusion(%x), kind=kLoop, calls=%f, backend_config={"estimated_cycles":"100"}
  %b = f32[4]{0} custom-call(%a), custom_call_target="library", backend_config={"estimated_cycles":"20"}
  %i = s32[] add(%one, %two)
  ROOT %out = (s32[], f32[4]{0}) tuple(%i, %b)
}

%called (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %c = f32[4]{0} copy(%p), backend_config={"estimated_cycles":"3"}
}

%outer (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[], f32[4]{0}) parameter(0)
  %w = (s32[], f32[4]{0}) while(%p), condition=%c, body=%inner, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %y = f32[4]{0} call(%p), to_apply=%called
}

%condition (p: (s32[], f32[4])) -> pred[] {
  %three = s32[] constant(3)
  ROOT %less = pred[] compare(%i, %three), direction=LT
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %w = (s32[], f32[4]{0}) while(%x), condition=%condition, body=%outer
  ROOT %r = f32[4]{0} fusion(%w), kind=kLoop, calls=%f
}
"""


@pytest.mark.parametrize(("scalars", "kernels"), [(True, (1, 1, 2)), (False, (1, 1, 3))], ids=["TPU", "GPU"])
def test_kernels_count_as_often_as_their_loops_run(scalars, kernels):
    loops = list(loops_of(PROGRAM, scalars_are_free=scalars))
    assert [(loop.depth, loop.runs) for loop in loops] == [(0, 1), (1, 3), (2, 15)]
    assert tuple(len(loop.kernels) for loop in loops) == kernels
    assert [loop.cycles for loop in loops] == [0, 3, 120]
    assert loops[1].kernels == ("copy",)
    assert loops[2].kernels[:2] == ("fusion", "library")


def test_the_table_has_ratios_to_the_best_other_candidate(monkeypatch):
    found = {"ours": (6, 40, 8), "scan": (4, 50, 1), "flax": (12, 80, 2)}
    loops = (ahead_of_time.Loop(0, 1, ("fusion",), 0), ahead_of_time.Loop(1, 7, ("fusion", "copy"), 0))
    counts = lambda name, *_: ahead_of_time.Counts(*found[name], loops, "")  # noqa: E731
    monkeypatch.setattr(accelerators, "count", counts)
    rows = accelerators.measured(accelerators.Program("test", {name: (name, ()) for name in found}), "v5e")
    assert [row["ratios"] for row in rows] == [
        {"kernels": 1.5, "cycles": 0.8, "temp_bytes": 8.0},
        {"kernels": 1.0, "cycles": 1.0, "temp_bytes": 1.0},
        {"kernels": 3.0, "cycles": 1.6, "temp_bytes": 2.0},
    ]
    assert "7x2" in accelerators.line(rows[0])
    tables = [{"target": "v5e", "rows": rows}, {"target": "v5e", "rows": [{"ratios": {"kernels": 6.0}}]}]
    assert [*accelerators.means(tables)] == [
        "TPU v5e, kernels: mean 3.00, largest 6.00",
        "TPU v5e, cycles: mean 0.80, largest 0.80",
        "TPU v5e, temp_bytes: mean 8.00, largest 8.00",
    ]


@pytest.mark.long
def test_every_program_can_be_traced():
    """Both candidates of each program take its arguments; a name occurs once."""
    programs = list(accelerators.programs(quick=True))
    titles = [program.title for program in programs]
    assert len(set(titles)) == len(titles) > 15
    for program in programs:
        results = [jax.eval_shape(f, *args) for f, args in program.candidates.values()]
        outputs = [jax.tree.map(lambda a: (a.shape, a.dtype), result[0]) for result in results]
        assert len(jax.tree.leaves(outputs[0])) > 0, program.title


def test_a_missing_compiler_is_named():
    """This environment has no compiler for the targets, unless someone installed one."""
    if importlib.util.find_spec("libtpu") is None:
        assert "extra `accelerators`" in ahead_of_time.missing("v5e")
        with pytest.raises(ImportError, match="TPU v6e"):
            count(lambda x: x, (jnp.ones(2),), "v6e")
    else:
        assert count(lambda x: x + 1, (jnp.ones(200),), "v5e").kernels == 1
