"""OpenAI-shaped responses: completions, stream chunks, errors.

Thinking comes as ``reasoning`` (vLLM's present name) and once more as ``reasoning_content`` (FastDeploy, DeepSeek and
most clients). Token ids use vLLM's names: ``prompt_token_ids`` at the top level and ``choices[].token_ids``.
``timings`` is ours.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from actors.errors import ContextExceeded, ServingError, Status
from actors.types import FinishReason, Timings
from cluster.generation import Delta, Finished, ModelCard, Started, Usage
from cluster.openai_request import client_field
from cluster.request_checks import COMPLETION_PREFIX, told

OWNER = "ernie-serving"
MAX_MESSAGE_LENGTH = 1000

_FINISH: Mapping[FinishReason, str] = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CANCELLED: "abort",
}
"""``abort`` is vLLM's word: OpenAI has none."""

HTTP_STATUS: Mapping[Status, int] = {
    Status.INVALID_ARGUMENT: 400,
    Status.NOT_FOUND: 404,
    Status.ALREADY_EXISTS: 409,
    Status.ABORTED: 409,
    Status.RESOURCE_EXHAUSTED: 429,
    Status.CANCELLED: 499,
    Status.INTERNAL: 500,
    Status.UNAVAILABLE: 503,
    Status.DEADLINE_EXCEEDED: 504,
}

_ERROR_TYPE: Mapping[Status, str] = {
    Status.INVALID_ARGUMENT: "invalid_request_error",
    Status.NOT_FOUND: "invalid_request_error",
    Status.ALREADY_EXISTS: "conflict_error",
    Status.ABORTED: "conflict_error",
    Status.RESOURCE_EXHAUSTED: "rate_limit_error",
    Status.CANCELLED: "cancelled_error",
    Status.INTERNAL: "server_error",
    Status.UNAVAILABLE: "service_unavailable_error",
    Status.DEADLINE_EXCEEDED: "timeout_error",
}


def error_body(error: ServingError) -> dict[str, Any]:
    """OpenAI's error object. ``code`` is the reason in lower case, or OpenAI's own where clients look for it."""
    code = "context_length_exceeded" if isinstance(error, ContextExceeded) else error.reason.lower()
    field = client_field(error.field) if error.field else None
    return error_object(told(error.message, field), _ERROR_TYPE[error.status], field, code)


def error_object(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    """An error object; overlong text, which only a client's own names can cause, is cut."""
    return {"error": {"message": _cut(message), "type": kind, "param": param and _cut(param), "code": code}}


def error_headers(error: ServingError) -> dict[str, str]:
    """Retry headers: whole seconds for everybody, milliseconds for OpenAI's clients."""
    if error.retry_after_s is None:
        return {}
    return {
        "retry-after": str(max(1, math.ceil(error.retry_after_s))),
        "retry-after-ms": str(max(1, math.ceil(error.retry_after_s * 1000))),
    }


def _cut(text: str) -> str:
    return text if len(text) <= MAX_MESSAGE_LENGTH else text[: MAX_MESSAGE_LENGTH - 3] + "..."


def usage_body(usage: Usage) -> dict[str, Any]:
    """Token accounting. ``media_tokens`` is ours."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.prompt_tokens + usage.output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens, "media_tokens": usage.media_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def timings_body(timings: Timings, usage: Usage) -> dict[str, Any]:
    """Seconds per stage, and to the first token."""
    return {
        "exposed": {str(stage): seconds for stage, seconds in timings.exposed.items()},
        "busy": {str(stage): seconds for stage, seconds in timings.busy.items()},
        "time_to_first_token": usage.time_to_first_token_s,
    }


def model_body(card: ModelCard) -> dict[str, Any]:
    """One entry of /v1/models; ``root`` and ``max_model_len`` as in vLLM."""
    return {
        "id": card.name,
        "object": "model",
        "created": card.created,
        "owned_by": OWNER,
        "root": card.source,
        "max_model_len": card.max_model_len,
    }


class Completion:
    """Gathers the events of a request into one ``chat.completion``."""

    def __init__(self, created: int, *, token_ids: bool) -> None:
        self._created = created
        self._wants_ids = token_ids
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._token_ids: list[int] = []

    def add(self, delta: Delta) -> None:
        self._text.append(delta.text)
        self._reasoning.append(delta.reasoning)
        self._token_ids.extend(delta.token_ids)

    def body(self, started: Started, finished: Finished) -> dict[str, Any]:
        """The response after the last event."""
        message: dict[str, Any] = {"role": "assistant", "content": "".join(self._text)}
        message |= _reasoning("".join(self._reasoning))
        choice: dict[str, Any] = {"index": 0, "message": message, "logprobs": None, **_ending(finished)}
        body: dict[str, Any] = {
            "id": COMPLETION_PREFIX + started.request_id,
            "object": "chat.completion",
            "created": self._created,
            "model": started.model,
            "choices": [choice],
            "usage": usage_body(finished.usage),
        }
        if self._wants_ids:
            body["prompt_token_ids"] = list(started.prompt_token_ids or ())
            choice["token_ids"] = self._token_ids
        if finished.timings is not None:
            body["timings"] = timings_body(finished.timings, finished.usage)
        return body


class Chunks:
    """Writes the events of a request as ``chat.completion.chunk`` objects.

    The first has the role (and the prompt's token ids), the last the finish reason, usage and timings.
    """

    def __init__(self, created: int, started: Started, *, token_ids: bool) -> None:
        self._created = created
        self._started = started
        self._wants_ids = token_ids

    def first(self) -> dict[str, Any]:
        chunk = self._chunk({"role": "assistant", "content": ""})
        if self._wants_ids:
            chunk["prompt_token_ids"] = list(self._started.prompt_token_ids or ())
        return chunk

    def delta(self, delta: Delta) -> dict[str, Any]:
        body: dict[str, Any] = _reasoning(delta.reasoning)
        if delta.text:
            body["content"] = delta.text
        return self._chunk(body, delta.token_ids)

    def last(self, finished: Finished) -> dict[str, Any]:
        chunk = self._chunk({})
        chunk["choices"][0] |= _ending(finished)
        chunk["usage"] = usage_body(finished.usage)
        if finished.timings is not None:
            chunk["timings"] = timings_body(finished.timings, finished.usage)
        return chunk

    def _chunk(self, delta: dict[str, Any], token_ids: tuple[int, ...] = ()) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "delta": delta, "finish_reason": None}
        if self._wants_ids:
            choice["token_ids"] = list(token_ids)
        return {
            "id": COMPLETION_PREFIX + self._started.request_id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._started.model,
            "choices": [choice],
        }


def _reasoning(text: str) -> dict[str, Any]:
    return {"reasoning": text, "reasoning_content": text} if text else {}


def _ending(finished: Finished) -> dict[str, Any]:
    return {"finish_reason": _FINISH[finished.reason], "stop_reason": finished.stop_reason}


def sse(body: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


SSE_DONE = b"data: [DONE]\n\n"
SSE_KEEP_ALIVE = b": keep-alive\n\n"
