"""A router with real links to scripted engines; preprocessing and encoding are doubles."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

from actors.errors import ServingError
from actors.reports import EncoderInfo, EngineInfo, LoadReport
from actors.types import (
    AttemptMode,
    EngineRequest,
    EngineRole,
    FinishReason,
    Grid,
    ImagePart,
    MediaKind,
    MediaSource,
    MediaSpan,
    Message,
    MessageRole,
    PreprocessReply,
    PreprocessRequest,
    PromptLogprobs,
    PromptMedia,
    SequenceKey,
    Stage,
    TextPart,
    TokenEvent,
    TokenLogprobs,
)
from actors.wire.channels import make_server
from actors.wire.engine_link import EngineLinkServicer
from actors.wire.media import EncodedUnit, units_of
from cluster.generation import ChoiceFinished, Delta, Event, Finished, GenerateCall
from cluster.registry import EncoderEntry, EngineEntry, PreprocessorEntry, Snapshot
from cluster.router.encoders import EncoderBook
from cluster.router.fleet import Fleet
from cluster.router.leases import LeaseKeeper
from cluster.router.output import OutputAssembler
from cluster.router.records import Recorder, RequestRecord
from cluster.router.retry_budget import RetryBudget
from cluster.router.router import Router
from cluster.router.sampling import SamplingDefaults, resolve_sampling
from cluster.router.scores import TokenScorer
from cluster.router.services import Services
from cluster.router.stages import MissingPatches, Preprocessed, StageLost
from cluster.router.suspects import Suspects
from ernie_serving.internal.v1 import engine_link_pb2, engine_link_pb2_grpc
from tests.doubles import ByteVocabulary
from tests.waiting import LIMIT_S, eventually

PICTURE = ImagePart(source=MediaSource(content=b""))
"""Its patches are there where a test gives the stages media."""
CALL = GenerateCall(messages=(Message(role=MessageRole.USER, parts=(TextPart(text="hi"), PICTURE)),), max_tokens=8)
IMAGE = PromptMedia(kind=MediaKind.IMAGE, offset=1, grid=Grid(1, 2, 2), content_keys=(b"c" * 32,))
END = 2


class Letters:
    """Token id n is the n-th letter; no thinking, no stop strings unless told."""

    in_reasoning = False
    matched: str | None = None

    def __init__(self, stop: str | None = None) -> None:
        self._stop = stop

    def push(self, piece):  # type: ignore[no-untyped-def]
        return "".join(chr(ord("a") + token) for token in piece)

    def flush(self) -> str:
        return ""


class NoThinking(Letters):
    def push(self, piece):  # type: ignore[no-untyped-def]
        return "", piece

    def flush(self):  # type: ignore[no-untyped-def]
        return "", ""


class StopAt(Letters):
    def push(self, piece, *, match=True):  # type: ignore[no-untyped-def]
        if match and self._stop is not None and self._stop in piece:
            self.matched = self._stop
            return piece[: piece.index(self._stop)]
        return piece


def make_output(call: GenerateCall, starts_thinking: bool) -> OutputAssembler:
    return OutputAssembler(
        Letters(),  # type: ignore[arg-type]
        NoThinking(),  # type: ignore[arg-type]
        StopAt(call.stop[0] if call.stop else None),  # type: ignore[arg-type]
        stop_token_ids=call.stop_token_ids,
        min_tokens=call.min_tokens,
        score=None if call.logprobs is None else SCORE,
    )


def letter(token_id: int) -> bytes:
    return bytes([ord("a") + token_id])


SCORE = TokenScorer(letter)


def logprobs_of(token_id: int) -> TokenLogprobs:
    """What scripted engines report of a token."""
    return TokenLogprobs(token_id=token_id, logprob=-0.5, rank=1, top=((token_id, -0.5), (0, -2.0)))


class HeldBack(asyncio.Queue):  # type: ignore[type-arg]
    """An outbox from which nothing is taken until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.let_go = asyncio.Event()

    async def get(self) -> engine_link_pb2.LinkResponse:
        await self.let_go.wait()
        message: engine_link_pb2.LinkResponse = await super().get()
        return message


class ScriptedEngine:
    """An engine whose tokens the test sends."""

    def __init__(self, name: str, role: EngineRole) -> None:
        self.server = make_server()
        self.free_blocks = 100
        self.draining = False
        self._held_back: list[HeldBack] = []
        self.info = EngineInfo(
            engine_id=name,
            incarnation=f"{name}-1",
            address=f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}",
            role=role,
            epoch=1,
            fingerprint="f",
            dtype="float64",
            block_size=16,
            switches="s",
            max_model_len=64,
        )
        self.links = EngineLinkServicer(self, lambda: self.info)
        engine_link_pb2_grpc.add_EngineLinkServiceServicer_to_server(self.links, self.server)
        self.submits: asyncio.Queue[tuple[SequenceKey, EngineRequest, AttemptMode]] = asyncio.Queue()
        self.cancels: asyncio.Queue[SequenceKey] = asyncio.Queue()
        self.supplies: asyncio.Queue[tuple[MediaSpan, ...]] = asyncio.Queue()

    def submit(self, key: SequenceKey, request: EngineRequest, mode: AttemptMode, peer: tuple[str, str] | None) -> None:
        assert (peer is None) == (mode is AttemptMode.COLOCATED)
        self.submits.put_nowait((key, request, mode))

    def cancel(self, key: SequenceKey) -> None:
        self.cancels.put_nowait(key)

    def supply_media(self, key: SequenceKey, media: tuple[MediaSpan, ...]) -> None:
        self.supplies.put_nowait(media)

    def load(self) -> LoadReport:
        return LoadReport(
            step=0,
            running=0,
            waiting=0,
            free_blocks=self.free_blocks,
            total_blocks=100,
            block_size=16,
            queued_tokens=0,
            draining=self.draining,
        )

    def freeze(self) -> None:
        """On its present links it says nothing from now on, not even that it lives; what it would have said waits."""
        for session in self.links._open:
            former, session.outbox = session.outbox, HeldBack()
            former.put_nowait(engine_link_pb2.LinkResponse())  # takes the writer on to the new one
            self._held_back.append(session.outbox)

    def thaw(self) -> None:
        """Says what it would have said."""
        for outbox in self._held_back:
            outbox.let_go.set()

    async def taken(self) -> tuple[SequenceKey, EngineRequest, AttemptMode]:
        return await asyncio.wait_for(self.submits.get(), LIMIT_S)

    async def cancelled(self) -> SequenceKey:
        return await asyncio.wait_for(self.cancels.get(), LIMIT_S)

    def end(self, key: SequenceKey, error: ServingError) -> None:
        self.links.deliver_end(key, error)

    def score_prompt(self, key: SequenceKey, first: int, *tokens: int | None) -> None:
        entries = tuple(None if token is None else logprobs_of(token) for token in tokens)
        self.links.deliver_prompt_logprobs(PromptLogprobs(key=key, first=first, entries=entries))

    def say(
        self,
        key: SequenceKey,
        first: int,
        *tokens: int,
        finish: FinishReason | None = None,
        scored: bool = False,
    ) -> None:
        events = [
            TokenEvent(
                key=key,
                index=first + i,
                token_id=token,
                busy_s=0.5,
                logprobs=logprobs_of(token) if scored else None,
            )
            for i, token in enumerate(tokens)
        ]
        if finish is not None:
            events[-1] = replace(events[-1], finish=finish)
        self.links.deliver_tokens(events)


class Stages:
    """Doubles of preprocessing, encoding and the places that hold leases."""

    def __init__(self) -> None:
        self.media: tuple[PromptMedia, ...] = ()
        self.prompt_ids: tuple[int, ...] = (5, 6, 7)
        self.error: Exception | None = None
        self.losses = 0
        """Preprocessors that are lost before one answers."""
        self.gate = asyncio.Event()
        self.gate.set()
        self.misses = 0
        self.encoder_losses = 0
        self.losses_are_deaths = False
        self.unit_gates: dict[bytes, asyncio.Event] = {}
        """Units, by content key, that are not encoded before."""
        self.unit_errors: dict[bytes, Exception] = {}
        """What goes wrong, once, in the place of a unit."""
        self.preprocessed = 0
        self.encoded = 0
        self.leases: set[tuple[str, str]] = set()
        self.keeper: LeaseKeeper

    async def run(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        return await (self._preprocess(*args) if len(args) == 1 else self._encode(*args, **kwargs))

    async def _preprocess(self, request: PreprocessRequest) -> Preprocessed:
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        if self.losses:
            self.losses -= 1
            raise StageLost("a preprocessor", died=self.losses_are_deaths)
        self.preprocessed += 1
        if self.media and request.keep_patches:
            self.keeper.hold("pre:1", request.lease)
            self.leases.add(("pre:1", request.lease))
        reply = PreprocessReply(
            prompt_ids=self.prompt_ids,
            media=self.media,
            starts_thinking=False,
            media_address="pre:1",
            incarnation="p",
            busy_s=0.25,
        )
        return Preprocessed(reply=reply, lease=request.lease)

    async def _encode(
        self,
        encoder: EncoderInfo,
        media: tuple[PromptMedia, ...],
        *,
        lease: str,
        patch_address: str,
        timeout_s: float,
        on_unit: Callable[[EncodedUnit], None],
    ) -> None:
        self.encoded += 1
        self.keeper.hold(encoder.address, lease)
        self.leases.add((encoder.address, lease))
        if self.misses:
            self.misses -= 1
            raise MissingPatches
        if self.encoder_losses:
            self.encoder_losses -= 1
            raise StageLost("a vision encoder", died=self.losses_are_deaths)
        for unit in units_of(media):
            if unit.content_key in self.unit_gates:
                await self.unit_gates[unit.content_key].wait()
            if unit.content_key in self.unit_errors:
                raise self.unit_errors.pop(unit.content_key)
            on_unit(EncodedUnit(content_key=unit.content_key, embedding_key=b"", busy_s=0.125))

    async def renew(self, address: str, leases: list[str]) -> list[str]:
        return []

    async def release(self, address: str, leases: list[str]) -> None:
        self.leases -= {(address, lease) for lease in leases}


class Recorded(Recorder):
    """What the router tells of its requests."""

    def __init__(self) -> None:
        self.admitted_ids: list[str] = []
        self.refusals: list[str] = []
        self.gaps: list[float] = []
        self.retries: list[tuple[Stage, str]] = []
        self.records: list[RequestRecord] = []

    def admitted(self, request_id: str) -> None:
        self.admitted_ids.append(request_id)

    def refused(self, reason: str) -> None:
        self.refusals.append(reason)

    def token_gap(self, seconds: float) -> None:
        self.gaps.append(seconds)

    def retried(self, stage: Stage, reason: str) -> None:
        self.retries.append((stage, reason))

    def ended(self, record: RequestRecord) -> None:
        self.records.append(record)


class World:
    def __init__(
        self, router: Router, stages: Stages, fleet: Fleet, recorder: Recorded, *engines: ScriptedEngine
    ) -> None:
        self.router, self.stages, self.fleet = router, stages, fleet
        self.engines = engines
        self.replacements: list[ScriptedEngine] = []
        self.recorder = recorder

    async def replace(self, engine: ScriptedEngine) -> ScriptedEngine:
        """Another engine of the same role in its place, as Serve would start one."""
        replacement = ScriptedEngine(f"{engine.info.engine_id}-again", engine.info.role)
        await replacement.server.start()
        self.replacements.append(replacement)
        known = self.fleet.snapshot
        kept = tuple(entry for entry in known.engines if entry.info.incarnation != engine.info.incarnation)
        entry = EngineEntry(info=replacement.info, pool="p", ready=True, load=None)
        self.fleet._adopt(dataclasses.replace(known, engines=(*kept, entry)))
        return replacement

    def ask(self, call: GenerateCall = CALL) -> asyncio.Task[list[Event]]:
        async def collect() -> list[Event]:
            return [event async for event in self.router.generate(call)]

        return asyncio.create_task(collect())


def text_of(events: Sequence[Event], choice: int = 0) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta) and event.choice == choice)


def endings(events: Sequence[Event]) -> dict[int, ChoiceFinished]:
    """By choice; fails when one ended twice, spoke after its end, or Finished is not the last event."""
    assert [isinstance(event, Finished) for event in events].index(True) == len(events) - 1
    found: dict[int, ChoiceFinished] = {}
    for event in events:
        if isinstance(event, Delta | ChoiceFinished):
            assert event.choice not in found
        if isinstance(event, ChoiceFinished):
            found[event.choice] = event
    return found


@asynccontextmanager
async def world(
    *roles: EngineRole,
    max_active: int = 4,
    encoders: bool = True,
    preprocessors: bool = True,
    default_timeout_s: float = 60,
    lost_after_s: float = 3.0,
    alone_tokens: int = 0,
) -> AsyncIterator[World]:
    stages = Stages()
    engines = [ScriptedEngine(f"e{i}", role) for i, role in enumerate(roles)]
    replacements: list[ScriptedEngine] = []
    for engine in engines:
        await engine.server.start()
    encoder = EncoderInfo(encoder_id="v", incarnation="v1", address="enc:1", fingerprint="ff", dtype="float64")
    snapshot = Snapshot(
        term=1,
        version=1,
        engines=tuple(EngineEntry(info=engine.info, pool="p", ready=True, load=None) for engine in engines),
        encoders=(EncoderEntry(info=encoder, queued_patches=0),) if encoders else (),
        preprocessors=(PreprocessorEntry(incarnation="p", address="pre:1"),) if preprocessors else (),
    )

    async def planner(known_version: int, known_term: int, timeout_s: float) -> Snapshot:
        if known_version == snapshot.version:
            await asyncio.sleep(timeout_s)
        return snapshot

    fleet = Fleet(planner, "r", lost_after_s=lost_after_s)
    keeper = stages.keeper = LeaseKeeper(stages)
    recorder = Recorded()
    services = Services(
        fleet=fleet,
        leases=keeper,
        preprocess=stages,  # type: ignore[arg-type]
        encode=stages,  # type: ignore[arg-type]
        encoders=EncoderBook(),
        budget=RetryBudget(share=0.2, burst=64, clock=time.monotonic),
        suspects=Suspects(),
        recorder=recorder,
        model_name="tiny",
        context_limit=lambda: fleet.context_limit(64),
        vocab_size=100,
        im_patch_id=90,
        alone_tokens=alone_tokens,
        vocabulary=ByteVocabulary(),
        resolve_sampling=lambda call, reply: resolve_sampling(
            call,
            SamplingDefaults(),
            prompt_tokens=len(reply.prompt_ids),
            starts_thinking=reply.starts_thinking,
            max_model_len=64,
            spellings=lambda text: (tuple(ord(letter) - ord("a") for letter in text),),
        ),
        make_output=make_output,
        score=SCORE,
        clock=time.monotonic,
        wall_clock=time.time,
    )
    router = Router(
        services,
        incarnation="r",
        source="dir",
        max_active=max_active,
        default_timeout_s=default_timeout_s,
        random_seed=lambda: -1,
    )
    fleet.start()
    keeper.start()
    try:
        await eventually(lambda: len(fleet.engines()) == len(engines))
        w = World(router, stages, fleet, recorder, *engines)
        replacements = w.replacements
        yield w
        await eventually(lambda: router.active_count == 0)
        await eventually(lambda: not stages.leases)
        router.check_integrity()
    finally:
        await fleet.close()
        await keeper.close()
        for engine in (*engines, *replacements):
            await engine.server.stop(None)
