"""What the planner says of the workers it knows."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from actors.types import EngineRole
from cluster.metrics.sheet import Sheet
from cluster.registry import ENCODERS, PREPROCESSORS, Snapshot


@dataclass(kw_only=True, slots=True)
class PlannerCounters:
    """Since its start."""

    losses: Counter[str] = field(default_factory=Counter)
    """Workers whose lease ran out, by pool."""
    role_changes: Counter[tuple[str, EngineRole, EngineRole]] = field(default_factory=Counter)
    """By pool, former and new role."""


def planner_sheet(term: int, snapshot: Snapshot, counters: PlannerCounters) -> Sheet:
    sheet = Sheet()
    sheet.add("ernie_planner_term", term)
    ready = Counter(entry.pool for entry in snapshot.engines if entry.ready)
    loading = Counter(entry.pool for entry in snapshot.loading) + Counter(
        entry.pool for entry in snapshot.engines if not entry.ready
    )
    ready.update({PREPROCESSORS: len(snapshot.preprocessors), ENCODERS: len(snapshot.encoders)})
    for state, counts in (("ready", ready), ("loading", loading)):
        for pool in sorted(ready.keys() | loading.keys()):
            sheet.add("ernie_workers", counts[pool], pool=pool, state=state)
    for pool, count in counters.losses.items():
        sheet.add("ernie_parts_lost_total", count, pool=pool)
    for (pool, former, role), count in counters.role_changes.items():
        sheet.add("ernie_role_changes_total", count, pool=pool, former=former, role=role)
    return sheet
