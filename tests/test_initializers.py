"""Initial parameters and states: the options of initializers, layers, and `zero_state`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxseq
from jaxseq import cells

KEY = jax.random.key(0)
D, H = 3, 5


def like(tree):
    """Return the structure, shapes and dtypes of a tree."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


# --- zero_state ---

CELLS = {
    name: partial(jaxseq.recurrence_cell, getattr(cells, name))
    for name in ("mgu", "indrnn", "classic_gru", "peephole_lstm", "layer_norm_lstm", "layer_norm_gru", "slstm")
} | {name: getattr(jaxseq, f"{name}_cell") for name in ("rnn", "gru", "lstm")}


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.bfloat16], ids=lambda d: d.__name__)
def test_zero_state_is_what_none_stands_for(name, dtype):
    init = getattr(cells if hasattr(cells, f"{name}_init") else jaxseq, f"{name}_init")
    params = init(KEY, D, H, dtype=dtype)
    state = jaxseq.zero_state(params, (2, 4))
    expected, _ = jax.eval_shape(CELLS[name], params, None, jnp.ones((2, 4, D), dtype))
    assert like(state) == expected
    assert not any(np.asarray(a).any() for a in jax.tree.leaves(state))


def test_zero_state_of_projections_convolutions_and_layers():
    params = cells.projected_lstm_init(KEY, D, 8, 4)
    assert [a.shape for a in jaxseq.zero_state(params)] == [(4,), (8,)]
    params = jaxseq.conv_lstm_init(KEY, (3, 1), 2, 6)
    expected, _ = jax.eval_shape(jaxseq.conv_lstm_cell, params, None, jnp.ones((2, 7, 9, 2), jnp.float32))
    assert like(jaxseq.zero_state(params, (2, 7, 9))) == expected
    params = jaxseq.stack_init(partial(jaxseq.bidirectional_init, (jaxseq.lstm_init, jaxseq.gru_init)), KEY, D, [H, 4])
    layer = partial(jaxseq.bidirectional, (jaxseq.lstm, jaxseq.gru))
    expected, _ = jax.eval_shape(partial(jaxseq.stack, layer), params, None, jnp.ones((7, 2, D), jnp.float32))
    assert like(jaxseq.zero_state(params, 2)) == expected
    assert jaxseq.zero_state(params, 2, dtype=jnp.bfloat16)[1][0].c.dtype == jnp.bfloat16


def test_zero_state_of_a_cell_of_your_own():
    step = lambda a, s: jaxseq.LSTMState(a[0], s.c + a[0])  # noqa: E731
    own = jaxseq.Cell("own", "h", step, jaxseq.RNNParams, state=jaxseq.LSTMState)
    params, xs = jaxseq.rnn_init(KEY, D, H, dtype=jnp.float64), jnp.ones((7, 2, D))
    state = jaxseq.zero_state(params, 2, cell=own)
    assert like(state) == jax.eval_shape(partial(jaxseq.recurrence, own), params, None, xs)[0]
    both = jaxseq.zero_state([params, params], 2, cell=[own, None])
    assert isinstance(both[0], jaxseq.LSTMState)
    assert both[1].shape == (2, H)


def test_zero_state_is_a_carry_of_lax_scan():
    params = jaxseq.lstm_init(KEY, D, H, dtype=jnp.bfloat16)
    xs = jax.random.normal(KEY, (7, 2, D)).astype(jnp.bfloat16)
    (h, _), ys = lax.scan(partial(jaxseq.lstm_cell, params), jaxseq.zero_state(params, 2), xs)
    (expected, _), zs = jaxseq.lstm(params, None, xs)
    np.testing.assert_allclose(np.asarray(ys, np.float32), np.asarray(zs, np.float32), atol=2e-2)
    assert h.dtype == expected.dtype == jnp.float32


MISTAKES = {
    "no parameters": (
        lambda: jaxseq.zero_state(jnp.ones(3)),
        TypeError,
        r"`params`: expected the parameters of a cell",
    ),
    "another cell": (
        lambda: jaxseq.zero_state(jaxseq.rnn_init(KEY, D, H), cell=cells.mgu),
        TypeError,
        r"`params`: expected MGUParams",
    ),
    "no cell": (
        lambda: jaxseq.zero_state(jaxseq.rnn_init(KEY, D, H), cell=3),
        TypeError,
        r"`cell`: expected a jaxseq\.Cell, got int 3",
    ),
    "fewer cells": (
        lambda: jaxseq.zero_state([jaxseq.rnn_init(KEY, D, H)] * 2, cell=[cells.rnn]),
        ValueError,
        r"`cell`: expected None, a jaxseq\.Cell, or a sequence of 2, one for each layer, got 1",
    ),
    "negative batch": (
        lambda: jaxseq.zero_state(jaxseq.rnn_init(KEY, D, H), (2, -1)),
        ValueError,
        r"`batch_shape`: expected an integer >= 0, got -1",
    ),
    "integer state": (
        lambda: jaxseq.zero_state(jaxseq.rnn_init(KEY, D, H), dtype=int),
        TypeError,
        r"`dtype`: expected a floating dtype",
    ),
    "size of one layer": (
        lambda: jaxseq.stack_init(jaxseq.gru_init, KEY, D, 4),
        TypeError,
        r"`hidden_sizes`: expected a sequence with the size of each layer, got int 4",
    ),
    "an op in place of an initializer": (
        lambda: jaxseq.stack_init(jaxseq.lstm, KEY, D, [4]),
        TypeError,
        r"`init`: expected an initializer, such as lstm_init, got lstm",
    ),
    "a cell in place of an initializer": (
        lambda: jaxseq.stack_init(cells.mgu, KEY, D, [4]),
        TypeError,
        r"`init`: expected an initializer, such as mgu_init, got mgu",
    ),
    "batch as a float": (
        lambda: jaxseq.zero_state(jaxseq.rnn_init(KEY, D, H), 2.0),
        TypeError,
        r"`batch_shape`: expected an integer or a sequence of integers, got float 2\.0",
    ),
    "no layer": (lambda: jaxseq.stack_init(jaxseq.gru_init, KEY, D, []), ValueError, r"`hidden_sizes`: .* one layer"),
    "an op as initializer": (
        lambda: jaxseq.bidirectional_init("gru", KEY, D, H),
        TypeError,
        r"`init`: expected a sequence of 2",
    ),
    "initializer of a wrong shape": (
        lambda: jaxseq.lstm_init(KEY, D, H, w_h_init=lambda key, shape, dtype: jnp.ones((H, 4 * H), dtype)),
        ValueError,
        r"`w_h_init`: expected shape \(5, 5\) = the shape that was passed to it, got \(5, 20\)",
    ),
    "initializer by name": (
        lambda: jaxseq.conv_init(KEY, 3, 4, 6, kernel_init="he"),
        TypeError,
        r"`kernel_init`: expected a function \(key, shape, dtype\) -> array, got str 'he'",
    ),
    "bias as a number": (
        lambda: jaxseq.gru_init(KEY, D, H, use_bias=0),
        TypeError,
        r"`use_bias`: expected True or False",
    ),
}


@pytest.mark.other_types
@pytest.mark.parametrize("label", MISTAKES)
def test_mistakes(label):
    call, error, match = MISTAKES[label]
    with pytest.raises(error, match=match):
        call()


# --- Options of initializers ---

RECURRENT = {
    "rnn": (jaxseq.rnn_init, (D, H), 1),
    "gru": (jaxseq.gru_init, (D, H), 3),
    "lstm": (jaxseq.lstm_init, (D, H), 4),
    "conv_lstm": (partial(jaxseq.conv_lstm_init, kernel_size=(3, 2)), (D, H), 4),
    "conv_gru": (partial(jaxseq.conv_gru_init, kernel_size=3), (D, H), 3),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_initializers_of_a_recurrence_are_called_for_each_gate(name):
    init, (inputs, outputs), gates = RECURRENT[name]
    sizes = {"c_in": inputs, "c_out": outputs} if "conv" in name else {"input_size": inputs, "hidden_size": outputs}
    calls = []

    def count(key, shape, dtype):
        calls.append(shape)
        return jnp.full(shape, len(calls), dtype)

    params = init(key=KEY, **sizes, w_x_init=count, w_h_init=count, use_bias=False, dtype=jnp.bfloat16)
    taps = params.w_x.shape[:-2]
    assert calls == [(*taps, inputs, outputs)] * gates + [(*taps, outputs, outputs)] * gates
    for w, first in (params.w_x, 1), (params.w_h, gates + 1):
        assert w.dtype == jnp.bfloat16
        blocks = np.asarray(w, int).reshape(-1, gates, outputs)
        assert (blocks == first + np.arange(gates)[:, None]).all()
    assert all(b is None for b in params[2:])


# The shape in which `w_h_init` is called, how often, and options. Input and hidden size are D and 6.
RECURRENT_BLOCKS = {
    "mgu": ((6, 6), 2, {}),
    "classic_gru": ((6, 6), 3, {}),
    "peephole_lstm": ((6, 6), 4, {}),
    "projected_lstm": ((2, 6), 4, {"projection_size": 2}),
    "layer_norm_lstm": ((6, 6), 4, {}),
    "layer_norm_gru": ((6, 6), 3, {}),
    "indrnn": ((1, 6), 1, {}),
    "slstm": ((3, 3), 8, {"heads": 2}),
}


@pytest.mark.parametrize("name", RECURRENT_BLOCKS)
def test_initializers_of_a_cell(name):
    block, count, options = RECURRENT_BLOCKS[name]
    init, shapes = getattr(cells, f"{name}_init"), {"x": [], "h": []}

    def draw(which, value, key, shape, dtype):
        shapes[which].append(shape)
        return jnp.full(shape, value, dtype)

    use_bias = {} if "norm" in name else {"use_bias": False}
    draws = {"w_x_init": partial(draw, "x", 2), "w_h_init": partial(draw, "h", 3)}
    plain, other = init(KEY, D, 6, **options), init(KEY, D, 6, **options, **use_bias, **draws)
    assert set(shapes["x"]) == {(D, 6)}
    assert shapes["h"] == [block] * count
    for field, leaf in plain._asdict().items():
        drawn = getattr(other, field)
        if use_bias and field.startswith("b"):
            assert drawn is None
            continue
        assert like(drawn) == like(leaf)
        values = {"w_x": 2, "w_h": 3} | ({"w_q": 3} if name == "classic_gru" else {})
        if field in values:
            assert (np.asarray(drawn) == values[field]).all()
    xs = jnp.ones((7, 2, D), jnp.float32)
    _, ys = jax.eval_shape(partial(jaxseq.recurrence, getattr(cells, name)), other, None, xs)
    assert ys.shape == (7, 2, 2 if name == "projected_lstm" else 6)


def test_initializers_of_jax_and_those_without_one_draw_the_same_other_weights():
    plain = jaxseq.lstm_init(KEY, D, H)
    other = jaxseq.lstm_init(KEY, D, H, w_x_init=jax.nn.initializers.glorot_uniform())
    np.testing.assert_array_equal(plain.w_h, other.w_h)
    assert np.abs(other.w_x).max() <= np.sqrt(6 / (D + H))
    assert not np.array_equal(plain.w_x, other.w_x)


def test_initializers_draw_in_the_dtype_of_the_parameters():
    draw = jax.nn.initializers.constant(0.1)
    assert (jaxseq.conv_init(KEY, 3, 4, 5, kernel_init=draw, dtype=jnp.float64).kernel == 0.1).all()
    assert (jaxseq.lstm_init(KEY, D, H, w_h_init=draw, dtype=jnp.float64).w_h == 0.1).all()


def test_a_kernel_initializer_sees_the_fan_in():
    """Axis -2 has the input channels of an output, also in a transposed convolution, whose kernel has them last."""
    draw = lambda key, shape, dtype: jnp.arange(np.prod(shape), dtype=dtype).reshape(shape)  # noqa: E731
    kernel, bias = jaxseq.conv_init(KEY, (3, 2), 4, 6, groups=2, kernel_init=draw, use_bias=False)
    np.testing.assert_array_equal(kernel, np.arange(3 * 2 * 2 * 6).reshape(3, 2, 2, 6))
    assert bias is None
    kernel, bias = jaxseq.conv_transpose_init(KEY, 3, 4, 6, groups=2, kernel_init=draw, use_bias=False)
    drawn = np.arange(3 * 2 * 6).reshape(3, 2, 6)
    expected = np.zeros((3, 3, 4))
    for i in range(4):  # input channel i is channel i % 2 of group i // 2
        for o in range(3):
            expected[:, o, i] = drawn[:, i % 2, 3 * (i // 2) + o]
    np.testing.assert_array_equal(kernel, expected)
    assert bias is None


def test_depthwise_and_separable_kernels_have_variance_one_over_fan_in():
    kernel, bias = jaxseq.depthwise_conv_init(KEY, (5, 5), 200, multiplier=2)
    assert (kernel.shape, bias.shape) == ((5, 5, 1, 400), (400,))
    assert float(kernel.var()) * 25 == pytest.approx(1, abs=0.05)
    params = jaxseq.separable_conv_init(KEY, 7, 100, 300, multiplier=2, use_bias=False)
    assert [a.shape for a in params[:2]] == [(7, 1, 200), (1, 200, 300)]
    assert params.bias is None
    assert float(params.depthwise.var()) * 7 == pytest.approx(1, abs=0.1)
    assert float(params.pointwise.var()) * 200 == pytest.approx(1, abs=0.05)


def test_each_layer_takes_the_output_of_the_layer_before():
    both = partial(jaxseq.bidirectional_init, jaxseq.gru_init)
    params = jaxseq.stack_init([both, jaxseq.lstm_init], KEY, D, [H, 4], dtype=jnp.bfloat16)
    assert [p.w_x.shape for p in params[0]] == [(D, 15)] * 2
    assert params[1].w_x.shape == (10, 16)
    assert params[1].w_x.dtype == jnp.bfloat16
    assert not np.array_equal(params[0][0].w_x, params[0][1].w_x)
    projected = partial(cells.projected_lstm_init, projection_size=2)
    assert [p.w_x.shape[0] for p in jaxseq.stack_init(projected, KEY, D, [H, 6, 4])] == [D, 2, 2]
    # A stack in a stack: the next layer takes the outputs of its last layer only.
    nested = jaxseq.stack_init([partial(jaxseq.stack_init, jaxseq.lstm_init), jaxseq.gru_init], KEY, D, [[H, 4], 6])
    assert nested[1].w_x.shape == (4, 18)
