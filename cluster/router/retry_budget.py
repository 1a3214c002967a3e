"""How much work a router does twice: a share of the requests it admits, so that losses cannot multiply its load."""

from __future__ import annotations

from collections.abc import Callable

FLOOR_PER_S = 10.0
"""Retries that are paid for by time alone: whoever waits for the budget gets through, also when nobody new comes."""


class RetryBudget:
    """A token bucket that may go into debt: ``spend`` never refuses, it says how long to wait.

    Args:
        share: retries earned by each admitted request.
        burst: retries saved up at most, and at hand in the beginning: an engine may be lost with all its requests.
    """

    def __init__(self, *, share: float, burst: float, clock: Callable[[], float]) -> None:
        self._share = share
        self._burst = burst
        self._clock = clock
        self._saved = burst
        self._since = clock()

    @property
    def saved(self) -> float:
        """Retries at hand; below zero when some wait."""
        now = self._clock()
        self._saved = min(self._burst, self._saved + (now - self._since) * FLOOR_PER_S)
        self._since = now
        return self._saved

    def admit(self) -> None:
        """A request was admitted."""
        self._saved = min(self._burst, self.saved + self._share)

    def spend(self) -> float:
        """Takes one retry; returns the seconds it has to wait for."""
        self._saved = self.saved - 1.0
        return max(0.0, -self._saved / FLOOR_PER_S)

    def try_spend(self) -> bool:
        """Takes one retry if there is one at hand: for work that may as well be left out."""
        if self.saved < 1.0:
            return False
        self._saved -= 1.0
        return True
