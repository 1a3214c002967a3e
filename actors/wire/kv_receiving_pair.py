"""A decode engine's end of one pair: the stream and the sequences; their chunks come through its lanes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeAlias

import grpc.aio

from actors.engine.scheduling.reservations import Reservation
from actors.errors import InternalError, ServingError, Unavailable
from actors.reports import KvIdentity
from actors.types import SequenceKey
from actors.wire import convert
from actors.wire.kv_control import (
    CANCELLED,
    DUPLICATE,
    ENGINE_LOST,
    LAYOUT_MISMATCH,
    PROTOCOL,
    DecodeEngine,
    Outbox,
    PairParts,
    TaskSet,
    given_up,
    hello,
    identity_from_proto,
    read_message,
)
from actors.wire.kv_receiving_lane import Incoming, Placed, ReceivingLane
from ernie_serving.internal.v1 import kv_control_pb2 as pb

log = logging.getLogger(__name__)

MAX_RANKS = 64
"""Of a group: each rank that sends costs a thread here."""

Context: TypeAlias = "grpc.aio.ServicerContext[pb.TransferRequest, pb.TransferResponse]"


@dataclass(frozen=True, kw_only=True, slots=True)
class ReceiverParts(PairParts):
    """What all pairs of a receiver share. ``entries`` holds every sequence of every pair."""

    engine: DecodeEngine
    identity: KvIdentity
    entries: dict[SequenceKey, Incoming]
    next_generation: Callable[[], int]
    post: Callable[[Callable[[], None]], None]
    """Runs an action on the event loop, from any thread."""


class ReceivingPair:
    """Everything between this engine and one stream of a prefill engine. Lives on the event loop."""

    def __init__(self, parts: ReceiverParts, peer_incarnation: str) -> None:
        self._parts = parts
        self._peer = peer_incarnation
        self._outbox = Outbox(pb.TransferResponse(heartbeat=pb.TransferHeartbeat()), parts.config.heartbeat_s)
        self._lanes: dict[tuple[int, int], ReceivingLane] = {}
        """By rank there and rank here."""
        self._tasks = TaskSet()

    @property
    def busy_reason(self) -> str | None:
        """What keeps the pair from being idle, for integrity checks."""
        return "a chunk on its way" if any(lane.busy for lane in self._lanes.values()) else None

    async def serve(self, context: Context) -> None:
        """Talks until the stream ends, then fails what is left of it."""
        self._outbox.put(pb.TransferResponse(hello=hello(self._parts.incarnation, self._peer)))
        self._tasks.start(self._read(context))
        self._tasks.start(self._write(context))
        error: ServingError = Unavailable(f"engine {self._peer} is lost", reason=ENGINE_LOST)
        try:
            await self._tasks.first_end()
        except ServingError as failure:
            error = failure
        except grpc.aio.BaseError:
            pass
        except Exception:
            log.exception("pair with engine %s failed", self._peer)
            error = InternalError("a KV transfer failed")
        finally:
            self._tasks.cancel()
            self._end(error)

    def _end(self, error: ServingError) -> None:
        for lane in self._lanes.values():
            lane.stop()
        lost = [entry for entry in self._parts.entries.values() if entry.pair is self]
        if lost:
            keys = ", ".join(str(entry.key) for entry in lost)
            log.warning("pair with engine %s lost under %s: %s", self._peer, keys, error.message)
        for entry in lost:
            self.give_up(entry, error, tell_peer=None)

    async def release(self) -> None:
        """Returns when the lanes have ended; the stream must have."""
        await self._tasks.all_ended()
        await asyncio.gather(*(lane.close() for lane in self._lanes.values()))

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
                self._offered(request.offer)
            case "sent" if not request.sent.checksums:
                entry = self._own(convert.key_from_proto(request.sent.key))
                if entry is not None:
                    self._place(entry, Placed(entry.token_count, 0, range(0)), request.sent)
            case "sent":
                self._hear(request.sent)
            case "send_failed":
                self._hear(request.send_failed)
            case "piece":
                self._hear(request.piece)
            case "cancel":
                entry = self._own(convert.key_from_proto(request.cancel.key))
                if entry is not None:
                    self.give_up(entry, given_up(request.cancel.reason), tell_peer=None)

    def _hear(self, message: pb.Sent | pb.SendFailed | pb.Piece) -> None:
        for lane in self._lanes.values():
            lane.hear(message)

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
            entry.rank, entry.held_tokens = rank, held_tokens
            entry.own_blocks = block_table[held_tokens // block_size :]
            reserved = pb.Reserved(
                key=convert.key_to_proto(entry.key),
                rank=rank,
                rendezvous_address=parts.ranks[rank].address,
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

    def _offered(self, offer: pb.Offer) -> None:
        entry = self._wanted(offer)
        if entry is None:
            self._outbox.put(pb.TransferResponse(decline=pb.Decline(key=offer.key, chunk=offer.chunk)))
            return
        lane = self._lanes.get((offer.rank, entry.rank))
        if lane is None:
            lane = ReceivingLane(
                self._parts,
                self._peer,
                entry.rank,
                next_generation=self._parts.next_generation,
                say=self._outbox.put,
                wanted=self._wanted,
                still_wanted=lambda entry: self._own(entry.key) is entry,
                place=self._place,
            )
            self._lanes[offer.rank, entry.rank] = lane
            self._tasks.start(lane.run())
        lane.offer(offer)

    def _wanted(self, offer: pb.Offer) -> Incoming | None:
        entry = self._own(convert.key_from_proto(offer.key))
        problem = self._problem(entry, offer) if entry is not None else None
        if entry is not None and problem is not None:
            log.error("offer of %s refused: %s", entry.key, problem)
            self.give_up(entry, InternalError("a KV transfer failed", reason=PROTOCOL), tell_peer=PROTOCOL)
            return None
        return entry

    def _problem(self, entry: Incoming, offer: pb.Offer) -> str | None:
        geometry, layers = self._parts.geometry, Placed.of(offer).layers
        expected = [(layer, geometry.message_bytes(offer.token_count)) for layer in layers]
        if entry.own_blocks is None:
            return "it came before its reservation"
        if offer.rank >= MAX_RANKS:
            return f"no group has a rank {offer.rank}"
        if offer.first_token < entry.held_tokens:
            return f"token {offer.first_token} is one of {entry.held_tokens} that are here already"
        if offer.token_count == 0 or offer.first_token + offer.token_count > entry.token_count:
            return f"tokens {offer.first_token} + {offer.token_count} of {entry.token_count}"
        if offer.chunk in entry.placed:
            return f"chunk {offer.chunk} is in place"
        told = [(message.layer, message.byte_count) for message in offer.messages]
        if not layers or layers.stop > geometry.num_layers or told != expected:
            return "its messages are not layers of this cache"
        return None

    def _place(self, entry: Incoming, chunk: Placed, sent: pb.Sent) -> None:
        """A chunk is verified and written, or has no tokens."""
        entry.placed[sent.chunk] = chunk
        if sent.last:
            entry.last = sent
        if entry.complete and not all(map(entry.covers, range(self._parts.geometry.num_layers))):
            log.error("chunks of %s are not its tokens %d .. %d", entry.key, entry.held_tokens, entry.token_count)
            self.give_up(entry, InternalError("a KV transfer failed", reason=PROTOCOL), tell_peer=PROTOCOL)
            return
        self._parts.counters.chunks += 1
        self._outbox.put(pb.TransferResponse(ack=pb.Ack(key=sent.key, chunk=sent.chunk)))
        if entry.complete and entry.last is not None:
            self.give_up(entry, None, tell_peer=None)
            self._parts.on_transferred(entry.key, entry.busy_s)
            self._parts.engine.kv_arrived(entry.key, entry.last.first_output_id, entry.last.finished)
