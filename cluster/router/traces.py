"""Requests as OpenTelemetry spans: one for each, and one for every time it spent in a stage."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

from opentelemetry.sdk.resources import SERVICE_INSTANCE_ID, SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import Span, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from cluster.router.records import Outcome, Recorder, RequestRecord
from cluster.trace_link import current_link

SERVICE = "ernie-serving"
EXPORTER = "opentelemetry.exporter.otlp.proto.grpc.trace_exporter"
EXPORT_TIMEOUT_S = 2
"""For one batch, and so for the last one when the router ends."""


def load_exporter() -> Any:
    """The exporter's class.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module(EXPORTER).OTLPSpanExporter
    except ModuleNotFoundError:
        raise ValueError(f"otlp_endpoint: traces need more: pip install '{SERVICE}[traces]'") from None


def export_to(endpoint: str, instance: str) -> TracerProvider:
    """Spans go to a collector that speaks OTLP over gRPC, in batches, from a thread of their own. Sampling is what
    ``OTEL_TRACES_SAMPLER`` says: all, unless the client's context says no.
    """
    resource = Resource.create(
        {
            SERVICE_NAME: SERVICE,
            SERVICE_VERSION: importlib.metadata.version(SERVICE),
            SERVICE_INSTANCE_ID: instance,
        }
    )
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    exporter = load_exporter()(endpoint=endpoint, insecure=endpoint.startswith("http://"), timeout=EXPORT_TIMEOUT_S)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


class TraceRecorder(Recorder):
    """Spans are children of what the client's ``traceparent`` names."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer(SERVICE)
        self._contexts = TraceContextTextMapPropagator()
        self._running: dict[str, Any] = {}

    def admitted(self, request_id: str) -> None:
        link = current_link()
        parent = self._contexts.extract({} if link is None else dict(link.came))
        span = self._tracer.start_span("request", parent, SpanKind.SERVER, {"ernie.request_id": request_id})
        if link is not None:
            self._contexts.inject(link.goes, set_span_in_context(span))
        self._running[request_id] = span

    def ended(self, record: RequestRecord) -> None:
        span = self._running.pop(record.request_id)
        if not isinstance(span, Span) or span.start_time is None:
            return  # It is not sampled.
        inside = set_span_in_context(span)
        for stage, began_s, ended_s in record.spans:
            child = self._tracer.start_span(stage.value, inside, start_time=span.start_time + _ns(began_s))
            child.end(span.start_time + _ns(ended_s))
        span.set_attributes(_attributes(record))
        if record.outcome is Outcome.ERROR:
            span.set_status(Status(StatusCode.ERROR, record.reason))
        span.end(span.start_time + _ns(record.e2e_s))

    def close(self) -> None:
        """Sends what is left. Blocks for ``EXPORT_TIMEOUT_S`` at most."""
        self._provider.shutdown()


def _attributes(record: RequestRecord) -> dict[str, Any]:
    """Names of OpenTelemetry's conventions for generative models where there are any."""
    usage = record.usage
    found = {
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.output_tokens": usage.output_tokens,
        "gen_ai.response.finish_reasons": [reason.value for reason in record.finish_reasons],
        "ernie.outcome": record.outcome.value,
        "ernie.media_tokens": usage.media_tokens,
        "ernie.cached_tokens": usage.cached_tokens,
        "ernie.attempts": record.attempts,
        "ernie.ttft_s": record.ttft_s,
        "ernie.tpot_s": record.tpot_s,
        "ernie.alias": record.alias,
        "error.type": record.reason,
    }
    return {name: value for name, value in found.items() if value is not None}


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
