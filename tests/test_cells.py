"""Cells and linear maps: equations against other libraries or papers, pullbacks against autodiff, error messages.

Agreement with the reference implementation, and transformations, are tested for all ops in other files.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import arguments, assert_close, bound, cotangents_for, inner, normals, pullback, scans, subjaxprs
from jax import lax

import jaxseq
from jaxseq import Cell, Pullback, StepResult, cells, linear_maps
from jaxseq._cases import CASES

VARIANTS = CASES["recurrence"].variants
LABELS = [label for label in VARIANTS if "," not in label]
HAND = [label for label in LABELS if VARIANTS[label].first[0].pullback is not None]


def without_pullback(cell):
    """Return the same cell, differentiated by JAX."""
    return cell._replace(pullback=None, replay=None, step=lambda *args: cell.step(*args).state)


@pytest.mark.long  # the contract compares with the reference, which has no pullback
@pytest.mark.parametrize("label", HAND)
def test_the_pullback_is_that_of_jax(label, key):
    cell, args = VARIANTS[label].first[0], arguments("recurrence", label, key)
    f, g = (partial(jaxseq.recurrence, c, truncation=3) for c in (cell, without_pullback(cell)))
    cotangents = cotangents_for(f, args, jax.random.fold_in(key, 1))
    assert_close(*(jax.jit(pullback(h))(args, cotangents) for h in (f, g)), relative=1e-13)


@pytest.mark.parametrize("label", LABELS)
def test_cell_in_a_scan_equals_the_sequence(label, key):
    cell, (params, carry, xs) = VARIANTS[label].first[0], arguments("recurrence", label, key)
    stepped = lax.scan(partial(jaxseq.recurrence_cell, cell, params), carry, xs)
    assert_close(stepped, jaxseq.recurrence(cell, params, carry, xs))


# --- Equations ---


def test_indrnn_by_hand():
    """One unit, h = relu(2 x + 0.5 h - 1)."""
    params = cells.IndRNNParams(jnp.array([[2.0]]), jnp.array([[0.5]]), jnp.array([-1.0]))
    _, ys = jaxseq.recurrence(cells.indrnn, params, jnp.array([4.0]), jnp.array([[1.0], [-2.0], [1.0], [0.25]]))
    np.testing.assert_allclose(ys[:, 0], [3.0, 0.0, 1.0, 0.0])


@pytest.mark.parametrize(("steps", "bound"), [(None, 1.0), (4, 2**0.25)])
def test_initial_recurrent_weights_of_indrnn_fill_their_interval(steps, bound, key):
    """The bound is 1, or 2^(1/T) for T steps, so that no unit grows by more than a factor of 2 over a sequence."""
    w_h = cells.indrnn_init(key, 1, 512, steps=steps).w_h
    assert w_h.min() >= 0
    assert 0.95 * bound < w_h.max() <= bound


def with_jax_relu(params, x, recurrent):
    """Compute the network with `jax.nn.relu`."""
    h = jnp.zeros((x.shape[1], params.w_x.shape[1]), x.dtype)
    for x_t in x:
        h = jax.nn.relu(x_t @ params.w_x + recurrent(h, params.w_h) + params.b[None])
    return h.sum()


@pytest.mark.parametrize("namespace", [jaxseq, jaxseq.reference], ids=["op", "reference"])
@pytest.mark.parametrize("cell", ["relu_rnn", "indrnn"])
def test_relu_at_zero_has_the_derivatives_of_jax_nn(cell, namespace, key):
    """Where a pre-activation is zero, the subgradient is that of `jax.nn.relu`, at first and second order."""
    init = jaxseq.rnn_init if cell == "relu_rnn" else cells.indrnn_init
    params = init(key, 3, 16)
    params = params._replace(w_x=params.w_x.at[:, :8].set(0))
    xs = jax.random.normal(key, (3, 2, 3), jnp.float32)
    params = params._replace(w_h=params.w_h.at[..., :8].set(0))
    ours = lambda p, x: namespace.recurrence(getattr(cells, cell), p, None, x)[0].sum()  # noqa: E731
    expected = lambda p, x: with_jax_relu(p, x, jnp.matmul if cell == "relu_rnn" else jnp.multiply)  # noqa: E731

    def derivatives(f):
        both = jax.grad(f, (0, 1))
        return jax.jit(lambda p, x: (both(p, x), jax.jvp(both, (p, x), (p, x))[1]))

    assert_close(*(derivatives(f)(params, xs) for f in (ours, expected)), relative=1e-5)


def test_relu_keeps_nan():
    params = jaxseq.rnn_init(jax.random.key(0), 3, 4)
    for namespace in (jaxseq, jaxseq.reference):
        assert jnp.isnan(
            namespace.rnn(params, None, jnp.full((1, 3), jnp.nan, jnp.float32), activation="relu")[0]
        ).all()


def test_slstm_where_its_exponents_are_equal_and_its_gate_is_at_zero():
    """Where ℓ + m = a_i, the gradient of m' is that of a_i, as in the pullback. (log σ)'' is -1/4 at 0."""
    state = cells.SLSTMState(*jnp.ones((4, 1)))
    one = lambda a_i, a_f: cells.slstm.step((a_i, a_f, jnp.zeros(1), jnp.zeros(1)), state)[0].m[0]  # noqa: E731
    zero = jnp.zeros(1)
    equal = 1 - jnp.log(2 * jnp.ones(1))
    assert jax.grad(one, (0, 1))(equal, zero) == (1, 0)
    np.testing.assert_allclose(jax.grad(one, 1)(zero - 9, zero), 0.5)
    np.testing.assert_allclose(jax.hessian(one, 1)(zero - 9, zero), -0.25)


def test_slstm_is_the_unstabilised_recurrence(key):
    """h = o c / n with c' = f c + exp(a_i) z and n' = f n + exp(a_i), without the stabilizer m."""
    params, _, xs = arguments("recurrence", "slstm", key)
    heads, d, _, _ = params.w_h.shape
    h = c = n = jnp.zeros((xs.shape[1], heads * d))
    ys = []
    for x in xs:
        r = jnp.einsum("bnd,ndgi->bgni", h.reshape(-1, heads, d), params.w_h).reshape(len(h), -1)
        i, f, z, o = jnp.split(x @ params.w_x + r + params.b[None], 4, -1)
        i, f, z, o = jnp.exp(i), jax.nn.sigmoid(f), jnp.tanh(z), jax.nn.sigmoid(o)
        c, n = f * c + i * z, f * n + i
        h = o * c / n
        ys.append(h)
    assert_close(jaxseq.recurrence(cells.slstm, params, None, xs)[1], jnp.stack(ys))


@pytest.mark.parametrize("scale", [100.0, 1000.0])
def test_slstm_keeps_to_numbers_where_exp_does_not(scale, key):
    params, _, xs = arguments("recurrence", "slstm", key, dtype=jnp.float32)
    f = lambda params, xs: jaxseq.recurrence(cells.slstm, params, None, xs)[1].sum()  # noqa: E731
    y, gradient = jax.value_and_grad(f)(params, scale * xs)
    assert all(jnp.isfinite(a).all() for a in jax.tree.leaves((y, gradient)))


def test_peephole_lstm_by_its_equations(key):
    params, (h, c), xs = args = arguments("recurrence", "peephole_lstm", key)
    p_i, p_f, p_o = (p[None] for p in params[3:])
    ys = []
    for x in xs:
        a_i, a_f, a_g, a_o = jnp.split(x @ params.w_x + h @ params.w_h + params.b[None], 4, -1)
        c = jax.nn.sigmoid(a_f + p_f * c) * c + jax.nn.sigmoid(a_i + p_i * c) * jnp.tanh(a_g)
        h = jax.nn.sigmoid(a_o + p_o * c) * jnp.tanh(c)
        ys.append(h)
    assert_close(jaxseq.recurrence(cells.peephole_lstm, *args)[1], jnp.stack(ys))


def normal(a):
    """Normalize over the last axis with `jax.nn.standardize`."""
    return jax.nn.standardize(a, epsilon=1e-5)


def test_layer_norm_lstm_by_its_equations(key):
    p, (h, c), xs = args = arguments("recurrence", "layer_norm_lstm", key)
    ys = []
    for x in xs:
        a = p.gain_x[None] * normal(x @ p.w_x) + p.gain_h[None] * normal(h @ p.w_h) + p.shift[None]
        i, f, g, o = jnp.split(a, 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(p.gain_c[None] * normal(c) + p.shift_c[None])
        ys.append(h)
    assert_close(jaxseq.recurrence(cells.layer_norm_lstm, *args)[1], jnp.stack(ys))


def test_layer_norm_gru_by_its_equations(key):
    p, h, xs = args = arguments("recurrence", "layer_norm_gru", key)
    H = h.shape[-1]
    ys = []

    def side(a, gain, shift):
        return gain[None] * jnp.concatenate([normal(a[:, : 2 * H]), normal(a[:, 2 * H :])], -1) + shift[None]

    for x in xs:
        u, v = side(x @ p.w_x, p.gain_x, p.shift_x), side(h @ p.w_h, p.gain_h, p.shift_h)
        r, z = jnp.split(jax.nn.sigmoid(u + v)[:, : 2 * H], 2, -1)
        n = jnp.tanh(u[:, 2 * H :] + r * v[:, 2 * H :])
        h = (1 - z) * n + z * h
        ys.append(h)
    assert_close(jaxseq.recurrence(cells.layer_norm_gru, *args)[1], jnp.stack(ys))


# --- Backward pass ---


def weight_contractions(f, args, shape):
    """Return the products in loops of the gradient whose result has the shape of a weight."""
    cotangents = jax.tree.map(jnp.ones_like, f(*args))
    found = []
    for scan in scans(pullback(f), args, cotangents):
        inside = [e for e in subjaxprs(scan.params["jaxpr"].jaxpr) if e.primitive.name == "dot_general"]
        found += [e for e in inside if e.outvars[0].aval.shape == shape]
    return found


@pytest.mark.parametrize("label", ["leaky", "twice"])
def test_weights_are_contracted_outside_of_the_loop_of_a_users_cell(label, key):
    f, args = bound("recurrence", label), arguments("recurrence", label, key)
    assert not weight_contractions(f, args, args[0].w_h.shape)
    reference = bound("recurrence", label, reference=True)
    assert weight_contractions(reference, args, args[0].w_h.shape), "weight_contractions missed one"


@pytest.mark.parametrize("label", ["leaky", "twice", "slstm"])
def test_truncated_windows_go_back_side_by_side(label, key):
    """For T = 12 and windows of 3, no loop of the gradient has more than 3 steps, except the forward sweep."""
    cell = VARIANTS[label].first[0]
    params, carry, xs = arguments("recurrence", label, key, length=12)
    f = partial(jaxseq.recurrence, cell, truncation=3)
    back = lambda args, cotangents: jax.vjp(f, *args)[1](cotangents)  # noqa: E731
    cotangents = jax.tree.map(jnp.ones_like, f(params, carry, xs))
    lengths = [scan.params["length"] for scan in scans(back, (params, carry, xs), cotangents)]
    assert lengths.count(12) == 1
    assert max(length for length in lengths if length != 12) == 3


def test_gradient_of_the_cells_own_parameters_is_directional(key):
    """Compare with a difference quotient, which is independent of all rules of jaxseq."""
    args = arguments("recurrence", "leaky", key)
    f = bound("recurrence", "leaky")
    w_bar = cotangents_for(f, args, jax.random.fold_in(key, 1))
    _, (p_bar, _, _) = pullback(f)(args, w_bar)
    rest = args[1:]
    direction = jax.tree.map(jnp.zeros_like, args[0])._replace(rate=normals(key, args[0].rate), gain=jnp.array(1.0))
    at = lambda t: inner(f(jax.tree.map(lambda a, d: a + t * d, args[0], direction), *rest), w_bar)  # noqa: E731
    np.testing.assert_allclose(inner(p_bar, direction), (at(1e-5) - at(-1e-5)) / 2e-5, rtol=1e-8)


# --- Other maps ---


class Scaled(linear_maps.LinearMap):
    """A user-defined map with w (G, 1), which scales all channels by one number for each gate."""

    def product(self, precision, w, x):
        return jnp.concatenate([x * g for g in w[:, 0]], -1)

    def pull_input(self, precision, w, y_bar, space):
        return sum(part * g for part, g in zip(jnp.split(y_bar, len(w), -1), w[:, 0], strict=True))

    def pull_weight(self, precision, x, y_bar, w):
        return jnp.stack([jnp.sum(x * part).reshape(1) for part in jnp.split(y_bar, len(w), -1)])

    def shape(self, inputs, gates, outputs):
        return f"({gates}, 1)"

    def channels(self, w, gates):
        return (5, 5) if w.shape == (gates, 1) else None


def test_a_map_of_the_users_own(key):
    cell = cells.gru._replace(name="scaled", recurrent=Scaled())
    params, carry, xs = arguments("gru", "plain", key)
    params = params._replace(w_h=normals(key, jnp.zeros((3, 1))))
    f, reference = (partial(g, cell) for g in (jaxseq.recurrence, jaxseq.reference.recurrence))
    cotangents = cotangents_for(f, (params, carry, xs), key)
    assert_close(*(pullback(g)((params, carry, xs), cotangents) for g in (f, reference)))


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
@pytest.mark.parametrize(
    ("kind", "w", "x"),
    [
        (linear_maps.Dense(), (3, 8), (3,)),
        (linear_maps.Diagonal(), (2, 4), (4,)),
        (linear_maps.BlockDiagonal(), (2, 3, 2, 4), (6,)),
        (linear_maps.Conv(stride=2, padding="VALID"), (2, 3, 8), (5, 3)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, linear_maps.LinearMap) else "",
)
def test_pullbacks_of_a_map(kind, w, x, batch, key):
    """Compare with autodiff of the product."""
    keys = jax.random.split(key, 3)
    w, x = normals(keys[0], jnp.zeros(w)), normals(keys[1], jnp.zeros((*batch, *x)))
    y, pull = jax.vjp(partial(kind.product, None), w, x)
    y_bar = normals(keys[2], y)
    space = kind.space_of(w, x)
    actual = kind.pull_weight(None, x, y_bar, w), kind.pull_input(None, w, y_bar, space)
    assert_close(actual, pull(y_bar))
    assert_close(kind.pull_in_a_loop(None, w, space)(y_bar), actual[1])


def test_a_convolutional_map_takes_its_stride():
    """Sums of two neighbours at stride 2."""
    y = linear_maps.Conv(stride=2, padding="VALID").product(None, jnp.ones((2, 1, 1)), jnp.arange(5.0)[:, None])
    assert y.ravel().tolist() == [1, 5]


# --- Bad cells ---


class Params(NamedTuple):
    w_x: Any
    w_h: Any
    b: Any
    gain: Any


def run(step, pull=None, state=None, **fields):
    cell = Cell("odd", gates="ab", step=step, params=Params, state=state, pullback=pull)._replace(**fields)
    w = jnp.ones((5, 10))
    params = Params(jnp.ones((3, 10)), w, None, jnp.ones(5))
    return lambda: jaxseq.recurrence(cell, params, None, jnp.ones((7, 2, 3)))


def odd(**fields):
    return run(lambda a, h, p: h, **fields)


def fine(a, h, p):
    return StepResult(h + a[0], a)


KERNELS = jaxseq.LSTMParams(jnp.ones((3, 2, 16)), jnp.ones((3, 4, 16)), None)
BAD = {
    "another shape": (
        run(lambda a, h, p: h[..., :2]),
        ValueError,
        r"`odd\.step`: expected a state like `s_prev`, float64\[5\], got float64\[2\]",
    ),
    "another dtype": (
        run(lambda a, h, p: h.astype(jnp.float32)),
        ValueError,
        r"`odd\.step`: expected a state like `s_prev`, float64\[5\], got float32\[5\]",
    ),
    "another structure": (
        run(lambda a, h, p: (h, h)),
        ValueError,
        r"`odd\.step`: expected a state like `s_prev`, float64\[5\], got \(float64\[5\], float64\[5\]\)",
    ),
    "no residuals with a pullback": (
        run(lambda a, h, p: h, lambda *args: None),
        TypeError,
        r"`odd\.step`: expected jaxseq\.StepResult\(state, residuals\), since there is a pullback, got float64\[5\]",
    ),
    "a plain tuple from a pullback": (
        run(fine, lambda a, h, h_bar, p: ((h_bar, h_bar), h_bar, p._replace(gain=h_bar))),
        TypeError,
        r"`odd\.pullback`: expected jaxseq\.Pullback\(delta, state_bar\), got \(\(float64\[5\], float64\[5\]\), .*gain",
    ),
    "a number for a state": (
        run(lambda a, h, p: 0.0),
        ValueError,
        r"`odd\.step`: expected a state like `s_prev`, float64\[5\], got 0\.0",
    ),
    "a number for a residual": (
        run(lambda a, h, p: StepResult(h, (h, 1.0)), lambda *args: None),
        TypeError,
        r"`odd\.step`: expected arrays as residuals, got \(float64\[5\], 1\.0\)",
    ),
    "δ of one gate": (
        run(fine, lambda a, h, h_bar, p: Pullback((h_bar,), h_bar, p._replace(gain=h_bar))),
        ValueError,
        r"`odd\.pullback`: expected `delta` like the pre-activations, \(.*, float64\[5\]\), got \(float64\[5\],\)",
    ),
    "another s̄_prev": (
        run(fine, lambda a, h, h_bar, p: Pullback((h_bar, h_bar), (h_bar,), p._replace(gain=h_bar))),
        ValueError,
        r"`odd\.pullback`: expected `state_bar` like the state, float64\[5\], got \(float64\[5\],\)",
    ),
    "p̄ of another shape": (
        run(fine, lambda a, h, h_bar, p: Pullback((h_bar, h_bar), h_bar, p._replace(gain=h_bar[:1]))),
        ValueError,
        r"`odd\.pullback`: expected `params_bar` of one example like the cell parameters, .*\[5\].*\[1\]",
    ),
    "twice the same gate": (
        odd(gates="aa"),
        ValueError,
        r"`odd\.gates`: expected a distinct letter for each gate, .*'aa'",
    ),
    "unknown split gates": (
        odd(split_gates="x"),
        ValueError,
        r"`odd\.split_gates`: expected some of the gates 'ab' .*'x'",
    ),
    "input-only gate in front": (
        odd(input_only_gates="a"),
        ValueError,
        r"`odd\.input_only_gates`: expected the last of the gates 'ab', .*'a'",
    ),
    "all gates input-only": (
        odd(input_only_gates="ab"),
        ValueError,
        r"`odd\.input_only_gates`: expected the last of the gates 'ab', .*'ab'",
    ),
    "parameters without maps": (odd(params=jaxseq.LSTMState), ValueError, r"`odd\.params`: .*got LSTMState\(h, c\)"),
    "a state that is not a container": (
        odd(state=list),
        TypeError,
        r"`odd\.state`: expected a NamedTuple whose first field is h",
    ),
    "a class for a map": (
        odd(recurrent=linear_maps.Dense),
        TypeError,
        r"`odd\.recurrent`: expected a linear map from jaxseq\.linear_maps",
    ),
    "width of the pre-activations": (
        lambda: jaxseq.recurrence(
            cells.mgu, cells.MGUParams(jnp.ones((3, 12)), jnp.ones((5, 12)), None, None), None, jnp.ones((7, 2, 3))
        ),
        ValueError,
        r"`params\.w_h`: expected shape \(H, 2 H\), one block of H columns for each gate f, n, got \(5, 12\)",
    ),
    "a kernel that shrinks the state": (
        lambda: jaxseq.recurrence(
            cells.rnn._replace(input=linear_maps.Conv(), recurrent=linear_maps.Conv(padding="VALID")),
            jaxseq.RNNParams(jnp.ones((3, 2, 4)), jnp.ones((3, 4, 4)), None),
            None,
            jnp.ones((7, 2, 9, 2)),
        ),
        ValueError,
        r"`rnn\.recurrent`: expected a map that preserves the spatial shape \(9,\), got Conv\(.*padding='VALID'",
    ),
    "kernels of different axes": (
        lambda: jaxseq.conv_lstm(
            jaxseq.LSTMParams(jnp.ones((3, 2, 16)), jnp.ones((3, 3, 4, 16)), None), None, jnp.ones((7, 2, 9, 2))
        ),
        ValueError,
        r"`params\.w_h`: expected a kernel with 1 spatial axes, as in `params\.w_x`, got \(3, 3, 4, 16\)",
    ),
    "too few axes": (
        lambda: jaxseq.conv_lstm(KERNELS, None, jnp.ones((7, 2))),
        ValueError,
        r"`xs`: expected at least 3 axes \(time, \*batch, \*space, channels\), got 2",
    ),
    "time among space": (
        lambda: jaxseq.conv_lstm(
            KERNELS,
            None,
            jnp.ones((7, 2, 9, 2)),
            time_axis=2,
        ),
        ValueError,
        r"`time_axis`: expected an axis from 0 to 1 or from -4 to -3, before the spatial and channel axes, got 2",
    ),
    "integer gain": (
        lambda: jaxseq.recurrence(
            cells.peephole_lstm,
            cells.peephole_lstm_init(jax.random.key(0), 3, 5)._replace(p_i=jnp.ones(5, int)),
            None,
            jnp.ones((7, 2, 3), jnp.float32),
        ),
        TypeError,
        r"`params\.p_i`: expected a float array, got int64\[5\]",
    ),
    "heads": (
        lambda: cells.slstm_init(jax.random.key(0), 3, 8, heads=3),
        ValueError,
        r"`heads`: expected a divisor of `hidden_size`, 8, got 3",
    ),
}


@pytest.mark.other_types
def test_a_function_is_no_cell():
    expected = r"`cell`: expected a jaxseq\.Cell, .*; `jaxseq\.scan` runs a step function, got function"
    with pytest.raises(TypeError, match=expected):
        jaxseq.recurrence(fine, None, None, jnp.ones((7, 2, 3)))


@pytest.mark.parametrize(("call", "kind", "message"), BAD.values(), ids=BAD)
def test_a_bad_cell_is_reported_by_name_and_part(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_what_a_step_raises_says_whose_it_is():
    with pytest.raises(TypeError, match=r"^dot requires ") as caught:
        run(lambda a, h, p: h + jnp.dot(a, h))()
    assert any("`step` of the cell 'odd'" in note for note in caught.value.__notes__)


@pytest.mark.parametrize(
    ("step", "calls"),
    [(lambda a, s, p, L: s, 0), (lambda a, s, p, L: s._replace(h=L(s.s) + L(s.s)), 2)],
    ids=["none", "two"],
)
def test_calls_of_the_inner_product(step, calls):
    cell = VARIANTS["twice"].first[0]._replace(step=step)
    with pytest.raises(
        ValueError, match=rf"`twice\.step`: expected one call of L, the product with `params\.w_q`, got {calls}"
    ):
        jaxseq.recurrence(cell, *arguments("recurrence", "twice", jax.random.key(0)))


@pytest.mark.parametrize(
    ("init", "sizes"),
    [
        (jaxseq.gru_init, (3, 4)),
        (jaxseq.conv_gru_init, ((3,), 2, 4)),
        (cells.mgu_init, (3, 4)),
        (cells.peephole_lstm_init, (3, 4)),
        (cells.layer_norm_lstm_init, (3, 4)),
        (cells.layer_norm_gru_init, (3, 4)),
    ],
)
def test_initial_parameters_share_no_buffer(init, sizes, key):
    """Parameters that share a buffer could not be donated."""
    params = init(key, *sizes)
    jax.block_until_ready(jax.jit(lambda p: jax.tree.map(jnp.sin, p), donate_argnums=0)(params))


class TreeParams(NamedTuple):
    w_x: Any
    w_h: Any
    b: Any
    gains: Any


def test_a_cell_parameter_may_be_a_dict(key):
    step = lambda a, h, p: h + jnp.expand_dims(p.gains["rate"], range(h.ndim - 1)) * (jnp.tanh(a[0]) - h)  # noqa: E731
    cell = Cell("tree", "h", step, TreeParams)
    params = TreeParams(*jaxseq.rnn_init(key, 3, 5), gains={"rate": jnp.full(5, 0.1, jnp.float32)})
    loss = lambda f: lambda params: jnp.sum(f(cell, params, None, jnp.ones((4, 2, 3), jnp.float32))[1])  # noqa: E731
    found, expected = (jax.grad(loss(m.recurrence))(params) for m in (jaxseq, jaxseq.reference))
    assert_close(found, expected, relative=1e-5)
