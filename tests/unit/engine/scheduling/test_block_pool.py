from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.engine.scheduling.block_pool import BlockPool


def test_allocates_low_numbers_first_and_reuses() -> None:
    pool = BlockPool(4)
    assert pool.allocate(3) == [0, 1, 2]
    pool.release([0, 1])
    assert (pool.free, pool.used) == (3, 1)
    assert pool.allocate(2) == [0, 1]
    pool.check_integrity([[0, 1], [2]])


def test_refuses_what_is_not_there() -> None:
    pool = BlockPool(2)
    with pytest.raises(ValueError, match="3 blocks asked, 2 free"):
        pool.allocate(3)
    assert pool.free == 2
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(ValueError, match="released twice"):
        pool.release(blocks)
    with pytest.raises(ValueError, match="needs blocks"):
        BlockPool(0)


def test_a_shared_block_is_free_after_the_last_reference() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.publish(blocks[0], b"name")
    assert pool.lookup([b"name"]) == blocks
    pool.release(blocks)
    pool.check_integrity([blocks])
    assert pool.free == 1
    pool.release(blocks)
    assert pool.free == 2


@pytest.mark.parametrize("holders", [[], [[0], [0]], [[0, 1]]])
def test_integrity_finds_wrong_holders(holders: list[list[int]]) -> None:
    pool = BlockPool(3)
    pool.allocate(1)
    with pytest.raises(AssertionError):
        pool.check_integrity(holders)


@given(st.lists(st.tuples(st.sampled_from(["allocate", "release"]), st.integers(0, 5)), max_size=60))
def test_random_histories_keep_count(steps: list[tuple[str, int]]) -> None:
    pool = BlockPool(8)
    held: list[list[int]] = []
    for action, number in steps:
        if action == "allocate" and number <= pool.free and number:
            held.append(pool.allocate(number))
        elif held and action == "release":
            pool.release(held.pop(number % len(held)))
        pool.check_integrity(held)
    for blocks in held:
        pool.release(blocks)
    assert pool.free == pool.total


def test_blocks_that_go_are_forgotten_and_new_ones_are_empty() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(4)
    for block in blocks[:3]:
        pool.publish(block, bytes([block]))
    pool.take_changes()
    pool.release(blocks[1:])
    pool.resize(2)
    pool.check_integrity([[0]])
    assert (pool.total, pool.free, pool.cached) == (2, 1, 1)
    assert pool.take_changes() == ((), (b"\x02",))
    with pytest.raises(ValueError, match="cannot have 0 blocks: block 0 is used"):
        pool.resize(0)
    pool.resize(5)
    pool.check_integrity([[0]])
    assert pool.free == 4 and pool.lookup([b"\x00", b"\x01"]) == [0, 1]
    assert pool.allocate(3) == [2, 3, 4]
    pool.check_integrity([[0], [0, 1], [2, 3, 4]])
