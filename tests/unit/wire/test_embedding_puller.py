from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import replace

import pytest
import torch

from actors.errors import InternalError, ServingError, Unavailable
from actors.types import Grid, MediaKind, MediaSpan, SequenceKey
from actors.wire.embedding_puller import PULL_TRIES, EmbeddingPuller
from actors.wire.media import MediaMiss
from tests.waiting import LIMIT_S

GRID = Grid(1, 4, 4)
UNIT_BYTES = GRID.tokens_per_unit * 8


def span(*keys: bytes, frames: int = 1, offset: int = 0, address: str = "encoder:1") -> MediaSpan:
    return MediaSpan(
        kind=MediaKind.IMAGE if frames == 1 else MediaKind.VIDEO,
        offset=offset,
        grid=Grid(frames, GRID.height, GRID.width),
        embedding_keys=keys,
        encoder_address=address,
    )


class Place:
    """An encoder that answers when told to, and an engine that records what it is given."""

    def __init__(self, window_bytes: int) -> None:
        self.gates: defaultdict[bytes, asyncio.Event] = defaultdict(asyncio.Event)
        self.pulled: list[tuple[str, bytes]] = []
        self.gone: set[tuple[str, bytes]] = set()
        self.broken: dict[bytes, Exception] = {}
        self.failed: list[tuple[SequenceKey, ServingError]] = []
        self.supplied: list[tuple[SequenceKey, int, int, bytes]] = []
        self.needs: asyncio.Queue[tuple[SequenceKey, tuple[bytes, ...]]] = asyncio.Queue()
        self.puller = EmbeddingPuller(
            self.pull,
            supply=self.supply,
            need=lambda key, keys: self.needs.put_nowait((key, keys)),
            fail=lambda key, error: self.failed.append((key, error)),
            bytes_per_token=8,
            window_bytes=window_bytes,
        )

    async def pull(self, item: MediaSpan, key: bytes, reader: SequenceKey) -> torch.Tensor:
        address = item.encoder_address
        self.pulled.append((address, key))
        await self.gates[key].wait()
        if (address, key) in self.gone:
            raise MediaMiss("not there")
        if key in self.broken:
            raise self.broken[key]
        return torch.full((GRID.tokens_per_unit, 2), float(key[0]))

    def supply(self, key: SequenceKey, media_index: int, unit_index: int, tensor: torch.Tensor) -> None:
        self.supplied.append((key, media_index, unit_index, bytes([int(tensor[0, 0])])))

    def open(self, *keys: bytes) -> None:
        for key in keys:
            self.gates[key].set()


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


A, B = SequenceKey("a", 0, 0), SequenceKey("b", 0, 0)


async def test_units_come_in_prompt_order_and_go_back_to_the_window() -> None:
    place = Place(window_bytes=2 * UNIT_BYTES)
    place.open(b"1", b"2", b"3")
    place.puller.start(A, (span(b"1"), span(b"2", b"3", frames=4, offset=9)))
    await settle()
    assert place.supplied == [(A, 0, 0, b"1"), (A, 1, 0, b"2")]
    assert place.puller.held_bytes == 2 * UNIT_BYTES
    place.puller.consumed(A, 0, 0)
    await settle()
    assert place.supplied[2:] == [(A, 1, 1, b"3")]
    place.puller.stop(A)
    place.puller.stop(A)
    assert place.puller.held_bytes == 0
    place.puller.check_integrity()


async def test_a_unit_larger_than_the_window_travels_alone() -> None:
    place = Place(window_bytes=UNIT_BYTES - 1)
    place.open(b"1", b"2")
    place.puller.start(A, (span(b"1"),))
    place.puller.start(B, (span(b"2"),))
    await settle()
    assert [key for key, *_ in place.supplied] == [A]
    place.puller.consumed(A, 0, 0)
    await settle()
    assert [key for key, *_ in place.supplied] == [A, B]


@pytest.mark.parametrize("answered", [False, True])
async def test_stopping_frees_what_is_held_in_flight_and_waited_for(answered: bool) -> None:
    place = Place(window_bytes=UNIT_BYTES)
    if answered:
        place.open(b"1")
    place.puller.start(A, (span(b"1", b"2", frames=4),))
    place.puller.start(B, (span(b"3"),))
    await settle()
    place.open(b"3")
    place.puller.stop(A)
    await settle()
    assert (B, 0, 0, b"3") in place.supplied
    place.puller.stop(B)
    assert place.puller.held_bytes == 0
    place.puller.check_integrity()


async def test_a_miss_asks_for_the_media_again_and_goes_on_elsewhere() -> None:
    place = Place(window_bytes=10 * UNIT_BYTES)
    place.open(b"1", b"2")
    place.gone.add(("encoder:1", b"2"))
    media = (span(b"1"), span(b"2", offset=9))
    place.puller.start(A, media)
    assert await asyncio.wait_for(place.needs.get(), LIMIT_S) == (A, (b"2",))
    place.puller.resupply(A, tuple(replace(item, encoder_address="encoder:2") for item in media))
    await settle()
    assert place.supplied == [(A, 0, 0, b"1"), (A, 1, 0, b"2")]
    assert place.pulled == [("encoder:1", b"1"), ("encoder:1", b"2"), ("encoder:2", b"2")]


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (Unavailable("the encoder failed", reason="STAGE_LOST"), Unavailable, "the encoder failed"),
        (RuntimeError("secret"), InternalError, "pulling embeddings failed"),
    ],
)
async def test_a_pull_that_fails_ends_its_sequence_and_no_other(
    error: Exception, kind: type[ServingError], message: str
) -> None:
    place = Place(window_bytes=10 * UNIT_BYTES)
    place.open(b"1", b"2")
    place.broken[b"1"] = error
    place.puller.start(A, (span(b"1"),))
    place.puller.start(B, (span(b"2"),))
    await settle()
    assert [(key, type(failure), failure.message) for key, failure in place.failed] == [(A, kind, message)]
    assert place.supplied == [(B, 0, 0, b"2")]
    for key in (A, B):
        place.puller.stop(key)
    place.puller.check_integrity()
    assert place.puller.held_bytes == 0


async def test_media_that_are_gone_again_and_again_end_the_sequence() -> None:
    place = Place(window_bytes=10 * UNIT_BYTES)
    place.open(b"1")
    place.gone.add(("encoder:1", b"1"))
    place.puller.start(A, (span(b"1"),))
    for _ in range(PULL_TRIES - 1):
        assert await asyncio.wait_for(place.needs.get(), LIMIT_S) == (A, (b"1",))
        place.puller.resupply(A, (span(b"1"),))
    await settle()
    assert [(key, error.reason) for key, error in place.failed] == [(A, "STAGE_LOST")]
    assert place.needs.empty()


async def test_units_inside_a_cached_prefix_are_not_pulled() -> None:
    place = Place(window_bytes=9 * UNIT_BYTES)
    place.open(b"1", b"2", b"3", b"4")
    media = (span(b"1", offset=1), span(b"2", b"3", frames=4, offset=5), span(b"4", offset=13))
    place.puller.start(A, media, 9)
    await settle()
    assert place.supplied == [(A, 1, 1, b"3"), (A, 2, 0, b"4")]
    assert place.puller.held_bytes == 2 * UNIT_BYTES
    place.puller.stop(A)
    place.puller.start(B, media, 8)
    await settle()
    assert [item[3] for item in place.supplied[2:]] == [b"2", b"3", b"4"]
    place.puller.stop(B)


async def test_a_preempted_sequence_gives_its_window_back_and_pulls_again() -> None:
    place = Place(window_bytes=UNIT_BYTES)
    place.open(b"1", b"2")
    place.puller.start(A, (span(b"1", b"2", frames=4),))
    await settle()
    place.puller.stop(A)
    assert place.puller.held_bytes == 0
    place.puller.start(A, (span(b"1", b"2", frames=4),))
    await settle()
    assert place.supplied == [(A, 0, 0, b"1")] * 2
    place.puller.consumed(A, 0, 0)
    await settle()
    assert place.supplied[2:] == [(A, 0, 1, b"2")]
    place.puller.consumed(A, 0, 1)
    assert place.puller.held_bytes == 0


async def test_what_was_consumed_from_before_a_preemption_is_not_pulled_again() -> None:
    place = Place(window_bytes=UNIT_BYTES)
    place.open(b"1", b"2", b"3")
    place.puller.start(A, (span(b"1", b"2", b"3", frames=6),))
    place.puller.consumed(A, 0, 1)
    await settle()
    place.puller.consumed(A, 0, 0)
    await settle()
    assert [item[3] for item in place.supplied] == [b"1", b"3"]
    place.puller.consumed(A, 0, 2)
    assert place.puller.held_bytes == 0
