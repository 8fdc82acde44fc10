"""The trial of a subject at one point: its numbers, and the evidence against them."""

from functools import cached_property

import numpy as np

from jaxseq.testing._evidence import ByDifferences, ByTruth, Evidence
from jaxseq.testing._numbers import Numbers


class Trial(Numbers):
    """The numbers at one point, with what contradicts them."""

    @cached_property
    def by_differences(self) -> ByDifferences | None:
        """Evidence from differences; None below float64, where they decide nothing."""
        if self.subject.dtype != np.float64:
            return None
        evidence = ByDifferences.random(self)
        if evidence.kink():
            self.notes.append("f has a kink here, its slopes to the two sides differ: take another point")
        return evidence

    @cached_property
    def by_elements(self) -> Evidence | None:
        """Evidence on single elements: from the truth, or from differences where nothing else is known."""
        if self.true is not None:
            return ByTruth(self, self._kink)
        return ByDifferences.of_elements(self) if self.subject.dtype == np.float64 else None

    @property
    def evidence(self) -> list[Evidence]:
        """All there is."""
        return [e for e in (self.by_differences, self.by_elements) if e is not None]

    @cached_property
    def wrong(self) -> bool:
        """Whether anything contradicts the result at this point."""
        return any(e.against(n) for e in self.evidence for n in range(len(self.leaves)))

    def _kink(self, leaf: int) -> float:
        """By how much rightful derivatives of f may differ. A reference is believed, and so is its choice at a kink."""
        believed = self.subject.reference is not None
        return 0.0 if believed or self.by_differences is None else self.by_differences.kink(leaf)
