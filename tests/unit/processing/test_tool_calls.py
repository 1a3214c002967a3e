"""Tool calls in answers: what is a call, what stays text, and that no way of cutting the text changes that."""

from __future__ import annotations

import itertools
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.processing.parsers import ReasoningParser
from actors.processing.tool_calls import ToolCallParser, joined
from actors.types import ToolCallDelta

Found = tuple[str, list[tuple[str, str]], bool]
"""Text, (name, arguments) of the calls, and whether the last call broke off."""


def parse(*chunks: str, most: int | None = None, leading: bool = False) -> Found:
    ids = itertools.count()
    parser = ToolCallParser(lambda: f"call_{next(ids)}", most=most, leading=leading)
    pieces = [*map(parser.push, chunks), parser.flush()]
    for _, deltas in pieces:
        assert len({delta.index for delta in deltas}) == len(deltas)
    told = [delta for _, deltas in pieces for delta in deltas]
    begun = [delta for delta in told if delta.id]
    assert [delta.index for delta in begun] == list(range(parser.count))
    assert [delta.id for delta in begun] == [f"call_{index}" for index in range(parser.count)]
    assert all(bool(delta.id) == bool(delta.name) for delta in told)
    assert [delta.index for delta in told] == sorted(delta.index for delta in told)
    calls = [(delta.name, delta.arguments) for delta in joined(told)]
    return "".join(text for text, _ in pieces), calls, parser.unfinished


def block(text: str) -> str:
    return f"<tool_call>\n{text}\n</tool_call>"


F = block('{"name": "f", "arguments": {"a": [1, 2]}}')
G = block('{"name": "g", "arguments": {}}')
CALL_F, CALL_G = ("f", '{"a": [1, 2]}'), ("g", "{}")

CORPUS: list[tuple[str, Found]] = [
    # One and several, alone and with text around.
    (F, ("", [CALL_F], False)),
    (F + "\n", ("", [CALL_F], False)),
    ("\n" + F, ("", [CALL_F], False)),
    (F + "\n" + G + "\n", ("", [CALL_F, CALL_G], False)),
    (F + G, ("", [CALL_F, CALL_G], False)),
    ("Let me look.\n" + F, ("Let me look.", [CALL_F], False)),
    (
        "Let me look. " + F + "\nAnd there:\n" + G + " Done.\n",
        ("Let me look. \nAnd there:\n Done.", [CALL_F, CALL_G], False),
    ),
    (F + "\n\nDone.", ("Done.", [CALL_F], False)),
    (F.replace("\n", ""), ("", [CALL_F], False)),
    (F.replace("\n", " \n\t "), ("", [CALL_F], False)),
    # Text alone stays as it is.
    ("", ("", [], False)),
    ("\n\n plain \n", ("\n\n plain \n", [], False)),
    ("a <tool_call", ("a <tool_call", [], False)),
    ("a < b <tool_calls> <tool>", ("a < b <tool_calls> <tool>", [], False)),
    ("</tool_call>", ("</tool_call>", [], False)),
    # Members in any order, other members, spaces, escapes; the first of each counts.
    (block('{"arguments": {"a": 1}, "name": "f"}'), ("", [("f", '{"a": 1}')], False)),
    (block('{"id": 3, "name": "f", "x": ["}"], "arguments": {"a": 1}, "y": null}'), ("", [("f", '{"a": 1}')], False)),
    (block('{ "name" :"f" ,\n"arguments": { "a" : 1 } }'), ("", [("f", '{ "a" : 1 }')], False)),
    (
        block('{"name": "f\\u00e9", "arguments": {"\\u00e9": "\\ud83d"}}'),
        ("", [("fé", '{"\\u00e9": "\\ud83d"}')], False),
    ),
    (
        block('{"name": "f", "arguments": {"name": "x", "arguments": {}}}'),
        ("", [("f", '{"name": "x", "arguments": {}}')], False),
    ),
    (block('{"name": "f", "name": 1, "arguments": {}, "arguments": 2}'), ("", [("f", "{}")], False)),
    (block('{"name": "f"}'), ("", [("f", "{}")], False)),
    (block('{"name": "é漢😀", "arguments": {"q": "größe 漢😀"}}'), ("", [("é漢😀", '{"q": "größe 漢😀"}')], False)),
    # Markers inside strings are part of them.
    (block('{"name": "f", "arguments": {"a": "</tool_call>"}}'), ("", [("f", '{"a": "</tool_call>"}')], False)),
    (block('{"name": "f", "arguments": {"a": "<tool_call>{}"}}'), ("", [("f", '{"a": "<tool_call>{}"}')], False)),
    # No call: text, marker and all.
    (block(""), (block(""), [], False)),
    (block("{}"), (block("{}"), [], False)),
    (block("look at this"), (block("look at this"), [], False)),
    (block("[1]"), (block("[1]"), [], False)),
    (block('{"name": ""}'), (block('{"name": ""}'), [], False)),
    (block('{"name": 3, "arguments": {}}'), (block('{"name": 3, "arguments": {}}'), [], False)),
    (block('{"name": "f", "arguments": "{}"}'), (block('{"name": "f", "arguments": "{}"}'), [], False)),
    (block('{"name": "f", "arguments": null}'), (block('{"name": "f", "arguments": null}'), [], False)),
    (block('{"name": "\\ud800", "arguments": {}}'), (block('{"name": "\\ud800", "arguments": {}}'), [], False)),
    (block('{"arguments": {}}'), (block('{"arguments": {}}'), [], False)),
    (block('{"arguments": {"a": 1'), (block('{"arguments": {"a": 1'), [], False)),
    (block("{'name': 'f', 'arguments': {}}"), (block("{'name': 'f', 'arguments': {}}"), [], False)),
    ("<tool_call>", ("<tool_call>", [], False)),
    ('<tool_call>\n{"name": "f", "argu', ('<tool_call>\n{"name": "f", "argu', [], False)),
    ("a\n" + block("no") + "\n" + F + "\nb", ("a\n" + block("no") + "\n\nb", [CALL_F], False)),
    ("<tool_call>" + F, ("<tool_call>", [CALL_F], False)),
    ('<tool_call>{"x": "' + F, ('<tool_call>{"x": "', [CALL_F], False)),
    (F + block("no"), (block("no"), [CALL_F], False)),
    # A call all the same: what was written of its arguments is passed on.
    (F.removesuffix("\n</tool_call>"), ("", [CALL_F], False)),
    (F.removesuffix("\n</tool_call>") + " and so on", ("and so on", [CALL_F], False)),
    (F.removesuffix("call>"), ("</tool_", [CALL_F], False)),
    (F.removesuffix("\n</tool_call>") + G, ("", [CALL_F, CALL_G], False)),
    (block('{"name": "f", "arguments": {"a": [1, 2]}') + "x", ("x", [CALL_F], False)),
    (block('{"name": "f", "arguments": {"a": [1, 2]}, oops}') + "x", ("x", [CALL_F], False)),
    (block('{"name": "f", "arguments": {"a": 01}}') + "x", ("x", [("f", '{"a": 01}}')], False)),
    (block('{"name": "f", "arguments": {a: 1} }') + "\n" + G, ("", [("f", "{a: 1} }"), CALL_G], False)),
    (
        block('{"name": "f", "arguments": {a: 1}').removesuffix("</tool_call>") + G,
        ("", [("f", "{a: 1}"), CALL_G], False),
    ),
    (block('{"name": "f", "arguments": {"a": "x') + "y", ("y", [("f", '{"a": "x')], False)),
    ('<tool_call>\n{"name": "f", "arguments": {"a": [1', ("", [("f", '{"a": [1')], True)),
    ('<tool_call>\n{"name": "f", "arguments": {"a": nix </tool', ("", [("f", '{"a": nix </tool')], True)),
    ('<tool_call>\n{"name": "f", "arguments": {', ("", [("f", "{")], True)),
    ('<tool_call>\n{"name": "f", "arguments": {}', ("", [("f", "{}")], False)),
]


@pytest.mark.parametrize(("text", "found"), CORPUS, ids=range(len(CORPUS)))
def test_corpus_in_every_cut(text: str, found: Found) -> None:
    assert parse(text) == found
    assert parse(*text) == found
    for first in range(len(text) + 1):
        assert parse(text[:first], text[first:]) == found
    for size in (2, 3, 5, 7):
        assert parse(*(text[i : i + size] for i in range(0, len(text), size))) == found


def test_corpus_in_every_pair_of_cuts() -> None:
    for text, found in CORPUS[::3]:
        short = text[:45]
        whole = found if short == text else parse(short)
        for first, second in itertools.combinations(range(len(short) + 1), 2):
            assert parse(short[:first], short[first:second], short[second:]) == whole


PIECES = [
    "<tool_call>",
    "</tool_call>",
    "{",
    "}",
    '"name"',
    '"arguments"',
    ": ",
    '"f"',
    ", ",
    "\n",
    " ",
    "a",
    "1",
    "[",
    "]",
]
PIECES += [F, G, "<tool_call>{", '<tool_call>{"name": "f", "arguments": {', '"', "\\", "<", "</tool_", "é"]


LEADING: list[tuple[str, Found]] = [
    (F, ("", [CALL_F], False)),
    ("\n\n" + F + "\n" + G + "\n", ("", [CALL_F, CALL_G], False)),
    ("Let me look.\n" + F, ("Let me look.\n" + F, [], False)),
    ("a" + F + "\n", ("a" + F + "\n", [], False)),
    ("<" + F, ("<" + F, [], False)),
    ("<tool_cal" + F, ("<tool_cal" + F, [], False)),
    (F + "\nThere.\n" + G, ("There.\n" + G, [CALL_F], False)),
    (block("no") + F, (block("no") + F, [], False)),
    ('{"a": "' + F + '"}\n', ('{"a": "' + F + '"}\n', [], False)),
    ("\n plain \n", ("\n plain \n", [], False)),
    (" \n", (" \n", [], False)),
]


@pytest.mark.parametrize(("text", "found"), LEADING, ids=range(len(LEADING)))
def test_calls_that_must_lead_in_every_cut(text: str, found: Found) -> None:
    assert parse(text, leading=True) == found
    assert parse(*text, leading=True) == found
    for first in range(len(text) + 1):
        assert parse(text[:first], text[first:], leading=True) == found


@settings(deadline=None, max_examples=400)
@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join), st.lists(st.integers(0, 999), max_size=6))
def test_cuts_never_matter(text: str, cuts: list[int]) -> None:
    edges = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    for leading in (False, True):
        whole = parse(text, leading=leading)
        assert parse(*(text[a:b] for a, b in itertools.pairwise(edges)), leading=leading) == whole
        assert parse(*text, leading=leading) == whole
        if not whole[1]:
            assert whole[0] == text


NAMES = st.text(min_size=1, max_size=6).filter(lambda text: text.isprintable())
CALLS = st.tuples(NAMES, st.dictionaries(NAMES, st.integers() | NAMES | st.lists(NAMES, max_size=2), max_size=3))


@settings(deadline=None, max_examples=200)
@given(st.lists(CALLS, min_size=1, max_size=3), st.booleans(), st.text(alphabet="ab .", max_size=6))
def test_what_vllm_reads_as_calls_are_the_same_calls(
    calls: list[tuple[str, object]], ascii_only: bool, text: str
) -> None:
    blocks = [block(json.dumps({"name": n, "arguments": a}, ensure_ascii=ascii_only)) for n, a in calls]
    answer = text + "\n" + "\n".join(blocks) + "\n"
    if any("tool_call>" in json.dumps(call) for call in calls):
        return
    theirs = [json.loads(found) for found in re.findall(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", answer, re.DOTALL)]
    content, found, unfinished = parse(answer)
    assert [(name, json.loads(arguments)) for name, arguments in found] == [
        (call["name"], call["arguments"]) for call in theirs
    ]
    assert (content, unfinished) == (text.strip(" ") if not text.strip(" ") else text.rstrip(" "), False)


def test_arguments_come_as_soon_as_they_are_certain() -> None:
    parser = ToolCallParser(lambda: "call_x")
    assert parser.push("Look.\n<tool_") == ("Look.", ())
    assert parser.push('call>{"name": "f", "argum') == ("", ())
    assert parser.push('ents": {"a') == ("", (ToolCallDelta(index=0, id="call_x", name="f", arguments='{"a'),))
    assert parser.unfinished
    assert parser.push('": [1') == ("", (ToolCallDelta(index=0, arguments='": [1'),))
    assert parser.push("]}}") == ("", (ToolCallDelta(index=0, arguments="]}"),))
    assert not parser.unfinished
    assert parser.push("</tool_call>\n<tool_call> n") == ("\n\n<tool_call> n", ())
    assert parser.flush() == ("", ())


def test_text_that_is_no_call_is_not_held_back() -> None:
    parser = ToolCallParser(lambda: "call_x")
    assert parser.push("<tool_call> t") == ("<tool_call> t", ())
    assert parser.push("wo <tool_call>{'a") == (("wo <tool_call>{'a"), ())
    assert parser.push(" < b") == (" < b", ())
    assert parser.push("b  ") == ("b", ())
    assert parser.push("c") == ("  c", ())


def test_no_more_calls_than_asked_for() -> None:
    for text in (F + "\n" + G + "more", F.removesuffix("\n</tool_call>") + G, F + " text"):
        for cut in range(len(text)):
            assert parse(text[:cut], text[cut:], most=1) == ("", [CALL_F], False)
    parser = ToolCallParser(lambda: "call_x", most=2)
    parser.push("a" + F)
    assert not parser.full
    parser.push(G)
    assert parser.full and parser.push("b" + F) == ("", ()) and parser.flush() == ("", ())


@pytest.mark.parametrize(
    ("starts", "text", "reasoning", "content"),
    [
        (True, "I look.\n</think>\n\n" + F + "\n", "I look.", ""),
        (True, "I look.</think>\n<response>\nThere.\n</response>\n" + F, "I look.", "There."),
        (True, "a " + G + " b</think>" + F, "a " + G + " b", ""),
        (False, "<think>\nhm\n</think>\n" + F, "hm", ""),
        (False, F, "", ""),
        (False, "There: " + F, "", "There:"),
    ],
)
def test_behind_thinking_in_every_cut(starts: bool, text: str, reasoning: str, content: str) -> None:
    """For -PT (thinking off and on) and -Thinking."""
    for cut in range(len(text) + 1):
        thinking, calls = ReasoningParser(starts), ToolCallParser(lambda: "call_x")
        thought = said = ""
        told: list[ToolCallDelta] = []
        for more, answer in (thinking.push(text[:cut]), thinking.push(text[cut:]), thinking.flush()):
            thought += more
            out, deltas = calls.push(answer)
            said += out
            told += deltas
        out, deltas = calls.flush()
        assert (thought, said + out) == (reasoning, content)
        assert joined([*told, *deltas]) == (ToolCallDelta(index=0, id="call_x", name="f", arguments='{"a": [1, 2]}'),)


def test_long_and_deep_arguments_cost_no_stack_and_no_time() -> None:
    deep = "[" * 5_000 + "]" * 5_000
    long = block('{"name": "f", "arguments": {"a": ' + deep + ', "b": ' + "1" * 5_000 + "}}")
    text, calls, unfinished = parse(*long)
    assert (text, unfinished, len(calls[0][1])) == ("", False, len(long) - len(block('{"name": "f", "arguments": }')))
    bad = '<tool_call>{"a": "' * 300
    assert parse(*bad)[:2] == (bad, [])
