from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import numpy as np
import pytest
import torch

from actors.config import VisionEncoderConfig
from actors.ernie.config import ErnieConfig
from actors.ernie.vision import VisionModel
from actors.ernie.weights import Checkpoint, load_vision
from actors.errors import InternalError, InvalidRequest, MediaTooLarge, Unavailable
from actors.types import Grid
from actors.vision_encoder import VisionEncoder
from actors.wire.media import EncodedUnit, MediaUnit, embedding_key
from actors.wire.media_client import MediaClient
from tests.tiny_model import tiny_checkpoint
from tests.unit.wire.media_places import HOST, PatchPlace, patch_place
from tests.waiting import eventually

SMALL, WIDE, PAIR = Grid(1, 4, 4), Grid(1, 2, 6), Grid(2, 4, 4)


class Rig:
    """An encoder, a preprocessor's patches and a client, all real, on localhost."""

    def __init__(self, encoder: VisionEncoder, place: PatchPlace, client: MediaClient) -> None:
        self.encoder = encoder
        self.place = place
        self.client = client

    async def encode(self, lease: str, *units: MediaUnit, patch_address: str | None = None) -> list[EncodedUnit]:
        answers = self.client.encode(
            self.encoder.identity.address,
            lease=lease,
            units=units,
            patch_address=patch_address or self.place.address,
            timeout_s=20,
        )
        return [answer async for answer in answers]

    async def embedding(self, answer: EncodedUnit) -> torch.Tensor:
        assert answer.embedding_key is not None
        embedding = await self.client.pull(self.encoder.identity.address, answer.embedding_key, "one")
        assert isinstance(embedding, torch.Tensor)
        return embedding


async def start_encoder(**changes: Any) -> VisionEncoder:
    fields = {"model_dir": str(tiny_checkpoint()), "encoder_id": "encoder", "dtype": "float64"} | changes
    encoder = VisionEncoder.__new__(VisionEncoder)
    await encoder.__init__(VisionEncoderConfig(**fields), HOST)  # type: ignore[misc]
    return encoder


@asynccontextmanager
async def rig(**changes: Any) -> AsyncIterator[Rig]:
    async with AsyncExitStack() as stack:
        place = await stack.enter_async_context(patch_place())
        client = MediaClient()
        stack.push_async_callback(client.close)
        encoder = await start_encoder(**changes)
        stack.push_async_callback(encoder.close)
        yield Rig(encoder, place, client)
        audit = encoder.audit()
        assert not audit.problem
        assert audit.held["queued_patches"] == audit.held["window_bytes"] == 0
        assert encoder._store.stats().reserved_bytes == 0


def reference(patches: Sequence[np.ndarray[Any, Any]], grids: Sequence[Grid], dtype: str) -> list[torch.Tensor]:
    with Checkpoint(tiny_checkpoint()) as checkpoint:
        model = load_vision(checkpoint, checkpoint.config, dtype=getattr(torch, dtype))
    return model.encode(torch.from_numpy(np.concatenate(patches)), grids)


def hold_forward(encoder: VisionEncoder, monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Stops the worker inside its next batch: (entered, go)."""
    entered, go = threading.Event(), threading.Event()
    forward = encoder._queue._encode

    def held(*args: Any) -> Any:
        entered.set()
        assert go.wait(10)
        return forward(*args)

    monkeypatch.setattr(encoder._queue, "_encode", held)
    return entered, go


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
async def test_embeddings_equal_the_models_own(dtype: str) -> None:
    async with rig(dtype=dtype) as r:
        grids = [SMALL, WIDE, PAIR]
        units = await r.place.keep("one", *grids)
        answers = {answer.content_key: answer for answer in await r.encode("one", *units)}
        patches = [r.place.store.get(unit.content_key) for unit in units]
        for unit, rows in zip(units, patches, strict=True):
            assert rows is not None
            embedding = await r.embedding(answers[unit.content_key])
            (expected,) = reference([rows], [unit.grid], dtype)
            assert embedding.dtype == getattr(torch, dtype)
            tolerance = {"float64": 1e-12, "float32": 1e-4, "bfloat16": 0.1}[dtype]
            torch.testing.assert_close(embedding, expected, atol=tolerance, rtol=tolerance)


async def test_two_requests_share_a_batch_and_get_what_they_get_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    encode = VisionModel.encode

    def counted(self: VisionModel, patches: torch.Tensor, unit_grids: Sequence[Grid]) -> list[torch.Tensor]:
        sizes.append(len(unit_grids))
        return encode(self, patches, unit_grids)

    monkeypatch.setattr(VisionModel, "encode", counted)
    grids = [SMALL, PAIR, WIDE, SMALL]
    async with rig() as r:
        first, *others = await r.place.keep("one", SMALL, *grids, seed=7)
        entered, go = hold_forward(r.encoder, monkeypatch)
        calls = [asyncio.create_task(r.encode("zero", first))]
        await eventually(entered.is_set)
        calls += [asyncio.create_task(r.encode("one", *others[:2])), asyncio.create_task(r.encode("two", *others[2:]))]
        await eventually(lambda: len(r.encoder._queue._ready) == 4)
        go.set()
        answers = {answer.content_key: answer for call in calls for answer in await call}
        assert sizes == [1, 4]
        together = [await r.embedding(answers[unit.content_key]) for unit in others]
    async with rig() as r:
        for unit, (grid, shared) in zip(others, zip(grids, together, strict=True), strict=True):
            (again,) = await r.place.keep("one", grid, seed=8 + others.index(unit))
            assert again == unit
            (answer,) = await r.encode("one", unit)
            torch.testing.assert_close(shared, await r.embedding(answer), atol=1e-12, rtol=0)


async def test_known_embeddings_are_served_from_the_cache_without_patches() -> None:
    async with rig() as r:
        units = await r.place.keep("one", SMALL, PAIR)
        first = await r.encode("one", *units)
        assert not any(answer.cached for answer in first)
        await r.client.release(r.encoder.identity.address, ["one"])
        r.place.store.release(["one"])
        again = await r.encode("two", *units)
        assert all(answer.cached and answer.busy_s == 0 for answer in again)
        assert {answer.embedding_key for answer in again} == {answer.embedding_key for answer in first}
        stats = r.encoder._store.stats()
        assert stats.cached_bytes == 0 and stats.leases == 1


async def test_gone_patches_are_answered_with_an_empty_key() -> None:
    async with rig() as r:
        here, gone = await r.place.keep("one", SMALL, PAIR)
        await r.encode("one", here)
        r.place.store.release(["one"])
        answers = {answer.content_key: answer for answer in await r.encode("one", here, gone)}
        assert answers[here.content_key].cached and answers[gone.content_key].embedding_key is None
        (answer,) = await r.encode("one", gone, patch_address="127.0.0.1:1")
        assert answer.embedding_key is None


async def test_a_unit_named_twice_is_answered_once() -> None:
    async with rig() as r:
        (unit,) = await r.place.keep("one", SMALL)
        assert len(await r.encode("one", unit, unit)) == 1


async def test_released_embeddings_stay_pullable_until_evicted() -> None:
    tiny = ErnieConfig.from_dir(tiny_checkpoint()).text.hidden_size * 8 * SMALL.tokens
    async with rig(embedding_bytes=2 * tiny, cache_bytes=2 * tiny) as r:
        units = await r.place.keep("one", SMALL, SMALL, SMALL)
        answers = []
        for index, unit in enumerate(units):
            answers += await r.encode(str(index), unit)
            await r.client.release(r.encoder.identity.address, [str(index)])
        store = r.encoder._store
        here = [answer.embedding_key is not None and store.get(answer.embedding_key) is not None for answer in answers]
        assert here == [False, True, True]


async def test_what_can_never_be_held_is_refused_by_name() -> None:
    async with rig(embedding_bytes=1000) as r:
        units = await r.place.keep("one", Grid(1, 40, 40))
        with pytest.raises(InvalidRequest, match="embedding_bytes") as caught:
            await r.encode("one", *units)
        assert caught.value.reason == MediaTooLarge.default_reason
        assert r.encoder.audit().held["leases"] == 0


async def test_requests_wait_for_bytes_and_never_for_each_other() -> None:
    tiny = ErnieConfig.from_dir(tiny_checkpoint()).text.hidden_size * 8 * SMALL.tokens
    async with rig(embedding_bytes=3 * tiny, cache_bytes=tiny) as r:
        a, b, c, d = await r.place.keep("one", SMALL, SMALL, SMALL, SMALL)
        await r.encode("one", a)
        await r.encode("two", b)

        async def more(lease: str, *units: MediaUnit) -> None:
            answers = await r.encode(lease, *units)
            assert all(answer.embedding_key for answer in answers)
            await r.client.release(r.encoder.identity.address, [lease])

        async with asyncio.timeout(10):
            await asyncio.gather(more("one", a, c, d), more("two", b, d, c))


@pytest.mark.parametrize(
    "unit",
    [
        MediaUnit(content_key=b"short", grid=SMALL),
        MediaUnit(content_key=bytes(32), grid=Grid(3, 4, 4)),
        MediaUnit(content_key=bytes(32), grid=Grid(0, 4, 4)),
        MediaUnit(content_key=bytes(32), grid=Grid(1, 3, 4)),
        MediaUnit(content_key=bytes(32), grid=Grid(1, 4, 0)),
    ],
)
async def test_what_names_no_unit_is_refused(unit: MediaUnit) -> None:
    async with rig() as r:
        with pytest.raises(InvalidRequest):
            await r.encode("one", unit)
        await r.encoder.check_health()


async def test_cancelled_while_patches_are_pulled(monkeypatch: pytest.MonkeyPatch) -> None:
    async with rig() as r:
        pulling = asyncio.Event()

        async def never(*args: object) -> Any:
            pulling.set()
            await asyncio.Event().wait()

        monkeypatch.setattr(r.encoder._queue, "_pull", never)
        await cancel_at(r, pulling.is_set, r.encode("one", *await r.place.keep("one", SMALL)))
        assert r.encoder._store.stats().units == 0


async def test_cancelled_in_a_batch_the_embedding_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    async with rig() as r:
        entered, go = hold_forward(r.encoder, monkeypatch)
        running, waiting = await r.place.keep("one", SMALL, PAIR)
        call = asyncio.create_task(r.encode("one", running))
        await eventually(entered.is_set)
        await cancel_at(r, lambda: len(r.encoder._queue._ready) == 1, r.encode("two", waiting), idle=False)
        await eventually(lambda: r.encoder._queue.queued_patches == running.grid.patches)
        call.cancel()
        await eventually(lambda: r.encoder._store.stats().leases == 0)
        go.set()
        await eventually(lambda: r.encoder._queue.queued_patches == 0)
        assert r.encoder._store.stats().cached_units == 1


async def test_cancelled_while_waiting_for_bytes() -> None:
    tiny = ErnieConfig.from_dir(tiny_checkpoint()).text.hidden_size * 8 * SMALL.tokens
    async with rig(embedding_bytes=tiny, cache_bytes=0) as r:
        a, b = await r.place.keep("one", SMALL, SMALL)
        await r.encode("one", a)
        await cancel_at(r, lambda: r.encoder._store.stats().waiting == 1, r.encode("two", b), idle=False)
        await eventually(lambda: r.encoder._store.stats().waiting == 0)
        assert r.encoder._store.renew(["one", "two"]) == ["two"]


async def test_a_unit_someone_else_wants_survives_a_cancellation(monkeypatch: pytest.MonkeyPatch) -> None:
    async with rig() as r:
        entered, go = hold_forward(r.encoder, monkeypatch)
        first, shared = await r.place.keep("one", SMALL, PAIR)
        calls = [asyncio.create_task(r.encode("zero", first))]
        await eventually(entered.is_set)
        calls.append(asyncio.create_task(r.encode("one", shared)))
        await cancel_at(
            r,
            lambda: len(r.encoder._queue._ready) == 1 and len(r.encoder._queue._ready[0].tickets) == 2,
            r.encode("two", shared),
            idle=False,
        )
        go.set()
        (answer,) = await calls[1]
        assert answer.embedding_key is not None
        await calls[0]


async def cancel_at(
    r: Rig, reached: Callable[[], bool], call: Awaitable[list[EncodedUnit]], *, idle: bool = True
) -> None:
    task = asyncio.ensure_future(call)
    await eventually(reached)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    if idle:
        await eventually(lambda: r.encoder._queue.queued_patches == 0 and r.encoder._store.stats().leases == 0)


async def test_an_embedding_that_is_not_finite_is_an_error_of_its_caller_only(monkeypatch: pytest.MonkeyPatch) -> None:
    encode = VisionModel.encode

    def spoiled(self: VisionModel, patches: torch.Tensor, unit_grids: Sequence[Grid]) -> list[torch.Tensor]:
        made = encode(self, patches, unit_grids)
        return [e.fill_(float("inf")) if g == PAIR else e for e, g in zip(made, unit_grids, strict=True)]

    monkeypatch.setattr(VisionModel, "encode", spoiled)
    async with rig() as r:
        good, bad = await r.place.keep("one", SMALL, PAIR)
        with pytest.raises(InternalError, match="not finite"):
            await r.encode("one", bad)
        assert (await r.encode("two", good))[0].embedding_key is not None
        await r.encoder.check_health()
        key = embedding_key(bad.content_key, bytes.fromhex(r.encoder.identity.fingerprint), "float64")
        assert r.encoder._store.get(key) is None


async def test_a_failing_model_ends_the_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("secret")

    async with rig() as r:
        await r.encoder.check_health()
        monkeypatch.setattr(r.encoder._queue, "_encode", fail)
        units = await r.place.keep("one", SMALL, PAIR)
        with pytest.raises(InternalError, match="the vision encoder failed"):
            await r.encode("one", *units)
        with pytest.raises(RuntimeError, match="the vision encoder failed"):
            await r.encoder.check_health()
        with pytest.raises(Unavailable):
            await r.encode("two", *units)


async def test_only_vision_weights_are_read() -> None:
    encoder = await start_encoder()
    try:
        with Checkpoint(tiny_checkpoint()) as checkpoint:
            vision = checkpoint.bytes_to_read(checkpoint.specs)["vision"]
            assert encoder.identity.fingerprint == checkpoint.fingerprint("vision").hex()
        assert encoder.loaded.bytes_read == {"language": 0, "vision_experts": 0, "vision": vision} and vision > 0
        assert encoder.identity.dtype == "float64" and encoder.queued_patches == 0
    finally:
        await encoder.close()
        await encoder.close()
    with pytest.raises(RuntimeError):
        await encoder.check_health()


def test_configs_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"VisionEncoderConfig\.dtype"):
        VisionEncoderConfig(model_dir="x", encoder_id="e", dtype="int8")
    with pytest.raises(ValueError, match=r"VisionEncoderConfig\.max_batch_patches"):
        VisionEncoderConfig(model_dir="x", encoder_id="e", dtype="float32", max_batch_patches=0)
