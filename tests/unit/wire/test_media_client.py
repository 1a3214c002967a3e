from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from functools import partial

import grpc.aio
import numpy as np
import pytest
import torch

from actors.errors import InternalError, InvalidRequest, MediaTooLarge, Unavailable
from actors.types import Grid
from actors.wire import media_server
from actors.wire.channels import bind, make_server
from actors.wire.media import AnswerUnit, EncodeCall, EncodedUnit, MediaMiss, MediaUnit
from actors.wire.media_client import MediaClient
from actors.wire.media_server import MediaServer
from ernie_serving.internal.v1 import media_pb2, media_pb2_grpc
from tests.unit.wire.media_places import HOST, embedding_store, patch_place
from tests.waiting import eventually


@pytest.fixture
async def client() -> AsyncIterator[MediaClient]:
    made = MediaClient(pull_timeout_s=5.0, lease_timeout_s=5.0)
    yield made
    await made.close()


class Encoder:
    """Answers with cached, fresh and missing units, then waits to be cancelled or fails."""

    def __init__(self, end: Exception | None = None, *, hang: bool = False) -> None:
        self.end = end
        self.hang = hang
        self.calls: list[EncodeCall] = []
        self.cancelled = 0

    async def encode(self, call: EncodeCall, answer: AnswerUnit) -> None:
        self.calls.append(call)
        try:
            for index, unit in enumerate(call.units):
                key = None if index == 1 else b"e" + unit.content_key
                await answer(
                    EncodedUnit(content_key=unit.content_key, embedding_key=key, cached=index == 2, busy_s=0.25 * index)
                )
            if self.end is not None:
                raise self.end
            if self.hang:
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


UNITS = tuple(MediaUnit(content_key=bytes([i]) * 32, grid=Grid(1 + i % 2, 2, 4)) for i in range(3))


async def collect(client: MediaClient, address: str, timeout_s: float = 5.0) -> list[EncodedUnit]:
    answers = client.encode(address, lease="one", units=UNITS, patch_address="pre:1", timeout_s=timeout_s)
    return [answer async for answer in answers]


async def test_patches_are_pulled_and_proved(client: MediaClient) -> None:
    async with patch_place() as place:
        for unit in await place.keep("one", Grid(1, 2, 2), Grid(2, 4, 6), Grid(1, 74, 74)):
            patches = await client.pull_patches(place.address, unit, "one")
            np.testing.assert_array_equal(patches, place.store.get(unit.content_key))


async def test_many_pulls_share_one_channel(client: MediaClient) -> None:
    async with patch_place() as place:
        units = await place.keep("one", *[Grid(1, 2, 2)] * 20)
        await asyncio.gather(*(client.pull_patches(place.address, unit, "one") for unit in units))
        assert list(client._peers) == [place.address]


async def test_a_place_that_falls_silent_under_a_pull_is_a_miss() -> None:
    """Long before the pull's own deadline; a slow one that goes on is none."""

    class Frozen(media_pb2_grpc.MediaServiceServicer):
        async def Pull(  # type: ignore[override]  # noqa: N802
            self, request: media_pb2.PullRequest, context: grpc.aio.ServicerContext[object, object]
        ) -> None:
            header = media_pb2.TensorHeader(dtype="uint8", shape=[4])
            await context.write(media_pb2.PullResponse(header=header, data=b"a"))
            for _ in range(3):
                await asyncio.sleep(0.2 if request.key == b"slow" else 60.0)
                await context.write(media_pb2.PullResponse(data=b"a"))

    server = make_server()
    media_pb2_grpc.add_MediaServiceServicer_to_server(Frozen(), server)
    address = bind(server, HOST)
    await server.start()
    client = MediaClient(pull_timeout_s=30.0, silent_s=0.5)
    try:
        assert len(await client.pull(address, b"slow", "one")) == 4
        async with asyncio.timeout(10):
            with pytest.raises(MediaMiss, match="silent"):
                await client.pull(address, b"frozen", "one")
    finally:
        await client.close()
        await server.stop(None)


class Busy:
    """An encoder at work on one unit, which is made, or given up, when the test says so."""

    def __init__(self) -> None:
        self.pulls = 0
        self.over = asyncio.Event()

    async def encode(self, call: EncodeCall, answer: AnswerUnit) -> None:
        raise AssertionError

    async def wait_for(self, key: bytes) -> None:
        self.pulls += 1
        await self.over.wait()


@pytest.mark.parametrize("made", [True, False])
async def test_a_unit_that_is_being_made_is_waited_for(
    made: bool, client: MediaClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long that takes, and not in silence."""
    monkeypatch.setattr("actors.wire.media_server.PENDING_S", 0.01)
    encoder = Busy()
    async with patch_place(encoder=encoder) as place:
        pull = asyncio.create_task(client.pull(place.address, b"key", "reader"))
        await eventually(lambda: encoder.pulls >= 3 or pull.done())
        if made:
            await place.put("one", (b"key", np.arange(6, dtype=np.uint8)))
        encoder.over.set()
        if made:
            assert (await pull).tolist() == list(range(6))
        else:
            with pytest.raises(MediaMiss, match="NOT_FOUND"):
                await pull


async def test_what_is_not_there_is_a_miss(client: MediaClient) -> None:
    async with patch_place() as place:
        with pytest.raises(MediaMiss, match="NOT_FOUND"):
            await client.pull(place.address, b"key", "one")


@pytest.mark.parametrize("damage", ["other bytes", "fewer rows", "a tensor"])
async def test_a_corrupted_unit_is_a_loud_miss(
    client: MediaClient, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with patch_place() as place:
        (unit,) = await place.keep("one", Grid(1, 4, 4))
        stored = place.store._units[unit.content_key]
        stored.value = stored.value.copy()
        if damage == "other bytes":
            stored.value[7, 13] ^= 1
        elif damage == "fewer rows":
            stored.value = stored.value[:-1]
        else:
            stored.value = torch.zeros(16, 2)  # type: ignore[assignment]
        with caplog.at_level(logging.ERROR), pytest.raises(MediaMiss, match=r"corrupted|no patches"):
            await client.pull_patches(place.address, unit, "one")
        assert unit.content_key.hex() in caplog.text
        stored.value = np.zeros((16, 588), dtype=np.uint8)  # so that the books agree again


async def test_a_bit_that_flips_in_an_embedding_is_a_loud_miss(
    client: MediaClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    chunks_of = media_server.chunks_of

    def flipped(value: torch.Tensor) -> Iterator[bytes]:
        for chunk in chunks_of(value):
            yield chunk[:-1] + bytes([chunk[-1] ^ 1])

    store, embedding = embedding_store(), torch.arange(6.0).reshape(2, 3)
    with store.open("one") as lease:
        store.put(b"key", embedding, await store.reserve(lease, embedding.nbytes), [lease])
        server = MediaServer(store)
        await server.start(HOST)
        try:
            pull = partial(client.pull_embedding, server.address, b"key", "one", shape=(2, 3), dtype=torch.float32)
            assert torch.equal(await pull(), embedding)
            monkeypatch.setattr(media_server, "chunks_of", flipped)
            with caplog.at_level(logging.ERROR), pytest.raises(MediaMiss, match="other bytes"):
                await pull()
            assert b"key".hex() in caplog.text
        finally:
            await server.close()


async def test_more_or_fewer_bytes_than_announced_are_a_miss(client: MediaClient) -> None:
    class Liar(media_pb2_grpc.MediaServiceServicer):
        async def Pull(  # type: ignore[override]  # noqa: N802
            self, request: media_pb2.PullRequest, context: grpc.aio.ServicerContext[object, object]
        ) -> None:
            header = media_pb2.TensorHeader(dtype="uint8", shape=[10])
            if request.key != b"nothing":
                await context.write(media_pb2.PullResponse(header=header, data=b"x" * int(request.key)))

    server = make_server()
    media_pb2_grpc.add_MediaServiceServicer_to_server(Liar(), server)  # type: ignore[abstract]
    address = f"{HOST}:{server.add_insecure_port(f'{HOST}:0')}"
    await server.start()
    try:
        assert isinstance(await client.pull(address, b"10", "one"), np.ndarray)
        for key in (b"9", b"11", b"nothing"):
            with pytest.raises(MediaMiss, match="damaged"):
                await client.pull(address, key, "one")
        with pytest.raises(MediaMiss, match="at most 5"):
            await client.pull(address, b"10", "one", max_bytes=5)
    finally:
        await server.stop(None)


async def test_a_dead_peer_is_a_miss_and_a_reborn_one_is_found(client: MediaClient) -> None:
    async with patch_place() as place:
        (unit,) = await place.keep("one", Grid(1, 2, 2))
        await client.pull_patches(place.address, unit, "one")
        address = place.address
        await place.server.close()
        with pytest.raises(MediaMiss, match="UNAVAILABLE"):
            await client.pull_patches(address, unit, "one")
        assert not client._peers
        server = make_server()
        media_pb2_grpc.add_MediaServiceServicer_to_server(place.server._servicer, server)
        assert server.add_insecure_port(address)
        await server.start()
        try:
            await client.pull_patches(address, unit, "one")
        finally:
            await server.stop(None)


async def test_a_peer_that_closes_in_the_middle_of_a_pull_is_a_miss(client: MediaClient) -> None:
    started = asyncio.Event()

    class Slow(media_pb2_grpc.MediaServiceServicer):
        async def Pull(  # type: ignore[override]  # noqa: N802
            self, request: media_pb2.PullRequest, context: grpc.aio.ServicerContext[object, object]
        ) -> None:
            header = media_pb2.TensorHeader(dtype="uint8", shape=[10])
            await context.write(media_pb2.PullResponse(header=header, data=b"12345"))
            started.set()
            await asyncio.Event().wait()

    server = make_server()
    media_pb2_grpc.add_MediaServiceServicer_to_server(Slow(), server)  # type: ignore[abstract]
    address = f"{HOST}:{server.add_insecure_port(f'{HOST}:0')}"
    await server.start()
    pull = asyncio.create_task(client.pull(address, b"key", "one"))
    await started.wait()
    await server.stop(None)
    with pytest.raises(MediaMiss):
        await pull


async def test_a_frozen_peer_is_a_miss_after_the_deadline() -> None:
    async def never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    frozen = await asyncio.start_server(never, HOST, 0)
    address = "{}:{}".format(*frozen.sockets[0].getsockname())
    client = MediaClient(pull_timeout_s=0.2, lease_timeout_s=0.2)
    try:
        with pytest.raises(MediaMiss):
            await client.pull(address, b"key", "one")
        for call in (client.renew, client.release):
            with pytest.raises(Unavailable) as caught:
                await call(address, ["one"])
            assert caught.value.reason == "STAGE_LOST"
        with pytest.raises(Unavailable):
            await collect(client, address, timeout_s=0.2)
    finally:
        await client.close()
        frozen.close()


async def test_another_worker_at_the_address_is_a_lost_place(client: MediaClient) -> None:
    """Ports are used again: a preprocessor may come up where an encoder was, or an engine."""
    async with patch_place() as place:
        with pytest.raises(Unavailable) as caught:
            await collect(client, place.address)
        assert caught.value.reason == "STAGE_LOST"
    engine = make_server()
    address = bind(engine, HOST)
    await engine.start()
    try:
        with pytest.raises(MediaMiss, match="UNIMPLEMENTED"):
            await client.pull(address, b"key", "one")
    finally:
        await engine.stop(None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
async def test_embeddings_are_pulled_and_checked(client: MediaClient, dtype: torch.dtype) -> None:
    store = embedding_store()
    server = MediaServer(store)
    await server.start(HOST)
    try:
        embedding = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
        with store.open("one") as lease:
            reservation = await store.reserve(lease, embedding.nbytes)
            store.put(b"key", embedding, reservation, [lease])
        received = await client.pull_embedding(server.address, b"key", "one", shape=(4, 6), dtype=dtype)
        assert torch.equal(received, embedding)
        for shape, other in (((4, 5), dtype), ((6, 4), dtype), ((8, 6), torch.float32)):
            with pytest.raises(MediaMiss):
                await client.pull_embedding(server.address, b"key", "one", shape=shape, dtype=other)
    finally:
        await server.close()


async def test_encode_passes_the_call_and_every_answer(client: MediaClient) -> None:
    encoder = Encoder()
    async with patch_place(encoder=encoder) as place:
        answers = await collect(client, place.address)
    assert encoder.calls == [EncodeCall(lease="one", units=UNITS, patch_address="pre:1")]
    keys = [unit.content_key for unit in UNITS]
    assert answers == [
        EncodedUnit(content_key=keys[0], embedding_key=b"e" + keys[0]),
        EncodedUnit(content_key=keys[1], embedding_key=None, busy_s=0.25),
        EncodedUnit(content_key=keys[2], embedding_key=b"e" + keys[2], cached=True, busy_s=0.5),
    ]


async def test_errors_keep_their_kind_reason_and_field(client: MediaClient) -> None:
    async with patch_place(encoder=Encoder(MediaTooLarge("over the limit \u00e9", field="messages"))) as place:
        with pytest.raises(InvalidRequest) as caught:
            await collect(client, place.address)
        assert (caught.value.reason, caught.value.field) == ("MEDIA_TOO_LARGE", "messages")
        assert caught.value.message == "over the limit \u00e9"
    async with patch_place(encoder=Encoder(RuntimeError("secret"))) as place:
        with pytest.raises(InternalError, match="the vision encoder failed"):
            await collect(client, place.address)


async def test_a_closed_iterator_cancels_the_call(client: MediaClient) -> None:
    encoder = Encoder(hang=True)
    async with patch_place(encoder=encoder) as place:
        answers = client.encode(place.address, lease="one", units=UNITS, patch_address="pre:1", timeout_s=60)
        async with aclosing(answers):
            assert (await anext(answers)).content_key == UNITS[0].content_key
        await eventually(lambda: encoder.cancelled == 1)


async def test_a_cancelled_reader_cancels_the_call(client: MediaClient) -> None:
    encoder = Encoder(hang=True)
    async with patch_place(encoder=encoder) as place:
        reader = asyncio.create_task(collect(client, place.address, timeout_s=60))
        await eventually(lambda: len(encoder.calls) == 1)
        reader.cancel()
        await eventually(lambda: encoder.cancelled == 1)
        with pytest.raises(asyncio.CancelledError):
            await reader


async def test_an_encoder_that_dies_is_a_lost_stage(client: MediaClient) -> None:
    encoder = Encoder(hang=True)
    async with patch_place(encoder=encoder) as place:
        reader = asyncio.create_task(collect(client, place.address, timeout_s=60))
        await eventually(lambda: len(encoder.calls) == 1)
        await place.server.close()
        with pytest.raises(Unavailable) as caught:
            await reader
    assert caught.value.reason == "STAGE_LOST"


async def test_leases_are_renewed_and_released_by_place(client: MediaClient) -> None:
    async with patch_place() as place:
        await place.keep("one", Grid(1, 2, 2))
        assert await client.renew(place.address, ["one", "two"]) == ["two"]
        await client.release(place.address, ["one", "two"])
        assert place.store.stats().units == 0
        assert await client.renew(place.address, ["one"]) == ["one"]
