"""Every attempt of an engine, in the list its state belongs to. The only place where a sequence's state changes."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence as Listed

from actors.engine.scheduling.rank_state import RankState
from actors.engine.scheduling.sequence import Sequence, SequenceState
from actors.types import AttemptMode, SequenceKey

State = SequenceState


class Roster:
    """Lists, here and of the ranks, are sorted by ``Sequence.order``; others only read them."""

    def __init__(self, ranks: Listed[RankState]) -> None:
        self.ranks = ranks
        self.by_key: dict[SequenceKey, Sequence] = {}
        self.by_id: dict[int, Sequence] = {}
        self.queue: list[Sequence] = []
        """WAITING."""
        self.expected = 0
        """Number of EXPECTED."""
        self.waiting_tokens = 0
        """Tokens that WAITING ones have to compute."""
        self._numbers = itertools.count()

    @property
    def waiting_count(self) -> int:
        """Attempts without blocks."""
        return len(self.queue) + self.expected

    @property
    def running(self) -> int:
        """Number of RUNNING."""
        return sum(rank.running for rank in self.ranks)

    @property
    def holder_count(self) -> int:
        """Attempts with blocks."""
        return sum(len(rank.holders) for rank in self.ranks)

    @property
    def queued_tokens(self) -> int:
        """Tokens of prompts, and of preempted sequences, still to be computed here."""
        return self.waiting_tokens + sum(rank.queued_tokens for rank in self.ranks)

    def rank_of(self, sequence: Sequence) -> RankState:
        """Of one that holds blocks."""
        assert sequence.rank is not None, f"{sequence.key} is {sequence.state.value} without a rank"
        return self.ranks[sequence.rank]

    def add(self, sequence: Sequence, state: SequenceState, position: float) -> None:
        """Numbers a sequence and orders it by ``position``, then by submission.

        Raises ValueError if its key is here already.
        """
        if sequence.key in self.by_key:
            raise ValueError(f"{sequence.key} is here already")
        sequence.id = next(self._numbers)
        sequence.order = (position, sequence.id)
        self.by_key[sequence.key] = sequence
        self.by_id[sequence.id] = sequence
        sequence.state = State.ENDED
        self.move(sequence, state)

    def remove(self, sequence: Sequence) -> None:
        self.move(sequence, State.ENDED)
        del self.by_key[sequence.key]
        del self.by_id[sequence.id]

    def admit(self, sequence: Sequence, rank: int, blocks: list[int], cached_tokens: int, state: SequenceState) -> None:
        """A waiting sequence was given blocks on a rank, the first of which hold the KV of ``cached_tokens``."""
        self._leave(sequence)
        sequence.begin(rank, blocks, cached_tokens)
        self._enter(sequence, state)

    def requeue(self, sequence: Sequence) -> None:
        """A sequence whose blocks were released waits again, under another number, in its old order."""
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
        self.rank_of(sequence).queued_tokens += _queued(sequence, sequence.state) - before

    def _leave(self, sequence: Sequence) -> None:
        state = sequence.state
        if state is State.WAITING:
            _take(self.queue, sequence)
        if state.holds_blocks:
            _take(self.rank_of(sequence).holders, sequence)
        self._count(sequence, state, -1)

    def _enter(self, sequence: Sequence, state: SequenceState) -> None:
        sequence.state = state
        if state is State.WAITING:
            bisect.insort(self.queue, sequence, key=_order)
        if state.holds_blocks:
            bisect.insort(self.rank_of(sequence).holders, sequence, key=_order)
        self._count(sequence, state, 1)

    def _count(self, sequence: Sequence, state: SequenceState, sign: int) -> None:
        self.expected += sign * (state is State.EXPECTED)
        if not state.holds_blocks:
            self.waiting_tokens += sign * _queued(sequence, state)
            return
        rank = self.rank_of(sequence)
        rank.running += sign * (state is State.RUNNING)
        rank.growing += sign * _grows(sequence, state)
        rank.active += sign * state.takes_part
        rank.queued_tokens += sign * _queued(sequence, state)

    def check_integrity(self, block_size: int) -> None:
        """Raises AssertionError if blocks, lists and counts disagree."""
        everyone = list(self.by_key.values())
        queue = sorted((s for s in everyone if s.state is State.WAITING), key=_order)
        assert queue == self.queue, "the queue is wrong"
        assert self.expected == sum(s.state is State.EXPECTED for s in everyone), "the count of expected is wrong"
        assert {s.id: s for s in everyone} == self.by_id, "the index by number is wrong"
        waiting = sum(_queued(s, s.state) for s in everyone if not s.state.holds_blocks)
        assert waiting == self.waiting_tokens, f"{self.waiting_tokens} waiting tokens counted, {waiting} present"
        for rank in self.ranks:
            _check_rank(rank, sorted((s for s in everyone if s.rank == rank.number), key=_order))
        for s in everyone:
            assert bool(s.blocks) == s.state.holds_blocks, f"{s.key} is {s.state.value} with {len(s.blocks)} blocks"
            assert (s.rank is not None) == s.state.holds_blocks, f"{s.key} is {s.state.value} on rank {s.rank}"
            assert s.computed <= len(s.blocks) * block_size, f"{s.key} is computed beyond its blocks"
            assert s.computed <= len(s.tokens), f"{s.key} is computed beyond its tokens"
            assert s.published <= s.computed // block_size, f"{s.key} published a block it did not compute"
            assert s.told_blocks <= len(s.blocks), f"{s.key} told the runner of blocks it has not"


def _check_rank(rank: RankState, present: list[Sequence]) -> None:
    name = f"on rank {rank.number}"
    rank.pool.check_integrity(s.blocks for s in present)
    assert present == rank.holders, f"the list of holders {name} is wrong"
    assert rank.running == sum(s.state is State.RUNNING for s in present), f"the count of running {name} is wrong"
    assert rank.growing == sum(_grows(s, s.state) for s in present), f"the count of growing {name} is wrong"
    assert rank.active == sum(s.state.takes_part for s in present), f"the count of active {name} is wrong"
    queued = sum(_queued(s, s.state) for s in present)
    assert queued == rank.queued_tokens, f"{rank.queued_tokens} queued tokens counted {name}, {queued} present"


def _order(sequence: Sequence) -> tuple[float, int]:
    return sequence.order


def _take(ordered: list[Sequence], sequence: Sequence) -> None:
    at = bisect.bisect_left(ordered, sequence.order, key=_order)
    assert ordered[at] is sequence, f"{sequence.key} is not where its order says"
    del ordered[at]


def _grows(sequence: Sequence, state: SequenceState) -> bool:
    return state is State.RUNNING and sequence.mode is not AttemptMode.PREFILL


def _queued(sequence: Sequence, state: SequenceState) -> int:
    """Tokens that a sequence in ``state`` still has to compute before it decodes."""
    if sequence.mode is AttemptMode.DECODE or state in (State.PINNED, State.ENDED):
        return 0
    return max(0, sequence.prefill_count - sequence.computed)
