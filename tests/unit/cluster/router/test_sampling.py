"""What a request leaves open comes from the checkpoint and from the room in the context."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from actors.errors import ContextExceeded, InvalidRequest
from actors.types import SamplingParams, Structure, StructureKind
from cluster.generation import GenerateCall
from cluster.router.sampling import MAX_PROMPT_SCORES, SamplingDefaults, Spellings, resolve_sampling


def spellings(text: str) -> tuple[tuple[int, ...], ...]:
    """As letters, and as one token of the first letter."""
    return (tuple(map(ord, text)), (ord(text[0]),)) if text else ()


def resolve(
    call: GenerateCall,
    defaults: SamplingDefaults | None = None,
    *,
    prompt_tokens: int = 10,
    starts_thinking: bool = False,
    max_model_len: int = 64,
    spellings: Spellings = spellings,
) -> SamplingParams:
    return resolve_sampling(
        call,
        defaults or SamplingDefaults(),
        prompt_tokens=prompt_tokens,
        starts_thinking=starts_thinking,
        max_model_len=max_model_len,
        spellings=spellings,
    )


def defaults(folder: Path, values: Any) -> SamplingDefaults:
    (folder / "generation_config.json").write_text(json.dumps(values))
    return SamplingDefaults.from_dir(folder)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, SamplingDefaults()),
        ({"temperature": None, "top_k": None}, SamplingDefaults()),
        ({"temperature": 0.2, "top_p": 0.8, "top_k": 20}, SamplingDefaults(temperature=0.2, top_p=0.8, top_k=20)),
        ({"temperature": 0}, SamplingDefaults(temperature=0)),
        ({"top_k": -1, "max_new_tokens": 5}, SamplingDefaults(top_k=0)),
        ({"min_p": 0.05, "repetition_penalty": 1.1}, SamplingDefaults(min_p=0.05, repetition_penalty=1.1)),
        ({"do_sample": False, "temperature": 0.7}, SamplingDefaults(temperature=0)),
        ({"do_sample": True, "temperature": 0.7}, SamplingDefaults(temperature=0.7)),
    ],
)
def test_the_checkpoint_gives_defaults(tmp_path: Path, values: dict[str, Any], expected: SamplingDefaults) -> None:
    assert defaults(tmp_path, values) == expected


def test_a_checkpoint_may_say_nothing(tmp_path: Path) -> None:
    assert SamplingDefaults.from_dir(tmp_path) == SamplingDefaults()


@pytest.mark.parametrize(
    "values",
    [
        [],
        {"temperature": "hot"},
        {"temperature": -1},
        {"top_p": 0},
        {"top_k": -2},
        {"min_p": 2},
        {"repetition_penalty": 0},
    ],
)
def test_defaults_no_request_could_use_are_refused(tmp_path: Path, values: Any) -> None:
    with pytest.raises(ValueError, match=r"generation_config\.json: "):
        defaults(tmp_path, values)


def test_what_is_not_applied_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    defaults(tmp_path, {"min_p": 0.1, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3})
    assert [record.getMessage().split("=")[0].split()[-1] for record in caplog.records] == ["no_repeat_ngram_size"]


def test_the_caller_wins_and_the_context_bounds() -> None:
    call = GenerateCall(messages=(), temperature=0.0, top_k=3, min_p=0.0)
    got = resolve(call, SamplingDefaults(top_p=0.5, top_k=9, min_p=0.5, repetition_penalty=1.3))
    assert (got.temperature, got.top_p, got.top_k, got.max_tokens) == (0.0, 0.5, 3, 54)
    assert (got.min_p, got.repetition_penalty) == (0.0, 1.3)


def test_all_a_caller_says_of_sampling_reaches_the_engine() -> None:
    structure = Structure(kind=StructureKind.REGEX, text="a+")
    call = GenerateCall(
        messages=(),
        temperature=0.5,
        top_p=0.9,
        top_k=4,
        min_p=0.1,
        repetition_penalty=1.5,
        presence_penalty=0.25,
        frequency_penalty=-0.5,
        logit_bias=((3, 1.5),),
        allowed_token_ids=(3, 4),
        bad_words=("no", " never"),
        min_tokens=2,
        max_tokens=9,
        stop_token_ids=(8,),
        ignore_eos=True,
        logprobs=3,
        prompt_logprobs=0,
        structure=structure,
        reasoning_max_tokens=5,
    )
    assert resolve(call, starts_thinking=True) == SamplingParams(
        temperature=0.5,
        top_p=0.9,
        top_k=4,
        min_p=0.1,
        repetition_penalty=1.5,
        presence_penalty=0.25,
        frequency_penalty=-0.5,
        logit_bias=((3, 1.5),),
        allowed_token_ids=(3, 4),
        bad_words_ids=((110, 111), (110,), (110, 101, 118, 101, 114)),
        min_tokens=2,
        max_tokens=9,
        stop_token_ids=(8,),
        ignore_eos=True,
        logprobs=3,
        prompt_logprobs=0,
        structure=structure,
        starts_thinking=True,
        reasoning_max_tokens=5,
    )


def test_a_bound_on_thinking_means_nothing_without_thinking() -> None:
    got = resolve(GenerateCall(messages=(), reasoning_max_tokens=5))
    assert (got.starts_thinking, got.reasoning_max_tokens) == (False, None)


@pytest.mark.parametrize("word", ["  ", "\x00"])
def test_a_bad_word_has_text_and_tokens(word: str) -> None:
    """Spaces are not one: in front of nothing they would forbid every lone space."""

    def spelt(text: str) -> tuple[tuple[int, ...], ...]:
        return () if text == "\x00" else ((7,), (8, 7))

    with pytest.raises(InvalidRequest) as caught:
        resolve(GenerateCall(messages=(), bad_words=("fine", word)), spellings=spelt)
    assert caught.value.field == "bad_words[1]"


def test_line_ends_can_be_bad_words() -> None:
    assert resolve(GenerateCall(messages=(), bad_words=(" \n",))).bad_words_ids == ((10,),)


def test_scores_of_a_long_prompt_are_bounded() -> None:
    fits = MAX_PROMPT_SCORES // 4
    call = GenerateCall(messages=(), prompt_logprobs=3)
    assert resolve(call, prompt_tokens=fits, max_model_len=2 * fits).prompt_logprobs == 3
    with pytest.raises(InvalidRequest, match=str(MAX_PROMPT_SCORES)) as caught:
        resolve(call, prompt_tokens=fits + 1, max_model_len=2 * fits)
    assert caught.value.field == "prompt_logprobs"


@pytest.mark.parametrize(("prompt", "max_tokens", "field"), [(64, None, "messages"), (10, 55, "max_tokens")])
def test_what_does_not_fit_names_its_field(prompt: int, max_tokens: int | None, field: str) -> None:
    with pytest.raises(ContextExceeded, match="64") as caught:
        resolve(GenerateCall(messages=(), max_tokens=max_tokens), prompt_tokens=prompt)
    assert caught.value.field == field
