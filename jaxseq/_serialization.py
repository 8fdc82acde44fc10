"""Registration of the public NamedTuples with `jax.export`, which serializes functions that take or return them.

The serialized names are part of the format: a name always refers to the same class.
"""

from contextlib import suppress

from jax import export

from jaxseq import autoregressive, cells, diagnostics
from jaxseq._conv import ConvParams
from jaxseq._gru import GRUParams
from jaxseq._lstm import LSTMParams, LSTMState
from jaxseq._rnn import RNNParams

REGISTERED: dict[str, type] = {
    "jaxseq.ConvParams": ConvParams,
    "jaxseq.GRUParams": GRUParams,
    "jaxseq.LSTMParams": LSTMParams,
    "jaxseq.LSTMState": LSTMState,
    "jaxseq.RNNParams": RNNParams,
    "jaxseq.autoregressive.Linear": autoregressive.Linear,
    "jaxseq.cells.ClassicGRUParams": cells.ClassicGRUParams,
    "jaxseq.cells.IndRNNParams": cells.IndRNNParams,
    "jaxseq.cells.LayerNormGRUParams": cells.LayerNormGRUParams,
    "jaxseq.cells.LayerNormLSTMParams": cells.LayerNormLSTMParams,
    "jaxseq.cells.MGUParams": cells.MGUParams,
    "jaxseq.cells.PeepholeLSTMParams": cells.PeepholeLSTMParams,
    "jaxseq.cells.ProjectedLSTMParams": cells.ProjectedLSTMParams,
    "jaxseq.cells.SLSTMParams": cells.SLSTMParams,
    "jaxseq.cells.SLSTMState": cells.SLSTMState,
    "jaxseq.diagnostics.JacobianProducts": diagnostics.JacobianProducts,
    "jaxseq.diagnostics.Lyapunov": diagnostics.Lyapunov,
    "jaxseq.diagnostics.TruncationBias": diagnostics.TruncationBias,
}

for name, kind in REGISTERED.items():
    with suppress(ValueError):  # already registered: this module was reloaded
        export.register_namedtuple_serialization(kind, serialized_name=name)
