"""Errors that cross Serve handles."""

from __future__ import annotations

from actors.errors import ServingError


def own_error(error: BaseException) -> ServingError | None:
    """What a replica of ours raised for a client, out of the classes Ray wraps or mixes it into; else None."""
    cause = getattr(error, "cause", None)
    return next((found for found in (cause, error) if isinstance(found, ServingError)), None)
