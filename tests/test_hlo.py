"""`tests.support.hlo` on programs whose collectives and flops are known."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from helpers import mesh_of
from jax import lax
from jax.sharding import PartitionSpec

from tests.support import hlo
from tests.support.hlo import Collective

pytestmark = pytest.mark.eight_devices


def text(f, *shapes):
    """Return the HLO text compiled for float32 arrays of these shapes."""
    return program(f, *shapes).as_text()


def program(f, *shapes):
    return jax.jit(f).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile()


def on_two(f, **specs):
    return jax.shard_map(f, mesh=mesh_of((2,), ("d",), "automatic"), check_vma=False, **specs)


def test_a_sum_in_a_scan_runs_in_every_step():
    """h (4, 8) has 2 rows on each device. Each of 16 steps sums the rows of h, 8 floats, over devices."""

    def f(w, xs):
        def step(h, x):
            h = jnp.tanh(x + h @ w)
            return h, lax.psum(h.sum(0), "d")

        return lax.scan(step, jnp.zeros_like(xs[0]), xs)[1]

    found = text(
        on_two(f, in_specs=(PartitionSpec(), PartitionSpec(None, "d")), out_specs=PartitionSpec()), (8, 8), (16, 4, 8)
    )
    assert hlo.collectives(found) == [Collective("all-reduce", 4 * 8, loops=1, times=16)]
    assert hlo.flops(found) == 16 * 2 * (2 * 8) * 8
    assert hlo.flops(found, once=True) == 2 * (2 * 8) * 8


def test_one_sum_of_several_arrays():
    """XLA combines the reductions of (2, 8) and (3,) on each device into one."""
    f = on_two(lambda a, b: lax.psum((a, b), "d"), in_specs=PartitionSpec("d"), out_specs=PartitionSpec())
    assert hlo.collectives(text(f, (4, 8), (6,))) == [Collective("all-reduce", 4 * (2 * 8 + 3), 0, 1)]


# Each device has (2, 8), 64 bytes.
KINDS = {
    "all-gather": (partial(lax.all_gather, axis_name="d"), 128),
    "reduce-scatter": (partial(lax.psum_scatter, axis_name="d", tiled=True), 32),
    "all-to-all": (partial(lax.all_to_all, axis_name="d", split_axis=0, concat_axis=0, tiled=True), 64),
    "collective-permute": (partial(lax.ppermute, axis_name="d", perm=[(0, 1), (1, 0)]), 64),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind):
    f, size = KINDS[kind]
    found = text(on_two(f, in_specs=PartitionSpec("d"), out_specs=PartitionSpec("d")), (4, 8))
    assert hlo.collectives(found) == [Collective(kind, size, 0, 1)]


def test_loops_in_loops():
    """5 times 3 products of (2, 8) and (8, 8) in nested loops, and one after them."""

    def f(w, h):
        three = lambda h: lax.scan(lambda h, _: (jnp.sin(h @ w), None), h, length=3)[0]  # noqa: E731
        return lax.scan(lambda h, _: (three(jnp.cos(h)), None), h, length=5)[0] @ w

    found = text(f, (8, 8), (2, 8))
    assert hlo.flops(found) == (5 * 3 + 1) * 2 * (2 * 8) * 8
    assert hlo.flops(found, once=True) == 2 * 2 * (2 * 8) * 8
    assert max(place.loops for place in hlo.places(found)) == 2
    assert hlo.collectives(found) == []


def test_a_loop_that_nobody_can_count():
    def f(w, h):
        return lax.while_loop(lambda h: lax.psum(jnp.sum(h), "d") < 100.0, lambda h: jnp.exp(h @ w), h)

    found = text(
        on_two(f, in_specs=(PartitionSpec(), PartitionSpec("d")), out_specs=PartitionSpec("d")), (8, 8), (4, 8)
    )
    assert hlo.collectives(found) == [Collective("all-reduce", 4, loops=1, times=None)]
    assert hlo.flops(found, once=True) == 2 * (2 * 8) * 8
    with pytest.raises(ValueError, match="expected a known trip count of the loop around"):
        hlo.flops(found)


def test_both_branches_count():
    def f(w, h):
        return lax.cond(h[0, 0] > 0, lambda h: h @ w, lambda h: jnp.sin(h) @ w.T, h)

    assert hlo.flops(text(f, (8, 8), (4, 8))) == 2 * 2 * (4 * 8) * 8


def test_a_batch_of_products():
    found = program(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (2, 16, 4), (2, 4, 6))
    assert hlo.flops(found.as_text()) == 2 * (2 * 16 * 6) * 4 == found.cost_analysis()["flops"]


# A convolution has no loop, so XLA's own count must be equal.
CONVOLUTIONS = {
    "whole": {"window_strides": (1,), "padding": "VALID"},
    "padded": {"window_strides": (1,), "padding": "SAME"},
    "strided": {"window_strides": (3,), "padding": [(2, 1)]},
    "gaps in the window": {"window_strides": (1,), "padding": [(4, 0)], "rhs_dilation": (2,)},
    "gaps in the input": {"window_strides": (1,), "padding": [(2, 2)], "lhs_dilation": (3,)},
    "groups": {"window_strides": (1,), "padding": "SAME", "feature_group_count": 2},
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution(name):
    """x is (2, 16, 4), and the kernel is (3, 4, 6) or, with two groups, (3, 2, 6)."""
    options = CONVOLUTIONS[name]
    groups = options.get("feature_group_count", 1)
    f = partial(lax.conv_general_dilated, dimension_numbers=("NWC", "WIO", "NWC"), **options)
    found = program(f, (2, 16, 4), (3, 4 // groups, 6))
    pairs = {"whole": 14 * 3, "padded": 16 * 3 - 2, "groups": 16 * 3 - 2}  # of an output and a tap
    if name in pairs:
        assert hlo.flops(found.as_text()) == 2 * (2 * 6) * (4 // groups) * pairs[name]
    assert hlo.flops(found.as_text()) == found.cost_analysis()["flops"]


# HLO as compilers for accelerators write it: asynchronous start and done, tiled layouts.
ASYNCHRONOUS = """HloModule m, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

ENTRY %main (p: f32[2,8]) -> (f32[4,8], bf16[2,8]) {
  %p = f32[2,8]{1,0:T(8,128)} parameter(0)
  %r = f32[2,8]{1,0:T(8,128)} all-reduce-start(%p), replica_groups={{0,1}}, to_apply=%add
  %r.done = f32[2,8]{1,0:T(8,128)} all-reduce-done(%r)
  %g = (f32[2,8]{1,0:T(8,128)}, f32[4,8]{1,0:T(8,128)}) all-gather-start(%r.done), dimensions={0}
  %g.done = f32[4,8]{1,0:T(8,128)} all-gather-done(%g)
  %c = bf16[2,8]{1,0:T(8,128)(2,1)} convert(%p)
  %m = (bf16[2,8]{1,0}, bf16[2,8]{1,0}, u32[], u32[]) collective-permute-start(%c), source_target_pairs={{0,1},{1,0}}
  %m.done = bf16[2,8]{1,0} collective-permute-done(%m)
  ROOT %out = (f32[4,8]{1,0}, bf16[2,8]{1,0}) tuple(%g.done, /*index=1*/%m.done)
}
"""


def test_asynchronous_forms_count_once():
    assert hlo.collectives(ASYNCHRONOUS) == [
        Collective("all-reduce", 64, 0, 1),
        Collective("all-gather", 128, 0, 1),
        Collective("collective-permute", 32, 0, 1),
    ]


def test_what_cannot_be_read_is_refused():
    custom = ASYNCHRONOUS.replace("convert(%p)", 'custom-call(%p), custom_call_target="__cublas$gemm"')
    with pytest.raises(ValueError, match="got a custom call, `__cublas\\$gemm`"):
        hlo.flops(custom)
    with pytest.raises(ValueError, match="expected the HLO text of a module"):
        hlo.flops("")
