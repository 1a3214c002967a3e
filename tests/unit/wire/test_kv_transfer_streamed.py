"""Where the data path does not work chunks go over the control stream: counted, verified, given up as any other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from actors.parallel.kv_transfer import Staging, Transport, TransportError
from actors.wire import convert, kv_receiving_lane, kv_sending_lane
from actors.wire.channels import open_channel
from actors.wire.kv_control import identity_to_proto
from ernie_serving.internal.v1 import kv_control_pb2 as pb
from ernie_serving.internal.v1.kv_control_pb2_grpc import KvControlServiceStub
from tests.unit.wire.kv_engines import (
    CONFIG,
    IDENTITY,
    DecodeSide,
    Gate,
    PrefillSide,
    Through,
    decode_side,
    geometry_of,
    key_of,
    prefill_side,
    same_bytes,
)

KEY = key_of(1)
TABLE = [4, 5]
BOUNDS = [0, 4, 8]
CHUNK = geometry_of().chunk_bytes(4)


class Path:
    """A data path that works while ``works``, for either side."""

    def __init__(self, works: bool = False) -> None:
        self.works = works

    def __call__(self, transport: Transport, _name: str) -> Transport:
        return Shaky(transport, self)


class Shaky(Through):
    def __init__(self, inner: Transport, path: Path) -> None:
        super().__init__(inner)
        self.path = path

    def send(self, tensors: Iterable[Tensor]) -> None:
        if not self.path.works:
            raise TransportError("no data path here")
        self.inner.send(tensors)

    def recv(self, buffers: Sequence[Tensor], arrived: Callable[[int], None]) -> None:
        if not self.path.works:
            raise TransportError("no data path here")
        self.inner.recv(buffers, arrived)


async def assert_arrives(prefill: PrefillSide, decode: DecodeSide, number: int = 1, parts: int = 1) -> None:
    key = key_of(number)
    await prefill.send(key, decode, TABLE, BOUNDS, parts)
    assert await decode.engine.hears("kv_arrived", key) == ("kv_arrived", key, 7, False)
    await prefill.engine.hears("transferred", key)
    assert not prefill.engine.told("fail", key)
    assert same_bytes(prefill.cache.of(TABLE, 8), decode.cache.of(decode.engine.tables[key], 8))


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> int:
    for module in (kv_sending_lane, kv_receiving_lane):
        monkeypatch.setattr(module, "CHUNK_BYTES", 100)
    return 100


@pytest.mark.parametrize("side", ["prefill", "decode"])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
async def test_chunks_arrive_over_the_stream(
    side: str, dtype: torch.dtype, parts: int, small_pieces: int, caplog: pytest.LogCaptureFixture
) -> None:
    geometry, broken = geometry_of(dtype), {"wrap": Path()}
    there: dict[str, Any] = broken if side == "prefill" else {}
    here: dict[str, Any] = broken if side == "decode" else {}
    async with decode_side(geometry=geometry, **here) as decode, prefill_side(geometry=geometry, **there) as prefill:
        await assert_arrives(prefill, decode, parts=parts)
        await assert_arrives(prefill, decode, number=2, parts=parts)
        size = 4 * geometry.chunk_bytes(4)
        for counters in (prefill.sender.counters, decode.receiver.counters):
            assert (counters.streamed_bytes, counters.generations, counters.failures) == (size, 2, 0)
        assert prefill.sender.counters.sent_bytes == decode.receiver.counters.received_bytes == size
        assert prefill.sender.counters.resent_bytes == 0
        assert prefill.busy[KEY] > 0 and decode.busy[KEY] > 0
    assert caplog.text.count("does not work: KV goes over the control stream") == 1


async def test_the_data_path_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now, path = 1000.0, Path()
    monkeypatch.setattr(kv_sending_lane, "time", SimpleNamespace(monotonic=lambda: now))
    async with decode_side() as decode, prefill_side(wrap=path) as prefill:
        counters = prefill.sender.counters
        await assert_arrives(prefill, decode)
        assert (counters.streamed_bytes, counters.generations) == (2 * CHUNK, 2)
        now += CONFIG.streaming_s - 1
        await assert_arrives(prefill, decode, number=2)
        assert (counters.streamed_bytes, counters.generations) == (4 * CHUNK, 2)
        now += 1
        await assert_arrives(prefill, decode, number=3)
        assert (counters.streamed_bytes, counters.generations) == (6 * CHUNK, 3), "one failure is enough now"
        now += CONFIG.streaming_s
        path.works = True
        await assert_arrives(prefill, decode, number=4)
        assert (counters.streamed_bytes, counters.generations) == (6 * CHUNK, 4)
        path.works = False
        await assert_arrives(prefill, decode, number=5)
        assert (counters.streamed_bytes, counters.generations) == (8 * CHUNK, 5), "it is given up after two again"


async def test_corrupted_pieces_go_again(monkeypatch: pytest.MonkeyPatch, small_pieces: int) -> None:
    put, times = Staging.put, [2]

    def flipping(self: Staging, offset: int, content: bytes) -> None:
        if offset == small_pieces and times[0]:
            times[0] -= 1
            content = bytes([content[0] ^ 4, *content[1:]])
        put(self, offset, content)

    monkeypatch.setattr(Staging, "put", flipping)
    async with decode_side() as decode, prefill_side(wrap=Path()) as prefill:
        await assert_arrives(prefill, decode)
        assert prefill.sender.counters.resent_bytes == 2 * CHUNK
        times[0] = 1000
        key = key_of(2)
        await prefill.send(key, decode, TABLE, BOUNDS)
        assert await prefill.engine.hears("fail", key) == ("fail", key, "TRANSFER_FAILED")
        await decode.engine.hears("fail", key)
        assert not decode.cache.of(decode.engine.tables[key], 8).any()
        times[0] = 0
        await assert_arrives(prefill, decode, number=3)


@pytest.mark.parametrize("side", ["prefill", "decode"])
async def test_a_sequence_is_given_up_between_pieces(
    side: str, monkeypatch: pytest.MonkeyPatch, small_pieces: int
) -> None:
    gate, pieces, put = Gate(), 0, Staging.put

    def held(self: Staging, offset: int, content: bytes) -> None:
        nonlocal pieces
        pieces += 1
        if pieces == 3:
            gate.pass_through()
        put(self, offset, content)

    monkeypatch.setattr(Staging, "put", held)
    async with decode_side() as decode, prefill_side(wrap=Path()) as prefill:
        await prefill.send(KEY, decode, TABLE, BOUNDS)
        await gate.reached()
        if side == "prefill":
            prefill.sender.cancel(KEY)
            await decode.engine.hears("fail", KEY)
        else:
            decode.receiver.drop(KEY)
            await prefill.engine.hears("fail", KEY)
        await prefill.engine.hears("transferred", KEY)
        gate.open()
        await assert_arrives(prefill, decode, number=2)
        assert not decode.engine.told("kv_arrived", KEY)
        assert not decode.cache.of(decode.engine.tables[KEY], 8).any()
        assert pieces < 3 + 2 + 2 * -(-CHUNK // small_pieces), "what nobody wants is not sent to its end"


async def test_a_lost_peer_ends_what_is_streamed(monkeypatch: pytest.MonkeyPatch, small_pieces: int) -> None:
    gate = Gate()
    monkeypatch.setattr(Staging, "put", lambda *_: gate.pass_through())
    async with decode_side(idle_after=False) as decode, prefill_side(wrap=Path()) as prefill:
        await prefill.send(KEY, decode, TABLE, BOUNDS)
        await gate.reached()
        closing = asyncio.create_task(decode.receiver.close())
        assert (await prefill.engine.hears("fail", KEY))[2] == "ENGINE_LOST"
        await prefill.engine.hears("transferred", KEY)
        gate.open()
        await closing


@pytest.mark.parametrize(
    "piece",
    [
        {"offset": 1, "content": b"x"},
        {"offset": 0, "content": b""},
        {"offset": 0, "content": b"x" * (CHUNK + 1)},
    ],
)
async def test_pieces_that_do_not_fit_end_the_pair(piece: dict[str, Any]) -> None:
    async with decode_side() as decode, open_channel(decode.address) as channel:
        call = KvControlServiceStub(channel).Transfer()
        hello = pb.TransferHello(
            protocol_version=convert.PROTOCOL_VERSION, incarnation="p", peer_incarnation=decode.incarnation
        )
        key = convert.key_to_proto(KEY)
        await call.write(pb.TransferRequest(hello=hello))
        reserve = pb.Reserve(key=key, token_count=4, layout=identity_to_proto(IDENTITY))
        await call.write(pb.TransferRequest(reserve=reserve))
        await _next(call, "reserved")
        messages = [pb.LayerMessage(layer=layer, byte_count=CHUNK // 3) for layer in range(3)]
        offer = pb.Offer(key=key, token_count=4, messages=messages, streamed=True)
        await call.write(pb.TransferRequest(offer=offer))
        accept = (await _next(call, "accept")).accept
        await call.write(pb.TransferRequest(piece=pb.Piece(key=key, generation=accept.generation, **piece)))
        assert (await decode.engine.hears("fail", KEY))[2] == "PROTOCOL"


async def _next(call: Any, kind: str) -> pb.TransferResponse:
    while (response := await call.read()).WhichOneof("message") != kind:
        assert isinstance(response, pb.TransferResponse)
    return response  # type: ignore[no-any-return]
