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
from collections.abc import Container
from dataclasses import replace

import ray
from ray import serve
from ray.experimental import internal_kv

from actors.reports import EncoderInfo, EngineInfo, GroupReport, LoadReport, RoleOrder
from actors.types import EngineRole
from cluster.config import PREPROCESSORS, VISION_ENCODERS, ClusterConfig
from cluster.decisions import DecisionKind, DecisionLog
from cluster.registry import (
    LEASE_S,
    EncoderEntry,
    EngineEntry,
    LoadingEntry,
    PoolScale,
    PreprocessorEntry,
    Registry,
    Snapshot,
)
from cluster.roles import RoleMover, check_move, find_engine

log = logging.getLogger(__name__)

EXPIRY_PERIOD_S = LEASE_S / 6
DECIDE_PERIOD_S = 1.0

_TERM_NAMESPACE = b"ernie-serving"


def take_term(application: str) -> int:
    """Claims the next planner term of an application in the GCS key-value store. Terms start at 1 and only grow."""
    term = 1
    while internal_kv._internal_kv_put(
        f"planner-term/{ray.get_runtime_context().get_job_id()}/{application}/{term}".encode(),
        b"",
        overwrite=False,
        namespace=_TERM_NAMESPACE,
    ):
        term += 1
    return term


class Planner:
    """One replica. Every method is quick and runs on the replica's event loop."""

    async def __init__(self, config: ClusterConfig, term: int | None = None) -> None:  # type: ignore[misc]  # Serve awaits it
        self._wanted = {pool.name: Counter(pool.role_counts()) for pool in config.pools}
        self._movers = {pool.name: RoleMover(pool.move_roles) for pool in config.pools if pool.move_roles is not None}
        self._orders: dict[str, RoleOrder] = {}
        """By incarnation, of engines that have not done it yet."""
        self._term = take_term(serve.get_replica_context().app_name) if term is None else term
        self._registry = Registry(self._term)
        self._decisions = DecisionLog(time.time)
        self._pools = tuple(
            PoolScale(name=name, target=replicas, min=replicas, max=replicas)
            for name, replicas in (
                (PREPROCESSORS, config.preprocessor.replicas),
                (VISION_ENCODERS, config.vision_encoder.replicas),
                *((pool.name, pool.replicas) for pool in config.pools),
            )
        )
        self._changed = asyncio.Event()
        self._told = self._snapshot()
        self._decides_at = time.monotonic() + (LEASE_S if self._term > 1 else 0.0)
        self._expiry = asyncio.get_running_loop().create_task(self._expire())
        self._deciding = asyncio.get_running_loop().create_task(self._decide()) if self._movers else None
        log.info("planner term %d", self._term)

    async def assign_role(self, incarnation: str, pool: str) -> EngineRole:
        """Answers a starting engine.

        An engine more than wanted usually replaces one whose lease has yet to run out, so the answer waits for a
        vacancy as long as a lease lasts. A planner that follows another first waits one lease for engines to report.
        """
        wanted = self._wanted[pool]
        await asyncio.sleep(max(0.0, self._decides_at - time.monotonic()))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LEASE_S + EXPIRY_PERIOD_S):
                while not self._registry.has_vacancy(pool, wanted):
                    await self._changed.wait()
        return self._registry.assign(incarnation, pool, wanted, time.monotonic())

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
            self._done(order, info, pool)
            return None
        return order

    def _done(self, order: RoleOrder, info: EngineInfo, pool: str) -> None:
        del self._orders[info.incarnation]
        log.info("engine %s is %s now", info.engine_id, info.role)
        # Whoever replaces an engine of the pool takes the role that is short from now on, and not before: until it has
        # moved, it counts as what it was.
        self._wanted[pool] += Counter({order.role: 1})
        self._wanted[pool] -= Counter({order.former: 1})

    async def order_role(self, name: str, role: EngineRole) -> str:
        """An engine, by its id or a part of it, is to take a role. Returns its id; the change itself takes a while.

        Raises:
            NotFound, InvalidRequest: no engine, or several, of that name.
            Unavailable: it cannot go now, see ``check_move``.
        """
        await asyncio.sleep(max(0.0, self._decides_at - time.monotonic()))
        entry = find_engine(self._registry.snapshot().engines, name)
        if entry.info.role is not role or entry.info.incarnation in self._orders:
            self._order(entry, role, "by hand")
        return entry.info.engine_id

    def _order(self, entry: EngineEntry, role: EngineRole, why: str) -> None:
        info = entry.info
        alone = check_move(self._registry.snapshot().engines, entry, role, self._orders)
        self._orders[info.incarnation] = RoleOrder(
            term=self._term, epoch=info.epoch, former=info.role, role=role, substitutes=alone
        )
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
        await asyncio.sleep(max(0.0, self._decides_at - time.monotonic()))
        while True:
            for pool, mover in self._movers.items():
                engines = self._registry.snapshot().engines
                move = mover.decide(engines, pool, time.monotonic(), list(self._orders))
                if move is not None:
                    self._order(move.mover, move.role, move.why)
            await asyncio.sleep(DECIDE_PERIOD_S)

    async def renew_encoder(self, info: EncoderInfo, queued_patches: int) -> None:
        self._registry.renew_encoder(EncoderEntry(info=info, queued_patches=queued_patches), time.monotonic())
        self._notify()

    async def renew_preprocessor(self, incarnation: str, address: str) -> None:
        entry = PreprocessorEntry(incarnation=incarnation, address=address)
        self._registry.renew_preprocessor(entry, time.monotonic())
        self._notify()

    async def leave(self, incarnation: str) -> None:
        self._registry.leave(incarnation)
        self._orders.pop(incarnation, None)
        self._notify()

    async def snapshot(self, known_version: int, known_term: int, timeout_s: float) -> Snapshot:
        """Returns as soon as the snapshot differs from the known one, at latest after ``timeout_s``.

        A planner that follows another answers once everybody had a lease's time to report: until then an entry that is
        missing means nothing.
        """
        await asyncio.sleep(max(0.0, self._decides_at - time.monotonic()))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while (self._told.version, self._term) == (known_version, known_term):
                    await self._changed.wait()
        return self._snapshot()

    def _snapshot(self) -> Snapshot:
        seen = self._registry.snapshot()
        version = seen.version + self._decisions.count
        return replace(seen, version=version, pools=self._pools, decisions=self._decisions.kept)

    def _notify(self, lost: Container[str] = ()) -> None:
        """Tells whoever waits if anything changed, and notes who came and went. ``lost``: incarnations that did not say
        goodbye.
        """
        known = self._told.members()
        members = self._registry.snapshot().members()
        for incarnation, (pool, name) in members.items():
            if incarnation not in known:
                self._decisions.note(DecisionKind.FLEET, pool=pool, subject=name, change="joined")
        for incarnation, (pool, name) in known.items():
            if incarnation not in members:
                change = "lost" if incarnation in lost else "left"
                self._decisions.note(DecisionKind.FLEET, pool=pool, subject=name, change=change)
        now = self._snapshot()
        if now.version != self._told.version:
            self._told = now
            self._changed.set()
            self._changed = asyncio.Event()

    async def _expire(self) -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(EXPIRY_PERIOD_S)
            if time.monotonic() - before > LEASE_S / 2:
                continue  # this process stood still: renewals wait to be heard
            lost = self._registry.expire(time.monotonic())
            for incarnation in lost:
                log.warning("lease of %s ran out", incarnation)
                self._orders.pop(incarnation, None)
            self._notify(lost)

    def check_health(self) -> None:
        for task, what in ((self._expiry, "lease clock"), (self._deciding, "moving of roles")):
            if task is not None and task.done():
                raise RuntimeError(f"the planner's {what} stopped") from task.exception()
