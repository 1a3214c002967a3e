from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.processing.parsers import ReasoningParser, StopStrings


def parse(starts_thinking: bool, *chunks: str) -> tuple[str, str]:
    parser = ReasoningParser(starts_thinking)
    deltas = [parser.push(chunk) for chunk in chunks] + [parser.flush()]
    return "".join(r for r, _ in deltas), "".join(a for _, a in deltas)


def pieces(text: str, cuts: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in pairwise(edges)]


@pytest.mark.parametrize(
    ("starts", "text", "reasoning", "answer"),
    [
        (True, "why\n</think>\n\nanswer\n", "why", "answer\n"),
        (True, "\n\nwhy\n\nmore\n</think>answer", "why\n\nmore", "answer"),
        (True, "<think>\nwhy</think>answer", "why", "answer"),
        (True, "never closed\n", "never closed", ""),
        (True, "</think>\n\nanswer", "", "answer"),
        (True, "why</think>\n<response>\nanswer\n</response>\n", "why", "answer"),
        (True, "why</think><response>a\n\nb</response>", "why", "a\n\nb"),
        (True, "why</think><response>\ncut off\n", "why", "cut off"),
        (True, "why</think>\n<tool_call>\n{}\n</tool_call>\n", "why", "<tool_call>\n{}\n</tool_call>\n"),
        (True, "why</think><response>a</response>\n<tool_call>", "why", "a<tool_call>"),
        (True, "a < b </thin</think>c", "a < b </thin", "c"),
        (True, "why</think>x</think>y", "why", "x</think>y"),
        (True, "why</think>\n<respond>", "why", "<respond>"),
        (False, "plain", "", "plain"),
        (False, "\n\nplain\n", "", "\n\nplain\n"),
        (False, "<think>\nwhy\n</think>\nanswer", "why", "answer"),
        (False, "\n<think>why</think>answer", "why", "answer"),
        (False, "<thin", "", "<thin"),
        (False, "a <think>b</think>", "", "a <think>b</think>"),
        (False, "<response>\nanswer\n</response>", "", "answer"),
        (False, "", "", ""),
        (True, "", "", ""),
    ],
)
def test_grammar_in_any_cut(starts: bool, text: str, reasoning: str, answer: str) -> None:
    assert parse(starts, text) == (reasoning, answer)
    assert parse(starts, *text) == (reasoning, answer)
    for size in (2, 3, 5):
        assert parse(starts, *(text[i : i + size] for i in range(0, len(text), size))) == (reasoning, answer)


MARKERS = st.sampled_from(
    ["<think>", "</think>", "<response>", "</response>", "\n", "a", "<", "</", "think>", "é", " "]
)


@settings(deadline=None, max_examples=200)
@given(st.lists(MARKERS, max_size=12).map("".join), st.lists(st.integers(0, 99), max_size=8), st.booleans())
def test_cuts_never_matter(text: str, cuts: list[int], starts: bool) -> None:
    assert parse(starts, *pieces(text, cuts)) == parse(starts, text)


@pytest.mark.parametrize(
    ("starts", "text", "reasoning", "answer"),
    [
        (False, "<response>a</response>", "", "<response>a</response>"),
        (False, "<think>a</think>", "", "<think>a</think>"),
        (False, "\n\n{}", "", "\n\n{}"),
        (True, "hm</think>\n\n<response>a</response>\n", "hm", "<response>a</response>\n"),
        (True, "hm</think><think>", "hm", "<think>"),
    ],
)
def test_a_structured_answer_stays_as_it_is(starts: bool, text: str, reasoning: str, answer: str) -> None:
    for cut in range(len(text) + 1):
        parser = ReasoningParser(starts, structured=True)
        pieces = [parser.push(text[:cut]), parser.push(text[cut:]), parser.flush()]
        assert ("".join(r for r, _ in pieces), "".join(a for _, a in pieces)) == (reasoning, answer)


def test_only_what_could_be_a_marker_is_held_back() -> None:
    parser = ReasoningParser(True)
    assert parser.push("because") == ("because", "")
    assert parser.push(" a <") == (" a ", "")
    assert parser.push("b") == ("<b", "")
    assert parser.push("\n") == ("", "")
    assert parser.push("c</thi") == ("\nc", "")
    assert parser.in_reasoning
    assert parser.push("nk>yes") == ("", "yes")
    assert not parser.in_reasoning
    assert parser.push("</think>") == ("", "</think>")
    assert parser.flush() == ("", "")


def stop(stops: list[str], *chunks: str) -> tuple[str, str | None]:
    matcher = StopStrings(stops)
    text = "".join(matcher.push(chunk) for chunk in chunks) + matcher.flush()
    return text, matcher.matched


@pytest.mark.parametrize(
    ("stops", "text", "kept", "matched"),
    [
        ([], "anything", "anything", None),
        (["END"], "before END after", "before ", "END"),
        (["END"], "no", "no", None),
        (["END"], "EN", "EN", None),
        (["aab"], "aaab", "a", "aab"),
        (["b", "abc"], "xabc", "xa", "b"),  # completed first
        (["bc", "abc"], "xabc", "x", "abc"),  # completed together: began first
        (["\n\n"], "a\nb\n\nc", "a\nb", "\n\n"),
        (["x"], "x", "", "x"),
        (["\u00e9t\u00e9"], "un \u00e9t\u00e9", "un ", "\u00e9t\u00e9"),
    ],
)
def test_stop_strings_in_any_cut(stops: list[str], text: str, kept: str, matched: str | None) -> None:
    assert stop(stops, text) == (kept, matched)
    assert stop(stops, *text) == (kept, matched)
    assert stop(stops, *(text[i : i + 2] for i in range(0, len(text), 2))) == (kept, matched)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    st.text("abc", max_size=20),
    st.lists(st.integers(0, 99), max_size=8),
)
def test_stop_cuts_never_matter(stops: list[str], text: str, cuts: list[int]) -> None:
    assert stop(stops, *pieces(text, cuts)) == stop(stops, text)
    kept, matched = stop(stops, text)
    ends = [text.find(s) + len(s) for s in stops if s in text]
    if ends:
        assert matched is not None
        assert len(kept) + len(matched) == min(ends)
    else:
        assert (kept, matched) == (text, None)


def test_nothing_after_a_match_and_partial_held_back() -> None:
    matcher = StopStrings(["</s>"])
    assert matcher.push("one </") == "one "
    assert matcher.push("b> two </s") == "</b> two "
    assert matcher.push("> three") == ""
    assert matcher.matched == "</s>"
    assert matcher.push("four") == ""
    assert matcher.flush() == ""


def test_a_stop_string_that_may_not_end_yet() -> None:
    matcher = StopStrings(["ab", "xabc", "b1"])
    assert matcher.push("ab xab", match=False) == "ab "
    assert matcher.push("z") == "xabz"  # "ab" ended where none may
    assert matcher.push("xab", match=False) == ""
    assert matcher.push("c") == ""
    assert matcher.matched == "xabc"
    begun = StopStrings(["ab", "b1"])
    assert begun.push("ab", match=False) == "a"
    assert (begun.push("1"), begun.matched) == ("", "b1")


def test_empty_stop_string() -> None:
    with pytest.raises(ValueError):
        StopStrings(["a", ""])


def test_repeated_markers_cost_no_stack() -> None:
    assert parse(True, "<think>\n" * 5000 + "why</think>answer") == ("why", "answer")
