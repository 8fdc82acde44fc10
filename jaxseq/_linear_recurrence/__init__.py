"""Recurrences that are linear in their state.

_call        the public function: checks, masks
_rule        the recurrence, its derivation, and its gradient
_truncation  windows of truncated backpropagation
_solve       algorithms for one recurrence: step by step, in chunks, with an associative scan
_shards      time sharded over devices
"""

from jaxseq._linear_recurrence._call import linear_recurrence as linear_recurrence
from jaxseq._linear_recurrence._rule import Inputs as Inputs
from jaxseq._linear_recurrence._rule import Options as Options
from jaxseq._linear_recurrence._rule import run as run
from jaxseq._linear_recurrence._solve import Algorithm as Algorithm
from jaxseq._linear_recurrence._truncation import run_truncated as run_truncated
from jaxseq._linear_recurrence._truncation import window_starts as window_starts
