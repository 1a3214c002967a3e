"""The preprocessor: messages in; token ids, grids and content keys out; keeps patches for pulling.

Called through a Serve handle. Holds no weights.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event

from actors.busy import BusyShare
from actors.config import PreprocessorConfig
from actors.errors import InternalError, RequestCancelled, ServingError, Unavailable
from actors.log_context import about
from actors.processing.config import ProcessingLimits
from actors.processing.patches import PATCH_BYTES
from actors.processing.processor import Processed, Processor
from actors.tallies import WORK_SECONDS, Tally
from actors.types import SPATIAL_MERGE, TEMPORAL_MERGE, ImagePart, PreprocessReply, PreprocessRequest, VideoPart
from actors.wire.audit import Audit
from actors.wire.channels import node_address
from actors.wire.media_server import MediaServer
from actors.wire.tensors import Patches
from actors.wire.unit_store import Lease, Reservation, UnitStore

log = logging.getLogger(__name__)

PIXEL_BYTES = 3
TOKEN_BYTES = PATCH_BYTES * SPATIAL_MERGE**2 * TEMPORAL_MERGE
"""Most patch bytes behind one placeholder token."""


class Preprocessor:
    """One replica. Serve builds it with ``await``: ``__init__`` is a coroutine.

    Admission: the largest size the patches of a request can have is reserved before anything is decoded (all of the
    budget when it is larger than that) and corrected to their true size afterwards, so memory in use and in the making
    is bounded together. A request whose patches are larger than the whole budget is refused.

    Args:
        config: where the model directory is and how much to hold.
        limits: what one request may bring.
        host: address its Media server listens on; the node's, as Ray knows it, when None.
        page: its metrics, in the text format of Prometheus.
    """

    async def __init__(  # type: ignore[misc]
        self,
        config: PreprocessorConfig,
        limits: ProcessingLimits | None = None,
        host: str | None = None,
        page: Callable[[Preprocessor], bytes] = lambda _: b"",
    ) -> None:
        self._processor = await asyncio.to_thread(Processor, config.model_dir, limits, media=config.media)
        self._closing = False
        self._busy = BusyShare(config.workers)
        self._waiting: dict[object, float] = {}
        """When requests came that are not begun yet, the oldest first."""
        self._store: UnitStore[Patches] = UnitStore(limit_bytes=config.patch_bytes, limit_name="patch_bytes")
        self._pool = ThreadPoolExecutor(max_workers=config.workers, thread_name_prefix="preprocess")
        self.seconds = Tally(WORK_SECONDS)
        """Work on one request."""
        self._server = MediaServer(self._store, page=lambda: page(self))
        await self._server.start(host if host is not None else node_address())
        log.info("preprocessor serves patches at %s", self._server.address)

    @property
    def address(self) -> str:
        """host:port of the Media server."""
        return self._server.address

    @property
    def incarnation(self) -> str:
        return self._server.incarnation

    @property
    def busy(self) -> float:
        """Share of the last seconds of its workers in which they had something to do."""
        return self._busy.share()

    @property
    def waiting_count(self) -> int:
        """Requests that are not begun yet."""
        return len(self._waiting)

    @property
    def queue_age_s(self) -> float:
        """How long the oldest request has waited that is not begun yet, for memory or a worker."""
        oldest = next(iter(list(self._waiting.values())), None)
        return 0.0 if oldest is None else time.monotonic() - oldest

    async def preprocess(self, request: PreprocessRequest) -> PreprocessReply:
        """Does everything a prompt needs before weights; patches then wait under ``request.lease``.

        Cancelling it frees whatever was made; work in a thread stops at its next step and its result is dropped.

        Raises:
            InvalidRequest: and its kinds, what the caller must change.
            RequestCancelled: the lease was released meanwhile.
            Unavailable: reason DRAINING, this replica is closing.
            InternalError: a defect.
        """
        ticket = object()
        self._waiting[ticket] = time.monotonic()
        try:
            with about(request.lease), self._store.open(request.lease) as lease:
                reservation = await self._store.reserve(lease, min(self._bound(request), self._store.limit_bytes))
                processed, busy_s = await self._in_thread(request, lease, reservation, ticket)
                await self._keep(processed, lease, reservation)
        finally:
            self._waiting.pop(ticket, None)
        self.seconds.add(busy_s)
        return PreprocessReply(
            prompt_ids=processed.prompt_ids,
            media=processed.media,
            starts_thinking=processed.starts_thinking,
            media_address=self._server.address,
            incarnation=self._server.incarnation,
            busy_s=busy_s,
        )

    @property
    def store(self) -> UnitStore[Patches]:
        """Of its patches."""
        return self._store

    async def check_health(self) -> None:
        """Raises RuntimeError when patches are no longer served: Serve then replaces the replica."""
        self._server.check()

    def audit(self) -> Audit:
        """What is held for requests, and whether the books agree."""
        return self._server.audit()

    async def close(self, grace_s: float = 0.0) -> None:
        """Lets pulls end for ``grace_s``, then ends everything; waits for work in threads. Idempotent."""
        self._closing = True
        await self._server.close(grace_s)
        await asyncio.to_thread(self._pool.shutdown, cancel_futures=True)
        self._processor.close()

    async def _in_thread(
        self, request: PreprocessRequest, lease: Lease, reservation: Reservation, ticket: object
    ) -> tuple[Processed, float]:
        """Processes on the pool. Cancelled, it lets ``reservation`` go only when the thread is through."""
        loop = asyncio.get_running_loop()
        abandoned = Event()

        def check() -> None:
            if abandoned.is_set() or lease.ended:
                raise RequestCancelled("the patches were released while they were made")

        try:
            work = self._pool.submit(contextvars.copy_context().run, self._process, request, check, ticket)
        except RuntimeError:  # the pool is shut down
            reservation.release()
            raise Unavailable("this preprocessor is closing", reason="DRAINING") from None
        try:
            return await asyncio.wrap_future(work)
        except asyncio.CancelledError:
            abandoned.set()
            work.cancel()
            work.add_done_callback(lambda _: loop.call_soon_threadsafe(reservation.release))
            if self._closing and work.cancelled():
                raise Unavailable("this preprocessor is closing", reason="DRAINING") from None
            raise
        except ServingError:
            reservation.release()
            raise
        except Exception:
            reservation.release()
            log.exception("preprocessing for lease %s failed", request.lease)
            raise InternalError("preprocessing failed") from None

    def _process(
        self, request: PreprocessRequest, check: Callable[[], None], ticket: object
    ) -> tuple[Processed, float]:
        """On a pool thread."""
        self._waiting.pop(ticket, None)
        check()
        started = time.perf_counter()
        with self._busy.doing():
            processed = self._processor.process(request, check)
        return processed, time.perf_counter() - started

    async def _keep(self, processed: Processed, lease: Lease, reservation: Reservation) -> None:
        """Puts the units under the lease and returns what was reserved too much."""
        units = processed.units
        byte_count = sum(unit.patches.nbytes for unit in units.values())
        try:
            if byte_count > reservation.byte_count:
                self._store.check_fits(byte_count)
                reservation.release()
                reservation = await self._store.reserve(lease, byte_count)
            if lease.ended:
                raise RequestCancelled("the patches were released while they were made")
            for key, unit in units.items():
                self._store.put(key, unit.patches, reservation, [lease])
        finally:
            reservation.release()

    def _bound(self, request: PreprocessRequest) -> int:
        """Most bytes the patches of a request can have: by pixel and frame bounds of its parts, and by its tokens."""
        pixels = 0
        options, images, videos = request.media_options, self._processor.image_config, self._processor.video_config
        for message in request.messages:
            for part in message.parts:
                match part:
                    case ImagePart():
                        pixels += _most_pixels(
                            (part.min_pixels, part.max_pixels),
                            (options.image_min_pixels, options.image_max_pixels),
                            images.max_pixels,
                        )
                    case VideoPart():
                        frames = part.max_frames or options.video_max_frames or videos.max_frames
                        pixels += (frames + frames % TEMPORAL_MERGE) * _most_pixels(
                            (part.min_pixels, part.max_pixels),
                            (options.video_min_pixels, options.video_max_pixels),
                            videos.max_pixels,
                        )
        return min(pixels * PIXEL_BYTES, request.max_prompt_tokens * TOKEN_BYTES)


def _most_pixels(part: tuple[int | None, int | None], request: tuple[int | None, int | None], default: int) -> int:
    """The upper bound in force, given as (lower, upper): a lower one given alone may lift it."""
    return max(part[1] or request[1] or default, part[0] or 0, request[0] or 0)
