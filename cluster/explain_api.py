"""What became of a request and why, over HTTP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from cluster.generation import GenerationService
from cluster.http_exchange import guarded, trace_id
from cluster.openapi import Route
from cluster.request_checks import bare_name

Explain = Callable[[str], dict[str, Any]]


def explain_route(explain: Explain) -> Route:
    """GET /requests/{request_id}/explain."""

    async def handler(_: GenerationService, request: Request) -> Response:
        async def answer() -> Response:
            return JSONResponse(explain(bare_name(request.path_params["request_id"])))

        return await guarded(answer(), trace_id(request))

    return Route(
        method="GET",
        path="/requests/{request_id}/explain",
        handler=handler,
        summary="What `ernie explain` shows: what became of a request that runs or ended lately, and why.",
        reply=dict[str, object],
        errors=(404, 500),
        parameters=({"name": "request_id", "in": "path", "required": True, "schema": {"type": "string"}},),
    )
