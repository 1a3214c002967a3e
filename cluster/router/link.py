"""The router's end of one engine's link: a bidi stream shared by all attempts this router has there.

A link is *lost* when its stream breaks or when nothing arrives for ``lost_after_s``: every attempt on it then gets one
``EngineLost``. Attempts never share fate otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import grpc
import grpc.aio

from actors.errors import ServingError, Unavailable
from actors.types import (
    AttemptMode,
    EngineInfo,
    EngineRequest,
    LoadReport,
    MediaSpan,
    MilestoneKind,
    PromptLogprobs,
    SequenceKey,
    TokenEvent,
)
from actors.wire import convert
from actors.wire.cached_blocks import apply_cached_blocks
from actors.wire.channels import open_channel
from ernie_serving.internal.v1 import engine_link_pb2, engine_link_pb2_grpc

log = logging.getLogger(__name__)

HEARTBEAT_S = 1.0


@dataclass(frozen=True, slots=True)
class AttemptError:
    """The attempt ended without a last token."""

    key: SequenceKey
    error: ServingError


@dataclass(frozen=True, slots=True)
class Milestone:
    """The attempt passed a point in an engine; ``busy_s`` is what the engine worked for it since the last one."""

    key: SequenceKey
    kind: MilestoneKind
    busy_s: float
    cached_tokens: int = 0
    """With PREFILL_STARTED: leading tokens found in the prefix cache."""


@dataclass(frozen=True, slots=True)
class MediaNeed:
    """Embeddings were gone when the engine pulled them."""

    key: SequenceKey
    embedding_keys: tuple[bytes, ...]


AttemptEvent = TokenEvent | AttemptError | Milestone | MediaNeed | PromptLogprobs


def engine_lost(info: EngineInfo, why: str) -> Unavailable:
    return Unavailable(
        f"engine {info.engine_id} was lost ({why}); send the request again",
        reason="ENGINE_LOST",
        retry_after_s=1.0,
    )


class EngineLink:
    """One connection to one incarnation of an engine. Lives on the router's event loop."""

    def __init__(
        self,
        info: EngineInfo,
        router_incarnation: str,
        *,
        lost_after_s: float,
        on_load: Callable[[EngineLink], None],
        on_lost: Callable[[EngineLink], None],
    ) -> None:
        self.info = info
        self.load: LoadReport | None = None
        self.cached_blocks: set[bytes] = set()
        """Chain hashes of the blocks the engine's prefix cache holds, as last heard."""
        self._router_incarnation = router_incarnation
        self._lost_after_s = lost_after_s
        self._on_load = on_load
        self._on_lost = on_lost
        self._outbox: asyncio.Queue[engine_link_pb2.LinkRequest] = asyncio.Queue()
        self._attempts: dict[SequenceKey, asyncio.Queue[AttemptEvent]] = {}
        self._heard_at = time.monotonic()
        self._task: asyncio.Task[None] | None = None

    @property
    def usable(self) -> bool:
        """Greeted and heard of lately."""
        return self.load is not None and self._task is not None and not self._task.done()

    @property
    def silent_s(self) -> float:
        return time.monotonic() - self._heard_at

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def submit(
        self,
        key: SequenceKey,
        request: EngineRequest,
        mode: AttemptMode,
        peer: EngineInfo | None,
        events: asyncio.Queue[AttemptEvent],
    ) -> None:
        """Starts an attempt; everything about it arrives in ``events`` until ``forget``."""
        self._attempts[key] = events
        submit = engine_link_pb2.Submit(
            key=convert.key_to_proto(key),
            request=convert.request_to_proto(request),
            mode=convert.MODES[mode],
            epoch=self.info.epoch,
        )
        if peer is not None:
            submit.peer.address = peer.address
            submit.peer.incarnation = peer.incarnation
        self._outbox.put_nowait(engine_link_pb2.LinkRequest(submit=submit))

    def supply_media(self, key: SequenceKey, media: tuple[MediaSpan, ...]) -> None:
        supply = engine_link_pb2.SupplyMedia(
            key=convert.key_to_proto(key), media=[convert.span_to_proto(span) for span in media]
        )
        self._outbox.put_nowait(engine_link_pb2.LinkRequest(supply_media=supply))

    def forget(self, key: SequenceKey, *, cancel: bool) -> None:
        """Stops listening to an attempt and, unless it is over, ends it at the engine."""
        if self._attempts.pop(key, None) is not None and cancel:
            self._outbox.put_nowait(
                engine_link_pb2.LinkRequest(cancel=engine_link_pb2.Cancel(key=convert.key_to_proto(key)))
            )

    async def _run(self) -> None:
        why = "closed"
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._watch())
                tasks.create_task(self._talk())
        except* ConnectionError as group:
            why = str(group.exceptions[0])
        except* grpc.aio.AioRpcError as group:
            error = group.exceptions[0]
            why = error.details() or error.code().name if isinstance(error, grpc.aio.AioRpcError) else str(error)
        finally:
            self.load = None
            self.cached_blocks.clear()
            lost = engine_lost(self.info, why)
            for key, events in self._attempts.items():
                events.put_nowait(AttemptError(key, lost))
            if self._attempts:
                log.warning(
                    "link to engine %s lost (%s) with %d attempts", self.info.engine_id, why, len(self._attempts)
                )
            self._attempts.clear()
            self._on_lost(self)

    async def _watch(self) -> None:
        """Sends heartbeats and ends the link when the engine is silent for too long."""
        while True:
            await asyncio.sleep(min(HEARTBEAT_S, self._lost_after_s / 3))
            if self.silent_s > self._lost_after_s:
                raise ConnectionError(f"silent for {self.silent_s:.1f} s")
            self._outbox.put_nowait(engine_link_pb2.LinkRequest(heartbeat=engine_link_pb2.RouterHeartbeat()))

    async def _talk(self) -> None:
        async with open_channel(self.info.address) as channel:
            stub = engine_link_pb2_grpc.EngineLinkServiceStub(channel)
            call = stub.Link(self._requests())
            async for response in call:
                self._heard_at = time.monotonic()
                self._receive(response)
        raise ConnectionError("the engine closed the stream")

    async def _requests(self) -> AsyncIterator[engine_link_pb2.LinkRequest]:
        yield engine_link_pb2.LinkRequest(
            hello=engine_link_pb2.RouterHello(
                protocol_version=convert.PROTOCOL_VERSION, router_incarnation=self._router_incarnation
            )
        )
        while True:
            yield await self._outbox.get()

    def _receive(self, response: engine_link_pb2.LinkResponse) -> None:
        match response.WhichOneof("message"):
            case "step_output":
                for token in response.step_output.tokens:
                    event = convert.token_from_proto(token)
                    self._deliver(event.key, event)
            case "load":
                self.load = convert.load_from_proto(response.load)
                self._on_load(self)
            case "attempt_ended":
                key = convert.key_from_proto(response.attempt_ended.key)
                self._deliver(key, AttemptError(key, convert.error_from_proto(response.attempt_ended)))
            case "milestone":
                key = convert.key_from_proto(response.milestone.key)
                kind = convert.MILESTONE_OF[response.milestone.kind]
                milestone = response.milestone
                self._deliver(key, Milestone(key, kind, milestone.busy_seconds, milestone.cached_token_count))
            case "prompt_logprobs":
                piece = convert.prompt_logprobs_from_proto(response.prompt_logprobs)
                self._deliver(piece.key, piece)
            case "cached_blocks":
                apply_cached_blocks(self.cached_blocks, response.cached_blocks)
            case "media_need":
                key = convert.key_from_proto(response.media_need.key)
                self._deliver(key, MediaNeed(key, tuple(response.media_need.embedding_keys)))
            case "hello":
                hello = response.hello
                if (hello.protocol_version, hello.incarnation) != (convert.PROTOCOL_VERSION, self.info.incarnation):
                    raise ConnectionError(
                        f"expected protocol {convert.PROTOCOL_VERSION} of {self.info.incarnation}, "
                        f"met protocol {hello.protocol_version} of {hello.incarnation}"
                    )

    def _deliver(self, key: SequenceKey, event: AttemptEvent) -> None:
        events = self._attempts.get(key)
        if events is not None:
            events.put_nowait(event)
