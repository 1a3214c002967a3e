"""OpenAI chat completion requests: what a body may hold, and its translation into a ``GenerateCall``.

Field names follow OpenAI; those it does not have (``top_k``, ``stop_token_ids``, ``return_token_ids`` ...) follow vLLM.
Anything else in a body is refused by name rather than ignored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, FiniteFloat, Tag, ValidationError
from pydantic_core import ErrorDetails

from actors.errors import InvalidRequest
from actors.types import (
    ContentPart,
    ImagePart,
    Message,
    MessageRole,
    TextPart,
    ThinkingMode,
    ToolCall,
    VideoPart,
)
from cluster.generation import GenerateCall
from cluster.request_checks import check_call, check_messages, check_pixels, media_from_uri, not_supported

SPELLING = {"timeout_s": "timeout", "thinking": "enable_thinking"}
"""Attributes of GenerateCall whose OpenAI names differ."""


class Strict(BaseModel):
    """No unknown fields, no conversions between types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TextBody(Strict):
    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    url: str
    detail: Literal["auto", "low", "high"] | None = None


class VideoUrl(Strict):
    url: str


class ImageUrlBody(Strict):
    """OpenAI's picture part, with the pixel bounds Hugging Face processors take."""

    type: Literal["image_url"]
    image_url: ImageUrl
    min_pixels: int | None = None
    max_pixels: int | None = None


class VideoUrlBody(Strict):
    """vLLM's video part."""

    type: Literal["video_url"]
    video_url: VideoUrl


class ImageBody(Strict):
    """The picture part of Hugging Face chat templates."""

    type: Literal["image"]
    url: str
    min_pixels: int | None = None
    max_pixels: int | None = None


class VideoBody(Strict):
    """The video part of Hugging Face chat templates."""

    type: Literal["video"]
    url: str


def _part_tag(value: Any) -> str | None:
    # The parentheses tell tags from field names in error locations.
    return f"({value['type']})" if isinstance(value, dict) and isinstance(value.get("type"), str) else None


PartBody = Annotated[
    Annotated[TextBody, Tag("(text)")]
    | Annotated[ImageUrlBody, Tag("(image_url)")]
    | Annotated[VideoUrlBody, Tag("(video_url)")]
    | Annotated[ImageBody, Tag("(image)")]
    | Annotated[VideoBody, Tag("(video)")],
    Discriminator(
        _part_tag,
        custom_error_type="part_type",
        custom_error_message="must be an object whose type is text, image_url, video_url, image or video",
    ),
]


def _listed_content(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class FunctionBody(Strict):
    name: str
    arguments: str


class ToolCallBody(Strict):
    id: str
    type: Literal["function"] = "function"
    function: FunctionBody


class MessageBody(Strict):
    """One turn. ``reasoning`` (vLLM) and ``reasoning_content`` (FastDeploy, DeepSeek) are the same thing.

    The last four are what OpenAI's client writes as null when it dumps an earlier reply; they must be null.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[list[PartBody], BeforeValidator(_listed_content)] | None = None
    name: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallBody] | None = None
    tool_call_id: str | None = None
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None


class ChatRequest(Strict):
    """Body of ``POST /v1/chat/completions``."""

    model: str | None = None
    messages: list[MessageBody]
    stream: bool | None = None
    temperature: FiniteFloat | None = None
    top_p: FiniteFloat | None = None
    top_k: int | None = None
    seed: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stop: Annotated[list[str], BeforeValidator(_listed)] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    enable_thinking: bool | None = None
    timeout: FiniteFloat | None = None
    return_token_ids: bool | None = None
    return_timings: bool | None = None


def parse_chat_request(body: bytes) -> ChatRequest:
    """Checks the types of a body. Raises InvalidRequest naming the first wrong field."""
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
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
    spelling = SPELLING if chat.max_tokens is not None else SPELLING | {"max_tokens": "max_completion_tokens"}
    call = GenerateCall(
        messages=tuple(_message(message, f"messages[{index}]") for index, message in enumerate(chat.messages)),
        model=chat.model,
        temperature=chat.temperature,
        top_p=chat.top_p,
        top_k=0 if chat.top_k == -1 else chat.top_k,
        seed=chat.seed,
        max_tokens=limits.pop() if limits else None,
        stop=tuple(chat.stop or ()),
        stop_token_ids=tuple(chat.stop_token_ids or ()),
        ignore_eos=bool(chat.ignore_eos),
        thinking=_thinking(chat.enable_thinking),
        timeout_s=chat.timeout,
        return_token_ids=bool(chat.return_token_ids),
        return_timings=bool(chat.return_timings),
    )
    check_messages(call.messages, "content")
    check_call(call, spelling)
    return call


def _thinking(enabled: bool | None) -> ThinkingMode:
    if enabled is None:
        return ThinkingMode.AUTO
    return ThinkingMode.ON if enabled else ThinkingMode.OFF


_ROLES: Mapping[str, MessageRole] = {
    "system": MessageRole.SYSTEM,
    "developer": MessageRole.SYSTEM,
    "user": MessageRole.USER,
    "assistant": MessageRole.ASSISTANT,
    "tool": MessageRole.TOOL,
}


def _message(body: MessageBody, field: str) -> Message:
    role = _ROLES[body.role]
    if body.reasoning is not None and body.reasoning_content not in (None, body.reasoning):
        raise InvalidRequest(
            f"{field}.reasoning and {field}.reasoning_content differ: give one", field=f"{field}.reasoning_content"
        )
    reasoning = body.reasoning if body.reasoning is not None else body.reasoning_content
    if role is not MessageRole.ASSISTANT:
        for name in ("reasoning", "reasoning_content", "tool_calls"):
            if getattr(body, name):
                raise _misplaced(f"{field}.{name}", "assistant")
        if body.content is None:
            raise InvalidRequest(f"{field}.content is required", field=f"{field}.content")
    if role is not MessageRole.TOOL and body.tool_call_id is not None:
        raise _misplaced(f"{field}.tool_call_id", "tool")
    return Message(
        role=role,
        parts=tuple(_part(part, f"{field}.content[{index}]") for index, part in enumerate(body.content or ())),
        reasoning=reasoning or None,
        tool_calls=tuple(
            ToolCall(id=call.id, name=call.function.name, arguments=call.function.arguments)
            for call in body.tool_calls or ()
        ),
        tool_call_id=body.tool_call_id,
        name=body.name,
    )


def _misplaced(field: str, role: str) -> InvalidRequest:
    return InvalidRequest(f"{field} belongs to messages of role {role}", field=field)


def _part(body: PartBody, field: str) -> ContentPart:
    match body:
        case TextBody():
            return TextPart(text=body.text)
        case ImageUrlBody():
            if body.image_url.detail == "low":
                raise InvalidRequest(
                    f'{field}.image_url.detail "low" is not supported: set max_pixels on the part instead',
                    field=f"{field}.image_url.detail",
                    reason="UNSUPPORTED_FIELD",
                )
            return _image(body.image_url.url, f"{field}.image_url.url", body.min_pixels, body.max_pixels, field)
        case ImageBody():
            return _image(body.url, f"{field}.url", body.min_pixels, body.max_pixels, field)
        case VideoUrlBody():
            return VideoPart(source=media_from_uri(body.video_url.url, f"{field}.video_url.url"))
        case VideoBody():
            return VideoPart(source=media_from_uri(body.url, f"{field}.url"))


def _image(url: str, url_field: str, low: int | None, high: int | None, field: str) -> ImagePart:
    check_pixels(low, high, field)
    return ImagePart(source=media_from_uri(url, url_field), min_pixels=low, max_pixels=high)


_PART = re.compile(r"^(messages\[\d+\])\.parts\b")


def client_field(field: str) -> str:
    """Turns a field as a later stage names it, which may be in the terms of ``GenerateCall``, into OpenAI's terms."""
    head, dot, rest = field.partition(".")
    return _PART.sub(r"\1.content", SPELLING.get(head, head) + dot + rest)
