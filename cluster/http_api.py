"""The HTTP facade: which route is answered by what.

Handlers take the service and the request, so that any FastAPI or Starlette application can mount them.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from functools import cache

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from actors.errors import NotFound
from cluster import openapi_replies as replies
from cluster.generation import GenerationService
from cluster.http_exchange import answer_exchange, guarded, trace_id
from cluster.openai_chat import ChatExchange
from cluster.openai_completions import CompletionRequest
from cluster.openai_completions_response import CompletionExchange
from cluster.openai_request import ChatRequest, parse_body, parse_chat_request
from cluster.openai_response import error_object, model_body
from cluster.openai_responses import ResponsesExchange
from cluster.openai_responses_request import ResponsesRequest
from cluster.openapi import DISTRIBUTION, Handler, Route, openapi_document
from cluster.pages.routes import install_pages
from cluster.tokenize_api import DetokenizeRequest, TokenizeRequest, detokenize, tokenize


async def chat_completions(service: GenerationService, request: Request) -> Response:
    """POST /v1/chat/completions."""
    return await answer_exchange(service, request, lambda body: ChatExchange(parse_chat_request(body)))


async def completions(service: GenerationService, request: Request) -> Response:
    """POST /v1/completions."""
    return await answer_exchange(service, request, lambda body: CompletionExchange(parse_body(CompletionRequest, body)))


async def responses(service: GenerationService, request: Request) -> Response:
    """POST /v1/responses."""
    return await answer_exchange(service, request, lambda body: ResponsesExchange(parse_body(ResponsesRequest, body)))


async def list_models(service: GenerationService, request: Request) -> Response:
    """GET /v1/models."""

    async def answer() -> Response:
        return JSONResponse({"object": "list", "data": [model_body(card) for card in service.models()]})

    return await guarded(answer(), trace_id(request))


async def get_model(service: GenerationService, request: Request) -> Response:
    """GET /v1/models/{model_id}."""

    async def answer() -> Response:
        wanted = request.path_params["model_id"]
        for card in service.models():
            if card.name == wanted:
                return JSONResponse(model_body(card))
        raise NotFound(f"the model {wanted!r} does not exist", field="model")

    return await guarded(answer(), trace_id(request))


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

    return await guarded(answer(), trace_id(request))


async def version(service: GenerationService, request: Request) -> Response:
    """GET /version."""
    return JSONResponse({"version": importlib.metadata.version(DISTRIBUTION)})


_GENERATION_ERRORS = (400, 404, 409, 429, 499, 500, 503, 504)
_TOKEN_ERRORS = (400, 404, 500, 503, 504)

ROUTES = (
    Route(
        method="POST",
        path="/v1/chat/completions",
        handler=chat_completions,
        summary="Generates a reply to a conversation.",
        body=ChatRequest,
        reply=replies.ChatReply,
        event=replies.ChatChunk | replies.ErrorReply,
        streams="Chunks, then `[DONE]`; an error is the last event.",
        errors=_GENERATION_ERRORS,
    ),
    Route(
        method="POST",
        path="/v1/completions",
        handler=completions,
        summary="Continues raw prompts.",
        body=CompletionRequest,
        reply=replies.CompletionReply,
        event=replies.CompletionChunk | replies.ErrorReply,
        streams="Chunks, then `[DONE]`; an error is the last event.",
        errors=_GENERATION_ERRORS,
    ),
    Route(
        method="POST",
        path="/v1/responses",
        handler=responses,
        summary="Generates a response to a conversation that is sent whole.",
        body=ResponsesRequest,
        reply=replies.ResponsesReply,
        event=replies.ResponsesEvent,
        streams="From `response.created` to `response.completed`, `response.incomplete` or `response.failed`; `error` "
        "where nothing was created.",
        errors=_GENERATION_ERRORS,
    ),
    Route(
        method="POST",
        path="/tokenize",
        handler=tokenize,
        summary="Token ids of a prompt or a conversation.",
        body=TokenizeRequest,
        reply=replies.TokenizeReply,
        errors=_TOKEN_ERRORS,
    ),
    Route(
        method="POST",
        path="/detokenize",
        handler=detokenize,
        summary="Text of token ids.",
        body=DetokenizeRequest,
        reply=replies.DetokenizeReply,
        errors=(400, 404, 499, 500),
    ),
    Route(
        method="GET",
        path="/v1/models",
        handler=list_models,
        summary="The models that are served.",
        reply=replies.ModelsReply,
    ),
    Route(
        method="GET",
        path="/v1/models/{model_id:path}",
        handler=get_model,
        summary="One model that is served.",
        reply=replies.ModelReply,
        errors=(404, 500),
        parameters=({"name": "model_id", "in": "path", "required": True, "schema": {"type": "string"}},),
    ),
    Route(
        method="GET",
        path="/health",
        handler=health,
        summary="Answers while this process lives.",
        reply=replies.HealthReply,
    ),
    Route(
        method="GET",
        path="/ready",
        handler=ready,
        summary="Whether a request could be served now.",
        reply=replies.ReadyReply,
        replies={503: replies.ReadyReply},
    ),
    Route(
        method="GET",
        path="/version",
        handler=version,
        summary="The version of the server.",
        reply=replies.VersionReply,
    ),
)


def build_api(get_service: Callable[[], GenerationService], more: Sequence[Route] = ()) -> FastAPI:
    """An application with every route, and ``more`` of them. ``get_service`` is called once per request."""
    app = FastAPI(title=DISTRIBUTION, docs_url=None, redoc_url=None, openapi_url=None)

    def route(method: str, path: str, handler: Handler) -> None:
        async def endpoint(request: Request) -> Response:
            return await handler(get_service(), request)

        app.add_route(path, endpoint, methods=[method])

    async def document(service: GenerationService, request: Request) -> Response:
        return JSONResponse(described())

    described_route = Route(
        method="GET",
        path="/openapi.json",
        handler=document,
        summary="This document.",
        reply=dict[str, object],
    )
    routes = (*ROUTES, *more, described_route)
    described = cache(lambda: openapi_document(routes))
    for entry in routes:
        route(entry.method, entry.path, entry.handler)
    install_pages(app)
    install_error_handlers(app)
    return app


def install_error_handlers(app: FastAPI) -> None:
    """Gives unknown routes and methods OpenAI's error body too."""

    async def routing_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        body = error_object(f"{request.method} {request.url.path}: {error.detail}", "invalid_request_error", None, None)
        return JSONResponse(body, status_code=error.status_code, headers=error.headers)

    app.add_exception_handler(HTTPException, routing_error)
