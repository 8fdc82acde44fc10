"""Arguments on the device and on the host, and `jax.hessian`.

testing/test_library.py tests every op under jit, vmap, scan, cond, remat and shard_map with `jaxseq.testing`.
"""

import chex
import jax
import jax.numpy as jnp
from absl.testing import parameterized
from helpers import (
    arguments,
    assert_close,
    bound,
    compiled,
    cotangents_for,
    pullback,
)

import jaxseq
from jaxseq._cases import CASES


class TestVariants(chex.TestCase):
    """Without jit, with arguments on the device and on the host (NumPy); `contract.py` compiles every op."""

    @chex.variants(without_jit=True, without_device=True)
    @parameterized.named_parameters((name, name) for name in ("conv", "causal_conv", "lstm"))
    def test_value_and_gradient(self, name):
        label = next(iter(CASES[name].variants))
        key = jax.random.key(20)
        args = arguments(name, label, key)
        cotangents = cotangents_for(bound(name, label), args, jax.random.fold_in(key, 1))
        actual = self.variant(pullback(bound(name, label)))(args, cotangents)
        expected = compiled(name, label, reference=True)(args, cotangents)
        chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
        chex.assert_tree_all_finite(actual)
        chex.assert_trees_all_close(actual, expected, rtol=1e-9, atol=1e-10)


def scalar(f):
    """Return a function that reduces all outputs of `f` to a nonlinear scalar."""
    return lambda *args: sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(f(*args)))


def test_hessian_by_name(key):
    args = arguments("gru", "plain", key, batch=(), length=3)
    f = jax.jit(jax.hessian(lambda xs: scalar(jaxseq.gru)(*args[:2], xs)))
    reference = jax.jit(jax.hessian(lambda xs: scalar(jaxseq.reference.gru)(*args[:2], xs)))
    assert_close(f(args[2]), reference(args[2]), relative=1e-9)
