"""OpenAI chat completion requests: what a body may hold, and its translation into a ``GenerateCall``.

Field names follow OpenAI; those it does not have (``top_k``, ``stop_token_ids``, ``return_token_ids`` ...) follow vLLM.
Anything else in a body is refused by name rather than ignored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from actors.errors import InvalidRequest
from cluster.generation import GenerateCall
from cluster.openai_media import ProcessorKwargs, to_media_options
from cluster.openai_messages import MessageBody, part_names, to_messages
from cluster.openai_neutral import NeutralFields
from cluster.openai_sampling import SamplingBody, sampling_fields
from cluster.openai_structure import Strict, StructureFields, find_structure
from cluster.openai_thinking import ChatTemplateKwargs, Effort, find_thinking
from cluster.openai_tools import ToolBody, ToolChoiceBody, to_tool_choice, to_tools
from cluster.request_checks import check_call, not_supported

Body = TypeVar("Body", bound=Strict)

MAX_LISTED_ERRORS = 10_000
"""More wrong places of a body are only counted: telling the first means having pydantic describe them all."""

SPELLING = {
    "timeout_s": "timeout",
    "thinking": "enable_thinking",
    "bad_words_ids": "bad_words",
    "media_options": "mm_processor_kwargs",
}
"""Names of later stages whose OpenAI names differ in every request; ``spelling`` adds what depends on the request."""


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None
    continuous_usage_stats: Literal[False] | None = None


class ChatRequest(NeutralFields, SamplingBody, StructureFields):
    """Body of ``POST /v1/chat/completions``. Of ``metadata`` only FastDeploy's ``enable_thinking`` is read."""

    messages: list[MessageBody]
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    reasoning_max_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    prompt_logprobs: int | None = None
    tools: list[ToolBody] | None = None
    tool_choice: ToolChoiceBody | None = None
    parallel_tool_calls: bool | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: ChatTemplateKwargs | None = None
    metadata: dict[str, Any] | None = None
    reasoning_effort: Effort | None = None
    mm_processor_kwargs: ProcessorKwargs | None = None
    return_token_ids: bool | None = None

    @property
    def wants_stream_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


def parse_chat_request(body: bytes) -> ChatRequest:
    """Checks the types of a body. Raises InvalidRequest naming the first wrong field."""
    return parse_body(ChatRequest, body)


def parse_body(kind: type[Body], body: bytes) -> Body:
    """The same for a body of any kind."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        if error.error_count() > MAX_LISTED_ERRORS:
            raise InvalidRequest(f"the body is wrong in {error.error_count()} places") from None
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    raise _refusal(first)


def _refusal(error: ErrorDetails) -> InvalidRequest:
    path = field_path(error["loc"])
    if error["type"] == "json_invalid":
        return InvalidRequest(f"the body is not valid JSON: {error['msg'].removeprefix('Invalid JSON: ')}")
    if not path:
        return InvalidRequest("the body must be a JSON object")
    match error["type"]:
        case "extra_forbidden":
            return not_supported(path)
        case "none_required":
            return not_supported(path)
        case "missing":
            return InvalidRequest(f"{path} is required", field=path)
        case "literal_error" if error["loc"][0] in NeutralFields.model_fields or error["loc"][0] == "stream_options":
            return InvalidRequest(f"{path}: {error['msg']}", field=path, reason="UNSUPPORTED_FIELD")
        case "part_type":
            return InvalidRequest(f"{path} {error['msg']}", field=path)
        case _:
            return InvalidRequest(f"{path}: {error['msg']}", field=path)


def field_path(location: tuple[int | str, ...]) -> str:
    """Writes a pydantic error location as ``messages[0].content[1].image_url.url``."""
    path = ""
    last = len(location) - 1
    for position, step in enumerate(location):
        if isinstance(step, int):
            path += f"[{step}]"
        elif position == last or not (step.startswith("(") and step.endswith(")")):
            path += f".{step}" if path else step
    return path


def to_call(chat: ChatRequest) -> GenerateCall:
    """Translates a request. Raises InvalidRequest for values out of bounds or at odds with each other."""
    limits = {limit for limit in (chat.max_tokens, chat.max_completion_tokens) if limit is not None}
    if len(limits) > 1:
        raise InvalidRequest(
            f"max_tokens {chat.max_tokens} and max_completion_tokens {chat.max_completion_tokens} differ: give one",
            field="max_completion_tokens",
        )
    if chat.stream_options is not None and not chat.stream:
        raise InvalidRequest("stream_options belongs to requests with stream", field="stream_options")
    _, structure = find_structure(chat)
    tools = to_tools(chat.tools)
    call = GenerateCall(
        **sampling_fields(chat),
        messages=to_messages(chat.messages),
        n=1 if chat.n is None else chat.n,
        max_tokens=limits.pop() if limits else None,
        reasoning_max_tokens=chat.reasoning_max_tokens,
        logprobs=_logprobs(chat),
        prompt_logprobs=chat.prompt_logprobs,
        structure=structure,
        tools=tools,
        tool_choice=to_tool_choice(chat.tool_choice, tools),
        parallel_tool_calls=chat.parallel_tool_calls is not False,
        thinking=find_thinking(chat)[1],
        media_options=to_media_options(chat.mm_processor_kwargs)[0],
        return_token_ids=bool(chat.return_token_ids),
    )
    check_call(call, spelling(chat))
    return call


def spelling(chat: ChatRequest) -> Mapping[str, str]:
    """The names this client used where there is a choice, for errors of ``to_call`` and of later stages."""
    names = dict(SPELLING)
    if chat.max_tokens is None:
        names["max_tokens"] = "max_completion_tokens"
    if chat.top_logprobs is not None:
        names["logprobs"] = "top_logprobs"
    names["structure"] = find_structure(chat)[0] or "response_format"
    names |= part_names(chat.messages)
    names["enable_thinking"] = find_thinking(chat)[0] or "enable_thinking"
    return names | to_media_options(chat.mm_processor_kwargs)[1]


def _logprobs(chat: ChatRequest) -> int | None:
    if chat.logprobs:
        return chat.top_logprobs or 0
    if chat.top_logprobs is not None:
        raise InvalidRequest("top_logprobs needs logprobs to be true", field="top_logprobs")
    return None


_PART = re.compile(r"^(messages\[\d+\])\.parts\b")
_HEAD = re.compile(r"^\w+")
_MEDIUM = re.compile(r"^(messages\[\d+\]\.content\[\d+\])\.(?:image|video)_url(?:\.(\w+))?$")
_OPTIONS = {"frames_per_second": "fps", "start_s": "video_start", "end_s": "video_end"}


def client_field(field: str, names: Mapping[str, str] = SPELLING) -> str:
    """Turns a field as a later stage names it, which may be in the terms of ``GenerateCall``, into OpenAI's terms."""
    field = names.get(field) or _HEAD.sub(lambda head: names.get(head[0], head[0]), field)
    if (medium := _MEDIUM.match(field)) and (option := medium[2]) not in (None, "url"):
        # Options stand beside the medium.
        return f"{medium[1]}.{_OPTIONS.get(option, option)}"
    return _PART.sub(r"\1.content", field)
