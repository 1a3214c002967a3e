"""Thinking: the budget, the closing the templates write, and where the structure begins."""

from __future__ import annotations

import json

import numpy as np
import pytest

from actors.engine.constraints.compiler import needs_constraint
from actors.engine.constraints.vocabulary import ConstraintVocabulary
from actors.errors import InvalidRequest
from tests.unit.engine.constraints import structures as st

PT = st.encode("\nAssistant: <think>")
"""How a thinking prompt ends in the template of -PT, and in that of -Thinking."""
THINKING = st.encode("\nAssistant: \n<think>\n")
YES_NO = st.choice("yes", "no")


def follow(prompt: tuple[int, ...], outputs: tuple[int, ...] = (), limit: int = 40, **sampling: object) -> list[int]:
    """Outputs, then what is forced: tokens that are the only ones allowed, until there is a choice."""
    state = st.constraint(st.sampling(starts_thinking=True, **sampling), prompt)
    ids = list(outputs)
    st.advance(state, outputs)
    while len(ids) < limit and (allowed := st.allowed(state)) is not None and len(allowed) == 1:
        ids.append(allowed.pop())
        state.accept(ids[-1])
    return ids


@pytest.mark.parametrize("prompt", [PT, THINKING])
def test_a_budget_of_none_closes_as_the_templates_write_no_thinking(prompt: tuple[int, ...]) -> None:
    ids = follow(prompt, reasoning_max_tokens=0)
    text = st.tokenizer().decode([*prompt, *ids], skip_special_tokens=False)
    assert text.split("<think>")[1] == "\n\n</think>\n\n"
    assert st.encode(text)[-len(ids) :] == tuple(ids), "the closing has the tokens of a prompt that is closed"


@pytest.mark.parametrize(
    ("thought", "closing"),
    [
        ("\n", "\n</think>\n\n"),
        ("\n\n", "</think>\n\n"),
        ("\nI see.", "\n</think>\n\n"),
        ("\nI see.\n", "</think>\n\n"),
        ("\nI see.\n\n\n\n\n\n\n\n\n", "</think>\n\n"),
    ],
)
def test_the_closing_goes_on_from_what_was_thought(thought: str, closing: str) -> None:
    outputs = st.encode(thought)
    ids = follow(PT, outputs, reasoning_max_tokens=len(outputs))
    assert st.vocabulary().text(ids).decode() == thought + closing


def test_the_budget_counts_tokens_and_leaves_the_answer_free() -> None:
    thought = st.encode("one two three four five")
    state = st.constraint(st.sampling(starts_thinking=True, reasoning_max_tokens=len(thought)), THINKING)
    for token in thought:
        assert st.allowed(state) is None
        state.accept(token)
    closing = st.encode("\n</think>\n\n")
    for token in closing:
        assert st.allowed(state) == {token}
        state.accept(token)
    for token in st.encode("free text, then <think> and </think> again" * 3):
        assert st.allowed(state) is None
        state.accept(token)


@pytest.mark.parametrize("closing", ["</think>", "\n</think>\n\n", "\n</think>\n\n\n\nlong", "plain< /", "x</ think>"])
def test_a_thinking_that_ends_by_itself_is_left_alone(closing: str) -> None:
    state = st.constraint(st.sampling(starts_thinking=True, reasoning_max_tokens=30), THINKING)
    for token in st.encode(closing):
        assert st.allowed(state) is None
        state.accept(token)
    if "</think>" in closing:
        for token in st.encode("a long answer, over and over, of many words") * 3:
            assert st.allowed(state) is None
            state.accept(token)


def spelt_end() -> tuple[int, ...]:
    """``</think>`` in ordinary tokens."""
    plain = [st.tokenizer().token_to_id(character) for character in "</think>"]
    assert None not in plain
    return tuple(token for token in plain if token is not None)


def test_an_end_that_other_tokens_spell_counts_too() -> None:
    """The parsers of replies read text."""
    state = st.constraint(st.sampling(starts_thinking=True, reasoning_max_tokens=20), THINKING)
    st.advance(state, spelt_end())
    for token in st.encode("many words of an answer") * 5:
        assert st.allowed(state) is None
        state.accept(token)


def test_before_a_structure_other_tokens_cannot_spell_the_end() -> None:
    state = st.constraint(st.sampling(YES_NO, starts_thinking=True), THINKING)
    *most, last = spelt_end()
    st.advance(state, most)
    ids = st.allowed(state)
    assert ids is not None and last not in ids and st.END_THINK in ids
    texts = [st.vocabulary().text((token,)) for token in range(st.SIZE)]
    assert not [text for token, text in enumerate(texts) if text.startswith(b">") and token in ids]
    state.accept(st.encode("x")[0])
    ids = st.allowed(state)
    assert ids is not None and last in ids


def test_no_end_comes_before_a_structured_answer() -> None:
    stop = st.encode("e")[0]
    state = st.constraint(st.sampling(YES_NO, starts_thinking=True, stop_token_ids=(stop,)), THINKING)
    ids = st.allowed(state)
    assert ids is not None
    assert not ids & {*st.ENDS, stop}
    assert ids == set(range(st.LAYOUT.im_patch_id)) - {*st.ENDS, stop}


def test_newlines_may_stand_before_the_structure_and_do_not_belong_to_it() -> None:
    newline = st.encode("\n")[0]
    first = st.allowed(st.constraint(st.sampling(YES_NO)))
    assert first is not None and newline not in first
    state = st.constraint(st.sampling(YES_NO, starts_thinking=True), THINKING)
    st.advance(state, (*st.encode("hm"), st.END_THINK))
    assert st.allowed(state) == first | {newline}
    state.accept(newline)
    assert st.allowed(state) == first | {newline}
    state.accept(newline)
    assert st.allowed(state) == first
    st.advance(state, st.encode("yes"))
    assert st.allowed(state) == set(st.ENDS)


def test_after_a_forced_closing_the_structure_begins_at_once() -> None:
    ids = follow(THINKING, structure=st.regex("[0-9]"), reasoning_max_tokens=0)
    assert st.vocabulary().text(ids) == b"\n</think>\n\n"


def test_a_structure_that_begins_with_a_newline() -> None:
    """Whoever reads a reply drops newlines after thinking: they are taken from the choice, or refused."""
    either = st.regex(r"\n?[ab]")
    newline = st.encode("\n")[0]
    at_once = st.allowed(st.constraint(st.sampling(either)))
    assert at_once is not None and newline in at_once
    state = st.constraint(st.sampling(either, starts_thinking=True, reasoning_max_tokens=0), THINKING)
    st.advance(state, st.encode("\n</think>\n\n"))
    assert st.allowed(state) == at_once - {newline}
    with pytest.raises(InvalidRequest, match="cannot begin with a newline") as caught:
        st.compiled(st.sampling(st.regex(r"\n\n[ab]"), starts_thinking=True))
    assert caught.value.field == "structure"


def test_a_model_may_begin_to_think_although_its_prompt_did_not() -> None:
    state = st.constraint(st.sampling(reasoning_max_tokens=2), st.encode("Assistant: "))
    st.advance(state, (*st.encode("\n"), st.THINK))
    st.advance(state, st.encode("\n") * 2)
    assert st.allowed(state) == {st.END_THINK}
    answering = st.constraint(st.sampling(reasoning_max_tokens=2), st.encode("Assistant: "))
    for token in st.encode("no thought, but an <think> in the text and so on"):
        assert st.allowed(answering) is None
        answering.accept(token)


def test_a_structure_begins_at_once_where_no_thinking_is_open() -> None:
    state = st.constraint(st.sampling(YES_NO, reasoning_max_tokens=5), st.encode("Assistant: <think>\n\n</think>\n\n"))
    assert st.allowed(state) == st.allowed(st.constraint(st.sampling(YES_NO)))


def test_an_output_continues_anywhere() -> None:
    """A state rebuilt from tokens equals the one that drew them, at every position."""
    cases = [
        (st.sampling(starts_thinking=True, reasoning_max_tokens=7), THINKING),
        (st.sampling(st.schema({"type": "array", "items": {"type": "integer"}}), starts_thinking=True), THINKING),
        (st.sampling(st.schema({"enum": ["größer", "漢字"]}), starts_thinking=True, reasoning_max_tokens=4), PT),
        (st.sampling(st.regex("[a-z]{1,9}x"), stop_token_ids=(7,)), ()),
    ]
    for params, prompt in cases:
        make = st.compiled(params)
        rng = np.random.default_rng(3)
        state = make(prompt, st.raising)
        output: list[int] = []
        while len(output) < 80:
            ids = st.allowed(state)
            again = make(prompt, st.raising)
            st.advance(again, output)
            assert st.allowed(again) == ids, (params, output)
            ids = ids or set(range(3, 900))
            token = st.END_THINK if len(output) == 20 and st.END_THINK in ids else int(rng.choice(sorted(ids)))
            if token in st.ENDS:
                break
            output.append(token)
            state.accept(token)


def test_what_a_checkpoint_without_think_tokens_refuses() -> None:
    document = json.loads(st.tokenizer_json())
    for content in ("<think>", "</think>"):
        document["model"]["vocab"][f"no {content}"] = document["model"]["vocab"].pop(content)
    document["added_tokens"] = [token for token in document["added_tokens"] if "think>" not in token["content"]]
    without = ConstraintVocabulary(json.dumps(document), limit=st.LAYOUT.im_patch_id, end_ids=st.ENDS)
    with pytest.raises(InvalidRequest) as caught:
        st.compiled(st.sampling(reasoning_max_tokens=5), without)
    assert caught.value.field == "reasoning_max_tokens"
    assert st.compiled(st.sampling(YES_NO, starts_thinking=True), without)((), st.raising).fill(np.zeros(32, np.int32))


def test_what_needs_a_constraint() -> None:
    assert needs_constraint(st.sampling(YES_NO))
    assert needs_constraint(st.sampling(reasoning_max_tokens=0))
    assert not needs_constraint(st.sampling(starts_thinking=True))


@pytest.mark.parametrize("size", [600, st.SIZE, 2000])
def test_rows_of_any_width_are_filled(size: int) -> None:
    """The tokenizer may know more ids than a row has, or fewer."""
    full = st.allowed(st.constraint(st.sampling(YES_NO)))
    assert full is not None
    assert st.allowed(st.constraint(st.sampling(YES_NO)), size) == {token for token in full if token < size}
