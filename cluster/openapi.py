"""The OpenAPI document of the HTTP API, made of its route table and of the models the handlers read bodies with."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request, Response
from pydantic import TypeAdapter

from cluster.generation import GenerationService
from cluster.openapi_replies import ErrorReply

DISTRIBUTION = "ernie-serving"

_TEMPLATE = "#/components/schemas/{model}"
_MEANINGS = {
    200: "What was asked for.",
    400: "A field is wrong: `param` names it.",
    401: "The admin token is missing or another one.",
    404: "No such model or engine.",
    409: "A request of that name is active, or media changed while it ran.",
    415: "The body is not said to be JSON.",
    429: "Too much is going on: try again after `retry-after` seconds.",
    499: "The request was cancelled.",
    500: "A defect of the server.",
    503: "A part is missing, starting, draining or was lost.",
    504: "The request took longer than its `timeout`.",
}

_DONE = "[DONE]"
"""The one event of streams that is no JSON."""

Handler = Callable[[GenerationService, Request], Awaitable[Response]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Route:
    """What is answered by what. ``body`` and ``reply`` are types of JSON bodies, or of what ``media_type`` says;
    ``replies`` those of other statuses than 200 that are no errors.
    """

    method: str
    path: str
    handler: Handler
    summary: str
    reply: Any
    media_type: str = "application/json"
    """Of the reply."""
    body: Any = None
    event: Any = None
    """Type of the JSON data of its stream's events, where it has one, and in words what they are."""
    streams: str = ""
    errors: tuple[int, ...] = (500,)
    replies: dict[int, Any] = field(default_factory=dict)
    parameters: tuple[dict[str, Any], ...] = ()

    @property
    def documented_path(self) -> str:
        return self.path.replace(":path}", "}")


def openapi_document(routes: Iterable[Route]) -> dict[str, Any]:
    """As OpenAPI 3.1 writes it."""
    routes = list(routes)
    wanted: dict[str, Any] = {"error": ErrorReply}
    for route in routes:
        bodies = {"body": route.body, "reply": route.reply, "event": route.event}
        bodies |= {str(code): kind for code, kind in route.replies.items()}
        wanted |= {_key(route, name): kind for name, kind in bodies.items() if kind is not None}
    schemas, definitions = TypeAdapter.json_schemas(
        [(key, "validation", TypeAdapter(kind)) for key, kind in wanted.items()], ref_template=_TEMPLATE
    )
    known = {key: schema for (key, _), schema in schemas.items()}
    paths: dict[str, Any] = {}
    for route in routes:
        paths.setdefault(route.documented_path, {})[route.method.lower()] = _operation(route, known)
    return {
        "openapi": "3.1.0",
        "info": {"title": DISTRIBUTION, "version": importlib.metadata.version(DISTRIBUTION)},
        "paths": paths,
        "components": {"schemas": definitions.get("$defs", {})},
    }


def _operation(route: Route, schemas: dict[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {route.media_type: {"schema": schemas[_key(route, "reply")]}}
    if route.event is not None:
        # OpenAPI 3.2's word, which tools of 3.1 pass over.
        content["text/event-stream"] = {"itemSchema": _server_sent(schemas[_key(route, "event")], route.streams)}
    responses = {"200": {"description": _MEANINGS[200], "content": content}}
    told = dict.fromkeys(route.errors, schemas["error"]) | {
        code: schemas[_key(route, str(code))] for code in route.replies
    }
    for status, schema in told.items():
        json_body = {"application/json": {"schema": schema}}
        responses[str(status)] = {"description": _MEANINGS[status], "content": json_body}
    operation: dict[str, Any] = {"summary": route.summary, "responses": dict(sorted(responses.items()))}
    if route.body is not None:
        body = {"schema": schemas[_key(route, "body")]}
        operation["requestBody"] = {"required": True, "content": {"application/json": body}}
    if route.parameters:
        operation["parameters"] = list(route.parameters)
    return operation


def _server_sent(data: dict[str, Any], description: str) -> dict[str, Any]:
    """A server-sent event as it is read."""
    told = {"contentMediaType": "application/json", "contentSchema": data}
    return {
        "type": "object",
        "description": description,
        "properties": {"event": {"type": "string"}, "data": {"type": "string", "anyOf": [{"const": _DONE}, told]}},
        "required": ["data"],
    }


def _key(route: Route, name: str) -> str:
    return f"{route.method} {route.path} {name}"
