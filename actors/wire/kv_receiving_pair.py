"""A decode engine's end of one pair: the stream, the chunk on its way and the thread that receives and scatters."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeAlias

import grpc.aio

from actors.engine.scheduling.reservations import Reservation
from actors.errors import InternalError, ServingError, Unavailable
from actors.parallel.kv_threads import ReceivingThread
from actors.parallel.kv_transfer import (
    BlockGuard,
    Transport,
    TransportError,
    pair_name,
)
from actors.types import KvIdentity, SequenceKey
from actors.wire import convert
from actors.wire.kv_control import (
    BROKEN,
    CANCELLED,
    CHECKSUM,
    DUPLICATE,
    ENGINE_LOST,
    LAYOUT_MISMATCH,
    PROTOCOL,
    DecodeEngine,
    Outbox,
    PairParts,
    given_up,
    hello,
    identity_from_proto,
    read_message,
)
from ernie_serving.internal.v1 import kv_control_pb2 as pb

log = logging.getLogger(__name__)

Context: TypeAlias = "grpc.aio.ServicerContext[pb.TransferRequest, pb.TransferResponse]"


@dataclass(eq=False, slots=True)
class Incoming:
    """A sequence from Reserve to its last chunk in place."""

    key: SequenceKey
    token_count: int
    pair: ReceivingPair
    guard: BlockGuard = field(default_factory=BlockGuard)
    held_tokens: int = 0
    """Leading tokens that are not sent: their KV is here."""
    own_blocks: list[int] | None = None
    """Of the tokens that are; None before the reservation. Held blocks are shared, so nothing here can name them."""
    placed: dict[int, tuple[int, int]] = field(default_factory=dict)
    """First token and count of each verified chunk, by index."""
    last: pb.Sent | None = None
    busy_s: float = 0.0

    @property
    def complete(self) -> bool:
        """All chunks up to the last are in place."""
        return self.last is not None and len(self.placed) > self.last.chunk

    @property
    def covered(self) -> bool:
        """The chunks are the tokens of the prompt that are not held, each once."""
        end = self.held_tokens
        for first, count in sorted(self.placed.values()):
            if first != end:
                return False
            end += count
        return end == self.token_count


@dataclass(frozen=True, kw_only=True, slots=True)
class ReceiverParts(PairParts):
    """What all pairs of a receiver share. ``entries`` holds every sequence of every pair."""

    engine: DecodeEngine
    identity: KvIdentity
    entries: dict[SequenceKey, Incoming]
    next_generation: Callable[[], int]
    post: Callable[[Callable[[], None]], None]
    """Runs an action on the event loop, from any thread."""


@dataclass(eq=False, slots=True)
class _Exchange:
    """One accepted chunk. ``sent`` is None when the sender failed."""

    key: SequenceKey
    chunk: int
    generation: int
    sent: asyncio.Future[pb.Sent | None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    stop: threading.Event = field(default_factory=threading.Event)


class ReceivingPair:
    """Everything between this engine and one stream of a prefill engine. Lives on the event loop."""

    def __init__(self, parts: ReceiverParts, peer_incarnation: str) -> None:
        self._parts = parts
        self._peer = peer_incarnation
        self._outbox = Outbox(pb.TransferResponse(heartbeat=pb.TransferHeartbeat()), parts.config.heartbeat_s)
        self._offers: asyncio.Queue[pb.Offer] = asyncio.Queue()
        self._exchange: _Exchange | None = None
        self._generation = 0
        self._thread = ReceivingThread(f"kv-recv-{peer_incarnation[:8]}", parts.cache, parts.geometry)

    @property
    def busy_reason(self) -> str | None:
        """What keeps the pair from being idle, for integrity checks."""
        return "a chunk on its way" if self._exchange is not None or self._thread.staging_in_use else None

    async def serve(self, context: Context) -> None:
        """Talks until the stream ends, then fails what is left of it."""
        self._outbox.put(pb.TransferResponse(hello=hello(self._parts.incarnation, self._peer)))
        tasks = [
            asyncio.create_task(self._read(context)),
            asyncio.create_task(self._write(context)),
            asyncio.create_task(self._work()),
        ]
        error: ServingError = Unavailable(f"engine {self._peer} is lost", reason=ENGINE_LOST)
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except ServingError as failure:
            error = failure
        except grpc.aio.BaseError:
            pass
        except Exception:
            log.exception("pair with engine %s failed", self._peer)
            error = InternalError("a KV transfer failed")
        finally:
            for task in tasks:
                task.cancel()
            self._end(error)

    def _end(self, error: ServingError) -> None:
        if self._exchange is not None:
            self._exchange.stop.set()
        lost = [entry for entry in self._parts.entries.values() if entry.pair is self]
        if lost:
            log.warning("pair with engine %s lost: %s", self._peer, error.message)
        for entry in lost:
            self.give_up(entry, error, tell_peer=None)

    async def release(self) -> None:
        """Returns when the thread has ended; the stream must have."""
        await self._thread.close()

    def give_up(self, entry: Incoming, error: ServingError | None, *, tell_peer: str | None) -> None:
        """Ends a sequence; ``error`` for the engine unless it knows, ``tell_peer`` the reason for the sender."""
        entry.guard.shut()
        del self._parts.entries[entry.key]
        if tell_peer is not None:
            cancel = pb.TransferCancel(key=convert.key_to_proto(entry.key), reason=tell_peer)
            self._outbox.put(pb.TransferResponse(cancel=cancel))
        if error is not None:
            self._parts.counters.failures += 1
            self._parts.engine.fail(entry.key, error)

    # The stream.

    async def _write(self, context: Context) -> None:
        async for response in self._outbox:
            await context.write(response)

    async def _read(self, context: Context) -> None:
        silence_s = self._parts.config.lost_after_s
        while (request := await read_message(context.read, pb.TransferRequest, silence_s, self._peer)) is not None:
            self._receive(request)

    def _receive(self, request: pb.TransferRequest) -> None:
        match request.WhichOneof("message"):
            case "reserve":
                self._reserve(request.reserve)
            case "offer":
                self._offers.put_nowait(request.offer)
            case "sent":
                self._answer(request.sent, request.sent)
            case "send_failed":
                self._answer(request.send_failed, None)
            case "cancel":
                entry = self._own(convert.key_from_proto(request.cancel.key))
                if entry is not None:
                    self.give_up(entry, given_up(request.cancel.reason), tell_peer=None)

    def _answer(self, message: pb.Sent | pb.SendFailed, sent: pb.Sent | None) -> None:
        """Hands what the sender says of a chunk to its exchange, if that is still under way."""
        exchange = self._exchange
        named = (convert.key_from_proto(message.key), message.chunk, message.generation)
        if exchange is None or named != (exchange.key, exchange.chunk, exchange.generation):
            return
        if not exchange.sent.done():
            exchange.sent.set_result(sent)
        if sent is None:
            exchange.stop.set()

    def _own(self, key: SequenceKey) -> Incoming | None:
        entry = self._parts.entries.get(key)
        return entry if entry is not None and entry.pair is self else None

    # Reservations.

    def _reserve(self, reserve: pb.Reserve) -> None:
        parts = self._parts
        key = convert.key_from_proto(reserve.key)
        differences = parts.identity.differences(identity_from_proto(reserve.layout))
        if differences:
            self._refuse(key, LAYOUT_MISMATCH, f"engines differ in {', '.join(differences)}")
        elif key in parts.entries:
            self._refuse(key, DUPLICATE, "the sequence is reserved already")
        else:
            entry = Incoming(key, reserve.token_count, self)
            parts.entries[key] = entry
            try:
                future = parts.engine.reserve(key, reserve.token_count)
            except ServingError as error:
                del parts.entries[key]
                self._refuse(key, error.reason, error.message)
            else:
                future.add_done_callback(lambda done: parts.post(lambda: self._reserved(entry, done)))

    def _reserved(self, entry: Incoming, future: Future[Reservation]) -> None:
        parts = self._parts
        failure = future.exception()
        if parts.entries.get(entry.key) is not entry:
            if failure is None:
                parts.engine.fail(entry.key, given_up(CANCELLED))
            return
        if failure is None:
            rank, block_table, held_tokens = future.result()
            block_size = parts.identity.block_size
            if held_tokens % block_size or not 0 <= held_tokens < entry.token_count:
                log.error("%d of %d tokens of %s cannot be held", held_tokens, entry.token_count, entry.key)
                self.give_up(entry, InternalError("a KV transfer failed", reason=PROTOCOL), tell_peer=PROTOCOL)
                return
            entry.held_tokens, entry.own_blocks = held_tokens, block_table[held_tokens // block_size :]
            reserved = pb.Reserved(
                key=convert.key_to_proto(entry.key),
                rank=rank,
                rendezvous_address=parts.meeting.address,
                held_token_count=held_tokens,
            )
            self._outbox.put(pb.TransferResponse(reserved=reserved))
            return
        del parts.entries[entry.key]
        if isinstance(failure, ServingError):
            self._refuse(entry.key, failure.reason, failure.message)
        else:
            log.error("reservation of %s failed", entry.key, exc_info=failure)
            self._refuse(entry.key, InternalError.default_reason, "the engine could not reserve")

    def _refuse(self, key: SequenceKey, reason: str, message: str) -> None:
        refused = pb.Refused(key=convert.key_to_proto(key), reason=reason, message=message)
        self._outbox.put(pb.TransferResponse(refused=refused))

    # Chunks.

    async def _work(self) -> None:
        while True:
            offer = await self._offers.get()
            entry = self._own(convert.key_from_proto(offer.key))
            problem = self._problem(entry, offer) if entry is not None else None
            if entry is not None and problem is not None:
                log.error("offer of %s refused: %s", entry.key, problem)
                self.give_up(entry, InternalError("a KV transfer failed", reason=PROTOCOL), tell_peer=PROTOCOL)
                entry = None
            if entry is None:
                decline = pb.Decline(key=offer.key, chunk=offer.chunk)
                self._outbox.put(pb.TransferResponse(decline=decline))
                continue
            await self._take(entry, offer)
            self._exchange = None

    def _problem(self, entry: Incoming, offer: pb.Offer) -> str | None:
        size = self._parts.geometry.message_bytes(offer.token_count)
        expected = [(layer, size) for layer in range(self._parts.geometry.num_layers)]
        if entry.own_blocks is None:
            return "it came before its reservation"
        if offer.first_token < entry.held_tokens:
            return f"token {offer.first_token} is one of {entry.held_tokens} that are here already"
        if offer.token_count == 0 or offer.first_token + offer.token_count > entry.token_count:
            return f"tokens {offer.first_token} + {offer.token_count} of {entry.token_count}"
        if offer.chunk in entry.placed:
            return f"chunk {offer.chunk} is in place"
        if [(message.layer, message.byte_count) for message in offer.messages] != expected:
            return "its messages are not the layers of this cache"
        return None

    async def _take(self, entry: Incoming, offer: pb.Offer) -> None:
        """Sees one accepted chunk through; whatever becomes of the sequence, the bytes are received."""
        if self._generation == 0:
            self._generation = self._parts.next_generation()
            self._parts.counters.generations += 1
        exchange = _Exchange(entry.key, offer.chunk, self._generation)
        self._exchange = exchange
        accept = pb.Accept(key=offer.key, chunk=offer.chunk, generation=exchange.generation)
        self._outbox.put(pb.TransferResponse(accept=accept))
        try:
            checksums, busy_s = await self._thread.receive(
                exchange.generation, lambda: self._listen(exchange), offer.token_count
            )
        except TransportError as error:
            self._generation = 0
            if not (exchange.sent.done() and exchange.sent.result() is None):
                log.warning("generation %d from engine %s failed: %s", exchange.generation, self._peer, error)
                self._nack(offer, exchange.generation, BROKEN)
            return
        sent = await exchange.sent
        if sent is None:
            self._generation = 0
            await self._thread.leave()
            return
        self._parts.counters.received_bytes += self._parts.geometry.chunk_bytes(offer.token_count)
        if entry is not self._own(entry.key):
            self._thread.forget()
            return
        if list(sent.checksums) != checksums:
            self._thread.forget()
            self._nack(offer, exchange.generation, CHECKSUM)
            return
        scatter_s = await self._thread.scatter(
            entry.own_blocks or [], offer.first_token - entry.held_tokens, entry.guard
        )
        if entry is self._own(entry.key):
            entry.busy_s += busy_s + scatter_s
            self._place(entry, offer, sent)

    def _place(self, entry: Incoming, offer: pb.Offer, sent: pb.Sent) -> None:
        entry.placed[offer.chunk] = (offer.first_token, offer.token_count)
        if sent.last:
            entry.last = sent
        if entry.complete and not entry.covered:
            log.error("chunks of %s are not its tokens %d .. %d", entry.key, entry.held_tokens, entry.token_count)
            self.give_up(entry, InternalError("a KV transfer failed", reason=PROTOCOL), tell_peer=PROTOCOL)
            return
        self._parts.counters.chunks += 1
        self._outbox.put(pb.TransferResponse(ack=pb.Ack(key=offer.key, chunk=offer.chunk)))
        if entry.complete and entry.last is not None:
            self.give_up(entry, None, tell_peer=None)
            self._parts.on_transferred(entry.key, entry.busy_s)
            self._parts.engine.kv_arrived(entry.key, entry.last.first_output_id, entry.last.finished)

    def _nack(self, offer: pb.Offer, generation: int, reason: str) -> None:
        nack = pb.Nack(key=offer.key, chunk=offer.chunk, generation=generation, reason=reason)
        self._outbox.put(pb.TransferResponse(nack=nack))

    def _listen(self, exchange: _Exchange) -> Transport:
        """Runs on the data thread."""
        name = pair_name(self._peer, self._parts.incarnation, exchange.generation)
        return self._parts.meeting.listen(name, exchange.stop)
