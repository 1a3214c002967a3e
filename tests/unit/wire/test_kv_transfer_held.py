"""Transfers to a decode engine that holds the beginning of the prompt: only the rest travels."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future

import pytest
import torch

from actors.engine.scheduling.reservations import Reservation
from actors.types import SequenceKey
from tests.unit.wire.kv_engines import (
    BLOCK_SIZE,
    DecodeDouble,
    DecodeSide,
    PrefillSide,
    decode_side,
    key_of,
    prefill_side,
    same_bytes,
)

TABLE = [5, 2, 9, 0, 7]
SHARED = [20, 3, 41, 11]


def hold(prefill: PrefillSide, decode: DecodeSide, key: SequenceKey, count: int) -> None:
    """The first ``count`` blocks of the prompt are in blocks ``SHARED`` of the decode engine."""
    decode.engine.held[key] = SHARED[:count]
    for block in SHARED:
        if block in decode.engine.free:
            decode.engine.free.remove(block)
    for source, target in zip(TABLE[:count], SHARED, strict=False):
        rows = slice(target * BLOCK_SIZE, (target + 1) * BLOCK_SIZE)
        decode.cache.data[:, rows] = prefill.cache.data[:, source * BLOCK_SIZE : (source + 1) * BLOCK_SIZE]


async def goes_on(prefill: PrefillSide, decode: DecodeSide) -> None:
    """The pair serves the next sequence."""
    await prefill.send(key_of(99), decode, TABLE, [0, 18])
    await decode.engine.hears("kv_arrived", key_of(99))
    await prefill.engine.hears("transferred", key_of(99))


@pytest.mark.parametrize(
    ("tokens", "held_blocks", "inner_bounds"),
    [(18, 1, []), (18, 2, [9, 12]), (18, 4, []), (18, 4, [17]), (17, 4, []), (20, 4, []), (20, 1, [5, 6, 7])],
)
async def test_only_what_is_not_held_travels(tokens: int, held_blocks: int, inner_bounds: list[int]) -> None:
    async with decode_side() as decode, prefill_side() as prefill:
        key, held = key_of(1), held_blocks * BLOCK_SIZE
        hold(prefill, decode, key, held_blocks)
        await prefill.send(key, decode, TABLE, [held, *inner_bounds, tokens])
        assert await prefill.engine.hears("reserved", key) == ("reserved", key, held)
        assert await decode.engine.hears("kv_arrived", key) == ("kv_arrived", key, 7, False)
        await prefill.engine.hears("transferred", key)
        assert decode.engine.tables[key][:held_blocks] == SHARED[:held_blocks]
        assert same_bytes(prefill.cache.of(TABLE, tokens), decode.cache.of(decode.engine.tables[key], tokens))
        wire_bytes = prefill.geometry.chunk_bytes(tokens - held)
        assert prefill.sender.counters.sent_bytes == wire_bytes
        assert decode.receiver.counters.received_bytes == wire_bytes


async def test_shared_blocks_are_never_written() -> None:
    """Whatever arrives, rows outside a sequence's own blocks stay as they are, others' readers in them included."""
    async with decode_side() as decode, prefill_side() as prefill:
        keys = [key_of(number) for number in range(4)]
        for number, key in enumerate(keys):
            hold(prefill, decode, key, 1 + number)
        before = decode.cache.data.clone()
        await asyncio.gather(
            *(prefill.send(key, decode, TABLE, [(1 + number) * BLOCK_SIZE, 18]) for number, key in enumerate(keys))
        )
        for key in keys:
            await decode.engine.hears("kv_arrived", key)
            await prefill.engine.hears("transferred", key)
        own = {block for n, key in enumerate(keys) for block in decode.engine.tables[key][1 + n :]}
        others = [row for row in range(before.shape[1]) if row // BLOCK_SIZE not in own]
        assert same_bytes(before[:, others], decode.cache.data[:, others])
        for key in keys:
            assert same_bytes(prefill.cache.of(TABLE, 18), decode.cache.of(decode.engine.tables[key], 18))


@pytest.mark.parametrize("bounds", [[0, 18], [7, 18], [4, 18], [0, 8, 18]])
async def test_a_sender_that_sends_held_tokens_is_refused_before_any_byte(bounds: list[int]) -> None:
    async with decode_side() as decode, prefill_side() as prefill:
        key = key_of(1)
        hold(prefill, decode, key, 2)
        before = decode.cache.data.clone()
        await prefill.send(key, decode, TABLE, bounds)
        assert await decode.engine.hears("fail", key) == ("fail", key, "PROTOCOL")
        assert await prefill.engine.hears("fail", key) == ("fail", key, "PROTOCOL")
        await prefill.engine.hears("transferred", key)
        assert torch.equal(before, decode.cache.data)
        assert prefill.sender.counters.sent_bytes == 0
        await goes_on(prefill, decode)


async def test_tokens_missing_after_the_held_ones_are_noticed() -> None:
    async with decode_side() as decode, prefill_side() as prefill:
        key = key_of(1)
        hold(prefill, decode, key, 2)
        await prefill.send(key, decode, TABLE, [9, 18])
        assert await decode.engine.hears("fail", key) == ("fail", key, "PROTOCOL")
        await prefill.engine.hears("transferred", key)
        assert not decode.engine.told("kv_arrived", key)
        await goes_on(prefill, decode)


class BoastfulEngine(DecodeDouble):
    """Says that it holds so many tokens."""

    boast = 0

    def reserve(self, key: SequenceKey, token_count: int) -> Future[Reservation]:
        future: Future[Reservation] = Future()
        future.set_result(Reservation(0, TABLE, self.boast))
        return future


@pytest.mark.parametrize("held", [-4, 3, 6, 16, 20])
async def test_an_engine_cannot_hold_parts_of_blocks_or_the_whole_prompt(
    held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.unit.wire.kv_engines.DecodeDouble", BoastfulEngine)
    monkeypatch.setattr(BoastfulEngine, "boast", held)
    async with decode_side() as decode, prefill_side() as prefill:
        key = key_of(1)
        prefill.reserve(key, decode, 16)
        assert await decode.engine.hears("fail", key) == ("fail", key, "PROTOCOL")
        assert await prefill.engine.hears("fail", key) == ("fail", key, "PROTOCOL")
        await prefill.engine.hears("transferred", key)
        assert not prefill.engine.told("reserved", key)
