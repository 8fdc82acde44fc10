"""Results leave in the dtype of the input, cotangents in the dtype of their primal, products accumulate wide."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import GRID, OPS, SEQUENCES, arguments, assert_close, bound, compiled, cotangents_for, pullback, subjaxprs
from jax import lax

from jaxseq._cases import CASES

LOW = [jnp.float32, jnp.bfloat16, jnp.float16]


@pytest.mark.parametrize("dtype", LOW, ids=lambda d: d.__name__)
@pytest.mark.parametrize(("name", "label"), GRID)
def test_dtype_is_kept(name, label, dtype, key):
    """Values, gradients, and gradients of gradients, traced only: no number is needed."""
    args = arguments(name, label, key, dtype=dtype)
    f = bound(name, label)

    def second(args, cotangents):
        return jax.vjp(pullback(f), args, cotangents)[1](pullback(f)(args, cotangents))

    outputs = jax.eval_shape(f, *args)
    assert {leaf.dtype for leaf in jax.tree.leaves(outputs)} == {jnp.dtype(dtype)}
    gradients = jax.eval_shape(pullback(f), args, outputs)[1]
    chex.assert_trees_all_equal_shapes_and_dtypes(gradients, jax.eval_shape(lambda *a: a, *args))
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(second, args, outputs)[0], gradients)


@pytest.mark.parametrize("dtype", LOW, ids=lambda d: d.__name__)
@pytest.mark.parametrize(("name", "label"), OPS)
def test_low_precision_stays_near_the_twin_in_float64(name, label, dtype, key):
    """At the rounded inputs, within a few units in the last place of each leaf's largest element."""
    args = arguments(name, label, key, dtype=dtype)
    cotangents = cotangents_for(bound(name, label), args, jax.random.fold_in(key, 1))
    wide = jax.tree.map(lambda a: a.astype(jnp.float64), (args, cotangents))
    actual = compiled(name, label)(args, cotangents)
    actual = jax.tree.map(lambda a: a.astype(jnp.float64), actual)
    # Measured over five seeds: below 6 eps for every op and dtype.
    assert_close(actual, compiled(name, label, twin=True)(*wide), relative=10 * float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("name", SEQUENCES)
def test_mixed_dtypes(name, key):
    """A wide carry and wide weights over narrow inputs: each cotangent has the dtype of its own primal."""
    label = "truncation"
    params, _, xs = arguments(name, label, key, dtype=jnp.bfloat16)
    params = params._replace(w_h=params.w_h.astype(jnp.float32))
    _, carry, _ = arguments(name, label, key, dtype=jnp.float32)
    args = (params, carry, xs)
    (last, ys), gradients = pullback(bound(name, label))(args, cotangents_for(bound(name, label), args, key))
    chex.assert_trees_all_equal_shapes_and_dtypes(last, carry)
    assert ys.dtype == jnp.bfloat16
    chex.assert_trees_all_equal_shapes_and_dtypes(gradients, args)


@pytest.mark.parametrize(("name", "label"), [p for p in OPS if "cell" not in p.id])
def test_a_wide_bias_does_not_widen_the_products(name, label, key):
    """It is added to what has accumulated, so that fast units for narrow products stay in use."""
    args = arguments(name, label, key, dtype=jnp.bfloat16)
    if name == "conv":
        args = (*args[:2], args[2].astype(jnp.float32))
    else:
        biases = {f: b.astype(jnp.float32) for f, b in args[0]._asdict().items() if f.startswith("b")}
        args = (args[0]._replace(**biases), *args[1:])
    products = [
        e
        for e in subjaxprs(jax.make_jaxpr(pullback(bound(name, label)))(args, bound(name, label)(*args)).jaxpr)
        if e.primitive.name in ("dot_general", "conv_general_dilated")
    ]
    assert products
    for product in products:
        assert [v.aval.dtype for v in (*product.invars, *product.outvars)] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]


def test_products_of_bfloat16_accumulate_in_float32():
    """1 + 256 small terms: in bfloat16 each of them would be rounded away."""
    conv = CASES["conv"].op
    x = jnp.full((300, 1), 2.0**-9, jnp.bfloat16).at[0].set(1)
    y = conv(x, jnp.ones((257, 1, 1), jnp.bfloat16))
    assert float(y[0, 0]) == 1.5
    gradient = jax.grad(lambda k: conv(x, k, k[0, 0]).astype(jnp.float32).sum())(jnp.ones((1, 1, 1), jnp.bfloat16))
    np.testing.assert_allclose(float(gradient[0, 0, 0]), 300 + 1 + 299 * 2.0**-9, rtol=2.0**-8)


def test_complex_convolution_is_bilinear(key):
    """No conjugate anywhere: the gradient of a holomorphic function in JAX's convention."""
    x, w, b = arguments("conv", "1d", key)
    args = (lax.complex(x, x[::-1]), lax.complex(w, -2 * w[::-1]), lax.complex(b, b[::-1]))
    cotangents = cotangents_for(bound("conv", "1d"), args, jax.random.fold_in(key, 1))
    actual, expected = (jax.jit(pullback(bound("conv", "1d", twin=t)))(args, cotangents) for t in (False, True))
    assert_close(actual, expected)
