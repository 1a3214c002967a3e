"""Engines change their roles under replies of every kind, on all parts without Ray: what clients get stays the same."""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
from collections import Counter

import pytest

from actors import engine_replica
from actors.engine import engine
from actors.errors import Unavailable
from actors.reports import RoleOrder
from actors.types import EngineRole
from actors.wire import engine_link, renewal
from cluster.router import link
from tests.chaos.mutation.sitecustomize import MUTATIONS
from tests.in_process import InProcessCluster, in_process_cluster
from tests.tiny_model import tiny_checkpoint
from tests.unit.test_resume_in_process import Reply, reply
from tests.unit.test_survival_in_process import CALLS, alone, check

PREFILL, DECODE, COLOCATED = EngineRole.PREFILL, EngineRole.DECODE, EngineRole.COLOCATED
SWITCHES = int(os.environ.get("ROLE_SWITCHES", "16"))
"""More of them for a long run."""


@pytest.fixture(autouse=True)
def quick_renewals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Orders of the planner are heard with the next one."""
    monkeypatch.setattr(renewal, "RENEW_S", 0.1)


async def change(cluster: InProcessCluster, name: str, role: EngineRole) -> None:
    """Returns when the engine has the role, and the router and the planner know."""
    await cluster.planner.order_role(name, role)
    (replica,) = [one for one in cluster.engines if one._info.engine_id == name]
    async with asyncio.timeout(60):
        while (name, role) not in [(view.info.engine_id, view.info.role) for view in cluster.parts.fleet.engines()]:
            await asyncio.sleep(0.01)
        while cluster.planner._orders:
            await asyncio.sleep(0.01)
    assert replica._info.role is role


async def keep_asking(cluster: InProcessCluster, number: int, expected: list[Reply], stop: asyncio.Event) -> int:
    for count in itertools.count():
        if stop.is_set():
            return count
        at = (number + count) % len(CALLS)
        check([await reply(cluster, CALLS[at])], [expected[at]])
    raise AssertionError


@pytest.mark.timeout(900)
async def test_replies_are_the_same_while_engines_change_roles() -> None:
    """What runs on an engine moves at once, since it is given no time to finish there."""
    expected = await alone()
    seen: Counter[tuple[EngineRole, EngineRole]] = Counter()
    roles = (PREFILL, PREFILL, DECODE, DECODE)
    async with in_process_cluster(tiny_checkpoint(), *roles, role_drain_s=0.02) as cluster:
        stop = asyncio.Event()
        asking = [asyncio.create_task(keep_asking(cluster, number, expected, stop)) for number in range(3)]
        wanted = itertools.cycle([DECODE, COLOCATED, PREFILL, DECODE, PREFILL, COLOCATED])
        turn = itertools.cycle(range(4))
        while sum(seen.values()) < SWITCHES:
            assert not any(task.done() for task in asking), [task for task in asking if task.done()]
            replica, role = cluster.engines[next(turn)], next(wanted)
            former = replica._info.role
            try:
                await change(cluster, replica._info.engine_id, role)
            except Unavailable as refused:
                assert refused.reason == "LAST_OF_ROLE"
                continue
            if former is not role:
                seen[former, role] += 1
                assert replica._engine.load().total_blocks == (
                    replica._kv_rank._cache.block_count if role is DECODE else replica._runner.block_counts[0]
                )
        stop.set()
        counts = await asyncio.gather(*asking)
        assert min(counts) > 0
        await cluster.wait_clean()
        assert {replica._info.epoch for replica in cluster.engines} != {1}


async def test_an_engine_dies_where_nobody_looks_at_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The router takes it for what it was, and it computes pictures without the experts for them."""
    for holder, name in ((engine_link.EngineLinkServicer, "_submit"), (engine, "check_request")):
        monkeypatch.setattr(holder, name, getattr(holder, name))  # so that it is as before afterwards
    monkeypatch.setattr(link.EngineLink, "info", None, raising=False)
    for name, mutate in MUTATIONS["no_epoch"].items():
        mutate(sys.modules[name])
    died = asyncio.Event()
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(engine_replica, "_exit_soon", lambda: loop.call_soon_threadsafe(died.set))
    async with in_process_cluster(tiny_checkpoint(), PREFILL, PREFILL, DECODE, DECODE) as cluster:
        mover = cluster.engines[0]
        await cluster.planner.order_role(mover._info.engine_id, DECODE)
        async with asyncio.timeout(60):
            while mover._info.role is not DECODE:
                await asyncio.sleep(0.01)
            asking = [asyncio.create_task(reply(cluster, call)) for call in CALLS]
            await died.wait()
        await cluster.kill(mover)
        check(await asyncio.gather(*asking), await alone())


async def test_an_engine_refuses_orders_that_are_void() -> None:
    async with in_process_cluster(tiny_checkpoint(), PREFILL, DECODE) as cluster:
        prefill = cluster.engines[0]
        with pytest.raises(Unavailable, match="the others cannot prefill and decode without it"):
            await cluster.planner.order_role(prefill._info.engine_id, DECODE)
        info = prefill._info
        for order in (
            RoleOrder(term=1, epoch=1, former=PREFILL, role=DECODE, substitutes=()),
            RoleOrder(term=1, epoch=2, former=PREFILL, role=DECODE, substitutes=("x",)),
            RoleOrder(term=1, epoch=1, former=DECODE, role=PREFILL, substitutes=("x",)),
            RoleOrder(term=-1, epoch=1, former=PREFILL, role=DECODE, substitutes=("x",)),
        ):
            await prefill._take_role(order)
            assert prefill._info == info and not prefill.load().draining
        assert (await reply(cluster, CALLS[0])).choices == (await alone())[0].choices


async def test_the_last_engine_of_a_role_ends_once_another_one_has_taken_it() -> None:
    """Serve ends whichever it chose. Nobody waits for a prefill engine meanwhile, and replies stay the same."""
    expected = await alone()
    async with in_process_cluster(tiny_checkpoint(), PREFILL, DECODE, DECODE, role_drain_s=0.02) as cluster:
        stop = asyncio.Event()
        asking = [asyncio.create_task(keep_asking(cluster, number, expected, stop)) for number in range(2)]
        (last,) = [engine for engine in cluster.engines if engine._info.role is PREFILL]
        cluster.engines.remove(last)
        closing = asyncio.create_task(last.close())
        async with asyncio.timeout(60):
            while not last.load().draining:
                assert {PREFILL, DECODE} <= {view.info.role for view in cluster.parts.fleet.engines()}
                await asyncio.sleep(0.01)
        assert Counter(engine._info.role for engine in cluster.engines) == {PREFILL: 1, DECODE: 1}
        await closing
        stop.set()
        assert min(await asyncio.gather(*asking)) > 0
        await cluster.wait_clean()
