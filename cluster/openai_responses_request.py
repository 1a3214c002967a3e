"""OpenAI Responses requests: what a body may hold, and its translation into a ``GenerateCall``.

The API keeps nothing: a conversation is sent whole each time. ``reasoning.effort`` only says whether the model thinks:
``none`` switches thinking off, any other effort switches it on, and without one the model's template decides. Sampling
fields OpenAI does not have follow vLLM. What would need a store or OpenAI's own tools is refused by name; ``user``,
``safety_identifier``, ``prompt_cache_key``, ``service_tier`` and ``include`` change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, WithJsonSchema

from actors.errors import InvalidRequest
from actors.types import Structure, StructureKind, ThinkingMode
from cluster.generation import GenerateCall, Tool, ToolChoice, ToolMode
from cluster.openai_media import ProcessorKwargs, to_media_options
from cluster.openai_request import SPELLING, client_field
from cluster.openai_responses_items import Conversation, Item
from cluster.openai_sampling import SamplingBody, sampling_fields
from cluster.openai_structure import JsonText, Strict
from cluster.openai_thinking import (
    MAX_METADATA_KEY_LENGTH,
    MAX_METADATA_PAIRS,
    MAX_METADATA_VALUE_LENGTH,
)
from cluster.request_checks import check_call
from cluster.tools import check_tool_choice, check_tools

NAMES = {
    **SPELLING,
    "structure": "text.format",
    "max_tokens": "max_output_tokens",
    "thinking": "reasoning.effort",
    "enable_thinking": "reasoning.effort",
    "messages": "input",
}
"""Names of ``GenerateCall`` and of later stages as this API spells them."""


def _tool_tag(value: Any) -> str | None:
    # The parentheses tell tags from field names in error locations.
    return "(function)" if isinstance(value, dict) and value.get("type") == "function" else None


class FunctionTool(Strict):
    """``strict`` changes nothing: arguments of forced calls always match their schema, those of other calls may not."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


FunctionToolOnly = Annotated[
    Annotated[FunctionTool, Tag("(function)")],
    Discriminator(
        _tool_tag,
        custom_error_type="part_type",
        custom_error_message="must be an object whose type is function: other tools are not supported",
    ),
]


class NamedFunction(Strict):
    type: Literal["function"]
    name: str


class TextFormat(Strict):
    """``name``, ``description`` and ``strict`` change nothing: a schema always binds."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: JsonText | None = Field(None, alias="schema")
    strict: bool | None = None


class TextConfig(Strict):
    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class Reasoning(Strict):
    """Thinking comes whole, as ``reasoning_text``: summaries are not made."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto"] | None = None


class ResponseStreamOptions(Strict):
    include_obfuscation: Literal[False] | None = None


def _input_tag(value: Any) -> str | None:
    return "(text)" if isinstance(value, str) else "(items)" if isinstance(value, list) else None


Input = Annotated[
    Annotated[str, Tag("(text)")] | Annotated[list[Item], Tag("(items)")],
    Discriminator(_input_tag, custom_error_type="part_type", custom_error_message="must be a text or a list of items"),
]

_CHOICES = "must be auto, none, required or an object that names a function"


def _choice_tag(value: Any) -> str | None:
    return "(mode)" if isinstance(value, str) else "(function)" if isinstance(value, dict) else None


ToolChoiceItem = Annotated[
    Annotated[str, WithJsonSchema({"enum": [str(mode) for mode in ToolMode]}), Tag("(mode)")]
    | Annotated[NamedFunction, Tag("(function)")],
    Discriminator(_choice_tag, custom_error_type="part_type", custom_error_message=_CHOICES),
]


class ResponsesRequest(SamplingBody):
    """Body of ``POST /v1/responses``."""

    input: Input
    instructions: str | None = None
    max_output_tokens: int | None = None
    reasoning: Reasoning | None = None
    reasoning_max_tokens: int | None = None
    text: TextConfig | None = None
    tools: list[FunctionToolOnly] | None = None
    tool_choice: ToolChoiceItem | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, str] | None = None
    include: list[Literal["reasoning.encrypted_content"]] | None = None
    stream_options: ResponseStreamOptions | None = None
    store: Literal[False] | None = None
    background: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    service_tier: Literal["auto", "default"] | None = None
    mm_processor_kwargs: ProcessorKwargs | None = None
    previous_response_id: None = None
    conversation: None = None
    prompt: None = None
    max_tool_calls: None = None
    top_logprobs: None = None


class ResponsesCall:
    """A request as the router takes it, with the client's name of everything in it."""

    def __init__(self, body: ResponsesRequest) -> None:
        """Raises InvalidRequest for values out of bounds or at odds with each other."""
        _check_metadata(body.metadata or {})
        self._conversation = Conversation.read(body.instructions, body.input)
        tools = _tools(body.tools or ())
        media_options, self._media_names = to_media_options(body.mm_processor_kwargs)
        self.call = GenerateCall(
            **sampling_fields(body),
            messages=tuple(self._conversation.messages),
            max_tokens=body.max_output_tokens,
            reasoning_max_tokens=body.reasoning_max_tokens,
            structure=_structure(body.text.format if body.text is not None else None),
            tools=tools,
            tool_choice=_tool_choice(body.tool_choice, tools),
            parallel_tool_calls=body.parallel_tool_calls is not False,
            thinking=_thinking(body.reasoning),
            media_options=media_options,
        )
        check_call(self.call, NAMES)

    def client_field(self, path: str) -> str:
        """A field as a later stage names it, as the client wrote it."""
        if path.startswith("messages"):
            return self._conversation.client_field(path)
        return client_field(path, NAMES | self._media_names)


def _check_metadata(metadata: Mapping[str, str]) -> None:
    if len(metadata) > MAX_METADATA_PAIRS:
        raise _wrong("metadata", f"has {len(metadata)} entries, the limit is {MAX_METADATA_PAIRS}")
    for key, value in metadata.items():
        if len(key) > MAX_METADATA_KEY_LENGTH or len(value) > MAX_METADATA_VALUE_LENGTH:
            rule = (
                f"must have keys of at most {MAX_METADATA_KEY_LENGTH} characters "
                f"and values of at most {MAX_METADATA_VALUE_LENGTH}"
            )
            raise _wrong("metadata", rule)


def _thinking(reasoning: Reasoning | None) -> ThinkingMode:
    if reasoning is None or reasoning.effort is None:
        return ThinkingMode.AUTO
    return ThinkingMode.OFF if reasoning.effort == "none" else ThinkingMode.ON


def _structure(format_: TextFormat | None) -> Structure | None:
    if format_ is None or format_.type == "text":
        return None
    if format_.type == "json_object":
        return Structure(kind=StructureKind.JSON_OBJECT)
    if format_.schema_ is None:
        raise _wrong("text.format.schema", "is required")
    return Structure(kind=StructureKind.JSON_SCHEMA, text=format_.schema_)


def _tools(bodies: Sequence[FunctionTool]) -> tuple[Tool, ...]:
    tools = tuple(
        Tool(name=body.name, description=body.description or None, parameters=body.parameters) for body in bodies
    )
    check_tools(tools, lambda index, part: f"tools[{index}].{part}")
    return tools


def _tool_choice(body: str | NamedFunction | None, tools: tuple[Tool, ...]) -> ToolChoice:
    match body:
        case None:
            choice = ToolChoice()
        case NamedFunction():
            choice = ToolChoice(mode=ToolMode.REQUIRED, function=body.name)
        case mode:
            if mode not in tuple(ToolMode):
                raise _wrong("tool_choice", _CHOICES)
            choice = ToolChoice(mode=ToolMode(mode))
    check_tool_choice(tools, choice, "tool_choice.name")
    return choice


def _wrong(field: str, rule: str) -> InvalidRequest:
    return InvalidRequest(f"{field} {rule}", field=field)
