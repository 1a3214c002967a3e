"""POST /v1/responses as an exchange: output items, the events that build them up, and the response around them.

    response.created, response.in_progress
    per item: response.output_item.added ... response.output_item.done
        reasoning       content_part.added, reasoning_text.delta ..., reasoning_text.done, content_part.done
        message         content_part.added, output_text.delta ..., output_text.done, content_part.done
        function_call   function_call_arguments.delta ..., function_call_arguments.done
    response.completed | response.incomplete (bounded or cancelled) | response.failed

A whole reply is the response of the last event. An error inside a stream is told by ``response.failed``, or by an
``error`` event where nothing was created yet; either is the last event.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any

from actors.errors import InternalError, ServingError, Status
from actors.types import FinishReason, ToolCallDelta
from cluster.generation import ChoiceFinished, Delta, Event, Finished, GenerationService, Started, Usage, is_last
from cluster.openai_response import error_body, sse, timings_body, usage_body
from cluster.openai_responses_request import ResponsesCall, ResponsesRequest
from cluster.request_checks import RESPONSE_PREFIX

_STATUS: Mapping[FinishReason, str] = {
    FinishReason.STOP: "completed",
    FinishReason.TOOL_CALLS: "completed",
    FinishReason.LENGTH: "incomplete",
    FinishReason.CANCELLED: "cancelled",
}
_ERROR_CODE: Mapping[Status, str] = {
    Status.INVALID_ARGUMENT: "invalid_prompt",
    Status.RESOURCE_EXHAUSTED: "rate_limit_exceeded",
}
"""OpenAI has few codes for failed responses; everything else is ``server_error``."""

Told = dict[str, Any]


class _Item:
    """An output item while it grows. Its text is one content part; of a call it is the arguments."""

    def __init__(self, kind: str, index: int, request_id: str, call: ToolCallDelta | None = None) -> None:
        prefix = {"reasoning": "rs", "message": "msg", "function_call": "fc"}[kind]
        self.kind = kind
        self.index = index
        self.id = f"{prefix}_{request_id}_{index}"
        self.call = call
        self.text = ""

    @property
    def text_name(self) -> str:
        return "reasoning_text" if self.kind == "reasoning" else "output_text"

    @property
    def logprobs(self) -> Told:
        """What events of answer text must have; log-probabilities are not told by this API."""
        return {} if self.kind == "reasoning" else {"logprobs": []}

    def part(self, text: str) -> Told:
        body: Told = {"type": self.text_name, "text": text}
        return body if self.kind == "reasoning" else body | {"annotations": []}

    def body(self, status: str, *, empty: bool = False) -> Told:
        """As an item of the output; ``empty`` before anything of it was told."""
        body: Told = {"id": self.id, "type": self.kind, "status": status}
        if self.call is not None:
            arguments = "" if empty else self.text
            return body | {"call_id": self.call.id, "name": self.call.name, "arguments": arguments}
        content = [] if empty else [self.part(self.text)]
        extra: Told = {"summary": []} if self.kind == "reasoning" else {"role": "assistant"}
        return body | extra | {"content": content}


class ResponseBuilder:
    """Takes the events of a request and tells what each of them adds to the response."""

    def __init__(self, body: ResponsesRequest) -> None:
        self._body = body
        self._created_at = int(time.time())
        self._started: Started | None = None
        self._output: list[Told] = []
        self._item: _Item | None = None
        self._status = "in_progress"
        self._error: Told | None = None
        self._finished: Finished | None = None
        self._count = 0

    @property
    def created(self) -> bool:
        return self._started is not None

    def take(self, event: Event) -> list[Told]:
        """Returns what a stream tells of the event."""
        if isinstance(event, Started):
            self._started = event
            return [self._tell(f"response.{name}", response=self.response()) for name in ("created", "in_progress")]
        if self._started is None:
            raise InternalError("the request did not begin with its first event")
        match event:
            case Delta():
                return list(self._grow(event, self._started.request_id))
            case ChoiceFinished():
                self._status = _STATUS[event.reason]
                return list(self._close("completed" if self._status == "completed" else "incomplete"))
            case Finished():
                self._finished = event
                name = "completed" if self._status == "completed" else "incomplete"
                return [self._tell(f"response.{name}", response=self.response())]
            case _:
                return []

    def fail(self, error: ServingError) -> list[Told]:
        """The last events of a response that fails: of an item that had begun, too."""
        told = error_body(error)["error"]
        if self._started is None:
            return [self._tell("error", code=told["code"], message=told["message"], param=told["param"])]
        self._status = "failed"
        self._error = {"code": _ERROR_CODE.get(error.status, "server_error"), "message": told["message"]}
        closing = list(self._close("incomplete"))
        return [*closing, self._tell("response.failed", response=self.response())]

    def response(self) -> Told:
        """The response as far as it has come."""
        body, started = self._body, self._started
        if started is None:
            raise InternalError("the request did not begin with its first event")
        reason = "max_output_tokens" if self._status == "incomplete" else None
        response: Told = {
            "id": RESPONSE_PREFIX + started.request_id,
            "object": "response",
            "created_at": self._created_at,
            "status": self._status,
            "background": False,
            "error": self._error,
            "incomplete_details": reason and {"reason": reason},
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": started.model,
            "output": list(self._output),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "store": False,
            "temperature": body.temperature,
            "text": {"format": _format(body)},
            "tool_choice": _dumped(body.tool_choice) or "auto",
            "tools": [_tool(tool) for tool in body.tools or ()],
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
        }
        if self._finished is not None:
            response["usage"] = _usage(self._finished.usage)
            if self._finished.timings is not None:
                response["timings"] = timings_body(self._finished.timings, self._finished.usage)
        return response

    def _grow(self, delta: Delta, request_id: str) -> Iterable[Told]:
        """Thinking comes first; more of an open call comes before text, which stands behind it."""
        calls = list(delta.tool_calls)
        if delta.reasoning:
            yield from self._more("reasoning", delta.reasoning, request_id)
        if calls and not calls[0].id:
            yield from self._more("function_call", calls.pop(0).arguments, request_id)
        if delta.text:
            yield from self._more("message", delta.text, request_id)
        for call in calls:
            yield from self._open("function_call", request_id, call)
            yield from self._more("function_call", call.arguments, request_id)

    def _more(self, kind: str, text: str, request_id: str) -> Iterable[Told]:
        if self._item is None or self._item.kind != kind:
            if kind == "function_call":
                raise InternalError("a call went on that had not begun")
            yield from self._open(kind, request_id)
        item = self._item
        assert item is not None
        if not text:
            return
        item.text += text
        if kind == "function_call":
            yield self._of(item, "function_call_arguments.delta", delta=text)
        else:
            yield self._of(item, f"{item.text_name}.delta", content_index=0, delta=text, **item.logprobs)

    def _open(self, kind: str, request_id: str, call: ToolCallDelta | None = None) -> Iterable[Told]:
        yield from self._close("completed")
        item = self._item = _Item(kind, len(self._output), request_id, call)
        added = item.body("in_progress", empty=True)
        yield self._tell("response.output_item.added", output_index=item.index, item=added)
        if call is None:
            yield self._of(item, "content_part.added", content_index=0, part=item.part(""))

    def _close(self, status: str) -> Iterable[Told]:
        item, self._item = self._item, None
        if item is None:
            return
        body = item.body(status)
        self._output.append(body)
        if item.call is not None:
            yield self._of(item, "function_call_arguments.done", name=item.call.name, arguments=item.text)
        else:
            yield self._of(item, f"{item.text_name}.done", content_index=0, text=item.text, **item.logprobs)
            yield self._of(item, "content_part.done", content_index=0, part=item.part(item.text))
        yield self._tell("response.output_item.done", output_index=item.index, item=body)

    def _of(self, item: _Item, event: str, /, **fields: Any) -> Told:
        return self._tell(f"response.{event}", item_id=item.id, output_index=item.index, **fields)

    def _tell(self, kind: str, **fields: Any) -> Told:
        told = {"type": kind, "sequence_number": self._count, **fields}
        self._count += 1
        return told


class ResponsesExchange:
    """A Responses request and its reply."""

    def __init__(self, body: ResponsesRequest) -> None:
        """Raises InvalidRequest for values out of bounds or at odds with each other."""
        self.stream = bool(body.stream)
        self._asked = ResponsesCall(body)
        self._builder = ResponseBuilder(body)

    def events(self, service: GenerationService) -> AsyncIterator[Event]:
        return service.generate(self._asked.call)

    def begins(self, event: Event) -> bool:
        return isinstance(event, Started)

    def is_last(self, event: Event) -> bool:
        return is_last(event)

    def add(self, event: Event) -> None:
        self._builder.take(event)

    def whole(self) -> dict[str, Any]:
        return self._builder.response()

    def frames(self, event: Event) -> Iterable[bytes]:
        return map(_sse, self._builder.take(event))

    def end(self) -> bytes:
        return b""

    def failed(self, error: ServingError) -> bytes:
        return b"".join(map(_sse, self._builder.fail(error)))

    def name_field(self, error: ServingError) -> None:
        if error.field is not None:
            error.field = self._asked.client_field(error.field)


def _usage(usage: Usage) -> Told:
    """Token accounting; of the input, images and video as chat tells them."""
    told = usage_body(usage)
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": told["prompt_tokens_details"],
        "output_tokens": usage.output_tokens,
        "output_tokens_details": told["completion_tokens_details"],
        "total_tokens": usage.prompt_tokens + usage.output_tokens,
    }


def _format(body: ResponsesRequest) -> Told:
    """As given, the schema as an object."""
    format_ = body.text.format if body.text is not None else None
    if format_ is None:
        return {"type": "text"}
    told = format_.model_dump(by_alias=True, exclude_none=True)
    if format_.schema_ is not None:
        told["schema"] = json.loads(format_.schema_)
    return told


def _tool(tool: Any) -> Told:
    told: Told = tool.model_dump(exclude_unset=True)
    return {"parameters": None, "strict": None, **told}


def _dumped(choice: Any) -> Any:
    return choice if choice is None or isinstance(choice, str) else choice.model_dump()


def _sse(told: Told) -> bytes:
    return sse(told, event=told["type"])
