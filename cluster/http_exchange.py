"""One generation request over HTTP: body in, JSON or server-sent events out, whatever protocol it is written in.

A facade says by an ``Exchange`` what its body asks for and how events are told. A stream's status is decided by the
first text or the first silence of ``KEEP_ALIVE_S``: an error by then, also one an engine refuses with, has its own HTTP
status. A later one is told as the protocol tells errors inside a stream, and the stream ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from actors.errors import InternalError, InvalidRequest, ServingError
from cluster.event_reader import EventReader, Gone
from cluster.generation import GenerationService
from cluster.openai_response import HTTP_STATUS, SSE_KEEP_ALIVE, error_body, error_headers
from cluster.trace_link import linked

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 15.0
"""Longest silence on a stream before a comment is sent."""
MAX_BODY_BYTES = 256 * 2**20
MAX_BODY_MARKS = 2**21
"""Brackets, braces and commas of a body, which bound the values in it: parsing holds up the process for up to a second
per million. Base64 has none.
"""
CLIENT_CLOSED_REQUEST = 499

E = TypeVar("E")


class Exchange(Protocol[E]):
    """A request of one protocol. ``E`` is what it reads, events of one or of several generations."""

    @property
    def stream(self) -> bool: ...

    def events(self, service: GenerationService) -> AsyncIterator[E]: ...

    def begins(self, event: E) -> bool:
        """Whether the event comes before any text."""

    def is_last(self, event: E) -> bool: ...

    def add(self, event: E) -> None:
        """Takes one event of a reply that is told as a whole."""

    def whole(self) -> dict[str, Any]:
        """The reply after the last event."""

    def frames(self, event: E) -> Iterable[bytes]:
        """Tells one event of a stream."""

    def end(self) -> bytes:
        """What follows the last event of a stream."""

    def failed(self, error: ServingError) -> bytes:
        """Tells an error inside a stream, which ends there."""

    def name_field(self, error: ServingError) -> None:
        """Makes an error of a later stage name its field as this client did."""


async def answer_exchange(
    service: GenerationService, request: Request, read: Callable[[bytes], Exchange[Any]]
) -> Response:
    """Reads the body, generates, and answers whole or with a stream."""
    trace = trace_id(request)

    async def answer() -> Response:
        try:
            exchange = read(await read_body(request))
        except ServingError as error:
            service.note_refused(error)
            raise
        gone = asyncio.ensure_future(_disconnected(request.receive))
        try:
            reader = EventReader(exchange.events(service), gone=gone, last=exchange.is_last)
            try:
                if not exchange.stream:
                    return JSONResponse(await _whole(reader, exchange))
                head = [await reader.next(KEEP_ALIVE_S)]
                while head[-1] is not None and exchange.begins(head[-1]):
                    head.append(await reader.next(KEEP_ALIVE_S))
            except BaseException as error:
                await reader.close()
                if isinstance(error, ServingError):
                    exchange.name_field(error)
                raise
            return EventStream(reader, exchange, head, trace)
        finally:
            gone.cancel()

    with linked(request.headers.items()) as link:
        response = await guarded(answer(), trace)
    response.headers.update(link.goes)
    return response


class EventStream(Response, Generic[E]):
    """Server-sent events of one request. Owns the reader: a client that leaves cancels the request."""

    media_type = "text/event-stream"

    def __init__(self, reader: EventReader[E], exchange: Exchange[E], head: Sequence[E | None], trace: str) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._reader = reader
        self._exchange = exchange
        self._head = head
        self._trace = trace

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.ensure_future(_disconnected(receive))
        self._reader.watch(gone)
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async with contextlib.aclosing(self._frames()) as frames:
                async for frame in frames:
                    await send({"type": "http.response.body", "body": frame, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except (Gone, OSError):
            log.info("request %s: %d client left", self._trace, CLIENT_CLOSED_REQUEST)
        finally:
            gone.cancel()
            await self._reader.close()

    async def _frames(self) -> AsyncGenerator[bytes, None]:
        try:
            async for frame in self._reply():
                yield frame
            if end := self._exchange.end():
                yield end
        except ServingError as error:
            log.info("request %s: %s after the stream began: %r", self._trace, error.status, error.message)
            self._exchange.name_field(error)
            yield self._exchange.failed(error)
        except Gone:
            raise
        except Exception:
            log.exception("request %s failed after the stream began", self._trace)
            yield self._exchange.failed(InternalError("internal error"))

    async def _reply(self) -> AsyncIterator[bytes]:
        async for event in self._events():
            if event is None:
                yield SSE_KEEP_ALIVE
                continue
            for frame in self._exchange.frames(event):
                yield frame
            if self._exchange.is_last(event):
                return

    async def _events(self) -> AsyncIterator[E | None]:
        for event in self._head:
            yield event
        while True:
            yield await self._reader.next(KEEP_ALIVE_S)


async def _whole(reader: EventReader[E], exchange: Exchange[E]) -> dict[str, Any]:
    while True:
        event = await reader.next()
        assert event is not None
        exchange.add(event)
        if exchange.is_last(event):
            await reader.close()
            return exchange.whole()


async def guarded(answer: Awaitable[Response], trace: str) -> Response:
    """Turns every way to fail into a response."""
    try:
        return await answer
    except ServingError as error:
        log.info("request %s: %s %r", trace, error.status, error.message)
        return JSONResponse(error_body(error), HTTP_STATUS[error.status], error_headers(error))
    except Gone:
        log.info("request %s: %d client left", trace, CLIENT_CLOSED_REQUEST)
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    except Exception:
        log.exception("request %s failed", trace)
        return JSONResponse(error_body(InternalError("internal error")), 500)


def trace_id(request: Request) -> str:
    """Names the exchange in our log, also where no request was admitted. Serve assigns it and tells the client."""
    return request.headers.get("x-request-id", "")[:128] or uuid.uuid4().hex


async def read_body(request: Request) -> bytes:
    """Raises InvalidRequest over ``MAX_BODY_BYTES`` or ``MAX_BODY_MARKS`` and Gone when the client left."""
    body = bytearray()
    marks = 0
    try:
        async for piece in request.stream():
            body += piece
            marks += sum(piece.count(mark) for mark in (b"[", b"{", b","))
            if len(body) > MAX_BODY_BYTES:
                raise _too_large(f"{MAX_BODY_BYTES} bytes")
            if marks > MAX_BODY_MARKS:
                raise _too_large(f"{MAX_BODY_MARKS} brackets, braces and commas")
    except ClientDisconnect:
        raise Gone from None
    return bytes(body)


def _too_large(limit: str) -> InvalidRequest:
    return InvalidRequest(f"the body is over the limit of {limit}", reason="BODY_TOO_LARGE")


async def _disconnected(receive: Receive) -> None:
    """Returns once the client has left, which a broken connection also means. Only after the body was read."""
    try:
        while (await receive())["type"] != "http.disconnect":
            pass
    except Exception:
        log.warning("lost sight of a client", exc_info=True)
