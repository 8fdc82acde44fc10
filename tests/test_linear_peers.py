"""Linear cells: values and gradients against their papers in NumPy and SciPy, and against other libraries.

The other libraries are in the extra `peers`. `test_recurrentgemma.py` has one more.

Each library gets the parameters of jaxseq through differentiable operations of its own framework. Therefore its
gradients are those of the parameters of jaxseq.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, pullback
from peers import differences, in_torch, need
from scipy import linalg, signal
from scipy.special import expit

import jaxseq
from jaxseq import cells

T, B = 7, 2


# --- Arguments ---


class Layer(NamedTuple):
    """A cell, its parameters drawn by a function of normal draws, the shape of its state, and D."""

    cell: object
    params: object
    state: tuple[int, ...]
    features: int
    complex: bool = False


def ssm_maps(draw, D, H):
    return {"w_x": draw(D, 2 * H), "w_y": draw(2 * H, D), "skip": draw(D)}


def s5_params(draw, H=4):
    return cells.S5Params(real=-np.exp(draw(H)), imag=3 * draw(H), log_step=draw(H) - 1, **ssm_maps(draw, 3, H))


LAYERS = {
    "min_gru": Layer(cells.min_gru, lambda draw: cells.MinGRUParams(draw(3, 12), draw(12)), (6,), 3),
    "min_lstm": Layer(cells.min_lstm, lambda draw: cells.MinLSTMParams(draw(3, 18), draw(18)), (6,), 3),
    "lru": Layer(
        cells.lru,
        lambda draw: cells.LRUParams(nu=draw(4) - 1, theta=draw(4), gamma=draw(4), **ssm_maps(draw, 3, 4)),
        (4,),
        3,
        complex=True,
    ),
    "s5": Layer(cells.s5, s5_params, (4,), 3, complex=True),
    "s5_bilinear": Layer(cells.s5_bilinear, s5_params, (4,), 3, complex=True),
    "rg_lru": Layer(cells.rg_lru, lambda draw: cells.RGLRUParams(draw(12), draw(4, 3, 2, 3), draw(24)), (12,), 12),
    "selective_ssm": Layer(
        cells.selective_ssm,
        lambda draw: cells.SelectiveSSMParams(
            *(draw(*shape) for shape in ((5, 2), (2, 5), (5,), (5, 3), (5, 3), (5, 3), (5,)))
        ),
        (15,),
        5,
    ),
}


def problem(name, dtype=np.float64):
    """Return the function `recurrence` of a cell, its arguments and cotangents, all of them random and non-zero."""
    layer, generator = LAYERS[name], np.random.default_rng(list(name.encode()))

    def draw(*shape):
        return 0.5 * generator.standard_normal(shape)

    def state():
        parts = draw(2, B, *layer.state)
        return parts[0] + 1j * parts[1] if layer.complex else parts[0]

    args = layer.params(draw), state(), 2 * draw(T, B, layer.features)
    outputs = args[2].shape if layer.complex or name == "selective_ssm" else (T, B, *layer.state)
    cotangents = state(), draw(*outputs)
    cast = lambda a: jnp.asarray(a, np.complex128 if np.iscomplexobj(a) else dtype)  # noqa: E731
    return partial(jaxseq.recurrence, layer.cell), *jax.tree.map(cast, (args, cotangents))


# --- The equations of the papers, in NumPy: one example and one step at a time ---


def through_time(step, carry, xs):
    """Apply `step(h, x) -> (h, y)` of one example to all steps of all examples."""
    last, ys = [], []
    for n in range(B):
        h, outputs = carry[n], []
        for t in range(T):
            h, y = step(h, xs[t, n])
            outputs.append(y)
        last.append(h)
        ys.append(outputs)
    return np.array(last), np.stack(ys, 1)


def min_gru_of_paper(p, carry, xs):
    """Feng et al. (2024), section 3.1."""
    (w_z, w_h), (b_z, b_h) = np.split(p.w_x.T, 2), np.split(p.b, 2)

    def step(h, x):
        z = expit(w_z @ x + b_z)
        candidate = w_h @ x + b_h
        h = (1 - z) * h + z * candidate
        return h, h

    return through_time(step, carry, xs)


def min_lstm_of_paper(p, carry, xs):
    """Feng et al. (2024), section 3.2."""
    (w_f, w_i, w_h), (b_f, b_i, b_h) = np.split(p.w_x.T, 3), np.split(p.b, 3)

    def step(h, x):
        f, i = expit(w_f @ x + b_f), expit(w_i @ x + b_i)
        candidate = w_h @ x + b_h
        h = f / (f + i) * h + i / (f + i) * candidate
        return h, h

    return through_time(step, carry, xs)


def lru_of_paper(p, carry, xs):
    """Orvieto et al. (2023), the code of appendix A."""
    b_re, b_im = np.split(p.w_x.T, 2)
    c_re, c_im = np.split(p.w_y.T, 2, 1)
    factors = np.exp(-np.exp(p.nu) + 1j * np.exp(p.theta))
    b_norm = (b_re + 1j * b_im) * np.exp(p.gamma)[:, None]
    c = c_re + 1j * c_im

    def step(h, x):
        h = factors * h + b_norm @ x
        return h, (c @ h).real + p.skip * x

    return through_time(step, carry, xs)


def s5_of_paper(method, p, carry, xs):
    """Smith et al. (2023), section 3.2, without complex numbers: each pair of states is a real system of two.

    The state (Re h, Im h) of a pair has the real system matrix [[Re λ, -Im λ], [Im λ, Re λ]]. The conjugate state adds
    the same real part to the output again. Time is in units of the step of each pair.
    """
    b_re, b_im = np.split(p.w_x.T, 2)
    c_re, c_im = np.split(p.w_y.T, 2, 1)
    steps = np.exp(p.log_step)
    pairs = [[[re, -im], [im, re]] for re, im in zip(steps * p.real, steps * p.imag, strict=True)]
    a = linalg.block_diag(*pairs)
    b = np.repeat(steps, 2)[:, None] * np.stack([b_re, b_im], 1).reshape(len(a), -1)
    c = 2 * np.stack([c_re, -c_im], -1).reshape(-1, len(a))
    a, b = method(a, b)

    def step(h, x):
        h = a @ h + b @ x
        return h, c @ h + p.skip * x

    last, ys = through_time(step, np.stack([carry.real, carry.imag], -1).reshape(B, -1), xs)
    return last[:, ::2] + 1j * last[:, 1::2], ys


def zero_order_hold(a, b):
    """Return exp(A) and the integral of exp(A s) B for s from 0 to 1, which are parts of one matrix exponential."""
    n = len(a)
    block = linalg.expm(np.block([[a, b], [np.zeros((b.shape[1], n + b.shape[1]))]]))
    return block[:n, :n], block[:n, n:]


def bilinear(a, b):
    return signal.cont2discrete((a, b, np.eye(len(a)), np.zeros_like(b)), 1, method="bilinear")[:2]


def rg_lru_of_paper(p, carry, xs):
    """De et al. (2024), equations 1 to 4, with dense matrices of the gates."""
    w_r, w_i = (linalg.block_diag(*p.w_x[:, :, gate]).T for gate in range(2))
    b_r, b_i = np.split(p.b, 2)
    a = expit(p.rate)

    def step(h, x):
        r, i = expit(w_r @ x + b_r), expit(w_i @ x + b_i)
        a_t = a ** (8 * r)
        h = a_t * h + np.sqrt(1 - a_t**2) * (i * x)
        return h, h

    return through_time(step, carry, xs)


def selective_ssm_of_paper(p, carry, xs):
    """Gu and Dao (2023), algorithm 2, with Δ B for the discretized B, as their implementation has it."""
    a = -np.exp(p.log_rate)

    def step(h, x):
        delta = np.log1p(np.exp(p.b + p.w_up.T @ (p.w_step.T @ x)))
        b, c = p.w_in.T @ x, p.w_out.T @ x
        h = np.exp(delta[:, None] * a) * h.reshape(a.shape) + np.outer(delta * x, b)
        return h.reshape(-1), h @ c + p.skip * x

    return through_time(step, carry, xs)


PAPERS = {
    "min_gru": min_gru_of_paper,
    "min_lstm": min_lstm_of_paper,
    "lru": lru_of_paper,
    "s5": partial(s5_of_paper, zero_order_hold),
    "s5_bilinear": partial(s5_of_paper, bilinear),
    "rg_lru": rg_lru_of_paper,
    "selective_ssm": selective_ssm_of_paper,
}


@pytest.mark.parametrize("name", LAYERS)
def test_linear_cell_equals_its_paper(name):
    f, args, cotangents = problem(name)
    outputs, gradients = jax.jit(pullback(f))(args, cotangents)
    paper, in_numpy = PAPERS[name], jax.tree.map(np.asarray, (args, cotangents))
    assert_close(outputs, jax.tree.map(jnp.asarray, paper(*in_numpy[0])), relative=1e-13)
    assert_close(gradients, differences(paper, *in_numpy), relative=1e-9)


# --- Other libraries ---


def set_tensors(module, **tensors):
    """Replace parameters of a torch module by tensors, through which gradients flow."""
    for path, tensor in tensors.items():
        *owners, name = path.split("__")
        owner = module.get_submodule(".".join(owners))
        assert getattr(owner, name).shape == tensor.shape, path
        delattr(owner, name)
        setattr(owner, name, tensor)


def batch_major(run):
    """Turn a function whose xs and ys have the batch on the first axis into one that has time there."""

    def call(params, carry, xs):
        last, ys = run(params, carry, xs.swapaxes(0, 1))
        return last, ys.swapaxes(0, 1)

    return call


@pytest.mark.parametrize("form", ["parallel", "step by step"])
@pytest.mark.parametrize(("name", "kind"), [("min_gru", "minGRU"), ("min_lstm", "minLSTM")])
def test_minimal_rnns_equal_mingru_pytorch(name, kind, form):
    """Compare where its candidate, g(u) = u + 1/2 for u >= 0, is linear. It has no bias: x has a feature of ones."""
    torch, module = need(f"minGRU_pytorch.{kind}")
    f, ((w_x, b), carry, xs), cotangents = problem(name)
    params = type(LAYERS[name].params(lambda *s: np.zeros(s)))(w_x, b.at[-6:].add(6))  # candidates above 1/2
    args = params, jnp.abs(carry) + 0.6, xs  # it computes logarithms of states
    assert np.min(np.asarray(xs @ w_x)[..., -6:] + np.asarray(params.b)[-6:]) > 0.5
    outputs, gradients = jax.jit(pullback(f))(args, cotangents)

    @batch_major
    def theirs(p, h, xs):
        layer = getattr(module, kind)(4, expansion_factor=1.5, proj_out=False).double()
        rows = torch.cat([p.w_x, p.b[None]]).T  # gates of 6 rows: z, n or f, i, n; its candidate is the first
        shift = torch.zeros(6, 4, dtype=rows.dtype)
        shift[:, -1] = 0.5
        weight = torch.cat([rows[-6:] - shift, rows[:-6]])
        set_tensors(layer, **{f"to_hidden_and_{'gate' if kind == 'minGRU' else 'f_i_gate'}__weight": weight})
        xs, h = torch.cat([xs, torch.ones_like(xs[..., :1])], -1), h[:, None]
        if form == "parallel":
            # Here, but not step by step, its minLSTM applies g to the initial state.
            ys, h = layer(xs, h if kind == "minGRU" else h - 0.5, return_next_prev_hidden=True)
        else:
            ys = []
            for t in range(T):
                y, h = layer(xs[:, t : t + 1], h, return_next_prev_hidden=True)
                ys.append(y)
            ys = torch.cat(ys, 1)
        return h[:, 0], ys

    expected = in_torch(torch, theirs, args, cotangents)
    assert_close((outputs, gradients), expected)


def test_lru_equals_lru_pytorch():
    """Compare all but the final state, which it does not return."""
    torch, module = need("LRU_pytorch")
    f, args, (last_bar, ys_bar) = problem("lru")
    (_, ys), gradients = jax.jit(pullback(f))(args, (0 * last_bar, ys_bar))

    def theirs(p, carry, xs):
        layer = module.LRU(3, 3, 4)
        b, c = torch.complex(*p.w_x.T.chunk(2)), torch.complex(*p.w_y.T.chunk(2, 1))
        set_tensors(layer, nu_log=p.nu, theta_log=p.theta, gamma_log=p.gamma, B=b, C=c, D=torch.diag(p.skip))
        return None, torch.stack([layer(xs[:, n], carry[n]) for n in range(B)], 1)

    torch.set_default_dtype(torch.float64)  # of the outputs that it allocates
    try:
        (_, expected), its_gradients = in_torch(torch, theirs, args, (last_bar, ys_bar))
    finally:
        torch.set_default_dtype(torch.float32)
    assert_close((ys, gradients), (expected, its_gradients))


@pytest.mark.parametrize(("name", "rule"), [("s5", "discretize_zoh"), ("s5_bilinear", "discretize_bilinear")])
def test_s5_equals_s5_pytorch(name, rule):
    """Compare with all states, those of jaxseq and their conjugates, in place of the factor 2."""
    torch, module = need("s5.s5_model")
    f, args, cotangents = problem(name)
    outputs, gradients = jax.jit(pullback(f))(args, cotangents)

    def theirs(p, carry, xs):
        both = lambda a, axis=0: torch.cat([a, a.conj()], axis)  # noqa: E731
        b, c = torch.complex(*p.w_x.T.chunk(2)), torch.complex(*p.w_y.T.chunk(2, 1))
        a, b = getattr(module, rule)(both(torch.complex(p.real, p.imag)), both(b), p.log_step.exp().repeat(2))
        found = [module.apply_ssm(a, b, both(c, 1), p.skip, xs[:, n], both(carry[n])) for n in range(B)]
        return torch.stack([h[: len(p.real)] for _, h in found]), torch.stack([y for y, _ in found], 1)

    assert_close((outputs, gradients), in_torch(torch, theirs, args, cotangents))


@pytest.mark.parametrize("form", ["parallel", "in a loop", "step by step"])
def test_selective_ssm_equals_mambapy(form):
    """Compare the part of its block between the convolution and the gate. It rounds A to float32."""
    torch, module = need("mambapy.mamba")
    f, args, cotangents = problem("selective_ssm")
    if form != "step by step":  # it starts with a state of zero, and does not return the last one
        args, cotangents = (args[0], 0 * args[1], args[2]), (0 * cotangents[0], cotangents[1])
    (last, ys), (p_bar, carry_bar, xs_bar) = jax.jit(pullback(f))(args, cotangents)

    @batch_major
    def theirs(p, carry, xs):
        config = module.MambaConfig(5, 1, dt_rank=2, d_state=3, expand_factor=1, pscan=form == "parallel")
        block = module.MambaBlock(config)
        maps = {"x_proj__weight": torch.cat([p.w_step, p.w_in, p.w_out], 1).T, "dt_proj__weight": p.w_up.T}
        set_tensors(block, **maps, dt_proj__bias=p.b, A_log=p.log_rate, D=p.skip)
        if form != "step by step":
            return None, block.ssm(xs, None)
        h, ys = carry.reshape(B, 5, 3), []
        for t in range(T):
            y, h = block.ssm_step(xs[:, t], h)
            ys.append(y)
        return h.reshape(B, 15), torch.stack(ys, 1)

    (its_last, its_ys), (its_p_bar, its_carry_bar, its_xs_bar) = in_torch(torch, theirs, args, cotangents)
    assert_close((ys, p_bar, xs_bar), (its_ys, its_p_bar, its_xs_bar), relative=1e-6)
    if form == "step by step":
        assert_close((last, carry_bar), (its_last, its_carry_bar), relative=1e-6)
