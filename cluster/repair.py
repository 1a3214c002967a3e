"""Roles that are not as they should be, and who takes another one to mend that. Pure, on a given clock.

A pool may have other roles than wanted because Serve ended whichever engine it chose, or because the engines of a role
died and nothing replaces them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace

from actors.types import EngineRole
from cluster.registry import EngineEntry, Snapshot
from cluster.roles import Move, can_answer, least_busy, serving, substitutes

BROKEN_S = 30.0
"""For so long no request can be answered, and nobody is on the way, before an engine takes a role nobody has any more.
An engine that crashed is usually back by then."""


@dataclass(slots=True)
class Repair:
    """Decides again and again; remembers since when nothing works."""

    _broken_since: float = math.inf

    def decide(
        self,
        snapshot: Snapshot,
        wanted: Mapping[str, Mapping[EngineRole, int]],
        now: float,
        away: Container[str],
    ) -> Move | None:
        """One engine that is to change, if any. ``wanted``: engines of each pool by role; ``away``: incarnations of
        those that leave or change already. Nothing that is decided here changes what is wanted.
        """
        stays = [entry for entry in serving(snapshot.engines) if entry.info.incarnation not in away]
        if can_answer(entry.info for entry in stays):
            self._broken_since = math.inf
            return next((move for pool in wanted if (move := _misplaced(stays, pool, wanted[pool])) is not None), None)
        if not stays or snapshot.loading:
            self._broken_since = math.inf
            return None
        self._broken_since = min(self._broken_since, now)
        if now - self._broken_since < BROKEN_S:
            return None
        return _to_answer(stays, "no request could be answered and nobody comes")


def _misplaced(stays: Sequence[EngineEntry], pool: str, wanted: Mapping[EngineRole, int]) -> Move | None:
    """In a pool that is complete, an engine of a role with too many becomes one of a role with too few."""
    own = [entry for entry in stays if entry.pool == pool]
    present = Counter(entry.info.role for entry in own)
    short = [role for role in EngineRole if present[role] < wanted.get(role, 0)]
    if not short or len(own) != sum(wanted.values()):
        return None
    movers = [
        entry
        for entry in own
        if present[entry.info.role] > wanted.get(entry.info.role, 0) and substitutes(stays, entry.info.incarnation)
    ]
    why = f"{short[0]} has {present[short[0]]} of {wanted[short[0]]} wanted"
    return Move(min(movers, key=least_busy), short[0], why) if movers else None


def _to_answer(stays: Sequence[EngineEntry], why: str) -> Move | None:
    """The least busy engine that can make requests answerable by a change of its role alone; splitting the work goes
    before doing both."""
    for role in EngineRole:
        for mover in sorted(stays, key=least_busy):
            after = [replace(one.info, role=role) if one is mover else one.info for one in stays]
            if mover.info.role is not role and can_answer(after):
                return Move(mover, role, why)
    return None


def successor(serving: Sequence[EngineEntry], leaver: EngineEntry) -> Move | None:
    """Who is to take over before ``leaver`` goes, which serves until then; None if nobody can. ``serving``: the engines
    there are, ``leaver`` among them."""
    stays = [entry for entry in serving if entry is not leaver]
    move = _to_answer(stays, f"{leaver.info.engine_id} leaves and is the last to {_does(leaver.info.role)}")
    return move if move is not None and substitutes(serving, move.mover.info.incarnation) else None


def _does(role: EngineRole) -> str:
    return "prefill" if role is EngineRole.PREFILL else "decode" if role is EngineRole.DECODE else "do both"
