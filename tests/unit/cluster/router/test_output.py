"""What a client sees of one choice, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import pytest

from actors.errors import InternalError
from actors.processing.detokenize import IncrementalDetokenizer
from actors.processing.parsers import ReasoningParser, StopStrings
from actors.processing.tokenizer import TextTokenizer
from actors.types import FinishReason, SequenceKey, TokenEvent
from cluster.router.output import Ending, OutputAssembler
from tests.tiny_model import tiny_checkpoint
from tests.unit.cluster.router.world import SCORE, logprobs_of

KEY = SequenceKey("r", 0, 0)


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.from_dir(tiny_checkpoint())


def assembler(
    tokenizer: TextTokenizer, *stop: str, thinking: bool = False, min_tokens: int = 0, scored: bool = False
) -> OutputAssembler:
    return OutputAssembler(
        IncrementalDetokenizer(tokenizer),
        ReasoningParser(thinking),
        StopStrings(stop),
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
