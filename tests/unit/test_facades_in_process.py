"""Both public faces over a real router and real engines, as clients see them."""

from __future__ import annotations

import json
from typing import Any

import grpc
import httpx
import openai
import pytest

from actors.types import EngineRole
from cluster.client import AsyncClient, ClientError, generate_request
from cluster.grpc_request import SPELLING
from tests.doubles import grpc_serving
from tests.in_process import in_process_cluster
from tests.tiny_model import tiny_checkpoint
from tests.unit.cluster.test_http_api import serving
from tests.unit.test_structured_in_process import closers

ASK: list[Any] = [{"role": "user", "content": "Who is this?"}]
NO_TOKEN = 10**6
"""Beyond any vocabulary."""

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"n": 129}, "n"),
    ({"min_p": 1.5}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"logit_bias": {5: 101}}, "logit_bias"),
    ({"logit_bias": {NO_TOKEN: 1}}, "logit_bias"),
    ({"allowed_token_ids": [NO_TOKEN]}, "allowed_token_ids"),
    ({"stop_token_ids": [NO_TOKEN]}, "stop_token_ids"),
    ({"bad_words": ["fine", "  "]}, "bad_words[1]"),
    ({"min_tokens": 5}, "min_tokens"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"reasoning_max_tokens": -1}, "reasoning_max_tokens"),
    ({"priority": -(2**31)}, "priority"),
    ({"cache_salt": "x" * 257}, "cache_salt"),
]
"""In the names both clients share, with ``max_tokens`` 4."""

STRUCTURES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"guided_json": "{"}, {"json_schema": "{"}, "guided_json"),
    ({"guided_json": {"type": "no"}}, {"json_schema": {"type": "no"}}, "guided_json"),
    ({"guided_regex": "("}, {"regex": "("}, "guided_regex"),
    ({"structured_outputs": {"grammar": "x"}}, {"grammar": "x"}, "structured_outputs.grammar"),
    ({"guided_choice": []}, {"choice": []}, "guided_choice"),
]


async def test_what_is_wrong_is_named_as_its_client_wrote_it() -> None:
    async with (
        in_process_cluster(tiny_checkpoint(), EngineRole.PREFILL, EngineRole.DECODE) as cluster,
        serving(cluster.parts.router) as url,  # type: ignore[arg-type]
        grpc_serving(cluster.parts.router) as address,  # type: ignore[arg-type]
        httpx.AsyncClient(base_url=url, trust_env=False) as http,
        AsyncClient(address) as client,
    ):

        async def refused_over_http(fields: dict[str, Any], field: str) -> None:
            for stream in (False, True):
                body = {"messages": ASK, "max_tokens": 4, "stream": stream, **fields}
                reply = await http.post("/v1/chat/completions", json=body, timeout=30)
                assert reply.status_code == 400, fields
                error = reply.json()["error"]
                assert error["param"].startswith(field) and field in error["message"], error

        async def refused_over_grpc(fields: dict[str, Any], field: str) -> None:
            with pytest.raises(ClientError) as caught:
                await client.generate(generate_request("hi", max_tokens=4, **fields))
            assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT, fields
            assert (caught.value.field or "").startswith(field) and field in caught.value.message, caught.value

        for fields, field in REFUSED:
            await refused_over_http(fields, field)
            head, bracket, index = field.partition("[")
            await refused_over_grpc(fields, SPELLING.get(head, head) + bracket + index)
        for over_http, over_grpc, field in STRUCTURES:
            await refused_over_http(over_http, field)
            await refused_over_grpc(over_grpc, "structured_output")
        await cluster.wait_clean()


async def test_choices_scores_and_structures_through_openais_client() -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    answer: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    extra = {"enable_thinking": True, "reasoning_max_tokens": 4, "return_token_ids": True, "prompt_logprobs": 1}
    async with (
        in_process_cluster(tiny_checkpoint(), EngineRole.COLOCATED) as cluster,
        serving(cluster.parts.router) as url,  # type: ignore[arg-type]
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        stream = await client.chat.completions.create(
            model=cluster.parts.router.models()[0].name,
            messages=ASK,
            n=2,
            seed=3,
            max_tokens=80,
            logit_bias={str(token): bias for token, bias in closers()},
            response_format=answer,
            logprobs=True,
            top_logprobs=2,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=extra,
        )
        chunks = [chunk.model_dump() async for chunk in stream]
        await cluster.wait_clean()
    last = chunks.pop()
    assert last["choices"] == [] and all(chunk["usage"] is None for chunk in chunks)
    assert len(chunks[0]["prompt_logprobs"]) == last["usage"]["prompt_tokens"] == len(chunks[0]["prompt_token_ids"])
    tokens = 0
    for index in range(2):
        pieces = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert pieces[0]["delta"]["role"] == "assistant"
        assert [piece["finish_reason"] for piece in pieces if piece["finish_reason"]] == ["stop"]
        assert pieces[-1]["finish_reason"] == "stop"
        text = "".join(piece["delta"].get("content") or "" for piece in pieces)
        assert json.loads(text)["a"] in (1, 2)
        assert any(piece["delta"].get("reasoning") for piece in pieces)
        ids = [token for piece in pieces for token in piece["token_ids"]]
        scores = [score for piece in pieces if piece["logprobs"] for score in piece["logprobs"]["content"]]
        assert len(scores) == len(ids) and all(len(score["top_logprobs"]) == 2 for score in scores)
        assert text.encode() in b"".join(bytes(score["bytes"]) for score in scores)
        tokens += len(ids)
    assert tokens == last["usage"]["completion_tokens"]
