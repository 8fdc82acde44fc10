"""Every op under jit, vmap, scan, cond, remat and forward over reverse."""

import chex
import jax
import jax.numpy as jnp
import pytest
from absl.testing import parameterized
from helpers import OPS, arguments, assert_close, bound, compiled, cotangents_for, inner, pullback
from jax import lax

import jaxseq
from jaxseq._cases import CASES

# The options with the most of the engine in them, one variant an op.
RICH = [
    pytest.param(name, label, id=f"{name}-{label}")
    for name, label in [
        ("conv", "2d grouped, dilated"),
        ("rnn", "relu"),
        ("gru", "truncation"),
        ("lstm", "truncation, reverse"),
        ("lstm_cell", "plain"),
    ]
]


class TestVariants(chex.TestCase):
    """With and without jit, with arguments on the device and on the host (NumPy)."""

    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    @parameterized.named_parameters((name, name) for name in CASES)
    def test_value_and_gradient(self, name):
        label = next(iter(CASES[name].variants))
        key = jax.random.key(20)
        args = arguments(name, label, key)
        cotangents = cotangents_for(bound(name, label), args, jax.random.fold_in(key, 1))
        actual = self.variant(pullback(bound(name, label)))(args, cotangents)
        expected = compiled(name, label, twin=True)(args, cotangents)
        chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
        chex.assert_tree_all_finite(actual)
        chex.assert_trees_all_close(actual, expected, rtol=1e-9, atol=1e-10)


def batched(name, label, key, which, size=3):
    """Arguments of which those with a True leaf axis hold `size` different examples each."""
    several = [arguments(name, label, jax.random.fold_in(key, i)) for i in range(size)]
    axes = tuple(0 if w else None for w in which)
    args = tuple(
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *(a[i] for a in several)) if w else several[0][i]
        for i, w in enumerate(which)
    )
    single = [tuple(several[n][i] if w else several[0][i] for i, w in enumerate(which)) for n in range(size)]
    return args, axes, single


# Three arguments each: (x, kernel, bias) or (params, carry, xs).
SUBSETS = [(True, False, False), (False, False, True), (False, True, False), (True, True, True)]


@pytest.mark.parametrize("which", SUBSETS, ids=lambda w: "".join("01"[b] for b in w))
@pytest.mark.parametrize(("name", "label"), RICH)
def test_vmap_of_gradient_and_gradient_of_vmap(name, label, which, key):
    f = bound(name, label)
    args, axes, single = batched(name, label, key, which)
    cotangents = [cotangents_for(f, a, jax.random.fold_in(key, 9 + i)) for i, a in enumerate(single)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *cotangents)
    one_by_one = [compiled(name, label, twin=True)(a, c) for a, c in zip(single, cotangents, strict=True)]
    outputs, each = jax.tree.map(lambda *leaves: jnp.stack(leaves), *one_by_one)

    actual = jax.jit(jax.vmap(pullback(f), in_axes=(axes, 0)))(args, stacked)
    assert_close(actual, (outputs, each))

    # An argument that all examples share gets the sum of what each says.
    summed = tuple(e if w else jax.tree.map(lambda leaf: leaf.sum(0), e) for w, e in zip(which, each, strict=True))
    assert_close(jax.jit(pullback(jax.vmap(f, in_axes=axes)))(args, stacked), (outputs, summed))


@pytest.mark.parametrize(("name", "label"), RICH)
def test_vmap_over_cotangents_alone(name, label, key):
    f, args = bound(name, label), arguments(name, label, key)
    cotangents = [cotangents_for(f, args, jax.random.fold_in(key, i)) for i in (1, 2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *cotangents)
    actual = jax.jit(jax.vmap(jax.vjp(f, *args)[1]))(stacked)
    expected = [compiled(name, label, twin=True)(args, c)[1] for c in cotangents]
    assert_close(actual, jax.tree.map(lambda *leaves: jnp.stack(leaves), *expected))


def scalar(f):
    """A nonlinear scalar of all outputs."""
    return lambda *args: sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(f(*args)))


@pytest.mark.parametrize(("name", "label"), RICH)
def test_inside_scan_cond_and_remat(name, label, key):
    args = arguments(name, label, key)
    gains = jnp.array([0.7, -0.4, 1.1])

    def in_scan(f):
        def loss(*args):
            def body(total, gain):
                scaled = jax.tree.map(lambda a: a * gain, args)
                return total + lax.cond(gain > 0, scalar(f), lambda *a: -scalar(f)(*a), *scaled), None

            return lax.scan(body, jnp.float64(0), gains)[0]

        return loss

    def unrolled(f):
        return lambda *args: sum(
            (1.0 if gain > 0 else -1.0) * scalar(f)(*jax.tree.map(lambda a, g=gain: a * g, args))
            for gain in gains.tolist()
        )

    every = tuple(range(len(args)))
    op, twin = bound(name, label), bound(name, label, twin=True)
    expected = jax.jit(jax.grad(unrolled(twin), every))(*args)
    assert_close(jax.jit(jax.grad(in_scan(op), every))(*args), expected)
    assert_close(jax.jit(jax.grad(in_scan(jax.checkpoint(op)), every))(*args), expected)


@pytest.mark.parametrize(("name", "label"), RICH)
def test_hessian_is_forward_over_reverse(name, label, key):
    """Works because the rule's fwd calls the undecorated implementation."""
    args = arguments(name, label, key, batch=(1,), length=4)

    def product(f):
        """H u, as the forward derivative of the reverse gradient."""
        gradient = jax.grad(scalar(f), tuple(range(len(args))))
        return jax.jit(lambda args, u: jax.jvp(gradient, args, u)[1])(args, jax.tree.map(jnp.cos, args))

    assert_close(product(bound(name, label)), product(bound(name, label, twin=True)), relative=1e-9)


def test_hessian_by_name(key):
    args = arguments("gru", "plain", key, batch=(), length=3)
    f = jax.jit(jax.hessian(lambda xs: scalar(jaxseq.gru)(*args[:2], xs)))
    twin = jax.jit(jax.hessian(lambda xs: scalar(jaxseq.reference.gru)(*args[:2], xs)))
    assert_close(f(args[2]), twin(args[2]), relative=1e-9)


@pytest.mark.parametrize(("name", "label"), OPS)
def test_forward_mode_points_to_the_twin(name, label, key):
    args = arguments(name, label, key)
    with pytest.raises(TypeError, match="forward-mode") as info:
        jax.jvp(bound(name, label), args, args)
    assert f"jaxseq.reference.{name}" in "".join(info.value.__notes__)
    value, tangent = jax.jvp(bound(name, label, twin=True), args, args)
    chex.assert_tree_all_finite((value, tangent))


@pytest.mark.parametrize(("name", "label"), OPS)
def test_each_argument_alone_equals_the_joint_gradient(name, label, key):
    args = arguments(name, label, key)
    cotangents = cotangents_for(bound(name, label), args, jax.random.fold_in(key, 1))
    _, joint = compiled(name, label)(args, cotangents)
    for i in range(len(args)):
        alone = jax.grad(lambda a, i=i: inner(bound(name, label)(*args[:i], a, *args[i + 1 :]), cotangents))(args[i])
        assert_close(alone, joint[i], relative=1e-13)


def test_leaves_no_tracer_behind(key):
    with jax.checking_leaks():
        args = arguments("lstm", "truncation", key)
        jax.jit(jax.grad(scalar(bound("lstm", "truncation")), (0, 1, 2)))(*args)
