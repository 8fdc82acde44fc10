"""Time: one forward sweep and one backward sweep for every cell.

A recurrence is a pointwise cell φ between two linear maps. With state s_t, of which h_t is the first leaf,

    u_t = x_t W_x + b_x            the input map,      (*B, D) -> (*B, G H)
    r_t = h_{t-1} W_h + b_h        the recurrent map,  (*B, H) -> (*B, G H)
    s_t = φ(u_t, r_t, s_{t-1})     the cell, pointwise
    y_t = h_t

written with matrices, but each of the two may be any linear map L with its pullbacks (`jaxseq/linear_maps.py`): read
x W as L(W, x), δ Wᵀ as Lᵀ(W, δ), and xᵀ δ as δ ⊗ x.

Let s̄_t be the cotangent of s_t: what the loss says to y_t directly, plus all that comes back from later
steps. The cell's pullback turns s̄_t into the cotangents of its three arguments; those of the
pre-activations are called δ:

    (δu_t, δr_t, s̃_{t-1}) = φ*(s̄_t)                                   pointwise
    s̄_{t-1} = s̃_{t-1} + (δr_t W_hᵀ + ȳ_{t-1}) on its leaf h            the sweep, backwards in t     (1)

Only (1) is sequential. The sweep carries the state's cotangent alone and emits δ; everything else is one
contraction over a stretch of time:

    W̄_x = sum_t x_tᵀ δu_t        b̄_x = sum_t δu_t        x̄_t = δu_t W_xᵀ
    W̄_h = sum_t h_{t-1}ᵀ δr_t    b̄_h = sum_t δr_t                                                    (2)

A cell may have parameters p of its own, and one product v_t = q_t W_q inside of φ. Then φ* gives p̄_t of every example
as well, and (q_t, v̄_t), which the sweep emits as it does δ:

    p̄ = sum_t p̄_t               W̄_q = sum_t q_tᵀ v̄_t                                            (2')

Masks (`_time.py`). With live_t and stop_t, and ŝ the state as a step finds it,

    ŝ_t = 0 where stop_t, else s_{t-1}          s_t = φ(u_t, r_t, ŝ_t) where live_t, else s_{t-1}
    y_t = h_t where live_t, else 0

so that δ_t = 0 where not live_t, and

    s̄_{t-1} = s̄_t where not live_t, else 0 where stop_t, else (1)                                      (1')

with h_{t-1} in (2) the leaf of ŝ_t. Zeros are selected, never products with zero: x_t and h_{t-1} may be NaN where a
step does not count, and the derivative of φ infinite. So it is the results of φ* that are selected, δ_t, s̃_{t-1},
p̄_t, q_t and v̄_t, and x_t and h_{t-1} in (2). The plain form, which JAX differentiates, selects what φ is given as well
as what it returns: the pullback of a selection is a selection.

What is dropped and held. With d a mask (*B, H), and k_t how much of ŝ_t stays, laid out as the state,

    r_t = (d h_{t-1}) W_h + b_h                  s_t = k_t ŝ_t + (1 - k_t) φ(u_t, r_t, ŝ_t)

φ* gets (1 - k_t) s̄_t, k_t s̄_t is added to what it says of ŝ_t, and d multiplies δr_t W_hᵀ in (1) and h_{t-1} in (2).
Where k_t is boolean it selects. Where it is True for all of the state of an example, the step is idle: φ does not
count there, as in padding.

Truncation (k1, k2). A window of k1 steps says to its state what its own losses say, as far back as k2 - k1
steps before it. (1) is linear in s̄, so the cotangents of different windows can travel apart, and where one
begins does not wait for what another has to say: all windows are swept side by side, as one more batch axis
W = T // k1, k1 sequential steps in place of T:

    (T, *B, H) -> (W, k1, *B, H)

    stage 0       every window with its own ȳ
    stage 1, ...  every window with no ȳ, and s̄ at its end what the window behind it sent to its beginning
                  in the stage before, until k2 steps are gone

and the δ of all stages add up in (2). truncation = k is stage 0 alone; the full gradient is one window, k1 = T.

What is kept. The forward sweep keeps of every step what the cell wants for φ*, and of the state ŝ only what
it is at the beginning of each chunk of steps: its leaf h is y of the step before, and the others the cell can
`replay` from what it has kept, pointwise. A chunk of the backward sweep makes its ŝ again, runs (1), contracts
(2), and what it needed is gone. With `checkpoint`, and where it costs no time, nothing is kept but the states at
the beginning of chunks: h being known, u and r of a whole chunk are one product each, and φ is run over them
again. (Where y is rounded, h isn't known, and a chunk runs the forward sweep again.)

On several devices that the compiler may divide a batch over, each contraction (2) is a sum over devices. There a
chunk is a whole window, unless `checkpoint` asks for shorter ones, and no loop has a collective in it.

JAX computes second derivatives itself, from `forward_without_residuals` of `_forward.py`, where truncation is
`stop_gradient`.
"""

from jaxseq._recurrence._call import one_step as one_step
from jaxseq._recurrence._call import sequence as sequence
from jaxseq._recurrence._cell import Cell as Cell
from jaxseq._recurrence._cell import Gates as Gates
