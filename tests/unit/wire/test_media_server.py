from __future__ import annotations

import asyncio
import zlib

import grpc
import grpc.aio
import numpy as np
import pytest
import torch

from actors.errors import MediaTooLarge
from actors.types import Grid
from actors.wire import convert
from actors.wire.channels import open_channel
from actors.wire.media import AnswerUnit, EncodeCall, EncodedUnit
from actors.wire.media_server import MediaServer
from ernie_serving.internal.v1 import media_pb2, media_pb2_grpc
from tests.unit.wire.media_places import HOST, Clock, embedding_store, patch_place
from tests.waiting import eventually

MEGABYTE = 1_000_000


class FakeEncoder:
    def __init__(self) -> None:
        self.calls: list[EncodeCall] = []
        self.cancelled = 0
        self.error: Exception | None = None
        self.hang = False

    async def encode(self, call: EncodeCall, answer: AnswerUnit) -> None:
        self.calls.append(call)
        try:
            for unit in call.units:
                key = b"e" + unit.content_key
                await answer(EncodedUnit(content_key=unit.content_key, embedding_key=key, busy_s=0.5))
            if self.error is not None:
                raise self.error
            if self.hang:
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


def stub_of(channel: grpc.aio.Channel) -> media_pb2_grpc.MediaServiceAsyncStub:
    return media_pb2_grpc.MediaServiceStub(channel)


@pytest.mark.parametrize(("rows", "chunks"), [(0, [0]), (1, [10]), (100_000, [MEGABYTE]), (320_000, [MEGABYTE] * 3)])
async def test_a_unit_comes_as_header_and_chunks_of_at_most_a_megabyte(rows: int, chunks: list[int]) -> None:
    patches = np.random.default_rng(1).integers(0, 256, (rows, 10), dtype=np.uint8)
    if rows == 320_000:
        chunks = [*chunks, 200_000]
    async with patch_place() as place, open_channel(place.address) as channel:
        await place.put("lease", (b"key", patches))
        messages = [message async for message in stub_of(channel).Pull(media_pb2.PullRequest(key=b"key"), timeout=5)]
    assert [len(message.data) for message in messages] == chunks
    assert messages[0].header == media_pb2.TensorHeader(dtype="uint8", shape=[rows, 10])
    assert not any(message.HasField("header") for message in messages[1:])
    assert b"".join(message.data for message in messages) == patches.tobytes()


async def test_a_miss_is_not_found() -> None:
    async with patch_place() as place, open_channel(place.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in stub_of(channel).Pull(media_pb2.PullRequest(key=b"key"), timeout=5):
                pass
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_renew_covers_all_leases_of_a_place_and_names_unknown_ones() -> None:
    clock = Clock()
    async with patch_place(clock) as place, open_channel(place.address) as channel:
        stub = stub_of(channel)
        await place.keep("one", Grid(1, 2, 2))
        await place.keep("two", Grid(1, 4, 2), seed=1)
        for _ in range(3):
            clock.now += 4
            response = await stub.Renew(media_pb2.RenewRequest(leases=["one", "two", "three"]), timeout=5)
            assert list(response.unknown_leases) == ["three"]
        clock.now += 4
        await stub.Renew(media_pb2.RenewRequest(leases=["one"]), timeout=5)
        clock.now += 2
        response = await stub.Renew(media_pb2.RenewRequest(leases=["one", "two"]), timeout=5)
        assert list(response.unknown_leases) == ["two"] and place.store.stats().units == 1


async def test_a_pull_extends_a_lease_it_knows_and_starts_none() -> None:
    clock = Clock()
    async with patch_place(clock) as place, open_channel(place.address) as channel:
        (unit,) = await place.keep("one", Grid(1, 2, 2))
        clock.now += 4
        for lease in ("one", "other"):
            request = media_pb2.PullRequest(key=unit.content_key, lease=lease)
            assert [message async for message in stub_of(channel).Pull(request, timeout=5)]
        clock.now += 4
        assert place.store.renew(["one", "other"]) == ["other"]


async def test_release_is_idempotent() -> None:
    async with patch_place() as place, open_channel(place.address) as channel:
        await place.keep("one", Grid(1, 2, 2))
        for _ in range(2):
            await stub_of(channel).Release(media_pb2.ReleaseRequest(leases=["one", "never"]), timeout=5)
        assert place.store.stats().byte_count == 0


async def test_leases_expire_without_any_call() -> None:
    clock = Clock()
    async with patch_place(clock) as place:
        await place.keep("one", Grid(1, 2, 2))
        clock.now += 5.1
        await eventually(lambda: place.store.stats().units == 0)
        place.server.check()


async def test_preprocessors_encode_nothing() -> None:
    async with patch_place() as place, open_channel(place.address) as channel:
        request = media_pb2.EncodeRequest(protocol_version=convert.PROTOCOL_VERSION)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in stub_of(channel).Encode(request, timeout=5):
                pass
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_another_protocol_is_refused() -> None:
    encoder = FakeEncoder()
    async with patch_place(encoder=encoder) as place, open_channel(place.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in stub_of(channel).Encode(media_pb2.EncodeRequest(protocol_version=999), timeout=5):
                pass
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION and not encoder.calls


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (MediaTooLarge("over the limit x", field="messages"), grpc.StatusCode.INVALID_ARGUMENT, "over the limit x"),
        (RuntimeError("secret"), grpc.StatusCode.INTERNAL, "the vision encoder failed"),
    ],
)
async def test_errors_of_the_encoder_end_the_call(error: Exception, code: grpc.StatusCode, text: str) -> None:
    encoder = FakeEncoder()
    encoder.error = error
    async with patch_place(encoder=encoder) as place, open_channel(place.address) as channel:
        request = media_pb2.EncodeRequest(protocol_version=convert.PROTOCOL_VERSION)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in stub_of(channel).Encode(request, timeout=5):
                pass
    assert caught.value.code() is code and caught.value.details() == text


async def test_a_cancelled_encode_reaches_the_encoder() -> None:
    encoder = FakeEncoder()
    encoder.hang = True
    async with patch_place(encoder=encoder) as place, open_channel(place.address) as channel:
        request = media_pb2.EncodeRequest(
            protocol_version=convert.PROTOCOL_VERSION, lease="one", units=[media_pb2.EncodeUnit(content_key=b"c")]
        )
        call = stub_of(channel).Encode(request, timeout=30)
        response = await call.read()
        assert isinstance(response, media_pb2.EncodeResponse) and response.embedding_key == b"ec"
        call.cancel()
        await eventually(lambda: encoder.cancelled == 1)


async def test_it_publishes_address_and_incarnation_and_stops_watching_when_closed() -> None:
    servers = [MediaServer(embedding_store()) for _ in range(2)]
    for server in servers:
        with pytest.raises(RuntimeError, match="not running"):
            server.check()
        await server.start(HOST)
        server.check()
    assert servers[0].incarnation != servers[1].incarnation
    assert servers[0].address != servers[1].address and servers[0].address.startswith("127.0.0.1:")
    for server in servers:
        await server.close()
        await server.close()
        with pytest.raises(RuntimeError, match="not running"):
            server.check()


async def test_embeddings_of_every_dtype_are_served() -> None:
    store = embedding_store()
    server = MediaServer(store)
    await server.start(HOST)
    try:
        with store.open("one") as lease:
            embedding = torch.arange(6).reshape(2, 3).to(torch.bfloat16)
            reservation = await store.reserve(lease, embedding.nbytes)
            store.put(b"key", embedding, reservation, [lease])
            async with open_channel(server.address) as channel:
                call = stub_of(channel).Pull(media_pb2.PullRequest(key=b"key"), timeout=5)
                (message,) = [message async for message in call]
        assert message.header == media_pb2.TensorHeader(
            dtype="bfloat16", shape=[2, 3], checksum=zlib.crc32(message.data)
        )
        assert message.data == embedding.view(torch.uint8).numpy().tobytes()
    finally:
        await server.close()
