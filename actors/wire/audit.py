"""Asks a worker what it holds for requests and whether its books agree, and for its metrics."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import grpc.aio

from actors.wire.channels import open_channel
from ernie_serving.internal.v1 import audit_pb2, audit_pb2_grpc


@dataclass(frozen=True, kw_only=True, slots=True)
class Audit:
    """``held`` counts resources by name; all zero when idle. ``problem`` is empty when the books agree."""

    held: Mapping[str, int]
    problem: str = ""

    @property
    def clean(self) -> bool:
        return not self.problem and not any(self.held.values())


def take_audit(held: Callable[[], Mapping[str, int]], check_integrity: Callable[[], None]) -> Audit:
    """Counts what is held; a failed integrity check becomes the audit's problem."""
    problem = ""
    try:
        check_integrity()
    except (RuntimeError, AssertionError) as error:
        problem = str(error) or type(error).__name__
    return Audit(held=dict(held()), problem=problem)


class AuditServicer(audit_pb2_grpc.AuditServiceServicer):
    """Serves what a worker says of itself. ``page``: its metrics, in the text format of Prometheus."""

    def __init__(self, take: Callable[[], Awaitable[Audit]], page: Callable[[], bytes]) -> None:
        self._take = take
        self._page = page

    async def Audit(  # noqa: N802
        self,
        request: audit_pb2.AuditRequest,
        context: grpc.aio.ServicerContext[audit_pb2.AuditRequest, audit_pb2.AuditResponse],
    ) -> audit_pb2.AuditResponse:
        audit = await self._take()
        return audit_pb2.AuditResponse(held=dict(audit.held), problem=audit.problem)

    async def Metrics(  # noqa: N802
        self,
        request: audit_pb2.MetricsRequest,
        context: grpc.aio.ServicerContext[audit_pb2.MetricsRequest, audit_pb2.MetricsResponse],
    ) -> audit_pb2.MetricsResponse:
        return audit_pb2.MetricsResponse(page=self._page())


async def fetch_audit(address: str, *, timeout_s: float) -> Audit:
    """Audits the worker at ``host:port``.

    Raises:
        grpc.aio.AioRpcError: it does not answer.
    """
    async with open_channel(address) as channel:
        stub: audit_pb2_grpc.AuditServiceAsyncStub = audit_pb2_grpc.AuditServiceStub(channel)
        response = await stub.Audit(audit_pb2.AuditRequest(), timeout=timeout_s)
    return Audit(held=dict(response.held), problem=response.problem)


class MetricsClient:
    """Asks one worker for its metrics, over a channel that is kept."""

    def __init__(self, address: str) -> None:
        self._channel = open_channel(address)
        self._stub: audit_pb2_grpc.AuditServiceAsyncStub = audit_pb2_grpc.AuditServiceStub(self._channel)

    async def fetch(self) -> bytes:
        """Its page, in the text format of Prometheus. Raises grpc.aio.AioRpcError when it does not answer."""
        response = await self._stub.Metrics(audit_pb2.MetricsRequest())
        return response.page

    async def close(self) -> None:
        await self._channel.close()
