"""What an engine says of itself."""

from __future__ import annotations

from actors.engine.scheduling.scheduler import Scheduler
from actors.reports import LoadReport


def measure(scheduler: Scheduler) -> LoadReport:
    """As of now, of all ranks together; the step thread's to call."""
    roster, ranks = scheduler.roster, scheduler.ranks
    return LoadReport(
        step=scheduler.step,
        running=roster.running,
        waiting=roster.waiting_count,
        free_blocks=sum(rank.pool.free for rank in ranks),
        total_blocks=sum(rank.pool.total for rank in ranks),
        block_size=scheduler.config.block_size,
        queued_tokens=roster.queued_tokens,
        reserved=roster.holder_count - roster.running,
        cached_blocks=sum(rank.pool.cached for rank in ranks),
        prefix_queried_tokens=sum(rank.prefix.queried_tokens for rank in ranks),
        prefix_hit_tokens=sum(rank.prefix.hit_tokens for rank in ranks),
        preemptions=scheduler.preemptions,
    )
