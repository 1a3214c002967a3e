"""Tools of a chat request in OpenAI's shape: what a body may say of them, and their translation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Tag

from actors.errors import InvalidRequest
from cluster.generation import Tool, ToolChoice, ToolMode
from cluster.openai_structure import Strict
from cluster.tools import check_tool_choice, check_tools


class FunctionDefinition(Strict):
    """``strict`` changes nothing: arguments of forced calls always match their schema, those of other calls may not."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolBody(Strict):
    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(Strict):
    name: str


class NamedToolChoice(Strict):
    type: Literal["function"]
    function: FunctionName


def _choice_tag(value: Any) -> str | None:
    # The parentheses tell tags from field names in error locations.
    return "(mode)" if isinstance(value, str) else "(function)" if isinstance(value, dict) else None


ToolChoiceBody = Annotated[
    Annotated[str, Tag("(mode)")] | Annotated[NamedToolChoice, Tag("(function)")],
    Discriminator(
        _choice_tag,
        custom_error_type="part_type",
        custom_error_message="must be auto, none, required or an object that names a function",
    ),
]


def to_tools(bodies: list[ToolBody] | None) -> tuple[Tool, ...]:
    """Raises InvalidRequest naming the first wrong field."""
    tools = tuple(
        Tool(
            name=body.function.name,
            description=body.function.description or None,
            parameters=body.function.parameters,
        )
        for body in bodies or ()
    )
    check_tools(tools, lambda index, part: f"tools[{index}].function.{part}")
    return tools


def to_tool_choice(body: ToolChoiceBody | None, tools: tuple[Tool, ...]) -> ToolChoice:
    """Raises InvalidRequest for a mode OpenAI does not have, and for a call nobody could make."""
    match body:
        case None:
            choice = ToolChoice()
        case NamedToolChoice():
            choice = ToolChoice(mode=ToolMode.REQUIRED, function=body.function.name)
        case mode:
            if mode not in tuple(ToolMode):
                raise InvalidRequest(
                    "tool_choice must be auto, none, required or an object that names a function", field="tool_choice"
                )
            choice = ToolChoice(mode=ToolMode(mode))
    check_tool_choice(tools, choice, "tool_choice.function.name")
    return choice
