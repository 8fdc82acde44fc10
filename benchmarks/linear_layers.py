"""Layers of linear cells without jaxseq: in plain JAX, in torch, and with the scans of recurrentgemma and mambapy.

The equations below are those of `jaxseq.cells`, written for `jax.numpy` and torch at once: `xp` is one of the two. Each
cell has `coefficients(xp, p, x) -> (a, v)` of the recurrence h_t = a_t h_{t-1} + v_t, and `output(xp, p, h, x) -> y`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import harness
from benchmarks.harness import Candidate
from jaxseq import MLSTMState

Function = Callable[..., Any]


class Equations(NamedTuple):
    """The equations of a cell. `output=None` is y = h."""

    coefficients: Function
    output: Function | None = None


def sigmoid(xp: Any, u: Any) -> Any:
    return 1 / (1 + xp.exp(-u))


def halves(u: Any) -> tuple[Any, Any]:
    size = u.shape[-1] // 2
    return u[..., :size], u[..., size:]


def min_gru(xp: Any, p: Any, x: Any) -> tuple[Any, Any]:
    z, candidate = halves(x @ p.w_x + p.b)
    z = sigmoid(xp, z)
    return 1 - z, z * candidate


def lru(xp: Any, p: Any, x: Any) -> tuple[Any, Any]:
    re, im = halves(x @ p.w_x)
    return xp.exp(-xp.exp(p.nu) + 1j * xp.exp(p.theta)), xp.exp(p.gamma) * (re + 1j * im)


def s5(xp: Any, p: Any, x: Any) -> tuple[Any, Any]:
    re, im = halves(x @ p.w_x)
    eigenvalues = p.real + 1j * p.imag
    a = xp.exp(eigenvalues * xp.exp(p.log_step))
    return a, (a - 1) / eigenvalues * (re + 1j * im)


def output_of_ssm(factor: int) -> Function:
    def output(xp: Any, p: Any, h: Any, x: Any) -> Any:
        size = h.shape[-1]
        return factor * (h.real @ p.w_y[:size] - h.imag @ p.w_y[size:]) + p.skip * x

    return output


def rg_lru(xp: Any, p: Any, x: Any) -> tuple[Any, Any]:
    blocks, size = p.w_x.shape[:2]
    u = xp.einsum("tbni,nigj->tbgnj", x.reshape(*x.shape[:2], blocks, size), p.w_x)
    r, i = halves(sigmoid(xp, u.reshape(*x.shape[:2], -1) + p.b))
    log_a = -8 * r * xp.log1p(xp.exp(-p.rate))
    return xp.exp(log_a), xp.sqrt(-xp.expm1(2 * log_a)) * i * x


def selective_ssm(xp: Any, p: Any, x: Any) -> tuple[Any, Any]:
    step = xp.log1p(xp.exp(x @ p.w_step @ p.w_up + p.b))
    a = xp.exp(-step[..., None] * xp.exp(p.log_rate))
    v = (step * x)[..., None] * (x @ p.w_in)[..., None, :]
    return a.reshape(*x.shape[:2], -1), v.reshape(*x.shape[:2], -1)


def output_of_selective_ssm(xp: Any, p: Any, h: Any, x: Any) -> Any:
    return xp.einsum("tbdn,tbn->tbd", h.reshape(*x.shape, -1), x @ p.w_out) + p.skip * x


EQUATIONS = {
    "min_gru": Equations(min_gru),
    "lru": Equations(lru, output_of_ssm(1)),
    "s5": Equations(s5, output_of_ssm(2)),
    "rg_lru": Equations(rg_lru),
    "selective_ssm": Equations(selective_ssm, output_of_selective_ssm),
}


# --- JAX ---


def in_jax(name: str, solve: Function) -> Function:
    """Return the layer `(params, carry, xs) -> (carry, ys)` with `solve(a, carry, v) -> (last, hs)`."""
    equations = EQUATIONS[name]

    def layer(params: Any, carry: jax.Array, xs: jax.Array) -> tuple[jax.Array, jax.Array]:
        a, v = equations.coefficients(jnp, params, xs)
        last, hs = solve(a, carry, v)
        return last, hs if equations.output is None else equations.output(jnp, params, hs, xs)

    return layer


def in_a_scan(a: jax.Array, carry: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Solve with `lax.scan`. If a is constant in time, it is not an input of the loop."""
    varies = a.ndim == v.ndim

    def step(h: jax.Array, at: Any) -> tuple[jax.Array, jax.Array]:
        h = at[0] * h + at[1] if varies else a * h + at
        return h, h

    return lax.scan(step, carry, (a, v) if varies else v)


def in_an_associative_scan(a: jax.Array, carry: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Solve with `lax.associative_scan`."""

    def pair(left: Any, right: Any) -> Any:
        return left[0] * right[0], right[0] * left[1] + right[1]

    a = jnp.broadcast_to(a, v.shape)
    _, hs = lax.associative_scan(pair, (a, v.at[0].add(a[0] * carry)))
    return hs[-1], hs


def in_recurrentgemma() -> Function | None:
    """Return a solver with the scan over time of recurrentgemma for CPUs, whose arrays are batch major.

    Its RG-LRU unrolls this scan 128 times, which takes a minute to compile on a CPU and is slower.
    """
    module = harness.peer("recurrentgemma.jax.scan")
    if module is None:
        return None
    kind = harness.peer("recurrentgemma.common").ScanType.LINEAR_NATIVE

    def solve(a: jax.Array, carry: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        hs, last = module.linear_scan(jnp.swapaxes(v, 0, 1), jnp.swapaxes(a, 0, 1), carry, scan_type=kind)
        return last, jnp.swapaxes(hs, 0, 1)

    return solve


# --- mLSTM ---


def mlstm_gates(params: Any, xs: jax.Array) -> tuple[jax.Array, ...]:
    """Return the queries, keys, values, the two exponents and the output gates of an mLSTM."""
    heads = lambda w: jnp.einsum("tbd,dnk->tbnk", xs, w)  # noqa: E731
    a_i, a_f = (jnp.einsum("tbd,dn->tbn", xs, w) + b for w, b in ((params.w_i, params.b_i), (params.w_f, params.b_f)))
    return (
        heads(params.w_q),
        heads(params.w_k),
        heads(params.w_v),
        a_i,
        a_f,
        sigmoid(jnp, heads(params.w_o) + params.b_o),
    )


def mlstm_in_a_scan(params: Any, carry: Any, xs: jax.Array) -> tuple[Any, jax.Array]:
    """Compute an mLSTM step by step."""
    q, k, v, a_i, a_f, o = mlstm_gates(params, xs)

    def step(state: Any, at: Any) -> tuple[Any, jax.Array]:
        (c, n, m), (q, k, v, a_i, log_f) = state, at
        larger = jnp.maximum(log_f + m, a_i)
        f, i = jnp.exp(log_f + m - larger)[..., None], jnp.exp(a_i - larger)[..., None]
        c, n = f[..., None] * c + (i * k)[..., None] * v[..., None, :], f * n + i * k
        size = jnp.maximum(jnp.abs(jnp.sum(n * q, -1)), jnp.exp(-larger))
        return MLSTMState(c, n, larger), jnp.einsum("bnkv,bnk->bnv", c, q) / size[..., None]

    B, (N, K), V = xs.shape[1], params.w_k.shape[1:], params.w_v.shape[-1]
    if carry is None:
        carry = MLSTMState(jnp.zeros((B, N, K, V)), jnp.zeros((B, N, K)), jnp.zeros((B, N)))
    end, hs = lax.scan(step, carry, (q, k / k.shape[-1] ** 0.5, v, a_i, jax.nn.log_sigmoid(a_f)))
    return end, (o * hs).reshape(*xs.shape[:2], -1)


def mlstm_in_mlstm_kernels() -> Function | None:
    """Return an mLSTM with the JAX function of mlstm_kernels for any backend, which computes all steps at once.

    It starts with a state of zeros, and returns no state.
    """
    module = harness.peer("mlstm_kernels.jax.parallel.native_stablef.fwbw")
    if module is None:
        return None

    def layer(params: Any, _: None, xs: jax.Array) -> tuple[None, jax.Array]:
        *parts, o = mlstm_gates(params, xs)
        hs = module.mlstm_parallel__native_stablef_autograd(*(jnp.moveaxis(a, 0, 2) for a in parts))
        return None, (o * jnp.moveaxis(hs, 2, 0)).reshape(*xs.shape[:2], -1)

    return layer


# --- torch ---


def in_torch(label: str, name: str, bars: Any, args: Any) -> Candidate:
    """Return the layer in eager torch, with the recurrence in a loop ("torch") or in the scan of "mambapy"."""
    torch, solve = harness.peer("torch"), in_a_torch_loop if label == "torch" else in_mambapy()
    if torch is None or solve is None:
        return Candidate(label, None)
    equations = EQUATIONS[name]
    tensors = jax.tree.map(lambda a: torch.tensor(np.ascontiguousarray(a)), (bars, *args))
    # The gradient of torch for a complex tensor is the conjugate of that of JAX.
    tensors = (tuple(bar.conj().resolve_conj() for bar in tensors[0]), *tensors[1:])

    def run(bars: Any, params: Any, carry: Any, xs: Any) -> Any:
        leaves = [leaf.requires_grad_() for leaf in (*params, carry, xs)]
        a, v = equations.coefficients(torch, params, xs)
        hs = solve(a, carry, v)
        ys = hs if equations.output is None else equations.output(torch, params, hs, xs)
        return (hs[-1], ys), torch.autograd.grad([hs[-1], ys], leaves, bars)

    def common(out: Any) -> Any:
        arrays = lambda tree: [t.detach().resolve_conj().numpy() for t in tree]  # noqa: E731
        *params, carry, xs = arrays(g.conj() for g in out[1])
        return tuple(arrays(out[0])), (type(args[0])(*params), carry, xs)

    return Candidate(label, run, tensors, common, jit=False)


def in_a_torch_loop(a: Any, carry: Any, v: Any) -> Any:
    """Solve step by step. The gradient of `v[t]` would be an array of the size of v for each step."""
    torch = harness.peer("torch")
    h, hs = carry, []
    for a_t, v_t in zip(a.unbind() if a.ndim == v.ndim else [a] * len(v), v.unbind(), strict=True):
        h = a_t * h + v_t
        hs.append(h)
    return torch.stack(hs)


def in_mambapy() -> Function | None:
    """Return a solver with the parallel scan of mambapy, whose arrays are (batch, time, features, states)."""
    torch = harness.peer("torch")
    module = None if torch is None else harness.peer("mambapy.pscan")
    if torch is None or module is None:
        return None

    def solve(a: Any, carry: Any, v: Any) -> Any:
        v = torch.cat([v[:1] + a[:1] * carry, v[1:]])
        return module.pscan(a.swapaxes(0, 1)[..., None], v.swapaxes(0, 1)[..., None])[..., 0].swapaxes(0, 1)

    return solve
