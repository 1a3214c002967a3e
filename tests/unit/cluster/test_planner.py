from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from actors.reports import LoadReport
from actors.types import EngineRole
from cluster import planner as planner_module
from cluster import registry as registry_module
from cluster.config import ClusterConfig, EnginePool, PreprocessorPool, Roles, parse
from cluster.config_scaling import PreprocessorAutoscaling
from cluster.planner import Planner
from cluster.planner_memory import Mix, read, write
from tests.unit.cluster.test_registry import engine

CONFIG = ClusterConfig(model="m", engines=(EnginePool(name="pool", roles=Roles(prefill=1, decode=1)),))


@asynccontextmanager
async def planner(
    monkeypatch: pytest.MonkeyPatch, term: int = 1, config: ClusterConfig | None = None, memory: Any = None
) -> AsyncIterator[Planner]:
    """With leases of 0.3 s. It decides when a test says so."""
    monkeypatch.setattr(registry_module, "LEASE_S", 0.3)
    monkeypatch.setattr(planner_module, "LEASE_S", 0.3)
    monkeypatch.setattr(planner_module, "EXPIRY_PERIOD_S", 0.05)
    monkeypatch.setattr(planner_module, "DECIDE_PERIOD_S", 1000.0)
    made = Planner.__new__(Planner)
    await made.__init__(config or CONFIG, term, memory)  # type: ignore[misc]
    yield made
    made.close()


async def test_a_replacement_takes_the_role_of_the_engine_it_replaces(monkeypatch: pytest.MonkeyPatch) -> None:
    async with planner(monkeypatch) as made:
        assert await made.assign_role("a", "pool") is EngineRole.PREFILL
        assert await made.assign_role("b", "pool") is EngineRole.DECODE
        await made.renew_engine(engine("b", EngineRole.DECODE).info, "pool", True, None)
        replacement = asyncio.create_task(made.assign_role("c", "pool"))
        while not replacement.done():
            await made.renew_engine(engine("a", EngineRole.PREFILL).info, "pool", True, None)
            await asyncio.sleep(0.05)
        assert replacement.result() is EngineRole.DECODE


async def test_an_engine_more_than_wanted_gets_a_role_after_one_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    async with planner(monkeypatch) as made:
        infos = [engine("a", EngineRole.PREFILL).info, engine("b", EngineRole.DECODE).info]
        for info in infos:
            await made.renew_engine(info, "pool", True, None)
        extra = asyncio.create_task(made.assign_role("c", "pool"))
        while not extra.done():
            for info in infos:
                await made.renew_engine(info, "pool", True, None)
            await asyncio.sleep(0.05)
        assert extra.result() in (EngineRole.PREFILL, EngineRole.DECODE)


async def test_a_later_planner_hears_engines_before_it_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    async with planner(monkeypatch, term=2) as made:
        asked = asyncio.create_task(made.assign_role("c", "pool"))
        await asyncio.sleep(0)
        await made.renew_engine(engine("a", EngineRole.PREFILL).info, "pool", True, None)
        while not asked.done():
            await made.renew_engine(engine("a", EngineRole.PREFILL).info, "pool", True, None)
            await asyncio.sleep(0.05)
        assert asked.result() is EngineRole.DECODE


async def test_a_snapshot_comes_as_soon_as_something_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    async with planner(monkeypatch) as made:
        first = await made.snapshot(-1, 0, 5.0)
        waiting = asyncio.create_task(made.snapshot(first.version, first.term, 5.0))
        await asyncio.sleep(0.02)
        assert not waiting.done()
        await made.renew_engine(engine("a").info, "pool", True, None)
        assert [entry.info.incarnation for entry in (await waiting).engines] == ["a"]
        assert (await made.snapshot(99, 1, 0.01)).version == (await waiting).version


async def test_an_engine_counts_as_what_it_was_until_it_has_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decode engine is lost while another one becomes a prefill engine: what replaces it decodes."""
    config = ClusterConfig(model="m", engines=(EnginePool(name="pool", roles=Roles(prefill=1, decode=2)),))
    monkeypatch.setattr("tests.unit.cluster.test_planner.CONFIG", config)
    roles = {"a": EngineRole.PREFILL, "b": EngineRole.DECODE, "c": EngineRole.DECODE}
    async with planner(monkeypatch) as made:
        infos = {name: engine(name, role).info for name, role in roles.items()}
        for name in infos:
            assert await made.renew_engine(infos[name], "pool", True, None) is None
        assert await made.order_role("engine-b", EngineRole.PREFILL) == "engine-b"
        order = await made.renew_engine(infos["b"], "pool", True, None)
        assert order is not None and (order.role, order.epoch) == (EngineRole.PREFILL, 1)
        assert set(order.substitutes) == {"a", "c"}
        await made.leave("c")
        for name in "ab":
            await made.renew_engine(infos[name], "pool", True, None)
        assert await made.assign_role("d", "pool") is EngineRole.DECODE
        moved = replace(infos["b"], role=EngineRole.PREFILL, epoch=2)
        assert await made.renew_engine(moved, "pool", True, None) is None
        await made.leave("b")
        await made.renew_engine(infos["a"], "pool", True, None)
        assert await made.assign_role("e", "pool") is EngineRole.PREFILL


async def test_an_engine_that_is_lost_with_an_order_leaves_its_role_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """It had done what was ordered, or was about to, when it froze: nobody heard. It comes back, or is replaced."""
    config = ClusterConfig(model="m", engines=(EnginePool(name="pool", roles=Roles(prefill=1, decode=2)),))
    async with planner(monkeypatch, 1, config) as made:
        infos = {name: engine(name, EngineRole.DECODE).info for name in "bc"}
        infos["a"] = engine("a", EngineRole.PREFILL).info

        async def renew(*names: str) -> None:
            for name in names:
                await made.renew_engine(infos[name], "pool", True, IDLE)

        await renew(*"abc")
        await made.order_role("engine-b", EngineRole.PREFILL)
        while "b" in made._orders:
            await renew("a", "c")
            await asyncio.sleep(0.05)
        assert await made.assign_role("d", "pool") is EngineRole.PREFILL
        infos["b"] = replace(infos["b"], role=EngineRole.PREFILL, epoch=2)
        await renew(*"abc")
        for now in range(100):
            made._decide_once(float(now))
        assert not made._orders


async def test_the_planner_remembers_who_came_and_went_and_what_it_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    async with planner(monkeypatch) as made:
        first, second = engine("a", EngineRole.PREFILL).info, engine("b", EngineRole.DECODE).info
        await made.renew_engine(first, "pool", False, None)
        assert (await made.snapshot(-1, 0, 5.0)).decisions == ()
        for info in (first, second):
            await made.renew_engine(info, "pool", True, None)
        await made.renew_engine(engine("c", EngineRole.DECODE).info, "pool", True, None)
        known = await made.snapshot(-1, 0, 5.0)
        waiting = asyncio.create_task(made.snapshot(known.version, known.term, 5.0))
        await asyncio.sleep(0.01)
        await made.order_role("engine-b", EngineRole.PREFILL)
        assert (await waiting).decisions[-1].change == "decode -> prefill", "a decision is told at once"
        await made.leave("c")
        while (await made.snapshot(-1, 0, 5.0)).engines:
            await asyncio.sleep(0.02)
        told = [(one.number, one.kind, one.pool, one.subject, one.change) for one in made._decisions.kept]
    assert told == [
        (1, "fleet", "pool", "engine-a", "joined"),
        (2, "fleet", "pool", "engine-b", "joined"),
        (3, "fleet", "pool", "engine-c", "joined"),
        (4, "role", "pool", "engine-b", "decode -> prefill"),
        (5, "fleet", "pool", "engine-c", "left"),
        (6, "fleet", "pool", "engine-a", "lost"),
        (7, "fleet", "pool", "engine-b", "lost"),
    ]
    assert made._decisions.kept[3].reason == "by hand"


async def test_a_later_planner_wants_the_roles_that_engines_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """They changed under the planner before: what replaces a decode engine decodes."""
    config = ClusterConfig(model="m", engines=(EnginePool(name="pool", roles=Roles(prefill=2, decode=1)),))
    async with planner(monkeypatch, 2, config) as made:
        infos = [engine(name, role).info for name, role in zip("abc", "prefill decode decode".split(), strict=True)]
        asked: asyncio.Task[EngineRole] | None = None
        while asked is None or not asked.done():
            here = infos[:2] if made._begun.is_set() else infos
            for info in here:
                await made.renew_engine(info, "pool", True, None)
            if asked is None and made._begun.is_set():
                asked = asyncio.create_task(made.assign_role("d", "pool"))
            await asyncio.sleep(0.05)
        assert asked.result() is EngineRole.DECODE


class Kept:
    """A memory."""

    def __init__(self) -> None:
        self.written: bytes | None = None

    async def load(self, configured: Mix) -> dict[str, Counter[EngineRole]]:
        return read(self.written, configured)

    def keep(self, configured: Mix, wanted: Mix) -> None:
        self.written = write(configured, wanted)


@pytest.mark.parametrize(("ordered", "becomes"), [(False, EngineRole.DECODE), (True, None)])
async def test_a_later_planner_tells_accidents_from_wishes(
    monkeypatch: pytest.MonkeyPatch, ordered: bool, becomes: EngineRole | None
) -> None:
    """Both engines prefill when the planner ends. By accident one more than wanted; or since somebody ordered it."""
    memory = Kept()
    config = ClusterConfig(
        model="m",
        engines=(EnginePool(name="pool", roles=Roles(prefill=1, decode=1)), EnginePool(roles=Roles(colocated=1))),
    )
    infos = [engine(name, EngineRole.PREFILL).info for name in "ab"]
    async with planner(monkeypatch, 1, config, memory) as first:
        await first.renew_engine(engine("both", EngineRole.COLOCATED).info, "engine", True, IDLE)
        await first.renew_engine(infos[0], "pool", True, IDLE)
        await first.renew_engine(replace(infos[1], role=EngineRole.DECODE), "pool", True, IDLE)
        if ordered:
            await first.order_role("engine-b", EngineRole.PREFILL)
    async with planner(monkeypatch, 2, config, memory) as second:
        for info in infos:
            await second.renew_engine(info, "pool", True, IDLE)
        await second.renew_engine(engine("both", EngineRole.COLOCATED).info, "engine", True, IDLE)
        second._begin()
        second._decide_once(0.0)
        assert [order.role for order in second._orders.values()] == ([] if becomes is None else [becomes])


def test_what_was_wanted_under_another_configuration_is_nothing() -> None:
    wanted = {"pool": {EngineRole.PREFILL: 2, EngineRole.DECODE: 0}}
    kept = write({"pool": {EngineRole.PREFILL: 1, EngineRole.DECODE: 1}}, wanted)
    assert read(kept, {"pool": {EngineRole.DECODE: 1, EngineRole.PREFILL: 1}}) == {"pool": {EngineRole.PREFILL: 2}}
    assert read(kept, {"pool": {EngineRole.PREFILL: 2}}) == read(None, {}) == {}


SCALED = parse(
    {
        "model": "m",
        "engines": [
            {
                "name": "pool",
                "roles": {"prefill": 1, "decode": 1},
                "autoscaling": {"min_replicas": 2, "max_replicas": 4, "upscale_delay_s": 5, "downscale_delay_s": 30},
            }
        ],
    },
    "test",
)
IDLE = LoadReport(step=0, running=0, waiting=0, free_blocks=100, total_blocks=100, block_size=16, queued_tokens=0)


async def test_roles_follow_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding is short: the engine that comes decodes. Later one goes, and whichever it is, each role has one."""
    async with planner(monkeypatch, 1, SCALED) as made:
        infos = {name: engine(name, role).info for name, role in (("a", EngineRole.PREFILL), ("b", EngineRole.DECODE))}

        async def renew(load: LoadReport) -> None:
            for info in infos.values():
                await made.renew_engine(info, "pool", True, load)

        await renew(replace(IDLE, free_blocks=1))
        for now in range(6):
            made._decide_once(float(now))
        assert await made.scale_of("pool", {}) == {"planner_term": 1, "planner_decision": 1, "planner_target": 3}
        assert await made.assign_role("c", "pool") is EngineRole.DECODE
        infos["c"] = engine("c", EngineRole.DECODE).info
        await renew(IDLE)
        for now in range(10, 41):
            made._decide_once(float(now))
        assert (await made.scale_of("pool", {}))["planner_target"] == 2
        assert made._wanted["pool"] == {EngineRole.PREFILL: 1, EngineRole.DECODE: 1}
        # Serve ends the only one that prefills.
        assert not await made.may_leave("a")
        (incarnation,) = made._orders
        assert made._orders[incarnation].role is EngineRole.PREFILL
        assert not await made.may_leave("a"), "not before the other one has moved"
        infos[incarnation] = replace(infos[incarnation], role=EngineRole.PREFILL, epoch=2)
        await renew(IDLE)
        assert await made.may_leave("a")
        await made.leave("a")
        assert made._wanted["pool"] == {EngineRole.PREFILL: 1, EngineRole.DECODE: 1}
        told = [(one.kind, one.change) for one in (await made.snapshot(-1, 0, 0.1)).decisions]
    assert [change for kind, change in told if kind != "fleet"] == ["2 -> 3", "3 -> 2", "decode -> prefill"]


async def test_where_all_engines_are_to_end_none_waits_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    async with planner(monkeypatch) as made:
        for name, role in (("a", EngineRole.PREFILL), ("b", EngineRole.DECODE), ("c", EngineRole.DECODE)):
            await made.renew_engine(engine(name, role).info, "pool", True, IDLE)
        assert not await made.may_leave("a")
        assert await made.may_leave("b")
        assert await made.may_leave("c")
        assert await made.may_leave("a")
        assert await made.may_leave("nobody")


async def test_a_preprocessor_that_serve_started_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool had none. The first one wakes it, and is not sent away by what was decided before."""
    scaling = PreprocessorAutoscaling(min_replicas=0, max_replicas=2, downscale_delay_s=0)
    config = CONFIG.model_copy(update={"preprocessor": PreprocessorPool(autoscaling=scaling)})
    async with planner(monkeypatch, 1, config) as made:
        await made.renew_preprocessor("p", "a:1")
        made._decide_once(0.0)
        assert (await made.snapshot(-1, 0, 0.1)).may_be_empty("preprocessor")
        assert (await made.scale_of("preprocessor", {"planner_term": 1, "planner_decision": 0, "planner_target": 1}))[
            "planner_target"
        ] == 0
        assert (await made.scale_of("preprocessor", {}))["planner_target"] == 1
        changes = [one.change for one in (await made.snapshot(-1, 0, 0.1)).decisions]
    assert changes == ["joined", "1 -> 0", "0 -> 1"]
