"""What operators ask of a running cluster over HTTP."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, ValidationError

from actors.errors import InvalidRequest, NotFound, ServingError
from actors.types import EngineRole
from cluster.config import Admin, error_lines
from cluster.generation import GenerationService
from cluster.openai_response import HTTP_STATUS, error_body, error_headers, error_object
from cluster.openapi import Route

MAX_BODY_BYTES = 4096
JSON = "application/json"

OrderRole = Callable[[str, EngineRole], Awaitable[str]]


class RoleRequest(BaseModel):
    """Which engine, by its id or a part of it, and which role. In a reply the id is whole."""

    model_config = ConfigDict(extra="forbid")
    engine: str
    role: EngineRole


def role_route(admin: Admin | None, order_role: OrderRole) -> Route:
    """POST /admin/role."""

    async def handler(_: GenerationService, request: Request) -> Response:
        return await set_role(admin, order_role, request)

    return Route(
        method="POST",
        path="/admin/role",
        handler=handler,
        summary="An engine is to take another role; `/status` tells when it has.",
        body=RoleRequest,
        reply=RoleRequest,
        errors=(400, 401, 404, 415, 503),
    )


async def set_role(admin: Admin | None, order_role: OrderRole, request: Request) -> Response:
    """An engine is to take another role. The answer comes before it has."""
    if admin is None:
        error = NotFound("admin: this cluster is not changed over HTTP; see the field admin", reason="ADMIN_OFF")
        return _refusal(error)
    given = request.headers.get("authorization", "")
    if admin.token is not None and not hmac.compare_digest(given.encode(), f"Bearer {admin.token}".encode()):
        body = error_object("authorization: this needs the admin token", "authentication_error", None, "admin_token")
        return JSONResponse(body, status_code=401, headers={"www-authenticate": "Bearer"})
    # Where no token is asked for, this alone keeps foreign web pages out: a browser sends JSON nowhere unasked.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != JSON:
        body = error_object(f"content-type: must be {JSON}", "invalid_request_error", None, "content_type")
        return JSONResponse(body, status_code=415)
    try:
        asked = await _read(request)
        engine = await order_role(asked.engine, asked.role)
    except ServingError as error:
        return _refusal(error)
    return JSONResponse({"engine": engine, "role": str(asked.role)})


async def _read(request: Request) -> RoleRequest:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY_BYTES:
            raise InvalidRequest(f"the body is over the limit of {MAX_BODY_BYTES} bytes", reason="BODY_TOO_LARGE")
    try:
        return RoleRequest.model_validate_json(bytes(body))
    except ValidationError as error:
        field = ".".join(str(part) for part in error.errors()[0]["loc"]) or None
        raise InvalidRequest("; ".join(error_lines(error)), field=field) from None


def _refusal(error: ServingError) -> Response:
    return JSONResponse(error_body(error), HTTP_STATUS[error.status], error_headers(error))
