"""Registration of the public NamedTuples with `jax.export`, which serializes functions that take or return them.

The serialized names are part of the format: a name always refers to the same class.
"""

from contextlib import suppress

from jax import export

from jaxseq import _types

REGISTERED: dict[str, type] = {
    "jaxseq.ConvParams": _types.ConvParams,
    "jaxseq.GRUParams": _types.GRUParams,
    "jaxseq.LSTMParams": _types.LSTMParams,
    "jaxseq.LSTMState": _types.LSTMState,
    "jaxseq.MLSTMParams": _types.MLSTMParams,
    "jaxseq.MLSTMState": _types.MLSTMState,
    "jaxseq.ParallelReport": _types.ParallelReport,
    "jaxseq.QRNNParams": _types.QRNNParams,
    "jaxseq.QRNNState": _types.QRNNState,
    "jaxseq.RNNParams": _types.RNNParams,
    "jaxseq.SeparableConvParams": _types.SeparableConvParams,
    "jaxseq.autoregressive.Linear": _types.Linear,
    "jaxseq.cells.ClassicGRUParams": _types.ClassicGRUParams,
    "jaxseq.cells.IndRNNParams": _types.IndRNNParams,
    "jaxseq.cells.LayerNormGRUParams": _types.LayerNormGRUParams,
    "jaxseq.cells.LayerNormLSTMParams": _types.LayerNormLSTMParams,
    "jaxseq.cells.LRUParams": _types.LRUParams,
    "jaxseq.cells.MGUParams": _types.MGUParams,
    "jaxseq.cells.MinGRUParams": _types.MinGRUParams,
    "jaxseq.cells.MinLSTMParams": _types.MinLSTMParams,
    "jaxseq.cells.PeepholeLSTMParams": _types.PeepholeLSTMParams,
    "jaxseq.cells.ProjectedLSTMParams": _types.ProjectedLSTMParams,
    "jaxseq.cells.RGLRUParams": _types.RGLRUParams,
    "jaxseq.cells.S5Params": _types.S5Params,
    "jaxseq.cells.SLSTMParams": _types.SLSTMParams,
    "jaxseq.cells.SLSTMState": _types.SLSTMState,
    "jaxseq.cells.SelectiveSSMParams": _types.SelectiveSSMParams,
    "jaxseq.diagnostics.JacobianProducts": _types.JacobianProducts,
    "jaxseq.diagnostics.Lyapunov": _types.Lyapunov,
    "jaxseq.diagnostics.TruncationBias": _types.TruncationBias,
}

for name, kind in REGISTERED.items():
    with suppress(ValueError):  # already registered: this module was reloaded
        export.register_namedtuple_serialization(kind, serialized_name=name)
