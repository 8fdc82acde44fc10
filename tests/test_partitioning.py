"""An op decides once, for both passes, whether the compiler may partition its arrays."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from helpers import causal_conv, cotangents_for, normals

import jaxseq
from jaxseq import cells


def recurrent(cell, init, *batch):
    """Return an op and its arguments: a recurrence over 64 steps."""
    xs = jnp.ones((64, *batch, 3))
    return lambda params, xs: jaxseq.recurrence(cell, params, None, xs), (init(jax.random.key(0), 3, 4), xs)


def convolution(window, x, **options):
    return partial(jaxseq.conv, **options), (jnp.ones(x), jnp.ones(window))


# Everything that depends on the decision: chunks of time, a batch of one, a product inside the step, leading axes of
# a convolution in a recurrence, patches, and the loop over the taps of a depthwise kernel.
OPS = {
    "chunks": lambda: recurrent(cells.gru, jaxseq.gru_init, 2),
    "a batch of one": lambda: recurrent(cells.gru, jaxseq.gru_init, 1),
    "a product inside": lambda: recurrent(cells.classic_gru, cells.classic_gru_init, 2),
    "conv_gru": lambda: (
        lambda params, xs: jaxseq.conv_gru(params, None, xs),
        (jaxseq.conv_gru_init(jax.random.key(0), 3, 3, 4), jnp.ones((64, 2, 5, 3))),
    ),
    "patches": lambda: convolution((2, 2, 3, 4), (2, 6, 6, 3), stride=2),
    "a loop over taps": lambda: convolution((65, 1, 3), (2, 70, 3), groups=3),
    "causal_conv": lambda: (
        lambda x, kernel: causal_conv(None, x, kernel, groups=3),
        (jnp.ones((2, 3, 3)), jnp.ones((65, 1, 3))),
    ),
}


@pytest.mark.parametrize("devices", [1, pytest.param(8, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", OPS)
def test_backward_keeps_the_decision_of_forward(name, devices, key, monkeypatch):
    """Without a mesh in context, the decision depends on the number of devices.

    The test changes that number after the forward pass. The backward pass must not decide again.
    """
    f, shapes = OPS[name]()
    args = normals(key, shapes)
    y_bar = cotangents_for(f, args, key)

    def pullback(devices):
        monkeypatch.setattr(jax, "device_count", lambda: devices)
        return jax.vjp(f, *args)[1]

    program = lambda pull: str(jax.make_jaxpr(pull)(y_bar))  # noqa: E731
    pull, other = pullback(devices), program(pullback(9 - devices))
    assert jax.device_count() == 9 - devices
    kept = program(pull)
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    assert (kept == program(pull), kept == other) == (True, False)
