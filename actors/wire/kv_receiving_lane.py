"""A decode engine's end of one lane: chunks come from one rank of a prefill engine to one of its own, one by one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from actors.errors import ServingError, Unavailable
from actors.parallel.kv_ends import Received, Work
from actors.parallel.kv_transfer import BlockGuard, TransportError, pair_name
from actors.types import SequenceKey
from actors.wire import convert
from actors.wire.kv_control import BROKEN, CHECKSUM, PROTOCOL, PairParts
from actors.wire.tensors import CHUNK_BYTES
from ernie_serving.internal.v1 import kv_control_pb2 as pb

log = logging.getLogger(__name__)


class Placed(NamedTuple):
    """What a chunk was: tokens from ``first`` on, in some layers."""

    first: int
    tokens: int
    layers: range

    @classmethod
    def of(cls, offer: pb.Offer) -> Placed:
        """Layers follow each other, or the offer is refused."""
        first_layer = offer.messages[0].layer if offer.messages else 0
        return cls(offer.first_token, offer.token_count, range(first_layer, first_layer + len(offer.messages)))


class Holder(Protocol):
    """The pair that a sequence came by."""

    def give_up(self, entry: Incoming, error: ServingError | None, *, tell_peer: str | None) -> None: ...


@dataclass(eq=False, slots=True)
class Incoming:
    """A sequence from Reserve to its last chunk in place."""

    key: SequenceKey
    token_count: int
    pair: Holder
    guard: BlockGuard = field(default_factory=BlockGuard)
    rank: int = 0
    """That holds it."""
    held_tokens: int = 0
    """Leading tokens that are not sent: their KV is here."""
    own_blocks: list[int] | None = None
    """Of the tokens that are; None before the reservation. Held blocks are shared, so nothing here can name them."""
    placed: dict[int, Placed] = field(default_factory=dict)
    """Each verified chunk, by index."""
    last: pb.Sent | None = None
    busy_s: float = 0.0

    @property
    def complete(self) -> bool:
        """All chunks up to the last are in place."""
        return self.last is not None and len(self.placed) > self.last.chunk

    def covers(self, layer: int) -> bool:
        """In that layer the chunks are the tokens of the prompt that are not held, each once."""
        end = self.held_tokens
        for chunk in sorted(self.placed.values(), key=lambda chunk: chunk.first):
            if layer in chunk.layers:
                if chunk.first != end:
                    return False
                end += chunk.tokens
        return end == self.token_count


@dataclass(eq=False, slots=True)
class _Exchange:
    """One accepted chunk. ``sent`` is None when the sender failed."""

    key: SequenceKey
    chunk: int
    generation: int
    sent: asyncio.Future[pb.Sent | None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    work: Work[Received] | None = None
    pieces: asyncio.Queue[pb.Piece | None] = field(default_factory=asyncio.Queue)
    """Of a streamed chunk; None when no more come."""

    def stop(self) -> None:
        if self.work is not None:
            self.work.stop()


class ReceivingLane:
    """Lives on the event loop. Its pair decides which sequences there are, and what becomes of them."""

    def __init__(
        self,
        parts: PairParts,
        peer: str,
        rank: int,
        *,
        next_generation: Callable[[], int],
        say: Callable[[pb.TransferResponse], None],
        wanted: Callable[[pb.Offer], Incoming | None],
        still_wanted: Callable[[Incoming], bool],
        place: Callable[[Incoming, Placed, pb.Sent], None],
    ) -> None:
        """``rank``: this engine's. ``wanted``: the sequence of an offer, if it is still received and the offer fits.
        ``place``: a chunk is verified and written.
        """
        self._parts = parts
        self._peer = peer
        self._next_generation = next_generation
        self._say = say
        self._wanted = wanted
        self._still_wanted = still_wanted
        self._place = place
        self._offers: asyncio.Queue[pb.Offer] = asyncio.Queue()
        self._exchange: _Exchange | None = None
        self._generation = 0
        self._end = parts.ranks[rank].receiving_end(peer)

    @property
    def busy(self) -> bool:
        return self._exchange is not None or self._end.staging_in_use

    def offer(self, offer: pb.Offer) -> None:
        self._offers.put_nowait(offer)

    def hear(self, message: pb.Sent | pb.SendFailed | pb.Piece) -> None:
        """What the sender says of a chunk, if its exchange is under way here."""
        exchange = self._exchange
        named = (convert.key_from_proto(message.key), message.chunk, message.generation)
        if exchange is None or named != (exchange.key, exchange.chunk, exchange.generation):
            return
        if isinstance(message, pb.Piece):
            exchange.pieces.put_nowait(message)
            return
        sent = message if isinstance(message, pb.Sent) else None
        if not exchange.sent.done():
            exchange.sent.set_result(sent)
        if sent is None:
            exchange.stop()
            exchange.pieces.put_nowait(None)

    def stop(self) -> None:
        """Nothing more will come."""
        if self._exchange is not None:
            self._exchange.stop()

    async def run(self) -> None:
        """Receives until it is cancelled."""
        while True:
            offer = await self._offers.get()
            entry = self._wanted(offer)
            if entry is None:
                self._say(pb.TransferResponse(decline=pb.Decline(key=offer.key, chunk=offer.chunk)))
                continue
            try:
                await self._take(entry, offer)
            finally:
                self._exchange = None

    def close(self) -> Awaitable[None]:
        """Done when the end is; ``run`` must have ended."""
        return asyncio.wrap_future(self._end.close())

    async def _take(self, entry: Incoming, offer: pb.Offer) -> None:
        """Sees one accepted chunk through; whatever becomes of the sequence, the bytes are received."""
        chunk = Placed.of(offer)
        receive = self._collect if offer.streamed else self._receive
        received = await receive(entry, offer, chunk)
        if received is None or self._exchange is None:
            return
        sent = await self._exchange.sent
        if sent is None:
            self._generation = 0
            await asyncio.wrap_future(self._end.leave())
            return
        counters = self._parts.counters
        size = self._parts.geometry.chunk_bytes(chunk.tokens, chunk.layers)
        counters.received_bytes += size
        counters.streamed_bytes += size if offer.streamed else 0
        if not self._still_wanted(entry):
            self._end.forget()
            return
        if list(sent.checksums) != received.checksums:
            self._end.forget()
            self._nack(offer, self._exchange.generation, CHECKSUM)
            return
        scatter_s = await asyncio.wrap_future(
            self._end.scatter(entry.own_blocks or [], offer.first_token - entry.held_tokens, entry.guard)
        )
        if self._still_wanted(entry):
            entry.busy_s += received.seconds + scatter_s
            counters.seconds += received.seconds + scatter_s
            self._place(entry, chunk, sent)

    def _accept(self, entry: Incoming, offer: pb.Offer, generation: int) -> _Exchange:
        self._exchange = _Exchange(entry.key, offer.chunk, generation)
        accept = pb.Accept(key=offer.key, chunk=offer.chunk, generation=generation)
        self._say(pb.TransferResponse(accept=accept))
        return self._exchange

    async def _receive(self, entry: Incoming, offer: pb.Offer, chunk: Placed) -> Received | None:
        """By the data path. None if that broke."""
        if self._generation == 0:
            self._generation = self._next_generation()
            self._parts.counters.generations += 1
        exchange = self._accept(entry, offer, self._generation)
        name = pair_name(self._peer, self._parts.incarnation, exchange.generation)
        exchange.work = self._end.receive(name, chunk.tokens, chunk.layers)
        try:
            return await asyncio.wrap_future(exchange.work.future)
        except TransportError as error:
            self._generation = 0
            if not (exchange.sent.done() and exchange.sent.result() is None):
                log.warning(
                    "generation %d from engine %s failed under %s: %s",
                    exchange.generation,
                    self._peer,
                    exchange.key,
                    error,
                )
                self._nack(offer, exchange.generation, BROKEN)
            return None

    async def _collect(self, entry: Incoming, offer: pb.Offer, chunk: Placed) -> Received | None:
        """Over the control stream, piece by piece. None if the sender gave the sequence up meanwhile."""
        exchange = self._accept(entry, offer, self._next_generation())
        size, offset = self._parts.geometry.chunk_bytes(chunk.tokens, chunk.layers), 0
        while offset < size:
            piece = await exchange.pieces.get()
            if piece is None:
                self._end.forget()
                return None
            if piece.offset != offset or not 0 < len(piece.content) <= min(CHUNK_BYTES, size - offset):
                raise Unavailable(f"bytes {piece.offset} + {len(piece.content)} of {size} at {offset}", reason=PROTOCOL)
            await asyncio.wrap_future(self._end.put(chunk.tokens, chunk.layers, offset, piece.content))
            offset += len(piece.content)
            self._say(pb.TransferResponse(taken=pb.Taken(key=offer.key, chunk=offer.chunk)))
        return await asyncio.wrap_future(self._end.filled())

    def _nack(self, offer: pb.Offer, generation: int, reason: str) -> None:
        self._parts.counters.nacks += 1
        nack = pb.Nack(key=offer.key, chunk=offer.chunk, generation=generation, reason=reason)
        self._say(pb.TransferResponse(nack=nack))
