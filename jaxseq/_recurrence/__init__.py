"""The recurrence engine: one forward pass and one backward pass for every cell.

A recurrence is a pointwise cell φ between two linear maps. With state s_t, of which h_t is the first leaf,

    u_t = x_t W_x + b_x            the input map,      (*B, D) -> (*B, G H)
    r_t = h_{t-1} W_h + b_h        the recurrent map,  (*B, H) -> (*B, G H)
    s_t = φ(u_t, r_t, s_{t-1})     the cell, pointwise
    y_t = h_t

This is written with matrices, but each of the two may be any linear map L with its pullbacks
(`jaxseq/linear_maps.py`): read x W as L(W, x), δ Wᵀ as Lᵀ(W, δ), and xᵀ δ as δ ⊗ x.

Let s̄_t be the cotangent of s_t: the direct contribution of the loss through y_t, plus the contributions of later
steps. The cell's pullback maps s̄_t to the cotangents of its three arguments; those of the pre-activations are called
δ:

    (δu_t, δr_t, s̃_{t-1}) = φ*(s̄_t)                                   pointwise
    s̄_{t-1} = s̃_{t-1} + (δr_t W_hᵀ + ȳ_{t-1}) on its leaf h            the loop, backwards in t      (1)

Only (1) is sequential. The loop carries the cotangent of the state and returns δ. Everything else is one contraction
over a chunk of time:

    W̄_x = sum_t x_tᵀ δu_t        b̄_x = sum_t δu_t        x̄_t = δu_t W_xᵀ
    W̄_h = sum_t h_{t-1}ᵀ δr_t    b̄_h = sum_t δr_t                                                    (2)

A cell may have side inputs e_t, which φ and φ* get as they are, and whose cotangents φ* returns. It may have
parameters p, and one product v_t = q_t W_q inside φ. Then φ* also returns p̄_t of every example, and
(q_t, v̄_t), which the loop returns like δ:

    p̄ = sum_t p̄_t               W̄_q = sum_t q_tᵀ v̄_t                                            (2')

Masks (`_time.py`). With the masks valid_t and reset_t, and ŝ_t the state before the step,

    ŝ_t = s⁰ where reset_t, else s_{t-1}        s_t = φ(u_t, r_t, ŝ_t) where valid_t, else s_{t-1}
    y_t = h_t where valid_t, else 0

so that δ_t = 0 where not valid_t, and

    s̄_{t-1} = s̄_t where not valid_t, else 0 where reset_t, else (1)                                 (1')

with h_{t-1} in (2) the leaf of ŝ_t, and s⁰ = 0 or `reset_state`, whose cotangent is the sum of (1) where reset_t. With
`return_states`, all s_t are results, and their cotangents are added to s̄_t where valid_t.

Masks select; they do not multiply by zero, because in a masked step x_t and h_{t-1} may be NaN and the derivative of φ
infinite. The backward pass therefore selects in the results of φ* (δ_t, s̃_{t-1}, p̄_t, q_t and v̄_t), and in x_t and
h_{t-1} in (2). The plain form, which JAX differentiates, selects in the arguments of φ as well as in its results: the
pullback of a selection is a selection.

Recurrent dropout and zoneout. With d a dropout mask (*B, H), and k_t the weight of the previous state, with the
structure of the state,

    r_t = (d h_{t-1}) W_h + b_h                  s_t = k_t ŝ_t + (1 - k_t) φ(u_t, r_t, ŝ_t)

φ* gets (1 - k_t) s̄_t, k_t s̄_t is added to its cotangent of ŝ_t, and d multiplies δr_t W_hᵀ in (1) and h_{t-1} in (2).
A boolean k_t selects. Where it is True for all of the state of an example, the step is not read: φ has no effect
there, as in padding.

Truncation (k1, k2). The loss in each window of k1 steps is backpropagated as far as k2 - k1 steps before the window.
(1) is linear in s̄, so the cotangents of different windows can be propagated separately, and a window does not wait for
the cotangents of the next one. All windows run in parallel, as one more batch axis W = T // k1, with k1 sequential
steps instead of T:

    (T, *B, H) -> (W, k1, *B, H)

    stage 0       every window with its own ȳ
    stage 1, ...  every window with ȳ = 0, and with s̄ at its end the cotangent that the next window returned at its
                  start in the stage before, until k2 steps are covered

and the δ of all stages add up in (2). truncation = k is stage 0 only. The full gradient is one window, k1 = T.

Residuals. The forward pass stores for every step the residuals of φ*, and the state ŝ only at the start of each chunk
of steps: its leaf h is y of the step before, and the cell can `replay` the other leaves from its residuals, pointwise.
For each chunk, the backward pass recomputes ŝ, runs (1) and contracts (2). With `checkpoint`, and where it costs no
time, only the states at the starts of chunks are stored. Since h is known, u and r of a whole chunk are one product
each, and φ is applied again. (If y is rounded, h is not known, and the forward pass of the chunk runs again.)

If the compiler may partition the batch over several devices, each contraction (2) is a sum over devices. A chunk is
then a whole window, unless `checkpoint` asks for shorter ones, and no loop contains a collective.

Second derivatives are JAX's own, of `forward_without_residuals` in `_forward.py`, where truncation is `stop_gradient`.

The path of a call. `jaxseq.lstm(params, carry, xs)` goes through these files to `lax.scan`, and its gradient back:

    _call.py       sequence              checks the arguments (`_arguments.py`, `_inspect.py`), makes `Inputs(weights,
                                         carry, xs, masks)` and `Options`, and calls the rule
    _rule.py       rule                  the custom rule, `_fwd` and `_bwd`, in both modes (`_both_modes.py`)
    _forward.py    forward               makes the `Plan` (`_plan.py`) and scans `forward_step` over time; stores
                                         `Residuals`, with the plan in them
    _step.py       forward_step          u and r by the linear maps (`linear_maps.py`), φ (`_phi.py`), masks, zoneout;
                                         what all steps use is a `Sweep`
    _backward.py   backward              one `Stage` for each block of time and pass over its windows
                   _run_stage            ... for each group of windows (`_run_group`) ...
                   _run_chunk            ... for each chunk: recompute its states, then
                   _run_loop             scan equation (1'): the cell's pullback, and δr W_hᵀ
                   _contract             the contractions (2)

A linear cell (`_linear_cell.py`) has no recurrent map, and its step is linear in the state. `sequence` calls the rule
in `_linear_rule.py` for it.

On an explicit mesh, or where arrays vary over devices, `_distributed/_recurrence.py` runs the rule on each device.
"""

from jaxseq._recurrence._call import one_step as one_step
from jaxseq._recurrence._call import sequence as sequence
from jaxseq._recurrence._cell import SAME_AS_H as SAME_AS_H
from jaxseq._recurrence._cell import Cell as Cell
from jaxseq._recurrence._cell import Gates as Gates
from jaxseq._recurrence._cell import Pullback as Pullback
from jaxseq._recurrence._cell import StepResult as StepResult
from jaxseq._recurrence._linear_cell import AnyCell as AnyCell
from jaxseq._recurrence._linear_cell import LinearCell as LinearCell
from jaxseq._recurrence._linear_cell import LinearProduct as LinearProduct
from jaxseq._recurrence._linear_cell import check_linear_cell as check_linear_cell
from jaxseq._recurrence._phi import Inner as Inner
