"""Reference implementation of every op: the textbook equations, differentiated by JAX.

Each function has the name and signature of an op, computes the same values, and contains no custom differentiation
rule. The tests compare the ops with it, in both modes. It is written for readability, not speed, and does not validate
its arguments.
"""

from jaxseq.reference._convolution import causal_conv, conv, conv_transpose, depthwise_conv, separable_conv
from jaxseq.reference._layers import bidirectional, stack
from jaxseq.reference._linear_layers import mlstm, mlstm_cell, qrnn, qrnn_cell
from jaxseq.reference._linear_recurrence import linear_recurrence
from jaxseq.reference._recurrence import (
    conv_gru,
    conv_gru_cell,
    conv_lstm,
    conv_lstm_cell,
    gru,
    gru_cell,
    lstm,
    lstm_cell,
    recurrence,
    recurrence_cell,
    rnn,
    rnn_cell,
)
from jaxseq.reference._scan import scan

__all__ = [
    "bidirectional",
    "causal_conv",
    "conv",
    "conv_gru",
    "conv_gru_cell",
    "conv_lstm",
    "conv_lstm_cell",
    "conv_transpose",
    "depthwise_conv",
    "gru",
    "gru_cell",
    "linear_recurrence",
    "lstm",
    "lstm_cell",
    "mlstm",
    "mlstm_cell",
    "qrnn",
    "qrnn_cell",
    "recurrence",
    "recurrence_cell",
    "rnn",
    "rnn_cell",
    "scan",
    "separable_conv",
    "stack",
]
