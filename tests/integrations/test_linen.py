"""`jaxseq.integrations.linen`: training as in Flax, values of the functions of jaxseq, carries, dtypes, errors."""

import doctest
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxseq
from jaxseq import cells, convert

nn = pytest.importorskip("flax.linen", reason="Flax is not installed (extra `peers`)")
optax = pytest.importorskip("optax", reason="optax is not installed (extra `examples`)")
linen = import_module("jaxseq.integrations.linen")
serialization = import_module("flax.serialization")

pytestmark = [pytest.mark.usefixtures("as_users_have_jax"), pytest.mark.long]

B, T, D, H = 3, 6, 4, 5
LENGTHS = np.array([6, 2, 4], np.int32)
TRAINED = {
    "rnn": (lambda: nn.RNN(nn.SimpleCell(H)), lambda: linen.RNN(H)),
    "gru": (lambda: nn.RNN(nn.GRUCell(H)), lambda: linen.GRU(H)),
    "lstm": (lambda: nn.RNN(nn.OptimizedLSTMCell(H)), lambda: linen.LSTM(H)),
    "conv": (lambda: nn.Conv(H, (3,), 2, kernel_dilation=2), lambda: linen.Conv(H, (3,), strides=2, kernel_dilation=2)),
    "conv_transpose": (lambda: nn.ConvTranspose(H, (3,), (2,)), lambda: linen.ConvTranspose(H, (3,), strides=2)),
}


@pytest.fixture
def xs():
    return jax.random.normal(jax.random.key(0), (B, T, D), jnp.float32)


def close(found, expected, tolerance=1e-5):
    found, expected = jax.tree.leaves(found), jax.tree.leaves(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=tolerance, atol=tolerance)


def weights(variables):
    return variables["params"]["weights"]


def losses(apply, params, xs):
    """Return the losses of 50 steps of Adam."""
    target = jax.random.normal(jax.random.key(9), jax.eval_shape(apply, params, xs).shape, jnp.float32)
    adam = optax.adam(1e-2)

    def step(state, _):
        params, moments = state
        value, grads = jax.value_and_grad(lambda params: jnp.mean((apply(params, xs) - target) ** 2))(params)
        updates, moments = adam.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    return jax.jit(lambda p: jax.lax.scan(step, (p, adam.init(p)), None, 50)[1])(params)


@pytest.mark.parametrize("name", TRAINED)
def test_trains_as_in_flax(name, xs):
    theirs, ours = (make() for make in TRAINED[name])
    variables = theirs.init(jax.random.key(1), xs)
    converted = {"params": {"weights": convert.from_flax(name, variables)}}
    assert jax.tree.map(jnp.shape, converted) == jax.tree.map(jnp.shape, ours.init(jax.random.key(1), xs))
    expected = losses(theirs.apply, variables, xs)
    assert expected[-1] < 0.98 * expected[0]
    np.testing.assert_allclose(losses(ours.apply, converted, xs), expected, rtol=1e-4)


def cell_of(name):
    return lambda params, carry, xs, **time: jaxseq.recurrence(getattr(cells, name), params, carry, xs, **time)


RESETS = jnp.zeros((B, T), bool).at[0, 3].set(True)
PURE = {
    "recurrence": (
        lambda: linen.Recurrence(H, cells.mgu, cells.mgu_init),
        cell_of("mgu"),
        {"resets": RESETS, "checkpoint": "auto"},
    ),
    "bidirectional": (
        lambda: linen.Bidirectional(linen.RNN(H), linen.LSTM(2)),
        lambda *args, **time: jaxseq.bidirectional([jaxseq.rnn, jaxseq.lstm], *args, **time),
        {"lengths": LENGTHS},
    ),
    "stack": (
        lambda: linen.Stack([linen.LSTM(H), linen.Bidirectional(linen.RNN(2), linen.RNN(3)), linen.RNN(H)]),
        lambda *args, **time: jaxseq.stack(
            [jaxseq.lstm, lambda *args, **time: jaxseq.bidirectional(jaxseq.rnn, *args, **time), jaxseq.rnn],
            *args,
            **time,
        ),
        {"lengths": LENGTHS, "truncation": 4},
    ),
    "causal_conv": (
        lambda: linen.CausalConv(2 * D, 3, kernel_dilation=2, feature_group_count=2),
        lambda *args, **time: jaxseq.causal_conv(*args, dilation=2, groups=2, **time),
        {"resets": RESETS},
    ),
}


@pytest.mark.parametrize("name", PURE)
def test_values_and_gradients_of_the_function(name, xs):
    make, pure, time = PURE[name]
    layer = make()
    variables = layer.init(jax.random.key(1), xs)

    def of_layer(variables, xs):
        return layer.apply(variables, xs, return_carry=True, **time)

    def of_function(variables, xs):
        return pure(weights(variables), None, xs, time_axis=-2, **time)

    def gradient(f):
        return jax.jit(jax.grad(lambda v, xs: sum(jnp.sum(a**2) for a in jax.tree.leaves(f(v, xs)))))(variables, xs)

    close(jax.jit(of_layer)(variables, xs), of_function(variables, xs))
    close(gradient(of_layer), gradient(of_function))
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(gradient(of_layer)))


def test_conv_lstm():
    images = jax.random.normal(jax.random.key(2), (2, 3, 6, 5, D))
    layer = linen.ConvLSTM(2, (3, 2), strides=(2, 1), use_bias=False)
    variables = layer.init(jax.random.key(1), images)
    apply = jax.jit(lambda v: layer.apply(v, images, return_carry=True))
    state, ys = jaxseq.conv_lstm(weights(variables), None, images, stride=(2, 1), time_axis=1)
    close(apply(variables), ((state.c, state.h), ys))
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(jax.grad(lambda v: jnp.sum(apply(v)[1] ** 2))(variables)))
    stack = linen.Stack([layer, linen.ConvLSTM(3, (1, 1))])
    assert stack.init_with_output(jax.random.key(1), images)[0].shape == (2, 3, 3, 5, 3)
    theirs = nn.RNN(nn.ConvLSTMCell(2, kernel_size=(3, 3)))
    variables = theirs.init(jax.random.key(0), images)
    converted = {"params": {"weights": convert.from_flax("conv_lstm", variables["params"])}}
    close(linen.ConvLSTM(2, (3, 3)).apply(converted, images), theirs.apply(variables, images))


@pytest.mark.parametrize("name", ["lstm", "gru", "causal_conv", "stack"])
def test_chunks(name, xs):
    layer = {
        "lstm": linen.LSTM(H),
        "gru": linen.GRU(H),
        "causal_conv": linen.CausalConv(H, 3),
        "stack": linen.Stack([linen.LSTM(H), linen.Recurrence(H, cells.peephole_lstm, cells.peephole_lstm_init)]),
    }[name]
    ys, variables = layer.init_with_output(jax.random.key(1), xs)
    carry, first = layer.apply(variables, xs[:, :2], return_carry=True)
    last = layer.apply(variables, xs[:, 2:], initial_carry=carry)
    close(jnp.concatenate([first, last], 1), ys)


def test_carry_and_lengths_as_in_flax(xs):
    theirs, ours = nn.RNN(nn.OptimizedLSTMCell(H)), linen.LSTM(H)
    variables = theirs.init(jax.random.key(1), xs)
    converted = {"params": {"weights": convert.from_flax("lstm", variables)}}
    initial = tuple(jax.random.normal(jax.random.key(k), (B, H)) for k in (1, 2))
    options = {"initial_carry": initial, "seq_lengths": LENGTHS, "return_carry": True}
    (c, h), ys = theirs.apply(variables, xs, **options)
    mask = (jnp.arange(T) < LENGTHS[:, None])[..., None]
    close(ours.apply(converted, xs, **options), ((c, h), ys * mask))
    ys = theirs.apply(variables, xs, seq_lengths=LENGTHS, reverse=True, keep_order=True)
    close(ours.apply(converted, xs, seq_lengths=LENGTHS, reverse=True), ys * mask)
    close(ours.apply(converted, xs[0]), ours.apply(converted, xs)[0])  # no batch axis
    found = ours.apply(converted, xs.swapaxes(0, 1), time_axis=0)
    close(found.swapaxes(0, 1), ours.apply(converted, xs))


def test_dtypes(xs):
    layer = linen.LSTM(H, dtype=jnp.bfloat16)
    variables = layer.init(jax.random.key(0), xs)
    assert {a.dtype for a in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    (c, _), ys = layer.apply(variables, xs, return_carry=True)
    assert (ys.dtype, c.dtype) == (jnp.bfloat16, jnp.float32)
    exact = linen.LSTM(H)
    close(ys, exact.apply(variables, xs), 3e-2)
    assert exact.apply(variables, xs.astype(jnp.bfloat16)).dtype == jnp.float32  # promoted, as in Flax
    half = linen.Conv(H, 3, param_dtype=jnp.bfloat16).init(jax.random.key(0), xs)
    assert {a.dtype for a in jax.tree.leaves(half)} == {jnp.dtype("bfloat16")}
    conv = linen.Conv(H, 3, dtype=jnp.bfloat16)
    assert conv.init_with_output(jax.random.key(0), xs)[0].dtype == jnp.bfloat16


def test_initializers_and_biases(xs):
    two, three = nn.initializers.constant(2.0), nn.initializers.constant(3.0)
    params = weights(linen.GRU(H, kernel_init=two, recurrent_kernel_init=three).init(jax.random.key(0), xs))
    assert jnp.all(params.w_x == 2)
    assert jnp.all(params.w_h == 3)
    for make in (linen.Conv, linen.ConvTranspose, linen.CausalConv):
        ys, variables = make(H, 3, kernel_init=two, use_bias=False).init_with_output(jax.random.key(0), xs)
        assert jnp.all(weights(variables).kernel == 2)
        assert weights(variables).bias is None
        assert ys.shape == (B, T, H)
    for make in (linen.RNN, linen.GRU, linen.LSTM):
        ys, variables = make(H, use_bias=False).init_with_output(jax.random.key(0), xs)
        assert len(jax.tree.leaves(variables)) == 2
        assert ys.shape == (B, T, H)
    relu = linen.RNN(H, activation_fn=nn.relu)
    ys, variables = relu.init_with_output(jax.random.key(0), xs)
    close(ys, jaxseq.rnn(weights(variables), None, xs, activation="relu", time_axis=1)[1])


def test_dropout_draws_from_the_rng_of_flax(xs):
    layer = linen.Stack([linen.LSTM(H), linen.LSTM(H)])
    kept, variables = layer.init_with_output(jax.random.key(0), xs)
    rates = {"dropout": 0.5, "recurrent_dropout": 0.2, "zoneout": 0.1}
    a, b, again = (layer.apply(variables, xs, rngs={"dropout": jax.random.key(k)}, **rates) for k in (1, 2, 1))
    close(a, again, 0)
    assert jnp.max(jnp.abs(a - b)) > 1e-3
    assert jnp.max(jnp.abs(a - kept)) > 1e-3
    with pytest.raises(ValueError, match="`key`"):
        layer.apply(variables, xs, dropout=0.5)


def test_tools_of_flax_see_the_parameters(xs):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, xs):
            return nn.Dense(2)(nn.remat(linen.LSTM)(H, name="lstm")(xs))

    model = Model()
    variables = nn.jit(Model)().init(jax.random.key(0), xs)
    assert weights({"params": variables["params"]["lstm"]}).w_h.shape == (H, 4 * H)
    table = model.tabulate(jax.random.key(0), xs, console_kwargs={"force_terminal": False})
    assert f"float32[{H},{4 * H}]" in table
    restored = serialization.from_bytes(variables, serialization.to_bytes(variables))
    close(nn.jit(Model)().apply(restored, xs), model.apply(variables, xs))
    grads = jax.grad(lambda v: jnp.sum(model.apply(v, xs) ** 2))(variables)
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(grads))


MISTAKES = {
    "unknown": ({"mask": LENGTHS}, TypeError, "unexpected keyword argument 'mask'"),
    "carry": ({"initial_carry": jnp.zeros((B, H + 1))}, ValueError, "`carry`"),
    "lengths": ({"seq_lengths": LENGTHS + 5}, ValueError, "`lengths`"),
    "time_major": ({"time_major": True}, TypeError, "time_axis"),
}


@pytest.mark.other_types
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_errors(name, xs):
    options, kind, match = MISTAKES[name]
    with pytest.raises(kind, match=match):
        linen.GRU(H).init(jax.random.key(0), xs, **options)


@pytest.mark.other_types
def test_mistakes_of_construction_are_errors(xs):
    key = jax.random.key(0)
    with pytest.raises(TypeError, match="gate_fn"):
        linen.LSTM(H, gate_fn=nn.relu)
    with pytest.raises(ValueError, match="CIRCULAR"):
        linen.Conv(H, 3, padding="CIRCULAR").init(key, xs)
    with pytest.raises(TypeError, match="w_h_init"):
        linen.Conv(H, 3, recurrent_kernel_init=nn.initializers.zeros).init(key, xs)
    with pytest.raises(ValueError, match="`reverse`"):
        linen.Bidirectional(linen.GRU(H), linen.GRU(H)).init(key, xs, reverse=True)
    variables = linen.LSTM(H).init(key, xs)
    with pytest.raises(TypeError, match=r"expected LSTMState\(h, c\), got list"):
        linen.LSTM(H).apply(variables, xs, initial_carry=[jnp.zeros((B, H))] * 2)


def test_example():
    assert doctest.testmod(linen).failed == 0
