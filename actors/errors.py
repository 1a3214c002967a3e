"""Errors a client may see. Each has a status, mapped once to gRPC and once to HTTP, and a machine-readable reason.

    ServingError
      InvalidRequest        INVALID_ARGUMENT     400   the caller must change ``field``
        MediaUnreadable                                bytes that are no image or video
        MediaTooLarge                                  over a count, byte, pixel or frame limit
        ContextExceeded                                prompt and reply do not fit the context
      NotFound              NOT_FOUND            404   unknown model or request
      AlreadyExists         ALREADY_EXISTS       409   a request of that name is active
      Overloaded            RESOURCE_EXHAUSTED   429   try again after ``retry_after_s``
      Unavailable           UNAVAILABLE          503   a part was lost, is starting or draining
      DeadlineExceeded      DEADLINE_EXCEEDED    504
      RequestCancelled      CANCELLED            499
      MediaChanged          ABORTED              409   a URL gave other bytes on a second fetch
      InternalError         INTERNAL             500   a defect of ours; details stay in the log

``ValueError`` and ``assert`` remain for programming errors inside one part.
"""

from __future__ import annotations

import enum

POISON = "POISON"
"""Reason of an InternalError: parts died under the request, one after the other."""


class Status(enum.StrEnum):
    """Transport-neutral outcome; names follow google.rpc.Code."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    UNAVAILABLE = "UNAVAILABLE"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    CANCELLED = "CANCELLED"
    ABORTED = "ABORTED"
    INTERNAL = "INTERNAL"


class ServingError(Exception):
    """Base of everything a client may be told. Survives pickling: Serve handles carry it between processes."""

    status = Status.INTERNAL
    default_reason = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        field: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.field = field
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[object, ...]:
        state = {"reason": self.reason, "field": self.field, "retry_after_s": self.retry_after_s}
        return (_rebuild, (type(self), self.message, state))


def _rebuild(kind: type[ServingError], message: str, state: dict[str, object]) -> ServingError:
    return kind(message, **state)  # type: ignore[arg-type]


class InvalidRequest(ServingError):
    """A field of the request is wrong; ``field`` names it as the client wrote it."""

    status = Status.INVALID_ARGUMENT
    default_reason = "INVALID_FIELD"


class MediaUnreadable(InvalidRequest):
    """Media bytes cannot be decoded."""

    default_reason = "MEDIA_UNREADABLE"


class MediaTooLarge(InvalidRequest):
    """Media go over a limit named in the message."""

    default_reason = "MEDIA_TOO_LARGE"


class ContextExceeded(InvalidRequest):
    """Prompt and reply do not fit the context length."""

    default_reason = "CONTEXT_EXCEEDED"


class NotFound(ServingError):
    """No such model or request."""

    status = Status.NOT_FOUND
    default_reason = "MODEL_NOT_FOUND"


class AlreadyExists(ServingError):
    """The request name is in use."""

    status = Status.ALREADY_EXISTS
    default_reason = "REQUEST_ID_IN_USE"


class Overloaded(ServingError):
    """A queue is full; ``retry_after_s`` says when to come back."""

    status = Status.RESOURCE_EXHAUSTED
    default_reason = "QUEUE_FULL"


class Unavailable(ServingError):
    """A part is missing, lost or draining: reason ENGINE_LOST, NO_ENGINE, PREEMPTED, DRAINING, STAGE_LOST ..."""

    status = Status.UNAVAILABLE
    default_reason = "UNAVAILABLE"


class DeadlineExceeded(ServingError):
    """The request's own timeout ran out."""

    status = Status.DEADLINE_EXCEEDED
    default_reason = "DEADLINE_EXCEEDED"


class RequestCancelled(ServingError):
    """The client went away or cancelled."""

    status = Status.CANCELLED
    default_reason = "CLIENT_CANCELLED"


class MediaChanged(ServingError):
    """A media URL gave other bytes when it was fetched again."""

    status = Status.ABORTED
    default_reason = "MEDIA_CHANGED"


class InternalError(ServingError):
    """A defect of ours, or with reason POISON a request under which parts died. The message is for clients: never a
    traceback."""
