"""Which engine takes another role, and when. Pure: entries of the registry in, decisions out, on a given clock.

An engine that changes its role is away for a while: it finishes or moves what it has and reads the vision experts or
gives them up. So it may only go if the others can do everything without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from actors.errors import InvalidRequest, NotFound, Unavailable
from actors.reports import EngineInfo
from actors.types import EngineRole
from cluster.config_scaling import RoleMoves, Slo
from cluster.pressure import Pressure, lateness, measure
from cluster.registry import EngineEntry, Snapshot


def serving(entries: Iterable[EngineEntry], moving: Iterable[str] = ()) -> list[EngineEntry]:
    """Engines that take requests: ready, not leaving, and not among those ordered to move."""
    away = set(moving)
    return [entry for entry in entries if entry.serves and entry.info.incarnation not in away]


def can_answer(infos: Iterable[EngineInfo]) -> bool:
    """Whether requests can run: on one engine that does both, or on two that may exchange KV."""
    infos = list(infos)
    if any(info.role is EngineRole.COLOCATED for info in infos):
        return True
    prefill, decode = (
        {info.kv_identity for info in infos if info.role is role} for role in (EngineRole.PREFILL, EngineRole.DECODE)
    )
    return bool(prefill & decode)


def substitutes(entries: Iterable[EngineEntry], without: str) -> tuple[str, ...]:
    """Incarnations of serving engines other than ``without``, if they can answer requests alone; else empty."""
    others = [entry.info for entry in entries if entry.info.incarnation != without]
    return tuple(info.incarnation for info in others) if can_answer(others) else ()


def find_engine(entries: Sequence[EngineEntry], name: str) -> EngineEntry:
    """By its id, or a part of it that no other has. Raises NotFound or InvalidRequest with the field ``engine``."""
    found = [entry for entry in entries if entry.info.engine_id == name]
    found = found or [entry for entry in entries if name and name in entry.info.engine_id]
    if not found:
        known = ", ".join(sorted(entry.info.engine_id for entry in entries)) or "none"
        raise NotFound(f"engine: {name!r} is not known; there are {known}", reason="ENGINE_NOT_FOUND", field="engine")
    if len(found) > 1:
        several = ", ".join(sorted(entry.info.engine_id for entry in found))
        raise InvalidRequest(f"engine: {name!r} could be {several}", field="engine")
    return found[0]


def check_move(
    entries: Sequence[EngineEntry], mover: EngineEntry, role: EngineRole, moving: Iterable[str]
) -> tuple[str, ...]:
    """The substitutes of an engine that is to take another role. ``moving``: incarnations of those that do already.

    Where no request can be answered as it is and one could be afterwards, the engines of that time are the substitutes.

    Raises:
        Unavailable: reason ROLE_BUSY for an engine that is not ready, leaves or moves already; LAST_OF_ROLE if the
            others could not answer requests alone.
    """
    info = mover.info
    stays = serving(entries, moving)
    if mover not in stays:
        raise Unavailable(f"engine {info.engine_id} is not ready, leaves or changes its role now", reason="ROLE_BUSY")
    alone = substitutes(stays, info.incarnation)
    if not alone and not can_answer(entry.info for entry in stays):
        after = [replace(info, role=role) if entry is mover else entry.info for entry in stays]
        alone = tuple(one.incarnation for one in after) if can_answer(after) else ()
    if not alone:
        message = f"engine {info.engine_id} is needed as {info.role}: the others cannot prefill and decode without it"
        raise Unavailable(message, reason="LAST_OF_ROLE")
    return alone


@dataclass(frozen=True, slots=True)
class Move:
    mover: EngineEntry
    role: EngineRole
    why: str


@dataclass(slots=True)
class RoleMover:
    """Decides for one pool, again and again: hysteresis needs memory. ``now`` in seconds of any clock."""

    config: RoleMoves
    slo: Slo = field(default_factory=Slo)
    _short: EngineRole | None = None
    _since: float = 0.0
    _moved_at: float = field(default=float("-inf"))

    def decide(self, snapshot: Snapshot, pool: str, now: float, moving: Sequence[str]) -> Move | None:
        """One engine of the pool whose role changes now, if any. ``moving``: see ``check_move``. An empty registry
        decides nothing.
        """
        stays = serving(snapshot.engines, moving)
        late = lateness(snapshot.routers, self.slo, changed_s_ago=now - self._moved_at)
        pressure = measure(stays, self.config, late)
        short = self._short_of(pressure)
        if short is not self._short:
            self._short, self._since = short, now
        if short is None or moving or now - self._since < self.config.hold_s:
            return None
        if now - self._moved_at < self.config.cooldown_s:
            return None
        spare = EngineRole.DECODE if short is EngineRole.PREFILL else EngineRole.PREFILL
        candidates = [
            entry
            for entry in stays
            if entry.pool == pool and entry.info.role is spare and substitutes(stays, entry.info.incarnation)
        ]
        if not candidates:
            return None
        self._moved_at = now
        why = f"prefill at {pressure.prefill:.2f}, decode at {pressure.decode:.2f} of what is well"
        return Move(min(candidates, key=least_busy), short, why)

    def _short_of(self, pressure: Pressure) -> EngineRole | None:
        if pressure.prefill >= 1.0 and pressure.decode <= self.config.idle:
            return EngineRole.PREFILL
        if pressure.decode >= 1.0 and pressure.prefill <= self.config.idle:
            return EngineRole.DECODE
        return None


def least_busy(entry: EngineEntry) -> tuple[int, int, str]:
    """Whoever has least to finish goes."""
    load = entry.load
    busy = (0, 0) if load is None else (load.running + load.waiting + load.reserved, load.queued_tokens)
    return (*busy, entry.info.engine_id)
