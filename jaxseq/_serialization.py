"""Registration of the public NamedTuples with `jax.export`, which serializes functions that take or return them.

The serialized names are part of the format: a name always refers to the same class.
"""

from contextlib import suppress

from jax import export

from jaxseq import _types, cells

REGISTERED: dict[str, type] = {
    "jaxseq.ConvParams": _types.ConvParams,
    "jaxseq.GRUParams": _types.GRUParams,
    "jaxseq.LSTMParams": _types.LSTMParams,
    "jaxseq.LSTMState": _types.LSTMState,
    "jaxseq.RNNParams": _types.RNNParams,
    "jaxseq.autoregressive.Linear": _types.Linear,
    "jaxseq.cells.ClassicGRUParams": cells.ClassicGRUParams,
    "jaxseq.cells.IndRNNParams": cells.IndRNNParams,
    "jaxseq.cells.LayerNormGRUParams": cells.LayerNormGRUParams,
    "jaxseq.cells.LayerNormLSTMParams": cells.LayerNormLSTMParams,
    "jaxseq.cells.MGUParams": cells.MGUParams,
    "jaxseq.cells.PeepholeLSTMParams": cells.PeepholeLSTMParams,
    "jaxseq.cells.ProjectedLSTMParams": cells.ProjectedLSTMParams,
    "jaxseq.cells.SLSTMParams": cells.SLSTMParams,
    "jaxseq.cells.SLSTMState": cells.SLSTMState,
    "jaxseq.diagnostics.JacobianProducts": _types.JacobianProducts,
    "jaxseq.diagnostics.Lyapunov": _types.Lyapunov,
    "jaxseq.diagnostics.TruncationBias": _types.TruncationBias,
}

for name, kind in REGISTERED.items():
    with suppress(ValueError):  # already registered: this module was reloaded
        export.register_namedtuple_serialization(kind, serialized_name=name)
