"""When something is due for which attempt."""

from __future__ import annotations

import heapq
from collections.abc import Collection

from actors.types import SequenceKey


class Timers:
    """What is due is checked by whoever set it: a timer may outlive its reason."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, SequenceKey]] = []

    def set(self, due: float, key: SequenceKey) -> None:
        heapq.heappush(self._heap, (due, key))

    @property
    def next_due(self) -> float | None:
        return self._heap[0][0] if self._heap else None

    def pop_due(self, now: float) -> list[SequenceKey]:
        """Keys of the timers that are due, removed, in order of time."""
        keys = []
        while self._heap and self._heap[0][0] <= now:
            keys.append(heapq.heappop(self._heap)[1])
        return keys

    def prune(self, *alive: Collection[SequenceKey]) -> None:
        """Drops timers of other keys than those ``alive`` once they are the most."""
        if len(self._heap) > 64 + 4 * sum(len(keys) for keys in alive):
            self._heap = [timer for timer in self._heap if any(timer[1] in keys for keys in alive)]
            heapq.heapify(self._heap)
