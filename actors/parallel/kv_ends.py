"""The ends of a pair of ranks as whoever controls transfers sees them, wherever those ranks' processes are.

A pair leads from one rank of a prefill engine to one of a decode engine; each end has a thread and a staging buffer of
its own in the process of its rank. What ends are asked for they do one after the other, in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Generic, NamedTuple, Protocol, TypeVar

from actors.parallel.kv_transfer import BlockGuard, ChunkPlace

_T = TypeVar("_T")


class Received(NamedTuple):
    """A chunk that went into the staging buffer, or out of it."""

    checksums: list[int]
    """CRC-32 of each message."""
    seconds: float
    """What it took."""


class Work(Protocol, Generic[_T]):
    """What an end was asked for. The future fails with TransportError when the generation has ended at this end."""

    @property
    def future(self) -> Future[_T]: ...

    def stop(self) -> None:
        """Ends the waiting for the other end to come. Nothing else, and nothing later. Any thread."""


class SendingEnd(Protocol):
    """Gathers and sends. Used by one thread, which nothing here holds up."""

    @property
    def staging_in_use(self) -> bool: ...

    def send(self, name: str, address: str, place: ChunkPlace, guard: BlockGuard) -> Work[Received]:
        """Sends a chunk through the generation of that name, met at ``address`` when it is new. See ``send_chunk``."""

    def stage(self, place: ChunkPlace, guard: BlockGuard) -> Future[Received]:
        """Gathers a chunk, to be read in pieces. See ``stage_chunk``; staged until ``forget``."""

    def piece(self, offset: int, size: int) -> Future[bytes]:
        """Bytes of what is staged."""

    def forget(self) -> None:
        """Frees the staging buffer."""

    def close(self) -> Future[None]:
        """Leaves the generation and ends, once what is done now is done or has timed out. Never fails."""


class ReceivingEnd(Protocol):
    """Receives and scatters. What was received stays staged until ``scatter`` or ``forget``. Used by one thread."""

    @property
    def staging_in_use(self) -> bool: ...

    def receive(self, name: str, tokens: int, layers: range) -> Work[Received]:
        """Receives a chunk through the generation of that name, met at the rank's own address when it is new."""

    def put(self, tokens: int, layers: range, offset: int, content: bytes) -> Future[None]:
        """A piece of a chunk of so many tokens and those layers; pieces come in order, and the first, which has offset
        0, begins it.
        """

    def filled(self) -> Future[Received]:
        """All pieces are in."""

    def scatter(self, block_table: Sequence[int], first: int, guard: BlockGuard) -> Future[float]:
        """Writes what was received to its places, unless ``guard`` is shut, and forgets it; the seconds it took."""

    def forget(self) -> None:
        """Frees the staging buffer."""

    def leave(self) -> Future[None]:
        """Ends the present generation at this end: the peer's calls fail, what was staged is forgotten."""

    def close(self) -> Future[None]:
        """As that of a sending end."""


class KvRank(Protocol):
    """A rank whose KV is sent or received."""

    @property
    def address(self) -> str:
        """``host:port`` where its receiving ends are met."""

    def sending_end(self, peer: str) -> SendingEnd:
        """``peer`` names the other engine to people."""

    def receiving_end(self, peer: str) -> ReceivingEnd: ...
