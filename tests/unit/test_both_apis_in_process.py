"""One corpus of requests, both protocols, streamed and whole: the same tokens, texts, endings, usage and errors."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import torch
from google.protobuf import json_format

from actors.errors import Status
from actors.types import EngineRole
from cluster.client import AsyncClient, ClientError
from cluster.openai_response import HTTP_STATUS
from ernie_serving.v1 import inference_pb2 as pb
from tests.doubles import grpc_serving
from tests.in_process import in_process_cluster
from tests.nano_model import nano_checkpoint
from tests.unit.cluster.test_http_api import serving
from tests.unit.request_corpus import ANSWERED, REFUSED, Request, star

ROLES = {"colocated": (EngineRole.COLOCATED,), "split": (EngineRole.PREFILL, EngineRole.DECODE)}
_FINISH = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_TOOL_CALLS: "tool_calls",
}
ONLY_SPLIT = ("greedy", "sampled", "thinking", "tools", "schema", "picture", "clip", "a look at a tool's picture")
"""Where prompts and replies have engines of their own the facades are the same: some of the corpus will do."""


@dataclass
class Reply:
    """What either protocol says of one choice."""

    text: str = ""
    reasoning: str = ""
    calls: list[list[str]] = field(default_factory=list)
    """Name and arguments."""
    token_ids: list[int] = field(default_factory=list)
    scores: list[Any] = field(default_factory=list)
    ended: Any = None


@dataclass
class Answer:
    prompt_ids: list[int]
    prompt_scores: list[Any]
    replies: list[Reply]
    usage: dict[str, int]


class Faces:
    def __init__(self, http: httpx.AsyncClient, client: AsyncClient) -> None:
        self.http = http
        self.client = client

    async def over_http(self, body: Request) -> Answer:
        response = await self.http.post("/v1/chat/completions", json=body | {"return_token_ids": True}, timeout=120)
        assert response.status_code == 200, response.text
        whole = response.json()
        replies = []
        for choice in whole["choices"]:
            message = choice["message"]
            assert message.get("reasoning") == message.get("reasoning_content")
            replies.append(
                Reply(
                    text=message["content"] or "",
                    reasoning=message.get("reasoning") or "",
                    calls=[[c["function"]["name"], c["function"]["arguments"]] for c in message.get("tool_calls", ())],
                    token_ids=choice["token_ids"],
                    scores=_http_scores(choice["logprobs"]),
                    ended=(choice["finish_reason"], choice["stop_reason"]),
                )
            )
        return Answer(
            whole["prompt_token_ids"],
            _http_prompt_scores(whole.get("prompt_logprobs")),
            replies,
            _usage(whole["usage"]),
        )

    async def streamed_over_http(self, body: Request) -> Answer:
        body = body | {"return_token_ids": True, "stream": True, "stream_options": {"include_usage": True}}
        replies = [Reply() for _ in range(body.get("n", 1))]
        async with self.http.stream("POST", "/v1/chat/completions", json=body, timeout=120) as response:
            assert response.status_code == 200
            lines = [line[6:] async for line in response.aiter_lines() if line.startswith("data: ")]
        assert lines.pop() == "[DONE]"
        chunks = [json.loads(line) for line in lines]
        last = chunks.pop()
        assert last["choices"] == [] and all(chunk["usage"] is None for chunk in chunks)
        for chunk in chunks:
            (choice,) = chunk["choices"]
            delta, reply = choice["delta"], replies[choice["index"]]
            assert reply.ended is None and delta.get("reasoning") == delta.get("reasoning_content")
            reply.text += delta.get("content") or ""
            reply.reasoning += delta.get("reasoning") or ""
            for call in delta.get("tool_calls", ()):
                if call.get("id"):
                    assert call["index"] == len(reply.calls)
                    reply.calls.append([call["function"]["name"], ""])
                reply.calls[call["index"]][1] += call["function"]["arguments"]
            reply.token_ids += choice["token_ids"]
            reply.scores += _http_scores(choice.get("logprobs"))
            if choice["finish_reason"] is not None:
                reply.ended = (choice["finish_reason"], choice["stop_reason"])
        return Answer(
            chunks[0]["prompt_token_ids"],
            _http_prompt_scores(chunks[0].get("prompt_logprobs")),
            replies,
            _usage(last["usage"]),
        )

    async def over_grpc(self, fields: Request) -> Answer:
        whole = await self.client.generate(_request(fields))
        return Answer(
            list(whole.prompt_token_ids),
            _grpc_prompt_scores(whole.prompt_logprobs),
            [
                Reply(
                    text=choice.text,
                    reasoning=choice.reasoning_text,
                    calls=[[call.name, call.arguments_json] for call in choice.tool_calls],
                    token_ids=list(choice.token_ids),
                    scores=_grpc_scores(choice.logprobs),
                    ended=_ended(choice),
                )
                for choice in whole.choices
            ],
            _grpc_usage(whole.usage),
        )

    async def streamed_over_grpc(self, fields: Request) -> Answer:
        replies = [Reply() for _ in range(fields.get("choice_count", 1))]
        answer = Answer([], [], replies, {})
        async for event in self.client.stream_generate(_request(fields)):
            match event.WhichOneof("event"):
                case "started":
                    answer.prompt_ids = list(event.started.prompt_token_ids)
                case "prompt_scored":
                    answer.prompt_scores = _grpc_prompt_scores(event.prompt_scored.logprobs)
                case "delta":
                    delta, reply = event.delta, replies[event.delta.choice_index]
                    assert reply.ended is None
                    reply.text += delta.text
                    reply.reasoning += delta.reasoning_text
                    for call in delta.tool_calls:
                        if call.id:
                            assert call.index == len(reply.calls)
                            reply.calls.append([call.name, ""])
                        reply.calls[call.index][1] += call.arguments_json
                    reply.token_ids += delta.token_ids
                    reply.scores += _grpc_scores(delta.logprobs)
                case "choice_finished":
                    replies[event.choice_finished.choice_index].ended = _ended(event.choice_finished)
                case "finished":
                    answer.usage = _grpc_usage(event.finished.usage)
        return answer


@asynccontextmanager
async def faces(*roles: EngineRole) -> AsyncIterator[Faces]:
    torch.set_num_threads(1)
    async with (
        in_process_cluster(nano_checkpoint(), *roles, dtype="float64") as cluster,
        serving(cluster.parts.router) as url,  # type: ignore[arg-type]
        grpc_serving(cluster.parts.router) as address,  # type: ignore[arg-type]
        AsyncClient(address, retries=0) as client,
        httpx.AsyncClient(base_url=url, trust_env=False) as http,
    ):
        yield Faces(http, client)
        await cluster.wait_clean()


def _request(fields: Request) -> pb.GenerateRequest:
    return json_format.ParseDict(fields | {"return_token_ids": True}, pb.GenerateRequest())


def _http_scores(logprobs: Any) -> list[Any]:
    return [
        (
            bytes(entry["bytes"]),
            entry["logprob"],
            [(bytes(top["bytes"]), top["logprob"]) for top in entry["top_logprobs"]],
        )
        for entry in (logprobs or {}).get("content") or ()
    ]


def _grpc_scores(entries: Any) -> list[Any]:
    return [
        (entry.chosen.token, entry.chosen.logprob, [(top.token, top.logprob) for top in entry.top]) for entry in entries
    ]


def _http_prompt_scores(entries: Any) -> list[Any]:
    """By token id: vLLM's form is a map."""
    return [
        None if entry is None else sorted((int(token), score["logprob"]) for token, score in entry.items())
        for entry in entries or ()
    ]


def _grpc_prompt_scores(entries: Any) -> list[Any]:
    return [
        sorted({(score.token_id, score.logprob) for score in (entry.chosen, *entry.top)})
        if entry.HasField("chosen")
        else None
        for entry in entries
    ]


def _ended(choice: Any) -> tuple[str, str | int | None]:
    cause = choice.stop_cause
    which = cause.WhichOneof("cause")
    return _FINISH[choice.finish_reason], None if which is None else getattr(cause, which)


def _usage(usage: Any) -> dict[str, int]:
    prompt, output = usage["prompt_tokens_details"], usage["completion_tokens_details"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert prompt["media_tokens"] == prompt["image_tokens"] + prompt["video_tokens"]
    return {
        "prompt": usage["prompt_tokens"],
        "output": usage["completion_tokens"],
        "cached": prompt["cached_tokens"],
        "media": prompt["media_tokens"],
        "video": prompt["video_tokens"],
        "reasoning": output["reasoning_tokens"],
    }


def _grpc_usage(usage: pb.Usage) -> dict[str, int]:
    return {
        "prompt": usage.prompt_token_count,
        "output": usage.output_token_count,
        "cached": usage.cached_token_count,
        "media": usage.media_token_count,
        "video": usage.video_token_count,
        "reasoning": usage.reasoning_token_count,
    }


@pytest.mark.parametrize("roles", ROLES)
async def test_answers(roles: str) -> None:
    async with faces(*ROLES[roles]) as on:
        for name, (http, grpc) in ANSWERED.items():
            if roles == "split" and name not in ONLY_SPLIT:
                continue
            # The first finds nothing in the prefix cache, the others all it left there.
            await on.over_http(http)
            told = await on.over_http(http)
            others = [await on.streamed_over_http(http), await on.over_grpc(grpc), await on.streamed_over_grpc(grpc)]
            assert others[0] == told, name
            assert others[1] == others[2], name
            assert others[1] == told, name
            assert told.usage["output"] == sum(len(reply.token_ids) for reply in told.replies)
            assert told.usage["prompt"] == len(told.prompt_ids)
            _check(name, told)


def _check(name: str, told: Answer) -> None:
    """That the corpus shows what it is there to show."""
    reply = told.replies[0]
    if "thinking" in name:
        assert bool(reply.reasoning) is bool(told.usage["reasoning"]) is ("not" not in name)
    if name in ("a call required", "one call"):
        assert reply.calls and reply.ended[0] == "tool_calls" and not reply.text
    if "picture" in name or "pixels" in name:
        assert told.usage["media"] > told.usage["video"] == 0
    if "clip" in name:
        assert told.usage["media"] == told.usage["video"] > 0
    if name == "sampled":
        assert len(told.replies) == 3


async def test_errors() -> None:
    async with faces(EngineRole.COLOCATED) as on:
        for name, ((http, grpc), reason, http_field, grpc_field) in REFUSED.items():
            reason = reason or "INVALID_FIELD"
            for stream in (False, True):
                response = await on.http.post("/v1/chat/completions", json=http | {"stream": stream}, timeout=120)
                error = response.json()["error"]
                told = "context_length_exceeded" if reason == "CONTEXT_EXCEEDED" else reason.lower()
                assert (error["code"], error["param"]) == (told, http_field), (name, error)
                assert http_field in error["message"]
            with pytest.raises(ClientError) as whole:
                await on.client.generate(_request(grpc))
            with pytest.raises(ClientError) as streamed:
                async for _ in on.client.stream_generate(_request(grpc)):
                    pass
            for refused in (whole.value, streamed.value):
                assert (refused.reason, refused.field) == (reason, grpc_field), (name, refused)
                assert grpc_field in refused.message
                assert HTTP_STATUS[Status[refused.code.name]] == response.status_code


async def test_a_name_is_one_name_over_both() -> None:
    """What goes on under an alias over one protocol is active for the other, which may also end it."""
    http, grpc = star(
        {"request_id": "mine", "max_tokens": 3000, "ignore_eos": True}, {"request_id": "mine"}, ignore_eos=True
    )
    async with faces(EngineRole.COLOCATED) as on:

        async def refused_twice() -> None:
            response = await on.http.post("/v1/chat/completions", json=http, timeout=60)
            error = response.json()["error"]
            assert (response.status_code, error["code"], error["param"]) == (409, "request_id_in_use", "request_id")
            with pytest.raises(ClientError) as caught:
                await on.client.generate(_request(grpc))
            assert (caught.value.code.name, caught.value.reason) == ("ALREADY_EXISTS", "REQUEST_ID_IN_USE")
            assert caught.value.field == "request_id"

        async with on.http.stream("POST", "/v1/chat/completions", json=http | {"stream": True}, timeout=60) as response:
            lines = response.aiter_lines()
            await anext(lines)
            await refused_twice()
            await on.client.cancel("mine")
            chunks = [json.loads(line[6:]) async for line in lines if line.startswith("data: {")]
        assert chunks[-1]["choices"][0]["finish_reason"] == "abort"
        events = on.client.stream_generate(_request(grpc))
        await anext(events)
        await refused_twice()
        await on.client.cancel("mine")
        (ended,) = [event.choice_finished async for event in events if event.HasField("choice_finished")]
        assert ended.finish_reason == pb.FINISH_REASON_CANCELLED
