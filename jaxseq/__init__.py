"""jaxseq: convolution and recurrence for JAX, with hand-derived gradients proven against `jax.grad`.

A sequence layer is a pointwise cell between two linear maps, carried through time.
"""

from jaxseq import reference, testing
from jaxseq._causal_conv import causal_conv
from jaxseq._conv import ConvParams, conv, conv_init
from jaxseq._conv_transpose import conv_transpose
from jaxseq._gru import GRUParams, gru, gru_cell, gru_init
from jaxseq._lstm import LSTMParams, LSTMState, lstm, lstm_cell, lstm_init
from jaxseq._rnn import RNNParams, rnn, rnn_cell, rnn_init
from jaxseq._separable import depthwise_conv, separable_conv
from jaxseq._time import Time

__version__ = "0.1.0"

__all__ = [
    "ConvParams",
    "GRUParams",
    "LSTMParams",
    "LSTMState",
    "RNNParams",
    "Time",
    "causal_conv",
    "conv",
    "conv_init",
    "conv_transpose",
    "depthwise_conv",
    "gru",
    "gru_cell",
    "gru_init",
    "lstm",
    "lstm_cell",
    "lstm_init",
    "reference",
    "rnn",
    "rnn_cell",
    "rnn_init",
    "separable_conv",
    "testing",
]
