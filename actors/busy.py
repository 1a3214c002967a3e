"""How busy a worker was lately."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

WINDOW_S = 5.0


@dataclass(slots=True, eq=False)
class _Piece:
    begin: float
    weight: float
    end: float | None = None


class BusyShare:
    """Share of the last ``WINDOW_S`` seconds that work took. Thread-safe.

    Args:
        capacity: pieces of work that can go on at once.
        clock: monotonic seconds.
    """

    def __init__(self, capacity: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        self._capacity = capacity
        self._clock = clock
        self._pieces: deque[_Piece] = deque()
        self._lock = threading.Lock()

    @contextmanager
    def doing(self, weight: float = 1.0) -> Iterator[None]:
        """Around a piece of work. ``weight``: the share of it that counts."""
        piece = _Piece(self._clock(), weight)
        with self._lock:
            self._pieces.append(piece)
        try:
            yield
        finally:
            piece.end = self._clock()
            self.share()

    def share(self) -> float:
        """0 to 1; work that still goes on counts as far as it has come."""
        now = self._clock()
        start = now - WINDOW_S
        with self._lock:
            while self._pieces and (end := self._pieces[0].end) is not None and end <= start:
                self._pieces.popleft()
            spans = [(piece, now if piece.end is None else piece.end) for piece in self._pieces]
        done = sum(piece.weight * max(0.0, end - max(start, piece.begin)) for piece, end in spans)
        return min(1.0, done / WINDOW_S / self._capacity)
