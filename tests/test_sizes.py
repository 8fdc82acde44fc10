"""Any number of batch axes, windows of any length, and empty arrays."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from helpers import OPS, arguments, assert_close, bound, cotangents_for, derived, long_where, pullback

import jaxseq

# (batch, length)
CORNERS = {
    "no batch axis": ((), 4),
    "three batch axes": ((2, 1, 3), 4),
    "one empty of two batch axes": ((3, 0), 5),
}
# One op for each place in the code that merges batch axes.
FLATTENED = ("conv", "conv_transpose", "causal_conv", "gru", "conv_lstm")


def compare(name, label, key, **sizes):
    args = arguments(name, label, key, **sizes)
    cotangents = cotangents_for(bound(name, label), args, jax.random.fold_in(key, 1))
    actual, expected = (jax.jit(pullback(bound(name, label, reference=t)))(args, cotangents) for t in (False, True))
    assert_close(actual, expected)
    return actual


@pytest.mark.parametrize("corner", CORNERS)
@pytest.mark.parametrize(
    ("name", "label"),
    long_where([p for p in OPS if not derived(*p.values)], lambda name, _: name not in FLATTENED),
)
def test_corner(name, label, corner, key):
    batch, length = CORNERS[corner]
    if name.startswith("conv"):
        length = max(length, 4)
    compare(name, label, key, batch=batch, length=length)


@pytest.mark.parametrize(
    ("label", "length"),
    [("truncation", 1), ("truncation", 3), ("truncation, reverse", 3)],
)
def test_length_of_a_sequence(label, length, key):
    """Sequences shorter than a window, as long as one, or longer."""
    (carry, ys), _ = compare("gru", label, key, length=length)
    assert ys.shape == (length, 2, 5)
    assert carry.shape == (2, 5)


def test_no_steps_hand_the_carry_through(key):
    params, carry, xs = arguments("lstm", "plain", key, length=0)
    (last, _), gradients = pullback(bound("lstm", "plain"))((params, carry, xs), (carry, jnp.zeros((0, 2, 5))))
    assert_close(last, carry)
    assert_close(gradients[1], carry)
    assert all(not leaf.any() for leaf in jax.tree.leaves(gradients[0]))


@pytest.mark.parametrize("label", ["dilated causal", "depthwise", "strided same"])
def test_convolution_of_an_empty_signal(label, key):
    y, (x_bar, w_bar, *_) = compare("conv", label, key, length=0)
    assert y.shape[1] == x_bar.shape[1] == 0
    assert not w_bar.any()


def test_an_empty_signal_whose_padding_is_shorter_than_the_window():
    """At stride 2, the padding alone gives no output."""
    x, w = jnp.ones((2, 0, 3)), jnp.ones((6, 1, 3))
    for f in (jaxseq.conv, jaxseq.reference.conv):
        y, (x_bar, w_bar) = pullback(partial(f, groups=3, stride=2, padding=2))((x, w), jnp.ones((2, 0, 3)))
        assert y.shape == x_bar.shape == (2, 0, 3)
        assert w_bar.shape == w.shape
        assert not w_bar.any()


@pytest.mark.parametrize(
    "label", ["strided same", "strided, dilated, causal", "output padding, grouped", "2d grouped, dilated"]
)
def test_transposed_convolution_of_an_empty_signal(label, key):
    y, (x_bar, w_bar, *_) = compare("conv_transpose", label, key, length=0)
    assert y.shape[1] == x_bar.shape[1] == 0
    assert not w_bar.any()


@pytest.mark.parametrize("label", ["strided same", "2d grouped, dilated"])
def test_convolution_of_two_batch_axes(label, key):
    compare("conv", label, key, batch=(2, 3), length=8)
