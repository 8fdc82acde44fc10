"""The plain twin of every op: the equations as they stand in a textbook, differentiated by JAX.

Each function has the name, the signature and the meaning of the op it defines, and no custom rule anywhere below it.
It is the oracle of the tests, and the way for what a reverse rule can't do: `jax.jvp`, `jax.jacfwd`,
`jax.linearize`. It is written for reading, not for speed, and leaves the checking of arguments to the ops.
"""

from jaxseq.reference._convolution import causal_conv, conv, conv_transpose, depthwise_conv, separable_conv
from jaxseq.reference._layers import bidirectional, stack
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
    "lstm",
    "lstm_cell",
    "recurrence",
    "recurrence_cell",
    "rnn",
    "rnn_cell",
    "scan",
    "separable_conv",
    "stack",
]
