"""A real cluster answers over both APIs as the same parts do in one process; it survives its clients and its losses."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import httpx
import openai
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from actors.types import EngineRole, ImagePart, Message, MessageRole, TextPart
from cluster.client import AsyncClient, ClientError, user_message
from cluster.generation import Delta, GenerateCall
from cluster.metrics.definitions import METRICS, Source
from ernie_serving.v1 import inference_pb2
from tests.cluster.launcher import LaunchedCluster
from tests.in_process import in_process_cluster
from tests.media import image_part, mp4, png
from tests.tiny_model import tiny_checkpoint

CLUSTER: dict[str, Any] = {
    "router": {"max_active": 12},
    "max_model_len": 4096,
    "slo": {"ttft_s": 60.0, "tpot_s": 10.0},
    "log_level": "INFO",
    "log_format": "json",
}
PICTURE = png(150, 100, 1)
QUESTION = "What is this?"
LONG = 2000


def data_uri(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def chat(*, tokens: int, picture: bool = True, **fields: Any) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "text", "text": QUESTION}]
    if picture:
        parts.insert(0, {"type": "image_url", "image_url": {"url": data_uri(PICTURE)}})
    return {
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        **fields,
    }


def request(*, tokens: int, **sampling: Any) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        messages=[user_message(QUESTION, images=[PICTURE])],
        sampling_params=inference_pb2.SamplingParams(
            **({"temperature": 0.0, "max_output_token_count": tokens, "ignore_eos": True} | sampling)
        ),
        return_token_ids=True,
        return_timings=True,
    )


@pytest.fixture
def http(cluster: LaunchedCluster) -> httpx.Client:
    return httpx.Client(base_url=cluster.http_url, timeout=60)


async def expected_ids(tokens: int, **fields: Any) -> list[int]:
    """The same parts in one process, colocated."""
    picture = image_part(150, 100, 1)
    assert isinstance(picture, ImagePart) and picture.source.content == PICTURE
    call = GenerateCall(
        messages=(Message(role=MessageRole.USER, parts=(picture, TextPart(text=QUESTION))),),
        max_tokens=tokens,
        ignore_eos=True,
        return_token_ids=True,
        **({"temperature": 0.0} | fields),
    )
    async with in_process_cluster(tiny_checkpoint(), EngineRole.COLOCATED) as parts:
        events = [event async for event in parts.parts.router.generate(call)]
    return [token for event in events if isinstance(event, Delta) for token in event.token_ids]


async def test_http_and_grpc_give_the_tokens_of_one_process(cluster: LaunchedCluster, http: httpx.Client) -> None:
    body = chat(tokens=24, return_token_ids=True, return_timings=True)
    reply = await asyncio.to_thread(http.post, "/v1/chat/completions", json=body)
    whole = reply.raise_for_status().json()
    ids = whole["choices"][0]["token_ids"]
    assert ids == await expected_ids(24)
    assert whole["model"] == "tiny" and whole["choices"][0]["finish_reason"] == "length"
    assert whole["usage"]["prompt_tokens"] == len(whole["prompt_token_ids"])
    assert {"preprocess", "encode", "prefill", "transfer", "decode"} <= whole["timings"]["exposed"].keys()
    async with AsyncClient(cluster.grpc_address) as client:
        response = await client.generate(request(tokens=24), timeout_s=60)
        (choice,) = response.choices
        assert list(choice.token_ids) == ids
        assert list(response.prompt_token_ids) == whole["prompt_token_ids"]
        assert choice.text == whole["choices"][0]["message"]["content"]
        streamed = [
            token
            async for event in client.stream_generate(request(tokens=24), timeout_s=60)
            for token in event.delta.token_ids
        ]
        assert streamed == ids
        drawn = {"temperature": 0.8, "seed": 5, "top_p": 0.9}
        sampled = await client.generate(request(tokens=24, **drawn), timeout_s=60)
    assert list(sampled.choices[0].token_ids) == await expected_ids(24, **drawn) != ids


def test_the_other_endpoints_answer_through_the_proxy(cluster: LaunchedCluster, http: httpx.Client) -> None:
    client = openai.OpenAI(base_url=f"{cluster.http_url}/v1", api_key="none", max_retries=0)
    asked: dict[str, Any] = {"temperature": 0, "extra_body": {"ignore_eos": True}}
    response = client.responses.create(model="tiny", input=QUESTION, max_output_tokens=8, **asked)
    reply = http.post("/tokenize", json={"messages": [{"role": "user", "content": QUESTION}]})
    ids = reply.raise_for_status().json()["tokens"]
    stream = client.completions.create(model="tiny", prompt=ids, max_tokens=8, stream=True, **asked)
    text = "".join(choice.text for chunk in stream for choice in chunk.choices)
    assert text == response.output_text != "" and response.usage is not None
    assert response.usage.input_tokens == len(ids) and response.usage.output_tokens == 8
    document = http.get("/openapi.json").raise_for_status().json()
    assert {"/status", "/v1/responses", "/detokenize"} <= document["paths"].keys()
    assert http.get("/version").raise_for_status().json()["version"] == document["info"]["version"]
    assert http.get("/status", params={"audit": "false"}).raise_for_status().json()["model"] == "tiny"
    for given in ("mine-7", None):
        named = http.get("/health", headers={} if given is None else {"x-request-id": given})
        (told,) = named.headers.get_list("x-request-id")
        assert told and given in (None, told)


def test_prometheus_reads_every_metric_on_both_ports(cluster: LaunchedCluster, http: httpx.Client) -> None:
    http.post("/v1/chat/completions", json=chat(tokens=4)).raise_for_status()
    began = time.monotonic()
    page = http.get("/metrics").raise_for_status()
    print(f"{len(page.content)} bytes after {1000 * (time.monotonic() - began):.0f} ms")
    assert page.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    alone = httpx.get(cluster.metrics_url, timeout=10).raise_for_status()
    assert alone.headers["content-type"] == page.headers["content-type"]
    read, read_alone = (
        {family.name: family.samples for family in text_string_to_metric_families(text)}
        for text in (page.text, alone.text)
    )
    assert read.keys() == read_alone.keys()
    # All but those of engines of several ranks, see test_groups.
    wanted = [name for name, metric in METRICS.items() if metric.source is not Source.GROUP]
    assert not {name for name in wanted if not read.get(name.removesuffix("_total"))}
    up = {sample.labels["pool"]: sample.value for sample in read["ernie_part_up"]}
    assert up == dict.fromkeys(("preprocessor", "vision_encoder", "engine", "planner"), 1.0)
    engines = {engine["id"]: engine["role"] for engine in http.get("/status").json()["engines"]}
    assert {sample.labels["worker"]: sample.labels["role"] for sample in read["ernie_engine_role"]} == engines


def test_a_line_of_logs_names_its_request(cluster: LaunchedCluster, http: httpx.Client) -> None:
    reply = http.post("/v1/chat/completions", json=chat(tokens=4)).raise_for_status().json()
    folder = cluster.session / "session_latest" / "logs" / "serve"
    deadline = time.monotonic() + 10
    while True:
        text = "".join(file.read_text() for file in folder.glob("replica_ernie_router_*"))
        ended = [line for line in map(json.loads, text.splitlines()) if "finished after" in line["message"]]
        if any(reply["id"].endswith(f"-{line['ernie_request']}") for line in ended):
            break
        assert time.monotonic() < deadline, f"no line about {reply['id']} in\n{text}"
        time.sleep(0.1)
    assert all(line["ernie_request"] in line["message"] and line["levelname"] == "INFO" for line in ended)


async def test_the_openai_sdk_streams_and_raises(cluster: LaunchedCluster) -> None:
    client = openai.AsyncOpenAI(base_url=f"{cluster.http_url}/v1", api_key="none", max_retries=0)
    body = chat(tokens=16)
    extra = {"ignore_eos": body.pop("ignore_eos")}
    whole = await client.chat.completions.create(model="tiny", extra_body=extra, **body)
    stream = await client.chat.completions.create(model="tiny", extra_body=extra, stream=True, **body)
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])
    assert text == whole.choices[0].message.content
    assert [model.id for model in (await client.models.list()).data] == ["tiny"]
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(model="other", **body)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="logit_bias"):
        await client.chat.completions.create(model="tiny", logit_bias={"5": 101}, **body)


def test_a_video_is_answered(http: httpx.Client) -> None:
    video = {"type": "video_url", "video_url": {"url": data_uri(mp4(96, 64, 48, 12), "video/mp4")}}
    body = chat(tokens=4, picture=False, return_token_ids=True)
    body["messages"][0]["content"].insert(0, video)
    reply = http.post("/v1/chat/completions", json=body).raise_for_status().json()
    assert len(reply["choices"][0]["token_ids"]) == 4
    assert reply["usage"]["prompt_tokens"] > 50


BAD = {
    "messages": ({"messages": []}, "messages"),
    "role": ({"messages": [{"role": "robot", "content": "hi"}]}, "messages[0].role"),
    "image bytes": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_uri(b"no")}}]}]},
        "messages[0].content[0].image_url",
    ),
    "file": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}
            ]
        },
        "messages[0].content[0].image_url",
    ),
    "host": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://example.com/a.png"}}]}
            ]
        },
        "messages[0].content[0].image_url",
    ),
    "placeholder": ({"messages": [{"role": "user", "content": "a <|IMAGE_START|> b"}]}, "messages[0].content"),
    "too long": ({"messages": [{"role": "user", "content": "many words " * 4000}]}, "messages"),
    "max_tokens": ({"max_tokens": 10**6}, "max_tokens"),
    "temperature": ({"temperature": -1}, "temperature"),
    "unknown": ({"best_of": 2}, "best_of"),
    "n": ({"n": 0}, "n"),
    "schema": (
        {
            "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nothing"}}},
            "ignore_eos": False,
        },
        "response_format.json_schema.schema",
    ),
    "grammar": ({"guided_grammar": "start: (", "ignore_eos": False}, "guided_grammar"),
    "bias": ({"logit_bias": {"99999999": 1}}, "logit_bias"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_its_field(http: httpx.Client, name: str) -> None:
    changes, field = BAD[name]
    response = http.post("/v1/chat/completions", json=chat(tokens=2) | changes)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"].startswith(field), error
    assert "Traceback" not in response.text and ".py" not in response.text
    if name == "host":
        assert "--allowed-media-domains" in error["message"]


async def test_errors_over_grpc_carry_reason_and_field(cluster: LaunchedCluster) -> None:
    async with AsyncClient(cluster.grpc_address) as client:
        for bad, code, reason, field in (
            (
                inference_pb2.GenerateRequest(model="other", messages=[user_message("a")]),
                "NOT_FOUND",
                "MODEL_NOT_FOUND",
                "model",
            ),
            (inference_pb2.GenerateRequest(), "INVALID_ARGUMENT", "INVALID_FIELD", "messages"),
            (
                inference_pb2.GenerateRequest(messages=[user_message("a", images=[b"GIF89a"])]),
                "INVALID_ARGUMENT",
                "MEDIA_UNREADABLE",
                "messages[0].parts[0].image",
            ),
        ):
            with pytest.raises(ClientError) as caught:
                await client.generate(bad, timeout_s=30)
            assert (caught.value.code.name, caught.value.reason) == (code, reason)
            assert (caught.value.field or "").startswith(field)
            assert "Traceback" not in caught.value.message


def test_health_readiness_and_reflection(cluster: LaunchedCluster, http: httpx.Client) -> None:
    assert http.get("/health").status_code == 200
    assert http.get("/ready").status_code == 200
    services = {"ernie_serving.v1.InferenceService", "grpc.health.v1.Health"}
    with grpc.insecure_channel(cluster.grpc_address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", *services - {"grpc.health.v1.Health"}):
            asked = health_pb2.HealthCheckRequest(service=service)
            assert health.Check(asked, timeout=10).status == health_pb2.HealthCheckResponse.SERVING
            watch = health.Watch(asked, timeout=10)
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            watch.cancel()
        listing = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([listing]), timeout=10)
    assert services <= {service.name for service in answer.list_services_response.service}


async def test_counting_tokens_keeps_nothing(cluster: LaunchedCluster) -> None:
    asked = request(tokens=2)
    async with AsyncClient(cluster.grpc_address) as client:
        counted = await client.count_tokens(list(asked.messages))
        await wait_clean(cluster)
        reply = await client.generate(asked, timeout_s=30)
    assert counted.tokens == reply.usage.prompt_token_count
    assert counted.media_tokens == reply.usage.media_token_count > 0


async def wait_clean(cluster: LaunchedCluster, within_s: float = 4.0) -> None:
    """Sooner than leases would run out."""
    await asyncio.to_thread(cluster.wait_clean, within_s)


async def http_lines(cluster: LaunchedCluster, body: dict[str, Any]) -> AsyncIterator[str]:
    async with (
        httpx.AsyncClient(base_url=cluster.http_url, timeout=60) as client,
        client.stream("POST", "/v1/chat/completions", json=body) as response,
    ):
        async for line in response.aiter_lines():
            if line:
                yield line


async def test_a_client_that_leaves_frees_everything(cluster: LaunchedCluster) -> None:
    await wait_clean(cluster, 5.0)
    lines = http_lines(cluster, chat(tokens=LONG, stream=True))
    for _ in range(4):
        await anext(lines)
    await lines.aclose()  # type: ignore[attr-defined]
    await wait_clean(cluster)
    async with AsyncClient(cluster.grpc_address) as client:
        stream = client.stream_generate(request(tokens=LONG), timeout_s=60)
        for _ in range(4):
            await anext(stream)
        await stream.aclose()
        await wait_clean(cluster)


async def test_cancel_generation_from_another_connection(cluster: LaunchedCluster) -> None:
    async with AsyncClient(cluster.grpc_address) as one, AsyncClient(cluster.grpc_address) as other:
        wanted = request(tokens=LONG)
        wanted.request_id = "mine"
        reasons = []
        async for event in one.stream_generate(wanted, timeout_s=60):
            if event.delta.text and not reasons:
                reasons.append("asked")
                await other.cancel("mine")
            if event.WhichOneof("event") == "choice_finished":
                reasons.append(inference_pb2.FinishReason.Name(event.choice_finished.finish_reason))
        assert reasons == ["asked", "FINISH_REASON_CANCELLED"]
        with pytest.raises(ClientError) as caught:
            await other.cancel("never seen")
        assert caught.value.code is grpc.StatusCode.NOT_FOUND
    await wait_clean(cluster)


async def test_a_full_router_says_when_to_come_back(cluster: LaunchedCluster) -> None:
    async with httpx.AsyncClient(base_url=cluster.http_url, timeout=60) as client:
        replies = await asyncio.gather(
            *(client.post("/v1/chat/completions", json=chat(tokens=40, picture=False)) for _ in range(40))
        )
    codes = sorted({reply.status_code for reply in replies})
    assert codes == [200, 429]
    refused = next(reply for reply in replies if reply.status_code == 429)
    assert float(refused.headers["retry-after"]) > 0
    assert refused.json()["error"]["message"]
    await wait_clean(cluster)


def engine_process(cluster: LaunchedCluster, http: httpx.Client, role: str) -> psutil.Process:
    """The process that listens where the engine of that role is registered."""
    (address,) = (engine["address"] for engine in http.get("/status").json()["engines"] if engine["role"] == role)
    port = int(address.rpartition(":")[2])
    for pid in cluster.processes():
        for connection in psutil.Process(pid).net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                return psutil.Process(pid)
    raise AssertionError(f"nobody listens on {address}")


@pytest.mark.parametrize("role", ["decode", "prefill"])
async def test_a_reply_waits_for_the_replacement_of_the_only_engine(
    cluster: LaunchedCluster, http: httpx.Client, role: str
) -> None:
    """Its client sees a pause; so does a request that comes meanwhile."""
    victim = engine_process(cluster, http, role)
    async with AsyncClient(cluster.grpc_address) as client:
        stream = client.stream_generate(request(tokens=LONG), timeout_s=120)
        tokens: list[int] = []
        while len(tokens) < 5:
            tokens += (await anext(stream)).delta.token_ids
        os.kill(victim.pid, signal.SIGKILL)
        late = asyncio.create_task(client.generate(request(tokens=8), timeout_s=120))
        async for event in stream:
            tokens += event.delta.token_ids
        expected = await expected_ids(LONG)
        assert tokens == expected
        assert list((await late).choices[0].token_ids) == expected[:8]
    await wait_clean(cluster, 5.0)


def test_the_commands_talk_to_a_running_cluster(cluster: LaunchedCluster, tmp_path: Any) -> None:
    (tmp_path / "picture.png").write_bytes(PICTURE)
    shown = cluster.command("status", "--url", cluster.http_url)
    assert "prefill" in shown and "decode" in shown
    answer = cluster.command(
        "chat",
        QUESTION,
        "--image",
        str(tmp_path / "picture.png"),
        "--address",
        cluster.grpc_address,
        "--max-tokens",
        "8",
    )
    assert "decode" in answer
