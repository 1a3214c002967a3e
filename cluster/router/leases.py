"""Leases on patches and embeddings: held per request, renewed per place in one message a second."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from typing import Protocol

log = logging.getLogger(__name__)

RENEW_S = 1.0


class LeasePlaces(Protocol):
    """Reaches the Media service of a place by its address."""

    async def renew(self, address: str, leases: list[str]) -> list[str]: ...

    async def release(self, address: str, leases: list[str]) -> None: ...


class LeaseKeeper:
    """Every lease this router holds, by place. One loop renews them; a release that cannot be told simply expires."""

    def __init__(self, places: LeasePlaces) -> None:
        self._places = places
        self._held: defaultdict[str, set[str]] = defaultdict(set)
        self._releases: set[asyncio.Task[None]] = set()
        self._loop: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._loop = asyncio.get_running_loop().create_task(self._renew())

    async def close(self) -> None:
        if self._loop is not None:
            self._loop.cancel()
        await asyncio.gather(*self._releases, return_exceptions=True)

    @property
    def count(self) -> int:
        return sum(len(leases) for leases in self._held.values())

    def hold(self, address: str, lease: str) -> None:
        self._held[address].add(lease)

    def release(self, address: str, lease: str) -> None:
        """Ends a lease now, without waiting for the place to answer. Idempotent."""
        leases = self._held.get(address)
        if leases is None or lease not in leases:
            return
        leases.remove(lease)
        if not leases:
            del self._held[address]
        task = asyncio.get_running_loop().create_task(self._tell(address, lease))
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)

    async def _tell(self, address: str, lease: str) -> None:
        try:
            await self._places.release(address, [lease])
        except Exception as error:
            log.info("release of %s at %s failed (%s): it expires there", lease, address, error)

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(RENEW_S)
            await asyncio.gather(*(self._renew_at(address, sorted(held)) for address, held in self._held.items()))

    async def _renew_at(self, address: str, leases: list[str]) -> None:
        try:
            unknown = await self._places.renew(address, leases)
        except Exception as error:
            log.warning("renewal of %d leases at %s failed: %s", len(leases), address, error)
            return
        if unknown:
            log.warning("%s does not know leases %s", address, unknown)
