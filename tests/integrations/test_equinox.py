"""Modules for Equinox: they train as the layers of Equinox do, and their values are those of the pure functions."""

import doctest
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxseq
from jaxseq import cells, convert

eqx = pytest.importorskip("equinox", reason="Equinox is not installed (extra `peers`)")
optax = pytest.importorskip("optax", reason="optax is not installed (extra `examples`)")

from jaxseq.integrations import equinox as layers  # noqa: E402

pytestmark = [pytest.mark.usefixtures("as_users_have_jax"), pytest.mark.long]

B, T, D, H = 2, 7, 3, 4
KEY = jax.random.PRNGKey(0)
XS = jax.device_put(np.random.default_rng(0).standard_normal((B, T, D), np.float32))
IMAGES = jax.device_put(np.random.default_rng(1).standard_normal((B, 4, 6, 5), np.float32))  # channels first
FRAMES = jax.device_put(np.random.default_rng(2).standard_normal((B, T, 2, 6, 5), np.float32))
LENGTHS = np.array([7, 4])
RESETS = np.zeros((B, T), bool)
RESETS[0, 5] = RESETS[1, 3] = True


def close(actual, expected, tolerance=1e-5):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def to_last(tree):
    """Return images with channels last, as jaxseq has them."""
    return jax.tree.map(lambda a: jnp.moveaxis(a, -3, -1), tree)


def squares(f):
    """Return the loss of a function that returns outputs, or `(hidden, outputs)`."""
    return lambda *args: jnp.sum(jax.tree.leaves(f(*args))[-1] ** 2)


# --- Training beside the layers of Equinox ---


def losses(model, outputs):
    """Return the losses of 50 steps of Adam."""
    params, static = eqx.partition(model, eqx.is_inexact_array)
    shape = jax.eval_shape(lambda params: outputs(eqx.combine(params, static)), params).shape
    target, adam = 0.5 * jax.random.normal(jax.random.key(9), shape), optax.adam(1e-2)

    def step(state, _):
        params, moments = state
        loss = lambda params: jnp.mean((outputs(eqx.combine(params, static)) - target) ** 2)  # noqa: E731
        value, gradient = jax.value_and_grad(loss)(params)
        updates, moments = adam.update(gradient, moments)
        return (optax.apply_updates(params, updates), moments), value

    return jax.jit(lambda state: jax.lax.scan(step, state, None, 50)[1])((params, adam.init(params)))


def with_params(layer, params):
    assert jax.tree.map(jnp.shape, layer.params) == jax.tree.map(jnp.shape, params)
    return eqx.tree_at(lambda layer: layer.params, layer, params)


def train_alike(theirs, ours):
    expected = losses(*theirs)
    assert expected[-1] < 0.97 * expected[0]
    np.testing.assert_allclose(losses(*ours), expected, rtol=1e-4)


class RNNCell(eqx.Module):
    """Equinox has no such cell: one from its linear layers."""

    of_x: eqx.nn.Linear
    of_h: eqx.nn.Linear

    def __call__(self, x, h):
        return jax.nn.relu(self.of_x(x) + self.of_h(h))


def scanned(cell, zero):
    """Return h of all steps, `(B, T, H)`."""

    def one(xs):
        def step(state, x):
            state = cell(x, state)
            return state, jax.tree.leaves(state)[0]

        return jax.lax.scan(step, zero, xs)[1]

    return jax.vmap(one)(XS)


def test_rnn_trains_as_a_cell_of_equinox():
    ours = layers.RNN(D, H, activation="relu", key=KEY)
    cell = RNNCell(eqx.nn.Linear(D, H, key=KEY), eqx.nn.Linear(H, H, use_bias=False, key=KEY))
    ours = with_params(ours, jaxseq.RNNParams(cell.of_x.weight.T, cell.of_h.weight.T, cell.of_x.bias))
    train_alike((cell, lambda cell: scanned(cell, jnp.zeros(H))), (ours, lambda layer: layer(XS)[1]))


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("op", ["gru", "lstm"])
def test_cells_train_as_those_of_equinox(op, use_bias):
    cell = getattr(eqx.nn, f"{op.upper()}Cell")(D, H, use_bias=use_bias, key=KEY)
    ours = getattr(layers, op.upper())(input_size=D, hidden_size=H, use_bias=use_bias, key=KEY)
    ours = with_params(ours, convert.from_equinox(op, cell))
    zero = (jnp.zeros(H), jnp.zeros(H)) if op == "lstm" else jnp.zeros(H)
    train_alike((cell, lambda cell: scanned(cell, zero)), (ours, lambda layer: layer(XS)[1]))


@pytest.mark.parametrize(
    ("name", "op", "options"),
    [
        ("Conv", "conv", {"stride": 2, "padding": 1, "groups": 2}),
        ("Conv", "conv", {"padding": "SAME", "dilation": (2, 1), "use_bias": False}),
        ("ConvTranspose", "conv_transpose", {"stride": 2, "padding": ((1, 0), (0, 1))}),
        ("ConvTranspose", "conv_transpose", {"stride": (2, 1), "padding": "SAME", "groups": 2}),
    ],
)
def test_convolutions_train_as_those_of_equinox(name, op, options):
    theirs = getattr(eqx.nn, name)(2, 4, 6, kernel_size=3, key=KEY, **options)
    ours = getattr(layers, name)(2, 4, 6, kernel_size=3, key=KEY, **options)
    ours = with_params(ours, convert.from_equinox(op, theirs))
    train_alike((theirs, lambda layer: jax.vmap(layer)(IMAGES)), (ours, lambda layer: layer(IMAGES, key=KEY)))


# --- Values and gradients of the pure functions ---


def test_recurrence_is_the_pure_function():
    layer = layers.Recurrence(cells.mgu, cells.mgu_init, D, H, truncation=3, key=KEY)
    pure = lambda params: jaxseq.recurrence(  # noqa: E731
        cells.mgu, params, None, XS, truncation=3, time_axis=1, reverse=True, resets=RESETS
    )
    close(eqx.filter_jit(layer)(XS, reverse=True, resets=RESETS), pure(layer.params))
    gradient = eqx.filter_grad(squares(lambda layer: layer(XS, reverse=True, resets=RESETS)))(layer)
    close(gradient.params, jax.grad(squares(pure))(layer.params))
    plain = jaxseq.recurrence(cells.mgu, layer.params, None, XS, time_axis=1)
    assert np.any(jax.grad(squares(lambda params: plain))(layer.params).w_h != gradient.params.w_h)
    projected = layers.Recurrence(cells.projected_lstm, cells.projected_lstm_init, D, H, projection_size=2, key=KEY)
    assert projected(XS[0])[1].shape == (T, 2)


def test_states_and_lengths_of_an_lstm():
    lstm = layers.LSTM(D, H, key=KEY)
    h, c = jnp.full((B, H), 0.5), jnp.full((B, H), -2.0)
    expected = jaxseq.lstm(lstm.params, jaxseq.LSTMState(h, c), XS, time_axis=1, lengths=LENGTHS)
    close(lstm(XS, (h, c), lengths=LENGTHS), expected)  # the state of eqx.nn.LSTMCell
    close(lstm(XS, jaxseq.LSTMState(h, c), lengths=LENGTHS), expected)
    hidden, first = lstm(XS[:, :3])
    close(jnp.concatenate([first, lstm(XS[:, 3:], hidden)[1]], 1), lstm(XS)[1])
    close(jax.vmap(lstm)(XS)[1], lstm(XS)[1])
    close(lstm(XS.swapaxes(0, 1), time_axis=0)[1].swapaxes(0, 1), lstm(XS)[1])


def test_causal_conv_is_the_pure_function():
    layer = layers.CausalConv(D, 6, 3, dilation=2, groups=3, key=KEY)
    pure = lambda params: jaxseq.causal_conv(params, None, XS, dilation=2, groups=3, resets=RESETS, time_axis=1)  # noqa: E731
    close(eqx.filter_jit(layer)(XS, resets=RESETS), pure(layer.params))
    gradient = eqx.filter_grad(squares(lambda layer: layer(XS, resets=RESETS)))(layer)
    close(gradient.params, jax.grad(squares(pure))(layer.params))
    hidden, first = layer(XS[:, :3])
    close(jnp.concatenate([first, layer(XS[:, 3:], hidden)[1]], 1), layer(XS)[1])


def test_conv_lstm_is_the_pure_function():
    layer = layers.ConvLSTM(2, 2, 3, (3, 2), stride=2, key=KEY)
    pure = lambda params, carry=None, **time: jaxseq.conv_lstm(  # noqa: E731
        params, carry, to_last(FRAMES), stride=2, time_axis=1, **time
    )
    hidden, ys = eqx.filter_jit(layer)(FRAMES)
    assert hidden.c.shape == (B, 3, 3, 3)
    assert ys.shape == (B, T, 3, 3, 3)
    close(to_last((hidden, ys)), pure(layer.params))
    time = {"lengths": LENGTHS, "resets": RESETS}
    close(to_last(layer(FRAMES, tuple(hidden), **time)), pure(layer.params, to_last(hidden), **time))
    gradient = eqx.filter_grad(squares(lambda layer: layer(FRAMES)))(layer)
    close(gradient.params, jax.grad(squares(pure))(layer.params), 1e-4)


def example_stack(**options):
    keys = jax.random.split(KEY, 4)
    both = layers.Bidirectional(layers.GRU(H, H, key=keys[1]), layers.GRU(H, 2, key=keys[2]))
    return layers.Stack([layers.LSTM(D, H, key=keys[0]), both], **options)


def test_stack_and_bidirectional_are_the_pure_functions():
    stack = example_stack(dropout=0.3, recurrent_dropout=0.2)
    lstm, both = stack.params
    params = [lstm.params, [both.params[0].params, both.params[1].params]]
    functions = [jaxseq.lstm, partial(jaxseq.bidirectional, jaxseq.gru)]
    pure = lambda params, **options: jaxseq.stack(  # noqa: E731
        functions, params, None, XS, time_axis=1, lengths=LENGTHS, **options
    )
    with_dropout = pure(params, key=KEY, dropout=0.3, recurrent_dropout=0.2)
    close(eqx.filter_jit(stack)(XS, key=KEY, lengths=LENGTHS), with_dropout)
    evaluated = eqx.nn.inference_mode(stack)
    close(evaluated(XS, key=KEY, lengths=LENGTHS), pure(params))
    assert np.any(with_dropout[1] != pure(params)[1])
    with pytest.raises(ValueError, match="`key`"):
        stack(XS)

    hidden, _ = evaluated(XS[:, :3])
    assert evaluated(XS[:, 3:], hidden)[1].shape == (B, T - 3, H + 2)
    gradient = eqx.filter_grad(squares(lambda stack: stack(XS, lengths=LENGTHS)))(evaluated)
    expected = jax.grad(squares(pure))(params)
    close(gradient.params[0].params, expected[0])
    trained = lambda params: (params.w_x, params.w_h, params.b_x, params.b_h[-2:])  # noqa: E731
    close(trained(gradient.params[1].params[1].params), trained(expected[1][1]))


def test_stack_of_images_has_channels_first():
    stack = layers.Stack([layers.ConvLSTM(2, 2, 2, 3, key=KEY), layers.ConvLSTM(2, 2, 2, 3, key=KEY)], residual=True)
    params = [layer.params for layer in stack.params]
    expected = jaxseq.stack(jaxseq.conv_lstm, params, None, to_last(FRAMES), time_axis=1, residual=True)
    close(to_last(stack(FRAMES)), expected)
    both = layers.Bidirectional(*stack.params)
    expected = jaxseq.bidirectional(jaxseq.conv_lstm, params, None, to_last(FRAMES), time_axis=1)
    close(to_last(both(FRAMES)), expected)


# --- Conventions of Equinox ---


def test_only_the_part_of_n_is_trained_in_the_recurrent_bias_of_a_gru():
    params = jaxseq.gru_init(KEY, D, H)._replace(b_h=0.1 * jnp.arange(3.0 * H))
    gru = with_params(layers.GRU(D, H, key=KEY), params)
    close(gru(XS), jaxseq.gru(params, None, XS, time_axis=1))
    gradient = eqx.filter_grad(squares(lambda gru: gru(XS)))(gru).params.b_h
    assert np.array_equal(gradient != 0, np.arange(3 * H) >= 2 * H)


def test_dtypes_and_biases():
    lstm = layers.LSTM(D, H, dtype=jnp.bfloat16, key=KEY)
    assert {a.dtype for a in jax.tree.leaves(lstm)} == {jnp.dtype(jnp.bfloat16)}
    hidden, ys = lstm(jnp.asarray(XS, jnp.bfloat16))
    assert (hidden.h.dtype, ys.dtype) == (jnp.float32, jnp.bfloat16)
    with jax.enable_x64(True):
        assert layers.Conv(1, 2, 3, 3, key=KEY).params.kernel.dtype == jnp.float64
    assert layers.RNN(D, H, use_bias=False, key=KEY).params.b is None
    assert layers.ConvLSTM(1, D, H, 3, use_bias=False, key=KEY).params.b is None
    assert layers.CausalConv(D, H, 3, use_bias=False, key=KEY).params.bias is None
    assert np.all(layers.LSTM(D, H, w_x_init=jax.nn.initializers.ones, key=KEY).params.w_x == 1)


def test_tools_of_equinox(tmp_path):
    stack = example_stack(residual=False, truncation=4)
    eqx.tree_serialise_leaves(tmp_path / "model.eqx", stack)
    other = example_stack(residual=False, truncation=4)
    assert jax.tree.structure(other) == jax.tree.structure(stack)
    zeros = jax.tree.map(lambda a: a * 0, other)
    close(eqx.tree_deserialise_leaves(tmp_path / "model.eqx", zeros)(XS), stack(XS))


MISTAKES = {
    "option": (lambda: layers.LSTM(D, H, key=KEY)(XS, seq_lengths=LENGTHS), TypeError, "seq_lengths"),
    "option of the constructor": (lambda: layers.LSTM(D, H, seq=1, key=KEY), TypeError, "'seq'"),
    "sizes": (lambda: layers.LSTM(D + 1, H, key=KEY)(XS), ValueError, "`xs`|w_x"),
    "order of states": (lambda: layers.GRU(D, H, key=KEY)(XS, (XS, XS)), (TypeError, ValueError), "`carry`"),
    "axes": (lambda: layers.Conv(2, D, H, (3, 3, 3), key=KEY), ValueError, "`kernel_size`.*2 spatial axes"),
    "padding_mode": (lambda: layers.Conv(1, D, H, 3, padding_mode="CIRCULAR", key=KEY), TypeError, "padding_mode"),
    "stride": (lambda: layers.CausalConv(D, H, 3, stride=2, key=KEY), TypeError, "stride"),
}


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.other_types
def test_mistakes(name):
    call, kind, match = MISTAKES[name]
    with pytest.raises(kind, match=match):
        call()


def test_docstring_example():
    result = doctest.testmod(layers)
    assert result.failed == 0
    assert result.attempted > 5


def test_jaxseq_does_not_import_equinox():
    code = "import sys, jaxseq; assert not {'jaxseq.integrations', 'equinox'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_axis_of_time_of_the_constructor():
    layer = layers.LSTM(D, H, time_axis=0, key=KEY)
    expected = layers.LSTM(D, H, key=KEY)(XS)[1]
    np.testing.assert_allclose(layer(XS.swapaxes(0, 1))[1].swapaxes(0, 1), expected, rtol=1e-5)
    np.testing.assert_allclose(layer(XS, time_axis=1)[1], expected, rtol=1e-5)


def test_states_of_images_have_channels_first():
    """A reset at the first step to a state equals a carry of it; spatial size and features are equal."""
    layer = layers.ConvLSTM(1, 3, 6, 3, key=KEY)
    xs, h = jnp.ones((B, 5, 3, 6)), jnp.arange(B * 36.0).reshape(B, 6, 6) / 50
    resets = jnp.zeros((B, 5), bool).at[:, 0].set(True)
    close(layer(xs, resets=resets, reset_state=(h, -h)), layer(xs, (h, -h)))
