"""Blocks with content: sharing, publishing, eviction, and the log of changes."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from actors.engine.scheduling.block_pool import BlockPool


def name(number: int) -> bytes:
    return number.to_bytes(32, "little")


def chain(*numbers: int) -> list[bytes]:
    return [name(number) for number in numbers]


def cached_chain(pool: BlockPool, *numbers: int) -> list[int]:
    """Blocks of a finished sequence whose whole blocks were published."""
    blocks = pool.allocate(len(numbers))
    for block, number in zip(blocks, numbers, strict=True):
        pool.publish(block, name(number))
    pool.release(blocks)
    return blocks


def test_a_released_block_keeps_its_content_until_it_is_allocated() -> None:
    pool = BlockPool(4)
    blocks = cached_chain(pool, 1, 2)
    assert (pool.free, pool.cached, pool.used) == (4, 2, 0)
    assert pool.lookup(chain(1, 2, 3)) == blocks
    assert (pool.free, pool.cached, pool.used) == (2, 0, 2)
    pool.check_integrity([blocks])


def test_finds_the_longest_prefix_only() -> None:
    pool = BlockPool(8)
    one, two, three = cached_chain(pool, 1, 2, 3)
    assert pool.lookup(chain(1, 9, 3)) == [one]
    assert pool.lookup(chain(9, 1, 2)) == []
    assert pool.lookup([]) == []
    assert pool.lookup(chain(1, 2, 3, 4)) == [one, two, three]
    pool.check_integrity([[one], [one, two, three]])


def test_peek_tells_what_lookup_would_take_from_the_free_blocks() -> None:
    pool = BlockPool(4)
    blocks = cached_chain(pool, 1, 2, 3)
    held = pool.lookup(chain(1))
    assert pool.peek(chain(1, 2, 3)) == (blocks, 2)
    assert pool.free == 3
    pool.check_integrity([held])


def test_blocks_in_use_are_found_and_shared() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(2)
    pool.publish(blocks[0], name(1))
    assert pool.lookup(chain(1)) == blocks[:1]
    pool.release(blocks)
    assert (pool.free, pool.cached) == (1, 0)
    pool.release(blocks[:1])
    assert (pool.free, pool.cached) == (2, 1)


def test_empty_blocks_are_handed_out_before_cached_ones() -> None:
    pool = BlockPool(4)
    cached = cached_chain(pool, 1, 2)
    blocks = pool.allocate(2)
    assert not set(blocks) & set(cached)
    assert pool.peek(chain(1, 2)).blocks == cached


def test_the_end_of_a_chain_is_evicted_before_its_beginning() -> None:
    pool = BlockPool(3)
    blocks = cached_chain(pool, 1, 2, 3)
    for left in (2, 1, 0):
        pool.allocate(1)
        assert pool.peek(chain(1, 2, 3)).blocks == blocks[:left]


def test_the_chain_unused_for_longest_is_evicted_first() -> None:
    pool = BlockPool(4)
    cached_chain(pool, 1, 2)
    cached_chain(pool, 3, 4)
    pool.release(pool.lookup(chain(1, 2)))
    pool.allocate(2)
    assert len(pool.peek(chain(1, 2)).blocks) == 2
    assert pool.peek(chain(3, 4)).blocks == []


def test_a_second_block_of_the_same_content_stays_without_a_name() -> None:
    pool = BlockPool(4)
    first, second = pool.allocate(2)
    pool.publish(first, name(1))
    pool.publish(first, name(1))
    pool.publish(second, name(1))
    pool.release([second])
    assert pool.cached == 0
    assert pool.lookup(chain(1)) == [first]
    assert pool.take_changes() == (tuple(chain(1)), ())
    pool.check_integrity([[first], [first]])


def test_refuses_wrong_names() -> None:
    pool = BlockPool(2)
    with pytest.raises(ValueError, match="free and cannot be published"):
        pool.publish(0, name(1))
    (block,) = pool.allocate(1)
    pool.publish(block, name(1))
    with pytest.raises(ValueError, match="another content"):
        pool.publish(block, name(2))


def test_changes_are_told_once_and_net() -> None:
    pool = BlockPool(2)
    cached_chain(pool, 1, 2)
    assert pool.take_changes() == (tuple(chain(1, 2)), ())
    assert pool.take_changes() == ((), ())
    cached_chain(pool, 3)
    assert pool.take_changes() == (tuple(chain(3)), tuple(chain(2)))
    # Evicted and computed again, and computed and evicted again, between two reports.
    pool.release(pool.allocate(2))
    cached_chain(pool, 1, 3)
    pool.release(pool.allocate(2))
    cached_chain(pool, 4)
    pool.release(pool.allocate(2))
    assert pool.take_changes() == ((), tuple(chain(3, 1)))


@pytest.mark.parametrize("damage", ["name", "lost", "log"])
def test_integrity_finds_damaged_content(damage: str) -> None:
    pool = BlockPool(3)
    cached_chain(pool, 1, 2)
    pool.check_integrity([])
    if damage == "name":
        pool._hashes[0] = name(2)
    elif damage == "lost":
        del pool._cached[0]
    else:
        pool._removed[name(1)] = None
    with pytest.raises(AssertionError):
        pool.check_integrity([])


class PoolAgainstModel(RuleBasedStateMachine):
    """The model keeps everything in plain lists and searches them.

    ``told`` is what somebody knows who only ever hears of changes.
    """

    @initialize(total=st.integers(1, 9))
    def begin(self, total: int) -> None:
        self.pool = BlockPool(total)
        self.total = total
        self.holders: list[list[int]] = []
        self.content: list[tuple[int, bytes]] = []
        self.idle: list[int] = []
        self.told: set[bytes] = set()

    def references(self, block: int) -> int:
        return sum(blocks.count(block) for blocks in self.holders)

    def named(self, block: int) -> bytes | None:
        return dict(self.content).get(block)

    def empty(self) -> list[int]:
        return [block for block in range(self.total) if not self.references(block) and block not in self.idle]

    @rule(count=st.integers(0, 4))
    def allocate(self, count: int) -> None:
        empty = self.empty()
        if count > len(empty) + len(self.idle):
            with pytest.raises(ValueError, match="free"):
                self.pool.allocate(count)
            return
        blocks = self.pool.allocate(count)
        evicted = self.idle[: max(0, count - len(empty))]
        assert len(blocks) == count == len(set(blocks))
        assert set(blocks) <= set(empty) | set(evicted) and set(evicted) <= set(blocks)
        self.content = [(block, hash) for block, hash in self.content if block not in evicted]
        self.idle = self.idle[len(evicted) :]
        if blocks:
            self.holders.append(blocks)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted({block for blocks in self.holders for block in blocks})))
        hash = name(data.draw(st.integers(0, 7)))
        if self.named(block) not in (None, hash):
            with pytest.raises(ValueError, match="another content"):
                self.pool.publish(block, hash)
            return
        self.pool.publish(block, hash)
        if all(other != hash for _, other in self.content):
            self.content.append((block, hash))

    @rule(numbers=st.lists(st.integers(0, 7), max_size=5))
    def lookup(self, numbers: list[int]) -> None:
        expected: list[int] = []
        for number in numbers:
            found = [block for block, hash in self.content if hash == name(number)]
            if not found:
                break
            expected += found
        match = self.pool.peek(chain(*numbers))
        assert match == (expected, sum(not self.references(block) for block in expected))
        assert self.pool.lookup(chain(*numbers)) == expected
        self.idle = [block for block in self.idle if block not in expected]
        if expected:
            self.holders.append(expected)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        blocks = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        self.pool.release(blocks)
        gone = dict.fromkeys(block for block in reversed(blocks) if not self.references(block))
        # A chain may name a block twice here: its last reference goes with its first place.
        order = sorted(gone, key=lambda block: -blocks.index(block))
        self.idle += [block for block in order if self.named(block) is not None]

    @rule()
    def hear(self) -> None:
        stored, removed = self.pool.take_changes()
        assert not set(stored) & set(removed)
        assert not set(stored) & self.told and set(removed) <= self.told
        self.told = self.told - set(removed) | set(stored)
        assert self.told == {hash for _, hash in self.content}

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check_integrity(self.holders)
        assert self.pool.free == len(self.empty()) + len(self.idle)
        assert self.pool.cached == len(self.idle)
        assert self.pool.used == self.total - self.pool.free

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for blocks in self.holders:
                self.pool.release(blocks)
            self.pool.check_integrity([])
            assert self.pool.free == self.total


PoolAgainstModel.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestPoolAgainstModel = PoolAgainstModel.TestCase
