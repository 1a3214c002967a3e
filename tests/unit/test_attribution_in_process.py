"""Where the time of a request goes, on all parts without Ray: what holds a stage up shows there, and what is hidden
nowhere.

The router's clock is the test's: it stands still but where a part says that time passes. So no machine is too slow.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from actors.engine.plan import StepPlan
from actors.processing.processor import Processor
from actors.types import EngineRole, Stage, TextPart
from actors.wire.kv_sending_lane import Chunk, SendingLane
from cluster.generation import Finished
from tests.in_process import InProcessCluster, in_process_cluster
from tests.media import image_part
from tests.tiny_model import tiny_checkpoint
from tests.unit.test_resume_in_process import ask

DELAY_S = 0.3
STEP_S = 0.125
"""Of a step that prefills, where steps take time; exact in binary."""
WAIT_LIMIT_S = 30.0


class Clock:
    """Of the router. Parts move it, from any thread."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Request:
    """The one that runs, seen by parts."""

    def __init__(self, cluster: InProcessCluster, clock: Clock) -> None:
        self.cluster = cluster
        self.clock = clock

    @property
    def stage(self) -> Stage:
        (where,) = self.cluster.parts.router.whereabouts()
        return where.stage

    def takes(self, stage: Stage, seconds: float) -> None:
        """A part works so long, in its own thread, and the request waits for that stage."""
        if not seconds:
            return
        deadline = time.monotonic() + WAIT_LIMIT_S
        while self.stage is not stage:  # What tells the router so may be on its way.
            assert time.monotonic() < deadline, f"the router sees {self.stage}, not {stage}"
            time.sleep(0.001)
        self.clock.now += seconds

    async def timings(self) -> dict[Stage, float]:
        """Exposed seconds of one more request, those that are not 0."""
        parts = (image_part(150, 100, 1), TextPart(text="What is this?"))
        call = ask(*parts, max_tokens=6, return_timings=True, timeout_s=2 * WAIT_LIMIT_S)
        began = self.clock.now
        async for event in self.cluster.parts.router.generate(call):
            if isinstance(event, Finished):
                assert event.timings is not None
                exposed = event.timings.exposed
                assert sum(exposed.values()) == pytest.approx(self.clock.now - began)
                return {stage: seconds for stage, seconds in exposed.items() if seconds}
        raise AssertionError("the request did not finish")


@asynccontextmanager
async def a_request() -> AsyncIterator[Request]:
    """Of a picture, whose prompt takes several steps."""
    roles = (EngineRole.PREFILL, EngineRole.DECODE)
    engine = {"max_num_seqs": 8, "max_batched_tokens": 8, "prefix_caching": False}
    async with in_process_cluster(tiny_checkpoint(), *roles, embedding_cache_bytes=0, **engine) as cluster:
        router, clock = cluster.parts.router, Clock()
        router._services = replace(router._services, clock=clock)
        yield Request(cluster, clock)


def before(monkeypatch: pytest.MonkeyPatch, target: Any, name: str, act: Callable[..., None]) -> None:
    """``act`` gets what a method is called with, before it does."""
    method = getattr(target, name)

    def wrapped(*args: Any) -> Any:
        act(*args)
        return method(*args)

    monkeypatch.setattr(target, name, wrapped)


def computes(*args: Any) -> bool:
    """Not a step that only tells ranks which sequences ended."""
    return not isinstance(args[0], StepPlan) or args[0].token_count > 0


def hold_up(stage: Stage, request: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next request's part for that stage takes ``DELAY_S`` more."""
    prefill, decode = request.cluster.engines
    places: dict[Stage, tuple[Any, str]] = {
        Stage.QUEUED: (prefill._engine._scheduler, "submit"),
        Stage.PREPROCESS: (Processor, "process"),
        Stage.ENCODE: (request.cluster.encoder._queue, "_encode"),
        Stage.PREFILL: (prefill._runner, "run"),
        Stage.DECODE: (decode._runner, "run"),
    }
    if stage in places:
        delays = iter([DELAY_S])

        def takes(*args: Any) -> None:
            if computes(*args):
                request.takes(stage, next(delays, 0.0))

        before(monkeypatch, *places[stage], takes)
        return

    async def act() -> None:
        await asyncio.to_thread(request.takes, stage, DELAY_S)

    # All chunks wait behind the first, and it for the end of the prefill.
    before_chunk(monkeypatch, lambda chunk: chunk.computed.index == 0, act)


def before_chunk(monkeypatch: pytest.MonkeyPatch, which: Callable[[Chunk], bool], act: Callable[[], Any]) -> None:
    """``act`` is awaited before some chunks of KV are sent."""
    exchange = SendingLane._exchange

    async def wrapped(self: SendingLane, chunk: Chunk) -> None:
        if which(chunk):
            await act()
        await exchange(self, chunk)

    monkeypatch.setattr(SendingLane, "_exchange", wrapped)


@pytest.mark.parametrize("stage", [stage for stage in Stage if stage is not Stage.FINISHED])
async def test_what_holds_a_stage_up_shows_there_alone(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    async with a_request() as request:
        assert await request.timings() == {}
        hold_up(stage, request, monkeypatch)
        assert await request.timings() == {stage: pytest.approx(DELAY_S)}


async def test_what_is_hidden_shows_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first chunk of KV takes longer than usual, while the prompt is still computed."""
    async with a_request() as request:
        prefill, _ = request.cluster.engines

        def step(plan: StepPlan) -> None:
            if computes(plan):
                request.takes(Stage.PREFILL, STEP_S)

        before(monkeypatch, prefill._runner, "run", step)
        usual = await request.timings()
        assert usual.keys() == {Stage.PREFILL} and usual[Stage.PREFILL] > 2 * DELAY_S
        held = False

        async def act() -> None:
            nonlocal held
            held = True
            until = request.clock.now + DELAY_S
            while request.clock.now < until:
                await asyncio.sleep(0.001)

        before_chunk(monkeypatch, lambda chunk: chunk.computed.index == 0, act)
        assert await request.timings() == usual and held
