"""A prefill engine's end of one pair: the stream and the sequences; their chunks go through its lanes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial

import grpc.aio

from actors.engine.events import ComputedChunk
from actors.errors import InternalError, ServingError, Unavailable
from actors.reports import KvIdentity
from actors.types import SequenceKey
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
    TaskSet,
    given_up,
    hello,
    identity_to_proto,
    read_message,
)
from actors.wire.kv_sending_lane import Chunk, Outgoing, SendingLane
from ernie_serving.internal.v1 import common_pb2
from ernie_serving.internal.v1 import kv_control_pb2 as pb
from ernie_serving.internal.v1.kv_control_pb2_grpc import KvControlServiceStub

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class SenderParts(PairParts):
    """What all pairs of a sender share."""

    engine: PrefillEngine


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
        self._entries: dict[SequenceKey, Outgoing] = {}
        self._outbox = Outbox(pb.TransferRequest(heartbeat=pb.TransferHeartbeat()), parts.config.heartbeat_s)
        self._lanes: dict[tuple[int, int], SendingLane] = {}
        """By rank here and rank there."""
        self._tasks = TaskSet()
        self._greeted = asyncio.Event()
        self._task = asyncio.create_task(self._run())
        self.released = asyncio.create_task(self._release())
        """Done when the pair has ended and its lanes with it."""

    def __contains__(self, key: SequenceKey) -> bool:
        return key in self._entries

    @property
    def idle(self) -> bool:
        return not self._entries and all(lane.idle for lane in self._lanes.values())

    @property
    def busy_reason(self) -> str | None:
        """What keeps the pair from being idle, for integrity checks."""
        if self._entries:
            return f"sequences {[str(key) for key in self._entries]}"
        if any(lane.busy for lane in self._lanes.values()):
            return "a chunk on its way"
        return None

    def reserve(self, key: SequenceKey, token_count: int, identity: KvIdentity) -> None:
        self.used_at = time.monotonic()
        self._entries[key] = Outgoing(key)
        reserve = pb.Reserve(key=convert.key_to_proto(key), layout=identity_to_proto(identity), token_count=token_count)
        self._outbox.put(pb.TransferRequest(reserve=reserve))

    def push(self, computed: ComputedChunk) -> None:
        entry = self._entries[computed.key]
        chunk = Chunk(computed, entry)
        entry.unacked[computed.index] = chunk
        entry.last_pushed = entry.last_pushed or computed.last
        if computed.token_count:
            self._lane_of(chunk).push(chunk)
        else:
            self._outbox.put(pb.TransferRequest(sent=chunk.sent()))

    def cancel(self, key: SequenceKey) -> None:
        """Ends a sequence at the engine's wish; nothing reads its blocks once this returns."""
        self._drop(self._entries[key], CANCELLED)

    def close_when_idle(self) -> None:
        """Ends the stream after what was said; for idle pairs."""
        self._outbox.end()

    async def close(self) -> None:
        """Ends the pair now. Returns when its lanes have ended, or must be left behind: see ``TorchMeeting``."""
        self._task.cancel()
        await asyncio.wait([self._task])
        self._end(_stopping())
        config = self._parts.config
        _, stuck = await asyncio.wait([self.released], timeout=config.join_timeout_s + config.data_timeout_s)
        if stuck:
            log.error("a data path of the pair with engine %s does not end", self.incarnation)

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
            keys = ", ".join(map(str, self._entries))
            log.warning("pair with engine %s lost under %s: %s", self.incarnation, keys, error.message)
        for entry in list(self._entries.values()):
            self._fail(entry, error, tell_peer=False)
        self._left(self)

    async def _talk(self, channel: grpc.aio.Channel) -> None:
        call = KvControlServiceStub(channel).Transfer(self._requests())
        self._tasks.start(self._read(call))
        try:
            await self._tasks.first_end()
        finally:
            self._tasks.cancel()
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
                    entry.rank = response.reserved.rank
                    entry.rendezvous = response.reserved.rendezvous_address
                    self._parts.engine.reserved(entry.key, response.reserved.held_token_count)
            case "refused":
                entry = self._entry(response.refused.key)
                if entry is not None:
                    del self._entries[entry.key]
                    self._parts.engine.refused(entry.key, response.refused.reason)
            case "accept":
                self._answered(response.accept, response)
            case "decline":
                self._answered(response.decline, response)
            case "taken":
                key = convert.key_from_proto(response.taken.key)
                if not any(lane.takes_taken(key, response.taken.chunk) for lane in self._lanes.values()):
                    raise Unavailable("a piece was taken that was not sent", reason=PROTOCOL)
            case "ack":
                self._acked(response.ack)
            case "nack":
                self._nacked(response.nack)
            case "cancel":
                entry = self._entry(response.cancel.key)
                if entry is not None:
                    self._fail(entry, given_up(response.cancel.reason), tell_peer=False)

    def _entry(self, key: common_pb2.SequenceKey) -> Outgoing | None:
        return self._entries.get(convert.key_from_proto(key))

    def _answered(self, answer: pb.Accept | pb.Decline, response: pb.TransferResponse) -> None:
        key = convert.key_from_proto(answer.key)
        if not any(lane.takes_answer(key, answer.chunk, response) for lane in self._lanes.values()):
            raise Unavailable("an answer without an offer", reason=PROTOCOL)

    def _acked(self, ack: pb.Ack) -> None:
        self._parts.counters.chunks += 1
        entry = self._entry(ack.key)
        if entry is None:
            return
        chunk = entry.unacked.pop(ack.chunk, None)
        if chunk is not None and chunk.computed.token_count:
            self._lane_of(chunk).acked(chunk)
        if entry.last_pushed and not entry.unacked:
            del self._entries[entry.key]
            self.used_at = time.monotonic()
            entry.guard.shut()
            self._parts.on_transferred(entry.key, entry.busy_s)
            self._parts.engine.transferred(entry.key)

    def _nacked(self, nack: pb.Nack) -> None:
        entry = self._entry(nack.key)
        chunk = entry.unacked.get(nack.chunk) if entry is not None else None
        if chunk is None or chunk.generation != nack.generation:
            return
        self._parts.counters.nacks += 1
        if nack.reason == BROKEN:
            self._lane_of(chunk).broke(chunk)
            return
        chunk.rejections += 1
        limit = self._parts.config.resend_limit
        if chunk.rejections > limit:
            message = f"chunk {nack.chunk} was refused {chunk.rejections} times: {nack.reason}"
            self._fail(chunk.entry, Unavailable(message, reason=TRANSFER_FAILED), tell_peer=True)
        else:
            log.warning("chunk %d of %s goes again: %s", nack.chunk, chunk.entry.key, nack.reason or CHECKSUM)
            self._lane_of(chunk).again(chunk)

    # Lanes.

    def _lane(self, rank: int, peer_rank: int) -> SendingLane:
        lane = self._lanes.get((rank, peer_rank))
        if lane is None:
            lane = SendingLane(
                self._parts,
                self.incarnation,
                rank,
                say=self._outbox.put,
                wanted=lambda entry: self._entries.get(entry.key) is entry,
                declined=self._declined,
            )
            self._lanes[rank, peer_rank] = lane
            self._tasks.start(lane.run())
        return lane

    def _lane_of(self, chunk: Chunk) -> SendingLane:
        return self._lane(chunk.computed.rank, chunk.entry.rank)

    def _declined(self, entry: Outgoing) -> None:
        if self._entries.get(entry.key) is entry:
            self._fail(entry, given_up(CANCELLED), tell_peer=False)

    def _drop(self, entry: Outgoing, reason: str | None) -> None:
        del self._entries[entry.key]
        self.used_at = time.monotonic()
        entry.guard.shut()
        if reason is not None:
            cancel = pb.TransferCancel(key=convert.key_to_proto(entry.key), reason=reason)
            self._outbox.put(pb.TransferRequest(cancel=cancel))
        self._parts.engine.transferred(entry.key)

    def _fail(self, entry: Outgoing, error: ServingError, *, tell_peer: bool) -> None:
        self._parts.counters.failures += 1
        self._parts.engine.fail(entry.key, error)
        self._drop(entry, error.reason if tell_peer else None)

    async def _release(self) -> None:
        await asyncio.wait([self._task])
        await self._tasks.all_ended()
        await asyncio.gather(*(lane.close() for lane in self._lanes.values()))


def _stopping() -> Unavailable:
    return Unavailable("the engine is stopping", reason=DRAINING)
