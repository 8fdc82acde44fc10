"""conv_transpose against the transpose of conv, loops over indices, and manually computed values."""

import re
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, inner, pullback
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxseq
from jaxseq._init import normal


def operands(key, x_shape, kernel_shape):
    return (normal(jax.random.fold_in(key, n), shape) for n, shape in enumerate((x_shape, kernel_shape)))


@pytest.mark.parametrize(
    ("size", "kernel_size", "channels", "options"),
    [
        ((9,), (3,), (4, 6), {"stride": 2, "padding": ((1, 0),)}),
        ((10,), (4,), (4, 6), {"stride": 3, "dilation": 2, "padding": "SAME", "groups": 2}),
        ((11,), (2,), (4, 6), {"stride": 5, "padding": ((3, 0),), "dilation": 3}),
        ((9,), (5,), (3, 3), {"padding": ((-2, -1),), "groups": 3}),
        ((7,), (1,), (4, 6), {}),
        ((8, 9), (3, 2), (4, 6), {"stride": (2, 3), "dilation": (1, 2), "padding": ((1, 2), (0, -1)), "groups": 2}),
        ((5, 6, 4), (2, 3, 1), (2, 4), {"stride": (2, 1, 3), "padding": 1}),
    ],
)
def test_is_the_transpose_of_conv(size, kernel_size, channels, options, key):
    """<x, C(u)> = <Cᵀ(x), u>, and Cᵀ(x) is the pullback of conv, with the same kernel array."""
    c_in, c_out = channels
    u, w = operands(key, (2, *size, c_in), (*kernel_size, c_in // options.get("groups", 1), c_out))
    y = jaxseq.conv(u, w, **options)
    x = normal(jax.random.fold_in(key, 7), y.shape)
    same = options.get("padding") == "SAME"
    smallest = jaxseq.conv_transpose(x, w, **options).shape[1:-1]
    extra = (0,) * len(size) if same else tuple(I - i for I, i in zip(size, smallest, strict=True))
    x_bar = jaxseq.conv_transpose(x, w, output_padding=extra, **options)
    if same:  # the transpose returns s O positions, and u may have fewer
        u = jnp.pad(u, ((0, 0), *((0, I - i) for I, i in zip(smallest, size, strict=True)), (0, 0)))
        np.testing.assert_allclose(inner(x, jaxseq.conv(u, w, **options)), inner(x_bar, u), rtol=1e-12)
    else:
        np.testing.assert_allclose(inner(x, y), inner(x_bar, u), rtol=1e-12)
        _, (pulled,) = pullback(lambda u: jaxseq.conv(u, w, **options))((u,), x)
        assert_close(x_bar, pulled, relative=1e-14)


def loops(x, w, stride, padding, dilation, *, groups, extra):
    """Compute y[s n + d k - lo, i] += x[n, o] w[k, i, o] along one axis."""
    (O, c_in), (K, per_out, _) = x.shape, w.shape
    lo, hi = padding
    size = (O - 1) * stride + dilation * (K - 1) + 1 - lo - hi + extra
    y = np.zeros((size, per_out * groups))
    for n, k, o, i in product(range(O), range(K), range(c_in), range(per_out)):
        m, group = stride * n + dilation * k - lo, o // (c_in // groups)
        if 0 <= m < size:
            y[m, group * per_out + i] += x[n, o] * w[k, i, o]
    return y


@settings(deadline=None, max_examples=25)
@given(
    size=st.integers(1, 6),
    kernel_size=st.integers(1, 4),
    stride=st.integers(1, 4),
    padding=st.tuples(st.integers(-3, 4), st.integers(-3, 4)),
    dilation=st.integers(1, 3),
    groups=st.integers(1, 2),
    extra=st.integers(0, 3),
)
def test_equals_loops_at_any_geometry(size, kernel_size, stride, padding, dilation, *, groups, extra):
    extra %= max(stride, dilation)  # the limit in torch
    x, w = operands(jax.random.key(0), (size, 2 * groups), (kernel_size, 3, 2 * groups))
    run = partial(
        jaxseq.conv_transpose, stride=stride, padding=(padding,), dilation=dilation, groups=groups, output_padding=extra
    )
    if (size - 1) * stride + dilation * (kernel_size - 1) + 1 - sum(padding) + extra < 1:
        with pytest.raises(ValueError, match=r"`padding`: expected lo . hi < "):
            run(x, w)
    else:
        y = loops(np.asarray(x), np.asarray(w), stride, padding, dilation, groups=groups, extra=extra)
        assert_close(run(x, w), jnp.asarray(y))


def test_by_hand():
    """[1, 2] at stride 3 with the kernel [1, 10] is 1 10 0 2 20; crop one at the start, add one at the end."""
    x, w = jnp.array([1.0, 2.0])[:, None], jnp.array([1.0, 10.0])[:, None, None]
    y = jaxseq.conv_transpose(x, w, jnp.array([0.5]), stride=3, padding=((1, 0),), output_padding=1)
    assert y[:, 0].tolist() == [10.5, 0.5, 2.5, 20.5, 0.5]


@pytest.mark.parametrize("stride", [1, 2, 3, 5])
@pytest.mark.parametrize("kernel_size", [1, 2, 4])
def test_same_multiplies_the_size(stride, kernel_size, key):
    """Also if the kernel is smaller than the stride and leaves gaps."""
    x, w = operands(key, (2, 3, 4), (kernel_size, 5, 4))
    y = jaxseq.conv_transpose(x, w, stride=stride, padding="SAME")
    assert y.shape == (2, 3 * stride, 5)
    assert jaxseq.conv(y, w, stride=stride, padding="SAME").shape == x.shape


@pytest.mark.parametrize(("kernel_size", "stride", "dilation"), [(3, 2, 1), (4, 2, 3), (2, 5, 1), (1, 3, 1)])
def test_causal_upsampling(kernel_size, stride, dilation, key):
    """With the padding that the error suggests, output m of s O depends only on inputs n with s n <= m."""
    w = jnp.ones((kernel_size, 1, 1))
    upsample = partial(jaxseq.conv_transpose, stride=stride, dilation=dilation)
    with pytest.raises(ValueError, match=r"padding=\[\(0, -?\d+\)\]") as error:
        upsample(jnp.ones((4, 1)), w, padding="CAUSAL")
    hi = int(re.search(r"padding=\[\(0, (-?\d+)\)\]", str(error.value))[1])
    responses = np.asarray(upsample(jnp.eye(4)[..., None], w, padding=[(0, hi)]))[..., 0]  # to unit inputs
    assert responses.shape == (4, stride * 4)
    for n, response in enumerate(responses):
        assert not response[: stride * n].any()
        assert response[stride * n] == 1  # tap 0


@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 4)])
def test_of_nothing(shape, key):
    x, w = operands(key, shape, (3, 6, 4))
    size = 11 if shape[1] else 0
    cotangent = jnp.ones((shape[0], size, 6))
    y, (x_bar, w_bar, b_bar) = pullback(partial(jaxseq.conv_transpose, stride=2))((x, w, jnp.arange(6.0)), cotangent)
    assert y.shape == cotangent.shape
    assert x_bar.shape == x.shape
    assert not w_bar.any()
    assert not b_bar.any()


@pytest.mark.parametrize(("kernel_size", "stride"), [(4, 2), ((3, 4), (1, 3)), ((2, 1, 3), 1)])
def test_initial_parameters(kernel_size, stride, key):
    """White noise of unit variance gives outputs of unit variance, away from the borders."""
    groups, c_in, c_out = 2, 64, 96
    kernel, bias = jaxseq.conv_transpose_init(
        key, kernel_size, c_in, c_out, stride=stride, groups=groups, dtype=jnp.float32
    )
    taps = (kernel_size,) if isinstance(kernel_size, int) else kernel_size
    assert kernel.shape == (*taps, c_out // groups, c_in)
    assert kernel.dtype == bias.dtype == jnp.float32
    assert bias.shape == (c_out,)
    assert not bias.any()
    x = normal(jax.random.fold_in(key, 1), (8, *(12,) * len(taps), c_in), jnp.float32)
    y = jaxseq.conv_transpose(x, kernel, bias, stride=stride, groups=groups)
    inner = y[(slice(None), *(slice(6, 12),) * len(taps))]  # a multiple of every stride
    np.testing.assert_allclose(np.std(np.asarray(inner)), 1, rtol=0.1)
