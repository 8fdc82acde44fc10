"""Gradient checks for custom differentiation rules, those of jaxseq and those of any other code.

`check_vjp(f, args)` returns a report. Print it, or call its `raise_if_failed()` in a test.
"""

from jaxseq.testing._check import check_jvp, check_vjp
from jaxseq.testing._mutants import Mutant, mutate
from jaxseq.testing._point import cotangents, lifted
from jaxseq.testing._report import CHECKS, Failure, GradientCheckError, Report, Result, Verdict
from jaxseq.testing._truncation import check_truncation

__all__ = [
    "CHECKS",
    "Failure",
    "GradientCheckError",
    "Mutant",
    "Report",
    "Result",
    "Verdict",
    "check_jvp",
    "check_truncation",
    "check_vjp",
    "cotangents",
    "lifted",
    "mutate",
]
