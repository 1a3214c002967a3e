"""Bounds on waiting for events, and what becomes of a request that is left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from actors.errors import InternalError, Unavailable
from actors.types import Message, MessageRole
from cluster.event_reader import READ_AHEAD, EventReader, Gone
from cluster.generation import Delta, Event, GenerateCall, is_last
from tests.doubles import FINISHED, SCRIPT, STARTED, Pause, ScriptedService

CALL = GenerateCall(messages=(Message(role=MessageRole.USER, parts=()),))


async def test_events_come_in_order_and_the_last_one_ends_the_request() -> None:
    service = ScriptedService()
    async with EventReader(service.generate(CALL), last=is_last) as reader:
        assert [await reader.next() for _ in SCRIPT] == list(SCRIPT)
    assert service.ended.get_nowait() == "finished"


async def test_a_wait_that_times_out_loses_nothing() -> None:
    service = ScriptedService(script=(STARTED, Pause(), FINISHED))
    async with EventReader(service.generate(CALL), last=is_last) as reader:
        assert await reader.next() == STARTED
        assert await reader.next(0.001) is None
        assert await reader.next(0.001) is None
        service.resume.set()
        assert await reader.next(10) == FINISHED


async def test_leaving_closes_the_request_and_waits_for_its_cleanup() -> None:
    cleaned = False

    async def events() -> AsyncGenerator[Event, None]:
        nonlocal cleaned
        try:
            yield STARTED
            await asyncio.Event().wait()
        finally:
            for _ in range(3):
                await asyncio.sleep(0)
            cleaned = True

    async with EventReader(events(), last=is_last) as reader:
        await reader.next()
    assert cleaned
    await reader.close()


async def test_a_client_that_left_is_noticed_while_waiting() -> None:
    service = ScriptedService(script=(STARTED, Pause()))
    gone = asyncio.get_running_loop().create_future()
    async with EventReader(service.generate(CALL), last=is_last, gone=gone) as reader:
        await reader.next()
        waiting = asyncio.ensure_future(reader.next())
        await service.paused.wait()
        gone.set_result(None)
        with pytest.raises(Gone):
            await waiting
    assert service.ended.get_nowait() == "closed"


async def test_errors_come_after_the_events_before_them() -> None:
    service = ScriptedService(script=(STARTED, Unavailable("lost")))
    async with EventReader(service.generate(CALL), last=is_last) as reader:
        assert await reader.next() == STARTED
        with pytest.raises(Unavailable):
            await reader.next()


async def test_an_end_without_a_last_event_is_our_defect() -> None:
    async with EventReader(ScriptedService(script=(STARTED,)).generate(CALL), last=is_last) as reader:
        await reader.next()
        with pytest.raises(InternalError):
            await reader.next()


async def test_a_slow_reader_holds_the_request_up() -> None:
    taken = 0

    async def events() -> AsyncGenerator[Event, None]:
        nonlocal taken
        while True:
            taken += 1
            yield Delta(text="x")

    async with EventReader(events(), last=is_last) as reader:
        await reader.next()
        for _ in range(5 * READ_AHEAD):
            await asyncio.sleep(0)
        assert taken == READ_AHEAD + 2
