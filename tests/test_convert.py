"""Conversion of weights: results and gradients equal those of other libraries, round trips, and errors.

The gradient of jaxseq is taken through the conversion, so it is with respect to the arrays of the other library and can
be compared with the gradient of that library.
"""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

import jaxseq
from jaxseq import GRUParams, LSTMParams, RNNParams, cells, convert, reference
from jaxseq._conv import ConvParams
from jaxseq._init import normal
from jaxseq.cells import ClassicGRUParams, MGUParams, ProjectedLSTMParams

T, B, D, H = 4, 2, 3, 5
WINDOW = (3, 2, 4)  # a convolution over n axes uses the first n
SPACE = (7, 6, 9)


@pytest.fixture(autouse=True, scope="module")
def in_double_as_users_have_it():
    """Enable float64 with JAX's default promotion, since the other libraries promote dtypes and ranks implicitly."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def drawn(key, tree):
    """Replace the leaves of `tree`, biases included, by random normal ones."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    new = [0.5 * normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
    return structure.unflatten(new)


def recurrence(op):
    """Return the function `(params, xs) -> ys` of jaxseq."""
    if op in ("rnn", "gru", "lstm", "conv_lstm"):
        return lambda params, xs, **options: getattr(jaxseq, op)(params, None, xs, **options)[1]
    return lambda params, xs: jaxseq.recurrence(getattr(cells, op), params, None, xs)[1]


def both(f, weights, xs, y_bar):
    """Return y and the cotangents of weights and xs."""

    def run(weights, xs, y_bar):
        y, pull = jax.vjp(f, weights, xs)
        return y, pull(y_bar)

    return jax.jit(run)(weights, xs, y_bar)


def agree(theirs, ours, weights, xs, key, *, tolerance=1e-12):
    """Assert that two functions of (weights, xs) agree, in value and in the pullback of a random cotangent."""
    y = jax.eval_shape(theirs, weights, xs)
    y_bar = normal(key, y.shape, y.dtype)

    expected = both(theirs, weights, xs, y_bar)
    with jax.numpy_dtype_promotion("strict"):
        assert_close(both(ours, weights, xs, y_bar), expected, tolerance)
    assert min(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected)) > 1e-3  # every leaf has an effect


def equal(a, b):
    assert jax.tree.leaves(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


# --- Flax ---


def xs_of(op, key, dtype=jnp.float64):
    """Return random inputs with time first, and two spatial axes for a convolutional cell."""
    return normal(key, (T, B, *((6, 7) if op == "conv_lstm" else ()), D), dtype)


LINEN = {
    "rnn": lambda nn: nn.SimpleCell(H, param_dtype=jnp.float64),
    "gru": lambda nn: nn.GRUCell(H, param_dtype=jnp.float64),
    "lstm": lambda nn: nn.LSTMCell(H, param_dtype=jnp.float64),
    "optimized": lambda nn: nn.OptimizedLSTMCell(H, param_dtype=jnp.float64),
    "mgu": lambda nn: nn.MGUCell(H, param_dtype=jnp.float64),
    "conv_lstm": lambda nn: nn.ConvLSTMCell(H, (3, 2), param_dtype=jnp.float64),
}


@pytest.mark.parametrize("name", LINEN)
def test_linen(name, key):
    nn = pytest.importorskip("flax.linen", reason="Flax is not installed (extra `peers`)")
    op = "lstm" if name == "optimized" else name
    layer, xs = nn.RNN(LINEN[name](nn), time_major=True), xs_of(op, key)
    if op == "conv_lstm":  # nn.RNN supports one feature axis only
        cell, zeros = LINEN[name](nn), jnp.zeros((B, 6, 7, H))
        variables = drawn(key, cell.init(key, (zeros, zeros), xs[0]))

        def apply(variables, xs):
            carry, ys = (zeros, zeros), []
            for x in xs:
                carry, y = cell.apply(variables, carry, x)
                ys.append(y)
            return jnp.stack(ys)

    else:
        variables, apply = drawn(key, layer.init(key, xs)), layer.apply
    agree(apply, lambda v, xs: recurrence(op)(convert.from_flax(op, v), xs), variables, xs, key)
    cell = variables["params"].get("cell", variables["params"])
    if op == "conv_lstm":
        cell = {"ih": cell["ih"], "hh": cell["hh"] | {"bias": jnp.zeros_like(cell["hh"]["bias"])}}
        assert_close(convert.to_flax(op, convert.from_flax(op, cell)), cell, 1e-15)  # rounding of b_f + 1 - 1
    else:
        equal(convert.to_flax(op, convert.from_flax(op, cell)), dict(cell))


NNX = {
    "rnn": lambda nnx, **o: nnx.SimpleCell(D, H, dtype=jnp.float64, **o),
    "gru": lambda nnx, **o: nnx.GRUCell(D, H, **o),
    "lstm": lambda nnx, **o: nnx.LSTMCell(D, H, **o),
    "optimized": lambda nnx, **o: nnx.OptimizedLSTMCell(D, H, **o),
}


@pytest.mark.parametrize("name", NNX)
def test_nnx(name, key):
    nnx = pytest.importorskip("flax.nnx", reason="Flax is not installed (extra `peers`)")
    op = "lstm" if name == "optimized" else name
    cell = NNX[name](nnx, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
    definition, state = nnx.split(cell)
    weights, xs = drawn(key, nnx.to_pure_dict(state)), xs_of(op, key)

    def theirs(weights, xs):
        own = jax.tree.map(lambda a: a, state)
        nnx.replace_by_pure_dict(own, weights)
        return nnx.RNN(nnx.merge(definition, own), time_major=True)(xs)

    agree(theirs, lambda w, xs: recurrence(op)(convert.from_nnx(op, w), xs), weights, xs, key)
    back = partial(convert.to_nnx, op, optimized=name == "optimized") if op == "lstm" else partial(convert.to_nnx, op)
    equal(back(convert.from_nnx(op, weights)), weights)
    nnx.update(cell, weights)
    for given in (cell, nnx.state(cell)):
        equal(convert.from_nnx(op, given), convert.from_nnx(op, weights))


@pytest.mark.parametrize("transpose_kernel", [False, True])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_convolutions_of_flax(axes, transpose_kernel, key):
    nn = pytest.importorskip("flax.linen", reason="Flax is not installed (extra `peers`)")
    nnx = pytest.importorskip("flax.nnx")
    x = normal(key, (B, *SPACE[:axes], 4), jnp.float64)
    conv = {"strides": 2, "padding": 1, "kernel_dilation": 2, "feature_group_count": 2, "param_dtype": jnp.float64}
    transposed = {
        "strides": (2,) * axes,
        "padding": "VALID",
        "kernel_dilation": (2,) * axes,
        "param_dtype": jnp.float64,
    }
    transposed["transpose_kernel"] = transpose_kernel
    linen = {
        "conv": nn.Conv(6, WINDOW[:axes], **conv),
        "conv_transpose": nn.ConvTranspose(6, WINDOW[:axes], **transposed),
    }
    ours = {"conv": {"stride": 2, "padding": 1, "groups": 2}, "conv_transpose": {"stride": 2}}
    ours = {op: own | {"dilation": 2} for op, own in ours.items()}
    own = {"transpose_kernel": transpose_kernel}
    for op, layer in linen.items():
        variables = drawn(key, layer.init(key, x))
        f = lambda v, x, op=op: getattr(jaxseq, op)(x, *convert.from_flax(op, v, **own), **ours[op])  # noqa: E731
        agree(layer.apply, f, variables, x, key)
        equal(convert.to_flax(op, convert.from_flax(op, variables, **own), **own), variables["params"])
    kinds = {"conv": (nnx.Conv, conv), "conv_transpose": (nnx.ConvTranspose, transposed)}
    for op, (kind, options) in kinds.items():
        module = kind(4, 6, WINDOW[:axes], rngs=nnx.Rngs(0), **options)
        params = convert.from_nnx(op, module)  # reads transpose_kernel from the module
        assert_close(getattr(jaxseq, op)(x, *params, **ours[op]), module(x))
        state = nnx.to_pure_dict(nnx.state(module))
        equal(convert.to_nnx(op, params, **own), {name: state[name] for name in ("kernel", "bias")})


# (kernel size, stride, dilation) of transposed convolutions: kernels smaller and larger than the stride, even and odd.
TRANSPOSED = [(2, 3, 1), (3, 2, 1), (4, 2, 2)]


def agree_in_float32(theirs, ours):
    assert ours.dtype == jnp.float32
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kernel_size", "stride", "dilation"), TRANSPOSED)
def test_padding_of_transposed_convolutions_of_flax(kernel_size, stride, dilation, key):
    """SAME is the same. VALID gives a longer output if the stride exceeds the kernel. Pairs pad the dilated input."""
    nn = pytest.importorskip("flax.linen", reason="Flax is not installed (extra `peers`)")
    x, K = normal(key, (B, 5, 4), jnp.float32), dilation * (kernel_size - 1) + 1
    layer = nn.ConvTranspose(6, (kernel_size,), strides=(stride,), kernel_dilation=(dilation,))
    variables = drawn(key, layer.init(key, x))
    own = convert.from_flax("conv_transpose", variables)
    for padding, translated, more in (
        ("SAME", "SAME", 0),
        ("VALID", "VALID", max(stride - K, 0)),
        ([(2, 1)], [(K - 1 - 2, K - 1 - 1)], 0),
        (1, K - 1 - 1, 0),
    ):
        options = {"stride": stride, "dilation": dilation, "padding": translated, "output_padding": more}
        y = jaxseq.conv_transpose(x, *own, **options)
        agree_in_float32(layer.clone(padding=padding).apply(variables, x), y)


# --- Haiku ---


@pytest.mark.parametrize("op", ["rnn", "lstm", "classic_gru", "conv_lstm"])
def test_haiku(op, key):
    hk = pytest.importorskip("haiku", reason="Haiku is not installed (extra `peers`)")
    xs = xs_of(op, key)
    kinds = {"rnn": hk.VanillaRNN, "lstm": hk.LSTM, "classic_gru": hk.GRU}

    def unroll(xs):
        cell = hk.Conv2DLSTM((6, 7), H, (3, 2), name="core") if op == "conv_lstm" else kinds[op](H, name="core")
        start = jax.tree.map(lambda a: a.astype(jnp.float64), cell.initial_state(B))
        return hk.dynamic_unroll(cell, hk.Linear(D, name="before")(xs) if xs.ndim == 3 else xs, start)[0]

    transformed = hk.without_apply_rng(hk.transform(unroll))
    weights = drawn(key, transformed.init(key, xs))
    options = {"activation": "relu"} if op == "rnn" else {}

    def ours(weights, xs):
        if xs.ndim == 3:
            xs = xs @ weights["before"]["w"] + jnp.broadcast_to(weights["before"]["b"], xs.shape)
        return recurrence(op)(convert.from_haiku(op, weights, name="core"), xs, **options)

    agree(transformed.apply, ours, weights, xs, key)
    own = {path: leaves for path, leaves in weights.items() if path.startswith("core")}
    for path, leaves in own.items():
        if path.endswith(("linear_1", "hidden_to_hidden")):  # to_haiku puts the sum of both biases into the first
            leaves["b"] = jnp.zeros_like(leaves["b"])
    back = convert.to_haiku(op, convert.from_haiku(op, own), name="core")
    assert_close(back, own, 1e-15) if "lstm" in op else equal(back, own)  # rounding of b_f + 1 - 1


def test_names_are_those_that_haiku_gives(key):
    hk = pytest.importorskip("haiku", reason="Haiku is not installed (extra `peers`)")
    cells = {
        "rnn": lambda: hk.VanillaRNN(H),
        "lstm": lambda: hk.LSTM(H),
        "classic_gru": lambda: hk.GRU(H),
        "conv_lstm": lambda: hk.Conv2DLSTM((6, 7), H, (3, 2)),
    }
    for op, cell in cells.items():
        step = hk.transform(lambda x, cell=cell: (core := cell())(x, core.initial_state(B)))
        names = jax.eval_shape(step.init, key, xs_of(op, key, jnp.float32)[0])
        assert set(convert.to_haiku(op, drawn(key, OURS[op]))) == set(names)


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("op", ["conv", "conv_transpose"])
def test_convolutions_of_haiku(op, axes, key):
    hk = pytest.importorskip("haiku", reason="Haiku is not installed (extra `peers`)")
    x = normal(key, (B, *SPACE[:axes], 4), jnp.float64)
    kind = getattr(hk, f"Conv{axes}D" + ("Transpose" if op == "conv_transpose" else ""))
    theirs, options = ({"rate": 2}, {"dilation": 2}) if op == "conv" else ({}, {})
    theirs |= {"stride": 1 + axes % 2, "padding": "VALID"}
    layer = hk.without_apply_rng(hk.transform(lambda x: kind(6, WINDOW[:axes], **theirs)(x)))  # noqa: PLW0108
    weights = drawn(key, layer.init(key, x))
    f = lambda w, x: getattr(jaxseq, op)(x, *convert.from_haiku(op, w), stride=1 + axes % 2, **options)  # noqa: E731
    agree(layer.apply, f, weights, x, key)
    equal(convert.to_haiku(op, convert.from_haiku(op, weights)), weights)  # under Haiku's default name


@pytest.mark.parametrize("padding", ["SAME", ((2, 1),), 7, 8])
def test_padding_of_transposed_convolutions_of_haiku(padding, key):
    """Pairs mean the same as in Flax. A number is an `output_shape`, to which padding="SAME" crops the output."""
    hk = pytest.importorskip("haiku", reason="Haiku is not installed (extra `peers`)")
    x, kernel_size, stride = normal(key, (B, 4, 4), jnp.float32), 3, 2
    options = {"output_shape": padding, "padding": "SAME"} if isinstance(padding, int) else {"padding": padding}
    layer = hk.transform(lambda x: hk.Conv1DTranspose(6, kernel_size, stride, **options)(x))  # noqa: PLW0108
    layer = hk.without_apply_rng(layer)
    weights = drawn(key, layer.init(key, x))
    if isinstance(padding, tuple):
        padding = [(kernel_size - 1 - lo, kernel_size - 1 - hi) for lo, hi in padding]
    elif isinstance(padding, int):
        cut = max((4 - 1) * stride + kernel_size - padding, 0)
        padding = [(cut // 2, cut - cut // 2)]
    y = jaxseq.conv_transpose(x, *convert.from_haiku("conv_transpose", weights), stride=stride, padding=padding)
    agree_in_float32(layer.apply(weights, x), y)


# --- Equinox ---


@pytest.mark.parametrize("op", ["gru", "lstm"])
@pytest.mark.parametrize("use_bias", [True, False])
def test_equinox(op, use_bias, key):
    eqx = pytest.importorskip("equinox", reason="Equinox is not installed (extra `peers`)")
    kind = {"gru": eqx.nn.GRUCell, "lstm": eqx.nn.LSTMCell}[op]
    cell = drawn(key, kind(D, H, use_bias=use_bias, key=key))
    xs = xs_of(op, key)

    def theirs(cell, xs):
        def one(xs):
            def body(state, x):
                state = cell(x, state)
                return state, jax.tree.leaves(state)[0]

            zero = jnp.zeros(H)
            return jax.lax.scan(body, (zero, zero) if op == "lstm" else zero, xs)[1]

        return jax.vmap(one, 1, 1)(xs)

    agree(theirs, lambda c, xs: recurrence(op)(convert.from_equinox(op, c), xs), cell, xs, key)
    other = kind(D, H, use_bias=use_bias, key=jax.random.fold_in(key, 1))
    equal(convert.to_equinox(op, convert.from_equinox(op, cell), other), cell)


@pytest.mark.parametrize(("axes", "groups"), [(1, 2), (2, 1), (2, 2), (3, 1)])
@pytest.mark.parametrize("op", ["conv", "conv_transpose"])
def test_convolutions_of_equinox(op, axes, groups, key):
    eqx = pytest.importorskip("equinox", reason="Equinox is not installed (extra `peers`)")
    kind = eqx.nn.Conv if op == "conv" else eqx.nn.ConvTranspose
    options = {"stride": 2, "padding": ((2, 1),) * axes, "dilation": 2, "groups": groups}
    options |= {"output_padding": 1} if op == "conv_transpose" else {}
    layer = drawn(key, kind(axes, 4, 6, WINDOW[:axes], key=key, **options))
    x = normal(key, (B, *SPACE[:axes], 4), jnp.float64)
    theirs = lambda layer, x: jnp.moveaxis(jax.vmap(layer)(jnp.moveaxis(x, -1, 1)), 1, -1)  # noqa: E731
    agree(theirs, lambda w, x: getattr(jaxseq, op)(x, *convert.from_equinox(op, w), **options), layer, x, key)
    other = kind(axes, 4, 6, WINDOW[:axes], key=jax.random.fold_in(key, 1), **options)
    equal(convert.to_equinox(op, convert.from_equinox(op, layer), other), layer)


@pytest.mark.parametrize(("kernel_size", "stride", "more"), [(3, 2, 0), (4, 2, 1), (1, 3, 1)])
def test_padding_same_of_transposed_convolutions_of_equinox(kernel_size, stride, more, key):
    """With output_padding, SAME crops the output by that many more."""
    eqx = pytest.importorskip("equinox", reason="Equinox is not installed (extra `peers`)")
    x = normal(key, (5, 4), jnp.float32)
    options = {"stride": stride, "padding": "SAME", "output_padding": more, "dtype": jnp.float32}
    layer = eqx.nn.ConvTranspose1d(4, 6, kernel_size, key=key, **options)
    total = kernel_size - stride + more
    lo = max(total // 2, 0)
    options = {"padding": [(lo, max(total - lo, 0))], "output_padding": max(lo - total, 0)} if more else {}
    options = {"padding": "SAME"} | options
    y = jaxseq.conv_transpose(x[None], *convert.from_equinox("conv_transpose", layer), stride=stride, **options)
    agree_in_float32(layer(x.T).T, y[0])


# --- Keras ---

KERAS = {
    "rnn": lambda layers, **o: layers.SimpleRNN(H, **o),
    "gru": lambda layers, **o: layers.GRU(H, **o),
    "classic_gru": lambda layers, **o: layers.GRU(H, reset_after=False, **o),
    "lstm": lambda layers, **o: layers.LSTM(H, **o),
    "conv_lstm": lambda layers, **o: layers.ConvLSTM2D(H, (3, 2), padding="same", **o),
}


@pytest.fixture
def keras(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras", reason="Keras is not installed (extra `peers`)")
    with jax.enable_x64(False):  # Keras converts float64 to float32
        yield keras


def stateless(layer, shape):
    """Return the weights of a layer, and its output as a function of weights and input."""
    layer.build(shape)
    others = [variable.value for variable in layer.non_trainable_variables]
    weights = [variable.value for variable in layer.trainable_variables]
    return weights, lambda weights, x: layer.stateless_call(weights, others, x)[0]


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("op", KERAS)
def test_keras(op, use_bias, key, keras):
    layer = KERAS[op](keras.layers, return_sequences=True, use_bias=use_bias)
    xs = xs_of(op, key, jnp.float32)
    weights, run = stateless(layer, (B, T, *xs.shape[2:]))
    weights = drawn(key, weights)
    theirs = lambda w, xs: run(w, xs.swapaxes(0, 1)).swapaxes(0, 1)  # noqa: E731
    ours = lambda w, xs: recurrence(op)(convert.from_keras(op, w), xs)  # noqa: E731
    agree(theirs, ours, weights, xs, key, tolerance=1e-5)
    equal(convert.to_keras(op, convert.from_keras(op, weights)), weights)
    layer.set_weights(weights)
    equal(convert.from_keras(op, layer), convert.from_keras(op, weights))


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("op", ["conv", "conv_transpose"])
def test_convolutions_of_keras(op, axes, key, keras):
    kind = getattr(keras.layers, f"Conv{axes}D" + ("Transpose" if op == "conv_transpose" else ""))
    x = normal(key, (B, *SPACE[:axes], 4), jnp.float32)
    own = {"groups": 2} if op == "conv" else {}
    weights, theirs = stateless(kind(6, WINDOW[:axes], strides=2, padding="valid", **own), x.shape)
    weights = drawn(key, weights)
    ours = lambda w, x: getattr(jaxseq, op)(x, *convert.from_keras(op, w), stride=2, **own)  # noqa: E731
    agree(theirs, ours, weights, x, key, tolerance=1e-5)
    equal(convert.to_keras(op, convert.from_keras(op, weights)), weights)


@pytest.mark.parametrize("output_padding", [None, 1])
@pytest.mark.parametrize(("kernel_size", "stride", "dilation"), [(2, 3, 1), (3, 2, 1), (4, 3, 1)])
def test_padding_of_transposed_convolutions_of_keras(kernel_size, stride, dilation, output_padding, key, keras):
    """With output_padding, "same" has another length. "valid" is longer if the stride exceeds the kernel size."""
    x, K = normal(key, (B, 5, 4), jnp.float32), dilation * (kernel_size - 1) + 1
    total = K - K % 2 - (output_padding or 0)
    lo = max(total // 2, 0)
    more = max(lo - total, 0)
    same = ("SAME", 0) if output_padding is None else ([(lo, total - lo + more)], more)
    for word, (padding, more) in {
        "same": same,
        "valid": ("VALID", max(stride - K, 0) if output_padding is None else output_padding),
    }.items():
        options = {"strides": stride, "dilation_rate": dilation, "padding": word, "output_padding": output_padding}
        weights, theirs = stateless(keras.layers.Conv1DTranspose(6, kernel_size, **options), x.shape)
        weights = drawn(key, weights)
        own = convert.from_keras("conv_transpose", weights)
        options = {"stride": stride, "dilation": dilation, "padding": padding, "output_padding": more}
        agree_in_float32(theirs(weights, x), jaxseq.conv_transpose(x, *own, **options))


def test_options_of_layers_of_keras(key, keras):
    """`go_backwards`, the padding of a ConvLSTM, and depthwise kernels convert as documented in docs/convert.md."""
    xs = xs_of("rnn", key, jnp.float32).swapaxes(0, 1)
    layer = keras.layers.SimpleRNN(H, return_sequences=True, go_backwards=True)
    theirs = layer(xs)
    _, ys = jaxseq.rnn(convert.from_keras("rnn", layer), None, xs, time_axis=1, reverse=True)
    agree_in_float32(theirs[:, ::-1], ys)

    xs = normal(key, (B, T, 9, D), jnp.float32)
    layer = keras.layers.ConvLSTM1D(H, 3, strides=2, return_sequences=True)
    theirs = layer(xs)
    params = convert.from_keras("conv_lstm", layer)
    agree_in_float32(theirs, jaxseq.conv_lstm(params, None, xs, time_axis=1, stride=2, padding="VALID")[1])

    layer = keras.layers.DepthwiseConv1D(3, depth_multiplier=2, bias_initializer="glorot_uniform")
    theirs = layer(xs[0])
    kernel, bias = (variable.value for variable in layer.weights)
    own = convert.from_keras("conv", [kernel.reshape(3, 1, D * 2), bias])
    agree_in_float32(theirs, jaxseq.conv(xs[0], *own, groups=D))


# --- torch ---


def in_torch(torch, layer, xs, key):
    """Return y, its cotangent, the weights and their gradients by name, and the gradient of xs."""
    with torch.no_grad():
        for i, parameter in enumerate(layer.parameters()):
            a = 0.5 * normal(jax.random.fold_in(key, i), tuple(parameter.shape), jnp.float64)
            parameter.copy_(torch.from_dlpack(a))
    x = torch.tensor(np.asarray(xs), requires_grad=True)
    y = layer(x)
    y = y[0] if isinstance(y, tuple) else y
    y_bar = normal(key, tuple(y.shape), jnp.float64)
    y.backward(torch.from_dlpack(y_bar))
    gradients = {name: jnp.asarray(p.grad.numpy()) for name, p in layer.named_parameters()}
    weights = {name: jnp.asarray(a.numpy()) for name, a in layer.state_dict().items()}
    return jnp.asarray(y.detach().numpy()), y_bar, weights, gradients, jnp.asarray(x.grad.numpy())


TORCH = {
    "rnn": ("RNN", {}),
    "relu": ("RNN", {"nonlinearity": "relu"}),
    "gru": ("GRU", {}),
    "lstm": ("LSTM", {}),
    "projected_lstm": ("LSTM", {"proj_size": 2}),
}
LAYERS = {
    "one": {},
    "without bias": {"bias": False},
    "three layers": {"num_layers": 3},
    "two directions": {"bidirectional": True},
    "two layers, two directions": {"num_layers": 2, "bidirectional": True, "bias": False},
}


# Each kind with one layer, and with several layers and both directions. The other layouts are tested for one kind each.
KINDS = [(name, layers) for name in TORCH for layers in ("one", "two layers, two directions")]
KINDS += [("lstm", "without bias"), ("gru", "three layers"), ("rnn", "two directions")]


@pytest.mark.parametrize(("name", "layers"), KINDS)
def test_torch(name, layers, key):
    torch = pytest.importorskip("torch", reason="torch is not installed (extra `peers`)")
    kind, options = TORCH[name]
    op, own = ("rnn", {"activation": "relu"}) if name == "relu" else (name, {})
    layer = getattr(torch.nn, kind)(D, H, **options, **LAYERS[layers], dtype=torch.float64)
    xs = xs_of(op, key)
    y, y_bar, weights, gradients, xs_bar = in_torch(torch, layer, xs, key)

    def ours(weights, xs):
        params = convert.from_torch(op, weights)
        f = getattr(jaxseq, op, None) or partial(jaxseq.recurrence, getattr(cells, op))
        f = partial(f, **own)
        if layers in ("one", "without bias"):
            return f(params, None, xs)[1]
        return jaxseq.stack(partial(jaxseq.bidirectional, f) if "two" in layers else f, params, None, xs)[1]

    assert_close(both(ours, weights, xs, y_bar), (y, (gradients, xs_bar)), 1e-12)
    assert len(gradients) == len(weights)

    params = convert.from_torch(op, layer)  # a module instead of a state dict
    equal(params, convert.from_torch(op, weights))
    back = convert.to_torch(op, params)
    equal(convert.from_torch(op, back), params)
    assert {k: a.shape for k, a in back.items()} == {k: a.shape for k, a in weights.items()}
    other = getattr(torch.nn, kind)(D, H, **options, **LAYERS[layers], dtype=torch.float64)
    other.load_state_dict({k: torch.from_dlpack(a) for k, a in back.items()})
    torch.testing.assert_close(other(torch.tensor(np.asarray(xs)))[0], torch.tensor(np.asarray(y)))
    if op == "gru":
        equal(back, weights)


def test_torch_cells_prefixes_and_copies(key):
    torch = pytest.importorskip("torch", reason="torch is not installed (extra `peers`)")
    cell = torch.nn.LSTMCell(D, H)
    model = torch.nn.ModuleDict({"before": torch.nn.Linear(2, D), "core": cell})
    params = convert.from_torch("lstm", model.state_dict(), prefix="core.")
    equal(params, convert.from_torch("lstm", cell))
    assert params.w_x.dtype == jnp.float32
    back = convert.to_torch("lstm", params, prefix="core.", cell=True)
    assert set(back) == {k for k in model.state_dict() if k.startswith("core")}
    x, h, c = (normal(k, (B, n), jnp.float32) for k, n in zip(jax.random.split(key, 3), (D, H, H), strict=True))
    want = cell(*(torch.from_dlpack(a) for a in (x,)), tuple(torch.from_dlpack(a) for a in (h, c)))[0]
    with jax.enable_x64(False):
        _, y = jaxseq.lstm_cell(params, jaxseq.LSTMState(h, c), x)
    np.testing.assert_allclose(y, want.detach().numpy(), rtol=1e-5, atol=1e-6)
    before = np.asarray(params.w_x).copy()
    with torch.no_grad():
        cell.weight_ih.zero_()
    np.testing.assert_array_equal(params.w_x, before)
    half = convert.from_torch("lstm", torch.nn.LSTM(D, H, dtype=torch.bfloat16))
    assert half.w_h.dtype == jnp.bfloat16


@pytest.mark.parametrize(("axes", "groups"), [(1, 2), (2, 1), (2, 2), (3, 1)])
@pytest.mark.parametrize("op", ["conv", "conv_transpose"])
def test_convolutions_of_torch(op, axes, groups, key):
    torch = pytest.importorskip("torch", reason="torch is not installed (extra `peers`)")
    kind = getattr(torch.nn, f"Conv{axes}d" if op == "conv" else f"ConvTranspose{axes}d")
    options = {"stride": 2, "padding": 1, "dilation": 2, "groups": groups}
    options |= {"output_padding": 1} if op == "conv_transpose" else {}
    x = normal(key, (B, *SPACE[:axes], 4), jnp.float64)
    layer = kind(4, 6, WINDOW[:axes], **options, dtype=torch.float64)
    y, y_bar, weights, gradients, x_bar = in_torch(torch, layer, jnp.moveaxis(x, -1, 1), key)
    ours = lambda w, x: getattr(jaxseq, op)(x, *convert.from_torch(op, w), **options)  # noqa: E731
    y, y_bar, x_bar = (jnp.moveaxis(a, 1, -1) for a in (y, y_bar, x_bar))
    assert_close(both(ours, weights, x, y_bar), (y, (gradients, x_bar)), 1e-12)
    equal(convert.to_torch(op, convert.from_torch(op, layer)), weights)


def test_padding_same_of_torch(key):
    """For a kernel of even size, torch pads one more at the end."""
    torch = pytest.importorskip("torch", reason="torch is not installed (extra `peers`)")
    x = normal(key, (B, 9, 4), jnp.float32)
    layer = torch.nn.Conv1d(4, 6, 4, padding="same", dilation=2)
    y = jaxseq.conv(x, *convert.from_torch("conv", layer), padding="SAME", dilation=2)
    agree_in_float32(layer(torch.tensor(np.asarray(x)).mT).mT.detach().numpy(), y)


def test_weights_that_torch_computes(key):
    """Parametrized weights, weights of a subclass, and tensors that torch conjugates or negates lazily."""
    torch = pytest.importorskip("torch", reason="torch is not installed (extra `peers`)")
    x = normal(key, (B, 9, 4), jnp.float32)

    class Causal(torch.nn.Conv1d):
        def __init__(self):
            super().__init__(4, 6, 3)

    layer = Causal().eval()
    with torch.no_grad():
        layer.weight.mul_(3)
    torch.nn.utils.parametrizations.weight_norm(layer)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(2)
    want = layer(torch.tensor(np.asarray(x)).mT).mT.detach().numpy()
    agree_in_float32(want, jaxseq.conv(x, *convert.from_torch("conv", layer)))
    model = torch.nn.ModuleDict({"first": layer})
    agree_in_float32(want, jaxseq.conv(x, *convert.from_torch("conv", model, prefix="first.")))

    weight = torch.complex(torch.randn(6, 4, 3), torch.randn(6, 4, 3))
    bias = torch.tensor([1 + 2j]).conj().imag  # contiguous, lazily negative
    assert bias.is_neg()
    params = convert.from_torch("conv", {"weight": weight.conj(), "bias": bias.expand(6)})
    np.testing.assert_array_equal(params.kernel, np.conj(weight.numpy()).transpose(2, 1, 0))
    np.testing.assert_array_equal(params.bias, -2 * np.ones(6))
    half = torch.nn.Conv1d(4, 6, 3, dtype=torch.bfloat16)
    kernel = convert.from_torch("conv", half).kernel
    assert kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(kernel.astype(jnp.float32), half.weight.detach().float().numpy().transpose(2, 1, 0))


def test_a_copy_does_not_follow_its_source():
    weight = np.ones((6, 4, 3), np.float32)
    kernel = convert.from_torch("conv", {"weight": weight}).kernel
    weight[:] = 2
    np.testing.assert_array_equal(kernel, 1)


def test_one_layer_without_biases_has_zeros_beside_one_with_them():
    """torch has biases in all layers or in none."""
    bare = OURS["gru"]._replace(b_x=None, b_h=None)
    state = convert.to_torch("gru", [OURS["gru"], bare])
    assert not state["bias_ih_l1"].any()
    assert len(convert.from_torch("gru", state)) == 2


# --- Round trips that start from jaxseq parameters; no other library is needed ---

OURS = {
    "rnn": RNNParams(*(np.ones(s) for s in [(D, H), (H, H), (H,)])),
    "gru": GRUParams(*(np.ones(s) for s in [(D, 3 * H), (H, 3 * H), (3 * H,), (3 * H,)])),
    "lstm": LSTMParams(*(np.ones(s) for s in [(D, 4 * H), (H, 4 * H), (4 * H,)])),
    "classic_gru": ClassicGRUParams(*(np.ones(s) for s in [(D, 3 * H), (H, 2 * H), (3 * H,), (H, H)])),
    "projected_lstm": ProjectedLSTMParams(*(np.ones(s) for s in [(D, 4 * H), (2, 4 * H), (4 * H,), (H, 2)])),
    "mgu": MGUParams(*(np.ones(s) for s in [(D, 2 * H), (H, 2 * H), (2 * H,), (2 * H,)])),
    "conv_lstm": LSTMParams(*(np.ones(s) for s in [(3, 2, D, 4 * H), (3, 2, H, 4 * H), (4 * H,)])),
    "conv": ConvParams(np.ones((3, 2, D, H)), np.ones(H)),
    "conv_transpose": ConvParams(np.ones((3, 2, H, D)), np.ones(H)),
}
WAYS = {
    "torch": (convert.to_torch, convert.from_torch, ("rnn", "gru", "lstm", "projected_lstm", "conv", "conv_transpose")),
    "flax": (
        convert.to_flax,
        convert.from_flax,
        ("rnn", "gru", "lstm", "mgu", "conv_lstm", "conv", "conv_transpose"),
    ),
    "nnx": (convert.to_nnx, convert.from_nnx, ("rnn", "gru", "lstm", "conv", "conv_transpose")),
    "haiku": (
        convert.to_haiku,
        convert.from_haiku,
        ("rnn", "lstm", "classic_gru", "conv_lstm", "conv", "conv_transpose"),
    ),
    "keras": (
        convert.to_keras,
        convert.from_keras,
        ("rnn", "gru", "classic_gru", "lstm", "conv_lstm", "conv", "conv_transpose"),
    ),
}
PAIRS = [pytest.param(library, op, id=f"{library}-{op}") for library, (_, _, ops) in WAYS.items() for op in ops]


def zeros_where_none(a, b):
    return a if a is not None or b is None else jnp.zeros_like(b)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("library", "op"), PAIRS)
def test_ours_come_back(library, op, bias, key):
    to, back, _ = WAYS[library]
    params = drawn(key, OURS[op])
    if library in ("flax", "nnx") and op in ("gru", "mgu"):  # Flax has b_h for the last gate only, nnx has none
        params = params._replace(b_h=None if library == "nnx" else params.b_h.at[:-H].set(0))
    if not bias:
        params = params._replace(**{f: None for f in params._fields if f in ("b", "b_x", "b_h", "bias")})
    there = to(op, params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(there))
    again = jax.jit(lambda there: back(op, there))(there)
    if bias or jax.tree.structure(again) != jax.tree.structure(params):  # a mandatory bias is zero
        full = type(again)(*map(zeros_where_none, params, again))
        one_more = library in ("haiku", "flax") and "lstm" in op and (library, op) != ("flax", "lstm")
        assert_close(again, full, 1e-15) if one_more else equal(again, full)
    else:
        equal(again, params)


def test_every_op_of_a_library_is_tried():
    modules = {name: getattr(convert, f"_{name}") for name in ("torch", "haiku", "keras", "equinox")}
    for name, (_, _, ops) in WAYS.items():
        held = {"flax": convert._flax.LINEN, "nnx": convert._flax.NNX}.get(name) or modules[name].OPS
        assert set(held) == set(ops)
    assert set(convert._equinox.OPS) == {"gru", "lstm", "conv", "conv_transpose"}


def test_a_second_bias_that_is_only_added_is_added(key):
    """Flax has one bias where jaxseq has two, and computes the same."""
    params = drawn(key, OURS["gru"])
    folded = convert.from_flax("gru", convert.to_flax("gru", params))
    assert not jnp.any(folded.b_h[:-H])
    xs = xs_of("gru", key)
    assert_close(reference.gru(folded, None, xs), reference.gru(params, None, xs))


# --- Errors ---


def refuses(f, *parts, error=ValueError):
    with pytest.raises(error) as raised:
        f()
    for part in parts:
        assert part in str(raised.value), str(raised.value)


def test_variants_of_the_gru_are_told_apart():
    three = [np.ones((D, 3 * H)), np.ones((H, 3 * H))]
    refuses(lambda: convert.from_haiku("gru", {}), "`op`", "'gru'", "resets before", "'classic_gru'")
    refuses(lambda: convert.from_torch("classic_gru", {}), "'classic_gru'", "resets after", "'gru'")
    refuses(lambda: convert.from_flax("classic_gru", {}), "'gru'")
    refuses(lambda: convert.from_nnx("classic_gru", {}), "'gru'")
    refuses(lambda: convert.from_equinox("classic_gru", {}), "'gru'")
    refuses(lambda: convert.to_haiku("gru", OURS["gru"]), "resets before")
    refuses(lambda: convert.from_keras("gru", [*three, np.ones(3 * H)]), "reset_after=False", "'classic_gru'")
    refuses(lambda: convert.from_keras("classic_gru", [*three, np.ones((2, 3 * H))]), "reset_after=True", "'gru'")
    refuses(lambda: convert.to_nnx("gru", OURS["gru"]), "no bias of h", "`params.b_h`")
    refuses(lambda: jax.jit(partial(convert.to_nnx, "gru"))(OURS["gru"]), "no bias of h")
    refuses(
        lambda: convert.from_flax("mgu", {"if": _dense(2), "in": _dense(2), "hf": _w(2), "hn": _w(2)}), "reset_gate"
    )


def _w(n):
    return {"kernel": np.ones((n, n))}


def _dense(n):
    return _w(n) | {"bias": np.ones(n)}


def test_layers_of_keras_say_what_their_weights_do_not(keras):
    layer = keras.layers.GRU(H, use_bias=False, reset_after=False)
    layer.build((B, T, D))
    refuses(lambda: convert.from_keras("gru", layer), "reset_after=False", "'classic_gru'")
    assert convert.from_keras("classic_gru", layer).b is None
    layer = keras.layers.LSTM(H, recurrent_activation="hard_sigmoid")
    layer.build((B, T, D))
    refuses(lambda: convert.from_keras("lstm", layer), "recurrent_activation", "hard_sigmoid", "sigmoid")


def test_modules_of_flax_and_equinox_say_what_their_weights_do_not(key):
    nnx = pytest.importorskip("flax.nnx", reason="Flax is not installed (extra `peers`)")
    eqx = pytest.importorskip("equinox", reason="Equinox is not installed (extra `peers`)")
    own = {"rngs": nnx.Rngs(0)}
    refuses(lambda: convert.from_nnx("rnn", nnx.SimpleCell(D, H, residual=True, **own)), "residual")
    refuses(lambda: convert.from_nnx("lstm", nnx.LSTMCell(D, H, gate_fn=jax.nn.hard_sigmoid, **own)), "gate_fn")
    refuses(lambda: convert.from_nnx("gru", nnx.GRUCell(D, H, activation_fn=jax.nn.relu, **own)), "activation_fn")
    circular = eqx.nn.Conv1d(4, 6, 3, padding=1, padding_mode="CIRCULAR", key=key)
    refuses(lambda: convert.from_equinox("conv", circular), "padding_mode", "CIRCULAR")
    small, bare = eqx.nn.LSTMCell(D, H + 1, key=key), eqx.nn.LSTMCell(D, H, use_bias=False, key=key)
    refuses(lambda: convert.to_equinox("lstm", OURS["lstm"], small), "`layer`", "weight_ih", "(20, 3)", "(24, 3)")
    refuses(lambda: convert.to_equinox("lstm", OURS["lstm"], bare), "`params`", "bias")


def subclass(kind, method):
    """Return a subclass that overrides `method`."""
    return type("Other", (kind,), {method: lambda self, *args: args[0]})


def with_lora(cell, nnx):
    cell.dense_i = nnx.LoRALinear(3, 20, lora_rank=2, use_bias=False, rngs=nnx.Rngs(0))
    return cell


def model(torch):
    return torch.nn.Sequential(torch.nn.Conv1d(4, 5, 3))


# Layers that compute something else: (library, requested op, layer, parts of the error message).
OTHER_EQUATIONS = {
    **{
        f"torch, {mode}": (
            "torch",
            "conv",
            lambda torch, mode=mode: torch.nn.Conv1d(4, 5, 3, padding=1, padding_mode=mode),
            ("Conv1d", f"padding_mode='{mode}'", f"jnp.pad(..., mode='{word}')"),
        )
        for mode, word in {"circular": "wrap", "reflect": "reflect", "replicate": "edge"}.items()
    },
    "torch, transposed": (
        "torch",
        "conv",
        lambda torch: torch.nn.ConvTranspose1d(4, 4, 3),
        ("ConvTranspose1d", "'conv_transpose'"),
    ),
    "torch, not transposed": (
        "torch",
        "conv_transpose",
        lambda torch: torch.nn.Conv1d(4, 4, 3),
        ("Conv1d", "is 'conv'"),
    ),
    "torch, another gate": ("torch", "lstm", lambda torch: torch.nn.GRU(3, 5), ("GRU", "the op for a GRU is 'gru'")),
    "torch, another class": ("torch", "conv", lambda torch: torch.nn.Linear(3, 5), ("Linear", "state_dict()")),
    "torch, a model": ("torch", "conv", model, ("Sequential", "`prefix`")),
    "torch, overridden": (
        "torch",
        "conv",
        lambda torch: subclass(torch.nn.Conv1d, "forward")(4, 5, 3),
        ("Other overrides `forward`",),
    ),
    "torch, lazy": ("torch", "conv", lambda torch: torch.nn.LazyConv1d(5, 3), ("'weight' with data", "run")),
    "torch, meta": ("torch", "conv", lambda torch: torch.nn.Conv1d(4, 5, 3, device="meta"), ("'weight' with data",)),
    "torch, in training": (
        "torch",
        "conv",
        lambda torch: torch.nn.utils.parametrizations.spectral_norm(torch.nn.Conv1d(4, 5, 3)),
        ("training mode", "eval()"),
    ),
    "nnx, mask": (
        "nnx",
        "conv",
        lambda nnx: nnx.Conv(4, 5, (3,), mask=jnp.ones((3, 4, 5)), rngs=nnx.Rngs(0)),
        ("mask", "layer.kernel * layer.mask"),
    ),
    "nnx, mask of a transposed one": (
        "nnx",
        "conv_transpose",
        lambda nnx: nnx.ConvTranspose(4, 5, (3,), mask=jnp.ones((3, 4, 5)), rngs=nnx.Rngs(0)),
        ("mask",),
    ),
    **{
        f"nnx, {padding}": (
            "nnx",
            "conv",
            lambda nnx, padding=padding: nnx.Conv(4, 5, (3,), padding=padding, rngs=nnx.Rngs(0)),
            (f"padding='{padding}'", "nnx.state"),
        )
        for padding in ("CIRCULAR", "REFLECT")
    },
    "nnx, CIRCULAR, transposed": (
        "nnx",
        "conv_transpose",
        lambda nnx: nnx.ConvTranspose(4, 5, (3,), padding="CIRCULAR", rngs=nnx.Rngs(0)),
        ("padding='CIRCULAR'",),
    ),
    "nnx, input_dilation": (
        "nnx",
        "conv",
        lambda nnx: nnx.Conv(4, 5, (3,), input_dilation=2, rngs=nnx.Rngs(0)),
        ("input_dilation=2", "zeros between"),
    ),
    "nnx, another function": (
        "nnx",
        "conv",
        lambda nnx: nnx.Conv(4, 5, (3,), conv_general_dilated=lambda x, *args, **options: x, rngs=nnx.Rngs(0)),
        ("conv_general_dilated",),
    ),
    "nnx, promoted": (
        "nnx",
        "gru",
        lambda nnx: nnx.GRUCell(3, 5, promote_dtype=lambda arrays, **options: arrays, rngs=nnx.Rngs(0)),
        ("promote_dtype",),
    ),
    "nnx, a layer within": (
        "nnx",
        "lstm",
        lambda nnx: with_lora(nnx.OptimizedLSTMCell(3, 5, rngs=nnx.Rngs(0)), nnx),
        ("LoRALinear",),
    ),
    "nnx, transposed": (
        "nnx",
        "conv",
        lambda nnx: nnx.ConvTranspose(4, 4, (3,), rngs=nnx.Rngs(0)),
        ("ConvTranspose", "'conv_transpose'"),
    ),
    "nnx, not transposed": (
        "nnx",
        "conv_transpose",
        lambda nnx: nnx.Conv(4, 4, (3,), rngs=nnx.Rngs(0)),
        ("Conv", "is 'conv'"),
    ),
    "nnx, overridden": (
        "nnx",
        "gru",
        lambda nnx: subclass(nnx.GRUCell, "__call__")(3, 5, rngs=nnx.Rngs(0)),
        ("overrides `__call__`", "nnx.state"),
    ),
    "nnx, RNN": (
        "nnx",
        "lstm",
        lambda nnx: nnx.RNN(nnx.LSTMCell(3, 5, rngs=nnx.Rngs(0))),
        ("RNN", "pass its `cell`"),
    ),
    "Equinox, transposed": (
        "equinox",
        "conv",
        lambda eqx: eqx.nn.ConvTranspose1d(4, 4, 3, key=jax.random.key(0)),
        ("ConvTranspose1d", "'conv_transpose'"),
    ),
    "Equinox, not transposed": (
        "equinox",
        "conv_transpose",
        lambda eqx: eqx.nn.Conv1d(4, 4, 3, key=jax.random.key(0)),
        ("Conv1d", "is 'conv'"),
    ),
    "Equinox, circular, transposed": (
        "equinox",
        "conv_transpose",
        lambda eqx: eqx.nn.ConvTranspose1d(4, 4, 3, padding="SAME", padding_mode="CIRCULAR", key=jax.random.key(0)),
        ("padding_mode='CIRCULAR'",),
    ),
    "Equinox, another gate": (
        "equinox",
        "gru",
        lambda eqx: eqx.nn.LSTMCell(3, 5, key=jax.random.key(0)),
        ("LSTMCell", "'lstm'"),
    ),
    "Equinox, normalized": (
        "equinox",
        "conv",
        lambda eqx: eqx.nn.WeightNorm(eqx.nn.Conv1d(4, 4, 3, key=jax.random.key(0))),
        ("WeightNorm",),
    ),
    "Equinox, partitioned": (
        "equinox",
        "conv",
        lambda eqx: eqx.tree_at(lambda layer: layer.bias, eqx.nn.Conv1d(4, 4, 3, key=jax.random.key(0)), replace=None),
        ("use_bias=True", "no bias"),
    ),
    "Equinox, a bias that is not added": (
        "equinox",
        "conv",
        lambda eqx: eqx.tree_at(
            lambda layer: layer.bias,
            eqx.nn.Conv1d(4, 4, 3, use_bias=False, key=jax.random.key(0)),
            replace=jnp.ones((4, 1)),
            is_leaf=lambda leaf: leaf is None,
        ),
        ("use_bias=False", "a bias that it does not add"),
    ),
    "Keras, activation": (
        "keras",
        "conv",
        lambda keras: keras.layers.Conv1D(5, 3, activation="relu"),
        ("Conv1D", "activation='relu'", "get_weights()"),
    ),
    "Keras, transposed": (
        "keras",
        "conv",
        lambda keras: keras.layers.Conv1DTranspose(5, 3),
        ("Conv1DTranspose", "'conv_transpose'"),
    ),
    "Keras, not transposed": (
        "keras",
        "conv_transpose",
        lambda keras: keras.layers.Conv1D(5, 3),
        ("Conv1D", "is 'conv'"),
    ),
    "Keras, another gate": (
        "keras",
        "lstm",
        lambda keras: keras.layers.GRU(5),
        ("GRUCell", "is 'gru'"),
    ),
    "Keras, depthwise": (
        "keras",
        "conv",
        lambda keras: keras.layers.DepthwiseConv1D(3, depth_multiplier=2, use_bias=False),
        ("DepthwiseConv1D", "kernel.reshape", "groups=channels"),
    ),
    "Keras, separable": (
        "keras",
        "conv",
        lambda keras: keras.layers.SeparableConv1D(5, 3, use_bias=False),
        ("SeparableConv1D", "two convolutions"),
    ),
    "Keras, overridden": (
        "keras",
        "lstm",
        lambda keras: subclass(keras.layers.LSTM, "call")(5),
        ("overrides `call`",),
    ),
    "Keras, gates of a cell": (
        "keras",
        "lstm",
        lambda keras: keras.layers.RNN(keras.layers.LSTMCell(5, recurrent_activation="hard_sigmoid")),
        ("recurrent_activation", "hard_sigmoid"),
    ),
    "Keras, a layer for an activation": (
        "keras",
        "gru",
        lambda keras: keras.layers.GRU(5, activation=keras.layers.LeakyReLU()),
        ("activation is LeakyReLU", "tanh"),
    ),
    "Keras, two directions": (
        "keras",
        "lstm",
        lambda keras: keras.layers.Bidirectional(keras.layers.LSTM(5)),
        ("Bidirectional", "forward_layer"),
    ),
    "Keras, not built": ("keras", "lstm", lambda keras: keras.layers.LSTM(5), ("call or build it first",)),
}


@pytest.mark.parametrize("name", OTHER_EQUATIONS)
def test_layers_with_other_equations(name, request):
    library, op, make, parts = OTHER_EQUATIONS[name]
    if library == "keras":
        module = request.getfixturevalue("keras")
    else:
        module = pytest.importorskip({"nnx": "flax.nnx"}.get(library, library), reason="not installed (extra `peers`)")
    layer = make(module)
    refuses(lambda: getattr(convert, f"from_{library}")(op, layer), *parts)


def flax_cell(op, *, of_x=(), of_h=()):
    """Return the dict of a Flax cell with biases at the named gates."""
    gates = {"lstm": "ifgo", "gru": "rzn", "rnn": [""]}[op]
    return {
        letter + gate: {"kernel": np.ones((size, H))} | ({"bias": np.ones(H)} if gate in biased else {})
        for letter, size, biased in (("i", D, of_x), ("h", H, of_h))
        for gate in gates
    }


CONV, TRANSPOSED_CONV = np.ones((3, D, H)), np.ones((3, H, D))  # jaxseq kernels, from D to H channels
HAIKU_CONV_LSTM = {"input_to_hidden": {"w": np.ones((3, D, 20))}, "hidden_to_hidden": {"w": np.ones((3, H, 20))}}
STATE = {"weight_ih_l0": np.ones((4 * H, D)), "weight_hh_l0": np.ones((4 * H, H))}
BIASES = {"bias_ih_l0": np.ones(4 * H), "bias_hh_l0": np.ones(4 * H)}
DENSE = {"dense_i": {"kernel": np.ones((D, 20))}, "dense_h": {"kernel": np.ones((H, 20)), "bias": np.ones(20)}}
# Biases of some gates only, or one of two biases; unexpected arrays.
PARTIAL = {
    "torch, one of two": (
        lambda: convert.from_torch("lstm", STATE | {"bias_ih_l0": np.ones(4 * H)}),
        ("bias_ih_l0 without bias_hh_l0",),
    ),
    "torch, one of two layers": (
        lambda: convert.from_torch(
            "lstm", STATE | BIASES | {"weight_ih_l1": np.ones((20, H)), "weight_hh_l1": np.ones((20, H))}
        ),
        ("bias_ih_l0 without bias_ih_l1",),
    ),
    "Flax, no bias of ho": (
        lambda: convert.from_flax("lstm", flax_cell("lstm", of_h="ifg")),
        ("hi.bias without ho.bias",),
    ),
    "Flax, no bias of hi": (lambda: convert.from_flax("lstm", flax_cell("lstm", of_h="o")), ("without hi.bias",)),
    "Flax, a bias beside ii": (
        lambda: convert.from_flax("lstm", flax_cell("lstm", of_x="i", of_h="ifgo")),
        ("'ii.bias'",),
    ),
    "Flax, a bias beside hr": (
        lambda: convert.from_flax("gru", flax_cell("gru", of_x="rzn", of_h="rn")),
        ("'hr.bias'",),
    ),
    "Flax, no bias of ir": (lambda: convert.from_flax("gru", flax_cell("gru", of_x="zn", of_h="n")), ("ir.bias",)),
    "Flax, a bias beside h": (
        lambda: convert.from_flax("rnn", flax_cell("rnn", of_x=[""], of_h=[""])),
        ("'h.bias'",),
    ),
    "Flax, one of two of a ConvLSTM": (
        lambda: convert.from_flax(
            "conv_lstm",
            {"ih": {"kernel": np.ones((3, D, 20)), "bias": np.ones(20)}, "hh": {"kernel": np.ones((3, H, 20))}},
        ),
        ("ih.bias without hh.bias",),
    ),
    "Flax, a size of n": (
        lambda: convert.from_flax(
            "gru", flax_cell("gru", of_x="rzn", of_h="n") | {"hn": {"kernel": np.ones((H, H)), "bias": np.ones(1)}}
        ),
        ("'hn.bias'", "(5,)", "(1,)"),
    ),
    "Flax, gates of several sizes": (
        lambda: convert.from_flax(
            "lstm",
            flax_cell("lstm") | {"ii": {"kernel": np.ones((D, H - 1))}, "if": {"kernel": np.ones((D, H + 1))}},
        ),
        ("'if.kernel' of shape (3, 4)", "(3, 6)"),
    ),
    "Flax, biases of several sizes": (
        lambda: convert.from_flax(
            "rnn", {"i": {"kernel": np.ones((D, H)), "bias": np.ones((1, H))}, "h": {"kernel": np.ones((H, H))}}
        ),
        ("bias of x", "(5,)", "(1, 5)"),
    ),
    "Flax, another layer beside": (
        lambda: convert.from_flax("lstm", flax_cell("lstm", of_h="ifgo") | {"norm": {"scale": np.ones(H)}}),
        ("'norm.scale'",),
    ),
    "nnx, another layer beside": (
        lambda: convert.from_nnx("lstm", DENSE | {"norm": {"scale": np.ones(H)}}),
        ("'norm.scale'",),
    ),
    "nnx, a mask beside": (
        lambda: convert.from_nnx("conv", {"kernel": CONV, "mask": np.ones((3, D, H))}),
        ("'mask'",),
    ),
    "Haiku, one of two of a ConvLSTM": (
        lambda: convert.from_haiku(
            "conv_lstm",
            HAIKU_CONV_LSTM | {"input_to_hidden": HAIKU_CONV_LSTM["input_to_hidden"] | {"b": np.ones(20)}},
        ),
        ("input_to_hidden: b without hidden_to_hidden: b",),
    ),
    "Haiku, the second of two": (
        lambda: convert.from_haiku(
            "rnn", {"linear": {"w": np.ones((D, H))}, "linear_1": {"w": np.ones((H, H)), "b": np.ones(H)}}
        ),
        ("linear_1: b without linear: b",),
    ),
    "Haiku, none of an LSTM": (lambda: convert.from_haiku("lstm", {"lstm": {"w": np.ones((8, 20))}}), ("'b' in it",)),
    "Haiku, another array beside": (
        lambda: convert.from_haiku("lstm", {"lstm": {"w": np.ones((8, 20)), "b": np.ones(20), "scale": np.ones(5)}}),
        ("'scale'",),
    ),
    "Haiku, two modules of one name": (
        lambda: convert.from_haiku("conv_lstm", {f"{a}/{b}": c for a in "ab" for b, c in HAIKU_CONV_LSTM.items()}),
        ("select it by `name`", "a/input_to_hidden"),
    ),
    "Equinox, no bias_n": (
        lambda: convert.from_equinox(
            "gru", SimpleNamespace(weight_ih=np.ones((15, D)), weight_hh=np.ones((15, H)), bias=np.ones(15))
        ),
        ("bias without bias_n",),
    ),
    "Keras, a number too many": (
        lambda: convert.from_keras("lstm", [np.ones((D, 20)), np.ones((H, 20)), np.ones(20), np.ones(20)]),
        ("4 arrays",),
    ),
}


@pytest.mark.parametrize("name", PARTIAL)
def test_biases_are_all_there_or_none(name):
    f, parts = PARTIAL[name]
    refuses(f, "`weights`", *parts)


def equinox_conv(kernel, bias):
    return SimpleNamespace(weight=kernel.transpose(2, 1, 0), bias=bias, groups=1)


# A convolution from 3 to 5 channels, as each library stores it.
FROM = {
    "torch": lambda kernel, bias: {"weight": kernel.transpose(2, 1, 0), "bias": bias},
    "flax": lambda kernel, bias: {"kernel": kernel, "bias": bias},
    "nnx": lambda kernel, bias: {"kernel": kernel, "bias": bias},
    "haiku": lambda kernel, bias: {"conv1_d": {"w": kernel, "b": bias}},
    "equinox": equinox_conv,
    "keras": lambda kernel, bias: [kernel, bias],
}


@pytest.mark.parametrize("op", ["conv", "conv_transpose"])
@pytest.mark.parametrize("library", FROM)
def test_sizes_of_biases_of_convolutions(library, op):
    """In either direction, a bias has one element for each output channel."""
    come, kernel = getattr(convert, f"from_{library}"), {"conv": CONV, "conv_transpose": TRANSPOSED_CONV}[op]
    stored = partial(FROM[library], CONV if library in ("flax", "nnx", "equinox") else kernel)
    assert come(op, stored(np.ones(H))).bias.shape == (H,)
    for bias in np.ones(D), np.ones(1), np.ones((H, H)), np.ones((1, H)), np.ones(()):
        parts = "bias", op, str(bias.shape)
        refuses(partial(come, op, stored(bias)), "`weights`", *parts)
        if library != "equinox":
            refuses(partial(getattr(convert, f"to_{library}"), op, ConvParams(kernel, bias)), "`params`", *parts)
    if library not in ("torch", "equinox"):
        refuses(partial(come, op, FROM[library](kernel[0], np.ones(H))), "`weights`", "3 to 5 axes")


def test_groups_of_transposed_convolutions():
    """torch and Equinox support them. For the other libraries, the size of the bias reveals that they do not fit."""
    grouped = ConvParams(np.ones((3, 2, 4)), np.ones(4))  # 4 to 4 channels in 2 groups
    assert convert.from_torch("conv_transpose", convert.to_torch("conv_transpose", grouped)).bias.shape == (4,)
    refuses(lambda: convert.to_torch("conv_transpose", grouped._replace(bias=np.ones(6))), "groups divide 4")
    for to in convert.to_flax, convert.to_nnx, convert.to_haiku, convert.to_keras:
        refuses(partial(to, "conv_transpose", grouped), "`params`", "bias", "(2,)", "(4,)")


SIZES = {
    "w_h": ("lstm", OURS["lstm"]._replace(w_h=np.ones((H + 1, 4 * H))), "recurrent map"),
    "b": ("lstm", OURS["lstm"]._replace(b=np.ones(4)), "bias of x"),
    "b_h": ("gru", OURS["gru"]._replace(b_h=np.ones(H)), "bias of h"),
    "gates": ("gru", OURS["gru"]._replace(w_x=np.ones((D, 16))), "3 gates"),
    "kernels for matrices": ("lstm", OURS["conv_lstm"], "matrices"),
    "matrices for kernels": ("conv_lstm", OURS["lstm"], "kernels"),
    "w_q": ("classic_gru", OURS["classic_gru"]._replace(w_q=np.ones((H, 1))), "(H, H)"),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_of_our_parameters(name):
    op, params, part = SIZES[name]
    for to, _, ops in WAYS.values():
        if op in ops:
            refuses(partial(to, op, params), "`params", part)


def test_a_projection_has_the_units_of_its_lstm():
    state = {"weight_ih_l0": np.ones((20, D)), "weight_hh_l0": np.ones((20, 2)), "weight_hr_l0": np.ones((2, 4))}
    refuses(lambda: convert.from_torch("projected_lstm", state), "projection", "(5, 2)", "(4, 2)")
    complex_ = {name: a.astype(complex) for name, a in STATE.items()}
    refuses(lambda: convert.from_torch("lstm", complex_), "float arrays", "complex128", error=TypeError)


MISTAKES = {
    "unknown op": (lambda: convert.from_torch("transformer", STATE), ValueError, ("`op`", "'lstm'")),
    "an LSTM taken for a GRU": (lambda: convert.from_torch("gru", STATE), ValueError, ("`weights`", "3 gates")),
    "an LSTM taken for an RNN": (lambda: convert.from_torch("rnn", STATE), ValueError, ("1 gates", "(5, 20)")),
    "an unexpected projection": (
        lambda: convert.from_torch("lstm", STATE | {"weight_hr_l0": np.ones((2, H))}),
        ValueError,
        ("weight_hr", "'projected_lstm'"),
    ),
    "no projection": (lambda: convert.from_torch("projected_lstm", STATE), ValueError, ("no projection", "'lstm'")),
    "a name too many": (lambda: convert.from_torch("lstm", STATE | {"weight": 1}), ValueError, ("'weight'",)),
    "a name too few": (
        lambda: convert.from_torch("lstm", {"weight_ih_l0": STATE["weight_ih_l0"]}),
        ValueError,
        ("'weight_hh' in it",),
    ),
    "a layer too few": (
        lambda: convert.from_torch("lstm", {k.replace("l0", "l1"): a for k, a in STATE.items()}),
        ValueError,
        ("2 layers", "layer 0"),
    ),
    "another prefix": (
        lambda: convert.from_torch("lstm", STATE, prefix="rnn."),
        ValueError,
        ("'rnn.'", "weight_ih_l0"),
    ),
    "no state dict": (lambda: convert.from_torch("lstm", np.ones(3)), TypeError, ("`weights`", "state_dict")),
    "integers": (lambda: convert.from_torch("lstm", {"weight_ih_l0": np.ones((20, 3), int)}), TypeError, ("int64",)),
    "a bias of another size": (
        lambda: convert.from_torch("lstm", STATE | BIASES | {"bias_ih_l0": np.ones(H)}),
        ValueError,
        ("bias of x", "(20,)", "(5,)"),
    ),
    "a dense weight": (lambda: convert.from_torch("conv", {"weight": np.ones((3, 4))}), ValueError, ("3 to 5 axes",)),
    "names of no convolution": (lambda: convert.from_torch("conv", STATE), ValueError, ("'weight' and 'bias'",)),
    "parameters of a GRU": (lambda: convert.to_torch("lstm", OURS["gru"]), TypeError, ("`params`", "LSTMParams")),
    "layers for a cell": (lambda: convert.to_torch("gru", [OURS["gru"]], cell=True), ValueError, ("`cell`",)),
    "not a layer": (lambda: convert.to_torch("gru", [1, 2]), TypeError, ("`params`", "GRUParams", "int 1")),
    "three directions": (
        lambda: convert.to_torch("gru", [[OURS["gru"]] * 3]),
        ValueError,
        ("`params`", "two directions", "3 in layer 0"),
    ),
    "arguments the other way round": (lambda: convert.from_torch(STATE, "lstm"), TypeError, ("`op`", "'lstm'", "dict")),
    "no layers": (lambda: convert.to_torch("gru", []), TypeError, ("`params`", "GRUParams")),
    "Flax without a gate": (lambda: convert.from_flax("lstm", {"ii": _w(2)}), ValueError, ("'if' in it", "ii")),
    "Flax, no dict": (lambda: convert.from_flax("lstm", np.ones(3)), TypeError, ("`weights`", "dict")),
    "nnx without its maps": (lambda: convert.from_nnx("gru", {"kernel": np.ones(3)}), ValueError, ("'dense_i' in it",)),
    "an invalid transpose_kernel": (
        lambda: convert.from_flax("conv", _w(2), transpose_kernel=1),
        TypeError,
        ("`transpose_kernel`", "True or False"),
    ),
    "Haiku, several modules": (
        lambda: convert.from_haiku("lstm", {"a": _w(2), "b": _w(2)}),
        ValueError,
        ("select it by `name`", "a, b"),
    ),
    "Haiku, another name": (lambda: convert.from_haiku("lstm", {"a": _w(2)}, name="b"), ValueError, ("'b' in it", "a")),
    "Haiku, arrays": (lambda: convert.from_haiku("lstm", {"w": np.ones(3)}), TypeError, ("`weights`", "dicts")),
    "Keras, too few": (lambda: convert.from_keras("lstm", [np.ones((3, 20))]), ValueError, ("2 arrays", "1 arrays")),
    "Keras, no list": (lambda: convert.from_keras("lstm", np.ones(3)), TypeError, ("`weights`", "get_weights")),
    "Equinox has no such cell": (lambda: convert.from_equinox("rnn", None), ValueError, ("no cell without gates",)),
    "Equinox, no module": (lambda: convert.from_equinox("lstm", {}), ValueError, ("'weight_ih' in it",)),
}


@pytest.mark.other_types
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake):
    f, error, parts = MISTAKES[mistake]
    refuses(f, *parts, error=error)


def test_no_library_is_imported():
    import ast
    from pathlib import Path

    files = list(Path(jaxseq.__file__).parent.rglob("*.py"))
    assert Path(convert.__file__) in files
    for file in files:
        if file.parent.name == "integrations":  # imported by its users only
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in names} & {"torch", "flax", "haiku", "equinox", "keras"}, file
