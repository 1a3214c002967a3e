"""Counts of values by size: what histograms are made of."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence

STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0)
"""Of one pass of a model."""
WORK_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Of a stage of a request."""
COUNTS = tuple(float(2**n) for n in range(18))
"""Of things in a batch."""


class Tally:
    """How many values were at most each of some bounds. One thread adds; any may read, a value behind at most."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self.total = 0.0
        """Sum of the values."""

    def add(self, value: float) -> None:
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self.total += value

    @property
    def count(self) -> int:
        return sum(self._counts)

    def cumulative(self) -> list[tuple[float, int]]:
        """(bound, how many values were at most that), ascending; the last bound is infinite."""
        return list(zip((*self._bounds, float("inf")), itertools.accumulate(self._counts), strict=True))
