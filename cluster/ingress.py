"""The public face as one Serve ingress class: HTTP through FastAPI, gRPC by method name, one router behind both."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from ray import serve

from actors.errors import Unavailable
from actors.types import EngineRole
from actors.wire.channels import node_address
from cluster.admin_api import role_route
from cluster.config import ClusterConfig
from cluster.explain_api import explain_route
from cluster.generation import GenerationService
from cluster.grpc_service import InferenceServicer
from cluster.http_api import build_api
from cluster.logs import log_as_serve_does
from cluster.metrics_api import MetricsPort, metrics_route
from cluster.openapi import Route
from cluster.router.assembly import RouterParts
from cluster.router.router import Router
from cluster.serve_errors import own_error
from cluster.status import cluster_status


@serve.ingress()
class Ingress(InferenceServicer):
    """One router replica. ``pools`` are only bound so that Serve deploys them: engines and encoders are reached by
    address."""

    router: Router

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: ClusterConfig, planner: Any, preprocessor: Any, *pools: Any
    ) -> None:
        log_as_serve_does()
        # `options` makes the handle ask Serve's controller for its replicas. Else the first request would, and
        # would wait for a head that is away.
        self._parts = await RouterParts.start(config, planner, preprocessor.options())
        self._model = config.model_name
        self._admin = config.admin
        self._slo = config.slo
        self._planner = planner
        self.router = self._parts.router
        self._metrics_port = MetricsPort(self._parts.metrics.text)
        if config.metrics_port is not None:
            await self._metrics_port.start(config.metrics_host or node_address(), config.metrics_port)

    def __serve_build_asgi_app__(self) -> FastAPI:
        options = ("audit", "requests")

        async def status(_: GenerationService, request: Request) -> Response:
            asked = {name: request.query_params.get(name) == "true" for name in options}
            return JSONResponse(await self.status(**asked))

        route = Route(
            method="GET",
            path="/status",
            handler=status,
            summary="What `ernie status` shows; with `audit` also what every part holds for requests, with `requests` "
            "where each of them is.",
            reply=dict[str, object],
            parameters=tuple({"name": name, "in": "query", "schema": {"type": "boolean"}} for name in options),
        )
        more = (
            role_route(self._admin, self._order_role),
            metrics_route(lambda: self._parts.metrics.text()),
            explain_route(lambda name: self.router.explain(name)),
        )
        return build_api(lambda: self.router, (route, *more))

    async def status(self, *, audit: bool = False, requests: bool = False) -> dict[str, Any]:
        """What ``ernie status`` shows; with ``audit`` also what every part holds for requests, with ``requests`` where
        each of them is."""
        fleet, whereabouts = self._parts.fleet, self.router.whereabouts()
        status = cluster_status(
            fleet.live_snapshot(),
            model=self._model,
            missing=await self.router.not_ready(),
            requests=whereabouts,
            speaking=fleet.speaking(),
            latency=self._parts.latency.summary(),
            slo=self._slo,
        )
        if requests:
            status["requests"] = [dataclasses.asdict(where) for where in whereabouts]
        if audit:
            audits = await self._parts.audits()
            status["audits"] = {
                name: {"held": dict(found.held), "problem": found.problem} for name, found in audits.items()
            }
        return status

    async def _order_role(self, engine: str, role: EngineRole) -> str:
        try:
            ordered: str = await self._planner.order_role.remote(engine, role)
        except Exception as error:
            raise own_error(error) or Unavailable("the planner does not answer", reason="NO_PLANNER") from None
        return ordered

    async def drain(self, timeout_s: float) -> int:
        """Refuses new requests and waits for running ones; returns how many were still running at the end."""
        return await self.router.drain(timeout_s)

    async def __del__(self) -> None:
        await self._metrics_port.close()
        await self._parts.close()
