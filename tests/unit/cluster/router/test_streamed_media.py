"""Engines begin with the first unit of a prompt while the others are being encoded: what the router makes of it, with
scripted engines and an encoder whose units the test lets through.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from actors.engine.scheduling.block_hash import hash_blocks
from actors.errors import InternalError
from actors.types import (
    EngineRequest,
    EngineRole,
    FinishReason,
    Grid,
    MediaKind,
    MediaSpan,
    MilestoneKind,
    PromptMedia,
    Stage,
)
from actors.wire.media import embedding_key
from cluster.generation import Event, Finished
from cluster.router.stages import MissingPatches, StageLost
from tests.unit.cluster.router.world import CALL, ScriptedEngine, World, text_of, world
from tests.waiting import LIMIT_S, eventually

KEYS = tuple(bytes([number]) * 32 for number in range(3))
MEDIA = tuple(
    PromptMedia(kind=MediaKind.IMAGE, offset=1 + 2 * number, grid=Grid(1, 2, 2), content_keys=(key,))
    for number, key in enumerate(KEYS)
)
"""One token each, between tokens of text."""


@asynccontextmanager
async def held_world(*held: int) -> AsyncIterator[World]:
    """One engine, three pictures; units of those numbers wait for ``unit_gates``."""
    async with world(EngineRole.COLOCATED) as w:
        w.stages.media, w.stages.prompt_ids = MEDIA, tuple(range(8))
        w.stages.unit_gates = {KEYS[number]: asyncio.Event() for number in held}
        yield w


def stage(w: World) -> Stage:
    (run,) = w.router._active.values()
    return run.timeline.stage


async def supplied(engine: ScriptedEngine) -> tuple[MediaSpan, ...]:
    return await asyncio.wait_for(engine.supplies.get(), LIMIT_S)


async def finish(w: World, key, task: asyncio.Task[list[Event]]) -> Finished:  # type: ignore[no-untyped-def]
    w.engines[0].say(key, 0, 0, finish=FinishReason.LENGTH)
    events = await task
    assert text_of(events) == "a"
    (finished,) = [event for event in events if isinstance(event, Finished)]
    return finished


async def test_engines_get_a_request_when_its_first_unit_is_encoded() -> None:
    async with held_world(0, 2) as w:
        (engine,) = w.engines
        task = w.ask(replace(CALL, return_timings=True))
        await eventually(lambda: w.stages.encoded == 1)
        await asyncio.sleep(0.02)
        assert engine.submits.empty() and stage(w) is Stage.ENCODE
        w.stages.unit_gates[KEYS[0]].set()
        key, request, _ = await engine.taken()
        assert not w.stages.unit_gates[KEYS[2]].is_set()
        for span, content_key in zip(request.media, KEYS, strict=True):
            assert span.embedding_keys == (embedding_key(content_key, b"\xff", "float64"),)
            assert span.encoder_address == "enc:1"
        w.stages.unit_gates[KEYS[2]].set()
        await eventually(lambda: w.stages.leases == {("enc:1", "r-1#2")})  # Patches went back.
        timings = (await finish(w, key, task)).timings
        assert timings is not None and timings.busy[Stage.ENCODE] == 3 * 0.125


async def test_encoding_is_exposed_only_while_an_engine_waits_for_it() -> None:
    async with held_world(1, 2) as w:
        (engine,) = w.engines
        task = w.ask()
        key, *_ = await engine.taken()
        engine.links.deliver_milestone(key, MilestoneKind.MEDIA_AWAITED, 0.0, 1)  # It is only on its way.
        engine.links.deliver_milestone(key, MilestoneKind.PREFILL_STARTED, 0.0)
        await eventually(lambda: stage(w) is Stage.PREFILL)
        engine.links.deliver_milestone(key, MilestoneKind.MEDIA_AWAITED, 0.0, 3)
        await eventually(lambda: stage(w) is Stage.ENCODE)
        w.stages.unit_gates[KEYS[1]].set()
        await eventually(lambda: stage(w) is Stage.PREFILL)
        assert not w.stages.unit_gates[KEYS[2]].is_set()
        w.stages.unit_gates[KEYS[2]].set()
        await finish(w, key, task)


@pytest.mark.parametrize("error", [MissingPatches(), StageLost("a vision encoder")])
async def test_units_that_are_lost_while_engines_compute_are_made_again(error: Exception) -> None:
    """The engine hears of it when it asks for what it misses, and that may be before the encoder is known as lost."""
    async with held_world(2) as w:
        (engine,) = w.engines
        task = w.ask()
        key, request, _ = await engine.taken()
        w.stages.unit_errors[KEYS[2]] = error
        engine.links.deliver_milestone(key, MilestoneKind.PREFILL_STARTED, 0.0)
        engine.links.deliver_milestone(key, MilestoneKind.MEDIA_AWAITED, 0.0, 5)
        await eventually(lambda: stage(w) is Stage.ENCODE)
        engine.links.deliver_need(key, request.media[2].embedding_keys)
        await asyncio.sleep(0.02)
        assert engine.supplies.empty()
        w.stages.unit_gates[KEYS[2]].set()
        again = await supplied(engine)
        assert again == request.media
        assert (w.stages.preprocessed, w.stages.encoded) == (1 + isinstance(error, MissingPatches), 2)
        assert stage(w) is Stage.PREFILL
        await finish(w, key, task)


async def test_a_unit_that_cannot_be_encoded_ends_the_request_that_needs_it() -> None:
    async with held_world() as w:
        w.stages.unit_errors[KEYS[2]] = InternalError("not finite")
        task = w.ask()
        key, request, _ = await w.engines[0].taken()
        w.engines[0].links.deliver_need(key, request.media[2].embedding_keys)
        with pytest.raises(InternalError, match="not finite"):
            await task
        assert await w.engines[0].cancelled() == key
        assert w.stages.encoded == 1


async def test_what_an_engine_finds_in_its_cache_is_encoded_no_further() -> None:
    async with held_world(1) as w:
        task = w.ask()
        key, *_ = await w.engines[0].taken()
        assert w.stages.leases
        w.engines[0].say(key, 0, 0)
        await eventually(lambda: not w.stages.leases)
        (run,) = w.router._active.values()
        await eventually(lambda: not run._keeper._ending)
        w.engines[0].say(key, 1, 1, finish=FinishReason.LENGTH)
        assert text_of(await task) == "ab"


@asynccontextmanager
async def world_that_holds_its_media() -> AsyncIterator[tuple[World, EngineRequest]]:
    """Whose engine has computed this request and has all whole blocks of its prompt."""
    async with held_world() as w:
        (engine,) = w.engines
        w.stages.prompt_ids = (1, 90, 2, 90, 3, 90, *range(30))
        task = w.ask()
        key, request, _ = await engine.taken()
        await finish(w, key, task)
        held = hash_blocks(engine.info.kv_identity, request.prompt_ids, request.media, request.salt)
        engine.links.deliver_blocks_changed(held, [])
        await eventually(lambda: w.fleet.engines()[0].cached_blocks == set(held))
        yield w, request


@pytest.mark.parametrize("lost", [False, True])
async def test_media_that_an_engine_holds_are_encoded_only_if_it_asks(lost: bool) -> None:
    async with world_that_holds_its_media() as (w, before):
        (engine,) = w.engines
        task = w.ask()
        key, request, _ = await engine.taken()
        assert (request.media, w.stages.preprocessed, w.stages.encoded) == (before.media, 2, 1)
        await eventually(lambda: not w.stages.leases)
        if lost:
            engine.links.deliver_need(key, request.media[1].embedding_keys)
            assert await supplied(engine) == before.media
        assert (w.stages.preprocessed, w.stages.encoded) == ((3, 2) if lost else (2, 1))
        await finish(w, key, task)


async def test_a_prompt_that_is_scored_is_encoded_whoever_holds_it() -> None:
    async with world_that_holds_its_media() as (w, _):
        task = w.ask(replace(CALL, prompt_logprobs=0))
        await w.engines[0].taken()
        assert w.stages.encoded == 2
        task.cancel()
        await asyncio.wait([task])


async def test_an_attempt_that_follows_finds_the_encoding_still_going_on() -> None:
    async with held_world(2) as w:
        (engine,) = w.engines
        task = w.ask()
        key, *_ = await engine.taken()
        engine.links.deliver_milestone(key, MilestoneKind.PREFILL_STARTED, 0.0)
        engine.links.deliver_milestone(key, MilestoneKind.MEDIA_AWAITED, 0.0, 5)
        await eventually(lambda: stage(w) is Stage.ENCODE)
        engine.end(key, StageLost("an embedding"))
        again, request, _ = await engine.taken()
        assert (again.attempt, w.stages.encoded, stage(w)) == (1, 1, Stage.QUEUED)
        w.stages.unit_gates[KEYS[2]].set()
        await eventually(lambda: w.stages.leases == {("enc:1", "r-1#2")})
        assert stage(w) is Stage.QUEUED  # The attempt that waited for it is over.
        engine.links.deliver_need(again, request.media[2].embedding_keys)
        assert await supplied(engine) == request.media
        assert w.stages.encoded == 2
        await finish(w, again, task)


async def test_leaving_while_units_are_encoded_ends_that_too() -> None:
    async with held_world(2) as w:
        task = w.ask()
        await w.engines[0].taken()
        task.cancel()
        await eventually(lambda: not w.stages.leases and w.router.active_count == 0)
