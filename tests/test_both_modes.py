"""`both_modes`: forward mode beside a `jax.custom_vjp`, judged by plain functions, and rules wrong on purpose."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import arguments, assert_close, normals
from jax import lax

import jaxseq


class Pair(NamedTuple):
    mean: jax.Array
    most: jax.Array | None


def plain(params, mask, x, power=2):
    """A function of a pytree with None, of a boolean mask and of a static power, with several results."""
    h = jnp.tanh(x @ params["w"]) ** power * params["scale"]
    h = jnp.where(mask[:, None], h, 0)
    return Pair(jnp.mean(h), None), {"h": h, "signs": jnp.sign(h).astype(jnp.int32)}


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def hand(params, mask, x, power=2):
    return plain(params, mask, x, power)


def forward(params, mask, x, power=2):
    a = jnp.tanh(x @ params["w"])
    return hand(params, mask, x, power), (params, mask, x, a)


def backward(power, kept, cotangents):
    params, mask, x, a = kept
    (mean_bar, _), results_bar = cotangents
    h_bar = results_bar["h"] + mean_bar / a.size
    h_bar = jnp.where(mask[:, None], h_bar, 0)
    a_bar = h_bar * params["scale"] * power * a ** (power - 1) * (1 - a**2)
    scale_bar = jnp.sum(h_bar * a**power)
    return {"w": x.T @ a_bar, "scale": scale_bar, "unused": None}, None, a_bar @ params["w"].T


hand.defvjp(forward, backward)

F = jaxseq.both_modes(hand, plain, static_argnums=3)
MASK = jnp.array([True, False, True])


def operands(key):
    like = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float64)  # noqa: E731
    params, x = normals(key, ({"w": like(4, 5), "scale": like(), "unused": None}, like(3, 4)))
    return params, x


def scalar(f, params, x, power=2):
    pair, results = f(params, MASK, x, power)
    return pair.mean + jnp.sum(jnp.sin(results["h"]))


COMPOSITIONS = {
    "value": lambda f, p, x: f(p, x),
    "grad": lambda f, p, x: jax.grad(f, (0, 1))(p, x),
    "jvp": lambda f, p, x: jax.jvp(f, (p, x), (p, x)),
    "jvp of one argument": lambda f, p, x: jax.jvp(lambda x: f(p, x), (x,), (x,)),
    "linearize": lambda f, p, x: jax.linearize(f, p, x)[1](p, x),
    "jacfwd": lambda f, p, x: jax.jacfwd(f)(p, x),
    "jacrev": lambda f, p, x: jax.jacrev(f)(p, x),
    "hessian": lambda f, p, x: jax.hessian(f, 1)(p, x),
    "hessian of a jitted function": lambda f, p, x: jax.hessian(jax.jit(f), 1)(p, x),
    "forward over reverse": lambda f, p, x: jax.jvp(jax.grad(f), (p, x), (p, x)),
    "reverse over forward": lambda f, p, x: jax.grad(lambda p: jax.jvp(f, (p, x), (p, x))[1])(p),
    "reverse over linearize": lambda f, p, x: jax.grad(lambda p: jax.linearize(f, p, x)[1](p, x))(p),
    "reverse over linearize of a jitted function": lambda f, p, x: jax.grad(
        lambda p: jax.linearize(jax.jit(f), p, x)[1](p, x)
    )(p),
    "reverse over reverse": lambda f, p, x: jax.grad(lambda x: jnp.sum(jax.grad(f, 1)(p, x) ** 2))(x),
    "vmap of grad": lambda f, p, x: jax.vmap(jax.grad(f), (None, 0))(p, jnp.stack([x, 2 * x])),
    "vmap of jvp": lambda f, p, x: jax.vmap(lambda t: jax.jvp(lambda x: f(p, x), (x,), (t,)))(jnp.stack([x, 2 * x])),
    "grad of vmap": lambda f, p, x: jax.grad(lambda p: jnp.sum(jax.vmap(f, (None, 0))(p, jnp.stack([x, 2 * x]))))(p),
    "remat": lambda f, p, x: jax.grad(jax.checkpoint(f), (0, 1))(p, x),
    "remat with a policy": lambda f, p, x: jax.grad(
        jax.checkpoint(f, policy=jax.checkpoint_policies.dots_saveable), (0, 1)
    )(p, x),
    "scan": lambda f, p, x: jax.grad(lambda p: lax.scan(lambda c, _: (c + f(p, c * x), c), 1.0, None, length=3)[0])(p),
    "jvp of while": lambda f, p, x: jax.jvp(
        lambda p: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] + f(p, c[1] * x)), (0, 1.0))[1],
        (p,),
        (p,),
    ),
}


FIRST = (
    *("grad", "jvp", "jacfwd", "hessian", "hessian of a jitted function"),
    *("reverse over linearize of a jitted function", "grad of vmap", "remat with a policy", "jvp of while"),
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FIRST else pytest.mark.long) for name in COMPOSITIONS]
)
def test_composition(name, key):
    """Each equals that of the plain function."""
    params, x = operands(key)
    found, expected = (jax.jit(partial(COMPOSITIONS[name], partial(scalar, f)))(params, x) for f in (F, plain))
    assert_close(found, expected, relative=1e-12)


def test_eager_and_static_arguments(key):
    params, x = operands(key)
    for power in (2, 3):
        for of in (jax.grad, jax.jacfwd):
            found, expected = (of(partial(scalar, f, power=power))(params, x) for f in (F, plain))
            assert_close(found, expected, relative=1e-12)
    named = jaxseq.both_modes(lambda p, m, x, **o: hand(p, m, x, *o.values()), plain)
    assert_close(named(params, MASK, x, power=3), plain(params, MASK, x, 3))


def test_integers_have_no_tangent(key):
    params, x = operands(key)
    zero = np.zeros(MASK.shape, jax.dtypes.float0)
    (pair, results), (pair_dot, results_dot) = jax.jvp(
        F, (params, MASK, x, 2), (params, zero, x, np.zeros((), jax.dtypes.float0))
    )
    assert results_dot["signs"].dtype == jax.dtypes.float0
    assert results["signs"].dtype == jnp.int32
    assert pair.most is pair_dot.most is None


@jax.custom_vjp
def doubled(x):
    return jnp.sin(x)


doubled.defvjp(lambda x: (doubled(x), x), lambda x, y_bar: (2 * y_bar * jnp.cos(x),))  # wrong on purpose


def test_each_mode_takes_its_own_rule():
    """The gradient is that of the pullback, also where it is wrong, and the tangent that of the plain function."""
    f, x = jaxseq.both_modes(doubled, jnp.sin), jnp.float64(0.5)
    np.testing.assert_allclose(jax.grad(f)(x), 2 * jnp.cos(x))
    np.testing.assert_allclose(jax.jvp(f, (x,), (1.0,))[1], jnp.cos(x))
    np.testing.assert_allclose(jax.linear_transpose(jax.linearize(f, x)[1], x)(1.0)[0], 2 * jnp.cos(x))
    batch = jnp.array([0.1, 0.2])
    np.testing.assert_allclose(jax.vmap(jax.grad(f))(batch), 2 * jnp.cos(batch))


WAYS = ("jit", "scan", "cond", "remat", "remat, all stored", "remat of scan", "vmap", "constant", "vmap, constant")


@pytest.mark.parametrize("way", WAYS)
def test_reverse_mode_takes_the_pullback_in_every_transformation(way):
    """It is wrong on purpose by a factor of two: where the tangents are unknown only after the rule has run."""
    f = jaxseq.both_modes(doubled, jnp.sin)
    in_scan = lambda x: lax.scan(lambda c, _: (c, f(c)), x, length=3)[1].sum() / 3  # noqa: E731
    of_two = jaxseq.both_modes(lambda x, y: doubled(x) + 0 * y, lambda x, y: jnp.sin(x) + 0 * y)
    constant = jnp.zeros(3)
    g = {
        "jit": jax.jit(f),
        "scan": in_scan,
        "cond": lambda x: lax.cond(x > 0, f, lambda x: x, x),
        "remat": jax.checkpoint(lambda x: f(x) + 0 * f(2 * x)),
        "remat, all stored": jax.checkpoint(f, policy=jax.checkpoint_policies.everything_saveable),
        "remat of scan": jax.checkpoint(in_scan),
        "vmap": lambda x: jax.vmap(jax.jit(f))(jnp.stack([x, x])).mean(),
        "constant": lambda x: of_two(x, constant).mean(),
        "vmap, constant": lambda x: jax.vmap(of_two, (0, None))(jnp.stack([x, x]), constant).mean(),
    }[way]
    x = jnp.float64(0.5)
    np.testing.assert_allclose(jax.grad(g)(x), 2 * jnp.cos(x))
    np.testing.assert_allclose(jax.jit(jax.grad(g))(x), 2 * jnp.cos(x))
    np.testing.assert_allclose(jax.jvp(g, (x,), (1.0,))[1], jnp.cos(x))


def test_a_policy_of_remat_that_stores_convolutions():
    """A layer in `lax.scan` is convolved once in the forward pass, and not again in the backward pass."""
    x, kernels = jnp.ones((2, 8, 16)), jnp.ones((3, 3, 16, 16))

    def count(policy):
        layer = jax.checkpoint(lambda w, x: jnp.tanh(jaxseq.conv(x, w, padding="SAME")), policy=policy)
        loss = lambda kernels: jnp.sum(lax.scan(lambda x, w: (layer(w, x), None), x, kernels)[0])  # noqa: E731
        return jax.jit(jax.grad(loss)).lower(kernels).compile().as_text().count(" convolution(")

    assert count(jax.checkpoint_policies.dots_saveable) == count(None) - 1


@jax.custom_vjp
def product(x, w):
    return x @ w


product.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, y_bar: (y_bar @ kept[1].T, kept[0].T @ y_bar))


@pytest.mark.parametrize("shape", [(3, 0), (0, 4)], ids=str)
def test_empty_arrays(shape):
    f, x, w = jaxseq.both_modes(product, jnp.matmul), jnp.ones(shape), jnp.ones((shape[1], 2))
    y, tangent = jax.jvp(f, (x, w), (x, w))
    assert y.shape == tangent.shape == (shape[0], 2)
    assert not jax.grad(lambda w: jnp.sum(f(x, w)))(w).any()


def test_complex_numbers(key):
    x, w, t = (lax.complex(*normals(k, (jnp.ones((3, 4)), jnp.ones((3, 4))))) for k in jax.random.split(key, 3))
    w = w.T
    f = jaxseq.both_modes(product, jnp.matmul)
    assert_close(jax.jvp(f, (x, w), (t, w)), jax.jvp(jnp.matmul, (x, w), (t, w)))
    y_bar = jnp.full((3, 3), 1 + 2j)
    assert_close(jax.vjp(f, x, w)[1](y_bar), jax.vjp(product, x, w)[1](y_bar))


def test_reverse_mode_of_an_op_costs_what_it_cost(key):
    """The same products, bytes and flops as without forward mode."""
    args = arguments("lstm", "plain", key, dtype=jnp.float32)
    loss = lambda f: jax.jit(jax.grad(lambda *args: jnp.sum(f(*args)[1] ** 2), (0, 1, 2)))  # noqa: E731
    both = jaxseq.both_modes(jaxseq.lstm, jaxseq.reference.lstm)
    found, expected = (loss(f).lower(*args).compile() for f in (both, jaxseq.lstm))
    assert found.memory_analysis().temp_size_in_bytes <= expected.memory_analysis().temp_size_in_bytes
    assert found.cost_analysis()["flops"] <= 1.01 * expected.cost_analysis()["flops"]
    assert_close(jax.jvp(both, args, args), jax.jvp(jaxseq.reference.lstm, args, args), relative=1e-5)


@pytest.mark.other_types
def test_errors():
    with pytest.raises(TypeError, match=r"`plain`: expected a function, got int 3"):
        jaxseq.both_modes(doubled, 3)
    with pytest.raises(TypeError, match=r"`static_argnums`: expected an integer >= 0"):
        jaxseq.both_modes(doubled, jnp.sin, static_argnums=("x",))
    with pytest.raises(TypeError, match=r"`static_argnums`: expected an integer >= 0"):
        jaxseq.both_modes(doubled, jnp.sin, static_argnums=1.0)
    with pytest.raises(TypeError, match=r"`plain`: expected a function of the arguments of `hand`.*missing"):
        jax.grad(jaxseq.both_modes(doubled, lambda x, y: x + y))(1.0)
    other = jaxseq.both_modes(doubled, lambda x: x.astype(jnp.float32))
    with pytest.raises(TypeError, match=r"`plain`: expected the result of `hand`, float64\[\], got float32\[\]"):
        jax.grad(other)(jnp.float64(1.0))


# --- Functions that close over traced arrays, and those that do not compute the same ---


def scaled(a):
    """Return sin(a x) with both modes; its two functions close over a."""
    plain = lambda x: jnp.sin(a * x)  # noqa: E731
    f = jax.custom_vjp(plain)
    f.defvjp(lambda x: (plain(x), x), lambda x, y_bar: (y_bar * a * jnp.cos(a * x),))
    return jaxseq.both_modes(f, plain)


class Scaled:
    def __init__(self, a):
        self.a = a

    def plain(self, x):
        return jnp.sin(self.a * x)


def scaled_by_a_method(a):
    """The same, where an object holds a."""
    f = jax.custom_vjp(Scaled(a).plain)
    f.defvjp(lambda x: (jnp.sin(a * x), x), lambda x, y_bar: (y_bar * a * jnp.cos(a * x),))
    return jaxseq.both_modes(f, Scaled(a).plain)


@pytest.mark.parametrize("scaled", [scaled, scaled_by_a_method])
def test_a_function_that_closes_over_a_traced_array(scaled):
    """It has its gradient, whose derivative with respect to the array is right, and no forward mode."""
    x, slope = jnp.float64(0.3), lambda a: jax.grad(scaled(a))(0.3)
    expected = jnp.cos(2 * x) - 2 * x * jnp.sin(2 * x)
    for derivative in (jax.grad(slope), jax.jit(jax.grad(slope)), jax.grad(jax.jit(slope))):
        np.testing.assert_allclose(derivative(2.0), expected, rtol=1e-12)
    tangent = lambda a: jax.jvp(scaled(a), (x,), (x,))[1]  # noqa: E731
    np.testing.assert_allclose(tangent(2.0), 2 * x * jnp.cos(2 * x))
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jit(tangent)(2.0)


def test_a_cell_that_closes_over_a_traced_array(key):
    params, carry, xs = arguments("rnn", "plain", key)

    def slope(a, module):
        cell = jaxseq.Cell("scaled", gates="h", step=lambda g, h: jnp.tanh(a * g[0]), params=jaxseq.RNNParams)
        total = lambda xs: jnp.sum(jnp.sin(module.recurrence(cell, params, carry, xs)[1]))  # noqa: E731
        return jnp.sum(jnp.sin(jax.grad(total)(xs)))

    found, expected = (jax.jit(jax.grad(partial(slope, module=m)))(0.7) for m in (jaxseq, jaxseq.reference))
    np.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.parametrize(
    "other",
    [lambda y: y[:1], lambda y: y.astype(jnp.float32), lambda y: (y,), lambda y: {"y": y}],
    ids=["shape", "dtype", "tuple", "dict"],
)
def test_a_plain_function_with_another_result_is_an_error_in_forward_mode(other):
    f, x = jaxseq.both_modes(doubled, lambda x: other(jnp.sin(x))), jnp.ones(3)
    with pytest.raises(TypeError, match="`plain`: expected the result of `hand`"):
        jax.jvp(f, (x,), (x,))
