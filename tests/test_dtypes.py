"""Dtypes of second derivatives and of matrix products, and the precision of accumulation.

`contract.py` checks the dtypes of values and gradients, and the accuracy of low precision.
"""

import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    OPS,
    arguments,
    assert_close,
    bound,
    derived,
    long_where,
    pullback,
)

from jaxseq._cases import CASES


@pytest.mark.parametrize(("name", "label"), long_where(OPS, derived))
def test_second_derivatives_have_the_dtype_of_their_primal(name, label, key):
    """Traced, not run. `contract.py` checks the dtypes of values and gradients."""
    args, f = arguments(name, label, key, dtype=jnp.bfloat16), bound(name, label)

    def second(args, cotangents):
        return jax.vjp(pullback(f), args, cotangents)[1](pullback(f)(args, cotangents))

    outputs = jax.eval_shape(f, *args)
    gradients = jax.eval_shape(pullback(f), args, outputs)[1]
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(second, args, outputs)[0], gradients)


# Ops without products of their own, and two with products of states or unrounded gates, in float32.
NO_PRODUCTS = ("bidirectional", "stack", "scan", "linear_recurrence", "mlstm", "qrnn")


@pytest.mark.parametrize(("name", "label"), [p for p in OPS if "cell" not in p.id and p.id not in NO_PRODUCTS])
def test_a_wide_bias_does_not_widen_the_products(name, label, key):
    """The bias is added after accumulation, so that the products can use hardware for narrow dtypes.

    A state in float32 would widen its own product, so this test sets `state_dtype`.
    """
    args, f = arguments(name, label, key, dtype=jnp.bfloat16), bound(name, label)
    if not hasattr(args[0], "_asdict"):
        args = (*args[:-1], args[-1].astype(jnp.float32))
    else:
        biases = {f: b.astype(jnp.float32) for f, b in args[0]._asdict().items() if f.startswith("b")}
        f = f if name == "causal_conv" else partial(f, state_dtype=jnp.bfloat16)
        args = (args[0]._replace(**biases), *args[1:])
    text = jax.jit(pullback(f)).lower(args, jax.eval_shape(f, *args)).as_text()
    types = r"stablehlo\.(?:dot_general|convolution).*: \(tensor<(.*)>, tensor<(.*)>\) -> tensor<(.*)>"
    products = [[a.rpartition("x")[2] for a in found] for found in re.findall(types, text)]
    assert products or "depthwise" in label  # a depthwise convolution does not sum over channels
    assert all(product == ["bf16", "bf16", "f32"] for product in products)


@pytest.mark.parametrize("name", ["lstm"])
def test_wide_inputs_widen_the_backward_sweep(name, key):
    """With wide inputs, the dtype of narrow weights affects only the rounding of their gradient."""
    params, carry, _ = arguments(name, "plain", key, dtype=jnp.bfloat16)
    xs = arguments(name, "plain", key, dtype=jnp.float32)[2]
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), params)
    f = bound(name, "plain")
    narrow, full = (
        pullback(f)((p, carry, xs), jax.tree.map(jnp.ones_like, f(p, carry, xs)))[1] for p in (params, wide)
    )
    assert_close(narrow[2], full[2], relative=1e-5)
    chex.assert_trees_all_equal(narrow[0], jax.tree.map(lambda a: a.astype(jnp.bfloat16), full[0]))


def test_products_of_bfloat16_accumulate_in_float32():
    """1 plus 256 small terms, each of which would be lost to rounding in bfloat16."""
    conv = CASES["conv"].op
    x = jnp.full((300, 1), 2.0**-9, jnp.bfloat16).at[0].set(1)
    y = conv(x, jnp.ones((257, 1, 1), jnp.bfloat16))
    assert float(y[0, 0]) == 1.5
    gradient = jax.grad(lambda k: conv(x, k, k[0, 0]).astype(jnp.float32).sum())(jnp.ones((1, 1, 1), jnp.bfloat16))
    np.testing.assert_allclose(float(gradient[0, 0, 0]), 300 + 1 + 299 * 2.0**-9, rtol=2.0**-8)
