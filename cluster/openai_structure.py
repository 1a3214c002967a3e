"""The ways a chat request says what its answer must match: OpenAI's ``response_format``, vLLM's ``structured_outputs``
and vLLM's older ``guided_*``. All become one ``Structure``; a request may use one.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from actors.errors import InvalidRequest
from actors.types import Structure, StructureKind


class Strict(BaseModel):
    """Base of everything in a request body: no unknown fields, no conversions between types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def _written(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise PydanticCustomError("finite_number", "must have finite numbers only") from None


JsonText = Annotated[str, BeforeValidator(_written, json_schema_input_type=str | dict[str, Any])]
"""A JSON object, given as it is or as JSON text."""


class JsonSchemaFormat(Strict):
    """``name``, ``description`` and ``strict`` change nothing: a schema always binds."""

    name: str | None = None
    description: str | None = None
    schema_: JsonText = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(Strict):
    """vLLM's object: one of these."""

    json_: JsonText | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class StructureFields(Strict):
    """The fields of a request that may hold a structure."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonText | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None


def find_structure(body: StructureFields) -> tuple[str | None, Structure | None]:
    """Returns the field that says what the answer must match, and what it says; (None, None) where there is none.

    Raises:
        InvalidRequest: two fields do.
    """
    found: list[tuple[str, Structure]] = []

    def add(field: str, kind: StructureKind, text: str | None) -> None:
        if text is not None:
            found.append((field, Structure(kind=kind, text=text)))

    if (format_ := body.response_format) is not None:
        _add_response_format(format_, found)
    if (outputs := body.structured_outputs) is not None:
        before = len(found)
        add("structured_outputs.json", StructureKind.JSON_SCHEMA, outputs.json_)
        add("structured_outputs.json_object", StructureKind.JSON_OBJECT, "" if outputs.json_object else None)
        add("structured_outputs.regex", StructureKind.REGEX, outputs.regex)
        add("structured_outputs.choice", StructureKind.CHOICE, _listed(outputs.choice))
        add("structured_outputs.grammar", StructureKind.GRAMMAR, outputs.grammar)
        if len(found) == before:
            raise InvalidRequest(
                "structured_outputs must have json, json_object, regex, choice or grammar", field="structured_outputs"
            )
    add("guided_json", StructureKind.JSON_SCHEMA, body.guided_json)
    add("guided_regex", StructureKind.REGEX, body.guided_regex)
    add("guided_choice", StructureKind.CHOICE, _listed(body.guided_choice))
    add("guided_grammar", StructureKind.GRAMMAR, body.guided_grammar)
    match found:
        case []:
            return None, None
        case [(field, structure)]:
            return field, structure
        case [(first, _), (second, _), *_]:
            raise InvalidRequest(f"{first} and {second} both say what the answer must match: give one", field=second)
    raise AssertionError(found)


def _add_response_format(format_: ResponseFormat, found: list[tuple[str, Structure]]) -> None:
    match format_.type:
        case "json_schema":
            if format_.json_schema is None:
                raise InvalidRequest("response_format.json_schema is required", field="response_format.json_schema")
            schema = Structure(kind=StructureKind.JSON_SCHEMA, text=format_.json_schema.schema_)
            found.append(("response_format.json_schema.schema", schema))
        case "json_object":
            found.append(("response_format", Structure(kind=StructureKind.JSON_OBJECT)))
    if format_.type != "json_schema" and format_.json_schema is not None:
        raise InvalidRequest(
            f"response_format.json_schema does not belong to type {format_.type}", field="response_format.json_schema"
        )


def _listed(choices: list[str] | None) -> str | None:
    return None if choices is None else json.dumps(choices, ensure_ascii=False)
