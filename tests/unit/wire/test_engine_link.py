"""The two ends of a link against each other, over real gRPC on the loopback."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import grpc
import grpc.aio
import pytest

from actors.errors import AlreadyExists, Overloaded, ServingError, Unavailable
from actors.reports import EngineInfo, LoadReport
from actors.types import (
    AttemptMode,
    EngineRequest,
    EngineRole,
    FinishReason,
    Grid,
    MediaKind,
    MediaSpan,
    MilestoneKind,
    PromptLogprobs,
    SamplingParams,
    SequenceKey,
    TokenEvent,
    TokenLogprobs,
)
from actors.wire import convert
from actors.wire.channels import make_server, open_channel
from actors.wire.engine_link import EngineLinkServicer
from cluster.router.link import AttemptError, AttemptEvent, EngineLink, EngineLost, MediaNeed, Milestone
from ernie_serving.internal.v1 import engine_link_pb2, engine_link_pb2_grpc
from tests.waiting import LIMIT_S, eventually

LOAD = LoadReport(
    step=7, running=1, waiting=2, free_blocks=3, total_blocks=9, block_size=16, queued_tokens=40, reserved=1
)
REQUEST = EngineRequest(
    prompt_ids=(1, 2, 300, 300, 5),
    media=(
        MediaSpan(
            kind=MediaKind.IMAGE,
            offset=2,
            grid=Grid(1, 2, 4),
            embedding_keys=(b"k" * 32,),
            encoder_address="127.0.0.1:5",
        ),
    ),
    output_ids=(9,),
    sampling=SamplingParams(temperature=0.5, top_p=0.9, top_k=4, max_tokens=7, stop_token_ids=(3,), ignore_eos=True),
    seed=2**64 - 1,
    salt=b"tenant",
    arrival_s=1.5,
    deadline_s=2.5,
    priority=-1,
)
KEY = SequenceKey("router-1", 0, 0)


class Host:
    def __init__(self) -> None:
        self.calls: asyncio.Queue[tuple[object, ...]] = asyncio.Queue()
        self.refuse: ServingError | None = None
        self.draining = False

    def submit(self, key: SequenceKey, request: EngineRequest, mode: AttemptMode, peer: tuple[str, str] | None) -> None:
        if self.refuse is not None:
            raise self.refuse
        self.calls.put_nowait(("submit", key, request, mode, peer))

    def cancel(self, key: SequenceKey) -> None:
        self.calls.put_nowait(("cancel", key))

    def supply_media(self, key: SequenceKey, media: tuple[MediaSpan, ...]) -> None:
        self.calls.put_nowait(("supply", key, media))

    def load(self) -> LoadReport:
        return replace(LOAD, draining=self.draining)


class Pair:
    def __init__(self, info: EngineInfo, host: Host, servicer: EngineLinkServicer, server: grpc.aio.Server) -> None:
        self.info, self.host, self.servicer, self.server = info, host, servicer, server
        self.events: asyncio.Queue[AttemptEvent] = asyncio.Queue()
        self.loaded = asyncio.Event()
        self.lost = asyncio.Event()
        self.link = self.connect(info)

    def connect(self, info: EngineInfo, lost_after_s: float = 5.0) -> EngineLink:
        return EngineLink(
            info,
            "router",
            lost_after_s=lost_after_s,
            on_load=lambda _: self.loaded.set(),
            on_lost=lambda _: self.lost.set(),
        )

    async def event(self) -> AttemptEvent:
        return await asyncio.wait_for(self.events.get(), LIMIT_S)

    async def call(self) -> tuple[object, ...]:
        return await asyncio.wait_for(self.host.calls.get(), LIMIT_S)


@asynccontextmanager
async def engine() -> AsyncIterator[Pair]:
    host = Host()
    server = make_server()
    port = server.add_insecure_port("127.0.0.1:0")
    info = EngineInfo(
        engine_id="engine",
        incarnation="first",
        address=f"127.0.0.1:{port}",
        role=EngineRole.COLOCATED,
        epoch=3,
        fingerprint="f",
        dtype="float64",
        block_size=16,
        switches="s",
        max_model_len=64,
    )
    servicer = EngineLinkServicer(host, lambda: info)
    engine_link_pb2_grpc.add_EngineLinkServiceServicer_to_server(servicer, server)
    await server.start()
    pair = Pair(info, host, servicer, server)
    pair.link.start()
    try:
        await asyncio.wait_for(pair.loaded.wait(), LIMIT_S)
        yield pair
    finally:
        await pair.link.close()
        await server.stop(None)


async def test_an_attempt_from_submit_to_its_last_token() -> None:
    async with engine() as pair:
        assert pair.link.usable and pair.link.load == LOAD
        peer = replace(pair.info, address="10.0.0.1:1", incarnation="peer")
        pair.link.submit(KEY, REQUEST, AttemptMode.PREFILL, peer, pair.events)
        assert await pair.call() == ("submit", KEY, REQUEST, AttemptMode.PREFILL, ("10.0.0.1:1", "peer"))

        pair.servicer.deliver_milestone(KEY, MilestoneKind.PREFILL_STARTED, 0.0)
        assert await pair.event() == Milestone(KEY, MilestoneKind.PREFILL_STARTED, 0.0)
        pair.servicer.deliver_need(KEY, (b"k" * 32,))
        assert await pair.event() == MediaNeed(KEY, (b"k" * 32,))
        pair.link.supply_media(KEY, REQUEST.media)
        assert await pair.call() == ("supply", KEY, REQUEST.media)

        tokens = [
            TokenEvent(key=KEY, index=1, token_id=11, busy_s=0.5),
            TokenEvent(key=KEY, index=2, token_id=2, finish=FinishReason.STOP),
        ]
        pair.servicer.deliver_tokens(tokens)
        assert [await pair.event(), await pair.event()] == tokens
        assert pair.servicer.attempt_count == 0
        pair.link.forget(KEY, cancel=False)


async def test_cancel_reaches_the_engine_once() -> None:
    async with engine() as pair:
        pair.link.submit(KEY, REQUEST, AttemptMode.COLOCATED, None, pair.events)
        assert (await pair.call())[4] is None
        pair.link.forget(KEY, cancel=True)
        pair.link.forget(KEY, cancel=True)
        assert await pair.call() == ("cancel", KEY)
        other = SequenceKey("router-2", 0, 0)
        pair.link.submit(other, REQUEST, AttemptMode.COLOCATED, None, pair.events)
        assert (await pair.call())[1] == other


async def test_a_refused_submit_and_an_end_carry_the_error() -> None:
    async with engine() as pair:
        pair.host.refuse = Overloaded("full", retry_after_s=2.0)
        pair.link.submit(KEY, REQUEST, AttemptMode.COLOCATED, None, pair.events)
        event = await pair.event()
        assert isinstance(event, AttemptError)
        assert isinstance(event.error, Overloaded)
        assert (event.error.reason, event.error.retry_after_s) == ("QUEUE_FULL", 2.0)
        pair.host.refuse = None
        pair.link.submit(KEY, REQUEST, AttemptMode.COLOCATED, None, pair.events)
        await pair.call()
        pair.servicer.deliver_end(KEY, Unavailable("no blocks", reason="PREEMPTED", retry_after_s=1.0))
        event = await pair.event()
        assert isinstance(event, AttemptError) and event.error.reason == "PREEMPTED"


async def test_a_stale_epoch_is_refused() -> None:
    async with engine() as pair:
        pair.link.info = replace(pair.info, epoch=2)
        pair.link.submit(KEY, REQUEST, AttemptMode.COLOCATED, None, pair.events)
        event = await pair.event()
        assert isinstance(event, AttemptError) and event.error.reason == "EPOCH_CHANGED"


async def test_a_closed_link_cancels_its_attempts_at_the_engine() -> None:
    async with engine() as pair:
        pair.link.submit(KEY, REQUEST, AttemptMode.COLOCATED, None, pair.events)
        await pair.call()
        await pair.link.close()
        assert await pair.call() == ("cancel", KEY)
        event = await pair.event()
        assert isinstance(event, AttemptError) and event.error.reason == "ENGINE_LOST"


async def test_a_lost_engine_fails_its_attempts() -> None:
    async with engine() as pair:
        dead = pair.connect(replace(pair.info, incarnation="replaced"))
        pair.lost.clear()
        dead.start()
        dead.submit(KEY, REQUEST, AttemptMode.COLOCATED, None, pair.events)
        event = await pair.event()
        assert isinstance(event, AttemptError) and event.error.reason == "ENGINE_LOST"
        assert f"met protocol {convert.PROTOCOL_VERSION} of first" in event.error.message
        await asyncio.wait_for(pair.lost.wait(), LIMIT_S)
        assert not dead.usable
        await dead.close()


async def test_an_engine_that_leaves_is_known_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async with engine() as pair:
        monkeypatch.setattr("actors.wire.engine_link.LOAD_S", 60.0)
        await asyncio.sleep(0.6)  # the last heartbeat of before
        assert pair.link.takes_new
        pair.host.draining = True
        pair.servicer.tell_load()
        await eventually(lambda: not pair.link.takes_new)
        assert pair.link.usable


@pytest.mark.parametrize("died", [True, False])
async def test_only_what_a_dead_engine_may_have_computed_is_suspect(died: bool) -> None:
    """Not what it had handed over, nor what waited in its queue as long as it computed anything."""
    async with engine() as pair:
        names = [SequenceKey(f"router-{index}", 0, 0) for index in range(4)]
        waiting, started, handed_over, decoding = names
        modes = [AttemptMode.PREFILL, AttemptMode.PREFILL, AttemptMode.PREFILL, AttemptMode.COLOCATED]
        for name, mode in zip(names, modes, strict=True):
            pair.link.submit(name, REQUEST, mode, pair.info, pair.events)
            await pair.call()
        for name in (started, handed_over):
            pair.servicer.deliver_milestone(name, MilestoneKind.PREFILL_STARTED, 0.0)
        tokens = [TokenEvent(key=name, index=1, token_id=1) for name in (handed_over, decoding)]
        pair.servicer.deliver_tokens(tokens)
        for _ in range(4):
            await pair.event()
        if died:
            await pair.server.stop(None)
        else:
            await pair.link.close()
        found = {}
        for _ in names:
            event = await pair.event()
            assert isinstance(event, AttemptError) and isinstance(event.error, EngineLost)
            assert (event.engine, event.error.incarnation, event.error.reason) == ("first", "first", "ENGINE_LOST")
            assert event.error.computed == event.error.died
            found[event.key] = event.error.died
        assert found == {waiting: False, started: died, handed_over: False, decoding: died}


async def test_what_a_dead_engine_had_just_been_given_is_suspect_when_nothing_else_is() -> None:
    async with engine() as pair:
        pair.link.submit(KEY, REQUEST, AttemptMode.COLOCATED, None, pair.events)
        await pair.call()
        await pair.server.stop(None)
        event = await pair.event()
        assert isinstance(event, AttemptError) and isinstance(event.error, EngineLost)
        assert event.error.died and not event.error.computed


async def test_a_silent_engine_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    async with engine() as pair:
        monkeypatch.setattr("actors.wire.engine_link.LOAD_S", 60.0)
        silent = pair.connect(pair.info, lost_after_s=0.3)
        pair.lost.clear()
        silent.start()
        silent.submit(KEY, REQUEST, AttemptMode.COLOCATED, None, pair.events)
        event = await pair.event()
        assert isinstance(event, AttemptError) and "silent" in event.error.message
        await silent.close()


async def test_a_router_that_stood_still_itself_hears_the_engine_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.wire.engine_link.LOAD_S", 0.05)
    async with engine() as pair:
        link = pair.connect(pair.info, lost_after_s=0.6)
        pair.loaded.clear()
        pair.lost.clear()
        link.start()
        await asyncio.wait_for(pair.loaded.wait(), LIMIT_S)
        time.sleep(0.9)  # noqa: ASYNC251
        await asyncio.sleep(0.2)
        assert link.usable and not pair.lost.is_set()
        await link.close()


async def test_a_second_submit_of_a_running_attempt_is_refused_and_the_first_goes_on() -> None:
    async with engine() as pair:
        pair.link.submit(KEY, REQUEST, AttemptMode.COLOCATED, None, pair.events)
        await pair.call()
        other = pair.connect(pair.info)
        pair.loaded.clear()
        other.start()
        await asyncio.wait_for(pair.loaded.wait(), LIMIT_S)
        refused: asyncio.Queue[AttemptEvent] = asyncio.Queue()
        other.submit(KEY, REQUEST, AttemptMode.COLOCATED, None, refused)
        event = await asyncio.wait_for(refused.get(), LIMIT_S)
        assert isinstance(event, AttemptError) and isinstance(event.error, AlreadyExists)
        token = TokenEvent(key=KEY, index=1, token_id=11)
        pair.servicer.deliver_tokens([token])
        assert await pair.event() == token
        await other.close()
        assert pair.servicer.attempt_count == 1 and pair.host.calls.empty()


async def test_attempts_of_a_router_that_stops_reading_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen router keeps its connection, and its stream fills up until nothing can be written any more."""
    async with engine() as pair, open_channel(pair.info.address) as channel:
        monkeypatch.setattr("actors.wire.engine_link.ROUTER_SILENT_S", 0.3)
        hello = engine_link_pb2.RouterHello(protocol_version=convert.PROTOCOL_VERSION, router_incarnation="frozen")
        submit = engine_link_pb2.Submit(
            key=convert.key_to_proto(KEY),
            request=convert.request_to_proto(REQUEST),
            mode=convert.MODES[AttemptMode.COLOCATED],
            epoch=pair.info.epoch,
        )
        call = engine_link_pb2_grpc.EngineLinkServiceStub(channel).Link()
        await call.write(engine_link_pb2.LinkRequest(hello=hello))
        await call.write(engine_link_pb2.LinkRequest(submit=submit))
        assert (await pair.call())[:2] == ("submit", KEY)
        for index in range(100):
            pair.servicer.deliver_tokens([TokenEvent(key=KEY, index=index, token_id=1)] * 5000)
        assert await pair.call() == ("cancel", KEY)
        call.cancel()


@pytest.mark.parametrize("hello", [True, False])
async def test_a_link_that_does_not_begin_with_a_hello_is_refused(monkeypatch: pytest.MonkeyPatch, hello: bool) -> None:
    monkeypatch.setattr("actors.wire.engine_link.ROUTER_SILENT_S", 0.2)
    async with engine() as pair, open_channel(pair.info.address) as channel:
        call = engine_link_pb2_grpc.EngineLinkServiceStub(channel).Link()
        if hello:
            wrong = engine_link_pb2.RouterHello(protocol_version=convert.PROTOCOL_VERSION + 1)
            await call.write(engine_link_pb2.LinkRequest(hello=wrong))
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await asyncio.wait_for(call.read(), LIMIT_S)
        assert refusal.value.code() is grpc.StatusCode.FAILED_PRECONDITION


def block(number: int) -> bytes:
    return number.to_bytes(32, "little")


async def test_every_router_knows_the_blocks_an_engine_holds() -> None:
    async with engine() as pair:
        pair.servicer.deliver_blocks_changed([block(1), block(2)], [])
        await eventually(lambda: pair.link.cached_blocks == {block(1), block(2)})
        pair.servicer.deliver_blocks_changed([block(3)], [block(1)])
        late = pair.connect(pair.info)
        late.start()
        await eventually(lambda: pair.link.cached_blocks == late.cached_blocks == {block(2), block(3)})
        pair.servicer.deliver_blocks_changed([], [block(2)])
        await eventually(lambda: pair.link.cached_blocks == late.cached_blocks == {block(3)})
        await late.close()


async def test_many_blocks_travel_in_several_messages() -> None:
    async with engine() as pair:
        blocks = {block(number) for number in range(140_000)}
        pair.servicer.deliver_blocks_changed(blocks, [])
        await eventually(lambda: pair.link.cached_blocks == blocks)
        late = pair.connect(pair.info)
        late.start()
        await eventually(lambda: late.cached_blocks == blocks)
        await late.close()


async def test_a_lost_link_knows_nothing() -> None:
    async with engine() as pair:
        pair.servicer.deliver_blocks_changed([block(1)], [])
        await eventually(lambda: pair.link.cached_blocks == {block(1)})
        await pair.link.close()
        assert pair.link.cached_blocks == set()
        await eventually(lambda: not pair.servicer._open)


async def test_what_was_cached_and_prompt_logprobs_reach_their_attempt() -> None:
    async with engine() as pair:
        pair.link.submit(KEY, REQUEST, AttemptMode.COLOCATED, None, pair.events)
        await pair.call()
        pair.servicer.deliver_milestone(KEY, MilestoneKind.PREFILL_STARTED, 0.0, 48)
        assert await pair.event() == Milestone(KEY, MilestoneKind.PREFILL_STARTED, 0.0, 48)
        entry = TokenLogprobs(token_id=5, logprob=-0.5, rank=2, top=((7, -0.25), (5, -0.5)))
        piece = PromptLogprobs(key=KEY, first=3, entries=(None, entry))
        pair.servicer.deliver_prompt_logprobs(piece)
        assert await pair.event() == piece
