from __future__ import annotations

import asyncio
import io
import pickle
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from PIL import Image

from actors.config import PreprocessorConfig
from actors.errors import InternalError, InvalidRequest, MediaTooLarge, MediaUnreadable, RequestCancelled, Unavailable
from actors.preprocessor import Preprocessor
from actors.processing.processor import Processed, Processor
from actors.types import (
    Grid,
    ImagePart,
    MediaSource,
    Message,
    MessageRole,
    PreprocessRequest,
    TextPart,
    VideoPart,
)
from actors.wire.media import units_of
from actors.wire.media_client import MediaClient
from tests.tiny_model import tiny_checkpoint
from tests.unit.wire.media_places import HOST
from tests.waiting import eventually


def picture(seed: int, width: int = 112, height: int = 84) -> ImagePart:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return ImagePart(source=MediaSource(content=content.getvalue()))


def request(
    lease: str, *parts: ImagePart | VideoPart, text: str = "What is this?", **changes: Any
) -> PreprocessRequest:
    message = Message(role=MessageRole.USER, parts=(*parts, TextPart(text="What is this?")))
    return PreprocessRequest(lease=lease, messages=(message,), **({"max_prompt_tokens": 4096} | changes))


def books(worker: Preprocessor) -> dict[str, int]:
    worker._store.check_integrity()
    return asdict(worker._store.stats())


@asynccontextmanager
async def preprocessor(**changes: Any) -> AsyncIterator[Preprocessor]:
    config = PreprocessorConfig(**({"model_dir": str(tiny_checkpoint())} | changes))
    made = Preprocessor.__new__(Preprocessor)
    await made.__init__(config, None, HOST)  # type: ignore[misc]
    try:
        yield made
        counts = books(made)
        assert counts["reserved_bytes"] == counts["waiting"] == 0
        assert made.queue_age_s == 0
    finally:
        await made.close()


class Gate:
    """Stops ``Processor.process`` in its thread before it returns its result."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.go = threading.Event()
        process = Processor.process

        def held(own: Processor, request: PreprocessRequest, check: Callable[[], None] = lambda: None) -> Processed:
            self.count += 1
            processed = process(own, request, check)
            assert self.go.wait(10)
            return processed

        monkeypatch.setattr(Processor, "process", held)


async def test_patches_wait_under_the_lease_for_pulling() -> None:
    async with preprocessor() as p:
        reply = await p.preprocess(request("one", picture(1), picture(2, 30, 60)))
        assert (reply.media_address, reply.incarnation) == (p.address, p.incarnation) and reply.busy_s > 0
        expected = Processor(tiny_checkpoint()).process(request("one", picture(1), picture(2, 30, 60)))
        assert (reply.prompt_ids, reply.media, reply.starts_thinking) == (
            expected.prompt_ids,
            expected.media,
            expected.starts_thinking,
        )
        client = MediaClient()
        for unit in units_of(reply.media):
            patches = await client.pull_patches(p.address, unit, "one")
            np.testing.assert_array_equal(patches, expected.units[unit.content_key].patches)
        assert books(p) == {
            "units": 2,
            "leases": 1,
            "byte_count": sum(unit.patches.nbytes for unit in expected.units.values()),
            "cached_units": 0,
            "cached_bytes": 0,
            "reserved_bytes": 0,
            "waiting": 0,
        }
        await client.release(p.address, ["one"])
        assert books(p)["byte_count"] == 0
        await client.close()


async def test_one_picture_of_two_requests_is_kept_once() -> None:
    async with preprocessor() as p:
        await p.preprocess(request("one", picture(1)))
        before = books(p)
        await p.preprocess(request("two", picture(1)))
        after = books(p)
        assert (after["units"], after["byte_count"], after["leases"]) == (1, before["byte_count"], 2)


async def test_text_alone_and_counting_keep_nothing() -> None:
    async with preprocessor() as p:
        assert (await p.preprocess(request("one"))).media == ()
        reply = await p.preprocess(request("two", picture(1), keep_patches=False))
        assert reply.media[0].grid.tokens > 0
        assert not any(books(p).values())


async def test_errors_of_the_caller_pass_and_leave_nothing() -> None:
    async with preprocessor() as p:
        broken = ImagePart(source=MediaSource(content=b"no picture"))
        with pytest.raises(MediaUnreadable):
            await p.preprocess(request("one", picture(1), broken))
        with pytest.raises(InvalidRequest):
            await p.preprocess(request("two", picture(1), max_prompt_tokens=3))
        assert not any(books(p).values())
        await p.check_health()


async def test_a_defect_shows_no_details(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*args: object) -> None:
        raise KeyError("secret")

    async with preprocessor() as p:
        monkeypatch.setattr(Processor, "process", fail)
        with pytest.raises(InternalError) as caught:
            await p.preprocess(request("one", picture(1)))
        assert "secret" not in str(pickle.loads(pickle.dumps(caught.value))) and "secret" in caplog.text
        assert not any(books(p).values())


async def test_a_request_larger_than_the_budget_is_refused_by_name() -> None:
    async with preprocessor(patch_bytes=20_000) as p:
        with pytest.raises(MediaTooLarge, match="patch_bytes"):
            await p.preprocess(request("one", picture(1)))
        assert not any(books(p).values())
        small = picture(2, 56, 56)
        await p.preprocess(request("two", small))
        assert books(p)["byte_count"] == Grid(1, 4, 4).patches * 588


async def test_what_does_not_fit_waits_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    gate.go.set()
    async with preprocessor(patch_bytes=40_000) as p:
        await p.preprocess(request("one", picture(1)))
        assert gate.count == 1
        waiting = asyncio.create_task(p.preprocess(request("two", picture(2))))
        await eventually(lambda: p._store.stats().waiting == 1)
        assert p.queue_age_s > 0
        await p.preprocess(request("text"))
        assert gate.count == 2 and not waiting.done()
        p._store.release(["one"])
        reply = await waiting
        assert gate.count == 3 and p._store.get(reply.media[0].content_keys[0]) is not None


async def test_cancelled_while_waiting_for_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    gate.go.set()
    async with preprocessor(patch_bytes=40_000) as p:
        await p.preprocess(request("one", picture(1)))
        waiting = asyncio.create_task(p.preprocess(request("two", picture(2))))
        await eventually(lambda: p._store.stats().waiting == 1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert gate.count == 1 and p._store.stats().leases == 1 and p._store.stats().waiting == 0


async def test_cancelled_in_a_thread_its_patches_are_dropped_when_it_is_through(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = Gate(monkeypatch)
    async with preprocessor() as p:
        running = asyncio.create_task(p.preprocess(request("one", picture(1))))
        await eventually(lambda: gate.count == 1)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert p._store.stats().reserved_bytes > 0 and p._store.stats().leases == 0
        gate.go.set()
        await eventually(lambda: p._store.stats().byte_count == 0)
        assert p._store.stats().units == 0


async def test_cancelled_in_the_queue_of_the_pool_it_never_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    async with preprocessor(workers=1) as p:
        running = asyncio.create_task(p.preprocess(request("one", picture(1))))
        await eventually(lambda: gate.count == 1)
        reserved = p._store.stats().reserved_bytes
        queued = asyncio.create_task(p.preprocess(request("two", picture(2))))
        await eventually(lambda: p._store.stats().reserved_bytes > reserved)
        queued.cancel()
        await eventually(lambda: p._store.stats().reserved_bytes == reserved)
        gate.go.set()
        await running
        assert gate.count == 1


async def test_cancelled_work_stops_at_its_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: list[type[BaseException]] = []
    reached, go = threading.Event(), threading.Event()

    def long(own: Processor, request: PreprocessRequest, check: Callable[[], None]) -> Processed:
        reached.set()
        assert go.wait(10)
        try:
            check()
        except RequestCancelled as error:
            stopped.append(type(error))
            raise
        raise AssertionError("went on")

    async with preprocessor() as p:
        monkeypatch.setattr(Processor, "process", long)
        running = asyncio.create_task(p.preprocess(request("one", picture(1))))
        await eventually(reached.is_set)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        go.set()
        await eventually(lambda: p._store.stats().byte_count == 0)
        assert stopped == [RequestCancelled]


async def test_patches_released_while_they_are_made_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    async with preprocessor() as p:
        running = asyncio.create_task(p.preprocess(request("one", picture(1))))
        await eventually(lambda: gate.count == 1)
        p._store.release(["one"])
        gate.go.set()
        with pytest.raises(RequestCancelled):
            await running
        assert not any(books(p).values())


async def test_no_more_than_the_configured_number_is_processed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    async with preprocessor(workers=2) as p:
        calls = [asyncio.create_task(p.preprocess(request(f"lease {i}", picture(i)))) for i in range(4)]
        await eventually(lambda: gate.count == 2 and p._pool._work_queue.qsize() == 2)
        assert p.queue_age_s > 0 and p.busy > 0
        gate.go.set()
        await asyncio.gather(*calls)
        assert gate.count == 4


async def test_closing_ends_waiting_work_as_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    async with preprocessor(workers=1) as p:
        running = asyncio.create_task(p.preprocess(request("one", picture(1))))
        await eventually(lambda: gate.count == 1)
        queued = asyncio.create_task(p.preprocess(request("two", picture(2))))
        await eventually(lambda: p._pool._work_queue.qsize() == 1)
        closing = asyncio.create_task(p.close())
        with pytest.raises(Unavailable) as caught:
            await queued
        assert caught.value.reason == "DRAINING"
        gate.go.set()
        await closing
        await running
        with pytest.raises(Unavailable):
            await p.preprocess(request("three"))
        with pytest.raises(RuntimeError, match="not running"):
            await p.check_health()


async def test_the_bound_covers_what_processing_makes() -> None:
    async with preprocessor() as p:
        pixels = p._processor.image_config.max_pixels
        video = p._processor.video_config
        clip = VideoPart(source=MediaSource(content=b""), max_frames=5)
        many = 10**9
        assert p._bound(request("x")) == 0
        assert p._bound(request("x", picture(1), max_prompt_tokens=many)) == pixels * 3
        assert p._bound(request("x", clip, max_prompt_tokens=many)) == 6 * video.max_pixels * 3
        assert p._bound(request("x", clip, max_prompt_tokens=10)) == 10 * 8 * 588
        reply = await p.preprocess(request("x", picture(1, 900, 700)))
        assert reply.media[0].grid.patches * 588 <= p._bound(request("x", picture(1)))


async def test_a_bound_that_was_too_low_is_corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Preprocessor, "_bound", lambda self, request: 10)
    async with preprocessor(patch_bytes=50_000) as p:
        await p.preprocess(request("one", picture(1)))
        waiting = asyncio.create_task(p.preprocess(request("two", picture(2))))
        await eventually(lambda: p._store.stats().waiting == 1)
        p._store.check_integrity()
        p._store.release(["one"])
        await waiting
        assert p._store.stats().units == 1


def test_configs_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"PreprocessorConfig\.workers"):
        PreprocessorConfig(model_dir="x", workers=0)
