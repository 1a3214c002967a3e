"""However the text of an output is cut into deltas, the message is the same, and nothing that was told is taken back.

Through everything behind the detokenizer: thinking, stop strings, calls, and both forms of a reply over HTTP.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.processing.parsers import ReasoningParser, StopStrings
from actors.processing.tool_calls import ToolCallParser
from actors.types import FinishReason, SequenceKey, TokenEvent
from cluster.generation import ChoiceFinished, Delta, GenerateCall
from cluster.grpc_response import whole_response
from cluster.openai_response import Chunks, Completion
from cluster.router.output import OutputAssembler
from tests.doubles import FINISHED, STARTED

F = '<tool_call>\n{"name": "f", "arguments": {"a": [1, 2]}}\n</tool_call>'
G = '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>\n'
CALL = GenerateCall(messages=())


class Pieces:
    """A detokenizer whose token i stands for piece i."""

    def __init__(self, pieces: Sequence[str]) -> None:
        self._pieces = pieces

    def push(self, ids: Sequence[int]) -> str:
        return "".join(self._pieces[token] for token in ids)

    def flush(self) -> str:
        return ""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How an output is read."""

    starts_thinking: bool = False
    structured: bool = False
    tools: bool = True
    leading: bool = False
    most: int | None = None
    stop: tuple[str, ...] = ()


THINKING = Reading(starts_thinking=True)
READINGS = {
    "pt": Reading(),
    "thinking": THINKING,
    "without tools": Reading(starts_thinking=True, tools=False),
    "calls lead": Reading(starts_thinking=True, leading=True),
    "one call": Reading(starts_thinking=True, most=1),
    "stops": Reading(starts_thinking=True, stop=("END", "\n\n\n", "2]")),
    "structured": Reading(starts_thinking=True, structured=True, leading=True),
    "structured at once": Reading(structured=True, tools=False),
}

CORPUS = [
    "",
    "plain",
    "\n\nplain\n",
    "why\n</think>\n\nanswer\n",
    "why</think>\n<response>\nanswer\n\nmore\n</response>\n",
    "why</think><response>cut off",
    "never closed\n",
    "<think>\nwhy</think>answer",
    "</think></think>",
    "a < b </thin</think> c <thi",
    "why\n</think>\n\n" + F + "\n" + G,
    "why</think>Let me look.\n" + F + " and " + G,
    "why</think>\n<response>\nLook.\n</response>\n" + F,
    F,
    "Look. " + F + "\nEND and more",
    'why</think><tool_call>{"name": "f", "arguments": {"a": "</tool_call>',
    'why</think><tool_call>{"name": "f", "argu',
    "why</think><tool_call>no call</tool_call>\n" + F,
    "why</think>" + F.removesuffix("</tool_call>") + G,
    'why</think>{"a": "' + F.replace('"', "'") + '"}',
    "é漢😀</think>漢é" + F.replace("f", "é"),
    "a\n\n\nb</think>c\n\n\nd",
]


def said(reading: Reading, pieces: Sequence[str], finish: FinishReason | None = FinishReason.LENGTH) -> Iterator[Any]:
    """Delta by delta, one piece at a time, and the ending at last if there is one."""
    ids = itertools.count()
    output = OutputAssembler(
        Pieces(pieces),  # type: ignore[arg-type]
        ReasoningParser(reading.starts_thinking, structured=reading.structured),
        StopStrings(() if reading.structured else reading.stop),
        tools=ToolCallParser(lambda: f"call_{next(ids)}", most=reading.most, leading=reading.leading)
        if reading.tools
        else None,
        stop_token_ids=(),
    )
    for index in range(len(pieces)):
        last = index == len(pieces) - 1
        yield output.push(
            [TokenEvent(key=SequenceKey("r", 0, 0), index=index, token_id=index, finish=finish if last else None)]
        )
        if output.ending is not None:
            yield ChoiceFinished(reason=output.ending.reason, stop_reason=output.ending.stop_reason)
            return


def message(events: Sequence[Any]) -> Any:
    """As HTTP clients have it, whole; the stream and gRPC must say the same."""
    whole = Completion(0, CALL)
    chunks = Chunks(0, CALL, STARTED, usage=False)
    streamed: dict[str, Any] = {"content": "", "reasoning": "", "calls": []}
    bodies = list(chunks.begin())
    for event in events:
        whole.add(event)
        bodies += chunks.of(event)
    for body in bodies:
        (choice,) = body["choices"]
        delta = choice["delta"]
        assert delta.get("reasoning") == delta.get("reasoning_content")
        for name in ("content", "reasoning"):
            streamed[name] += delta.get(name) or ""
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                streamed["calls"].append([call["id"], call["function"]["name"], ""])
            streamed["calls"][call["index"]][2] += call["function"]["arguments"]
    (choice,) = whole.body(STARTED, FINISHED)["choices"]
    found, ending = choice["message"], (choice["finish_reason"], choice["stop_reason"])
    calls = [
        [call["id"], call["function"]["name"], call["function"]["arguments"]] for call in found.get("tool_calls", ())
    ]
    parts = [found["content"] or "", found.get("reasoning_content", ""), calls]
    assert list(streamed.values()) == parts
    (reply,) = whole_response(1, [STARTED, *events, FINISHED]).choices
    assert [reply.text, reply.reasoning_text] == parts[:2]
    assert [[call.id, call.name, call.arguments_json] for call in reply.tool_calls] == calls
    return *parts, ending


def read(reading: Reading, *pieces: str) -> Any:
    return message(list(said(reading, pieces or ("",))))


def cuts(text: str) -> Iterator[Sequence[str]]:
    """Every cut in two, in pieces of every size up to seven, and - of the beginning of a text - every cut there is."""
    for first in range(len(text) + 1):
        yield text[:first], text[first:]
    for size in range(1, 8):
        yield [text[start : start + size] for start in range(0, len(text), size)] or [""]


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("text", CORPUS, ids=range(len(CORPUS)))
def test_corpus_in_every_cut(text: str, reading: str) -> None:
    whole = read(READINGS[reading], text)
    for pieces in cuts(text):
        assert read(READINGS[reading], *pieces) == whole


@pytest.mark.parametrize("reading", READINGS)
def test_short_texts_in_every_way_there_is(reading: str) -> None:
    for text in ("\n</think>\n", "<thi</thin", "END</t", "a\n\n\n\nb", "<tool_c"):
        whole = read(READINGS[reading], text)
        for mask in range(1 << (len(text) - 1)):
            edges = [0, *(place + 1 for place in range(len(text) - 1) if mask >> place & 1), len(text)]
            assert read(READINGS[reading], *(text[a:b] for a, b in itertools.pairwise(edges))) == whole


MARKERS = [
    "<think>", "</think>", "<response>", "</response>", "<tool_call>", "</tool_call>", "\n", " ", "a", "<", "</", "END",
    "2]", '"', "{", "}", F, G, '<tool_call>{"name": "f", "arguments": {', "é漢😀",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(MARKERS), max_size=10).map("".join)


@settings(deadline=None, max_examples=200)
@given(TEXTS, st.lists(st.integers(0, 999), max_size=8), st.sampled_from(sorted(READINGS)))
def test_cuts_never_matter(text: str, places: list[int], name: str) -> None:
    edges = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    whole = read(READINGS[name], text)
    assert read(READINGS[name], *(text[a:b] for a, b in itertools.pairwise(edges))) == whole
    assert read(READINGS[name], *text) == whole


@settings(deadline=None, max_examples=200)
@given(TEXTS, TEXTS, st.sampled_from(sorted(READINGS)))
def test_what_was_told_stays_whatever_follows(begun: str, rest: str, name: str) -> None:
    reading = READINGS[name]
    told = list(said(reading, [*begun] or [""], finish=None))
    ended = bool(told) and isinstance(told[-1], ChoiceFinished)
    early = message(told if ended else [*told, ChoiceFinished(reason=FinishReason.LENGTH)])
    final = read(reading, *begun, *rest)
    if ended:
        assert final == early
        return
    for part, whole in zip(early[:2], final[:2], strict=True):
        assert whole.startswith(part)
    assert len(final[2]) >= len(early[2])
    for (call_id, called, arguments), theirs in zip(early[2], final[2], strict=False):
        assert theirs[:2] == [call_id, called] and theirs[2].startswith(arguments)


@pytest.mark.parametrize(
    ("text", "reading", "reasoning", "content", "calls", "ending"),
    [
        # No </think> at all is all thinking, streamed or whole; FastDeploy tells them apart.
        ("I wonder", THINKING, "I wonder", "", [], "length"),
        ("why</think>\n\n" + F, THINKING, "why", "", ["f"], "length"),
        ("why</think>\n<response>\nyes\n</response>\n", THINKING, "why", "yes", [], "length"),
        ("why</think>Look.\n" + F, THINKING, "why", "Look.", ["f"], "length"),
        ("why</think>Look.\n" + F, READINGS["calls lead"], "why", "Look.\n" + F, [], "length"),
        ("why</think>" + F + G, READINGS["one call"], "why", "", ["f"], "tool_calls"),
        ('{"a": "<tool_call>"}', Reading(structured=True, leading=True), "", '{"a": "<tool_call>"}', [], "length"),
    ],
)
def test_edges(text: str, reading: Reading, reasoning: str, content: str, calls: list[str], ending: str) -> None:
    found = read(reading, *text)
    assert (found[1], found[0], [name for _, name, _ in found[2]], found[3][0]) == (reasoning, content, calls, ending)
    for _, _, arguments in found[2]:
        assert isinstance(json.loads(arguments), dict)


def test_a_reply_that_the_model_ends() -> None:
    events = list(said(THINKING, ["why</think>", F, "\n", "(end)"], finish=FinishReason.STOP))
    assert message(events)[3] == ("tool_calls", None)
    assert [event.text for event in events if isinstance(event, Delta)] == ["", "", "", ""]
