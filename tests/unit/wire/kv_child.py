"""One engine's KV side in a process of its own, to be killed by a test: ``kv_child decode | prefill ADDRESS NAME``."""

from __future__ import annotations

import asyncio
import sys

import torch

from tests.unit.wire.kv_engines import IDENTITY, Gate, HeldRecv, decode_side, key_of, prefill_side


class Announced(Gate):
    def pass_through(self) -> None:
        print("receiving", flush=True)
        super().pass_through()


async def decode() -> None:
    """Grants, accepts and then never receives."""
    gate = Announced()
    async with decode_side(name="child", wrap=lambda transport, _name: HeldRecv(transport, gate)) as side:
        print(side.address, flush=True)
        await asyncio.Event().wait()


async def prefill(address: str, incarnation: str) -> None:
    """Sends one chunk of two and says so when it is acknowledged."""
    async with prefill_side(name="child") as side:
        key = key_of(1)
        side.sender.reserve(key, address, incarnation, 8, IDENTITY)
        await side.engine.hears("reserved", key)
        side.push(key, [1, 2], [0, 4, 8], only=0)
        side.sender.reserve(key_of(3), address, incarnation, 4, IDENTITY)
        await side.engine.hears("reserved", key_of(3))
        side.push(key_of(3), [3], [0, 4])
        await side.engine.hears("transferred", key_of(3))
        print("sent", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    torch.set_num_threads(1)
    asyncio.run(decode() if sys.argv[1] == "decode" else prefill(*sys.argv[2:]))
