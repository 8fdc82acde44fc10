"""JAX's debugging modes: `disable_jit`, `debug_nans`, `debug_infs`, `checking_leaks`, `log_compiles`, and checkify."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import causal_conv, draw
from jax import lax
from jax.experimental import checkify

import jaxseq
from jaxseq import cells

pytestmark = pytest.mark.usefixtures("as_users_have_jax")
KEY = jax.random.key(0)


LSTM = jaxseq.LSTMParams(draw(3, 16), draw(4, 16), draw(16))
GRU = jaxseq.GRUParams(draw(3, 12), draw(4, 12), draw(12), draw(12))
RNN = jaxseq.RNNParams(draw(3, 4), draw(4, 4), draw(4))
LENGTHS, RESETS = np.array([4, 2]), np.zeros((4, 2), bool)
RESETS[2, 1] = True
XS = draw(4, 2, 3)


def scan(w, xs, **options):
    return jaxseq.scan(lambda s, x: (jnp.tanh(s @ w + x), s), jnp.zeros((2, 3)), xs, **options)


OPS = {
    "conv": (partial(jaxseq.conv, padding="SAME"), draw(2, 6, 5, 3), draw(3, 3, 3, 4)),
    "conv, groups": (partial(jaxseq.conv, groups=2), draw(2, 9, 4), draw(3, 2, 6)),
    "conv, 3-D": (jaxseq.conv, draw(1, 4, 4, 4, 2), draw(2, 2, 2, 2, 3)),
    "depthwise_conv": (jaxseq.depthwise_conv, draw(2, 9, 4), draw(3, 1, 4)),
    "depthwise_conv, long": (jaxseq.depthwise_conv, draw(2, 90, 2), draw(70, 1, 2)),
    "separable_conv": (jaxseq.separable_conv, draw(2, 9, 4), draw(3, 1, 4), draw(1, 4, 3)),
    "conv_transpose": (partial(jaxseq.conv_transpose, stride=2), draw(2, 5, 4), draw(3, 3, 4)),
    "causal_conv": (partial(causal_conv, resets=RESETS.T), draw(2, 2, 4), draw(2, 4, 4), draw(3, 4, 3)),
    "lstm": (lambda p, xs: jaxseq.lstm(p, None, xs), LSTM, XS),
    "lstm, lengths": (
        lambda p, xs: jaxseq.lstm(p, None, xs, lengths=LENGTHS, resets=RESETS, reverse=True, truncation=(2, 3)),
        LSTM,
        XS,
    ),
    "lstm, checkpoint": (lambda p, xs: jaxseq.lstm(p, None, xs, checkpoint=2, unroll=2), LSTM, XS),
    "gru": (lambda p, xs: jaxseq.gru(p, None, xs, truncation=2), GRU, XS),
    "slstm": (
        lambda p, xs: jaxseq.recurrence(cells.slstm, p, None, xs),
        jax.tree.map(lambda a: draw(*a.shape), jax.eval_shape(lambda: cells.slstm_init(KEY, 4, 4))),
        draw(3, 2, 4),
    ),
    "conv_lstm": (
        lambda p, xs: jaxseq.conv_lstm(p, None, xs),
        jaxseq.LSTMParams(draw(3, 2, 12), draw(3, 3, 12), draw(12)),
        draw(3, 2, 5, 2),
    ),
    "stack": (
        lambda p, xs: jaxseq.stack(jaxseq.gru, [p], None, xs, recurrent_dropout=0.2, zoneout=0.1, key=KEY),
        GRU,
        XS,
    ),
    "bidirectional": (lambda p, xs: jaxseq.bidirectional(jaxseq.lstm, [p, p], None, xs), LSTM, XS),
    "scan": (partial(scan, truncation=2), draw(3, 3), XS),
    "scan, checkpoint": (partial(scan, truncation=(2, 3), checkpoint=2), draw(3, 3), XS),
}
EACH = pytest.mark.parametrize("name", OPS)
# Traced in the default suite. The others are similar.
TRACED = ("conv, groups", "depthwise_conv", "causal_conv", "lstm, lengths", "gru", "scan")


def later(*names):
    """Parametrize over all ops, those not named marked as long."""
    return pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.long] * (n not in names)) for n in OPS])


def value_and_gradient(name):
    """Return a function of one tuple that computes the value and pullback of the op, and that tuple."""
    f, *args = OPS[name]

    def both(args):
        out, pull = jax.vjp(f, *args)
        return out, pull(jax.tree.map(jnp.sin, out))

    return both, tuple(args)


def assert_close(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


# Each operation is compiled separately, which is slow. The default suite runs one op, which once had an empty scan.
@later("depthwise_conv")
def test_disable_jit(name):
    f, args = value_and_gradient(name)
    with jax.disable_jit():
        got = f(args)
    assert_close(got, jax.jit(f)(args))


@later(*TRACED)
def test_checking_leaks(name):
    f, args = value_and_gradient(name)
    with jax.checking_leaks():
        jax.jit(f).trace(args)


@pytest.mark.long
@EACH
def test_debug_nans_debug_infs_and_log_compiles(name):
    f, args = value_and_gradient(name)
    expected = jax.jit(f)(args)
    with jax.debug_nans(True), jax.debug_infs(True), jax.log_compiles(True):
        assert_close(f(args), expected)


# --- checkify ---

# Ops that use the gradient of `jnp.take_along_axis` or a slice in `jax.checkpoint`, whose indices JAX cannot check.
WITHOUT_INDICES = ("lstm, lengths", "causal_conv", "scan, checkpoint", "depthwise_conv, long")


def checked(name):
    f, args = value_and_gradient(name)
    errors = checkify.all_checks - (checkify.index_checks if name in WITHOUT_INDICES else frozenset())
    return checkify.checkify(f, errors=errors), args


@later(*TRACED)
def test_checkify_traces_every_op(name):
    jax.eval_shape(*checked(name))


@pytest.mark.parametrize(
    ("of_jax", "error", "message"),
    [
        ("take_along_axis", IndexError, "tuple index out of range"),
        ("checkpoint", ValueError, "too many values to unpack"),
    ],
)
def test_jax_cannot_check_these_indices(of_jax, error, message):
    """If this test fails, JAX was fixed: shorten `WITHOUT_INDICES` and the page on limits."""
    i, a = jnp.zeros((1, 3), int), draw(4, 3)
    f = {
        "take_along_axis": jax.grad(lambda a: jnp.take_along_axis(a, i, 0).sum()),
        "checkpoint": jax.checkpoint(lambda a: lax.dynamic_slice_in_dim(a, jnp.argmax(a[0]), 2)),
    }[of_jax]
    with pytest.raises(error, match=message):
        jax.eval_shape(checkify.checkify(f, errors=checkify.index_checks), a)


@pytest.mark.long
@EACH
def test_checkify_finds_nothing_and_changes_nothing(name):
    f, args = checked(name)
    error, got = jax.jit(f)(args)
    error.throw()
    assert_close(got, jax.jit(value_and_gradient(name)[0])(args))


def rnn(lengths, xs, **options):
    return jaxseq.rnn(RNN, None, xs, lengths=lengths, **options)[1]


@pytest.mark.parametrize("dtype", ["int8", "uint32", "int64"])
def test_lengths_out_of_range_are_clamped_under_jit(dtype):
    low, high = max(-1, np.iinfo(dtype).min), min(np.iinfo(dtype).max, 2**40 + 1)
    with jax.enable_x64(True):
        xs = XS.astype(jnp.float32)
        run = jax.jit(partial(rnn, reverse=True, truncation=2))
        np.testing.assert_array_equal(run(np.array([low, high], dtype), xs), run(np.array([0, 4], dtype), xs))
        with pytest.raises(ValueError, match=rf"`lengths`: expected lengths from 0 to 4, .*, got {low} to {high}"):
            rnn(np.array([low, high], dtype), xs)


@pytest.mark.parametrize(
    "f",
    [
        jax.value_and_grad(jax.checkpoint(lambda n, xs: rnn(n, xs).sum()), argnums=1),
        lambda n, xs: lax.map(lambda n: jax.vmap(rnn, (0, None))(n, xs), jnp.stack([n, n])[None])[0],
    ],
    ids=["value and gradient, remat", "vmap in scan"],
)
def test_lengths_out_of_range_are_an_error_under_checkify(f):
    run = jax.jit(checkify.checkify(f))
    error, _ = run(jnp.array([5, 2]), XS)
    assert "`lengths`: expected lengths from 0 to 4, the number of steps, got" in str(error.get())
    assert "[5 2]" in str(error.get())
    error, out = run(jnp.array([4, 2]), XS)
    assert error.get() is None
    assert_close(out, jax.jit(f)(jnp.array([4, 2]), XS))


def test_the_check_of_lengths_costs_nothing_without_checkify():
    text = jax.jit(rnn).lower(jnp.array([4, 2]), XS).compile().as_text()
    assert not [line for line in text.splitlines() if " reduce(" in line and "pred[]" in line]
