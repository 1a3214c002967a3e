"""GET /metrics, on the HTTP port and, where it is asked for, on a port of its own."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web
from fastapi import Request, Response

from cluster.generation import GenerationService
from cluster.metrics.sheet import CONTENT_TYPE
from cluster.openapi import Route

PATH = "/metrics"

Page = Callable[[], Awaitable[bytes]]


def metrics_route(page: Page) -> Route:
    async def handler(_: GenerationService, request: Request) -> Response:
        return Response(await page(), media_type=CONTENT_TYPE)

    return Route(
        method="GET",
        path=PATH,
        handler=handler,
        summary="Metrics of the whole cluster, as Prometheus reads them.",
        reply=str,
        media_type="text/plain",
    )


class MetricsPort:
    """Serves the page, and nothing else, at ``host:port``."""

    def __init__(self, page: Page) -> None:
        async def handler(request: web.Request) -> web.Response:
            return web.Response(body=await page(), headers={"content-type": CONTENT_TYPE})

        app = web.Application()
        app.router.add_get(PATH, handler)
        self._runner = web.AppRunner(app, access_log=None)

    async def start(self, host: str, port: int) -> None:
        """Raises OSError when it cannot listen there."""
        await self._runner.setup()
        # Shared, so that a router that follows another on this node need not wait until that one has drained.
        await web.TCPSite(self._runner, host, port, reuse_port=True).start()

    async def close(self) -> None:
        await self._runner.cleanup()
