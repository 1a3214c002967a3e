"""Items of a conversation as the Responses API writes them, and what they are as messages of a chat.

    instructions                                  a system message before all
    message                                       a message of its role
    reasoning, assistant message, function_call   in a row: one message of the assistant
    function_call_output                          a message of the tool

A message of the assistant ends before reasoning, and before a second message that comes right behind one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Tag

from actors.errors import InvalidRequest
from actors.types import ContentPart, ImagePart, Message, MessageRole, TextPart, ToolCall
from cluster.openai_structure import Strict
from cluster.request_checks import check_messages, media_from_uri

Status = Literal["in_progress", "completed", "incomplete"]


def _tag(value: Any) -> str | None:
    # The parentheses tell tags from field names in error locations.
    if not isinstance(value, dict):
        return None
    kind = value.get("type", "message" if "role" in value else None)
    return f"({kind})" if isinstance(kind, str) else None


class InputText(Strict):
    type: Literal["input_text"]
    text: str


class InputImage(Strict):
    type: Literal["input_image"]
    image_url: str
    detail: Literal["auto", "low", "high", "original"] | None = None
    file_id: None = None


class OutputText(Strict):
    """``annotations`` and ``logprobs`` are what is left over of an earlier reply."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


PartItem = Annotated[
    Annotated[InputText, Tag("(input_text)")]
    | Annotated[InputImage, Tag("(input_image)")]
    | Annotated[OutputText, Tag("(output_text)")],
    Discriminator(
        _tag,
        custom_error_type="part_type",
        custom_error_message="must be an object whose type is input_text, input_image or output_text",
    ),
]


def _listed_text(value: Any) -> Any:
    return [{"type": "input_text", "text": value}] if isinstance(value, str) else value


Content = Annotated[list[PartItem], BeforeValidator(_listed_text, json_schema_input_type=str | list[PartItem])]


class MessageItem(Strict):
    """``id``, ``status`` and ``phase`` are what is left over of an earlier reply."""

    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    id: str | None = None
    status: Status | None = None
    phase: str | None = None


class FunctionCallItem(Strict):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: Status | None = None


class FunctionCallOutputItem(Strict):
    type: Literal["function_call_output"]
    call_id: str
    output: Content
    id: str | None = None
    status: Status | None = None


class SummaryText(Strict):
    type: Literal["summary_text"]
    text: str


class ReasoningText(Strict):
    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(Strict):
    """The thinking is the ``content``; where an item has none, as of another model, its summary stands for it."""

    type: Literal["reasoning"]
    summary: list[SummaryText] | None = None
    content: list[ReasoningText] | None = None
    encrypted_content: None = None
    id: str | None = None
    status: Status | None = None

    @property
    def text(self) -> str:
        return "\n\n".join(part.text for part in self.content or self.summary or ())


Item = Annotated[
    Annotated[MessageItem, Tag("(message)")]
    | Annotated[FunctionCallItem, Tag("(function_call)")]
    | Annotated[FunctionCallOutputItem, Tag("(function_call_output)")]
    | Annotated[ReasoningItem, Tag("(reasoning)")],
    Discriminator(
        _tag,
        custom_error_type="part_type",
        custom_error_message=(
            "must be an object whose type is message, function_call, function_call_output or reasoning"
        ),
    ),
]

_ROLES = {"user": MessageRole.USER, "system": MessageRole.SYSTEM, "developer": MessageRole.SYSTEM}


@dataclass(kw_only=True, slots=True)
class _Turn:
    """A message of the assistant in the making."""

    parts: list[ContentPart] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    last: object = None


class Conversation:
    """Messages, and the client's path of everything in them."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self._paths: dict[str, str] = {}
        self._turn: _Turn | None = None

    @classmethod
    def read(cls, instructions: str | None, given: str | Sequence[Item]) -> Conversation:
        """Raises InvalidRequest naming the first wrong field."""
        chat = cls()
        if instructions:
            chat._add(MessageRole.SYSTEM, (TextPart(text=instructions),), "instructions", "instructions")
        if isinstance(given, str):
            chat._add(MessageRole.USER, (TextPart(text=given),), "input", "input")
            items: Sequence[Item] = ()
        else:
            items = given
        for index, item in enumerate(items):
            chat._take(item, f"input[{index}]")
        chat._flush()
        try:
            check_messages(tuple(chat.messages), "content")
        except InvalidRequest as error:
            field = error.field or ""
            raise _wrong(chat.client_field(field), error.message.removeprefix(field).lstrip()) from None
        return chat

    def client_field(self, path: str) -> str:
        """A path into ``messages`` as the client wrote it; any other stays."""
        prefix = path
        while prefix:
            if (known := self._paths.get(prefix)) is not None:
                return known + path[len(prefix) :]
            prefix = prefix[: max(prefix.rfind("."), prefix.rfind("["), 0)]
        return "input" + path.removeprefix("messages") if path.startswith("messages") else path

    def _take(self, item: Item, path: str) -> None:
        match item:
            case MessageItem(role="assistant"):
                if self._turn is not None and isinstance(self._turn.last, MessageItem):
                    self._flush()
                turn = self._assistant(item, path)
                self._know("content", f"{path}.content")
                for index, part in enumerate(item.content):
                    field_ = f"{path}.content[{index}]"
                    self._know(f"content[{len(turn.parts)}]", field_)
                    turn.parts.append(_part(part, field_, MessageRole.ASSISTANT))
            case MessageItem():
                self._message(_ROLES[item.role], item.content, path, f"{path}.content")
            case FunctionCallItem():
                turn = self._assistant(item, path)
                for name in (f"tool_calls[{len(turn.calls)}]", f"tool_calls[{len(turn.calls)}].function"):
                    self._know(name, path)
                turn.calls.append(ToolCall(id=item.call_id, name=item.name, arguments=item.arguments))
            case FunctionCallOutputItem():
                self._message(MessageRole.TOOL, item.output, path, f"{path}.output", item.call_id)
                self._paths[f"messages[{len(self.messages) - 1}].tool_call_id"] = f"{path}.call_id"
            case ReasoningItem():
                if self._turn is not None and (self._turn.parts or self._turn.calls):
                    self._flush()
                turn = self._assistant(item, path)
                for name in ("reasoning", "reasoning_content"):
                    self._know(name, f"{path}.content")
                turn.reasoning.append(item.text)

    def _assistant(self, item: Item, path: str) -> _Turn:
        """The turn the item belongs to."""
        if self._turn is None:
            self._turn = _Turn()
            self._paths[f"messages[{len(self.messages)}]"] = path
        self._turn.last = item
        return self._turn

    def _know(self, name: str, path: str) -> None:
        self._paths.setdefault(f"messages[{len(self.messages)}].{name}", path)

    def _message(
        self, role: MessageRole, content: Sequence[PartItem], path: str, content_path: str, call_id: str | None = None
    ) -> None:
        parts = tuple(_part(part, f"{content_path}[{index}]", role) for index, part in enumerate(content))
        self._add(role, parts, path, content_path, call_id)

    def _add(
        self,
        role: MessageRole,
        parts: tuple[ContentPart, ...],
        path: str,
        content_path: str,
        call_id: str | None = None,
    ) -> None:
        self._flush()
        self._paths[f"messages[{len(self.messages)}]"] = path
        self._know("content", content_path)
        self.messages.append(Message(role=role, parts=parts, tool_call_id=call_id))

    def _flush(self) -> None:
        turn, self._turn = self._turn, None
        if turn is not None:
            self.messages.append(
                Message(
                    role=MessageRole.ASSISTANT,
                    parts=tuple(turn.parts),
                    reasoning="\n\n".join(turn.reasoning) or None,
                    tool_calls=tuple(turn.calls),
                )
            )


def _part(part: PartItem, path: str, role: MessageRole) -> ContentPart:
    if isinstance(part, OutputText) and role is not MessageRole.ASSISTANT:
        raise _wrong(path, "is output_text, which belongs to messages of role assistant")
    if isinstance(part, InputImage):
        source = media_from_uri(part.image_url, f"{path}.image_url")
        return ImagePart(source=source, low_detail=part.detail == "low")
    return TextPart(text=part.text)


def _wrong(field: str, rule: str) -> InvalidRequest:
    return InvalidRequest(f"{field} {rule}", field=field)
