"""Attempts that end for want of blocks: the queue they return to, and how they go on. Links are real."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace

import pytest

from actors.errors import DeadlineExceeded, Overloaded, Unavailable
from actors.types import AttemptMode, EngineRole, FinishReason, MilestoneKind, SequenceKey, Stage
from cluster.generation import Delta, Finished, Started
from tests.unit.cluster.router.world import CALL, IMAGE, ScriptedEngine, World, endings, text_of, world
from tests.waiting import LIMIT_S, eventually

SPLIT = (EngineRole.PREFILL, EngineRole.DECODE)
PREEMPTED = Unavailable("out of blocks", reason="PREEMPTED", retry_after_s=1.0)
NO_BLOCKS = Unavailable("full", reason="NO_BLOCKS")


@pytest.fixture(autouse=True)
def frequent_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room is seen by load messages: tests need not wait for the next one."""
    monkeypatch.setattr("actors.wire.engine_link.LOAD_S", 0.02)


async def fill(w: World, *engines: ScriptedEngine) -> None:
    """Engines tell that they have no room."""
    for engine in engines:
        engine.free_blocks = 0
    full = {engine.info.incarnation for engine in engines}
    await eventually(lambda: {v.info.incarnation for v in w.fleet.engines() if not v.load.free_blocks} == full)


async def test_a_refusal_for_want_of_blocks_waits_for_room_and_tries_again() -> None:
    async with world(*SPLIT) as w:
        prefill, decode = w.engines
        task = w.ask()
        key, *_ = await prefill.taken()
        assert (await decode.taken())[0] == key
        await fill(w, decode)
        prefill.end(key, NO_BLOCKS)
        assert await decode.cancelled() == key
        assert prefill.submits.empty()
        decode.free_blocks = 100
        again, *_ = await prefill.taken()
        assert again == key._replace(attempt=1)
        # An engine says nothing of a request it has not got.
        assert (await decode.taken())[0] == again
        prefill.say(key, 0, 25)  # a late token of the first attempt is nobody's
        prefill.say(again, 0, 0)
        decode.say(again, 1, 1, finish=FinishReason.LENGTH)
        assert text_of(await task) == "ab"


async def test_a_preempted_reply_goes_on_behind_its_tokens() -> None:
    async with world(*SPLIT) as w:
        prefill, decode = w.engines
        task = w.ask(replace(CALL, return_token_ids=True, return_timings=True))
        key, first, _ = await prefill.taken()
        await decode.taken()
        prefill.say(key, 0, 0)
        decode.say(key, 1, 1, 2)
        await fill(w, decode)
        decode.end(key, PREEMPTED)
        assert await prefill.cancelled() == key
        decode.free_blocks = 100
        again, request, mode = await prefill.taken()
        assert (again, mode) == (SequenceKey(key.request_id, 1, 0), AttemptMode.PREFILL)
        assert (await decode.taken())[:2] == (again, request)
        assert request == replace(first, output_ids=(0, 1, 2))
        decode.say(key, 3, 25)  # a zombie
        prefill.say(again, 3, 3)
        decode.say(again, 2, 24)  # an index known already
        decode.say(again, 4, 4, finish=FinishReason.LENGTH)
        events = await task
        assert text_of(events) == "abcde"
        assert [token for event in events if isinstance(event, Delta) for token in event.token_ids] == [0, 1, 2, 3, 4]
        assert endings(events)[0].reason is FinishReason.LENGTH
        finished = events[-1]
        assert isinstance(finished, Finished) and finished.usage.output_tokens == 5
        assert finished.timings is not None
        assert finished.timings.busy[Stage.PREFILL] == 1.0  # a token 0 of either attempt


async def test_an_early_token_of_an_attempt_that_ended_is_drawn_again() -> None:
    """Token 1 came, token 0 did not: nothing was shown, so nothing is known."""
    async with world(*SPLIT) as w:
        prefill, decode = w.engines
        task = w.ask()
        key, *_ = await prefill.taken()
        decode.say(key, 1, 25)
        decode.end(key, PREEMPTED)
        again, request, _ = await prefill.taken()
        assert request.output_ids == ()
        prefill.say(again, 0, 0)
        decode.say(again, 1, 1, finish=FinishReason.LENGTH)
        assert text_of(await task) == "ab"


async def test_an_ending_that_another_attempt_would_meet_too_is_told() -> None:
    async with world(EngineRole.COLOCATED) as w:
        task = w.ask()
        key, *_ = await w.engines[0].taken()
        w.engines[0].end(key, Unavailable("what is this?", reason="MISMATCH"))
        with pytest.raises(Unavailable) as caught:
            await task
        assert caught.value.reason == "MISMATCH"


async def test_a_full_queue_turns_away_newcomers_only() -> None:
    full = Overloaded("full", retry_after_s=1.0)
    async with world(EngineRole.COLOCATED) as w:
        (engine,) = w.engines
        task = w.ask(replace(CALL, n=2))
        key, *_ = await engine.taken()
        engine.end(key, full)
        with pytest.raises(Overloaded):
            await task
        task = w.ask(replace(CALL, n=2))
        key, *_ = await engine.taken()
        engine.say(key, 0, 0)
        other, *_ = await engine.taken()
        engine.end(other, full)
        engine.end(key, PREEMPTED)
        refused = 0
        for _ in range(3):
            again, request, _ = await engine.taken()
            assert request.output_ids == ((0,) if again.choice == 0 else ())
            if again.choice == 0 and not refused:
                refused += 1
                engine.end(again, full)
            else:
                engine.say(again, len(request.output_ids), 1, finish=FinishReason.LENGTH)
        events = await task
        assert (text_of(events, 0), text_of(events, 1)) == ("ab", "b")


async def preempted(w: World, **changes: object) -> tuple[asyncio.Task[list[object]], SequenceKey]:
    """A request that shows "a" and then waits for room."""
    (engine,) = w.engines
    task = w.ask(replace(CALL, **changes))  # type: ignore[arg-type]
    key, *_ = await engine.taken()
    await fill(w, engine)
    engine.say(key, 0, 0)
    engine.end(key, PREEMPTED)
    await eventually(lambda: len(w.fleet._waiting) == 1)
    return task, key  # type: ignore[return-value]


async def test_a_request_can_be_cancelled_while_it_waits_for_room() -> None:
    async with world(EngineRole.COLOCATED) as w:
        task, key = await preempted(w)
        await w.router.cancel(key.request_id)
        events = await task
        assert text_of(events) == "a"  # type: ignore[arg-type]
        assert endings(events)[0].reason is FinishReason.CANCELLED  # type: ignore[arg-type]
        assert w.fleet._waiting == [] and w.engines[0].submits.empty()


async def test_the_deadline_also_runs_while_a_request_waits_for_room() -> None:
    async with world(EngineRole.COLOCATED) as w:
        task, _ = await preempted(w, timeout_s=0.7)
        with pytest.raises(DeadlineExceeded):
            await task
        assert w.fleet._waiting == []


async def test_a_client_that_leaves_a_waiting_request_leaves_nothing() -> None:
    async with world(EngineRole.COLOCATED) as w:
        (engine,) = w.engines
        await fill(w, engine)
        async with aclosing(w.router.generate(CALL)) as events:
            assert isinstance(await anext(events), Started)
            key, *_ = await engine.taken()
            engine.end(key, NO_BLOCKS)
            await eventually(lambda: len(w.fleet._waiting) == 1)
        await eventually(lambda: not w.fleet._waiting)


async def test_room_goes_to_the_first_in_line_and_newcomers_stand_behind() -> None:
    async with world(EngineRole.COLOCATED, max_active=8) as w:
        (engine,) = w.engines
        names = ["first", "second", "urgent"]
        tasks = {}
        keys = {}
        for name in names:
            tasks[name] = w.ask(replace(CALL, request_id=name, priority=-1 if name == "urgent" else 0))
            keys[name], *_ = await engine.taken()
        await fill(w, engine)
        for name in reversed(names):
            engine.end(keys[name], NO_BLOCKS)
        await eventually(lambda: len(w.fleet._waiting) == 3)
        tasks["late"] = w.ask(replace(CALL, request_id="late"))
        await eventually(lambda: len(w.fleet._waiting) == 4)
        engine.free_blocks = 1
        order = []
        for _ in range(4):
            key, request, _ = await engine.taken()
            assert request.priority == (1 if key.request_id == keys["urgent"].request_id else 0)
            order.append(key)
        assert [key.request_id for key in order[:3]] == [keys[n].request_id for n in ("urgent", "first", "second")]
        assert [key.attempt for key in order] == [1, 1, 1, 0]
        for key in order:
            engine.say(key, 0, 0, finish=FinishReason.LENGTH)
        for task in tasks.values():
            await task


async def test_one_load_message_wakes_all_there_is_room_for() -> None:
    async with world(EngineRole.COLOCATED, max_active=8) as w:
        (engine,) = w.engines
        tasks = [w.ask() for _ in range(3)]
        keys = [(await engine.taken())[0] for _ in tasks]
        await fill(w, engine)
        for key in keys:
            engine.end(key, NO_BLOCKS)
        await eventually(lambda: len(w.fleet._waiting) == 3)
        (link,) = w.fleet._links.values()
        assert link.load is not None
        link.load = replace(link.load, free_blocks=2)
        w.fleet._wake(link)
        await asyncio.sleep(0)
        assert len(w.fleet._waiting) == 1
        engine.free_blocks = 100
        for _ in tasks:
            key, *_ = await engine.taken()
            engine.say(key, 0, 0, finish=FinishReason.LENGTH)
        await asyncio.gather(*tasks)


async def test_embeddings_are_leased_again_only_when_they_are_needed_again() -> None:
    async with world(*SPLIT) as w:
        prefill, decode = w.engines
        w.stages.media = (IMAGE,)
        task = w.ask()
        key, first, _ = await prefill.taken()
        assert w.stages.leases
        prefill.say(key, 0, 0)
        await eventually(lambda: not w.stages.leases)
        decode.end(key, PREEMPTED)
        again, request, _ = await prefill.taken()
        assert request.media == first.media and not w.stages.leases
        prefill.links.deliver_need(again, request.media[0].embedding_keys)
        assert await asyncio.wait_for(prefill.supplies.get(), LIMIT_S) == request.media
        assert (w.stages.preprocessed, w.stages.encoded) == (2, 2)
        assert {place for place, _ in w.stages.leases} == {"enc:1"}
        prefill.say(again, 1, 1)
        await eventually(lambda: not w.stages.leases)
        decode.say(again, 2, 2, finish=FinishReason.LENGTH)
        assert text_of(await task) == "abc"


async def test_embeddings_stay_until_the_last_choice_has_a_token_and_are_made_again_once_for_all() -> None:
    async with world(EngineRole.COLOCATED) as w:
        (engine,) = w.engines
        w.stages.media = (IMAGE,)
        task = w.ask(replace(CALL, n=3))
        first, request, _ = await engine.taken()
        engine.say(first, 0, 0)
        second, *_ = await engine.taken()
        third, *_ = await engine.taken()
        assert {key.choice for key in (second, third)} == {1, 2}
        engine.say(second, 0, 1)
        await asyncio.sleep(0.05)
        assert w.stages.leases
        for key in (second, third):
            engine.links.deliver_need(key, request.media[0].embedding_keys)
        supplied = [await asyncio.wait_for(engine.supplies.get(), LIMIT_S) for _ in range(2)]
        assert supplied == [request.media, request.media]
        assert (w.stages.preprocessed, w.stages.encoded) == (2, 2)
        engine.say(second, 1, 3, finish=FinishReason.LENGTH)
        engine.say(third, 0, 2)
        await eventually(lambda: not w.stages.leases)
        for key in (first, third):
            engine.say(key, 1, 3, finish=FinishReason.LENGTH)
        events = await task
        assert sorted(text_of(events, choice) for choice in range(3)) == ["ad", "bd", "cd"]
        assert len(endings(events)) == 3


async def test_embeddings_made_again_for_one_choice_outlive_the_end_of_another() -> None:
    async with world(EngineRole.COLOCATED) as w:
        (engine,) = w.engines
        w.stages.media = (IMAGE,)
        task = w.ask(replace(CALL, n=2))
        first, request, _ = await engine.taken()
        engine.say(first, 0, 0)
        second, *_ = await engine.taken()
        engine.say(second, 0, 0)
        await eventually(lambda: not w.stages.leases)
        engine.end(first, PREEMPTED)
        again, *_ = await engine.taken()
        engine.links.deliver_need(again, request.media[0].embedding_keys)
        await asyncio.wait_for(engine.supplies.get(), LIMIT_S)
        engine.say(second, 1, 1, finish=FinishReason.LENGTH)
        engine.links.deliver_milestone(again, MilestoneKind.PREFILL_STARTED, 0.0)
        await eventually(lambda: next(iter(w.router._active.values())).timeline.stage is Stage.PREFILL)
        await asyncio.sleep(0.02)
        assert w.stages.leases
        engine.say(again, 1, 1)
        await eventually(lambda: not w.stages.leases)
        engine.say(again, 2, 2, finish=FinishReason.LENGTH)
        events = await task
        assert (text_of(events, 0), text_of(events, 1)) == ("abc", "ab")


async def test_embeddings_an_engine_pulls_again_outlive_the_end_of_another_choice() -> None:
    """A preempted sequence that its engine recomputes itself asks for media in the middle of its attempt."""
    async with world(EngineRole.COLOCATED) as w:
        (engine,) = w.engines
        w.stages.media = (IMAGE,)
        task = w.ask(replace(CALL, n=2))
        first, request, _ = await engine.taken()
        engine.say(first, 0, 0)
        second, *_ = await engine.taken()
        engine.say(second, 0, 0)
        await eventually(lambda: not w.stages.leases)
        engine.links.deliver_need(first, request.media[0].embedding_keys)
        await asyncio.wait_for(engine.supplies.get(), LIMIT_S)
        engine.say(second, 1, 1, finish=FinishReason.LENGTH)
        (run,) = w.router._active.values()
        await eventually(lambda: run._choices[1].finish_reason is not None)
        assert w.stages.keeper.count == 1
        engine.say(first, 1, 1)
        await eventually(lambda: w.stages.keeper.count == 0)
        engine.say(first, 2, 2, finish=FinishReason.LENGTH)
        events = await task
        assert (text_of(events, 0), text_of(events, 1)) == ("abc", "ab")


async def test_other_choices_go_where_the_prompt_is() -> None:
    """Even when another engine has less to do, unless there is no room."""
    async with world(EngineRole.COLOCATED, EngineRole.COLOCATED) as w:
        chosen, other = w.engines
        other.free_blocks = 90
        await eventually(lambda: {v.load.free_blocks for v in w.fleet.engines()} == {90, 100})
        task = w.ask(replace(CALL, n=2))
        first, *_ = await chosen.taken()
        chosen.free_blocks, other.free_blocks = 50, 100
        await eventually(lambda: {v.load.free_blocks for v in w.fleet.engines()} == {50, 100})
        chosen.say(first, 0, 0)
        second, *_ = await chosen.taken()
        for key in (first, second):
            chosen.say(key, int(key == first), 1, finish=FinishReason.LENGTH)
        await task

        full = w.ask(replace(CALL, n=2))
        first, *_ = await other.taken()
        await fill(w, other)
        other.say(first, 0, 0)
        second, *_ = await chosen.taken()
        other.say(first, 1, 1, finish=FinishReason.LENGTH)
        chosen.say(second, 0, 1, finish=FinishReason.LENGTH)
        assert text_of(await full, 1) == "b"


async def test_prompt_scores_are_asked_for_until_they_are_whole() -> None:
    async with world(EngineRole.COLOCATED) as w:
        (engine,) = w.engines
        task = w.ask(replace(CALL, prompt_logprobs=1, logprobs=1))
        key, request, _ = await engine.taken()
        assert request.sampling.prompt_logprobs == 1
        engine.score_prompt(key, 0, None, 6)
        engine.end(key, PREEMPTED)
        key, request, _ = await engine.taken()
        assert request.sampling.prompt_logprobs == 1
        engine.score_prompt(key, 0, None)
        engine.score_prompt(key, 1, 6, 7)
        engine.say(key, 0, 0, scored=True)
        engine.end(key, PREEMPTED)
        key, request, _ = await engine.taken()
        assert request.sampling.prompt_logprobs is None
        engine.say(key, 1, 1, finish=FinishReason.LENGTH, scored=True)
        events = await task
        assert [type(event).__name__ for event in events[:3]] == ["Started", "PromptScored", "Delta"]
        deltas = [event for event in events if isinstance(event, Delta)]
        assert [score.chosen.token for delta in deltas for score in delta.logprobs] == [b"a", b"b"]
        assert all(delta.token_ids == () for delta in deltas)
