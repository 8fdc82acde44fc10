"""Trial: a subject at one point, with the evidence for and against its derivative."""

from functools import cached_property

import numpy as np

from jaxseq.testing._evidence import ByDifferences, ByTruth, Evidence
from jaxseq.testing._numbers import Numbers


class Trial(Numbers):
    """`Numbers` at one point, with the evidence against them."""

    @cached_property
    def by_differences(self) -> ByDifferences | None:
        """Evidence from finite differences; None below float64, where they are too inaccurate."""
        if self.subject.dtype != np.float64:
            return None
        evidence = ByDifferences.random(self)
        if evidence.kink():
            self.notes.append("f has a kink here (its one-sided slopes differ): pass another point")
        return evidence

    @cached_property
    def by_elements(self) -> Evidence | None:
        """Evidence on single elements: from the expected derivative, or from finite differences if there is none."""
        if self.true is not None:
            return ByTruth(self, self._kink)
        return ByDifferences.of_elements(self) if self.subject.dtype == np.float64 else None

    @property
    def evidence(self) -> list[Evidence]:
        """All evidence at this point."""
        return [e for e in (self.by_differences, self.by_elements) if e is not None]

    @cached_property
    def wrong(self) -> bool:
        """Whether anything contradicts the result at this point."""
        return any(e.against(n) for e in self.evidence for n in range(len(self.leaves)))

    def _kink(self, leaf: int) -> float:
        """Return how far valid derivatives may differ at a kink; zero with a reference, whose choice is accepted."""
        believed = self.subject.reference is not None
        return 0.0 if believed or self.by_differences is None else self.by_differences.kink(leaf)
