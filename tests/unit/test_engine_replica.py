"""The engine replica around its engine: what links, pulls and audits do to it."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest

from actors.errors import AlreadyExists, InternalError
from actors.types import AttemptMode, EngineRequest, EngineRole, Message, MessageRole, SamplingParams, SequenceKey
from actors.wire.audit import fetch_audit
from cluster.generation import Finished, GenerateCall
from tests.in_process import in_process_cluster
from tests.media import image_part
from tests.tiny_model import tiny_checkpoint

CALL = GenerateCall(
    messages=(Message(role=MessageRole.USER, parts=(image_part(150, 100, 1),)),), temperature=0.0, max_tokens=4
)


class HeldRunner:
    """A runner whose first step waits until it is let go."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self.began = threading.Event()
        self.let_go = threading.Event()
        self.was_let_go = False

    def run(self, plan: Any) -> Any:
        self.began.set()
        self.was_let_go = self.let_go.wait(5)
        return self._runner.run(plan)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)


async def test_an_audit_does_not_stop_the_loop_for_a_long_step() -> None:
    async with in_process_cluster(tiny_checkpoint(), EngineRole.COLOCATED) as cluster:
        (replica,) = cluster.engines
        held = HeldRunner(replica._engine._runner)
        replica._engine._runner = held
        reply = asyncio.create_task(_last(cluster.parts.router.generate(CALL)))
        assert await asyncio.to_thread(held.began.wait, 10)
        audit = asyncio.create_task(fetch_audit(replica._info.address, timeout_s=30))
        await asyncio.sleep(0.2)
        assert not audit.done()
        held.let_go.set()
        assert (await audit).problem == ""
        assert held.was_let_go, "the step ended before the event loop ran again"
        assert isinstance(await reply, Finished)
        await cluster.wait_clean()


async def test_a_pull_that_fails_ends_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_key: bytes) -> None:
        raise RuntimeError("a defect of the encoder")

    async with in_process_cluster(tiny_checkpoint(), EngineRole.PREFILL, EngineRole.DECODE) as cluster:
        monkeypatch.setattr(cluster.encoder._store, "get", broken)
        async with asyncio.timeout(10):
            with pytest.raises(InternalError):
                await _last(cluster.parts.router.generate(CALL))
        await cluster.wait_clean()
        monkeypatch.undo()
        assert isinstance(await _last(cluster.parts.router.generate(CALL)), Finished)


@pytest.mark.parametrize("place", ["encoder", "preprocessor"])
async def test_media_that_are_gone_when_pulled_are_made_again(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    async with in_process_cluster(tiny_checkpoint(), EngineRole.PREFILL, EngineRole.DECODE) as cluster:
        store = getattr(cluster, place)._store
        kept, asked = store.get, []

        def gone_once(key: bytes) -> object:
            asked.append(key)
            return kept(key) if len(asked) > 1 else None

        monkeypatch.setattr(store, "get", gone_once)
        assert isinstance(await _last(cluster.parts.router.generate(CALL)), Finished)
        assert len(asked) > 1
        await cluster.wait_clean()


async def test_a_second_submit_leaves_the_first_attempt_alone() -> None:
    request = EngineRequest(
        prompt_ids=(5, 6, 7),
        sampling=SamplingParams(max_tokens=2),
        seed=1,
        arrival_s=0.0,
        deadline_s=time.time() + 600.0,
    )
    key = SequenceKey("request", 0, 0)
    async with in_process_cluster(tiny_checkpoint(), EngineRole.PREFILL, EngineRole.DECODE) as cluster:
        decode = cluster.engines[1]
        decode.submit(key, request, AttemptMode.DECODE, None)
        with pytest.raises(AlreadyExists):
            decode.submit(key, request, AttemptMode.DECODE, None)
        assert (await decode.audit()).held["attempts"] == 1
        decode.cancel(key)
        await cluster.wait_clean()


async def _last(events: Any) -> object:
    return [event async for event in events][-1]
