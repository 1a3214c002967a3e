"""The asyncio client and what it sends, against the real facade and a scripted service."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from actors.errors import InvalidRequest, Overloaded
from cluster.client import (
    AsyncClient,
    ClientError,
    DeadlineError,
    InvalidRequestError,
    NotFoundError,
    RefusedError,
    UnreachableError,
    count_request,
    generate_request,
    media_source,
    user_message,
)
from cluster.generation import ModelCard
from ernie_serving.v1 import content_pb2, inference_pb2
from tests.doubles import SCRIPT, Pause, ScriptedService, grpc_serving
from tests.waiting import LIMIT_S

ASK = inference_pb2.GenerateRequest(messages=[user_message("hello")])


async def test_whole_and_streamed_replies_agree() -> None:
    async with grpc_serving(ScriptedService()) as address, AsyncClient(address) as client:
        whole = await client.generate(ASK)
        text = "".join([response.delta.text async for response in client.stream_generate(ASK)])
    assert text == whole.choices[0].text == "A cät"


@pytest.mark.parametrize(("own", "given", "sent"), [(None, None, None), (4, None, 4), (None, 3, 3), (4, 3, 3)])
async def test_the_deadline_is_copied_into_the_request(own: int | None, given: float | None, sent: float) -> None:
    service = ScriptedService()
    request = inference_pb2.GenerateRequest(messages=ASK.messages)
    if own is not None:
        request.timeout.CopyFrom(Duration(seconds=own))
    async with grpc_serving(service) as address, AsyncClient(address) as client:
        await client.generate(request, timeout_s=given)
        async for _ in client.stream_generate(request, timeout_s=given):
            pass
    assert [call.timeout_s for call in service.calls] == [sent and pytest.approx(sent, abs=1)] * 2
    assert request.HasField("timeout") == (own is not None)


async def test_a_proxy_of_the_environment_is_not_on_the_way_to_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "no_grpc_proxy", "grpc_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    async with grpc_serving(ScriptedService()) as address, AsyncClient(address) as client:
        assert (await client.generate(ASK, timeout_s=10)).choices[0].text == "A cät"


async def test_a_missed_deadline_cancels_the_request() -> None:
    service = ScriptedService(script=(*SCRIPT[:1], Pause()))
    async with grpc_serving(service) as address, AsyncClient(address) as client:
        with pytest.raises(DeadlineError) as caught:
            await client.generate(ASK, timeout_s=0.2)
        assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert await asyncio.wait_for(service.ended.get(), LIMIT_S) == "closed"


async def test_errors_are_typed() -> None:
    service = ScriptedService(script=(Overloaded("queue full", retry_after_s=1.5),))
    async with grpc_serving(service) as address, AsyncClient(address, retries=0) as client:
        with pytest.raises(RefusedError) as full:
            await client.generate(ASK)
        service.script = (*SCRIPT[:2], InvalidRequest("bad", field="stop[1]"))
        with pytest.raises(InvalidRequestError) as wrong:
            async for _ in client.stream_generate(ASK):
                pass
    assert (full.value.code, full.value.message) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "queue full")
    assert (full.value.reason, full.value.field, full.value.retry_after_s) == ("QUEUE_FULL", None, 1.5)
    assert (wrong.value.reason, wrong.value.field) == ("INVALID_FIELD", "sampling_params.stop_sequences[1]")
    assert not full.value.unreachable


async def test_nobody_listens() -> None:
    async with grpc_serving(ScriptedService()) as address:
        pass
    async with AsyncClient(address) as client:
        with pytest.raises(UnreachableError) as caught:
            await client.models()
    assert caught.value.unreachable


async def test_closing_a_stream_cancels_the_request() -> None:
    service = ScriptedService(script=(*SCRIPT[:2], Pause()))
    async with grpc_serving(service) as address, AsyncClient(address) as client:
        async with aclosing(client.stream_generate(ASK)) as responses:
            assert (await anext(responses)).started.request_id == "r-1"
        assert await asyncio.wait_for(service.ended.get(), LIMIT_S) == "closed"


async def test_responses_without_content_are_skipped() -> None:
    service = ScriptedService(script=(*SCRIPT[:4], InvalidRequest("late")))
    seen = []
    async with grpc_serving(service) as address, AsyncClient(address) as client:
        with pytest.raises(ClientError):
            async for response in client.stream_generate(ASK):
                seen.append(response)
    assert all(response.WhichOneof("event") for response in seen)
    assert [token for response in seen for token in response.delta.token_ids] == [10, 11, 12, 13]


async def test_cancel_count_and_models() -> None:
    cards = tuple(ModelCard(name=name, source="/w", max_model_len=1, created=1) for name in "ab")
    service = ScriptedService(cards=cards)
    async with grpc_serving(service) as address, AsyncClient(address) as client:
        await client.cancel("r-1")
        with pytest.raises(NotFoundError) as caught:
            await client.cancel("unknown")
        counts = await client.count_tokens("hello")
        assert [(model.name, model.context_tokens) for model in await client.models()] == [("a", 1), ("b", 1)]
    assert service.cancelled == ["r-1"]
    assert caught.value.reason == "REQUEST_NOT_FOUND"
    assert (counts.tokens, counts.media_tokens) == (12, 6)


def test_user_message_puts_media_before_the_text(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    picture.write_bytes(b"png")
    message = user_message("?", images=[picture, b"raw"], videos=["https://a/b.mp4"])
    assert message.role == content_pb2.ROLE_USER
    assert [part.WhichOneof("part") for part in message.parts] == ["image", "image", "video", "text"]
    assert [part.image.source.content for part in message.parts[:2]] == [b"png", b"raw"]
    assert message.parts[2].video.source.uri == "https://a/b.mp4"
    assert message.parts[3].text == "?"


def test_missing_files_are_reported(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"none\.png"):
        media_source(tmp_path / "none.png")


def test_a_request_from_plain_text() -> None:
    request = generate_request("hi", n=2, temperature=0, stop=["END"], enable_thinking=False, logprobs=0)
    assert [part.text for part in request.messages[0].parts] == ["hi"]
    assert (request.choice_count, list(request.sampling_params.stop_sequences)) == (2, ["END"])
    assert request.HasField("top_logprob_count") and not request.HasField("prompt_top_logprob_count")
    assert request.sampling_params.HasField("temperature") and not request.sampling_params.HasField("top_p")
    assert request.thinking_mode == inference_pb2.THINKING_MODE_DISABLED
    assert not request.HasField("structured_output") and not request.HasField("media_options")


def test_how_media_are_prepared() -> None:
    options = {"image_max_pixels": 50_000, "video_fps": 0.5, "video_max_frames": 8}
    for request in (
        generate_request("hi", mm_processor_kwargs=options),
        count_request("hi", mm_processor_kwargs=options),
    ):
        made = request.media_options
        assert (made.image_max_pixels, made.video_frames_per_second, made.video_max_frame_count) == (50_000, 0.5, 8)
        assert not made.HasField("image_min_pixels")


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"json_object": True, "regex": "a"}, "give one of"),
        ({"mm_processor_kwargs": {"image_pixels": 5}}, "image_pixels is not among"),
        ({"stop": "END"}, "stop must be a list"),
        ({"choice": "a"}, "choice must be a list"),
        ({"top_k": 2**40}, "range"),
        ({"n": 0}, "n must not be 0"),
        ({"allowed_token_ids": []}, "allowed_token_ids must not be empty"),
        ({"cache_salt": ""}, "cache_salt must not be empty"),
        ({"model": ""}, "model must not be empty"),
        ({"request_id": ""}, "request_id must not be empty"),
    ],
)
def test_requests_that_have_no_wire_form(fields: dict[str, Any], wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        generate_request("hi", **fields)
