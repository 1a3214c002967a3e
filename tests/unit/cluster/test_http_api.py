"""The HTTP facade over real sockets, mostly through OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import openai
import pydantic
import pytest
import uvicorn

from actors.errors import (
    POISON,
    AlreadyExists,
    ContextExceeded,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    MediaChanged,
    MediaUnreadable,
    NotFound,
    Overloaded,
    RequestCancelled,
    ServingError,
    Unavailable,
)
from actors.types import FinishReason, StructureKind, ThinkingMode
from cluster import http_api, http_exchange
from cluster.generation import ChoiceFinished, Delta, Finished, Started
from tests.doubles import FINISHED, SCORED, SCRIPT, STARTED, USAGE, Pause, ScriptedService
from tests.waiting import LIMIT_S

ASK: list[Any] = [{"role": "user", "content": "What is this?"}]
CHAT = "/v1/chat/completions"


@asynccontextmanager
async def serving(service: ScriptedService) -> AsyncIterator[str]:
    config = uvicorn.Config(http_api.build_api(lambda: service), port=0, log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    sock = config.bind_socket()
    task = asyncio.ensure_future(server._serve([sock]))
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task
        sock.close()


@asynccontextmanager
async def sdk(service: ScriptedService) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        serving(service) as address,
        openai.AsyncOpenAI(base_url=address + "/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


@asynccontextmanager
async def plain(service: ScriptedService) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(service) as address, httpx.AsyncClient(base_url=address, trust_env=False) as client:
        yield client


async def test_whole_reply() -> None:
    service = ScriptedService()
    async with sdk(service) as client:
        reply = await client.chat.completions.create(
            model="ernie",
            messages=ASK,
            temperature=0,
            max_tokens=9,
            extra_body={"enable_thinking": True, "return_token_ids": True, "return_timings": True},
        )
    choice = reply.choices[0]
    assert (reply.id, reply.model, reply.object) == ("chatcmpl-r-1", "ernie", "chat.completion")
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "A cät", "stop")
    body = reply.model_dump()
    assert body["choices"][0]["message"]["reasoning"] == "hmm."
    assert body["choices"][0]["message"]["reasoning_content"] == "hmm."
    assert body["choices"][0]["stop_reason"] == "END"
    assert body["choices"][0]["token_ids"] == [10, 11, 12, 13, 14]
    assert body["prompt_token_ids"] == [1, 2, 3]
    assert body["timings"] == {
        "exposed": {"queued": 0.001, "prefill": 0.2, "decode": 1.5},
        "busy": {"encode": 0.125, "prefill": 0.19},
        "time_to_first_token": 0.25,
    }
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (12, 5, 17)
    assert body["usage"]["prompt_tokens_details"]["media_tokens"] == 6
    assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] == 2
    (call,) = service.calls
    assert (call.model, call.temperature, call.max_tokens, call.thinking) == ("ernie", 0, 9, ThinkingMode.ON)
    assert await service.ended.get() == "finished"


async def test_extras_are_absent_unless_asked_for() -> None:
    service = ScriptedService(
        script=(
            Started(request_id="r", model="m", prompt_tokens=1),
            Delta(text="x"),
            ChoiceFinished(reason=FinishReason.LENGTH),
            Finished(usage=USAGE),
        )
    )
    async with plain(service) as client:
        body = (await client.post(CHAT, json={"messages": ASK})).json()
        stream = (await client.post(CHAT, json={"messages": ASK, "stream": True})).text
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "x"}
    for extra in ("token_ids", "timings", "reasoning"):
        assert extra not in json.dumps(body["choices"]) and f'"{extra}"' not in stream
    assert "prompt_token_ids" not in body and "prompt_token_ids" not in stream


async def test_stream() -> None:
    service = ScriptedService()
    async with sdk(service) as client:
        stream = await client.chat.completions.create(
            model="ernie",
            messages=ASK,
            stream=True,
            extra_body={"return_token_ids": True, "return_timings": True},
        )
        chunks = [chunk.model_dump() async for chunk in stream]
    first, *_, last = chunks
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert first["prompt_token_ids"] == [1, 2, 3]
    assert {chunk["id"] for chunk in chunks} == {"chatcmpl-r-1"}
    deltas = [chunk["choices"][0] for chunk in chunks[:-1]]
    assert "".join(choice["delta"].get("content") or "" for choice in deltas) == "A cät"
    assert "".join(choice["delta"].get("reasoning") or "" for choice in deltas) == "hmm."
    assert "".join(choice["delta"].get("reasoning_content") or "" for choice in deltas) == "hmm."
    assert [token for choice in deltas for token in choice["token_ids"]] == [10, 11, 12, 13, 14]
    assert [choice["finish_reason"] for choice in deltas] == [None] * 5 + ["stop"]
    assert last["choices"] == [] and last["timings"]["exposed"]["decode"] == 1.5
    assert all(chunk.get("usage") is None for chunk in chunks)


@pytest.mark.parametrize("timings", [False, True])
async def test_usage_comes_in_a_last_chunk_on_request(timings: bool) -> None:
    script = SCRIPT if timings else (*SCRIPT[:-1], Finished(usage=USAGE))
    async with sdk(ScriptedService(script=script)) as client:
        stream = await client.chat.completions.create(
            model="ernie", messages=ASK, stream=True, stream_options={"include_usage": True}
        )
        *chunks, last = [chunk async for chunk in stream]
    assert last.choices == [] and last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (12, 5)
    assert last.usage.prompt_tokens_details is not None and last.usage.prompt_tokens_details.cached_tokens == 4
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


async def test_stream_on_the_wire() -> None:
    async with plain(ScriptedService()) as client:
        response = await client.post(CHAT, json={"messages": ASK, "stream": True})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert "content-length" not in response.headers
    frames = response.text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    assert all(frame.startswith("data: ") for frame in frames[:-1])


ERRORS = [
    (InvalidRequest("bad", field="messages[0].parts[1]"), 400, "invalid_request_error", "messages[0].content[1]"),
    (MediaUnreadable("bad bytes", field="timeout_s"), 400, "invalid_request_error", "timeout"),
    (NotFound("no such model", field="model"), 404, "invalid_request_error", "model"),
    (AlreadyExists("in use"), 409, "conflict_error", None),
    (MediaChanged("changed"), 409, "conflict_error", None),
    (Overloaded("full", retry_after_s=1.2), 429, "rate_limit_error", None),
    (RequestCancelled("cancelled"), 499, "cancelled_error", None),
    (InternalError("broken"), 500, "server_error", None),
    (Unavailable("lost", retry_after_s=0.1), 503, "service_unavailable_error", None),
    (DeadlineExceeded("late"), 504, "timeout_error", None),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("error", "status", "kind", "param"), ERRORS, ids=lambda value: type(value).__name__)
async def test_errors_before_the_reply(
    error: ServingError, status: int, kind: str, param: str | None, stream: bool
) -> None:
    async with plain(ScriptedService(script=(error,))) as client:
        response = await client.post(CHAT, json={"messages": ASK, "stream": stream})
    assert response.status_code == status
    assert response.json() == {
        "error": {
            "message": f"{param}: {error.message}" if param and param not in error.message else error.message,
            "type": kind,
            "param": param,
            "code": error.reason.lower(),
        }
    }


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
async def test_bodies_that_cannot_be_read_count_as_refused(route: str) -> None:
    service = ScriptedService()
    async with plain(service) as client:
        replies = [await client.post(route, content=body) for body in ('{"temperature": 9}', "no JSON")]
    assert [reply.status_code for reply in replies] == [400, 400]
    assert len(service.refused) == 2 and not service.calls


async def test_an_engines_refusal_has_its_own_status() -> None:
    script = (STARTED, Overloaded("full", retry_after_s=1.0))
    async with plain(ScriptedService(script=script)) as client:
        response = await client.post(CHAT, json={"messages": ASK, "stream": True})
    assert (response.status_code, response.headers["retry-after"]) == (429, "1")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
async def test_a_bound_that_does_not_fit_is_named_as_it_was_written(name: str, stream: bool) -> None:
    script = (ContextExceeded("9 tokens do not fit", field="max_tokens"),)
    async with plain(ScriptedService(script=script)) as client:
        response = await client.post(CHAT, json={"messages": ASK, "stream": stream, name: 9})
    error = response.json()["error"]
    assert (error["param"], error["message"]) == (name, f"{name}: 9 tokens do not fit")


async def test_codes_and_headers_clients_act_on() -> None:
    async with sdk(ScriptedService(script=(NotFound("no model"),))) as client:
        with pytest.raises(openai.NotFoundError) as missing:
            await client.chat.completions.create(model="x", messages=ASK)
    assert missing.value.code == "model_not_found"
    async with sdk(ScriptedService(script=(ContextExceeded("too long"),))) as client:
        with pytest.raises(openai.BadRequestError) as long:
            await client.chat.completions.create(model="x", messages=ASK)
    assert long.value.code == "context_length_exceeded"
    async with sdk(ScriptedService(script=(Overloaded("full", retry_after_s=1.2),))) as client:
        with pytest.raises(openai.RateLimitError) as full:
            await client.chat.completions.create(model="x", messages=ASK)
    assert full.value.response.headers["retry-after"] == "2"
    assert full.value.response.headers["retry-after-ms"] == "1200"


@pytest.mark.parametrize(
    ("error", "tries"),
    [
        (InternalError("engines died", reason=POISON), 1),
        (DeadlineExceeded("late"), 1),
        (AlreadyExists("in use"), 1),
        (Unavailable("lost", retry_after_s=0.001), 3),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_openais_client_tries_again_only_what_may_succeed(error: ServingError, tries: int) -> None:
    service = ScriptedService(script=(error,))
    async with sdk(service) as client:
        with pytest.raises(openai.APIStatusError):
            await client.with_options(max_retries=2).chat.completions.create(model="m", messages=ASK)
    assert len(service.calls) == tries


async def test_errors_after_the_stream_began_reach_openais_client() -> None:
    service = ScriptedService(script=(*SCRIPT[:2], Unavailable("engine lost", reason="ENGINE_LOST")))
    async with sdk(service) as client:
        stream = await client.chat.completions.create(model="m", messages=ASK, stream=True)
        seen = []
        with pytest.raises(openai.APIError, match="engine lost") as caught:
            async for chunk in stream:
                seen.append(chunk)
    assert len(seen) == 2
    assert caught.value.code == "engine_lost"
    async with plain(service) as client:
        text = (await client.post(CHAT, json={"messages": ASK, "stream": True})).text
    assert "[DONE]" not in text and text.endswith('"code":"engine_lost"}}\n\n')


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("defect", [KeyError, TimeoutError])  # the second is an OSError, as losing a client is
async def test_defects_stay_in_the_log(
    defect: type[Exception], stream: bool, at: int, caplog: pytest.LogCaptureFixture
) -> None:
    service = ScriptedService(script=(*SCRIPT[:at], defect("secret")))
    async with plain(service) as client:
        response = await client.post(
            CHAT, json={"messages": ASK, "stream": stream}, headers={"x-request-id": "trace-7"}
        )
    assert response.status_code == (200 if stream and at else 500)
    assert "internal error" in response.text
    assert "secret" not in response.text and "Traceback" not in response.text
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert "trace-7" in record.getMessage() and record.exc_info is not None


@pytest.mark.parametrize("script", [SCRIPT[:3], SCRIPT[1:]], ids=["no end", "no beginning"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_service_that_breaks_its_contract_is_an_error(script: Any, stream: bool) -> None:
    async with plain(ScriptedService(script=script)) as client:
        response = await client.post(CHAT, json={"messages": ASK, "stream": stream})
    assert '"code":"internal"' in response.text and "[DONE]" not in response.text


SCORING: dict[str, Any] = {
    "n": 2,
    "logprobs": True,
    "top_logprobs": 2,
    "extra_body": {"prompt_logprobs": 2, "return_token_ids": True},
}


def entry(token: str, raw: bytes, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(raw)}


async def test_choices_and_log_probabilities() -> None:
    async with sdk(ScriptedService(script=SCORED)) as client:
        reply = await client.chat.completions.create(model="m", messages=ASK, **SCORING)
    assert [(choice.index, choice.message.content, choice.finish_reason) for choice in reply.choices] == [
        (0, "cät", "stop"),
        (1, "no", "length"),
    ]
    first, second = reply.choices
    assert first.logprobs is not None and first.logprobs.content is not None
    assert b"".join(bytes(item.bytes or ()) for item in first.logprobs.content) == "hcät".encode()
    assert [item.token for item in first.logprobs.content] == ["h", "c\ufffd", "\ufffd", "t"]
    assert first.logprobs.content[-1].logprob == -9999
    assert second.logprobs is not None
    assert second.logprobs.model_dump() == {
        "content": [entry("no", b"no", -0.5) | {"top_logprobs": [entry("no", b"no", -0.5), entry("na", b"na", -1.5)]}],
        "refusal": None,
    }
    body = reply.model_dump()
    assert [choice["token_ids"] for choice in body["choices"]] == [[10, 11, 12, 13], [20]]
    assert body["choices"][0]["stop_reason"] == 7
    assert body["prompt_logprobs"] == [
        None,
        {
            "98": {"logprob": -0.5, "rank": 1, "decoded_token": "b"},
            "99": {"logprob": -1.5, "rank": 2, "decoded_token": "c"},
        },
        None,
    ]


async def test_choices_are_interleaved_in_a_stream() -> None:
    service = ScriptedService(script=SCORED)
    async with sdk(service) as client:
        whole = (await client.chat.completions.create(model="m", messages=ASK, **SCORING)).model_dump()
        stream = await client.chat.completions.create(model="m", messages=ASK, stream=True, **SCORING)
        chunks = [chunk.model_dump() async for chunk in stream]
    assert [choice["index"] for chunk in chunks for choice in chunk["choices"]] == [0, 1, 1, 0, 0, 1, 0, 0]
    assert [chunk.get("prompt_logprobs") for chunk in chunks[:2]] == [whole["prompt_logprobs"], None]
    for expected in whole["choices"]:
        pieces = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == expected["index"]]
        assert pieces[0]["delta"]["role"] == "assistant"
        assert "".join(piece["delta"].get("content") or "" for piece in pieces) == expected["message"]["content"]
        assert [token for piece in pieces for token in piece["token_ids"]] == expected["token_ids"]
        content = [item for piece in pieces if piece["logprobs"] for item in piece["logprobs"]["content"]]
        assert content == expected["logprobs"]["content"]
        assert [piece["finish_reason"] for piece in pieces][-1] == expected["finish_reason"]


class Animal(pydantic.BaseModel):
    name: str
    legs: int


async def test_openais_client_parses_structured_answers() -> None:
    text = Delta(text='{"name": "cat", "legs": 4}')
    service = ScriptedService(script=(STARTED, text, ChoiceFinished(reason=FinishReason.STOP), FINISHED))
    async with sdk(service) as client:
        reply = await client.chat.completions.parse(model="m", messages=ASK, response_format=Animal)
        async with client.chat.completions.stream(model="m", messages=ASK, response_format=Animal) as stream:
            streamed = await stream.get_final_completion()
    assert reply.choices[0].message.parsed == streamed.choices[0].message.parsed == Animal(name="cat", legs=4)
    for call in service.calls:
        assert call.structure is not None and call.structure.kind is StructureKind.JSON_SCHEMA
        assert list(json.loads(call.structure.text)["properties"]) == ["name", "legs"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize(
    ("fields", "ours", "theirs"),
    [
        ({"guided_regex": "["}, "structure", "guided_regex"),
        ({"response_format": {"type": "json_object"}}, "structure", "response_format"),
        ({"logprobs": True, "top_logprobs": 2}, "logprobs", "top_logprobs"),
        ({"bad_words": ["x"]}, "bad_words_ids", "bad_words"),
    ],
)
async def test_engines_fields_are_named_as_the_client_did(
    fields: dict[str, Any], ours: str, theirs: str, stream: bool, at: int
) -> None:
    script = (*SCRIPT[:at], InvalidRequest("no", field=ours))
    async with plain(ScriptedService(script=script)) as client:
        text = (await client.post(CHAT, json={"messages": ASK, "stream": stream, **fields})).text
    assert f'"message":"{theirs}: no"' in text and f'"param":"{theirs}"' in text


async def test_unknown_fields_are_named() -> None:
    service = ScriptedService()
    async with sdk(service) as client:
        for field, extra in (
            (
                "stream_options.continuous_usage_stats",
                {"stream_options": {"continuous_usage_stats": True}, "stream": True},
            ),
            ("functions", {"functions": [{"name": "f", "parameters": {}}]}),
            ("chat_template_kwargs.options", {"extra_body": {"chat_template_kwargs": {"options": {}}}}),
        ):
            with pytest.raises(openai.BadRequestError) as caught:
                await client.chat.completions.create(model="m", messages=ASK, **extra)
            assert caught.value.param == field
    assert service.calls == []


async def test_long_names_are_cut() -> None:
    async with plain(ScriptedService()) as client:
        response = await client.post(CHAT, json={"messages": ASK, "x" * 100_000: 1})
    assert response.status_code == 400 and len(response.content) < 3000


@pytest.mark.parametrize(
    ("bound", "over", "told"),
    [
        ("MAX_BODY_BYTES", b"x" * 101, "100 bytes"),
        ("MAX_BODY_MARKS", b"[" * 101, "100 brackets"),
        ("MAX_BODY_MARKS", b"[" + b"{}," * 50, "100 brackets"),
    ],
)
async def test_oversized_bodies_are_refused(
    bound: str, over: bytes, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_exchange, bound, 100)
    async with plain(ScriptedService()) as client:
        refused = await client.post(CHAT, content=over)
        read = await client.post(CHAT, content=over[:-1])
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "body_too_large") and told in refused.text
    assert "not valid JSON" in read.text


async def test_a_body_that_is_wrong_all_over_is_not_described_place_by_place() -> None:
    async with plain(ScriptedService()) as client:
        response = await client.post(CHAT, json={"messages": [[]] * 10_001})
    assert response.status_code == 400 and "wrong in 10001 places" in response.text


async def test_silence_is_bridged_by_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_exchange, "KEEP_ALIVE_S", 0.01)
    service = ScriptedService(script=(Pause(), *SCRIPT))
    async with plain(service) as client, client.stream("POST", CHAT, json={"messages": ASK, "stream": True}) as reply:
        pieces = reply.aiter_text()
        assert (await anext(pieces)).startswith(": keep-alive\n\n")
        service.resume.set()
        rest = "".join([piece async for piece in pieces])
    assert rest.endswith("data: [DONE]\n\n") and rest.count("keep-alive") < 1000


async def test_openais_client_skips_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_exchange, "KEEP_ALIVE_S", 0.01)
    service = ScriptedService(script=(Pause(), *SCRIPT))
    async with sdk(service) as client:
        stream = await client.chat.completions.create(model="m", messages=ASK, stream=True)
        service.resume.set()
        assert len([chunk async for chunk in stream]) == 7


Leave = Callable[[httpx.AsyncClient, ScriptedService], Awaitable[None]]


async def leave_mid_stream(client: httpx.AsyncClient, service: ScriptedService) -> None:
    async with client.stream("POST", CHAT, json={"messages": ASK, "stream": True}) as response:
        await anext(response.aiter_text())


async def leave_before_the_stream(client: httpx.AsyncClient, service: ScriptedService) -> None:
    request = asyncio.ensure_future(client.post(CHAT, json={"messages": ASK, "stream": True}))
    await service.paused.wait()
    request.cancel()


async def leave_a_whole_reply(client: httpx.AsyncClient, service: ScriptedService) -> None:
    request = asyncio.ensure_future(client.post(CHAT, json={"messages": ASK}))
    await service.paused.wait()
    request.cancel()


@pytest.mark.parametrize(
    ("leave", "script"),
    [
        (leave_mid_stream, (*SCRIPT[:2], Pause())),
        (leave_before_the_stream, (Pause(),)),
        (leave_a_whole_reply, (*SCRIPT[:2], Pause())),
    ],
)
async def test_leaving_cancels_the_request(leave: Leave, script: Any) -> None:
    service = ScriptedService(script=script)
    async with plain(service) as client:
        await asyncio.wait_for(leave(client, service), LIMIT_S)
        assert await asyncio.wait_for(service.ended.get(), LIMIT_S) == "closed"


async def test_cancelled_elsewhere_ends_with_abort() -> None:
    cancelled = ChoiceFinished(reason=FinishReason.CANCELLED)
    async with plain(ScriptedService(script=(STARTED, cancelled, FINISHED))) as client:
        body = (await client.post(CHAT, json={"messages": ASK})).json()
    assert body["choices"][0]["finish_reason"] == "abort"


async def test_a_stream_cancelled_before_its_prompt_was_scored_still_begins_with_roles() -> None:
    cancelled = [ChoiceFinished(choice=choice, reason=FinishReason.CANCELLED) for choice in range(2)]
    async with sdk(ScriptedService(script=(STARTED, *cancelled, FINISHED))) as client:
        stream = await client.chat.completions.create(
            model="m", messages=ASK, n=2, stream=True, extra_body={"prompt_logprobs": 1}
        )
        choices = [choice async for chunk in stream for choice in chunk.choices]
    assert [(choice.index, choice.delta.role, choice.finish_reason) for choice in choices] == [
        (0, "assistant", None),
        (1, "assistant", None),
        (0, None, "abort"),
        (1, None, "abort"),
    ]


async def test_models() -> None:
    async with sdk(ScriptedService()) as client:
        listed = [model async for model in client.models.list()]
        assert [model.id for model in listed] == ["ernie"]
        one = await client.models.retrieve("ernie")
        assert one.model_dump(exclude_unset=True) == {
            "id": "ernie",
            "object": "model",
            "created": 1_700_000_000,
            "owned_by": "ernie-serving",
            "root": "/models/ernie",
            "max_model_len": 4096,
        }
        with pytest.raises(openai.NotFoundError) as caught:
            await client.models.retrieve("org/other")
    assert caught.value.code == "model_not_found" and "org/other" in caught.value.message


async def test_health_and_readiness() -> None:
    service = ScriptedService(missing="no prefill engine")
    async with plain(service) as client:
        assert (await client.get("/health")).status_code == 200
        response = await client.get("/ready")
        assert (response.status_code, response.json()["missing"]) == (503, "no prefill engine")
        service.missing = None
        assert (await client.get("/ready")).status_code == 200


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v2", 404), ("GET", CHAT, 405), ("GET", "/docs", 404)])
async def test_unknown_routes_answer_in_openais_form(method: str, path: str, status: int) -> None:
    async with plain(ScriptedService()) as client:
        response = await client.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]["type"] == "invalid_request_error"
