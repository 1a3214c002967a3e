"""Every attempt of an engine, in the list its state belongs to. The only place where a sequence's state changes."""

from __future__ import annotations

import bisect

from actors.engine.block_pool import BlockPool
from actors.engine.sequence import Sequence, SequenceState
from actors.types import AttemptMode, SequenceKey

State = SequenceState


class Roster:
    """Lists are sorted by ``Sequence.rank``; others only read them."""

    def __init__(self) -> None:
        self.by_key: dict[SequenceKey, Sequence] = {}
        self.by_id: dict[int, Sequence] = {}
        self.queue: list[Sequence] = []
        """WAITING."""
        self.holders: list[Sequence] = []
        """Those that hold blocks."""
        self.expected = 0
        """Number of EXPECTED."""
        self.queued_tokens = 0
        """Prompt tokens still to be computed here."""

    @property
    def waiting_count(self) -> int:
        """Attempts without blocks."""
        return len(self.queue) + self.expected

    @property
    def running_count(self) -> int:
        return sum(sequence.state is State.RUNNING for sequence in self.holders)

    @property
    def active_count(self) -> int:
        """Sequences that take part in steps now or later."""
        return sum(sequence.state.takes_part for sequence in self.holders)

    def add(self, sequence: Sequence, state: SequenceState) -> None:
        """Raises ValueError if its key or number is here already."""
        if sequence.key in self.by_key or sequence.id in self.by_id:
            raise ValueError(f"{sequence.key} is here already")
        self.by_key[sequence.key] = sequence
        self.by_id[sequence.id] = sequence
        sequence.state = State.ENDED
        self.move(sequence, state)

    def remove(self, sequence: Sequence) -> None:
        self.move(sequence, State.ENDED)
        del self.by_key[sequence.key]
        del self.by_id[sequence.id]

    def move(self, sequence: Sequence, state: SequenceState) -> None:
        """Gives a sequence another state, and its place in the lists."""
        old, sequence.state = sequence.state, state
        if old is state:
            return
        if old is State.WAITING:
            self.queue.remove(sequence)
        elif state is State.WAITING:
            bisect.insort(self.queue, sequence, key=lambda other: other.rank)
        self.expected += (state is State.EXPECTED) - (old is State.EXPECTED)
        if state.holds_blocks and not old.holds_blocks:
            bisect.insort(self.holders, sequence, key=lambda other: other.rank)
        elif old.holds_blocks and not state.holds_blocks:
            self.holders.remove(sequence)
        self.queued_tokens += _queued(sequence, state) - _queued(sequence, old)

    def advance(self, sequence: Sequence, count: int) -> None:
        """``count`` more tokens of it are computed."""
        before = _queued(sequence, sequence.state)
        sequence.computed += count
        self.queued_tokens += _queued(sequence, sequence.state) - before

    def check_integrity(self, pool: BlockPool, block_size: int) -> None:
        """Raises AssertionError if blocks, lists and counts disagree."""
        everyone = list(self.by_key.values())
        pool.check_integrity(sequence.blocks for sequence in everyone)
        holders = sorted((s for s in everyone if s.state.holds_blocks), key=lambda s: s.rank)
        queue = sorted((s for s in everyone if s.state is State.WAITING), key=lambda s: s.rank)
        assert holders == self.holders, "the list of holders is wrong"
        assert queue == self.queue, "the queue is wrong"
        assert self.expected == sum(s.state is State.EXPECTED for s in everyone), "the count of expected is wrong"
        assert all(bool(s.blocks) == s.state.holds_blocks for s in everyone), "blocks held in a state without blocks"
        assert all(s.computed <= len(s.blocks) * block_size for s in holders), "computed beyond the blocks"
        assert {s.id: s for s in everyone} == self.by_id, "the index by number is wrong"
        queued = sum(_queued(s, s.state) for s in everyone)
        assert queued == self.queued_tokens, f"{self.queued_tokens} queued tokens counted, {queued} present"


def _queued(sequence: Sequence, state: SequenceState) -> int:
    """Prompt tokens that a sequence in ``state`` still has to compute."""
    if sequence.mode is AttemptMode.DECODE or state in (State.PINNED, State.ENDED):
        return 0
    return max(0, sequence.initial_count - sequence.computed)
