"""Recurrences of nonlinear cells that are parallel in time, by Newton iterations.

_call       the public function: checks, time first in processing order, the report
_rule       the derivation: the states as a fixed point, and their gradient by the implicit function theorem
_newton     the iterations
_jacobian   the Jacobian of a step with respect to the state, or its diagonal
_pointwise  whether the step of a cell is pointwise
_solve      the linear recurrence of an iteration
_steps      the steps of a cell at all times at once; states as vectors
"""

from jaxseq._parallel._call import parallel
from jaxseq._types import ParallelReport

__all__ = ["ParallelReport", "parallel"]
