"""One request from admission to its last event.

    QUEUED -> PREPROCESS -> (ENCODE) -> QUEUED -> PREFILL -> (TRANSFER) -> DECODE -> FINISHED

Whatever happens - finish, stop, error, cancel, deadline, a lost engine - ``run`` ends once and frees everything it
holds in every place: attempts on links, leases on patches and embeddings.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from actors.errors import DeadlineExceeded, InternalError, MediaChanged, RequestCancelled, ServingError, Unavailable
from actors.types import (
    AttemptMode,
    EngineRequest,
    FinishReason,
    MediaSpan,
    MilestoneKind,
    PreprocessReply,
    PreprocessRequest,
    SamplingParams,
    SequenceKey,
    Stage,
    Timings,
    TokenEvent,
)
from cluster.generation import Event, Finished, GenerateCall, Started, Usage
from cluster.policy import Route, pick_encoder, pick_route
from cluster.router.fleet import Fleet
from cluster.router.leases import LeaseKeeper
from cluster.router.link import AttemptError, AttemptEvent, EngineLink, MediaNeed, Milestone, engine_lost
from cluster.router.output import Ending, OutputAssembler
from cluster.router.stages import EncodeStage, MissingPatches, PreprocessStage
from cluster.router.timeline import Timeline

log = logging.getLogger(__name__)

REQUEUE_REASONS = frozenset({"NO_BLOCKS"})
"""Refusals that count nothing: the request waits for room and tries again with its arrival time."""

PEER_CANCELLED = "PEER_CANCELLED"
CAUSE_WAIT_S = 0.5

MEDIA_TRIES = 3
"""How often media are made before the request fails."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Services:
    """What all requests of a router share."""

    fleet: Fleet
    leases: LeaseKeeper
    preprocess: PreprocessStage
    encode: EncodeStage
    model_name: str
    context_limit: Callable[[], int]
    """Longest prompt and reply together the engines at hand can hold."""
    vocab_size: int
    resolve_sampling: Callable[[GenerateCall, int], SamplingParams]
    """From the call and the number of prompt tokens."""
    make_output: Callable[[GenerateCall, bool], OutputAssembler]
    """From the call and whether the prompt ends inside a think block."""
    clock: Callable[[], float]
    wall_clock: Callable[[], float]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Prompt:
    reply: PreprocessReply
    media: tuple[MediaSpan, ...]


class RequestRun:
    """Runs in a task of its own. ``events`` gets Started, Deltas and at last Finished or one ServingError."""

    def __init__(self, request_id: str, call: GenerateCall, *, seed: int, timeout_s: float, services: Services) -> None:
        self.request_id = request_id
        self.events: asyncio.Queue[Event | ServingError] = asyncio.Queue()
        self.timeline = Timeline(services.clock)
        self._call = call
        self._seed = seed
        self._timeout_s = timeout_s
        self._services = services
        self._arrival_s = services.wall_clock()
        self._leases: set[tuple[str, str]] = set()
        self._lease_count = 0
        self._first_token_s: float | None = None
        self._prompt: _Prompt | None = None
        self._output: OutputAssembler | None = None
        self._cancelled_by_name = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> asyncio.Task[None]:
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"request {self.request_id}")
        self._task.add_done_callback(self._tell_of_cancellation)
        return self._task

    def _tell_of_cancellation(self, task: asyncio.Task[None]) -> None:
        """A task that is cancelled before its first step runs nothing of ``_run``."""
        if task.cancelled():
            self.events.put_nowait(RequestCancelled("the request was cancelled"))

    def cancel_by_name(self) -> None:
        """Ends the request from another connection: its own client sees that it was cancelled."""
        self._cancelled_by_name = True
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                ending = await self._work()
            self._finish(ending)
        except TimeoutError:
            self.events.put_nowait(
                DeadlineExceeded(f"the request took longer than {self._timeout_s:g} s", field="timeout")
            )
        except ServingError as error:
            self.events.put_nowait(error)
        except asyncio.CancelledError:
            if not self._cancelled_by_name:
                raise
            if self._output is None:
                self.events.put_nowait(RequestCancelled("the request was cancelled"))
            else:
                self._finish(Ending(reason=FinishReason.CANCELLED))
        except Exception:
            log.exception("request %s failed", self.request_id)
            self.events.put_nowait(InternalError(f"internal error; request {self.request_id}"))
        finally:
            for address, lease in self._leases:
                self._services.leases.release(address, lease)

    def _finish(self, ending: Ending) -> None:
        timings = self.timeline.finish()
        assert self._prompt is not None and self._output is not None
        reply = self._prompt.reply
        usage = Usage(
            prompt_tokens=len(reply.prompt_ids),
            media_tokens=sum(item.grid.tokens for item in reply.media),
            cached_tokens=0,
            output_tokens=len(self._output.token_ids),
            reasoning_tokens=self._output.reasoning_tokens,
            time_to_first_token_s=self._first_token_s,
        )
        shown: Timings | None = timings if self._call.return_timings else None
        self.events.put_nowait(
            Finished(reason=ending.reason, usage=usage, stop_reason=ending.stop_reason, timings=shown)
        )

    async def _work(self) -> Ending:
        self._prompt = prompt = await self._prepare()
        reply = prompt.reply
        sampling = self._services.resolve_sampling(self._call, len(reply.prompt_ids))
        self._output = self._services.make_output(self._call, reply.starts_thinking)
        self.events.put_nowait(
            Started(
                request_id=self.request_id,
                model=self._services.model_name,
                prompt_tokens=len(reply.prompt_ids),
                prompt_token_ids=reply.prompt_ids if self._call.return_token_ids else None,
            )
        )
        request = EngineRequest(
            prompt_ids=reply.prompt_ids,
            media=prompt.media,
            sampling=sampling,
            seed=self._seed,
            arrival_s=self._arrival_s,
            deadline_s=self._arrival_s + self._timeout_s,
        )
        attempt = 0
        while True:
            self.timeline.enter(Stage.QUEUED)
            try:
                return await _Attempt(self, SequenceKey(self.request_id, attempt, 0), request, self._output).run()
            except Unavailable as error:
                if error.reason not in REQUEUE_REASONS or self._output.token_ids:
                    raise
            await self._services.fleet.wait_for_room(len(request.prompt_ids), self._arrival_s)
            attempt += 1

    async def _prepare(self) -> _Prompt:
        for _ in range(MEDIA_TRIES):
            reply = await self._preprocess()
            try:
                return _Prompt(reply=reply, media=await self.encode(reply))
            except MissingPatches:
                log.warning("request %s: patches were gone before they were encoded", self.request_id)
        raise Unavailable("media were lost again and again", reason="STAGE_LOST", retry_after_s=1.0)

    async def _preprocess(self) -> PreprocessReply:
        self.timeline.enter(Stage.PREPROCESS)
        call = self._call
        lease = self._new_lease()
        reply = await self._services.preprocess.run(
            PreprocessRequest(
                lease=lease,
                messages=call.messages,
                thinking=call.thinking,
                max_prompt_tokens=self._services.context_limit() - 1,
            )
        )
        self._leases.add((reply.media_address, lease))
        self.timeline.add_busy(Stage.PREPROCESS, reply.busy_s)
        return reply

    async def encode(self, reply: PreprocessReply) -> tuple[MediaSpan, ...]:
        """Has all media encoded; their patches are given back as soon as that is done."""
        if not reply.media:
            return ()
        self.timeline.enter(Stage.ENCODE)
        encoder = pick_encoder(self._services.fleet.encoders)
        if encoder is None:
            raise Unavailable("no vision encoder is ready", reason="NO_ENCODER", retry_after_s=1.0)
        lease = self._new_lease()
        self._leases.add((encoder.address, lease))
        spans, busy_s = await self._services.encode.run(
            encoder, reply.media, lease=lease, patch_address=reply.media_address, timeout_s=self._timeout_s
        )
        self.timeline.add_busy(Stage.ENCODE, busy_s)
        self.release(reply.media_address)
        return spans

    def release(self, *addresses: str) -> None:
        """Gives back what this request still holds at some places."""
        for address, lease in [held for held in self._leases if held[0] in addresses]:
            self._leases.discard((address, lease))
            self._services.leases.release(address, lease)

    async def make_media_again(self) -> tuple[MediaSpan, ...]:
        """Answers MediaNeed: fetches and encodes everything once more.

        Raises:
            MediaChanged: the media are no longer what the prompt was made of.
        """
        assert self._prompt is not None
        known = self._prompt.reply
        again = await self._prepare()
        if (again.reply.prompt_ids, again.reply.media) != (known.prompt_ids, known.media):
            raise MediaChanged("media changed while the request was running")
        return again.media

    def pick_route(self, token_count: int) -> Route:
        route = pick_route(self._services.fleet.engines(), token_count)
        if route is None:
            raise Unavailable("no prefill and decode path is ready", reason="NO_ENGINE", retry_after_s=1.0)
        return route

    def link(self, route: Route) -> tuple[EngineLink, EngineLink | None]:
        """Links of a route that was just picked; an engine lost in between is an error."""
        prefill = self._services.fleet.link(route.prefill)
        if prefill is None:
            raise engine_lost(route.prefill, "link closed")
        if route.decode is None:
            return prefill, None
        decode = self._services.fleet.link(route.decode)
        if decode is None:
            raise engine_lost(route.decode, "link closed")
        return prefill, decode

    @property
    def wants_token_ids(self) -> bool:
        return self._call.return_token_ids

    def took_first_token(self) -> None:
        if self._first_token_s is None:
            self._first_token_s = self.timeline.elapsed_s

    def _new_lease(self) -> str:
        self._lease_count += 1
        return f"{self.request_id}#{self._lease_count}"


class _Attempt:
    """One attempt on one route: feeds engine events to the output until it ends."""

    def __init__(self, run: RequestRun, key: SequenceKey, request: EngineRequest, output: OutputAssembler) -> None:
        self._run = run
        self._key = key
        self._request = request
        self._output = output
        self._events: asyncio.Queue[AttemptEvent] = asyncio.Queue()
        self._split = False

    async def run(self) -> Ending:
        """Returns how the reply ended; on any other way out both engines are told to stop.

        Raises:
            ServingError: the attempt ended without a last token.
        """
        request = self._request
        route = self._run.pick_route(len(request.prompt_ids) + len(request.output_ids))
        prefill, decode = self._run.link(route)
        self._split = decode is not None
        over = False
        try:
            if decode is None:
                prefill.submit(self._key, request, AttemptMode.COLOCATED, None, self._events)
            else:
                decode.submit(self._key, request, AttemptMode.DECODE, prefill.info, self._events)
                prefill.submit(self._key, request, AttemptMode.PREFILL, decode.info, self._events)
            ending = await self._follow(prefill)
            over = self._output.engine_finished
            return ending
        finally:
            for link in (prefill, decode):
                if link is not None:
                    link.forget(self._key, cancel=not over)

    async def _follow(self, prefill: EngineLink) -> Ending:
        while True:
            batch = [await self._events.get()]
            while not self._events.empty():
                batch.append(self._events.get_nowait())
            tokens = [event for event in batch if isinstance(event, TokenEvent)]
            if tokens and (ending := self._take(tokens)) is not None:
                return ending
            for event in batch:
                match event:
                    case AttemptError(_, error):
                        raise await self._cause(error)
                    case Milestone(_, kind, busy_s):
                        self._pass(kind, busy_s)
                    case MediaNeed():
                        spans = await self._run.make_media_again()
                        self._run.timeline.enter(Stage.PREFILL)
                        prefill.supply_media(self._key, spans)

    async def _cause(self, error: ServingError) -> ServingError:
        """An engine whose peer gave up says only that; the peer's own error says why and follows at once."""
        if error.reason != PEER_CANCELLED:
            return error
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CAUSE_WAIT_S):
                while True:
                    event = await self._events.get()
                    if isinstance(event, AttemptError) and event.error.reason != PEER_CANCELLED:
                        return event.error
        return error

    def _take(self, tokens: list[TokenEvent]) -> Ending | None:
        run = self._run
        before = len(self._output.token_ids)
        delta = self._output.push(tokens)
        count = len(self._output.token_ids)
        for event in tokens:
            run.timeline.add_busy(Stage.PREFILL if event.index == 0 else Stage.DECODE, event.busy_s)
        if before == 0 and count > 0:
            run.took_first_token()
            run.release(*{span.encoder_address for span in self._request.media})
            run.timeline.enter(Stage.TRANSFER if self._split else Stage.DECODE)
        if self._split and count > 1 and run.timeline.stage is Stage.TRANSFER:
            run.timeline.enter(Stage.DECODE)
        if not run.wants_token_ids:
            delta = replace(delta, token_ids=())
        if delta.text or delta.reasoning or delta.token_ids:
            run.events.put_nowait(delta)
        return self._output.ending

    def _pass(self, kind: MilestoneKind, busy_s: float) -> None:
        timeline = self._run.timeline
        match kind:
            case MilestoneKind.PREFILL_STARTED:
                if timeline.stage is Stage.QUEUED:
                    timeline.enter(Stage.PREFILL)
            case MilestoneKind.TRANSFERRED:
                timeline.add_busy(Stage.TRANSFER, busy_s)
