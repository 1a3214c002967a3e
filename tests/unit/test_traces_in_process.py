"""Requests as spans at a collector: whose children they are, and what they say of where the time went."""

from __future__ import annotations

import importlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2

from actors.types import EngineRole, Stage
from cluster.client import user_message
from cluster.router.traces import load_exporter
from ernie_serving.v1 import inference_pb2, inference_pb2_grpc
from tests.doubles import grpc_serving
from tests.in_process import in_process_cluster
from tests.tiny_model import tiny_checkpoint
from tests.unit.cluster.test_http_api import serving

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
CAME = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
NOT_SAMPLED = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
ROLES = (EngineRole.PREFILL, EngineRole.DECODE)
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "ignore_eos": True}

GRPC_ASK = inference_pb2.GenerateRequest(
    messages=[user_message("hi")],
    sampling_params=inference_pb2.SamplingParams(max_output_token_count=4, ignore_eos=True),
)


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self.spans: list[trace_pb2.Span] = []
        self.services: set[str] = set()

    async def Export(self, request: Any, context: Any) -> Any:  # noqa: N802
        for resource in request.resource_spans:
            names = {attribute.key: attribute.value.string_value for attribute in resource.resource.attributes}
            self.services.add(names["service.name"])
            for scope in resource.scope_spans:
                self.spans.extend(scope.spans)
        return trace_service_pb2.ExportTraceServiceResponse()


@asynccontextmanager
async def collector() -> AsyncIterator[tuple[Collector, str]]:
    server, kept = grpc.aio.server(), Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(kept, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield kept, f"http://127.0.0.1:{port}"
    await server.stop(None)


async def test_spans_of_a_request_are_children_of_what_came_with_it() -> None:
    async with collector() as (kept, endpoint):
        async with in_process_cluster(tiny_checkpoint(), *ROLES, described={"otlp_endpoint": endpoint}) as cluster:
            router: Any = cluster.parts.router
            async with serving(router) as url, httpx.AsyncClient(base_url=url, trust_env=False) as http:
                streamed = await http.post("/v1/chat/completions", json=ASK | {"stream": True}, headers=CAME)
                whole = await http.post("/v1/chat/completions", json=ASK, headers=CAME)
                await http.post("/v1/chat/completions", json=ASK, headers=NOT_SAMPLED)
                alone = await http.post("/v1/chat/completions", json=ASK)
                wrong = await http.post("/v1/chat/completions", json=ASK | {"stop_token_ids": [10**9]}, headers=CAME)
                assert wrong.status_code == 400 and "traceparent" not in wrong.headers
            async with grpc_serving(router) as address, grpc.aio.insecure_channel(address) as channel:
                stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
                call = stub.StreamGenerate(
                    inference_pb2.StreamGenerateRequest(request=GRPC_ASK), metadata=tuple(CAME.items())
                )
                assert [event async for event in call]
                told = dict(await call.trailing_metadata())
                unary = stub.Generate(GRPC_ASK, metadata=tuple(CAME.items()))
                await unary
                told_unary = dict(await unary.trailing_metadata())
        # Closing the router has sent the last of them.
    assert kept.services == {"ernie-serving"}
    spans = {span.span_id.hex(): span for span in kept.spans}
    requests = {name: span for name, span in spans.items() if span.name == "request"}
    assert len(requests) == 5
    theirs = [reply.headers["traceparent"] for reply in (streamed, whole)]
    theirs += [str(metadata["traceparent"]) for metadata in (told, told_unary)]
    for text in theirs:
        _, trace, span_id, _ = text.split("-")
        assert trace == TRACE and requests[span_id].parent_span_id.hex() == PARENT
    own = requests[alone.headers["traceparent"].split("-")[2]]
    assert not own.parent_span_id and own.trace_id.hex() != TRACE
    for name, request in requests.items():
        stages = [span for span in spans.values() if span.parent_span_id.hex() == name]
        stages.sort(key=lambda span: (span.start_time_unix_nano, span.end_time_unix_nano))
        assert {Stage.QUEUED, Stage.PREPROCESS, Stage.PREFILL} <= {Stage(span.name) for span in stages}
        assert stages[0].start_time_unix_nano == request.start_time_unix_nano
        assert stages[-1].end_time_unix_nano == request.end_time_unix_nano
        ends = [span.end_time_unix_nano for span in stages[:-1]]
        assert ends == [span.start_time_unix_nano for span in stages[1:]]
        told_of = {attribute.key: attribute.value for attribute in request.attributes}
        assert told_of["gen_ai.usage.output_tokens"].int_value == 4
        assert told_of["ernie.outcome"].string_value == "finished" and told_of["ernie.ttft_s"].double_value > 0


async def test_a_request_that_fails_says_why() -> None:
    async with collector() as (kept, endpoint):
        async with in_process_cluster(tiny_checkpoint(), *ROLES, described={"otlp_endpoint": endpoint}) as cluster:
            router: Any = cluster.parts.router
            async with serving(router) as url, httpx.AsyncClient(base_url=url, trust_env=False) as http:
                late = await http.post("/v1/chat/completions", json=ASK | {"timeout": 0.001}, headers=CAME)
                assert late.status_code == 504 and TRACE in late.headers["traceparent"]
    (request,) = [span for span in kept.spans if span.name == "request"]
    assert request.status.code == trace_pb2.Status.STATUS_CODE_ERROR
    assert request.status.message == "DEADLINE_EXCEEDED"


def test_without_the_exporter_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ValueError, match=r"otlp_endpoint: .*pip install 'ernie-serving\[traces\]'"):
        load_exporter()
