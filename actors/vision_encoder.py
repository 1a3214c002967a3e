"""The vision encoder: pulls patches, batches units across requests, keeps embeddings by key for pulling.

Loads the vision tower and the resampler only. Requests come to its Media server, not through Serve.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from actors.config import VisionEncoderConfig
from actors.ernie.vision import VisionModel
from actors.ernie.weights import Checkpoint, LoadReport, load_vision
from actors.errors import InvalidRequest, Unavailable
from actors.reports import EncoderInfo
from actors.types import SPATIAL_MERGE, TEMPORAL_MERGE, Grid
from actors.wire.audit import Audit
from actors.wire.channels import node_address
from actors.wire.encode_queue import EncodeQueue, Ticket
from actors.wire.media import AnswerUnit, EncodeCall, EncodedUnit, MediaUnit, embedding_key
from actors.wire.media_client import MediaClient
from actors.wire.media_server import MediaServer
from actors.wire.tensors import Patches
from actors.wire.unit_store import Lease, Reservation, UnitStore

log = logging.getLogger(__name__)

KEY_BYTES = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class _Loaded:
    model: VisionModel
    fingerprint: bytes
    report: LoadReport


class VisionEncoder:
    """One replica. Serve builds it with ``await``: ``__init__`` is a coroutine.

    Args:
        config: what to load and how much to hold.
        host: address its Media server listens on; the node's, as Ray knows it, when None.
        page: its metrics, in the text format of Prometheus.
    """

    async def __init__(  # type: ignore[misc]
        self,
        config: VisionEncoderConfig,
        host: str | None = None,
        page: Callable[[VisionEncoder], bytes] = lambda _: b"",
    ) -> None:
        loaded = await asyncio.to_thread(_load, config)
        self._config = config
        self._model = loaded.model
        self._fingerprint = loaded.fingerprint
        self._report = loaded.report
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        self._store: UnitStore[torch.Tensor] = UnitStore(
            limit_bytes=config.embedding_bytes, limit_name="embedding_bytes", cache_bytes=config.cache_bytes
        )
        self._client = MediaClient(pull_timeout_s=config.pull_timeout_s)
        self._queue = EncodeQueue(
            store=self._store,
            pull=self._client.pull_patches,
            encode=self._forward,
            value_bytes=loaded.model.config.patch_values,
            window_bytes=config.patch_window_bytes,
            max_batch_patches=config.max_batch_patches,
        )
        self.unit_sources = Counter(cached=0, shared=0, computed=0)
        """Where units that were asked for came from: were here, were on their way, or were made."""
        self._server = MediaServer(self._store, self, also_held=self._queue_held, page=lambda: page(self))
        await self._server.start(host if host is not None else node_address())
        log.info("vision encoder %s serves embeddings at %s", config.encoder_id, self._server.address)

    @property
    def identity(self) -> EncoderInfo:
        """For the registry."""
        return EncoderInfo(
            encoder_id=self._config.encoder_id,
            incarnation=self._server.incarnation,
            address=self._server.address,
            fingerprint=self._fingerprint.hex(),
            dtype=self._config.dtype,
        )

    @property
    def queue(self) -> EncodeQueue:
        return self._queue

    @property
    def store(self) -> UnitStore[torch.Tensor]:
        """Of its embeddings."""
        return self._store

    @property
    def loaded(self) -> LoadReport:
        """What was read from the checkpoint."""
        return self._report

    @property
    def queued_patches(self) -> int:
        """Patches that wait for their batch or are in it."""
        return self._queue.queued_patches

    @property
    def busy(self) -> float:
        """Share of the last seconds in which it computed."""
        return self._queue.busy

    def audit(self) -> Audit:
        """What is held for requests, and whether the books agree."""
        return self._server.audit()

    def _queue_held(self) -> dict[str, int]:
        return {"queued_patches": self._queue.queued_patches, "window_bytes": self._queue.window_bytes_used}

    async def check_health(self) -> None:
        """Raises RuntimeError when the worker failed or nothing is served: Serve then replaces the replica."""
        if self._queue.failure is not None:
            raise RuntimeError("the vision encoder failed") from self._queue.failure
        self._server.check()

    async def close(self, grace_s: float = 0.0) -> None:
        """Lets running calls end for ``grace_s``, then ends everything. Idempotent."""
        await self._server.close(grace_s)
        await self._queue.close()
        await self._client.close()

    async def encode(self, call: EncodeCall, answer: AnswerUnit) -> None:
        """Answers once per distinct unit as each is ready; what is here already comes first.

        Raises:
            InvalidRequest: a key or grid that names no unit.
            MediaTooLarge: the embeddings can never be held together.
            Unavailable, InternalError: this encoder failed.
        """
        if self._queue.failure is not None:
            raise Unavailable("the vision encoder failed and is being replaced", reason="STAGE_LOST")
        units = {embedding_key(unit.content_key, self._fingerprint, self._config.dtype): unit for unit in call.units}
        for unit in units.values():
            _check_unit(unit)
        with self._store.open(call.lease) as lease:
            tickets: list[Ticket] = []
            try:
                reservation = await self._reserve(lease, units)
                try:
                    cached = self._start(call, lease, units, reservation, tickets)
                finally:
                    reservation.release()
                for key in cached:
                    await answer(EncodedUnit(content_key=units[key].content_key, embedding_key=key, cached=True))
                for future in asyncio.as_completed([ticket.future for ticket in tickets]):
                    await answer(await future)
            finally:
                for ticket in tickets:
                    self._queue.leave(ticket)

    async def wait_for(self, key: bytes) -> None:
        """Returns when no embedding of that key is being made any more, or none was."""
        await self._queue.wait_for(key)

    async def _reserve(self, lease: Lease, units: dict[bytes, MediaUnit]) -> Reservation:
        """Bytes for every embedding that is neither here nor on its way; for all of them if that has to wait.

        While it waits the lease holds nothing, so what is here now may be gone afterwards.
        """
        everything = sum(self._embedding_bytes(unit.grid) for unit in units.values())
        self._store.check_fits(everything)
        missing = [unit for key, unit in units.items() if not self._store.hold(lease, key) and key not in self._queue]
        reservation = self._store.try_reserve(sum(self._embedding_bytes(unit.grid) for unit in missing))
        return reservation or await self._store.reserve(lease, everything)

    def _start(
        self,
        call: EncodeCall,
        lease: Lease,
        units: dict[bytes, MediaUnit],
        reservation: Reservation,
        tickets: list[Ticket],
    ) -> list[bytes]:
        """Queues what is not here and returns the keys of what is. Never waits, so nothing changes in between."""
        cached = []
        for key, unit in units.items():
            if self._store.hold(lease, key):
                self.unit_sources["cached"] += 1
                cached.append(key)
            else:
                self.unit_sources["shared" if key in self._queue else "computed"] += 1
                part = None if key in self._queue else reservation.split(self._embedding_bytes(unit.grid))
                tickets.append(self._queue.join(key, unit, lease, call.patch_address, part))
        return cached

    def _embedding_bytes(self, unit_grid: Grid) -> int:
        return unit_grid.tokens * self._model.config.output_size * self._dtype.itemsize

    def _forward(self, patches: Sequence[Patches], grids: Sequence[Grid]) -> list[torch.Tensor]:
        """One batch, on the worker thread."""
        rows = torch.from_numpy(patches[0] if len(patches) == 1 else np.concatenate(patches))
        with torch.inference_mode():
            embeddings = self._model.encode(rows, grids)
            # A copy each: a view would keep the whole batch alive as long as any of its units.
            return [embedding.to("cpu", copy=True).contiguous() for embedding in embeddings]


def _load(config: VisionEncoderConfig) -> _Loaded:
    with Checkpoint(config.model_dir) as checkpoint:
        model = load_vision(checkpoint, checkpoint.config, dtype=getattr(torch, config.dtype), device=config.device)
        return _Loaded(
            model=model,
            fingerprint=checkpoint.fingerprint("vision"),
            report=checkpoint.report,
        )


def _check_unit(unit: MediaUnit) -> None:
    """Everything a forward pass could stumble over."""
    grid = unit.grid
    if len(unit.content_key) != KEY_BYTES:
        raise InvalidRequest(f"a content key has {KEY_BYTES} bytes, not {len(unit.content_key)}", field="units")
    if not 1 <= grid.frames <= TEMPORAL_MERGE or any(
        side < SPATIAL_MERGE or side % SPATIAL_MERGE for side in (grid.height, grid.width)
    ):
        raise InvalidRequest(f"{grid} is not the grid of a unit", field="units")
