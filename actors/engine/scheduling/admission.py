"""Who is given blocks, where, and which of them: whole prompts only, in order, on top of what the cache holds."""

from __future__ import annotations

from collections.abc import Sequence as Listed

from actors.engine.config import EngineConfig
from actors.engine.scheduling.placement import RankView, choose_rank
from actors.engine.scheduling.rank_state import RankState
from actors.engine.scheduling.roster import Roster
from actors.engine.scheduling.sequence import Sequence, SequenceState
from actors.types import AttemptMode

State = SequenceState


class Admission:
    """Takes the head of the queue while the whole of it fits on one rank. Nobody overtakes the head, not even where it
    does not fit: as others end room grows on every rank, so its turn comes.
    """

    def __init__(self, config: EngineConfig, ranks: Listed[RankState], roster: Roster, max_model_len: int) -> None:
        self._config = config
        self._ranks = ranks
        self._roster = roster
        self.max_model_len = max_model_len
        self._refused: tuple[int, tuple[int | None, ...]] | None = None

    def next(self) -> Sequence | None:
        """Admits the head if there is room: it holds its blocks and has left the queue. None if nobody can be."""
        if not self._roster.queue:
            return None
        sequence = self._roster.queue[0]
        rooms = tuple(self._room(rank) for rank in self._ranks)
        if not any(room is not None and room > 0 for room in rooms) or self._refused == (sequence.id, rooms):
            return None  # Nothing was freed since: a prefix of thousands of blocks is not searched for in every step.
        total = -(-self._token_count(sequence) // self._config.block_size)
        number = choose_rank(
            [self._view(sequence, total, rank, room) for rank, room in zip(self._ranks, rooms, strict=True)]
        )
        if number is None:
            self._refused = (sequence.id, rooms)
            return None
        self._refused = None
        rank = self._ranks[number]
        blocks = rank.prefix.take(sequence)
        found = len(blocks)
        blocks += rank.pool.allocate(total - found)
        self._roster.admit(sequence, number, blocks, found * self._config.block_size, _first_state(sequence))
        sequence.published = found
        return sequence

    def _room(self, rank: RankState) -> int | None:
        """Replies that grow need a block each before long; admission leaves it to them."""
        return rank.pool.free - rank.growing if rank.active < self._config.max_num_seqs else None

    def _view(self, sequence: Sequence, total: int, rank: RankState, room: int | None) -> RankView:
        match = rank.prefix.peek(sequence)
        found = len(match.blocks)
        cached = found * self._config.block_size
        return RankView(
            room=room,
            needed=total - found + match.free_count,
            uncached=0 if sequence.mode is AttemptMode.DECODE else len(sequence.tokens) - cached,
            queued=rank.queued_tokens,
            active=rank.active,
            held=rank.pool.used * self._config.block_size,
            has_sibling=any(other.key.request_id == sequence.key.request_id for other in rank.holders),
        )

    def _token_count(self, sequence: Sequence) -> int:
        """Tokens that admission makes room for."""
        margins = {
            AttemptMode.PREFILL: 0,
            AttemptMode.COLOCATED: 1,
            AttemptMode.DECODE: max(1, self._config.reserve_margin_tokens),
        }
        return min(len(sequence.tokens) + margins[sequence.mode], self.max_model_len)


def _first_state(sequence: Sequence) -> SequenceState:
    if sequence.mode is AttemptMode.DECODE:
        return State.RECEIVING
    if sequence.mode is AttemptMode.PREFILL and not sequence.reservation_granted:
        return State.RESERVING
    return State.RUNNING
