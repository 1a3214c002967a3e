from __future__ import annotations

import asyncio

import pytest

from actors.wire.byte_budget import ByteBudget


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_bytes_are_granted_in_order_of_arrival() -> None:
    budget = ByteBudget(10)
    await budget.take(8)
    large = asyncio.create_task(budget.take(9))
    small = asyncio.create_task(budget.take(1))
    await settle()
    assert not large.done() and not small.done() and not budget.try_take(1) and budget.waiting == 2
    assert budget.try_take(0)
    budget.give(8)
    await asyncio.gather(large, small)
    assert budget.used == 10 and budget.waiting == 0


async def test_a_cancelled_waiter_lets_the_next_one_through() -> None:
    budget = ByteBudget(10)
    await budget.take(8)
    large = asyncio.create_task(budget.take(9))
    small = asyncio.create_task(budget.take(2))
    await settle()
    large.cancel()
    await small
    assert large.cancelled() and budget.used == 10


async def test_cancellation_in_the_tick_of_the_grant_returns_it() -> None:
    budget = ByteBudget(10)
    await budget.take(10)
    waiter = asyncio.create_task(budget.take(4))
    await settle()
    budget.give(10)
    assert budget.used == 4 and budget.granting == 4
    waiter.cancel()
    await settle()
    assert waiter.cancelled() and budget.used == 0 and budget.granting == 0


async def test_what_can_be_reclaimed_is_taken_only_as_needed() -> None:
    spare = [4, 3]

    def reclaim(short: int) -> int:
        freed = 0
        while freed < short and sum(spare) + freed >= short:
            freed += spare.pop()
        return freed

    budget = ByteBudget(10, reclaim=reclaim)
    await budget.take(10)
    assert budget.try_take(2) and spare == [4] and budget.used == 9
    assert not budget.try_take(6) and spare == [4]


async def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        ByteBudget(0)
    budget = ByteBudget(3)
    with pytest.raises(ValueError, match="never fit"):
        await budget.take(4)
    with pytest.raises(ValueError, match="give back"):
        budget.give(1)
