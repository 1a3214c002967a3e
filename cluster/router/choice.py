"""One choice of a request: one attempt after the other until it ends, one stream to the client.

An attempt that ends before the choice does is followed by another (``verdict``): the choice waits, for room, for an
engine that is replaced or for the retry budget, keeps the request's arrival, and goes on behind the tokens it has,
through a prefill engine. What the client has seen stays; the output knows every index it took, and a forgotten attempt
is not listened to.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from actors.errors import POISON, InternalError, ServingError, Unavailable
from actors.types import (
    EngineRequest,
    FinishReason,
    MediaSpan,
    MilestoneKind,
    PromptLogprobs,
    SequenceKey,
    Stage,
    TokenEvent,
    service_rank,
)
from cluster.generation import ChoiceFinished, Event, GenerateCall
from cluster.policy.candidates import MOST_TOLD, Candidate
from cluster.policy.choose import Decision, choose
from cluster.policy.views import Demand, EngineView, Route, has_room_on
from cluster.router.attempt import Attempt, RouteLinks
from cluster.router.link import EngineLost, Milestone
from cluster.router.output import Ending, OutputAssembler
from cluster.router.prefix import request_hashes
from cluster.router.prompt import PromptKeeper
from cluster.router.scores import PromptScores
from cluster.router.services import Services
from cluster.router.story import Fact, Story, What
from cluster.router.suspects import SETTLE_S, ChoiceKey
from cluster.router.timeline import Progress, Timeline
from cluster.router.verdict import NOT_CACHED, Verdict, judge

log = logging.getLogger(__name__)

RECHECK_S = 0.5
"""For a suspect that waits: engines may also become free by coming up."""
WAIT_NOTED_S = 0.001
"""Shorter waits are none."""


@dataclass(kw_only=True, slots=True)
class RequestState:
    """What the choices of a request share."""

    request_id: str
    call: GenerateCall
    services: Services
    events: asyncio.Queue[Event | ServingError]
    timeline: Timeline
    progress: Progress
    keeper: PromptKeeper
    story: Story
    request: EngineRequest
    """Of a choice that begins; without prompt log-probabilities, which are only asked for once."""
    vision_end: int
    """Leading tokens that only engines which prefill can compute."""
    prompt_scores: PromptScores | None
    """Given when the caller asked for them."""
    first_token_s: float | None = None
    cached_tokens: int | None = None
    """Of choice 0: the others find its prompt in the cache."""
    prompt_route: Route | None = None
    """Where choice 0 had the prompt computed."""
    prompt_computed: asyncio.Event = field(default_factory=asyncio.Event)
    """From now on the others find the prompt in the caches of ``prompt_route``."""

    @property
    def rank(self) -> float:
        return service_rank(self.request.arrival_s, self.request.priority)


class ChoiceRun:
    """Owns the attempts and the output of one choice. ``run`` puts its Deltas and its ChoiceFinished."""

    def __init__(self, index: int, state: RequestState) -> None:
        self.index = index
        self.output: OutputAssembler = state.services.make_output(state.call, state.keeper.prompt.reply.starts_thinking)
        self._state = state
        self._name = ChoiceKey(state.request_id, index)
        self._spans: tuple[MediaSpan, ...] = ()
        self._route: Route | None = None
        self._first = 0
        self._transferred = False
        self._attempt = 0
        self._refused_alone = False
        """An engine that decodes had less cached than was thought."""
        self.attempts = 0
        """Submitted to engines."""
        self.finish_reason: FinishReason | None = None
        """Set when the choice has ended."""
        self._first_token_s = self._last_token_s = 0.0
        """On the services' clock."""

    def _note(self, what: What, candidates: Iterable[Candidate] = (), **facts: Fact) -> None:
        self._state.story.note(what, choice=self.index, attempt=self._attempt, candidates=candidates, **facts)

    @contextlib.contextmanager
    def _waiting(self, reason: str) -> Iterator[None]:
        """Notes a wait that is one. ``reason``: what for, or the verdict it follows from."""
        since_s = self._state.story.now_s
        yield
        waited_s = self._state.story.now_s - since_s
        if waited_s > WAIT_NOTED_S:
            self._note(What.WAITED, reason=reason, waited_s=waited_s)

    async def run(self) -> None:
        """Returns when the choice has ended.

        Raises:
            ServingError: an attempt ended for a reason that another one would meet as well.
        """
        state, services = self._state, self._state.services
        try:
            for attempt in itertools.count():
                key = SequenceKey(state.request_id, attempt, self.index)
                self._attempt = attempt
                state.progress.enter(self.index, Stage.QUEUED)
                try:
                    await self._try(key)
                    break
                except ServingError as error:
                    verdict = judge(error, newcomer=attempt == 0 and self.index == 0)
                    self._note(
                        What.ATTEMPT_ENDED,
                        reason=error.reason,
                        message=error.message,
                        tokens=len(self.output.token_ids),
                        verdict=verdict.name.lower(),
                    )
                    if verdict is Verdict.TOLD:
                        raise
                    self._refused_alone |= error.reason == NOT_CACHED
                    log.info("%s: %s after %d tokens", key, error.reason, len(self.output.token_ids))
                    services.recorder.retried(Stage.PREFILL, error.reason)
                    self._check_poison(error)
                finally:
                    services.suspects.rest(self._name)
                state.keeper.need(self.index)
                with self._waiting(verdict.name.lower()):
                    await self._wait(verdict)
        finally:
            services.suspects.drop(self._name)
        assert self.output.ending is not None
        self._finish(self.output.ending)

    def _check_poison(self, error: ServingError) -> None:
        """Raises InternalError for a choice under which engines die, one after the other."""
        if not isinstance(error, EngineLost) or not error.died:
            return
        count, suspects = len(self.output.token_ids), self._state.services.suspects
        if suspects.accuse(self._name, error.incarnation, count, computed=error.computed):
            log.error("choice %s is refused: a second engine died while it computed it", self._name)
            raise InternalError("engines died while they computed this request", reason=POISON)

    async def _wait(self, verdict: Verdict) -> None:
        services = self._state.services
        match verdict:
            case Verdict.ROOM:
                await services.fleet.wait_for_room(self._token_count, self._state.rank)
            case Verdict.LOST:
                settle_s = SETTLE_S if services.suspects.is_spared(self._name) else 0.0
                await asyncio.sleep(max(settle_s, services.budget.spend()))

    def cancel(self) -> None:
        """Tells the client that the choice was cancelled, unless it has ended. ``run`` must have been stopped."""
        if self.finish_reason is None:
            self._finish(Ending(reason=FinishReason.CANCELLED))

    @property
    def gap_count(self) -> int:
        """Between its tokens."""
        return max(0, len(self.output.token_ids) - 1)

    @property
    def decoded_s(self) -> float:
        """From its first token to its last."""
        return self._last_token_s - self._first_token_s

    @property
    def engine_finished(self) -> bool:
        return self.output.engine_finished

    @property
    def decodes(self) -> bool:
        got = len(self.output.token_ids) - self._first
        return got > 1 or (got == 1 and self._transferred)

    @property
    def route(self) -> Route | None:
        """Of its last attempt."""
        return self._route

    @property
    def _token_count(self) -> int:
        return len(self._state.request.prompt_ids) + len(self.output.token_ids)

    def _finish(self, ending: Ending) -> None:
        state = self._state
        self.finish_reason = ending.reason
        state.events.put_nowait(ChoiceFinished(choice=self.index, reason=ending.reason, stop_reason=ending.stop_reason))
        self._note(What.CHOICE_FINISHED, reason=str(ending.reason), tokens=len(self.output.token_ids))
        state.keeper.computed(self.index)
        state.progress.leave(self.index)
        if self.index == 0:
            state.prompt_computed.set()

    async def _try(self, key: SequenceKey) -> None:
        state, fleet = self._state, self._state.services.fleet
        decision = await self._find_route(key.attempt)
        if key.attempt == 0 and fleet.is_behind(state.rank):
            # Others wait since before this one came: what room there is belongs to them.
            with self._waiting("behind others who wait for room"):
                await fleet.wait_for_room(self._token_count, state.rank)
            decision = await self._find_route(key.attempt)
        route = decision.route
        assert route is not None
        self._note_route(route, decision.routes)
        links = RouteLinks.of(fleet, route)
        engines = [info.incarnation for info in (route.prefill, route.decode) if info is not None]
        state.services.suspects.begin(self._name, frozenset(engines))
        self._route = route
        self._first = len(self.output.token_ids)
        self._transferred = False
        self.output.begin_attempt()
        self.attempts += 1
        await Attempt(self, key, self._request(), links).run()

    def _note_route(self, route: Route, candidates: tuple[Candidate, ...]) -> None:
        prefill, decode = route.prefill, route.decode or route.prefill
        self._note(
            What.ROUTE,
            candidates,
            prefill=prefill.engine_id,
            decode=decode.engine_id,
            prefill_role=str(prefill.role),
            decode_role=str(decode.role),
            prefill_epoch=prefill.epoch,
            decode_epoch=decode.epoch,
            tokens=self._token_count,
            known_from_choice_0=not candidates,
        )

    async def _find_route(self, attempt: int) -> Decision:
        """Waits for engines while those there were are replaced, and as a suspect for some without another one.

        Raises Unavailable if there never was a path.
        """
        fleet, suspects = self._state.services.fleet, self._state.services.suspects
        while True:
            views = fleet.engines()
            allowed = [view for view in views if suspects.may_try(self._name, view.info.incarnation)]
            decision = self._pick_route(allowed, attempt)
            if decision.route is not None:
                return self._with_excluded(decision, views, allowed)
            if len(allowed) < len(views):
                with self._waiting("another suspect is tried"), contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(RECHECK_S):
                        await suspects.changed()
            elif fleet.had_path:
                with self._waiting("no path"):
                    await fleet.wait_for_path()
            else:
                raise Unavailable("no prefill and decode path is ready", reason="NO_ENGINE", retry_after_s=1.0)

    def _pick_route(self, engines: list[EngineView], attempt: int) -> Decision:
        known = self._state.prompt_route
        if attempt == 0 and known is not None and has_room_on(engines, known, self._lacking(known)):
            return Decision(route=known)
        request = self._request()
        demand = Demand(
            token_count=self._token_count,
            prefix_hashes=request_hashes(request),
            alone_tokens=0 if self._refused_alone else self._state.services.alone_tokens,
            vision_end=self._state.vision_end,
            media_tokens=sum(span.grid.tokens for span in request.media),
            encoder_address=request.media[0].encoder_address if request.media else None,
        )
        return choose(demand, engines)

    def _with_excluded(self, decision: Decision, views: list[EngineView], allowed: list[EngineView]) -> Decision:
        """With the engines that were not asked."""
        reasons = self._state.services.fleet.set_aside()
        if len(allowed) < len(views):
            tried = {view.info.engine_id for view in views} - {view.info.engine_id for view in allowed}
            reasons |= dict.fromkeys(tried, "it tries another suspect")
        if not reasons or not decision.routes:
            return decision
        others = [Candidate(name=name, terms={}, excluded=why) for name, why in reasons.items()]
        return replace(decision, routes=(*decision.routes, *others[:MOST_TOLD]))

    def _lacking(self, route: Route) -> int:
        """Tokens that need blocks of their own where the prompt is cached: whole blocks are shared, one more is grown
        into.
        """
        block_size = route.prefill.block_size
        return (self._token_count - 1) % block_size + 1 + block_size

    def _request(self) -> EngineRequest:
        """As far as the choice has come."""
        state = self._state
        self._spans = state.keeper.prompt.spans
        sampling = state.request.sampling
        if self._misses_prompt_scores:
            sampling = replace(sampling, prompt_logprobs=state.call.prompt_logprobs)
        return replace(state.request, media=self._spans, output_ids=tuple(self.output.token_ids), sampling=sampling)

    @property
    def _misses_prompt_scores(self) -> bool:
        scores = self._state.prompt_scores
        return self.index == 0 and scores is not None and not scores.complete

    # What the attempt tells (AttemptOwner).

    def take_tokens(self, tokens: list[TokenEvent]) -> bool:
        state = self._state
        for event in tokens:
            state.timeline.add_busy(Stage.PREFILL if event.index == self._first else Stage.DECODE, event.busy_s)
        before = len(self.output.token_ids)
        delta = self.output.push(tokens)
        count = len(self.output.token_ids)
        if count == before:
            return False
        self._time_tokens(before)
        state.services.suspects.advance(self._name, count)
        if before == self._first:
            self._note(What.FIRST_TOKEN, tokens=count)
        if before == 0 and self.index == 0:
            self._tell_prompt()
        assert self._route is not None
        split = self._route.decode is not None
        # Not only with the first token of an attempt: an engine may preempt and compute the prompt once more itself.
        state.keeper.computed(self.index)
        if before == self._first and split:
            state.progress.enter(self.index, Stage.TRANSFER)
        if not split or self._transferred or count > self._first + 1:
            self._decodes()
        if not state.call.return_token_ids:
            delta = replace(delta, token_ids=())
        if delta.text or delta.reasoning or delta.tool_calls or delta.token_ids or delta.logprobs:
            state.events.put_nowait(replace(delta, choice=self.index))
        return self.output.ending is not None

    def _time_tokens(self, before: int) -> None:
        """Tokens arrived behind the ``before`` that the choice had."""
        now = self._state.services.clock()
        if before == 0:
            self._first_token_s = now
        else:
            self._state.services.recorder.token_gap(now - self._last_token_s)
        self._last_token_s = now

    def _tell_prompt(self) -> None:
        """The request's first token is here, so the prompt is computed and scored."""
        state = self._state
        state.first_token_s = state.timeline.elapsed_s
        if state.prompt_scores is not None:
            state.events.put_nowait(state.prompt_scores.event())

    def _decodes(self) -> None:
        """All engines of the route have the prompt."""
        state = self._state
        if state.progress.stage(self.index) is not Stage.DECODE:
            state.progress.enter(self.index, Stage.DECODE)
        if self.index == 0:
            state.prompt_route = self._route
            state.prompt_computed.set()

    def take_prompt_scores(self, piece: PromptLogprobs) -> None:
        if self.index == 0 and self._state.prompt_scores is not None:
            self._state.prompt_scores.take(piece)

    def pass_milestone(self, milestone: Milestone) -> None:
        state = self._state
        match milestone.kind:
            case MilestoneKind.PREFILL_STARTED:
                if self.index == 0 and state.cached_tokens is None:
                    state.cached_tokens = milestone.token_count
                self._note(What.PREFILL_STARTED, cached_tokens=milestone.token_count)
                if state.progress.stage(self.index) is Stage.QUEUED:
                    state.progress.enter(self.index, Stage.PREFILL)
            case MilestoneKind.MEDIA_AWAITED:
                state.timeline.add_busy(Stage.PREFILL, milestone.busy_s)
                state.keeper.await_unit(self.index, milestone.token_count)
            case MilestoneKind.TRANSFERRED:
                state.timeline.add_busy(Stage.TRANSFER, milestone.busy_s)
                self._note(What.TRANSFERRED, busy_s=milestone.busy_s)
                self._transferred = True
                if len(self.output.token_ids) > self._first:
                    self._decodes()

    async def make_media_again(self) -> tuple[MediaSpan, ...]:
        self._spans = await self._state.keeper.make_again(self._spans, self.index)
        self._state.progress.enter(self.index, Stage.PREFILL)
        return self._spans
