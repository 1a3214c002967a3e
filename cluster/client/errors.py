"""How a call fails, as the service tells it.

    ClientError
      InvalidRequestError   INVALID_ARGUMENT     the caller must change ``field``
      NotFoundError         NOT_FOUND            no such model or request
      RefusedError          RESOURCE_EXHAUSTED,  the service cannot now; again after ``retry_after_s``
                            UNAVAILABLE
      UnreachableError      UNAVAILABLE          nothing that speaks this protocol answered
      DeadlineError         DEADLINE_EXCEEDED
      CancelledError        CANCELLED            ended by ``cancel`` or from elsewhere

Other codes, and whatever comes from the way there and not from the service, are plain ClientErrors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

_DETAILS_KEY = "grpc-status-details-bin"


class ClientError(Exception):
    """A call failed.

    ``reason``, ``field`` and ``retry_after_s`` are None where the server gave none; no ``reason`` at all means that the
    error did not come from the service but from the way to it.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        reason: str | None = None,
        field: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(f"{code.name}: {message}")
        self.code = code
        self.message = message
        self.reason = reason
        self.field = field
        self.retry_after_s = retry_after_s

    @property
    def unreachable(self) -> bool:
        """Nothing that speaks this protocol answered."""
        return isinstance(self, UnreachableError)


class InvalidRequestError(ClientError):
    """The request is wrong; ``field`` names the part at fault."""


class NotFoundError(ClientError):
    """No such model or request."""


class RefusedError(ClientError):
    """The service cannot answer now; ``retry_after_s`` says when to come back, where it is known."""


class UnreachableError(ClientError):
    """Nothing that speaks this protocol answered."""


class DeadlineError(ClientError):
    """The time ran out, here or in the cluster."""


class CancelledError(ClientError):
    """The request was cancelled. Not asyncio's: a cancelled task gets that one."""


_KINDS: dict[grpc.StatusCode, type[ClientError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
    grpc.StatusCode.CANCELLED: CancelledError,
}
_REFUSALS = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)


def client_error(error: grpc.RpcError) -> ClientError:
    """The typed form of what grpc raised, in its sync and asyncio forms alike."""
    # Both forms have code(), details() and trailing_metadata(), but no common base that says so.
    call: Any = error
    reason = field = None
    retry_after_s = None
    for packed in _details(call.trailing_metadata()):
        info = error_details_pb2.ErrorInfo()
        retry = error_details_pb2.RetryInfo()
        if packed.Unpack(info):
            reason, field = info.reason, info.metadata.get("field")
        elif packed.Unpack(retry):
            retry_after_s = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
    kind = _kind(call.code(), told=reason is not None)
    return kind(call.code(), call.details() or "", reason=reason, field=field, retry_after_s=retry_after_s)


def _kind(code: grpc.StatusCode, *, told: bool) -> type[ClientError]:
    if code in _REFUSALS and told:
        return RefusedError
    if code is grpc.StatusCode.UNAVAILABLE:
        return UnreachableError
    return _KINDS.get(code, ClientError)


def _details(metadata: Iterable[tuple[str, str | bytes]] | None) -> Sequence[Any]:
    for key, value in metadata or ():
        if key == _DETAILS_KEY and isinstance(value, bytes):
            try:
                return list(status_pb2.Status.FromString(value).details)
            except DecodeError:
                return ()
    return ()
