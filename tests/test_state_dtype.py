"""By default, states are float32 between steps, whatever the dtypes of inputs, weights and carry."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normals

import jaxseq

T, B, H = 500, 4, 16
NARROW = jnp.bfloat16


def weights(key, dtype=NARROW, forget=4):
    """Return LSTM parameters with a memory of about 1 / (1 - σ(forget)) steps."""
    params = jaxseq.lstm_init(key, H, H, dtype=dtype)
    return params._replace(b=params.b.at[H : 2 * H].set(forget))


def inputs(key, steps=T, dtype=NARROW):
    return jax.random.normal(key, (steps, B, H), jnp.float32).astype(dtype)


def cast(tree, dtype):
    return jax.tree.map(lambda a: a.astype(dtype), tree)


def test_gradients_over_many_steps(key):
    """Compare with autodiff of the reference implementation in float64."""
    params, xs = weights(key), inputs(key)

    def gradient(layer, params, xs):
        return jax.jit(jax.grad(lambda p: jnp.sum(layer(p, None, xs)[1].astype(xs.dtype) ** 2).astype(float)))(params)

    exact = gradient(jaxseq.reference.lstm, *cast((params, xs), jnp.float64))
    error = {}
    for name, options in (("default", {}), ("narrow", {"state_dtype": NARROW})):
        found = gradient(partial(jaxseq.lstm, **options), params, xs)
        assert {a.dtype for a in found} == {jnp.dtype(NARROW)}
        gap = [np.linalg.norm(np.asarray(a, float) - b) / np.linalg.norm(b) for a, b in zip(found, exact, strict=True)]
        error[name] = max(gap)
    assert error["default"] < 0.05
    assert error["narrow"] > 0.2


def test_a_state_is_not_rounded_before_its_product():
    """The product of one and 1 + 2^-10, which bfloat16 cannot represent, is exact."""
    one, h = jnp.ones((1, 1), NARROW), jnp.full((1, 1), 1 + 2**-10, jnp.float32)
    params = jaxseq.RNNParams(jnp.zeros((1, 1), NARROW), one, None)
    last, _ = jaxseq.rnn(params, h, one[None], activation="relu")
    np.testing.assert_array_equal(last, h)


DTYPES = [
    (NARROW, NARROW, None, {}, jnp.float32),
    (NARROW, NARROW, NARROW, {}, NARROW),
    (NARROW, NARROW, None, {"state_dtype": NARROW}, NARROW),
    (NARROW, NARROW, jnp.float32, {"state_dtype": "bfloat16"}, jnp.float32),
    (jnp.float16, jnp.float16, None, {}, jnp.float32),
    (jnp.float32, NARROW, None, {}, jnp.float32),
    (jnp.float32, jnp.float32, None, {"state_dtype": NARROW}, NARROW),
    (jnp.float32, jnp.float32, None, {"state_dtype": jnp.float64}, jnp.float64),
    (jnp.float64, jnp.float64, None, {}, jnp.float64),
]


@pytest.mark.parametrize(
    "names", ["lstm", "slstm", *(pytest.param(n, marks=pytest.mark.long) for n in ("conv_gru", "bidirectional"))]
)
def test_dtypes_at_the_boundary(names, key):
    """ys has the dtype of xs, the returned carry that of `carry` or of the state, each cotangent that of its primal.

    The same holds for the reference implementation. Traced, not run.
    """
    for of_params, of_xs, of_carry, options, out in DTYPES:
        for library in (jaxseq, jaxseq.reference):
            if names.startswith("conv"):
                params, layer = getattr(jaxseq, f"{names}_init")(key, 3, 2, 4), getattr(library, names)
                xs = jnp.ones((5, 2, 6, 2), of_xs)
            elif names == "slstm":
                params, xs = jaxseq.cells.slstm_init(key, 4, 4), jnp.ones((5, 2, 4), of_xs)
                layer = partial(library.recurrence, jaxseq.cells.slstm)
            elif names == "bidirectional":
                params = [jaxseq.gru_init(key, 4, 4)] * 2
                layer, xs = partial(getattr(library, names), library.gru), jnp.ones((5, 2, 4), of_xs)
            else:
                params, layer = getattr(jaxseq, f"{names}_init")(key, 4, 4), getattr(library, names)
                xs = jnp.ones((5, 2, 4), of_xs)
            params = cast(params, of_params)
            layer = partial(layer, **options)
            carry, _ = jax.eval_shape(layer, params, None, xs)
            if of_carry is not None:
                carry = jax.tree.map(lambda a, d=of_carry: jax.ShapeDtypeStruct(a.shape, d), carry)
            given = None if of_carry is None else carry
            last, ys = jax.eval_shape(layer, params, given, xs)
            assert {a.dtype for a in jax.tree.leaves(last)} == {jnp.dtype(out)}
            assert ys.dtype == of_xs
            if library is jaxseq.reference:
                continue
            loss = lambda p, s, x, layer=layer: sum(  # noqa: E731
                jnp.sum(a.astype(jnp.float64)) for a in jax.tree.leaves(layer(p, s, x))
            )
            found = jax.eval_shape(jax.grad(loss, (0, 1, 2)), params, carry, xs)
            want = (params, carry, xs)
            assert [a.dtype for a in jax.tree.leaves(found)] == [a.dtype for a in jax.tree.leaves(want)]


def test_chunks(key):
    """Chunks with a float32 carry are exact. A bfloat16 carry keeps its dtype, as loops require, and rounds once."""
    params, xs = weights(key, forget=1), inputs(key, 20)
    run = jax.jit(jaxseq.lstm)
    last, ys = run(params, None, xs)
    middle, first = run(params, None, xs[:10])
    end, second = run(params, middle, xs[10:])
    np.testing.assert_array_equal(jnp.concatenate([first, second]), ys)
    jax.tree.map(np.testing.assert_array_equal, end, last)
    narrow = cast(middle, NARROW)
    end, second = jax.lax.scan(partial(jaxseq.lstm, params), narrow, xs[None, 10:])
    want, _ = run(params, cast(narrow, jnp.float32), xs[10:])
    jax.tree.map(np.testing.assert_array_equal, end, cast(want, NARROW))
    steps, _ = jax.lax.scan(partial(jaxseq.lstm_cell, params), narrow, xs[10:])
    assert {a.dtype for a in steps} == {jnp.dtype(NARROW)}
    assert {a.dtype for a in jaxseq.lstm_cell(params, None, xs[0])[0]} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    ("of_params", "of_xs", "options"),
    [
        (NARROW, NARROW, {}),
        (jnp.float32, NARROW, {"checkpoint": 4}),
        (jnp.float16, jnp.float16, {"truncation": (4, 6)}),
        (NARROW, NARROW, {"state_dtype": NARROW}),
    ],
)
def test_agrees_with_the_reference(of_params, of_xs, options, key):
    """Values and gradients of a GRU agree within a few roundings of the narrower dtype."""
    params = cast(jaxseq.gru_init(key, H, H), of_params)
    xs = inputs(key, 12, of_xs)
    cotangent = normals(key, xs)

    @partial(jax.jit, static_argnums=0)
    def both(layer, params, xs):
        (_, ys), pull = jax.vjp(lambda p, x: layer(p, None, x, **options), params, xs)
        return ys, pull((jnp.zeros(ys.shape[1:], _.dtype), cotangent))

    found, want = (both(library.gru, params, xs) for library in (jaxseq, jaxseq.reference))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        exact = np.asarray(b, float)
        assert np.linalg.norm(np.asarray(a, float) - exact) < 0.01 * np.linalg.norm(exact)


def test_what_is_no_dtype_of_floats(key):
    with pytest.raises(TypeError, match="`state_dtype`: expected a floating dtype, got int32"):
        jaxseq.lstm(weights(key), None, inputs(key, 3), state_dtype=jnp.int32)
