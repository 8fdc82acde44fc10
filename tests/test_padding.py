"""Positive and negative padding in float32. XLA CPU reads out of bounds if a convolution both crops and pads."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import causal_conv, pullback, subjaxprs

import jaxseq

RNG = np.random.default_rng(0)

# (space, kernel_size, options): each sign on each side, beyond either edge, and positive padding with
# lo > d (K - 1) > hi, where the gradient with respect to x crops and pads.
GEOMETRIES = [
    ((40,), (5,), {"padding": [(-1, 1)]}),
    ((40,), (5,), {"padding": [(2, -2)], "stride": 2}),
    ((64,), (1,), {"padding": [(1, -1)]}),
    ((40,), (3,), {"padding": [(3, 1)]}),
    ((40,), (3,), {"padding": [(1, 9)], "dilation": 2, "stride": 3}),
    ((41,), (4,), {"padding": [(1, 0)], "stride": 3}),
    ((11,), (3,), {"padding": [(-9, 12)]}),
    ((11,), (3,), {"padding": [(14, -9)], "stride": 4}),
    ((3,), (7,), {"padding": [(6, 0)]}),
    ((3,), (7,), {"padding": [(1, 5)]}),
    ((40,), (3,), {"padding": [(4, 1)], "groups": 2}),
    ((8, 9), (3, 3), {"padding": [(-1, 1), (0, 0)]}),
    ((9, 8), (3, 2), {"padding": [(4, 1), (2, -3)], "stride": (1, 2), "dilation": (1, 2)}),
    ((16, 16), (3, 3), {"padding": [(4, 1), (2, 2)], "groups": 2}),
    ((5, 6, 7), (2, 3, 2), {"padding": [(-1, 1), (4, 0), (2, -1)], "stride": (1, 2, 1)}),
]
GRID = [pytest.param(*g, id=f"{n}-{len(g[0])}d") for n, g in enumerate(GEOMETRIES)]


def arrays(*shapes):
    return [jnp.asarray(RNG.normal(size=shape), jnp.float32) for shape in shapes]


def tap_by_tap(x, w, y_bar, stride, lo, *, dilation, groups):
    """Return (y, x_bar, w_bar) for x (N, *space, C) in float64, from the positions within bounds at each tap."""
    x, w, y_bar = (np.asarray(a, np.float64) for a in (x, w, y_bar))
    grouped = lambda a: a.reshape(*a.shape[:-1], groups, -1)  # noqa: E731
    x, w, y_bar = map(grouped, (x, w, y_bar))
    y, x_bar, w_bar = map(np.zeros_like, (y_bar, x, w))
    for tap in np.ndindex(*w.shape[:-3]):
        rows, outputs = [range(len(x))], [range(len(x))]
        for I, O, s, k, d, first in zip(x.shape[1:], y_bar.shape[1:], stride, tap, dilation, lo, strict=False):
            m = s * np.arange(O) + d * k - first
            inside = (m >= 0) & (m < I)
            rows.append(m[inside])
            outputs.append(np.flatnonzero(inside))
        rows, outputs = np.ix_(*rows), np.ix_(*outputs)
        y[outputs] += np.einsum("...gi,igo->...go", x[rows], w[tap])
        x_bar[rows] += np.einsum("...go,igo->...gi", y_bar[outputs], w[tap])
        w_bar[tap] = np.einsum("ngi,ngo->igo", *(a.reshape(-1, *a.shape[-2:]) for a in (x[rows], y_bar[outputs])))
    return [a.reshape(*a.shape[:-2], -1) for a in (y, x_bar, w_bar)]


def per_axis(option, axes):
    return option if isinstance(option, tuple) else (option,) * axes


@pytest.mark.parametrize(("space", "kernel_size", "options"), [GRID[n] for n in (0, 2, 3, 4, 7, 9, 10, 11, 13, 14)])
def test_float32_equals_sums_in_float64(space, kernel_size, options):
    """Values and gradients of conv, and of conv_transpose applied to its output, at 16 channels."""
    axes, g, c = len(space), options.get("groups", 1), 16
    x, w = arrays((2, *space, c), (*kernel_size, c // g, c))
    conv = partial(jaxseq.conv, **options)
    (y_bar,) = arrays(jax.eval_shape(conv, x, w).shape)
    stride, dilation = (per_axis(options.get(name, 1), axes) for name in ("stride", "dilation"))
    y, x_bar, w_bar = tap_by_tap(x, w, y_bar, stride, [lo for lo, _ in options["padding"]], dilation=dilation, groups=g)
    transpose = partial(jaxseq.conv_transpose, **options)
    smallest = jax.eval_shape(transpose, y_bar, w).shape[1:-1]
    extra = tuple(I - size for I, size in zip(space, smallest, strict=True))
    transpose = partial(transpose, output_padding=extra)
    both = jax.jit(lambda x, w, y_bar: (pullback(conv)((x, w), y_bar), pullback(transpose)((y_bar, w), x)))
    for actual, expected in zip(jax.tree.leaves(both(x, w, y_bar)), (y, x_bar, w_bar, x_bar, y, w_bar), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


# --- No call of lax.conv_general_dilated has negative padding (traced, not run) ---


def paddings(f, *args):
    """Return all amounts of padding in the calls of lax.conv_general_dilated in f."""
    calls = [e for e in subjaxprs(jax.make_jaxpr(f)(*args).jaxpr) if e.primitive.name == "conv_general_dilated"]
    return [amount for call in calls for pair in call.params["padding"] for amount in pair]


def to_second_order(f, *args):
    """Return the gradient and its derivative, where JAX differentiates the convolutions of the hand-derived rule."""
    squares = lambda tree: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree))  # noqa: E731
    gradient = jax.grad(lambda *args: squares(f(*args)), range(len(args)))
    return gradient(*args), jax.grad(lambda *args: squares(gradient(*args)), range(len(args)))(*args)


def check(f, *args):
    found = paddings(partial(to_second_order, f), *args)
    assert found, "expected a call of lax.conv_general_dilated"
    assert min(found) >= 0


# Excluded are kernels of which only one tap reads the input: these are matrix products.
@pytest.mark.parametrize(
    ("space", "kernel_size", "options"), [p for p in GRID if max(p.values[1]) > 1 and p.id != "7-1d"]
)
def test_no_call_sees_negative_padding(space, kernel_size, options):
    g = options.get("groups", 1)
    x, w = jnp.ones((2, *space, 2 * g)), jnp.ones((*kernel_size, 2, 3 * g))
    conv = partial(jaxseq.conv, **options)
    check(conv, x, w)
    check(partial(jaxseq.conv_transpose, **options), jnp.ones(jax.eval_shape(conv, x, w).shape), w)


def test_causal_and_recurrent_calls_see_no_negative_padding():
    x, w = jnp.ones((2, 3, 2)), jnp.ones((5, 2, 3))  # a kernel longer than the chunk
    check(lambda x, w: causal_conv(None, x, w, dilation=2)[1], x, w)
    for op, init in ((jaxseq.conv_lstm, jaxseq.conv_lstm_init), (jaxseq.conv_gru, jaxseq.conv_gru_init)):
        params = init(jax.random.key(0), 3, 2, 3, dtype=jnp.float64)
        check(lambda p, xs, op=op: op(p, None, xs, padding=[(4, 1)])[1], params, jnp.ones((2, 2, 9, 2)))


def test_xla_makes_no_negative_padding():
    """XLA exchanges a short input with a long kernel, which changes their padding."""
    f = jax.jit(pullback(partial(jaxseq.conv, padding=[(4, 0)])))
    text = f.lower((jnp.ones((2, 3, 16)), jnp.ones((5, 16, 16))), jnp.ones((2, 3, 16))).compile().as_text()
    assert "window={" in text
    assert not re.search(r"pad=\S*-", text)


@pytest.mark.parametrize(
    "options",
    [{"padding": "SAME"}, {"padding": "VALID"}, {"padding": 1, "stride": 2}, {"padding": "SAME", "dilation": 2}],
)
def test_ordinary_padding_adds_no_operation(options):
    x, w = jnp.ones((2, 16, 16, 3)), jnp.ones((3, 3, 3, 4))
    conv = partial(jaxseq.conv, **options)
    jaxpr = jax.make_jaxpr(pullback(conv))((x, w), jnp.ones(jax.eval_shape(conv, x, w).shape)).jaxpr
    assert not {"pad", "slice"} & {e.primitive.name for e in subjaxprs(jaxpr)}
