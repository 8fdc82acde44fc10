"""Conversion of parameters from and to other libraries, none of which is imported.

`from_*(op, weights)` converts a state dict, a pytree or a module to parameters of jaxseq. `to_*(op, params)` converts
them back. `op` is the name of the layer in jaxseq and determines the equations. A layer with other equations raises an
error.

Names of the layers (N is the number of spatial axes, 1 to 3). Empty cell: the library has no such layer, or none that
is converted:

| `op` | torch | Flax linen | Flax nnx | Haiku | Equinox | Keras |
|---|---|---|---|---|---|---|
| `"rnn"` | `RNN` | `SimpleCell` | `SimpleCell` | `VanillaRNN` | | `SimpleRNN` |
| `"gru"` | `GRU` | `GRUCell` | `GRUCell` | | `GRUCell` | `GRU` |
| `"classic_gru"` | | | | `GRU` | | `GRU(reset_after=False)` |
| `"lstm"` | `LSTM` | `LSTMCell` | `LSTMCell` | `LSTM` | `LSTMCell` | `LSTM` |
| `"projected_lstm"` | `LSTM(proj_size=)` | | | | | |
| `"mgu"` | | `MGUCell` | | | | |
| `"conv_lstm"` | | `ConvLSTMCell` | | `ConvNDLSTM` | | `ConvLSTMND` |
| `"conv"` | `ConvNd` | `Conv` | `Conv` | `ConvND` | `ConvNd` | `ConvND` |
| `"conv_transpose"` | `ConvTransposeNd` | `ConvTranspose` | `ConvTranspose` | `ConvNDTranspose` | as torch | as Haiku |

All functions support `jax.jit` and `jax.grad`. Each file contains the layout of one library, and `_layout.py` contains
the operations that they share.
"""

from jaxseq.convert._equinox import from_equinox, to_equinox
from jaxseq.convert._flax import from_flax, from_nnx, to_flax, to_nnx
from jaxseq.convert._haiku import from_haiku, to_haiku
from jaxseq.convert._keras import from_keras, to_keras
from jaxseq.convert._torch import from_torch, to_torch

__all__ = [
    "from_equinox",
    "from_flax",
    "from_haiku",
    "from_keras",
    "from_nnx",
    "from_torch",
    "to_equinox",
    "to_flax",
    "to_haiku",
    "to_keras",
    "to_nnx",
    "to_torch",
]
