"""Cells for `jaxseq.recurrence`, each with an initializer, in addition to `rnn`, `gru` and `lstm`.

peephole_lstm      the gates read the memory
projected_lstm     the output is a projection of the hidden units
layer_norm_lstm    layer normalization of both maps and of the memory
layer_norm_gru     layer normalization of both maps
classic_gru        the reset gate acts before the recurrent product
mgu                one gate
indrnn             a diagonal recurrent map
slstm              exponential gates, heads
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
from jaxseq.cells._mgu import MGUParams, mgu, mgu_init
from jaxseq.cells._peephole_lstm import PeepholeLSTMParams, peephole_lstm, peephole_lstm_init
from jaxseq.cells._projected_lstm import ProjectedLSTMParams, projected_lstm, projected_lstm_init
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
    "LayerNormGRUParams",
    "LayerNormLSTMParams",
    "MGUParams",
    "PeepholeLSTMParams",
    "ProjectedLSTMParams",
    "SLSTMParams",
    "SLSTMState",
    "classic_gru",
    "classic_gru_init",
    "gru",
    "indrnn",
    "indrnn_init",
    "layer_norm_gru",
    "layer_norm_gru_init",
    "layer_norm_lstm",
    "layer_norm_lstm_init",
    "lstm",
    "mgu",
    "mgu_init",
    "peephole_lstm",
    "peephole_lstm_init",
    "projected_lstm",
    "projected_lstm_init",
    "relu_rnn",
    "rnn",
    "slstm",
    "slstm_init",
]
