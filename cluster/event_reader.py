"""Reads the events of one request with a bound on every wait."""

from __future__ import annotations

import asyncio
import collections
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from types import TracebackType
from typing import Any, cast

from actors.errors import InternalError
from cluster.generation import Event, Finished

READ_AHEAD = 64
"""Events held for a client that reads slowly before the request itself waits."""


class Gone(Exception):
    """The client left."""


class EventReader:
    """Owns the iterator of one request and runs it in one task, so that a wait may time out without losing an event.

    Leaving the context closes the iterator, which cancels the request unless it is over. One reader at a time.
    """

    def __init__(self, events: AsyncIterator[Event], *, gone: asyncio.Future[Any] | None = None) -> None:
        self._events = cast("AsyncGenerator[Event, None]", events)
        self._ready: collections.deque[Event] = collections.deque()
        self._room = asyncio.Semaphore(READ_AHEAD)
        self._wake = asyncio.Event()
        self._gone: asyncio.Future[Any] | None = None
        if gone is not None:
            self.watch(gone)
        self._task = asyncio.ensure_future(self._run())
        self._task.add_done_callback(lambda _: self._wake.set())

    def watch(self, gone: asyncio.Future[Any]) -> None:
        """Makes ``next`` raise Gone once ``gone`` is done. Replaces an earlier one."""
        self._gone = gone
        gone.add_done_callback(lambda _: self._wake.set())

    async def next(self, timeout_s: float | None = None) -> Event | None:
        """Returns the next event, or None when there was none for ``timeout_s``.

        Raises Gone, whatever the service raised, and InternalError when the service ended without ``Finished``.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not (self._ready or self._task.done() or self._has_left()):
                    self._wake.clear()
                    await self._wake.wait()
        if self._has_left():
            raise Gone
        if self._ready:
            self._room.release()
            return self._ready.popleft()
        if self._task.done():
            self._task.result()
            raise InternalError("the request ended without a last event")
        return None

    def _has_left(self) -> bool:
        return self._gone is not None and self._gone.done() and not self._gone.cancelled()

    async def _run(self) -> None:
        async with contextlib.aclosing(self._events):
            async for event in self._events:
                await self._room.acquire()
                self._ready.append(event)
                self._wake.set()
                if isinstance(event, Finished):
                    return

    async def __aenter__(self) -> EventReader:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancels what still runs and waits until the service has cleaned up. May be called twice."""
        self._task.cancel()
        await asyncio.wait({self._task})
        if not self._task.cancelled():
            self._task.exception()
