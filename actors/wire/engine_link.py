"""The engine's end of its links: one session per router, one message per step and session."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Protocol, TypeAlias

import grpc
import grpc.aio

from actors.errors import AlreadyExists, InternalError, ServingError, Unavailable
from actors.reports import EngineInfo, LoadReport
from actors.types import AttemptMode, EngineRequest, MediaSpan, MilestoneKind, PromptLogprobs, SequenceKey, TokenEvent
from actors.wire import convert
from actors.wire.cached_blocks import CachedBlocksFeed
from ernie_serving.internal.v1 import common_pb2, engine_link_pb2, engine_link_pb2_grpc

log = logging.getLogger(__name__)

LOAD_S = 0.5
ROUTER_SILENT_S = 5.0
"""A router that says nothing for so long is gone: its attempts end."""

BLOCKS_S = 0.05
"""Changes of the prefix cache are told together, at most so often."""

Context: TypeAlias = "grpc.aio.ServicerContext[engine_link_pb2.LinkRequest, engine_link_pb2.LinkResponse]"


class AttemptHost(Protocol):
    """What a link needs of its engine. Called on the event loop; must not block."""

    def submit(self, key: SequenceKey, request: EngineRequest, mode: AttemptMode, peer: tuple[str, str] | None) -> None:
        """Starts an attempt. ``peer``: (address, incarnation). Raises ServingError to refuse it."""

    def cancel(self, key: SequenceKey) -> None: ...

    def supply_media(self, key: SequenceKey, media: tuple[MediaSpan, ...]) -> None: ...

    def load(self) -> LoadReport: ...


class _Session:
    def __init__(self, router: str) -> None:
        self.router = router
        self.outbox: asyncio.Queue[engine_link_pb2.LinkResponse] = asyncio.Queue()
        self.keys: set[SequenceKey] = set()
        self.submit_count = 0
        self.heard_at = time.monotonic()

    def tell_end(self, key: SequenceKey, error: ServingError) -> None:
        ended = convert.ended_to_proto(key, error)
        self.outbox.put_nowait(engine_link_pb2.LinkResponse(attempt_ended=ended))


class EngineLinkServicer(engine_link_pb2_grpc.EngineLinkServiceServicer):
    """Serves ``Link``. All methods run on the event loop that serves it."""

    def __init__(self, host: AttemptHost, info: Callable[[], EngineInfo]) -> None:
        self._host = host
        self._info = info
        self._sessions: dict[SequenceKey, _Session] = {}
        self._open: set[_Session] = set()
        self._blocks = CachedBlocksFeed()
        self._blocks_timer: asyncio.TimerHandle | None = None

    @property
    def attempt_count(self) -> int:
        return len(self._sessions)

    def deliver_tokens(self, events: list[TokenEvent]) -> None:
        """Sends the tokens of one step, one message per router."""
        outputs: defaultdict[_Session, engine_link_pb2.StepOutput] = defaultdict(engine_link_pb2.StepOutput)
        for event in events:
            session = self._sessions.get(event.key)
            if session is not None:
                outputs[session].tokens.append(convert.token_to_proto(event))
            if event.finish is not None:
                self.forget(event.key)
        for session, output in outputs.items():
            session.outbox.put_nowait(engine_link_pb2.LinkResponse(step_output=output))

    def deliver_end(self, key: SequenceKey, error: ServingError) -> None:
        session = self._sessions.get(key)
        self.forget(key)
        if session is not None:
            session.tell_end(key, error)

    def deliver_milestone(self, key: SequenceKey, kind: MilestoneKind, busy_s: float, token_count: int = 0) -> None:
        session = self._sessions.get(key)
        if session is not None:
            milestone = engine_link_pb2.Milestone(
                key=convert.key_to_proto(key),
                kind=convert.MILESTONES[kind],
                busy_seconds=busy_s,
                token_count=token_count,
            )
            session.outbox.put_nowait(engine_link_pb2.LinkResponse(milestone=milestone))

    def deliver_prompt_logprobs(self, piece: PromptLogprobs) -> None:
        session = self._sessions.get(piece.key)
        if session is not None:
            message = convert.prompt_logprobs_to_proto(piece)
            session.outbox.put_nowait(engine_link_pb2.LinkResponse(prompt_logprobs=message))

    def deliver_blocks_changed(self, stored: Iterable[bytes], removed: Iterable[bytes]) -> None:
        """Tells every router, soon, which chain hashes the prefix cache has and which it has no more."""
        self._blocks.note(stored, removed)
        if self._blocks_timer is None:
            self._blocks_timer = asyncio.get_running_loop().call_later(BLOCKS_S, self._tell_blocks)

    def _tell_blocks(self) -> None:
        if self._blocks_timer is not None:
            self._blocks_timer.cancel()
            self._blocks_timer = None
        for changes in self._blocks.take_changes():
            for session in self._open:
                session.outbox.put_nowait(engine_link_pb2.LinkResponse(cached_blocks=changes))

    def deliver_need(self, key: SequenceKey, embedding_keys: tuple[bytes, ...]) -> None:
        session = self._sessions.get(key)
        if session is not None:
            need = engine_link_pb2.MediaNeed(key=convert.key_to_proto(key), embedding_keys=embedding_keys)
            session.outbox.put_nowait(engine_link_pb2.LinkResponse(media_need=need))

    def tell_load(self) -> None:
        """Tells every router at once what the next heartbeat would."""
        for session in self._open:
            session.outbox.put_nowait(engine_link_pb2.LinkResponse(load=self._load(session)))

    def _load(self, session: _Session) -> engine_link_pb2.Load:
        info = self._info()
        load = convert.load_to_proto(self._host.load(), info.role, info.epoch)
        load.submit_count = session.submit_count
        return load

    async def Link(  # type: ignore[override]  # noqa: N802
        self, request_iterator: object, context: Context
    ) -> None:
        """One router's stream, by ``context.read`` and ``context.write``: a generator blocked by a router that does not
        read would not see the end of its call.
        """
        session = _Session(await self._greet(context))
        session.outbox.put_nowait(engine_link_pb2.LinkResponse(hello=self._hello()))
        self._tell_blocks()
        for blocks in self._blocks.snapshot():
            session.outbox.put_nowait(engine_link_pb2.LinkResponse(cached_blocks=blocks))
        self._open.add(session)
        tasks = [
            asyncio.create_task(self._read(context, session)),
            asyncio.create_task(self._write(context, session)),
            asyncio.create_task(self._beat(session)),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except grpc.aio.BaseError:
            pass  # the stream broke
        except Exception:
            log.exception("link to router %s failed", session.router)
        finally:
            for task in tasks:
                task.cancel()
            self._open.discard(session)
            for key in session.keys.copy():
                self.forget(key)
                self._host.cancel(key)
            log.info("link to router %s closed", session.router)

    async def _greet(self, context: Context) -> str:
        """Reads and checks the hello; returns the incarnation of the router."""
        try:
            async with asyncio.timeout(ROUTER_SILENT_S):
                first = await context.read()
        except TimeoutError:
            first = None
        if (
            not isinstance(first, engine_link_pb2.LinkRequest)
            or first.hello.protocol_version != convert.PROTOCOL_VERSION
        ):
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"a link begins with a hello of protocol {convert.PROTOCOL_VERSION}",
            )
        return first.hello.router_incarnation

    def _hello(self) -> engine_link_pb2.EngineHello:
        info = self._info()
        return engine_link_pb2.EngineHello(
            protocol_version=convert.PROTOCOL_VERSION,
            engine_id=info.engine_id,
            incarnation=info.incarnation,
            role=convert.ROLES[info.role],
            epoch=info.epoch,
            layout=common_pb2.KvLayout(
                fingerprint=info.fingerprint, dtype=info.dtype, block_size=info.block_size, switches=info.switches
            ),
            max_model_len=info.max_model_len,
        )

    async def _read(self, context: Context, session: _Session) -> None:
        while isinstance(request := await context.read(), engine_link_pb2.LinkRequest):
            session.heard_at = time.monotonic()
            self._receive(request, session)

    async def _write(self, context: Context, session: _Session) -> None:
        while True:
            await context.write(await session.outbox.get())

    async def _beat(self, session: _Session) -> None:
        while time.monotonic() - session.heard_at < ROUTER_SILENT_S:
            session.outbox.put_nowait(engine_link_pb2.LinkResponse(load=self._load(session)))
            await asyncio.sleep(LOAD_S)
        log.warning("router %s was silent for %.0f s: ending its attempts", session.router, ROUTER_SILENT_S)

    def _receive(self, request: engine_link_pb2.LinkRequest, session: _Session) -> None:
        match request.WhichOneof("message"):
            case "submit":
                self._submit(request.submit, session)
            case "cancel":
                key = convert.key_from_proto(request.cancel.key)
                self.forget(key)
                self._host.cancel(key)
            case "supply_media":
                supply = request.supply_media
                self._host.supply_media(
                    convert.key_from_proto(supply.key), tuple(convert.span_from_proto(span) for span in supply.media)
                )

    def _submit(self, submit: engine_link_pb2.Submit, session: _Session) -> None:
        key = convert.key_from_proto(submit.key)
        session.submit_count += 1
        if key in self._sessions:  # the attempt that runs keeps its session
            session.tell_end(key, AlreadyExists(f"attempt {key} is active already"))
            return
        self._sessions[key] = session
        session.keys.add(key)
        try:
            if submit.epoch != self._info().epoch:
                raise Unavailable(f"the engine's role changed (epoch {self._info().epoch})", reason="EPOCH_CHANGED")
            peer = (submit.peer.address, submit.peer.incarnation) if submit.HasField("peer") else None
            self._host.submit(key, convert.request_from_proto(submit.request), convert.MODE_OF[submit.mode], peer)
        except ServingError as error:
            self.deliver_end(key, error)
        except Exception:
            log.exception("submit of %s failed", key)
            self.deliver_end(key, InternalError("the engine could not take the request"))

    def forget(self, key: SequenceKey) -> None:
        """Nothing more is told of this attempt. Idempotent."""
        session = self._sessions.pop(key, None)
        if session is not None:
            session.keys.discard(key)
