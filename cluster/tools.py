"""Tools of a request: bounds that both facades check, the form chat templates read, and the structure of calls.

A forced call (``tool_choice`` required or named) is structured output: after any thinking comes

    <tool_call>
    {"name": "f", "arguments": {...}}
    </tool_call>

once, or several times where parallel calls are allowed and no function is named. Engines make a grammar of it. Where
the model may call (``auto``) and the answer is to match a JSON schema, the reply is either such calls or such an
answer.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from actors.errors import InvalidRequest
from actors.types import Structure, StructureKind
from cluster.generation import GenerateCall, Tool, ToolChoice, ToolMode

MAX_TOOLS = 128
MAX_NAME_LENGTH = 64
MAX_SCHEMA_DEPTH = 60
"""Nesting costs stack later on."""

_NAME = re.compile(rf"[A-Za-z0-9_-]{{1,{MAX_NAME_LENGTH}}}")
_LIBRARY_OPTIONS = "x-guidance"


def check_tools(tools: Sequence[Tool], field: Callable[[int, str], str]) -> None:
    """Form only: whether a schema makes sense is for the engine that compiles it, when calls are forced.

    ``field`` gives the client's path of the name or the parameters of a tool.

    Raises:
        InvalidRequest: too many tools, a name that is none or that two have, or parameters that describe no object.
    """
    if len(tools) > MAX_TOOLS:
        raise _wrong("tools", f"has {len(tools)} tools, the limit is {MAX_TOOLS}")
    first: dict[str, int] = {}
    for index, tool in enumerate(tools):
        name = field(index, "name")
        if _NAME.fullmatch(tool.name) is None:
            raise _wrong(name, f'must be 1 to {MAX_NAME_LENGTH} letters, digits, "_" or "-"')
        if first.setdefault(tool.name, index) != index:
            raise _wrong(name, f"is {tool.name!r}, as that of tools[{first[tool.name]}]")
        if tool.parameters is not None:
            _check_parameters(tool.parameters, field(index, "parameters"))


def _check_parameters(schema: dict[str, Any], field: str) -> None:
    if schema.get("type", "object") != "object":
        raise _wrong(field, 'must be the JSON schema of an object: its type must be "object"')
    if not isinstance(schema.get("properties", {}), dict):
        raise _wrong(f"{field}.properties", "must be an object")
    required = schema.get("required", [])
    if not (isinstance(required, list) and all(isinstance(name, str) for name in required)):
        raise _wrong(f"{field}.required", "must be a list of names")
    _check_values(schema, field)
    if _LIBRARY_OPTIONS in schema:
        raise _wrong(f"{field}.{_LIBRARY_OPTIONS}", "is not supported")


def _check_values(schema: dict[str, Any], field: str) -> None:
    """Nesting has a bound, and numbers are such as JSON has: a schema goes into prompts, and back to the client."""
    level: list[Any] = [schema]
    for _ in range(MAX_SCHEMA_DEPTH):
        if any(isinstance(value, float) and not math.isfinite(value) for value in level):
            raise _wrong(field, "must have finite numbers only")
        level = [
            inner
            for value in level
            if isinstance(value, dict | list)
            for inner in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return
    raise _wrong(field, f"is nested deeper than {MAX_SCHEMA_DEPTH} levels")


def check_tool_choice(tools: Sequence[Tool], choice: ToolChoice, function_field: str) -> None:
    """Raises InvalidRequest for a call that nothing offered could make."""
    if choice.mode is not ToolMode.REQUIRED:
        return
    if choice.function is not None:
        if all(tool.name != choice.function for tool in tools):
            raise _wrong(function_field, f"is {choice.function!r}, which tools does not have")
    elif not tools:
        raise _wrong("tool_choice", "is required, but there are no tools")


def parse_parameters(text: str, field: str) -> dict[str, Any]:
    """The JSON schema of a function's arguments. Raises InvalidRequest for text that is no JSON object."""
    schema = parse_json(text, field)
    if not isinstance(schema, dict):
        raise _wrong(field, "must be a JSON schema, which is an object")
    return schema


def parse_json(text: str, field: str) -> Any:
    """Raises InvalidRequest for text that is no JSON, of which NaN and infinite numbers are no part."""
    try:
        return json.loads(text, parse_float=_finite, parse_constant=_finite)
    except ValueError as error:
        raise _wrong(field, f"is not valid JSON: {error}") from None
    except RecursionError:
        raise _wrong(field, "is nested too deeply") from None


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value


def template_form(tool: Tool) -> dict[str, Any]:
    """As OpenAI declares it, which is what chat templates write into the prompt: the same for both APIs."""
    function: dict[str, Any] = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.parameters is not None:
        function["parameters"] = tool.parameters
    return {"type": "function", "function": function}


def answer_structure(call: GenerateCall) -> Structure | None:
    """What the answer must match: what the caller says, calls that are forced, or either of the two where the model is
    free to call and what the caller says is a JSON schema."""
    if call.forces_call:
        return _calls(call)
    if call.structure is None or not call.offered_tools:
        return call.structure
    match call.structure.kind:
        case StructureKind.JSON_SCHEMA:
            return _calls(call, json.loads(call.structure.text))
        case StructureKind.JSON_OBJECT:
            return _calls(call, {"type": "object"})
    return call.structure


def _calls(call: GenerateCall, answer: Any = None) -> Structure:
    choice = call.tool_choice.function
    functions = [
        {"name": tool.name, "parameters": tool.parameters} for tool in call.tools if choice in (None, tool.name)
    ]
    wanted = {"functions": functions, "several": call.parallel_tool_calls and choice is None}
    if answer is not None:
        wanted["answer"] = answer
    return Structure(kind=StructureKind.TOOL_CALLS, text=json.dumps(wanted))


def _wrong(field: str, rule: str) -> InvalidRequest:
    return InvalidRequest(f"{field} {rule}", field=field)
