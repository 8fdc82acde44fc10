"""Convolution against SciPy and against loops over indices, and its geometry against the formula."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
from helpers import assert_close, causal_conv, normals, pullback, subjaxprs
from hypothesis import assume, given, settings, strategies

import jaxseq
from jaxseq import _geometry
from jaxseq._init import normal
from jaxseq.tuning import CPU

MODES = {"valid": "VALID", "same": 1, "full": 2}  # the kernel size is 3 along each axis


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("flip", [False, True])
def test_equals_scipy(axes, mode, flip, key):
    """Compare with scipy.signal.correlate and scipy.signal.convolve, one channel at a time."""
    x = normal(key, (2, *(7, 6, 5)[:axes], 2))
    w = normal(jax.random.fold_in(key, 1), (3,) * axes + (2, 3))
    theirs = scipy.signal.convolve if flip else scipy.signal.correlate
    expected = np.stack(
        [
            [
                sum(theirs(np.asarray(x)[b, ..., i], np.asarray(w)[..., i, o], mode=mode) for i in range(2))
                for o in range(3)
            ]
            for b in range(2)
        ]
    )
    actual = jaxseq.conv(x, w, padding=MODES[mode], flip=flip)
    np.testing.assert_allclose(actual, np.moveaxis(expected, 1, -1), atol=1e-12)


@pytest.mark.parametrize("flip", [False, True])
def test_strided_and_dilated_equals_scipy(flip, key):
    """A dilated kernel has zeros between its taps, and a stride selects outputs."""
    x, w = normal(key, (11, 1)), normal(jax.random.fold_in(key, 1), (3, 1, 1))
    spread = np.zeros(5)
    spread[::2] = np.asarray(w)[:, 0, 0]
    theirs = scipy.signal.convolve if flip else scipy.signal.correlate
    expected = theirs(np.asarray(x)[:, 0], spread, mode="full")[::3]
    actual = jaxseq.conv(x, w, padding=4, dilation=2, stride=3, flip=flip)
    np.testing.assert_allclose(actual[:, 0], expected, atol=1e-13)


def loops(x, w, stride, padding, dilation, groups):
    """Return (y, x̄, w̄) by loops over indices, for the loss sum(y * y) / 2, so that ȳ = y."""
    (I, C), (K, per_in, c_out) = x.shape, w.shape
    lo, hi = padding
    O = (I + lo + hi - dilation * (K - 1) - 1) // stride + 1
    places = [
        (n, k, m, i, o)
        for n, k, i, o in itertools.product(range(O), range(K), range(per_in), range(c_out))
        if 0 <= (m := stride * n + dilation * k - lo) < I
    ]
    y, x_bar, w_bar = np.zeros((O, c_out)), np.zeros_like(x), np.zeros_like(w)
    channel = lambda i, o: o // (c_out // groups) * per_in + i  # noqa: E731
    for n, k, m, i, o in places:
        y[n, o] += x[m, channel(i, o)] * w[k, i, o]
    for n, k, m, i, o in places:
        x_bar[m, channel(i, o)] += y[n, o] * w[k, i, o]
        w_bar[k, i, o] += y[n, o] * x[m, channel(i, o)]
    assert per_in * groups == C
    return y, x_bar, w_bar


# (stride, padding, dilation, groups): each kind of padding with each kind of stride
GEOMETRIES = [
    (1, (0, 0), 1, 1),
    (2, (1, 3), 1, 2),
    (3, (4, 0), 2, 1),
    (2, (-2, 1), 3, 2),
    (1, (0, -4), 1, 1),
    (5, (9, 7), 2, 2),
    # Cropped or padded beyond the opposite edge, where some XLA backends read wrong elements without a workaround.
    (1, (-12, 16), 1, 1),
    (8, (14, -9), 1, 1),
    (4, (16, -11), 1, 2),
    (1, (13, -12), 1, 1),
]


def compare_with_loops(size, kernel_size, stride, padding, dilation, groups):
    keys = jax.random.split(jax.random.key(size), 2)
    x, w = normal(keys[0], (size, 2 * groups)), normal(keys[1], (kernel_size, 2, 3 * groups))
    f = lambda x, w: jaxseq.conv(x, w, stride=stride, padding=[padding], dilation=dilation, groups=groups)  # noqa: E731
    y, x_bar, w_bar = loops(np.asarray(x), np.asarray(w), stride, padding, dilation, groups)
    actual, gradients = jax.jit(pullback(f))((x, w), jnp.asarray(y))
    np.testing.assert_allclose(actual, y, atol=1e-11)
    np.testing.assert_allclose(gradients[0], x_bar, atol=1e-10)
    np.testing.assert_allclose(gradients[1], w_bar, atol=1e-10)


@pytest.mark.parametrize(("stride", "padding", "dilation", "groups"), GEOMETRIES)
def test_equals_loops_over_indices(stride, padding, dilation, groups):
    compare_with_loops(11, 3, stride, padding, dilation, groups)


PADS = strategies.integers(-6, 6)


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(
    size=strategies.integers(1, 9),
    kernel_size=strategies.integers(1, 4),
    stride=strategies.integers(1, 4),
    padding=strategies.tuples(PADS, PADS),
    dilation=strategies.integers(1, 3),
    groups=strategies.sampled_from([1, 3]),
)
def test_equals_loops_at_any_geometry(size, kernel_size, stride, padding, dilation, groups):
    assume(size + sum(padding) >= _geometry.extent(kernel_size, dilation))
    compare_with_loops(size, kernel_size, stride, padding, dilation, groups)


@pytest.mark.parametrize("stride", [1, 2, 3, 5])
@pytest.mark.parametrize("dilation", [1, 2, 4])
def test_same_and_causal_sizes(stride, dilation):
    for size, kernel_size in itertools.product(range(1, 12), range(1, 5)):
        outputs = {}
        for word in ("SAME", "CAUSAL"):
            geometry = _geometry.resolve((size,), (kernel_size,), stride, word, dilation, 1)
            (lo, hi) = geometry.padding[0]
            (outputs[word],) = _geometry.output_sizes(geometry, (size,), (kernel_size,))
            if word == "SAME":
                assert 0 <= hi - lo <= 1
            else:
                assert (lo, hi) == (dilation * (kernel_size - 1), 0)
        assert outputs == dict.fromkeys(outputs, -(-size // stride))


def test_same_is_what_lax_calls_same(key):
    x, w = normal(key, (2, 9, 8, 3)), normal(jax.random.fold_in(key, 1), (4, 3, 3, 5))
    expected = jax.lax.conv_general_dilated(x, w, (2, 3), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_allclose(jaxseq.conv(x, w, padding="same", stride=(2, 3)), expected, atol=1e-12)


def test_causal_output_knows_no_future(key):
    """The Jacobian of output n to input m is zero for m > n, and not all zero for m <= n."""
    w = normal(key, (3, 1, 1))
    f = lambda x: jaxseq.conv(x[:, None], w, padding="CAUSAL", dilation=2)[:, 0]  # noqa: E731
    jacobian = np.asarray(jax.jacrev(f)(normal(key, (8,))))
    assert not np.triu(jacobian, 1).any()
    for lag in range(8):
        assert np.diagonal(jacobian, -lag).all() == (lag in (0, 2, 4))


def test_groups_are_separate_convolutions(key):
    x, w = normal(key, (2, 7, 6, 4)), normal(jax.random.fold_in(key, 1), (2, 3, 2, 10))
    halves = [jaxseq.conv(x[..., 2 * g : 2 * g + 2], w[..., 5 * g : 5 * g + 5]) for g in (0, 1)]
    assert_close(jaxseq.conv(x, w, groups=2), jnp.concatenate(halves, -1), relative=1e-13)


def test_pullbacks_are_transposes(key):
    """<ȳ, C(x, w)> is a trilinear form, so each pullback gives the same number."""
    x, w = normal(key, (2, 9, 4)), normal(jax.random.fold_in(key, 1), (3, 2, 6))
    f = lambda x, w: jaxseq.conv(x, w, stride=2, padding=((3, 1),), dilation=2, groups=2)  # noqa: E731
    y, vjp = jax.vjp(f, x, w)
    y_bar = normal(jax.random.fold_in(key, 2), y.shape)
    x_bar, w_bar = vjp(y_bar)
    np.testing.assert_allclose(jnp.vdot(x_bar, x), jnp.vdot(y_bar, y), rtol=1e-12)
    np.testing.assert_allclose(jnp.vdot(w_bar, w), jnp.vdot(y_bar, y), rtol=1e-12)


@pytest.mark.parametrize("taps", [CPU.conv.terms, CPU.conv.terms + 1])
@pytest.mark.parametrize("transposed", [False, pytest.param(True, marks=pytest.mark.long)])
def test_depthwise_on_both_sides_of_the_limit(taps, transposed, key):
    """Up to the limit the rule is `_shifts`, beyond it `_spectrum`; both equal the reference implementation."""
    x, w, y_bar = (normal(jax.random.fold_in(key, n), s) for n, s in enumerate([(2, 40, 3), (taps, 1, 3), (2, 40, 3)]))
    name, options = "conv_transpose" if transposed else "conv", {"groups": 3, "padding": "SAME"}
    ours, reference = (
        jax.jit(pullback(partial(getattr(module, name), **options))) for module in (jaxseq, jaxseq.reference)
    )
    text = ours.lower((x, w), y_bar).as_text()
    assert ("stablehlo.fft" in text) == (taps > CPU.conv.terms)
    assert "stablehlo.convolution" not in text
    assert_close(ours((x, w), y_bar), reference((x, w), y_bar), relative=1e-13)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("huge", [2**31, 2**70])
def test_steps_beyond_32_bits(groups, huge):
    """A stride beyond the input leaves one output, and the dilation of a kernel of one tap has no effect."""
    x = jnp.arange(18.0).reshape(6, 3)
    w, tap = jnp.ones((3, 3 // groups, 3)), jnp.ones((1, 3 // groups, 3))
    channels = lambda rows: rows if groups == 3 else jnp.broadcast_to(rows.sum(-1, keepdims=True), rows.shape)  # noqa: E731
    run = lambda f, *args: jax.jit(pullback(f))(args, f(*args))  # noqa: E731
    y, (x_bar, w_bar) = run(partial(jaxseq.conv, stride=huge, groups=groups), x, w)
    assert_close(y, channels(x[:3].sum(0, keepdims=True)))
    assert_close(x_bar, jnp.zeros_like(x).at[:3].set(channels(y)))
    y, _ = run(partial(jaxseq.conv, dilation=huge, groups=groups), x, tap)
    assert_close(y, channels(x))
    _, y = causal_conv(None, x, tap, dilation=huge, groups=groups)
    assert_close(y, channels(x))
    y, (_, w_bar) = run(partial(jaxseq.conv_transpose, stride=huge, groups=groups), x[:1], w)
    assert_close(y, jnp.broadcast_to(channels(x[:1]), (3, 3)))
    assert w_bar.shape == w.shape


@pytest.mark.parametrize("kernel_size", [3, (3,), (2, 3), (2, 1, 3)])
def test_initial_parameters(kernel_size, key):
    groups, c_in, c_out = 2, 64, 96
    kernel, bias = jaxseq.conv_init(key, kernel_size, c_in, c_out, groups=groups, dtype=jnp.float32)
    taps = (kernel_size,) if isinstance(kernel_size, int) else kernel_size
    assert kernel.shape == (*taps, c_in // groups, c_out)
    assert kernel.dtype == bias.dtype == jnp.float32
    assert bias.shape == (c_out,)
    assert not bias.any()
    x = normal(jax.random.fold_in(key, 1), (8, *(12,) * len(taps), c_in), jnp.float32)
    y = jaxseq.conv(x, kernel, bias, groups=groups)
    np.testing.assert_allclose(np.std(np.asarray(y)), 1, rtol=0.1)


@pytest.mark.parametrize(
    ("x", "kernel", "options"),
    [((2, 6, 5, 3), (2, 4, 3, 2), {"stride": 2, "padding": 1}), ((2, 8, 7, 3), (4, 7, 3, 2), {"stride": (4, 1)})],
    ids=["strided", "patches of a spectrogram"],
)
def test_taps_that_do_not_meet_beside_more_taps_than_outputs(x, kernel, options, key):
    """XLA aborts the process while it compiles the gradient of lax.conv here. Compare with responses to unit inputs."""
    x, kernel = normal(key, x, jnp.float64), normal(jax.random.fold_in(key, 1), kernel, jnp.float64)
    f = jax.jit(partial(jaxseq.conv, **options))
    y, pull = jax.vjp(lambda x: f(x, kernel), x)
    y_bar = normal(jax.random.fold_in(key, 2), y.shape, y.dtype)
    ones = jnp.eye(x[0].size).reshape(-1, *x.shape[1:])
    assert_close(pull(y_bar)[0], jnp.einsum("n...,b...->bn", f(ones, kernel), y_bar).reshape(x.shape))


def test_precision_reaches_the_pointwise_product():
    args = jnp.ones((2, 9, 4)), jnp.ones((3, 1, 4)), jnp.ones((1, 4, 5))
    f = partial(jaxseq.separable_conv, precision="highest")
    products = [
        e.params["precision"]
        for e in subjaxprs(jax.make_jaxpr(f)(*args).jaxpr)
        if e.primitive.name in ("dot_general", "conv_general_dilated")
    ]
    assert products
    assert all(precision == (jax.lax.Precision.HIGHEST,) * 2 for precision in products)


# --- Lengths ---


@pytest.mark.parametrize(
    "options",
    [
        {"dilation": 2},
        {"padding": "SAME"},
        {"padding": "CAUSAL", "stride": 2},
        {"padding": ((3, 1),), "stride": 2, "groups": 2},
        {"padding": ((-1, -2),)},
    ],
    ids=str,
)
def test_each_sequence_ends_at_its_length(options, key):
    """Compare with lax on each sequence, cut at its length. The padding is NaN, in inputs and cotangents."""
    lengths, (K, T) = (0, 5, 8, 11), (3, 11)
    x, w, b = normals(key, (jnp.ones((4, T, 4)), jnp.ones((K, 4 // options.get("groups", 1), 6)), jnp.ones(6)))
    f = partial(jaxseq.conv, lengths=jnp.array(lengths), **options)
    y_bar = normals(key, jax.eval_shape(f, x, w, b), stream=1)
    stride, dilation, groups = (options.get(name, 1) for name in ("stride", "dilation", "groups"))
    pads = {"SAME": (1, 1), "CAUSAL": (2, 0)}.get(options.get("padding"), options.get("padding", ((0, 0),))[0])

    def by_lax(x, w, b):
        y = jax.lax.conv_general_dilated(
            x[None],
            w,
            (stride,),
            (pads,),
            rhs_dilation=(dilation,),
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=groups,
        )
        return y[0] + b[None]

    beyond = lambda a, counts: (jnp.arange(a.shape[1])[None] >= jnp.array(counts)[:, None])[..., None]  # noqa: E731
    counts = [max((n + sum(pads) - dilation * (K - 1) - 1) // stride + 1, 0) for n in lengths]
    of_x, of_y = beyond(x, lengths), beyond(y_bar, counts)
    run = jax.jit(pullback(f))
    y, gradients = run((jnp.where(of_x, jnp.nan, x), w, b), jnp.where(of_y, jnp.nan, y_bar))
    assert not jnp.where(of_y, y, 0).any()
    assert not jnp.where(of_x, gradients[0], 0).any()
    w_bar, b_bar = jnp.zeros_like(w), jnp.zeros_like(b)
    for i, (n, count) in enumerate(zip(lengths, counts, strict=True)):
        if count:
            own, (x_bar, *of_params) = jax.jit(pullback(by_lax))((x[i, :n], w, b), y_bar[i, :count])
            assert_close((y[i, :count], gradients[0][i, :n]), (own, x_bar))
            w_bar, b_bar = w_bar + of_params[0], b_bar + of_params[1]
    assert_close(list(gradients[1:]), [w_bar, b_bar])


def test_lengths_with_a_stride_and_same_padding(key):
    """Each sequence has ceil(length / stride) outputs."""
    x, w = normals(key, (jnp.ones((3, 11, 4)), jnp.ones((3, 4, 6))))
    y = jaxseq.conv(x, w, padding="SAME", stride=2, lengths=jnp.array([0, 4, 9]))
    assert (y != 0).any(-1).sum(1).tolist() == [0, 2, 5]
