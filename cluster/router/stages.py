"""The router's calls to preprocessors and vision encoders: deadlines, late answers and lost places."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import Any

import ray.exceptions
import ray.serve.exceptions

from actors.errors import ServingError, Unavailable
from actors.types import EncoderInfo, MediaSpan, PreprocessReply, PreprocessRequest, PromptMedia
from actors.wire.media import units_of
from actors.wire.media_client import MediaClient
from cluster.router.leases import LeaseKeeper

log = logging.getLogger(__name__)


class PreprocessStage:
    """Calls the preprocessor pool through its Serve handle."""

    def __init__(self, handle: Any, leases: LeaseKeeper) -> None:
        self._handle = handle
        self._leases = leases
        self._late: set[asyncio.Task[None]] = set()

    async def run(self, request: PreprocessRequest) -> PreprocessReply:
        """Returns the prompt; its patches, if kept, stay under ``request.lease``, which is held from here on.

        Raises:
            ServingError: what the preprocessor says of the request, or Unavailable when it was lost.
        """
        response = self._handle.preprocess.remote(request)
        answer = asyncio.ensure_future(_answer(response))
        try:
            reply = await asyncio.shield(answer)
        except asyncio.CancelledError:
            response.cancel()
            task = asyncio.get_running_loop().create_task(self._release_late(answer, request))
            self._late.add(task)
            task.add_done_callback(self._late.discard)
            raise
        if reply.media and request.keep_patches:
            self._leases.hold(reply.media_address, request.lease)
        return reply

    async def _release_late(self, answer: asyncio.Future[PreprocessReply], request: PreprocessRequest) -> None:
        """A cancelled call may still have been answered: its patches go back at once."""
        with contextlib.suppress(ServingError, asyncio.CancelledError):
            reply = await answer
            if reply.media and request.keep_patches:
                self._leases.hold(reply.media_address, request.lease)
                self._leases.release(reply.media_address, request.lease)


async def _answer(response: Any) -> PreprocessReply:
    try:
        reply = await response
    except ServingError as error:
        raise _own(error) from None
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ServingError):
            raise error.cause from None
        raise
    except (ray.exceptions.RayError, ray.serve.exceptions.RayServeException) as error:
        log.warning("a preprocessor was lost: %s", error)
        raise _stage_lost("a preprocessor") from None
    assert isinstance(reply, PreprocessReply)
    return reply


def _stage_lost(what: str) -> Unavailable:
    return Unavailable(f"{what} was lost; send the request again", reason="STAGE_LOST", retry_after_s=1.0)


def _own(error: ServingError) -> ServingError:
    """Ray raises a class of its own that derives from ours: unwrap it."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, ServingError) else error


class MissingPatches(Exception):
    """The encoder found patches gone: preprocess again."""


class EncodeStage:
    """Has all units of a prompt encoded at one encoder."""

    def __init__(self, client: MediaClient, leases: LeaseKeeper) -> None:
        self._client = client
        self._leases = leases

    async def run(
        self, encoder: EncoderInfo, media: Sequence[PromptMedia], *, lease: str, patch_address: str, timeout_s: float
    ) -> tuple[tuple[MediaSpan, ...], float]:
        """Returns spans with embedding keys, and the encoder's busy seconds. Embeddings stay under ``lease``.

        Raises:
            MissingPatches: some patches are gone.
            Unavailable: the encoder was lost.
        """
        self._leases.hold(encoder.address, lease)
        keys: dict[bytes, bytes] = {}
        busy_s = 0.0
        answers = self._client.encode(
            encoder.address, lease=lease, units=units_of(media), patch_address=patch_address, timeout_s=timeout_s
        )
        try:
            async with contextlib.aclosing(answers):
                async for answer in answers:
                    if answer.embedding_key is None:
                        raise MissingPatches
                    keys[answer.content_key] = answer.embedding_key
                    busy_s += answer.busy_s
        except Unavailable as error:
            log.warning("vision encoder %s was lost: %s", encoder.encoder_id, error)
            raise _stage_lost("a vision encoder") from None
        spans = tuple(
            MediaSpan(
                kind=item.kind,
                offset=item.offset,
                grid=item.grid,
                embedding_keys=tuple(keys[content_key] for content_key in item.content_keys),
                encoder_address=encoder.address,
            )
            for item in media
        )
        return spans, busy_s
