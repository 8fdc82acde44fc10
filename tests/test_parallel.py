"""`parallel`: the states and gradients of a recurrence, computed by Newton iterations.

Judged against `jaxseq.reference.recurrence`, which computes one step after another in plain JAX.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, mesh_of, normals, place
from jax.sharding import PartitionSpec as P

import jaxseq
from jaxseq import cells, linear_maps, parallel, tuning
from jaxseq._parallel import _jacobian
from jaxseq._parallel._pointwise import is_pointwise
from jaxseq._parallel._solve import solve
from jaxseq._parallel._steps import make_steps
from jaxseq._recurrence._arguments import check_params
from jaxseq._recurrence._inputs import Inputs, Masks
from jaxseq._time_options import Options

T, B, D = 21, 2, 3
IN_CHUNKS = tuning.Tuning(linear=tuning.LinearTuning(elements=700, least_steps=2))


class LeakyParams(NamedTuple):
    w_x: jax.Array
    w_h: jax.Array
    b: jax.Array
    rate: jax.Array  # one per unit


def leaky_step(a, h, p, e):
    """Read a side input per step, and the order of the units: the step is not pointwise."""
    rate = jnp.expand_dims(jax.nn.sigmoid(p.rate), range(h.ndim - 1))
    return (1 - rate) * h + rate * jnp.tanh(a[0] + e["gain"][..., None] * jnp.flip(h, -1))


leaky = jaxseq.Cell("leaky", gates="h", step=leaky_step, params=LeakyParams, side_inputs=True)


def leaky_init(key, inputs, hidden, *, dtype):
    return LeakyParams(*jaxseq.rnn_init(key, inputs, hidden, dtype=dtype), rate=jnp.zeros(hidden, dtype))


INITS = {
    "gru": lambda *args, **kw: jaxseq.gru_init(*args, 5, **kw),
    "lstm": lambda *args, **kw: jaxseq.lstm_init(*args, 4, **kw),
    "slstm": lambda *args, **kw: cells.slstm_init(*args, 4, heads=2, **kw),
    "indrnn": lambda *args, **kw: cells.indrnn_init(*args, 5, **kw),
    "projected_lstm": lambda *args, **kw: cells.projected_lstm_init(*args, 5, 4, **kw),
    "leaky": lambda *args, **kw: leaky_init(*args, 5, **kw),
}
POINTWISE = {"gru", "lstm", "slstm", "indrnn"}


def cell_of(name):
    return leaky if name == "leaky" else getattr(cells, name)


def arguments(name, key, dtype=jnp.float64, steps=T):
    """Return params, a carry and a sequence, all random and not zero. The carry is a state that the cell can reach."""
    cell = cell_of(name)
    params = INITS[name](key, D, dtype=dtype)
    params = jax.tree.map(lambda a, b: a + 0.3 * b, params, normals(key, params))
    xs = normals(key, jnp.zeros((steps + 2, B, D), dtype), 1)
    if name == "leaky":
        xs = xs, {"gain": 0.2 * normals(key, jnp.zeros((steps + 2, B), dtype), 2), "number": jnp.zeros((steps + 2, B))}
    before, after = jax.tree.map(lambda a: a[:2], xs), jax.tree.map(lambda a: a[2:], xs)
    return params, jaxseq.reference.recurrence(cell, params, None, before)[0], after


def steps_of(name, key):
    """Return the steps of a cell as the iterations see them, and random states before them."""
    params, carry, xs = arguments(name, key)
    cell = cell_of(name)
    xs, side = (xs[0], xs[1:]) if name == "leaky" else (xs, ())
    steps = make_steps(cell, Options(), Inputs(check_params(cell, params), carry, xs, Masks(side=side)))
    s = jnp.broadcast_to(steps.first, (T, *steps.first.shape))
    return steps, s * (1 + 0.1 * normals(key, s))


@pytest.mark.parametrize("name", INITS)
def test_states_and_gradients_are_those_of_the_reference(name, key):
    """With all of the Jacobian in chunks of an associative scan, and with its diagonal step by step."""
    cell, args = cell_of(name), arguments(name, key)
    reference = partial(jaxseq.reference.recurrence, cell)
    bars = normals(key, jax.eval_shape(reference, *args), 3)

    def derivatives(f, *args):
        def outputs_and_report(*args):
            last, ys, *report = f(*args)
            return (last, ys), report

        outputs, pull, report = jax.vjp(outputs_and_report, *args, has_aux=True)
        return outputs, pull(bars), report

    *expected, _ = jax.jit(partial(derivatives, reference))(*args)
    for method, numbers in (("deer", IN_CHUNKS), ("quasi-deer", tuning.CPU)):
        with tuning.use(numbers):
            *found, (report,) = jax.jit(partial(derivatives, partial(parallel, cell, method=method)))(*args)
        assert_close(found, expected, relative=1e-11)
        assert (report.iterations > 0).all()
        assert (report.iterations < T if method == "deer" else report.iterations <= T).all()


@pytest.mark.parametrize("name", INITS)
def test_the_diagonal_is_that_of_the_jacobian(name, key):
    steps, s = steps_of(name, key)
    assert is_pointwise(steps) == (name in POINTWISE)
    assert _jacobian.is_diagonal(steps) == (name == "indrnn")
    whole, diagonal = jax.jit(lambda s: (_jacobian.matrices(steps, s), _jacobian.diagonal(steps, s)))(s)
    expected = jnp.diagonal(whole, axis1=-2, axis2=-1)
    np.testing.assert_allclose(diagonal, expected, rtol=1e-12, atol=1e-13)
    if name == "indrnn":
        assert jnp.count_nonzero(whole) == jnp.count_nonzero(expected)
    assert jnp.abs(expected).max() > 0.1


def test_the_jacobian_is_that_of_jax(key):
    """Of a state with several leaves, from both of which others depend."""
    steps, s = steps_of("projected_lstm", key)
    f = lambda s: steps.phi(steps.r(s), s)  # noqa: E731
    expected = jax.jit(jax.jacfwd(f))(s)  # (T, B, N, T, B, N): steps and examples are independent
    own = jnp.einsum("tbjtbi->tbij", expected)
    np.testing.assert_allclose(jax.jit(partial(_jacobian.matrices, steps))(s), own, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("elements", [None, 60, 10**6], ids=["step by step", "chunks", "one associative scan"])
def test_linear_recurrences(elements, key):
    """Of matrices in both directions, and of diagonals, against a loop."""
    shapes = [jnp.zeros(s) for s in ((11, 2, 3, 3), (11, 2, 3), (11, 2, 3))]
    arrays = normals(key, shapes)
    a, diagonal, b = map(np.asarray, arrays)
    d, e, backwards = np.zeros((2, 3)), np.zeros((2, 3)), np.zeros((2, 3))
    expected = [[], [], []]
    for t in range(11):
        d, e = np.einsum("bi,bij->bj", d, a[t]) + b[t], e * diagonal[t] + b[t]
        backwards = np.einsum("bi,bij->bj", backwards, a[-1 - t]) + b[-1 - t]
        for kept, state in zip(expected, (d, e, backwards), strict=True):
            kept.append(state)
    numbers = tuning.Tuning(linear=tuning.LinearTuning(elements=elements, least_steps=1))
    a, diagonal, b = arrays
    with tuning.use(numbers):
        found = solve(a, b), solve(diagonal, b), solve(a, b, reverse=True)[::-1]
    for one, kept in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, kept, rtol=1e-10, atol=1e-12)


def test_the_number_of_iterations_of_a_gru(key):
    """At its initializer, T = 1024 and H = 64 in float32: few, and fewer with all of the Jacobian."""
    params = jaxseq.gru_init(key, 16, 64)
    xs = normals(key, jnp.zeros((1024, 1, 16), jnp.float32))
    expected = jaxseq.gru(params, None, xs)[1]
    for method, low, high in (("deer", 3, 5), ("quasi-deer", 8, 13)):
        _, ys, report = jax.jit(partial(parallel, cells.gru, method=method))(params, None, xs)
        assert low <= report.iterations.item() <= high
        assert 0 < report.residual.item() <= 128 * np.finfo(np.float32).eps
        np.testing.assert_allclose(ys, expected, atol=1e-4)


# --- Without convergence ---


def test_without_convergence_everything_is_nan(key):
    """At gain 3 a GRU is chaotic. The other example of the batch, with zero inputs and state, has its own result."""
    params = jaxseq.gru_init(key, 8, 32, use_bias=False)
    params = params._replace(w_h=3 * params.w_h)
    xs = normals(key, jnp.zeros((128, 2, 8), jnp.float32)).at[:, 1].set(0)
    carry = normals(key, jnp.zeros((2, 32), jnp.float32)).at[1].set(0)
    bounded = partial(parallel, cells.gru, max_iterations=6)

    def loss(*args):
        last, ys, report = bounded(*args)
        return jnp.sum(ys) + jnp.sum(last), (last, ys, report)

    bars, (last, ys, report) = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(params, carry, xs)
    np.testing.assert_array_equal(report.converged, [False, True])
    np.testing.assert_array_equal(report.iterations, [6, 0])
    assert not report.residual[0] <= 1e-2
    for of_batch in (last, bars[1], *ys, *bars[2]):
        assert np.isnan(of_batch[0]).all()
        assert np.isfinite(of_batch[1]).all()
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(bars[0]))


def test_a_concrete_call_without_convergence_is_an_error(key):
    words = r"2 of 2 examples did not converge: after 1 iterations of quasi-deer.*Pass a larger `max_iterations`"
    with pytest.raises(FloatingPointError, match=words):
        parallel(cells.indrnn, *arguments("indrnn", key), max_iterations=1, method="quasi-deer")


def test_forward_mode_is_nan_too(key):
    params, carry, xs = arguments("gru", key)
    f = lambda xs: parallel(cells.gru, params, carry, xs, max_iterations=1)[1]  # noqa: E731
    ys, tangents = jax.jit(lambda xs: jax.jvp(f, (xs,), (xs,)))(xs)
    assert np.isnan(ys).all()
    assert np.isnan(tangents).all()


def test_nan_in_the_input_does_not_converge(key):
    """XLA's maximum of many numbers on a CPU ignores NaN."""
    params, xs = jaxseq.gru_init(key, 3, 32), normals(key, jnp.zeros((64, 2, 3), jnp.float32))
    xs = xs.at[5, 0].set(jnp.nan)
    _, ys, report = jax.jit(partial(parallel, cells.gru, max_iterations=70))(params, None, xs)
    np.testing.assert_array_equal(report.converged, [False, True])
    assert np.isnan(ys[:, 0]).all()
    assert np.isfinite(ys[:, 1]).all()


def test_damping_makes_an_unstable_recurrence_converge(key):
    """Every step multiplies differences by up to 300, so the products of Jacobians overflow in float32."""
    params = jaxseq.rnn_init(key, 3, 4, use_bias=False)
    params = params._replace(w_h=300 * params.w_h)
    xs = normals(key, jnp.zeros((60, 1, 3), jnp.float32))
    run = lambda **options: jax.jit(partial(parallel, cells.rnn, max_iterations=60, **options))(params, None, xs)  # noqa: E731
    _, ys, report = run(damping=0.999)
    assert report.converged
    assert report.iterations <= 60
    np.testing.assert_allclose(ys, jaxseq.rnn(params, None, xs)[1], atol=1e-3)


# --- Transformations and options ---


def test_second_derivatives_and_forward_mode(key):
    params, carry, xs = arguments("lstm", key, steps=7)
    carry_bar, ys_bar = normals(key, jax.eval_shape(partial(jaxseq.recurrence, cells.lstm), params, carry, xs))
    directions = normals(key, (params, carry, xs), 4)

    def derivatives(f, *args):
        def loss(*args):
            last, ys = f(cells.lstm, *args)[:2]
            return jnp.vdot(ys, ys_bar) + sum(map(jnp.vdot, last, carry_bar))

        return jax.jvp(loss, args, directions), jax.jvp(jax.grad(loss, (0, 1, 2)), args, directions)[1]

    expected = jax.jit(partial(derivatives, jaxseq.reference.recurrence))(params, carry, xs)
    assert_close(jax.jit(partial(derivatives, parallel))(params, carry, xs), expected, relative=1e-10)


def test_vmap_over_parameters(key):
    params, carry, xs = arguments("gru", key, jnp.float32)
    both = jax.tree.map(lambda a: jnp.stack([a, 0.5 * a]), params)
    run = jax.jit(jax.vmap(lambda p: parallel(cells.gru, p, carry, xs)))
    last, ys, report = run(both)
    assert report.iterations.shape == (2, B)
    expected_last, expected = jax.jit(jax.vmap(lambda p: jaxseq.gru(p, carry, xs)))(both)
    np.testing.assert_allclose(ys, expected, atol=2e-5)
    np.testing.assert_allclose(last, expected_last, atol=2e-5)


def test_reverse_time_axis_and_dtypes(key):
    """Batch first, two batch axes, inputs in bfloat16: outputs are, and the carry has its own dtype."""
    params, *_ = arguments("gru", key, jnp.float32)
    xs = normals(key, jnp.zeros((2, T, 3, D), jnp.float32)).astype(jnp.bfloat16)
    carry = normals(key, jnp.zeros((2, 3, 5), jnp.float32))
    options = {"reverse": True, "time_axis": 1}
    last, ys, report = jax.jit(partial(parallel, cells.gru, **options))(params, carry, xs)
    expected, expected_ys = jax.jit(partial(jaxseq.recurrence, cells.gru, **options))(params, carry, xs)
    assert (last.dtype, ys.dtype, report.residual.dtype, report.iterations.shape) == (
        jnp.float32,
        jnp.bfloat16,
        jnp.float32,
        (2, 3),
    )
    np.testing.assert_allclose(last, expected, atol=2e-5)
    np.testing.assert_allclose(ys.astype(jnp.float32), expected_ys.astype(jnp.float32), atol=1e-2)


def test_an_example_does_not_depend_on_the_others(key):
    params, carry, xs = arguments("gru", key, jnp.float32)
    xs = xs.at[:, 1].multiply(100)
    run = jax.jit(partial(parallel, cells.gru, method="quasi-deer"))
    before = run(params, carry, xs)
    after = run(params, carry, xs.at[:, 1].multiply(0))
    assert before[2].iterations[1] != after[2].iterations[1]
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        first = lambda v: v[:, 0] if v.shape[:1] == (T,) else v[0]  # noqa: E731
        np.testing.assert_array_equal(first(a), first(b))


def test_no_steps(key):
    params, carry, xs = arguments("lstm", key)
    last, ys, report = parallel(cells.lstm, params, carry, xs[:0])
    assert_close(last, carry)
    assert ys.shape == (0, B, 4)
    assert report.converged.all()


def test_explain_names_the_jacobians_and_the_linear_recurrences(key):
    for name, method, words in (
        ("gru", "deer", ["all elements", "of the iteration: in chunks of 8 steps"]),
        ("projected_lstm", "quasi-deer", ["diagonals, in 9 passes", "of the gradient: step by step"]),
        ("indrnn", "deer", ["diagonals, in one pass", "of the gradient: in chunks of 21 steps"]),
    ):
        numbers = tuning.Tuning(linear=tuning.LinearTuning(elements=500))
        with tuning.use(numbers):
            text = str(jaxseq.explain(parallel, cell_of(name), *arguments(name, key), method=method))
        assert all(w in text for w in words), text


# --- Arguments ---

PARAMS = jaxseq.gru_init(jax.random.key(0), D, 5)
XS = jnp.ones((T, B, D), jnp.float32)
CONV = jaxseq.GRUParams(jnp.ones((3, D, 15)), jnp.ones((3, 5, 15)), None, None)
in_space = cells.gru._replace(name="conv", input=linear_maps.Conv(), recurrent=linear_maps.Conv())
gru = partial(parallel, cells.gru, PARAMS, None)
ERRORS = {
    "cell": (lambda: parallel(jaxseq.gru, PARAMS, None, XS), TypeError, "`cell`: expected a jaxseq.Cell"),
    "linear cell": (lambda: parallel(cells.lru, PARAMS, None, XS), TypeError, "a linear cell needs no iterations"),
    "params": (lambda: parallel(cells.lstm, PARAMS, None, XS), TypeError, "`params`: expected LSTMParams"),
    "space": (lambda: parallel(in_space, CONV, None, XS), ValueError, "`cell`: expected a cell without spatial axes"),
    "axes": (lambda: gru(XS[0, 0]), ValueError, "`xs`: expected at least 2 axes"),
    "features": (lambda: gru(XS[..., :2]), ValueError, "`xs`: expected 3 features"),
    "integers": (lambda: gru(jnp.ones((T, B, D), int)), TypeError, "`xs`: expected a float array"),
    "side": (lambda: gru((XS, XS)), TypeError, "only a cell with `side_inputs=True` takes a pair"),
    "carry": (lambda: parallel(cells.gru, PARAMS, XS[0], XS), ValueError, r"`carry`: expected shape \(2, 5\)"),
    "method": (lambda: gru(XS, method="elk"), ValueError, "`method`: expected one of 'deer', 'quasi-deer'"),
    "tolerance": (lambda: gru(XS, tolerance=-1.0), ValueError, "`tolerance`: expected a number >= 0 and < 1"),
    "traced": (lambda: gru(XS, tolerance=jnp.ones(())), TypeError, "`tolerance`: .* known when the function is traced"),
    "iterations": (lambda: gru(XS, max_iterations=0), ValueError, "`max_iterations`: expected an integer >= 1, got 0"),
    "damping": (lambda: gru(XS, damping=1.0), ValueError, "`damping`: expected a number >= 0 and < 1, got 1"),
    "time axis": (lambda: gru(XS, time_axis=2), ValueError, "`time_axis`: expected an axis"),
    "option": (lambda: gru(XS, truncation=3), TypeError, "unexpected keyword argument 'truncation'"),
}


@pytest.mark.other_types
@pytest.mark.parametrize("name", ERRORS)
def test_wrong_arguments(name):
    call, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        call()


def test_an_explicit_mesh_is_refused():
    mesh = mesh_of((1,), ("b",), "explicit")
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="`xs`: expected arrays that are not on an explicit mesh"):
        gru(place(mesh, XS, P(None, "b")))
