"""Linear cells: chunks of time, complex states, what the backward pass stores, devices, initializers and errors.

`tests/test_contract.py` and others check the variants of `_cases.py`. `tests/test_linear_peers.py` compares the cells
with their papers and with other libraries.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, mesh_of, normals, place
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

import jaxseq
from jaxseq import LinearCell, cells, recurrence, tuning
from tests.support import hlo

T, B, D, H = 11, 3, 4, 5
KEY = jax.random.key(0)
LENGTHS = jnp.array([11, 0, 6])
RESETS = jnp.asarray(np.random.default_rng(3).random((T, B)) < 0.3).at[0].set(False)
HIDDEN = {"rg_lru": D, "selective_ssm": 2}  # for 4 features; the others have H units


def weights(name, *, seed=1, features=D, hidden=None, dtype=jnp.float64):
    """Return random parameters, close to the initial ones, with no zero among them."""
    init = getattr(cells, f"{name.removesuffix('_bilinear')}_init")
    params = init(KEY, features, hidden or HIDDEN.get(name, H), dtype=dtype)
    return jax.tree.map(lambda a, b: a + 0.2 * b, params, normals(jax.random.key(seed), params))


def draw(seed, *shape, dtype=np.float64):
    generator = np.random.default_rng(seed)
    numbers = generator.normal(size=(2, *shape))
    return jnp.asarray(numbers[0] + 1j * numbers[1] if np.issubdtype(dtype, np.complexfloating) else numbers[0], dtype)


def state_of(name, params, seed=7):
    like = jaxseq.zero_state(params, B)
    return draw(seed, *like.shape, dtype=like.dtype)


OPTIONS = {
    "lru": {"lengths": LENGTHS, "resets": RESETS, "reverse": True, "return_states": True},
    "s5": {"truncation": 3, "zoneout": 0.3},
    "min_gru": {"truncation": 2, "lengths": LENGTHS, "resets": RESETS, "reverse": True},
    "min_lstm": {"checkpoint": 3, "reverse": True, "resets": RESETS},
    "rg_lru": {"truncation": (2, 5), "lengths": LENGTHS},
    "selective_ssm": {"checkpoint": "auto", "lengths": LENGTHS},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_chunks_and_a_rest_equal_the_reference(name):
    """Values and gradients, where padding has NaN. Chunks of 4 steps leave a rest of 3."""
    cell, params, options = getattr(cells, name), weights(name), OPTIONS[name]
    carry, xs = state_of(name, params), draw(2, T, B, D)
    if name == "rg_lru":
        options = options | {"zoneout": jnp.abs(draw(3, T, B, D)) % 1}
    more = {"reset_state": 0.5 * carry} if "resets" in options else {}

    def derivatives(module, params, carry, xs, more):
        def loss(params, carry, xs, more):
            end, ys = module.recurrence(cell, params, carry, xs, **options, **more)
            return jnp.sum(jnp.sin(ys)) + jnp.sum(jnp.sin(jnp.real(end)) + jnp.square(jnp.imag(end)))

        return jax.value_and_grad(loss, (0, 1, 2, 3))(params, carry, xs, more)

    expected = jax.jit(partial(derivatives, jaxseq.reference))(params, carry, xs, more)
    if "lengths" in options:
        valid = jnp.arange(T)[:, None, None] < LENGTHS[None, :, None]
        xs = jnp.where(valid, xs, jnp.nan)
        if isinstance(options.get("zoneout"), jax.Array):
            options["zoneout"] = jnp.where(valid, options["zoneout"], jnp.nan)
    with tuning.use(tuning.Tuning(linear=tuning.LinearTuning(chunk_elements=1, chunk_steps=4))):
        found = jax.jit(partial(derivatives, jaxseq))(params, carry, xs, more)
    assert_close(found, expected, relative=1e-11)


@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 1e-4), (jnp.bfloat16, 0.03)])
@pytest.mark.parametrize("name", ["lru", "rg_lru"])
def test_narrow_dtypes(name, dtype, bound):
    """The state is float32 or complex64, and the gradients of weights add up in float32 over chunks."""
    cell, xs = getattr(cells, name), draw(2, 600, 2, 16).astype(dtype)
    params = weights(name, features=16, hidden=16, dtype=jnp.float32)
    params = jax.tree.map(lambda a: a.astype(dtype), params)

    def loss(module, params, xs):
        carry, ys = module.recurrence(cell, params, None, xs)
        return jnp.mean(jnp.square(ys.astype(jnp.finfo(carry.dtype).dtype))), (carry, ys)

    of = lambda module: jax.jit(jax.value_and_grad(partial(loss, module), (0, 1), has_aux=True))  # noqa: E731
    found = of(jaxseq)(params, xs)
    expected = of(jaxseq.reference)(*jax.tree.map(lambda a: a.astype(jnp.float64), (params, xs)))
    (_, (carry, ys)), (params_bar, xs_bar) = found
    assert carry.dtype == (jnp.complex64 if name == "lru" else jnp.float32)
    assert {a.dtype for a in (ys, xs_bar, *params_bar)} == {np.dtype(dtype)}
    for one, e in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        assert np.abs(np.asarray(one, np.float64) - e).max() <= bound * np.abs(e).max()


def test_one_step_at_a_time_equals_the_sequence():
    params, xs = weights("lru"), draw(2, T, B, D)
    carry = state_of("lru", params)
    end, ys = jax.jit(partial(recurrence, cells.lru))(params, carry, xs)
    found = lax.scan(partial(jaxseq.recurrence_cell, cells.lru, params), carry, xs)
    assert_close(found, (end, ys), relative=1e-12)


def test_layers_of_linear_cells():
    init = [partial(f, dtype="f4") for f in (cells.lru_init, cells.min_gru_init, cells.selective_ssm_init)]
    params = jaxseq.stack_init(init, KEY, 6, [8, 5, 3])
    layers = [cells.lru, cells.min_gru, cells.selective_ssm]
    ends, ys = jaxseq.stack(layers, params, None, jnp.ones((7, 2, 6), "f4"), zoneout=0.1, key=KEY)
    assert [(end.shape, end.dtype) for end in ends] == [((2, 8), jnp.complex64), ((2, 5), "f4"), ((2, 15), "f4")]
    assert ys.shape == (7, 2, 5)
    assert [a.dtype for a in jaxseq.zero_state(params, 2)] == [jnp.complex64, "f4", "f4"]


def test_no_steps():
    params = weights("selective_ssm")
    carry, ys = recurrence(cells.selective_ssm, params, None, jnp.zeros((0, B, D)))
    assert carry.shape == (B, 2 * D)
    assert ys.shape == (0, B, D)


@pytest.mark.parametrize("name", ["rg_lru", "selective_ssm"])
def test_a_batch_of_zero(name):
    carry, ys = recurrence(getattr(cells, name), weights(name), None, jnp.zeros((5, 0, D)))
    assert carry.shape == (0, D * (2 if name == "selective_ssm" else 1))
    assert ys.shape == (5, 0, D)


# --- The work of the backward pass ---


def test_only_the_states_before_chunks_are_stored():
    """And the arguments. The temporary arrays are less than a fourth of those of JAX's gradient of a scan."""
    params, xs = weights("lru", features=16, hidden=16, dtype=jnp.float32), jnp.ones((256, 8, 16), jnp.float32)

    def plain(params, xs):
        factor = jnp.exp(lax.complex(-jnp.exp(params.nu), jnp.exp(params.theta)))
        u = lax.complex(*jnp.split((xs @ params.w_x) * jnp.tile(jnp.exp(params.gamma), 2)[None, None], 2, -1))

        def step(h, u):
            h = factor[None] * h + u
            return h, h

        _, h = lax.scan(step, jnp.zeros((8, 16), jnp.complex64), u)
        return jnp.concatenate([h.real, -h.imag], -1) @ params.w_y + params.skip[None, None] * xs

    ours = lambda params, xs: recurrence(cells.lru, params, None, xs)[1]  # noqa: E731
    with tuning.use(tuning.Tuning(linear=tuning.LinearTuning(chunk_elements=16 * 8 * 16))):
        stored = [a for a in jax.tree.leaves(jax.vjp(ours, params, xs)[1]) if a.ndim > 2]
        assert sum(a.nbytes for a in stored) <= xs.nbytes + 256 // 16 * 8 * 16 * 8
        run = [jax.jit(jax.grad(lambda *args, f=f: jnp.sum(f(*args) ** 2), (0, 1))) for f in (ours, plain)]
        compiled = [f.lower(params, xs).compile() for f in run]
    assert_close(*(f(params, xs) for f in compiled), relative=1e-4)
    used, of_scan = (f.memory_analysis().temp_size_in_bytes for f in compiled)
    assert used <= of_scan / 4


def test_explain_names_the_chunks():
    params, xs = weights("min_gru"), jnp.ones((64, B, D))
    found = str(jaxseq.explain(recurrence, cells.min_gru, params, None, xs, checkpoint=16))
    assert "coefficients and states: computed again in the backward pass, 16 steps at a time" in found


# --- Devices ---


def gradient_of(cell, **options):
    f = lambda *args: sum(jnp.sum(jnp.sin(jnp.real(a))) for a in recurrence(cell, *args, **options))  # noqa: E731
    return jax.jit(jax.grad(f, (0, 1, 2)))


@pytest.mark.eight_devices
@pytest.mark.parametrize("options", [{}, {"reverse": True, "truncation": (2, 3)}], ids=["plain", "windows"])
def test_time_over_devices(options):
    """log2(n) exchanges in each direction, of one factor and one state. With truncation, the compiler gathers."""
    params, carry, xs = weights("lru"), draw(1, B, H, dtype=complex), draw(2, 8, B, D)
    f = gradient_of(cells.lru, **options)
    mesh = mesh_of((4, 2), ("t", "idle"), "explicit")
    with jax.set_mesh(mesh):
        args = place(mesh, (params, carry, xs), (P(), P(), P("t")))
        compiled = f.lower(*args).compile()
        found = compiled(*args)
    assert_close(jax.tree.map(np.asarray, found), jax.tree.map(np.asarray, f(params, carry, xs)), relative=1e-10)
    if not options:
        moved = hlo.collectives(compiled.as_text())
        exchanges = [c for c in moved if c.kind == "collective-permute"]
        assert [(c.bytes, c.loops) for c in exchanges] == [(2 * carry.nbytes, 0)] * 2 * 2
        assert {c.kind for c in moved} == {"collective-permute", "all-reduce"}


@pytest.mark.eight_devices
@pytest.mark.parametrize("kind", ["explicit", "auto"])
def test_a_batch_over_devices_has_no_collective_in_a_loop(kind):
    params, carry, xs = weights("min_gru"), draw(1, 4, H), draw(2, 64, 4, D)
    f = gradient_of(cells.min_gru)
    mesh = mesh_of((4, 2), ("b", "idle"), kind)
    with jax.set_mesh(mesh):
        args = place(mesh, (params, carry, xs), (P(), P("b"), P(None, "b")))
        with tuning.use(tuning.Tuning(linear=tuning.LinearTuning(chunk_elements=1))):
            compiled = f.lower(*args).compile()
        found = compiled(*args)
    assert_close(jax.tree.map(np.asarray, found), jax.tree.map(np.asarray, f(params, carry, xs)), relative=1e-10)
    assert {c.loops for c in hlo.collectives(compiled.as_text())} == {0}


# --- Initial values ---


def test_the_factors_of_an_lru_are_in_the_ring():
    params = cells.lru_init(KEY, 3, 4000, min_radius=0.5, max_radius=0.9, max_phase=0.3)
    radius, phase = np.exp(-np.exp(np.float64(params.nu))), np.exp(np.float64(params.theta))
    assert 0.5 <= radius.min() < 0.505
    assert 0.895 < radius.max() <= 0.9
    assert abs(np.mean(radius**2) - (0.25 + 0.81) / 2) < 0.01  # uniform in area
    assert 0 < phase.min() < 0.001
    assert 0.299 < phase.max() <= 0.3
    np.testing.assert_allclose(np.exp(params.gamma), np.sqrt(1 - radius**2), rtol=1e-3)


def test_the_eigenvalues_of_s5_are_those_of_hippo():
    """Those of LegS, -sqrt(2 n + 1) sqrt(2 k + 1) below the diagonal and -(n + 1) on it, plus a matrix of rank one."""
    n = np.arange(8)
    p = np.sqrt(n + 0.5)
    legs = -np.tril(np.sqrt((2 * n[:, None] + 1) * (2 * n + 1)), -1) - np.diag(n + 1.0)
    eigenvalues = np.linalg.eigvals(legs + np.outer(p, p))
    expected = np.sort(eigenvalues.imag[eigenvalues.imag > 0])
    params = cells.s5_init(KEY, 3, 8, blocks=2, dtype=jnp.float64)
    np.testing.assert_allclose(params.imag, np.tile(expected, 2), rtol=1e-6)
    np.testing.assert_allclose(params.real, eigenvalues.real.mean(), rtol=1e-6)
    assert -np.log(1000) <= np.min(params.log_step) < np.max(params.log_step) <= -np.log(10)


def test_initial_decays_of_rg_lru_and_selective_ssm():
    params = cells.rg_lru_init(KEY, 2000, 2000, blocks=1000)
    decay = jax.nn.sigmoid(jnp.float64(params.rate)) ** 8
    assert 0.9 - 1e-5 <= decay.min() < 0.901
    assert 0.998 < decay.max() <= 0.999 + 1e-5
    params = cells.selective_ssm_init(KEY, 2000, 3)
    step = np.log1p(np.exp(np.float64(params.b)))
    assert 0.001 * (1 - 1e-3) <= step.min() < 0.0011
    assert 0.09 < step.max() <= 0.1001
    np.testing.assert_allclose(-np.exp(params.log_rate[7]), [-1, -2, -3], rtol=1e-6)


# --- Extreme gates ---


@pytest.mark.parametrize("name", ["rg_lru", "min_lstm", "min_gru", "selective_ssm"])
def test_saturated_gates_have_finite_gradients(name):
    """A factor of exactly one or zero, and gates that underflow."""
    params = weights(name, dtype=jnp.float32)
    for b in (200.0, -200.0):
        f = lambda params, xs: jnp.sum(recurrence(getattr(cells, name), params, None, xs)[1])  # noqa: E731
        found = jax.value_and_grad(f, (0, 1))(params._replace(b=jnp.full_like(params.b, b)), jnp.ones((T, B, D), "f4"))
        assert all(np.isfinite(a).all() for a in jax.tree.leaves(found))


# --- Cells of users, and errors ---


class DecayParams(NamedTuple):
    w: Float[Array, "D H"]
    rate: Float[Array, " H"]


class PlainParams(NamedTuple):
    w: Array


DECAY = LinearCell("decay", coefficients=lambda p, x, L: (jax.nn.sigmoid(p.rate), L(p.w, x)), params=DecayParams)
PLAIN = LinearCell("plain", coefficients=lambda p, x, L: (jnp.asarray(0.5), L(p.w, x)), params=PlainParams)


def test_a_cell_of_a_user():
    w, xs = draw(0, D, H), draw(1, T, D)
    _, ys = recurrence(PLAIN, PlainParams(w), None, xs)
    h = np.zeros(H)
    for x, y in zip(np.asarray(xs), np.asarray(ys), strict=True):
        h = 0.5 * h + x @ np.asarray(w)
        np.testing.assert_allclose(y, h, rtol=1e-12)


def with_coefficients(f):
    return PLAIN._replace(coefficients=f)


GRU = weights("min_gru")
LRU = weights("lru")
XS = jnp.ones((T, B, D))
ERRORS = {
    "bias": (
        lambda: recurrence(cells.min_gru, GRU._replace(b=jnp.ones(9)), None, XS),
        ValueError,
        r"`params.b`: expected shape \(2\*H,\) with D = 4, H = 5, got \(9,\)",
    ),
    "features": (lambda: recurrence(cells.lru, LRU, None, XS[..., :3]), ValueError, "`xs`: expected 4 features"),
    "blocks": (
        lambda: recurrence(cells.rg_lru, weights("rg_lru")._replace(w_x=jnp.ones((3, 2, 2, 2))), None, XS),
        ValueError,
        "`params.w_x`: expected shape",
    ),
    "container": (lambda: recurrence(cells.lru, GRU, None, XS), TypeError, "`params`: expected"),
    "real carry": (lambda: recurrence(cells.lru, LRU, jnp.ones((B, H)), XS), TypeError, "`carry`: .*a complex array"),
    "complex carry": (
        lambda: recurrence(cells.min_gru, GRU, jnp.ones((B, H), complex), XS),
        TypeError,
        "`carry`: .*a real array",
    ),
    "carry": (lambda: recurrence(cells.min_gru, GRU, XS[0], XS), ValueError, r"`carry`: expected shape \(3, 5\)"),
    "dropout": (
        lambda: recurrence(cells.min_gru, GRU, None, XS, recurrent_dropout_mask=jnp.ones((B, H))),
        TypeError,
        "`recurrent_dropout_mask`: expected None, since 'min_gru' has no recurrent map",
    ),
    "side inputs": (lambda: recurrence(cells.lru, LRU, None, (XS, XS)), TypeError, "`xs`: expected a float array"),
    "not a pair": (
        lambda: recurrence(with_coefficients(lambda p, x, L: x), PlainParams(XS), None, XS),
        ValueError,
        r"`plain.coefficients`: expected a pair \(a, v\)",
    ),
    "factors": (
        lambda: recurrence(with_coefficients(lambda p, x, L: (jnp.ones(3), x)), PlainParams(XS), None, XS),
        ValueError,
        r"`plain.coefficients`: expected a of shape \(T, \*batch, H\)",
    ),
    "state": (
        lambda: recurrence(with_coefficients(lambda p, x, L: (jnp.ones(()), x[0])), PlainParams(XS), None, XS),
        ValueError,
        r"`plain.coefficients`: expected v of shape",
    ),
    "complex output": (
        lambda: recurrence(
            with_coefficients(lambda p, x, L: (jnp.ones(()), x.astype(complex))), PlainParams(XS), None, XS
        ),
        ValueError,
        "`plain.output`: expected real outputs",
    ),
    "a of one step": (
        lambda: recurrence(with_coefficients(lambda p, x, L: (x[0], x)), PlainParams(XS), None, XS),
        ValueError,
        "`plain.coefficients`: expected a of shape",
    ),
    "no array": (
        lambda: recurrence(PLAIN._replace(output=lambda p, h, x, L: (h, x)), PlainParams(XS[0].T @ XS[0]), None, XS),
        TypeError,
        "`plain.output`: expected an array",
    ),
    "no weight": (
        lambda: recurrence(cells.min_gru, GRU._replace(w_x=None), None, XS),
        TypeError,
        r"`params.w_x`: expected an array of shape \(D, 2\*H\), got None",
    ),
    "no features": (lambda: jaxseq.zero_state(PlainParams(XS), cell=PLAIN), ValueError, "`plain.params`: expected"),
    "coefficients": (lambda: recurrence(with_coefficients(3), None, None, XS), TypeError, "expected a function, got"),
    "ring": (lambda: cells.lru_init(KEY, 3, 4, min_radius=0.9, max_radius=0.5), ValueError, "`min_radius`"),
    "phase": (lambda: cells.lru_init(KEY, 3, 4, max_phase=0), ValueError, "`max_phase`: expected a positive number"),
    "steps": (lambda: cells.s5_init(KEY, 3, 4, min_step=0), ValueError, "`min_step`: expected 0 < min_step"),
    "hippo blocks": (lambda: cells.s5_init(KEY, 3, 4, blocks=3), ValueError, "`blocks`: expected a divisor"),
    "sizes": (lambda: cells.rg_lru_init(KEY, 3, 4), ValueError, "`hidden_size`: expected `input_size`, 3"),
    "feature blocks": (lambda: cells.rg_lru_init(KEY, 4, 4, blocks=3), ValueError, "`blocks`: expected a divisor"),
    "step order": (
        lambda: cells.selective_ssm_init(KEY, 3, 4, min_step=0.2, max_step=0.1),
        ValueError,
        "`min_step`: expected 0 < min_step",
    ),
}


@pytest.mark.other_types
@pytest.mark.parametrize("name", ERRORS)
def test_wrong_arguments(name):
    call, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        call()
