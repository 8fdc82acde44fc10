r"""The recurrence of an mLSTM: a matrix that decays by a factor and gains the product of two vectors, in chunks.

    C_t = f_t C_{t-1} + i_t k_t v_tᵀ     n_t = f_t n_{t-1} + i_t k_t     f_t = exp(λ_t),  i_t = exp(a_t)

for each head. Outputs read r_t = C_tᵀ q_t and d_t = n_t·q_t. The exponentials overflow, so that all four are computed
times exp(-m_t), with the largest exponent so far,

    m_t = max(λ_t + m_{t-1}, a_t)

Chunks. Term 0 is the state before a chunk of L steps, and terms 1 .. L are its steps. At step t, term s has the
exponent e_ts and the weight w_ts:

    e_ts = a_s + λ_{s+1} + ... + λ_t,   s <= t,        a_0 = m_0,        m_t = max_s e_ts,        w_ts = exp(e_ts - m_t)

With P_ts = w_ts q_t·k_s, all steps are matrix products:

    r_t = w_t0 C_0ᵀ q_t + sum_s P_ts v_s          d_t = w_t0 n_0·q_t + sum_s P_ts
    C_L = w_L0 C_0 + sum_s w_Ls k_s v_sᵀ          n_L = w_L0 n_0 + sum_s w_Ls k_s

The sums of λ are formed one by one. As differences of running sums they would lose digits.

Pullback. y does not depend on m, and is computed from r, d and m as if m were constant. So the m_t of the outputs have
no cotangent, but that of the returned state has, m̄_L. With A_ts = r̄_t·v_s + d̄_t and B_s = k_s·(C̄_L v_s + n̄_L),

    q̄_t = w_t0 (C_0 r̄_t + n_0 d̄_t) + sum_s w_ts A_ts k_s
    k̄_s = sum_t w_ts A_ts q_t + w_Ls (C̄_L v_s + n̄_L)
    v̄_s = sum_t P_ts r̄_t + w_Ls C̄_Lᵀ k_s
    C̄_0 = sum_t w_t0 q_t r̄_tᵀ + w_L0 C̄_L         n̄_0 = sum_t w_t0 d̄_t q_t + w_L0 n̄_L

The cotangents of the exponents, in the outputs (ē) and in the returned state (ε), are

    ē_ts = P_ts A_ts       ē_t0 = w_t0 q_t·(C_0 r̄_t + n_0 d̄_t)
    ε_s = w_Ls B_s         ε_0 = w_L0 (<C̄_L, C_0> + n̄_L·n_0)
    e_Ls gets ε_s, and the largest of them, the first one of several, also m̄_L - sum_s ε_s

    ā_s = sum_t ē_ts       m̄_0 = sum_t ē_t0       λ̄_u = sum of ē_ts over t >= u > s

    padding    λ = 0 and a = -inf: m does not change, and the weight is zero
    reset      w_ts = 0 for a term s before it. The state is zero with m = 0, so m_t is at least the sum of λ since
               then. That of the last reset is `restart`, -inf if there was none in the chunk

Only the states before chunks are stored. The pullback computes the products of a chunk again. In forward mode and for
second derivatives, JAX differentiates the products.

    code                     here
    exponents, weights       e and w of the outputs, (*B, N, L, L + 1), and of the returned state, (*B, N, L + 1)
    decay                    λ
    numerator, denominator   r, d

Source: M. Beck et al., xLSTM: Extended long short-term memory (2024), section 2.3 and appendix A.3. For the chunks:
S. Yang et al., Gated linear attention transformers with hardware-efficient training (2024), section 4.
"""

from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.lax import PrecisionLike

from jaxseq import _mesh, _time
from jaxseq._both_modes import Rule, call_in_both_modes
from jaxseq._types import MLSTMState

Tree = TypeVar("Tree")


class Steps(NamedTuple):
    """What the steps read, time first, in the dtype of the state."""

    q: jax.Array  # (T, *B, N, K)
    k: jax.Array  # (T, *B, N, K)
    v: jax.Array  # (T, *B, N, V)
    a: jax.Array  # (T, *B, N), the exponent of the input gate
    decay: jax.Array  # (T, *B, N), the logarithm of the forget gate
    valid: jax.Array | None  # (T, *B)
    reset: jax.Array | None  # (T, *B)


class Outputs(NamedTuple):
    """What y reads, time first, times exp(-m)."""

    numerator: jax.Array  # (T, *B, N, V)
    denominator: jax.Array  # (T, *B, N)
    m: jax.Array  # (T, *B, N), a constant


class Options(NamedTuple):
    """What is decided once per call. Static."""

    chunk: int
    precision: PrecisionLike


Results = tuple[MLSTMState, Outputs]


def run(options: Options, carry: MLSTMState, steps: Steps) -> Results:
    """Return the state after all steps, and the outputs."""
    hand, forward, pull, plain = (partial(f, options) for f in (_recurrence, _forward, _pull, _plain))
    return call_in_both_modes(Rule(hand, forward, pull, plain), *_mesh.align_varying((carry, steps)))


# --- Rule: chunks of equal length in a loop, then the remaining steps ---


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recurrence(options: Options, carry: MLSTMState, steps: Steps) -> Results:
    return _plain(options, carry, steps)


def _plain(options: Options, carry: MLSTMState, steps: Steps) -> Results:
    """Run all chunks, for JAX to differentiate."""
    return _forward(options, carry, steps)[0]


def _forward(options: Options, carry: MLSTMState, steps: Steps) -> tuple[Results, tuple[Steps, MLSTMState]]:
    """Return the results, and the steps and the states before the chunks, the remaining steps included."""

    def chunk(state: MLSTMState, of_chunk: Steps) -> tuple[MLSTMState, tuple[Outputs, MLSTMState]]:
        end, outputs = _run_chunk(options.precision, state, of_chunk)
        return end, (outputs, jax.tree.map(lambda a: a[None], state))

    end, (outputs, states) = _time.scan_chunks(chunk, chunk, carry, steps, options.chunk, reverse=False)
    return (end, outputs), (steps, states)


def _pull(options: Options, residuals: tuple[Steps, MLSTMState], cotangents: Results) -> tuple[MLSTMState, Steps]:
    steps, states = residuals
    s_bar, y_bar = jax.tree.map(jnp.asarray, cotangents)
    main, rest = _split(steps, options.chunk)
    of_main, of_rest = _split(y_bar, options.chunk)
    bars = None
    if rest is not None and of_rest is not None:
        last = jax.tree.map(lambda a: a[-1], states)
        states = jax.tree.map(lambda a: a[:-1], states)
        s_bar, bars = _pull_chunk(options.precision, last, rest, of_rest, s_bar)

    def pull(s_bar: MLSTMState, at: tuple[MLSTMState, Steps, Outputs]) -> tuple[MLSTMState, Steps]:
        state, of_chunk, y_bar = at
        return _pull_chunk(options.precision, state, of_chunk, y_bar, s_bar)

    s_bar, found = lax.scan(pull, s_bar, (states, main, of_main), reverse=True)
    found = jax.tree.map(_merge, found)
    if bars is not None:
        found = jax.tree.map(lambda *parts: jnp.concatenate(parts), found, bars)
    return s_bar, found


_recurrence.defvjp(_forward, _pull)


def _split(tree: Tree, chunk: int) -> tuple[Tree, Tree | None]:
    """Split time into (chunks, steps of a chunk) and the remaining steps, or None."""
    total = jax.tree.leaves(tree)[0].shape[0]
    count, rest = divmod(total, chunk)
    main = jax.tree.map(lambda a: a[: total - rest].reshape(count, chunk, *a.shape[1:]), tree)
    return main, jax.tree.map(lambda a: a[total - rest :], tree) if rest else None


def _merge(a: jax.Array) -> jax.Array:
    return a.reshape(a.shape[0] * a.shape[1], *a.shape[2:])


# --- One chunk. Its arrays are (*B, N, L, ·) ---


class _Weights(NamedTuple):
    """The weights of the terms, with what else the pullback reads of the exponents."""

    outputs: jax.Array  # (*B, N, L, L + 1)
    state: jax.Array  # (*B, N, L + 1)
    m: jax.Array  # of the outputs, (*B, N, L)
    end: jax.Array  # m of the returned state, (*B, N)
    largest: jax.Array  # (*B, N, 1): the term whose exponent is m of the returned state, or L + 1 for `restart`
    reads_state: jax.Array | None  # (*B, 1, L): False from the first reset on


def _weights(carry: MLSTMState, steps: Steps) -> _Weights:
    exponents, restart = _exponents(steps, carry.m, steps.a, steps.decay)
    m = lax.stop_gradient(jnp.maximum(jnp.max(exponents, -1), restart))
    last = exponents[..., -1, :]
    candidates = jnp.concatenate([last, restart[..., -1:]], -1)
    # The derivative of `jnp.max` compares for equality. That fails where XLA computes an operand twice and rounds it
    # differently.
    largest = jnp.argmax(candidates, -1, keepdims=True)
    end = jnp.take_along_axis(candidates, largest, -1)[..., 0]
    reads_state = None
    if steps.reset is not None:
        reads_state = jnp.moveaxis(jnp.cumsum(steps.reset, 0, dtype=jnp.int32) == 0, 0, -1)[..., None, :]
    # Without any term, m is -inf and all weights are zero.
    of_outputs, of_state = (
        jnp.exp(e - jnp.where(top == -jnp.inf, 0, top)[..., None]) for e, top in ((exponents, m), (last, end))
    )
    return _Weights(of_outputs, of_state, m, end, largest, reads_state)


def _exponents(steps: Steps, first: jax.Array, a: jax.Array, decay: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return e (*B, N, L, L + 1), -inf where step t does not read term s, and `restart` (*B, N, L).

    Both are linear in m before the chunk, a and decay. Those of `steps` are not read, but its masks are.
    """
    decay = _time.zero_padding(steps.valid, decay)
    a = _time.select(steps.valid, a, jnp.full_like(a, -jnp.inf))
    decay, a = jnp.moveaxis(decay, 0, -1), jnp.moveaxis(a, 0, -1)
    count = a.shape[-1]
    # t has the axes (*B, N, L, 1), and s has (*B, N, 1, L + 1).
    t, s = (
        jnp.expand_dims(jnp.arange(size), (*range(a.ndim - 1), axis)) for size, axis in ((count, -1), (count + 1, -2))
    )
    sums = jnp.cumsum(jnp.where(s <= t, decay[..., None], 0), -2)  # of decay over the steps from index s to t
    terms = jnp.concatenate([first[..., None], a], -1)
    read, restart = jnp.broadcast_to(s <= t + 1, sums.shape), jnp.full_like(decay, -jnp.inf)
    if steps.reset is not None:
        reset = jnp.moveaxis(steps.reset, 0, -1)[..., None, :]
        number = jnp.cumsum(reset, -1, dtype=jnp.int32)  # of resets so far
        of_term = jnp.concatenate([jnp.zeros_like(number[..., :1]), number], -1)
        same = number[..., None] == of_term[..., None, :]
        read &= same
        starts = reset[..., None, :] & same[..., 1:] & (s[..., :-1] <= t)
        since_reset = jnp.sum(jnp.where(starts, sums[..., :-1], 0), -1)  # of at most one start
        restart = jnp.where(jnp.any(starts, -1), since_reset, -jnp.inf)
    return jnp.where(read, sums + terms[..., None, :], -jnp.inf), restart


def _run_chunk(precision: PrecisionLike, carry: MLSTMState, steps: Steps) -> Results:
    product, w = partial(jnp.einsum, precision=precision), _weights(carry, steps)
    q, k, v = (jnp.moveaxis(a, 0, -2) for a in steps[:3])
    numerator = w.outputs[..., :1] * product("...tk,...kv->...tv", q, carry.c)
    denominator = w.outputs[..., 0] * product("...tk,...k->...t", q, carry.n)
    c, n = w.state[..., :1, None] * carry.c, w.state[..., :1] * carry.n
    if w.reads_state is not None:  # a NaN in a state that is reset has no effect
        numerator = _time.zero_padding(jnp.broadcast_to(w.reads_state, denominator.shape), numerator)
        denominator = jnp.where(w.reads_state, denominator, 0)
        c, n = _time.zero_padding(w.reads_state[..., 0, -1], (c, n))
    p = w.outputs[..., 1:] * product("...tk,...sk->...ts", q, k)
    numerator += product("...ts,...sv->...tv", p, v)
    denominator += jnp.sum(p, -1)
    added = w.state[..., 1:, None] * k
    state = MLSTMState(c + product("...sk,...sv->...kv", added, v), n + jnp.sum(added, -2), w.end)
    return state, Outputs(jnp.moveaxis(numerator, -2, 0), jnp.moveaxis(denominator, -1, 0), jnp.moveaxis(w.m, -1, 0))


def _pull_chunk(
    precision: PrecisionLike, carry: MLSTMState, steps: Steps, y_bar: Outputs, s_bar: MLSTMState
) -> tuple[MLSTMState, Steps]:
    product, w = partial(jnp.einsum, precision=precision), _weights(carry, steps)
    q, k, v = (jnp.moveaxis(a, 0, -2) for a in steps[:3])
    r_bar, d_bar = jnp.moveaxis(y_bar.numerator, 0, -2), jnp.moveaxis(y_bar.denominator, 0, -1)
    w_0, w_L0, w_Ls = w.outputs[..., :1], w.state[..., :1], w.state[..., 1:, None]
    p = w.outputs[..., 1:] * product("...tk,...sk->...ts", q, k)
    a_ts = product("...tv,...sv->...ts", r_bar, v) + d_bar[..., None]
    similarity_bar = w.outputs[..., 1:] * a_ts

    of_state = product("...kv,...tv->...tk", carry.c, r_bar) + d_bar[..., None] * carry.n[..., None, :]
    of_state, product_of_states = w_0 * of_state, _inner(s_bar.c, carry.c) + jnp.sum(s_bar.n * carry.n, -1)
    if w.reads_state is not None:
        of_state = _time.zero_padding(jnp.broadcast_to(w.reads_state, d_bar.shape), of_state)
        product_of_states = jnp.where(w.reads_state[..., -1], product_of_states, 0)
    through_state = product("...kv,...sv->...sk", s_bar.c, v) + s_bar.n[..., None, :]
    q_bar = of_state + product("...ts,...sk->...tk", similarity_bar, k)
    k_bar = product("...ts,...tk->...sk", similarity_bar, q) + w_Ls * through_state
    v_bar = product("...ts,...tv->...sv", p, r_bar) + product("...kv,...sk->...sv", s_bar.c, w_Ls * k)
    c_bar = product("...tk,...tv->...kv", w_0 * q, r_bar) + w_L0[..., None] * s_bar.c
    n_bar = product("...tk,...t->...k", w_0 * q, d_bar) + w_L0 * s_bar.n

    e_bar = jnp.concatenate([jnp.sum(q * of_state, -1, keepdims=True), p * a_ts], -1)
    of_terms = jnp.sum(w_Ls * k * through_state, -1)
    epsilon = jnp.concatenate([w_L0 * product_of_states[..., None], of_terms], -1)
    terms = jnp.expand_dims(jnp.arange(epsilon.shape[-1] + 1, dtype=w.largest.dtype), range(w.largest.ndim - 1))
    of_largest = jnp.where(w.largest == terms, (s_bar.m - jnp.sum(epsilon, -1))[..., None], 0)
    e_bar = e_bar.at[..., -1, :].add(epsilon + of_largest[..., :-1])
    restart_bar = jnp.zeros_like(w.m).at[..., -1].set(of_largest[..., -1])
    _, pull_exponents = jax.vjp(partial(_exponents, steps), carry.m, steps.a, steps.decay)
    m_bar, a_bar, decay_bar = pull_exponents((e_bar, restart_bar))
    time_first = lambda a: jnp.moveaxis(a, -2, 0)  # noqa: E731
    bars = Steps(time_first(q_bar), time_first(k_bar), time_first(v_bar), a_bar, decay_bar, None, None)
    return MLSTMState(c_bar, n_bar, m_bar), bars


def _inner(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the inner product of matrices."""
    return jnp.sum(a * b, (-2, -1))
