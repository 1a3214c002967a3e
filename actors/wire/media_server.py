"""Serves units for pulling, and their leases; at a vision encoder also Encode. One per preprocessor or encoder."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeAlias

import grpc
import grpc.aio

from actors.errors import InternalError, ServingError
from actors.log_context import about
from actors.wire import convert
from actors.wire.audit import Audit, AuditServicer, take_audit
from actors.wire.channels import bind, make_server
from actors.wire.media import EncodeCall, EncodedUnit, MediaUnit, UnitEncoder
from actors.wire.status import abort
from actors.wire.tensors import Patches, chunks_of, header_of
from actors.wire.unit_store import UnitStore
from ernie_serving.internal.v1 import audit_pb2_grpc, media_pb2, media_pb2_grpc

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

Store: TypeAlias = "UnitStore[Patches] | UnitStore[torch.Tensor]"
PENDING_S = 1.0
"""A pull waits for a unit that is being made as long as this, and is then asked again: so a place that says nothing is
told from one that has much to do."""

Context = grpc.aio.ServicerContext[object, object]


class MediaServer:
    """Owns the gRPC server in front of a store and ends the store's leases in time.

    Args:
        store: what is served; stays the caller's.
        encoder: answers Encode; without one it is UNIMPLEMENTED.
        also_held: what else the owner holds for requests, for audits.
        page: the owner's metrics, in the text format of Prometheus.
    """

    def __init__(
        self,
        store: Store,
        encoder: UnitEncoder | None = None,
        *,
        also_held: Callable[[], Mapping[str, int]] = dict,
        page: Callable[[], bytes] = bytes,
    ) -> None:
        self.incarnation = uuid.uuid4().hex
        self.address = ""
        """host:port once started."""
        self._store = store
        self._servicer = _MediaServicer(store, encoder)
        self._also_held = also_held
        self._page = page
        self._server: grpc.aio.Server | None = None
        self._expiry: asyncio.Task[None] | None = None

    async def start(self, host: str) -> None:
        """Listens on a free port of ``host``."""
        self._server = server = make_server()
        media_pb2_grpc.add_MediaServiceServicer_to_server(self._servicer, server)
        audit_pb2_grpc.add_AuditServiceServicer_to_server(AuditServicer(self._audit, self._page), server)
        address = bind(server, host)
        await server.start()
        self.address = address
        self._expiry = asyncio.create_task(self._expire())

    def check(self) -> None:
        """Raises RuntimeError when leases are no longer watched, or nothing is served."""
        if self._expiry is None:
            raise RuntimeError("the media server is not running")
        if self._expiry.done():
            raise RuntimeError("the watch over leases ended") from (
                None if self._expiry.cancelled() else self._expiry.exception()
            )

    def audit(self) -> Audit:
        """What is held for requests; cached embeddings are not."""
        return take_audit(self._held, self._store.check_integrity)

    async def _audit(self) -> Audit:
        return self.audit()

    def _held(self) -> dict[str, int]:
        stats = self._store.stats()
        return {
            "leases": stats.leases,
            "bytes": stats.byte_count - stats.cached_bytes,
            "waiting": stats.waiting,
            **self._also_held(),
        }

    async def close(self, grace_s: float = 0.0) -> None:
        """Refuses new calls at once, ends running ones after ``grace_s``. Idempotent."""
        server, self._server = self._server, None
        if server is not None:
            await server.stop(grace_s)
        expiry, self._expiry = self._expiry, None
        if expiry is not None:
            expiry.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await expiry

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(self._store.lease_ttl_s / 10)
            self._store.expire()


class _MediaServicer(media_pb2_grpc.MediaServiceServicer):
    """Streams are written by ``context.write``: a generator would not see the cancellation of its call at once."""

    def __init__(self, store: Store, encoder: UnitEncoder | None) -> None:
        self._store = store
        self._encoder = encoder

    async def Encode(  # type: ignore[override]  # noqa: N802
        self, request: media_pb2.EncodeRequest, context: Context
    ) -> None:
        if self._encoder is None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "this place keeps patches and encodes nothing")
        if request.protocol_version != convert.PROTOCOL_VERSION:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"protocol {request.protocol_version} is not {convert.PROTOCOL_VERSION}, which this encoder speaks",
            )
        call = EncodeCall(
            lease=request.lease,
            units=tuple(
                MediaUnit(content_key=unit.content_key, grid=convert.grid_from_proto(unit.grid))
                for unit in request.units
            ),
            patch_address=request.patch_address,
        )

        async def answer(unit: EncodedUnit) -> None:
            await context.write(
                media_pb2.EncodeResponse(
                    content_key=unit.content_key,
                    embedding_key=unit.embedding_key or b"",
                    cached=unit.cached,
                    busy_seconds=unit.busy_s,
                )
            )

        try:
            with about(call.lease):
                await self._encoder.encode(call, answer)
        except ServingError as error:
            await abort(context, error)
        except Exception:
            log.exception("Encode for lease %s failed", call.lease)
            await abort(context, InternalError("the vision encoder failed"))

    async def Pull(  # type: ignore[override]  # noqa: N802
        self, request: media_pb2.PullRequest, context: Context
    ) -> None:
        unit = self._store.get(request.key)
        if unit is None and self._encoder is not None:
            try:
                async with asyncio.timeout(PENDING_S):
                    await self._encoder.wait_for(request.key)
            except TimeoutError:
                await context.write(media_pb2.PullResponse(pending=True))
                return
            unit = self._store.get(request.key)
        if unit is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no unit {request.key.hex()}")
        self._store.renew([request.lease])
        response = media_pb2.PullResponse(header=header_of(unit))
        for chunk in chunks_of(unit):
            response.data = chunk
            await context.write(response)
            response = media_pb2.PullResponse()
        if response.HasField("header"):  # a unit without elements has no chunk to carry it
            await context.write(response)

    async def Renew(  # noqa: N802
        self, request: media_pb2.RenewRequest, context: Context
    ) -> media_pb2.RenewResponse:
        return media_pb2.RenewResponse(unknown_leases=self._store.renew(request.leases))

    async def Release(  # noqa: N802
        self, request: media_pb2.ReleaseRequest, context: Context
    ) -> media_pb2.ReleaseResponse:
        self._store.release(request.leases)
        return media_pb2.ReleaseResponse()
