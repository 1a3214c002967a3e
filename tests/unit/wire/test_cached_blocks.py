from __future__ import annotations

import random

import pytest

from actors.wire import cached_blocks
from actors.wire.cached_blocks import CachedBlocksFeed, apply_cached_blocks


def names(*numbers: int) -> list[bytes]:
    return [number.to_bytes(32, "little") for number in numbers]


def test_changes_are_net() -> None:
    feed = CachedBlocksFeed()
    feed.note(names(1, 2), [])
    feed.note(names(3), names(1))
    (stored,) = feed.take_changes()
    assert (set(stored.stored_hashes), list(stored.removed_hashes)) == (set(names(2, 3)), [])
    feed.note([], names(2))
    feed.note(names(2), [])
    assert list(feed.take_changes()) == []
    feed.note([], names(2, 9))
    (removed,) = feed.take_changes()
    assert (list(removed.stored_hashes), list(removed.removed_hashes)) == ([], names(2))
    assert not removed.snapshot


def test_a_snapshot_comes_after_the_changes_before_it() -> None:
    feed = CachedBlocksFeed()
    assert [message.snapshot for message in feed.snapshot()] == [True]
    feed.note(names(1), [])
    with pytest.raises(ValueError, match="told first"):
        list(feed.snapshot())


def test_messages_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cached_blocks, "HASHES_PER_MESSAGE", 4)
    feed = CachedBlocksFeed()
    feed.note(names(*range(10)), [])
    assert [len(message.stored_hashes) for message in feed.take_changes()] == [4, 4, 2]
    snapshot = list(feed.snapshot())
    assert [(message.snapshot, len(message.stored_hashes)) for message in snapshot] == [
        (True, 4),
        (False, 4),
        (False, 2),
    ]
    known = set(names(77))
    for message in snapshot:
        apply_cached_blocks(known, message)
    assert known == set(names(*range(10)))
    feed.note([], names(*range(9)))
    assert [len(message.removed_hashes) for message in feed.take_changes()] == [4, 4, 1]


def test_every_listener_knows_what_is_there_whenever_it_came() -> None:
    rng = random.Random(0)
    feed = CachedBlocksFeed()
    present: set[bytes] = set()
    listeners: list[set[bytes]] = []
    for _ in range(400):
        if rng.random() < 0.7:
            stored, removed = names(*rng.sample(range(12), 3)), names(*rng.sample(range(12), 3))
            stored = [name for name in stored if name not in removed]
            feed.note(stored, removed)
            present = present - set(removed) | set(stored)
            continue
        for message in feed.take_changes():
            for known in listeners:
                apply_cached_blocks(known, message)
        if rng.random() < 0.2:
            listeners.append(set())
            for message in feed.snapshot():
                apply_cached_blocks(listeners[-1], message)
        assert all(known == present for known in listeners)
    assert len(listeners) > 5
