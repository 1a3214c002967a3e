"""The published OpenAPI document: whole, true to what is answered, and held by whatever schemathesis makes of it."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import Any

import httpx
import hypothesis
import jsonschema
import pytest
import schemathesis
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from actors.errors import Unavailable
from actors.types import EngineRole
from cluster.http_api import build_api
from tests.doubles import SCORED, SCRIPT, ScriptedService
from tests.in_process import in_process_cluster
from tests.tiny_model import tiny_checkpoint
from tests.unit.cluster.test_completions import SCORED as COMPLETIONS_SCORED
from tests.unit.cluster.test_http_api import plain, serving
from tests.unit.cluster.test_responses import CALLS

CONTEXT = 64
"""Short, as what schemathesis asks for mostly has no bound of its own."""
EXAMPLES = 15
"""Per operation, valid and invalid ones each."""
RETRIES = 8
"""How often a refused request is asked again without the field it was refused for."""
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


async def test_every_route_is_described_and_nothing_is_fetched_from_elsewhere() -> None:
    app = build_api(ScriptedService)
    async with plain(ScriptedService()) as client:
        response = await client.get("/openapi.json")
        assert (await client.get("/docs")).status_code == 404
    document = response.json()
    described = {(path, method.upper()) for path, methods in document["paths"].items() for method in methods}
    routes = {
        (route.path.replace(":path}", "}"), method)  # type: ignore[attr-defined]
        for route in app.routes
        if route.include_in_schema  # type: ignore[attr-defined]
        for method in route.methods - {"HEAD"}  # type: ignore[attr-defined]
    }
    assert described == routes
    assert document["openapi"] == "3.1.0" and "http" not in response.text


ASK = [{"role": "user", "content": "hi"}]
REPLIES: list[tuple[ScriptedService, str, dict[str, Any] | None, int]] = [
    (ScriptedService(), "/v1/chat/completions", {"messages": ASK, "return_timings": True, "metadata": {"a": "b"}}, 200),
    (
        ScriptedService(script=SCORED),
        "/v1/chat/completions",
        {"messages": ASK, "n": 2, "logprobs": True, "prompt_logprobs": 1, "return_token_ids": True},
        200,
    ),
    (ScriptedService(script=CALLS), "/v1/chat/completions", {"messages": ASK}, 200),
    (ScriptedService(), "/v1/chat/completions", {"messages": []}, 400),
    (ScriptedService(), "/v1/completions", {"prompt": "hi", "return_timings": True}, 200),
    (
        ScriptedService(script=COMPLETIONS_SCORED),
        "/v1/completions",
        {"prompt": "hi", "n": 2, "logprobs": 1, "prompt_logprobs": 1, "return_token_ids": True},
        200,
    ),
    (
        ScriptedService(script=CALLS),
        "/v1/responses",
        {
            "input": "hi",
            "tools": [{"type": "function", "name": "look", "parameters": {}}],
            "tool_choice": {"type": "function", "name": "look"},
            "reasoning": {"effort": "low"},
            "text": {"format": {"type": "text"}},
            "metadata": {"a": "b"},
        },
        200,
    ),
    (ScriptedService(), "/tokenize", {"prompt": "hi", "return_token_strs": True}, 200),
    (ScriptedService(), "/tokenize", {"messages": ASK}, 200),
    (ScriptedService(), "/detokenize", {"tokens": [104, 105]}, 200),
    (ScriptedService(), "/detokenize", {"tokens": [999]}, 400),
    (ScriptedService(), "/v1/models", None, 200),
    (ScriptedService(), "/v1/models/{model_id}", None, 200),
    (ScriptedService(), "/ready", None, 200),
    (ScriptedService(missing="an engine"), "/ready", None, 503),
    (ScriptedService(), "/health", None, 200),
    (ScriptedService(), "/version", None, 200),
    (ScriptedService(), "/openapi.json", None, 200),
]


@pytest.mark.parametrize(("service", "path", "body", "status"), REPLIES, ids=lambda value: str(value)[:40])
async def test_replies_are_as_described(
    service: ScriptedService, path: str, body: dict[str, Any] | None, status: int
) -> None:
    async with plain(service) as client:
        document = (await client.get("/openapi.json")).json()
        method = "GET" if body is None else "POST"
        response = await client.request(method, path.replace("{model_id}", "ernie"), json=body)
    assert response.status_code == status, response.text
    operation = document["paths"][path][method.lower()]
    schema = operation["responses"][str(status)]["content"]["application/json"]["schema"]
    jsonschema.Draft202012Validator(schema | {"components": document["components"]}).validate(response.json())
    if body is not None and status == 200:
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        jsonschema.Draft202012Validator(schema | {"components": document["components"]}).validate(body)


STREAMS: list[tuple[tuple[Any, ...], str, dict[str, Any]]] = [
    (SCORED, "/v1/chat/completions", {"n": 2, "logprobs": True, "prompt_logprobs": 1, "return_token_ids": True}),
    (CALLS, "/v1/chat/completions", {"stream_options": {"include_usage": True}, "return_timings": True}),
    ((*CALLS[:3], Unavailable("lost")), "/v1/chat/completions", {}),
    (COMPLETIONS_SCORED, "/v1/completions", {"n": 2, "logprobs": 1, "echo": True, "return_token_ids": True}),
    (SCRIPT, "/v1/completions", {"stream_options": {"include_usage": True}, "return_timings": True}),
    ((*SCRIPT[:3], Unavailable("lost")), "/v1/completions", {}),
    (CALLS, "/v1/responses", {}),
    ((*CALLS[:3], Unavailable("lost")), "/v1/responses", {}),
]
"""Scripts of the service, and what is asked for."""
PROMPTS = {
    "/v1/chat/completions": {"messages": ASK},
    "/v1/completions": {"prompt": "hi"},
    "/v1/responses": {"input": "hi"},
}


@pytest.mark.parametrize(("script", "path", "fields"), STREAMS, ids=lambda value: str(value)[:40])
async def test_stream_events_are_as_described(script: tuple[Any, ...], path: str, fields: dict[str, Any]) -> None:
    async with plain(ScriptedService(script=script)) as client:
        document = (await client.get("/openapi.json")).json()
        text = (await client.post(path, json=PROMPTS[path] | fields | {"stream": True})).text
    content = document["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]
    data = content["itemSchema"]["properties"]["data"]["anyOf"][1]["contentSchema"]
    schema = jsonschema.Draft202012Validator(data | {"components": document["components"]})
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert len(events) > 2
    for event in events:
        if event != "[DONE]":
            schema.validate(json.loads(event))


@contextmanager
def served() -> Iterator[str]:
    """The address of the API over a real router and engine, which live on a loop of a thread of their own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    stack = AsyncExitStack()

    async def start() -> str:
        cluster = await stack.enter_async_context(
            in_process_cluster(tiny_checkpoint(), EngineRole.COLOCATED, max_model_len=CONTEXT)
        )
        stack.push_async_callback(cluster.wait_clean)
        return await stack.enter_async_context(serving(cluster.parts.router))  # type: ignore[arg-type]

    try:
        yield asyncio.run_coroutine_threadsafe(start(), loop).result(60)
    finally:
        asyncio.run_coroutine_threadsafe(stack.aclose(), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


Answered = dict[tuple[str, int], int]
"""How often each path answered with each status."""


GOOD: dict[str, Any] = {"messages": ASK, "prompt": "hi", "input": "hi", "tokens": [5]}
"""What bodies cannot do without."""


def without_blamed(body: Any, reply: Any) -> bool:
    """Takes the field out that a request was refused for, or makes it good, so that the next one gets further. False:
    there is none.
    """
    if reply.status_code not in (400, 404) or not isinstance(body, dict):
        return False
    field = re.split(r"[.\[]", reply.json()["error"]["param"] or "")[0]
    if body.get(field, GOOD.get(field)) == GOOD.get(field):
        return False
    if field in GOOD:
        body[field] = GOOD[field]
    else:
        del body[field]
    return True


@pytest.mark.timeout(900)
def test_schemathesis_finds_nothing() -> None:
    answered: Answered = {}
    with served() as url:
        api = schemathesis.openapi.from_dict(httpx.get(f"{url}/openapi.json", trust_env=False).json())
        api.config.update(base_url=url)
        for found in api.get_all_operations():
            operation = found.ok()
            fuzz(operation, GenerationMode.POSITIVE, CHECKS, answered)
            if operation.method == "post":
                fuzz(operation, GenerationMode.NEGATIVE, [*CHECKS, negative_data_rejection], answered)
    # Not only refusals: something of every kind was answered.
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/detokenize"):
        assert answered.get((path, 200)) and answered.get((path, 400)), answered


def fuzz(operation: Any, mode: GenerationMode, checks: list[Any], answered: Answered) -> None:
    @hypothesis.settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("timeout"), int | float):
            case.body["timeout"] = 600  # a shorter one may well pass, which is no defect
        for _ in range(RETRIES):
            response = case.call_and_validate(checks=checks, timeout=600)
            told = operation.path, response.status_code
            answered[told] = answered.get(told, 0) + 1
            if mode is GenerationMode.NEGATIVE or not without_blamed(case.body, response):
                return

    ask()
