"""Recurrences: direction, one manually computed step, residuals of the forward pass, and initializers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SEQUENCES, arguments, assert_close, scans

import jaxseq
from jaxseq._cases import CASES


@pytest.mark.parametrize("name", SEQUENCES)
def test_reverse_is_reading_the_flipped_sequence(name, key):
    params, carry, xs = arguments(name, "plain", key)
    last, ys = CASES[name].op(params, carry, xs, reverse=True)
    flipped_last, flipped = CASES[name].op(params, carry, xs[::-1])
    assert_close((last, ys[::-1]), (flipped_last, flipped), relative=1e-14)


def test_lstm_step_by_hand():
    """One unit and one input, with gates i = σ(1), f = σ(2), g = tanh(1/2), o = σ(-1)."""
    params = jaxseq.LSTMParams(
        w_x=jnp.array([[1.0, 2.0, 0.25, 0.5]]),
        w_h=jnp.array([[2.0, -4.0, 1.0, 0.0]]),
        b=jnp.array([-2.0, 0.0, -0.5, -2.0]),
    )
    (h, c), y = jaxseq.lstm_cell(params, jaxseq.LSTMState(jnp.array([0.5]), jnp.array([3.0])), jnp.array([2.0]))
    # a = x w_x + h w_h + b = (2 + 1 - 2, 4 - 2, 0.5 + 0.5 - 0.5, 1 - 2) = (1, 2, 1/2, -1)
    i, f, g, o = 1 / (1 + np.exp(-1)), 1 / (1 + np.exp(-2)), np.tanh(0.5), 1 / (1 + np.exp(1))
    np.testing.assert_allclose(c, [3 * f + i * g], rtol=1e-14)
    np.testing.assert_allclose(h, [o * np.tanh(3 * f + i * g)], rtol=1e-14)
    np.testing.assert_array_equal(y, h)


# Residuals: ys, the values that the cell saves, and one initial state. The gates of a small GRU are recomputed.
KEPT = [("rnn", 5, {}, 1, 1), ("gru", 5, {}, 1, 1), ("gru", 130, {}, 5, 1), ("gru", 130, {"checkpoint": 11}, 1, 1)]
KEPT += [("lstm", 5, {}, 5, 2), ("lstm", 5, {"checkpoint": 11}, 1, 2)]
KEPT += [("rnn", 5, {"activation": jnp.tanh}, 1, 1), ("rnn", 5, {"activation": jax.nn.relu}, 1, 1)]  # rules by hand


@pytest.mark.parametrize(("name", "hidden", "options", "arrays", "leaves"), KEPT)
def test_what_forward_keeps_for_backward(name, hidden, options, arrays, leaves, key):
    """The residuals besides the arguments are `arrays` arrays (T, B, H) and `leaves` arrays (B, H)."""
    (_, _, xs), init = arguments(name, "plain", key, length=11, dtype=jnp.float32), getattr(jaxseq, f"{name}_init")
    h = jnp.ones((2, hidden), jnp.float32)
    args = init(key, xs.shape[-1], hidden, dtype=jnp.float32), jaxseq.LSTMState(h, h) if name == "lstm" else h, xs
    _, vjp = jax.vjp(partial(CASES[name].op, **options), *args)
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(vjp))
    given = sum(leaf.nbytes for leaf in jax.tree.leaves(args))
    assert kept == given + (arrays * 11 + leaves) * 2 * hidden * 4


def test_any_function_as_activation_even_if_it_mixes_features(key):
    params, h, xs = arguments("rnn", "plain", key)

    def loop(params, h, xs):
        ys = []
        for x in xs:
            h = jax.nn.softmax(x @ params.w_x + h @ params.w_h + params.b[None])
            ys.append(h)
        return h, jnp.stack(ys)

    def gradients(f):
        return jax.jit(jax.grad(lambda *args: sum(jnp.sum(a**3) for a in f(*args)), argnums=(0, 1, 2)))(params, h, xs)

    assert_close(gradients(partial(jaxseq.rnn, activation=jax.nn.softmax)), gradients(loop))


def test_an_activation_closes_over_no_traced_value(key):
    args = arguments("rnn", "plain", key)
    with pytest.raises(
        TypeError, match=r"`activation`: expected a function without traced values of its own; pass them"
    ):
        jax.grad(lambda s: jaxseq.rnn(*args, activation=lambda a: jnp.tanh(s * a))[1].sum())(2.0)


def test_unroll_and_precision_reach_the_compiler(key):
    args = arguments("gru", "plain", key)
    f = partial(jaxseq.gru, unroll=3, precision="highest")
    both = lambda args: jax.vjp(f, *args)[1](f(*args))  # noqa: E731
    sweeps = scans(both, args)
    assert {e.params["unroll"] for e in sweeps} == {3}
    text = str(jax.make_jaxpr(both)(args))
    assert text.count("dot_general") == text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") > 0


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
@pytest.mark.parametrize(("init", "gates"), [(jaxseq.rnn_init, 1), (jaxseq.gru_init, 3), (jaxseq.lstm_init, 4)])
def test_initial_parameters(init, gates, dtype, key):
    D, H = 40, 24
    params = init(key, D, H, dtype=dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    assert params.w_x.shape == (D, gates * H)
    np.testing.assert_allclose(np.std(np.asarray(params.w_x, np.float64)), D**-0.5, rtol=0.1)
    for block in np.split(np.asarray(params.w_h, np.float64), gates, axis=1):
        np.testing.assert_allclose(block.T @ block, np.eye(H), atol=10 * float(jnp.finfo(dtype).eps))
    assert not np.array_equal(init(jax.random.key(21), D, H, dtype=dtype).w_x, params.w_x)


def test_first_biases(key):
    assert not jaxseq.rnn_init(key, 3, 5).b.any()
    gru = jaxseq.gru_init(key, 3, 5)
    assert not gru.b_x.any()
    assert not gru.b_h.any()
    np.testing.assert_array_equal(jaxseq.lstm_init(key, 3, 2).b, [0, 0, 1, 1, 0, 0, 0, 0])
