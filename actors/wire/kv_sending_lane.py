"""A prefill engine's end of one lane: chunks go from one of its ranks to one rank of a decode engine, one by one."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from actors.engine.events import ComputedChunk
from actors.parallel.kv_ends import Received, Work
from actors.parallel.kv_transfer import BlockGuard, ChunkPlace, TransportError, pair_name
from actors.types import SequenceKey
from actors.wire import convert
from actors.wire.kv_control import PairParts
from actors.wire.tensors import CHUNK_BYTES
from ernie_serving.internal.v1 import kv_control_pb2 as pb

log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class Outgoing:
    """A sequence from Reserve to the Ack of its last chunk."""

    key: SequenceKey
    guard: BlockGuard = field(default_factory=BlockGuard)
    rank: int = 0
    """Of the decode engine, which holds it."""
    rendezvous: str = ""
    unacked: dict[int, Chunk] = field(default_factory=dict)
    last_pushed: bool = False
    busy_s: float = 0.0


@dataclass(eq=False, slots=True)
class Chunk:
    """A chunk until its Ack. ``generation`` is that of the exchange under way, 0 when there is none."""

    computed: ComputedChunk
    entry: Outgoing
    generation: int = 0
    sends: int = 0
    rejections: int = 0
    broken: bool = False
    streamed: bool = False
    """The exchange under way, or the last one, goes over the control stream."""
    work: Work[Received] | None = None

    def sent(self, checksums: Sequence[int] = ()) -> pb.Sent:
        """What is said when its bytes, if it has any, have gone."""
        computed = self.computed
        return pb.Sent(
            key=convert.key_to_proto(computed.key),
            chunk=computed.index,
            generation=self.generation,
            checksums=checksums,
            last=computed.last,
            first_output_id=computed.first_output_id or 0,
            finished=computed.finished,
        )

    def stop(self) -> None:
        """Ends the waiting of the exchange under way."""
        if self.work is not None:
            self.work.stop()


class SendingLane:
    """Lives on the event loop. Its pair decides which sequences there are, and what becomes of them."""

    def __init__(
        self,
        parts: PairParts,
        peer: str,
        rank: int,
        *,
        say: Callable[[pb.TransferRequest], None],
        wanted: Callable[[Outgoing], bool],
        declined: Callable[[Outgoing], None],
    ) -> None:
        """``rank``: this engine's. ``wanted``: whether a sequence is still sent."""
        self._parts = parts
        self._peer = peer
        self._say = say
        self._wanted = wanted
        self._declined = declined
        self._ready: asyncio.Queue[Chunk] = asyncio.Queue()
        self._current: Chunk | None = None
        self._answer: asyncio.Future[pb.TransferResponse] | None = None
        self._taken: asyncio.Future[None] | None = None
        self._breaks = 0
        self._streams_until = 0.0
        self._generation = 0
        self._end = parts.ranks[rank].sending_end(peer)

    @property
    def idle(self) -> bool:
        return self._current is None

    @property
    def busy(self) -> bool:
        return self._current is not None or self._end.staging_in_use

    def push(self, chunk: Chunk) -> None:
        self._ready.put_nowait(chunk)

    def takes_answer(self, key: SequenceKey, index: int, response: pb.TransferResponse) -> bool:
        """An Accept or Decline; False if it answers no offer of this lane."""
        if self._answer is None or self._answer.done() or not self._is_current(key, index):
            return False
        self._answer.set_result(response)
        return True

    def takes_taken(self, key: SequenceKey, index: int) -> bool:
        """A Taken; False if it is of no chunk of this lane."""
        if self._taken is None or self._taken.done() or not self._is_current(key, index):
            return False
        self._taken.set_result(None)
        return True

    def acked(self, chunk: Chunk) -> None:
        """It has arrived."""
        if not chunk.streamed:
            self._breaks = 0

    def again(self, chunk: Chunk) -> None:
        """The receiver did not get what was sent."""
        chunk.generation = 0
        self._ready.put_nowait(chunk)

    def broke(self, chunk: Chunk) -> None:
        """The receiver has left the generation that ``chunk`` went through, or goes through."""
        if chunk is self._current:
            chunk.broken = True
            chunk.stop()
        else:
            self._broke(chunk)

    async def run(self) -> None:
        """Sends until it is cancelled."""
        while True:
            chunk = await self._ready.get()
            if not self._wanted(chunk.entry):
                continue
            self._current = chunk
            try:
                await self._exchange(chunk)
            finally:
                chunk.stop()
                chunk.work = None
                self._current = None

    def close(self) -> Awaitable[None]:
        """Done when the end is; ``run`` must have ended."""
        return asyncio.wrap_future(self._end.close())

    def _is_current(self, key: SequenceKey, index: int) -> bool:
        current = self._current
        return current is not None and (current.computed.key, current.computed.index) == (key, index)

    async def _exchange(self, chunk: Chunk) -> None:
        chunk.streamed = time.monotonic() < self._streams_until
        self._answer = asyncio.get_running_loop().create_future()
        self._say(pb.TransferRequest(offer=self._offer(chunk)))
        answer = await self._answer
        self._answer = None
        if answer.WhichOneof("message") == "decline":
            self._declined(chunk.entry)
            return
        chunk.generation, chunk.broken = answer.accept.generation, False
        sent = await (self._stream(chunk) if chunk.streamed else self._send(chunk))
        if sent is None:
            return
        self._count(chunk, sent.seconds)
        self._say(pb.TransferRequest(sent=chunk.sent(sent.checksums)))

    async def _send(self, chunk: Chunk) -> Received | None:
        """By the data path. None if that broke."""
        computed, entry = chunk.computed, chunk.entry
        if chunk.generation != self._generation:
            self._generation = chunk.generation
            self._parts.counters.generations += 1
        chunk.work = self._end.send(
            pair_name(self._parts.incarnation, self._peer, chunk.generation),
            entry.rendezvous,
            self._place(chunk),
            entry.guard,
        )
        try:
            sent = await asyncio.wrap_future(chunk.work.future)
        except TransportError as error:
            log.warning(
                "generation %d to engine %s failed under %s: %s", chunk.generation, self._peer, computed.key, error
            )
            self._say_failed(chunk)
            self._broke(chunk)
            return None
        if chunk.broken:
            self._broke(chunk)
            return None
        return sent

    async def _stream(self, chunk: Chunk) -> Received | None:
        """Over the control stream, piece by piece. None if the sequence was given up meanwhile."""
        entry = chunk.entry
        try:
            staged = await asyncio.wrap_future(self._end.stage(self._place(chunk), entry.guard))
            size = self._size(chunk)
            for offset in range(0, size, CHUNK_BYTES):
                if not self._wanted(entry):
                    self._say_failed(chunk)
                    return None
                content = await asyncio.wrap_future(self._end.piece(offset, min(CHUNK_BYTES, size - offset)))
                self._taken = asyncio.get_running_loop().create_future()
                self._say(pb.TransferRequest(piece=self._piece(chunk, offset, content)))
                await self._taken
            return staged
        finally:
            self._end.forget()

    def _layers(self, chunk: Chunk) -> range:
        return chunk.computed.part.layers(self._parts.geometry.num_layers)

    def _place(self, chunk: Chunk) -> ChunkPlace:
        computed = chunk.computed
        return ChunkPlace(computed.block_table, computed.first_token, computed.token_count, self._layers(chunk))

    def _size(self, chunk: Chunk) -> int:
        return self._parts.geometry.chunk_bytes(chunk.computed.token_count, self._layers(chunk))

    def _say_failed(self, chunk: Chunk) -> None:
        key, index = convert.key_to_proto(chunk.computed.key), chunk.computed.index
        failed = pb.SendFailed(key=key, chunk=index, generation=chunk.generation)
        self._say(pb.TransferRequest(send_failed=failed))

    def _piece(self, chunk: Chunk, offset: int, content: bytes) -> pb.Piece:
        key, index = convert.key_to_proto(chunk.computed.key), chunk.computed.index
        return pb.Piece(key=key, chunk=index, generation=chunk.generation, offset=offset, content=content)

    def _offer(self, chunk: Chunk) -> pb.Offer:
        computed = chunk.computed
        size = self._parts.geometry.message_bytes(computed.token_count)
        layers = self._layers(chunk)
        return pb.Offer(
            key=convert.key_to_proto(computed.key),
            chunk=computed.index,
            first_token=computed.first_token,
            token_count=computed.token_count,
            messages=[pb.LayerMessage(layer=layer, byte_count=size) for layer in layers],
            rank=computed.rank,
            streamed=chunk.streamed,
        )

    def _count(self, chunk: Chunk, busy_s: float) -> None:
        counters = self._parts.counters
        size = self._size(chunk)
        chunk.entry.busy_s += busy_s
        counters.seconds += busy_s
        counters.sent_bytes += size
        counters.streamed_bytes += size if chunk.streamed else 0
        counters.resent_bytes += size if chunk.sends else 0
        chunk.sends += 1

    def _broke(self, chunk: Chunk) -> None:
        """A generation ended under ``chunk``; the receiver will name another one when it accepts the next offer."""
        self._breaks += 1
        config = self._parts.config
        if self._breaks >= config.break_limit:
            self._breaks = config.break_limit - 1
            self._streams_until = time.monotonic() + config.streaming_s
            log.error(
                "the data path from rank %d to rank %d of engine %s does not work: KV goes over the control stream, "
                "which is slower; the path is tried again in %g s",
                chunk.computed.rank,
                chunk.entry.rank,
                self._peer,
                config.streaming_s,
            )
        if self._wanted(chunk.entry):
            self.again(chunk)
