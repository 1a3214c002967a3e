"""What both ends of KvControl share.

One gRPC stream per pair of engines, leader to leader, carries the control of all its transfers; bulk bytes travel
beside it through ``actors.parallel``, straight from the rank that computed them to the one that holds the sequence. A
sequence goes

    Reserve -> Reserved | Refused
    for each chunk: Offer -> Accept(generation) | Decline;  bytes;  Sent(checksums) | SendFailed -> Ack | Nack
    for a last chunk without tokens: Sent -> Ack
    where bytes cannot go beside: Piece -> Taken -> Piece -> Taken ...
    TransferCancel at any time, either way

Two ranks that have met are a *lane* of the pair, with a data path and generations of its own; lanes know nothing of
each other. One chunk of a lane is on the data path at a time; the next may be offered while the last is verified and
scattered. Every Offer gets one Accept or Decline, and every Accept one Sent or SendFailed: whatever is cancelled
meanwhile, both ends complete what they promised. All state belongs to the event loop of the leader; the ends of lanes
(``KvRank``), in the leader's process or another, only copy and wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from actors.engine.scheduling.reservations import Reservation
from actors.errors import ServingError, Unavailable
from actors.parallel.kv_ends import KvRank
from actors.parallel.kv_transfer import KvGeometry, KvTransferConfig
from actors.reports import KvIdentity
from actors.types import SequenceKey
from actors.wire import convert
from ernie_serving.internal.v1 import common_pb2
from ernie_serving.internal.v1 import kv_control_pb2 as pb

CANCELLED = "CANCELLED"
ENGINE_LOST = "ENGINE_LOST"
PEER_CANCELLED = "PEER_CANCELLED"
PROTOCOL = "PROTOCOL"
TRANSFER_FAILED = "TRANSFER_FAILED"
VERSION_MISMATCH = "VERSION_MISMATCH"
INCARNATION_MISMATCH = "INCARNATION_MISMATCH"
LAYOUT_MISMATCH = "LAYOUT_MISMATCH"
DRAINING = "DRAINING"
DUPLICATE = "DUPLICATE"
CHECKSUM = "CHECKSUM"
BROKEN = "BROKEN"

_MessageT = TypeVar("_MessageT")


class PrefillEngine(Protocol):
    """What a sender tells its engine. Called on the event loop, must not block; unknown keys are ignored there."""

    def reserved(self, key: SequenceKey, held_tokens: int, /) -> None:
        """The peer holds blocks, and the KV of the first ``held_tokens``."""

    def refused(self, key: SequenceKey, reason: str, /) -> None:
        """The peer holds nothing; the key is done with here."""

    def transferred(self, key: SequenceKey, /) -> None:
        """Nothing reads the blocks any more: all chunks are in place, or the transfer was given up."""

    def fail(self, key: SequenceKey, error: ServingError, /) -> None:
        """The transfer is lost; ``transferred`` follows."""


class DecodeEngine(Protocol):
    """What a receiver asks of its engine. As above, but ``drop`` of the receiver may come from any thread."""

    def reserve(self, key: SequenceKey, token_count: int, /) -> Future[Reservation]:
        """Blocks for a prompt. Fails with ServingError; its reason goes to the peer.

        The KV of the held tokens is in the first blocks already: whole blocks that others may share, not all tokens.
        """

    def kv_arrived(self, key: SequenceKey, first_output_id: int, finished: bool, /) -> None:
        """Every chunk is verified and in place. ``finished``: token 0 ended the reply."""

    def fail(self, key: SequenceKey, error: ServingError, /) -> None:
        """The transfer is lost: free the reservation, also one granted a moment ago."""


OnTransferred = Callable[[SequenceKey, float], None]
"""A transfer is complete; seconds its data thread was at work. Called on the event loop."""


@dataclass(slots=True)
class TransferCounters:
    """Of one engine since its start. ``sent_bytes`` includes ``resent_bytes``; broken chunks do not count."""

    sent_bytes: int = 0
    resent_bytes: int = 0
    received_bytes: int = 0
    streamed_bytes: int = 0
    """Of those sent or received, those that went over the control stream: the data path did not work."""
    chunks: int = 0
    """Acknowledged, whichever way they went."""
    generations: int = 0
    """Data paths begun, of all lanes."""
    failures: int = 0
    """Sequences given up, cancelled ones not counted."""
    nacks: int = 0
    """Chunks that did not arrive as they were sent."""
    seconds: float = 0.0
    """Work of the ranks on what was sent or received."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairParts:
    """What all pairs of one side share. ``incarnation`` is this engine's."""

    ranks: Sequence[KvRank]
    """Of this engine."""
    geometry: KvGeometry
    incarnation: str
    config: KvTransferConfig
    counters: TransferCounters
    on_transferred: OnTransferred


class Outbox(Generic[_MessageT]):
    """Messages waiting to be written to one stream, in order; a heartbeat goes out when there is nothing to say."""

    def __init__(self, heartbeat: _MessageT, period_s: float) -> None:
        self._heartbeat = heartbeat
        self._period_s = period_s
        self._queue: asyncio.Queue[_MessageT | None] = asyncio.Queue()

    def put(self, message: _MessageT) -> None:
        self._queue.put_nowait(message)

    def end(self) -> None:
        """Ends the iteration after what is already in."""
        self._queue.put_nowait(None)

    async def __aiter__(self) -> AsyncIterator[_MessageT]:
        while True:
            try:
                message = await asyncio.wait_for(self._queue.get(), self._period_s)
            except TimeoutError:
                message = self._heartbeat
            if message is None:
                return
            yield message


class TaskSet:
    """What one stream does at the same time; the first of it that ends or fails ends the stream."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._one_ended = asyncio.Event()

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(lambda _task: self._one_ended.set())

    async def first_end(self) -> None:
        """Raises what that one raised."""
        await self._one_ended.wait()
        for task in self._tasks:
            if task.done():
                task.result()

    def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def all_ended(self) -> None:
        """After ``cancel``."""
        if self._tasks:
            await asyncio.wait(self._tasks)


async def read_message(
    read: Callable[[], Awaitable[object]], kind: type[_MessageT], silence_s: float, peer: str
) -> _MessageT | None:
    """The next message of a stream, None at its end. Raises Unavailable after ``silence_s`` without one."""
    try:
        async with asyncio.timeout(silence_s):
            message = await read()
    except TimeoutError:
        raise Unavailable(f"engine {peer} was silent for {silence_s:g} s", reason=ENGINE_LOST) from None
    return message if isinstance(message, kind) else None


def hello(incarnation: str, peer_incarnation: str) -> pb.TransferHello:
    """First message of the engine ``incarnation``."""
    return pb.TransferHello(
        protocol_version=convert.PROTOCOL_VERSION, incarnation=incarnation, peer_incarnation=peer_incarnation
    )


def identity_to_proto(identity: KvIdentity) -> common_pb2.KvLayout:
    return common_pb2.KvLayout(
        fingerprint=identity.fingerprint,
        dtype=identity.dtype,
        block_size=identity.block_size,
        switches=identity.switches,
    )


def identity_from_proto(message: common_pb2.KvLayout) -> KvIdentity:
    return KvIdentity(
        fingerprint=message.fingerprint,
        dtype=message.dtype,
        block_size=message.block_size,
        switches=message.switches,
    )


def given_up(reason: str) -> Unavailable:
    """Error of a sequence whose TransferCancel named ``reason``."""
    if reason == CANCELLED:
        return Unavailable("the other engine gave the sequence up", reason=PEER_CANCELLED)
    return Unavailable(f"the other engine gave the transfer up: {reason}", reason=reason)
