"""Which KV blocks are in use, and what the others still hold. Pure bookkeeping: no tensors, no locks.

A block is *used* while somebody holds a reference, *cached* when nobody does but its hash still names its content, and
*empty* otherwise. Cached blocks are free: they are handed out when no empty one is left, the longest unused first.

    empty --allocate--> used --publish--> used, named --release--> cached --lookup--> used, named
      ^------release-----+                   cached --allocate (eviction)--> used
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import NamedTuple


class Match(NamedTuple):
    """The cached blocks of a prefix, without references; ``free_count`` of them are nobody's at present."""

    blocks: list[int]
    free_count: int


class Changes(NamedTuple):
    """Hashes that became findable and that ceased to be. No hash is in both."""

    stored: tuple[bytes, ...]
    removed: tuple[bytes, ...]


class BlockPool:
    """Reference-counted allocator of blocks 0 .. total - 1; low numbers are handed out first."""

    def __init__(self, total: int) -> None:
        if total < 1:
            raise ValueError(f"a pool needs blocks, got {total}")
        self.total = total
        self._references = [0] * total
        self._empty = list(range(total - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._hashes: list[bytes | None] = [None] * total
        self._blocks: dict[bytes, int] = {}
        self._stored: dict[bytes, None] = {}
        self._removed: dict[bytes, None] = {}

    @property
    def free(self) -> int:
        """Blocks that ``allocate`` can hand out, with or without a known content."""
        return len(self._empty) + len(self._cached)

    @property
    def used(self) -> int:
        return self.total - self.free

    @property
    def cached(self) -> int:
        """Of the free blocks, those whose content can still be found."""
        return len(self._cached)

    def resize(self, total: int) -> None:
        """Blocks from ``total`` on are no more, and what they held is forgotten; or there are new ones, empty.

        Raises ValueError if one that would go is used.
        """
        gone = range(total, self.total)
        used = [block for block in gone if self._references[block]]
        if total < 1 or used:
            raise ValueError(f"a pool cannot have {total} blocks: {f'block {used[0]} is used' if used else 'too few'}")
        for block in gone:
            if block in self._cached:
                del self._cached[block]
                self._forget(block)
        self._empty = [*range(total - 1, self.total - 1, -1), *(block for block in self._empty if block < total)]
        more = max(0, total - self.total)
        self._references = self._references[:total] + [0] * more
        self._hashes = self._hashes[:total] + [None] * more
        self.total = total

    # References

    def allocate(self, count: int) -> list[int]:
        """``count`` blocks with one reference each, evicting what they held.

        Raises ValueError if fewer are free: ask ``free`` first.
        """
        if not 0 <= count <= self.free:
            raise ValueError(f"{count} blocks asked, {self.free} free")
        blocks = [self._empty.pop() if self._empty else self._evict() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference each; blocks without any become free. Raises ValueError on a double free.

        ``blocks`` are in the order of their tokens: the last of them is evicted first, for a prefix is of use without
        what follows it, never the other way round.
        """
        for block in reversed(blocks):
            if not self._references[block]:
                raise ValueError(f"block {block} released twice")
            self._references[block] -= 1
            if self._references[block]:
                continue
            if self._hashes[block] is None:
                self._empty.append(block)
            else:
                self._cached[block] = None

    # Content

    def peek(self, hashes: Iterable[bytes]) -> Match:
        """What ``lookup`` would find; nothing changes."""
        found = takewhile(lambda block: block is not None, map(self._blocks.get, hashes))
        blocks = [block for block in found if block is not None]
        return Match(blocks, sum(not self._references[block] for block in blocks))

    def lookup(self, hashes: Iterable[bytes]) -> list[int]:
        """Blocks of the longest known prefix of a chain, used by others or not, with a reference taken on each.

        They are shared: nobody may write to them.
        """
        blocks = self.peek(hashes).blocks
        for block in blocks:
            if not self._references[block]:
                del self._cached[block]
            self._references[block] += 1
        return blocks

    def publish(self, block: int, hash: bytes) -> None:
        """Names the content of a used block, all of whose tokens are computed.

        If another block has the name already, this one stays without. Raises ValueError for a free block, and for one
        that has another name.
        """
        if not self._references[block]:
            raise ValueError(f"block {block} is free and cannot be published")
        if self._hashes[block] not in (None, hash):
            raise ValueError(f"block {block} has another content already")
        if hash in self._blocks:
            return
        self._hashes[block] = hash
        self._blocks[hash] = block
        if hash in self._removed:
            del self._removed[hash]
        else:
            self._stored[hash] = None

    def take_changes(self) -> Changes:
        """The net changes of what can be found since the last call."""
        changes = Changes(tuple(self._stored), tuple(self._removed))
        self._stored, self._removed = {}, {}
        return changes

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        self._forget(block)
        return block

    def _forget(self, block: int) -> None:
        hash = self._hashes[block]
        assert hash is not None, f"block {block} is cached without a name"
        self._hashes[block] = None
        del self._blocks[hash]
        if hash in self._stored:
            del self._stored[hash]
        else:
            self._removed[hash] = None

    def check_integrity(self, holders: Iterable[Sequence[int]]) -> None:
        """Raises AssertionError unless ``holders`` account for exactly the references given out, every free block is
        empty or cached, and names and blocks agree.
        """
        held = Counter(block for blocks in holders for block in blocks)
        empty = set(self._empty)
        assert len(empty) == len(self._empty), "a block is free twice"
        assert not empty & self._cached.keys(), "a block is both empty and cached"
        for block, references in enumerate(self._references):
            free = block in empty or block in self._cached
            assert references == held[block], f"block {block}: {references} references, {held[block]} holders"
            assert (references == 0) == free, f"block {block}: {references} references, free lists disagree"
        assert not set(held) - set(range(self.total)), "a holder names a block outside the pool"
        names = {hash: block for block, hash in enumerate(self._hashes) if hash is not None}
        assert names == self._blocks, "names and blocks disagree"
        assert len(names) == sum(hash is not None for hash in self._hashes), "two blocks have one name"
        assert all(self._hashes[block] is not None for block in self._cached), "a cached block has no name"
        assert all(self._hashes[block] is None for block in empty), "an empty block has a name"
        assert self._stored.keys() <= names.keys(), "a change tells of a block that cannot be found"
        assert not self._removed.keys() & names.keys(), "a change denies a block that can be found"
