"""Every op with batch and features sharded, under each kind of mesh: equal results, no collective in the loop.

test_time_shards.py tests sharded time and space.
"""

from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from multiprocessing import get_context

import jax
import jax.numpy as jnp
import pytest
from helpers import (
    OPS,
    arguments,
    assert_close,
    bound,
    compiled,
    cotangents_for,
    mesh_of,
    normals,
    place,
    pullback,
)
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxseq
from jaxseq import _mesh
from jaxseq._cases import CASES
from tests.support import hlo
from tests.support.eight_devices import configure

pytestmark = pytest.mark.eight_devices

VARIANTS = {
    "gru": ["truncation, reverse"],
    "lstm": [
        "no bias, zero carry",
        "truncation, reverse",
        "overlapping windows",
        "lengths, resets, reverse",
        "batch first, lengths, checkpoint",
        "states, reset state, lengths",
    ],
    "bidirectional": ["rnn and gru, lengths, checkpoint"],
    "stack": ["bidirectional lstm, dropout, resets"],
    "recurrence": ["twice, lengths, checkpoint", "slstm", "layer_norm_gru", "indrnn, resets, truncation, reverse"],
    "causal_conv": [
        *("no carry", "batch first, lengths", "resets", "resets, grouped, no carry", "resets, depthwise, dilated"),
    ],
    # One for each rule, and the masks of lengths.
    "conv": ["depthwise", "2d depthwise, long", "one tap", "2d grouped, dilated", "3d", "lengths"],
}
GRID = [pytest.param(name, label, id=f"{name}-{label}") for name, labels in VARIANTS.items() for label in labels]
# A loop over taps sums the weight of each tap over devices, so the kernel is summed once, in K parts.
TAP_BY_TAP = [("causal_conv", "resets"), ("causal_conv", "resets, grouped, no carry")]
# A loop over segments recomputes and contracts each segment: one sum for each segment, none for each step.
BY_SEGMENT = [
    ("bidirectional", "rnn and gru, lengths, checkpoint"),
    ("lstm", "batch first, lengths, checkpoint"),
    ("recurrence", "twice, lengths, checkpoint"),
]
# JAX differentiates user-defined steps, so it sums over devices at every step.
BY_STEP = [("scan", "truncation")]
# The compiler does not partition Fourier transforms: it gathers their operands.
GATHERED = [("conv", "2d depthwise, long", "automatic")]


def batch_specs(make):
    """Return specs that shard the batch axis of each array, which is the axis that grows with the batch."""

    def spec(small, large):
        return P(*("d" if a != b else None for a, b in zip(small.shape, large.shape, strict=True)))

    return jax.tree.map(spec, make(batch=(8,)), make(batch=(16,)))


def is_spec(s):
    return isinstance(s, P)


# The ops and variants in the default suite, for each kind of mesh.
DEFAULT = {
    "automatic": (
        *("conv", "depthwise_conv", "causal_conv", "lstm", "conv_lstm", "scan", "recurrence", "stack"),
        *("lstm-overlapping windows", "causal_conv-resets", "conv-one tap"),
    ),
    "explicit": ("conv", "causal_conv", "lstm"),
    "shard_map": (),
}


def over_kinds(ops, variants):
    """Parametrize ops over each kind of mesh, and single-step cells and variants over automatic axes.

    Variants of lstm are also tested over explicit axes.
    """
    return [
        pytest.param(kind, *p.values, id=f"{p.id}-{kind}", marks=[] if p.id in ids else [pytest.mark.long])
        for p in [*ops, *variants]
        for kind, ids in DEFAULT.items()
        if (p in ops and not p.id.endswith("_cell")) or kind == "automatic" or (kind == "explicit" and "lstm" in p.id)
    ]


@pytest.mark.parametrize(("kind", "name", "label"), over_kinds(OPS, GRID))
def test_batch_over_devices(name, label, kind, key):
    f = bound(name, label)
    make = lambda batch: arguments(name, label, key, batch=batch)  # noqa: E731
    outputs = lambda batch: jax.eval_shape(f, *make(batch))  # noqa: E731
    args, specs = make((8,)), batch_specs(make)
    cotangents, out_specs = cotangents_for(f, args, jax.random.fold_in(key, 1)), batch_specs(outputs)
    expected = compiled(name, label, reference=True)(args, cotangents)

    mesh = mesh_of((4, 2), ("d", "idle"), kind)
    run = pullback(f)
    if kind == "shard_map":
        run = jax.shard_map(run, mesh=mesh, in_specs=(specs, out_specs), out_specs=(out_specs, specs))
    with jax.set_mesh(mesh):
        placed = place(mesh, args, specs), place(mesh, cotangents, out_specs)
        program = jax.jit(run).lower(*placed).compile()
        assert_close(program(*placed), expected)

    collectives = hlo.collectives(program.as_text())
    replicated = [s for s in jax.tree.leaves(specs, is_leaf=is_spec) if "d" not in s]
    assert collectives or not replicated
    assert len(collectives) <= len(replicated) or (name, label, kind) in GATHERED or name == "scan"
    in_loops = [c for c in collectives if c.loops]
    assert not in_loops or (name, label) in TAP_BY_TAP + BY_SEGMENT + BY_STEP


def test_the_search_for_collectives_finds_one():
    """Autodiff of a scan sums the cotangent of a replicated weight over devices at every step."""
    mesh = mesh_of((8,), ("d",), "automatic")
    params, carry, xs = arguments("lstm", "plain", jax.random.key(0), batch=(8,))
    with jax.set_mesh(mesh):
        xs = jax.device_put(xs, NamedSharding(mesh, P(None, "d")))
        loss = lambda p, xs: (bound("lstm", "plain", reference=True)(p, carry, xs)[1] ** 2).sum()  # noqa: E731
        program = jax.jit(jax.grad(loss)).lower(params, xs).compile()
    assert any(c.times == len(xs) for c in hlo.collectives(program.as_text()))


# --- Features of weights, inputs and states, where a mesh axis divides them evenly ---

# Sizes are multiples of 3 or 5, so one of the meshes of 1 x 5 and 2 x 3 devices divides each of them.
FEATURES_FIRST = ("separable_conv", "causal_conv", "lstm", "conv")


def feature_specs(make, sizes):
    """Return specs that shard the batch over b, and the last axis over f if f divides it."""
    (nb, nf), small, large = sizes, make((2,)), make((4,))

    def spec(a, b):
        parts = ["b" if m != n and nb > 1 else None for m, n in zip(a.shape, b.shape, strict=True)]
        if parts and a.shape[-1] == b.shape[-1] and a.shape[-1] % nf == 0 and jnp.issubdtype(a.dtype, jnp.inexact):
            parts[-1] = "f"
        return P(*parts)

    return jax.tree.map(spec, small, large)


def feature_grid():
    """Parametrize ops and variants over the explicit 1 x 5 mesh, and some ops over the other mesh and automatic axes.

    Inside a rule, explicit feature axes are automatic too.
    """
    found = []
    for p in [*(p for p in OPS if not p.id.endswith("_cell")), *GRID]:
        for kind, sizes in ("explicit", (1, 5)), ("explicit", (2, 3)), ("automatic", (1, 5)):
            if p.id in FEATURES_FIRST or (kind, sizes) == ("explicit", (1, 5)):
                # The default suite tests some ops, over the mesh that divides most sizes.
                first = p.id in FEATURES_FIRST and (kind, sizes) == ("explicit", (1, 5))
                name = f"{p.id}-{'x'.join(map(str, sizes))}-{kind}"
                found.append(pytest.param(kind, sizes, *p.values, id=name, marks=[] if first else [pytest.mark.long]))
    return found


@pytest.mark.parametrize(("kind", "sizes", "name", "label"), feature_grid())
def test_features_over_devices(name, label, sizes, kind, key):
    f = bound(name, label)
    make = lambda batch: arguments(name, label, key, batch=batch)  # noqa: E731
    args, specs = make((4,)), feature_specs(make, sizes)
    cotangents = cotangents_for(f, args, jax.random.fold_in(key, 1))
    expected = compiled(name, label, reference=True)(args, cotangents)
    mesh = mesh_of(sizes, ("b", "f"), kind)
    with jax.set_mesh(mesh):
        placed = place(mesh, args, specs)
        types = jax.eval_shape(f, *placed)
        cotangents = place(
            mesh, cotangents, jax.tree.map(lambda t: t.sharding.spec if kind == "explicit" else P(), types)
        )
        assert_close(jax.jit(pullback(f))(placed, cotangents), expected)


def test_hidden_units_over_devices_and_batch_too(key):
    """Weights and states are sharded by columns, on every kind of mesh; ys is sharded like the state."""
    params = jaxseq.lstm_init(key, 3, 4, dtype=jnp.float64)
    carry, xs = normals(key, (jaxseq.LSTMState(jnp.ones((4, 4)), jnp.ones((4, 4))), jnp.ones((5, 4, 3))))
    expected = jax.jit(pullback(jaxseq.reference.lstm))((params, carry, xs), (carry, jnp.ones((5, 4, 4))))
    specs = type(params)(P(None, "f"), P(None, "f"), P("f")), type(carry)(*[P("b", "f")] * 2), P(None, "b")
    for kind in "explicit", "automatic":
        mesh = mesh_of((2, 4), ("b", "f"), kind)
        with jax.set_mesh(mesh):
            placed = place(mesh, (params, carry, xs), specs)
            cotangents = place(mesh, (carry, jnp.ones((5, 4, 4))), (specs[1], P(None, "b", "f")))
            assert_close(jax.jit(pullback(jaxseq.lstm))(placed, cotangents), expected)
            if kind == "explicit":
                state, ys = jax.eval_shape(jaxseq.lstm, *placed)
                assert {a.sharding.spec for a in (*state, ys)} == {P("b", "f"), P(None, "b", "f")}
                gradient = jax.eval_shape(pullback(jaxseq.lstm), placed, cotangents)[1]
                assert [a.sharding.spec for a in jax.tree.leaves(gradient)[:3]] == [P(None, "f"), P(None, "f"), P("f")]


@pytest.mark.parametrize("kind", ["explicit", "automatic"])
def test_the_batch_in_shard_map_and_features_in_what_it_leaves(kind, key):
    """`shard_map` over only one axis of the mesh."""
    params, carry = jaxseq.gru_init(key, 3, 4, dtype=jnp.float64), jnp.zeros((4, 4))
    xs, y_bar = normals(key, (jnp.ones((5, 4, 3)), jnp.ones((5, 4, 4))))
    run = lambda gru: pullback(lambda params, carry, xs: gru(params, carry, xs)[1])  # noqa: E731
    expected = jax.jit(run(jaxseq.reference.gru))((params, carry, xs), y_bar)
    mesh = mesh_of((2, 4), ("b", "f"), kind)
    specs = (P(), P("b"), P(None, "b")), P(None, "b")
    divided = jax.shard_map(
        run(jaxseq.gru), mesh=mesh, in_specs=specs, out_specs=(specs[1], specs[0]), axis_names={"b"}
    )
    with jax.set_mesh(mesh):
        columns = jax.tree.map(lambda p: P(*(None,) * (p.ndim - 1), "f"), params)
        placed = place(mesh, (params, carry, xs), (columns, P("b", "f"), P(None, "b")))
        assert_close(jax.jit(divided)(placed, place(mesh, y_bar, P(None, "b", "f"))), expected)


def test_each_device_has_its_own_groups():
    """Three groups of two channels, each summed to one channel on a separate device."""
    x = jnp.arange(6.0)[None]
    mesh = mesh_of((3,), ("f",), "explicit")
    with jax.set_mesh(mesh):
        placed = place(mesh, (x, jnp.ones((1, 2, 3))), (P(None, "f"), P(None, None, "f")))
        y = jax.jit(partial(jaxseq.conv, groups=3))(*placed)
    assert y.tolist() == [[1, 5, 9]]
    assert y.sharding.spec == P(None, "f")


def test_groups_over_more_devices_than_there_are(key):
    """Two groups of channels over four devices, which once made XLA abort during compilation."""
    x, w, y_bar = normals(key, (jnp.ones((2, 8, 8)), jnp.ones((3, 4, 8)), jnp.ones((2, 8, 8))))
    run = lambda conv: pullback(partial(conv, padding="SAME", groups=2))  # noqa: E731
    expected = jax.jit(run(jaxseq.reference.conv))((x, w), y_bar)
    mesh = mesh_of((4, 2), ("f", "t"), "explicit")
    with jax.set_mesh(mesh):
        placed = place(mesh, (x, w), (P(None, "t", "f"), P(None, None, "f"))), place(mesh, y_bar, P(None, "t", "f"))
        assert_close(jax.jit(run(jaxseq.conv))(*placed), expected)


@pytest.mark.parametrize("spec", [P("d"), P(None, "d")], ids=["rows", "columns"])
def test_weights_over_the_axis_of_the_batch(spec, key):
    """Fully sharded data parallelism gathers the weights before the loop and sums once after it."""
    params, xs = jaxseq.gru_init(key, 8, 8, dtype=jnp.float64), normals(key, jnp.ones((5, 8, 8)))
    y_bar = normals(jax.random.fold_in(key, 1), jnp.ones((5, 8, 8)))
    run = lambda gru: pullback(lambda params, xs: gru(params, None, xs)[1])  # noqa: E731
    expected = jax.jit(run(jaxseq.reference.gru))((params, xs), y_bar)
    mesh = mesh_of((8,), ("d",), "explicit")
    with jax.set_mesh(mesh):
        specs = jax.tree.map(lambda p: spec if p.ndim == 2 else P("d"), params)
        placed = place(mesh, (params, xs), (specs, P(None, "d"))), place(mesh, y_bar, P(None, "d"))
        program = jax.jit(run(jaxseq.gru)).lower(*placed).compile()
        assert_close(program(*placed), expected)
    collectives = hlo.collectives(program.as_text())
    assert not any(c.loops for c in collectives)
    assert 0 < sum(c.kind == "all-gather" for c in collectives) <= len(jax.tree.leaves(params))
    assert 0 < sum(c.kind in ("all-reduce", "reduce-scatter") for c in collectives) <= len(jax.tree.leaves(params))


def temporaries():
    """Return the temporary bytes of the gradient of an RNN, for arrays that were never placed."""
    params, xs = jaxseq.rnn_init(jax.random.key(0), 3, 4), jnp.ones((512, 2, 3), jnp.float32)
    loss = lambda params, xs: (jaxseq.rnn(params, None, xs)[1] ** 2).sum()  # noqa: E731  # traced anew
    return jax.jit(jax.grad(loss)).lower(params, xs).compile().memory_analysis().temp_size_in_bytes


def test_what_lies_on_one_device_of_many_has_the_rule_of_one():
    """The rule for one device, with chunks of time, is used if an explicit mesh shows that nothing is sharded.

    Without a mesh, this is unknown.
    """
    unknown = temporaries()
    with jax.set_mesh(mesh_of((8,), ("d",), "explicit")):
        known = temporaries()
    with ProcessPoolExecutor(1, get_context("spawn"), configure, (1,)) as of_one_device:
        assert of_one_device.submit(jax.device_count).result() == 1
        assert known == of_one_device.submit(temporaries).result() < 0.7 * unknown


WHERE = {
    "no mesh": (None, (True, False)),
    "one automatic axis": (((8,), "automatic"), (True, False)),
    "an axis of one device": (((8, 1), "automatic"), (True, False)),
    "two automatic axes": (((4, 2), "automatic"), (True, True)),
    "explicit axes": (((4, 2), "explicit"), (False, False)),
}


@pytest.mark.parametrize("how", ["in context", "of the array's type"])
@pytest.mark.parametrize("where", WHERE)
def test_what_the_compiler_may_do(where, how):
    described, expected = WHERE[where]
    found, x = [], jnp.ones(8)
    note = jax.jit(lambda x: found.append(_mesh.partitioning(x)))
    if described is None:
        note(x)
    else:
        sizes, kind = described
        mesh = mesh_of(sizes, ("a", "b")[: len(sizes)], kind)
        with jax.set_mesh(mesh) if how == "in context" else nullcontext():
            note(x if how == "in context" else place(mesh, x, P()))
    assert found == [expected]


# --- Arrays that were never placed ---


@pytest.mark.parametrize("name", ["lstm", "conv", "causal_conv"])
def test_weights_and_states_that_were_never_placed_follow_the_input(name, key):
    label = next(iter(CASES[name].variants))
    args, f = arguments(name, label, key, batch=(8,)), bound(name, label)
    cotangents = cotangents_for(f, args, key)
    expected = compiled(name, label, reference=True)(args, cotangents)
    where = {"lstm": 2, "conv": 0, "causal_conv": 2}[name]
    mesh = mesh_of((8,), ("d",), "explicit")

    def gradient(x, cotangents, others):
        return pullback(f)((*others[:where], x, *others[where:]), cotangents)

    with jax.set_mesh(mesh):
        x = jax.device_put(args[where], NamedSharding(mesh, P(*("d" if n == 8 else None for n in args[where].shape))))
        types = jax.eval_shape(lambda x: f(*args[:where], x, *args[where + 1 :]), x)
        cotangents = place(mesh, cotangents, jax.tree.map(lambda t: t.sharding.spec, types))
        assert_close(jax.jit(gradient)(x, cotangents, (*args[:where], *args[where + 1 :])), expected)


def test_lengths_resets_and_dropout_that_lie_elsewhere_follow_the_input(key):
    params, _, xs = arguments("lstm", "plain", key, batch=(8,))
    keys = iter(jax.random.split(key, 4))
    time = {
        "lengths": jax.random.randint(next(keys), (8,), 0, len(xs) + 1),
        "resets": jax.random.bernoulli(next(keys), 0.3, xs.shape[:2]),
        "recurrent_dropout_mask": jax.random.bernoulli(next(keys), 0.5, (8, params.w_h.shape[0])).astype(xs.dtype),
        "zoneout": jaxseq.LSTMState(*jax.random.bernoulli(next(keys), 0.5, (2, *xs.shape[:2], params.w_h.shape[0]))),
    }
    run = lambda lstm: jax.jit(jax.grad(lambda params, xs: (lstm(params, None, xs, **time)[1] ** 2).sum(), (0, 1)))  # noqa: E731
    expected = run(jaxseq.reference.lstm)(params, xs)
    mesh = mesh_of((8,), ("d",), "explicit")
    with jax.set_mesh(mesh):
        assert_close(
            run(jaxseq.lstm)(*place(mesh, (params, xs), (jax.tree.map(lambda _: P(), params), P(None, "d")))), expected
        )
