"""jaxseq: convolution and recurrence for JAX, with hand-derived gradients that are checked against `jax.grad`.

A recurrence consists of an input map and a recurrent map, both linear, and a pointwise cell that updates the state.
"""

from jaxseq import _serialization as _serialization
from jaxseq import autoregressive, cells, convert, diagnostics, linear_maps, reference, testing
from jaxseq._any_cell import recurrence, recurrence_cell
from jaxseq._causal_conv import causal_conv
from jaxseq._conv import ConvParams, conv, conv_init
from jaxseq._conv_recurrence import (
    conv_gru,
    conv_gru_cell,
    conv_gru_init,
    conv_lstm,
    conv_lstm_cell,
    conv_lstm_init,
)
from jaxseq._conv_transpose import conv_transpose, conv_transpose_init
from jaxseq._distributed._carry_across_shards import carry_across_shards
from jaxseq._gru import GRUParams, gru, gru_cell, gru_init
from jaxseq._layers import bidirectional, stack
from jaxseq._lstm import LSTMParams, LSTMState, lstm, lstm_cell, lstm_init
from jaxseq._recurrence import Cell
from jaxseq._rnn import RNNParams, rnn, rnn_cell, rnn_init
from jaxseq._scan import scan
from jaxseq._separable import depthwise_conv, separable_conv
from jaxseq._time_options import TimeOptions

__version__ = "0.1.0"

__all__ = [
    "Cell",
    "ConvParams",
    "GRUParams",
    "LSTMParams",
    "LSTMState",
    "RNNParams",
    "TimeOptions",
    "autoregressive",
    "bidirectional",
    "carry_across_shards",
    "causal_conv",
    "cells",
    "conv",
    "conv_gru",
    "conv_gru_cell",
    "conv_gru_init",
    "conv_init",
    "conv_lstm",
    "conv_lstm_cell",
    "conv_lstm_init",
    "conv_transpose",
    "conv_transpose_init",
    "convert",
    "depthwise_conv",
    "diagnostics",
    "gru",
    "gru_cell",
    "gru_init",
    "linear_maps",
    "lstm",
    "lstm_cell",
    "lstm_init",
    "recurrence",
    "recurrence_cell",
    "reference",
    "rnn",
    "rnn_cell",
    "rnn_init",
    "scan",
    "separable_conv",
    "stack",
    "testing",
]
