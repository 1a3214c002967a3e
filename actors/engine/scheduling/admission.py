"""Who is given blocks, and which of them: whole prompts only, in order of rank, on top of what the cache holds."""

from __future__ import annotations

from actors.engine.config import EngineConfig
from actors.engine.scheduling.block_pool import BlockPool
from actors.engine.scheduling.prefix import PrefixCache
from actors.engine.scheduling.roster import Roster
from actors.engine.scheduling.sequence import Sequence, SequenceState
from actors.types import AttemptMode

State = SequenceState


class Admission:
    """Takes the head of the queue while the whole of it fits. Nobody overtakes the head."""

    def __init__(
        self, config: EngineConfig, pool: BlockPool, roster: Roster, prefix: PrefixCache, max_model_len: int
    ) -> None:
        self._config = config
        self._pool = pool
        self._roster = roster
        self._prefix = prefix
        self._max_model_len = max_model_len
        self._refused: tuple[int, int] | None = None

    def next(self) -> Sequence | None:
        """Admits the head if there is room: it holds its blocks and has left the queue. None if nobody can be."""
        if not self._roster.queue or self._roster.active >= self._config.max_num_seqs:
            return None
        sequence = self._roster.queue[0]
        # Replies that grow need a block each before long; admission leaves it to them.
        room = self._pool.free - self._roster.growing
        if self._refused == (sequence.id, room):
            return None  # Nothing was freed since: a prefix of thousands of blocks is not searched for in every step.
        total = -(-self._token_count(sequence) // self._config.block_size)
        match = self._prefix.peek(sequence)
        if total - len(match.blocks) + match.free_count > room:
            self._refused = (sequence.id, room)
            return None
        self._refused = None
        blocks = self._prefix.take(sequence)
        found = len(blocks)
        blocks += self._pool.allocate(total - found)
        self._roster.admit(sequence, blocks, found * self._config.block_size, _first_state(sequence))
        sequence.published = found
        return sequence

    def _token_count(self, sequence: Sequence) -> int:
        """Tokens that admission makes room for."""
        margins = {
            AttemptMode.PREFILL: 0,
            AttemptMode.COLOCATED: 1,
            AttemptMode.DECODE: max(1, self._config.reserve_margin_tokens),
        }
        return min(len(sequence.tokens) + margins[sequence.mode], self._max_model_len)


def _first_state(sequence: Sequence) -> SequenceState:
    if sequence.mode is AttemptMode.DECODE:
        return State.RECEIVING
    if sequence.mode is AttemptMode.PREFILL and not sequence.reservation_granted:
        return State.RESERVING
    return State.RUNNING
