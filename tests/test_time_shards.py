"""Sharded time and space: halo exchange, `carry_across_shards`, and the number of bytes that they move."""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import pytest
from helpers import (
    arguments,
    assert_close,
    bound,
    causal_conv,
    compiled,
    cotangents_for,
    mesh_of,
    normals,
    place,
    pullback,
    scans,
)
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxseq
from jaxseq._cases import CASES
from tests.support import hlo

pytestmark = pytest.mark.eight_devices

# --- Convolutions: x, kernel, options, and the rows that a shard receives from its neighbours in the forward pass ---

CONVOLUTIONS = {
    "causal": ((4, 24, 3), (5, 3, 2), {"padding": "CAUSAL"}, 4),
    "same": ((4, 24, 3), (4, 3, 2), {"padding": "SAME"}, 3),
    "dilated": ((4, 24, 3), (3, 3, 2), {"padding": "CAUSAL", "dilation": 2}, 4),
    "strided": ((4, 24, 3), (5, 3, 2), {"padding": "SAME", "stride": 3}, 2),
    "stride beyond the kernel": ((4, 24, 3), (2, 3, 2), {"padding": [(0, 0)], "stride": 3}, 0),
    "depthwise": ((4, 24, 6), (4, 1, 6), {"padding": "SAME", "groups": 6}, 3),
    "long": ((4, 320, 2), (100, 1, 2), {"padding": "CAUSAL", "groups": 2}, 99),
    "kernel of three parts": ((4, 12, 3), (8, 3, 2), {"padding": "CAUSAL"}, 7),
    "grouped": ((4, 24, 4), (3, 2, 6), {"padding": "SAME", "groups": 2}, 2),
    "one tap": ((4, 24, 3), (1, 3, 2), {}, 0),
    "cropped in front": ((4, 24, 3), (3, 3, 2), {"padding": [(-1, 3)]}, 3),
}
TRANSPOSES = {
    "one side": ((4, 24, 3), (5, 2, 3), {"padding": [(4, 0)]}, 4),
    "strided": ((4, 16, 3), (5, 2, 3), {"padding": "SAME", "stride": 2}, 2),
    "stride 3, grouped": ((4, 16, 4), (4, 3, 4), {"padding": [(0, 1)], "stride": 3, "groups": 2}, 1),
    "depthwise": ((4, 24, 6), (4, 1, 6), {"padding": "SAME", "groups": 6}, 3),
}
SPACES = [
    pytest.param(op, *case, id=f"{op}-{label}")
    for op, cases in (("conv", CONVOLUTIONS), ("conv_transpose", TRANSPOSES))
    for label, case in cases.items()
]


@pytest.mark.parametrize(("op", "shape", "kernel_size", "options", "rows"), SPACES)
def test_space_over_devices_moves_halos_and_no_more(op, shape, kernel_size, options, rows, key):
    """Forward receives the rows that the kernel reaches, backward returns their cotangents, and one sum follows.

    The mesh has an idle axis too.
    """
    f, reference = (partial(getattr(module, op), **options) for module in (jaxseq, jaxseq.reference))
    keys = jax.random.split(key)
    channels = kernel_size[-1] if op == "conv" else kernel_size[-2] * options.get("groups", 1)
    x, w, b = normals(keys[0], (jnp.ones(shape), jnp.ones(kernel_size), jnp.ones(channels)))
    y_bar = cotangents_for(reference, (x, w, b), keys[1])
    expected = jax.jit(pullback(reference))((x, w, b), y_bar)
    mesh = mesh_of((2, 4), ("idle", "t"), "explicit")
    with jax.set_mesh(mesh):
        placed = place(mesh, (x, w, b), (P(None, "t"), P(), P())), place(mesh, y_bar, P(None, "t"))
        program = jax.jit(pullback(f)).lower(*placed).compile()
        y, (x_bar, *_) = program(*placed)
        assert_close((y, (x_bar, *program(*placed)[1][1:])), expected)
        assert y.sharding.spec == x_bar.sharding.spec == P(None, "t", None)
    collectives = hlo.collectives(program.as_text())
    assert {c.kind for c in collectives} <= {"collective-permute", "all-reduce"}
    assert sum(c.kind == "all-reduce" for c in collectives) <= 2  # kernel and bias
    moved = sum(c.bytes for c in collectives if c.kind == "collective-permute")
    assert moved == 2 * rows * x.nbytes // x.shape[1]  # forward and backward


@pytest.mark.parametrize(
    "spec", [("h", "w"), ("wh", None), (None, "h")], ids=["both axes", "one axis over both", "the second axis"]
)
def test_an_image_over_devices_with_its_corners(spec, key):
    run = lambda conv: pullback(partial(conv, padding="SAME", dilation=(1, 2)))  # noqa: E731
    x, w, y_bar = normals(key, (jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 2)), jnp.ones((2, 8, 8, 2))))
    expected = jax.jit(run(jaxseq.reference.conv))((x, w), y_bar)
    mesh = mesh_of((4, 2), ("h", "w"), "explicit")
    space = P(None, *(("w", "h") if part == "wh" else part for part in spec))  # not in the order of the mesh
    with jax.set_mesh(mesh):
        placed = place(mesh, (x, w), (space, P())), place(mesh, y_bar, space)
        program = jax.jit(run(jaxseq.conv)).lower(*placed).compile()
        assert_close(program(*placed), expected)
    kinds = {c.kind for c in hlo.collectives(program.as_text())}
    assert "collective-permute" in kinds
    assert "all-gather" not in kinds


def test_space_batch_and_channels_over_devices_at_once(key):
    run = lambda conv: pullback(partial(conv, padding="CAUSAL"))  # noqa: E731
    x, w, b, y_bar = normals(key, (jnp.ones((4, 8, 4)), jnp.ones((3, 4, 6)), jnp.ones(6), jnp.ones((4, 8, 6))))
    expected = jax.jit(run(jaxseq.reference.conv))((x, w, b), y_bar)
    mesh = mesh_of((2, 2, 2), ("b", "t", "c"), "explicit")
    with jax.set_mesh(mesh):
        placed = (
            place(mesh, (x, w, b), (P("b", "t", "c"), P(None, None, "c"), P("c"))),
            place(mesh, y_bar, P("b", "t", "c")),
        )
        assert_close(jax.jit(run(jaxseq.conv))(*placed), expected)


def test_without_jit_and_without_a_mesh_in_context(key):
    x, w = normals(key, (jnp.ones((2, 8, 3)), jnp.ones((3, 3, 2))))
    placed = place(mesh_of((4,), ("t",), "explicit"), (x, w), (P(None, "t"), P()))
    assert_close(jaxseq.conv(*placed, padding="SAME"), jaxseq.reference.conv(x, w, padding="SAME"))


def test_automatic_axes_leave_halos_to_the_compiler(key):
    """The compiler exchanges halos for the convolutions that are computed by XLA's own operation."""
    run = lambda conv: pullback(partial(conv, padding="CAUSAL"))  # noqa: E731
    x, w, y_bar = normals(key, (jnp.ones((4, 24, 3)), jnp.ones((3, 3, 2)), jnp.ones((4, 24, 2))))
    mesh = mesh_of((8,), ("t",), "automatic")
    with jax.set_mesh(mesh):
        placed = place(mesh, (x, w), (P(None, "t"), P())), place(mesh, y_bar, P(None, "t"))
        program = jax.jit(run(jaxseq.conv)).lower(*placed).compile()
        assert_close(program(*placed), jax.jit(run(jaxseq.reference.conv))((x, w), y_bar))
    moved = [c.bytes // (x.itemsize * 4) for c in hlo.collectives(program.as_text()) if c.kind == "collective-permute"]
    assert sorted(moved) == [2 * 2, 2 * 3, 2 * 3]  # two rows each: of ȳ for x̄, of x for y, of x again for w̄


REFUSED = {
    "valid": ((2, 16, 3), {}, "16 inputs and 14 outputs at stride 1 over 4"),
    "valid, outputs in equal parts": ((2, 16, 3), {"dilation": 2}, "16 inputs and 12 outputs at stride 1 over 4"),
    "a stride that does not divide": (
        (2, 12, 3),
        {"stride": 2, "padding": "SAME"},
        "12 inputs and 6 outputs at stride 2",
    ),
}


@pytest.mark.parametrize("label", REFUSED)
def test_outputs_that_cannot_be_divided_alike_are_refused(label):
    shape, options, got = REFUSED[label]
    mesh = mesh_of((4,), ("t",), "explicit")
    x = place(mesh, jnp.ones(shape), P(None, "t"))
    match = rf"`x`: expected along a spatial axis .* \('t',\).* got {got}"
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=match):
        jaxseq.conv(x, jnp.ones((3, 3, 2)), **options)


def test_a_transpose_that_cannot_be_divided_alike_is_refused():
    mesh = mesh_of((4,), ("t",), "explicit")
    x = place(mesh, jnp.ones((2, 16, 3)), P(None, "t"))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="got 16 inputs and 18 outputs at stride 1 over 4"):
        jaxseq.conv_transpose(x, jnp.ones((3, 2, 3)))


# --- An idle mesh axis, over which XLA's partitioner may sum equal terms ---


IDLE = [("conv", "automatic"), ("conv_transpose", "automatic"), ("causal_conv", "explicit"), ("conv_lstm", "automatic")]
REST = [
    pytest.param(*case, marks=pytest.mark.long)
    for case in product(["conv", "conv_transpose", "causal_conv", "conv_lstm", "conv_gru"], ["explicit", "automatic"])
    if case not in IDLE
]


@pytest.mark.parametrize(("name", "kind"), [*IDLE, *REST])
def test_an_idle_axis_beside_space_counts_nothing_twice(name, kind, key):
    """Values and gradients in float32, with the kernel replicated or sharded over the idle axis."""
    draw = lambda *shape: normals(jax.random.fold_in(key, len(shape)), jnp.ones(shape, jnp.float32))  # noqa: E731
    over_a = P(None, "a")
    if name in ("conv_lstm", "conv_gru"):
        params = getattr(jaxseq, f"{name}_init")(key, 3, 4, 4)
        args, over_a = (draw(3, 4, 8, 4), params.w_x), P(None, None, "a")
        call = lambda ns, x, w: getattr(ns, name)(params._replace(w_x=w), None, x)[1]  # noqa: E731
    elif name == "causal_conv":
        args = draw(2, 8, 4), draw(1, 1, 3, 4, 8)[0, 0]
        call = lambda ns, x, w: causal_conv(None, x, w, module=ns)[1]  # noqa: E731
    else:
        args = draw(2, 8, 4), draw(1, 1, 3, *((4, 8) if name == "conv" else (8, 4)))[0, 0]
        call = lambda ns, x, w: getattr(ns, name)(x, w, padding="SAME")  # noqa: E731
    reference = partial(call, jaxseq.reference)
    y_bar = cotangents_for(reference, args, key)
    expected = jax.jit(pullback(reference))(args, y_bar)
    mesh = mesh_of((2, 2), ("a", "b"), kind)
    with jax.set_mesh(mesh):
        for of_kernel in P(), P(None, None, "b"):
            placed = place(mesh, args, (over_a, of_kernel))
            types = jax.eval_shape(partial(call, jaxseq), *placed)
            cotangent = place(mesh, y_bar, types.sharding.spec if kind == "explicit" else over_a)
            assert_close(jax.jit(pullback(partial(call, jaxseq)))(placed, cotangent), expected, 1e-5)


def test_a_transposed_convolution_over_two_mesh_axes_that_divide_space(key):
    """XLA aborts over a pad that crops and dilates along a sharded axis."""
    args = normals(key, (jnp.ones((2, 16, 4), jnp.float32), jnp.ones((5, 2, 4), jnp.float32)))
    call = lambda ns, x, w: ns.conv_transpose(x, w, stride=2, padding="SAME", groups=2)  # noqa: E731
    placed = place(mesh_of((2, 2), ("a", "b"), "automatic"), args, (P(None, ("b", "a")), P()))
    assert_close(jax.jit(partial(call, jaxseq))(*placed), call(jaxseq.reference, *args), 1e-5)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_the_mesh_of_a_cotangent_alone_has_an_idle_axis(jit, key):
    """The arguments were never placed, and no mesh is in context."""
    args = normals(key, (jnp.ones((2, 8, 4), jnp.float32), jnp.ones((3, 4, 8), jnp.float32)))
    y_bar = normals(jax.random.fold_in(key, 1), jnp.ones((2, 8, 8), jnp.float32))
    of_ours, of_reference = (jax.vjp(partial(ns.conv, padding="SAME"), *args)[1] for ns in (jaxseq, jaxseq.reference))
    placed = place(mesh_of((2, 2), ("a", "b"), "automatic"), y_bar, P(None, "a"))
    assert_close((jax.jit(of_ours) if jit else of_ours)(placed), of_reference(y_bar), 1e-5)


# --- Time over four devices and the batch over two, for every op with a time axis ---


def time_specs(make):
    """Return specs that shard the batch over b, and time over u and t, which is not the order of the mesh.

    These are the axes that grow with the batch and with the length.
    """

    def spec(a, b, c):
        axes = zip(a.shape, b.shape, c.shape, strict=True)
        time = lambda n, longer: ("u", "t") if n != longer and not n % 4 else None  # noqa: E731
        return P(*("b" if n != more else time(n, longer) for n, more, longer in axes))

    return jax.tree.map(spec, make(4, 12), make(6, 12), make(4, 16))


FIRST = {
    "gru": ["truncation, reverse"],
    "lstm": ["plain", "lengths, resets, reverse"],
    "bidirectional": ["lstm"],
    "causal_conv": ["resets, depthwise, dilated"],
}
THOROUGH = ("lstm", "causal_conv")  # for the other ops, which use the same code, test the first variant
OVER_TIME = [
    pytest.param(name, label, id=f"{name}-{label}", marks=[] if label in FIRST.get(name, []) else [pytest.mark.long])
    for name, case in CASES.items()
    for place, label in enumerate(case.variants)
    if (name in THOROUGH or place == 0 or label in FIRST.get(name, []))
    and not (name.endswith("_cell") or name in ("conv", "conv_transpose", "depthwise_conv", "separable_conv", "scan"))
]


@pytest.mark.parametrize(("name", "label"), OVER_TIME)
def test_time_over_devices(name, label, key):
    f = bound(name, label)
    make = lambda batch, length: arguments(name, label, key, batch=(batch,), length=length)  # noqa: E731
    args, specs = make(4, 12), time_specs(make)
    assert any(("u", "t") in s for s in jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, P)))
    cotangents = cotangents_for(f, args, jax.random.fold_in(key, 1))
    expected = compiled(name, label, reference=True)(args, cotangents)
    mesh = mesh_of((2, 2, 2), ("b", "t", "u"), "explicit")
    with jax.set_mesh(mesh):
        placed = place(mesh, args, specs)
        types = jax.eval_shape(f, *placed)
        assert any(("u", "t") in a.sharding.spec for a in jax.tree.leaves(types))
        cotangents = place(mesh, cotangents, jax.tree.map(lambda t: t.sharding.spec, types))
        assert_close(jax.jit(pullback(f))(placed, cotangents), expected)


def test_a_causal_convolution_over_time_moves_its_carry(key):
    """Move a halo of kernel_size - 1 steps forward and one back, and send the returned carry to all devices."""
    (T, B, C), K = (24, 2, 3), 4
    carry, x, w = normals(key, (jnp.ones((B, K - 1, C)), jnp.ones((B, T, C)), jnp.ones((K, C, 5))))
    f = lambda carry, x, w: causal_conv(carry, x, w)[1]  # noqa: E731
    mesh = mesh_of((8,), ("t",), "explicit")
    with jax.set_mesh(mesh):
        placed = place(mesh, (carry, x, w), (P(), P(None, "t"), P()))
        y_bar = jax.device_put(jnp.ones((B, T, 5)), NamedSharding(mesh, P(None, "t")))
        collectives = hlo.collectives(jax.jit(pullback(f)).lower(placed, y_bar).compile().as_text())
    moved = [c.bytes for c in collectives if c.kind == "collective-permute"]
    assert moved == [carry.nbytes] * 2
    assert {c.kind for c in collectives} == {"collective-permute", "all-reduce"}


def test_a_carry_of_two_shards():
    """With two steps on each of four devices, a sum over four steps needs three steps from the two previous devices."""
    x = jnp.arange(1.0, 9.0)
    mesh = mesh_of((4,), ("t",), "explicit")
    with jax.set_mesh(mesh):
        placed = place(mesh, x[:, None], P("t"))
        carry, y = jax.jit(causal_conv)(None, placed, jnp.ones((4, 1, 1)))
    assert y[:, 0].tolist() == [1, 3, 6, 10, 14, 18, 22, 26]
    assert carry[:, 0].tolist() == [6, 7, 8]


def test_the_last_state_is_that_of_the_shard_in_which_a_sequence_ends():
    """Sums of ones over no step, a part of the first of two shards, all of it, and both shards."""
    lengths, ones = jnp.array([0, 1, 2, 4]), jnp.ones((1, 1))
    f = partial(jaxseq.rnn, jaxseq.RNNParams(ones, ones, None), None, activation="relu", lengths=lengths)
    mesh = mesh_of((2,), ("t",), "explicit")
    with jax.set_mesh(mesh):
        last, _ = jax.jit(f)(place(mesh, jnp.ones((4, 4, 1)), P("t")))
    assert last[:, 0].tolist() == lengths.tolist()


def over_time(truncation, devices, key, kind="explicit", reverse=False):
    """Return the compiled gradient of an LSTM with time over `devices` devices, its parameters and its input."""
    params = jaxseq.lstm_init(key, 3, 4, dtype=jnp.float64)
    xs = normals(key, jnp.ones((256, 2, 3)))
    run = lambda params, xs: jaxseq.lstm(params, None, xs, truncation=truncation, reverse=reverse)[1]  # noqa: E731
    gradient = jax.grad(lambda params, xs: (run(params, xs) ** 2).sum(), (0, 1))
    mesh = mesh_of((devices,), ("t",), kind)
    with jax.set_mesh(mesh):
        placed = place(mesh, (params, xs), (jax.tree.map(lambda _: P(), params), P("t")))
        return jax.jit(gradient).lower(*placed).compile(), params, xs


def test_truncated_windows_run_backward_on_all_devices_at_once(key):
    """Forward passes the state from device to device. Backward communicates once, in one sum."""
    program, params, xs = over_time(16, 8, key)
    state = 2 * 4 * xs.itemsize  # of h or c
    weights = sum(p.nbytes for p in params)
    collectives = hlo.collectives(program.as_text())
    permutes = [c for c in collectives if c.kind == "collective-permute"]
    assert [(c.bytes, c.loops, c.times) for c in permutes] == [(state, 1, 7)] * 2
    (total,) = (c for c in collectives if c not in permutes)
    assert (total.kind, total.bytes, total.loops) == ("all-reduce", weights, 0)


def test_memory_is_divided_over_devices(key):
    (one, *_), (eight, *_) = over_time(None, 1, key), over_time(None, 8, key)
    assert eight.memory_analysis().temp_size_in_bytes < one.memory_analysis().temp_size_in_bytes / 3
    assert not any(c.kind == "all-gather" for c in hlo.collectives(eight.as_text()))


def test_automatic_axes_gather_the_input_and_divide_the_windows(key):
    """The compiler shards the residuals and the windows of the backward pass, with no sum in a loop."""
    program, params, xs = over_time(16, 8, key, kind="automatic")
    collectives = hlo.collectives(program.as_text())
    assert not any(c.loops for c in collectives)
    assert [c.bytes for c in collectives if c.kind == "all-reduce"] == [sum(p.nbytes for p in params)]
    assert sum(c.bytes for c in collectives if c.kind == "all-gather") <= 2 * xs.nbytes
    one, *_ = over_time(16, 1, key, kind="automatic")
    assert program.memory_analysis().temp_size_in_bytes < one.memory_analysis().temp_size_in_bytes / 2


# --- carry_across_shards, in shard_map ---


def over_shards(f, devices):
    mesh = mesh_of((devices,), ("t",), "automatic")
    return jax.shard_map(f, mesh=mesh, in_specs=(P(), P(), P("t")), out_specs=P("t"))


@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "backwards"])
def test_the_carry_goes_through_all_shards_and_back(reverse, key):
    """Over two mesh axes, not in the order of the mesh, which has a third, idle axis."""
    params, h, xs = arguments("gru", "plain", key, batch=(2,), length=12)

    def run(params, h, xs):
        gru = partial(jaxseq.gru, params, xs=xs, reverse=reverse)
        return gru(jaxseq.carry_across_shards(lambda h: gru(h)[0], h, ("u", "t"), reverse=reverse))[1]

    reference = lambda params, h, xs: jaxseq.reference.gru(params, h, xs, reverse=reverse)[1]  # noqa: E731
    y_bar = cotangents_for(reference, (params, h, xs), key)
    expected = jax.jit(pullback(reference))((params, h, xs), y_bar)
    mesh, over_time = mesh_of((2, 2, 2), ("t", "idle", "u"), "automatic"), P(("u", "t"))
    over_devices = jax.shard_map(run, mesh=mesh, in_specs=(P(), P(), over_time), out_specs=over_time)
    assert_close(jax.jit(pullback(over_devices))((params, h, xs), y_bar), expected)


def test_a_carry_whose_gradient_stops_is_truncation(key):
    params, h, xs = arguments("gru", "plain", key, batch=(2,), length=12)

    def run(params, h, xs):
        start = lax.stop_gradient(jaxseq.carry_across_shards(lambda h: jaxseq.gru(params, h, xs)[0], h, "t"))
        first = lax.axis_index("t") == 0
        return jaxseq.gru(params, jnp.where(first, h, start), xs, truncation=3)[1]

    reference = lambda params, h, xs: jaxseq.reference.gru(params, h, xs, truncation=3)[1]  # noqa: E731
    y_bar = cotangents_for(reference, (params, h, xs), key)
    expected = jax.jit(pullback(reference))((params, h, xs), y_bar)
    assert_close(jax.jit(pullback(over_shards(run, 4)))((params, h, xs), y_bar), expected)


@pytest.mark.parametrize("kernel_size", [3, 6], ids=["shorter than a shard", "longer"])
def test_a_causal_convolution_with_a_carry_across_shards(kernel_size, key):
    carry, x, w, b = normals(
        key, (jnp.ones((2, kernel_size - 1, 3)), jnp.ones((2, 16, 3)), jnp.ones((kernel_size, 3, 2)), jnp.ones(2))
    )

    def run(carry, x, w, b):
        conv = partial(causal_conv, x=x, kernel=w, bias=b)
        return conv(
            jaxseq.carry_across_shards(
                lambda carry: conv(carry)[0], carry, "t", rounds=-(-(kernel_size - 1) // x.shape[1])
            )
        )[1]

    mesh = mesh_of((4,), ("t",), "automatic")
    over_time = P(None, "t")
    divided = jax.shard_map(run, mesh=mesh, in_specs=(P(), over_time, P(), P()), out_specs=over_time)
    reference = lambda *args: causal_conv(*args, module=jaxseq.reference)[1]  # noqa: E731
    y_bar = cotangents_for(reference, (carry, x, w, b), key)
    expected = jax.jit(pullback(reference))((carry, x, w, b), y_bar)
    assert_close(jax.jit(pullback(divided))((carry, x, w, b), y_bar), expected)


def test_the_carry_takes_as_many_rounds_as_requested(key):
    """If a step depends only on its own shard of three numbers, one round is enough."""
    xs = jnp.arange(1.0, 13.0)

    def starts(rounds, forgets):
        step = lambda s, xs: xs.sum() if forgets else s + xs.sum()  # noqa: E731
        return over_shards(
            lambda _, s, xs: jaxseq.carry_across_shards(partial(step, xs=xs), s, "t", rounds=rounds)[None], 4
        )

    assert starts(1, forgets=True)(0.0, jnp.zeros(()), xs).tolist() == [0.0, 6.0, 15.0, 24.0]
    assert starts(None, forgets=False)(0.0, jnp.zeros(()), xs).tolist() == [0.0, 6.0, 21.0, 45.0]
    for rounds, expected in (1, 1), (2, 2), (None, 3), (9, 3):
        loops = scans(starts(rounds, forgets=False), 0.0, jnp.zeros(()), xs)
        assert [eqn.params["length"] for eqn in loops] == [expected]


def test_one_device_has_nobody_to_hand_to():
    run = lambda _, carry, xs: jaxseq.carry_across_shards(lambda s: s + xs.sum(), carry, "t")[None]  # noqa: E731
    assert over_shards(run, 1)(0.0, jnp.full((), 5.0), jnp.ones(4)).tolist() == [5.0]


MISTAKES = {
    "an axis that does not exist": (
        lambda s: jaxseq.carry_across_shards(lambda s: s, s, "x"),
        ValueError,
        r"`axis_name`.*'x'",
    ),
    "an axis twice": (
        lambda s: jaxseq.carry_across_shards(lambda s: s, s, ("t", "t")),
        ValueError,
        r"expected distinct manual mesh axes .*, got \('t', 't'\)",
    ),
    "no function": (
        lambda s: jaxseq.carry_across_shards(1, s, "t"),
        TypeError,
        r"`step`: expected a function .* got 1",
    ),
    "no rounds": (lambda s: jaxseq.carry_across_shards(lambda s: s, s, "t", rounds=0), ValueError, r"`rounds`.*0"),
}


@pytest.mark.other_types
@pytest.mark.parametrize("label", MISTAKES)
def test_mistakes_with_carry_across_shards(label):
    wrong, error, match = MISTAKES[label]
    with pytest.raises(error, match=match):
        over_shards(lambda _, carry, xs: wrong(carry), 2)(0.0, jnp.zeros(()), jnp.ones(4))


def test_the_carry_outside_of_shard_map():
    with pytest.raises(ValueError, match=r"`axis_name`: expected distinct manual mesh axes of `shard_map`.*got 't'"):
        jaxseq.carry_across_shards(lambda s: s, jnp.zeros(()), "t")


@pytest.mark.parametrize(
    ("of_x", "of_zoneout", "options"),
    [
        (P("t"), P("t"), {"reverse": True, "truncation": 2}),  # reversed within the lengths: time is gathered
        (P(None, "b"), P("b", None), {}),  # another axis than that of xs
        (P(), P(), {}),  # replicated
    ],
    ids=str,
)
def test_boolean_zoneout_over_devices(of_x, of_zoneout, options, key):
    mesh = mesh_of((2, 2), ("t", "b"), "explicit")
    params, x = jaxseq.gru_init(key, 6, 4, dtype=jnp.float64), jax.random.normal(key, (8, 4, 6))
    zoneout, lengths = jax.random.bernoulli(key, 0.8, (8, 4, 4)), jnp.array([8, 5, 3, 0])

    def loss(params, x, zoneout):
        return jnp.sum(jaxseq.gru(params, None, x, zoneout=zoneout, lengths=lengths, **options)[1] ** 2)

    placed = place(mesh, (x, zoneout), (of_x, of_zoneout))
    actual, expected = jax.jit(jax.grad(loss, (0, 1)))(params, *placed), jax.grad(loss, (0, 1))(params, x, zoneout)
    assert_close(jax.device_get(actual), jax.device_get(expected))
