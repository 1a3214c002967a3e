"""Calls of tools as structures: the checkpoint's own markers around JSON that matches a function's schema."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from actors.engine.constraints.structure import StructureTemplate
from actors.engine.constraints.vocabulary import ConstraintVocabulary
from actors.errors import InvalidRequest
from actors.types import Structure, StructureKind
from tests.unit.engine.constraints import structures as st

OPEN, CLOSE = st.LAYOUT.special["<tool_call>"], st.LAYOUT.special["</tool_call>"]
SCHEMA = {
    "properties": {"at": {"type": "array", "items": {"type": "integer"}, "maxItems": 2}, "n": {"pattern": "^\\d{2}$"}},
    "required": ["at"],
    "additionalProperties": False,
}
F = {"name": "f", "parameters": SCHEMA}
G = {"name": "g", "parameters": None}
RIGHT = '<tool_call>\n{"name": "f", "arguments": {"at": [1, 2]}}\n</tool_call>'


def calls(*functions: dict[str, Any], several: bool = False, **answer: Any) -> Structure:
    text = json.dumps({"functions": functions, "several": several, **answer})
    return Structure(kind=StructureKind.TOOL_CALLS, text=text)


EITHER = calls(F, several=True, answer={"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]})


def follows(structure: Structure, ids: tuple[int, ...], vocabulary: ConstraintVocabulary | None = None) -> bool:
    """Whether the ids may be drawn one after the other, and the reply may end behind them."""
    known = vocabulary or st.vocabulary()
    state = StructureTemplate(structure, known).start((), st.raising)
    for token in (*ids, st.EOS):
        if not state.allowed()[token // 32] >> (token % 32) & 1:
            return False
        state.accept(token)
    return True


@pytest.mark.parametrize(
    ("structure", "text", "fits"),
    [
        (calls(F), RIGHT, True),
        (calls(F, G), RIGHT, True),
        (calls(G), RIGHT, False),
        (calls(G), '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>', True),
        (calls(G), '<tool_call>\n{"name": "g", "arguments": {"a": 1}}\n</tool_call>', False),
        (calls(F), RIGHT.replace(", 2", ",2"), False),
        (calls(F), RIGHT.replace(", 2", ", 2, 3"), False),
        (calls(F), RIGHT.replace("at", "to"), False),
        (calls(F), RIGHT.replace("]}", '], "n": "42"}'), True),
        (calls(F), RIGHT.replace("]}", '], "n": "4\u0662"}'), False),
        (calls(F), RIGHT.removesuffix("</tool_call>"), False),
        (calls(F), "Look.\n" + RIGHT, False),
        (calls(F), f"{RIGHT}\n{RIGHT}", False),
        (calls(F, several=True), f"{RIGHT}\n{RIGHT}", True),
        (calls(F, several=True), RIGHT, True),
        (calls(F, several=True), "", False),
        (EITHER, f"{RIGHT}\n{RIGHT}", True),
        (EITHER, '{"a": "b"}', True),
        (EITHER, '{\n  "a":"b"\n}', True),
        (EITHER, '{"a": 1}', False),
        (EITHER, RIGHT.replace("at", "to"), False),
        (EITHER, RIGHT + '\n{"a": "b"}', False),
        (EITHER, '{"a": "b"}\n' + RIGHT, False),
        (EITHER, "Look.", False),
    ],
)
def test_what_is_a_call(structure: Structure, text: str, fits: bool) -> None:
    ids = st.encode(text)
    assert ids.count(OPEN) == text.count("<tool_call>") and ids.count(CLOSE) == text.count("</tool_call>")
    assert follows(structure, ids) == fits


def test_markers_are_never_spelt() -> None:
    begun = st.encode("<") + st.encode("tool_call>")
    assert OPEN not in begun and not follows(calls(F), (*begun, *st.encode(RIGHT)[1:]))


def test_markers_stand_in_calls_alone() -> None:
    text = json.dumps({"type": "string"})
    other = Structure(kind=StructureKind.JSON_SCHEMA, text=text)
    assert follows(other, st.encode('"a"')) and not follows(other, (*st.encode('"'), OPEN, *st.encode('"')))


def test_markers_are_no_part_of_the_answer_in_place_of_calls() -> None:
    quoted = (*st.encode('{"a": "'), OPEN, *st.encode('"}'))
    assert OPEN in quoted and not follows(EITHER, quoted)


def test_a_checkpoint_without_markers_spells_them() -> None:
    document = json.loads(st.tokenizer_json().replace("tool_call>", "other_call>"))
    vocabulary = ConstraintVocabulary(json.dumps(document), limit=st.LAYOUT.im_patch_id, end_ids=st.ENDS)
    assert vocabulary.special_id("<tool_call>") is None
    ids = tuple(
        token for piece in ("<", "tool_", "call>", RIGHT[11:-12], "</", "tool_", "call>") for token in st.encode(piece)
    )
    assert OPEN not in ids and follows(calls(F), ids, vocabulary)


@pytest.mark.parametrize("thinking", [False, True])
def test_whatever_is_drawn_is_a_call(thinking: bool) -> None:
    ended = 0
    for seed in range(10):
        fields: dict[str, Any] = {"starts_thinking": True, "reasoning_max_tokens": 4} if thinking else {}
        params = st.sampling(calls(F, G), **fields)
        ids = st.draw(st.constraint(params, (st.THINK,) if thinking else ()), seed)
        if ids is None:
            continue
        ended += 1
        text = st.decode(ids[ids.index(st.END_THINK) + 1 :]).lstrip("\n") if thinking else st.decode(ids)
        call = json.loads(text.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>"))
        assert ids.count(OPEN) == ids.count(CLOSE) == 1
        jsonschema.validate(call["arguments"], SCHEMA if call["name"] == "f" else {"maxProperties": 0})
    assert ended >= 5


@pytest.mark.parametrize("schema", [{"properties": {"a": {"uniqueItems": True}}}, {"x-guidance": {}}])
def test_schemas_that_cannot_be_enforced_are_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        StructureTemplate(calls(F, answer=schema), st.vocabulary())
    with pytest.raises(InvalidRequest, match=r"uniqueItems|x-guidance"):
        StructureTemplate(calls({"name": "f", "parameters": schema}), st.vocabulary())
