"""Which request a line of the log is about."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_request: ContextVar[str] = ContextVar("ernie_request", default="")


@contextmanager
def about(request: str) -> Iterator[None]:
    """What is logged meanwhile is about that request: here, in tasks that start here, and in functions a copy of this
    context runs. ``request``: its id, or the name of one of its leases, which begins with that.
    """
    token = _request.set(request.partition("#")[0])
    try:
        yield
    finally:
        _request.reset(token)


class RequestFilter(logging.Filter):
    """Lets every line through, with the id of its request: as the attribute ``ernie_request``, which JSON shows, and
    before a text that does not have it.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        request = _request.get()
        if request and not hasattr(record, "ernie_request"):
            record.ernie_request = request
            if request not in record.getMessage():
                record.msg = f"request {request}: {record.msg}"
        return True
