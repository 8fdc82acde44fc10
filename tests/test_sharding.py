"""Every op with its batch over two devices, under each kind of mesh: same numbers, and no collective in the loop."""

import re

import jax
import pytest
from helpers import OPS, arguments, assert_close, bound, compiled, cotangents_for, derived, long_where, pullback
from jax.sharding import AxisType, NamedSharding, PartitionSpec

GRID = [
    *long_where(OPS, derived),
    *[pytest.param(name, "truncation, reverse", id=f"{name}-truncation, reverse") for name in ("gru", "lstm")],
]
GRID += [
    pytest.param("lstm", label, id=f"lstm-{label}")
    for label in (
        "no bias, zero carry",
        "windows that reach back",
        "lengths, resets, reverse",
        "batch first, lengths, checkpoint",
    )
]
GRID += [
    pytest.param("recurrence", label, id=f"recurrence-{label}")
    for label in ("twice, lengths, checkpoint", "slstm", "layer_norm_gru", "indrnn, resets, truncation, reverse")
]
GRID += [
    pytest.param("causal_conv", label, id=f"causal_conv-{label}")
    for label in ("no carry", "resets", "resets, grouped, no carry", "resets, depthwise, dilated")
]
GRID += [  # one of each rule
    pytest.param("conv", label, id=f"conv-{label}")
    for label in ("depthwise", "2d depthwise, long", "one tap", "2d grouped, dilated", "3d")
]
# A loop over taps in which each tap's own weight is summed over devices: all of the kernel, once, in K parts.
TAP_BY_TAP = [("causal_conv", "resets"), ("causal_conv", "resets, grouped, no carry")]
# A loop over segments, each of which is recomputed and contracted by itself: one sum a segment, none a step.
BY_SEGMENT = [("lstm", "batch first, lengths, checkpoint"), ("recurrence", "twice, lengths, checkpoint")]
# Steps of the user's own, which JAX differentiates: nothing is known of them by which a sum could wait for the end.
BY_STEP = [("scan", "truncation")]
# The compiler splits no Fourier transform, so that it gathers what goes through one.
GATHERED = [("conv", "2d depthwise, long", "automatic")]
COLLECTIVE = re.compile(r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(-start)?\(")


def batch_specs(make):
    """Where the batch axis of each array is: the axis that grows with the batch."""

    def spec(small, large):
        return PartitionSpec(*("d" if a != b else None for a, b in zip(small.shape, large.shape, strict=True)))

    return jax.tree.map(spec, make(batch=(2,)), make(batch=(4,)))


def while_bodies(hlo):
    computations = dict(re.findall(r"^%?([\w.-]+) [^\n]*\{\n(.*?)^\}", hlo, flags=re.DOTALL | re.MULTILINE))
    return [computations[name] for name in re.findall(r"body=%?([\w.-]+)", hlo)]


# Of variants the first stage sees the one mesh under which JAX itself checks every step.
KINDS = [
    pytest.param(
        kind,
        *p.values,
        id=f"{p.id}-{kind}",
        marks=[
            *p.marks,
            *(
                [pytest.mark.long]
                if kind != "explicit" and p.values not in [q.values for q in OPS] and not p.marks
                else []
            ),
        ],
    )
    for p in GRID
    for kind in ("automatic", "explicit", "shard_map")
]


@pytest.mark.parametrize(("kind", "name", "label"), KINDS)
def test_batch_over_two_devices(name, label, kind, key):
    f = bound(name, label)
    make = lambda batch: arguments(name, label, key, batch=batch)  # noqa: E731
    outputs = lambda batch: jax.eval_shape(f, *make(batch))  # noqa: E731
    args, specs = make((4,)), batch_specs(make)
    cotangents, out_specs = cotangents_for(f, args, jax.random.fold_in(key, 1)), batch_specs(outputs)
    expected = compiled(name, label, twin=True)(args, cotangents)

    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Explicit if kind == "explicit" else AxisType.Auto,))
    place = lambda tree, specs: jax.device_put(tree, jax.tree.map(lambda s: NamedSharding(mesh, s), specs))  # noqa: E731
    run = pullback(f)
    if kind == "shard_map":
        run = jax.shard_map(run, mesh=mesh, in_specs=(specs, out_specs), out_specs=(out_specs, specs))
    with jax.set_mesh(mesh):
        placed = place(args, specs), place(cotangents, out_specs)
        program = jax.jit(run).lower(*placed).compile()
        assert_close(program(*placed), expected)

    hlo = program.as_text()
    replicated = [s for s in jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, PartitionSpec)) if "d" not in s]
    assert len(COLLECTIVE.findall(hlo)) >= 1
    assert len(COLLECTIVE.findall(hlo)) <= len(replicated) or (name, label, kind) in GATHERED or name == "scan"
    bodies = while_bodies(hlo)
    assert bodies or name not in ("rnn", "gru", "lstm")
    assert not any(COLLECTIVE.search(body) for body in bodies) or (name, label) in TAP_BY_TAP + BY_SEGMENT + BY_STEP


def test_the_search_for_collectives_finds_one():
    """Autodiff of a scan puts one in every step: the sum of a replicated weight's cotangent."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    params, carry, xs = arguments("lstm", "plain", jax.random.key(0), batch=(4,))
    with jax.set_mesh(mesh):
        xs = jax.device_put(xs, NamedSharding(mesh, PartitionSpec(None, "d")))
        loss = lambda p, xs: (bound("lstm", "plain", twin=True)(p, carry, xs)[1] ** 2).sum()  # noqa: E731
        hlo = jax.jit(jax.grad(loss)).lower(params, xs).compile().as_text()
    assert any(COLLECTIVE.search(body) for body in while_bodies(hlo))
