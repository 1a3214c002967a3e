"""Media servers and units for tests: everything on localhost, real gRPC."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import numpy as np
import torch

from actors.processing.patches import PATCH_BYTES, content_key
from actors.types import Grid, MediaKind
from actors.wire.media import MediaUnit, UnitEncoder
from actors.wire.media_server import MediaServer
from actors.wire.tensors import Patches
from actors.wire.unit_store import UnitStore

HOST = "127.0.0.1"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make_unit(grid: Grid, seed: int) -> tuple[MediaUnit, Patches]:
    patches = np.random.default_rng(seed).integers(0, 256, (grid.patches, PATCH_BYTES), dtype=np.uint8)
    kind = MediaKind.IMAGE if grid.frames == 1 else MediaKind.VIDEO
    return MediaUnit(content_key=content_key(kind, grid, patches), grid=grid), patches


class PatchPlace:
    """A preprocessor's side of the wire: a store and its server."""

    def __init__(self, clock: Callable[[], float], encoder: UnitEncoder | None = None) -> None:
        self.store: UnitStore[Patches] = UnitStore(limit_bytes=100_000_000, limit_name="patch_bytes", clock=clock)
        self.server = MediaServer(self.store, encoder)

    @property
    def address(self) -> str:
        return self.server.address

    async def put(self, lease_name: str, *units: tuple[bytes, Patches]) -> None:
        with self.store.open(lease_name) as lease:
            reservation = await self.store.reserve(lease, sum(patches.nbytes for _, patches in units))
            for key, patches in units:
                self.store.put(key, patches, reservation, [lease])
            reservation.release()

    async def keep(self, lease_name: str, *grids: Grid, seed: int = 0) -> tuple[MediaUnit, ...]:
        made = [make_unit(grid, seed + index) for index, grid in enumerate(grids)]
        await self.put(lease_name, *((unit.content_key, patches) for unit, patches in made))
        return tuple(unit for unit, _ in made)


@asynccontextmanager
async def patch_place(
    clock: Callable[[], float] | None = None, encoder: UnitEncoder | None = None
) -> AsyncIterator[PatchPlace]:
    place = PatchPlace(clock or Clock(), encoder)
    await place.server.start(HOST)
    try:
        yield place
        place.store.check_integrity()
    finally:
        await place.server.close()


def embedding_store() -> UnitStore[torch.Tensor]:
    return UnitStore(limit_bytes=1_000_000, limit_name="embedding_bytes", cache_bytes=500_000, clock=Clock())
