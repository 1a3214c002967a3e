"""Transfers that go well, and reservations that do not."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace

import pytest
import torch

from actors.engine.events import ComputedChunk
from actors.engine.plan import LayerPart
from actors.parallel.kv_transfer import KvTransferConfig
from actors.reports import KvIdentity
from tests.unit.wire.kv_engines import (
    IDENTITY,
    Gate,
    HeldRecv,
    decode_side,
    geometry_of,
    key_of,
    prefill_side,
    same_bytes,
)
from tests.waiting import eventually


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
async def test_chunks_arrive_byte_for_byte(dtype: torch.dtype, parts: int) -> None:
    """Of all layers, and part after part of them."""
    geometry = geometry_of(dtype)
    async with decode_side(geometry=geometry) as decode, prefill_side(geometry=geometry) as prefill:
        key, table = key_of(1), [5, 2, 9, 0, 7]
        await prefill.send(key, decode, table, [0, 7, 8, 18], parts)
        assert await decode.engine.hears("kv_arrived", key) == ("kv_arrived", key, 7, False)
        await prefill.engine.hears("transferred", key)
        assert same_bytes(prefill.cache.of(table, 18), decode.cache.of(decode.engine.tables[key], 18))
        wire_bytes = 18 * geometry.num_layers * 2 * geometry.num_kv_heads * geometry.head_dim * dtype.itemsize
        assert prefill.sender.counters.sent_bytes == wire_bytes
        assert decode.receiver.counters.received_bytes == wire_bytes
        assert prefill.sender.counters.resent_bytes == 0
        assert prefill.sender.counters.generations == decode.receiver.counters.generations == 1
        assert prefill.sender.counters.chunks == decode.receiver.counters.chunks == 3 * parts
        assert prefill.busy[key] > 0 and decode.busy[key] > 0


async def test_layers_that_never_came_are_missed() -> None:
    async with decode_side() as decode, prefill_side() as prefill:
        key = key_of(1)
        prefill.reserve(key, decode, 4)
        await prefill.engine.hears("reserved", key)
        prefill.sender.push(
            ComputedChunk(
                key=key,
                rank=0,
                index=0,
                first_token=0,
                token_count=4,
                part=LayerPart(0, 3),
                block_table=(1,),
                last=True,
                first_output_id=7,
            )
        )
        assert (await decode.engine.hears("fail", key))[2] == "PROTOCOL"
        await prefill.engine.hears("transferred", key)
        assert not decode.engine.told("kv_arrived", key)


async def test_reservation_says_what_is_held() -> None:
    async with decode_side() as decode, prefill_side() as prefill:
        prefill.reserve(key_of(1), decode, 9)
        assert await prefill.engine.hears("reserved", key_of(1)) == ("reserved", key_of(1), 0)
        assert decode.engine.told("reserve", key_of(1)) == [("reserve", key_of(1), 9)]
        prefill.sender.cancel(key_of(1))
        await decode.engine.hears("fail", key_of(1))


async def test_interleaved_sequences_keep_apart() -> None:
    async with decode_side() as decode, prefill_side() as prefill:
        bounds = [0, 5, 9, 12]
        tables = {key_of(n): [3 * n, 3 * n + 1, 3 * n + 2] for n in range(5)}
        for key in tables:
            prefill.reserve(key, decode, bounds[-1])
        for key in tables:
            await prefill.engine.hears("reserved", key)
        for chunk in range(3):
            for key, table in tables.items():
                prefill.push(key, table, bounds, only=chunk)
        for key, table in tables.items():
            await decode.engine.hears("kv_arrived", key)
            await prefill.engine.hears("transferred", key)
            assert same_bytes(prefill.cache.of(table, 12), decode.cache.of(decode.engine.tables[key], 12))
        assert prefill.sender.pair_count == decode.receiver.pair_count == 1
        assert decode.receiver.counters.generations == 1


async def test_token_zero_that_ends_the_reply_is_told() -> None:
    async with decode_side() as decode, prefill_side() as prefill:
        key = key_of(1)
        prefill.reserve(key, decode, 3)
        await prefill.engine.hears("reserved", key)
        prefill.sender.push(
            ComputedChunk(
                key=key,
                rank=0,
                index=0,
                first_token=0,
                token_count=3,
                block_table=(1,),
                last=True,
                first_output_id=2,
                finished=True,
            )
        )
        assert await decode.engine.hears("kv_arrived", key) == ("kv_arrived", key, 2, True)
        await prefill.engine.hears("transferred", key)


async def test_transferred_waits_for_the_last_chunk() -> None:
    async with decode_side() as decode, prefill_side() as prefill:
        key = key_of(1)
        prefill.reserve(key, decode, 8)
        await prefill.engine.hears("reserved", key)
        prefill.push(key, [1, 2], [0, 4, 8], only=0)
        other = key_of(2)
        await prefill.send(other, decode, [3], [0, 4])
        await prefill.engine.hears("transferred", other)
        assert not prefill.engine.told("transferred", key) and not decode.engine.told("kv_arrived", key)
        prefill.push(key, [1, 2], [0, 4, 8], only=1)
        await prefill.engine.hears("transferred", key)


async def test_no_blocks_is_refused_and_others_go_on() -> None:
    async with decode_side() as decode, prefill_side() as prefill:
        prefill.reserve(key_of(1), decode, 100_000)
        assert await prefill.engine.hears("refused", key_of(1)) == ("refused", key_of(1), "NO_BLOCKS")
        await prefill.send(key_of(2), decode, [1], [0, 4])
        await decode.engine.hears("kv_arrived", key_of(2))
        await prefill.engine.hears("transferred", key_of(2))
        assert not prefill.engine.told("transferred", key_of(1))


@pytest.mark.parametrize(
    "other",
    [
        KvIdentity(fingerprint="f1", dtype="float32", block_size=4, switches=IDENTITY.switches),
        KvIdentity(fingerprint="f0", dtype="bfloat16", block_size=4, switches=IDENTITY.switches),
        KvIdentity(fingerprint="f0", dtype="float32", block_size=16, switches=IDENTITY.switches),
        KvIdentity(fingerprint="f0", dtype="float32", block_size=4, switches="routing=delimiters"),
    ],
)
async def test_another_layout_is_refused(other: KvIdentity) -> None:
    async with decode_side() as decode, prefill_side() as prefill:
        prefill.reserve(key_of(1), decode, 4, identity=other)
        assert await prefill.engine.hears("refused", key_of(1)) == ("refused", key_of(1), "LAYOUT_MISMATCH")
        assert not decode.engine.events


async def test_a_key_is_reserved_once() -> None:
    async with (
        decode_side() as decode,
        prefill_side() as prefill,
        prefill_side(name="prefill-2") as zombie,
    ):
        prefill.reserve(key_of(1), decode, 4)
        await prefill.engine.hears("reserved", key_of(1))
        zombie.reserve(key_of(1), decode, 4)
        assert await zombie.engine.hears("refused", key_of(1)) == ("refused", key_of(1), "DUPLICATE")
        prefill.push(key_of(1), [1], [0, 4])
        await prefill.engine.hears("transferred", key_of(1))


async def test_reserve_that_overtakes_its_submit_waits() -> None:
    async with decode_side() as decode, prefill_side() as prefill:
        decode.engine.wait_for_submit = True
        key = key_of(1)
        prefill.reserve(key, decode, 4)
        await decode.engine.hears("reserve", key)
        assert not prefill.engine.events
        submit = threading.Thread(target=decode.engine.submit, args=(key,))
        submit.start()
        await prefill.engine.hears("reserved", key)
        submit.join()
        prefill.push(key, [1], [0, 4])
        await prefill.engine.hears("transferred", key)


async def test_idle_pairs_make_room() -> None:
    config = KvTransferConfig(pair_limit=2, heartbeat_s=0.2)
    async with (
        decode_side(name="d1") as one,
        decode_side(name="d2") as two,
        decode_side(name="d3") as three,
        prefill_side(config=config) as prefill,
    ):
        prefill.reserve(key_of(1), one, 8)
        await prefill.engine.hears("reserved", key_of(1))
        for number, peer in enumerate([two, three, two], start=2):
            await prefill.send(key_of(number), peer, [number], [0, 4])
            await prefill.engine.hears("transferred", key_of(number))
            assert prefill.sender.pair_count == 2
        prefill.push(key_of(1), [8, 9], [0, 4, 8])
        await prefill.engine.hears("transferred", key_of(1))
        assert not prefill.engine.told("fail", key_of(1))


async def test_threads_end_with_their_sides() -> None:
    before = threading.active_count()
    async with decode_side() as decode, prefill_side() as prefill:
        await prefill.send(key_of(1), decode, [1], [0, 4])
        await prefill.engine.hears("transferred", key_of(1))
    await eventually(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("kv-")])
    assert threading.active_count() <= before + 1


@pytest.mark.parametrize("finished", [False, True])
async def test_token_zero_may_follow_the_last_tokens(finished: bool) -> None:
    """It is said at once, whatever is still on its way; both ends are done when all of it is there."""
    gate = Gate()
    async with decode_side(wrap=lambda transport, _: HeldRecv(transport, gate)) as decode, prefill_side() as prefill:
        key = key_of(1)
        prefill.reserve(key, decode, 8)
        await prefill.engine.hears("reserved", key)
        tokens = ComputedChunk(
            key=key, rank=0, index=0, first_token=0, token_count=8, block_table=(1, 2), last=False, first_output_id=None
        )
        prefill.sender.push(tokens)
        await gate.reached()
        end = replace(tokens, index=1, first_token=8, token_count=0, last=True, first_output_id=7, finished=finished)
        prefill.sender.push(end)
        await asyncio.sleep(0.05)
        assert not decode.engine.told("kv_arrived", key) and not prefill.engine.told("transferred", key)
        gate.open()
        assert await decode.engine.hears("kv_arrived", key) == ("kv_arrived", key, 7, finished)
        await prefill.engine.hears("transferred", key)
        assert same_bytes(decode.cache.of(decode.engine.tables[key], 8), prefill.cache.of([1, 2], 8))
        size = prefill.geometry.chunk_bytes(8)
        assert prefill.sender.counters.sent_bytes == decode.receiver.counters.received_bytes == size


async def test_an_end_without_all_tokens_is_noticed() -> None:
    async with decode_side() as decode, prefill_side() as prefill:
        key = key_of(1)
        prefill.reserve(key, decode, 8)
        await prefill.engine.hears("reserved", key)
        prefill.sender.push(
            ComputedChunk(
                key=key, rank=0, index=0, first_token=8, token_count=0, block_table=(1, 2), last=True, first_output_id=7
            )
        )
        assert await decode.engine.hears("fail", key) == ("fail", key, "PROTOCOL")
        await prefill.engine.hears("transferred", key)
