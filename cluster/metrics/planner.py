"""What the planner says of the workers it knows, and of what it decided."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import permutations, product

from actors.types import EngineRole
from cluster.metrics.sheet import Sheet
from cluster.registry import Snapshot


@dataclass(kw_only=True, slots=True)
class PlannerCounters:
    """Since its start."""

    fleet: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Workers that joined, left or were lost, by pool and change."""
    role_decisions: Counter[tuple[str, EngineRole, EngineRole]] = field(default_factory=Counter)
    """By pool, former and new role."""
    role_changes: Counter[tuple[str, EngineRole, EngineRole]] = field(default_factory=Counter)
    """Of these, those that were done."""
    scalings: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By pool and direction."""


def planner_sheet(snapshot: Snapshot, counters: PlannerCounters) -> Sheet:
    sheet = Sheet()
    sheet.add("ernie_planner_term", snapshot.term)
    ready = Counter(pool for pool, _ in snapshot.members().values())
    loading = Counter(entry.pool for entry in snapshot.loading)
    pools = sorted({scale.name for scale in snapshot.pools} | ready.keys() | loading.keys())
    for pool, (state, counts) in product(pools, (("ready", ready), ("loading", loading))):
        sheet.add("ernie_workers", counts[pool], pool=pool, state=state)
    for scale in snapshot.pools:
        sheet.add("ernie_pool_target_replicas", scale.target, pool=scale.name)
        sheet.add("ernie_pool_min_replicas", scale.min, pool=scale.name)
        sheet.add("ernie_pool_max_replicas", scale.max, pool=scale.name)
    # Also what never happened: a rate needs a first value.
    for pool, change in product(pools, ("joined", "left", "lost")):
        sheet.add("ernie_fleet_changes_total", counters.fleet[pool, change], pool=pool, change=change)
    for scale, direction in product(snapshot.pools, ("up", "down")):
        count = counters.scalings[scale.name, direction]
        sheet.add("ernie_scaling_decisions_total", count, pool=scale.name, direction=direction)
    engines = {entry.pool for entry in snapshot.engines} | loading.keys()
    roles = (EngineRole.PREFILL, EngineRole.DECODE)
    usual = {(pool, former, role) for pool in engines for former, role in permutations(roles, 2)}
    for name, moves in (("decisions", counters.role_decisions), ("changes", counters.role_changes)):
        for pool, former, role in sorted(usual | moves.keys()):
            count = moves[pool, former, role]
            sheet.add(f"ernie_role_{name}_total", count, pool=pool, former=former, role=role)
    return sheet
