"""Engines that die, fall silent or leave under a request: links are real, engines are scripted."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest

from actors.errors import InternalError, Unavailable
from actors.types import EngineRole, FinishReason, MilestoneKind, SequenceKey
from cluster.generation import Delta
from cluster.router.suspects import ChoiceKey
from tests.unit.cluster.router.world import CALL, ScriptedEngine, World, text_of, world
from tests.waiting import LIMIT_S, eventually

COLOCATED, PREFILL, DECODE = EngineRole.COLOCATED, EngineRole.PREFILL, EngineRole.DECODE
NEVER_S = 600.0
MOVED = Unavailable("the engine leaves", reason="MOVED")


@pytest.fixture(autouse=True)
def frequent_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.wire.engine_link.LOAD_S", 0.02)


async def taker(*engines: ScriptedEngine) -> tuple[ScriptedEngine, SequenceKey, tuple[int, ...]]:
    """The engine that gets the next attempt, its key, and the outputs it goes on behind."""
    async with asyncio.timeout(LIMIT_S):
        while True:
            for engine in engines:
                if not engine.submits.empty():
                    key, request, _ = engine.submits.get_nowait()
                    return engine, key, request.output_ids
            await asyncio.sleep(0.005)


def told(w: World) -> int:
    """Tokens the only request has."""
    (run,) = w.router._active.values()
    return len(run._choices[0].output.token_ids)


def other(w: World, engine: ScriptedEngine) -> ScriptedEngine:
    (found,) = (one for one in w.engines if one is not engine and one.info.role is engine.info.role)
    return found


@pytest.mark.parametrize("victim", [PREFILL, DECODE])
async def test_a_reply_goes_on_elsewhere_when_an_engine_dies(victim: EngineRole) -> None:
    async with world(PREFILL, PREFILL, DECODE, DECODE, lost_after_s=NEVER_S) as w:
        task = w.ask(replace(CALL, return_token_ids=True))
        prefill, key, _ = await taker(*w.engines[:2])
        decode, same, _ = await taker(*w.engines[2:])
        assert key == same
        prefill.say(key, 0, 0)
        if victim is DECODE:
            decode.links.deliver_milestone(key, MilestoneKind.TRANSFERRED, 0.0)
            decode.say(key, 1, 1, 2)
        await eventually(lambda: told(w) == (3 if victim is DECODE else 1))
        dead, alive = (prefill, decode) if victim is PREFILL else (decode, prefill)
        await dead.server.stop(None)
        assert await alive.cancelled() == key
        prefill, again, known = await taker(*w.engines[:2])
        decode, *_ = await taker(*w.engines[2:])
        assert dead not in (prefill, decode) and again == key._replace(attempt=1)
        assert known == ((0, 1, 2) if victim is DECODE else (0,))
        prefill.say(again, len(known), 3)
        decode.say(again, len(known) + 1, 4, finish=FinishReason.LENGTH)
        events = await task
        tokens = [token for event in events if isinstance(event, Delta) for token in event.token_ids]
        assert tokens == [*known, 3, 4]


async def test_an_engine_that_prefilled_may_die_once_another_one_decodes() -> None:
    async with world(PREFILL, DECODE) as w:
        prefill, decode = w.engines
        task = w.ask()
        key, *_ = await prefill.taken()
        prefill.say(key, 0, 0)
        decode.links.deliver_milestone(key, MilestoneKind.TRANSFERRED, 0.0)
        decode.say(key, 1, 1)
        await eventually(lambda: told(w) == 2)
        await prefill.server.stop(None)
        await eventually(lambda: len(w.fleet.engines()) == 1)
        decode.say(key, 2, 2, finish=FinishReason.LENGTH)
        assert text_of(await task) == "abc"


async def test_a_silent_engine_gets_nothing_new_and_is_lost_at_last(monkeypatch: pytest.MonkeyPatch) -> None:
    async with world(COLOCATED, COLOCATED, max_active=8, lost_after_s=1.5) as w:
        task = w.ask()
        frozen, key, _ = await taker(*w.engines)
        frozen.say(key, 0, 0)
        await eventually(lambda: told(w) == 1)
        spare = other(w, frozen)
        frozen.freeze()
        since = time.monotonic()
        await eventually(lambda: [view.info for view in w.fleet.engines()] == [spare.info])
        assert spare.submits.empty()
        late = w.ask(replace(CALL, request_id="late"))
        _, late_key, _ = await taker(spare)
        spare.say(late_key, 0, 1, finish=FinishReason.LENGTH)
        assert text_of(await late) == "b"
        _, again, known = await taker(spare)
        assert time.monotonic() - since > 1.4
        assert (again, known) == (key._replace(attempt=1), (0,))
        assert w.router._services.suspects.count == 0  # silence is no death
        frozen.thaw()
        frozen.say(key, 1, 25)  # a zombie
        spare.say(again, 1, 1, finish=FinishReason.LENGTH)
        assert text_of(await task) == "ab"
        await eventually(lambda: len(w.fleet.engines()) == 2)


async def test_the_last_engine_is_waited_for() -> None:
    async with world(COLOCATED) as w:
        (engine,) = w.engines
        task = w.ask()
        key, *_ = await engine.taken()
        engine.say(key, 0, 0)
        await eventually(lambda: told(w) == 1)
        await engine.server.stop(None)
        await eventually(lambda: not w.fleet.engines())
        newcomer = w.ask()
        await asyncio.sleep(0.05)
        assert not task.done() and not newcomer.done()
        replacement = await w.replace(engine)
        for _ in range(2):
            key, request, _ = await replacement.taken()
            replacement.say(key, len(request.output_ids), 1, finish=FinishReason.LENGTH)
            if request.output_ids:
                # Under suspicion it goes alone, but beside any that are not.
                assert request.output_ids == (0,)
        assert sorted([text_of(await task), text_of(await newcomer)]) == ["ab", "b"]


async def test_an_engine_that_leaves_gives_its_requests_away() -> None:
    async with world(COLOCATED, COLOCATED) as w:
        task = w.ask()
        leaver, key, _ = await taker(*w.engines)
        leaver.say(key, 0, 0)
        leaver.draining = True
        leaver.links.tell_load()
        await eventually(lambda: [view.info for view in w.fleet.engines()] == [other(w, leaver).info])
        leaver.end(key, MOVED)
        engine, again, known = await taker(*w.engines)
        assert (engine, again, known) == (other(w, leaver), key._replace(attempt=1), (0,))
        engine.say(again, 1, 1, finish=FinishReason.LENGTH)
        assert text_of(await task) == "ab"
        assert w.router._services.budget.saved == 64


async def test_suspects_are_tried_one_at_a_time_and_cleared() -> None:
    async with world(COLOCATED, COLOCATED, max_active=8) as w:
        victim, spare = w.engines
        spare.draining = True
        await eventually(lambda: len(w.fleet.engines()) == 1)
        tasks = [w.ask() for _ in range(3)]
        for _ in tasks:
            key, *_ = await victim.taken()
            victim.say(key, 0, 0)
        await eventually(lambda: all(run._choices[0].output.token_ids for run in w.router._active.values()))
        spare.draining = False
        await eventually(lambda: len(w.fleet.engines()) == 2)
        await victim.server.stop(None)
        for left in (2, 1, 0):
            key, request, _ = await spare.taken()
            await asyncio.sleep(0.05)
            assert spare.submits.empty()
            assert (request.output_ids, w.router._services.suspects.count) == ((0,), left + 1)
            spare.say(key, 1, 1)
            await asyncio.sleep(0.05)
            assert spare.submits.empty()
            spare.say(key, 2, 2)
            await eventually(lambda left=left: w.router._services.suspects.count == left)
            spare.say(key, 3, 3, finish=FinishReason.LENGTH)
        for task in tasks:
            assert text_of(await task) == "abcd"


async def test_a_request_under_which_two_engines_die_is_refused() -> None:
    async with world(COLOCATED, COLOCATED, COLOCATED) as w:
        task = w.ask()
        for attempt in range(2):
            engine, key, known = await taker(*w.engines)
            assert (key.attempt, known) == (attempt, (0,) if attempt else ())
            engine.links.deliver_milestone(key, MilestoneKind.PREFILL_STARTED, 0.0)
            engine.say(key, attempt, 0)  # one token is not enough to be cleared by
            await eventually(lambda n=attempt: told(w) > n)
            await engine.server.stop(None)
        with pytest.raises(InternalError) as caught:
            await task
        assert caught.value.reason == "POISON"
        assert w.router._services.suspects.count == 0


async def test_engines_that_die_in_one_moment_refuse_nobody() -> None:
    """The second one was dead when it got what the first had lost, and nobody knew yet."""
    async with world(COLOCATED, COLOCATED, COLOCATED) as w:
        task = w.ask()
        first, key, _ = await taker(*w.engines)
        first.say(key, 0, 0)
        await eventually(lambda: told(w) == 1)
        await first.server.stop(None)
        second, *_ = await taker(*w.engines)
        await second.server.stop(None)
        third, key, known = await taker(*w.engines)
        assert (key.attempt, known) == (2, (0,))
        third.say(key, 1, 1, finish=FinishReason.LENGTH)
        assert text_of(await task) == "ab"


async def test_who_waited_in_the_queue_of_a_dead_engine_is_no_suspect() -> None:
    async with world(COLOCATED, COLOCATED, max_active=8) as w:
        tasks = [w.ask() for _ in range(4)]
        keys: dict[int, list[SequenceKey]] = {0: [], 1: []}
        for _ in tasks:
            engine, key, _ = await taker(*w.engines)
            keys[w.engines.index(engine)].append(key)
        victim = w.engines[0] if len(keys[0]) >= 2 else w.engines[1]
        running, *waiting = keys[w.engines.index(victim)]
        victim.links.deliver_milestone(running, MilestoneKind.PREFILL_STARTED, 0.0)
        await asyncio.sleep(0.05)
        await victim.server.stop(None)
        spare = other(w, victim)
        for _ in range(1 + len(waiting)):
            await spare.taken()
        assert ChoiceKey(running.request_id, 0) in w.router._services.suspects
        assert w.router._services.suspects.count == 1
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def test_loads_are_told_as_links_hear_them() -> None:
    async with world(PREFILL, DECODE, lost_after_s=0.6) as w:
        before = w.fleet.snapshot
        assert all(entry.load is None for entry in before.engines)
        w.engines[1].free_blocks = 40
        await eventually(lambda: w.fleet.live_snapshot().engines[1].load.free_blocks == 40)
        live = w.fleet.live_snapshot()
        assert live.engines[0].load.free_blocks == 100
        assert (live.version, live.encoders) == (before.version, before.encoders)
        assert w.fleet.speaking() == {engine.info.incarnation for engine in w.engines}
        w.engines[1].freeze()
        await eventually(lambda: w.fleet.speaking() == {w.engines[0].info.incarnation})
        w.engines[1].thaw()
        await eventually(lambda: len(w.fleet.speaking()) == 2)
