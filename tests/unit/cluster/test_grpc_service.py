"""The gRPC facade behind a proxy that behaves like Serve's, seen through the raw stub."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

from actors.errors import InvalidRequest, NotFound, Overloaded, ServingError, Unavailable
from actors.types import ThinkingMode
from cluster import grpc_service
from cluster.generation import ModelCard, Tool
from cluster.grpc_service import InferenceServicer
from ernie_serving.v1 import content_pb2, inference_pb2, inference_pb2_grpc
from ernie_serving.v1.content_pb2 import ROLE_USER, ChatMessage, ContentPart
from tests.doubles import SCRIPT, Pause, ScriptedService, grpc_serving
from tests.waiting import LIMIT_S

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
ASK = inference_pb2.GenerateRequest(messages=[ChatMessage(role=ROLE_USER, parts=[ContentPart(text="hello")])])
STREAM = inference_pb2.StreamGenerateRequest(request=ASK)


@asynccontextmanager
async def stubs(service: ScriptedService) -> AsyncIterator[Any]:
    async with grpc_serving(service) as address, grpc.aio.insecure_channel(address) as channel:
        yield inference_pb2_grpc.InferenceServiceStub(channel)


@asynccontextmanager
async def health(service: ScriptedService) -> AsyncIterator[Any]:
    async with grpc_serving(service) as address, grpc.aio.insecure_channel(address) as channel:
        yield health_pb2_grpc.HealthStub(channel)


def error_info(error: grpc.aio.AioRpcError) -> Any:
    (packed,) = [value for key, value in error.trailing_metadata() if key == "grpc-status-details-bin"]
    status = status_pb2.Status.FromString(packed)
    assert (status.code, status.message) == (error.code().value[0], error.details())
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    return info


async def test_whole_reply() -> None:
    service = ScriptedService()
    async with stubs(service) as stub:
        reply = await stub.Generate(ASK)
    (choice,) = reply.choices
    assert (choice.text, choice.reasoning_text, reply.request_id) == ("A cät", "hmm.", "r-1")
    assert await service.ended.get() == "finished"


async def test_stream() -> None:
    service = ScriptedService()
    async with stubs(service) as stub:
        responses = [response async for response in stub.StreamGenerate(STREAM)]
    assert responses[0].HasField("started") and responses[-1].HasField("finished")
    assert "".join(response.delta.text for response in responses) == "A cät"
    assert await service.ended.get() == "finished"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidRequest("no"), grpc.StatusCode.INVALID_ARGUMENT),
        (NotFound("no"), grpc.StatusCode.NOT_FOUND),
        (Overloaded("no", retry_after_s=1), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (Unavailable("no", reason="ENGINE_LOST"), grpc.StatusCode.UNAVAILABLE),
    ],
)
@pytest.mark.parametrize("at", [0, 3])
async def test_errors_carry_their_details(error: ServingError, code: grpc.StatusCode, at: int) -> None:
    service = ScriptedService(script=(*SCRIPT[:at], error))
    async with stubs(service) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as whole:
            await stub.Generate(ASK)
        events = []
        with pytest.raises(grpc.aio.AioRpcError) as streamed:
            async for response in stub.StreamGenerate(STREAM):
                events.append(response.WhichOneof("event"))
    for caught in (whole, streamed):
        assert (caught.value.code(), caught.value.details()) == (code, "no")
        assert error_info(caught.value).reason == error.reason
        # Serve's own trailing metadata stays.
        assert ("request_id", "from-serve") in list(caught.value.trailing_metadata())
    assert events[-1] is None and "finished" not in events


async def test_refused_fields_are_named_in_the_protos_terms() -> None:
    service = ScriptedService()
    wrong = inference_pb2.GenerateRequest(messages=ASK.messages, sampling_params=inference_pb2.SamplingParams(top_p=0))
    async with stubs(service) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(wrong)
        assert error_info(caught.value).metadata["field"] == "sampling_params.top_p"
        refused = {"request": None, "sampling_params.top_p": wrong}
        for field, inner in refused.items():
            request = inference_pb2.StreamGenerateRequest(request=inner)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in stub.StreamGenerate(request):
                    pass
            assert error_info(caught.value).metadata["field"] == field
    assert service.calls == []
    assert service.refused == ["INVALID_FIELD"] * 3


@pytest.mark.parametrize("at", [0, 2])
async def test_defects_stay_in_the_log(at: int, caplog: pytest.LogCaptureFixture) -> None:
    service = ScriptedService(script=(*SCRIPT[:at], KeyError("secret")))
    async with stubs(service) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as whole:
            await stub.Generate(ASK)
        with pytest.raises(grpc.aio.AioRpcError) as streamed:
            async for _ in stub.StreamGenerate(STREAM):
                pass
    for caught in (whole, streamed):
        assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.INTERNAL, "internal error")
        assert "secret" not in str(caught.value) and "Traceback" not in str(caught.value)
    records = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(records) == 2 and all(record.exc_info for record in records)


async def test_a_service_that_stops_early_is_an_error() -> None:
    async with stubs(ScriptedService(script=SCRIPT[:3])) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(ASK)
    assert caught.value.code() is grpc.StatusCode.INTERNAL


@pytest.mark.parametrize("method", ["Generate", "StreamGenerate"])
async def test_leaving_cancels_the_request(method: str) -> None:
    service = ScriptedService(script=(*SCRIPT[:2], Pause()))
    async with stubs(service) as stub:
        if method == "Generate":
            call = stub.Generate(ASK)
        else:
            call = stub.StreamGenerate(STREAM)
            await call.read()
        await asyncio.wait_for(service.paused.wait(), LIMIT_S)
        call.cancel()
        assert await asyncio.wait_for(service.ended.get(), LIMIT_S) == "closed"


async def test_silence_is_bridged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_service, "KEEP_ALIVE_S", 0.01)
    service = ScriptedService(script=(Pause(), *SCRIPT))
    async with stubs(service) as stub:
        responses = aiter(stub.StreamGenerate(STREAM))
        assert await anext(responses) == inference_pb2.StreamGenerateResponse()
        service.resume.set()
        events = [response.WhichOneof("event") async for response in responses]
    assert events[-1] == "finished"


async def test_cancel_takes_names_in_either_form() -> None:
    service = ScriptedService()
    async with stubs(service) as stub:
        for name in ("r-1", "chatcmpl-r-1", "cmpl-r-1", "resp_r-1"):
            await stub.CancelGeneration(inference_pb2.CancelGenerationRequest(request_id=name))
        for name, code in (("", grpc.StatusCode.INVALID_ARGUMENT), ("r-2", grpc.StatusCode.NOT_FOUND)):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.CancelGeneration(inference_pb2.CancelGenerationRequest(request_id=name))
            assert caught.value.code() is code
    assert service.cancelled == ["r-1"] * 4


async def test_count_tokens() -> None:
    service = ScriptedService()
    request = inference_pb2.CountTokensRequest(
        messages=ASK.messages,
        thinking_mode=inference_pb2.THINKING_MODE_DISABLED,
        tools=[content_pb2.Tool(name="f")],
    )
    async with stubs(service) as stub:
        reply = await stub.CountTokens(request)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.CountTokens(inference_pb2.CountTokensRequest())
    assert (reply.token_count, reply.media_token_count) == (12, 6)
    (call,) = service.tokenized
    assert (call.model, call.thinking, call.tools) == (None, ThinkingMode.OFF, (Tool(name="f"),))
    assert error_info(caught.value).metadata["field"] == "messages"


async def test_models_come_in_pages() -> None:
    cards = tuple(ModelCard(name=name, source="/w", max_model_len=1, created=1) for name in "abcde")
    async with stubs(ScriptedService(cards=cards)) as stub:
        pages, token = [], ""
        while True:
            page = await stub.ListModels(inference_pb2.ListModelsRequest(page_size=2, page_token=token))
            pages.append([model.name for model in page.models])
            token = page.next_page_token
            if not token:
                break
        assert pages == [["a", "b"], ["c", "d"], ["e"]]
        everything = await stub.ListModels(inference_pb2.ListModelsRequest())
        assert len(everything.models) == 5 and not everything.next_page_token
        for wrong, field in (({"page_size": -1}, "page_size"), ({"page_token": "x"}, "page_token")):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.ListModels(inference_pb2.ListModelsRequest(**wrong))
            assert error_info(caught.value).metadata["field"] == field
        one = await stub.GetModel(inference_pb2.GetModelRequest(name="c"))
        assert one.model.name == "c"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetModel(inference_pb2.GetModelRequest(name="z"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert error_info(caught.value).reason == "MODEL_NOT_FOUND"


@pytest.mark.parametrize("name", ["", "ernie_serving.v1.InferenceService"])
async def test_health_follows_readiness(name: str) -> None:
    service = ScriptedService(missing="no decode engine")
    request = health_pb2.HealthCheckRequest(service=name)
    async with health(service) as stub:
        assert (await stub.Check(request)).status == NOT_SERVING
        watch = stub.Watch(request)
        assert (await watch.read()).status == NOT_SERVING
        service.missing = None
        assert (await watch.read()).status == SERVING
        assert (await stub.Check(request)).status == SERVING
        watch.cancel()


async def test_health_of_unknown_services() -> None:
    request = health_pb2.HealthCheckRequest(service="other")
    async with health(ScriptedService()) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Check(request)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        watch = stub.Watch(request)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        watch.cancel()


def test_every_rpc_has_a_method_serve_can_call() -> None:
    services = (
        inference_pb2.DESCRIPTOR.services_by_name["InferenceService"],
        health_pb2.DESCRIPTOR.services_by_name["Health"],
    )
    for rpc in (method for service in services for method in service.methods if method.name != "List"):
        method = getattr(InferenceServicer, rpc.name)
        assert "grpc_context" in inspect.signature(method).parameters
        assert inspect.isasyncgenfunction(method) == rpc.server_streaming
