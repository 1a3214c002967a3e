"""Units of media kept for pulling: patches by content key, embeddings by embedding key, held under leases.

A *lease* is a name (request and attempt) that its router renews. A unit stays while at least one lease holds it; then
it is freed or, where the store caches, becomes an entry of an LRU cache that gives way to whatever needs its bytes.

Why admission cannot deadlock: bytes are reserved at once for all a call will keep, before any of it is made; a lease
that has to wait for a reservation gives up what it holds and holds nothing until all it waits for is granted; whoever
holds bytes without waiting ends them by release or expiry. So nobody waits while holding, and the queue is served in
order. What was given up is made again on the miss that follows, if the cache did not keep it.

Plain asyncio: one event loop owns a store, and only ``reserve`` waits.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from actors.errors import MediaTooLarge
from actors.wire.byte_budget import ByteBudget

LEASE_TTL_S = 5.0


class HasBytes(Protocol):
    """A numpy array or a torch tensor."""

    @property
    def nbytes(self) -> int: ...


UnitT = TypeVar("UnitT", bound=HasBytes)


class Lease:
    """One period of a lease name. ``ended`` once released or expired; the same name may then start a new one."""

    __slots__ = ("ended", "expires_at", "keys", "name", "users", "waiting")

    def __init__(self, name: str, expires_at: float) -> None:
        self.name = name
        self.expires_at = expires_at
        self.keys: set[bytes] = set()
        self.users = 0
        self.waiting = 0
        self.ended = False


class Reservation:
    """Bytes promised to units that are still to be made. ``release`` returns what no unit took; idempotent."""

    def __init__(self, budget: ByteBudget, outstanding: set[Reservation], byte_count: int) -> None:
        self._budget = budget
        self._outstanding = outstanding
        self.byte_count = byte_count
        outstanding.add(self)

    def split(self, byte_count: int) -> Reservation:
        """Moves bytes into a reservation of their own."""
        self.consume(byte_count)
        return Reservation(self._budget, self._outstanding, byte_count)

    def consume(self, byte_count: int) -> None:
        """Moves bytes out: they belong to a unit from now on."""
        if byte_count > self.byte_count:
            raise ValueError(f"{byte_count} bytes are more than the {self.byte_count} reserved")
        self.byte_count -= byte_count

    def release(self) -> None:
        self._outstanding.discard(self)
        left, self.byte_count = self.byte_count, 0
        self._budget.give(left)


@dataclass(slots=True)
class _Unit(Generic[UnitT]):
    value: UnitT
    holders: set[Lease] = field(default_factory=set)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreStats:
    """What a store holds. ``byte_count`` covers held, cached and reserved bytes."""

    units: int
    leases: int
    byte_count: int
    cached_units: int
    cached_bytes: int
    reserved_bytes: int
    waiting: int


@dataclass(kw_only=True, slots=True)
class StoreCounters:
    """Of a store since its start."""

    hits: int = 0
    """Units that others came to copy."""
    hit_bytes: int = 0
    misses: int = 0
    """Units that others came to copy and that were not here."""
    evictions: int = 0
    """Cached units that gave way to others."""


class UnitStore(Generic[UnitT]):
    """Units under leases within a byte budget.

    Args:
        limit_bytes: budget for held, cached and reserved bytes together.
        limit_name: how refusals name that limit.
        cache_bytes: how many of them units without a lease may take; 0 frees such units at once.
        lease_ttl_s: a lease not renewed for so long ends.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        *,
        limit_bytes: int,
        limit_name: str,
        cache_bytes: int = 0,
        lease_ttl_s: float = LEASE_TTL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._budget = ByteBudget(limit_bytes, reclaim=self._reclaim)
        self._limit_name = limit_name
        self._cache_limit = min(cache_bytes, limit_bytes)
        self._ttl = lease_ttl_s
        self._clock = clock
        self._units: dict[bytes, _Unit[UnitT]] = {}
        self._leases: dict[str, Lease] = {}
        self._released: OrderedDict[str, float] = OrderedDict()
        """Names that were released before they were known here, and until when they are remembered."""
        self._cache: OrderedDict[bytes, int] = OrderedDict()
        self._cached_bytes = 0
        self.counters = StoreCounters()
        self._outstanding: set[Reservation] = set()

    @property
    def lease_ttl_s(self) -> float:
        return self._ttl

    @property
    def limit_bytes(self) -> int:
        return self._budget.limit

    def check_fits(self, byte_count: int) -> None:
        """Raises MediaTooLarge when a request can never be held, however long it waits."""
        if byte_count > self._budget.limit:
            raise MediaTooLarge(
                f"the media of this request take {byte_count / 1e6:.1f} MB, over the limit {self._limit_name} of "
                f"{self._budget.limit / 1e6:.1f} MB",
                field="messages",
            )

    def try_reserve(self, byte_count: int) -> Reservation | None:
        """Reserves bytes now, or returns None when they would have to wait."""
        if not self._budget.try_take(byte_count):
            return None
        return Reservation(self._budget, self._outstanding, byte_count)

    async def reserve(self, lease: Lease, byte_count: int) -> Reservation:
        """Reserves bytes for units of ``lease``, which gives up the units it holds if it has to wait.

        Raises:
            MediaTooLarge: more than the whole budget.
        """
        self.check_fits(byte_count)
        self.expire()
        reservation = self.try_reserve(byte_count)
        if reservation is None:
            self._give_up(lease)
            lease.waiting += 1
            try:
                await self._budget.take(byte_count)
            finally:
                lease.waiting -= 1
            reservation = Reservation(self._budget, self._outstanding, byte_count)
        return reservation

    @contextmanager
    def open(self, name: str) -> Iterator[Lease]:
        """Starts a lease or extends a running one; it cannot expire (but can be released) while open.

        Afterwards a lease that holds nothing ends at once. One whose release came first has ended from the start.
        """
        lease = self._leases.get(name) or Lease(name, 0.0)
        if self._released.pop(name, 0.0) > self._clock():
            lease.ended = True
        else:
            self._leases[name] = lease
        lease.users += 1
        try:
            yield lease
        finally:
            lease.users -= 1
            lease.expires_at = self._clock() + self._ttl
            if not lease.users and not lease.keys:
                self._end(lease)

    def put(self, key: bytes, value: UnitT, reservation: Reservation, leases: Iterable[Lease]) -> None:
        """Keeps a unit, its bytes taken from ``reservation``, under those of ``leases`` that neither ended nor wait.

        When none is left the unit goes the way of a unit without a lease. A known key keeps its first value.

        Raises:
            ValueError: the reservation is too small.
        """
        if key not in self._units:
            reservation.consume(value.nbytes)
            self._units[key] = _Unit(value)
        for lease in leases:
            self.hold(lease, key)
        if not self._units[key].holders and key not in self._cache:
            self._unhold(key)

    def cache(self, key: bytes, value: UnitT) -> None:
        """Keeps a unit without a lease, if there is room for it."""
        reservation = self.try_reserve(value.nbytes)
        if reservation is not None:
            self.put(key, value, reservation, [])
            reservation.release()

    def hold(self, lease: Lease, key: bytes) -> bool:
        """Puts a unit that is here under one more lease; False when it is not here.

        A lease that ended or waits for a reservation holds nothing: the unit then only counts as used.
        """
        unit = self._units.get(key)
        if unit is None:
            return False
        if not lease.ended and not lease.waiting:
            unit.holders.add(lease)
            lease.keys.add(key)
            self._cached_bytes -= self._cache.pop(key, 0)
        elif key in self._cache:
            self._cache.move_to_end(key)
        return True

    def get(self, key: bytes) -> UnitT | None:
        """A unit, held or cached; None is a miss."""
        unit = self._units.get(key)
        if unit is None:
            self.counters.misses += 1
            return None
        self.counters.hits += 1
        self.counters.hit_bytes += unit.value.nbytes
        if key in self._cache:
            self._cache.move_to_end(key)
        return unit.value

    def renew(self, names: Iterable[str]) -> list[str]:
        """Extends leases; returns those that are unknown."""
        self.expire()
        expires_at = self._clock() + self._ttl
        unknown = []
        for name in names:
            lease = self._leases.get(name)
            if lease is None:
                unknown.append(name)
            else:
                lease.expires_at = expires_at
        return unknown

    def release(self, names: Iterable[str]) -> None:
        """Ends leases. One that is unknown may be on its way here: it then holds nothing when it comes."""
        for name in names:
            lease = self._leases.get(name)
            if lease is not None:
                self._end(lease)
            else:
                self._released[name] = self._clock() + self._ttl
                self._released.move_to_end(name)

    def expire(self) -> None:
        """Ends leases that were not renewed in time; the owner calls this regularly."""
        now = self._clock()
        for lease in [lease for lease in self._leases.values() if not lease.users and lease.expires_at <= now]:
            self._end(lease)
        while self._released and next(iter(self._released.values())) <= now:
            self._released.popitem(last=False)

    def stats(self) -> StoreStats:
        return StoreStats(
            units=len(self._units),
            leases=len(self._leases),
            byte_count=self._budget.used,
            cached_units=len(self._cache),
            cached_bytes=self._cached_bytes,
            reserved_bytes=sum(reservation.byte_count for reservation in self._outstanding) + self._budget.granting,
            waiting=self._budget.waiting,
        )

    def check_integrity(self) -> None:
        """Raises AssertionError when the books do not match what is here."""
        stats = self.stats()
        unit_bytes = sum(unit.value.nbytes for unit in self._units.values())
        problems = []
        if stats.byte_count != unit_bytes + stats.reserved_bytes:
            problems.append(
                f"{stats.byte_count} bytes counted, but {unit_bytes} in units and {stats.reserved_bytes} reserved"
            )
        if stats.byte_count > self._budget.limit:
            problems.append(f"{stats.byte_count} bytes exceed the limit {self._budget.limit}")
        if self._cached_bytes != sum(self._units[key].value.nbytes for key in self._cache if key in self._units):
            problems.append(f"{self._cached_bytes} cached bytes counted, which the cache does not have")
        if self._cached_bytes > self._cache_limit:
            problems.append(f"{self._cached_bytes} cached bytes exceed the limit {self._cache_limit}")
        for key, unit in self._units.items():
            if bool(unit.holders) == (key in self._cache):
                problems.append(f"unit {key.hex()[:16]} has {len(unit.holders)} leases and cached={key in self._cache}")
            problems += [
                f"unit {key.hex()[:16]} is held by {lease.name}, which ended or does not know it"
                for lease in unit.holders
                if lease.ended or key not in lease.keys or self._leases.get(lease.name) is not lease
            ]
        for lease in self._leases.values():
            problems += [
                f"lease {lease.name} names unit {key.hex()[:16]}, which is not held by it"
                for key in lease.keys
                if key not in self._units or lease not in self._units[key].holders
            ]
        problems += [f"cached unit {key.hex()[:16]} is not here" for key in self._cache if key not in self._units]
        if problems:
            raise AssertionError("; ".join(problems))

    def _end(self, lease: Lease) -> None:
        self._give_up(lease)
        lease.ended = True
        if self._leases.get(lease.name) is lease:
            del self._leases[lease.name]

    def _give_up(self, lease: Lease) -> None:
        keys, lease.keys = lease.keys, set()
        for key in keys:
            holders = self._units[key].holders
            holders.discard(lease)
            if not holders:
                self._unhold(key)

    def _unhold(self, key: bytes) -> None:
        """Caches or frees a unit that no lease holds any more."""
        byte_count = self._units[key].value.nbytes
        if byte_count > self._cache_limit or not self._cache_limit:
            del self._units[key]
            self._budget.give(byte_count)
            return
        while self._cached_bytes + byte_count > self._cache_limit:
            self._budget.give(self._evict())
        self._cache[key] = byte_count
        self._cached_bytes += byte_count
        self._budget.wake()

    def _evict(self) -> int:
        key, byte_count = self._cache.popitem(last=False)
        self.counters.evictions += 1
        self._cached_bytes -= byte_count
        del self._units[key]
        return byte_count

    def _reclaim(self, short: int) -> int:
        if short > self._cached_bytes:
            return 0
        freed = 0
        while freed < short:
            freed += self._evict()
        return freed
