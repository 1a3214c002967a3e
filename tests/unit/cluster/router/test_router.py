"""The router with real links to scripted engines; preprocessing and encoding are doubles."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace

import pytest

from actors.errors import (
    AlreadyExists,
    ContextExceeded,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    MediaChanged,
    NotFound,
    Overloaded,
    RequestCancelled,
    ServingError,
    Unavailable,
)
from actors.types import (
    AttemptMode,
    EncoderInfo,
    EngineInfo,
    EngineRequest,
    EngineRole,
    FinishReason,
    Grid,
    LoadReport,
    MediaKind,
    MediaSpan,
    Message,
    MessageRole,
    MilestoneKind,
    PreprocessReply,
    PreprocessRequest,
    PromptMedia,
    SequenceKey,
    Stage,
    TextPart,
    TokenEvent,
)
from actors.wire.channels import make_server
from actors.wire.engine_link import EngineLinkServicer
from cluster.generation import Delta, Event, Finished, GenerateCall, Started
from cluster.registry import EncoderEntry, EngineEntry, PreprocessorEntry, Snapshot
from cluster.router.fleet import Fleet
from cluster.router.leases import LeaseKeeper
from cluster.router.output import OutputAssembler
from cluster.router.request import Services
from cluster.router.router import Router
from cluster.router.sampling import SamplingDefaults, resolve_sampling
from cluster.router.stages import MissingPatches
from ernie_serving.internal.v1 import engine_link_pb2_grpc

CALL = GenerateCall(messages=(Message(role=MessageRole.USER, parts=(TextPart(text="hi"),)),), max_tokens=8)
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
    def push(self, piece):  # type: ignore[no-untyped-def]
        if self._stop is not None and self._stop in piece:
            self.matched = self._stop
            return piece[: piece.index(self._stop)]
        return piece


def make_output(call: GenerateCall, starts_thinking: bool) -> OutputAssembler:
    stop = StopAt(call.stop[0] if call.stop else None)
    return OutputAssembler(Letters(), NoThinking(), stop, stop_token_ids=call.stop_token_ids)  # type: ignore[arg-type]


class ScriptedEngine:
    """An engine whose tokens the test sends."""

    def __init__(self, name: str, role: EngineRole) -> None:
        self.server = make_server()
        self.free_blocks = 100
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
        )

    async def taken(self) -> tuple[SequenceKey, EngineRequest, AttemptMode]:
        return await asyncio.wait_for(self.submits.get(), 5)

    async def cancelled(self) -> SequenceKey:
        return await asyncio.wait_for(self.cancels.get(), 5)

    def say(self, key: SequenceKey, first: int, *tokens: int, finish: FinishReason | None = None) -> None:
        events = [TokenEvent(key=key, index=first + i, token_id=token, busy_s=0.5) for i, token in enumerate(tokens)]
        if finish is not None:
            events[-1] = replace(events[-1], finish=finish)
        self.links.deliver_tokens(events)


class Stages:
    """Doubles of preprocessing, encoding and the places that hold leases."""

    def __init__(self) -> None:
        self.media: tuple[PromptMedia, ...] = ()
        self.prompt_ids: tuple[int, ...] = (5, 6, 7)
        self.error: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.misses = 0
        self.preprocessed = 0
        self.encoded = 0
        self.leases: set[tuple[str, str]] = set()
        self.keeper: LeaseKeeper

    async def run(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        return await (self._preprocess(*args) if len(args) == 1 else self._encode(*args, **kwargs))

    async def _preprocess(self, request: PreprocessRequest) -> PreprocessReply:
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        self.preprocessed += 1
        if self.media:
            self.keeper.hold("pre:1", request.lease)
            self.leases.add(("pre:1", request.lease))
        return PreprocessReply(
            prompt_ids=self.prompt_ids,
            media=self.media,
            starts_thinking=False,
            media_address="pre:1",
            incarnation="p",
            busy_s=0.25,
        )

    async def _encode(
        self, encoder: EncoderInfo, media: tuple[PromptMedia, ...], *, lease: str, patch_address: str, timeout_s: float
    ) -> tuple[tuple[MediaSpan, ...], float]:
        self.encoded += 1
        self.keeper.hold(encoder.address, lease)
        self.leases.add((encoder.address, lease))
        if self.misses:
            self.misses -= 1
            raise MissingPatches
        return tuple(
            MediaSpan(
                kind=item.kind,
                offset=item.offset,
                grid=item.grid,
                embedding_keys=tuple(b"e" + key[1:] for key in item.content_keys),
                encoder_address=encoder.address,
            )
            for item in media
        ), 0.125

    async def renew(self, address: str, leases: list[str]) -> list[str]:
        return []

    async def release(self, address: str, leases: list[str]) -> None:
        self.leases -= {(address, lease) for lease in leases}


class World:
    def __init__(self, router: Router, stages: Stages, fleet: Fleet, *engines: ScriptedEngine) -> None:
        self.router, self.stages, self.fleet = router, stages, fleet
        self.engines = engines

    def ask(self, call: GenerateCall = CALL) -> asyncio.Task[list[Event]]:
        async def collect() -> list[Event]:
            return [event async for event in self.router.generate(call)]

        return asyncio.create_task(collect())


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


@asynccontextmanager
async def world(
    *roles: EngineRole,
    max_active: int = 4,
    encoders: bool = True,
    preprocessors: bool = True,
    default_timeout_s: float = 60,
) -> AsyncIterator[World]:
    stages = Stages()
    engines = [ScriptedEngine(f"e{i}", role) for i, role in enumerate(roles)]
    for engine in engines:
        await engine.server.start()
    encoder = EncoderInfo(encoder_id="v", incarnation="v1", address="enc:1", fingerprint="f", dtype="float64")
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

    fleet = Fleet(planner, "r", lost_after_s=3.0)
    keeper = stages.keeper = LeaseKeeper(stages)
    services = Services(
        fleet=fleet,
        leases=keeper,
        preprocess=stages,  # type: ignore[arg-type]
        encode=stages,  # type: ignore[arg-type]
        model_name="tiny",
        context_limit=lambda: fleet.context_limit(64),
        vocab_size=100,
        resolve_sampling=lambda call, prompt_tokens: resolve_sampling(
            call, SamplingDefaults(), prompt_tokens=prompt_tokens, max_model_len=64
        ),
        make_output=make_output,
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
        yield World(router, stages, fleet, *engines)
        await eventually(lambda: router.active_count == 0)
        await eventually(lambda: not stages.leases)
        router.check_integrity()
    finally:
        await fleet.close()
        await keeper.close()
        for engine in engines:
            await engine.server.stop(None)


async def test_a_reply_through_prefill_and_decode() -> None:
    async with world(EngineRole.PREFILL, EngineRole.DECODE) as w:
        prefill, decode = w.engines
        w.stages.media = (IMAGE,)
        task = w.ask(replace(CALL, return_token_ids=True, return_timings=True, stop_token_ids=(9,)))
        key, request, mode = await prefill.taken()
        assert (await decode.taken())[:2] == (key, request)
        assert mode is AttemptMode.PREFILL
        assert request.prompt_ids == (5, 6, 7) and request.seed == 2**64 - 1
        assert request.media[0].encoder_address == "enc:1"
        await eventually(lambda: w.stages.leases == {("enc:1", "r-1#2")})
        prefill.links.deliver_milestone(key, MilestoneKind.PREFILL_STARTED, 0.0)
        decode.say(key, 1, 1)  # overtakes token 0
        prefill.say(key, 0, 0)
        await eventually(lambda: not w.stages.leases)
        decode.links.deliver_milestone(key, MilestoneKind.TRANSFERRED, 0.75)
        decode.say(key, 2, 2, 9, finish=FinishReason.STOP)
        started, *deltas, finished = await task
        assert isinstance(started, Started) and isinstance(finished, Finished)
        assert started.prompt_token_ids == (5, 6, 7) and started.model == "tiny"
        assert "".join(delta.text for delta in deltas if isinstance(delta, Delta)) == "abc"
        assert [i for delta in deltas if isinstance(delta, Delta) for i in delta.token_ids] == [0, 1, 2, 9]
        assert (finished.reason, finished.stop_reason) == (FinishReason.STOP, 9)
        usage = finished.usage
        assert (usage.prompt_tokens, usage.media_tokens, usage.output_tokens) == (3, 1, 4)
        assert finished.timings is not None
        assert set(finished.timings.exposed) == set(Stage) - {Stage.FINISHED}
        assert finished.timings.busy == {
            Stage.PREPROCESS: 0.25,
            Stage.ENCODE: 0.125,
            Stage.PREFILL: 0.5,
            Stage.TRANSFER: 0.75,
            Stage.DECODE: 1.5,
        }
        assert prefill.cancels.empty() and decode.cancels.empty()


async def test_a_stop_string_ends_the_reply_and_the_attempt() -> None:
    async with world(EngineRole.COLOCATED) as w:
        (engine,) = w.engines
        task = w.ask(replace(CALL, stop=("c",)))
        key, _, mode = await engine.taken()
        assert mode is AttemptMode.COLOCATED
        engine.say(key, 0, 0, 1, 2, 3)
        *_, finished = await task
        assert isinstance(finished, Finished) and finished.stop_reason == "c"
        assert finished.usage.output_tokens == 3
        assert await engine.cancelled() == key


async def test_a_client_that_leaves_frees_everything() -> None:
    async with world(EngineRole.PREFILL, EngineRole.DECODE) as w:
        w.stages.media = (IMAGE,)
        async with aclosing(w.router.generate(CALL)) as events:
            assert isinstance(await anext(events), Started)
            key, *_ = await w.engines[0].taken()
        assert [await engine.cancelled() for engine in w.engines] == [key, key]


@pytest.mark.parametrize("alias", [None, "mine"])
async def test_cancel_by_name_is_seen_by_the_client(alias: str | None) -> None:
    async with world(EngineRole.COLOCATED) as w:
        task = w.ask(replace(CALL, request_id=alias))
        key, *_ = await w.engines[0].taken()
        w.engines[0].say(key, 0, 0)
        await w.router.cancel(alias or key.request_id)
        finished = (await task)[-1]
        assert isinstance(finished, Finished) and finished.reason is FinishReason.CANCELLED
        await w.router.cancel(alias or key.request_id)
        with pytest.raises(NotFound):
            await w.router.cancel("never seen")


async def test_cancel_before_the_prompt_is_known() -> None:
    async with world(EngineRole.COLOCATED) as w:
        w.stages.gate.clear()
        task = w.ask()
        await eventually(lambda: w.router.active_count == 1)
        await w.router.cancel("r-1")
        with pytest.raises(RequestCancelled):
            await task


async def test_cancel_before_the_first_step_is_seen_by_the_client() -> None:
    async with world(EngineRole.COLOCATED) as w:
        reply = asyncio.ensure_future(anext(w.router.generate(CALL)))
        cancel = asyncio.create_task(w.router.cancel("r-1"))  # runs after admission and before the request's own task
        with pytest.raises(RequestCancelled):
            await asyncio.wait_for(reply, 5)
        await cancel
        assert w.stages.preprocessed == 0


async def test_the_deadline_ends_a_request_everywhere() -> None:
    async with world(EngineRole.COLOCATED) as w:
        task = w.ask(replace(CALL, timeout_s=0.3))
        key, *_ = await w.engines[0].taken()
        with pytest.raises(DeadlineExceeded, match=r"0\.3 s"):
            await task
        assert await w.engines[0].cancelled() == key


@pytest.mark.parametrize("victim", [0, 1])
async def test_a_lost_engine_ends_the_request_as_unavailable(victim: int) -> None:
    async with world(EngineRole.PREFILL, EngineRole.DECODE) as w:
        task = w.ask()
        key, *_ = await w.engines[0].taken()
        w.engines[0].say(key, 0, 0)
        await w.engines[victim].server.stop(None)
        with pytest.raises(Unavailable, match="lost") as caught:
            await task
        assert caught.value.reason == "ENGINE_LOST"
        assert await w.engines[1 - victim].cancelled() == key


async def test_a_refusal_for_want_of_blocks_waits_for_room_and_tries_again() -> None:
    async with world(EngineRole.PREFILL, EngineRole.DECODE) as w:
        prefill, decode = w.engines
        task = w.ask()
        key, *_ = await prefill.taken()
        decode.free_blocks = 0
        await eventually(lambda: min(view.load.free_blocks for view in w.fleet.engines()) == 0)
        prefill.links.deliver_end(key, Unavailable("full", reason="NO_BLOCKS"))
        assert await decode.cancelled() == key
        assert prefill.submits.empty()
        decode.free_blocks = 100
        again, *_ = await prefill.taken()
        assert again == key._replace(attempt=1)
        prefill.say(key, 0, 25)  # a late token of the first attempt is nobody's
        prefill.say(again, 0, 0)
        decode.say(again, 1, 1, finish=FinishReason.LENGTH)
        deltas = [event.text for event in await task if isinstance(event, Delta)]
        assert "".join(deltas) == "ab"


async def test_the_error_of_the_engine_that_failed_first_is_the_one_told() -> None:
    async with world(EngineRole.PREFILL, EngineRole.DECODE) as w:
        prefill, decode = w.engines
        task = w.ask()
        key, *_ = await prefill.taken()
        await decode.taken()
        decode.links.deliver_end(key, Unavailable("the other engine gave up", reason="PEER_CANCELLED"))
        await asyncio.sleep(0.05)
        prefill.links.deliver_end(key, Unavailable("lost", reason="STAGE_LOST"))
        with pytest.raises(Unavailable) as caught:
            await task
        assert caught.value.reason == "STAGE_LOST"


async def test_an_engine_that_left_the_registry_gets_nothing_new() -> None:
    async with world(EngineRole.COLOCATED) as w:
        w.fleet._adopt(Snapshot(term=1, version=2))
        with pytest.raises(Unavailable) as caught:
            await w.ask()
        assert caught.value.reason == "NO_ENGINE"


async def test_the_context_is_what_every_engine_can_hold() -> None:
    async with world(EngineRole.COLOCATED) as w:
        (link,) = w.fleet._links.values()
        link.info = replace(link.info, max_model_len=20)
        assert w.router.models()[0].max_model_len == 20
        with pytest.raises(ContextExceeded, match="context"):
            await w.ask(replace(CALL, max_tokens=20))


async def test_preemption_reaches_the_client_with_a_delay() -> None:
    async with world(EngineRole.COLOCATED) as w:
        task = w.ask()
        key, *_ = await w.engines[0].taken()
        w.engines[0].links.deliver_end(key, Unavailable("out of blocks", reason="PREEMPTED", retry_after_s=1.0))
        with pytest.raises(Unavailable) as caught:
            await task
        assert (caught.value.reason, caught.value.retry_after_s) == ("PREEMPTED", 1.0)


async def test_patches_that_are_gone_are_made_again() -> None:
    async with world(EngineRole.COLOCATED) as w:
        w.stages.media, w.stages.misses = (IMAGE,), 1
        task = w.ask()
        key, *_ = await w.engines[0].taken()
        w.engines[0].say(key, 0, END, finish=FinishReason.STOP)
        await task
        assert (w.stages.preprocessed, w.stages.encoded) == (2, 2)


@pytest.mark.parametrize("changed", [False, True])
async def test_embeddings_that_are_gone_are_made_again_unless_the_media_changed(changed: bool) -> None:
    async with world(EngineRole.COLOCATED) as w:
        w.stages.media = (IMAGE,)
        task = w.ask()
        key, request, _ = await w.engines[0].taken()
        if changed:
            w.stages.media = (replace(IMAGE, content_keys=(b"d" * 32,)),)
        w.engines[0].links.deliver_need(key, request.media[0].embedding_keys)
        if changed:
            with pytest.raises(MediaChanged):
                await task
            return
        assert await asyncio.wait_for(w.engines[0].supplies.get(), 5) == request.media
        w.engines[0].say(key, 0, END, finish=FinishReason.STOP)
        await task


@pytest.mark.parametrize(
    ("call", "error", "field"),
    [
        (replace(CALL, model="other"), NotFound, "model"),
        (replace(CALL, model=""), InvalidRequest, "model"),
        (replace(CALL, max_tokens=62), ContextExceeded, "max_tokens"),
    ],
)
async def test_requests_that_cannot_be_served(call: GenerateCall, error: type[ServingError], field: str) -> None:
    async with world(EngineRole.COLOCATED) as w:
        with pytest.raises(error) as caught:
            await w.ask(call)
        assert caught.value.field == field


@pytest.mark.parametrize(
    ("call", "field", "limit"),
    [
        (replace(CALL, stop_token_ids=(99, 100)), "stop_token_ids[1]", "99"),
        (replace(CALL, max_tokens=64), "max_tokens", "64"),
    ],
)
async def test_what_can_never_fit_is_refused_before_any_work(call: GenerateCall, field: str, limit: str) -> None:
    async with world(EngineRole.COLOCATED) as w:
        with pytest.raises(InvalidRequest, match=limit) as caught:
            await w.ask(call)
        assert caught.value.field == field
        assert w.stages.preprocessed == 0


async def test_a_name_is_unique_while_active() -> None:
    async with world(EngineRole.COLOCATED) as w:
        first = w.ask(replace(CALL, request_id="mine"))
        key, *_ = await w.engines[0].taken()
        with pytest.raises(AlreadyExists):
            await w.ask(replace(CALL, request_id="mine"))
        w.engines[0].say(key, 0, END, finish=FinishReason.STOP)
        await first
        second = w.ask(replace(CALL, request_id="mine"))
        key, *_ = await w.engines[0].taken()
        w.engines[0].say(key, 0, END, finish=FinishReason.STOP)
        await second


async def test_a_full_router_and_a_draining_one_refuse() -> None:
    async with world(EngineRole.COLOCATED, max_active=1) as w:
        first = w.ask()
        key, *_ = await w.engines[0].taken()
        with pytest.raises(Overloaded) as caught:
            await w.ask()
        assert caught.value.retry_after_s is not None
        drain = asyncio.create_task(w.router.drain(5.0))
        await eventually(lambda: w.router._draining)
        with pytest.raises(Unavailable, match="draining"):
            await w.ask()
        assert await w.router.not_ready() == "draining"
        w.engines[0].say(key, 0, END, finish=FinishReason.STOP)
        await first
        assert await drain == 0


async def test_readiness_names_what_is_missing() -> None:
    async with world(EngineRole.PREFILL) as w:
        assert await w.router.not_ready() == "no prefill and decode path"
        with pytest.raises(Unavailable) as caught:
            await w.ask()
        assert caught.value.reason == "NO_ENGINE"
    async with world(EngineRole.COLOCATED, encoders=False) as w:
        assert await w.router.not_ready() == "no vision encoder"
    async with world(EngineRole.COLOCATED, preprocessors=False) as w:
        assert await w.router.not_ready() == "no preprocessor"
    async with world(EngineRole.COLOCATED) as w:
        assert await w.router.not_ready() is None


async def test_a_defect_of_ours_shows_no_details(monkeypatch: pytest.MonkeyPatch) -> None:
    async with world(EngineRole.COLOCATED) as w:
        w.stages.error = KeyError("secret")
        with pytest.raises(InternalError, match="internal error; request r-1"):
            await w.ask()


async def test_tokens_are_counted_without_keeping_anything() -> None:
    async with world(EngineRole.COLOCATED) as w:
        assert await w.router.count_tokens(None, CALL.messages, CALL.thinking) == (3, 0)


async def test_counting_has_a_deadline_too() -> None:
    async with world(EngineRole.COLOCATED, default_timeout_s=0.05) as w:
        w.stages.gate.clear()
        with pytest.raises(DeadlineExceeded, match=r"0\.05 s"):
            await asyncio.wait_for(w.router.count_tokens(None, CALL.messages, CALL.thinking), 5)


async def test_token_ids_are_told_only_on_request() -> None:
    async with world(EngineRole.COLOCATED) as w:
        for wanted in (False, True):
            task = w.ask(replace(CALL, return_token_ids=wanted))
            key, *_ = await w.engines[0].taken()
            w.engines[0].say(key, 0, 0, 1, finish=FinishReason.LENGTH)
            deltas = [event for event in await task if isinstance(event, Delta)]
            assert "".join(delta.text for delta in deltas) == "ab"
            assert [token for delta in deltas for token in delta.token_ids] == ([0, 1] if wanted else [])
