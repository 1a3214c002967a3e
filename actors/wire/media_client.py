"""Calls to Media servers: preprocessors for patches, vision encoders for embeddings."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import grpc
import grpc.aio
import numpy as np

from actors.errors import InternalError, ServingError, Unavailable
from actors.processing.patches import PATCH_BYTES, content_key
from actors.types import MediaKind
from actors.wire import convert
from actors.wire.channels import open_channel
from actors.wire.media import EncodedUnit, MediaMiss, MediaUnit
from actors.wire.status import LOST, error_of
from actors.wire.tensors import Patches, TensorAssembler, TensorMismatch
from ernie_serving.internal.v1 import media_pb2, media_pb2_grpc

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

MAX_UNIT_BYTES = 256 << 20
"""No unit of supported media comes near: 14.5 MB of patches, 31 MB of float32 embeddings."""


class _Peer:
    """A channel and who uses it."""

    def __init__(self, address: str) -> None:
        self.channel = open_channel(address)
        self.stub: media_pb2_grpc.MediaServiceAsyncStub = media_pb2_grpc.MediaServiceStub(self.channel)
        self.users = 0
        self.lost = False


class MediaClient:
    """One channel per place, kept until the place is lost or the client closed. Lives on one event loop.

    Args:
        pull_timeout_s: deadline of one pull.
        silent_s: a pull during which so long nothing comes is given up: its place is frozen.
        lease_timeout_s: deadline of Renew and Release.
    """

    def __init__(self, *, pull_timeout_s: float = 10.0, silent_s: float = 3.0, lease_timeout_s: float = 1.0) -> None:
        self._pull_timeout_s = pull_timeout_s
        self._silent_s = silent_s
        self._lease_timeout_s = lease_timeout_s
        self._peers: dict[str, _Peer] = {}

    async def close(self) -> None:
        """Closes every channel; running calls end."""
        peers, self._peers = self._peers, {}
        for peer in peers.values():
            peer.lost = True
            await peer.channel.close()

    async def pull(
        self, address: str, key: bytes, lease: str, *, max_bytes: int = MAX_UNIT_BYTES
    ) -> Patches | torch.Tensor:
        """Copies a unit here: uint8 patches as an array, embeddings as a CPU tensor. Waits for one that is being made.

        Raises:
            MediaMiss: it is not there, the place is gone or too slow, or what came is not what was announced.
            ServingError: the place failed.
        """
        while (unit := await self._pull_once(address, key, lease, max_bytes)) is None:
            pass
        return unit

    async def _pull_once(self, address: str, key: bytes, lease: str, max_bytes: int) -> Patches | torch.Tensor | None:
        """None for a unit that is still being made."""
        try:
            async with self._peer(address) as peer:
                call = peer.stub.Pull(media_pb2.PullRequest(key=key, lease=lease), timeout=self._pull_timeout_s)
                try:
                    return await _assemble(call, max_bytes, self._silent_s)
                finally:
                    call.cancel()
        except TimeoutError:
            raise MediaMiss(f"{address} is silent") from None
        except TensorMismatch as error:
            log.error("unit %s from %s is damaged: %s", key.hex(), address, error)
            raise MediaMiss(f"damaged at {address}: {error}") from None
        except grpc.aio.AioRpcError as error:
            if error.code() in LOST or error.code() is grpc.StatusCode.NOT_FOUND:
                raise MediaMiss(f"{error.code().name} at {address}") from None
            raise error_of(error) from error

    async def pull_patches(self, address: str, unit: MediaUnit, lease: str) -> Patches:
        """Copies the patches of a unit here, uint8 [grid.patches, 588], and proves them by their content key.

        Raises:
            MediaMiss: as ``pull``; also when they are not the patches of the key.
            ServingError: the place failed.
        """
        shape = (unit.grid.patches, PATCH_BYTES)
        patches = await self.pull(address, unit.content_key, lease, max_bytes=shape[0] * shape[1])
        if not isinstance(patches, np.ndarray) or patches.shape != shape:
            log.error("unit %s from %s is no patches of %s", unit.content_key.hex(), address, unit.grid)
            raise MediaMiss(f"no patches of {unit.grid} at {address}")
        kind = MediaKind.IMAGE if unit.grid.frames == 1 else MediaKind.VIDEO
        if await asyncio.to_thread(content_key, kind, unit.grid, patches) != unit.content_key:
            log.error("patches of unit %s from %s are corrupted", unit.content_key.hex(), address)
            raise MediaMiss(f"corrupted at {address}")
        return patches

    async def pull_embedding(
        self, address: str, key: bytes, lease: str, *, shape: tuple[int, int], dtype: torch.dtype
    ) -> torch.Tensor:
        """Copies an embedding [tokens, language width] here, to the CPU.

        Raises:
            MediaMiss: as ``pull``; also when it has another shape or element type.
            ServingError: the place failed.
        """
        max_bytes = shape[0] * shape[1] * dtype.itemsize
        embedding = await self.pull(address, key, lease, max_bytes=max_bytes)
        if isinstance(embedding, np.ndarray) or tuple(embedding.shape) != shape or embedding.dtype != dtype:
            log.error("embedding %s from %s is not %s of shape %s", key.hex(), address, dtype, shape)
            raise MediaMiss(f"no {dtype} embedding of shape {shape} at {address}")
        return embedding

    async def encode(
        self, address: str, *, lease: str, units: Sequence[MediaUnit], patch_address: str, timeout_s: float
    ) -> AsyncGenerator[EncodedUnit, None]:
        """Yields one answer per distinct unit as each is ready; embeddings then belong to ``lease`` at ``address``.

        Close the iterator (``contextlib.aclosing``) to cancel.

        Raises:
            Unavailable: reason STAGE_LOST, the encoder is gone or did not finish in time.
            ServingError: what the encoder answered.
        """
        request = media_pb2.EncodeRequest(
            protocol_version=convert.PROTOCOL_VERSION,
            lease=lease,
            units=[
                media_pb2.EncodeUnit(content_key=unit.content_key, grid=convert.grid_to_proto(unit.grid))
                for unit in units
            ],
            patch_address=patch_address,
        )
        try:
            async with self._peer(address) as peer:
                call = peer.stub.Encode(request, timeout=timeout_s)
                try:
                    async for response in call:
                        yield EncodedUnit(
                            content_key=response.content_key,
                            embedding_key=response.embedding_key or None,
                            cached=response.cached,
                            busy_s=response.busy_seconds,
                        )
                finally:
                    call.cancel()
        except grpc.aio.AioRpcError as error:
            raise _stage_error(error, address) from error

    async def renew(self, address: str, leases: Iterable[str]) -> list[str]:
        """Extends leases at a place; returns those it does not know.

        Raises:
            Unavailable: reason STAGE_LOST, the place is gone or did not answer in time.
        """
        try:
            async with self._peer(address) as peer:
                request = media_pb2.RenewRequest(leases=leases)
                response = await peer.stub.Renew(request, timeout=self._lease_timeout_s)
        except grpc.aio.AioRpcError as error:
            raise _stage_error(error, address) from error
        return list(response.unknown_leases)

    async def release(self, address: str, leases: Iterable[str]) -> None:
        """Ends leases at a place.

        Raises:
            Unavailable: reason STAGE_LOST, the place is gone or did not answer in time; the leases expire there.
        """
        try:
            async with self._peer(address) as peer:
                await peer.stub.Release(media_pb2.ReleaseRequest(leases=leases), timeout=self._lease_timeout_s)
        except grpc.aio.AioRpcError as error:
            raise _stage_error(error, address) from error

    @asynccontextmanager
    async def _peer(self, address: str) -> AsyncIterator[_Peer]:
        """A channel for one call. One that lost its peer is closed by its last user; later calls open a new one."""
        peer = self._peers.get(address)
        if peer is None:
            peer = self._peers[address] = _Peer(address)
        peer.users += 1
        try:
            yield peer
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                peer.lost = True
                if self._peers.get(address) is peer:
                    del self._peers[address]
            raise
        finally:
            peer.users -= 1
            if peer.lost and not peer.users:
                await peer.channel.close()


async def _assemble(
    call: grpc.aio.UnaryStreamCall[media_pb2.PullRequest, media_pb2.PullResponse], max_bytes: int, silent_s: float
) -> Patches | torch.Tensor | None:
    """None for a unit that is still being made. Raises TimeoutError after ``silent_s`` without a message."""
    assembler: TensorAssembler | None = None
    responses = aiter(call)
    while True:
        async with asyncio.timeout(silent_s):
            response = await anext(responses, None)
        if response is None:
            break
        if response.pending:
            return None
        if assembler is None:
            assembler = TensorAssembler(response.header, max_bytes)
        assembler.add(response.data)
    if assembler is None:
        raise TensorMismatch("nothing came")
    return assembler.finish()


def _stage_error(error: grpc.aio.AioRpcError, address: str) -> ServingError:
    if error.code() in LOST:
        return Unavailable(f"{address} was lost ({error.code().name})", reason="STAGE_LOST")
    if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
        return InternalError(f"{address}: {error.details()}")
    return error_of(error)
