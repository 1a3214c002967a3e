"""OpenAI-shaped responses: completions, stream chunks, errors.

Thinking comes as ``reasoning`` (vLLM's present name) and once more as ``reasoning_content`` (FastDeploy, DeepSeek and
most clients). Calls come as OpenAI's ``tool_calls``: in a stream the first delta of a call has its id and name, the
others more of its arguments; a message of calls alone has the content null. Token ids and the prompt's
log-probabilities use vLLM's names: ``prompt_token_ids`` and ``prompt_logprobs`` at the top level,
``choices[].token_ids``. ``timings`` is ours.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from actors.errors import POISON, ContextExceeded, InternalError, ServingError, Status
from actors.processing.tool_calls import joined
from actors.types import FinishReason, Timings, ToolCallDelta
from cluster.generation import (
    ChoiceFinished,
    Delta,
    Finished,
    GenerateCall,
    ModelCard,
    PositionScores,
    PromptScored,
    Started,
    Usage,
)
from cluster.openai_logprobs import logprobs_body, prompt_logprobs_body
from cluster.openai_request import client_field
from cluster.request_checks import COMPLETION_PREFIX, told

OWNER = "ernie-serving"
MAX_MESSAGE_LENGTH = 1000

_FINISH: Mapping[FinishReason, str] = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.TOOL_CALLS: "tool_calls",
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
    """Retry headers: whole seconds for everybody, milliseconds for OpenAI's clients, which also retry 409 and all from
    500 unless they are told that the same request would only fail again.
    """
    if error.status in (Status.ALREADY_EXISTS, Status.DEADLINE_EXCEEDED) or error.reason == POISON:
        return {"x-should-retry": "false"}
    if error.retry_after_s is None:
        return {}
    return {
        "retry-after": str(max(1, math.ceil(error.retry_after_s))),
        "retry-after-ms": str(max(1, math.ceil(error.retry_after_s * 1000))),
    }


def _cut(text: str) -> str:
    return text if len(text) <= MAX_MESSAGE_LENGTH else text[: MAX_MESSAGE_LENGTH - 3] + "..."


def usage_body(usage: Usage) -> dict[str, Any]:
    """Token accounting. Image and video tokens have FastDeploy's names; ``media_tokens``, their sum, is ours."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.prompt_tokens + usage.output_tokens,
        "prompt_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "image_tokens": usage.image_tokens,
            "video_tokens": usage.video_tokens,
            "media_tokens": usage.media_tokens,
        },
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


class _Choice:
    def __init__(self) -> None:
        self.text: list[str] = []
        self.reasoning: list[str] = []
        self.calls: list[ToolCallDelta] = []
        self.token_ids: list[int] = []
        self.scores: list[PositionScores] = []
        self.finished: ChoiceFinished | None = None


class Completion:
    """Gathers the events of a request into one ``chat.completion`` object."""

    def __init__(self, created: int, call: GenerateCall) -> None:
        self._created = created
        self._call = call
        self._choices = [_Choice() for _ in range(call.n)]
        self._prompt_scores: PromptScored | None = None

    def add(self, event: PromptScored | Delta | ChoiceFinished) -> None:
        match event:
            case PromptScored():
                self._prompt_scores = event
            case Delta():
                choice = self._choices[event.choice]
                choice.text.append(event.text)
                choice.reasoning.append(event.reasoning)
                choice.calls.extend(event.tool_calls)
                choice.token_ids.extend(event.token_ids)
                choice.scores.extend(event.logprobs)
            case ChoiceFinished():
                self._choices[event.choice].finished = event

    def body(self, started: Started, finished: Finished) -> dict[str, Any]:
        """The response after the last event."""
        body: dict[str, Any] = {
            "id": COMPLETION_PREFIX + started.request_id,
            "object": "chat.completion",
            "created": self._created,
            "model": started.model,
            "choices": [self._choice(index, choice) for index, choice in enumerate(self._choices)],
            "usage": usage_body(finished.usage),
        }
        if self._call.return_token_ids:
            body["prompt_token_ids"] = list(started.prompt_token_ids or ())
        if self._prompt_scores is not None:
            body["prompt_logprobs"] = prompt_logprobs_body(self._prompt_scores.entries)
        if finished.timings is not None:
            body["timings"] = timings_body(finished.timings, finished.usage)
        return body

    def _choice(self, index: int, choice: _Choice) -> dict[str, Any]:
        if choice.finished is None:
            raise InternalError(f"the request ended before its choice {index}")
        text, calls = "".join(choice.text), joined(choice.calls)
        message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else "")}
        message |= _reasoning("".join(choice.reasoning))
        if calls:
            message["tool_calls"] = [_call(call) for call in calls]
        scores = None if self._call.logprobs is None else logprobs_body(choice.scores)
        body: dict[str, Any] = {"index": index, "message": message, "logprobs": scores, **ending(choice.finished)}
        if self._call.return_token_ids:
            body["token_ids"] = choice.token_ids
        return body


class Chunks:
    """Writes the events of a request as ``chat.completion.chunk`` objects.

    Every choice begins with its role (the first also with what was asked for of the prompt) and ends with its finish
    reason. Usage, on request, and timings come in a last chunk without choices.
    """

    def __init__(self, created: int, call: GenerateCall, started: Started, *, usage: bool) -> None:
        self._created = created
        self._call = call
        self._started = started
        self._usage = usage
        self._begun = False

    def begin(self) -> list[dict[str, Any]]:
        """What can be told at once: nothing where the prompt's log-probabilities are to come first."""
        return [] if self._call.prompt_logprobs is not None else self._roles(None)

    def of(self, event: PromptScored | Delta | ChoiceFinished | Finished) -> list[dict[str, Any]]:
        """Tells one event."""
        if isinstance(event, PromptScored):
            return self._roles(event)
        # A reply that was cancelled before its prompt had scores.
        bodies = [] if self._begun else self._roles(None)
        match event:
            case Delta():
                delta = _reasoning(event.reasoning) | ({"content": event.text} if event.text else {})
                if event.tool_calls:
                    delta["tool_calls"] = [{"index": call.index, **_call(call)} for call in event.tool_calls]
                bodies.append(self._choice_chunk(event.choice, delta, event.token_ids, event.logprobs))
            case ChoiceFinished():
                chunk = self._choice_chunk(event.choice, {})
                chunk["choices"][0] |= ending(event)
                bodies.append(chunk)
            case Finished() if self._usage or event.timings is not None:
                chunk = self._chunk([])
                if self._usage:
                    chunk["usage"] = usage_body(event.usage)
                if event.timings is not None:
                    chunk["timings"] = timings_body(event.timings, event.usage)
                bodies.append(chunk)
        return bodies

    def _roles(self, scored: PromptScored | None) -> list[dict[str, Any]]:
        self._begun = True
        chunks = [self._choice_chunk(index, {"role": "assistant", "content": ""}) for index in range(self._call.n)]
        if self._call.return_token_ids:
            chunks[0]["prompt_token_ids"] = list(self._started.prompt_token_ids or ())
        if scored is not None:
            chunks[0]["prompt_logprobs"] = prompt_logprobs_body(scored.entries)
        return chunks

    def _choice_chunk(
        self,
        index: int,
        delta: dict[str, Any],
        token_ids: tuple[int, ...] = (),
        scores: tuple[PositionScores, ...] = (),
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "delta": delta, "finish_reason": None}
        if self._call.return_token_ids:
            choice["token_ids"] = list(token_ids)
        if self._call.logprobs is not None:
            choice["logprobs"] = logprobs_body(scores) if scores else None
        return self._chunk([choice])

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk: dict[str, Any] = {
            "id": COMPLETION_PREFIX + self._started.request_id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._started.model,
            "choices": choices,
        }
        if self._usage:
            chunk["usage"] = None
        return chunk


def _reasoning(text: str) -> dict[str, Any]:
    return {"reasoning": text, "reasoning_content": text} if text else {}


def _call(call: ToolCallDelta) -> dict[str, Any]:
    """A whole call, or what one delta adds to it."""
    if not call.id:
        return {"function": {"arguments": call.arguments}}
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def ending(event: ChoiceFinished) -> dict[str, Any]:
    """How a choice ended; a stop string or stop token of the client's is named."""
    return {"finish_reason": _FINISH[event.reason], "stop_reason": event.stop_reason}


_LINE_ENDS = str.maketrans({end: f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"})
"""Characters that JSON may hold as they are, but at which ``str.splitlines`` and so httpx end a line."""


def sse(body: dict[str, Any], event: str = "") -> bytes:
    """One server-sent event, its data on a line by itself for every client."""
    data = json.dumps(body, ensure_ascii=False, separators=(",", ":")).translate(_LINE_ENDS)
    return f"event: {event}\ndata: {data}\n\n".encode() if event else f"data: {data}\n\n".encode()


SSE_DONE = b"data: [DONE]\n\n"
SSE_KEEP_ALIVE = b": keep-alive\n\n"
