"""The prompt of one request: what it was made of, and the leases that keep its media where engines find them."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field

from actors.errors import POISON, InternalError, MediaChanged, Unavailable
from actors.reports import EncoderInfo, EngineInfo
from actors.types import MediaKind, MediaSpan, PreprocessReply, PreprocessRequest, Stage, vision_end
from actors.wire.media import EncodedUnit
from cluster.generation import GenerateCall
from cluster.policy.choose import choose
from cluster.policy.views import Demand, cached_tokens
from cluster.router.encoders import patches_of
from cluster.router.prefix import PromptHashes, reusable
from cluster.router.services import Services
from cluster.router.stages import MissingPatches, Preprocessed, StageLost, spans_at
from cluster.router.story import Story, What
from cluster.router.timeline import Progress, Timeline
from cluster.router.verdict import Verdict, judge
from cluster.tools import template_form

log = logging.getLogger(__name__)

STAGE_DEATHS = 8
"""Of parts that worked on one request, after which it is refused. Other requests may have been the cause of some."""
DEATH_DELAY_S = 5.0
"""Longest wait behind a death: a dead part is offered until it is known to be dead, and replacing it takes time."""
RECHECK_S = 0.2
"""How often a place is looked for while there is none, or the one that was asked leaves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """Token ids and media as engines take them."""

    reply: PreprocessReply
    spans: tuple[MediaSpan, ...]

    @property
    def media_tokens(self) -> int:
        return _tokens_of(self.reply)

    @property
    def video_tokens(self) -> int:
        return sum(item.grid.tokens for item in self.reply.media if item.kind is MediaKind.VIDEO)

    def unit_at(self, position: int) -> bytes | None:
        """Content key of the unit whose placeholders begin there."""
        for item in self.reply.media:
            index, rest = divmod(position - item.offset, item.grid.tokens_per_unit)
            if not rest and 0 <= index < item.grid.units:
                return item.content_keys[index]
        return None


def _tokens_of(reply: PreprocessReply) -> int:
    return sum(item.grid.tokens for item in reply.media)


@dataclass(kw_only=True, slots=True)
class _Leases:
    patches: set[tuple[str, str]] = field(default_factory=set)
    embeddings: set[tuple[str, str]] = field(default_factory=set)
    count: int = 0


def preprocess_request(
    call: GenerateCall, *, lease: str, context_limit: int, keep_patches: bool = True
) -> PreprocessRequest:
    """All of a call that shapes its prompt."""
    return PreprocessRequest(
        lease=lease,
        messages=call.messages,
        prompt=call.prompt,
        add_special_tokens=call.add_special_tokens,
        thinking=call.thinking,
        tools=tuple(map(template_form, call.offered_tools)),
        max_prompt_tokens=context_limit - 1,
        keep_patches=keep_patches and any(message.has_media for message in call.messages),
        media_options=call.media_options,
    )


class PromptKeeper:
    """Makes the prompt, makes its media again when they were lost, and gives every lease back.

    A prompt is there once its first unit is encoded: engines begin with that one while the others follow. What goes
    wrong with those is mended in the background, or told to a choice whose engine misses one (``make_again``). Where
    the engine that is to compute it has the keys and values of all its media, as in the later turns of a conversation,
    nothing is encoded; should it have lost them by then, it asks for what it needs.

    Embeddings are leased until no choice waits for its prompt to be computed. Attempts that begin after that usually
    find them in the encoder's cache; where they do not, ``make_again`` answers.
    """

    def __init__(
        self,
        request_id: str,
        call: GenerateCall,
        *,
        timeout_s: float,
        services: Services,
        timeline: Timeline,
        progress: Progress,
        story: Story,
    ) -> None:
        self._request_id = request_id
        self._call = call
        self._timeout_s = timeout_s
        self._services = services
        self._timeline = timeline
        self._progress = progress
        self._story = story
        self._prompt: Prompt | None = None
        self._leases = _Leases()
        self._needed_by: set[int] = set()
        self._making: asyncio.Task[None] | None = None
        self._ending: set[asyncio.Task[None]] = set()
        """Makings that were cancelled."""
        self._stage = Stage.PREPROCESS
        """Of the making."""
        self._encoded: set[bytes] = set()
        """Content keys of what was made so far."""
        self._waiting: dict[int, bytes | None] = {}
        """Choices that cannot go on before that unit is encoded, or, if None, before there is a prompt."""
        self._changed = asyncio.Event()

    @property
    def prompt(self) -> Prompt:
        """As last made."""
        assert self._prompt is not None
        return self._prompt

    @property
    def patch_address(self) -> str | None:
        """Of the preprocessor that keeps patches for the request now."""
        return next((address for address, _ in self._leases.patches), None)

    @property
    def embedding_address(self) -> str | None:
        """Of the encoder that keeps or makes embeddings for the request now."""
        return next((address for address, _ in self._leases.embeddings), None)

    async def make(self) -> Prompt:
        """Preprocesses and begins to encode, for all choices.

        Raises:
            ServingError: what is wrong with the messages, or a part that was lost.
        """
        self._needed_by = set(range(self._call.n))
        return await self._other_than(None, 0)

    async def make_again(self, known: tuple[MediaSpan, ...], choice: int) -> tuple[MediaSpan, ...]:
        """Answers MediaNeed for a choice whose engine knows some spans: fetches and encodes everything once more,
        unless that was or is being done since.

        Raises:
            MediaChanged: the media are no longer what the prompt was made of.
            ServingError: what kept a unit from being encoded.
        """
        self.need(choice)
        self._story.note(What.MEDIA_AGAIN, choice=choice)
        if self.prompt.spans is known and not self._is_making:
            self._services.recorder.retried(Stage.ENCODE, "EMBEDDINGS_GONE")
        return (await self._other_than(known, choice)).spans

    def need(self, choice: int) -> None:
        """The choice's prompt has to be computed once more."""
        self._needed_by.add(choice)
        self._waiting.pop(choice, None)

    def await_unit(self, choice: int, position: int) -> None:
        """The choice's engine has computed all before the unit that begins at ``position``, and does not have that one.
        If it is not encoded yet, encoding is what the choice waits for now.
        """
        key = self.prompt.unit_at(position)
        if self._is_making and key is not None and key not in self._encoded:
            self._waiting[choice] = key
            self._progress.enter(choice, self._stage)

    def computed(self, choice: int) -> None:
        """The choice has a token, so its prompt is computed. Once that is true of all, embeddings are given back."""
        self._needed_by.discard(choice)
        self._waiting.pop(choice, None)
        if not self._needed_by:
            self._give_back()

    async def close(self) -> None:
        """Gives everything back. Idempotent."""
        self._give_back()
        if self._ending:
            await asyncio.wait(self._ending)

    def _give_back(self) -> None:
        """Nobody needs media any more, not even those that are still being encoded."""
        if self._making is not None and self._is_making:
            self._making.cancel()
            self._ending.add(self._making)
            self._making.add_done_callback(self._ending.discard)
            self._making = None
        self._release(self._leases.patches)
        self._release(self._leases.embeddings)

    @property
    def _is_making(self) -> bool:
        return self._making is not None and not self._making.done()

    async def _other_than(self, known: tuple[MediaSpan, ...] | None, choice: int) -> Prompt:
        """Waits for a prompt with other spans, and has one made where none is on its way."""
        self._waiting[choice] = None
        if self._is_making:
            self._progress.enter(choice, self._stage)
        try:
            while self._prompt is None or self._prompt.spans is known:
                if self._is_making:
                    await self._changed.wait()
                    continue
                if self._making is not None:
                    self._making.result()
                self._making = asyncio.get_running_loop().create_task(self._make())
                self._making.add_done_callback(self._note_end)
            return self._prompt
        finally:
            self._waiting.pop(choice, None)

    def _note_end(self, making: asyncio.Task[None]) -> None:
        if not making.cancelled() and (error := making.exception()) is not None:
            log.info("request %s: making its prompt failed: %s", self._request_id, error)
        self._tell()

    def _tell(self) -> None:
        """There is another prompt, or the making of one has ended."""
        self._changed.set()
        self._changed = asyncio.Event()

    def _enter(self, stage: Stage) -> None:
        self._stage = stage
        for choice in self._waiting:
            self._progress.enter(choice, stage)

    async def _make(self) -> None:
        """Another preprocessor or encoder does what a lost one did, as often as it takes: the deadline ends it, or the
        suspicion that they die of the request.
        """
        done: Preprocessed | None = None
        misses = deaths = 0
        while True:
            try:
                if done is None:
                    done = await self._preprocess()
                    self._check_same(done.reply)
                await self._encode(done.reply)
                return
            except MissingPatches:
                log.warning("request %s: patches were gone before they were encoded", self._request_id)
                self._story.note(What.STAGE_LOST, message="patches were gone before they were encoded")
                self._services.recorder.retried(Stage.ENCODE, "PATCHES_GONE")
                done = None
                self._release(self._leases.patches)
                await asyncio.sleep(RECHECK_S if misses else 0.0)
                misses += 1
            except Unavailable as error:
                verdict = judge(error, newcomer=True)
                if verdict is Verdict.TOLD:
                    raise
                if isinstance(error, StageLost) and error.died:
                    deaths += 1
                if deaths >= STAGE_DEATHS:
                    log.error("request %s is refused: %d parts died while they worked on it", self._request_id, deaths)
                    message = "preprocessors or encoders died while they worked on this request"
                    raise InternalError(message, reason=POISON) from None
                delay_s = self._services.budget.spend() if verdict is Verdict.LOST else RECHECK_S
                if deaths > 1:
                    delay_s += min(RECHECK_S * 2**deaths, DEATH_DELAY_S)
                log.warning("request %s: %s: again in %.1f s", self._request_id, error.message, delay_s)
                self._story.note(What.STAGE_LOST, message=error.message, again_in_s=delay_s)
                self._services.recorder.retried(Stage.PREPROCESS if done is None else Stage.ENCODE, error.reason)
                await asyncio.sleep(delay_s)

    def _check_same(self, again: PreprocessReply) -> None:
        """Raises MediaChanged for another prompt than the one engines know."""
        if self._prompt is None:
            return
        before = self._prompt.reply
        if (again.prompt_ids, again.media) != (before.prompt_ids, before.media):
            raise MediaChanged("media changed while the request was running")

    async def _preprocess(self) -> Preprocessed:
        self._enter(Stage.PREPROCESS)
        done = await self._services.preprocess.run(
            preprocess_request(self._call, lease=self._new_lease(), context_limit=self._services.context_limit())
        )
        reply = done.reply
        self._leases.patches.add((reply.media_address, done.lease))
        self._story.note(
            What.PREPROCESSED,
            preprocessor=reply.media_address,
            prompt_tokens=len(reply.prompt_ids),
            media_tokens=_tokens_of(reply),
            units=sum(len(item.content_keys) for item in reply.media),
            calls=done.calls,
            hedge_won=done.lease.endswith("+"),
            busy_s=reply.busy_s,
        )
        self._timeline.add_busy(Stage.PREPROCESS, reply.busy_s)
        return done

    async def _encode(self, reply: PreprocessReply) -> None:
        """Has all media encoded; their patches are given back as soon as that is done."""
        if not reply.media:
            self._take(Prompt(reply=reply, spans=()))
            return
        self._encoded.clear()
        self._enter(Stage.ENCODE)
        first = reply.media[0].content_keys[0]
        encoder = await self._find_encoder(reply)
        prompt = Prompt(reply=reply, spans=spans_at(encoder, reply.media))
        if self._prompt is None and (holder := self._holder(prompt)) is not None:
            self._story.note(What.MEDIA_HELD, engine=holder.engine_id)
            self._release(self._leases.patches)
            self._take(prompt)
            return
        lease = self._new_lease()
        self._leases.embeddings.add((encoder.address, lease))
        units: list[EncodedUnit] = []

        def take_unit(unit: EncodedUnit) -> None:
            units.append(unit)
            self._timeline.add_busy(Stage.ENCODE, unit.busy_s)
            self._encoded.add(unit.content_key)
            if unit.content_key == first:
                self._take(prompt)
            for choice in [choice for choice, key in self._waiting.items() if key == unit.content_key]:
                del self._waiting[choice]
                self._progress.enter(choice, Stage.PREFILL)

        with self._services.encoders.encoding(encoder.incarnation, patches_of(reply.media)):
            await self._services.encode.run(
                encoder,
                reply.media,
                lease=lease,
                patch_address=reply.media_address,
                timeout_s=self._timeout_s,
                on_unit=take_unit,
            )
        self._story.note(
            What.ENCODED,
            encoder=encoder.encoder_id,
            units=len(units),
            cached_units=sum(unit.cached for unit in units),
            busy_s=sum(unit.busy_s for unit in units),
        )
        self._release(self._leases.patches)

    def _take(self, prompt: Prompt) -> None:
        self._prompt = prompt
        self._tell()

    async def _find_encoder(self, reply: PreprocessReply) -> EncoderInfo:
        """The one that goes with the engines which will compute the prompt: where its embeddings are or begin soonest,
        near to those engines. The engines are picked for good when they can begin.

        Waits for one while those there were are replaced. Raises Unavailable if there never was one.
        """
        fleet, leases = self._services.fleet, self._services.leases
        while True:
            trusted = [entry for entry in fleet.encoders if not leases.doubts(entry.info.address)]
            views = self._services.encoders.views(trusted)
            several = len(views) > 1
            demand = self._demand(reply, views[0].info if several else None)
            decision = choose(demand, fleet.engines() if several else [], views)
            if decision.encoder is not None:
                self._story.note(
                    What.ENCODER,
                    candidates=decision.encoders,
                    encoder=decision.encoder.encoder_id,
                    address=decision.encoder.address,
                )
                return decision.encoder
            if not fleet.had_encoder:
                raise Unavailable("no vision encoder is ready", reason="NO_ENCODER", retry_after_s=1.0)
            await asyncio.sleep(RECHECK_S)

    def _holder(self, prompt: Prompt) -> EngineInfo | None:
        """The engine that would compute the prompt now, if it has everything up to the last of its media."""
        services, token_ids = self._services, prompt.reply.prompt_ids
        demand = Demand(
            token_count=len(token_ids),
            prefix_hashes=reusable(token_ids, prompt.spans, self._call.salt, self._call.prompt_logprobs),
            alone_tokens=services.alone_tokens,
            vision_end=vision_end(token_ids, services.im_patch_id),
            media_tokens=prompt.media_tokens,
            encoder_address=prompt.spans[0].encoder_address,
        )
        engines = services.fleet.engines()
        route = choose(demand, engines).route
        if route is None:
            return None
        (view,) = (view for view in engines if view.info is route.prefill)
        held = cached_tokens(view, demand.token_count, demand.prefix_hashes)
        return route.prefill if held >= prompt.spans[-1].end else None

    def _demand(self, reply: PreprocessReply, encoder: EncoderInfo | None) -> Demand:
        """Of a prompt that is to be encoded, as it will be named by engines where there is a choice of encoders."""
        units, media_tokens = patches_of(reply.media), _tokens_of(reply)
        if encoder is None:
            return Demand(token_count=len(reply.prompt_ids), units=units, media_tokens=media_tokens)
        return Demand(
            token_count=len(reply.prompt_ids),
            prefix_hashes=PromptHashes(reply.prompt_ids, spans_at(encoder, reply.media), self._call.salt),
            units=units,
            media_tokens=media_tokens,
        )

    def _release(self, leases: set[tuple[str, str]]) -> None:
        while leases:
            self._services.leases.release(*leases.pop())

    def _new_lease(self) -> str:
        self._leases.count += 1
        return f"{self._request_id}#{self._leases.count}"
