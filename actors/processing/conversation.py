"""Checks a conversation before any work is done on it, and turns it into what chat templates read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from actors.errors import InvalidRequest, MediaTooLarge
from actors.processing.config import ProcessingLimits
from actors.processing.template import TemplateSupport
from actors.processing.tokenizer import without_marks
from actors.types import ContentPart, ImagePart, MediaKind, Message, MessageRole, TextPart, VideoPart

_MAX_DEPTH = 64
_MEDIA_ROLES = (MessageRole.USER, MessageRole.TOOL)


def part_field(message_index: int, part_index: int, part: ContentPart) -> str:
    """Path of a part as an OpenAI client wrote it."""
    name = {ImagePart: "image_url", VideoPart: "video_url", TextPart: "text"}[type(part)]
    return f"messages[{message_index}].content[{part_index}].{name}"


def media_parts(messages: Sequence[Message]) -> list[tuple[str, ImagePart | VideoPart]]:
    """Pictures and videos with their fields, in the order of the conversation."""
    return [
        (part_field(i, j, part), part)
        for i, message in enumerate(messages)
        for j, part in enumerate(message.parts)
        if not isinstance(part, TextPart)
    ]


def part_kind(part: ImagePart | VideoPart) -> MediaKind:
    return MediaKind.IMAGE if isinstance(part, ImagePart) else MediaKind.VIDEO


def check_conversation(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    *,
    support: TemplateSupport,
    limits: ProcessingLimits,
    forbidden: Sequence[str],
) -> None:
    """Raises InvalidRequest naming the field for wrong roles or order, forms the template lacks, too many media, and
    text that contains one of the ``forbidden`` strings or is no Unicode text."""
    if not messages:
        raise InvalidRequest("messages must not be empty", field="messages")
    _check_order(messages)
    for i, message in enumerate(messages):
        _check_message(i, message, support)
        for field, text in _texts(i, message):
            _check_text(text, field, forbidden)
    for kind, limit in ((MediaKind.IMAGE, limits.max_images), (MediaKind.VIDEO, limits.max_videos)):
        fields = [field for field, part in media_parts(messages) if part_kind(part) is kind]
        if len(fields) > limit:
            raise MediaTooLarge(
                f"{len(fields)} {kind.value}s are over the limit of {limit} {kind.value}s per request",
                field=fields[limit],
            )
    if tools and not support.tools:
        raise InvalidRequest("this model's chat template has no form for tools", field="tools")
    for i, tool in enumerate(tools):
        _check_json_text(tool, f"tools[{i}]", forbidden)


def to_chat(
    messages: Sequence[Message], support: TemplateSupport, protect: Callable[[str], str]
) -> list[dict[str, Any]]:
    """Messages as templates read them, every string from the client passed through ``protect``.

    Adjacent text parts are one text, so that nothing can be spelled across two. Content without media is a string.
    """
    return [_to_turn(message, support, protect) for message in messages]


def protect_json(value: Any, protect: Callable[[str], str]) -> Any:
    """A JSON value with every string in it, keys included, passed through ``protect``."""
    if isinstance(value, str):
        return protect(value)
    if isinstance(value, Mapping):
        return {protect(str(key)): protect_json(item, protect) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [protect_json(item, protect) for item in value]
    return value


def _to_turn(message: Message, support: TemplateSupport, protect: Callable[[str], str]) -> dict[str, Any]:
    items: list[dict[str, Any]] = []
    for _, part in _joined(message.parts):
        if isinstance(part, TextPart):
            items.append({"type": "text", "text": protect(part.text)})
        else:
            items.append({"type": support.media_types[part_kind(part)]})
    media = any(item["type"] != "text" for item in items)
    turn: dict[str, Any] = {
        "role": message.role.value,
        "content": items if media else "".join(item["text"] for item in items),
    }
    if message.reasoning is not None:
        turn["reasoning_content"] = protect(message.reasoning)
    if message.tool_calls:
        turn["tool_calls"] = [
            {
                "id": protect(call.id),
                "type": "function",
                "function": {
                    "name": protect(call.name),
                    "arguments": protect_json(json.loads(call.arguments), protect),
                },
            }
            for call in message.tool_calls
        ]
    for key, value in (("tool_call_id", message.tool_call_id), ("name", message.name)):
        if value is not None:
            turn[key] = protect(value)
    return turn


def _joined(parts: Sequence[ContentPart]) -> list[tuple[int, ContentPart]]:
    """Parts with adjacent texts made one, each with the index of its first part."""
    joined: list[tuple[int, ContentPart]] = []
    for index, part in enumerate(parts):
        first, previous = joined[-1] if joined else (index, None)
        if isinstance(part, TextPart) and isinstance(previous, TextPart):
            joined[-1] = (first, TextPart(text=previous.text + part.text))
        else:
            joined.append((index, part))
    return joined


def _check_order(messages: Sequence[Message]) -> None:
    calls: set[str] = set()
    leading = True
    for i, message in enumerate(messages):
        field = f"messages[{i}].role"
        if not isinstance(message.role, MessageRole):
            known = ", ".join(role.value for role in MessageRole)
            raise InvalidRequest(f"unknown role {message.role!r}: one of {known}", field=field)
        if message.role is MessageRole.SYSTEM:
            if not leading:
                raise InvalidRequest("system messages must come first", field=field)
            continue
        leading = False
        if message.role is MessageRole.TOOL:
            if not message.tool_call_id:
                # Which call it answers is plain where there is one.
                if len(calls) == 1:
                    continue
                raise InvalidRequest("a tool message needs tool_call_id", field=f"messages[{i}].tool_call_id")
            if message.tool_call_id not in calls:
                raise InvalidRequest(
                    "tool_call_id names no tool call of the assistant message before it",
                    field=f"messages[{i}].tool_call_id",
                )
        else:
            calls = {call.id for call in message.tool_calls}
    last = len(messages) - 1
    if messages[last].role not in _MEDIA_ROLES:
        raise InvalidRequest(
            f"the last message must be from user or tool, not {messages[last].role.value}",
            field=f"messages[{last}].role",
        )
    if not any(message.role is MessageRole.USER for message in messages):
        raise InvalidRequest("messages need at least one from user", field="messages")


def _check_message(i: int, message: Message, support: TemplateSupport) -> None:
    role = message.role
    if role is MessageRole.SYSTEM and not support.system:
        raise InvalidRequest("this model's chat template has no form for system messages", field=f"messages[{i}].role")
    if role is MessageRole.TOOL and not support.tool_messages:
        raise InvalidRequest("this model's chat template has no form for tool messages", field=f"messages[{i}].role")
    if role is not MessageRole.ASSISTANT:
        for name, value in (("tool_calls", message.tool_calls), ("reasoning", message.reasoning)):
            if value:
                raise InvalidRequest(f"only assistant messages have {name}", field=f"messages[{i}].{name}")
    if role is not MessageRole.TOOL and message.tool_call_id:
        raise InvalidRequest("only tool messages have tool_call_id", field=f"messages[{i}].tool_call_id")
    if message.tool_calls and not support.tool_calls:
        raise InvalidRequest("this model's chat template has no form for tool calls", field=f"messages[{i}].tool_calls")
    if not message.parts and not message.tool_calls:
        raise InvalidRequest("message has no content", field=f"messages[{i}].content")
    for j, part in enumerate(message.parts):
        if isinstance(part, TextPart):
            continue
        kind = part_kind(part)
        if role not in _MEDIA_ROLES:
            raise InvalidRequest(f"{role.value} messages cannot hold a {kind.value}", field=part_field(i, j, part))
        if kind not in support.media_types:
            raise InvalidRequest(
                f"this model's chat template has no form for a {kind.value}", field=part_field(i, j, part)
            )
    for j, call in enumerate(message.tool_calls):
        field = f"messages[{i}].tool_calls[{j}]"
        if not call.id or not call.name:
            raise InvalidRequest("a tool call needs an id and a name", field=field)
        _parse_arguments(call.arguments, f"{field}.function.arguments")


def _parse_arguments(text: str, field: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("tool call arguments are not valid JSON", field=field) from error
    if not isinstance(value, dict):
        raise InvalidRequest("tool call arguments must be a JSON object", field=field)
    return value


def _texts(i: int, message: Message) -> list[tuple[str, str]]:
    """Every string a client put into a message, with its field."""
    found: list[tuple[str, str]] = []
    for j, part in _joined(message.parts):
        if isinstance(part, TextPart):
            field = f"messages[{i}].content" if len(message.parts) == 1 else part_field(i, j, part)
            found.append((field, part.text))
    for name, value in (
        ("reasoning_content", message.reasoning),
        ("tool_call_id", message.tool_call_id),
        ("name", message.name),
    ):
        if value is not None:
            found.append((f"messages[{i}].{name}", value))
    for j, call in enumerate(message.tool_calls):
        field = f"messages[{i}].tool_calls[{j}]"
        found += [(f"{field}.id", call.id), (f"{field}.function.name", call.name)]
        found += [(f"{field}.function.arguments", call.arguments)]
        # Escapes hide a string from the look at the JSON text, not from the template.
        arguments = _parse_arguments(call.arguments, f"{field}.function.arguments")
        found += [(f"{field}.function.arguments", text) for text in _strings(arguments, f"{field}.function.arguments")]
    return found


def _check_text(text: str, field: str, forbidden: Sequence[str]) -> None:
    spelled = without_marks(text)
    for string in forbidden:
        if string in spelled:
            raise InvalidRequest(f"text must not contain the media token {string}", field=field)
    check_unicode(text, field)


def check_unicode(text: str, field: str) -> None:
    """Raises InvalidRequest for what is no Unicode text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequest("text is not valid Unicode: it holds a lone surrogate", field=field) from error


def _check_json_text(value: Any, field: str, forbidden: Sequence[str]) -> None:
    for text in _strings(value, field):
        _check_text(text, field, forbidden)


def _strings(value: Any, field: str) -> list[str]:
    """Strings of a JSON value, keys included. Raises InvalidRequest over _MAX_DEPTH: nesting costs stack later on."""
    found: list[str] = []
    level: list[Any] = [value]
    for _ in range(_MAX_DEPTH):
        below: list[Any] = []
        for item in level:
            if isinstance(item, str):
                found.append(item)
            elif isinstance(item, Mapping):
                found += map(str, item)
                below += item.values()
            elif isinstance(item, list | tuple):
                below += item
        if not below:
            return found
        level = below
    raise InvalidRequest(f"JSON is nested deeper than {_MAX_DEPTH} levels", field=field)
