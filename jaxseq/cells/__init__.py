"""Cells beyond `rnn`, `gru` and `lstm`, for `jaxseq.recurrence`: each a file of equations, with its first weights.

peephole_lstm      gates see the memory
projected_lstm     an output of fewer numbers than units
layer_norm_lstm    both maps normalised, and the memory
layer_norm_gru
classic_gru        the reset before the recurrent product
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
