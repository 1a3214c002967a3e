"""A prefill engine's end of one pair: the stream, the chunks on their way and the thread that gathers and sends."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import partial

import grpc.aio

from actors.engine.events import ComputedChunk
from actors.errors import InternalError, ServingError, Unavailable
from actors.parallel.kv_threads import SendingThread
from actors.parallel.kv_transfer import (
    BlockGuard,
    Transport,
    TransportError,
    pair_name,
)
from actors.types import KvIdentity, SequenceKey
from actors.wire import convert, status
from actors.wire.channels import open_channel
from actors.wire.kv_control import (
    BROKEN,
    CANCELLED,
    CHECKSUM,
    DRAINING,
    ENGINE_LOST,
    INCARNATION_MISMATCH,
    PROTOCOL,
    TRANSFER_FAILED,
    VERSION_MISMATCH,
    Outbox,
    PairParts,
    PrefillEngine,
    given_up,
    hello,
    identity_to_proto,
    read_message,
)
from ernie_serving.internal.v1 import common_pb2
from ernie_serving.internal.v1 import kv_control_pb2 as pb
from ernie_serving.internal.v1.kv_control_pb2_grpc import KvControlServiceStub

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class SenderParts(PairParts):
    """What all pairs of a sender share."""

    engine: PrefillEngine


@dataclass(eq=False, slots=True)
class _Chunk:
    """A chunk until its Ack. ``generation`` is that of the exchange under way, 0 when there is none."""

    computed: ComputedChunk
    entry: _Entry
    generation: int = 0
    sends: int = 0
    rejections: int = 0
    broken: bool = False
    stop: threading.Event = field(default_factory=threading.Event)


@dataclass(eq=False, slots=True)
class _Entry:
    """A sequence from Reserve to the Ack of its last chunk."""

    key: SequenceKey
    guard: BlockGuard = field(default_factory=BlockGuard)
    rendezvous: str = ""
    unacked: dict[int, _Chunk] = field(default_factory=dict)
    last_pushed: bool = False
    busy_s: float = 0.0


class SendingPair:
    """Everything between this engine and one incarnation of a decode engine. Lives on the event loop.

    Ends when the stream does, whoever ended it; ``left`` is called then, after every sequence has failed.
    """

    def __init__(self, parts: SenderParts, address: str, incarnation: str, left: Callable[[SendingPair], None]) -> None:
        self.address = address
        self.incarnation = incarnation
        self.used_at = time.monotonic()
        self._parts = parts
        self._left = left
        self._entries: dict[SequenceKey, _Entry] = {}
        self._outbox = Outbox(pb.TransferRequest(heartbeat=pb.TransferHeartbeat()), parts.config.heartbeat_s)
        self._ready: asyncio.Queue[_Chunk] = asyncio.Queue()
        self._current: _Chunk | None = None
        self._answer: asyncio.Future[pb.TransferResponse] | None = None
        self._breaks = 0
        self._generation = 0
        self._thread = SendingThread(f"kv-send-{incarnation[:8]}", parts.cache, parts.geometry)
        self._greeted = asyncio.Event()
        self._task = asyncio.create_task(self._run())
        self.released = asyncio.create_task(self._release())
        """Done when the pair has ended and its thread with it."""

    def __contains__(self, key: SequenceKey) -> bool:
        return key in self._entries

    @property
    def idle(self) -> bool:
        return not self._entries and self._current is None

    @property
    def busy_reason(self) -> str | None:
        """What keeps the pair from being idle, for integrity checks."""
        if self._entries:
            return f"sequences {[str(key) for key in self._entries]}"
        if self._current is not None or self._thread.staging_in_use:
            return "a chunk on its way"
        return None

    def reserve(self, key: SequenceKey, token_count: int, identity: KvIdentity) -> None:
        self.used_at = time.monotonic()
        self._entries[key] = _Entry(key)
        reserve = pb.Reserve(key=convert.key_to_proto(key), layout=identity_to_proto(identity), token_count=token_count)
        self._outbox.put(pb.TransferRequest(reserve=reserve))

    def push(self, computed: ComputedChunk) -> None:
        entry = self._entries[computed.key]
        chunk = _Chunk(computed, entry)
        entry.unacked[computed.index] = chunk
        entry.last_pushed = entry.last_pushed or computed.last
        self._ready.put_nowait(chunk)

    def cancel(self, key: SequenceKey) -> None:
        """Ends a sequence at the engine's wish; nothing reads its blocks once this returns."""
        self._drop(self._entries[key], CANCELLED)

    def close_when_idle(self) -> None:
        """Ends the stream after what was said; for idle pairs."""
        self._outbox.end()

    async def close(self) -> None:
        """Ends the pair now. Returns when its thread has ended, or must be left behind: see ``TorchMeeting``."""
        self._task.cancel()
        await asyncio.wait([self._task])
        self._end(_stopping())
        config = self._parts.config
        _, stuck = await asyncio.wait([self.released], timeout=config.join_timeout_s + config.data_timeout_s)
        if stuck:
            log.error("the data thread of the pair with engine %s does not end", self.incarnation)

    # The stream.

    async def _run(self) -> None:
        error: ServingError = _stopping()
        try:
            async with open_channel(self.address) as channel:
                await self._talk(channel)
            error = Unavailable(f"engine {self.incarnation} closed the pair", reason=ENGINE_LOST)
        except grpc.aio.AioRpcError as failure:
            error = self._error_of(failure)
        except ServingError as failure:
            error = failure
        except Exception:
            log.exception("pair with engine %s failed", self.incarnation)
            error = InternalError("a KV transfer failed")
        finally:
            self._end(error)

    def _end(self, error: ServingError) -> None:
        if self._entries:
            log.warning("pair with engine %s lost: %s", self.incarnation, error.message)
        for entry in list(self._entries.values()):
            self._fail(entry, error, tell_peer=False)
        self._left(self)

    async def _talk(self, channel: grpc.aio.Channel) -> None:
        call = KvControlServiceStub(channel).Transfer(self._requests())
        tasks = [asyncio.create_task(self._read(call)), asyncio.create_task(self._send_all())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            call.cancel()

    async def _requests(self) -> AsyncIterator[pb.TransferRequest]:
        """Nothing follows the hello before the peer's answer: a write beside a refusal would hide its reason."""
        yield pb.TransferRequest(hello=hello(self._parts.incarnation, self.incarnation))
        await self._greeted.wait()
        async for request in self._outbox:
            yield request

    async def _read(self, call: grpc.aio.StreamStreamCall[pb.TransferRequest, pb.TransferResponse]) -> None:
        silence_s = self._parts.config.lost_after_s
        heard = partial(read_message, call.read, pb.TransferResponse, silence_s, self.incarnation)
        first = await heard()
        if first is None or first.WhichOneof("message") != "hello":
            raise Unavailable("the peer did not say hello", reason=PROTOCOL)
        if first.hello.protocol_version != convert.PROTOCOL_VERSION:
            raise Unavailable(f"the peer speaks protocol {first.hello.protocol_version}", reason=VERSION_MISMATCH)
        if first.hello.incarnation != self.incarnation:
            raise Unavailable(f"{self.address} is engine {first.hello.incarnation} now", reason=INCARNATION_MISMATCH)
        self._greeted.set()
        while (response := await heard()) is not None:
            self._receive(response)

    def _error_of(self, failure: grpc.aio.AioRpcError) -> ServingError:
        """The peer's own reason if it gave one; anything else on a stream means that it is lost."""
        error = status.error_of(failure)
        if error.reason != type(error).default_reason:
            return error
        return Unavailable(f"engine {self.incarnation} is lost: {error.message}", reason=ENGINE_LOST)

    def _receive(self, response: pb.TransferResponse) -> None:
        match response.WhichOneof("message"):
            case "reserved":
                entry = self._entry(response.reserved.key)
                if entry is not None:
                    entry.rendezvous = response.reserved.rendezvous_address
                    self._parts.engine.reserved(entry.key, response.reserved.held_token_count)
            case "refused":
                entry = self._entry(response.refused.key)
                if entry is not None:
                    del self._entries[entry.key]
                    self._parts.engine.refused(entry.key, response.refused.reason)
            case "accept" | "decline":
                if self._answer is None or self._answer.done():
                    raise Unavailable("an answer without an offer", reason=PROTOCOL)
                self._answer.set_result(response)
            case "ack":
                self._acked(response.ack)
            case "nack":
                self._nacked(response.nack)
            case "cancel":
                entry = self._entry(response.cancel.key)
                if entry is not None:
                    self._fail(entry, given_up(response.cancel.reason), tell_peer=False)

    def _entry(self, key: common_pb2.SequenceKey) -> _Entry | None:
        return self._entries.get(convert.key_from_proto(key))

    def _acked(self, ack: pb.Ack) -> None:
        self._breaks = 0
        self._parts.counters.chunks += 1
        entry = self._entry(ack.key)
        if entry is None:
            return
        entry.unacked.pop(ack.chunk, None)
        if entry.last_pushed and not entry.unacked:
            del self._entries[entry.key]
            self.used_at = time.monotonic()
            self._parts.on_transferred(entry.key, entry.busy_s)
            self._parts.engine.transferred(entry.key)

    def _nacked(self, nack: pb.Nack) -> None:
        entry = self._entry(nack.key)
        chunk = entry.unacked.get(nack.chunk) if entry is not None else None
        if chunk is None or chunk.generation != nack.generation:
            return
        if nack.reason == BROKEN:
            if chunk is self._current:
                chunk.broken = True
                chunk.stop.set()
            else:
                self._broke(chunk)
            return
        chunk.rejections += 1
        limit = self._parts.config.resend_limit
        if chunk.rejections > limit:
            message = f"chunk {nack.chunk} was refused {chunk.rejections} times: {nack.reason}"
            self._fail(chunk.entry, Unavailable(message, reason=TRANSFER_FAILED), tell_peer=True)
        else:
            log.warning("chunk %d of %s goes again: %s", nack.chunk, chunk.entry.key, nack.reason or CHECKSUM)
            self._again(chunk)

    # Chunks.

    async def _send_all(self) -> None:
        while True:
            chunk = await self._ready.get()
            if chunk.entry.key not in self._entries:
                continue
            self._current = chunk
            try:
                await self._exchange(chunk)
            finally:
                chunk.stop.set()
                self._current = None

    async def _exchange(self, chunk: _Chunk) -> None:
        computed, entry = chunk.computed, chunk.entry
        key = convert.key_to_proto(computed.key)
        self._answer = asyncio.get_running_loop().create_future()
        self._outbox.put(pb.TransferRequest(offer=self._offer(computed)))
        answer = await self._answer
        self._answer = None
        if answer.WhichOneof("message") == "decline":
            if entry.key in self._entries:
                self._fail(entry, given_up(CANCELLED), tell_peer=False)
            return
        chunk.generation, chunk.broken = answer.accept.generation, False
        chunk.stop.clear()
        if chunk.generation != self._generation:
            self._generation = chunk.generation
            self._parts.counters.generations += 1
        try:
            checksums, busy_s = await self._thread.send(
                chunk.generation,
                lambda: self._connect(chunk),
                block_table=computed.block_table,
                first=computed.first_token,
                tokens=computed.token_count,
                guard=entry.guard,
            )
        except TransportError as error:
            log.warning("generation %d to engine %s failed: %s", chunk.generation, self.incarnation, error)
            failed = pb.SendFailed(key=key, chunk=computed.index, generation=chunk.generation)
            self._outbox.put(pb.TransferRequest(send_failed=failed))
            self._broke(chunk)
            return
        if chunk.broken:
            self._broke(chunk)
            return
        self._count(chunk, busy_s)
        sent = pb.Sent(
            key=key,
            chunk=computed.index,
            generation=chunk.generation,
            checksums=checksums,
            last=computed.last,
            first_output_id=computed.first_output_id or 0,
            finished=computed.finished,
        )
        self._outbox.put(pb.TransferRequest(sent=sent))

    def _connect(self, chunk: _Chunk) -> Transport:
        """Runs on the data thread."""
        name = pair_name(self._parts.incarnation, self.incarnation, chunk.generation)
        return self._parts.meeting.connect(chunk.entry.rendezvous, name, chunk.stop)

    def _offer(self, computed: ComputedChunk) -> pb.Offer:
        size = self._parts.geometry.message_bytes(computed.token_count)
        return pb.Offer(
            key=convert.key_to_proto(computed.key),
            chunk=computed.index,
            first_token=computed.first_token,
            token_count=computed.token_count,
            messages=[pb.LayerMessage(layer=n, byte_count=size) for n in range(self._parts.geometry.num_layers)],
        )

    def _count(self, chunk: _Chunk, busy_s: float) -> None:
        counters = self._parts.counters
        size = self._parts.geometry.chunk_bytes(chunk.computed.token_count)
        chunk.entry.busy_s += busy_s
        counters.sent_bytes += size
        counters.resent_bytes += size if chunk.sends else 0
        chunk.sends += 1

    def _again(self, chunk: _Chunk) -> None:
        chunk.generation = 0
        self._ready.put_nowait(chunk)

    def _broke(self, chunk: _Chunk) -> None:
        """A generation ended under ``chunk``; the receiver will name another one when it accepts the next offer."""
        self._breaks += 1
        if self._breaks >= self._parts.config.break_limit:
            error = Unavailable(f"the data path to engine {self.incarnation} broke again", reason=TRANSFER_FAILED)
            for entry in [entry for entry in self._entries.values() if entry.unacked]:
                self._fail(entry, error, tell_peer=True)
            self._breaks = 0
        elif chunk.entry.key in self._entries:
            self._again(chunk)

    def _drop(self, entry: _Entry, reason: str | None) -> None:
        del self._entries[entry.key]
        self.used_at = time.monotonic()
        entry.guard.shut()
        if reason is not None:
            cancel = pb.TransferCancel(key=convert.key_to_proto(entry.key), reason=reason)
            self._outbox.put(pb.TransferRequest(cancel=cancel))
        self._parts.engine.transferred(entry.key)

    def _fail(self, entry: _Entry, error: ServingError, *, tell_peer: bool) -> None:
        self._parts.counters.failures += 1
        self._parts.engine.fail(entry.key, error)
        self._drop(entry, error.reason if tell_peer else None)

    async def _release(self) -> None:
        await asyncio.wait([self._task])
        await self._thread.close()


def _stopping() -> Unavailable:
    return Unavailable("the engine is stopping", reason=DRAINING)
