"""What an engine says of itself."""

from __future__ import annotations

from actors.engine.scheduling.scheduler import Scheduler
from actors.types import LoadReport


def measure(scheduler: Scheduler) -> LoadReport:
    """As of now; the step thread's to call."""
    roster, pool, prefix = scheduler.roster, scheduler.pool, scheduler.prefix
    return LoadReport(
        step=scheduler.step,
        running=roster.running,
        waiting=roster.waiting_count,
        free_blocks=pool.free,
        total_blocks=pool.total,
        block_size=scheduler.config.block_size,
        queued_tokens=roster.queued_tokens,
        reserved=len(roster.holders) - roster.running,
        cached_blocks=pool.cached,
        prefix_queried_tokens=prefix.queried_tokens,
        prefix_hit_tokens=prefix.hit_tokens,
        preemptions=scheduler.preemptions,
    )
