"""POST /v1/chat/completions as an exchange. An error inside a stream is sent as an ``{"error": ...}`` event, which
OpenAI's clients raise, and the stream ends without ``[DONE]``.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable
from typing import Any

from actors.errors import InternalError, ServingError
from cluster.generation import ChoiceFinished, Delta, Event, Finished, GenerationService, PromptScored, Started, is_last
from cluster.openai_request import ChatRequest, client_field, spelling, to_call
from cluster.openai_response import SSE_DONE, Chunks, Completion, error_body, sse


class ChatExchange:
    """A chat request and its reply."""

    def __init__(self, chat: ChatRequest) -> None:
        """Raises InvalidRequest for values out of bounds or at odds with each other."""
        self.stream = bool(chat.stream)
        self._chat = chat
        self._call = to_call(chat)
        self._created = int(time.time())
        self._completion = Completion(self._created, self._call)
        self._started: Started | None = None
        self._finished: Finished | None = None
        self._chunks: Chunks | None = None

    def events(self, service: GenerationService) -> AsyncIterator[Event]:
        return service.generate(self._call)

    def begins(self, event: Event) -> bool:
        return isinstance(event, Started)

    def is_last(self, event: Event) -> bool:
        return is_last(event)

    def add(self, event: Event) -> None:
        match event:
            case Started():
                self._started = event
            case Finished():
                self._finished = event
            case _:
                self._completion.add(event)

    def whole(self) -> dict[str, Any]:
        if self._started is None or self._finished is None:
            raise InternalError("the request did not begin with its first event")
        return self._completion.body(self._started, self._finished)

    def frames(self, event: Event) -> Iterable[bytes]:
        match event:
            case Started():
                self._chunks = Chunks(self._created, self._call, event, usage=self._chat.wants_stream_usage)
                bodies = self._chunks.begin()
            case PromptScored() | Delta() | ChoiceFinished() | Finished() if self._chunks is not None:
                bodies = self._chunks.of(event)
            case _:
                raise InternalError("the request did not begin with its first event")
        return map(sse, bodies)

    def end(self) -> bytes:
        return SSE_DONE

    def failed(self, error: ServingError) -> bytes:
        return sse(error_body(error))

    def name_field(self, error: ServingError) -> None:
        if error.field is not None:
            error.field = client_field(error.field, spelling(self._chat))
