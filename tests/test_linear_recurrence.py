"""`linear_recurrence`: its algorithms, numbers that only it accepts, and what its backward pass stores and computes.

`tests/test_contract.py` and others check the variants of `_cases.py`, with the algorithm of this backend.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, mesh_of, place, scans
from jax.sharding import PartitionSpec as P
from scipy import signal

import jaxseq
from jaxseq import linear_recurrence, tuning
from tests.support import hlo

T, B, H = 11, 3, 4
STATE = B * H
ALGORITHMS = {"step by step": None, "chunks and a rest": 8 * STATE, "one associative scan": 100 * STATE}


@pytest.fixture(params=ALGORITHMS)
def algorithm(request):
    with tuning.use(tuning.Tuning(linear=tuning.LinearTuning(elements=ALGORITHMS[request.param]))):
        yield request.param


def draw(seed, *shape, dtype=np.float64, scale=1.0):
    """Return normal numbers, complex ones for a complex dtype."""
    generator = np.random.default_rng(seed)
    numbers = generator.normal(size=(2, *shape)) * scale
    return jnp.asarray(numbers[0] + 1j * numbers[1] if np.issubdtype(dtype, np.complexfloating) else numbers[0], dtype)


LENGTHS = jnp.array([11, 0, 6])
RESETS = jnp.asarray(np.random.default_rng(3).random((T, B)) < 0.3)
OPTIONS = {
    "complex": ((T, B, H), {"reverse": True}),
    "constant over the batch": ((T, 1, H), {"lengths": LENGTHS, "resets": RESETS}),
    "constant in time": ((1, B, 1), {"lengths": LENGTHS, "resets": RESETS, "reverse": True, "checkpoint": 3}),
    "truncation": ((T, B, 1), {"lengths": LENGTHS, "resets": RESETS, "truncation": 3}),
    "truncation, reverse": ((T, 1, H), {"lengths": LENGTHS, "resets": RESETS, "truncation": 4, "reverse": True}),
    "overlapping windows": ((T, B, H), {"lengths": LENGTHS, "resets": RESETS, "truncation": (2, 5), "reverse": True}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_algorithm_equals_the_reference(name, algorithm):
    """Values, the gradient, and for one of them its derivative, where padding has NaN."""
    shape, options = OPTIONS[name]
    dtype = np.complex128 if name == "complex" else np.float64
    a, carry, x = (draw(n, *s, dtype=dtype, scale=0.8) for n, s in enumerate((shape, (B, H), (T, B, H))))
    clean, bars = (a, carry, x), (draw(5, B, H, dtype=dtype), draw(6, T, B, H, dtype=dtype))

    def derivatives(module, args):
        f = partial(module.linear_recurrence, **options)
        value, pull = jax.vjp(f, *args)
        if name not in ("complex", "truncation"):
            return value, pull(bars)
        pullback = lambda *args: jax.vjp(jax.jit(f), *args)[1](bars)  # noqa: E731
        return value, jax.jvp(f, args, clean), jax.jvp(pullback, args, clean)

    expected = jax.jit(partial(derivatives, jaxseq.reference))(clean)
    if "lengths" in options:
        padding = jnp.arange(T)[:, None, None] >= LENGTHS[None, :, None]
        x = jnp.where(padding, jnp.nan, x)
        a = jnp.where(padding, jnp.nan, a) if a.shape[:2] == (T, B) else a
    found = jax.jit(partial(derivatives, jaxseq))((a, carry, x))
    assert_close(found, expected, relative=1e-11)


def test_a_reset_stops_nan(algorithm):
    """A factor of zero does not: 0 NaN = NaN."""
    x = draw(0, T, B, H).at[2, 1].set(jnp.nan)
    resets = jnp.zeros((T, B), bool).at[5, 1].set(True)
    a = draw(1, T, B, H)
    f = lambda a, x: jnp.sum(jnp.sin(linear_recurrence(a, None, x, resets=resets)[1][5:]))  # noqa: E731
    value, bars = jax.jit(jax.value_and_grad(f, (0, 1)))(a, x)
    assert np.isfinite(value)
    assert all(np.isfinite(bar[5:]).all() for bar in bars)


@pytest.mark.parametrize("factor", [0.0, -0.9, 1.0, 1.7])
def test_a_constant_factor_is_a_filter_of_scipy(factor, algorithm):
    x, carry = draw(0, T, B, H), draw(1, B, H)
    expected, end = signal.lfilter([1], [1, -factor], x, axis=0, zi=factor * np.asarray(carry)[None])
    found, ys = jax.jit(linear_recurrence)(jnp.float64(factor), carry, x)
    np.testing.assert_allclose(ys, expected, rtol=1e-12)
    np.testing.assert_allclose(factor * found, end[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 3e-5), (jnp.bfloat16, 0.01)])
def test_narrow_dtypes(dtype, bound, algorithm):
    """Sums over many steps do not lose small inputs: the state is float32."""
    a, x = (1 - draw(0, 500, 2, 16, scale=1e-2) ** 2).astype(dtype), draw(1, 500, 2, 16).astype(dtype)

    def total(module, a, x):
        carry, ys = module.linear_recurrence(a, None, x)
        return jnp.sum(jnp.sin(carry)) + jnp.mean(jnp.square(ys.astype(carry.dtype))), (carry, ys)

    of = lambda module: jax.jit(jax.value_and_grad(partial(total, module), (0, 1), has_aux=True))  # noqa: E731
    found = of(jaxseq)(a, x)
    expected = of(jaxseq.reference)(a.astype(jnp.float64), x.astype(jnp.float64))
    (_, (carry, ys)), bars = found
    assert (carry.dtype, ys.dtype, *(bar.dtype for bar in bars)) == (jnp.float32, dtype, dtype, dtype)
    for one, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.abs(np.asarray(one, np.float64) - e).max() <= bound * np.abs(e).max()


def test_states_are_not_rounded_with_the_outputs(algorithm):
    """For inputs in bfloat16, the gradient of factors in float32 is exact to float32."""
    a, carry = draw(0, T, B, H, dtype=np.float32), draw(1, B, H, dtype=np.float32)
    x, y_bar = draw(2, T, B, H).astype(jnp.bfloat16), draw(3, T, B, H).astype(jnp.bfloat16)
    pull = lambda module: jax.jit(lambda *args: jax.vjp(module.linear_recurrence, *args[:3])[1](args[3:])[0])  # noqa: E731
    wide = jax.tree.map(lambda a: a.astype(jnp.float64), (a, carry, x, carry, y_bar))
    expected = pull(jaxseq.reference)(*wide)
    np.testing.assert_allclose(pull(jaxseq)(a, carry, x, carry, y_bar), expected, rtol=1e-4, atol=1e-5)


# --- The work of the backward pass ---


def test_the_outputs_are_all_that_is_stored():
    """With `checkpoint`, not even those. The backward pass is one loop, after another that computes the states."""
    a, x = jnp.ones((64, 8, 16), jnp.float32), jnp.ones((64, 8, 16), jnp.float32)
    for options, loops in (({}, 2), ({"checkpoint": 4}, 3)):
        f = lambda a, x, options=options: linear_recurrence(a, None, x, **options)[1]  # noqa: E731
        stored = jax.tree.leaves(jax.vjp(f, a, x)[1])
        assert sum(leaf.nbytes for leaf in stored if leaf.ndim == 3) <= (2 + (not options)) * a.nbytes
        assert len(scans(jax.grad(lambda a, x, f=f: jnp.sum(f(a, x)), (0, 1)), a, x)) == loops


def test_explain_names_the_algorithm(algorithm):
    found = str(jaxseq.explain(linear_recurrence, draw(0, T, B, H), None, draw(1, T, B, H), checkpoint=2))
    expected = {"step by step": "states: step by step", "chunks and a rest": "in chunks of 8 steps"}
    assert expected.get(algorithm, "in chunks of 11 steps") in found
    assert "computed again in the backward pass" in found


def test_an_associative_scan_has_no_loop():
    with tuning.use(tuning.ACCELERATOR):
        a = jnp.ones((64, 2, 3))
        run = jax.jit(jax.grad(lambda a, x: jnp.sum(linear_recurrence(a, None, x)[1]), (0, 1))).lower(a, a)
    assert "stablehlo.while" not in run.as_text()


@pytest.mark.eight_devices
@pytest.mark.parametrize("kind", ["explicit", "auto"])
def test_a_batch_over_devices_needs_no_collective(kind):
    a, carry, x = draw(0, T, 8, 16), draw(1, 8, 16), draw(2, T, 8, 16)
    f = jax.grad(lambda *args: sum(jnp.sum(jnp.sin(y)) for y in linear_recurrence(*args)), (0, 1, 2))
    mesh = mesh_of((4, 2), ("b", "h"), kind)
    with jax.set_mesh(mesh):
        args = place(mesh, (a, carry, x), (P(None, "b", "h"), P("b", "h"), P(None, "b", "h")))
        compiled = jax.jit(f).lower(*args).compile()
        found = compiled(*args)
    assert_close(jax.tree.map(np.asarray, found), jax.jit(f)(a, carry, x), relative=1e-12)
    text = compiled.as_text()
    assert not any(word in text for word in ("all-gather", "all-reduce", "collective-permute", "all-to-all"))


OVER_TIME = {
    "lengths, resets, reverse": ((8, B, H), {"lengths": jnp.array([8, 0, 5]), "resets": RESETS[:8], "reverse": True}),
    "lengths, resets": ((1, 1, H), {"lengths": jnp.array([8, 3, 5]), "resets": RESETS[:8]}),
    "checkpoint": ((8, 1, H), {"checkpoint": 2, "reverse": True}),
    "truncation": ((8, B, H), {"truncation": 3}),
    "overlapping windows": (
        (1, B, H),
        {"lengths": jnp.array([8, 3, 5]), "truncation": (2, 3), "reverse": True},
    ),
}


@pytest.mark.eight_devices
@pytest.mark.parametrize("name", OVER_TIME)
def test_time_over_devices(name):
    """The gradient, and without truncation its derivative, of one device."""
    shape, options = OVER_TIME[name]
    a, carry, x = (draw(n, *s) for n, s in enumerate((shape, (B, H), (8, B, H))))

    def derivatives(a, carry, x):
        f = lambda *args: sum(jnp.sum(jnp.sin(y)) for y in linear_recurrence(*args, **options))  # noqa: E731
        gradient = jax.grad(f, (0, 1, 2))
        args = a, carry, x
        return gradient(*args) if "truncation" in options else jax.jvp(gradient, args, args)

    expected = jax.jit(derivatives)(a, carry, x)
    mesh = mesh_of((4, 2), ("t", "idle"), "explicit")
    with jax.set_mesh(mesh):
        args = place(mesh, (a, carry, x), (P("t") if shape[0] == 8 else P(), P(), P("t")))
        found = jax.jit(derivatives)(*args)
    assert_close(jax.tree.map(np.asarray, found), jax.tree.map(np.asarray, expected), relative=1e-11)


@pytest.mark.eight_devices
def test_arguments_that_are_not_sharded():
    """All axes of x are, and the carry and the factors are not."""
    a, carry, x = draw(0, 16), draw(1, 4, 16), draw(2, 8, 4, 16)
    f = jax.grad(lambda *args: sum(jnp.sum(jnp.sin(y)) for y in linear_recurrence(*args)), (0, 1, 2))
    mesh = mesh_of((2, 2, 2), ("t", "b", "h"), "explicit")
    with jax.set_mesh(mesh):
        found = jax.jit(f)(*place(mesh, (a, carry, x), (P(), P(), P("t", "b", "h"))))
    assert_close(jax.tree.map(np.asarray, found), jax.tree.map(np.asarray, jax.jit(f)(a, carry, x)), relative=1e-11)


@pytest.mark.eight_devices
def test_an_infinite_product_of_factors_of_the_first_device():
    """It is multiplied with no state."""
    a, x = jnp.full((8, 1, 16), 0.5).at[0:2].set(1e200), draw(0, 8, 1, 16).at[0:2].set(0)
    mesh = mesh_of((4, 2), ("t", "idle"), "explicit")
    with jax.set_mesh(mesh):
        _, ys = jax.jit(linear_recurrence)(*(place(mesh, v, P("t")) if v is not None else None for v in (a, None, x)))
    np.testing.assert_allclose(ys, linear_recurrence(a, None, x)[1], rtol=1e-12)


@pytest.mark.eight_devices
@pytest.mark.parametrize("devices", [2, 4, 8])
def test_time_over_devices_takes_a_logarithm_of_exchanges(devices):
    """Each is of one factor and one state. The carry and its cotangent are summed, and nothing else moves."""
    f = lambda a, carry, x: sum(jnp.sum(jnp.sin(y)) for y in linear_recurrence(a, carry, x))  # noqa: E731
    mesh = mesh_of((devices, 8 // devices), ("t", "idle"), "explicit")
    with jax.set_mesh(mesh):
        args = place(mesh, (draw(0, 64, 2, 16), draw(1, 2, 16), draw(2, 64, 2, 16)), (P("t"), P(), P("t")))
        text = jax.jit(jax.grad(f, (0, 1, 2))).lower(*args).compile().as_text()
    found = hlo.collectives(text)
    exchanges = [c for c in found if c.kind == "collective-permute"]
    assert len(exchanges) == 2 * np.log2(devices)
    assert {(c.bytes, c.loops) for c in exchanges} == {(2 * args[1].nbytes, 0)}
    assert all(c.kind == "all-reduce" and c.bytes == args[1].nbytes for c in found if c not in exchanges)


# --- Arguments ---

X = jnp.ones((T, B, H))
Z = X.astype(complex)
ERRORS = {
    "integers": (lambda: linear_recurrence(jnp.ones(H, int), None, X), TypeError, "`a`: expected a float or complex"),
    "a shape": (lambda: linear_recurrence(jnp.ones(3), None, X), ValueError, r"`a`: .*\(11, 3, 4\).*got \(3,\)"),
    "no batch": (lambda: linear_recurrence(jnp.ones((T, H)), None, X), ValueError, r"pass \(T, 1, H\), got \(11, 4\)"),
    "complex a": (lambda: linear_recurrence(Z, None, X), TypeError, "`a`: expected a real array, as `x` is"),
    "complex x": (lambda: linear_recurrence(X, X[0], Z), TypeError, "`a`: expected a complex array, as `x` is"),
    "complex carry": (lambda: linear_recurrence(X, Z[0], X), TypeError, "`carry`: expected a real array"),
    "carry": (lambda: linear_recurrence(X, X, X), ValueError, r"`carry`: expected shape \(3, 4\) = \(\*batch, H\)"),
    "one axis": (lambda: linear_recurrence(X[0, 0], None, X[0, 0]), ValueError, "`x`: expected at least 2 axes"),
    "lengths": (lambda: linear_recurrence(X, None, X, lengths=jnp.array([12, 1, 2])), ValueError, "from 0 to 11"),
    "resets": (lambda: linear_recurrence(X, None, X, resets=jnp.ones((B, T), bool)), ValueError, "`resets`: expected"),
    "time axis": (lambda: linear_recurrence(X, None, X, time_axis=2), ValueError, "`time_axis`: expected an axis"),
    "truncation": (lambda: linear_recurrence(X, None, X, truncation=(3, 2)), ValueError, "k2 >= k1"),
    "option": (lambda: linear_recurrence(X, None, X, dones=RESETS), TypeError, "unexpected keyword argument 'dones'"),
}


@pytest.mark.other_types
@pytest.mark.parametrize("name", ERRORS)
def test_wrong_arguments(name):
    call, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        call()


def test_no_steps():
    carry, ys = linear_recurrence(jnp.ones((0, B, H)), X[0], X[:0])
    assert (carry == X[0]).all()
    assert ys.shape == (0, B, H)
