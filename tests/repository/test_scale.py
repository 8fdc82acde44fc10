"""The cost model of docs/scale.md against compiled programs on 1, 2, 4 and 8 devices, and the benchmark of two."""

import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mesh_of
from jax.sharding import NamedSharding, PartitionSpec

import jaxseq
from benchmarks import cost, harness, sharding
from benchmarks.recurrence import TINY
from jaxseq import reference
from tests.support import hlo
from tests.support.hlo import Collective

pytestmark = [pytest.mark.eight_devices, pytest.mark.usefixtures("as_users_have_jax")]

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"


def placed(mesh, *spec, shape, dtype=jnp.float32):
    """What a program is compiled for: an array of that shape, divided so."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))


def gradient(r, module=jaxseq, of_xs=False, dtype=jnp.float32):
    """The compiled gradient of a recurrence at a cotangent of ys, its batch over r.n devices."""
    mesh = mesh_of((r.n,), ("d",), "automatic")
    init = partial(getattr(jaxseq, f"{r.kind}_init"), input_size=r.D, hidden_size=r.H)
    params = jax.tree.map(lambda p: placed(mesh, shape=p.shape, dtype=dtype), jax.eval_shape(init, jax.random.key(0)))
    xs, ys_bar = (placed(mesh, None, "d", shape=(r.T, r.B, size), dtype=dtype) for size in (r.D, r.H))

    def pulled(params, xs, ys_bar):
        f = lambda params, xs: getattr(module, r.kind)(params, None, xs)[1]  # noqa: E731
        gradients = jax.vjp(f, params, xs)[1](ys_bar)
        return gradients if of_xs else gradients[0]

    return jax.jit(pulled).lower(params, xs, ys_bar).compile()


def sizes(kind, n, D=64):
    return cost.Recurrence(kind, B=16, T=12, D=D, H=64, n=n)


@pytest.mark.parametrize("n", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", cost.GATES)
def test_a_gradient_takes_these_products_and_one_sum(kind, n):
    r = sizes(kind, n)
    program = gradient(r)
    assert hlo.flops(program.as_text()) == r.flops
    assert hlo.collectives(program.as_text()) == [Collective("all-reduce", r.sum_bytes, 0, 1)] * (n > 1)
    # XLA's own count has the body of a loop once, and what is done pointwise.
    once = r.forward_step + r.backward_step + r.contractions
    assert hlo.flops(program.as_text(), once=True) == once
    assert once < program.cost_analysis()["flops"] < 1.05 * once


def test_what_is_summed_are_accumulators():
    """In float32, whatever the parameters are rounded to."""
    r = sizes("lstm", 2)
    program = gradient(r, dtype=jnp.bfloat16).as_text()
    assert hlo.flops(program) == r.flops
    assert hlo.collectives(program) == [Collective("all-reduce", r.sum_bytes, 0, 1)]


@pytest.mark.parametrize("n", [2, 8])
def test_gates_that_are_kept_and_the_gradient_of_xs(n):
    """A GRU of D + H > 128 makes no gate again."""
    r = sizes("gru", n, D=96)
    assert r.flops < sizes("gru", n, D=64).flops * 160 / 128
    assert hlo.flops(gradient(r, of_xs=True).as_text()) == r.flops + 2 * r.T * r.b * r.D * r.width


@pytest.mark.parametrize("n", [2, 8])
@pytest.mark.parametrize("kind", ["lstm", "rnn", "gru"])
def test_autodiff_of_a_scan_takes_the_same_products_and_a_sum_in_every_step(kind, n):
    r = sizes(kind, n, D=96)
    program = gradient(r, reference).as_text()
    assert hlo.flops(program) == r.flops
    assert hlo.collectives(program) == [Collective("all-reduce", r.sum_bytes, 1, r.T)]


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_a_convolution_with_time_divided(n):
    c = cost.Convolution(B=3, T=64, K=4, d=2, C_in=5, C_out=6, n=n)
    mesh = mesh_of((n,), ("d",), "explicit" if n > 1 else "automatic")
    conv = partial(jaxseq.conv, padding="CAUSAL", dilation=c.d)
    arrays = [placed(mesh, None, "d", shape=(c.B, c.T, size)) for size in (c.C_in, c.C_out)]
    weights = [placed(mesh, shape=shape) for shape in ((c.K, c.C_in, c.C_out), (c.C_out,))]

    def both(x, y_bar, *weights):
        y, pull = jax.vjp(conv, x, *weights)
        return y, pull(y_bar)

    with jax.set_mesh(mesh):
        program = jax.jit(both).lower(*arrays, *weights).compile()
    found = hlo.collectives(program.as_text())
    if n == 1:  # one device alone multiplies no padding: of tap k, counted from the last one, k d rows
        padding = c.d * c.K * (c.K - 1) // 2
        assert hlo.flops(program.as_text()) == c.flops - 3 * 2 * c.B * padding * c.C_in * c.C_out
        assert found == []
    else:
        assert hlo.flops(program.as_text()) == c.flops
        there_and_back = [Collective("collective-permute", c.halo_bytes, 0, 1)] * 2
        assert sorted(found) == [Collective("all-reduce", c.sum_bytes, 0, 1), *there_and_back]
    assert hlo.flops(program.as_text()) < program.cost_analysis()["flops"] < 1.05 * c.flops


@pytest.mark.parametrize("autodiff", [False, True])
@pytest.mark.parametrize("D", [64, 96])
@pytest.mark.parametrize("kind", cost.GATES)
def test_what_is_kept(kind, D, autodiff):
    """The arrays over time among the residuals, of which nothing needs to be compiled."""
    r = sizes(kind, 1, D)
    params = getattr(jaxseq, f"{kind}_init")(jax.random.key(0), r.D, r.H)
    f = getattr(reference if autodiff else jaxseq, kind)
    residuals = jax.eval_shape(
        lambda params, xs: jax.vjp(lambda params: f(params, None, xs), params)[1], params, jnp.zeros((r.T, r.B, r.D))
    )
    over_time = [a for a in jax.tree.leaves(residuals) if a.shape[:2] == (r.T, r.B)]
    less = r.residual_bytes(autodiff) - sum(a.size * a.dtype.itemsize for a in over_time)
    # JAX 0.12 has learnt to keep the output of a tanh once.
    assert less == 0 or (kind, autodiff, less) == ("rnn", True, cost.NUMBER * r.T * r.b * r.H)


def test_the_page_says_what_the_model_does():
    page = PAGE.read_text(encoding="utf-8")
    assert "\n".join(cost.tables()) in page
    for machine in cost.MACHINES:
        for figure in (machine.peak / 1e12, machine.memory / 1e9, machine.operation * 1e6):
            assert re.search(rf"\| {figure:g} ", page), f"{machine.name}: {figure:g}"
        for n in (8, 256):
            assert f"{machine.link(n) / 1e9:.0f} GB/s, {1e6 * machine.latency(n):.0f} µs" in page


def test_predictions_move_as_they_should():
    for machine in cost.MACHINES:
        for r in (cost.LARGE, cost.SMALL):
            on_8, on_256 = (r._replace(n=n) for n in (8, 256))
            assert cost.seconds(machine, r) > cost.seconds(machine, on_8) > cost.seconds(machine, on_256) * 0.99
            # T sums cost what one costs, T times; elsewhere the two forms of autodiff are the same.
            apart = cost.seconds_by_autodiff(machine, on_8) - cost.seconds_with_one_sum(machine, on_8)
            assert np.isclose(apart, (r.T - 1) * machine.all_reduce(8, r.sum_bytes))
            assert cost.seconds_by_autodiff(machine, r) == cost.seconds_with_one_sum(machine, r)


# --- The benchmark ---


@pytest.mark.parametrize(
    ("kind", "libraries"),
    [
        ("lstm", ["flax", "equinox", "haiku", "keras"]),
        ("gru", ["flax", "equinox", "keras"]),
        ("rnn", ["flax", "equinox", "keras"]),
    ],
)
def test_libraries_compute_the_same_with_their_batch_over_two_devices(kind, libraries, monkeypatch):
    for library in libraries:
        pytest.importorskip(library, reason=f"needs {library}, to compare with")
    monkeypatch.setattr(sharding, "PEERS", libraries)
    problem = sharding.over_devices(kind, TINY)
    rows = harness.measure(problem, 2)
    assert [row["name"] for row in rows] == ["jaxseq", "jaxseq, explicit", *libraries]
    assert all(row["error"] < 1e-5 for row in rows)
    lines = [sharding.line(candidate) for candidate in problem.candidates]
    for line in lines[:2]:
        assert re.fullmatch(r"  jaxseq.* +1 collectives, +0 of them in a loop, +0.00 MB", line)
    for line in lines[2:]:  # Keras has one sum of a GRU's outside
        assert re.search(rf" ({TINY.T}|{TINY.T + 1}) collectives,", line)
        assert f" {TINY.T} of them in a loop" in line


def test_the_table_of_two_devices(monkeypatch, capsys):
    monkeypatch.setattr(sharding, "KINDS", ("rnn",))
    monkeypatch.setattr(sharding, "PEERS", ["flax"])
    monkeypatch.setattr(harness, "peer", lambda name: None)
    sharding.main(["--quick", "--rounds", "2"])
    _, _, *lines = capsys.readouterr().out.splitlines()
    title = "rnn, B=2 T=5 D=3 H=4, 2 devices"
    rows = ["  jaxseq  ", "  jaxseq, explicit  ", "  flax  "]
    starts = [f"{title}: communication", *rows, title, *rows]
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True))
    assert ["not installed" in line for line in lines] == [False, False, False, True] * 2
