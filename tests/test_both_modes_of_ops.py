"""Forward mode and `jax.linear_transpose` of every op, judged by plain JAX, and the work of both modes.

`python -m jaxseq verify` and testing/test_library.py check <c, jvp(u)> = <vjp(c), u> for every variant.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import GRID, arguments, assert_close, bound, causal_conv, inner, long_where, mesh_of, normals, place, scans
from jax import lax
from jax.experimental import jet
from jax.sharding import PartitionSpec as P

import jaxseq
from jaxseq._cases import CASES

FIRST = (
    ("conv", "1d"),
    ("causal_conv", "resets, depthwise, dilated"),
    ("rnn", "truncation, reverse"),
    ("lstm", "states, reset state, lengths"),
)


def floats(args):
    """Return random tangents of the float leaves; those of the others are zero."""
    drawn = normals(jax.random.key(7), jax.tree.map(lambda a: jnp.zeros(a.shape), args))
    zero = lambda a, t: t if jnp.issubdtype(a.dtype, jnp.inexact) else np.zeros(a.shape, jax.dtypes.float0)  # noqa: E731
    return jax.tree.map(zero, args, drawn)


@pytest.mark.parametrize(("name", "label"), long_where(GRID, lambda *which: which not in FIRST))
def test_tangents_are_those_of_the_reference(name, label, key):
    """`jax.jvp`, and `jax.linearize`, whose linear function JAX has transposed once and can transpose again."""
    args = arguments(name, label, key)
    tangents = floats(args)
    value, expected = jax.jit(partial(jax.jvp, bound(name, label, reference=True)))(args, tangents)
    f = jax.jit(partial(jax.jvp, bound(name, label)))
    assert_close(f(args, tangents), (value, expected), relative=1e-9)
    if (name, label) in FIRST:
        _, linear = jax.linearize(bound(name, label), *args)
        assert_close(jax.jit(linear)(*tangents), expected, relative=1e-9)


def test_jacobian_and_hessian(key):
    """Each column of the Jacobian of a truncated op is that of a loop over the reference, and so is the Hessian."""
    args = arguments("gru", "truncation", key, batch=(), length=4)
    both = (bound("gru", "truncation", reference=reference) for reference in (False, True))
    f, reference = (lambda x, g=g: g(*args[:2], x)[1] for g in both)
    directions = np.eye(args[2].size).reshape(-1, *args[2].shape)
    columns = jax.jit(lambda x: lax.map(lambda t: jax.jvp(reference, (x,), (t,))[1], directions))(args[2])
    found = jax.jit(jax.jacfwd(f))(args[2]).reshape(*columns.shape[1:], -1)
    np.testing.assert_allclose(np.moveaxis(found, -1, 0), columns, atol=1e-12)
    scalar = lambda f: lambda x: jnp.sum(jnp.sin(f(x)))  # noqa: E731
    found, expected = (jax.jit(jax.hessian(scalar(g)))(args[2]) for g in (f, reference))
    assert_close(found, expected, relative=1e-9)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_narrow_dtypes(dtype, key):
    """Tangents have the dtype of their primal, and the error of a product in it."""
    k = jax.random.split(key, 6)
    draw = lambda n, *shape: jax.random.normal(k[n], shape, jnp.float32).astype(dtype)  # noqa: E731
    wide = lambda tree: jax.tree.map(lambda a: a.astype(jnp.float64), tree)  # noqa: E731
    w_x, w_h, b = draw(0, 16, 64) / 4, draw(1, 16, 64) / 4, draw(2, 64)
    params, xs, kernel = jaxseq.LSTMParams(w_x, w_h, b), draw(3, 32, 8, 16), draw(4, 5, 16, 24) / 8
    for module, f, args in (
        (jaxseq.reference.lstm, jaxseq.lstm, (params, None, xs)),
        (jaxseq.reference.conv, jaxseq.conv, (xs, kernel, draw(5, 24))),
    ):
        found = jax.jit(lambda *a, f=f: jax.jvp(f, a, a))(*args)[1]
        expected = jax.jit(lambda *a, f=module: jax.jvp(f, a, a))(*wide(args))[1]
        y, y_wide = (jax.tree.leaves(a)[-1] for a in (found, expected))
        assert y.dtype == dtype
        error = np.abs(np.asarray(y, np.float64) - y_wide).max() / np.abs(y_wide).max()
        assert error < (2e-6 if dtype == jnp.float32 else 0.02)


def test_truncation_without_jit(key):
    """Windows of equal length are scanned without an empty rest."""
    params, carry, xs = arguments("rnn", "plain", key, length=4)
    f = lambda module: jax.jvp(lambda xs: module.rnn(params, carry, xs, truncation=2)[1], (xs,), (xs,))  # noqa: E731
    with jax.disable_jit():
        found = f(jaxseq)
    assert_close(found, f(jaxseq.reference), relative=1e-12)


# --- The work of both modes ---


def test_reverse_mode_runs_one_pass_in_each_direction(key):
    """The gradient is a forward pass, the states again, and a backward pass. It has no loop of the tangents."""
    params, carry, xs = arguments("lstm", "plain", key)
    total = lambda *args: sum(jnp.sum(a) for a in jax.tree.leaves(jaxseq.lstm(*args)))  # noqa: E731
    assert [e.params["reverse"] for e in scans(jax.grad(total), params, carry, xs)] == [False, False, True]
    run = jax.jit(lambda *args: jax.jvp(jaxseq.lstm, args, args)).lower(params, carry, xs).compile()
    assert run.as_text().count(" while(") == 1  # of values and tangents


SECOND = {
    "hessian": lambda f, x: jax.hessian(f)(x),
    "reverse over reverse": lambda f, x: jax.grad(lambda x: jnp.sum(jax.grad(f)(x)))(x),
    "reverse over forward": lambda f, x: jax.grad(lambda x: jax.jvp(f, (x,), (x,))[1])(x),
}


@pytest.mark.parametrize("name", SECOND)
def test_second_derivatives_have_the_loops_and_products_of_the_reference(name, key):
    params, carry, xs = arguments("lstm", "plain", key)

    def work(module):
        f = lambda xs: jnp.sum(jnp.sin(module.lstm(params, carry, xs)[1]))  # noqa: E731
        text = jax.jit(partial(SECOND[name], f)).lower(xs).as_text()
        return text.count("stablehlo.while"), text.count("dot_general")

    assert work(jaxseq) == work(jaxseq.reference)


def test_a_tangent_of_a_convolution_is_two_convolutions():
    x, kernel = jnp.ones((2, 9, 16)), jnp.ones((3, 16, 16))
    f = lambda *args: jax.jvp(jaxseq.conv, args, args)  # noqa: E731
    text = jax.jit(f).lower(x, kernel).as_text()
    assert text.count("stablehlo.convolution") == 3
    of_kernel = lambda w: jax.jvp(lambda w: jaxseq.conv(x, w), (w,), (w,))  # noqa: E731
    assert jax.jit(of_kernel).lower(kernel).as_text().count("stablehlo.convolution") == 2


def test_a_tangent_has_the_settings_of_its_call(key):
    """JAX compiles the program after the settings have been left."""
    params, _, xs = arguments("lstm", "plain", key)

    def f(params):
        with jax.default_matmul_precision("highest"):
            return jax.jvp(lambda p: jaxseq.lstm(p, None, xs)[1], (params,), (params,))

    products = [line for line in jax.jit(f).lower(params).as_text().splitlines() if "dot_general" in line]
    assert len(products) == 5
    assert all("HIGHEST" in line for line in products)


# --- Several devices ---


@pytest.mark.eight_devices
@pytest.mark.parametrize("kind", ["explicit", "auto"])
def test_on_a_mesh(kind, key):
    """Batch over four devices and time over two: the tangents, and a Hessian-vector product, of one device."""
    params, _, xs = arguments("lstm", "plain", key, batch=(4,), length=8)
    kernel = normals(key, jax.ShapeDtypeStruct((3, xs.shape[-1], 6), jnp.float64))

    def f(params, kernel, xs):
        _, ys = jaxseq.lstm(params, None, xs, truncation=4)
        return jnp.sum(jnp.sin(ys)) + jnp.sum(jnp.sin(jaxseq.conv(jnp.moveaxis(xs, 0, 1), kernel, padding="SAME")))

    def derivatives(params, kernel, xs):
        args = params, kernel, xs
        return jax.jvp(f, args, args), jax.jvp(jax.grad(f, (0, 1)), args, args)

    expected = jax.jit(derivatives)(params, kernel, xs)
    mesh = mesh_of((2, 4), ("t", "b"), kind)
    with jax.set_mesh(mesh):
        found = jax.jit(derivatives)(*place(mesh, (params, kernel, xs), (P(), P(), P("t", "b"))))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9), found, expected)


# --- Linear transpose ---


def dense(f, x):
    """Return the matrix of a linear function, column by column."""
    basis = np.eye(x.size).reshape(-1, *x.shape)
    return np.asarray(lax.map(lambda e: f(e).ravel(), basis)).T


@pytest.fixture
def tensors(key):
    shapes = {"x": (2, 9, 4), "w": (3, 2, 6), "bias": (6,), "up": (3, 3, 4), "carry": (2, 4, 4), "taps": (3, 4, 6)}
    return normals(key, {name: jax.ShapeDtypeStruct(shape, jnp.float64) for name, shape in shapes.items()})


def linear_functions(t, module):
    conv = partial(module.conv, stride=2, padding="SAME", groups=2)
    up = partial(module.conv_transpose, stride=2, groups=2)
    causal = partial(causal_conv, module=module, dilation=2)
    return {
        "conv, x": (lambda x: conv(x, t["w"]), t["x"]),
        "conv, kernel": (lambda w: conv(t["x"], w), t["w"]),
        "conv, vmap": (jax.vmap(lambda w: conv(t["x"], w)), jnp.stack([t["w"], -2 * t["w"]])),
        "conv_transpose, x": (lambda x: up(x, t["up"]), t["x"]),
        "conv_transpose, kernel": (lambda w: up(t["x"], w), t["up"]),
        "causal_conv, x": (lambda x: causal(None, x, t["taps"])[1], t["x"]),
        "causal_conv, kernel": (lambda w: causal(t["carry"], t["x"], w)[1], t["taps"]),
    }


LINEAR = (
    *("conv, x", "conv, kernel", "conv, vmap", "conv_transpose, x", "conv_transpose, kernel"),
    *("causal_conv, x", "causal_conv, kernel"),
)


@pytest.mark.parametrize("name", LINEAR)
def test_linear_transpose(name, tensors):
    """It is the transpose of the dense matrix of the reference, also under jit on either side."""
    f, x = linear_functions(tensors, jaxseq)[name]
    matrix = dense(jax.jit(linear_functions(tensors, jaxseq.reference)[name][0]), x)
    c = normals(jax.random.key(1), jax.eval_shape(f, x))
    expected = matrix.T @ np.asarray(c).ravel()
    (found,) = jax.linear_transpose(f, x)(c)
    (jitted,) = jax.jit(jax.linear_transpose(jax.jit(f), x))(c)
    for a in (found, jitted):
        np.testing.assert_allclose(np.ravel(a), expected, atol=1e-12)


def test_linear_transpose_of_several_arguments(tensors):
    """Input and carry together, or input and bias together."""
    t = tensors
    c = normals(jax.random.key(2), jax.ShapeDtypeStruct((2, 9, 6), jnp.float64))
    f = lambda x, carry: causal_conv(carry, x, t["taps"], dilation=2)[1]  # noqa: E731
    found = jax.linear_transpose(f, t["x"], t["carry"])(c)
    np.testing.assert_allclose(inner(found, (t["x"], t["carry"])), inner(f(t["x"], t["carry"]), c), rtol=1e-12)
    g = lambda x, bias: jaxseq.conv(x, t["w"], bias, padding="SAME", groups=2)  # noqa: E731
    found = jax.linear_transpose(g, t["x"], t["bias"])(c)
    np.testing.assert_allclose(found[1], c.sum((0, 1)), rtol=1e-12)
    np.testing.assert_allclose(inner(found, (t["x"], t["bias"])), inner(g(t["x"], t["bias"]), c), rtol=1e-12)


@pytest.mark.parametrize("form", ["a bias", "a carry", "both factors"])
def test_linear_transpose_of_what_is_not_linear(form, tensors):
    t = tensors
    f = {
        "a bias": lambda x: jaxseq.conv(x, t["w"], t["bias"], groups=2),
        "a carry": lambda x: causal_conv(t["carry"], x, t["taps"], dilation=2)[1],
        "both factors": lambda x: jaxseq.conv(x, jnp.sum(x) * t["w"], groups=2),
    }[form]
    with pytest.raises(TypeError, match="is linear in its input"):
        jax.linear_transpose(f, t["x"])(jnp.zeros(jax.eval_shape(f, t["x"]).shape))


def test_linear_transpose_of_a_recurrence(key):
    params, _, xs = arguments("rnn", "plain", key)
    f = lambda xs: jaxseq.rnn(params, None, xs)[1]  # noqa: E731
    with pytest.raises(TypeError, match="hand-derived gradient is not transposed"):
        jax.linear_transpose(f, xs)(jax.eval_shape(f, xs))


@pytest.mark.parametrize("name", ["conv", "lstm"])
def test_taylor_mode_is_an_error(name, key):
    args = arguments(name, next(iter(CASES[name].variants)), key)
    place = 0 if name == "conv" else 2
    f = lambda x: getattr(jaxseq, name)(*args[:place], x, *args[place + 1 :])  # noqa: E731
    with pytest.raises(TypeError, match=rf"jaxseq\.{name}: expected arrays, got tracers of jax\.experimental\.jet"):
        jet.jet(f, (args[place],), ((args[place],),))
