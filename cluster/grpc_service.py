"""The gRPC facade: ``ernie_serving.v1.InferenceService`` and ``grpc.health.v1.Health`` as methods for an ingress class.

How Serve's proxies treat a failure decides the form. An exception reaches the client with its code and details only
(with its traceback, if no code was set); trailing metadata is taken over only together with a result. So a failing
method sets code, details and trailing metadata on the context and *returns*: gRPC drops the message of a unary call
whose status is not OK, and a stream sends one response without an event, which the protocol asks clients to skip.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Protocol, TypeVar

from google.rpc import status_pb2  # type: ignore[import-untyped]
from grpc import StatusCode
from grpc_health.v1 import health_pb2  # type: ignore[import-untyped]

from actors.errors import InternalError, InvalidRequest, NotFound, ServingError
from cluster.event_reader import EventReader
from cluster.generation import Event, Finished, GenerateCall, GenerationService, Started, is_last
from cluster.grpc_request import count_call, generate_call
from cluster.grpc_response import STATUS_CODE, model, status, stream_response, whole_response
from cluster.request_checks import bare_name
from cluster.trace_link import TraceLink, linked
from ernie_serving.v1 import inference_pb2

log = logging.getLogger(__name__)

SERVICE_NAME = "ernie_serving.v1.InferenceService"
DETAILS_KEY = "grpc-status-details-bin"
KEEP_ALIVE_S = 15.0
"""Longest silence on a stream before a response without an event is sent."""

Response = TypeVar("Response")


class ServeContext(Protocol):
    """The part of Serve's ``RayServegRPCContext`` used here."""

    def invocation_metadata(self) -> Sequence[tuple[str, str | bytes]] | None: ...

    def set_code(self, code: StatusCode) -> None: ...

    def set_details(self, details: str) -> None: ...

    def set_trailing_metadata(self, trailing_metadata: list[tuple[str, str | bytes]]) -> None: ...


class InferenceServicer:
    """Methods are named after RPCs, as Serve's proxy calls them; their context must be named ``grpc_context``."""

    router: GenerationService
    watch_interval_s: float = 1.0

    async def Generate(
        self, request: inference_pb2.GenerateRequest, grpc_context: ServeContext
    ) -> inference_pb2.GenerateResponse:
        """Generates a whole reply."""
        return await _unary(self._generate(request, grpc_context), inference_pb2.GenerateResponse(), grpc_context)

    async def _generate(
        self, request: inference_pb2.GenerateRequest, context: ServeContext
    ) -> inference_pb2.GenerateResponse:
        call = self._read(request)
        events: list[Event] = []
        reader, link = self._begin(call, context)
        async with reader:
            while not (events and isinstance(events[-1], Finished)):
                event = await reader.next()
                assert event is not None
                events.append(event)
        if not isinstance(events[0], Started):
            raise InternalError("the request did not begin with its first event")
        _tell(link, context)
        return whole_response(call.n, events)

    async def StreamGenerate(
        self, request: inference_pb2.StreamGenerateRequest, grpc_context: ServeContext
    ) -> AsyncIterator[inference_pb2.StreamGenerateResponse]:
        """Generates a reply and streams it."""
        try:
            call = self._read(request.request if request.HasField("request") else None)
            reader, link = self._begin(call, grpc_context)
            async with reader:
                event = None
                while not isinstance(event, Finished):
                    event = await reader.next(KEEP_ALIVE_S)
                    _tell(link, grpc_context)
                    yield inference_pb2.StreamGenerateResponse() if event is None else stream_response(event)
            return
        except Exception as error:
            _report(error, grpc_context)
        yield inference_pb2.StreamGenerateResponse()

    def _read(self, request: inference_pb2.GenerateRequest | None) -> GenerateCall:
        try:
            if request is None:
                raise InvalidRequest("request is required", field="request")
            return generate_call(request)
        except ServingError as error:
            self.router.note_refused(error)
            raise

    def _begin(self, call: GenerateCall, context: ServeContext) -> tuple[EventReader[Event], TraceLink]:
        texts = ((name, value) for name, value in context.invocation_metadata() or () if isinstance(value, str))
        with linked(texts) as link:
            return EventReader(self.router.generate(call), last=is_last), link

    async def CancelGeneration(
        self, request: inference_pb2.CancelGenerationRequest, grpc_context: ServeContext
    ) -> inference_pb2.CancelGenerationResponse:
        """Stops a generation from another connection."""
        response = inference_pb2.CancelGenerationResponse()

        async def answer() -> inference_pb2.CancelGenerationResponse:
            name = bare_name(request.request_id)
            if not name:
                raise InvalidRequest("request_id is required", field="request_id")
            await self.router.cancel(name)
            return response

        return await _unary(answer(), response, grpc_context)

    async def CountTokens(
        self, request: inference_pb2.CountTokensRequest, grpc_context: ServeContext
    ) -> inference_pb2.CountTokensResponse:
        """Counts the tokens a request would use."""

        async def answer() -> inference_pb2.CountTokensResponse:
            prompt = await self.router.tokenize(count_call(request))
            return inference_pb2.CountTokensResponse(token_count=len(prompt.ids), media_token_count=prompt.media_tokens)

        return await _unary(answer(), inference_pb2.CountTokensResponse(), grpc_context)

    async def GetModel(
        self, request: inference_pb2.GetModelRequest, grpc_context: ServeContext
    ) -> inference_pb2.GetModelResponse:
        """Gets a served model."""

        async def answer() -> inference_pb2.GetModelResponse:
            for card in self.router.models():
                if card.name == request.name:
                    return inference_pb2.GetModelResponse(model=model(card))
            raise NotFound(f"the model {request.name!r} does not exist", field="name")

        return await _unary(answer(), inference_pb2.GetModelResponse(), grpc_context)

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, grpc_context: ServeContext
    ) -> inference_pb2.ListModelsResponse:
        """Lists served models, a page at a time. A page token is the position of the next model."""

        async def answer() -> inference_pb2.ListModelsResponse:
            cards = self.router.models()
            if request.page_size < 0:
                raise InvalidRequest(f"page_size must not be negative, it is {request.page_size}", field="page_size")
            token = request.page_token
            if token and not (token.isascii() and token.isdigit() and len(token) < 10):
                raise InvalidRequest("page_token is not one this service gave out", field="page_token")
            begin = int(token or 0)
            end = begin + request.page_size if request.page_size else len(cards)
            return inference_pb2.ListModelsResponse(
                models=[model(card) for card in cards[begin:end]],
                next_page_token=str(end) if end < len(cards) else "",
            )

        return await _unary(answer(), inference_pb2.ListModelsResponse(), grpc_context)

    async def Check(
        self, request: health_pb2.HealthCheckRequest, grpc_context: ServeContext
    ) -> health_pb2.HealthCheckResponse:
        """grpc.health.v1: SERVING when a request could be served now."""

        async def answer() -> health_pb2.HealthCheckResponse:
            current = await self._health(request.service)
            if current is health_pb2.HealthCheckResponse.SERVICE_UNKNOWN:
                raise NotFound(f"no service {request.service!r}", reason="SERVICE_UNKNOWN", field="service")
            return health_pb2.HealthCheckResponse(status=current)

        return await _unary(answer(), health_pb2.HealthCheckResponse(), grpc_context)

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, grpc_context: ServeContext
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """grpc.health.v1: the present status, then every change until the client leaves."""
        told: health_pb2.HealthCheckResponse.ServingStatus | None = None
        while True:
            try:
                current = await self._health(request.service)
            except Exception:
                log.exception("cannot tell whether the service is ready")
                current = health_pb2.HealthCheckResponse.NOT_SERVING
            if current != told:
                yield health_pb2.HealthCheckResponse(status=current)
                told = current
            await asyncio.sleep(self.watch_interval_s)

    async def _health(self, service: str) -> health_pb2.HealthCheckResponse.ServingStatus:
        if service not in ("", SERVICE_NAME):
            return health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        if await self.router.not_ready() is None:
            return health_pb2.HealthCheckResponse.SERVING
        return health_pb2.HealthCheckResponse.NOT_SERVING


async def _unary(answer: Awaitable[Response], empty: Response, context: ServeContext) -> Response:
    try:
        return await answer
    except Exception as error:
        _report(error, context)
        return empty


def _tell(link: TraceLink, context: ServeContext) -> None:
    """The trace a request is part of, behind its reply."""
    if link.goes:
        context.set_trailing_metadata(list(link.goes.items()))


def _report(error: Exception, context: ServeContext) -> None:
    """Puts an error on the context; anything unexpected is logged and told as "internal error" only."""
    if not isinstance(error, ServingError):
        log.error("request failed", exc_info=error)
        error = InternalError("internal error")
    detail: status_pb2.Status = status(error)
    context.set_code(STATUS_CODE[error.status])
    context.set_details(detail.message)
    context.set_trailing_metadata([(DETAILS_KEY, detail.SerializeToString())])
