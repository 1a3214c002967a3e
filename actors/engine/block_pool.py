"""Which KV blocks are free. Pure bookkeeping: no tensors, no locks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence


class BlockPool:
    """Reference-counted allocator of blocks 0 .. total - 1; low numbers are handed out first."""

    def __init__(self, total: int) -> None:
        if total < 1:
            raise ValueError(f"a pool needs blocks, got {total}")
        self.total = total
        self._references = [0] * total
        self._free = list(range(total - 1, -1, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.total - len(self._free)

    def allocate(self, count: int) -> list[int]:
        """``count`` blocks with one reference each. Raises ValueError if fewer are free: ask ``free`` first."""
        if not 0 <= count <= len(self._free):
            raise ValueError(f"{count} blocks asked, {len(self._free)} free")
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def share(self, blocks: Sequence[int]) -> None:
        """Add a reference to blocks in use. Raises ValueError for a free one."""
        for block in blocks:
            if not self._references[block]:
                raise ValueError(f"block {block} is free and cannot be shared")
        for block in blocks:
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference each; blocks without any become free. Raises ValueError on a double free."""
        for block in reversed(blocks):
            if not self._references[block]:
                raise ValueError(f"block {block} released twice")
            self._references[block] -= 1
            if not self._references[block]:
                self._free.append(block)

    def check_integrity(self, holders: Iterable[Sequence[int]]) -> None:
        """Raises AssertionError unless ``holders`` account for exactly the references given out."""
        held = Counter(block for blocks in holders for block in blocks)
        free = set(self._free)
        assert len(free) == len(self._free), "a block is free twice"
        for block, references in enumerate(self._references):
            assert references == held[block], f"block {block}: {references} references, {held[block]} holders"
            assert (references == 0) == (block in free), f"block {block}: {references} references, free list disagrees"
        assert not set(held) - set(range(self.total)), "a holder names a block outside the pool"
