"""POST /tokenize and POST /detokenize over a scripted service."""

from __future__ import annotations

from typing import Any

import pytest

from actors.errors import ServingError, Unavailable
from actors.types import MediaOptions, ThinkingMode
from cluster.generation import GenerateCall, PromptTokens, Tool
from tests.doubles import ScriptedService
from tests.unit.cluster.test_http_api import plain

ASK = [{"role": "user", "content": "hi"}]
PICTURE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a/b.png"}}]}]


class Failing(ScriptedService):
    """Says that something is wrong with a field."""

    def __init__(self, error: ServingError) -> None:
        super().__init__()
        self.error = error

    async def tokenize(self, call: GenerateCall) -> PromptTokens:
        raise self.error


async def test_a_prompt() -> None:
    service = ScriptedService()
    async with plain(service) as client:
        reply = (await client.post("/tokenize", json={"prompt": "hi", "model": "ernie"})).json()
        named = (await client.post("/tokenize", json={"prompt": "hi", "return_token_strs": True})).json()
        await client.post("/tokenize", json={"prompt": "hi", "add_special_tokens": False})
    assert reply == {"count": 2, "max_model_len": 4096, "tokens": [104, 105], "token_strs": None}
    assert named == reply | {"token_strs": ["h", "i"]}
    assert [call.add_special_tokens for call in service.tokenized] == [True, True, False]
    assert service.tokenized[0] == GenerateCall(model="ernie", prompt="hi")


async def test_a_conversation_is_what_a_chat_would_send() -> None:
    service = ScriptedService()
    body = {
        "messages": ASK,
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "chat_template_kwargs": {"enable_thinking": False},
        "mm_processor_kwargs": {"image_max_pixels": 100_000},
        "add_generation_prompt": True,
        "continue_final_message": False,
        "add_special_tokens": False,
    }
    async with plain(service) as client:
        reply = (await client.post("/tokenize", json=body)).json()
    assert reply["count"] == len(reply["tokens"]) == 12
    (call,) = service.tokenized
    assert (call.thinking, call.tools, call.prompt) == (ThinkingMode.OFF, (Tool(name="f"),), None)
    assert call.media_options == MediaOptions(image_max_pixels=100_000)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "messages": ASK}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["a"]}, "prompt"),
        ({"messages": []}, "messages"),
        ({"prompt": "a", "tools": []}, "tools"),
        ({"prompt": "a", "enable_thinking": True}, "enable_thinking"),
        ({"prompt": "a", "mm_processor_kwargs": {}}, "mm_processor_kwargs"),
        ({"messages": ASK, "add_special_tokens": True}, "add_special_tokens"),
        ({"messages": ASK, "add_generation_prompt": False}, "add_generation_prompt"),
        ({"messages": ASK, "continue_final_message": True}, "continue_final_message"),
        ({"messages": ASK, "chat_template": "x"}, "chat_template"),
    ],
)
async def test_what_is_refused_is_named(body: dict[str, Any], field: str) -> None:
    service = ScriptedService()
    async with plain(service) as client:
        response = await client.post("/tokenize", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, field) and field in error["message"]
    assert service.tokenized == []


async def test_errors_of_later_stages_name_the_clients_field() -> None:
    body = {"messages": PICTURE, "mm_processor_kwargs": {"min_pixels": 5}}
    for ours, theirs in (
        ("media_options.image_min_pixels", "mm_processor_kwargs.min_pixels"),
        ("messages[0].parts[0].image_url", "messages[0].content[0].image_url"),
    ):
        async with plain(Failing(Unavailable("no", field=ours))) as client:
            response = await client.post("/tokenize", json=body)
        assert (response.status_code, response.json()["error"]["param"]) == (503, theirs)


async def test_tokens_are_spelled_out() -> None:
    async with plain(ScriptedService()) as client:
        reply = await client.post("/detokenize", json={"tokens": [1, 104, 105], "model": "ernie"})
        empty = await client.post("/detokenize", json={"tokens": []})
    assert reply.json() == {"prompt": "<s>hi"} and empty.json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ({"tokens": [104, 999]}, 400, "tokens[1]"),
        ({"tokens": [-1]}, 400, "tokens[0]"),
        ({"tokens": [2**70]}, 400, "tokens[0]"),
        ({"tokens": "hi"}, 400, "tokens"),
        ({"tokens": [65] * (2**20 + 1)}, 400, "tokens"),
        ({"tokens": [65], "model": "other"}, 404, "model"),
        ({}, 400, "tokens"),
    ],
)
async def test_tokens_that_are_none_are_named(body: dict[str, Any], status: int, field: str) -> None:
    async with plain(ScriptedService()) as client:
        response = await client.post("/detokenize", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (status, field)
