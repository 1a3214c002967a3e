"""Every way to say what an answer must match, and what becomes of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from actors.errors import InvalidRequest
from actors.types import Structure, StructureKind
from cluster.openai_request import parse_chat_request, to_call

SCHEMA = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"const": "ä"}}}
TEXT = '{"type": "object", "properties": {"b": {"type": "string"}, "a": {"const": "ä"}}}'


def structure(**fields: Any) -> Structure | None:
    body = {"messages": [{"role": "user", "content": "hello"}], **fields}
    return to_call(parse_chat_request(json.dumps(body).encode())).structure


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": TEXT}},
        {"guided_json": SCHEMA},
        {"guided_json": TEXT},
        {"guided_json": SCHEMA, "response_format": {"type": "text"}},
    ],
)
def test_schemas_keep_the_order_of_their_properties(fields: dict[str, Any]) -> None:
    assert structure(**fields) == Structure(kind=StructureKind.JSON_SCHEMA, text=TEXT)


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"response_format": {"type": "json_object"}}, StructureKind.JSON_OBJECT, ""),
        ({"structured_outputs": {"json_object": True}}, StructureKind.JSON_OBJECT, ""),
        ({"structured_outputs": {"regex": "a+", "json_object": False}}, StructureKind.REGEX, "a+"),
        ({"guided_regex": "a+"}, StructureKind.REGEX, "a+"),
        ({"structured_outputs": {"choice": ["ja", "nö"]}}, StructureKind.CHOICE, '["ja", "nö"]'),
        ({"guided_choice": ["ja", "nö"]}, StructureKind.CHOICE, '["ja", "nö"]'),
        ({"structured_outputs": {"grammar": "start: /a/"}}, StructureKind.GRAMMAR, "start: /a/"),
        ({"guided_grammar": "start: /a/"}, StructureKind.GRAMMAR, "start: /a/"),
    ],
)
def test_other_kinds(fields: dict[str, Any], kind: StructureKind, text: str) -> None:
    assert structure(**fields) == Structure(kind=kind, text=text)


@pytest.mark.parametrize("fields", [{}, {"response_format": {"type": "text"}}, {"response_format": None}])
def test_no_structure(fields: dict[str, Any]) -> None:
    assert structure(**fields) is None


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": [1]}}},
         "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"const": "x" * 65_536}}}},
         "response_format.json_schema.schema"),
        ({"response_format": {"type": "text", "json_schema": {"schema": {}}}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": "[1]"}}, "structured_outputs.json"),
        ({"guided_json": "[" * 50_000}, "guided_json"),
        ({"guided_json": 5}, "guided_json"),
        ({"guided_json": {"maximum": float("inf")}}, "guided_json"),
        ({"guided_json": '{"maximum": NaN}'}, "guided_json"),
        ({"guided_json": '{"maximum": 1e999}'}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": ["a", ""]}, "guided_choice"),
        ({"guided_choice": ["a"] * 1025}, "guided_choice"),
        ({"guided_choice": "a"}, "guided_choice"),
        ({"guided_regex": ""}, "guided_regex"),
        ({"guided_grammar": ""}, "guided_grammar"),
    ],
)  # fmt: skip
def test_wrong_values_name_their_field(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        structure(**fields)
    assert caught.value.field == field
    assert field in caught.value.message


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"guided_json": SCHEMA, "guided_regex": "a"}, ("guided_json", "guided_regex")),
        ({"response_format": {"type": "json_object"}, "guided_choice": ["a"]}, ("response_format", "guided_choice")),
        ({"structured_outputs": {"json": SCHEMA, "grammar": "x"}},
         ("structured_outputs.json", "structured_outputs.grammar")),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
         ("response_format", "structured_outputs.regex")),
    ],
)  # fmt: skip
def test_two_structures_are_both_named(fields: dict[str, Any], names: tuple[str, str]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        structure(**fields)
    assert caught.value.field == names[1]
    assert caught.value.message.startswith(f"{names[0]} and {names[1]} ")


def test_an_empty_structured_outputs_is_wrong_beside_another_structure() -> None:
    with pytest.raises(InvalidRequest, match="structured_outputs must have"):
        structure(response_format={"type": "json_object"}, structured_outputs={})
