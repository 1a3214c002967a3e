"""Everything a random model says under a structure matches it: the real engine, judged by others."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest

from actors.engine.constraints import sequence_constraint
from actors.engine.constraints.compiler import ConstraintCompiler
from actors.types import EngineRequest, FinishReason, Structure, StructureKind
from tests.unit.engine.constraints import structures as st
from tests.unit.engine.constraints.structure_corpus import CHOICES, GRAMMARS, REGEXES, SCHEMAS, check_schema_output
from tests.unit.engine.harness import Rig, key, request

Check = Callable[[str], Any]

# What ends things is made likely, so that answers of a model that says anything come to an end.
CLOSERS = tuple((st.encode(text)[0], 3.0) for text in ('"', "}", "]", ")"))
PADDING = tuple((st.encode(text)[0], -6.0) for text in (" ", "\t", "\n", "\r"))
PROMPT = st.encode("The weather in the mountains today is")
MAX_TOKENS = 260
SEEDS = 5
THINKING = st.encode("\nAssistant: \n<think>\n")
CLOSING = "\n</think>\n\n"


def rig() -> Rig:
    return Rig(
        st.model(),
        config=st.model_config(),
        compiler=ConstraintCompiler(st.vocabulary()),
        blocks=900,
        block_size=16,
        max_model_len=MAX_TOKENS + 40,
        max_num_seqs=48,
        max_batched_tokens=1024,
        max_waiting=10_000,
    )


def wanted(structure: Structure, seed: int, **sampling: Any) -> EngineRequest:
    fields = {"temperature": 1.0, "ignore_eos": False, "max_tokens": MAX_TOKENS, "logit_bias": CLOSERS + PADDING}
    prompt = PROMPT + THINKING if sampling.get("starts_thinking") else PROMPT
    return request(prompt, structure=structure, seed=seed, **(fields | sampling))


def answers(requests: list[EngineRequest]) -> list[str | None]:
    """Text of each, after any thinking; None where it did not end in time."""
    with rig() as running:
        outputs = running.run(*requests)
        finishes = [running.sink.finish(key(number)) for number in range(len(requests))]
    return [
        answer(ids[:-1], wanted.sampling.starts_thinking) if finish is FinishReason.STOP else None
        for ids, finish, wanted in zip(outputs, finishes, requests, strict=True)
    ]


def answer(ids: list[int], thought: bool) -> str:
    """As a client gets it: what follows the first ``</think>`` and the newlines behind it."""
    text = st.vocabulary().text(ids)
    if thought:
        text = text.partition(b"</think>")[2].lstrip(b"\n")
    return text.decode()


def judge(cases: list[tuple[str, Structure, Check]], seeds: int, **sampling: Any) -> dict[str, int]:
    """Asks for each case with each seed and checks what ended; returns how many did by case."""
    asked = [
        (name, check, wanted(structure, seed, **sampling)) for name, structure, check in cases for seed in range(seeds)
    ]
    ended: dict[str, int] = {name: 0 for name, _, _ in cases}
    texts = answers([item[2] for item in asked])
    for (name, check, _), text in zip(asked, texts, strict=True):
        if text is None:
            continue
        ended[name] += 1
        try:
            passed = check(text)
        except (ValueError, jsonschema.ValidationError) as error:
            raise AssertionError(f"{name}: {text!r}: {error}") from None
        assert passed is not False, f"{name}: {text!r}"
    return ended


def schema_cases() -> list[tuple[str, Structure, Check]]:
    def check(schema: Any) -> Check:
        return lambda text: check_schema_output(schema, text)

    return [(name, st.schema(schema), check(schema)) for name, schema in SCHEMAS.items()]


def other_cases() -> list[tuple[str, Structure, Check]]:
    def matches(pattern: str) -> Check:
        return lambda text: re.fullmatch(pattern, text) is not None

    def among(texts: tuple[str, ...]) -> Check:
        return lambda text: text in texts

    return [
        *((f"regex {pattern}", st.regex(pattern), matches(pattern)) for pattern in REGEXES),
        *((f"choice {texts[0]}", st.choice(*texts), among(texts)) for texts in CHOICES),
        *((f"grammar {name}", st.lark(text), check) for name, (text, check) in GRAMMARS.items()),
        (
            "json object",
            Structure(kind=StructureKind.JSON_OBJECT),
            lambda text: check_schema_output({"type": "object"}, text),
        ),
    ]


def assert_most_ended(ended: dict[str, int], seeds: int) -> None:
    assert sum(ended.values()) >= 0.9 * seeds * len(ended), ended


def test_schemas_are_met() -> None:
    assert len(SCHEMAS) >= 60
    ended = judge(schema_cases(), SEEDS)
    assert all(ended.values()), ended
    assert_most_ended(ended, SEEDS)


def test_regexes_choices_and_grammars_are_met() -> None:
    assert_most_ended(judge(other_cases(), SEEDS), SEEDS)


@pytest.mark.parametrize("budget", [0, 12])
def test_answers_after_thinking_are_met(budget: int) -> None:
    cases = (schema_cases() + other_cases())[::4]
    assert_most_ended(judge(cases, 2, starts_thinking=True, reasoning_max_tokens=budget), 2)


def test_a_model_that_closes_its_thinking_itself_goes_on_with_the_structure() -> None:
    likely = (*CLOSERS, *PADDING, (st.END_THINK, 4.0))
    cases = (schema_cases() + other_cases())[1::8]
    assert_most_ended(judge(cases, 2, starts_thinking=True, logit_bias=likely), 2)


def test_stop_tokens_wait_for_the_end_of_the_structure() -> None:
    """Each may begin or continue an answer, and none is indispensable."""
    stops = tuple(st.encode(text)[0] for text in ("1", "2", " ", "\n", "e", " the"))
    names = ("object closed", "integer range", "array", "object nested", "number", "anyOf", "string lengths")
    cases = [case for case in schema_cases() if case[0] in names]
    ended = judge(cases, 4, stop_token_ids=stops)
    assert all(ended.values()), ended


def test_penalties_bad_words_and_forbidden_ids_give_way_to_the_structure() -> None:
    """What forbids half of what a structure needs changes how it is written, or is not followed."""
    brace, quote = st.encode("{")[0], st.encode('"')[0]
    forbidding = {
        "bad_words_ids": ((quote,), (brace,)),
        "allowed_token_ids": st.encode("nothing of use"),
        "min_tokens": 100,
        "frequency_penalty": 1.0,
        "logit_bias": (),
        "max_tokens": 100,
    }
    cases = [case for case in schema_cases() if case[0] in ("enum", "const string", "boolean", "pattern anchored")]
    ended = judge(cases, 3, **forbidding)
    assert all(ended.values()), ended


def test_without_its_mask_a_model_meets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shows that the checks above can fail."""
    monkeypatch.setattr(sequence_constraint.SequenceConstraint, "fill", lambda self, mask_W: False)
    monkeypatch.setattr(sequence_constraint.SequenceConstraint, "accept", lambda self, token: None)
    name, structure, check = (
        "object",
        st.schema(SCHEMAS["tool call"]),
        lambda text: check_schema_output(SCHEMAS["tool call"], text),
    )
    with pytest.raises((AssertionError, UnicodeDecodeError)):
        judge([(name, structure, check)], 4, max_tokens=60, logit_bias=((st.EOS, 4.0),))
