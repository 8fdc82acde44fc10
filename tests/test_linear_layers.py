"""`mlstm` and `qrnn`: against their papers in NumPy, another library, and their reference implementations."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, pullback, scans, subjaxprs
from peers import differences, in_torch, need
from scipy.special import expit

import jaxseq
from jaxseq import tuning

LAYERS = {"mlstm": (jaxseq.mlstm, jaxseq.reference.mlstm), "qrnn": (jaxseq.qrnn, jaxseq.reference.qrnn)}


def problem(name, steps=7, batch=2, sizes=(3, 2, 4, 3), exponent=0.0):
    """Return random parameters, carry, inputs and cotangents of D, N, K, V, or of D, K taps and H, in float64."""
    generator = np.random.default_rng(list(name.encode()))
    draw = lambda *shape: jnp.asarray(0.6 * generator.standard_normal(shape))  # noqa: E731
    if name == "mlstm":
        D, N, K, V = sizes
        params = jaxseq.MLSTMParams(
            w_q=draw(D, N, K),
            w_k=draw(D, N, K),
            w_v=draw(D, N, V),
            w_i=2 * draw(D, N),
            w_f=2 * draw(D, N),
            w_o=draw(D, N, V),
            b_i=draw(N) + exponent,
            b_f=draw(N),
            b_o=draw(N, V),
        )
        state = lambda: jaxseq.MLSTMState(draw(batch, N, K, V), draw(batch, N, K), draw(batch, N))  # noqa: E731
        features = N * V
    else:
        D, taps, features = sizes[:3]
        params = jaxseq.QRNNParams(draw(taps, D, 3 * features), draw(3 * features))
        state = lambda: jaxseq.QRNNState(draw(batch, taps - 1, D), draw(batch, features))  # noqa: E731
    return (params, state(), draw(steps, batch, D)), (state(), draw(steps, batch, features))


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
    return (np.array(pasts), np.array(cs)), ys


@pytest.mark.parametrize("name", LAYERS)
def test_layer_equals_its_paper(name):
    """The chunks of mLSTM have 3 steps, and the last one has one."""
    args, (state_bar, ys_bar) = problem(name)
    if name == "mlstm":
        f, paper = unscaled(partial(jaxseq.mlstm, checkpoint=3)), mlstm_of_paper
        cotangents = (*state_bar[:2],), ys_bar
    else:
        f, paper, cotangents = lambda *args: (lambda s, y: ((*s,), y))(*jaxseq.qrnn(*args)), qrnn_of_paper, None
        cotangents = (*state_bar,), ys_bar
    outputs, gradients = jax.jit(pullback(f))(args, cotangents)
    in_numpy = jax.tree.map(np.asarray, args)
    assert_close(outputs, jax.tree.map(jnp.asarray, paper(*in_numpy)), relative=1e-13)
    flat = lambda *args: jax.tree.leaves(paper(*args))  # noqa: E731
    assert_close(gradients, differences(flat, in_numpy, jax.tree.leaves(cotangents)), relative=1e-8)


def test_large_exponents_do_not_overflow():
    """Input gates of exp(900), between others of exp(-900): NumPy computes them in extended precision."""
    (params, carry, xs), _ = problem("mlstm", steps=40, exponent=0.0)
    params = params._replace(w_i=900 * jnp.sign(params.w_i), w_f=3 * params.w_f)
    args = params, carry, jnp.clip(xs, -1, 1) / 3
    _, ys = jax.jit(partial(jaxseq.mlstm, checkpoint=8))(*args)
    _, expected = mlstm_of_paper(*jax.tree.map(lambda a: np.asarray(a, np.longdouble), args), wide=np.longdouble)
    assert_close(ys, jnp.asarray(expected.astype(np.float64)), relative=1e-11)


def test_mlstm_equals_mlstm_kernels():
    """The authors' loop over steps, with its state, in float64 and without its epsilon."""
    torch, module = need("mlstm_kernels.torch.recurrent.native_sequence")
    args, (state_bar, ys_bar) = problem("mlstm")
    outputs, gradients = jax.jit(pullback(partial(jaxseq.mlstm, checkpoint=4)))(args, (state_bar, ys_bar))

    def theirs(p, carry, xs):
        heads = lambda w: torch.einsum("tbd,dnk->bntk", xs, w)  # noqa: E731
        gates = lambda w, b: torch.einsum("tbd,dn->bnt", xs, w) + b[:, None]  # noqa: E731
        hs, (c, n, m) = module.mlstm_recurrent_sequence__native_fw(
            *(heads(w) for w in (p.w_q, p.w_k, p.w_v)),
            gates(p.w_i, p.b_i),
            gates(p.w_f, p.b_f),
            c_initial=carry.c,
            n_initial=carry.n,
            m_initial=carry.m[..., None],
            return_last_states=True,
            eps=0.0,
            dtype_state=torch.float64,
        )
        ys = torch.sigmoid(heads(p.w_o) + p.b_o[:, None]) * hs
        return c, n, m[..., 0], ys.permute(2, 0, 1, 3).reshape(*xs.shape[:2], -1)

    # It scales q in place of k, so the memory is larger by sqrt(K).
    scale = args[0].w_k.shape[-1] ** 0.5
    of_theirs = jaxseq.MLSTMState(carry_c := args[1].c, args[1].n, args[1].m)
    del carry_c
    scaled = (args[0], of_theirs._replace(c=scale * args[1].c, n=scale * args[1].n), args[2])
    found, bars = in_torch(torch, theirs, scaled, (state_bar.c / scale, state_bar.n / scale, state_bar.m, ys_bar))
    expected = jaxseq.MLSTMState(found[0] / scale, found[1] / scale, found[2]), found[3]
    assert_close(outputs, expected, relative=1e-13)
    carry_bar = bars[1]._replace(c=scale * bars[1].c, n=scale * bars[1].n)
    assert_close(gradients, (bars[0], carry_bar, bars[2]), relative=1e-12)


# --- In float32, at realistic sizes ---


def test_mlstm_in_float32_keeps_the_digits_of_the_gates():
    """Forget gates of exp(-30) before others near one: differences of running sums would lose three digits."""
    (params, carry, xs), cotangents = problem("mlstm", steps=200, batch=3, sizes=(16, 2, 16, 32))
    params = params._replace(w_f=0.2 * params.w_f, b_f=jnp.array([4.0, 5.0]))
    xs = xs.at[::7, :, 0].set(150.0)
    w_f = params.w_f.at[0].set(-0.2)
    scale = jnp.ones(16).at[0].set(0.0)  # the large feature reaches the forget gates only
    weights = {f: w * scale.reshape(-1, *[1] * (w.ndim - 1)) for f, w in params._asdict().items() if f[0] == "w"}
    args = params._replace(**weights | {"w_f": w_f}), carry, xs
    wide = jax.jit(pullback(jaxseq.reference.mlstm))(args, cotangents)
    narrow = jax.tree.map(lambda a: a.astype(jnp.float32), (args, cotangents))
    assert_close(jax.jit(pullback(jaxseq.mlstm))(*narrow), wide, relative=3e-6)


# --- Options ---

COMBINATIONS = [
    {"reverse": True, "truncation": (3, 7), "checkpoint": 2},
    {"reverse": True, "truncation": 4, "time_axis": 1},
    {"truncation": (2, 9)},
]


@pytest.mark.parametrize("options", COMBINATIONS, ids=lambda o: ", ".join(o))
@pytest.mark.parametrize("name", LAYERS)
def test_options_together_with_lengths_and_resets(name, options):
    """One sequence is empty, one has all steps, and truncation windows do not divide them."""
    (params, carry, xs), cotangents = problem(name, steps=11, batch=4)
    lengths = jnp.array([11, 0, 8, 5])
    resets = jnp.zeros((11, 4), bool).at[jnp.array([3, 4, 7, 9]), jnp.array([0, 0, 2, 3])].set(True)
    xs = xs.at[5:, 3].set(jnp.nan)  # padding
    if options.get("time_axis"):
        xs, resets = xs.swapaxes(0, 1), resets.swapaxes(0, 1)
        cotangents = cotangents[0], cotangents[1].swapaxes(0, 1)
    op, reference = (partial(f, lengths=lengths, resets=resets, **options) for f in LAYERS[name])
    ours, expected = (jax.jit(pullback(f))((params, carry, xs), cotangents) for f in (op, reference))
    assert_close(ours, expected, relative=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_parts_and_single_steps_are_the_whole_sequence(name):
    (params, carry, xs), _ = problem(name)
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
    (params, carry, xs), cotangents = problem(name)
    bad = jax.tree.map(lambda a: a.at[0].set(jnp.nan), carry)
    resets = jnp.zeros((7, 2), bool).at[0].set(True)
    f = jax.jit(pullback(partial(LAYERS[name][0], resets=resets)))
    (ours, gradients), (expected, of_expected) = (f((params, c, xs), cotangents) for c in (bad, carry))
    assert_close(ours, expected, relative=0)
    assert_close(gradients, of_expected, relative=0)
    assert not any(jnp.any(a) for a in jax.tree.leaves(gradients[1]))


# --- What the backward pass does ---


def test_mlstm_stores_the_memory_before_each_chunk_only():
    steps, (args, cotangents) = 96, problem("mlstm", steps=96, sizes=(8, 2, 16, 16))
    size = args[1].c.size
    chunks = steps // tuning.LinearTuning().memory_steps

    def largest(f):
        jaxpr = jax.make_jaxpr(pullback(f))(args, cotangents).jaxpr
        return max(v.aval.size for e in subjaxprs(jaxpr) for v in e.outvars if v.aval.shape[-2:] == (16, 16))

    assert largest(jaxseq.mlstm) == chunks * size
    assert largest(jaxseq.reference.mlstm) >= steps * size  # what JAX stores, step by step
    assert sorted(scans(pullback(jaxseq.mlstm), args, cotangents)) == [chunks, chunks]


def test_no_collective_in_a_loop_if_the_batch_is_sharded():
    ...
