"""jaxseq: convolution and recurrence for JAX, with hand-derived gradients that are checked against `jax.grad`.

A recurrence consists of an input map and a recurrent map, both linear, and a pointwise cell that updates the state.

`import jaxseq` imports the containers of parameters and states only, so that it takes little longer than `import jax`.
Every other name is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from jaxseq import _serialization as _serialization
from jaxseq._types import (
    ConvParams,
    GRUParams,
    LSTMParams,
    LSTMState,
    MLSTMParams,
    MLSTMState,
    QRNNParams,
    QRNNState,
    RNNParams,
    SeparableConvParams,
)

if TYPE_CHECKING:  # the same names as in _NAMES, for type checkers and the documentation
    from jaxseq import (
        autoregressive,
        cells,
        convert,
        diagnostics,
        integrations,
        linear_maps,
        reference,
        testing,
        tuning,
    )
    from jaxseq._any_cell import recurrence, recurrence_cell
    from jaxseq._both_modes import both_modes
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
    from jaxseq._layers import bidirectional, bidirectional_init, stack, stack_init
    from jaxseq._linear_recurrence import linear_recurrence
    from jaxseq._lstm import lstm, lstm_cell, lstm_init
    from jaxseq._mlstm import mlstm, mlstm_cell, mlstm_init
    from jaxseq._parallel import ParallelReport, parallel
    from jaxseq._qrnn import qrnn, qrnn_cell, qrnn_init
    from jaxseq._recurrence import SAME_AS_H, Cell, LinearCell, Pullback, StepResult
    from jaxseq._rnn import rnn, rnn_cell, rnn_init
    from jaxseq._scan import scan
    from jaxseq._separable import depthwise_conv, depthwise_conv_init, separable_conv, separable_conv_init
    from jaxseq._time_options import TimeOptions
    from jaxseq._zero_state import zero_state

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
    "LinearCell",
    "MLSTMParams",
    "MLSTMState",
    "ParallelReport",
    "Pullback",
    "QRNNParams",
    "QRNNState",
    "RNNParams",
    "SeparableConvParams",
    "StepResult",
    "TimeOptions",
    "autoregressive",
    "bidirectional",
    "bidirectional_init",
    "both_modes",
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
    "depthwise_conv_init",
    "diagnostics",
    "explain",
    "gru",
    "gru_cell",
    "gru_init",
    "integrations",
    "linear_maps",
    "linear_recurrence",
    "lstm",
    "lstm_cell",
    "lstm_init",
    "mlstm",
    "mlstm_cell",
    "mlstm_init",
    "parallel",
    "qrnn",
    "qrnn_cell",
    "qrnn_init",
    "recurrence",
    "recurrence_cell",
    "reference",
    "rnn",
    "rnn_cell",
    "rnn_init",
    "scan",
    "separable_conv",
    "separable_conv_init",
    "stack",
    "stack_init",
    "testing",
    "tuning",
    "zero_state",
]

# The names that each module defines. The public modules define none here: they are names themselves.
_NAMES: dict[str, tuple[str, ...]] = {
    "_any_cell": ("recurrence", "recurrence_cell"),
    "_both_modes": ("both_modes",),
    "_causal_conv": ("causal_conv",),
    "_conv": ("conv", "conv_init"),
    "_conv_recurrence": (
        "conv_gru",
        "conv_gru_cell",
        "conv_gru_init",
        "conv_lstm",
        "conv_lstm_cell",
        "conv_lstm_init",
    ),
    "_conv_transpose": ("conv_transpose", "conv_transpose_init"),
    "_distributed._carry_across_shards": ("carry_across_shards",),
    "_explain": ("Decision", "Explanation", "explain"),
    "_gru": ("gru", "gru_cell", "gru_init"),
    "_layers": ("bidirectional", "bidirectional_init", "stack", "stack_init"),
    "_linear_recurrence": ("linear_recurrence",),
    "_lstm": ("lstm", "lstm_cell", "lstm_init"),
    "_mlstm": ("mlstm", "mlstm_cell", "mlstm_init"),
    "_parallel": ("ParallelReport", "parallel"),
    "_qrnn": ("qrnn", "qrnn_cell", "qrnn_init"),
    "_recurrence": ("SAME_AS_H", "Cell", "LinearCell", "Pullback", "StepResult"),
    "_rnn": ("rnn", "rnn_cell", "rnn_init"),
    "_scan": ("scan",),
    "_separable": ("depthwise_conv", "depthwise_conv_init", "separable_conv", "separable_conv_init"),
    "_time_options": ("TimeOptions",),
    "_zero_state": ("zero_state",),
}
_MODULES = ("autoregressive", "cells", "convert", "diagnostics", "integrations", "linear_maps", "reference", "testing")
_MODULES += ("tuning",)
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}

if not TYPE_CHECKING:  # a type checker would accept any name

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return import_module(f"jaxseq.{name}")
        if name not in _MODULE_OF:
            hint = import_module("jaxseq._names").hint_for_attribute(name)
            message = f"module {__name__!r} has no attribute {name!r}" + (f"; use {hint}" if hint else "")
            raise AttributeError(message, name=name, obj=import_module(__name__))
        globals()[name] = value = getattr(import_module(f"jaxseq.{_MODULE_OF[name]}"), name)
        return value


def __dir__() -> list[str]:
    return sorted({*__all__, "__version__"})
