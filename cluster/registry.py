"""Who is there: engines and encoders under leases. Pure state on an injected clock; the planner owns one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from actors.reports import EncoderInfo, EngineInfo, GroupReport, LoadReport
from actors.sizes import told_bytes
from actors.types import EngineRole
from cluster.config import PREPROCESSORS, ROUTERS, VISION_ENCODERS
from cluster.decisions import Decision

LEASE_S = 3.0
"""An entry that was not renewed for so long leaves the registry."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineEntry:
    """An engine as it last described itself. ``ready``: loaded and warmed up."""

    info: EngineInfo
    pool: str
    ready: bool
    load: LoadReport | None
    group: GroupReport | None = None
    """Of an engine with several ranks."""

    @property
    def serves(self) -> bool:
        """It takes requests: ready, and neither leaving nor taking another role."""
        return self.ready and not (self.load is not None and self.load.draining)


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderEntry:
    """A vision encoder as it last described itself."""

    info: EncoderInfo
    queued_patches: int
    busy: float = 0.0
    """Share of the last seconds in which it computed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreprocessorEntry:
    """A preprocessor: requests reach it through its Serve handle, pulls and audits at its address."""

    incarnation: str
    address: str
    queue_age_s: float = 0.0
    """Of the oldest request that is not begun."""
    busy: float = 0.0
    """Share of the last seconds of its workers."""

    @property
    def worker_id(self) -> str:
        return self.incarnation[:8]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadingEntry:
    """An engine that has its role and reads its weights."""

    pool: str
    role: EngineRole
    ranks: tuple[tuple[int, int], ...] = ()
    """(bytes done, bytes in all) of each."""

    @property
    def progress(self) -> str:
        """For people; empty before anything is known."""
        done, total = map(sum, zip(*self.ranks, strict=True)) if self.ranks else (0, 0)
        if not total:
            return ""
        slowest = min(range(len(self.ranks)), key=lambda rank: self._share(rank))
        behind = f", rank {slowest} at {self._share(slowest):.0%}" if len(self.ranks) > 1 else ""
        return f"{told_bytes(done)} of {told_bytes(total)}{behind}"

    def _share(self, rank: int) -> float:
        done, total = self.ranks[rank]
        return done / total if total else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Percentiles:
    """In seconds."""

    p50: float
    p95: float
    p99: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Latency:
    """What the requests waited for that ended within the last ``window_s``. None: no request says anything of it."""

    window_s: float
    count: int
    ttft_s: Percentiles | None = None
    tpot_s: Percentiles | None = None
    e2e_s: Percentiles | None = None
    slo_met: float | None = None
    """Share of them that kept to the SLO; None without one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterEntry:
    """A router as it last described itself."""

    incarnation: str
    latency: Latency | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolScale:
    """How many replicas of a pool there are to be, within its bounds."""

    name: str
    target: int
    min: int
    max: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """Immutable view. ``version`` grows when membership, role, readiness, a target or a decision changes, not with load
    or progress.
    """

    term: int
    version: int
    engines: tuple[EngineEntry, ...] = ()
    encoders: tuple[EncoderEntry, ...] = ()
    preprocessors: tuple[PreprocessorEntry, ...] = ()
    loading: tuple[LoadingEntry, ...] = ()
    routers: tuple[RouterEntry, ...] = ()
    pools: tuple[PoolScale, ...] = ()
    decisions: tuple[Decision, ...] = ()
    """The last, oldest first."""

    def members(self) -> dict[str, tuple[str, str]]:
        """(pool, id) of every worker that serves, by incarnation."""
        members = {entry.info.incarnation: (entry.pool, entry.info.engine_id) for entry in self.engines if entry.ready}
        members |= {entry.incarnation: (ROUTERS, entry.incarnation) for entry in self.routers}
        members |= {entry.info.incarnation: (VISION_ENCODERS, entry.info.encoder_id) for entry in self.encoders}
        return members | {entry.incarnation: (PREPROCESSORS, entry.worker_id) for entry in self.preprocessors}

    def may_be_empty(self, pool: str) -> bool:
        """The pool scales to none: the next request brings one."""
        return any(scale.name == pool and scale.min == 0 for scale in self.pools)

    def replicas(self, pool: str) -> int:
        """Workers of the pool that serve."""
        return sum(name == pool for name, _ in self.members().values())


class Place(NamedTuple):
    """Where a worker answers questions about itself."""

    kind: str
    """``engine``, or the pool of other workers."""
    pool: str
    worker: str
    """Its name in ``/status``."""
    address: str


def places(snapshot: Snapshot) -> list[Place]:
    """Of every worker."""
    encoders = [entry.info for entry in snapshot.encoders]
    return [
        *(Place("engine", entry.pool, entry.info.engine_id, entry.info.address) for entry in snapshot.engines),
        *(Place(VISION_ENCODERS, VISION_ENCODERS, info.encoder_id, info.address) for info in encoders),
        *(Place(PREPROCESSORS, PREPROCESSORS, entry.worker_id, entry.address) for entry in snapshot.preprocessors),
    ]


def next_role(wanted: Mapping[EngineRole, int], present: Counter[EngineRole]) -> EngineRole:
    """Picks the role furthest below its wanted count; the order of ``EngineRole`` breaks ties.

    Raises:
        ValueError: nothing is wanted.
    """
    candidates = [role for role in EngineRole if wanted.get(role, 0) > 0]
    if not candidates:
        raise ValueError("the pool wants no role")
    return max(candidates, key=lambda role: wanted[role] - present[role])


def split_roles(
    configured: Mapping[EngineRole, int], present: Mapping[EngineRole, int], total: int
) -> Counter[EngineRole]:
    """How many of ``total`` engines are to have each role: as they have it, and as configured where some are missing or
    too many."""
    wanted = Counter(present)
    while wanted.total() < total:
        wanted[next_role(configured, wanted)] += 1
    while wanted.total() > total:
        wanted[max(wanted, key=lambda role: (wanted[role] > 1, wanted[role] - configured.get(role, 0)))] -= 1
    return +wanted


class Registry:
    """Entries by incarnation. Not thread-safe: one event loop owns it."""

    def __init__(self, term: int) -> None:
        self._term = term
        self._version = 0
        self._engines: dict[str, EngineEntry] = {}
        self._encoders: dict[str, EncoderEntry] = {}
        self._preprocessors: dict[str, PreprocessorEntry] = {}
        self._loading: dict[str, LoadingEntry] = {}
        self._routers: dict[str, RouterEntry] = {}
        self._expiry: dict[str, float] = {}

    @property
    def version(self) -> int:
        return self._version

    def has_vacancy(self, pool: str, wanted: Mapping[EngineRole, int], becoming: Mapping[str, EngineRole]) -> bool:
        """True when some role of the pool is below its wanted count, counting engines that still load. ``becoming``:
        see ``present``.
        """
        present = self.present(pool, becoming)
        return any(present[role] < count for role, count in wanted.items())

    def assign(
        self,
        incarnation: str,
        pool: str,
        wanted: Mapping[EngineRole, int],
        becoming: Mapping[str, EngineRole],
        now: float,
    ) -> EngineRole:
        """Gives a starting engine its role; it holds it from now on, ready or not. ``becoming``: see ``present``."""
        if incarnation in self._loading:
            return self._loading[incarnation].role
        role = next_role(wanted, self.present(pool, becoming))
        self._loading[incarnation] = LoadingEntry(pool=pool, role=role)
        self._expiry[incarnation] = now + LEASE_S
        return role

    def present(self, pool: str, becoming: Mapping[str, EngineRole]) -> Counter[EngineRole]:
        """Engines of a pool by role, those that load included. ``becoming``: roles, by incarnation, of those that
        change theirs, who count as what they will be.
        """
        own = [entry.info for entry in self._engines.values() if entry.pool == pool]
        present = Counter(becoming.get(info.incarnation, info.role) for info in own)
        present.update(entry.role for entry in self._loading.values() if entry.pool == pool)
        return present

    def renew_loading(self, incarnation: str, entry: LoadingEntry, now: float) -> None:
        """Keeps the claim of an engine that still loads; a registry that did not know it learns of it."""
        if incarnation not in self._engines:
            self._loading[incarnation] = entry
            self._expiry[incarnation] = now + LEASE_S

    def renew_engine(self, entry: EngineEntry, now: float) -> None:
        incarnation = entry.info.incarnation
        self._loading.pop(incarnation, None)
        before = self._engines.get(incarnation)
        self._engines[incarnation] = entry
        self._expiry[incarnation] = now + LEASE_S
        if before is None or (before.info, before.ready) != (entry.info, entry.ready):
            self._version += 1

    def renew_encoder(self, entry: EncoderEntry, now: float) -> None:
        incarnation = entry.info.incarnation
        before = self._encoders.get(incarnation)
        self._encoders[incarnation] = entry
        self._expiry[incarnation] = now + LEASE_S
        if before is None or before.info != entry.info:
            self._version += 1

    def renew_preprocessor(self, entry: PreprocessorEntry, now: float) -> None:
        before = self._preprocessors.get(entry.incarnation)
        self._preprocessors[entry.incarnation] = entry
        self._expiry[entry.incarnation] = now + LEASE_S
        if before is None or before.address != entry.address:
            self._version += 1

    def renew_router(self, entry: RouterEntry, now: float) -> None:
        before = self._routers.get(entry.incarnation)
        self._routers[entry.incarnation] = entry
        self._expiry[entry.incarnation] = now + LEASE_S
        if before is None:
            self._version += 1

    def leave(self, incarnation: str) -> None:
        entries: tuple[dict[str, Any], ...] = (
            self._engines,
            self._encoders,
            self._preprocessors,
            self._loading,
            self._routers,
        )
        known = [places.pop(incarnation) for places in entries if incarnation in places]
        self._expiry.pop(incarnation, None)
        if known:
            self._version += 1

    def expire(self, now: float) -> list[str]:
        """Drops entries whose lease ran out and returns their incarnations."""
        gone = [incarnation for incarnation, expiry in self._expiry.items() if expiry <= now]
        for incarnation in gone:
            self.leave(incarnation)
        return gone

    def snapshot(self) -> Snapshot:
        return Snapshot(
            term=self._term,
            version=self._version,
            engines=tuple(self._engines.values()),
            encoders=tuple(self._encoders.values()),
            preprocessors=tuple(self._preprocessors.values()),
            loading=tuple(self._loading.values()),
            routers=tuple(self._routers.values()),
        )
