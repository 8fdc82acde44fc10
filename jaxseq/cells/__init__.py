"""Cells for `jaxseq.recurrence`, each with an initializer, in addition to `rnn`, `gru` and `lstm`.

peephole_lstm      the gates read the memory
projected_lstm     the output is a projection of the hidden units
layer_norm_lstm    layer normalization of both maps and of the memory
layer_norm_gru     layer normalization of both maps
classic_gru        the reset gate acts before the recurrent product
mgu                one gate
indrnn             a diagonal recurrent map
slstm              exponential gates, heads

Linear in their state, without a recurrent map:

min_gru            a GRU whose gates read the input only
min_lstm           an LSTM whose gates read the input only
lru                complex factors, constant in time
s5, s5_bilinear    the same, from a state space model in continuous time
rg_lru             gated factors, a block-diagonal map
selective_ssm      several states for each feature, step sizes that depend on the input
"""

from jaxseq import _gru, _lstm, _rnn
from jaxseq.cells._classic_gru import ClassicGRUParams, classic_gru, classic_gru_init
from jaxseq.cells._indrnn import IndRNNParams, indrnn, indrnn_init
from jaxseq.cells._layer_norm import (
    LayerNormGRUParams,
    LayerNormLSTMParams,
    layer_norm_gru,
    layer_norm_gru_init,
    layer_norm_lstm,
    layer_norm_lstm_init,
)
from jaxseq.cells._lru import LRUParams, lru, lru_init
from jaxseq.cells._mgu import MGUParams, mgu, mgu_init
from jaxseq.cells._min_gru import MinGRUParams, min_gru, min_gru_init
from jaxseq.cells._min_lstm import MinLSTMParams, min_lstm, min_lstm_init
from jaxseq.cells._peephole_lstm import PeepholeLSTMParams, peephole_lstm, peephole_lstm_init
from jaxseq.cells._projected_lstm import ProjectedLSTMParams, projected_lstm, projected_lstm_init
from jaxseq.cells._rg_lru import RGLRUParams, rg_lru, rg_lru_init
from jaxseq.cells._s5 import S5Params, s5, s5_bilinear, s5_init
from jaxseq.cells._selective_ssm import SelectiveSSMParams, selective_ssm, selective_ssm_init
from jaxseq.cells._slstm import SLSTMParams, SLSTMState, slstm, slstm_init

rnn = _rnn.CELLS["tanh"]
"""The cell of `jaxseq.rnn`."""
relu_rnn = _rnn.CELLS["relu"]
"""The cell of `jaxseq.rnn` with `activation="relu"`."""
gru = _gru.CELL
"""The cell of `jaxseq.gru`."""
lstm = _lstm.CELL
"""The cell of `jaxseq.lstm`."""

__all__ = [
    "ClassicGRUParams",
    "IndRNNParams",
    "LRUParams",
    "LayerNormGRUParams",
    "LayerNormLSTMParams",
    "MGUParams",
    "MinGRUParams",
    "MinLSTMParams",
    "PeepholeLSTMParams",
    "ProjectedLSTMParams",
    "RGLRUParams",
    "S5Params",
    "SLSTMParams",
    "SLSTMState",
    "SelectiveSSMParams",
    "classic_gru",
    "classic_gru_init",
    "gru",
    "indrnn",
    "indrnn_init",
    "layer_norm_gru",
    "layer_norm_gru_init",
    "layer_norm_lstm",
    "layer_norm_lstm_init",
    "lru",
    "lru_init",
    "lstm",
    "mgu",
    "mgu_init",
    "min_gru",
    "min_gru_init",
    "min_lstm",
    "min_lstm_init",
    "peephole_lstm",
    "peephole_lstm_init",
    "projected_lstm",
    "projected_lstm_init",
    "relu_rnn",
    "rg_lru",
    "rg_lru_init",
    "rnn",
    "s5",
    "s5_bilinear",
    "s5_init",
    "selective_ssm",
    "selective_ssm_init",
    "slstm",
    "slstm_init",
]
