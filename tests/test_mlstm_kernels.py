"""`mlstm` against the loop over steps of mlstm_kernels, by the authors of xLSTM.

Its licence is not an open-source licence, so it is in no extra. This file is collected where it is installed.
"""

from functools import partial

import jax
from helpers import assert_close, pullback
from peers import in_torch, layer_problem, need

import jaxseq


def test_mlstm_equals_mlstm_kernels():
    """The authors' loop over steps, with its state, in float64 and without its epsilon."""
    torch, module = need("mlstm_kernels.torch.recurrent.native_sequence")
    args, (state_bar, ys_bar) = layer_problem("mlstm")
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

    # It scales q in place of k, so its memory is larger by sqrt(K).
    params, carry, xs = args
    scale = params.w_k.shape[-1] ** 0.5
    scaled = params, carry._replace(c=scale * carry.c, n=scale * carry.n), xs
    found, bars = in_torch(torch, theirs, scaled, (state_bar.c / scale, state_bar.n / scale, state_bar.m, ys_bar))
    expected = jaxseq.MLSTMState(found[0] / scale, found[1] / scale, found[2]), found[3]
    assert_close(outputs, expected, relative=1e-13)
    carry_bar = bars[1]._replace(c=scale * bars[1].c, n=scale * bars[1].n)
    assert_close(gradients, (bars[0], carry_bar, bars[2]), relative=1e-12)
