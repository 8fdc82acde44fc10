"""Modules for Haiku: they train as the modules of Haiku do, and their values are those of the pure functions."""

# ruff: noqa: PLW0108  (a module of Haiku has to be created inside the transformed function)

import doctest
import subprocess
import sys
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxseq
from jaxseq import cells, convert

hk = pytest.importorskip("haiku", reason="Haiku is not installed (extra `peers`)")
optax = pytest.importorskip("optax", reason="optax is not installed (extra `examples`)")

from jaxseq.integrations import haiku as layers  # noqa: E402

pytestmark = [pytest.mark.usefixtures("as_users_have_jax"), pytest.mark.long]

B, T, D, H = 2, 7, 3, 4
KEY = jax.random.PRNGKey(0)
XS = jax.device_put(np.random.default_rng(0).standard_normal((T, B, D), np.float32))
IMAGES = jax.device_put(np.random.default_rng(1).standard_normal((B, 6, 5, 4), np.float32))
FRAMES = jax.device_put(np.random.default_rng(2).standard_normal((T, B, 6, 5, 2), np.float32))
LENGTHS = np.array([7, 4])
RESETS = np.zeros((T, B), bool)
RESETS[5, 0] = RESETS[3, 1] = True


def transformed(f, *inputs):
    """Return (apply, params) of a function of modules."""
    model = hk.without_apply_rng(hk.transform(f))
    return model.apply, model.init(KEY, *inputs)


def close(actual, expected, tolerance=1e-5):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def of_haiku(carry_and_ys):
    """Return the result of a pure function as Haiku has it."""
    carry, ys = carry_and_ys
    return ys, hk.LSTMState(*carry) if isinstance(carry, jaxseq.LSTMState) else carry


# --- Training beside the modules of Haiku ---


def losses(apply, params, inputs):
    """Return the losses of 50 steps of Adam."""
    target = 0.5 * jax.random.normal(jax.random.key(9), jax.eval_shape(apply, params, inputs).shape)
    adam = optax.adam(1e-2)

    def step(state, _):
        params, moments = state
        loss = lambda params: jnp.mean((apply(params, inputs) - target) ** 2)  # noqa: E731
        value, gradient = jax.value_and_grad(loss)(params)
        updates, moments = adam.update(gradient, moments)
        return (optax.apply_updates(params, updates), moments), value

    return jax.jit(lambda state: jax.lax.scan(step, state, None, 50)[1])((params, adam.init(params)))


def train_alike(theirs, ours, op, inputs):
    """Train two functions of a module named "core" from the same initial parameters."""
    apply, weights = transformed(theirs, inputs)
    converted = convert.from_haiku(op, weights, name="core")._asdict()
    params = {"core": {name: a for name, a in converted.items() if a is not None}}
    own_apply, own_params = transformed(ours, inputs)
    assert jax.tree.map(jnp.shape, own_params) == jax.tree.map(jnp.shape, params)
    expected = losses(apply, weights, inputs)
    assert expected[-1] < 0.97 * expected[0]
    np.testing.assert_allclose(losses(own_apply, params, inputs), expected, rtol=1e-4)


CORES = {
    "rnn": (lambda: hk.VanillaRNN(H, double_bias=False, name="core"), lambda: layers.RNN(H, name="core")),
    "classic_gru": (lambda: hk.GRU(H, name="core"), lambda: layers.GRU(H, name="core")),
    "lstm": (lambda: hk.LSTM(H, name="core"), lambda: layers.LSTM(hidden_size=H, name="core")),
}


@pytest.mark.parametrize("op", CORES)
def test_cores_train_as_those_of_haiku(op):
    theirs, ours = CORES[op]

    def unroll(xs):
        core = hk.ResetCore(theirs())
        return hk.dynamic_unroll(core, (xs, RESETS), core.initial_state(B))[0]

    train_alike(unroll, lambda xs: ours()(xs, resets=RESETS)[0], op, XS)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Conv", {"stride": 2, "feature_group_count": 2}),
        ("Conv", {"rate": 2, "padding": [(2, 0), (1, 1)], "with_bias": False}),
        ("ConvTranspose", {"stride": 2}),
        ("ConvTranspose", {"stride": (2, 1), "padding": "VALID"}),
    ],
)
def test_convolutions_train_as_those_of_haiku(name, options):
    kind = hk.ConvND if name == "Conv" else hk.ConvNDTranspose
    theirs = lambda x: kind(2, 6, (3, 2), name="core", **options)(x)  # noqa: E731
    ours = lambda x: getattr(layers, name)(2, 6, (3, 2), name="core", **options)(x)  # noqa: E731
    train_alike(theirs, ours, "conv" if name == "Conv" else "conv_transpose", IMAGES)


# --- Values and gradients of the pure functions ---


def check(layer, pure, fields, inputs, **options):
    """Compare `layer()` with `pure(params, inputs)`: outputs, state and gradient, under jit."""
    apply, params = transformed(lambda xs, **time: layer()(xs, **time), inputs)
    ((name, own),) = params.items()
    own_apply = jax.jit(partial(apply, **options))
    close(own_apply(params, inputs), of_haiku(pure(fields(**own), inputs, **options)))
    gradient = jax.grad(lambda params: jnp.sum(own_apply(params, inputs)[0] ** 2))(params)[name]
    expected = jax.grad(lambda params: jnp.sum(pure(params, inputs, **options)[1] ** 2))(fields(**own))
    close(fields(**gradient), expected, 1e-4)
    return apply, params


def test_recurrence_is_the_pure_function():
    layer = lambda: layers.Recurrence(cells.mgu, cells.mgu_init, H, reverse=True)  # noqa: E731
    pure = lambda params, xs, **time: jaxseq.recurrence(cells.mgu, params, None, xs, reverse=True, **time)  # noqa: E731
    check(layer, pure, cells.MGUParams, XS, resets=RESETS, truncation=3)
    apply, params = transformed(lambda xs: layers.Recurrence(cells.gru, jaxseq.gru_init, H, name="gru")(xs), XS)
    close(apply(params, XS), of_haiku(jaxseq.gru(jaxseq.GRUParams(**params["gru"]), None, XS)))


class LeakyParams(NamedTuple):
    w_x: jax.Array
    w_h: jax.Array
    b: jax.Array
    leak: tuple


def leaky_init(key, input_size, hidden_size, *, dtype):
    return LeakyParams(*jaxseq.rnn_init(key, input_size, hidden_size, dtype=dtype), (jnp.full(hidden_size, 0.1),))


def test_recurrence_of_a_cell_with_a_tree_of_parameters():
    step = lambda a, h, params: h + params.leak[0] * (jnp.tanh(a[0]) - h)  # noqa: E731
    leaky = jaxseq.Cell("leaky", gates="h", step=step, params=LeakyParams)
    apply, params = transformed(lambda xs: layers.Recurrence(leaky, leaky_init, H, name="leaky")(xs), XS)
    own = params["leaky"]
    pure = LeakyParams(own["w_x"], own["w_h"], own["b"], (own["leak_0"],))
    close(apply(params, XS), of_haiku(jaxseq.recurrence(leaky, pure, None, XS)))


def test_conv_lstm_is_the_pure_function():
    layer = lambda: layers.ConvLSTM(2, 3, (3, 2), stride=2)  # noqa: E731
    pure = lambda params, xs, **time: jaxseq.conv_lstm(params, None, xs, stride=2, **time)  # noqa: E731
    check(layer, pure, jaxseq.LSTMParams, FRAMES, lengths=LENGTHS)


def test_conv_lstm_of_haiku():
    def unroll(xs):
        core = hk.Conv2DLSTM((6, 5), 3, 3, name="core")
        return hk.dynamic_unroll(core, xs, core.initial_state(B))

    theirs, weights = transformed(unroll, FRAMES)
    ours, _ = transformed(lambda xs: layers.ConvLSTM(2, 3, 3, name="core")(xs), FRAMES)
    close(ours({"core": convert.from_haiku("conv_lstm", weights)._asdict()}, FRAMES), theirs(weights, FRAMES))


def test_causal_conv_is_the_pure_function():
    layer = lambda: layers.CausalConv(6, 3, rate=2, feature_group_count=3)  # noqa: E731
    pure = lambda params, xs, **time: jaxseq.causal_conv(params, None, xs, dilation=2, groups=3, **time)  # noqa: E731
    check(layer, pure, jaxseq.ConvParams, XS, resets=RESETS)
    apply, params = transformed(lambda *args: layer()(*args), XS)
    first, state = apply(params, XS[:3])
    close(jnp.concatenate([first, apply(params, XS[3:], state)[0]]), apply(params, XS)[0])


def example_stack(xs, *state, **options):
    both = layers.Bidirectional(layers.LSTM(H), layers.LSTM(2))
    return layers.Stack([layers.GRU(H), both, layers.CausalConv(H, 2)], residual=False)(xs, *state, **options)


def test_stack_and_bidirectional_are_the_pure_functions():
    model = hk.transform(example_stack)
    params = model.init(KEY, XS)
    assert set(params) == {"gru", "lstm", "lstm_1", "causal_conv"}
    pure_params = [
        cells.ClassicGRUParams(**params["gru"]),
        [jaxseq.LSTMParams(**params["lstm"]), jaxseq.LSTMParams(**params["lstm_1"])],
        jaxseq.ConvParams(**params["causal_conv"]),
    ]
    functions = [cells.classic_gru, partial(jaxseq.bidirectional, jaxseq.lstm), jaxseq.causal_conv]
    pure = partial(jaxseq.stack, functions)
    gru, pair, carry = (expected := pure(pure_params, None, XS))[0]
    expected = expected[1], (gru, tuple(hk.LSTMState(*state) for state in pair), carry)
    close(jax.jit(model.apply)(params, None, XS), expected)
    close(
        model.apply(params, None, XS[3:], model.apply(params, None, XS)[1])[0],
        pure(pure_params, (gru, pair, carry), XS[3:])[1],
    )

    gradient = jax.grad(lambda params: jnp.sum(model.apply(params, None, XS)[0] ** 2))(params)
    pure_gradient = jax.grad(lambda params: jnp.sum(pure(params, None, XS)[1] ** 2))(pure_params)
    close(jaxseq.LSTMParams(**gradient["lstm_1"]), pure_gradient[1][1])
    close(cells.ClassicGRUParams(**gradient["gru"]), pure_gradient[0])


def test_dropout_of_a_stack():
    two = lambda xs, **options: layers.Stack([layers.LSTM(H), layers.GRU(2)])(xs, **options)  # noqa: E731
    model = hk.transform(two)
    rates = {"dropout": 0.3, "recurrent_dropout": 0.2, "zoneout": 0.1}
    params = model.init(KEY, XS, **rates)
    pure_params = [jaxseq.LSTMParams(**params["lstm"]), cells.ClassicGRUParams(**params["gru"])]
    expected = jaxseq.stack([jaxseq.lstm, cells.classic_gru], pure_params, None, XS, key=KEY, **rates)[1]
    close(model.apply(params, None, XS, key=KEY, **rates)[0], expected)
    drawn = [model.apply(params, key, XS, dropout=0.5)[0] for key in jax.random.split(KEY)]
    assert np.any(drawn[0] != drawn[1])
    with pytest.raises(ValueError, match="`key`"):
        model.apply(params, None, XS, dropout=0.5)


# --- Conventions of Haiku ---


def test_states_and_lengths_of_an_lstm():
    apply, params = transformed(lambda xs, *state, **time: layers.LSTM(H)(xs, *state, **time), XS)
    h, c = jnp.full((B, H), 0.5), jnp.full((B, H), -2.0)
    pure = partial(jaxseq.lstm, jaxseq.LSTMParams(**params["lstm"]))
    expected = of_haiku(pure(jaxseq.LSTMState(h, c), XS, lengths=LENGTHS))
    close(apply(params, XS, hk.LSTMState(hidden=h, cell=c), lengths=LENGTHS), expected)
    first, state = apply(params, XS[:3])
    close(jnp.concatenate([first, apply(params, XS[3:], state)[0]]), apply(params, XS)[0])
    close(apply(params, XS.swapaxes(0, 1), time_axis=1)[0].swapaxes(0, 1), apply(params, XS)[0])


def test_initializers_and_biases():
    init = {"w_i_init": hk.initializers.Constant(2), "w_h_init": jnp.ones, "b_init": hk.initializers.RandomNormal()}
    _, params = transformed(lambda xs: layers.GRU(H, **init)(xs), XS)
    assert np.all(params["gru"]["w_x"] == 2)
    assert np.all(params["gru"]["w_h"] == 1)
    assert np.all(params["gru"]["w_q"] == 1)
    assert np.all(params["gru"]["b"] != 0)
    _, params = transformed(lambda x: layers.Conv(2, 6, 3, w_init=jnp.ones, b_init=jnp.ones)(x), IMAGES)
    assert all(np.all(a == 1) for a in params["conv"].values())
    _, params = transformed(lambda xs: layers.LSTM(H)(xs), XS)
    close(params["lstm"]["b"], jaxseq.lstm_init(KEY, D, H).b)
    _, params = transformed(lambda xs: layers.ConvLSTM(2, 3, 3, with_bias=False)(xs), FRAMES)
    assert set(params["conv_lstm"]) == {"w_x", "w_h"}
    _, params = transformed(lambda xs: layers.CausalConv(3, 3, with_bias=False)(xs), XS)
    assert set(params["causal_conv"]) == {"kernel"}


def test_dtypes_and_tools():
    xs = jnp.asarray(XS, jnp.bfloat16)
    apply, params = transformed(lambda xs: layers.LSTM(H)(xs), xs)
    assert {a.dtype for a in params["lstm"].values()} == {jnp.dtype(jnp.bfloat16)}
    ys, state = apply(params, xs)
    assert (ys.dtype, state.cell.dtype) == (jnp.bfloat16, jnp.float32)
    assert "lstm" in hk.experimental.tabulate(lambda xs: layers.LSTM(H)(xs))(XS)
    _, params = transformed(lambda xs: [layer(layer(xs)[0])[0] for layer in [layers.RNN(D)]], XS)
    assert set(params) == {"rnn"}  # called twice: one set of parameters


MISTAKES = {
    "option": (lambda xs: layers.LSTM(H)(xs, seq_lengths=LENGTHS), TypeError, "seq_lengths"),
    "option of the constructor": (lambda xs: layers.LSTM(H, double_bias=True)(xs), TypeError, "double_bias"),
    "initializer": (lambda xs: layers.LSTM(H, w_init=jnp.ones)(xs), TypeError, "kernel_init"),
    "input_shape": (lambda xs: layers.ConvLSTM(1, (6,), 3, 3)(xs), TypeError, "positional"),
    "axes": (lambda xs: layers.Conv(2, H, (3, 3, 3))(xs), ValueError, "`kernel_shape`.*2 spatial axes"),
    "stride": (lambda xs: layers.CausalConv(H, 3, stride=2)(xs), TypeError, "stride"),
    "plain tuple as state": (lambda xs: layers.LSTM(H)(xs, (xs[0], xs[0])), TypeError, "`carry`"),
    "dtype": (lambda xs: layers.LSTM(H)(xs.astype(int)), TypeError, "dtype"),
}


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.other_types
def test_mistakes(name):
    call, kind, match = MISTAKES[name]
    with pytest.raises(kind, match=match):
        hk.transform(call).init(KEY, XS)


def test_docstring_example():
    result = doctest.testmod(layers)
    assert result.failed == 0
    assert result.attempted == 3


def test_jaxseq_does_not_import_haiku():
    code = "import sys, jaxseq; assert not {'jaxseq.integrations', 'haiku'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_state_of_haiku_after_a_reset():
    first = hk.LSTMState(jnp.full((B, H), 0.5), jnp.full((B, H), -0.25))
    resets = np.zeros((T, B), bool)
    resets[0] = True
    marked, params = transformed(lambda xs: layers.LSTM(H)(xs, resets=resets, reset_state=first)[0], XS)
    started, _ = transformed(lambda xs: layers.LSTM(H)(xs, first)[0], XS)
    np.testing.assert_allclose(marked(params, XS), started(params, XS), rtol=1e-5)
