"""Many sequences, both sides giving up, bytes flipping, data paths breaking: every key ends once, nothing is kept."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import pytest
from torch import Tensor

from actors.parallel.kv_transfer import Transport, TransportError
from actors.types import SequenceKey
from tests.unit.wire.kv_engines import (
    CONFIG,
    DecodeSide,
    PrefillSide,
    Through,
    decode_side,
    key_of,
    prefill_side,
    same_bytes,
)

SEQUENCES = 30
BOUNDS = [0, 3, 7, 8]


class Unreliable(Through):
    def __init__(self, inner: Transport, chance: random.Random) -> None:
        super().__init__(inner)
        self.chance = chance

    def send(self, tensors: Iterable[Tensor]) -> None:
        if self.chance.random() < 0.05:
            raise TransportError("cut")
        self.inner.send(tensors)

    def recv(self, buffers: Sequence[Tensor], arrived: Callable[[int], None]) -> None:
        def flipping(position: int) -> None:
            if self.chance.random() < 0.05:
                buffers[position][0] ^= 1
            arrived(position)

        self.inner.recv(buffers, flipping)
        if self.chance.random() < 0.05:
            raise TransportError("cut")


@pytest.mark.parametrize("seed", range(3))
async def test_every_key_ends_once(seed: int) -> None:
    chance = random.Random(seed)
    config = replace(CONFIG, resend_limit=1, break_limit=6)

    def unreliable(transport: Transport, _name: str) -> Transport:
        return Unreliable(transport, random.Random(chance.random()))

    async with (
        decode_side(wrap=unreliable, config=config) as decode,
        prefill_side(wrap=unreliable, config=config) as prefill,
    ):
        tables = {key_of(n): [n, 63 - n] for n in range(SEQUENCES)}
        for key in tables:
            prefill.reserve(key, decode, BOUNDS[-1])
        for key in tables:
            await prefill.engine.hears("reserved", key)
        cancelled, dropped = set(), set()
        for key in tables:
            for index in range(len(BOUNDS) - 1):
                prefill.push(key, tables[key], BOUNDS, only=index)
                victim = key_of(chance.randrange(SEQUENCES))
                if chance.random() < 0.05:
                    cancelled.add(victim)
                    prefill.sender.cancel(victim)
                elif chance.random() < 0.05:
                    dropped.add(victim)
                    decode.receiver.drop(victim)
                if chance.random() < 0.3:
                    await asyncio.sleep(0)
        for key in tables:
            await prefill.engine.hears("transferred", key)
        await flush(prefill, decode)

        arrived = 0
        for key, table in tables.items():
            ends = [e[0] for e in decode.engine.events if e[0] in ("kv_arrived", "fail") and e[1] == key]
            assert len(ends) == 1 or (key in dropped and not ends)
            assert len(prefill.engine.told("fail", key)) <= 1
            assert key in cancelled or len(prefill.engine.told("transferred", key)) == 1
            if ends == ["kv_arrived"]:
                arrived += 1
                assert same_bytes(prefill.cache.of(table, 8), decode.cache.of(decode.engine.tables[key], 8))
        assert arrived
        assert prefill.sender.counters.resent_bytes > 0
        assert prefill.sender.counters.generations > 1


async def flush(prefill: PrefillSide, decode: DecodeSide) -> None:
    """Brings one more sequence through, however often it takes: all that was said before it has been heard then."""
    key = SequenceKey("last", 0, 0)
    while True:
        await prefill.send(key, decode, [1, 2], BOUNDS)
        await prefill.engine.hears("transferred", key)
        if not prefill.engine.told("fail", key):
            return
        decode.engine.free += decode.engine.tables[key]
        key = key._replace(attempt=key.attempt + 1)
