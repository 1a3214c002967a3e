"""Requests that come together do not all go where the load was least a moment ago."""

from __future__ import annotations

from dataclasses import replace

from actors.types import EngineRole, FinishReason
from tests.unit.cluster.router.world import CALL, world
from tests.waiting import eventually

COLOCATED, PREFILL, DECODE = EngineRole.COLOCATED, EngineRole.PREFILL, EngineRole.DECODE


async def test_requests_that_come_together_are_spread() -> None:
    async with world(COLOCATED, COLOCATED, COLOCATED, max_active=9) as w:
        tasks = [w.ask(replace(CALL, request_id=str(number))) for number in range(9)]
        await eventually(lambda: sum(engine.submits.qsize() for engine in w.engines) == 9)
        assert [engine.submits.qsize() for engine in w.engines] == [3, 3, 3]
        for engine in w.engines:
            while not engine.submits.empty():
                key, _, _ = engine.submits.get_nowait()
                engine.say(key, 0, 0, finish=FinishReason.LENGTH)
        for task in tasks:
            await task


async def test_pairs_are_spread_on_both_sides() -> None:
    async with world(PREFILL, PREFILL, DECODE, DECODE, max_active=4) as w:
        tasks = [w.ask(replace(CALL, request_id=str(number))) for number in range(4)]
        await eventually(lambda: sum(engine.submits.qsize() for engine in w.engines) == 8)
        assert [engine.submits.qsize() for engine in w.engines] == [2, 2, 2, 2]
        for engine in w.engines[2:]:
            while not engine.submits.empty():
                key, _, _ = engine.submits.get_nowait()
                engine.say(key, 0, 0, finish=FinishReason.LENGTH)
        for task in tasks:
            await task


async def test_a_claim_ends_once_the_engine_counts_it_or_the_attempt_is_over() -> None:
    async with world(COLOCATED) as w:
        (engine,) = w.engines
        link = w.router._services.fleet.link(engine.info)
        assert link is not None and link.claimed_load == link.load
        task = w.ask()
        key, request, _ = await engine.taken()
        claimed = link.claimed_load
        assert claimed is not None and claimed.queued_tokens == len(request.prompt_ids) and claimed.free_blocks == 99
        engine.links.tell_load()
        engine.links.tell_load()
        await eventually(lambda: link.claimed_load == link.load)
        engine.say(key, 0, 0, finish=FinishReason.LENGTH)
        await task
        second = w.ask()
        key, _, _ = await engine.taken()
        engine.say(key, 0, 0, finish=FinishReason.LENGTH)
        await second
        await eventually(lambda: link.claimed_load == link.load)
