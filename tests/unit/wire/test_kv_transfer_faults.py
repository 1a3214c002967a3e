"""Corruption, stalls, broken generations, dead and frozen peers, wrong protocols."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import grpc.aio
import pytest
from torch import Tensor

from actors.parallel.kv_transfer import Transport, TransportError
from actors.wire import convert, status
from actors.wire.channels import make_server, open_channel
from actors.wire.kv_control import identity_to_proto
from ernie_serving.internal.v1 import kv_control_pb2 as pb
from ernie_serving.internal.v1.kv_control_pb2_grpc import (
    KvControlServiceServicer,
    KvControlServiceStub,
    add_KvControlServiceServicer_to_server,
)
from tests.unit.wire.kv_engines import (
    CONFIG,
    HOST,
    IDENTITY,
    PATIENCE_S,
    DecodeSide,
    Gate,
    PrefillSide,
    Through,
    decode_side,
    key_of,
    prefill_side,
    same_bytes,
)
from tests.waiting import LIMIT_S, eventually

KEY = key_of(1)
TABLE = [4, 5]
BOUNDS = [0, 4, 8]


async def assert_arrives(prefill: PrefillSide, decode: DecodeSide, number: int = 1) -> None:
    key = key_of(number)
    await prefill.send(key, decode, TABLE, BOUNDS)
    await decode.engine.hears("kv_arrived", key)
    await prefill.engine.hears("transferred", key)
    assert same_bytes(prefill.cache.of(TABLE, 8), decode.cache.of(decode.engine.tables[key], 8))


async def assert_fails(prefill: PrefillSide, decode: DecodeSide, reason: str, number: int = 1) -> None:
    key = key_of(number)
    await prefill.send(key, decode, TABLE, BOUNDS)
    assert (await prefill.engine.hears("fail", key))[2] == reason
    await prefill.engine.hears("transferred", key)
    assert (await decode.engine.hears("fail", key))[2] == reason
    assert not decode.engine.told("kv_arrived", key)


class Flip(Through):
    """Flips one bit of one message, as often as ``times`` says."""

    def __init__(self, inner: Transport, times: list[int]) -> None:
        super().__init__(inner)
        self.times = times

    def recv(self, buffers: Sequence[Tensor], arrived: Callable[[int], None]) -> None:
        def corrupted(position: int) -> None:
            if position == 1 and self.times[0] > 0:
                self.times[0] -= 1
                buffers[position][17] ^= 4
            arrived(position)

        self.inner.recv(buffers, corrupted)


async def test_of_a_chunk_in_parts_the_corrupted_one_goes_again() -> None:
    times = [1]
    async with decode_side(wrap=lambda transport, _name: Flip(transport, times)) as decode, prefill_side() as prefill:
        await prefill.send(KEY, decode, TABLE, BOUNDS, parts=2)
        await decode.engine.hears("kv_arrived", KEY)
        await prefill.engine.hears("transferred", KEY)
        assert same_bytes(prefill.cache.of(TABLE, 8), decode.cache.of(decode.engine.tables[KEY], 8))
        assert prefill.sender.counters.resent_bytes == prefill.geometry.chunk_bytes(4, range(1, 3))


async def test_corrupted_chunk_goes_again() -> None:
    times = [3]
    async with decode_side(wrap=lambda transport, _name: Flip(transport, times)) as decode, prefill_side() as prefill:
        await assert_arrives(prefill, decode)
        chunk_bytes = prefill.geometry.chunk_bytes(4)
        assert times == [0]
        assert prefill.sender.counters.resent_bytes == 3 * chunk_bytes
        assert prefill.sender.counters.sent_bytes == decode.receiver.counters.received_bytes == 5 * chunk_bytes
        assert decode.receiver.counters.generations == 1


@pytest.mark.parametrize("limit", [0, 2])
async def test_resends_are_counted(limit: int) -> None:
    config = replace(CONFIG, resend_limit=limit)
    times = [1000]
    async with (
        decode_side(wrap=lambda transport, _name: Flip(transport, times)) as decode,
        prefill_side(config=config) as prefill,
    ):
        prefill.reserve(KEY, decode, 4)
        await prefill.engine.hears("reserved", KEY)
        prefill.push(KEY, TABLE, [0, 4])
        await prefill.engine.hears("fail", KEY)
        assert prefill.sender.counters.resent_bytes == limit * prefill.geometry.chunk_bytes(4)


async def test_corruption_that_stays_fails_and_is_never_scattered() -> None:
    times = [1000]
    async with decode_side(wrap=lambda transport, _name: Flip(transport, times)) as decode, prefill_side() as prefill:
        await assert_fails(prefill, decode, "TRANSFER_FAILED")
        assert not decode.cache.data.any()
        times[0] = 0
        await assert_arrives(prefill, decode, number=2)


class StalledSend(Through):
    """Takes the bytes of the first generation and sends none until the receiver has given the generation up."""

    def __init__(self, inner: Transport, receiver_left: threading.Event) -> None:
        super().__init__(inner)
        self.receiver_left = receiver_left

    def send(self, tensors: Iterable[Tensor]) -> None:
        for _tensor in tensors:
            pass
        assert self.receiver_left.wait(PATIENCE_S)


class Watched(Through):
    def __init__(self, inner: Transport, closed: threading.Event) -> None:
        super().__init__(inner)
        self.closed = closed

    def close(self) -> None:
        super().close()
        self.closed.set()


async def test_stalled_data_path_is_rebuilt() -> None:
    config = replace(CONFIG, data_timeout_s=0.3)
    receiver_left = threading.Event()

    def stalled(transport: Transport, name: str) -> Transport:
        return StalledSend(transport, receiver_left) if name.endswith("#1") else transport

    def watched(transport: Transport, name: str) -> Transport:
        return Watched(transport, receiver_left) if name.endswith("#1") else transport

    async with (
        decode_side(wrap=watched, config=replace(CONFIG, data_timeout_s=0.3)) as decode,
        prefill_side(wrap=stalled, config=replace(config, data_timeout_s=10.0)) as prefill,
    ):
        await assert_arrives(prefill, decode)
        assert decode.receiver.counters.generations == 2


class FailingSend(Through):
    """Fails after one message has gone."""

    def send(self, tensors: Iterable[Tensor]) -> None:
        self.inner.send([next(iter(tensors))])
        raise TransportError("cut")


async def test_sender_that_fails_midway_offers_again() -> None:
    def cut_first(transport: Transport, name: str) -> Transport:
        return FailingSend(transport) if name.endswith("#1") else transport

    async with decode_side() as decode, prefill_side(wrap=cut_first) as prefill:
        await assert_arrives(prefill, decode)
        assert decode.receiver.counters.generations == prefill.sender.counters.generations == 2


async def test_defect_in_the_cache_is_not_taken_for_the_network() -> None:
    def defect() -> None:
        raise RuntimeError("a defect")

    async with decode_side() as decode, prefill_side(idle_after=False) as prefill:
        prefill.cache.before_read = defect
        await prefill.send(KEY, decode, TABLE, BOUNDS)
        assert (await prefill.engine.hears("fail", KEY))[2] == "INTERNAL"
        await prefill.engine.hears("transferred", KEY)
        assert (await decode.engine.hears("fail", KEY))[2] == "ENGINE_LOST"
        prefill.cache.before_read = lambda: None
        await assert_arrives(prefill, decode, number=2)


async def test_nobody_listens() -> None:
    async with decode_side() as decode, prefill_side() as prefill:
        gone = replace(decode, address=f"{HOST}:1", incarnation="gone")
        prefill.reserve(KEY, gone, 4)
        assert (await prefill.engine.hears("fail", KEY))[2] == "ENGINE_LOST"
        await prefill.engine.hears("transferred", KEY)
        await assert_arrives(prefill, decode, number=2)


async def test_another_incarnation_at_the_address() -> None:
    async with decode_side() as decode, prefill_side() as prefill:
        prefill.reserve(KEY, replace(decode, incarnation="decode-0"), 4)
        assert (await prefill.engine.hears("fail", KEY))[2] == "INCARNATION_MISMATCH"
        assert not decode.engine.events


async def test_receiver_refuses_another_protocol() -> None:
    async with decode_side() as decode, open_channel(decode.address) as channel:
        call = KvControlServiceStub(channel).Transfer()
        hello = pb.TransferHello(
            protocol_version=convert.PROTOCOL_VERSION + 1, incarnation="p", peer_incarnation=decode.incarnation
        )
        await call.write(pb.TransferRequest(hello=hello))
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await call.read()
        assert status.error_of(refusal.value).reason == "VERSION_MISMATCH"


async def test_receiver_wants_a_hello_first() -> None:
    async with decode_side() as decode, open_channel(decode.address) as channel:
        call = KvControlServiceStub(channel).Transfer()
        await call.write(pb.TransferRequest(heartbeat=pb.TransferHeartbeat()))
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await call.read()
        assert status.error_of(refusal.value).reason == "PROTOCOL"


class Stranger(KvControlServiceServicer):
    """Answers with one message and then says nothing."""

    def __init__(self, answer: pb.TransferResponse | None) -> None:
        self.answer = answer

    async def Transfer(self, request_iterator, context):  # type: ignore[no-untyped-def]  # noqa: N802
        if self.answer is not None:
            await context.write(self.answer)
        while await context.read() is not grpc.aio.EOF:
            pass


@asynccontextmanager
async def stranger(answer: pb.TransferResponse | None) -> AsyncIterator[str]:
    server = make_server()
    add_KvControlServiceServicer_to_server(Stranger(answer), server)
    port = server.add_insecure_port(f"{HOST}:0")
    await server.start()
    try:
        yield f"{HOST}:{port}"
    finally:
        await server.stop(None)


@pytest.mark.parametrize(
    ("hello", "reason"),
    [
        (pb.TransferHello(protocol_version=convert.PROTOCOL_VERSION + 1, incarnation="d"), "VERSION_MISMATCH"),
        (pb.TransferHello(protocol_version=convert.PROTOCOL_VERSION, incarnation="e"), "INCARNATION_MISMATCH"),
    ],
)
async def test_sender_refuses_a_wrong_hello(hello: pb.TransferHello, reason: str) -> None:
    async with stranger(pb.TransferResponse(hello=hello)) as address, prefill_side() as prefill:
        prefill.sender.reserve(KEY, address, "d", 4, IDENTITY)
        assert (await prefill.engine.hears("fail", KEY))[2] == reason
        await prefill.engine.hears("transferred", KEY)


async def test_silence_is_loss() -> None:
    config = replace(CONFIG, lost_after_s=0.3)
    async with stranger(None) as address, prefill_side(config=config) as prefill:
        prefill.sender.reserve(KEY, address, "d", 4, IDENTITY)
        assert (await prefill.engine.hears("fail", KEY))[2] == "ENGINE_LOST"
    async with decode_side(config=config) as decode, open_channel(decode.address) as channel:
        call = KvControlServiceStub(channel).Transfer()
        hello = pb.TransferHello(
            protocol_version=convert.PROTOCOL_VERSION, incarnation="p", peer_incarnation=decode.incarnation
        )
        await call.write(pb.TransferRequest(hello=hello))
        reserve = pb.Reserve(key=convert.key_to_proto(KEY), token_count=4, layout=identity_to_proto(IDENTITY))
        await call.write(pb.TransferRequest(reserve=reserve))
        assert (await decode.engine.hears("fail", KEY))[2] == "ENGINE_LOST"


@pytest.mark.parametrize(
    "change",
    [
        {"token_count": 5},
        {"token_count": 0},
        {"messages": []},
        {"messages": [pb.LayerMessage(layer=0, byte_count=1)]},
        {"messages": [pb.LayerMessage(layer=layer, byte_count=4 * 2 * 2 * 8 * 4) for layer in (0, 2)]},
        {"messages": [pb.LayerMessage(layer=layer, byte_count=4 * 2 * 2 * 8 * 4) for layer in (2, 3)]},
    ],
)
async def test_offers_that_do_not_fit_are_declined(change: dict[str, object]) -> None:
    async with decode_side() as decode, open_channel(decode.address) as channel:
        call = KvControlServiceStub(channel).Transfer()
        hello = pb.TransferHello(
            protocol_version=convert.PROTOCOL_VERSION, incarnation="p", peer_incarnation=decode.incarnation
        )
        key = convert.key_to_proto(KEY)
        await call.write(pb.TransferRequest(hello=hello))
        await call.write(
            pb.TransferRequest(reserve=pb.Reserve(key=key, token_count=4, layout=identity_to_proto(IDENTITY)))
        )
        messages = [pb.LayerMessage(layer=layer, byte_count=4 * 2 * 2 * 8 * 4) for layer in range(3)]
        fields: dict[str, object] = {"key": key, "token_count": 4, "messages": messages}
        await _until(call, "reserved")
        await call.write(pb.TransferRequest(offer=pb.Offer(**{**fields, **change})))  # type: ignore[arg-type]
        answers = await _until(call, "decline")
        assert [answer.cancel.reason for answer in answers if answer.HasField("cancel")] == ["PROTOCOL"]
        assert (await decode.engine.hears("fail", KEY))[2] == "PROTOCOL"
        call.cancel()


async def _until(call, kind: str) -> list[pb.TransferResponse]:  # type: ignore[no-untyped-def]
    answers = [await call.read()]
    while answers[-1].WhichOneof("message") != kind:
        answers.append(await call.read())
    return answers


@asynccontextmanager
async def child(role: str, *args: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """Runs ``kv_child.py`` and yields it with the first line it prints."""
    root = Path(__file__).parents[3]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.unit.wire.kv_child",
        role,
        *args,
        stdout=asyncio.subprocess.PIPE,
        cwd=root,
        env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'proto'}"},
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(2 * PATIENCE_S):
            line = (await process.stdout.readline()).decode().strip()
        yield process, line
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
async def test_decode_process_dies_or_freezes_under_a_chunk(sent: signal.Signals) -> None:
    config = replace(CONFIG, lost_after_s=1.0)
    async with (
        child("decode") as (process, address),
        decode_side() as healthy,
        prefill_side(config=config, idle_after=False) as prefill,
    ):
        prefill.sender.reserve(KEY, address, "child", 8, IDENTITY)
        await prefill.engine.hears("reserved", KEY)
        prefill.push(KEY, TABLE, BOUNDS)
        assert process.stdout is not None
        assert (await process.stdout.readline()).strip() == b"receiving"
        process.send_signal(sent)
        assert (await prefill.engine.hears("fail", KEY))[2] == "ENGINE_LOST"
        await prefill.engine.hears("transferred", KEY)
        await assert_arrives(prefill, healthy, number=2)
        if process.returncode is None:
            process.kill()


async def test_a_thread_that_hangs_on_a_lost_peer_holds_nothing_and_lets_its_engine_close() -> None:
    """A store answers no sooner than its process: one that is frozen holds whoever builds a pair with it."""
    gate = Gate()

    def hang(transport: Transport, _name: str) -> Transport:
        gate.pass_through()
        transport.close()
        raise TransportError("too late")

    config = replace(CONFIG, join_timeout_s=0.5, data_timeout_s=0.5)
    async with decode_side(config=config) as decode, prefill_side(config=config, wrap=hang) as prefill:
        try:
            await prefill.send(KEY, decode, TABLE, BOUNDS)
            await gate.reached()
            await decode.receiver.close()
            await prefill.engine.hears("fail", KEY)
            await prefill.engine.hears("transferred", KEY)
            prefill.sender.check_integrity()
            async with asyncio.timeout(LIMIT_S):
                await prefill.sender.close()
        finally:
            gate.open()
        await eventually(lambda: not prefill.sender._ending)


async def test_prefill_process_dies_between_chunks() -> None:
    async with decode_side() as decode, prefill_side() as healthy:
        key = key_of(2)
        healthy.reserve(key, decode, BOUNDS[-1])
        await healthy.engine.hears("reserved", key)
        async with child("prefill", decode.address, decode.incarnation) as (process, line):
            assert line == "sent"
            process.kill()
            assert (await decode.engine.hears("fail", KEY))[2] == "ENGINE_LOST"
        healthy.push(key, TABLE, BOUNDS)
        await decode.engine.hears("kv_arrived", key)
        await healthy.engine.hears("transferred", key)
        assert not decode.engine.told("fail", key)
