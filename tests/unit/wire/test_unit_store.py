from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from dataclasses import asdict

import numpy as np
import pytest

from actors.errors import MediaTooLarge
from actors.wire.tensors import Patches
from actors.wire.unit_store import Lease, Reservation, UnitStore
from tests.waiting import LIMIT_S


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


clock = Clock()


def make_store(limit: int = 100, cache: int = 0) -> UnitStore[Patches]:
    return UnitStore(limit_bytes=limit, limit_name="patch_bytes", cache_bytes=cache, clock=clock)


@pytest.fixture
def store() -> Iterator[UnitStore[Patches]]:
    made = make_store()
    yield made
    made.check_integrity()


@pytest.fixture
def caching() -> Iterator[UnitStore[Patches]]:
    made = make_store(cache=60)
    yield made
    made.check_integrity()


def unit(size: int) -> Patches:
    return np.zeros(size, dtype=np.uint8)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def put(store: UnitStore[Patches], name: str, **sizes: int) -> None:
    with store.open(name) as lease:
        reservation = await store.reserve(lease, sum(sizes.values()))
        for key, size in sizes.items():
            store.put(key.encode(), unit(size), reservation, [lease])
        reservation.release()


async def test_units_live_as_long_as_any_lease_holds_them(store: UnitStore[Patches]) -> None:
    await put(store, "one", a=10, b=20)
    await put(store, "two", b=20, c=30)
    assert asdict(store.stats()) == {
        "units": 3,
        "leases": 2,
        "byte_count": 60,
        "cached_units": 0,
        "cached_bytes": 0,
        "reserved_bytes": 0,
        "waiting": 0,
    }
    store.release(["one", "never seen"])
    store.release(["one"])
    assert store.get(b"a") is None and store.get(b"b") is not None
    store.release(["two"])
    assert store.stats().units == store.stats().byte_count == store.stats().leases == 0


async def test_unrenewed_leases_expire_after_five_seconds(store: UnitStore[Patches]) -> None:
    await put(store, "kept", a=10)
    await put(store, "forgotten", b=10)
    clock.now += 4.9
    assert store.renew(["kept", "strange"]) == ["strange"]
    assert store.get(b"b") is not None
    clock.now += 0.2
    store.expire()
    assert store.get(b"a") is not None and store.get(b"b") is None
    assert store.renew(["kept", "forgotten"]) == ["forgotten"]
    clock.now += 5.1
    assert store.renew(["kept"]) == ["kept"]


async def test_an_open_lease_does_not_expire_and_ends_with_its_use_when_empty(store: UnitStore[Patches]) -> None:
    with store.open("one") as lease:
        clock.now += 60
        store.expire()
        assert store.renew(["one"]) == [] and not lease.ended
    assert store.renew(["one"]) == ["one"] and lease.ended


async def test_a_unit_made_after_the_release_of_its_lease_is_not_kept(store: UnitStore[Patches]) -> None:
    with store.open("one") as lease:
        reservation = await store.reserve(lease, 10)
        store.release(["one"])
        with store.open("one") as again:
            assert again is not lease
        store.put(b"a", unit(10), reservation, [lease])
    assert store.get(b"a") is None and store.stats().byte_count == 0


async def test_a_lease_whose_release_overtook_it_holds_nothing(store: UnitStore[Patches]) -> None:
    store.release(["one", "two"])
    with store.open("one") as lease:
        assert lease.ended and store.stats().leases == 0
    await put(store, "one", a=10)
    assert store.get(b"a") is not None  # a second call of that name is no late one
    clock.now += 5.1
    store.expire()
    await put(store, "two", b=10)
    assert store.get(b"b") is not None and not store._released


async def test_a_request_larger_than_the_budget_names_the_limit(store: UnitStore[Patches]) -> None:
    with store.open("one") as lease, pytest.raises(MediaTooLarge, match=r"patch_bytes of 0\.0 MB"):
        await store.reserve(lease, 101)


async def test_what_does_not_fit_waits_for_release_or_expiry(store: UnitStore[Patches]) -> None:
    await put(store, "one", a=60)
    await put(store, "two", b=30)
    waiting = asyncio.create_task(put(store, "three", c=80))
    await settle()
    assert store.stats().waiting == 1 and store.get(b"c") is None
    store.release(["one"])
    await settle()
    assert not waiting.done()
    clock.now += 5.1
    store.expire()
    await waiting
    assert store.get(b"c") is not None


async def test_a_cancelled_wait_leaves_nothing(store: UnitStore[Patches]) -> None:
    await put(store, "one", a=60)
    waiting = asyncio.create_task(put(store, "two", b=80))
    await settle()
    waiting.cancel()
    await settle()
    assert store.stats().waiting == 0 and store.renew(["two"]) == ["two"]
    store.check_integrity()


async def test_the_books_agree_between_grant_and_resumption(store: UnitStore[Patches]) -> None:
    await put(store, "one", a=60)
    waiting = asyncio.create_task(put(store, "two", b=80))
    await settle()
    store.release(["one"])
    store.check_integrity()
    assert store.stats().reserved_bytes == 80
    await waiting


async def test_leases_that_both_hold_and_want_more_do_not_block_each_other(store: UnitStore[Patches]) -> None:
    await put(store, "one", a=50)
    await put(store, "two", b=50)

    async def more(name: str, key: str) -> None:
        await put(store, name, **{key: 40})
        store.release([name])

    await asyncio.wait_for(asyncio.gather(more("one", "c"), more("two", "d")), LIMIT_S)
    assert store.stats().units == 0


async def test_two_calls_under_one_lease_do_not_block_each_other(store: UnitStore[Patches]) -> None:
    """The second waits for bytes that the first would otherwise hold under the very lease that waits."""
    await put(store, "other", a=30)
    with store.open("one") as lease:
        reservation = await store.reserve(lease, 60)
        second = asyncio.create_task(put(store, "one", c=70))
        await settle()
        store.put(b"b", unit(60), reservation, [lease])
    await asyncio.wait_for(second, LIMIT_S)
    assert store.get(b"b") is None and store.get(b"c") is not None


async def test_unused_reservation_is_returned_and_cannot_be_overdrawn(store: UnitStore[Patches]) -> None:
    with store.open("one") as lease:
        reservation = await store.reserve(lease, 50)
        part = reservation.split(20)
        with pytest.raises(ValueError, match="reserved"):
            store.put(b"a", unit(21), part, [lease])
        store.put(b"a", unit(15), part, [lease])
        store.put(b"a", unit(15), part, [lease])
        assert store.stats().reserved_bytes == 35
        for _ in range(2):
            part.release()
            reservation.release()
    assert store.stats().byte_count == 15


async def test_unleased_embeddings_are_cached_and_served(caching: UnitStore[Patches]) -> None:
    await put(caching, "one", a=20, b=20)
    clock.now += 5.1
    caching.expire()
    assert caching.stats().cached_bytes == 40 and caching.get(b"a") is not None
    with caching.open("two") as lease:
        assert caching.hold(lease, b"a") and not caching.hold(lease, b"z")
        assert caching.stats().cached_bytes == 20
    caching.release(["two"])
    assert caching.stats().cached_bytes == 40


async def test_the_cache_evicts_the_least_recently_used(caching: UnitStore[Patches]) -> None:
    await put(caching, "one", a=20)
    await put(caching, "two", b=20)
    await put(caching, "three", c=20)
    caching.release(["one", "two", "three"])
    assert caching.get(b"a") is not None
    await put(caching, "four", d=20)
    caching.release(["four"])
    assert [key for key in (b"a", b"b", b"c", b"d") if caching.get(key) is None] == [b"b"]


async def test_cached_bytes_give_way_to_reservations(caching: UnitStore[Patches]) -> None:
    await put(caching, "one", a=30, b=30)
    caching.release(["one"])
    await put(caching, "two", c=50)
    assert caching.stats().cached_bytes == 30
    await put(caching, "three", d=50)
    assert caching.stats().cached_bytes == 0


async def test_a_waiter_gets_bytes_that_became_cached(caching: UnitStore[Patches]) -> None:
    await put(caching, "one", a=60)
    waiting = asyncio.create_task(put(caching, "two", b=60))
    await settle()
    caching.release(["one"])
    await waiting
    assert caching.get(b"a") is None


async def test_a_unit_larger_than_the_cache_is_freed(caching: UnitStore[Patches]) -> None:
    await put(caching, "one", a=61)
    caching.release(["one"])
    assert caching.stats().byte_count == 0


async def test_integrity_check_sees_wrong_books() -> None:
    store = make_store(cache=60)
    await put(store, "one", a=20)
    store._budget._used += 1  # the damage
    with pytest.raises(AssertionError, match="21 bytes counted, but 20 in units"):
        store.check_integrity()
    store._budget._used -= 1
    store._units[b"a"].holders.clear()
    with pytest.raises(AssertionError, match="0 leases and cached=False"):
        store.check_integrity()


@pytest.mark.parametrize("cache", [0, 40])
@pytest.mark.parametrize("seed", range(10))
async def test_the_books_agree_through_random_histories(seed: int, cache: int) -> None:
    rng = random.Random(seed)
    store = make_store(cache=cache)
    names, keys = ["a", "b", "c", "d"], [bytes([i]) for i in range(8)]
    sizes = {key: rng.randint(1, 40) for key in keys}
    tasks: list[asyncio.Task[None]] = []

    async def work(lease_name: str, wanted: list[bytes]) -> None:
        with store.open(lease_name) as lease:
            reservation = await store.reserve(lease, sum(sizes[key] for key in wanted))
            try:
                await make(lease, wanted, reservation)
            finally:
                reservation.release()

    async def make(lease: Lease, wanted: list[bytes], reservation: Reservation) -> None:
        for key in wanted:
            await asyncio.sleep(0)
            store.put(key, unit(sizes[key]), reservation, [lease])

    for _ in range(300):
        match rng.randint(0, 5):
            case 0 | 1:
                wanted = rng.sample(keys, rng.randint(0, 3))
                if sum(sizes[key] for key in wanted) <= 100:
                    tasks.append(asyncio.create_task(work(rng.choice(names), wanted)))
            case 2:
                store.release([rng.choice(names)])
            case 3:
                store.renew([rng.choice(names)])
            case 4:
                clock.now += rng.uniform(0, 3)
                store.expire()
            case 5 if tasks:
                rng.choice(tasks).cancel()
        await asyncio.sleep(0)
        store.check_integrity()
        assert store.stats().byte_count <= 100
    for _ in range(len(tasks) + 5):
        clock.now += 6
        store.expire()
        await settle()
    await asyncio.gather(*tasks, return_exceptions=True)
    clock.now += 6
    store.expire()
    store.check_integrity()
    stats = store.stats()
    assert (stats.leases, stats.reserved_bytes, stats.waiting) == (0, 0, 0)
    assert stats.byte_count == stats.cached_bytes
