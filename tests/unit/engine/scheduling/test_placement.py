"""Which rank a sequence goes to."""

from __future__ import annotations

import random

import pytest

from actors.engine.scheduling.block_pool import Changes
from actors.engine.scheduling.findable import FindableBlocks
from actors.engine.scheduling.placement import HELD_TOKENS, SEQUENCE_TOKENS, RankView, choose_rank


def view(
    room: int | None = 100,
    *,
    needed: int = 10,
    uncached: int = 100,
    queued: int = 0,
    active: int = 0,
    held: int = 0,
    sibling: bool = False,
) -> RankView:
    return RankView(room, needed, uncached, queued, active, held, sibling)


@pytest.mark.parametrize(
    ("views", "chosen"),
    [
        ([view()], 0),
        ([view(), view()], 0),
        ([view(9), view(10), view(11)], 2),
        ([view(9), view(None)], None),
        ([view(None), view(10)], 1),
        ([view(queued=1), view()], 1),
        ([view(active=1), view(queued=SEQUENCE_TOKENS - 1), view(queued=SEQUENCE_TOKENS + 1)], 1),
        ([view(held=HELD_TOKENS), view(held=HELD_TOKENS - 1)], 1),
        # A prefix on hand is worth its tokens, no more: work elsewhere weighs as much.
        ([view(), view(uncached=20, needed=3)], 1),
        ([view(), view(uncached=20, needed=3, queued=79)], 1),
        ([view(), view(uncached=20, needed=3, queued=81)], 0),
        ([view(5), view(5, needed=5, uncached=60)], 1),
        # Choices share their prompt where it is, while there is room.
        ([view(), view(queued=5000, active=30, sibling=True)], 1),
        ([view(), view(9, sibling=True)], 0),
        ([view(), view(None, sibling=True)], 0),
        ([view(sibling=True, queued=9), view(sibling=True)], 1),
    ],
)
def test_choice(views: list[RankView], chosen: int | None) -> None:
    assert choose_rank(views) == chosen


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("seed", range(5))
def test_work_differs_by_at_most_one_sequence(ranks: int, seed: int) -> None:
    """Whatever comes in whatever order, while there is room everywhere."""
    draw = random.Random(seed)
    queued, active, held = [0] * ranks, [0] * ranks, [0] * ranks
    largest = 0
    for _ in range(300):
        length = draw.choice([1, 10, 100, 3000])
        ranked = list(zip(queued, active, held, strict=True))
        views = [view(10**6, uncached=length, queued=q, active=a, held=h) for q, a, h in ranked]
        rank = choose_rank(views)
        assert rank is not None
        queued[rank] += length
        active[rank] += 1
        held[rank] += length
        largest = max(largest, length + SEQUENCE_TOKENS + length // HELD_TOKENS + 1)
        ranked = list(zip(queued, active, held, strict=True))
        work = [view(uncached=0, queued=q, active=a, held=h).work for q, a, h in ranked]
        assert max(work) - min(work) <= largest


def test_a_block_is_findable_while_some_rank_has_it() -> None:
    findable = FindableBlocks()

    def names(text: bytes) -> tuple[bytes, ...]:
        return tuple(bytes([letter]) for letter in text)

    def change(*changes: tuple[bytes, bytes]) -> tuple[set[bytes], set[bytes]]:
        pools = [Changes(names(stored), names(removed)) for stored, removed in changes]
        stored, removed = findable.update(pools)
        return set(stored), set(removed)

    assert change((b"ab", b""), (b"a", b"")) == ({b"a", b"b"}, set())
    assert change((b"", b"a"), (b"b", b"")) == (set(), set())
    assert change((b"", b"b"), (b"", b"a")) == (set(), {b"a"})
    assert change((b"a", b""), (b"", b"b")) == ({b"a"}, {b"b"})
    assert change((b"", b"a"), (b"a", b"")) == (set(), set())
    assert change((b"", b""), (b"", b"a")) == (set(), {b"a"})
    assert not findable._ranks
