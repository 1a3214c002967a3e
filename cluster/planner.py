"""The planner: registry of engines and encoders, and the role of every engine.

Soft state, off the request path: routers keep their last snapshot and their own streams when it is away, and engines
tell a new planner who they are with their next renewal. An engine that is to change its role hears of it in the answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import replace
from typing import Protocol

from ray import serve

from actors.reports import EncoderInfo, EngineInfo, GroupReport, LoadReport, RoleOrder
from actors.types import EngineRole
from cluster.autoscaling import Scaling
from cluster.config import ClusterConfig
from cluster.decisions import DecisionKind, DecisionLog
from cluster.logs import log_as_serve_does
from cluster.metrics.planner import PlannerCounters, planner_sheet
from cluster.planner_memory import Mix, PlannerMemory
from cluster.registry import (
    LEASE_S,
    EncoderEntry,
    EngineEntry,
    Latency,
    LoadingEntry,
    PreprocessorEntry,
    Registry,
    RouterEntry,
    Snapshot,
    split_roles,
)
from cluster.repair import Repair, successor
from cluster.roles import Move, RoleMover, check_move, find_engine, serving, substitutes
from cluster.scaler import Scaler
from cluster.scaling_policy import Echo

log = logging.getLogger(__name__)

EXPIRY_PERIOD_S = LEASE_S / 6
DECIDE_PERIOD_S = 1.0


class Memory(Protocol):
    """See ``PlannerMemory``."""

    async def load(self, configured: Mix) -> dict[str, Counter[EngineRole]]: ...

    def keep(self, configured: Mix, wanted: Mix) -> None: ...


class Planner:
    """One replica. Every method is quick and runs on the replica's event loop."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: ClusterConfig, term: int | None = None, memory: Memory | None = None
    ) -> None:
        """Serve names neither ``term`` nor ``memory``."""
        self._wanted = {pool.name: Counter(pool.role_counts()) for pool in config.pools}
        self._configured = {pool.name: pool.role_counts() for pool in config.pools}
        self._movers = {
            pool.name: RoleMover(pool.move_roles, config.slo) for pool in config.pools if pool.move_roles is not None
        }
        self._repair = Repair()
        self._orders: dict[str, RoleOrder] = {}
        """By incarnation, of engines of which it is not known yet that they have done it."""
        self._leaving: set[str] = set()
        """Incarnations of engines that were asked to end."""
        if term is None:
            log_as_serve_does()
            memory = kept = PlannerMemory(serve.get_replica_context().app_name)
            term = kept.take_term()
        self._term = term
        self._memory = memory
        self._kept = {} if memory is None else await memory.load(self._configured)
        self._registry = Registry(self._term)
        self.counters = PlannerCounters()
        self._decisions = DecisionLog(time.time)
        self._scaler = Scaler(config, self._term)
        self._changed = asyncio.Event()
        self._told = self._snapshot()
        self._begun = asyncio.Event()
        if self._term == 1:
            self._begin()
        self._expiry = asyncio.get_running_loop().create_task(self._expire())
        self._deciding = asyncio.get_running_loop().create_task(self._decide())
        log.info("planner term %d", self._term)

    def _begin(self) -> None:
        """From now on it knows who is there, and decides. Of engines that are there, what another planner wanted is
        wanted still; where that is not known, they keep the roles they have.
        """
        self._scaler.begin()
        for pool, configured in self._configured.items():
            present = self._registry.present(pool, {})
            known = self._kept.get(pool, present) if present else present
            self._wanted[pool] = split_roles(configured, known, self._scaler.target(pool))
        self._keep()
        self._begun.set()

    def _keep(self) -> None:
        if self._memory is not None:
            self._memory.keep(self._configured, self._wanted)

    async def assign_role(self, incarnation: str, pool: str) -> EngineRole:
        """Answers a starting engine.

        An engine more than wanted usually replaces one whose lease has yet to run out, so the answer waits for a
        vacancy as long as a lease lasts. A planner that follows another first waits one lease for engines to report.
        """
        await self._begun.wait()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LEASE_S + EXPIRY_PERIOD_S):
                while not self._registry.has_vacancy(pool, self._wanted[pool], self._becoming):
                    await self._changed.wait()
        return self._registry.assign(incarnation, pool, self._wanted[pool], self._becoming, time.monotonic())

    @property
    def _becoming(self) -> dict[str, EngineRole]:
        """Roles of engines that change theirs, by incarnation."""
        return {incarnation: order.role for incarnation, order in self._orders.items()}

    async def still_loading(
        self, incarnation: str, pool: str, role: EngineRole, ranks: tuple[tuple[int, int], ...]
    ) -> None:
        entry = LoadingEntry(pool=pool, role=role, ranks=ranks)
        self._registry.renew_loading(incarnation, entry, time.monotonic())

    async def renew_engine(
        self, info: EngineInfo, pool: str, ready: bool, load: LoadReport | None, group: GroupReport | None = None
    ) -> RoleOrder | None:
        """What the engine is to do about its role, until it has."""
        entry = EngineEntry(info=info, pool=pool, ready=ready, load=load, group=group)
        self._registry.renew_engine(entry, time.monotonic())
        self._notify()
        order = self._orders.get(info.incarnation)
        if order is not None and order.epoch != info.epoch:
            order = None
            self._done(info, pool)
        return order

    def _done(self, info: EngineInfo, pool: str) -> None:
        order = self._orders.pop(info.incarnation)
        self.counters.role_changes[pool, order.former, order.role] += 1
        log.info("engine %s is %s now", info.engine_id, info.role)

    async def order_role(self, name: str, role: EngineRole) -> str:
        """An engine, by its id or a part of it, is to take a role. Returns its id; the change itself takes a while.

        Raises:
            NotFound, InvalidRequest: no engine, or several, of that name.
            Unavailable: it cannot go now, see ``check_move``.
        """
        await self._begun.wait()
        entry = find_engine(self._registry.snapshot().engines, name)
        if entry.info.role is not role or entry.info.incarnation in self._orders:
            self._order(Move(entry, role, "by hand"), self._away())
        return entry.info.engine_id

    def _away(self, but: str = "") -> list[str]:
        """Incarnations of engines that are no substitutes: they leave, or change their role."""
        return [one for one in (*self._orders, *self._leaving) if one != but]

    def _order(self, move: Move, away: Sequence[str], *, shifts: bool = True) -> None:
        """``shifts``: how many engines are wanted of each role changes with it, whatever becomes of the engine: what
        replaces one that dies meanwhile takes the role that was ordered.
        """
        entry, role, why = move.mover, move.role, move.why
        info = entry.info
        alone = check_move(self._registry.snapshot().engines, entry, role, away)
        order = RoleOrder(term=self._term, epoch=info.epoch, former=info.role, role=role, substitutes=alone)
        self._orders[info.incarnation] = order
        if shifts:
            self._wanted[entry.pool] += Counter({role: 1})
            self._wanted[entry.pool] -= Counter({info.role: 1})
            self._keep()
        self.counters.role_decisions[entry.pool, info.role, role] += 1
        self._decisions.note(
            DecisionKind.ROLE,
            pool=entry.pool,
            subject=info.engine_id,
            change=f"{info.role} -> {role}",
            reason=why,
        )
        log.warning("engine %s is to be %s instead of %s: %s", info.engine_id, role, info.role, why)
        self._notify()

    async def _decide(self) -> None:
        if not self._begun.is_set():
            await asyncio.sleep(LEASE_S)
            self._begin()
        while True:
            self._decide_once(time.monotonic())
            await asyncio.sleep(DECIDE_PERIOD_S)

    def _decide_once(self, now: float) -> None:
        for pool, mover in self._movers.items():
            move = mover.decide(self._registry.snapshot(), pool, now, self._away())
            if move is not None:
                self._order(move, self._away())
        if not self._orders:
            move = self._repair.decide(self._registry.snapshot(), self._wanted, now, self._away())
            if move is not None:
                self._order(move, self._away(), shifts=False)
        for scaling in self._scaler.decide(self._registry.snapshot(), self._wanted, now):
            self._scale(scaling)

    def _scale(self, scaling: Scaling) -> None:
        if scaling.role is not None:
            self._wanted[scaling.pool][scaling.role] += scaling.target - scaling.former
            self._keep()
        self.counters.scalings[scaling.pool, "up" if scaling.target > scaling.former else "down"] += 1
        change = f"{scaling.former} -> {scaling.target}"
        self._decisions.note(
            DecisionKind.SCALE, pool=scaling.pool, subject=scaling.pool, change=change, reason=scaling.why
        )
        log.warning("%s: %s replicas: %s", scaling.pool, change, scaling.why)
        self._notify()

    async def scale_of(self, pool: str, known: Echo) -> Echo:
        """What a replica of a pool that scales is to echo to Serve, which has heard ``known`` before."""
        answer, scaling = self._scaler.answer(pool, known)
        if scaling is not None:
            self._scale(scaling)
        return answer

    async def may_leave(self, incarnation: str) -> bool:
        """Asked by an engine that is to end, again and again until it may: the last of a role serves on until another
        one has its role. Where no other can, it may go.
        """
        self._leaving.add(incarnation)
        engines = self._registry.snapshot().engines
        entry = next((entry for entry in engines if entry.info.incarnation == incarnation), None)
        if entry is None or substitutes(serving(engines, self._away()), incarnation):
            return True
        if any(one not in self._leaving for one in self._orders):
            return False
        move = successor(serving(engines, self._away(but=incarnation)), entry)
        if move is None:
            return True
        self._order(move, self._away(but=incarnation), shifts=False)
        return False

    async def renew_encoder(self, info: EncoderInfo, queued_patches: int, busy: float = 0.0) -> None:
        entry = EncoderEntry(info=info, queued_patches=queued_patches, busy=busy)
        self._registry.renew_encoder(entry, time.monotonic())
        self._notify()

    async def renew_preprocessor(
        self, incarnation: str, address: str, queue_age_s: float = 0.0, busy: float = 0.0
    ) -> None:
        entry = PreprocessorEntry(incarnation=incarnation, address=address, queue_age_s=queue_age_s, busy=busy)
        self._registry.renew_preprocessor(entry, time.monotonic())
        self._notify()

    async def renew_router(self, incarnation: str, latency: Latency | None) -> None:
        self._registry.renew_router(RouterEntry(incarnation=incarnation, latency=latency), time.monotonic())
        self._notify()

    async def metrics(self) -> bytes:
        """Its page, in the text format of Prometheus."""
        return planner_sheet(self._snapshot(), self.counters).text()

    async def leave(self, incarnation: str) -> None:
        self._registry.leave(incarnation)
        self._forget(incarnation)
        self._notify()

    def _forget(self, incarnation: str) -> None:
        self._orders.pop(incarnation, None)
        self._leaving.discard(incarnation)

    async def snapshot(self, known_version: int, known_term: int, timeout_s: float) -> Snapshot:
        """Returns as soon as the snapshot differs from the known one, at latest after ``timeout_s``.

        A planner that follows another answers once everybody had a lease's time to report: until then an entry that is
        missing means nothing.
        """
        await self._begun.wait()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while (self._told.version, self._term) == (known_version, known_term):
                    await self._changed.wait()
        return self._snapshot()

    @property
    def _version(self) -> int:
        return self._registry.version + self._decisions.count

    def _snapshot(self) -> Snapshot:
        seen = self._registry.snapshot()
        return replace(seen, version=self._version, pools=self._scaler.pools(), decisions=self._decisions.kept)

    def _notify(self, lost: Container[str] = ()) -> None:
        """Tells whoever waits if anything changed, and notes who came and went. ``lost``: incarnations that did not say
        goodbye.
        """
        if self._version == self._told.version:
            return  # as after most renewals, which bring loads alone
        known = self._told.members()
        members = self._registry.snapshot().members()
        for incarnation, (pool, name) in members.items():
            if incarnation not in known:
                self._note_fleet(pool, name, "joined")
        for incarnation, (pool, name) in known.items():
            if incarnation not in members:
                self._note_fleet(pool, name, "lost" if incarnation in lost else "left")
        self._told = self._snapshot()
        self._changed.set()
        self._changed = asyncio.Event()

    def _note_fleet(self, pool: str, name: str, change: str) -> None:
        self._decisions.note(DecisionKind.FLEET, pool=pool, subject=name, change=change)
        self.counters.fleet[pool, change] += 1

    async def _expire(self) -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(EXPIRY_PERIOD_S)
            if time.monotonic() - before > LEASE_S / 2:
                continue  # this process stood still: renewals wait to be heard
            lost = self._registry.expire(time.monotonic())
            for incarnation in lost:
                log.warning("lease of %s ran out", incarnation)
                self._forget(incarnation)
            self._notify(lost)

    def check_health(self) -> None:
        for task, what in ((self._expiry, "lease clock"), (self._deciding, "decisions")):
            if task.done():
                raise RuntimeError(f"the planner's {what} stopped") from task.exception()

    def close(self) -> None:
        """Ends its tasks."""
        self._expiry.cancel()
        self._deciding.cancel()
