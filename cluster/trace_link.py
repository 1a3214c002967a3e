"""The W3C trace context of one exchange with a client: what came with it, and what goes back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

TRACEPARENT, TRACESTATE = "traceparent", "tracestate"


@dataclass(slots=True)
class TraceLink:
    came: Mapping[str, str]
    goes: dict[str, str] = field(default_factory=dict)
    """Filled in when a request of the exchange is traced."""


_link: ContextVar[TraceLink | None] = ContextVar("trace_link", default=None)


@contextmanager
def linked(headers: Iterable[tuple[str, str]]) -> Iterator[TraceLink]:
    """Requests that are admitted meanwhile, here and in tasks that start here, belong to this exchange. ``headers`` or
    metadata of the client, names in lower case.
    """
    link = TraceLink({name: value for name, value in headers if name in (TRACEPARENT, TRACESTATE)})
    token = _link.set(link)
    try:
        yield link
    finally:
        _link.reset(token)


def current_link() -> TraceLink | None:
    return _link.get()
