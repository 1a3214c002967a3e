"""What answers are asked to match, and independent judges of whether they do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import jsonschema
from jsonschema.validators import validator_for

SHORT = {"type": "string", "maxLength": 8}
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": -9, "maximum": 9}, "y": {"type": "integer"}},
    "required": ["x", "y"],
    "additionalProperties": False,
}

SCHEMAS: dict[str, Any] = {
    "null": {"type": "null"},
    "boolean": {"type": "boolean"},
    "integer": {"type": "integer"},
    "integer range": {"type": "integer", "minimum": 17, "maximum": 1205},
    "integer negative range": {"type": "integer", "minimum": -300, "maximum": -7},
    "integer exclusive": {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 6},
    "integer at least": {"type": "integer", "minimum": 100_000},
    "integer multiple": {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 500},
    "number": {"type": "number"},
    "number range": {"type": "number", "minimum": -1.5, "maximum": 2.25},
    "number exclusive": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    "number multiple": {"type": "number", "multipleOf": 0.25},
    "string": {"type": "string", "maxLength": 12},
    "string lengths": {"type": "string", "minLength": 3, "maxLength": 5},
    "string exact length": {"type": "string", "minLength": 4, "maxLength": 4},
    "string unbounded": {"type": "string"},
    "pattern anchored": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    "pattern inside": {"type": "string", "pattern": "ab+c", "maxLength": 12},
    "pattern start": {"type": "string", "pattern": "^id_", "maxLength": 9},
    "pattern alternatives": {"type": "string", "pattern": "^(alpha|beta)(-[0-9]+)?$"},
    "pattern escapes": {"type": "string", "pattern": r"^\d{2}/\w\\\.$"},
    "pattern unicode": {"type": "string", "pattern": "^[äöü]{2}漢$"},
    "format date": {"type": "string", "format": "date"},
    "format date-time": {"type": "string", "format": "date-time"},
    "format time": {"type": "string", "format": "time"},
    "format ipv4": {"type": "string", "format": "ipv4"},
    "format ipv6": {"type": "string", "format": "ipv6"},
    "format uuid": {"type": "string", "format": "uuid"},
    "format email": {"type": "string", "format": "email"},
    "enum": {"enum": ["red", "green", "blue"]},
    "enum mixed": {"enum": [None, True, 3, -2.5, "x", [1, "a"], {"k": "v"}]},
    "enum unicode": {"enum": ["größer", "漢字", "e\u0301", "\U0001f600", 'say "hi"', "back\\slash", "tab\tnew\nline"]},
    "const string": {"const": "exactly this"},
    "const object": {"const": {"a": [1, None, {"b": 'quote " inside'}], "ü": False}},
    "type list": {"type": ["integer", "null", "boolean"]},
    "type and enum": {"type": "string", "enum": ["a", "b", "c"]},
    "array": {"type": "array", "items": {"type": "integer"}},
    "array bounds": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    "array exact": {"type": "array", "items": {"enum": ["x", "y"]}, "minItems": 3, "maxItems": 3},
    "array empty": {"type": "array", "maxItems": 0},
    "array tuple": {"type": "array", "prefixItems": [{"type": "integer"}, SHORT], "items": False, "minItems": 2},
    "array tuple open": {"type": "array", "prefixItems": [{"const": "head"}], "items": {"type": "null"}, "minItems": 1},
    "array nested": {
        "type": "array",
        "items": {"type": "array", "items": {"type": "integer"}, "maxItems": 2},
        "maxItems": 3,
    },
    "array of anything": {"type": "array", "maxItems": 2},
    "object closed": POINT,
    "object optional": {
        "type": "object",
        "properties": {"a": {"type": "null"}, "b": {"type": "boolean"}, "c": {"type": "integer", "maximum": 5}},
        "additionalProperties": False,
    },
    "object some required": {
        "type": "object",
        "properties": {"a": SHORT, "b": SHORT, "c": {"type": "boolean"}},
        "required": ["b"],
        "additionalProperties": False,
    },
    "object map": {"type": "object", "additionalProperties": {"type": "integer"}},
    "object sized": {
        "type": "object",
        "additionalProperties": {"type": "null"},
        "minProperties": 1,
        "maxProperties": 2,
    },
    "object empty": {"type": "object", "additionalProperties": False},
    "object open": {"type": "object", "properties": {"known": {"type": "boolean"}}, "required": ["known"]},
    "object pattern keys": {
        "type": "object",
        "patternProperties": {"^n_[a-z]{1,3}$": {"type": "integer"}, "^s_[a-z]$": {"type": "null"}},
        "additionalProperties": False,
    },
    "object unicode keys": {
        "type": "object",
        "properties": {"größe": {"type": "integer"}, "名前": SHORT, 'a "b"': {"type": "null"}, "": {"type": "boolean"}},
        "required": ["größe", "名前", 'a "b"', ""],
        "additionalProperties": False,
    },
    "object nested": {
        "type": "object",
        "properties": {"from": POINT, "to": POINT, "tags": {"type": "array", "items": SHORT, "maxItems": 2}},
        "required": ["from", "to", "tags"],
        "additionalProperties": False,
    },
    "object deep": {
        "type": "object",
        "properties": {
            "a": {
                "type": "object",
                "properties": {
                    "b": {"type": "object", "properties": {"c": {"type": "object", "properties": {"d": POINT}}}}
                },
                "required": ["b"],
                "additionalProperties": False,
            }
        },
        "required": ["a"],
        "additionalProperties": False,
    },
    "anyOf": {"anyOf": [{"type": "integer"}, {"type": "boolean"}, POINT]},
    "anyOf objects": {
        "anyOf": [
            {
                "type": "object",
                "properties": {"kind": {"const": "circle"}, "r": {"type": "number", "minimum": 0}},
                "required": ["kind", "r"],
                "additionalProperties": False,
            },
            {
                "type": "object",
                "properties": {"kind": {"const": "square"}, "side": {"type": "integer"}},
                "required": ["kind", "side"],
                "additionalProperties": False,
            },
        ]
    },
    "oneOf disjoint": {"oneOf": [{"type": "string", "maxLength": 4}, {"type": "integer"}, {"type": "null"}]},
    "allOf": {"allOf": [{"type": "integer", "minimum": 10}, {"maximum": 20}]},
    "allOf objects": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {"type": "object", "properties": {"b": {"type": "boolean"}}, "required": ["b"]},
        ]
    },
    "anyOf with sibling": {"type": "integer", "anyOf": [{"maximum": 3}, {"minimum": 1000}]},
    "ref": {"$defs": {"p": POINT}, "type": "array", "items": {"$ref": "#/$defs/p"}, "minItems": 1, "maxItems": 2},
    "ref definitions": {
        "definitions": {"name": {"type": "string", "pattern": "^[a-z]{1,4}$"}},
        "type": "object",
        "properties": {"n": {"$ref": "#/definitions/name"}},
        "required": ["n"],
        "additionalProperties": False,
    },
    "ref anchor": {
        "$id": "https://example.org/s",
        "$defs": {"a": {"$anchor": "here", "enum": [1, 2]}},
        "$ref": "#here",
    },
    "ref to property": {
        "type": "object",
        "properties": {"a": {"type": "boolean"}, "b": {"$ref": "#/properties/a"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
    "recursive tree": {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "v": {"type": "integer", "minimum": 0, "maximum": 9},
                    "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
                },
                "required": ["v"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    },
    "recursive list": {
        "$defs": {
            "list": {
                "anyOf": [
                    {"type": "null"},
                    {
                        "type": "object",
                        "properties": {"head": {"type": "integer"}, "tail": {"$ref": "#/$defs/list"}},
                        "required": ["head", "tail"],
                        "additionalProperties": False,
                    },
                ]
            }
        },
        "$ref": "#/$defs/list",
    },
    "recursive root": {"type": "array", "items": {"$ref": "#"}, "maxItems": 2},
    "draft 7": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "array",
        "items": [{"type": "integer"}, {"type": "null"}],
        "additionalItems": False,
        "minItems": 2,
    },
    "draft 4": {
        "$schema": "http://json-schema.org/draft-04/schema#",
        "type": "integer",
        "minimum": 1,
        "exclusiveMinimum": True,
        "maximum": 4,
    },
    "annotations": {
        "$comment": "nothing here matters",
        "title": "T",
        "description": "D",
        "default": 1,
        "examples": [1],
        "deprecated": True,
        "readOnly": True,
        "x-own": {"type": "string"},
        "type": "integer",
    },
    "anything": {},
    "tool call": {
        "type": "object",
        "properties": {
            "name": {"enum": ["get_weather", "get_time"]},
            "arguments": {
                "type": "object",
                "properties": {"city": SHORT, "days": {"type": "integer", "minimum": 1, "maximum": 14}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    },
    "invoice": {
        "type": "object",
        "properties": {
            "number": {"type": "string", "pattern": "^INV-[0-9]{4}$"},
            "date": {"type": "string", "format": "date"},
            "paid": {"type": "boolean"},
            "lines": {
                "type": "array",
                "minItems": 1,
                "maxItems": 2,
                "items": {
                    "type": "object",
                    "properties": {"text": SHORT, "amount": {"type": "number", "minimum": 0, "maximum": 1000}},
                    "required": ["text", "amount"],
                    "additionalProperties": False,
                },
            },
        },
        "required": ["number", "date", "paid", "lines"],
        "additionalProperties": False,
    },
}

REGEXES = (
    r"yes|no|maybe",
    r"\d{3}-\d{4}",
    r"[A-Z][a-z]{2,6}",
    r"(ab|cd)*e?f",
    r"[^a-z\n]{1,5}",
    r"(?i)hello world",
    r"-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?",
    r"#[0-9a-fA-F]{6}",
    r"(\w{1,4} ){2}\d{1,3}\.",
    r"[äöüß漢]{3}",
    r"a{2,4}b{0,2}|c{3}",
    r"\([0-9]{1,3}(,[0-9]{1,3}){0,3}\)",
    r'"([^"\\]|\\["\\n]){0,6}"',
    r"<b>[a-z]{1,5}</b>",
    r"^anchored$",
)

CHOICES: tuple[tuple[str, ...], ...] = (
    ("yes", "no"),
    ("a", "ab", "abc", "abx"),
    ("positive", "negative", "neutral", "not sure"),
    (" leading", "trailing ", "two words", "line\nbreak", "tab\t"),
    ("größer", "漢字", "\U0001f600", "é", "e\u0301"),
    ('quote "', "back\\slash", "brace {", "[x]*", "^$.|?+()", "</think>", "<think>", "\x01\x7f"),
    tuple(f"option number {number}" for number in range(300)),
)


def _balanced(text: str) -> bool:
    depth = 0
    for character in text:
        depth += {"(": 1, ")": -1}[character]
        if depth < 0:
            return False
    return depth == 0


def _same_count(text: str) -> bool:
    half = len(text) // 2
    return len(text) % 2 == 0 and text == "a" * half + "b" * half


_NUMBER = r"\s*-?\d+\s*"


def _sum(text: str) -> bool:
    """An arithmetic expression: brackets are folded from inside out until one number is left."""
    while (folded := re.sub(rf"\({_NUMBER}([-+*]{_NUMBER})*\)", "1", text)) != text:
        text = folded
    return re.fullmatch(rf"{_NUMBER}([-+*]{_NUMBER})*", text) is not None


def _key_values(text: str) -> bool:
    lines = text.split("\n")
    return lines[-1] == "" and all(re.fullmatch(r"[a-z]{1,4} = (on|off)", line) for line in lines[:-1])


def _json_call(text: str) -> bool:
    found = re.fullmatch(r"call (\w+)\((.*)\)", text, re.DOTALL)
    if found is None or found[1] not in ("f", "g"):
        return False
    jsonschema.validate(json.loads(found[2]), POINT)
    return True


GRAMMARS: dict[str, tuple[str, Callable[[str], bool]]] = {
    "balanced": ('start: pair*\npair: "(" pair* ")"', _balanced),
    "same count": ('start: ab?\nab: "a" ab? "b"', _same_count),
    "arithmetic": (
        'start: term (OP term)*\nterm: INT | "(" start ")"\nOP: "+" | "-" | "*"\nINT: /-?[0-9]{1,3}/\n%ignore /[ ]/',
        _sum,
    ),
    "lines": ('start: line{1,3}\nline: KEY " = " ("on" | "off") "\\n"\nKEY: /[a-z]{1,4}/', _key_values),
    "imports": (
        '%import common.INT\nstart: INT ("," INT)*  // a comment with <brackets>',
        lambda text: re.fullmatch(r"\d+(,\d+)*", text) is not None,
    ),
    "json inside": (f'start: "call " ("f" | "g") "(" point ")"\npoint: %json {json.dumps(POINT)}', _json_call),
    "terminal operators": (
        "start: WORD\nWORD: /[a-z]{1,6}/ & ~/(?s:.*)e(?s:.*)/",
        lambda text: re.fullmatch("[a-df-z]{1,6}", text) is not None,
    ),
}

_EXTRA_FORMATS = {
    "date-time": r"\d{4}-\d\d-\d\d[tT]\d\d:\d\d:\d\d(\.\d+)?([zZ]|[+-]\d\d:\d\d)",
    "time": r"\d\d:\d\d:\d\d(\.\d+)?([zZ]|[+-]\d\d:\d\d)",
}


def check_schema_output(schema: Any, text: str) -> None:
    """Raises ValueError or jsonschema.ValidationError if the text is no JSON document of the schema."""
    kind = validator_for(schema, default=jsonschema.Draft202012Validator)
    kind.check_schema(schema)
    document = json.loads(text)
    kind(schema, format_checker=kind.FORMAT_CHECKER).validate(document)
    pattern = _EXTRA_FORMATS.get(schema.get("format", ""))
    if pattern is not None and not re.fullmatch(pattern, document):
        raise ValueError(f"{document!r} is no {schema['format']}")
