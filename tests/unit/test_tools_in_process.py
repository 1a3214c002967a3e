"""nano and its zoom tool through both public faces, real router and real engines: calls that it makes as it was trained
to, and calls it is made to make."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import jsonschema
import openai
import pytest
import torch

from actors.types import EngineRole
from cluster.client import AsyncClient, ClientError, generate_request, user_message
from cluster.eval.asking import ask_with_zoom
from cluster.eval.tasks import Sample, samples
from cluster.eval.world import zoom
from tests.doubles import grpc_serving
from tests.in_process import InProcessCluster, in_process_cluster
from tests.nano_model import SEED, nano_checkpoint
from tests.unit.cluster.test_http_api import serving

ROLES = {"colocated": (EngineRole.COLOCATED,), "split": (EngineRole.PREFILL, EngineRole.DECODE)}
PARAMETERS = zoom.TOOL["function"]["parameters"]
BOX = {
    "type": "object",
    "properties": {"bbox_2d": {"type": "array", "items": {"type": "integer"}, "minItems": 4, "maxItems": 4}},
    "required": ["bbox_2d"],
    "additionalProperties": False,
}
STRICT: dict[str, Any] = {"type": "function", "function": {"name": zoom.NAME, "parameters": BOX}}
WAIT: dict[str, Any] = {"type": "function", "function": {"name": "wait", "description": "Does nothing."}}


class Faces:
    def __init__(self, cluster: InProcessCluster, url: str, client: AsyncClient, sdk: openai.AsyncOpenAI) -> None:
        self.cluster = cluster
        self.url = url
        self.client = client
        self.sdk = sdk


@asynccontextmanager
async def faces(*roles: EngineRole) -> AsyncIterator[Faces]:
    torch.set_num_threads(1)
    async with (
        in_process_cluster(nano_checkpoint(), *roles, dtype="float32") as cluster,
        serving(cluster.parts.router) as url,  # type: ignore[arg-type]
        grpc_serving(cluster.parts.router) as address,  # type: ignore[arg-type]
        AsyncClient(address) as client,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as sdk,
    ):
        yield Faces(cluster, url, client, sdk)
        await cluster.wait_clean()


def question(sample: Sample) -> list[Any]:
    data = base64.b64encode(sample.images[0]).decode()
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    return [{"role": "user", "content": [picture, {"type": "text", "text": sample.text}]}]


def made(message: Any) -> list[tuple[str, Any]]:
    """Calls of a message, their arguments read."""
    calls = message.tool_calls or []
    assert len({call.id for call in calls}) == len(calls) and all(call.id.startswith("call_") for call in calls)
    return [(call.function.name, json.loads(call.function.arguments)) for call in calls]


@pytest.mark.parametrize("roles", ROLES)
async def test_nano_looks_closer_over_both_apis_alike(roles: str) -> None:
    called = 0
    async with faces(*ROLES[roles]) as on:
        for sample in samples("zoom", SEED, 4):
            asked: dict[str, Any] = {"temperature": 0, "max_tokens": 96, "tools": [zoom.TOOL]}
            grpc = await on.client.generate(
                generate_request(user_message(sample.text, images=sample.images), **asked), timeout_s=120
            )
            whole = await on.sdk.chat.completions.create(model="nano", messages=question(sample), **asked)
            async with on.sdk.chat.completions.stream(model="nano", messages=question(sample), **asked) as stream:
                streamed = await stream.get_final_completion()
            (theirs,), (choice,), (final,) = grpc.choices, whole.choices, streamed.choices
            assert whole.usage is not None
            assert grpc.usage.prompt_token_count == whole.usage.prompt_tokens
            assert grpc.usage.output_token_count == whole.usage.completion_tokens
            assert (choice.message.content or "") == theirs.text == (final.message.content or "")
            calls = made(choice.message)
            assert calls == made(final.message)
            assert calls == [(call.name, json.loads(call.arguments_json)) for call in theirs.tool_calls]
            assert "<tool_call>" not in theirs.text
            assert choice.finish_reason == final.finish_reason == ("tool_calls" if calls else "stop")
            for name, arguments in calls:
                assert name == zoom.NAME
                jsonschema.validate(arguments, PARAMETERS)
            answered, looks = await ask_with_zoom(on.client, sample.text, sample.images[0])
            assert [look.call.name for look in looks] == [name for name, _ in calls]
            if looks:
                called += 1
                (picture,) = looks[0].shown
                seen = base64.b64encode(picture).decode()
                result = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{seen}"}}]
                call_id = (choice.message.tool_calls or [])[0].id
                again: list[Any] = [
                    *question(sample),
                    choice.message.model_dump(),
                    {"role": "tool", "tool_call_id": call_id, "content": result},
                ]
                answer = await on.sdk.chat.completions.create(model="nano", **{**asked, "messages": again})
                assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (answered.text, "stop")
    # It was trained to; at least one of these it looks at more closely.
    assert called


async def test_tools_that_may_not_be_called_are_not_seen() -> None:
    (sample,) = samples("zoom", SEED, 1)
    async with faces(EngineRole.COLOCATED) as on:
        counts = []
        for fields in ({}, {"tools": [zoom.TOOL], "tool_choice": "none"}, {"tools": [zoom.TOOL]}):
            reply = await on.sdk.chat.completions.create(
                model="nano", messages=question(sample), max_tokens=4, temperature=0, **fields
            )
            assert reply.usage is not None
            counts.append(reply.usage.prompt_tokens)
        counted = await on.client.count_tokens(sample.text, images=sample.images, tools=[zoom.TOOL])
    assert counts[0] == counts[1] < counts[2] == counted.tokens


@pytest.mark.parametrize("roles", ROLES)
async def test_a_call_that_is_required_is_made_and_valid(roles: str) -> None:
    rng = random.Random(SEED)
    async with faces(*ROLES[roles]) as on:
        for sample in samples("zoom", SEED, 2):
            for choice, thinking in (("required", False), ({"type": "function", "function": {"name": "wait"}}, True)):
                for temperature in (0, 1):
                    asked: dict[str, Any] = {
                        "messages": question(sample),
                        "tools": [STRICT, WAIT],
                        "tool_choice": choice,
                        "parallel_tool_calls": False,
                        "temperature": temperature,
                        "seed": rng.randrange(2**31),
                        "max_tokens": 200,
                        "stop": ['"', "}"],
                        "logprobs": True,
                        "extra_body": {"enable_thinking": thinking, "reasoning_max_tokens": 20},
                    }
                    whole = await on.sdk.chat.completions.create(model="nano", **asked)
                    (reply,) = whole.choices
                    ((name, arguments),) = made(reply.message)
                    assert reply.finish_reason == "tool_calls" and reply.message.content is None
                    if choice == "required":
                        assert name in (zoom.NAME, "wait")
                    else:
                        assert (name, arguments) == ("wait", {})
                        assert reply.message.model_dump().get("reasoning")
                    if name == zoom.NAME:
                        jsonschema.validate(arguments, BOX)
                    assert whole.usage is not None and reply.logprobs is not None
                    assert len(reply.logprobs.content or ()) == whole.usage.completion_tokens
                    asked.pop("logprobs")
                    async with on.sdk.chat.completions.stream(model="nano", **asked) as stream:
                        streamed = await stream.get_final_completion()
                    assert made(streamed.choices[0].message) == [(name, arguments)]


async def test_a_call_that_is_required_is_the_one_the_model_makes_of_itself() -> None:
    """Token for token: the markers are its own, the spacing is that of its training."""
    async with faces(EngineRole.COLOCATED) as on:
        for sample in samples("zoom", SEED, 4):
            asked: dict[str, Any] = {"messages": question(sample), "tools": [zoom.TOOL], "temperature": 0}
            asked |= {"max_tokens": 96, "parallel_tool_calls": False, "extra_body": {"return_token_ids": True}}
            free = await on.sdk.chat.completions.create(model="nano", **asked)
            forced = await on.sdk.chat.completions.create(model="nano", **asked, tool_choice="required")
            assert made(free.choices[0].message) == made(forced.choices[0].message)
            ids = free.choices[0].model_dump()["token_ids"]
            assert ids and forced.choices[0].model_dump()["token_ids"] == ids


@pytest.mark.parametrize("thinking", [False, True])
async def test_a_free_reply_is_calls_or_the_structured_answer(thinking: bool) -> None:
    """Never both, never neither: the model chooses."""
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    kinds = set()
    async with faces(EngineRole.COLOCATED) as on:
        (sample,) = samples("zoom", SEED, 1)
        for seed in range(4):
            asked: dict[str, Any] = {
                "messages": question(sample) if seed % 2 else [{"role": "user", "content": "What colour is the star?"}],
                "tools": [STRICT],
                "parallel_tool_calls": False,
                "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
                "temperature": 1,
                "seed": seed,
                "max_tokens": 200,
                "extra_body": {"enable_thinking": thinking, "reasoning_max_tokens": 20},
            }
            whole = await on.sdk.chat.completions.create(model="nano", **asked)
            (reply,) = whole.choices
            calls = made(reply.message)
            kinds.add(reply.finish_reason)
            if calls:
                assert reply.message.content is None
                assert reply.finish_reason in ("tool_calls", "length")
                for name, arguments in calls:
                    assert name == zoom.NAME
                    jsonschema.validate(arguments, BOX)
            else:
                assert reply.finish_reason == "stop"
                jsonschema.validate(json.loads(reply.message.content or ""), schema)
            async with on.sdk.chat.completions.stream(model="nano", **asked) as stream:
                streamed = await stream.get_final_completion()
            assert made(streamed.choices[0].message) == calls
            assert (streamed.choices[0].message.content or None) == reply.message.content
    assert kinds <= {"stop", "tool_calls", "length"}


async def test_several_choices_and_calls_have_ids_of_their_own() -> None:
    (sample,) = samples("zoom", SEED, 1)
    async with faces(EngineRole.COLOCATED) as on:
        reply = await on.sdk.chat.completions.create(
            model="nano",
            messages=question(sample),
            tools=[WAIT, STRICT],
            tool_choice="required",
            n=3,
            temperature=1,
            seed=1,
            max_tokens=160,
        )
    calls = [call for choice in reply.choices for call in choice.message.tool_calls or ()]
    assert len({call.id for call in calls}) == len(calls) >= 3


async def test_a_tool_that_cannot_be_enforced_is_the_callers_error() -> None:
    bad = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"uniqueItems": True}}}}}
    async with faces(EngineRole.COLOCATED) as on:
        async with httpx.AsyncClient(base_url=on.url, trust_env=False) as http:
            body = {"messages": [{"role": "user", "content": "hi"}], "tools": [bad], "tool_choice": "required"}
            for stream in (False, True):
                reply = await http.post("/v1/chat/completions", json={**body, "stream": stream}, timeout=60)
                error = reply.json()["error"]
                assert (reply.status_code, error["param"]) == (400, "tools")
                assert "tools" in error["message"] and "uniqueItems" in error["message"]
            # Nobody enforces it where the model is free.
            reply = await http.post(
                "/v1/chat/completions", json={**body, "tool_choice": "auto", "max_tokens": 4}, timeout=60
            )
            assert reply.status_code == 200
        with pytest.raises(ClientError, match="uniqueItems") as caught:
            await on.client.generate(generate_request("hi", tools=[bad], tool_choice="required"))
        assert caught.value.field == "tools"
