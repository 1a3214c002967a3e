"""Which block hashes an engine can find: on some rank, whichever."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from actors.engine.scheduling.block_pool import Changes


class FindableBlocks:
    """Joins the changes of all ranks' pools."""

    def __init__(self) -> None:
        self._ranks: Counter[bytes] = Counter()
        """By hash, on how many ranks it is."""

    def update(self, changes: Iterable[Changes]) -> Changes:
        """The net changes of the whole, given those of each pool."""
        moves: Counter[bytes] = Counter()
        for change in changes:
            moves.update(change.stored)
            moves.subtract(change.removed)
        stored, removed = [], []
        for hash, move in moves.items():
            before = self._ranks[hash]
            self._ranks[hash] += move
            if not before and self._ranks[hash]:
                stored.append(hash)
            elif before and not self._ranks[hash]:
                removed.append(hash)
            if not self._ranks[hash]:
                del self._ranks[hash]
        return Changes(tuple(stored), tuple(removed))
