"""`mlstm` and `qrnn`: against their papers in NumPy and their reference implementations."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, mesh_of, place, pullback, scans, subjaxprs
from jax.sharding import PartitionSpec as P
from peers import differences, layer_problem
from scipy.special import expit

import jaxseq
from jaxseq import tuning
from tests.support import hlo

LAYERS = {"mlstm": (jaxseq.mlstm, jaxseq.reference.mlstm), "qrnn": (jaxseq.qrnn, jaxseq.reference.qrnn)}


# --- The equations of the papers, in NumPy: one example and one step at a time, without a stabilizer ---


def mlstm_of_paper(p, carry, xs, wide=np.float64):
    """Beck et al. (2024), equations 19 to 27. The state is not scaled: exp(m) C, exp(m) n."""
    cs, ns, ms = (a.astype(wide) for a in carry)
    size, ys = p.w_k.shape[-1], np.zeros((*xs.shape[:2], *p.w_v.shape[1:]), wide)
    out_c, out_n = np.zeros_like(cs), np.zeros_like(ns)
    for b, h in np.ndindex(cs.shape[:2]):
        c, n = np.exp(ms[b, h]) * cs[b, h], np.exp(ms[b, h]) * ns[b, h]
        for t, x in enumerate(xs[:, b].astype(wide)):
            q, k, v = x @ p.w_q[:, h], x @ p.w_k[:, h] / np.sqrt(size), x @ p.w_v[:, h]
            i, f = np.exp(x @ p.w_i[:, h] + p.b_i[h]), 1 / (1 + np.exp(-x @ p.w_f[:, h] - p.b_f[h]))
            o = 1 / (1 + np.exp(-x @ p.w_o[:, h] - p.b_o[h]))
            c, n = f * c + i * np.outer(k, v), f * n + i * k
            ys[t, b, h] = o * (q @ c) / max(abs(n @ q), 1)
        out_c[b, h], out_n[b, h] = c, n
    return (out_c, out_n), ys.reshape(*ys.shape[:2], -1)


def unscaled(f):
    """Return a function whose state is (exp(m) C, exp(m) n)."""

    def call(*args):
        (c, n, m), ys = f(*args)
        scale = jnp.exp(m)
        return (scale[..., None, None] * c, scale[..., None] * n), ys

    return call


def qrnn_of_paper(p, carry, xs):
    """Bradbury et al. (2017), equations 1 to 3."""
    taps, features = len(p.kernel), p.kernel.shape[-1] // 3
    ys, pasts, cs = np.zeros((*xs.shape[:2], features)), [], []
    for b in range(xs.shape[1]):
        inputs, c = np.concatenate([carry.past[b], xs[:, b]]), carry.c[b]
        for t in range(len(xs)):
            u = sum(inputs[t + k] @ p.kernel[k] for k in range(taps)) + p.bias
            z, f, o = np.tanh(u[:features]), expit(u[features : 2 * features]), expit(u[2 * features :])
            c = f * c + (1 - f) * z
            ys[t, b] = o * c
        pasts.append(inputs[len(xs) :])
        cs.append(c)
    return jaxseq.QRNNState(np.array(pasts), np.array(cs)), ys


@pytest.mark.parametrize("name", LAYERS)
def test_layer_equals_its_paper(name):
    """The chunks of mLSTM have 3 steps, and the last one has one."""
    args, (state_bar, ys_bar) = layer_problem(name)
    if name == "mlstm":
        f, paper = unscaled(partial(jaxseq.mlstm, checkpoint=3)), mlstm_of_paper
        cotangents = (state_bar.c, state_bar.n), ys_bar
    else:
        f, paper, cotangents = jaxseq.qrnn, qrnn_of_paper, (state_bar, ys_bar)
    outputs, gradients = jax.jit(pullback(f))(args, cotangents)
    in_numpy = jax.tree.map(np.asarray, args)
    assert_close(outputs, jax.tree.map(jnp.asarray, paper(*in_numpy)), relative=1e-13)
    flat = lambda *args: jax.tree.leaves(paper(*args))  # noqa: E731
    assert_close(gradients, differences(flat, in_numpy, jax.tree.leaves(cotangents)), relative=1e-8)


def test_large_exponents_do_not_overflow():
    """Input gates of exp(900), between others of exp(-900): NumPy computes them in extended precision."""
    (params, carry, xs), _ = layer_problem("mlstm", steps=40, exponent=0.0)
    params = params._replace(w_i=900 * jnp.sign(params.w_i), w_f=3 * params.w_f)
    args = params, carry, jnp.clip(xs, -1, 1) / 3
    _, ys = jax.jit(partial(jaxseq.mlstm, checkpoint=8))(*args)
    _, expected = mlstm_of_paper(*jax.tree.map(lambda a: np.asarray(a, np.longdouble), args), wide=np.longdouble)
    assert_close(ys, jnp.asarray(expected.astype(np.float64)), relative=1e-11)


# --- In float32, at realistic sizes ---


def test_mlstm_in_float32_keeps_the_digits_of_the_gates():
    """Forget gates of exp(-30) before others near one: differences of running sums would lose three digits."""
    (params, carry, xs), cotangents = layer_problem("mlstm", steps=200, batch=3, sizes=(16, 2, 16, 32))
    params = params._replace(w_f=0.2 * params.w_f, b_f=jnp.array([4.0, 5.0]))
    xs = xs.at[::7, :, 0].set(150.0)
    w_f = params.w_f.at[0].set(-0.2)
    scale = jnp.ones(16).at[0].set(0.0)  # the large feature reaches the forget gates only
    weights = {f: w * scale.reshape(-1, *[1] * (w.ndim - 1)) for f, w in params._asdict().items() if f[0] == "w"}
    args = params._replace(**weights | {"w_f": w_f}), carry, xs
    wide = jax.jit(pullback(jaxseq.reference.mlstm))(args, cotangents)
    narrow = jax.tree.map(lambda a: a.astype(jnp.float32), (args, cotangents))
    found = jax.tree.map(lambda a: a.astype(jnp.float64), jax.jit(pullback(jaxseq.mlstm))(*narrow))
    assert_close(found[0], wide[0], relative=3e-6)
    assert_close(found[1], wide[1], relative=3e-5)


@pytest.mark.parametrize("bias", [50.0, 85.0])
@pytest.mark.parametrize("options", [{"lengths": jnp.array([5, 3])}, {"truncation": 3}], ids=["lengths", "truncation"])
def test_padding_after_large_exponents_has_no_gradient(bias, options):
    """The square of exp(-m) underflows in float32 from m = 44 on, and padding has a denominator of zero."""
    (params, carry, xs), cotangents = layer_problem("mlstm", steps=5, exponent=bias)
    wide = (params, carry._replace(m=carry.m + bias), xs), cotangents
    narrow = jax.tree.map(lambda a: a.astype(jnp.float32), wide)
    op, reference = (jax.jit(pullback(partial(f, **options))) for f in (jaxseq.mlstm, jaxseq.reference.mlstm))
    ours = jax.tree.map(lambda a: a.astype(jnp.float64), op(*narrow))
    assert_close(ours[1], reference(*wide)[1], relative=1e-3)  # an exponent of 85 is rounded by 4e-6


def test_steps_without_any_term():
    """A step of zeros has an output of zero for any m, and m = -inf is a state without terms."""
    (params, carry, xs), _ = layer_problem("mlstm", exponent=1000.0)
    _, ys = jaxseq.mlstm(params, None, xs.at[2].set(0).astype(jnp.float32))
    assert not ys[2].any()
    assert jnp.isfinite(ys).all()
    nothing = jax.tree.map(jnp.zeros_like, carry)._replace(m=jnp.full_like(carry.m, -jnp.inf))
    end, _ = jaxseq.mlstm(params, nothing, xs, lengths=jnp.array([0, 7]))
    assert_close(jax.tree.map(lambda a: a[0], end[:2]), jax.tree.map(lambda a: a[0], nothing[:2]), relative=0)
    assert jnp.isneginf(end.m[0]).all()


# --- Options ---

COMBINATIONS = [
    {"reverse": True, "truncation": (3, 7), "checkpoint": 2},
    {"reverse": True, "truncation": 4, "time_axis": 1},
    {"truncation": (2, 9)},
]


@pytest.mark.parametrize("options", COMBINATIONS, ids=", ".join)
@pytest.mark.parametrize("name", LAYERS)
def test_options_together_with_lengths_and_resets(name, options):
    """One sequence is empty, one has all steps, and truncation windows do not divide them."""
    (params, carry, xs), cotangents = layer_problem(name, steps=11, batch=4)
    lengths = jnp.array([11, 0, 8, 5])
    resets = jnp.zeros((11, 4), bool).at[jnp.array([3, 4, 10, 7, 9]), jnp.array([0, 0, 0, 2, 3])].set(True)
    xs = xs.at[5:, 3].set(jnp.nan)  # padding
    if options.get("time_axis"):
        xs, resets = xs.swapaxes(0, 1), resets.swapaxes(0, 1)
        cotangents = cotangents[0], cotangents[1].swapaxes(0, 1)
    op, reference = (partial(f, lengths=lengths, resets=resets, **options) for f in LAYERS[name])
    ours, expected = (jax.jit(pullback(f))((params, carry, xs), cotangents) for f in (op, reference))
    assert_close(ours, expected, relative=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_parts_and_single_steps_are_the_whole_sequence(name):
    (params, carry, xs), _ = layer_problem(name)
    op, cell = LAYERS[name][0], getattr(jaxseq, f"{name}_cell")
    end, ys = op(params, carry, xs)
    state, parts = carry, []
    for part in (xs[:3], xs[3:]):
        state, y = op(params, state, part)
        parts.append(y)
    assert_close((state, jnp.concatenate(parts)), (end, ys), relative=1e-13)
    state, steps = carry, []
    for x in xs:
        state, y = cell(params, state, x)
        steps.append(y)
    assert_close((state, jnp.stack(steps)), (end, ys), relative=1e-13)
    empty, nothing = op(params, carry, xs[:0])
    assert_close(empty, carry, relative=0)
    assert nothing.shape == (0, *ys.shape[1:])


@pytest.mark.parametrize("name", LAYERS)
def test_a_reset_stops_nan_in_the_carry(name):
    (params, carry, xs), cotangents = layer_problem(name)
    bad = jax.tree.map(lambda a: a.at[0].set(jnp.nan), carry)
    resets = jnp.zeros((7, 2), bool).at[0].set(True)
    f = jax.jit(pullback(partial(LAYERS[name][0], resets=resets)))
    (ours, gradients), (expected, of_expected) = (f((params, c, xs), cotangents) for c in (bad, carry))
    assert_close(ours, expected, relative=0)
    assert_close(gradients, of_expected, relative=0)
    assert not any(jnp.any(a) for a in jax.tree.leaves(gradients[1]))


# --- What the backward pass does ---


def test_mlstm_stores_the_memory_before_each_chunk_only():
    steps = 96
    args, cotangents = layer_problem("mlstm", steps, sizes=(8, 2, 16, 16))
    size, chunks = args[1].c.size, steps // tuning.LinearTuning().memory_steps

    def largest(f):
        jaxpr = jax.make_jaxpr(pullback(f))(args, cotangents).jaxpr
        return max(v.aval.size for e in subjaxprs(jaxpr) for v in e.outvars if v.aval.shape[-2:] == (16, 16))

    assert largest(jaxseq.mlstm) == chunks * size
    assert largest(jaxseq.reference.mlstm) >= steps * size  # what JAX stores, step by step
    assert [e.params["length"] for e in scans(pullback(jaxseq.mlstm), args, cotangents)] == [chunks, chunks]


@pytest.mark.eight_devices
@pytest.mark.parametrize("kind", ["explicit", "auto"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_batch_over_devices_has_no_collective_in_a_loop(name, kind):
    args, cotangents = layer_problem(name, steps=70, batch=4)
    f, mesh = jax.jit(pullback(LAYERS[name][0])), mesh_of((4, 2), ("b", "idle"), kind)
    expected = f(args, cotangents)
    of_batch = lambda tree: jax.tree.map(lambda _: P("b"), tree)  # noqa: E731
    specs = ((jax.tree.map(lambda _: P(), args[0]), of_batch(args[1]), P(None, "b")), (of_batch(args[1]), P(None, "b")))
    with jax.set_mesh(mesh):
        compiled = f.lower(*(placed := place(mesh, (args, cotangents), specs))).compile()
        found = compiled(*placed)
    assert_close(jax.tree.map(np.asarray, found), jax.tree.map(np.asarray, expected), relative=1e-10)
    assert {c.loops for c in hlo.collectives(compiled.as_text())} <= {0}


# --- Initializers, states, errors ---


def test_initial_values_of_mlstm():
    params = jaxseq.mlstm_init(jax.random.key(0), 400, 12, heads=3, key_size=50)
    assert [params.w_q.shape, params.w_k.shape, params.w_v.shape] == [(400, 3, 50), (400, 3, 50), (400, 3, 4)]
    np.testing.assert_allclose(jnp.std(params.w_q), 0.05, rtol=0.02)
    np.testing.assert_allclose(params.b_f, [3, 4.5, 6])
    assert not params.w_i.any()
    assert not params.w_f.any()
    assert 0 < jnp.max(jnp.abs(params.b_i)) < 0.4
    none = jaxseq.mlstm_init(jax.random.key(0), 4, 12, use_bias=False, w_x_init=jax.nn.initializers.ones)
    assert none.b_i is none.b_f is none.b_o is None
    assert (none.w_o == 1).all()


@pytest.mark.parametrize("name", LAYERS)
def test_initial_values_can_be_donated(name):
    params = getattr(jaxseq, f"{name}_init")(jax.random.key(0), 3, 8)
    jax.jit(lambda p: jax.tree.map(lambda a: a + 1, p), donate_argnums=0)(params)


def test_initial_values_of_qrnn():
    params = jaxseq.qrnn_init(jax.random.key(0), 100, 40, kernel_size=4)
    assert params.kernel.shape == (4, 100, 120)
    np.testing.assert_allclose(jnp.std(params.kernel), 0.05, rtol=0.02)
    assert jaxseq.qrnn_init(jax.random.key(0), 3, 5, use_bias=False, kernel_init=jax.nn.initializers.ones).bias is None


@pytest.mark.parametrize("name", LAYERS)
def test_layers_in_stack_and_zero_state(name):
    init, op, key = getattr(jaxseq, f"{name}_init"), LAYERS[name][0], jax.random.key(1)
    params = jaxseq.stack_init(init, key, 3, [6, 4])
    xs = jax.random.normal(key, (9, 2, 3), jnp.float32)
    carries, ys = jaxseq.stack(op, params, None, xs)
    assert_close(carries, jaxseq.stack(op, params, jaxseq.zero_state(params, 2), xs)[0], relative=0)
    _, middle = op(params[0], None, xs)
    assert_close(ys, op(params[1], None, middle)[1], relative=1e-6)
    both = jaxseq.bidirectional(op, (params[0], params[0]), None, xs)[1]
    assert_close(both[..., 6:], op(params[0], None, xs[::-1])[1][::-1], relative=1e-6)


def test_explain_says_how_many_steps_are_computed_at_once():
    (params, carry, xs), _ = layer_problem("mlstm", steps=70)
    text = str(jaxseq.explain(jaxseq.mlstm, params, carry, xs))
    assert "32 steps at once" in text
    assert "5 steps at once" in str(jaxseq.explain(partial(jaxseq.mlstm, checkpoint=5), params, carry, xs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w_k": jnp.zeros((3, 2, 5))}, r"params\.w_k.*\(D, N, K\).*K = 4.*\(3, 2, 5\)"),
        ({"w_v": None}, r"params\.w_v.*None"),
        ({"b_f": jnp.zeros(3)}, r"params\.b_f.*\(3,\)"),
        ({"w_q": jnp.zeros((3, 2, 4), int)}, r"params\.w_q.*float"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_wrong_parameters_are_named(change, message):
    (params, carry, xs), _ = layer_problem("mlstm")
    with pytest.raises((TypeError, ValueError), match=message):
        jaxseq.mlstm(params._replace(**change), carry, xs)


@pytest.mark.other_types
def test_other_wrong_arguments():
    (params, carry, xs), _ = layer_problem("mlstm")
    with pytest.raises(ValueError, match=r"carry\.n.*\(2, 2, 4\).*\(2, 2, 3\)"):
        jaxseq.mlstm(params, carry._replace(n=carry.n[..., :3]), xs)
    with pytest.raises(TypeError, match=r"carry.*MLSTMState"):
        jaxseq.mlstm(params, carry.c, xs)
    with pytest.raises(ValueError, match="3 features"):
        jaxseq.mlstm(params, carry, xs[..., :2])
    with pytest.raises(TypeError, match="unexpected keyword argument 'zoneout'"):
        jaxseq.mlstm(params, carry, xs, zoneout=0.1)
    (params, carry, xs), _ = layer_problem("qrnn")
    with pytest.raises(ValueError, match=r"params\.kernel.*one tap"):
        jaxseq.qrnn(params._replace(kernel=params.kernel[:0]), carry, xs)
    with pytest.raises(ValueError, match=r"params\.kernel.*\(K, D, 3\*H\), got"):
        jaxseq.qrnn(params._replace(kernel=params.kernel[0]), carry, xs)
    with pytest.raises(ValueError, match=r"carry\.past.*\(2, 1, 3\)"):
        jaxseq.qrnn(params, carry._replace(past=carry.past[:, :0]), xs)
    with pytest.raises(ValueError, match="heads"):
        jaxseq.mlstm_init(jax.random.key(0), 3, 7, heads=2)
