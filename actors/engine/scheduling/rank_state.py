"""One rank as the scheduler sees it: its blocks, what they hold, and the sequences that live there."""

from __future__ import annotations

from actors.engine.scheduling.block_pool import BlockPool
from actors.engine.scheduling.prefix import PrefixCache
from actors.engine.scheduling.sequence import Sequence


class RankState:
    """``holders`` and the counts are the roster's to change, ``ended_ids`` the scheduler's; others only read."""

    def __init__(self, number: int, pool: BlockPool, block_size: int) -> None:
        self.number = number
        self.pool = pool
        self.prefix = PrefixCache(pool, block_size)
        self.holders: list[Sequence] = []
        """Those that hold blocks here, sorted by ``Sequence.order``."""
        self.running = 0
        """Number of RUNNING."""
        self.growing = 0
        """Of these, those whose replies go on here."""
        self.active = 0
        """Sequences that take part in steps now or later."""
        self.queued_tokens = 0
        """Tokens of prompts, and of preempted sequences, that hold blocks and are still to be computed."""
        self.ended_ids: list[int] = []
        """Sequences that the rank's runner has to forget, told with the next plan."""
