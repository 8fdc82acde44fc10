"""Autoregressive models, against loops, NumPy's least squares, SciPy's densities, and sums over all sequences."""

from functools import cache, partial
from itertools import islice, product
from math import log

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, subjaxprs

import jaxseq
from jaxseq import autoregressive as ar
from jaxseq import reference
from jaxseq.testing import check_vjp

scipy_special = pytest.importorskip("scipy.special")
scipy_stats = pytest.importorskip("scipy.stats")


def random(*shape, seed=0):
    return np.random.default_rng([len(shape), *shape, seed]).normal(size=shape)


@cache
def gru_params(D, H):
    make = partial(jaxseq.gru_init, input_size=D, hidden_size=H, dtype=jnp.float64)
    like = jax.eval_shape(make, jax.random.key(0))
    return jax.tree.map(lambda a: jnp.asarray(0.7 * random(*a.shape)), like)


# --- lagged, histories ---


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("shape", [(11,), (11, 2, 3)])
def test_windows_equal_a_loop(shape, every):
    xs, order = random(*shape), 4
    targets = range(order, 11, every)
    expected = np.stack([xs[t - order : t] for t in targets]), np.stack([xs[t] for t in targets])
    for got in (ar.lagged(xs, order, every=every), jax.jit(partial(ar.lagged, order=order, every=every))(xs)):
        for a, e in zip(got, expected, strict=True):
            np.testing.assert_array_equal(a, e, strict=True)


def test_windows_of_numpy_are_a_view():
    xs = random(20, 2)
    for a in ar.lagged(xs, 5, every=2):
        assert isinstance(a, np.ndarray)
        assert np.shares_memory(a, xs)


def test_windows_as_long_as_can_be_and_of_other_kinds():
    windows, targets = ar.lagged(jnp.arange(4), 3)
    assert (windows.tolist(), targets.tolist(), windows.dtype) == ([[0, 1, 2]], [3], jnp.int64)
    assert ar.lagged(jnp.ones(4, jnp.bfloat16), 1)[0].dtype == jnp.bfloat16
    waves = np.exp(1j * np.arange(5))
    np.testing.assert_array_equal(ar.lagged(waves, 2)[0], [waves[t - 2 : t] for t in range(2, 5)])


def past(xs, orders, longest):
    """Compute `histories` in a loop, as its docstring defines it."""
    windows, lengths = np.zeros((len(xs), longest, *xs.shape[1:])), []
    for t, order in enumerate(orders):
        n = min(order, longest, t)
        windows[t, :n] = xs[t - n : t]
        lengths.append(n)
    return windows, np.array(lengths, np.int32)


@pytest.mark.parametrize(
    ("order", "longest"),
    [
        (3, None),
        (2, 4),
        (np.array([5, 0, 1, 4, 2, 3, 0, 6]), None),
        (jnp.array([5, 0, 1, 4, 2, 3, 0, 6], jnp.int32), 3),
        (np.arange(8), None),  # the whole past
        (np.arange(8, dtype=np.uint8), None),
        (np.zeros(8, int), None),
    ],
    ids=["fixed", "shorter than the row", "varying", "varying, cut", "growing", "growing, bytes", "none"],
)
@pytest.mark.parametrize("shape", [(8, 2), pytest.param((8,), marks=pytest.mark.long)])
def test_histories_equal_a_loop(order, longest, shape):
    xs = random(*shape)
    orders = np.broadcast_to(np.asarray(order, int), 8)
    rows = longest or max(1, int(orders.max()))
    for got, expected in zip(ar.histories(xs, order, longest=longest), past(xs, orders, rows), strict=True):
        np.testing.assert_array_equal(got, expected, strict=True)


def test_histories_of_orders_that_are_traced():
    xs, orders = random(2, 7), np.array([[3, 1, 0, 2, 4, 9, 5], [0, 1, 1, 3, 2, 2, 6]])
    f = jax.jit(jax.vmap(partial(ar.histories, longest=4)))
    for got, x, order in zip(zip(*f(xs, orders), strict=True), xs, orders, strict=True):
        for a, e in zip(got, past(x, order, 4), strict=True):
            np.testing.assert_array_equal(a, e, strict=True)


def test_a_recurrence_reads_each_history_alone():
    """With histories as a batch with `lengths`, the state of row t is that of a loop over x_{t-τ} .. x_{t-1}."""
    params, xs, orders = gru_params(2, 3), random(6, 2), np.array([0, 3, 1, 3, 2, 4])
    windows, lengths = ar.histories(xs, orders)
    states, _ = jax.jit(partial(jaxseq.gru, time_axis=1))(params, None, windows, lengths=lengths)
    step = jax.jit(reference.gru_cell)
    for t, order in enumerate(orders):
        h = jnp.zeros(3)
        for x in xs[max(0, t - order) : t]:
            h, _ = step(params, h, x)
        np.testing.assert_allclose(states[t], h, rtol=1e-12, atol=1e-15)


# --- fit, predict, forecast ---


@cache
def noisy_series(T=300):
    noise = random(T)
    x = [7.0, 7.5]
    for t in range(2, T):
        x.append(2.0 + 1.1 * x[-1] - 0.4 * x[-2] + 0.5 * noise[t])
    return np.array(x)


def least_squares(x, order):
    windows = np.stack([np.append(x[t - order : t][::-1], 1.0) for t in range(order, len(x))])
    ab, _, _, _ = np.linalg.lstsq(windows, x[order:], rcond=None)
    return ab[:-1], ab[-1], np.mean((x[order:] - windows @ ab) ** 2)


@pytest.mark.parametrize("order", [1, 2, pytest.param(5, marks=pytest.mark.long), 12])
@pytest.mark.parametrize(("dtype", "relative"), [(jnp.float64, 1e-10), (jnp.float32, 2e-4)])
def test_fit_equals_least_squares(order, dtype, relative):
    x = noisy_series()
    model = jax.jit(partial(ar.fit, order=order))(x.astype(dtype))
    for got, expected in zip(model, least_squares(x, order), strict=True):
        assert got.dtype == dtype
        np.testing.assert_allclose(got, expected, rtol=relative, atol=relative * float(np.abs(expected).max()))


@pytest.mark.parametrize(("variables", "order", "horizon"), [((3,), 2, 1), ((2,), 3, 4), ((), 4, 3)])
def test_fit_of_several_variables_and_steps_ahead_equals_least_squares(variables, order, horizon):
    xs = 5 + np.cumsum(random(60, *variables), 0)
    model = ar.fit(jnp.asarray(xs), order, horizon=horizon)
    lags = order + horizon - 1
    windows = np.stack([xs[lags - j : 60 - j] for j in range(horizon, lags + 1)], 1).reshape(60 - lags, -1)
    design, targets = np.concatenate([windows, np.ones((60 - lags, 1))], 1), xs[lags:]
    solution, *_ = np.linalg.lstsq(design, targets, rcond=None)
    assert not np.asarray(model.coefficients[: horizon - 1]).any()
    np.testing.assert_allclose(
        model.coefficients[horizon - 1 :], solution[:-1].reshape(order, *variables * 2), rtol=1e-7, atol=1e-9
    )
    np.testing.assert_allclose(model.intercept, solution[-1], rtol=1e-7, atol=1e-9)
    errors = targets - design @ solution
    np.testing.assert_allclose(model.variance, errors.T @ errors / len(errors), rtol=1e-7)
    np.testing.assert_allclose(ar.predict(model, jnp.asarray(xs))[lags:], targets - errors, rtol=1e-7)


def test_predictions_of_several_steps_are_forecasts_from_every_step():
    model = ar.Linear(*(jnp.asarray(0.4 * random(*shape)) for shape in ((3, 2, 2), (2,), (2, 2))))
    xs = jnp.asarray(random(8, 2))
    actual = ar.predict(model, xs, horizon=4)
    assert actual.shape == (8, 4, 2)
    np.testing.assert_allclose(actual[:, 0], ar.predict(model, xs), rtol=1e-12)
    A, b = np.asarray(model.coefficients), np.asarray(model.intercept)
    for t in range(3, 8):
        past = [*np.asarray(xs[:t])]
        for _ in range(4):
            past.append(b + sum(past[-1 - j] @ A[j] for j in range(3)))
        np.testing.assert_allclose(actual[t], past[t:], rtol=1e-10)
        np.testing.assert_allclose(ar.forecast(model, xs[:t], 4), past[t:], rtol=1e-10)


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_targets_of_several_steps(array):
    xs = array(random(11, 2))
    windows, targets = ar.lagged(xs, 3, every=2, horizon=4)
    starts = range(0, 5, 2)
    np.testing.assert_array_equal(windows, np.stack([xs[i : i + 3] for i in starts]))
    np.testing.assert_array_equal(targets, np.stack([xs[i + 3 : i + 7] for i in starts]))
    assert ar.lagged(xs, 3, horizon=8)[1].shape == (1, 8, 2)


@pytest.mark.parametrize(
    ("label", "dtype"),
    [("constant", jnp.float32), ("one of two", jnp.float64), ("a sum", jnp.float32), ("a line", jnp.float64)],
)
def test_fit_refuses_a_series_whose_windows_are_linearly_dependent(label, dtype):
    """Up to rounding: a constant differs from its mean, and the sum of two variables from the third."""
    a, b = random(40), random(40, seed=1)
    series = {
        "constant": np.full(40, 0.1),
        "one of two": np.stack([a, np.full(40, 0.7)], -1),
        "a sum": np.stack([a, b, a + b], -1),
        "a line": 0.1 * np.arange(40),
    }
    xs = jnp.asarray(series[label], dtype)
    with pytest.raises(ValueError, match=r"`xs`: expected a series with linearly independent windows"):
        ar.fit(xs, 2)
    assert np.isnan(jax.jit(ar.fit, static_argnums=1)(xs, 2).coefficients).all()


def test_fit_of_as_few_steps_as_there_may_be():
    """Five equations in three unknowns, then three equations, which leave no residual."""
    x = random(7)
    fit = jax.jit(partial(ar.fit, order=2))
    for got, expected in zip(fit(x), least_squares(x, 2), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-9)
    model = fit(x[:5])
    a, b, _ = least_squares(x[:5], 2)
    np.testing.assert_allclose([*model.coefficients, model.intercept], [*a, b], rtol=1e-7)
    assert float(model.variance) < 1e-12


def test_fit_lays_out_no_windows():
    T, order = 400, 20
    x = jnp.asarray(noisy_series(T))

    def largest(f):
        eqns = subjaxprs(jax.make_jaxpr(f)(x).jaxpr)
        return max(v.aval.size for eqn in eqns for v in (*eqn.invars, *eqn.outvars))

    assert largest(lambda x: ar.lagged(x, order)[0]) >= (T - order) * order
    assert largest(lambda x: ar.fit(x, order)) < 2 * T


@pytest.mark.long
def test_fit_under_vmap():
    xs = np.stack([noisy_series()[:90], random(90)])
    for i, model in enumerate(zip(*jax.vmap(partial(ar.fit, order=3))(xs), strict=True)):
        for got, expected in zip(model, least_squares(xs[i], 3), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-8)


MODEL = ar.Linear(jnp.array([0.9, -0.5, 0.3]), jnp.array(0.7), jnp.array(1.0))


def test_predictions_equal_a_loop():
    x = random(9)
    padded = np.concatenate([np.zeros(3), x])
    expected = [0.7 + np.dot(MODEL.coefficients, padded[t : t + 3][::-1]) for t in range(9)]
    np.testing.assert_allclose(jax.jit(ar.predict)(MODEL, x), expected, rtol=1e-12)
    both = jax.vmap(ar.predict, (None, 0))(MODEL, np.stack([0 * x, x]))
    np.testing.assert_allclose(both[1], expected, rtol=1e-12)


def test_the_error_of_predictions_is_the_variance_that_was_fitted():
    x = jnp.asarray(noisy_series())
    model = jax.jit(partial(ar.fit, order=5))(x)
    np.testing.assert_allclose(jnp.mean((ar.predict(model, x) - x)[5:] ** 2), model.variance, rtol=1e-9)


def test_forecasts_equal_a_loop():
    x = list(random(5))
    expected = list(x)
    for _ in range(6):
        expected.append(0.7 + np.dot(MODEL.coefficients, expected[:-4:-1]))
    got = jax.jit(partial(ar.forecast, steps=6))(MODEL, np.array(x))
    np.testing.assert_allclose(got, expected[5:], rtol=1e-12)
    np.testing.assert_allclose(ar.forecast(MODEL, jnp.array(x[2:]), 6), expected[5:], rtol=1e-12)
    assert ar.forecast(MODEL, jnp.array(x), 0).shape == (0,)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_predicted_has_the_dtype_of_the_series(dtype):
    """A model that was fitted in float64 can be applied to a series of lower precision."""
    x = jnp.asarray(random(6), dtype)
    tolerance = 10 * float(jnp.finfo(dtype).eps)
    for f in (ar.predict, partial(ar.forecast, steps=2)):
        got, expected = f(MODEL, x), f(MODEL, x.astype(float))
        assert got.dtype == dtype
        np.testing.assert_allclose(got.astype(float), expected, rtol=tolerance, atol=tolerance)


# --- log_probability, log_normal, log_likelihood ---

STEPS, V = (4, 3), 5
TOKENS = np.random.default_rng(1).integers(0, V, STEPS)


def at(scores, xs):
    return np.take_along_axis(np.asarray(scores), xs[..., None], -1)[..., 0]


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
def test_log_probability_of_logits_equals_scipy(kind):
    logits = 3 * random(*STEPS, V)
    got = jax.jit(lambda xs, a: ar.log_probability(xs, logits=a))(TOKENS.astype(kind), logits)
    np.testing.assert_allclose(got, at(scipy_special.log_softmax(logits, -1), TOKENS), rtol=1e-12)
    shifted = ar.log_probability(TOKENS.astype(kind), logits=logits + 1e4)  # and does not overflow
    np.testing.assert_allclose(shifted, got, rtol=1e-9)


def test_log_probability_of_probabilities_equals_scipy():
    p = np.random.default_rng(2).dirichlet(np.ones(V), STEPS)
    expected = np.sum([[scipy_stats.multinomial(1, p[i]).logpmf(np.eye(V)[TOKENS[i]])] for i in np.ndindex(STEPS)])
    got = ar.log_probability(TOKENS, probabilities=p)
    np.testing.assert_allclose(got, at(np.log(p), TOKENS), rtol=1e-12)
    np.testing.assert_allclose(got.sum(), expected, rtol=1e-9)


def test_what_can_not_be_has_probability_zero_and_no_bad_gradient():
    p = jnp.array([0.0, 0.25, 0.75])
    of = lambda p, x: ar.log_probability(jnp.array(x), probabilities=p)  # noqa: E731
    assert [float(of(p, x)) for x in range(3)] == [-np.inf, log(0.25), log(0.75)]
    np.testing.assert_allclose(jax.grad(of)(p, 1), [0.0, 4.0, 0.0], rtol=1e-12)
    masked = lambda a, x: ar.log_probability(jnp.array(x), logits=a)  # noqa: E731
    a = jnp.array([-jnp.inf, 0.0, log(3.0)])
    np.testing.assert_allclose([masked(a, x) for x in range(3)], [-np.inf, log(0.25), log(0.75)], rtol=1e-12)
    np.testing.assert_allclose(jax.grad(masked)(a, 1), [0.0, 0.75, -0.75], rtol=1e-12)


@pytest.mark.parametrize("given", ["logits", "probabilities"])
def test_tokens_out_of_range_are_nan(given):
    xs, known = np.array([0, -1, V - 1, V, 99]), np.array([True, False, True, False, False])
    got = ar.log_probability(xs, **{given: np.full((5, V), 1 / V)})
    np.testing.assert_array_equal(np.isnan(got), ~known)
    np.testing.assert_allclose(got[known], -log(V), rtol=1e-12)


def test_bytes():
    """All 256 values of uint8, which cannot represent 256, the number of values."""
    xs = np.arange(256, dtype=np.uint8)
    logits = random(256, 256)
    got = ar.log_probability(xs, logits=logits)
    np.testing.assert_allclose(got, np.diag(scipy_special.log_softmax(logits, -1)), rtol=1e-12)
    assert np.isfinite(ar.log_probability(xs[:100].astype(np.int8), probabilities=np.full((100, 200), 1 / 200))).all()


def test_probabilities_that_do_not_sum_are_nan_where_they_are_traced():
    p = np.array([[0.5, 0.5], [0.5, 0.4], [1.5, -0.5], [0.3, 0.7], [np.nan, 0.5]])
    got = jax.jit(lambda p: ar.log_probability(np.zeros(5, int), probabilities=p))(p)
    np.testing.assert_allclose(got, [log(0.5), np.nan, np.nan, log(0.3), np.nan], rtol=1e-12)
    assert np.isnan(jax.vmap(lambda p: ar.log_probability(np.array(0), probabilities=p))(p)).tolist() == [
        *(False, True, True, False, True)
    ]


def test_log_normal_equals_scipy():
    x, mean, log_scale = random(4, 3, 2), random(4, 3, 2, seed=1), random(4, 3, 2, seed=2)
    expected = scipy_stats.norm.logpdf(x, mean, np.exp(log_scale)).sum(-1)
    np.testing.assert_allclose(jax.jit(ar.log_normal)(x, mean, log_scale), expected, rtol=1e-12)
    shared = scipy_stats.norm.logpdf(x, mean, np.exp(log_scale[0, 0])).sum(-1)
    np.testing.assert_allclose(ar.log_normal(x, mean, log_scale[0, 0]), shared, rtol=1e-12)
    np.testing.assert_allclose(ar.log_normal(x[0, 0], mean[0, 0], np.array(0.3)).shape, ())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.long)])
def test_probabilities_keep_the_dtype(dtype):
    tolerance = 20 * float(jnp.finfo(dtype).eps)
    a, p = jnp.asarray(random(*STEPS, V), dtype), jnp.full((*STEPS, V), 1 / V, dtype)
    found = {
        "logits": (
            ar.log_probability(TOKENS, logits=a),
            at(scipy_special.log_softmax(np.asarray(a, float), -1), TOKENS),
        ),
        "probabilities": (ar.log_probability(TOKENS, probabilities=p), np.full(STEPS, -log(V))),
        "normal": (ar.log_normal(a, 0 * a, 0 * a), scipy_stats.norm.logpdf(np.asarray(a, float)).sum(-1)),
    }
    for got, expected in found.values():
        assert got.dtype == dtype
        np.testing.assert_allclose(np.asarray(got, float), expected, rtol=tolerance)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16, jnp.float16])
def test_sums_over_time_keep_the_dtype_but_not_its_rounding(dtype):
    """The sum over 4000 steps of -1.5. Accumulated in bfloat16, it would stop changing at -512."""
    got = ar.log_likelihood(jnp.full((4000, 2), -1.5, dtype))
    assert got.dtype == dtype
    np.testing.assert_allclose(np.asarray(got, float), -6000.0, rtol=4e-3)


def test_log_likelihood_stops_at_each_length():
    a = random(5, 2, 3)
    lengths = np.array([[5, 0, 3], [1, 4, 2]])
    expected = [[a[: lengths[i, j], i, j].sum() for j in range(3)] for i in range(2)]
    np.testing.assert_allclose(ar.log_likelihood(a, lengths=lengths), expected, rtol=1e-12)
    moved = ar.log_likelihood(np.moveaxis(a, 0, -1), lengths=jnp.asarray(lengths, jnp.int32), time_axis=-1)
    np.testing.assert_allclose(moved, expected, rtol=1e-12)
    np.testing.assert_allclose(ar.log_likelihood(a), a.sum(0), rtol=1e-12)
    np.testing.assert_allclose(ar.log_likelihood(a[:, 0, 0], lengths=np.array(2)), a[:2, 0, 0].sum(), rtol=1e-12)


def test_what_stands_in_padding_counts_nothing():
    a = random(4, 3)
    lengths = np.array([2, 4, 0])
    dead = np.arange(4)[:, None] >= lengths
    f = jax.jit(jax.value_and_grad(lambda a, n: ar.log_likelihood(a, lengths=n).sum()))
    for padding in (np.nan, -np.inf, 1e300):
        value, gradient = f(np.where(dead, padding, a), lengths)
        np.testing.assert_allclose(value, a[~dead].sum(), rtol=1e-12)
        np.testing.assert_array_equal(gradient, np.where(dead, 0.0, 1.0))


def test_a_model_s_gradient_is_finite_behind_the_lengths():
    """Also through log_probability, where the tokens of the padding are outside the V values."""
    xs, lengths = np.where(np.arange(4)[:, None] < [2, 4, 1], TOKENS, -1), np.array([2, 4, 1])
    logits = random(4, 3, V)
    f = lambda a: ar.log_likelihood(ar.log_probability(xs, logits=a), lengths=lengths).sum()  # noqa: E731
    p = scipy_special.softmax(logits, -1)
    expected = np.where((xs >= 0)[..., None], np.eye(V)[TOKENS] - p, 0.0)
    np.testing.assert_allclose(jax.jit(jax.grad(f))(logits), expected, rtol=1e-12, atol=1e-15)


# --- latent, shifted ---


def test_shifted():
    xs = random(4, 2, 3)
    late = np.concatenate([np.zeros((1, 2, 3)), xs[:-1]])
    np.testing.assert_array_equal(ar.shifted(xs), late, strict=True)
    first = random(2, 3)
    late[0] = first
    np.testing.assert_array_equal(ar.shifted(xs, first=first), late)
    np.testing.assert_array_equal(ar.shifted(xs.swapaxes(0, 1), first=first, time_axis=1), late.swapaxes(0, 1))
    np.testing.assert_array_equal(ar.shifted(xs.swapaxes(0, 1), first=first, time_axis=-2), late.swapaxes(0, 1))
    np.testing.assert_array_equal(ar.shifted(xs[:0]), xs[:0])
    tokens = ar.shifted(np.array([[3, 1], [2, 4]], np.uint8), first=7)
    np.testing.assert_array_equal(tokens, np.array([[7, 7], [3, 1]], np.uint8), strict=True)


@pytest.mark.parametrize("axis", [0, 1])
def test_shifted_with_resets(axis):
    xs, first, start = random(5, 2, 3), random(2, 3, seed=1), random(2, 3, seed=2)
    resets = np.zeros((5, 2), bool)
    resets[[0, 2, 3], [0, 1, 1]] = True
    turn = lambda a: np.swapaxes(a, 0, axis)  # noqa: E731
    f = jax.jit(partial(ar.shifted, time_axis=axis))
    for begin in (start, 0.0, 7.0):
        late = np.concatenate([first[None], xs[:-1]])
        late[resets] = np.broadcast_to(begin, (5, 2, 3))[resets]
        np.testing.assert_array_equal(f(turn(xs), first=first, start=begin, resets=turn(resets)), turn(late))
    late = np.concatenate([start[None], xs[:-1]])
    np.testing.assert_array_equal(f(turn(xs), start=start), turn(late))


def step_by_step(params, xs, first, start, h, resets=None):
    """Return (h_T, ys) of a loop over the cell, where y_t depends on x_{-1}, ..., x_{t-1}."""
    step, ys, x = jax.jit(reference.gru_cell), [], first
    for t in range(len(xs)):
        if resets is not None:
            h, x = (jnp.where(resets[t][:, None], a, b) for a, b in ((jnp.zeros_like(h), h), (start, x)))
        h, y = step(params, h, x)
        ys.append(y)
        x = xs[t]
    return h, jnp.stack(ys)


@pytest.mark.parametrize("reset", [False, True])
def test_latent_equals_the_cell_step_by_step(reset):
    params, xs, h = gru_params(2, 3), random(6, 4, 2), random(4, 3)
    first, start = jnp.asarray(random(4, 2)), jnp.asarray(random(4, 2, seed=1))
    resets = np.random.default_rng(3).random((6, 4)) < 0.3 if reset else None
    got = jax.jit(partial(ar.latent, jaxseq.gru))(params, h, xs, first=first, start=start, resets=resets)
    assert_close(got, step_by_step(params, xs, first, start, h, resets), 1e-12)


def test_latent_has_seen_the_past_only():
    params, h = gru_params(2, 3), jnp.asarray(random(3))
    f = jax.jit(jax.jacrev(lambda xs: ar.latent(jaxseq.gru, params, h, xs)[1]))
    J = np.asarray(f(jnp.asarray(random(5, 2))))  # (t, H, source, D)
    seen = np.abs(J).max((1, 3)) > 0
    np.testing.assert_array_equal(seen, np.tri(5, k=-1, dtype=bool))


def test_time_elsewhere_and_lengths():
    params, xs = gru_params(2, 3), random(6, 4, 2)
    lengths = np.array([6, 2, 0, 3])
    padded = np.where((np.arange(6)[:, None] < lengths)[..., None], xs, np.nan)
    late = np.concatenate([np.zeros((1, 4, 2)), xs[:-1]])
    h, ys = jax.jit(reference.gru)(params, None, late, lengths=lengths)
    f = jax.jit(partial(ar.latent, jaxseq.gru, time_axis=1))
    assert_close(f(params, None, padded.swapaxes(0, 1), lengths=lengths), (h, ys.swapaxes(0, 1)), 1e-12)


def test_chunks_equal_the_whole():
    params, xs = gru_params(2, 3), random(7, 4, 2)
    f = jax.jit(partial(ar.latent, jaxseq.gru))
    whole = f(params, None, xs)
    carry, a = f(params, None, xs[:3])
    carry, b = f(params, carry, xs[3:], first=xs[2])
    assert_close((carry, jnp.concatenate([a, b])), whole, 1e-12)


@pytest.mark.parametrize("reset", [3, 5], ids=["at the beginning of a chunk", "within a chunk"])
def test_chunks_with_resets_equal_the_whole(reset):
    """At a reset, the input is `start` in every chunk, not the last step of the previous chunk."""
    params, xs = gru_params(2, 3), random(7, 4, 2)
    resets = np.zeros((7, 4), bool)
    resets[reset, [1, 2]] = True
    f = jax.jit(partial(ar.latent, jaxseq.gru))
    whole = f(params, None, xs, resets=resets)
    carry, a = f(params, None, xs[:3], resets=resets[:3])
    carry, b = f(params, carry, xs[3:], first=xs[2], resets=resets[3:])
    assert_close((carry, jnp.concatenate([a, b])), whole, 1e-12)


def tiny(read):
    """Return a function that computes log P(x_t | h_t) for all t: embedding, GRU, output layer."""
    table, w = jnp.asarray(random(3, 2)), jnp.asarray(2 * random(3, 3))

    def log_probabilities(xs):
        _, ys = ar.latent(jaxseq.gru, gru_params(2, 3), None, xs, first=1, read=lambda x: table[x] if read else x)
        return ar.log_probability(xs, logits=ys @ w)

    return log_probabilities


def test_the_probabilities_of_all_sequences_sum_to_one():
    """The sum over all 3⁴ sequences is one only if every factor is a probability conditioned on the past."""
    every = np.array(list(product(range(3), repeat=4))).T
    f = tiny(True)
    p = np.exp(jax.jit(lambda xs: ar.log_likelihood(f(xs)))(jnp.asarray(every)))
    assert p.shape == (81,)
    assert np.ptp(p) > 1e-3, "expected sequences of different probabilities"
    np.testing.assert_allclose(p.sum(), 1.0, rtol=1e-12)


# --- Gradients ---


@pytest.mark.parametrize("op", ["categorical", "normal", pytest.param("latent", marks=pytest.mark.long)])
def test_gradients(op):
    if op == "categorical":
        xs, lengths = TOKENS, np.array([4, 2, 1])
        f = lambda a: ar.log_likelihood(ar.log_probability(xs, logits=a), lengths=lengths)  # noqa: E731
        args = (random(*STEPS, V),)
    elif op == "normal":
        f, args = ar.log_normal, (random(4, 2), random(4, 2, seed=1), random(2, seed=2))
    else:
        f = lambda params, h, xs: ar.latent(jaxseq.gru, params, h, xs)  # noqa: E731
        args = (gru_params(2, 3), random(4, 3), random(5, 4, 2))
    check_vjp(f, jax.tree.map(jnp.asarray, args), level="quick").raise_if_failed()


# --- draw, sample, stream ---

P = np.array([0.1, 0.5, 0.15, 0.25])
DRAWS = 20_000


@partial(jax.jit, static_argnames=("temperature", "top_k", "top_p"))
def counted(logits, **how):
    drawn = ar.draw(jax.random.key(7), jnp.broadcast_to(logits, (DRAWS, logits.size)), **how)
    return jnp.sum(drawn[:, None] == jnp.arange(logits.size)[None], 0), drawn.min()


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({}, P),
        pytest.param({"temperature": 2.0}, P**0.5, marks=pytest.mark.long),
        ({"temperature": 0.5}, P**2),
        ({"top_k": 2}, [0, 2, 0, 1]),
        pytest.param({"top_k": 4}, P, marks=pytest.mark.long),
        ({"top_p": 0.7}, [0, 2, 0, 1]),  # cumulative sums 0.5, 0.75
        ({"top_p": 0.8}, [0, 0.5, 0.15, 0.25]),  # 0.75 is not enough
        ({"top_p": 0.05}, [0, 1, 0, 0]),
        pytest.param({"top_p": 1.0}, P, marks=pytest.mark.long),
        ({"top_k": 3, "top_p": 0.8}, [0, 2, 0, 1]),  # the first two of three sum to 0.75 / 0.9
        ({"temperature": 2.0, "top_p": 0.6}, [0, 2**0.5, 0, 1]),  # (.316, .707, .387, .5) / 1.91
        ({"temperature": 0}, [0, 1, 0, 0]),
    ],
    ids=str,
)
def test_draws_have_the_frequencies_of_what_is_kept(how, expected):
    counts, least = map(np.asarray, counted(jnp.log(P) + 3.0, **how))
    expected = np.array(expected) / np.sum(expected)
    assert int(least) >= 0
    assert int(counts.sum()) == DRAWS
    assert (np.asarray(counts)[expected == 0] == 0).all()
    kept = expected > 0
    sigma = np.sqrt(DRAWS * expected * (1 - expected))
    assert (np.abs(counts - DRAWS * expected) <= 4 * sigma).all()
    if kept.sum() > 1:
        assert scipy_stats.chisquare(np.asarray(counts)[kept], DRAWS * expected[kept]).pvalue > 1e-4


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.long)])
def test_draws_from_logits_in_few_bits(dtype):
    """Rare values have the right frequency, and equal logits give equal frequencies."""
    p = np.array([0.9, 0.09, 0.0085, 0.0015])
    logits = jnp.asarray(np.log(p), dtype)
    p = scipy_special.softmax(np.asarray(logits, float))
    counts = np.asarray(counted(logits)[0])
    assert (np.abs(counts - DRAWS * p) <= 4 * np.sqrt(DRAWS * p * (1 - p))).all()
    counts, _ = counted(jnp.zeros(300, dtype))
    assert scipy_stats.chisquare(counts).pvalue > 1e-4


def test_ties_with_the_last_that_is_kept_are_kept():
    counts, _ = counted(jnp.array([1.0, 0.0, 1.0]), top_k=1)
    assert counts[1] == 0
    assert abs(int(counts[0]) - DRAWS / 2) < 4 * (DRAWS / 4) ** 0.5


def test_what_has_probability_zero_is_never_drawn():
    for how in ({}, {"top_k": 3, "temperature": 50.0}, {"top_p": 1.0}):
        counts, _ = counted(jnp.array([-jnp.inf, 0.0, -jnp.inf, 1.0]), **how)
        assert (counts[0], counts[2]) == (0, 0)
        assert counts[1] > 0


@pytest.mark.parametrize("how", [{}, {"temperature": 0}, {"top_k": 2}, {"top_p": 0.9}], ids=str)
def test_of_nan_nothing_is_drawn(how):
    logits = np.log(np.tile(P, (3, 2, 1)))
    logits[1, 0, 2] = np.nan
    drawn = jax.jit(partial(ar.draw, **how))(jax.random.key(1), logits)
    assert drawn.shape == (3, 2)
    bad = np.zeros((3, 2), bool)
    bad[1, 0] = True
    np.testing.assert_array_equal(np.asarray(drawn) == -1, bad)


def test_draws_of_one_key_are_the_same_and_of_rows_their_own():
    logits = jnp.zeros((50, 9))
    a, b, c = (ar.draw(jax.random.key(i), logits) for i in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()
    assert len(set(a.tolist())) > 3


TABLE = np.log(np.array([[0.1, 0.7, 0.2], [0.25, 0.25, 0.5], [0.6, 0.3, 0.1]]))


def chain(count, x):
    """A Markov chain over three values, whose carry counts its steps."""
    return count + 1, jnp.asarray(TABLE)[x]


FIRST = jnp.array([0, 2, 1, 0, 2])
SAMPLE = jax.jit(partial(ar.sample, step=chain), static_argnames=("length", "temperature", "top_k", "top_p"))


def test_a_sample_is_what_its_key_says():
    run = partial(SAMPLE, carry=jnp.array(0), first=FIRST, length=12)
    (count, xs), (_, again), (_, other) = (run(jax.random.key(k)) for k in (4, 4, 5))
    assert (int(count), xs.shape) == (12, (12, 5))
    np.testing.assert_array_equal(xs, again)
    assert (xs != other).any()
    x, expected = FIRST, []
    draw = jax.jit(ar.draw)
    for t in range(12):
        x = draw(jax.random.fold_in(jax.random.key(4), t), TABLE[x])
        expected.append(x)
    np.testing.assert_array_equal(xs, np.stack(expected))


@pytest.mark.parametrize("how", [{}, {"temperature": 0.7, "top_k": 2}, {"top_p": 0.8}], ids=str)
def test_a_stream_is_the_sample_value_by_value(how):
    key = jax.random.key(6)
    _, xs = SAMPLE(key, carry=jnp.array(0), first=FIRST, length=9, **how)
    values = ar.stream(key, chain, jnp.array(0), FIRST, **how)
    np.testing.assert_array_equal(np.stack(list(islice(values, 9))), xs)


def test_at_temperature_zero_a_sample_takes_the_likeliest():
    _, xs = ar.sample(jax.random.key(0), chain, 0, 0, 5, temperature=0)
    assert xs.tolist() == [1, 2, 0, 1, 2]


def test_samples_have_the_probabilities_of_the_model():
    """The nine pairs of two steps have the frequencies that log_likelihood predicts."""
    _, xs = SAMPLE(jax.random.key(3), carry=jnp.array(0), first=jnp.zeros(DRAWS, int), length=2)
    pairs = np.array(list(product(range(3), repeat=2))).T
    logits = TABLE[ar.shifted(pairs)]
    p = np.exp(ar.log_likelihood(ar.log_probability(pairs, logits=logits)))
    np.testing.assert_allclose(p.sum(), 1.0, rtol=1e-12)
    counts = np.bincount(np.asarray(xs[0] * 3 + xs[1]), minlength=9)
    assert scipy_stats.chisquare(counts, DRAWS * p).pvalue > 1e-4


@pytest.mark.long
def test_keys_under_vmap():
    keys = jax.random.split(jax.random.key(0), 3)
    f = lambda key: ar.sample(key, chain, jnp.array(0), jnp.array(1), 6)[1]  # noqa: E731
    np.testing.assert_array_equal(jax.jit(jax.vmap(f))(keys), np.stack([f(key) for key in keys]))


def test_no_steps_and_first_of_another_width():
    carry, xs = ar.sample(jax.random.key(0), chain, 3, jnp.array([1, 2], jnp.uint8), 0)
    assert (int(carry), xs.shape) == (3, (0, 2))
    _, xs = ar.sample(jax.random.key(0), chain, 0, np.array([1, 2], np.int32), 4)
    assert xs.shape == (4, 2)


def test_draws_from_a_density():
    """x_t ~ N(0.5 x_{t-1} + c, σ), with a tree of values instead of a token."""

    def step(carry, x):
        return carry + 1.0, {"mean": 0.5 * x["v"] + carry, "scale": jnp.array(0.1)}

    def normal(key, a):
        return {"v": a["mean"] + a["scale"] * jax.random.normal(key, a["mean"].shape)}

    key, first = jax.random.key(2), {"v": jnp.array([1.0, -1.0])}
    carry, xs = jax.jit(lambda key, x: ar.sample(key, step, 0.0, x, 4, draw=normal))(key, first)
    assert float(carry) == 4.0
    x, noise = first["v"], jax.jit(lambda t: jax.random.normal(jax.random.fold_in(key, t), (2,)))
    for t in range(4):
        x = 0.5 * x + t + 0.1 * noise(t)
        np.testing.assert_allclose(xs["v"][t], x, rtol=1e-12)
    values = list(islice(ar.stream(key, step, 0.0, first, draw=normal), 4))
    np.testing.assert_allclose(np.stack([v["v"] for v in values]), xs["v"], rtol=1e-12)


def test_a_carry_of_none_is_that_of_the_cell():
    params, table, w = gru_params(2, 3), jnp.asarray(random(3, 2)), jnp.asarray(2 * random(3, 3))

    def step(h, x):
        h, y = jaxseq.gru_cell(params, h, table[x])
        return h, y @ w

    key, first = jax.random.key(0), jnp.array([0, 2])
    run = jax.jit(partial(ar.sample, key, step, first=first, length=5))
    h, xs = run(carry=jaxseq.zero_state(params, 2))
    actual, ys = run(carry=None)
    np.testing.assert_allclose(actual, h, rtol=1e-12)
    np.testing.assert_array_equal(ys, xs)
    np.testing.assert_array_equal(list(islice(ar.stream(key, step, None, first), 5)), xs)
    assert ar.sample(key, step, None, first, 0)[1].shape == (0, 2)


@pytest.fixture(scope="module")
def network():
    """(step, state of a batch of 3), with float64 parameters, whose most likely values depend on the whole history."""
    params, table, w = gru_params(2, 3), jnp.asarray(3 * random(7, 2)), jnp.asarray(2 * random(3, 7))

    def step(h, x):
        h, y = jaxseq.gru_cell(params, h, table[x])
        return h, y @ w

    return step, jaxseq.zero_state(params, 3)


def by_hand(step, h, prompt, length, stop=()):
    """Read a prompt and sample one sequence at temperature zero, value by value."""
    for x in prompt[:-1]:
        h, _ = step(h, jnp.array(x))
    xs, x = [], prompt[-1]
    while len(xs) < length and not (xs and xs[-1] in stop):
        h, a = step(h, jnp.array(x))
        x = int(np.argmax(a))
        xs.append(x)
    return h, xs


PROMPT = np.array([[0, 2, 1], [6, 1, 5], [3, 3, 4], [2, 0, 2]])


@pytest.mark.parametrize(
    ("first", "prompt_lengths", "stop", "lengths"),
    [
        (None, None, None, None),
        ([4, 0, 1], [3, 1, 4], None, None),
        (None, [4, 1, 2], (6, 2), None),
        (None, None, 5, [9, 0, 4]),
        ([1, 2, 3], None, None, [3, 7, 1]),
    ],
)
def test_each_sequence_has_its_own_prompt_and_end(first, prompt_lengths, stop, lengths, network):
    step, state = network
    arrays = {"prompt_lengths": prompt_lengths, "lengths": lengths}
    options = {name: jnp.array(value) for name, value in arrays.items() if value is not None}
    first_array = None if first is None else jnp.array(first)
    run = jax.jit(partial(ar.sample, step=step, length=9, stop=stop, temperature=0))
    h, xs = run(jax.random.key(0), carry=state, first=first_array, prompt=jnp.asarray(PROMPT), **options)
    stops = () if stop is None else stop if isinstance(stop, tuple) else (stop,)
    for i in range(3):
        prompt = [*([] if first is None else [first[i]]), *PROMPT[: (prompt_lengths or [4] * 3)[i], i]]
        expected_h, expected = by_hand(step, state[i], prompt, (lengths or [9] * 3)[i], stops)
        assert xs[:, i].tolist() == expected + [-1] * (9 - len(expected))
        np.testing.assert_allclose(h[i], expected_h, rtol=1e-10)


def test_the_loop_ends_when_all_sequences_have_ended():
    steps = []

    def step(s, x):
        jax.debug.callback(lambda t: steps.append(int(t)), s[0])
        return s + 1, jax.nn.one_hot(s % 5, 5)  # 0, 1, 2, ...

    s, xs = ar.sample(jax.random.key(0), step, jnp.array([0, 2]), jnp.array([0, 0]), 1000, stop=3, temperature=0)
    jax.effects_barrier()
    assert xs[:6].T.tolist() == [[0, 1, 2, 3, -1, -1], [2, 3, -1, -1, -1, -1]]
    assert s.tolist() == [4, 4]
    assert len(steps) == 4


def test_a_stream_reads_its_prompt(network):
    step, state = network
    key, prompt = jax.random.key(0), jnp.asarray(PROMPT)
    _, xs = ar.sample(key, step, state, None, 5, prompt=prompt)
    np.testing.assert_array_equal(list(islice(ar.stream(key, step, None, None, prompt=prompt), 5)), xs)


def test_values_of_a_density_are_zero_after_their_end():
    step = lambda s, x: (s + 1.0, x + s)  # noqa: E731
    _, xs = ar.sample(
        jax.random.key(0), step, jnp.ones(2), jnp.ones(2), 3, lengths=jnp.array([1, 3]), draw=lambda key, a: a
    )
    assert xs.tolist() == [[2, 2], [0, 4], [0, 7]]


def test_values_that_are_vectors_end_with_their_sequence():
    step = lambda s, x: (s + 1.0, x + s[:, None])  # noqa: E731
    start, lengths = jnp.zeros((2, 3)), jnp.array([0, 2])
    _, xs = ar.sample(jax.random.key(0), step, jnp.ones(2), start, 3, lengths=lengths, draw=lambda key, a: a)
    np.testing.assert_array_equal(xs[:, :, 0], [[0, 1], [0, 3], [0, 0]])
    np.testing.assert_array_equal(xs, np.repeat(xs[..., :1], 3, -1))


CONSTANT = lambda s, x: (s, jnp.ones((3, 7)))  # noqa: E731
SAMPLE_MISTAKES = {
    "neither first nor prompt": ({"first": None}, ValueError, r"`first`: expected a value, since there is no `prompt`"),
    "lengths of no prompt": ({"prompt_lengths": jnp.ones(3, int)}, ValueError, r"`prompt`: .* since there are"),
    "an empty prompt": ({"prompt": jnp.ones((0, 3), int)}, ValueError, r"`prompt`: expected at least one value"),
    "a prompt of another batch": (
        {"prompt": jnp.ones((4, 2), int), "step": CONSTANT},
        TypeError,
        r"`prompt`: expected \(3,\), the shape of a drawn value",
    ),
    "a prompt of floats": (
        {"prompt": jnp.ones((4, 3)), "step": CONSTANT},
        TypeError,
        r"`prompt`: expected int.*, the dtype of a drawn value, got float64\[3\]",
    ),
    "too long a prompt": (
        {"prompt": jnp.ones((4, 3), int), "prompt_lengths": jnp.array([1, 5, 2])},
        ValueError,
        r"`prompt_lengths`: expected integers from 1 to 4, the steps of `prompt`, got 1 to 5",
    ),
    "lengths of another batch": (
        {"lengths": jnp.ones(2, int)},
        ValueError,
        r"`lengths`: expected shape \(3,\) = \*batch",
    ),
    "negative lengths": ({"lengths": jnp.array([1, -1, 2])}, ValueError, r"`lengths`: expected integers >= 0, got -1"),
    "lengths as floats": ({"lengths": jnp.ones(3)}, TypeError, r"`lengths`: expected an array of integers"),
    "a stop that is no token": ({"stop": "end"}, TypeError, r"`stop`: expected an integer, got str 'end'"),
    "a number as key": ({"key": 0}, TypeError, r"`key`: expected a JAX random key, such as jax\.random\.key\(0\)"),
    "a stop that is no token, for no steps": ({"stop": "end", "length": 0}, TypeError, r"`stop`: expected an integer"),
    "no state, but lengths": (
        {"carry": None, "lengths": jnp.ones(3, int)},
        TypeError,
        r"`carry`: expected arrays with `lengths`, such as those of `jaxseq\.zero_state`, got None",
    ),
    "a carry without batch": (
        {"carry": jnp.zeros(()), "step": CONSTANT, "stop": 1},
        ValueError,
        r"`carry`: expected arrays that start with the batch axes \(3,\)",
    ),
}


@pytest.mark.other_types
@pytest.mark.parametrize("label", SAMPLE_MISTAKES)
def test_mistakes_with_prompts_and_ends(label, network):
    changed, error, match = SAMPLE_MISTAKES[label]
    step, state = network
    given = {"key": jax.random.key(0), "step": step, "carry": state, "first": jnp.array([0, 1, 2]), "length": 4}
    with pytest.raises(error, match=match):
        ar.sample(**given | changed)


@pytest.mark.parametrize("limit", [np.iinfo(np.int64).max, 2**31, 2**32 + 1])
def test_a_length_that_means_no_limit(limit):
    lengths = np.full(3, limit)
    _, xs = ar.sample(jax.random.key(0), CONSTANT, None, jnp.array([0, 1, 2]), 4, lengths=lengths)
    assert (xs >= 0).all()


@pytest.mark.long
def test_a_sample_of_a_network_goes_on_from_a_prompt():
    """Process a prompt in one call, then sample at temperature zero: the argmax of one call on the whole sequence."""
    params, table, w = gru_params(2, 3), jnp.asarray(random(3, 2)), jnp.asarray(2 * random(3, 3))

    def step(h, x):
        h, y = jaxseq.gru_cell(params, h, table[x])
        return h, y @ w

    prompt = jnp.array([[0, 2], [1, 1], [2, 0]])
    read = partial(ar.latent, jaxseq.gru, params, None, first=0, read=lambda x: table[x])
    h, _ = read(prompt)
    _, xs = ar.sample(jax.random.key(0), step, h, prompt[-1], 3, temperature=0)
    whole = jnp.concatenate([prompt, xs])
    _, ys = read(whole)
    np.testing.assert_array_equal(jnp.argmax(ys @ w, -1)[3:], xs)


# --- Mistakes ---

NAN = np.array([[1.0, 2.0], [3.0, np.nan], [5.0, 6.0]])
X = jnp.arange(6.0)
KEY = jax.random.key(0)
XS, PARAMS = jnp.ones((5, 4, 2)), gru_params(2, 3)


def sample(first=FIRST, step=chain, length=3, **how):
    return ar.sample(KEY, step, jnp.array(0), first, length, **how)


def stream(first=FIRST, step=chain, **how):
    return ar.stream(KEY, step, jnp.array(0), first, **how)


def latent(xs=XS, **how):
    return ar.latent(jaxseq.gru, PARAMS, None, xs, **how)


MISTAKES = {
    # --- windows ---
    "NaN, NumPy": (lambda: ar.lagged(NAN, 1), ValueError, r"`xs`: expected finite numbers, got nan at \[1, 1\]"),
    "NaN, JAX": (lambda: ar.histories(jnp.asarray(NAN), 1), ValueError, r"`xs`: .* got nan at \[1, 1\]"),
    "infinity": (lambda: ar.lagged(jnp.array([1.0, 2.0, -jnp.inf]), 1), ValueError, r"`xs`: .* got -inf at \[2\]"),
    "a list": (
        lambda: ar.lagged([1, 2, 3], 1),
        TypeError,
        r"`xs`: expected an array of numbers \(T, \.\.\.\), got list",
    ),
    "booleans": (lambda: ar.lagged(X > 2, 1), TypeError, r"`xs`: expected an array of numbers .* got bool\[6\]"),
    "a number": (
        lambda: ar.lagged(jnp.array(1.0), 1),
        TypeError,
        r"`xs`: expected an array of numbers .* got float64\[\]",
    ),
    "window as long as the series": (
        lambda: ar.lagged(X, 6),
        ValueError,
        r"`order`: expected less than 6, the number of steps, got 6 \(xs \(6,\)\)",
    ),
    "no window": (lambda: ar.lagged(X, 0), ValueError, r"`order`: expected an integer >= 1, got 0"),
    "float window": (lambda: ar.lagged(X, 2.0), TypeError, r"`order`: expected an integer >= 1, got float 2\.0"),
    "every": (lambda: ar.lagged(X, 2, every=0), ValueError, r"`every`: expected an integer >= 1, got 0"),
    "history longer than the series": (lambda: ar.histories(X, 6), ValueError, r"`order`: expected less than 6"),
    "histories longer than the series": (
        lambda: ar.histories(X, np.arange(6), longest=6),
        ValueError,
        r"`longest`: expected less than 6, the number of steps, got 6",
    ),
    "orders of another shape": (
        lambda: ar.histories(X, np.ones(5, int)),
        ValueError,
        r"`order`: expected shape \(6,\)",
    ),
    "orders below zero": (
        lambda: ar.histories(X, np.array([0, 1, -2, 1, 1, 1])),
        ValueError,
        r"`order`: expected integers >= 0, got -2",
    ),
    "float orders": (lambda: ar.histories(X, np.ones(6)), TypeError, r"`order`: expected an integer, or an array of"),
    "float order in a longer row": (
        lambda: ar.histories(X, 1.5, longest=3),
        TypeError,
        r"`order`: expected an integer",
    ),
    "order below zero in a longer row": (lambda: ar.histories(X, -2, longest=3), ValueError, r"`order`: expected"),
    "traced orders": (
        lambda: jax.jit(ar.histories)(X, jnp.arange(6)),
        TypeError,
        r"`longest`: expected an integer, since `order` is traced, got None",
    ),
    # --- linear ---
    "fit: NaN": (
        lambda: ar.fit(X.at[3].set(jnp.nan), 1),
        ValueError,
        r"`xs`: expected finite numbers, got nan at \[3\]",
    ),
    "fit: more than one series": (
        lambda: ar.fit(jnp.ones((9, 2, 1)), 1),
        ValueError,
        r"`xs`: expected shape \(T,\) or \(T, K\); use jax\.vmap for several series, got \(9, 2, 1\)",
    ),
    "fit: too few steps for several variables": (
        lambda: ar.fit(jnp.ones((9, 3)), 2, horizon=2),
        ValueError,
        r"`order`: expected at most 1, so that there are no more unknowns than equations, got 2",
    ),
    "predict: another number of variables": (
        lambda: ar.predict(ar.Linear(jnp.ones(2), jnp.ones(()), jnp.ones(())), jnp.ones((9, 2))),
        ValueError,
        r"`model`: expected coefficients \(order, 2, 2\) and intercept \(2,\), .*, got coefficients \(2,\) and",
    ),
    "lagged: horizon beyond the series": (
        lambda: ar.lagged(np.arange(9), 6, horizon=4),
        ValueError,
        r"`horizon`: expected at most 3, the steps after a window, got 4",
    ),
    "predict: no steps": (
        lambda: ar.predict(ar.Linear(jnp.ones(2), jnp.ones(()), jnp.ones(())), jnp.ones(9), horizon=0),
        ValueError,
        r"`horizon`: expected an integer >= 1, got 0",
    ),
    "fit: integers": (lambda: ar.fit(jnp.arange(9), 1), TypeError, r"`xs`: expected a float array, got int64\[9\]"),
    "fit: too few steps": (
        lambda: ar.fit(X, 3),
        ValueError,
        r"`order`: expected at most 2, so that there are no more unknowns than equations, got 3",
    ),
    "fit: longer than the series": (lambda: ar.fit(X, 7), ValueError, r"`order`: expected less than 6"),
    "predict: model": (
        lambda: ar.predict((1, 2, 3), X),
        TypeError,
        r"`model`: expected Linear\(coefficients, intercept",
    ),
    "predict: NaN": (
        lambda: ar.predict(MODEL, X * jnp.nan),
        ValueError,
        r"`xs`: expected finite numbers, got nan at \[0\]",
    ),
    "forecast: model": (lambda: ar.forecast(X, X, 1), TypeError, r"`model`: expected Linear"),
    "forecast: too few": (
        lambda: ar.forecast(MODEL, X[:2], 1),
        ValueError,
        r"`xs`: expected at least 3 steps, the order of the model, got 2",
    ),
    "forecast: steps": (lambda: ar.forecast(MODEL, X, -1), ValueError, r"`steps`: expected an integer >= 0, got -1"),
    # --- likelihood ---
    "neither": (
        lambda: ar.log_probability(TOKENS),
        TypeError,
        r"`logits`: expected either logits or probabilities, got neither",
    ),
    "both": (
        lambda: ar.log_probability(TOKENS, logits=random(*STEPS, V), probabilities=random(*STEPS, V)),
        TypeError,
        r"`logits`: expected either logits or probabilities, got both",
    ),
    "logits that are integers": (
        lambda: ar.log_probability(TOKENS, logits=np.ones((*STEPS, V), int)),
        TypeError,
        r"`logits`: expected a float array, got int64\[4, 3, 5\]",
    ),
    "tokens that are floats": (
        lambda: ar.log_probability(1.0 * TOKENS, logits=random(*STEPS, V)),
        TypeError,
        r"`xs`: expected an array of integers, got float64\[4, 3\]",
    ),
    "logits of another shape": (
        lambda: ar.log_probability(TOKENS, logits=random(4, V)),
        ValueError,
        r"`logits`: expected shape \(4, 3, 'V'\) = \(\*steps, V\), got \(4, 5\) \(xs \(4, 3\)\)",
    ),
    "probabilities of another shape": (
        lambda: ar.log_probability(TOKENS, probabilities=random(3, 4, V)),
        ValueError,
        r"`probabilities`: expected shape \(4, 3, 'V'\)",
    ),
    "probabilities that do not sum": (
        lambda: ar.log_probability(np.array([0, 1]), probabilities=np.array([[0.5, 0.5], [0.5, 0.4]])),
        ValueError,
        r"`probabilities`: expected numbers >= 0 that sum to one, got a sum of 0\.9, the smallest 0\.4, at \[1\]",
    ),
    "probabilities below zero": (
        lambda: ar.log_probability(np.array(0), probabilities=np.array([1.5, -0.5])),
        ValueError,
        r"`probabilities`: expected numbers >= 0 that sum to one, got a sum of 1, the smallest -0\.5",
    ),
    "normal: integers": (lambda: ar.log_normal(TOKENS, X, X), TypeError, r"`xs`: expected a float array"),
    "normal: mean": (
        lambda: ar.log_normal(XS, XS[0], XS),
        ValueError,
        r"`mean`: expected shape \(5, 4, 2\) = \(\*steps, D\), got \(4, 2\)",
    ),
    "normal: scale": (
        lambda: ar.log_normal(XS, XS, jnp.ones(3)),
        ValueError,
        r"`log_scale`: expected shape \(5, 4, 2\)",
    ),
    "normal: a number": (
        lambda: ar.log_normal(X[0], X[0], X[0]),
        ValueError,
        r"`xs`: expected shape \(\*steps, D\), got",
    ),
    "likelihood: integers": (
        lambda: ar.log_likelihood(TOKENS),
        TypeError,
        r"`log_probabilities`: expected a float array",
    ),
    "likelihood: a number": (
        lambda: ar.log_likelihood(X[0]),
        ValueError,
        r"`log_probabilities`: expected shape \(T, \*ba",
    ),
    "likelihood: float lengths": (
        lambda: ar.log_likelihood(XS[..., 0], lengths=jnp.ones(4)),
        TypeError,
        r"`lengths`: expected an array of integers, got float64\[4\]",
    ),
    "likelihood: lengths of another shape": (
        lambda: ar.log_likelihood(XS[..., 0], lengths=np.ones(3, int)),
        ValueError,
        r"`lengths`: expected shape \(4,\)",
    ),
    "likelihood: lengths beyond T": (
        lambda: ar.log_likelihood(XS[..., 0], lengths=np.array([1, 2, 6, 0])),
        ValueError,
        r"`lengths`: expected lengths from 0 to 5, the number of steps, got 0 to 6",
    ),
    "likelihood: axis": (lambda: ar.log_likelihood(X, time_axis=1), ValueError, r"`time_axis`: expected an axis"),
    # --- latent ---
    "latent: reverse": (
        lambda: latent(reverse=True),
        ValueError,
        r"`reverse`: expected False, because an autoregressive model predicts later values .*, got bool True",
    ),
    "latent: layer": (lambda: ar.latent("gru", PARAMS, None, XS), TypeError, r"`layer`: expected a function \(params"),
    "latent: first": (
        lambda: latent(first=jnp.ones((4, 3))),
        ValueError,
        r"`first`: expected shape \(4, 2\), one step of `xs`, got \(4, 3\)",
    ),
    "latent: resets": (
        lambda: latent(resets=np.zeros((4, 5), bool)),
        ValueError,
        r"`resets`: expected shape \(T, \*batch\), equal to the leading axes of `xs`, got \(4, 5\)",
    ),
    "latent: integer resets": (
        lambda: latent(resets=np.zeros((5, 4), int)),
        TypeError,
        r"`resets`: expected a boolean array, got int64\[5, 4\]",
    ),
    "shifted: a list": (
        lambda: ar.shifted([1, 2]),
        TypeError,
        r"`xs`: expected an array \(T, \.\.\.\), got list \[1, 2\]",
    ),
    "shifted: axis": (lambda: ar.shifted(X, time_axis=2), ValueError, r"`time_axis`: expected an axis"),
    # --- sampling ---
    "temperature": (
        lambda: sample(temperature=-0.1),
        ValueError,
        r"`temperature`: expected a number >= 0, got -0\.1",
    ),
    "NaN temperature": (lambda: sample(temperature=float("nan")), ValueError, r"`temperature`: .* got nan"),
    "infinite temperature": (lambda: stream(temperature=float("inf")), ValueError, r"`temperature`: .* got inf"),
    "temperature as a string": (
        lambda: stream(temperature="hot"),
        TypeError,
        r"`temperature`: expected a number .* str 'hot'",
    ),
    "zero top_k": (lambda: sample(top_k=0), ValueError, r"`top_k`: expected an integer >= 1, got 0"),
    "top_k above the number of values": (
        lambda: sample(top_k=4),
        ValueError,
        r"`top_k`: expected at most 3, the number of values, got 4",
    ),
    "fractional top_k": (lambda: stream(top_k=0.5), TypeError, r"`top_k`: expected an integer >= 1"),
    "zero top_p": (
        lambda: ar.draw(KEY, X, top_p=0.0),
        ValueError,
        r"`top_p`: expected a number > 0 and <= 1, got 0\.0",
    ),
    "top_p above one": (
        lambda: sample(top_p=1.5),
        ValueError,
        r"`top_p`: expected a number > 0 and <= 1, got 1\.5",
    ),
    "top_p below zero": (lambda: stream(top_p=-0.5), ValueError, r"`top_p`: expected a number > 0 and <= 1"),
    "boolean top_p": (lambda: sample(top_p=True), TypeError, r"`top_p`: expected a number > 0"),
    "draw: integers": (lambda: ar.draw(KEY, FIRST), TypeError, r"`logits`: expected a float array, got int64\[5\]"),
    "draw: no values": (
        lambda: ar.draw(KEY, X[:0]),
        ValueError,
        r"`logits`: expected shape \(\*batch, V\), got \(0,\)",
    ),
    "step": (lambda: sample(step=None), TypeError, r"`step`: expected a function \(carry, x\) -> \(carry, logits\)"),
    "step of a stream": (lambda: stream(step="gru"), TypeError, r"`step`: expected a function"),
    "carry that changes": (lambda: sample(step=lambda s, x: (s[None], jnp.asarray(TABLE)[x])), TypeError, r"(?s)carry"),
    "length": (lambda: sample(length=-1), ValueError, r"`length`: expected an integer >= 0, got -1"),
    "first of another shape": (
        lambda: sample(jnp.zeros((5, 1), int), step=lambda s, x: (s, jnp.zeros((5, 3)))),
        TypeError,
        r"`first`: expected \(5,\), the shape of a drawn value, got \(5, 1\)",
    ),
    "first of another shape, in a stream": (
        lambda: stream(jnp.zeros(4, int), step=lambda s, x: (s, jnp.zeros((5, 3)))),
        TypeError,
        r"`first`: expected \(5,\), the shape of a drawn value, got \(4,\)",
    ),
    "first of floats": (
        lambda: sample(jnp.zeros(5), step=lambda s, x: (s, jnp.zeros((5, 3)))),
        TypeError,
        r"`first`: expected int64, the dtype of a drawn value, got float64\[5\]",
    ),
    "first of booleans": (
        lambda: sample(jnp.zeros(5, bool), step=lambda s, x: (s, jnp.zeros((5, 3)))),
        TypeError,
        r"`first`: expected int64, the dtype of a drawn value, got bool\[5\]",
    ),
    "draw not a function": (lambda: sample(draw="normal"), TypeError, r"`draw`: expected a function \(key, a\) -> x"),
    "draw with options": (
        lambda: sample(draw=lambda key, a: FIRST, top_k=2),
        TypeError,
        r"`draw`: expected None if temperature, top_k or top_p is passed",
    ),
}


@pytest.mark.other_types
@pytest.mark.parametrize(("call", "kind", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_numbers_that_are_traced_are_not_looked_at():
    """Traced values cannot raise an error; invalid ones give NaN or its consequences."""
    x = np.append(random(8), np.nan)
    assert np.isnan(jax.jit(partial(ar.fit, order=1))(x).coefficients).all()
    windows, _ = jax.jit(partial(ar.lagged, order=2))(x)
    assert windows.shape == (7, 2)
    assert np.isnan(jax.vmap(partial(ar.predict, MODEL))(np.stack([x, np.roll(x, 1)]))[1, 1])
