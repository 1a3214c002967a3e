"""POST /v1/completions over a scripted service, mostly through OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import openai
import pytest

from actors.errors import InvalidRequest, Unavailable
from actors.types import FinishReason, StructureKind
from cluster.generation import ChoiceFinished, Delta, PositionScores, PromptScored, TokenScore
from cluster.openai_completions import CompletionRequest, to_calls
from cluster.openai_completions_response import LegacyLogprobs
from cluster.openai_request import parse_body
from tests.doubles import ENDED, FINISHED, SCRIPT, STARTED, ByteVocabulary, Pause, ScriptedService
from tests.unit.cluster.test_http_api import plain, sdk
from tests.waiting import LIMIT_S

COMPLETIONS = "/v1/completions"


def score(token_id: int, *top: int) -> PositionScores:
    ranked = [
        TokenScore(token_id=i, token=ByteVocabulary().token_bytes(i), logprob=-0.5 - rank, rank=rank + 1)
        for rank, i in enumerate((token_id, *top))
    ]
    return PositionScores(chosen=ranked[0], top=tuple(ranked[1:]))


PROMPT = replace(STARTED, prompt_tokens=2, prompt_token_ids=tuple(b"hi"))
SCORED = (
    PROMPT,
    PromptScored(entries=(None, score(ord("i"), ord("o")))),
    Delta(text="", token_ids=(0xC3,), logprobs=(score(0xC3, ord("x")),)),
    Delta(text="ä!", token_ids=(0xA4, ord("!")), logprobs=(score(0xA4), score(ord("!")))),
    Delta(choice=1, text="no", token_ids=tuple(b"no"), logprobs=(score(ord("n")), score(ord("o")))),
    Delta(choice=1, token_ids=(1,), logprobs=(score(1),)),
    ChoiceFinished(reason=FinishReason.LENGTH),
    ChoiceFinished(choice=1, reason=FinishReason.STOP, stop_reason=1),
    FINISHED,
)


async def test_a_whole_reply_with_openais_defaults() -> None:
    service = ScriptedService()
    async with sdk(service) as client:
        reply = await client.completions.create(model="ernie", prompt="<s>Say", temperature=0, user="u")
    (choice,) = reply.choices
    assert (reply.id, reply.object, reply.model) == ("cmpl-r-1", "text_completion", "ernie")
    assert (choice.text, choice.finish_reason, choice.logprobs) == ("A cät", "stop", None)
    assert choice.model_dump()["stop_reason"] == "END"
    assert reply.usage is not None and reply.usage.total_tokens == 17
    assert reply.model_dump()["timings"]["time_to_first_token"] == 0.25
    (call,) = service.calls
    assert (call.prompt, call.messages, call.max_tokens, call.temperature) == ("<s>Say", (), 16, 0)
    assert call.add_special_tokens and not call.return_token_ids


async def test_echo_and_legacy_log_probabilities() -> None:
    service = ScriptedService(script=SCORED)
    async with sdk(service) as client:
        asked: dict[str, Any] = {"model": "m", "prompt": "hi", "n": 2, "echo": True, "logprobs": 1}
        whole = await client.completions.create(**asked, extra_body={"return_token_ids": True})
        chunks = [chunk async for chunk in await client.completions.create(**asked, stream=True)]
    first, second = whole.choices
    assert (first.text, second.text) == ("hiä!", "hino")
    assert first.logprobs is not None and first.logprobs.model_dump() == {
        "tokens": ["h", "i", "bytes:\\xc3", "bytes:\\xa4", "!"],
        "text_offset": [0, 1, 2, 2, 3],
        "token_logprobs": [None, -0.5, -0.5, -0.5, -0.5],
        "top_logprobs": [
            None,
            {"o": -1.5, "i": -0.5},
            {"x": -1.5, "bytes:\\xc3": -0.5},
            {"bytes:\\xa4": -0.5},
            {"!": -0.5},
        ],
    }
    assert second.logprobs is not None and second.logprobs.tokens == ["h", "i", "n", "o", "<s>"]
    assert second.logprobs.text_offset == [0, 1, 2, 3, 4]
    body = whole.model_dump()
    assert [choice["token_ids"] for choice in body["choices"]] == [[0xC3, 0xA4, 33], [110, 111, 1]]
    assert all(choice["prompt_token_ids"] == [104, 105] for choice in body["choices"])
    for choice in whole.choices:
        pieces = [piece for chunk in chunks for piece in chunk.choices if piece.index == choice.index]
        assert "".join(piece.text for piece in pieces) == choice.text
        assert choice.logprobs is not None
        for name, values in choice.logprobs.model_dump().items():
            assert [one for piece in pieces if piece.logprobs for one in getattr(piece.logprobs, name)] == values
        assert [piece.finish_reason for piece in pieces if piece.finish_reason] == [choice.finish_reason]
    assert all(call.prompt_logprobs == call.logprobs == 1 for call in service.calls)


async def test_only_the_prompt_is_told_where_no_token_is_wanted() -> None:
    service = ScriptedService(script=SCORED)
    async with plain(service) as client:
        asked = {"prompt": list(b"hi"), "n": 2, "echo": True, "logprobs": 0, "max_tokens": 0}
        body = (await client.post(COMPLETIONS, json=asked)).json()
        stream = (await client.post(COMPLETIONS, json=asked | {"stream": True})).text
    assert [(choice["text"], choice["finish_reason"]) for choice in body["choices"]] == [("hi", "length")] * 2
    assert body["choices"][0]["logprobs"]["tokens"] == ["h", "i"]
    assert body["usage"]["completion_tokens"] == 0 and stream.count('"text":"hi"') == 2 and "ä" not in stream
    assert service.calls[0].max_tokens == 1


async def test_prompt_scores_in_vllms_form() -> None:
    asked = {"prompt": "hi", "n": 2, "prompt_logprobs": 1}
    async with plain(ScriptedService(script=SCORED)) as client:
        body = (await client.post(COMPLETIONS, json=asked)).json()
    scores = body["choices"][0]["prompt_logprobs"]
    assert scores[0] is None and scores[1]["105"] == {"logprob": -0.5, "rank": 1, "decoded_token": "i"}
    assert body["choices"][0]["text"] == "ä!" and "token_ids" not in body["choices"][0]
    async with plain(ScriptedService(script=SCORED)) as client:
        echoed = (await client.post(COMPLETIONS, json=asked | {"echo": True})).json()["choices"][1]
    assert (echoed["text"], echoed["prompt_logprobs"], echoed["logprobs"]) == ("hino", scores, None)


@pytest.mark.parametrize("prompt", [["a", "b"], [[97], [98]]])
async def test_several_prompts_make_one_reply(prompt: Any) -> None:
    service = ScriptedService()
    async with sdk(service) as client:
        whole = await client.completions.create(model="m", prompt=prompt, seed=1)
        stream = await client.completions.create(
            model="m", prompt=prompt, stream=True, stream_options={"include_usage": True}
        )
        *chunks, last = [chunk async for chunk in stream]
    assert [(choice.index, choice.text) for choice in whole.choices] == [(0, "A cät"), (1, "A cät")]
    assert whole.usage is not None and whole.usage.completion_tokens == 10 and whole.usage.prompt_tokens == 24
    assert last.choices == [] and last.usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks)
    for index in range(2):
        pieces = [piece.text for chunk in chunks for piece in chunk.choices if piece.index == index]
        assert "".join(pieces) == "A cät"
    assert [call.prompt for call in service.calls[:2]] == ([(97,), (98,)] if prompt[0] == [97] else ["a", "b"])
    assert [service.ended.get_nowait() for _ in range(4)] == ["finished"] * 4


async def test_one_prompt_that_fails_ends_all() -> None:
    class Service(ScriptedService):
        async def generate(self, call: Any) -> Any:
            if call.prompt == "bad":
                raise InvalidRequest("no such thing", field="prompt")
            async for event in super().generate(call):
                yield event

    service = Service(script=(*SCRIPT[:2], Pause()))
    async with plain(service) as client:
        response = await client.post(COMPLETIONS, json={"prompt": ["good", "bad"]})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt[1]")
    assert await service.ended.get() == "closed"


async def test_leaving_cancels_every_prompt() -> None:
    service = ScriptedService(script=(*SCRIPT[:2], Pause()))
    async with plain(service) as client:
        asked = {"prompt": ["a", "b", "c"], "stream": True, "echo": True}
        async with client.stream("POST", COMPLETIONS, json=asked) as response:
            await anext(response.aiter_text())
        ended = [await asyncio.wait_for(service.ended.get(), LIMIT_S) for _ in range(3)]
    assert ended == ["closed"] * 3


async def test_errors_after_the_stream_began_are_raised_by_openais_client() -> None:
    service = ScriptedService(script=(*SCRIPT[:3], Unavailable("engine lost", reason="ENGINE_LOST")))
    async with sdk(service) as client:
        stream = await client.completions.create(model="m", prompt="a", stream=True)
        with pytest.raises(openai.APIError, match="engine lost") as caught:
            async for _ in stream:
                pass
    assert caught.value.code == "engine_lost"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt[0]"),
    ({"prompt": ["a", ""]}, "prompt[1]"),
    ({"prompt": [1, "a"]}, "prompt[1]"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": ["a"] * 129}, "prompt"),
    ({"prompt": ["a"] * 65, "n": 2}, "n"),
    ({"suffix": "x"}, "suffix"),
    ({"best_of": 2}, "best_of"),
    ({"messages": []}, "messages"),
    ({"tools": []}, "tools"),
    ({"enable_thinking": True}, "enable_thinking"),
    ({"reasoning_max_tokens": 3}, "reasoning_max_tokens"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"echo": True, "max_tokens": 0, "min_tokens": 1}, "min_tokens"),
    ({"echo": True, "logprobs": 1, "prompt_logprobs": 1}, "prompt_logprobs"),
    ({"prompt": ["a", "b"], "return_timings": True}, "return_timings"),
    ({"prompt": ["a", "b"], "request_id": "mine"}, "request_id"),
    ({"request_id": "cmpl-a"}, "request_id"),
    ({"stream_options": {}}, "stream_options"),
    ({"temperature": 3}, "temperature"),
    ({"guided_regex": "a", "guided_json": {}}, "guided_regex"),
    ({"skip_special_tokens": False}, "skip_special_tokens"),
    ({"include_stop_str_in_output": True}, "include_stop_str_in_output"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"store": False}, "store"),
]


@pytest.mark.parametrize(("fields", "field"), REFUSED, ids=lambda value: str(value)[:30])
async def test_what_is_refused_is_named(fields: dict[str, Any], field: str) -> None:
    service = ScriptedService()
    async with plain(service) as client:
        response = await client.post(COMPLETIONS, json={"prompt": "a"} | fields)
    error = response.json()["error"]
    assert response.status_code == 400 and error["type"] == "invalid_request_error"
    assert error["param"] == field and field in error["message"]
    assert service.calls == []


def test_every_field_is_carried_over() -> None:
    body = (
        b'{"prompt": "a", "model": "m", "n": 2, "temperature": 0.5, "top_p": 0.5, "top_k": -1, "min_p": 0.1, "seed": 3,'
        b'"repetition_penalty": 1.5, "presence_penalty": 1, "frequency_penalty": -1, "logit_bias": {"5": 1},'
        b'"allowed_token_ids": [5], "bad_words": ["x"], "min_tokens": 1, "max_tokens": 4, "stop": "S",'
        b'"stop_token_ids": [7], "ignore_eos": true, "logprobs": 2, "prompt_logprobs": 1, "guided_regex": "a+",'
        b'"priority": 1, "cache_salt": "s", "timeout": 2, "return_token_ids": true, "return_timings": true,'
        b'"add_special_tokens": false, "best_of": 1, "suffix": null, "user": "u", "request_id": "mine"}'
    )
    (call,) = to_calls(parse_body(CompletionRequest, body))
    (bare,) = to_calls(parse_body(CompletionRequest, b'{"prompt": "b"}'))
    same = {name for name in call.__dataclass_fields__ if getattr(call, name) == getattr(bare, name)}
    # What a raw prompt has no use for, and what -1 and nothing both mean.
    assert same == {
        "messages",
        "media_options",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "reasoning_max_tokens",
        "thinking",
    }
    assert call.top_k == 0 and call.structure is not None and call.structure.kind is StructureKind.REGEX


def test_fields_that_ask_for_what_is_done_anyway() -> None:
    given = {
        "prompt": "a",
        "skip_special_tokens": True,
        "spaces_between_special_tokens": True,
        "include_stop_str_in_output": False,
        "return_tokens_as_token_ids": False,
        "use_beam_search": False,
    }
    bare = to_calls(parse_body(CompletionRequest, b'{"prompt": "a"}'))
    assert to_calls(parse_body(CompletionRequest, json.dumps(given).encode())) == bare


def test_tokens_that_are_left_out_take_no_room() -> None:
    scores = LegacyLogprobs(ByteVocabulary())
    assert scores.prompt((1, 97), (None, None))["text_offset"] == [0, 3]
    assert scores.reply([score(1), score(98)])["text_offset"] == [4, 4]


async def test_a_service_that_breaks_its_contract_is_an_error() -> None:
    for script in (SCRIPT[:2], (SCRIPT[1], ENDED, FINISHED), (FINISHED,)):
        async with plain(ScriptedService(script=script)) as client:
            for stream in (False, True):
                text = (await client.post(COMPLETIONS, json={"prompt": "a", "stream": stream})).text
                assert '"code":"internal"' in text and "[DONE]" not in text
