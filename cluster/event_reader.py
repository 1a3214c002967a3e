"""Reads the events of one request with a bound on every wait."""

from __future__ import annotations

import asyncio
import collections
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from types import TracebackType
from typing import Any, Generic, TypeVar, cast

from actors.errors import InternalError

READ_AHEAD = 64
"""Events held for a client that reads slowly before the request itself waits."""


E = TypeVar("E")


class Gone(Exception):
    """The client left."""


class EventReader(Generic[E]):
    """Owns the iterator of one request and runs it in one task, so that a wait may time out without losing an event.

    ``last`` tells the event that ends the request: nothing is asked for behind it. Leaving the context closes the
    iterator, which cancels the request unless it is over. One reader at a time.
    """

    def __init__(
        self, events: AsyncIterator[E], *, last: Callable[[E], bool], gone: asyncio.Future[Any] | None = None
    ) -> None:
        self._events = cast("AsyncGenerator[E, None]", events)
        self._last = last
        self._ready: collections.deque[E] = collections.deque()
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

    async def next(self, timeout_s: float | None = None) -> E | None:
        """Returns the next event, or None when there was none for ``timeout_s``.

        Raises Gone, whatever the service raised, and InternalError when the service ended without its last event.
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
                if self._last(event):
                    return

    async def __aenter__(self) -> EventReader[E]:
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
