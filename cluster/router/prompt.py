"""The prompt of one request: what it was made of, and the leases that keep its media where engines find them."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field

from actors.errors import POISON, InternalError, MediaChanged, Unavailable
from actors.reports import EncoderInfo
from actors.types import MediaKind, MediaSpan, PreprocessReply, PreprocessRequest, Stage
from cluster.generation import GenerateCall
from cluster.policy import pick_encoder
from cluster.router.services import Services
from cluster.router.stages import MissingPatches, Preprocessed, StageLost
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
        return sum(item.grid.tokens for item in self.reply.media)

    @property
    def video_tokens(self) -> int:
        return sum(item.grid.tokens for item in self.reply.media if item.kind is MediaKind.VIDEO)


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
        keep_patches=keep_patches,
        media_options=call.media_options,
    )


class PromptKeeper:
    """Makes the prompt, makes its media again when they were lost, and gives every lease back.

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
    ) -> None:
        self._request_id = request_id
        self._call = call
        self._timeout_s = timeout_s
        self._services = services
        self._timeline = timeline
        self._progress = progress
        self._prompt: Prompt | None = None
        self._leases = _Leases()
        self._needed_by: set[int] = set()
        self._making = asyncio.Lock()

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
        """Preprocesses and encodes, for all choices.

        Raises:
            ServingError: what is wrong with the messages, or a part that was lost.
        """
        self._needed_by = set(range(self._call.n))
        self._prompt = await self._make(0)
        return self._prompt

    async def make_again(self, known: tuple[MediaSpan, ...], choice: int) -> tuple[MediaSpan, ...]:
        """Answers MediaNeed for a choice whose engine knows some spans: fetches and encodes everything once more,
        unless another choice had that done since.

        Raises:
            MediaChanged: the media are no longer what the prompt was made of.
        """
        self.need(choice)
        async with self._making:
            if self.prompt.spans is known:
                self._services.recorder.retried(Stage.ENCODE, "EMBEDDINGS_GONE")
                self._prompt = await self._make(choice)
        return self.prompt.spans

    def need(self, choice: int) -> None:
        """The choice's prompt has to be computed once more."""
        self._needed_by.add(choice)

    def computed(self, choice: int) -> None:
        """The choice has a token, so its prompt is computed. Once that is true of all, embeddings are given back."""
        self._needed_by.discard(choice)
        if not self._needed_by:
            self._release(self._leases.embeddings)

    def close(self) -> None:
        """Gives everything back. Idempotent."""
        self._release(self._leases.patches)
        self._release(self._leases.embeddings)

    async def _make(self, choice: int) -> Prompt:
        """Another preprocessor or encoder does what a lost one did, as often as it takes: the deadline ends it, or the
        suspicion that they die of the request.
        """
        done: Preprocessed | None = None
        misses = deaths = 0
        while True:
            try:
                if done is None:
                    done = await self._preprocess(choice)
                    self._check_same(done.reply)
                return Prompt(reply=done.reply, spans=await self._encode(done, choice))
            except MissingPatches:
                log.warning("request %s: patches were gone before they were encoded", self._request_id)
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
                self._services.recorder.retried(Stage.PREPROCESS if done is None else Stage.ENCODE, error.reason)
                await asyncio.sleep(delay_s)

    def _check_same(self, again: PreprocessReply) -> None:
        """Raises MediaChanged for another prompt than the one engines know."""
        if self._prompt is None:
            return
        before = self._prompt.reply
        if (again.prompt_ids, again.media) != (before.prompt_ids, before.media):
            raise MediaChanged("media changed while the request was running")

    async def _preprocess(self, choice: int) -> Preprocessed:
        self._progress.enter(choice, Stage.PREPROCESS)
        done = await self._services.preprocess.run(
            preprocess_request(self._call, lease=self._new_lease(), context_limit=self._services.context_limit())
        )
        self._leases.patches.add((done.reply.media_address, done.lease))
        self._timeline.add_busy(Stage.PREPROCESS, done.reply.busy_s)
        return done

    async def _encode(self, done: Preprocessed, choice: int) -> tuple[MediaSpan, ...]:
        """Has all media encoded; their patches are given back as soon as that is done."""
        reply = done.reply
        if not reply.media:
            return ()
        self._progress.enter(choice, Stage.ENCODE)
        encoder = await self._find_encoder(reply.media[0].content_keys[0])
        lease = self._new_lease()
        self._leases.embeddings.add((encoder.address, lease))
        spans, busy_s = await self._services.encode.run(
            encoder, reply.media, lease=lease, patch_address=reply.media_address, timeout_s=self._timeout_s
        )
        self._timeline.add_busy(Stage.ENCODE, busy_s)
        self._release(self._leases.patches)
        return spans

    async def _find_encoder(self, content_key: bytes) -> EncoderInfo:
        """For a request whose first unit has that key: all turns of a conversation go to one encoder.

        Waits for one while those there were are replaced. Raises Unavailable if there never was one.
        """
        fleet, leases = self._services.fleet, self._services.leases
        while True:
            trusted = [entry for entry in fleet.encoders if not leases.doubts(entry.info.address)]
            encoder = pick_encoder(trusted, content_key)
            if encoder is not None:
                return encoder
            if not fleet.had_encoder:
                raise Unavailable("no vision encoder is ready", reason="NO_ENCODER", retry_after_s=1.0)
            await asyncio.sleep(RECHECK_S)

    def _release(self, leases: set[tuple[str, str]]) -> None:
        while leases:
            self._services.leases.release(*leases.pop())

    def _new_lease(self) -> str:
        self._leases.count += 1
        return f"{self._request_id}#{self._leases.count}"
