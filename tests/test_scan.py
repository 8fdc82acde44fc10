"""`scan` behaves as `lax.scan`, and its truncated backward pass runs in parallel over windows."""

import re
from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, inner, normals, scans, subjaxprs
from jax import lax

import jaxseq
from jaxseq import reference, tuning

# (truncation, steps): no windows, windows of one step, a ragged last window, windows that reach back over one or
# several others, windows longer than the sequence.
TRUNCATIONS = ((None, 11), (1, 11), (4, 11), ((2, 3), 11), ((3, 7), 11), (20, 11), ((2, 3), 1))


def step(params, s, x):
    """A step whose state and outputs have several leaves, some of them integers."""
    h = jnp.tanh(s["h"] @ params["w"] + x["u"] @ params["v"]) + jnp.sin(s["n"].astype(s["h"].dtype)) / 10
    return {"h": h, "n": s["n"] + x["k"]}, (jnp.sum(s["h"] * h, -1), s["n"])


def inputs(key, T):
    keys = jax.random.split(key, 4)
    params = {"w": jax.random.normal(keys[0], (5, 5)) / 2, "v": jax.random.normal(keys[1], (3, 5)) / 2}
    return params, jax.random.normal(keys[2], (2, 5)), jax.random.normal(keys[3], (T, 2, 3))


def all_of_it(scan, args, key, *, second, **options):
    """Return values, the gradient, optionally a Hessian-vector product, and a JVP, with closed-over parameters."""

    def run(params, h, u):
        xs = {"u": u, "k": jnp.arange(u.shape[0])}
        end, (ys, ns) = scan(partial(step, params), {"h": h, "n": jnp.int64(0)}, xs, **options)
        return end["h"], ys, end["n"], ns

    def loss(args):
        h, ys, *_ = run(*args)
        return jnp.sum(jnp.sin(h)) + jnp.sum(jnp.sin(ys))

    direction = normals(key, args)

    @jax.jit
    def found(args):
        hvp = jax.grad(lambda args: inner(jax.grad(loss)(args), direction))(args) if second else None
        return run(*args), jax.grad(loss)(args), hvp, jax.jvp(loss, (args,), (direction,))[1]

    return found(args)


FIRST = [(3, False, 2, True), ((2, 3), True, None, False)]


@pytest.mark.parametrize(("truncation", "reverse", "checkpoint", "second"), FIRST, ids=str)
def test_it_is_the_reference(truncation, reverse, checkpoint, second, key):
    args, options = inputs(key, 11), {"truncation": truncation, "reverse": reverse, "second": second}
    expected = all_of_it(reference.scan, args, key, **options)
    assert_close(all_of_it(jaxseq.scan, args, key, checkpoint=checkpoint, **options), expected, relative=1e-9)


@pytest.mark.parametrize("reverse", [False, True])
def test_windows_of_large_states_run_one_by_one(reverse, key):
    with tuning.use(tuning.Tuning(scan=tuning.ScanTuning(parallel_state=9))):
        run_windows_of_large_states(reverse, key)


def run_windows_of_large_states(reverse, key):
    args, options = inputs(key, 11), {"truncation": 3, "reverse": reverse, "second": False}
    assert_close(all_of_it(jaxseq.scan, args, key, **options), all_of_it(reference.scan, args, key, **options))
    rules = [
        e
        for e in subjaxprs(
            jax.make_jaxpr(lambda s, x: jaxseq.scan(lambda s, x: (s + x, s), s, x, truncation=2))(
                jnp.ones(10), jnp.ones(5)
            ).jaxpr
        )
        if e.primitive.name.startswith("custom")
    ]
    assert not rules


@pytest.mark.long
@pytest.mark.parametrize(("truncation", "T"), TRUNCATIONS)
def test_it_is_the_reference_in_every_respect(truncation, T, key):
    args = inputs(key, T)
    for reverse in (False, True):
        options = {"truncation": truncation, "reverse": reverse, "second": not reverse}
        expected = all_of_it(reference.scan, args, key, **options)
        for checkpoint in (None, 2) if T > 1 else (7,):
            assert_close(all_of_it(jaxseq.scan, args, key, checkpoint=checkpoint, **options), expected, relative=1e-9)


def test_without_options_it_is_lax_scan(key):
    params, h, u = inputs(key, 6)
    f = lambda h, x: (jnp.tanh(h @ params["w"] + x @ params["v"]), h)  # noqa: E731
    assert str(jax.make_jaxpr(partial(jaxseq.scan, f))(h, u)) == str(jax.make_jaxpr(partial(lax.scan, f))(h, u))
    by_position = jaxseq.scan(f, h, u, 6, True, 2)
    chex.assert_trees_all_equal(by_position, lax.scan(f, h, u, 6, True, 2))


@pytest.mark.parametrize("options", [{}, {"truncation": 3}, {"truncation": (2, 4)}, {"checkpoint": 3}], ids=str)
def test_what_lax_scan_takes(options):
    """Python scalars, no inputs, no outputs, no steps, unroll=True, PRNG keys."""
    assert_close(jaxseq.scan(lambda s, _: (s * 0.5, s), 1.0, None, 7, **options)[1], 0.5 ** jnp.arange(7.0))
    assert jaxseq.scan(lambda s, x: (s + x, None), 0, jnp.arange(5), unroll=True, **options) == (10, None)
    end, ys = jaxseq.scan(lambda s, x: (s + x, s), 2.0, jnp.zeros(0), **options)
    assert (end, ys.shape) == (2.0, (0,))
    (end, _), ys = jaxseq.scan(
        lambda s, k: (jax.random.split(s[0]), None) and ((s[0], s[1] + 1), jax.random.normal(k)),
        (jax.random.key(0), 0.0),
        jax.random.split(jax.random.key(1), 7),
        **options,
    )
    assert ys.shape == (7,)


@pytest.mark.parametrize("options", [{}, {"truncation": 3}, {"checkpoint": 3}], ids=str)
@pytest.mark.parametrize(
    ("f", "init", "xs", "length"),
    [
        (lambda s, x: (jnp.stack([s, s]), x), jnp.ones(3), jnp.ones(5), None),
        (lambda s, x: (s.astype("f4"), x), jnp.ones(3), jnp.ones(5), None),
        (lambda s, x: ({"h": s}, x), jnp.ones(3), jnp.ones(5), None),
        (lambda s, x: s, jnp.ones(3), jnp.ones(5), None),
        (lambda s, x: (s, x), jnp.ones(3), {"a": jnp.ones(5), "b": jnp.ones(4)}, None),
        (lambda s, x: (s, x), jnp.ones(3), jnp.ones(5), 4),
        (lambda s, x: (s, x), jnp.ones(3), None, None),
        (lambda s, x: (s, x), jnp.ones(3), jnp.ones(()), None),
        pytest.param(3, jnp.ones(3), jnp.ones(5), None, marks=pytest.mark.other_types),
    ],
    ids=["shape", "dtype", "structure", "no pair", "lengths", "length", "no length", "no time", "no function"],
)
def test_errors_are_those_of_lax_scan(f, init, xs, length, options):
    with pytest.raises((TypeError, ValueError, IndexError)) as expected:
        lax.scan(f, init, xs, length)
    with pytest.raises(expected.type) as found:
        jaxseq.scan(f, init, xs, length, **options)
    assert str(found.value) == str(expected.value)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"truncation": 0}, ValueError, "`truncation`: expected an integer >= 1, a pair .* or None, got 0"),
        ({"truncation": (3, 2)}, ValueError, r"`truncation`: expected \(k1, k2\) with k2 >= k1"),
        pytest.param(
            {"truncation": 2.5}, TypeError, "`truncation`: expected an integer", marks=pytest.mark.other_types
        ),
        ({"checkpoint": 0}, ValueError, "`checkpoint`: expected an integer >= 1, .auto. .* or None, got 0"),
        ({"checkpoint": "sqrt"}, ValueError, "`checkpoint`: expected an integer >= 1, .auto. .* or None, got 'sqrt'"),
    ],
    ids=str,
)
def test_bad_options(options, kind, message):
    with pytest.raises(kind, match=message):
        jaxseq.scan(lambda s, x: (s, s), 0.0, jnp.ones(4), **options)


# --- Backward pass ---


def grown(T, **options):
    """Return a loss on a scan of T steps, and its arguments."""

    def loss(w, xs):
        f = lambda h, x: (jnp.tanh(h @ w + x), jnp.sum(h))  # noqa: E731
        h, ys = jaxseq.scan(f, jnp.zeros((8, 32), "f4"), xs, **options)
        return jnp.sum(h) + jnp.sum(ys)

    return loss, (jnp.zeros((32, 32), "f4"), jnp.zeros(T, "f4"))


@pytest.mark.parametrize("checkpoint", [None, 12])
def test_windows_go_back_side_by_side(checkpoint):
    """The backward loops run over the steps of a window and over groups; each product covers all windows of a group."""
    loss, args = grown(48, truncation=4, checkpoint=checkpoint)
    loops = [e for e in scans(jax.grad(loss, (0, 1)), *args) if e.params["reverse"]]
    groups = 1 if checkpoint is None else 4
    assert {e.params["length"] for e in loops} == {4, *([groups] if groups > 1 else [])}
    (sweep,) = [e for e in loops if not scans_within(e)]
    products = [
        v.aval.shape
        for e in subjaxprs(sweep.params["jaxpr"].jaxpr)
        if e.primitive.name == "dot_general"
        for v in e.invars
    ]
    assert any(12 // groups in shape for shape in products)


def scans_within(eqn):
    return [e for e in subjaxprs(eqn.params["jaxpr"].jaxpr) if e.primitive.name == "scan"]


def test_values_are_computed_once():
    """A program that computes only values has no axis of windows."""
    loss, args = grown(48, truncation=4)
    assert max(v.aval.ndim for e in scans(loss, *args) for v in e.params["jaxpr"].jaxpr.outvars) <= 2
    assert max(v.aval.ndim for e in scans(jax.grad(loss), *args) for v in e.params["jaxpr"].jaxpr.outvars) > 2


def test_no_gradient_crosses_a_boundary(key):
    params, h, u = inputs(key, 9)
    f = lambda h, x: (jnp.tanh(h @ params["w"] + x @ params["v"]), h)  # noqa: E731
    first = lambda h, u: jnp.sum(jnp.sin(jaxseq.scan(f, h, u, truncation=4)[1][5:8]))  # noqa: E731
    h_bar, u_bar = jax.grad(first, (0, 1))(h, u)
    assert not h_bar.any()
    assert not u_bar[:4].any()
    assert np.all(np.abs(u_bar[4:7]).max((1, 2)) > 0)


REACHES = [  # options, and the expected derivatives with respect to the initial state and to the increment a
    ({"truncation": (2, 4)}, (4, 17)),  # the second window reaches back to t = 0 and the initial state
    ({"truncation": 2, "checkpoint": 4}, (2, 9)),  # two windows at a time: no gradient crosses from one to the other
]


@pytest.mark.parametrize(("options", "expected"), REACHES, ids=str)
def test_how_far_back_windows_reach_by_hand(options, expected):
    """With s_t = s_{t-1} + a, the derivative of s_t with respect to a is the number of steps it reaches back; T = 6."""
    total = lambda s, a: jaxseq.scan(lambda s, _: (s + a, s + a), s, None, 6, **options)[1].sum()  # noqa: E731
    assert jax.grad(total, (0, 1))(0.0, 0.0) == expected


def temporary_bytes(T, **options):
    loss, args = grown(T, **options)
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in args]
    return jax.jit(jax.grad(loss)).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


def promised():
    """Yield T and the bytes of each column from the last table of docs/time.md."""
    text = (Path(__file__).parents[1] / "docs" / "time.md").read_text("utf-8")
    for row in re.findall(r"^\| ([\d ]+) \|(.*)\|$", text, flags=re.MULTILINE):
        yield int(row[0].replace(" ", "")), [1e6 * float(cell.split()[0]) for cell in row[1].split("|")]


COLUMNS = ({}, {"truncation": 50}, {"checkpoint": "auto"}, {"truncation": 50, "checkpoint": "auto"})
PROMISED = dict(promised())


@pytest.mark.parametrize("T", [pytest.param(T, marks=[pytest.mark.long] * (1000 < T < 1_000_000)) for T in PROMISED])
def test_temporary_bytes_are_what_the_docs_say(T):
    """Programs of up to a million steps, compiled, not run."""
    for options, expected in zip(COLUMNS, PROMISED[T], strict=True):
        assert 0.5 < temporary_bytes(T, **options) / expected <= 1.1, options  # newer JAX needs two thirds


def test_memory_of_auto_grows_like_the_root_of_time():
    for column in (2, 3):
        assert PROMISED[1_000_000][column] / PROMISED[1000][column] < 1.3 * 1000**0.5


def test_a_million_steps():
    """`checkpoint="auto"` runs a million steps in little memory."""
    f = lambda w, xs: jaxseq.scan(lambda s, x: (jnp.tanh(w * s + x), None), 0.0, xs, checkpoint="auto")[0]  # noqa: E731
    xs = jnp.linspace(-1.0, 1.0, 1_000_000)
    w_bar, x_bar = jax.jit(jax.grad(f, (0, 1)))(0.9, xs)
    s, ds = 0.0, 0.0
    for x in np.asarray(xs[-400:]):  # the influence of older steps is negligible
        s, ds = np.tanh(0.9 * s + x), (1 - np.tanh(0.9 * s + x) ** 2) * (s + 0.9 * ds)
    np.testing.assert_allclose(w_bar, ds, rtol=1e-9)
    assert x_bar[-1] > x_bar[-2] > x_bar[-10] > 0


# --- Steps of other libraries ---


def in_flax(key):
    nn = pytest.importorskip("flax.linen")
    cell = nn.GRUCell(5, param_dtype=jnp.float64)
    h = jax.random.normal(key, (2, 5))
    return cell.apply, cell.init(key, h, jnp.ones((2, 3))), h


def in_equinox(key):
    eqx = pytest.importorskip("equinox")
    params, static = eqx.partition(eqx.nn.GRUCell(3, 5, dtype=jnp.float64, key=key), eqx.is_array)

    def run(params, h, x):
        h = jax.vmap(eqx.combine(params, static))(x, h)
        return h, h

    return run, params, jax.random.normal(key, (2, 5))


def in_haiku(key):
    hk = pytest.importorskip("haiku")
    f = hk.without_apply_rng(hk.transform(lambda h, x: hk.VanillaRNN(5)(x, h)[::-1]))
    h = jax.random.normal(key, (2, 5))
    return f.apply, jax.tree.map(lambda a: a + 0.1, f.init(key, h, jnp.ones((2, 3)))), h


@pytest.mark.parametrize("make", [in_flax, in_equinox, in_haiku])
@pytest.mark.parametrize(
    "options",
    [pytest.param({"truncation": 3}, marks=pytest.mark.long), {"truncation": (2, 4), "checkpoint": 2}],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_steps_of_other_libraries(make, options, key):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        f, params, h = make(key)
        xs = jax.random.normal(key, (8, 2, 3))

        def loss(scan, params, h, xs):
            end, ys = scan(partial(f, params), h, xs, **options)
            return jnp.sum(jnp.sin(ys)) + jnp.sum(end**2)

        ours, reference_op = (
            jax.jit(jax.grad(partial(loss, scan), (0, 1, 2))) for scan in (jaxseq.scan, reference.scan)
        )
        assert_close(ours(params, h, xs), reference_op(params, h, xs), relative=1e-9)


def test_within_other_transformations(key):
    """Inside remat in a cond in a scan, differentiated under vmap."""
    params, h, u = inputs(key, 7)

    def loss(scan, params, h, u):
        f = lambda h, x: (jnp.tanh(h @ params["w"] + x @ params["v"]), h)  # noqa: E731
        g = jax.checkpoint(lambda h, u: scan(f, h, u, truncation=3)[0])
        many = lambda h, _: (lax.cond(jnp.sum(h) > 0, lambda h: g(h, u), lambda h: -g(h, u), h), None)  # noqa: E731
        return jnp.sum(jnp.sin(lax.scan(many, h, None, 2)[0]))

    gradients = lambda scan: jax.vmap(jax.grad(partial(loss, scan), (0, 1, 2)), (None, 0, None))  # noqa: E731
    args = params, jnp.stack([h, -h]), u
    assert_close(gradients(jaxseq.scan)(*args), gradients(reference.scan)(*args), relative=1e-9)
