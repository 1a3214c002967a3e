"""The ends of pairs at the rank of this process: each has a thread, which alone touches its transport and its staging
buffer.

A ``TransportError`` has ended the generation at this end already.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from torch import Tensor

from actors.parallel.kv_ends import Received
from actors.parallel.kv_transfer import (
    BlockGuard,
    ChunkPlace,
    KvCache,
    KvGeometry,
    Meeting,
    Staging,
    Transport,
    TransportError,
    checksum,
    receive_chunk,
    scatter_chunk,
    send_chunk,
    stage_chunk,
)

_T = TypeVar("_T")


@dataclass(eq=False, slots=True)
class ThreadWork(Generic[_T]):
    """Implements ``Work``."""

    future: Future[_T]
    _stop: threading.Event = field(default_factory=threading.Event)

    def stop(self) -> None:
        self._stop.set()


class LocalKvRank:
    """The rank of this process: implements ``KvRank``. Closing the meeting and the ends is their owner's."""

    def __init__(self, cache: KvCache, geometry: KvGeometry, meeting: Meeting) -> None:
        self.geometry = geometry
        self._cache = cache
        self._meeting = meeting

    @property
    def address(self) -> str:
        return self._meeting.address

    def sending_end(self, peer: str) -> SendingThread:
        return SendingThread(f"kv-send-{peer[:8]}", self._cache, self.geometry, self._meeting)

    def receiving_end(self, peer: str) -> ReceivingThread:
        return ReceivingThread(f"kv-recv-{peer[:8]}", self._cache, self.geometry, self._meeting)

    def close(self) -> None:
        """Ends the meeting."""
        self._meeting.close()


class _DataThread:
    def __init__(self, name: str, cache: KvCache, geometry: KvGeometry, meeting: Meeting) -> None:
        self._cache = cache
        self._meeting = meeting
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._staging = Staging(geometry)
        self._transport: Transport | None = None
        self._name = ""

    @property
    def staging_in_use(self) -> bool:
        return self._staging.in_use

    def leave(self) -> Future[None]:
        """Ends the present generation at this end: the peer's calls fail, what was staged is forgotten."""
        return self._thread.submit(self._leave)

    def close(self) -> Future[None]:
        """Leaves and ends the thread, once what it does now is done or has timed out."""
        left = self._thread.submit(self._leave)
        self._thread.shutdown(wait=False)
        return left

    def _enter(self, name: str, build: Callable[[], Transport]) -> Transport:
        if self._transport is None or name != self._name:
            self._leave()
            self._transport = build()
            self._name = name
        return self._transport

    def _leave(self) -> None:
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.close()
        self._staging.discard()


class SendingThread(_DataThread):
    """Implements ``SendingEnd``."""

    def send(self, name: str, address: str, place: ChunkPlace, guard: BlockGuard) -> ThreadWork[Received]:
        stop = threading.Event()

        def work() -> Received:
            started = time.perf_counter()
            try:
                checksums = send_chunk(
                    self._enter(name, lambda: self._meeting.connect(address, name, stop)),
                    self._staging,
                    self._cache,
                    place,
                    guard,
                )
            except TransportError:
                self._leave()
                raise
            return Received(checksums, time.perf_counter() - started)

        return ThreadWork(self._thread.submit(work), stop)

    def stage(self, place: ChunkPlace, guard: BlockGuard) -> Future[Received]:
        def work() -> Received:
            started = time.perf_counter()
            checksums = stage_chunk(self._staging, self._cache, place, guard)
            return Received(checksums, time.perf_counter() - started)

        return self._thread.submit(work)

    def piece(self, offset: int, size: int) -> Future[bytes]:
        return self._thread.submit(self._staging.piece, offset, size)

    def forget(self) -> None:
        self._staging.release()


class ReceivingThread(_DataThread):
    """Implements ``ReceivingEnd``."""

    def __init__(self, name: str, cache: KvCache, geometry: KvGeometry, meeting: Meeting) -> None:
        super().__init__(name, cache, geometry, meeting)
        self._messages: list[Tensor] = []
        self._layers = range(0)
        """Of the messages."""
        self._seconds = 0.0
        """What pieces took so far."""

    def receive(self, name: str, tokens: int, layers: range) -> ThreadWork[Received]:
        stop = threading.Event()

        def work() -> Received:
            started = time.perf_counter()
            try:
                transport = self._enter(name, lambda: self._meeting.listen(name, stop))
                self._messages, checksums = receive_chunk(transport, self._staging, tokens, layers)
                self._layers = layers
            except TransportError:
                self._leave()
                raise
            return Received(checksums, time.perf_counter() - started)

        return ThreadWork(self._thread.submit(work), stop)

    def put(self, tokens: int, layers: range, offset: int, content: bytes) -> Future[None]:
        def work() -> None:
            started = time.perf_counter()
            if offset == 0:
                self._messages, self._seconds = self._staging.take(tokens, layers), 0.0
                self._layers = layers
            self._staging.put(offset, content)
            self._seconds += time.perf_counter() - started

        return self._thread.submit(work)

    def filled(self) -> Future[Received]:
        return self._thread.submit(lambda: Received([checksum(message) for message in self._messages], self._seconds))

    def scatter(self, block_table: Sequence[int], first: int, guard: BlockGuard) -> Future[float]:
        def work() -> float:
            started = time.perf_counter()
            try:
                scatter_chunk(self._cache, self._messages, self._layers, block_table, first, guard)
            finally:
                self.forget()
            return time.perf_counter() - started

        return self._thread.submit(work)

    def forget(self) -> None:
        self._messages, self._layers = [], range(0)
        self._staging.release()
