"""Admission of bytes against a limit, first come first served. Plain asyncio; one event loop owns a budget."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable


class ByteBudget:
    """Counts bytes in use; what does not fit waits in arrival order, so a large request is never starved.

    Args:
        limit: bytes that may be in use at once.
        reclaim: called with a shortfall; frees at least that many bytes that were counted here and returns how many,
            or frees nothing and returns 0.
    """

    def __init__(self, limit: int, *, reclaim: Callable[[int], int] | None = None) -> None:
        if limit <= 0:
            raise ValueError(f"a byte budget must be positive, got {limit}")
        self.limit = limit
        self.granting = 0
        """Bytes in use whose takers have not run since they were admitted."""
        self._used = 0
        self._reclaim = reclaim
        self._waiters: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def used(self) -> int:
        return self._used

    @property
    def waiting(self) -> int:
        """Number of callers in ``take``."""
        return len(self._waiters)

    def try_take(self, byte_count: int) -> bool:
        """Takes bytes now, or nothing: also when they would fit but others wait. Zero bytes never wait."""
        return byte_count == 0 or (not self._waiters and self._admit(byte_count))

    async def take(self, byte_count: int) -> None:
        """Takes bytes as soon as they fit and everyone who came earlier has theirs.

        Raises:
            ValueError: they can never fit.
        """
        if byte_count > self.limit:
            raise ValueError(f"{byte_count} bytes can never fit into {self.limit}")
        if self.try_take(byte_count):
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (byte_count, turn)
        self._waiters.append(entry)
        try:
            await turn
            self.granting -= byte_count
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # granted in the same tick as the cancellation
                self.granting -= byte_count
                self.give(byte_count)
            elif entry in self._waiters:
                self._waiters.remove(entry)
                self.wake()
            raise

    def give(self, byte_count: int) -> None:
        """Returns bytes."""
        if not 0 <= byte_count <= self._used:
            raise ValueError(f"cannot give back {byte_count} of {self._used} bytes in use")
        self._used -= byte_count
        self.wake()

    def wake(self) -> None:
        """Admits waiters that fit now; also to be called when bytes in use became reclaimable."""
        while self._waiters and (self._waiters[0][1].cancelled() or self._admit(self._waiters[0][0])):
            byte_count, turn = self._waiters.popleft()
            if not turn.cancelled():
                self.granting += byte_count
                turn.set_result(None)

    def _admit(self, byte_count: int) -> bool:
        short = self._used + byte_count - self.limit
        if short > 0 and self._reclaim is not None:
            self._used -= self._reclaim(short)
        if self._used + byte_count > self.limit:
            return False
        self._used += byte_count
        return True
