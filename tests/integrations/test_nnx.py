"""`jaxseq.integrations.nnx`: training as in Flax, values of the functions of jaxseq, carries, dtypes, errors."""

import doctest
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxseq
from jaxseq import cells, convert, linear_maps

nnx = pytest.importorskip("flax.nnx", reason="Flax is not installed (extra `peers`)")
optax = pytest.importorskip("optax", reason="optax is not installed (extra `examples`)")
ours = import_module("jaxseq.integrations.nnx")

pytestmark = [pytest.mark.usefixtures("as_users_have_jax"), pytest.mark.long]

B, T, D, H = 3, 6, 4, 5
LENGTHS = np.array([6, 2, 4], np.int32)
CELLS = {"rnn": ("SimpleCell", "RNN"), "gru": ("GRUCell", "GRU"), "lstm": ("OptimizedLSTMCell", "LSTM")}
CONVOLUTIONS = {
    "conv": ("Conv", ((3,), 2), {"kernel_dilation": 2}),
    "conv_transpose": ("ConvTranspose", ((3,), (2,)), {}),
}


@pytest.fixture
def xs():
    return jax.random.normal(jax.random.key(0), (B, T, D), jnp.float32)


@pytest.fixture
def rngs():
    return nnx.Rngs(0)


def close(found, expected, tolerance=1e-5):
    found, expected = jax.tree.leaves(found), jax.tree.leaves(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=tolerance, atol=tolerance)


def shapes(layer):
    return jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(layer, nnx.Param)))


def pair(name, rngs):
    """Return a layer of Flax and ours with the same parameters."""
    if name in CELLS:
        cell, layer = CELLS[name]
        theirs = nnx.RNN(getattr(nnx, cell)(D, H, rngs=rngs), rngs=False)
        found, params = getattr(ours, layer)(D, H, rngs=rngs), convert.from_nnx(name, theirs.cell)
    else:
        layer, sizes, options = CONVOLUTIONS[name]
        theirs, found = (getattr(module, layer)(D, H, *sizes, **options, rngs=rngs) for module in (nnx, ours))
        params = convert.from_nnx(name, theirs)
    arrays = {field: a for field, a in params._asdict().items() if a is not None}
    assert shapes(found) == jax.tree.map(jnp.shape, arrays)
    nnx.update(found, arrays)
    return theirs, found


def zero_carry(name):
    zeros = jnp.zeros((B, H))
    return {"initial_carry": (zeros, zeros) if name == "lstm" else zeros} if name in CELLS else {}


def losses(module, xs, **options):
    """Return the losses of 50 steps of Adam."""
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    target = jax.random.normal(jax.random.key(9), module(xs, **options).shape, jnp.float32)
    adam = optax.adam(1e-2)

    def step(state, _):
        params, moments = state
        loss = lambda params: jnp.mean((nnx.merge(graph, params, rest)(xs, **options) - target) ** 2)  # noqa: E731
        value, grads = jax.value_and_grad(loss)(params)
        updates, moments = adam.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    return jax.jit(lambda p: jax.lax.scan(step, (p, adam.init(p)), None, 50)[1])(params)


@pytest.mark.parametrize("name", [*CELLS, *CONVOLUTIONS])
def test_trains_as_in_flax(name, xs, rngs):
    theirs, found = pair(name, rngs)
    expected = losses(theirs, xs, **zero_carry(name))
    assert expected[-1] < 0.98 * expected[0]
    np.testing.assert_allclose(losses(found, xs), expected, rtol=1e-4)


def mgu(params, carry, xs, **time):
    return jaxseq.recurrence(cells.mgu, params, carry, xs, **time)


def both(*args, **time):
    return jaxseq.bidirectional([jaxseq.gru, jaxseq.lstm], *args, **time)


def causal(*args, **time):
    return jaxseq.causal_conv(*args, dilation=2, groups=2, **time)


RESETS = jnp.zeros((B, T), bool).at[0, 3].set(True)
PURE = {
    "recurrence": (
        lambda rngs: ours.Recurrence(cells.mgu, cells.mgu_init, D, H, rngs=rngs),
        mgu,
        {"resets": RESETS, "checkpoint": "auto"},
    ),
    "bidirectional": (
        lambda rngs: ours.Bidirectional(ours.GRU(D, H, rngs=rngs), ours.LSTM(D, 2, rngs=rngs)),
        both,
        {"lengths": LENGTHS},
    ),
    "stack": (
        lambda rngs: ours.Stack(
            [
                ours.RNN(D, D, rngs=rngs),
                ours.Bidirectional(ours.GRU(D, 1, rngs=rngs), ours.LSTM(D, 3, rngs=rngs)),
            ]
        ),
        lambda *args, **time: jaxseq.stack([jaxseq.rnn, both], *args, **time),
        {"lengths": LENGTHS, "truncation": 4, "residual": True},
    ),
    "causal_conv": (
        lambda rngs: ours.CausalConv(D, 2 * D, 3, kernel_dilation=2, feature_group_count=2, rngs=rngs),
        causal,
        {"resets": RESETS},
    ),
}


@pytest.mark.parametrize("name", PURE)
def test_values_and_gradients_of_the_function(name, xs, rngs):
    make, pure, time = PURE[name]
    layer = make(rngs)
    params = layer._params()
    found = nnx.jit(lambda m, xs: m(xs, return_carry=True, **time))(layer, xs)
    close(found, pure(params, None, xs, time_axis=-2, **time))
    grads = nnx.jit(nnx.grad(lambda m, xs: jnp.sum(m(xs, **time) ** 2)))(layer, xs)
    expected = jax.jit(jax.grad(lambda p: jnp.sum(pure(p, None, xs, time_axis=-2, **time)[1] ** 2)))(params)
    by_size = lambda tree: sorted(jax.tree.leaves(tree), key=lambda a: (a.shape, float(jnp.sum(a))))  # noqa: E731
    close(by_size(grads), by_size(expected), 1e-4)
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(grads))


def test_conv_lstm(rngs):
    images = jax.random.normal(jax.random.key(2), (2, 3, 6, 5, D))
    layer = ours.ConvLSTM(D, 2, (3, 2), strides=(2, 1), use_bias=False, rngs=rngs)
    assert shapes(layer) == {"w_x": (3, 2, D, 8), "w_h": (3, 2, 2, 8)}
    state, ys = jaxseq.conv_lstm(layer._params(), None, images, stride=(2, 1), time_axis=1)
    close(nnx.jit(lambda m, xs: m(xs, return_carry=True))(layer, images), ((state.c, state.h), ys))
    grads = nnx.grad(lambda m: jnp.sum(m(images) ** 2))(layer)
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(grads))
    stack = ours.Stack([layer, ours.ConvLSTM(2, 3, (1, 1), rngs=rngs)])
    assert stack(images).shape == (2, 3, 3, 5, 3)


def test_chunks(xs, rngs):
    peephole = ours.Recurrence(cells.peephole_lstm, cells.peephole_lstm_init, H, H, rngs=rngs)
    lstm = ours.LSTM(D, H, rngs=rngs)
    causal_conv = ours.CausalConv(D, H, 3, rngs=rngs)
    for layer in (lstm, ours.GRU(D, H, rngs=rngs), causal_conv, ours.Stack([lstm, peephole])):
        carry, first = layer(xs[:, :2], return_carry=True)
        last = layer(xs[:, 2:], initial_carry=carry)
        close(jnp.concatenate([first, last], 1), layer(xs))


def test_carry_and_lengths_as_in_flax(xs, rngs):
    theirs, layer = pair("lstm", rngs)
    initial = tuple(jax.random.normal(jax.random.key(k), (B, H)) for k in (1, 2))
    options = {"initial_carry": initial, "seq_lengths": LENGTHS, "return_carry": True}
    (c, h), ys = theirs(xs, **options)
    mask = (jnp.arange(T) < LENGTHS[:, None])[..., None]
    close(layer(xs, **options), ((c, h), ys * mask))
    options = {"initial_carry": initial, "seq_lengths": LENGTHS, "reverse": True}
    close(layer(xs, **options), theirs(xs, keep_order=True, **options) * mask)
    close(layer(xs[0]), layer(xs)[0])  # no batch axis
    close(layer(xs.swapaxes(0, 1), time_axis=0).swapaxes(0, 1), layer(xs))


def test_dtypes(xs, rngs):
    layer = ours.LSTM(D, H, dtype=jnp.bfloat16, rngs=rngs)
    assert {a.dtype for a in jax.tree.leaves(nnx.state(layer))} == {jnp.dtype("float32")}
    (c, _), ys = layer(xs, return_carry=True)
    assert (ys.dtype, c.dtype) == (jnp.bfloat16, jnp.float32)
    exact = ours.LSTM(D, H, rngs=rngs)
    nnx.update(exact, nnx.state(layer))
    close(ys, exact(xs), 3e-2)
    assert exact(xs.astype(jnp.bfloat16)).dtype == jnp.float32  # promoted, as in Flax
    half = ours.Conv(D, H, 3, param_dtype=jnp.bfloat16, rngs=rngs)
    assert {a.dtype for a in jax.tree.leaves(nnx.state(half))} == {jnp.dtype("bfloat16")}
    assert ours.Conv(D, H, 3, dtype=jnp.bfloat16, rngs=rngs)(xs).dtype == jnp.bfloat16


def test_initializers_and_biases(xs, rngs):
    two, three = nnx.initializers.constant(2.0), nnx.initializers.constant(3.0)
    gru = ours.GRU(D, H, kernel_init=two, recurrent_kernel_init=three, rngs=rngs)
    assert jnp.all(gru.w_x[...] == 2)
    assert jnp.all(gru.w_h[...] == 3)
    for make in (ours.Conv, ours.ConvTranspose, ours.CausalConv):
        layer = make(D, H, 3, kernel_init=two, use_bias=False, rngs=rngs)
        assert {*shapes(layer)} == {"kernel"}
        assert jnp.all(layer.kernel[...] == 2)
        assert layer(xs).shape == (B, T, H)
    for make in (ours.RNN, ours.GRU, ours.LSTM):
        layer = make(in_features=D, hidden_features=H, use_bias=False, rngs=rngs)
        assert {*shapes(layer)} == {"w_x", "w_h"}
        assert layer(xs).shape == (B, T, H)
    relu = ours.RNN(D, H, activation_fn=nnx.relu, rngs=rngs)
    close(relu(xs), jaxseq.rnn(relu._params(), None, xs, activation="relu", time_axis=1)[1])


def test_dropout_draws_from_the_rngs(xs, rngs):
    layers = [ours.LSTM(D, H, rngs=rngs), ours.LSTM(H, H, rngs=rngs)]
    layer, rates = ours.Stack(layers, rngs=rngs), {"dropout": 0.5, "recurrent_dropout": 0.2, "zoneout": 0.1}
    train = nnx.jit(lambda m, xs: m(xs, **rates))
    a, b = train(layer, xs), train(layer, xs)
    assert jnp.max(jnp.abs(a - b)) > 1e-3  # the count of the rngs advances, also under `nnx.jit`
    assert jnp.max(jnp.abs(a - layer(xs))) > 1e-3
    close(layer(xs), layer(xs), 0)
    with pytest.raises(ValueError, match="`key`"):
        ours.Stack(layers)(xs, dropout=0.5)


def test_optimizer_and_split_of_flax(xs, rngs):
    recurrence = ours.Recurrence(cells.mgu, cells.mgu_init, H, H, rngs=rngs)
    model = nnx.Sequential(ours.LSTM(D, H, rngs=rngs), recurrence, nnx.Linear(H, 2, rngs=rngs))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        value, grads = nnx.value_and_grad(lambda m: jnp.mean(m(xs) ** 2))(model)
        optimizer.update(model, grads)
        return value

    first = step(model, optimizer)
    assert step(model, optimizer) < first
    graph, state = nnx.split(model)
    close(jax.jit(lambda state: nnx.merge(graph, state)(xs))(state), model(xs))
    hash(graph)


MISTAKES = {
    "unknown": ({"mask": LENGTHS}, TypeError, "unexpected keyword argument 'mask'"),
    "carry": ({"initial_carry": jnp.zeros((B, H + 1))}, ValueError, "`carry`"),
    "lengths": ({"seq_lengths": LENGTHS + 5}, ValueError, "`lengths`"),
    "time_major": ({"time_major": True}, TypeError, "time_axis"),
}


@pytest.mark.other_types
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_errors(name, xs, rngs):
    options, kind, match = MISTAKES[name]
    with pytest.raises(kind, match=match):
        ours.GRU(D, H, rngs=rngs)(xs, **options)


@pytest.mark.other_types
def test_mistakes_of_construction_are_errors(xs, rngs):
    with pytest.raises(TypeError, match="gate_fn"):
        ours.LSTM(D, H, gate_fn=nnx.relu, rngs=rngs)(xs)
    with pytest.raises(ValueError, match="CIRCULAR"):
        ours.Conv(D, H, 3, padding="CIRCULAR", rngs=rngs)(xs)
    with pytest.raises(TypeError, match="w_h_init"):
        ours.Conv(D, H, 3, recurrent_kernel_init=nnx.initializers.zeros, rngs=rngs)
    with pytest.raises(ValueError, match="`reverse`"):
        ours.Bidirectional(ours.GRU(D, H, rngs=rngs), ours.GRU(D, H, rngs=rngs))(xs, reverse=True)
    with pytest.raises(TypeError, match=r"expected LSTMState\(h, c\), got list"):
        ours.LSTM(D, H, rngs=rngs)(xs, initial_carry=[jnp.zeros((B, H))] * 2)
    with pytest.raises(ValueError, match="w_x"):
        ours.LSTM(D + 1, H, rngs=rngs)(xs)


def test_example():
    assert doctest.testmod(ours).failed == 0


def test_evaluation_turns_dropout_off():
    stack = ours.Stack([ours.LSTM(D, H, rngs=nnx.Rngs(0)), ours.LSTM(H, H, rngs=nnx.Rngs(1))], rngs=nnx.Rngs(2))
    xs = jnp.ones((B, T, D))
    assert not np.array_equal(stack(xs, dropout=0.5), stack(xs))
    stack.eval()
    np.testing.assert_array_equal(stack(xs, dropout=0.5, recurrent_dropout=0.5), stack(xs))


def test_options_of_the_constructor_and_of_the_call():
    """The axis of time by both, and the kernel size by name; the state after a reset is (c, h) as the carry."""
    time_first = ours.LSTM(D, H, time_axis=0, rngs=nnx.Rngs(0))
    xs = jnp.arange(T * B * D, dtype=jnp.float32).reshape(T, B, D) / 100
    expected = ours.LSTM(D, H, rngs=nnx.Rngs(0))(xs.swapaxes(0, 1))
    np.testing.assert_allclose(time_first(xs).swapaxes(0, 1), expected, rtol=1e-5)
    np.testing.assert_allclose(time_first(xs.swapaxes(0, 1), time_axis=1), expected, rtol=1e-5)
    sizes = {"in_features": D, "out_features": H, "kernel_size": 3}
    assert ours.CausalConv(**sizes, rngs=nnx.Rngs(0))(xs).shape == (T, B, H)
    assert ours.ConvLSTM(**sizes, rngs=nnx.Rngs(0))(jnp.ones((B, T, 6, D))).shape == (B, T, 6, H)
    c, h = jnp.full((T, H), 0.5), jnp.full((T, H), -0.25)
    resets = jnp.zeros((T, B), bool).at[:, 0].set(True)  # the batch is T here
    layer = ours.LSTM(D, H, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(layer(xs, resets=resets, reset_state=(c, h)), layer(xs, initial_carry=(c, h)), rtol=1e-5)


def test_side_inputs_of_a_cell():
    """They reach the step as they are, integers too, beside an input in another dtype."""

    def step(a, h, side):
        keep = jnp.exp(-side["dt"])[..., None]
        sign = jnp.where(side["action"] == 1, -1.0, 1.0)[..., None]
        return keep * h + (1 - keep) * sign * jnp.tanh(a[0])

    cell = jaxseq.Cell("irregular", "h", step, jaxseq.RNNParams, side_inputs=True)
    side = {"dt": jnp.full((B, T), 0.3), "action": jnp.arange(B * T).reshape(B, T) % 2}
    xs = jnp.ones((B, T, D))
    layer = ours.Recurrence(cell, jaxseq.rnn_init, D, H, rngs=nnx.Rngs(0))
    expected = jaxseq.recurrence(cell, layer._params(), None, (xs, side), time_axis=1)[1]
    np.testing.assert_allclose(layer((xs, side)), expected, rtol=1e-6)
    stack = ours.Stack([layer, ours.GRU(H, H, rngs=nnx.Rngs(1))])
    assert stack((xs, side), zoneout=0.1).shape == (B, T, H)


def test_the_axis_of_time_before_heads():
    """The weights of a block-diagonal input map have as many axes as a kernel of two spatial axes."""
    cell = cells.mgu._replace(name="heads", input=linear_maps.BlockDiagonal())

    def init(key, D, H, dtype=jnp.float32):
        first, second = jax.random.split(key)
        w_x = jax.random.normal(first, (2, D // 2, 2, H // 2), dtype)
        return cells.MGUParams(w_x, jax.random.normal(second, (H, 2 * H), dtype), None, None)

    layer = ours.Recurrence(cell, init, 6, 4, rngs=nnx.Rngs(0))
    xs = jnp.arange(2.0 * 3 * 5 * 6).reshape(2, 3, 5, 6) / 100
    expected = jaxseq.recurrence(cell, layer._params(), None, xs, time_axis=-2)[1]
    np.testing.assert_allclose(layer(xs), expected, rtol=1e-6)
    both = ours.Bidirectional(layer, layer)
    np.testing.assert_allclose(both(xs)[..., :4], expected, rtol=1e-6)
