"""Units on their way from patches to embeddings: pulled within a byte window, batched across calls, each made once.

    join -> fetch (window, pull) -> ready -> batch on the worker thread -> store
                    | miss: next caller's source, or "missing"

A unit in the queue is a *job*; every call that wants it holds a *ticket*. A job that loses its last ticket before its
batch started is dropped; once in a batch it is finished and its embedding cached. Everything but the batch itself
happens on one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from actors.busy import BusyShare
from actors.errors import InternalError, ServingError, Unavailable
from actors.tallies import COUNTS, STEP_SECONDS, Tally
from actors.types import Grid
from actors.wire.byte_budget import ByteBudget
from actors.wire.media import EncodedUnit, MediaMiss, MediaUnit
from actors.wire.tensors import Patches
from actors.wire.unit_store import Lease, Reservation, UnitStore

log = logging.getLogger(__name__)

PullPatches = Callable[[str, MediaUnit, str], Awaitable[Patches]]
"""(address, unit, lease name) -> patches; raises MediaMiss."""
EncodeBatch = Callable[[Sequence[Patches], Sequence[Grid]], Sequence[torch.Tensor]]
"""Runs on the worker thread; gives each unit a CPU tensor of its own."""


class Ticket:
    """One call's wish for one unit. ``future`` gets the answer, or InternalError for an embedding that is no number."""

    def __init__(self, job: _Job, lease: Lease, patch_address: str) -> None:
        self.job = job
        self.lease = lease
        self.patch_address = patch_address
        self.future: asyncio.Future[EncodedUnit] = asyncio.get_running_loop().create_future()

    def answer(self, unit: EncodedUnit) -> None:
        if not self.future.done():
            self.future.set_result(unit)

    def fail(self, error: ServingError) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class _Job:
    def __init__(self, key: bytes, unit: MediaUnit, reservation: Reservation) -> None:
        self.key = key
        self.unit = unit
        self.reservation = reservation
        self.tickets: list[Ticket] = []
        self.fetch: asyncio.Task[None] | None = None
        self.window_bytes = 0
        self.patches: Patches | None = None
        self.started = False
        self.gone = asyncio.Event()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Made:
    embeddings: Sequence[torch.Tensor]
    finite: Sequence[bool]
    seconds: float


class EncodeQueue:
    """Makes embeddings and puts them into a store.

    Args:
        store: receives embeddings; stays the caller's.
        pull: fetches patches.
        encode: one forward pass.
        value_bytes: bytes of one row of patches.
        window_bytes: bound on patches being pulled or waiting for their batch.
        max_batch_patches: bound on the patches of a batch; a larger unit goes alone.
    """

    def __init__(
        self,
        *,
        store: UnitStore[torch.Tensor],
        pull: PullPatches,
        encode: EncodeBatch,
        value_bytes: int,
        window_bytes: int,
        max_batch_patches: int,
    ) -> None:
        self._store = store
        self._pull = pull
        self._encode = encode
        self._value_bytes = value_bytes
        self._window = ByteBudget(window_bytes)
        self._max_batch_patches = max_batch_patches
        self._jobs: dict[bytes, _Job] = {}
        self._ready: deque[_Job] = deque()
        self._wake = asyncio.Event()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="vision-encoder")
        self._batches = asyncio.create_task(self._run())
        self._failure: BaseException | None = None
        self._busy = BusyShare()
        self.batch_seconds = Tally(STEP_SECONDS)
        self.batch_patches = Tally(COUNTS)
        self.patch_misses = 0

    @property
    def failure(self) -> BaseException | None:
        """Why nothing will be encoded any more."""
        return self._failure

    @property
    def queued_patches(self) -> int:
        """Patches of all jobs, those of the running batch included."""
        return sum(job.unit.grid.patches for job in self._jobs.values())

    @property
    def busy(self) -> float:
        """Share of the last seconds that batches took."""
        return self._busy.share()

    @property
    def window_bytes_used(self) -> int:
        return self._window.used

    async def wait_for(self, key: bytes) -> None:
        """Returns when the unit is not on its way any more, made or not."""
        while (job := self._jobs.get(key)) is not None:
            await job.gone.wait()

    def __contains__(self, key: object) -> bool:
        return key in self._jobs

    def join(
        self, key: bytes, unit: MediaUnit, lease: Lease, patch_address: str, reservation: Reservation | None
    ) -> Ticket:
        """Asks for a unit. ``reservation`` holds its embedding's bytes and becomes the queue's; needed unless
        ``key in queue``.
        """
        if self._failure is not None:
            if reservation is not None:
                reservation.release()
            raise Unavailable("the vision encoder failed and is being replaced", reason="STAGE_LOST")
        job = self._jobs.get(key)
        if job is None:
            if reservation is None:
                raise ValueError("a new job needs a reservation")
            job = self._jobs[key] = _Job(key, unit, reservation)
            job.fetch = asyncio.create_task(self._fetch(job))
        elif reservation is not None:
            reservation.release()
        ticket = Ticket(job, lease, patch_address)
        job.tickets.append(ticket)
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Withdraws a wish; no effect on an answered one."""
        if not ticket.future.cancel() and not ticket.future.cancelled():
            ticket.future.exception()  # looked at, or asyncio would complain about failures nobody awaited
        job = ticket.job
        if ticket in job.tickets:
            job.tickets.remove(ticket)
            if not job.tickets and not job.started:
                self._drop(job)

    async def close(self) -> None:
        """Ends everything; open tickets fail. Waits for a running batch."""
        self._failure = self._failure or RuntimeError("the encode queue is closed")
        self._batches.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._batches
        self._fail(Unavailable("the vision encoder is closing", reason="STAGE_LOST"))
        await asyncio.to_thread(self._worker.shutdown)

    async def _fetch(self, job: _Job) -> None:
        window_bytes = min(job.unit.grid.patches * self._value_bytes, self._window.limit)
        await self._window.take(window_bytes)
        job.window_bytes = window_bytes
        while job.tickets:
            first = job.tickets[0]
            asked = [ticket for ticket in job.tickets if ticket.patch_address == first.patch_address]
            try:
                job.patches = await self._pull(first.patch_address, job.unit, first.lease.name)
            except MediaMiss as miss:
                self.patch_misses += 1
                log.info("patches of unit %s are missing: %s", job.unit.content_key.hex(), miss)
                for ticket in asked:
                    ticket.answer(EncodedUnit(content_key=job.unit.content_key, embedding_key=None))
                job.tickets = [ticket for ticket in job.tickets if ticket not in asked]
                continue
            except Exception as error:
                log.exception("pulling unit %s from %s failed", job.unit.content_key.hex(), first.patch_address)
                shown = error if isinstance(error, ServingError) else InternalError("pulling patches failed")
                for ticket in job.tickets:
                    ticket.fail(shown)
                break
            self._ready.append(job)
            self._wake.set()
            return
        self._drop(job)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                await self._wake.wait()
                batch = self._take_batch()
                if not batch:
                    self._wake.clear()
                    continue
                self._deliver(batch, await loop.run_in_executor(self._worker, self._make, batch))
        except Exception as error:
            log.critical("the vision encoder failed and takes no more work", exc_info=True)
            self._failure = error
            self._fail(InternalError("the vision encoder failed"))

    def _take_batch(self) -> list[_Job]:
        batch: list[_Job] = []
        patches = 0
        while self._ready:
            patches += self._ready[0].unit.grid.patches
            if batch and patches > self._max_batch_patches:
                break
            job = self._ready.popleft()
            job.started = True
            batch.append(job)
        return batch

    def _make(self, batch: Sequence[_Job]) -> _Made:
        """On the worker thread."""
        started = time.perf_counter()
        patches = [job.patches for job in batch if job.patches is not None]
        with self._busy.doing():
            embeddings = self._encode(patches, [job.unit.grid for job in batch])
        if len(embeddings) != len(batch):
            raise RuntimeError(f"{len(embeddings)} embeddings of {len(batch)} units")
        finite = [bool(torch.isfinite(embedding).all()) for embedding in embeddings]
        return _Made(embeddings=embeddings, finite=finite, seconds=time.perf_counter() - started)

    def _deliver(self, batch: Sequence[_Job], made: _Made) -> None:
        patches = sum(job.unit.grid.patches for job in batch)
        per_patch = made.seconds / patches
        self.batch_seconds.add(made.seconds)
        self.batch_patches.add(patches)
        for job, embedding, finite in zip(batch, made.embeddings, made.finite, strict=True):
            if finite:
                self._store.put(job.key, embedding, job.reservation, [ticket.lease for ticket in job.tickets])
            tickets, job.tickets = job.tickets, []
            self._drop(job)
            if not finite:
                log.error("the embedding of unit %s holds NaN or infinity", job.unit.content_key.hex())
            busy_s = per_patch * job.unit.grid.patches / max(1, len(tickets))
            answer = EncodedUnit(content_key=job.unit.content_key, embedding_key=job.key, busy_s=busy_s)
            for ticket in tickets:
                if finite:
                    ticket.answer(answer)
                else:
                    ticket.fail(InternalError("the vision encoder made an embedding that is not finite"))

    def _fail(self, error: ServingError) -> None:
        for job in list(self._jobs.values()):
            for ticket in job.tickets:
                ticket.fail(error)
            self._drop(job)

    def _drop(self, job: _Job) -> None:
        """Takes a job out of wherever it is and returns what it holds. Idempotent."""
        if self._jobs.get(job.key) is not job:
            return
        del self._jobs[job.key]
        job.gone.set()
        if job in self._ready:
            self._ready.remove(job)
        if job.fetch is not None and job.fetch is not asyncio.current_task():
            job.fetch.cancel()
        job.patches = None
        self._window.give(job.window_bytes)
        job.window_bytes = 0
        job.reservation.release()
