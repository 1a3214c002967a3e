"""Who waits for blocks on a decode engine."""

from __future__ import annotations

from concurrent.futures import Future
from typing import NamedTuple

from actors.errors import Unavailable
from actors.types import SequenceKey


class Reservation(NamedTuple):
    """Blocks held for a transfer."""

    rank: int
    """Of the group: whose blocks they are."""
    block_table: list[int]
    held_tokens: int
    """Leading tokens that are in the blocks already."""


class Reservations:
    """Futures of reservations without an answer. The step thread's own; callbacks of the futures run on it."""

    def __init__(self, retry_after_s: float) -> None:
        self._retry_after_s = retry_after_s
        self._waiting: dict[SequenceKey, Future[Reservation]] = {}

    def add(self, key: SequenceKey, future: Future[Reservation]) -> bool:
        """False if that attempt has one already: the new one has failed."""
        if key in self._waiting:
            future.set_exception(Unavailable(f"attempt {key} has a reservation already", reason="DUPLICATE"))
            return False
        self._waiting[key] = future
        return True

    def grant(self, key: SequenceKey, rank: int, block_table: tuple[int, ...], held_tokens: int) -> None:
        self._waiting.pop(key).set_result(Reservation(rank, list(block_table), held_tokens))

    def refuse(self, key: SequenceKey, reason: str, message: str) -> None:
        error = Unavailable(message, reason=reason, retry_after_s=self._retry_after_s)
        self._waiting.pop(key).set_exception(error)

    def refuse_all(self, reason: str, message: str) -> None:
        """The engine ends."""
        for future in self._waiting.values():
            future.set_exception(Unavailable(message, reason=reason))
        self._waiting.clear()
