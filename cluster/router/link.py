"""The router's end of one engine's link: a bidi stream shared by all attempts this router has there.

A link is *suspect* when nothing arrived for ``suspect_after_s``: it takes nothing new. It is *lost* when its stream
breaks or after ``lost_after_s`` of silence: every attempt on it then gets one AttemptError. Attempts never share fate
otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import grpc
import grpc.aio

from actors.errors import ServingError, Unavailable
from actors.reports import EngineInfo, LoadReport
from actors.types import AttemptMode, EngineRequest, MediaSpan, MilestoneKind, PromptLogprobs, SequenceKey, TokenEvent
from actors.wire import convert
from actors.wire.cached_blocks import apply_cached_blocks
from actors.wire.channels import open_channel
from ernie_serving.internal.v1 import engine_link_pb2, engine_link_pb2_grpc

log = logging.getLogger(__name__)

Call: TypeAlias = "grpc.aio.StreamStreamCall[engine_link_pb2.LinkRequest, engine_link_pb2.LinkResponse]"

HEARTBEAT_S = 1.0
WATCH_S = 0.1


@dataclass(frozen=True, slots=True)
class AttemptError:
    """The attempt ended without a last token. ``engine``: incarnation of the one that says so, or that was lost."""

    key: SequenceKey
    error: ServingError
    engine: str


@dataclass(frozen=True, slots=True)
class Milestone:
    """The attempt passed a point in an engine; ``busy_s`` is what the engine worked for it since the last one."""

    key: SequenceKey
    kind: MilestoneKind
    busy_s: float
    token_count: int = 0
    """With PREFILL_STARTED: leading tokens found in the prefix cache. With MEDIA_AWAITED: those computed."""


@dataclass(frozen=True, slots=True)
class MediaNeed:
    """Embeddings were gone when the engine pulled them."""

    key: SequenceKey
    embedding_keys: tuple[bytes, ...]


AttemptEvent = TokenEvent | AttemptError | Milestone | MediaNeed | PromptLogprobs


class EngineLost(Unavailable):
    """``died``: its process ended for certain and may have had the attempt in its running batch; ``computed``: it is
    known to have had it.
    """

    default_reason = "ENGINE_LOST"

    def __init__(self, info: EngineInfo, why: str, *, died: bool = False, computed: bool = False) -> None:
        super().__init__(f"engine {info.engine_id} was lost ({why})", retry_after_s=1.0)
        self.incarnation = info.incarnation
        self.died = died
        self.computed = computed


@dataclass(slots=True)
class _Listener:
    """Who hears of an attempt, and how far this engine has come with it."""

    events: asyncio.Queue[AttemptEvent]
    mode: AttemptMode
    computing: bool = False
    handed_over: bool = False

    def note(self, event: AttemptEvent) -> None:
        if isinstance(event, TokenEvent):
            self.handed_over = self.mode is AttemptMode.PREFILL
            self.computing = not self.handed_over
        elif isinstance(event, Milestone):
            self.computing = True


@dataclass(frozen=True, slots=True)
class _Claim:
    """What a submitted attempt will take of an engine that does not count it yet."""

    number: int
    """Of the Submit, from 1."""
    tokens: int
    computes: bool
    """The prompt is computed there; otherwise its KV arrives."""


class EngineLink:
    """One connection to one incarnation of an engine. Lives on the router's event loop."""

    def __init__(
        self,
        info: EngineInfo,
        router_incarnation: str,
        *,
        lost_after_s: float,
        suspect_after_s: float | None = None,
        on_load: Callable[[EngineLink], None],
        on_lost: Callable[[EngineLink], None],
    ) -> None:
        """``suspect_after_s``: a third of ``lost_after_s`` unless given."""
        self.info = info
        self.load: LoadReport | None = None
        self.cached_blocks: set[bytes] = set()
        """Chain hashes of the blocks the engine's prefix cache holds, as last heard."""
        self._router_incarnation = router_incarnation
        self._lost_after_s = lost_after_s
        self._suspect_after_s = lost_after_s / 3 if suspect_after_s is None else suspect_after_s
        self._on_load = on_load
        self._on_lost = on_lost
        self._outbox: asyncio.Queue[engine_link_pb2.LinkRequest] = asyncio.Queue()
        self._attempts: dict[SequenceKey, _Listener] = {}
        self._claims: dict[SequenceKey, _Claim] = {}
        self._submit_count = 0
        self._counted = 0
        """Submits the engine had taken when it told its load last."""
        self._heard_at = time.monotonic()
        self._task: asyncio.Task[None] | None = None

    @property
    def usable(self) -> bool:
        """Greeted, and not lost."""
        return self.load is not None and self._task is not None and not self._task.done()

    @property
    def takes_new(self) -> bool:
        """Usable, heard of just now, and the engine does not leave."""
        return self.speaks and self.load is not None and not self.load.draining

    @property
    def speaks(self) -> bool:
        """Usable, and heard of just now."""
        return self.usable and self.silent_s <= self._suspect_after_s

    @property
    def claimed_load(self) -> LoadReport | None:
        """The load as it will be: with what this router submitted and the engine has not counted yet."""
        if self.load is None or not self._claims:
            return self.load
        claims = self._claims.values()
        blocks = sum(-(-claim.tokens // self.load.block_size) for claim in claims)
        return replace(
            self.load,
            free_blocks=max(0, self.load.free_blocks - blocks),
            queued_tokens=self.load.queued_tokens + sum(claim.tokens for claim in claims if claim.computes),
        )

    def _drop_claims(self, counted: int) -> None:
        """An engine in a long step tells a load of before it: what it took since is in the one after, at the latest."""
        self._claims = {key: claim for key, claim in self._claims.items() if claim.number > self._counted}
        self._counted = counted

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
        self._attempts[key] = _Listener(events, mode)
        self._submit_count += 1
        tokens = len(request.prompt_ids) + len(request.output_ids)
        self._claims[key] = _Claim(self._submit_count, tokens, computes=mode is not AttemptMode.DECODE)
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
        self._claims.pop(key, None)
        if self._attempts.pop(key, None) is not None and cancel:
            self._outbox.put_nowait(
                engine_link_pb2.LinkRequest(cancel=engine_link_pb2.Cancel(key=convert.key_to_proto(key)))
            )

    async def _run(self) -> None:
        why, died = "closed", False
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._watch())
                tasks.create_task(self._talk())
        except* ConnectionError as group:
            why = str(group.exceptions[0])
        except* grpc.aio.AioRpcError as group:
            error = group.exceptions[0]
            assert isinstance(error, grpc.aio.AioRpcError)
            why = error.details() or error.code().name
            died = error.code() is grpc.StatusCode.UNAVAILABLE
        finally:
            if self._attempts:
                log.warning(
                    "link to engine %s lost (%s) with %d attempts", self.info.engine_id, why, len(self._attempts)
                )
            batch = self._running_batch() if died else frozenset()
            for key, listener in self._attempts.items():
                lost = EngineLost(self.info, why, died=key in batch, computed=key in batch and listener.computing)
                listener.events.put_nowait(AttemptError(key, lost, self.info.incarnation))
            self.load = None
            self.cached_blocks.clear()
            self._attempts.clear()
            self._on_lost(self)

    def _running_batch(self) -> frozenset[SequenceKey]:
        """What the engine computed when it was last heard of. If it had begun with nothing then, what it began with
        was not heard: it may have been anything.
        """
        here = {key: listener for key, listener in self._attempts.items() if not listener.handed_over}
        return frozenset(key for key, listener in here.items() if listener.computing) or frozenset(here)

    async def _watch(self) -> None:
        """Sends heartbeats and ends the link when the engine is silent for too long."""
        beat_at = 0.0
        period_s = min(WATCH_S, self._lost_after_s / 10)
        while True:
            before = time.monotonic()
            await asyncio.sleep(period_s)
            now = time.monotonic()
            if now - before > self._lost_after_s / 3:
                # This process stood still: what the engine said meanwhile waits to be read.
                self._heard_at = max(self._heard_at, now - self._lost_after_s / 2)
            if self.silent_s > self._lost_after_s:
                raise ConnectionError(f"silent for {self.silent_s:.1f} s")
            if now >= beat_at:
                beat_at = now + min(HEARTBEAT_S, self._lost_after_s / 3)
                self._outbox.put_nowait(engine_link_pb2.LinkRequest(heartbeat=engine_link_pb2.RouterHeartbeat()))

    async def _talk(self) -> None:
        """Writes by ``call.write``: gRPC would leave an iterator of requests behind, waiting, when the call breaks."""
        async with open_channel(self.info.address) as channel:
            stub: engine_link_pb2_grpc.EngineLinkServiceAsyncStub = engine_link_pb2_grpc.EngineLinkServiceStub(channel)
            call = stub.Link()
            writing = asyncio.create_task(self._write(call))
            try:
                async for response in call:
                    self._heard_at = time.monotonic()
                    self._receive(response)
            finally:
                writing.cancel()
                call.cancel()
        raise ConnectionError("the engine closed the stream")

    async def _write(self, call: Call) -> None:
        """Until the call is over, of which reading tells."""
        hello = engine_link_pb2.RouterHello(
            protocol_version=convert.PROTOCOL_VERSION, router_incarnation=self._router_incarnation
        )
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await call.write(engine_link_pb2.LinkRequest(hello=hello))
            while True:
                await call.write(await self._outbox.get())

    def _receive(self, response: engine_link_pb2.LinkResponse) -> None:
        match response.WhichOneof("message"):
            case "step_output":
                for token in response.step_output.tokens:
                    event = convert.token_from_proto(token)
                    self._deliver(event.key, event)
            case "load":
                self.load = convert.load_from_proto(response.load)
                if response.load.epoch > self.info.epoch:  # It is heard here before the planner tells.
                    role = convert.ROLE_OF[response.load.role]
                    self.info = replace(self.info, role=role, epoch=response.load.epoch)
                self._drop_claims(response.load.submit_count)
                self._on_load(self)
            case "attempt_ended":
                key = convert.key_from_proto(response.attempt_ended.key)
                error = convert.error_from_proto(response.attempt_ended)
                self._deliver(key, AttemptError(key, error, self.info.incarnation))
            case "milestone":
                key = convert.key_from_proto(response.milestone.key)
                kind = convert.MILESTONE_OF[response.milestone.kind]
                milestone = response.milestone
                self._deliver(key, Milestone(key, kind, milestone.busy_seconds, milestone.token_count))
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
        listener = self._attempts.get(key)
        if listener is not None:
            listener.note(event)
            listener.events.put_nowait(event)
