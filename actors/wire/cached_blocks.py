"""What an engine tells routers of its prefix cache: everything once, then net changes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

from ernie_serving.internal.v1 import engine_link_pb2 as pb

HASHES_PER_MESSAGE = 16_384


class CachedBlocksFeed:
    """The chain hashes of an engine's prefix cache, and which of them listeners have not heard of."""

    def __init__(self) -> None:
        self._present: set[bytes] = set()
        self._untold: dict[bytes, bool] = {}
        """Hashes that came or went since the last message, and whether they are there now."""

    def note(self, stored: Iterable[bytes], removed: Iterable[bytes]) -> None:
        """Takes changes. One and its opposite cancel out."""
        for hashes, present in ((stored, True), (removed, False)):
            for hash in hashes:
                if (hash in self._present) == present:
                    continue
                (self._present.add if present else self._present.remove)(hash)
                if hash in self._untold:
                    del self._untold[hash]
                else:
                    self._untold[hash] = present

    def take_changes(self) -> Iterator[pb.CachedBlocks]:
        """Messages for those who have heard all before."""
        untold, self._untold = self._untold, {}
        for part in _parts(hash for hash, present in untold.items() if present):
            yield pb.CachedBlocks(stored_hashes=part)
        for part in _parts(hash for hash, present in untold.items() if not present):
            yield pb.CachedBlocks(removed_hashes=part)

    def snapshot(self) -> Iterator[pb.CachedBlocks]:
        """Messages for a newcomer. Changes must have been taken: they would not fit what it hears."""
        if self._untold:
            raise ValueError("there are changes to be told first")
        parts = _parts(self._present)
        yield pb.CachedBlocks(snapshot=True, stored_hashes=next(parts, []))
        for part in parts:
            yield pb.CachedBlocks(stored_hashes=part)


def apply_cached_blocks(known: set[bytes], message: pb.CachedBlocks) -> None:
    """The listener's side."""
    if message.snapshot:
        known.clear()
    known.update(message.stored_hashes)
    known.difference_update(message.removed_hashes)


def _parts(hashes: Iterable[bytes]) -> Iterator[list[bytes]]:
    rest = iter(hashes)
    while part := list(islice(rest, HASHES_PER_MESSAGE)):
        yield part
