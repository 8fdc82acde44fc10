"""Parameters from and to other libraries. None of them is imported here: a state dict, a pytree or a module is enough.

`from_*(op, weights)` gives our parameters, `to_*(op, params)` theirs. `op` is what our layer is called, and says which
equations are meant; where a layer has others, that is an error, never an approximation.

What each library calls it (a number of axes of space, 1 to 3, is N):

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

All are functions of arrays that `jax.jit` and `jax.grad` go through: the gradient to theirs is that to ours, pulled
back. A file knows the layout of one library, `_layout.py` what layouts are made of.
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
