"""The HTTP facade: which route is answered by what.

Handlers take the service and the request, so that any FastAPI or Starlette application can mount them.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Awaitable, Callable

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from actors.errors import NotFound
from cluster.generation import GenerationService
from cluster.http_exchange import answer_exchange, guarded, trace_id
from cluster.openai_chat import ChatExchange
from cluster.openai_completions import CompletionRequest
from cluster.openai_completions_response import CompletionExchange
from cluster.openai_request import parse_body, parse_chat_request
from cluster.openai_response import error_object, model_body
from cluster.openai_responses import ResponsesExchange
from cluster.openai_responses_request import ResponsesRequest
from cluster.tokenize_api import detokenize, tokenize

Handler = Callable[[GenerationService, Request], Awaitable[Response]]


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
    return JSONResponse({"version": importlib.metadata.version("ernie-serving")})


def build_api(get_service: Callable[[], GenerationService]) -> FastAPI:
    """An application with every route. ``get_service`` is called once per request."""
    app = FastAPI(title="ernie-serving", docs_url=None, redoc_url=None, openapi_url=None)

    def route(method: str, path: str, handler: Handler) -> None:
        async def endpoint(request: Request) -> Response:
            return await handler(get_service(), request)

        app.add_route(path, endpoint, methods=[method])

    route("POST", "/v1/chat/completions", chat_completions)
    route("POST", "/v1/completions", completions)
    route("POST", "/v1/responses", responses)
    route("POST", "/tokenize", tokenize)
    route("POST", "/detokenize", detokenize)
    route("GET", "/v1/models", list_models)
    route("GET", "/v1/models/{model_id:path}", get_model)
    route("GET", "/health", health)
    route("GET", "/ready", ready)
    route("GET", "/version", version)
    install_error_handlers(app)
    return app


def install_error_handlers(app: FastAPI) -> None:
    """Gives unknown routes and methods OpenAI's error body too."""

    async def routing_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        body = error_object(f"{request.method} {request.url.path}: {error.detail}", "invalid_request_error", None, None)
        return JSONResponse(body, status_code=error.status_code, headers=error.headers)

    app.add_exception_handler(HTTPException, routing_error)
