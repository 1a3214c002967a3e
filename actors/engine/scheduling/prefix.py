"""Sequences and the content of blocks: what is found for a new one, and what it leaves for others."""

from __future__ import annotations

from collections.abc import Iterator

from actors.engine.scheduling.block_hash import BlockHasher
from actors.engine.scheduling.block_pool import BlockPool, Match
from actors.engine.scheduling.sequence import Sequence

READ_BLOCKS = 64
"""Hashed at once while a prefix is looked up."""


class PrefixCache:
    """Looks prefixes up in the pool and publishes computed blocks there. A sequence without hasher takes no part.

    Tokens are hashed when their blocks are looked for or computed: all of a long prompt at once takes 10 ms or more.
    """

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self._pool = pool
        self._block_size = block_size
        self.queried_tokens = 0
        """Tokens of sequences looked up at their first admission."""
        self.hit_tokens = 0
        """Of these, found."""

    def peek(self, sequence: Sequence) -> Match:
        """What ``take`` would take; nothing changes."""
        return self._pool.peek(self._hashes(sequence))

    def take(self, sequence: Sequence) -> list[int]:
        """The longest known prefix of what is to be computed, a reference taken on each block."""
        blocks = self._pool.lookup(self._hashes(sequence))
        if sequence.hasher is not None and not sequence.prompt_logprobs_due and not sequence.preemptions:
            self.queried_tokens += len(sequence.tokens)
            self.hit_tokens += len(blocks) * self._block_size
        return blocks

    def publish(self, sequence: Sequence) -> None:
        """Names the blocks of a sequence that became full of computed tokens."""
        whole = sequence.computed // self._block_size
        if whole <= sequence.published or sequence.hasher is None:
            return
        hashes = self._read(sequence, sequence.hasher, whole)
        for number in range(sequence.published, whole):
            self._pool.publish(sequence.blocks[number], hashes[number])
        sequence.published = whole

    def _hashes(self, sequence: Sequence) -> Iterator[bytes]:
        """Of blocks that may be found: the last token must be computed, for what comes after it is drawn from that."""
        if sequence.hasher is None or sequence.prompt_logprobs_due:
            return
        end = (len(sequence.tokens) - 1) // self._block_size
        for first in range(0, end, READ_BLOCKS):
            stop = min(end, first + READ_BLOCKS)
            yield from self._read(sequence, sequence.hasher, stop)[first:stop]

    def _read(self, sequence: Sequence, hasher: BlockHasher, count: int) -> list[bytes]:
        """Hashes of the first ``count`` blocks of known tokens, or more."""
        if len(hasher.hashes) < count:
            hasher.extend(sequence.tokens[hasher.token_count : count * self._block_size])
        return hasher.hashes
