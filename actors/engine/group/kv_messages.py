"""What a leader orders of the KV of another rank, and that rank's answers. Only their order on the connection, among
themselves and to the parts of steps, makes the blocks safe: see ``RemoteKvRank``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from actors.parallel.kv_transfer import ChunkPlace


@dataclass(frozen=True, slots=True)
class MakeEnd:
    """A thread and a staging buffer for one end of a pair. No answer."""

    end: int
    """No other end of the rank ever has it."""
    sends: bool
    peer: str


@dataclass(frozen=True, slots=True)
class CloseEnd:
    number: int
    end: int


@dataclass(frozen=True, slots=True)
class SendChunk:
    """See ``SendingEnd.send``."""

    number: int
    """Of the order, for the answer."""
    end: int
    name: str
    address: str
    place: ChunkPlace
    guard: int | None
    """Number of the guard of the blocks; None if it is shut: what is sent was promised, and nobody will use it."""


@dataclass(frozen=True, slots=True)
class StageChunk:
    """See ``SendingEnd.stage``."""

    number: int
    end: int
    place: ChunkPlace
    guard: int | None
    """As above."""


@dataclass(frozen=True, slots=True)
class ReadPiece:
    """See ``SendingEnd.piece``."""

    number: int
    end: int
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class PutPiece:
    """See ``ReceivingEnd.put``."""

    number: int
    end: int
    tokens: int
    layers: range
    offset: int
    content: bytes


@dataclass(frozen=True, slots=True)
class AskFilled:
    """See ``ReceivingEnd.filled``."""

    number: int
    end: int


@dataclass(frozen=True, slots=True)
class ReceiveChunk:
    """See ``ReceivingEnd.receive``."""

    number: int
    end: int
    name: str
    tokens: int
    layers: range


@dataclass(frozen=True, slots=True)
class ScatterChunk:
    """See ``ReceivingEnd.scatter``."""

    number: int
    end: int
    block_table: tuple[int, ...]
    first: int
    guard: int


@dataclass(frozen=True, slots=True)
class ForgetChunk:
    """No answer."""

    end: int


@dataclass(frozen=True, slots=True)
class LeaveGeneration:
    number: int
    end: int


@dataclass(frozen=True, slots=True)
class StopWork:
    """Ends the waiting in the order of that number, if it is still under way. No answer."""

    number: int


@dataclass(frozen=True, slots=True)
class ShutGuard:
    """Last order that names the guard. Done before the next message is read. No answer."""

    guard: int


SendOrder = SendChunk | StageChunk | ReadPiece
ReceiveOrder = ReceiveChunk | PutPiece | AskFilled | ScatterChunk | LeaveGeneration
KvOrder = MakeEnd | CloseEnd | SendOrder | ReceiveOrder | ForgetChunk | StopWork | ShutGuard


@dataclass(frozen=True, slots=True)
class KvAnswer:
    """Rank: the order of that number is done."""

    number: int
    value: Any = None
    failure: str | None = None
    broken: bool = False
    """The failure is of the data path (TransportError)."""
