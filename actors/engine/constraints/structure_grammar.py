"""What a caller writes as a structure, as a grammar for llguidance.

* JSON schemas are draft 2020-12 and older. Properties come in the order of the schema; between the parts of a document
  stands at most ``WHITESPACE``, so that no model can pad for ever. Keywords that cannot be enforced are refused.
* Regular expressions have the syntax of Rust's regex crate, without look-around and back references, and match the
  whole answer. There and in JSON schemas ``\\d`` and ``\\w`` stand for ASCII, as in ECMA 262.
* Calls of tools stand between the checkpoint's own marker tokens, where it has them, as the model was trained to write
  calls, and are spaced as the chat templates write them.
* Grammars are llguidance's variant of Lark, and consist of text: special tokens are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from llguidance import LLMatcher

from actors.errors import InvalidRequest
from actors.types import Structure, StructureKind

MAX_BYTES = 64 * 1024
"""Of a structure's text. Compiling takes milliseconds as a rule; the worst of this size found took 10 s."""
WHITESPACE = r"[ \n\r\t]{1,64}"
MAX_MESSAGE = 300


def check_size(structure: Structure) -> None:
    """Raises InvalidRequest if it is over ``MAX_BYTES`` or no text at all."""
    try:
        size = len(structure.text.encode())
    except UnicodeEncodeError:
        raise refused("it holds half of a surrogate pair") from None
    if size > MAX_BYTES:
        raise refused(f"it has {size} bytes, the limit is {MAX_BYTES}")


CALL_MARKERS = ("<tool_call>", "</tool_call>")


def grammar_of(structure: Structure, token_id: Callable[[str], int | None]) -> str:
    """``token_id`` gives the id of a marker, None where the checkpoint has no such token. Raises InvalidRequest."""
    match structure.kind:
        case StructureKind.JSON_SCHEMA:
            return _schema(structure.text)
        case StructureKind.JSON_OBJECT:
            return _schema('{"type": "object"}')
        case StructureKind.REGEX:
            if not structure.text:
                raise refused("the regular expression is empty")
            return LLMatcher.grammar_from_regex(_with_ascii_classes(structure.text))
        case StructureKind.GRAMMAR:
            _check_lark(structure.text)
            return json.dumps({"grammars": [{"lark_grammar": structure.text}]})
        case StructureKind.TOOL_CALLS:
            ids = ((marker, token_id(marker)) for marker in CALL_MARKERS)
            markers = [_quoted(text) if token is None else f"<[{token}]>" for text, token in ids]
            lark = _calls(markers=markers, **json.loads(structure.text))
            return json.dumps({"grammars": [{"lark_grammar": lark}]})
        case StructureKind.CHOICE:
            return LLMatcher.grammar_from_regex("|".join(map(_literal, _choices(structure.text))))


def _schema(text: str) -> str:
    schema = _json(text, "the JSON schema")
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise refused("the JSON schema must be an object")
    if "x-guidance" in schema:
        raise refused("x-guidance is not supported in the JSON schema")
    options: Any = _ANSWER_SPACING
    try:
        return LLMatcher.grammar_from_json_schema(json.dumps(_with_ascii_patterns(schema)), overrides=options)
    except (ValueError, RecursionError) as error:
        raise refused(str(error)) from None


_ANSWER_SPACING = {"lenient": False, "whitespace_pattern": WHITESPACE}
_CALL_SPACING = {"lenient": False, "whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def _calls(*, functions: list[dict[str, Any]], several: bool, markers: list[str], answer: Any = None) -> str:
    """In Lark, with the arguments, and the answer that may stand in place of calls, as JSON schemas inside."""
    newline, (opening, closing) = _quoted("\n"), markers
    ways = " | ".join(f"call_{index}" for index in range(len(functions)))
    rules = [
        "start: calls" if answer is None else "start: calls | answer",
        f"calls: call ({newline} call)*" if several else "calls: call",
        f"call: {opening} {newline} ({ways}) {newline} {closing}",
    ]
    for index, function in enumerate(functions):
        head = _quoted(f'{{"name": {json.dumps(function["name"])}, "arguments": ')
        schema = function["parameters"]
        if schema is None:
            rules.append(f"call_{index}: {head} {_quoted('{}}')}")
            continue
        bound = {**_inner_schema(schema), "type": "object", "x-guidance": _CALL_SPACING}
        rules.append(f"call_{index}: {head} arguments_{index} {_quoted('}')}")
        rules.append(f"arguments_{index}: %json {json.dumps(bound)}")
    if answer is not None:
        rules.append(f"answer: %json {json.dumps({**_inner_schema(answer), 'x-guidance': _ANSWER_SPACING})}")
    return "\n".join(rules)


def _inner_schema(schema: Any) -> dict[str, Any]:
    if not isinstance(schema, dict):
        raise refused("the JSON schema must be an object")
    if "x-guidance" in schema:
        raise refused("x-guidance is not supported in the JSON schema")
    found: dict[str, Any] = _with_ascii_patterns(schema)
    return found


def _quoted(text: str) -> str:
    return json.dumps(text)


_VALUES = frozenset(("const", "enum", "default", "examples"))
_SCHEMAS_BY_NAME = frozenset(("properties", "patternProperties", "$defs", "definitions", "dependentSchemas"))


def _with_ascii_patterns(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_with_ascii_patterns(part) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    result: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _VALUES:
            result[key] = value
        elif key in _SCHEMAS_BY_NAME and isinstance(value, Mapping):
            patterns = key == "patternProperties"
            result[key] = {
                _with_ascii_classes(name) if patterns else name: _with_ascii_patterns(part)
                for name, part in value.items()
            }
        elif key == "pattern" and isinstance(value, str):
            result[key] = _with_ascii_classes(value)
        else:
            result[key] = _with_ascii_patterns(value)
    return result


_CLASS_PARTS = re.compile(r"\\[pP]\{[^}]*\}|\\.|\[\^?\]?|\]|.", re.DOTALL)
_ASCII = {r"\d": "[0-9]", r"\w": "[0-9A-Za-z_]"}


def _with_ascii_classes(pattern: str) -> str:
    """Narrows ``\\d`` and ``\\w`` to what they mean everywhere; in a negated class that would widen it."""
    negated: list[bool] = []
    result = ""
    for part in _CLASS_PARTS.findall(pattern):
        if part.startswith("["):
            negated.append(part.startswith("[^"))
        elif part == "]" and negated:
            negated.pop()
        elif part in _ASCII and not any(negated):
            part = _ASCII[part]
        result += part
    return result


_LARK_TEXTS = re.compile(r'"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])+/|(?:#|//)[^\n]*', re.DOTALL)
_LARK_UNSUPPORTED = re.compile(r"<[^<>\s]+>|%llguidance")


def _check_lark(text: str) -> None:
    if not text.strip():
        raise refused("the grammar is empty")
    found = _LARK_UNSUPPORTED.search(_LARK_TEXTS.sub(" ", text))
    if found is not None:
        what = "options" if found.group().startswith("%") else "special tokens"
        raise refused(f"{found.group()} stands in the grammar: {what} are not supported")


def _choices(text: str) -> list[str]:
    choices = _json(text, "the choices")
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
        raise refused("the choices must be a JSON list of at least one string")
    return list(dict.fromkeys(choices))


def _literal(text: str) -> str:
    """As a regular expression."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise refused("a choice holds half of a surrogate pair") from None
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise refused(f"{what} cannot be read as JSON: {error}") from None


def refused(reason: str) -> InvalidRequest:
    """What to tell of a structure that cannot be used."""
    reason = " ".join(reason.split())
    shown = reason if len(reason) <= MAX_MESSAGE else f"{reason[:MAX_MESSAGE]} ..."
    return InvalidRequest(f"the structure cannot be used: {shown}", field="structure", reason="INVALID_STRUCTURE")
