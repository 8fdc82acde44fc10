"""The mLSTM: an LSTM whose memory is a matrix, and whose gates read the input only.

_chunks.py    the recurrence, in chunks of steps
_call.py      the public functions, and the maps around the recurrence
"""

from jaxseq._mlstm._call import mlstm as mlstm
from jaxseq._mlstm._call import mlstm_cell as mlstm_cell
from jaxseq._mlstm._call import mlstm_init as mlstm_init
from jaxseq._mlstm._call import state_of as state_of
