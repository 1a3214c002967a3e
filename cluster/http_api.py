"""The OpenAI-compatible HTTP facade: requests in, JSON or server-sent events out.

Handlers take the service and the request, so that any FastAPI or Starlette application can mount them. A stream's
status is decided by the first text or the first silence of ``KEEP_ALIVE_S``: an error by then, also one an engine
refuses with, has its own HTTP status; a later one is sent as an ``{"error": ...}`` event, which OpenAI's clients raise,
and the stream ends without ``[DONE]``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from actors.errors import InternalError, InvalidRequest, NotFound, ServingError
from cluster.event_reader import EventReader, Gone
from cluster.generation import (
    ChoiceFinished,
    Delta,
    Event,
    Finished,
    GenerateCall,
    GenerationService,
    PromptScored,
    Started,
)
from cluster.openai_request import ChatRequest, client_field, parse_chat_request, spelling, to_call
from cluster.openai_response import (
    HTTP_STATUS,
    SSE_DONE,
    SSE_KEEP_ALIVE,
    Chunks,
    Completion,
    error_body,
    error_headers,
    error_object,
    model_body,
    sse,
)
from cluster.playground.routes import install_playground

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 15.0
"""Longest silence on a stream before a comment is sent."""
MAX_BODY_BYTES = 256 * 2**20
CLIENT_CLOSED_REQUEST = 499

Handler = Callable[[GenerationService, Request], Awaitable[Response]]


async def chat_completions(service: GenerationService, request: Request) -> Response:
    """POST /v1/chat/completions."""
    trace = _trace_id(request)

    async def answer() -> Response:
        chat = parse_chat_request(await _read_body(request))
        call = to_call(chat)
        gone = asyncio.ensure_future(_disconnected(request.receive))
        try:
            reader = EventReader(service.generate(call), gone=gone)
            try:
                if not chat.stream:
                    return JSONResponse(await _whole(reader, call))
                head = [await reader.next(KEEP_ALIVE_S)]
                if isinstance(head[0], Started):
                    head.append(await reader.next(KEEP_ALIVE_S))
            except BaseException as error:
                await reader.close()
                if isinstance(error, ServingError):
                    _name_field(error, chat)
                raise
            return EventStream(reader, chat, call, head, trace)
        finally:
            gone.cancel()

    return await _guarded(answer(), trace)


async def list_models(service: GenerationService, request: Request) -> Response:
    """GET /v1/models."""

    async def answer() -> Response:
        return JSONResponse({"object": "list", "data": [model_body(card) for card in service.models()]})

    return await _guarded(answer(), _trace_id(request))


async def get_model(service: GenerationService, request: Request) -> Response:
    """GET /v1/models/{model_id}."""

    async def answer() -> Response:
        wanted = request.path_params["model_id"]
        for card in service.models():
            if card.name == wanted:
                return JSONResponse(model_body(card))
        raise NotFound(f"the model {wanted!r} does not exist", field="model")

    return await _guarded(answer(), _trace_id(request))


async def health(service: GenerationService, request: Request) -> Response:
    """GET /health: this process answers."""
    return JSONResponse({"status": "alive"})


async def ready(service: GenerationService, request: Request) -> Response:
    """GET /ready: 200 when a request could be served now, else 503 with what is missing."""

    async def answer() -> Response:
        missing = await service.not_ready()
        if missing is None:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "not ready", "missing": missing}, status_code=503)

    return await _guarded(answer(), _trace_id(request))


def build_api(get_service: Callable[[], GenerationService]) -> FastAPI:
    """An application with every route. ``get_service`` is called once per request."""
    app = FastAPI(title="ernie-serving", docs_url=None, redoc_url=None, openapi_url=None)

    def route(method: str, path: str, handler: Handler) -> None:
        async def endpoint(request: Request) -> Response:
            return await handler(get_service(), request)

        app.add_route(path, endpoint, methods=[method])

    route("POST", "/v1/chat/completions", chat_completions)
    route("GET", "/v1/models", list_models)
    route("GET", "/v1/models/{model_id:path}", get_model)
    route("GET", "/health", health)
    route("GET", "/ready", ready)
    install_playground(app)
    install_error_handlers(app)
    return app


def install_error_handlers(app: FastAPI) -> None:
    """Gives unknown routes and methods OpenAI's error body too."""

    async def routing_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        body = error_object(f"{request.method} {request.url.path}: {error.detail}", "invalid_request_error", None, None)
        return JSONResponse(body, status_code=error.status_code, headers=error.headers)

    app.add_exception_handler(HTTPException, routing_error)


class EventStream(Response):
    """Server-sent events of one request. Owns the reader: a client that leaves cancels the request."""

    media_type = "text/event-stream"

    def __init__(
        self, reader: EventReader, chat: ChatRequest, call: GenerateCall, head: Sequence[Event | None], trace: str
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._reader = reader
        self._chat = chat
        self._call = call
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
            yield SSE_DONE
        except ServingError as error:
            log.info("request %s: %s after the stream began: %r", self._trace, error.status, error.message)
            _name_field(error, self._chat)
            yield sse(error_body(error))
        except (Gone, OSError):
            raise
        except Exception:
            log.exception("request %s failed after the stream began", self._trace)
            yield sse(error_body(InternalError("internal error")))

    async def _reply(self) -> AsyncIterator[bytes]:
        chunks: Chunks | None = None
        async for event in self._events():
            bodies: list[dict[str, Any]] = []
            match event:
                case None:
                    yield SSE_KEEP_ALIVE
                case Started():
                    chunks = Chunks(int(time.time()), self._call, event, usage=self._chat.wants_stream_usage)
                    bodies = chunks.begin()
                case PromptScored() | Delta() | ChoiceFinished() | Finished() if chunks is not None:
                    bodies = chunks.of(event)
                case _:
                    raise InternalError("the request did not begin with its first event")
            for body in bodies:
                yield sse(body)
            if isinstance(event, Finished):
                return

    async def _events(self) -> AsyncIterator[Event | None]:
        for event in self._head:
            yield event
        while True:
            yield await self._reader.next(KEEP_ALIVE_S)


async def _whole(reader: EventReader, call: GenerateCall) -> dict[str, Any]:
    completion = Completion(int(time.time()), call)
    started: Started | None = None
    while True:
        match await reader.next():
            case Started() as event:
                started = event
            case PromptScored() | Delta() | ChoiceFinished() as event:
                completion.add(event)
            case Finished() as event if started is not None:
                await reader.close()
                return completion.body(started, event)
            case _:
                raise InternalError("the request did not begin with its first event")


def _name_field(error: ServingError, chat: ChatRequest) -> None:
    """Makes an error of a later stage name its field as this client did."""
    if error.field is not None:
        error.field = client_field(error.field, spelling(chat))


async def _guarded(answer: Awaitable[Response], trace: str) -> Response:
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


def _trace_id(request: Request) -> str:
    """Names the exchange in our log, also where no request was admitted. Serve assigns it and tells the client."""
    return request.headers.get("x-request-id", "")[:128] or uuid.uuid4().hex


async def _read_body(request: Request) -> bytes:
    body = bytearray()
    try:
        async for piece in request.stream():
            body += piece
            if len(body) > MAX_BODY_BYTES:
                raise InvalidRequest(f"the body is over the limit of {MAX_BODY_BYTES} bytes", reason="BODY_TOO_LARGE")
    except ClientDisconnect:
        raise Gone from None
    return bytes(body)


async def _disconnected(receive: Receive) -> None:
    """Returns once the client has left, which a broken connection also means. Only after the body was read."""
    try:
        while (await receive())["type"] != "http.disconnect":
            pass
    except Exception:
        log.warning("lost sight of a client", exc_info=True)
