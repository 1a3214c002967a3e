"""What a client sees of one choice, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations

import pytest

from actors.errors import InternalError
from actors.processing.detokenize import IncrementalDetokenizer
from actors.processing.parsers import ReasoningParser, StopStrings
from actors.processing.tokenizer import TextTokenizer
from actors.processing.tool_calls import ToolCallParser, joined
from actors.types import FinishReason, SequenceKey, TokenEvent, ToolCallDelta
from cluster.router.output import Ending, OutputAssembler
from tests.tiny_model import tiny_checkpoint
from tests.unit.cluster.router.world import SCORE, logprobs_of

KEY = SequenceKey("r", 0, 0)


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.from_dir(tiny_checkpoint())


def assembler(
    tokenizer: TextTokenizer,
    *stop: str,
    thinking: bool = False,
    min_tokens: int = 0,
    scored: bool = False,
    tools: bool = False,
    most: int | None = None,
) -> OutputAssembler:
    return OutputAssembler(
        IncrementalDetokenizer(tokenizer),
        ReasoningParser(thinking),
        StopStrings(stop),
        tools=ToolCallParser(lambda: "call_x", most=most) if tools else None,
        stop_token_ids=(7,),
        min_tokens=min_tokens,
        score=SCORE if scored else None,
    )


def events(ids: Sequence[int], first: int = 0, finish: FinishReason | None = None) -> list[TokenEvent]:
    return [
        TokenEvent(
            key=KEY,
            index=first + i,
            token_id=token,
            finish=finish if i == len(ids) - 1 else None,
            logprobs=logprobs_of(token),
        )
        for i, token in enumerate(ids)
    ]


def test_the_first_token_may_come_late_and_no_other_once_it_is_here(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode("one two three four")[:4]
    for order in permutations(range(4)):
        output = assembler(tokenizer)
        told = events(ids, finish=FinishReason.LENGTH)
        arrived = [sorted(order[: count + 1]) for count in range(order.index(0), 4)]
        if all(seen == list(range(len(seen))) for seen in arrived):
            deltas = [output.push([told[index]]) for index in order]
            assert [token for delta in deltas for token in delta.token_ids] == ids
            assert "".join(delta.text for delta in deltas) == tokenizer.decode(ids)
            assert output.ending == Ending(reason=FinishReason.LENGTH)
        else:
            with pytest.raises(InternalError, match="missing"):
                for index in order:
                    output.push([told[index]])


def test_a_later_attempt_continues_text_thinking_and_held_back_pieces(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode("hm</think>caf\u00e9 \U0001f600 STOP now")
    whole = assembler(tokenizer, "STOP", thinking=True)
    expected = whole.push(events(ids))
    assert (expected.reasoning, expected.text) == ("hm", "caf\u00e9 \U0001f600 ")
    for cut in range(1, len(whole.token_ids)):
        output = assembler(tokenizer, "STOP", thinking=True)
        before = output.push(events(ids[:cut]))
        output.begin_attempt()
        ahead = output.push(events(ids[cut + 1 :], first=cut + 1))
        assert ahead.token_ids == ()
        after = output.push([*events([0] * cut), *events(ids[cut : cut + 1], first=cut)])
        assert before.token_ids + after.token_ids == expected.token_ids
        assert before.reasoning + after.reasoning == expected.reasoning
        assert before.text + after.text == expected.text
        assert (output.ending, output.reasoning_tokens) == (whole.ending, whole.reasoning_tokens)


def test_tokens_held_for_an_attempt_that_ended_are_dropped(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode("one two three")
    output = assembler(tokenizer)
    output.push(events(ids[1:2], first=1))
    output.begin_attempt()
    delta = output.push(events(ids[:1]))
    assert delta.token_ids == tuple(ids[:1])


def test_a_stop_token_is_named_and_not_shown(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode("one two")
    output = assembler(tokenizer)
    delta = output.push(events([*ids, 7], finish=FinishReason.STOP))
    assert (delta.text, output.ending) == ("one two", Ending(reason=FinishReason.STOP, stop_reason=7))
    assert output.engine_finished


def test_stop_strings_wait_for_the_least_number_of_tokens(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode("9 8 9 7")
    nine = [i for i, token in enumerate(ids) if tokenizer.decode([token]).strip() == "9"]
    for least, kept in [(0, ""), (nine[0] + 1, "9 8 "), (nine[1] + 1, "9 8 9 7"), (len(ids), "9 8 9 7")]:
        output = assembler(tokenizer, "9", min_tokens=least)
        text = "".join(output.push([event]).text for event in events(ids, finish=FinishReason.LENGTH))
        assert text == kept


def test_a_stop_string_may_begin_before_the_least_number_of_tokens(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode("1234")
    assert len(ids) == 4
    for least, kept in [(2, "1"), (3, "1234")]:
        output = assembler(tokenizer, "23", "231", min_tokens=least)
        text = "".join(output.push([event]).text for event in events(ids, finish=FinishReason.LENGTH))
        assert text == kept


def test_scores_stand_beside_their_tokens(tokenizer: TextTokenizer) -> None:
    output = assembler(tokenizer, scored=True)
    told = events([3, 4, 5], finish=FinishReason.LENGTH)
    assert output.push(told[1:2]).logprobs == ()
    delta = output.push([told[0], told[2]])
    assert [score.chosen.token_id for score in delta.logprobs] == list(delta.token_ids) == [3, 4, 5]
    assert assembler(tokenizer).push(told).logprobs == ()
    with pytest.raises(InternalError, match="log-probability"):
        assembler(tokenizer, scored=True).push([TokenEvent(key=KEY, index=0, token_id=1)])


def test_what_comes_after_the_end_changes_nothing(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode("1 2 3 4")
    output = assembler(tokenizer, "2")
    output.push(events(ids))
    count = len(output.token_ids)
    assert output.push(events(ids, first=count)).token_ids == ()
    assert len(output.token_ids) == count and output.ending == Ending(reason=FinishReason.STOP, stop_reason="2")
    assert not output.engine_finished


BLOCK = '<tool_call>\n{"name": "f", "arguments": {"a": "END"}}\n</tool_call>'
CALL = ToolCallDelta(index=0, id="call_x", name="f", arguments='{"a": "END"}')


def whole(output: OutputAssembler, ids: Sequence[int], finish: FinishReason) -> tuple[str, tuple[ToolCallDelta, ...]]:
    """One token at a time: text, calls."""
    deltas = [output.push([event]) for event in events(ids, finish=finish)]
    return "".join(delta.text for delta in deltas), joined(call for delta in deltas for call in delta.tool_calls)


def test_calls_are_told_apart_and_say_why_the_reply_ended(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode(f"Look.\n{BLOCK}\n{BLOCK}")
    for finish, reason in (
        (FinishReason.STOP, FinishReason.TOOL_CALLS),
        (FinishReason.LENGTH, FinishReason.LENGTH),
    ):
        output = assembler(tokenizer, tools=True)
        text, calls = whole(output, [*ids, 2], finish)
        assert text == "Look." and calls == (CALL, replace(CALL, index=1))
        assert output.ending == Ending(reason=reason) and len(output.token_ids) == len(ids) + 1


def test_without_tools_what_looks_like_a_call_is_text(tokenizer: TextTokenizer) -> None:
    output = assembler(tokenizer)
    assert whole(output, [*tokenizer.encode(BLOCK), 2], FinishReason.STOP) == (BLOCK, ())
    assert output.ending == Ending(reason=FinishReason.STOP)


def test_with_tools_text_without_calls_ends_as_ever(tokenizer: TextTokenizer) -> None:
    output = assembler(tokenizer, tools=True)
    assert whole(output, [*tokenizer.encode("\n\nno <tool_call> at all\n"), 2], FinishReason.STOP) == (
        "\n\nno <tool_call> at all\n",
        (),
    )
    assert output.ending == Ending(reason=FinishReason.STOP)


def test_a_call_that_breaks_off_is_no_reason_to_end(tokenizer: TextTokenizer) -> None:
    output = assembler(tokenizer, tools=True)
    text, (call,) = whole(output, [*tokenizer.encode(BLOCK.partition("END")[0]), 2], FinishReason.STOP)
    assert (text, call.arguments) == ("", '{"a": "')
    assert output.ending == Ending(reason=FinishReason.STOP)


def test_stop_strings_see_calls_as_they_are_written(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode(f"Look.\n{BLOCK}\nEND")
    for stop, arguments, reason in (
        ("END", '{"a": "', FinishReason.STOP),
        ("\nEND", '{"a": "END"}', FinishReason.TOOL_CALLS),
    ):
        output = assembler(tokenizer, stop, tools=True)
        text, (call,) = whole(output, ids, FinishReason.LENGTH)
        assert (text, call.arguments) == ("Look.", arguments)
        assert output.ending == Ending(reason=reason, stop_reason=stop)


def test_the_reply_ends_behind_the_last_call_it_may_make(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode(f"{BLOCK}\n{BLOCK} and more")
    output = assembler(tokenizer, tools=True, most=1)
    assert whole(output, ids, FinishReason.LENGTH) == ("", (CALL,))
    assert output.ending == Ending(reason=FinishReason.TOOL_CALLS) and not output.engine_finished
    assert len(output.token_ids) == len(tokenizer.encode(BLOCK))


def test_a_later_attempt_goes_on_with_a_call(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode(f"hm</think>\n\nLook.\n{BLOCK}")
    expected = assembler(tokenizer, thinking=True, tools=True).push(events(ids))
    assert (expected.reasoning, expected.text, expected.tool_calls) == ("hm", "Look.", (CALL,))
    for cut in range(1, len(ids)):
        output = assembler(tokenizer, thinking=True, tools=True)
        before = output.push(events(ids[:cut]))
        output.begin_attempt()
        after = output.push(events(ids[cut:], first=cut))
        assert before.text + after.text == expected.text
        assert joined(before.tool_calls + after.tool_calls) == expected.tool_calls
