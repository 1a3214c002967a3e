"""Serving errors on unary and server-streaming calls between our own parts."""

from __future__ import annotations

from typing import NoReturn, TypeVar

import grpc
import grpc.aio

from actors.errors import InternalError, ServingError, Status

_RequestT = TypeVar("_RequestT")
_ResponseT = TypeVar("_ResponseT")

_REASON, _FIELD, _RETRY_AFTER = "ernie-reason", "ernie-field", "ernie-retry-after"
KINDS: dict[Status, type[ServingError]] = {kind.status: kind for kind in ServingError.__subclasses__()}

LOST = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)
"""Codes of a peer that died, closed, froze or was never there, or whose port belongs to another kind of worker now."""


async def abort(context: grpc.aio.ServicerContext[_RequestT, _ResponseT], error: ServingError) -> NoReturn:
    """Ends a call with an error that ``error_of`` restores on the other side."""
    metadata = [(_REASON, error.reason)]
    if error.field is not None:
        metadata.append((_FIELD, error.field))
    if error.retry_after_s is not None:
        metadata.append((_RETRY_AFTER, repr(error.retry_after_s)))
    await context.abort(grpc.StatusCode[error.status], error.message, tuple(metadata))


def error_of(error: grpc.aio.AioRpcError) -> ServingError:
    """The serving error a call ended with; InternalError for a status that is none of ours."""
    message = error.details() or error.code().name
    kind = KINDS.get(Status(error.code().name)) if error.code().name in Status.__members__ else None
    if kind is None:
        return InternalError(f"{error.code().name}: {message}")
    metadata = {str(key): str(value) for key, value in error.trailing_metadata()}
    retry_after = metadata.get(_RETRY_AFTER)
    return kind(
        message,
        reason=metadata.get(_REASON),
        field=metadata.get(_FIELD),
        retry_after_s=float(retry_after) if retry_after is not None else None,
    )
