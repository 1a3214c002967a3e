"""A sequence that either side gives up, at every stage: its blocks are let alone and the pair goes on."""

from __future__ import annotations

import asyncio

import pytest
import torch

from actors.types import SequenceKey
from tests.unit.wire.kv_engines import (
    DecodeSide,
    Gate,
    HeldRecv,
    PrefillSide,
    decode_side,
    key_of,
    prefill_side,
    same_bytes,
)

KEY = key_of(1)
TABLE = [4, 5]
BOUNDS = [0, 4, 8]


async def assert_pair_goes_on(prefill: PrefillSide, decode: DecodeSide) -> None:
    """The same generation still carries another sequence: both ends completed what they had promised."""
    decode.engine.wait_for_submit = False
    key = SequenceKey("after", 0, 0)
    await prefill.send(key, decode, [9, 8], BOUNDS)
    await decode.engine.hears("kv_arrived", key)
    await prefill.engine.hears("transferred", key)
    assert same_bytes(prefill.cache.of([9, 8], 8), decode.cache.of(decode.engine.tables[key], 8))
    assert decode.receiver.counters.generations == 1
    assert prefill.sender.counters.generations == 1


async def assert_sender_gave_up(prefill: PrefillSide, decode: DecodeSide) -> None:
    assert await decode.engine.hears("fail", KEY) == ("fail", KEY, "PEER_CANCELLED")
    await prefill.engine.hears("transferred", KEY)
    assert not decode.engine.told("kv_arrived", KEY)
    assert not prefill.engine.told("fail", KEY)


async def assert_receiver_gave_up(prefill: PrefillSide, decode: DecodeSide) -> None:
    assert await prefill.engine.hears("fail", KEY) == ("fail", KEY, "PEER_CANCELLED")
    await prefill.engine.hears("transferred", KEY)
    assert prefill.engine.events.index(("fail", KEY, "PEER_CANCELLED")) < prefill.engine.events.index(
        ("transferred", KEY)
    )
    assert not decode.engine.told("kv_arrived", KEY)
    assert not decode.engine.told("fail", KEY)


async def reserve(prefill: PrefillSide, decode: DecodeSide) -> None:
    prefill.reserve(KEY, decode, BOUNDS[-1])
    await prefill.engine.hears("reserved", KEY)


@pytest.mark.parametrize("side", ["prefill", "decode"])
async def test_while_the_reservation_waits(side: str) -> None:
    async with decode_side() as decode, prefill_side() as prefill:
        decode.engine.wait_for_submit = True
        prefill.reserve(KEY, decode, BOUNDS[-1])
        await decode.engine.hears("reserve", KEY)
        if side == "prefill":
            prefill.sender.cancel(KEY)
            await assert_sender_gave_up(prefill, decode)
        else:
            decode.receiver.drop(KEY)
            await assert_receiver_gave_up(prefill, decode)
        decode.engine.submit(KEY)
        await assert_pair_goes_on(prefill, decode)
        assert decode.engine.told("fail", KEY), "blocks granted too late must be freed"


@pytest.mark.parametrize("side", ["prefill", "decode"])
async def test_before_the_first_chunk(side: str) -> None:
    async with decode_side() as decode, prefill_side() as prefill:
        await reserve(prefill, decode)
        if side == "prefill":
            prefill.sender.cancel(KEY)
            await assert_sender_gave_up(prefill, decode)
        else:
            decode.receiver.drop(KEY)
            await assert_receiver_gave_up(prefill, decode)
        prefill.push(KEY, TABLE, BOUNDS)
        await assert_pair_goes_on(prefill, decode)
        assert not decode.cache.of(decode.engine.tables[KEY], 8).any()


@pytest.mark.parametrize("side", ["prefill", "decode"])
async def test_between_chunks(side: str) -> None:
    async with decode_side() as decode, prefill_side() as prefill:
        await reserve(prefill, decode)
        prefill.push(KEY, TABLE, BOUNDS, only=0)
        other = key_of(2)
        await prefill.send(other, decode, [1], [0, 4])
        await prefill.engine.hears("transferred", other)
        if side == "prefill":
            prefill.sender.cancel(KEY)
            await assert_sender_gave_up(prefill, decode)
        else:
            decode.receiver.drop(KEY)
            await assert_receiver_gave_up(prefill, decode)
        await assert_pair_goes_on(prefill, decode)


@pytest.mark.parametrize("side", ["prefill", "decode"])
async def test_while_a_chunk_is_on_the_wire(side: str) -> None:
    gate = Gate()
    async with (
        decode_side(wrap=lambda transport, _name: HeldRecv(transport, gate)) as decode,
        prefill_side() as prefill,
    ):
        await reserve(prefill, decode)
        prefill.push(KEY, TABLE, BOUNDS)
        await gate.reached()
        if side == "prefill":
            prefill.sender.cancel(KEY)
            await assert_sender_gave_up(prefill, decode)
        else:
            decode.receiver.drop(KEY)
            await assert_receiver_gave_up(prefill, decode)
        gate.open()
        await assert_pair_goes_on(prefill, decode)
        assert not decode.cache.of(decode.engine.tables[KEY], 8).any(), "a cancelled chunk is not scattered"


async def test_while_the_sender_gathers() -> None:
    """The rest of the list goes out unread: blocks may be used again as soon as the engine hears ``transferred``."""
    gate = Gate()
    async with decode_side() as decode, prefill_side() as prefill:
        reads = []

        def before_read() -> None:
            reads.append(prefill.engine.told("transferred", KEY))
            if len(reads) == 1:
                gate.pass_through()

        prefill.cache.before_read = before_read
        await reserve(prefill, decode)
        prefill.push(KEY, TABLE, BOUNDS)
        await gate.reached()
        prefill.sender.cancel(KEY)
        asyncio.get_running_loop().run_in_executor(None, gate.open)
        await assert_sender_gave_up(prefill, decode)
        assert not any(reads), "a layer was read after transferred"
        await assert_pair_goes_on(prefill, decode)
        assert not decode.cache.of(decode.engine.tables[KEY], 8).any()


async def test_while_the_receiver_scatters() -> None:
    gate = Gate()
    async with decode_side() as decode, prefill_side() as prefill:
        dropped = False
        late_writes = 0

        def before_write() -> None:
            nonlocal late_writes
            late_writes += dropped
            gate.pass_through()

        decode.cache.before_write = before_write
        await reserve(prefill, decode)
        prefill.push(KEY, TABLE, BOUNDS)
        await gate.reached()
        dropping = asyncio.create_task(asyncio.to_thread(decode.receiver.drop, KEY))
        await asyncio.sleep(0.05)
        assert not dropping.done(), "drop returned while a layer was being written"
        gate.open()
        await dropping
        dropped = True
        written = decode.cache.of(decode.engine.tables[KEY], 8).clone()
        await assert_receiver_gave_up(prefill, decode)
        assert late_writes == 0
        decode.cache.before_write = lambda: None
        await assert_pair_goes_on(prefill, decode)
        assert torch.equal(written, decode.cache.of(decode.engine.tables[KEY], 8))


async def test_unknown_keys_are_transferred_at_once() -> None:
    async with prefill_side() as prefill:
        prefill.sender.cancel(KEY)
        await prefill.engine.hears("transferred", KEY)


async def test_chunks_of_unknown_keys_are_dropped() -> None:
    async with prefill_side() as prefill:
        prefill.push(KEY, TABLE, BOUNDS)
        prefill.sender.cancel(KEY)
        await prefill.engine.hears("transferred", KEY)
        assert not prefill.engine.told("fail", KEY)


async def test_closing_the_sender_ends_everything() -> None:
    async with decode_side() as decode, prefill_side() as prefill:
        await reserve(prefill, decode)
        await prefill.sender.close()
        assert prefill.engine.told("fail", KEY) == [("fail", KEY, "DRAINING")]
        assert prefill.engine.told("transferred", KEY)
        assert (await decode.engine.hears("fail", KEY))[2] == "ENGINE_LOST"
        prefill.reserve(key_of(2), decode, 4)
        assert (await prefill.engine.hears("fail", key_of(2)))[2] == "DRAINING"
        await prefill.engine.hears("transferred", key_of(2))


async def test_closing_the_receiver_ends_everything() -> None:
    async with decode_side() as decode, prefill_side() as prefill:
        await reserve(prefill, decode)
        await decode.receiver.close()
        assert decode.engine.told("fail", KEY)
        assert (await prefill.engine.hears("fail", KEY))[2] == "ENGINE_LOST"
        await prefill.engine.hears("transferred", KEY)
        prefill.reserve(key_of(2), decode, 4)
        assert (await prefill.engine.hears("fail", key_of(2)))[2] == "DRAINING"
