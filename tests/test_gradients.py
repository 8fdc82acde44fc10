"""Every op against its twin under autodiff, and against finite differences, in float64."""

import jax
import jax.numpy as jnp
import pytest
from helpers import GRID, SEQUENCES, arguments, assert_close, bound, compiled, cotangents_for, inner, normals
from jax.test_util import check_grads


@pytest.mark.parametrize(("name", "label"), GRID)
def test_value_and_gradient_equal_the_twin(name, label, key):
    args = arguments(name, label, key)
    cotangents = cotangents_for(bound(name, label), args, jax.random.fold_in(key, 1))
    assert_close(compiled(name, label)(args, cotangents), compiled(name, label, twin=True)(args, cotangents))


@pytest.mark.parametrize(("name", "label"), GRID)
def test_second_order_equals_the_twin(name, label, key):
    """The gradient of <vjp(ȳ), u> to the arguments and to ȳ: reverse over reverse, through rule and residuals."""
    args = arguments(name, label, key)
    cotangents = cotangents_for(bound(name, label), args, jax.random.fold_in(key, 1))
    direction = normals(jax.random.fold_in(key, 2), args)

    def second(f):
        def along(args, cotangents):
            return inner(jax.vjp(f, *args)[1](cotangents), direction)

        return jax.jit(jax.grad(along, argnums=(0, 1)))(args, cotangents)

    assert_close(second(bound(name, label)), second(bound(name, label, twin=True)), relative=1e-9)


@pytest.mark.parametrize(("name", "label"), [p for p in GRID if "truncation" not in p.id and "relu" not in p.id])
def test_finite_differences_of_first_and_second_order(name, label, key):
    """Truncated gradients are left out: differences do not see a stop; relu for its corner at order 2."""
    args = arguments(name, label, key, length=4)
    check_grads(jax.jit(bound(name, label)), args, order=2, modes=("rev",), eps=1e-4, atol=1e-5, rtol=1e-5)


def test_finite_differences_of_relu(key):
    """Away from the corner relu has a derivative that differences see."""
    args = arguments("rnn", "plain", key, length=4)
    f = jax.jit(lambda *a: bound("rnn", "plain")(*a, activation="relu"))
    check_grads(f, args, order=1, modes=("rev",), eps=1e-6, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", SEQUENCES)
def test_cotangent_of_the_final_carry_alone(name, key):
    """The two outputs are seeded one at a time as well, so that neither can hide the other."""
    args = arguments(name, "truncation", key)
    carry, ys = cotangents_for(bound(name, "truncation"), args, jax.random.fold_in(key, 1))
    zero = jax.tree.map(jnp.zeros_like, (carry, ys))
    for cotangents in ((carry, zero[1]), (zero[0], ys)):
        hand, twin = (compiled(name, "truncation", twin=t)(args, cotangents)[1] for t in (False, True))
        assert_close(hand, twin)
