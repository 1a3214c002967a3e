"""Every attempt of an engine, in the list its state belongs to. The only place where a sequence's state changes."""

from __future__ import annotations

import bisect
import itertools

from actors.engine.scheduling.block_pool import BlockPool
from actors.engine.scheduling.sequence import Sequence, SequenceState
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
        self.running = 0
        """Number of RUNNING."""
        self.growing = 0
        """Of these, those whose replies go on here."""
        self.active = 0
        """Sequences that take part in steps now or later."""
        self.queued_tokens = 0
        """Tokens of prompts, and of preempted sequences, still to be computed here."""
        self._numbers = itertools.count()

    @property
    def waiting_count(self) -> int:
        """Attempts without blocks."""
        return len(self.queue) + self.expected

    def add(self, sequence: Sequence, state: SequenceState, position: float) -> None:
        """Numbers a sequence and ranks it by ``position``, then by order of submission.

        Raises ValueError if its key is here already.
        """
        if sequence.key in self.by_key:
            raise ValueError(f"{sequence.key} is here already")
        sequence.id = next(self._numbers)
        sequence.rank = (position, sequence.id)
        self.by_key[sequence.key] = sequence
        self.by_id[sequence.id] = sequence
        sequence.state = State.ENDED
        self.move(sequence, state)

    def remove(self, sequence: Sequence) -> None:
        self.move(sequence, State.ENDED)
        del self.by_key[sequence.key]
        del self.by_id[sequence.id]

    def admit(self, sequence: Sequence, blocks: list[int], cached_tokens: int, state: SequenceState) -> None:
        """A waiting sequence was given blocks, the first of which hold the KV of ``cached_tokens``."""
        self._leave(sequence)
        sequence.begin(blocks, cached_tokens)
        self._enter(sequence, state)

    def requeue(self, sequence: Sequence) -> None:
        """A sequence whose blocks were released waits again, under another number, at its old rank."""
        self._leave(sequence)
        del self.by_id[sequence.id]
        sequence.restart()
        sequence.id = next(self._numbers)
        self.by_id[sequence.id] = sequence
        self._enter(sequence, State.WAITING)

    def move(self, sequence: Sequence, state: SequenceState) -> None:
        """Gives a sequence another state, and its place in the lists."""
        if sequence.state is not state:
            self._leave(sequence)
            self._enter(sequence, state)

    def advance(self, sequence: Sequence, count: int) -> None:
        """``count`` more tokens of it are computed."""
        if sequence.decodes:
            sequence.computed += count
            return
        before = _queued(sequence, sequence.state)
        sequence.computed += count
        self.queued_tokens += _queued(sequence, sequence.state) - before

    def _leave(self, sequence: Sequence) -> None:
        state = sequence.state
        if state is State.WAITING:
            _take(self.queue, sequence)
        if state.holds_blocks:
            _take(self.holders, sequence)
        self._count(sequence, state, -1)

    def _enter(self, sequence: Sequence, state: SequenceState) -> None:
        sequence.state = state
        if state is State.WAITING:
            bisect.insort(self.queue, sequence, key=_rank)
        if state.holds_blocks:
            bisect.insort(self.holders, sequence, key=_rank)
        self._count(sequence, state, 1)

    def _count(self, sequence: Sequence, state: SequenceState, sign: int) -> None:
        self.expected += sign * (state is State.EXPECTED)
        self.running += sign * (state is State.RUNNING)
        self.growing += sign * _grows(sequence, state)
        self.active += sign * state.takes_part
        self.queued_tokens += sign * _queued(sequence, state)

    def check_integrity(self, pool: BlockPool, block_size: int) -> None:
        """Raises AssertionError if blocks, lists and counts disagree."""
        everyone = list(self.by_key.values())
        pool.check_integrity(sequence.blocks for sequence in everyone)
        holders = sorted((s for s in everyone if s.state.holds_blocks), key=_rank)
        queue = sorted((s for s in everyone if s.state is State.WAITING), key=_rank)
        assert holders == self.holders, "the list of holders is wrong"
        assert queue == self.queue, "the queue is wrong"
        assert self.expected == sum(s.state is State.EXPECTED for s in everyone), "the count of expected is wrong"
        assert self.running == sum(s.state is State.RUNNING for s in everyone), "the count of running is wrong"
        assert self.growing == sum(_grows(s, s.state) for s in everyone), "the count of growing is wrong"
        assert self.active == sum(s.state.takes_part for s in everyone), "the count of active is wrong"
        assert {s.id: s for s in everyone} == self.by_id, "the index by number is wrong"
        queued = sum(_queued(s, s.state) for s in everyone)
        assert queued == self.queued_tokens, f"{self.queued_tokens} queued tokens counted, {queued} present"
        for s in everyone:
            assert bool(s.blocks) == s.state.holds_blocks, f"{s.key} is {s.state.value} with {len(s.blocks)} blocks"
            assert s.computed <= len(s.blocks) * block_size, f"{s.key} is computed beyond its blocks"
            assert s.computed <= len(s.tokens), f"{s.key} is computed beyond its tokens"
            assert s.published <= s.computed // block_size, f"{s.key} published a block it did not compute"
            assert s.told_blocks <= len(s.blocks), f"{s.key} told the runner of blocks it has not"


def _rank(sequence: Sequence) -> tuple[float, int]:
    return sequence.rank


def _take(ranked: list[Sequence], sequence: Sequence) -> None:
    at = bisect.bisect_left(ranked, sequence.rank, key=_rank)
    assert ranked[at] is sequence, f"{sequence.key} is not where its rank says"
    del ranked[at]


def _grows(sequence: Sequence, state: SequenceState) -> bool:
    return state is State.RUNNING and sequence.mode is not AttemptMode.PREFILL


def _queued(sequence: Sequence, state: SequenceState) -> int:
    """Tokens that a sequence in ``state`` still has to compute before it decodes."""
    if sequence.mode is AttemptMode.DECODE or state in (State.PINNED, State.ENDED):
        return 0
    return max(0, sequence.prefill_count - sequence.computed)
