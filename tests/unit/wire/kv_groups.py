"""A prefill and a decode engine whose ranks are processes: real engines, control over gRPC, KV over gloo."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeVar

from actors.engine.events import ComputedChunk
from actors.engine.execution.runner import Runner
from actors.engine.group.channel import GroupConfig
from actors.engine.group.group_runner import GroupRunner
from actors.engine_rank import kv_rank
from actors.ernie.config import ErnieConfig
from actors.ernie.text import LanguageModel
from actors.parallel.kv_ends import KvRank
from actors.parallel.kv_threads import LocalKvRank
from actors.parallel.kv_transfer import KvCache, KvTransferConfig, Meeting, Transport
from actors.types import AttemptMode, EngineRequest, EngineRole, SequenceKey
from actors.wire.channels import make_server
from actors.wire.kv_receiver import KvReceiver
from actors.wire.kv_sender import KvSender
from ernie_serving.internal.v1.kv_control_pb2_grpc import add_KvControlServiceServicer_to_server
from tests.small_models import language_model, text_config
from tests.unit.engine.engine_requests import Wanted
from tests.unit.engine.group.rank_group import HOST, PATIENT, RankGroup, RankLoader, small_model
from tests.unit.engine.harness import Recorder, Rig, ernie_config
from tests.unit.wire.kv_engines import CONFIG, PATIENCE_S, WrappedMeeting
from tests.waiting import wait_until

_T = TypeVar("_T")


def bankless_model() -> tuple[LanguageModel, ErnieConfig]:
    model = language_model(text_config(), bank=False)
    return model, ernie_config(model.config)


@dataclass(frozen=True, kw_only=True)
class KvLoader(RankLoader):
    """Lets a test stand between a rank's pairs and their data path or cache, in the rank's process: what does must
    pickle.
    """

    wrap: Callable[[Transport], Transport] | None = None
    cache: Callable[[KvCache], KvCache] | None = None

    def kv_rank(self, runner: Runner) -> LocalKvRank:
        return changed(super().kv_rank(runner), self.wrap, self.cache)


def changed(
    rank: LocalKvRank,
    wrap: Callable[[Transport], Transport] | None = None,
    cache: Callable[[KvCache], KvCache] | None = None,
) -> LocalKvRank:
    meeting: Meeting = rank._meeting
    if wrap is not None:
        meeting = WrappedMeeting(meeting, lambda transport, _name: wrap(transport))
    return LocalKvRank(rank._cache if cache is None else cache(rank._cache), rank.geometry, meeting)


def is_idle(check_integrity: Callable[[], None]) -> bool:
    try:
        check_integrity()
    except RuntimeError:
        return False
    return True


class Loop:
    """An event loop on a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="test-loop", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        future: Future[_T] = asyncio.run_coroutine_threadsafe(work, self.loop)
        return future.result(PATIENCE_S * 2)

    def close(self) -> None:
        self.run(self._end_tasks())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    async def _end_tasks(self) -> None:
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)


class PrefillSink(Recorder):
    sender: KvSender
    peer: tuple[str, str]
    rig: Rig

    def on_reserve_needed(self, key: SequenceKey, token_count: int) -> None:
        super().on_reserve_needed(key, token_count)
        self.sender.reserve(key, *self.peer, token_count, self.rig.engine._identity)

    def on_chunk(self, chunk: ComputedChunk) -> None:
        super().on_chunk(chunk)
        self.sender.push(chunk)

    def on_transfer_cancelled(self, key: SequenceKey) -> None:
        super().on_transfer_cancelled(key)
        self.sender.cancel(key)


class DecodeSink(Recorder):
    receiver: KvReceiver

    def on_reservation_dropped(self, key: SequenceKey) -> None:
        self.receiver.drop(key)
        super().on_reservation_dropped(key)


Join = Callable[[Runner], GroupRunner]


@dataclass(kw_only=True)
class Side:
    """How one engine is made. ``join``: of its group; one rank when None."""

    join: Join | None = None
    wrap: Callable[[Transport], Transport] | None = None
    """Around the data path of rank 0."""
    options: dict[str, Any] = field(default_factory=dict)


class _Engine:
    def __init__(self, side: Side, sink: Recorder, **fields: Any) -> None:
        self.rig = Rig(sink=sink, **({"group": side.join or GroupRunner} | fields | side.options))
        self._own = changed(kv_rank(self.rig.cache, HOST, CONFIG), side.wrap)
        self.ranks: list[KvRank] = [self._own, *self.rig.group.kv_ranks]

    def parts(self, loop: Loop, config: KvTransferConfig) -> dict[str, Any]:
        """Under a new incarnation: processes of ranks, and what was met by name there, outlive a test."""
        self.incarnation = uuid.uuid4().hex
        return {
            "engine": self.rig.engine,
            "ranks": self.ranks,
            "geometry": self._own.geometry,
            "incarnation": self.incarnation,
            "loop": loop.loop,
            "config": config,
        }

    def close(self) -> None:
        self._own.close()


class PrefillEngineSide(_Engine):
    """A context manager, entered when the peer serves."""

    def __init__(self, loop: Loop, side: Side, peer: tuple[str, str], config: KvTransferConfig = CONFIG) -> None:
        self.sink = PrefillSink()
        super().__init__(side, self.sink, role=EngineRole.PREFILL, blocks=400, max_batched_tokens=9)
        self._loop = loop
        self.sender = KvSender(**self.parts(loop, config))
        self.sink.sender, self.sink.peer, self.sink.rig = self.sender, peer, self.rig

    def __enter__(self) -> PrefillEngineSide:
        self.rig.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and self.sink.fatal is None:
                wait_until(lambda: is_idle(self.sender.check_integrity))
            self.rig.__exit__(kind)
        finally:
            self._loop.run(self.sender.close())
            self.close()


class DecodeEngineSide(_Engine):
    """A context manager; serves when it is made."""

    def __init__(self, loop: Loop, side: Side, config: KvTransferConfig = CONFIG) -> None:
        self.sink = DecodeSink()
        fields = {"blocks": 400, "reserve_wait_s": 60.0}
        if "model" not in side.options:
            fields["model"] = language_model(text_config(), bank=False)
        super().__init__(side, self.sink, role=EngineRole.DECODE, **fields)
        self._loop = loop
        self.receiver = KvReceiver(**self.parts(loop, config), identity=self.rig.engine._identity)
        self.sink.receiver = self.receiver
        self.peer = (loop.run(self._serve()), self.incarnation)

    async def _serve(self) -> str:
        self.server = make_server()
        add_KvControlServiceServicer_to_server(self.receiver, self.server)
        port = self.server.add_insecure_port(f"{HOST}:0")
        await self.server.start()
        return f"{HOST}:{port}"

    async def _end(self) -> None:
        await self.receiver.close()
        await self.server.stop(None)

    def __enter__(self) -> DecodeEngineSide:
        self.rig.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and self.sink.fatal is None:
                wait_until(lambda: is_idle(self.receiver.check_integrity))
            self.rig.__exit__(kind)
        finally:
            self._loop.run(self._end())
            self.close()


class EnginePair:
    """Both, in this process; their other ranks in others. A context manager."""

    def __init__(self, prefill: Side, decode: Side, config: KvTransferConfig = CONFIG) -> None:
        self._stack = ExitStack()
        self._loop = Loop()
        self._stack.callback(self._loop.close)
        self.decode = DecodeEngineSide(self._loop, decode, config)
        self.prefill = PrefillEngineSide(self._loop, prefill, self.decode.peer, config)

    def __enter__(self) -> EnginePair:
        self._stack.enter_context(self.decode)
        self._stack.enter_context(self.prefill)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def submit(self, name: int, wanted: EngineRequest, embeddings: Any = None) -> SequenceKey:
        self.decode.rig.submit(name, wanted, mode=AttemptMode.DECODE)
        return self.prefill.rig.submit(name, wanted, embeddings, AttemptMode.PREFILL)

    def wait_released(self, *names: SequenceKey) -> None:
        self.prefill.rig.wait_released(*names)
        self.decode.rig.wait_released(*names)

    def reply(self, name: SequenceKey) -> list[int]:
        assert name not in self.prefill.sink.ended, self.prefill.sink.ended[name].message
        assert name not in self.decode.sink.ended, self.decode.sink.ended[name].message
        return self.prefill.sink.ids(name) + self.decode.sink.ids(name)

    def run(self, *wanted: Wanted) -> list[list[int]]:
        names = [self.submit(number, *one) for number, one in enumerate(wanted)]
        self.wait_released(*names)
        return [self.reply(name) for name in names]

    @property
    def lanes(self) -> set[tuple[int, int]]:
        """Ranks there and here that have met."""
        return {lane for pair in self.prefill.sender._pairs.values() for lane in pair._lanes}

    def wait_clean(self) -> None:
        """All attempts have been released: nothing is kept for them on any rank, but for a chunk that was promised."""
        for rig in (self.prefill.rig, self.decode.rig):
            rig.assert_empty()
            held = rig.group.held()
            assert not any(count for name, count in held.items() if name != "kv_staging"), held
            wait_until(lambda rig=rig: not any(rig.group.held().values()))
        for check in (self.prefill.sender.check_integrity, self.decode.receiver.check_integrity):
            wait_until(lambda check=check: is_idle(check))


def prefill_group(size: int, config: GroupConfig = PATIENT, **loader: Any) -> RankGroup:
    return RankGroup(size, KvLoader(**({"model": small_model} | loader)).main, config)


def decode_group(size: int, config: GroupConfig = PATIENT, **loader: Any) -> RankGroup:
    return RankGroup(size, KvLoader(**({"model": bankless_model} | loader)).main, config)
