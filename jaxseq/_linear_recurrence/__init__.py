"""Recurrences that are linear in their state.

_call     the public function: checks, masks, processing order
_rule     the recurrence, its derivation, and its gradient
_solve    algorithms for one recurrence: step by step, in chunks, with an associative scan
_shards   time sharded over devices
"""

from jaxseq._linear_recurrence._call import linear_recurrence

__all__ = ["linear_recurrence"]
