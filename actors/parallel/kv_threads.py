"""The data thread of one end of a pair. It alone touches the pair's transport and staging buffer.

Both classes are driven by an event loop: each call runs on the thread, one at a time, and returns when it is done. A
``TransportError`` has ended the generation at this end already.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from torch import Tensor

from actors.parallel.kv_transfer import (
    BlockGuard,
    KvCache,
    KvGeometry,
    Staging,
    Transport,
    TransportError,
    receive_chunk,
    scatter_chunk,
    send_chunk,
)

_P = ParamSpec("_P")
_T = TypeVar("_T")


class _DataThread:
    def __init__(self, name: str, cache: KvCache, geometry: KvGeometry) -> None:
        self._cache = cache
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._staging = Staging(geometry)
        self._transport: Transport | None = None
        self._generation = 0

    @property
    def staging_in_use(self) -> bool:
        return self._staging.in_use

    async def leave(self) -> None:
        """Ends the present generation at this end: the peer's calls fail, what was staged is forgotten."""
        await self._run(self._leave)

    async def close(self) -> None:
        """Leaves and ends the thread, once what it does now is done or has timed out."""
        await self.leave()
        self._thread.shutdown()

    async def _run(self, work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: work(*args, **kwargs))

    def _enter(self, generation: int, build: Callable[[], Transport]) -> Transport:
        if self._transport is None or generation != self._generation:
            self._leave()
            self._transport = build()
            self._generation = generation
        return self._transport

    def _leave(self) -> None:
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.close()
        self._staging.discard()


class SendingThread(_DataThread):
    """Gathers and sends."""

    async def send(
        self,
        generation: int,
        connect: Callable[[], Transport],
        *,
        block_table: Sequence[int],
        first: int,
        tokens: int,
        guard: BlockGuard,
    ) -> tuple[list[int], float]:
        """Sends a chunk, through a transport of ``connect`` when the generation is new. See ``send_chunk``.

        Returns the CRC-32 of each message and the seconds it took.
        """

        def work() -> tuple[list[int], float]:
            started = time.perf_counter()
            try:
                checksums = send_chunk(
                    self._enter(generation, connect),
                    self._staging,
                    self._cache,
                    block_table=block_table,
                    first=first,
                    tokens=tokens,
                    guard=guard,
                )
            except TransportError:
                self._leave()
                raise
            return checksums, time.perf_counter() - started

        return await self._run(work)


class ReceivingThread(_DataThread):
    """Receives and scatters. What was received stays staged until ``scatter`` or ``forget``."""

    def __init__(self, name: str, cache: KvCache, geometry: KvGeometry) -> None:
        super().__init__(name, cache, geometry)
        self._messages: list[Tensor] = []

    async def receive(self, generation: int, listen: Callable[[], Transport], tokens: int) -> tuple[list[int], float]:
        """Receives a chunk. Returns the CRC-32 of each message and the seconds it took."""

        def work() -> tuple[list[int], float]:
            started = time.perf_counter()
            try:
                transport = self._enter(generation, listen)
                self._messages, checksums = receive_chunk(transport, self._staging, tokens)
            except TransportError:
                self._leave()
                raise
            return checksums, time.perf_counter() - started

        return await self._run(work)

    async def scatter(self, block_table: Sequence[int], first: int, guard: BlockGuard) -> float:
        """Writes what was received to its places, unless ``guard`` is shut. Returns the seconds it took."""

        def work() -> float:
            started = time.perf_counter()
            scatter_chunk(self._cache, self._messages, block_table, first, guard)
            return time.perf_counter() - started

        try:
            return await self._run(work)
        finally:
            self.forget()

    def forget(self) -> None:
        """Frees the staging buffer."""
        self._messages = []
        self._staging.release()
