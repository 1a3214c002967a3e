"""One page with the metrics of the whole cluster: the router's own, and what every other part says when it is asked."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from actors.wire.audit import MetricsClient
from cluster.metrics.sheet import Sheet, merged, node_of
from cluster.registry import Place, Snapshot, places

log = logging.getLogger(__name__)

ANSWER_S = 1.0
"""A part that takes longer is left out: one that is frozen must not hold up the page of all others."""

PLANNER = Place("planner", "planner", "planner", "")


class MetricsPage:
    """Asks all parts at once; keeps a channel to each.

    Args:
        own: adds the router's metrics.
        planner: asks it for its page.
    """

    def __init__(
        self,
        snapshot: Callable[[], Snapshot],
        own: Callable[[Sheet], None],
        planner: Callable[[], Awaitable[bytes]],
    ) -> None:
        self._snapshot = snapshot
        self._own = own
        self._planner = planner
        self._clients: dict[str, MetricsClient] = {}

    async def text(self) -> bytes:
        """In the text format of Prometheus."""
        started = time.monotonic()
        asked = places(self._snapshot())
        await self._keep({place.address for place in asked})
        questions = [self._ask(place, self._clients[place.address].fetch()) for place in asked]
        pages = await asyncio.gather(*questions, self._ask(PLANNER, self._planner()))
        sheet = Sheet()
        self._own(sheet)
        for place, page in zip((*asked, PLANNER), pages, strict=True):
            node = node_of(place.address)
            sheet.add("ernie_part_up", page is not None, pool=place.pool, worker=place.worker, node=node)
        sheet.add("ernie_scrape_seconds", time.monotonic() - started)
        return merged([sheet.text(), *(page for page in pages if page is not None)])

    async def _ask(self, place: Place, answer: Awaitable[bytes]) -> bytes | None:
        try:
            async with asyncio.timeout(ANSWER_S):
                return await answer
        except Exception as error:
            log.info("no metrics of %s %s: %r", place.kind, place.worker, error)
            return None

    async def _keep(self, addresses: set[str]) -> None:
        """Channels to these, and to no others."""
        for address in self._clients.keys() - addresses:
            await self._clients.pop(address).close()
        for address in addresses - self._clients.keys():
            self._clients[address] = MetricsClient(address)

    async def close(self) -> None:
        await self._keep(set())
