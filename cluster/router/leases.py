"""Leases on patches and embeddings: held per request, renewed per place in one message a second.

A place that leaves renewals unanswered is silent, which is how a frozen one is known.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from typing import Protocol

log = logging.getLogger(__name__)

RENEW_S = 1.0
RENEWAL_TRIES = 2
DOUBT_S = 5.0
"""A place that was lost gets nothing new for so long: by then the registry knows it too, or it is back."""


class LeasePlaces(Protocol):
    """Reaches the Media service of a place by its address."""

    async def renew(self, address: str, leases: list[str]) -> list[str]: ...

    async def release(self, address: str, leases: list[str]) -> None: ...


class LeaseKeeper:
    """Every lease this router holds, by place. One loop renews them; a release that cannot be told simply expires."""

    def __init__(self, places: LeasePlaces, *, lost_after_s: float = 3.0, suspect_after_s: float = 1.0) -> None:
        """Silence after which a place counts as lost, and after which it gets nothing new beside one renewal's time."""
        self._places = places
        self._lost_after_s = lost_after_s
        self._suspect_after_s = suspect_after_s
        self._heard_at: dict[str, float] = {}
        self._lost_at: dict[str, float] = {}
        self._held: defaultdict[str, set[str]] = defaultdict(set)
        self._releases: set[asyncio.Task[None]] = set()
        self._renewals: dict[str, asyncio.Task[None]] = {}
        self._loop: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._loop = asyncio.get_running_loop().create_task(self._renew())

    async def close(self) -> None:
        if self._loop is not None:
            self._loop.cancel()
        renewals = [*self._renewals.values()]
        for task in renewals:
            task.cancel()
        await asyncio.gather(*self._releases, *renewals, return_exceptions=True)

    @property
    def count(self) -> int:
        return sum(len(leases) for leases in self._held.values())

    def hold(self, address: str, lease: str) -> None:
        if address not in self._held:
            self._heard_at[address] = time.monotonic()
        self._held[address].add(lease)

    def note_lost(self, address: str) -> None:
        """A call to the place failed as one to a dead or frozen process does."""
        now = time.monotonic()
        self._lost_at = {place: at for place, at in self._lost_at.items() if now - at < DOUBT_S} | {address: now}

    def doubts(self, address: str) -> bool:
        """True when the place was lost lately, or leaves renewals unanswered."""
        lost_at = self._lost_at.get(address)
        if lost_at is not None and time.monotonic() - lost_at < DOUBT_S:
            return True
        return self._silent_s(address) > RENEW_S + self._suspect_after_s

    async def wait_lost(self, address: str) -> None:
        """Returns when a place with leases has been silent for so long that it counts as lost."""
        while True:
            left = self._lost_after_s - self._silent_s(address)
            if left <= 0:
                return
            await asyncio.sleep(left)

    def _silent_s(self, address: str) -> float:
        heard_at = self._heard_at.get(address)
        return 0.0 if heard_at is None else time.monotonic() - heard_at

    def release(self, address: str, lease: str) -> None:
        """Ends a lease now, without waiting for the place to answer. Idempotent."""
        leases = self._held.get(address)
        if leases is None or lease not in leases:
            return
        leases.remove(lease)
        if not leases:
            del self._held[address]
            del self._heard_at[address]
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
            before = time.monotonic()
            await asyncio.sleep(RENEW_S)
            now = time.monotonic()
            if now - before > RENEW_S + self._lost_after_s / 3:
                # This process stood still: nobody else was silent.
                heard_at = now - self._lost_after_s / 2
                self._heard_at = {address: max(at, heard_at) for address, at in self._heard_at.items()}
            for address in self._held.keys() - self._renewals.keys():
                self._renewals[address] = asyncio.create_task(self._renew_at(address))

    async def _renew_at(self, address: str) -> None:
        """A place that does not answer is asked again at once: one answer that is missed is no loss."""
        try:
            for _ in range(RENEWAL_TRIES):
                if address not in self._held or await self._is_renewed(address, sorted(self._held[address])):
                    return
        finally:
            del self._renewals[address]

    async def _is_renewed(self, address: str, leases: list[str]) -> bool:
        try:
            unknown = await self._places.renew(address, leases)
        except Exception as error:
            if not self.doubts(address):
                log.warning("renewal of %d leases at %s failed: %s", len(leases), address, error)
            return False
        if address in self._heard_at:
            self._heard_at[address] = time.monotonic()
        if unknown:
            log.warning("%s does not know leases %s", address, unknown)
        return True
