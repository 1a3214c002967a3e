"""Moves the KV of one sequence between two engines: what both ends agree on, and the work of a pair's data threads.

Legend: T tokens of a chunk, H key-value heads, d head width.

A *chunk* is the tokens one step computed of a sequence, in all layers or some that follow each other. A *message* is
one layer of a chunk, ``kv_T2Hd`` as bytes, so a chunk costs ``T * layers * 2 * H * d * itemsize`` bytes on the wire.
Messages are gathered into (and scattered out of) a staging buffer, so that neither the checksum nor the wire ever
sees live cache memory. Order is strict and there are no tags: one thread per end and pair; both ends complete the
list of messages once the receiver accepted a chunk. Where the data path does not work, the bytes of the staging
buffer travel otherwise, in *pieces*.

A *generation* is one build of the data path of a pair. Any failure on the data path ends the generation for both
ends; chunks without an acknowledgement go again through the next one.
"""

from __future__ import annotations

import itertools
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class TransportError(Exception):
    """The data path of a pair failed: timeout, reset or dead peer. The generation is lost for both ends."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KvTransferConfig:
    """Bounds of a transfer. Seconds unless named otherwise."""

    heartbeat_s: float = 0.5
    """Well below what ``lost_after_s`` leaves of a pause of 2 s, which is no loss."""
    lost_after_s: float = 3.0
    """Silence of a peer on the control stream that means it is lost."""
    data_timeout_s: float = 5.0
    """Longest wait for one message on the data path."""
    join_timeout_s: float = 5.0
    """Longest wait for the peer while a generation is built."""
    resend_limit: int = 3
    """Times one chunk goes again because its bytes did not verify."""
    break_limit: int = 2
    """Generations lost without an acknowledged chunk between them, after which chunks go over the control stream."""
    streaming_s: float = 60.0
    """For so long; then the data path is tried again, and given up at the first failure."""
    pair_limit: int = 16
    """Pairs a sender keeps open; the longest idle one closes first. Busy pairs are never closed for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KvGeometry:
    """Shape of the cache, which fixes the shape of every message."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    def message_bytes(self, tokens: int) -> int:
        """Bytes of one layer of a chunk of ``tokens``."""
        return tokens * 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    def chunk_bytes(self, tokens: int, layers: range | None = None) -> int:
        """Bytes of a chunk of ``tokens`` on the wire, of all layers unless given."""
        return (self.num_layers if layers is None else len(layers)) * self.message_bytes(tokens)


class ChunkPlace(NamedTuple):
    """Where a chunk lies in the cache of a rank: ``tokens`` tokens of a sequence from ``first`` on, in some layers."""

    block_table: Sequence[int]
    """Of the sequence."""
    first: int
    tokens: int
    layers: range


class KvCache(Protocol):
    """Cache of one rank. Called from the data threads, beside the step thread; blocks never overlap between them."""

    def read_tokens(self, layer: int, block_table: Sequence[int], first: int, count: int, /) -> Tensor:
        """Returns keys and values of ``count`` tokens from ``first`` as ``kv_T2Hd``, cache dtype."""

    def write_tokens(self, layer: int, block_table: Sequence[int], first: int, kv_T2Hd: Tensor, /) -> None:
        """Writes the tokens from ``first`` on."""


class Transport(Protocol):
    """One generation of a pair of ranks, one way. Used by one thread. Every call may raise ``TransportError``."""

    def send(self, tensors: Iterable[Tensor]) -> None:
        """Sends uint8 tensors in order, each posted as it is yielded. Returns when all may be overwritten."""

    def recv(self, buffers: Sequence[Tensor], arrived: Callable[[int], None]) -> None:
        """Fills uint8 ``buffers`` in order; calls ``arrived(position)`` as each is complete. Returns when all are."""

    def close(self) -> None:
        """Ends the generation: the peer's calls fail. Idempotent."""


class Meeting(Protocol):
    """Where the generations of this rank's pairs are built. Used from any thread."""

    @property
    def address(self) -> str:
        """``host:port`` for senders to come to; listens from the first use on."""

    def listen(self, name: str, stop: threading.Event) -> Transport:
        """Builds the receiving end. Raises ``TransportError`` on timeout, or soon after ``stop`` is set."""

    def connect(self, address: str, name: str, stop: threading.Event) -> Transport:
        """Builds the sending end at a receiver's address. Raises ``TransportError`` as above."""

    def close(self) -> None:
        """Stops listening. Transports that are built go on."""


def pair_name(prefill_incarnation: str, decode_incarnation: str, generation: int) -> str:
    """Name both ends build a generation under. Never used twice, as generations only grow."""
    return f"{prefill_incarnation}>{decode_incarnation}#{generation}"


_guard_numbers = itertools.count(1)


class BlockGuard:
    """Keeps data threads off the blocks of one sequence once it has given them up.

    Held for one layer of one chunk at a time, so ``shut`` waits for one copy at most.
    """

    def __init__(self) -> None:
        self.number = next(_guard_numbers)
        """No other guard of this process has it."""
        self._lock = threading.Lock()
        self._open = True
        self._borrowers: dict[object, Callable[[], None]] = {}

    def use(self, copy: Callable[[], None]) -> bool:
        """Runs ``copy`` if the blocks are still the sequence's; says whether it did."""
        with self._lock:
            if not self._open:
                return False
            copy()
            return True

    def lend(self, borrower: object, order: Callable[[], None], shut: Callable[[], None]) -> bool:
        """``use`` for an ``order`` upon which ``borrower`` copies where this guard is not. ``shut`` is called once,
        after the last order, and must see to it that no copy runs when the blocks are used again.
        """
        with self._lock:
            if not self._open:
                return False
            self._borrowers.setdefault(borrower, shut)
            order()
            return True

    def shut(self) -> None:
        """After this returns no ``copy`` runs or will run, and every borrower has been told. Idempotent."""
        self._open = False  # Before the lock, which is not fair: a data thread could take it for layer after layer.
        with self._lock:
            borrowers, self._borrowers = self._borrowers, {}
            for shut in borrowers.values():
                shut()


class Staging:
    """One buffer of one data thread, grown to the largest chunk it met."""

    def __init__(self, geometry: KvGeometry) -> None:
        self._geometry = geometry
        self._buffer = torch.empty(0, dtype=torch.uint8, device=geometry.device)
        self.in_use = False

    def take(self, tokens: int, layers: range) -> list[Tensor]:
        """One ``kv_T2Hd`` for each layer. They overlap those of the last ``take``, which must have been released."""
        if self.in_use:
            raise ValueError("staging buffer is in use")
        geometry = self._geometry
        size, whole = geometry.message_bytes(tokens), geometry.chunk_bytes(tokens, layers)
        if self._buffer.numel() < whole:
            self._buffer = torch.empty(whole, dtype=torch.uint8, device=geometry.device)
        self.in_use = True
        shape = (tokens, 2, geometry.num_kv_heads, geometry.head_dim)
        return [
            self._buffer[place * size : (place + 1) * size].view(geometry.dtype).view(shape)
            for place in range(len(layers))
        ]

    def piece(self, offset: int, size: int) -> bytes:
        """Bytes of what was taken."""
        return self._buffer[offset : offset + size].cpu().numpy().tobytes()

    @torch.inference_mode()
    def put(self, offset: int, content: bytes) -> None:
        """Fills in bytes of what was taken."""
        self._buffer[offset : offset + len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)

    def release(self) -> None:
        self.in_use = False

    def discard(self) -> None:
        """Releases and forgets the buffer: a broken generation may still own pieces of it."""
        self._buffer = torch.empty(0, dtype=torch.uint8, device=self._geometry.device)
        self.in_use = False


def as_bytes(tensor: Tensor) -> Tensor:
    """The same memory as a flat uint8 tensor. Needs a contiguous tensor."""
    return tensor.view(-1).view(torch.uint8)


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a contiguous tensor's bytes; copied to the host first where it is not there."""
    return zlib.crc32(as_bytes(tensor).cpu().numpy().data)


@torch.inference_mode()
def send_chunk(
    transport: Transport, staging: Staging, cache: KvCache, place: ChunkPlace, guard: BlockGuard
) -> list[int]:
    """Gathers and sends a chunk layer by layer, one on the wire while the next is gathered.

    Returns the CRC-32 of each message. When ``guard`` is shut the rest of the list goes out as it lies in the buffer:
    the receiver has been promised the bytes and has been told not to use them.
    """
    checksums: list[int] = []
    try:
        transport.send(_gathered(staging, cache, place, guard, checksums))
    except BaseException:
        staging.discard()
        raise
    staging.release()
    return checksums


@torch.inference_mode()
def stage_chunk(staging: Staging, cache: KvCache, place: ChunkPlace, guard: BlockGuard) -> list[int]:
    """Gathers a chunk into ``staging``, which stays taken. Returns the CRC-32 of each message. ``guard`` as above."""
    checksums: list[int] = []
    try:
        for _message in _gathered(staging, cache, place, guard, checksums):
            pass
    except BaseException:
        staging.discard()
        raise
    return checksums


def _gathered(
    staging: Staging, cache: KvCache, place: ChunkPlace, guard: BlockGuard, checksums: list[int]
) -> Iterator[Tensor]:
    block_table, first, tokens, layers = place
    for layer, kv_T2Hd in zip(layers, staging.take(tokens, layers), strict=True):

        def copy(layer: int = layer, into: Tensor = kv_T2Hd) -> None:
            into.copy_(cache.read_tokens(layer, block_table, first, tokens))
            _finish_copies(into.device)

        guard.use(copy)
        checksums.append(checksum(kv_T2Hd))
        yield as_bytes(kv_T2Hd)


@torch.inference_mode()
def receive_chunk(transport: Transport, staging: Staging, tokens: int, layers: range) -> tuple[list[Tensor], list[int]]:
    """Receives a chunk into ``staging``, which stays taken. Returns its messages and the CRC-32 of each."""
    messages = staging.take(tokens, layers)
    checksums = [0] * len(messages)

    def arrived(position: int) -> None:
        checksums[position] = checksum(messages[position])

    try:
        transport.recv([as_bytes(message) for message in messages], arrived)
    except BaseException:
        staging.discard()
        raise
    return messages, checksums


@torch.inference_mode()
def scatter_chunk(
    cache: KvCache,
    messages: Sequence[Tensor],
    layers: range,
    block_table: Sequence[int],
    first: int,
    guard: BlockGuard,
) -> bool:
    """Writes verified messages to their places. False when the sequence gave its blocks up before the end."""
    for layer, kv_T2Hd in zip(layers, messages, strict=True):

        def copy(layer: int = layer, kv_T2Hd: Tensor = kv_T2Hd) -> None:
            cache.write_tokens(layer, block_table, first, kv_T2Hd)
            _finish_copies(kv_T2Hd.device)

        if not guard.use(copy):
            return False
    return True


def _finish_copies(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
