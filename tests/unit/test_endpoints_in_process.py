"""The endpoints beside chat over a real router and a real engine."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Literal

import grpc.aio
import httpx
import openai
import pydantic
import pytest

from actors.processing.tokenizer import TextTokenizer
from actors.types import EngineRole
from ernie_serving.v1 import inference_pb2, inference_pb2_grpc
from tests.doubles import grpc_serving
from tests.in_process import InProcessCluster, in_process_cluster
from tests.tiny_model import tiny_checkpoint
from tests.unit.cluster.test_http_api import serving
from tests.unit.test_structured_in_process import closers

ASK: list[Any] = [{"role": "user", "content": "Who is this?"}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 6}
TOKENS: dict[str, Any] = {"return_token_ids": True}


class Faces:
    """Both public faces of one cluster."""

    def __init__(self, cluster: InProcessCluster, url: str, http: httpx.AsyncClient, stub: Any) -> None:
        self.cluster = cluster
        self.http = http
        self.grpc = stub
        self.sdk = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

    async def post(self, path: str, **body: Any) -> dict[str, Any]:
        reply = await self.http.post(path, json=body, timeout=60)
        assert reply.status_code == 200, reply.text
        answer: dict[str, Any] = reply.json()
        return answer


@asynccontextmanager
async def faces() -> AsyncIterator[Faces]:
    async with (
        in_process_cluster(tiny_checkpoint(), EngineRole.PREFILL, EngineRole.DECODE) as cluster,
        serving(cluster.parts.router) as url,  # type: ignore[arg-type]
        grpc_serving(cluster.parts.router) as address,  # type: ignore[arg-type]
        httpx.AsyncClient(base_url=url, trust_env=False) as http,
        grpc.aio.insecure_channel(address) as channel,
    ):
        yield Faces(cluster, url, http, inference_pb2_grpc.InferenceServiceStub(channel))
        await cluster.wait_clean()


async def test_a_chat_prompts_tokens_give_the_same_reply_through_every_door() -> None:
    async with faces() as on:
        chat = await on.post("/v1/chat/completions", messages=ASK, enable_thinking=False, **GREEDY, **TOKENS)
        prompt_ids, reply_ids = chat["prompt_token_ids"], chat["choices"][0]["token_ids"]
        tokenized = await on.post("/tokenize", messages=ASK, enable_thinking=False, return_token_strs=True)
        assert tokenized["tokens"] == prompt_ids and tokenized["count"] == len(tokenized["token_strs"])
        text = (await on.post("/detokenize", tokens=prompt_ids))["prompt"]
        assert text.startswith("<|begin_of_sentence|>User: Who is this?")
        assert (await on.post("/tokenize", prompt=text))["tokens"] == prompt_ids

        for prompt in (prompt_ids, [prompt_ids], text, [text, text]):
            reply = await on.post("/v1/completions", prompt=prompt, **GREEDY, **TOKENS)
            for choice in reply["choices"]:
                assert (choice["token_ids"], choice["prompt_token_ids"]) == (reply_ids, prompt_ids)
            assert reply["usage"]["completion_tokens"] == len(reply_ids) * len(reply["choices"])
        request = inference_pb2.GenerateRequest(prompt_text=text, return_token_ids=True)
        request.sampling_params.temperature = 0
        request.sampling_params.max_output_token_count = 6
        over_grpc = await on.grpc.Generate(request)
        assert list(over_grpc.prompt_token_ids) == prompt_ids
        assert list(over_grpc.choices[0].token_ids) == reply_ids
        counted = await on.grpc.CountTokens(inference_pb2.CountTokensRequest(prompt_text=text))
        assert counted.token_count == len(prompt_ids)


async def test_echo_scores_and_streams_through_openais_client() -> None:
    async with faces() as on:
        model = on.cluster.parts.router.models()[0].name
        asked: dict[str, Any] = {"model": model, "prompt": ["Who is", "1, 2,"], "n": 2, "echo": True, "logprobs": 2}
        whole = await on.sdk.completions.create(**asked, **GREEDY)
        chunks = [chunk async for chunk in await on.sdk.completions.create(**asked, **GREEDY, stream=True)]
        assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
        for choice in whole.choices:
            prompt = asked["prompt"][choice.index // 2]
            pieces = [piece for chunk in chunks for piece in chunk.choices if piece.index == choice.index]
            assert choice.text.startswith(prompt) and "".join(piece.text for piece in pieces) == choice.text
            assert pieces[-1].finish_reason == choice.finish_reason
            scores = choice.logprobs
            assert scores is not None and scores.tokens and scores.token_logprobs and scores.text_offset
            assert scores.token_logprobs[0] is None and all(score <= 0 for score in scores.token_logprobs[1:])
            assert "".join(scores.tokens).startswith(prompt)
            told = [piece.logprobs.tokens or [] for piece in pieces if piece.logprobs]
            assert [token for tokens in told for token in tokens] == scores.tokens
        only = await on.sdk.completions.create(
            model=model, prompt="Who is", echo=True, logprobs=0, max_tokens=0, temperature=0
        )
        assert only.choices[0].text == "Who is" and only.usage is not None and only.usage.completion_tokens == 0
        first = whole.choices[0].logprobs
        assert only.choices[0].logprobs is not None and first is not None and first.token_logprobs
        scored = only.choices[0].logprobs.token_logprobs or []
        assert scored[1:] == pytest.approx(first.token_logprobs[1 : len(scored)])


async def test_a_prompt_may_hold_any_token_but_placeholders() -> None:
    tokenizer = TextTokenizer.from_dir(tiny_checkpoint())
    async with faces() as on:
        placeholders = on.cluster.preprocessor._processor.tokens.placeholders
        ids = [token for token in range(tokenizer.vocab_size) if token not in placeholders]
        reply = await on.post("/v1/completions", prompt=ids, max_tokens=2, echo=True, prompt_logprobs=0)
        (choice,) = reply["choices"]
        assert reply["usage"]["prompt_tokens"] == len(ids) and choice["text"].startswith("<unk><s></s>")
        again = await on.post("/v1/completions", prompt=["<|IMAGE_START|>x<|IMAGE_END|>"], max_tokens=1, **TOKENS)
        assert len(again["choices"][0]["prompt_token_ids"]) == 3


async def test_what_is_wrong_with_a_prompt_is_named() -> None:
    image = "<|IMAGE_PLACEHOLDER|>"
    async with faces() as on:
        ids = (await on.post("/tokenize", prompt="some text"))["tokens"]
        wrong: list[tuple[Any, str]] = [
            (image, "prompt"),
            (["fine", image], "prompt[1]"),
            ([*ids, 10**6], f"prompt[{len(ids)}]"),
            ([ids, [*ids, -1]], f"prompt[1][{len(ids)}]"),
            ("long " * 20_000, "prompt"),
        ]
        for prompt, field in wrong:
            for stream in (False, True):
                reply = await on.http.post("/v1/completions", json={"prompt": prompt, "stream": stream}, timeout=60)
                assert reply.status_code == 400, reply.text
                error = reply.json()["error"]
                assert error["param"] == field and field in error["message"], error


class Pick(pydantic.BaseModel):
    a: Literal[1, 2]


async def test_responses_through_openais_client() -> None:
    schema = {"type": "object", "properties": {"b": {"enum": [1]}}, "required": ["b"], "additionalProperties": False}
    tool: Any = {"type": "function", "name": "f", "parameters": schema, "strict": True}
    closing = {"logit_bias": {str(token): bias for token, bias in closers()}, "seed": 3}
    async with faces() as on:
        model = on.cluster.parts.router.models()[0].name
        asked: dict[str, Any] = {"model": model, "input": "Who is this?", "temperature": 0, "max_output_tokens": 6}
        chat = await on.post("/v1/chat/completions", messages=ASK, **GREEDY)
        whole = await on.sdk.responses.create(**asked)
        events = [event async for event in await on.sdk.responses.create(**asked, stream=True)]
        assert whole.output_text == chat["choices"][0]["message"]["content"] and whole.status == "incomplete"
        text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
        assert text == whole.output_text and events[-1].type == "response.incomplete"
        assert whole.usage is not None and whole.usage.input_tokens == chat["usage"]["prompt_tokens"]

        asked |= {"max_output_tokens": 120, "temperature": 1, "extra_body": closing, "reasoning": {"effort": "none"}}
        parsed = await on.sdk.responses.parse(**asked, text_format=Pick)
        assert parsed.output_parsed is not None and parsed.status == "completed"

        asked |= {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
        async with on.sdk.responses.stream(**asked) as stream:
            called = await stream.get_final_response()
        (call,) = called.output
        assert call.type == "function_call" and json.loads(call.arguments) == {"b": 1} and call.name == "f"
        history: list[Any] = [{"role": "user", "content": "Who is this?"}, *called.output]
        history.append({"type": "function_call_output", "call_id": call.call_id, "output": "nobody"})
        again = await on.sdk.responses.create(model=model, input=history, tools=[tool], max_output_tokens=3)
        assert again.usage is not None and again.usage.output_tokens == 3

        history[-1]["call_id"] = "call_unknown"
        with pytest.raises(openai.BadRequestError) as caught:
            await on.sdk.responses.create(model=model, input=history, tools=[tool])
        assert caught.value.param == "input[2].call_id"

        thinking: dict[str, Any] = {"model": model, "input": "Who?", "reasoning": {"effort": "high"}}
        thought = await on.sdk.responses.create(**thinking, max_output_tokens=3)
        assert [item.type for item in thought.output] == ["reasoning"]
        assert thought.usage is not None and thought.usage.output_tokens_details.reasoning_tokens == 3
