"""jaxseq: convolution and recurrence for JAX, with hand-derived gradients that are checked against `jax.grad`.

A recurrence consists of an input map and a recurrent map, both linear, and a pointwise cell that updates the state.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from jaxseq import _serialization as _serialization
from jaxseq import cells, linear_maps, tuning
from jaxseq._any_cell import recurrence, recurrence_cell
from jaxseq._causal_conv import causal_conv
from jaxseq._conv import conv, conv_init
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
from jaxseq._explain import Decision, Explanation, explain
from jaxseq._gru import gru, gru_cell, gru_init
from jaxseq._layers import bidirectional, stack
from jaxseq._lstm import lstm, lstm_cell, lstm_init
from jaxseq._recurrence import SAME_AS_H, Cell, Pullback, StepResult
from jaxseq._rnn import rnn, rnn_cell, rnn_init
from jaxseq._scan import scan
from jaxseq._separable import depthwise_conv, separable_conv
from jaxseq._time_options import TimeOptions
from jaxseq._types import ConvParams, GRUParams, LSTMParams, LSTMState, RNNParams

if TYPE_CHECKING:
    from jaxseq import autoregressive, convert, diagnostics, reference, testing

__version__ = "0.1.0"

__all__ = [
    "SAME_AS_H",
    "Cell",
    "ConvParams",
    "Decision",
    "Explanation",
    "GRUParams",
    "LSTMParams",
    "LSTMState",
    "Pullback",
    "RNNParams",
    "StepResult",
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
    "explain",
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
    "tuning",
]

# Modules that no op needs. They are imported when they are first used, which keeps `import jaxseq` fast.
_LAZY_MODULES = ("autoregressive", "convert", "diagnostics", "reference", "testing")

if not TYPE_CHECKING:  # a type checker would accept any name

    def __getattr__(name: str) -> Any:
        if name in _LAZY_MODULES:
            return import_module(f"jaxseq.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY_MODULES})
