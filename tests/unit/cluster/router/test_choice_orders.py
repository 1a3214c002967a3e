"""Choices and their attempts under random orders of everything engines may say. Links and engines are doubles."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from actors.errors import InternalError, InvalidRequest, ServingError, Unavailable
from actors.reports import EngineInfo, LoadReport
from actors.types import (
    AttemptMode,
    EngineRequest,
    EngineRole,
    FinishReason,
    MilestoneKind,
    PreprocessReply,
    PromptLogprobs,
    SequenceKey,
    Stage,
    TokenEvent,
)
from cluster.generation import ChoiceFinished, Delta, Event, Finished, GenerateCall, PromptScored, Started
from cluster.policy.views import EngineView
from cluster.router.link import AttemptError, AttemptEvent, EngineLost, Milestone
from cluster.router.records import Recorder
from cluster.router.request import RequestRun
from cluster.router.retry_budget import RetryBudget
from cluster.router.sampling import SamplingDefaults, resolve_sampling
from cluster.router.services import Services
from cluster.router.stages import Preprocessed
from cluster.router.suspects import Suspects
from tests.doubles import ByteVocabulary
from tests.unit.cluster.router.world import CALL, SCORE, endings, logprobs_of, make_output, text_of

PROMPT = (5, 6, 7)


def drawn(choice: int, index: int) -> int:
    """The token every attempt draws at an index of a choice."""
    return (7 * choice + 3 * index) % 26


@dataclass
class Running:
    """An attempt as the engines see it: events each of them still says, in order."""

    key: SequenceKey
    request: EngineRequest
    streams: list[list[AttemptEvent]]
    preempted: bool


@dataclass
class Engines:
    """Plays prefill and decode of all attempts, or one colocated engine, in random order."""

    rng: random.Random
    split: bool
    reply_length: int
    preemptions: int
    losses: int = 0
    """Of an engine that prefills, after it has told its token."""
    heard: dict[SequenceKey, asyncio.Queue[AttemptEvent]] = field(default_factory=dict)
    running: dict[SequenceKey, Running] = field(default_factory=dict)
    cancelled: list[SequenceKey] = field(default_factory=list)
    submitted: list[tuple[SequenceKey, EngineRequest]] = field(default_factory=list)
    waiting: list[asyncio.Future[None]] = field(default_factory=list)
    break_stream: Callable[[list[AttemptEvent]], None] = lambda _: None

    def start(self, key: SequenceKey, request: EngineRequest) -> None:
        self.submitted.append((key, request))
        first = len(request.output_ids)
        tokens: list[AttemptEvent] = [
            TokenEvent(
                key=key,
                index=index,
                token_id=drawn(key.choice, index),
                finish=FinishReason.LENGTH if index == self.reply_length - 1 else None,
                logprobs=logprobs_of(drawn(key.choice, index)),
            )
            for index in range(first, self.reply_length)
        ]
        preempted = self.preemptions > 0 and self.rng.random() < 0.5
        if preempted:
            self.preemptions -= 1
            reason = self.rng.choice(["PREEMPTED", "NO_BLOCKS", "MOVED", "ENGINE_LOST", "DRAINING"])
            kept = self.rng.randrange(len(tokens))
            role = EngineRole.COLOCATED
            if self.split:
                role = EngineRole.DECODE if kept else EngineRole.PREFILL
            lost = reason == "ENGINE_LOST"
            error = EngineLost(engine(role), "killed") if lost else Unavailable("gone", reason=reason)
            tokens = [*tokens[:kept], AttemptError(key, error, role)]
        begin: list[AttemptEvent] = [Milestone(key, MilestoneKind.PREFILL_STARTED, 0.0, 16)]
        if request.sampling.prompt_logprobs is not None:
            begin += [
                PromptLogprobs(key=key, first=0, entries=(None, logprobs_of(6))),
                PromptLogprobs(key=key, first=2, entries=(logprobs_of(7),)),
            ]
        if self.split and not isinstance(tokens[0], AttemptError):
            arrived = Milestone(key, MilestoneKind.TRANSFERRED, 0.25)
            streams = [begin + tokens[:1], [arrived, *tokens[1:]]]
            if self.losses and self.rng.random() < 0.5:
                self.losses -= 1
                streams[0].append(AttemptError(key, EngineLost(engine(EngineRole.PREFILL), "killed"), "prefill"))
        else:
            streams = [begin + tokens]
        self.break_stream(streams[-1])
        self.running[key] = Running(key, request, streams, preempted)

    def step(self) -> None:
        """Something happens somewhere."""
        acts: list[Callable[[], None]] = []
        for attempt in self.running.values():
            acts += [lambda a=attempt, s=stream: self._say(a, s) for stream in attempt.streams if stream]
        acts += [lambda f=future: f.set_result(None) for future in self.waiting if not future.done()]
        if acts:
            self.rng.choice(acts)()

    def _say(self, attempt: Running, stream: list[AttemptEvent]) -> None:
        event = stream.pop(0)
        if (queue := self.heard.get(attempt.key)) is not None:
            queue.put_nowait(event)


def engine(role: EngineRole) -> EngineInfo:
    return EngineInfo(
        engine_id=role,
        incarnation=role,
        address=role,
        role=role,
        epoch=1,
        fingerprint="f",
        dtype="float64",
        block_size=16,
        switches="",
        max_model_len=64,
    )


class Link:
    def __init__(self, engines: Engines, info: EngineInfo) -> None:
        self.engines, self.info = engines, info

    def submit(
        self,
        key: SequenceKey,
        request: EngineRequest,
        mode: AttemptMode,
        peer: EngineInfo | None,
        events: asyncio.Queue[AttemptEvent],
    ) -> None:
        self.engines.heard[key] = events
        if mode is not AttemptMode.DECODE:
            self.engines.start(key, request)

    def forget(self, key: SequenceKey, *, cancel: bool) -> None:
        if self.engines.heard.pop(key, None) is not None and cancel:
            self.engines.cancelled.append(key)


class FleetDouble:
    def __init__(self, engines: Engines, roles: tuple[EngineRole, ...]) -> None:
        self.engines_double = engines
        load = LoadReport(step=0, running=0, waiting=0, free_blocks=9, total_blocks=9, block_size=16, queued_tokens=0)
        self.views = [EngineView(info=engine(role), load=load) for role in roles]

    def engines(self) -> list[EngineView]:
        return self.views

    def set_aside(self) -> dict[str, str]:
        return {}

    def link(self, info: EngineInfo) -> Link:
        return Link(self.engines_double, info)

    def is_behind(self, rank: float) -> bool:
        return False

    async def wait_for_room(self, token_count: int, rank: float) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting = self.engines_double.waiting
        waiting.append(future)
        try:
            await future
        finally:
            if future in waiting:
                waiting.remove(future)


class PreprocessDouble:
    async def run(self, request: object) -> Preprocessed:
        reply = PreprocessReply(
            prompt_ids=PROMPT, media=(), starts_thinking=False, media_address="p", incarnation="p", busy_s=0.0
        )
        return Preprocessed(reply=reply, lease="")


class NoLeases:
    def release(self, address: str, lease: str) -> None: ...


def services(engines: Engines) -> Services:
    roles = (EngineRole.PREFILL, EngineRole.DECODE) if engines.split else (EngineRole.COLOCATED,)
    parts: dict[str, Any] = {
        "fleet": FleetDouble(engines, roles),
        "preprocess": PreprocessDouble(),
        "encode": None,
        "encoders": None,
        "leases": NoLeases(),
    }
    return Services(
        **parts,
        budget=RetryBudget(share=0.2, burst=64, clock=lambda: 0.0),
        suspects=Suspects(),
        recorder=Recorder(),
        model_name="tiny",
        context_limit=lambda: 64,
        vocab_size=100,
        im_patch_id=90,
        alone_tokens=0,
        vocabulary=ByteVocabulary(),
        resolve_sampling=lambda call, reply: resolve_sampling(
            call,
            SamplingDefaults(),
            prompt_tokens=len(reply.prompt_ids),
            starts_thinking=False,
            max_model_len=64,
            spellings=lambda text: (),
        ),
        make_output=make_output,
        score=SCORE,
        clock=lambda: 0.0,
        wall_clock=lambda: 0.0,
    )


async def play(
    engines: Engines, call: GenerateCall, until: Callable[[list[Event]], bool] = lambda _: False
) -> tuple[list[Event], RequestRun]:
    """Runs a request to its end, or to cancelling it by name as soon as ``until`` says so."""
    run = RequestRun("r", call, seed=1, timeout_s=60.0, services=services(engines))
    task = run.start()
    events: list[Event] = []
    told = False
    for _ in range(10_000):
        for _ in range(engines.rng.choice([0, 1, 1, 8])):
            await asyncio.sleep(0)
        engines.step()
        while not run.events.empty():
            event = run.events.get_nowait()
            if isinstance(event, ServingError):
                await asyncio.wait([task])
                raise event
            events.append(event)
        if not told and until(events):
            told = True
            run.cancel_by_name()
        if task.done() and run.events.empty():
            return events, run
    raise AssertionError("the request does not end")


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("n", [1, 3])
async def test_whatever_the_order_each_choice_is_told_whole_and_once(n: int, split: bool) -> None:
    resumed = 0
    for seed in range(60):
        rng = random.Random(seed)
        length = rng.randint(1, 6)
        engines = Engines(rng=rng, split=split, reply_length=length, preemptions=rng.randint(0, 5))
        engines.losses = rng.randint(0, 3)
        call = replace(CALL, n=n, return_token_ids=True, logprobs=1, prompt_logprobs=1, return_timings=True)
        events, _ = await play(engines, call)
        expected = [[drawn(choice, index) for index in range(length)] for choice in range(n)]
        for choice in range(n):
            deltas = [event for event in events if isinstance(event, Delta) and event.choice == choice]
            tokens = [token for delta in deltas for token in delta.token_ids]
            assert tokens == expected[choice], seed
            assert [score.chosen.token_id for delta in deltas for score in delta.logprobs] == tokens
            assert text_of(events, choice) == "".join(chr(ord("a") + token) for token in tokens)
        assert {ending.reason for ending in endings(events).values()} == {FinishReason.LENGTH}
        assert len(endings(events)) == n
        assert isinstance(events[0], Started) and isinstance(events[1], PromptScored)
        assert [entry and entry.chosen.token_id for entry in events[1].entries] == [None, 6, 7]
        assert sum(isinstance(event, PromptScored) for event in events) == 1
        finished = events[-1]
        assert isinstance(finished, Finished) and finished.timings is not None
        assert (Stage.TRANSFER in finished.timings.exposed) is split
        assert finished.usage.output_tokens == n * length and finished.usage.cached_tokens == 3
        # What engines were asked:
        assert engines.heard == {}
        assert len({key for key, _ in engines.submitted}) == len(engines.submitted)
        for key, request in engines.submitted:
            assert request.output_ids == tuple(expected[key.choice][: len(request.output_ids)])
            scored_before = key.choice or request.output_ids
            assert not (scored_before and request.sampling.prompt_logprobs is not None)
        first_of_others = [i for i, (key, _) in enumerate(engines.submitted) if key.choice]
        assert all(engines.submitted[i][0].choice == 0 for i in range(min(first_of_others, default=0)))
        resumed += sum(key.attempt > 0 and len(request.output_ids) > 0 for key, request in engines.submitted)
    assert resumed > 5


async def test_others_start_on_the_engines_that_have_the_prompt() -> None:
    """Not before token 0 is here and, where another engine decodes, that one has the prompt too."""
    engines = Engines(rng=random.Random(1), split=True, reply_length=4, preemptions=0)
    run = RequestRun("r", replace(CALL, n=2), seed=1, timeout_s=60.0, services=services(engines))
    task = run.start()

    async def submitted() -> int:
        for _ in range(20):
            await asyncio.sleep(0)
        return len(engines.submitted)

    assert await submitted() == 1
    prefill, decode = next(iter(engines.running.values())).streams
    queue = engines.heard[SequenceKey("r", 0, 0)]
    queue.put_nowait(prefill.pop(0))
    queue.put_nowait(prefill.pop(0))
    assert await submitted() == 1
    queue.put_nowait(decode.pop(0))
    assert await submitted() == 2
    task.cancel()
    await asyncio.wait([task])
    assert engines.heard == {}
    assert sorted(engines.cancelled) == [SequenceKey("r", 0, 0), SequenceKey("r", 0, 1)]


async def test_others_are_sent_one_at_a_time() -> None:
    """Writing out a long prompt takes milliseconds: other requests get their turn in between."""
    engines = Engines(rng=random.Random(1), split=False, reply_length=4, preemptions=0)
    run = RequestRun("r", replace(CALL, n=9), seed=1, timeout_s=60.0, services=services(engines))
    task = run.start()
    for _ in range(20):
        await asyncio.sleep(0)
    first = SequenceKey("r", 0, 0)
    engines.heard[first].put_nowait(TokenEvent(key=first, index=0, token_id=1))
    counts = [len(engines.submitted)]
    for _ in range(40):
        await asyncio.sleep(0)
        counts.append(len(engines.submitted))
    assert {after - before for before, after in itertools.pairwise(counts)} == {0, 1}
    assert [key.choice for key, _ in engines.submitted] == list(range(9))
    task.cancel()
    await asyncio.wait([task])


@pytest.mark.parametrize("split", [False, True])
async def test_cancelling_at_any_moment_ends_every_choice_once(split: bool) -> None:
    for seed in range(60):
        rng = random.Random(seed)
        engines = Engines(rng=rng, split=split, reply_length=6, preemptions=3)
        stop_after = rng.randint(1, 12)
        events, _ = await play(engines, replace(CALL, n=3), lambda told, after=stop_after: len(told) >= after)
        found = endings(events)
        assert sorted(found) == [0, 1, 2]
        finished = events[-1]
        assert isinstance(finished, Finished)
        assert finished.usage.output_tokens == sum(len(text_of(events, choice)) for choice in range(3))
        for choice, ending in found.items():
            whole = "".join(chr(ord("a") + drawn(choice, index)) for index in range(6))
            assert whole.startswith(text_of(events, choice))
            assert (ending.reason is FinishReason.LENGTH) == (text_of(events, choice) == whole)
        assert engines.heard == {}


@pytest.mark.parametrize("split", [False, True])
async def test_one_choice_that_fails_fails_the_request_and_stops_the_others(split: bool) -> None:
    for seed in range(30):
        rng = random.Random(seed)
        engines = Engines(rng=rng, split=split, reply_length=6, preemptions=2)

        def fail(stream: list[AttemptEvent], rng: random.Random = rng, engines: Engines = engines) -> None:
            key = engines.submitted[-1][0]
            if key.choice == 1:
                at = rng.randrange(len(stream))
                stream[at:] = [AttemptError(key, InvalidRequest("no", field="structure"), "")]

        engines.break_stream = fail
        with pytest.raises(InvalidRequest, match="no"):
            await play(engines, replace(CALL, n=3))
        assert engines.heard == {}


async def test_a_missing_token_is_our_defect() -> None:
    engines = Engines(rng=random.Random(0), split=True, reply_length=5, preemptions=0)
    engines.break_stream = lambda stream: stream.pop(2) and None
    with pytest.raises(InternalError, match="token 2 is missing"):
        await play(engines, CALL)
    assert engines.heard == {}


async def test_a_prompt_without_its_scores_is_our_defect() -> None:
    engines = Engines(rng=random.Random(0), split=False, reply_length=5, preemptions=0)
    engines.break_stream = lambda stream: stream.pop(2) and None
    with pytest.raises(InternalError, match="2 of 3 prompt tokens"):
        await play(engines, replace(CALL, prompt_logprobs=0))


async def test_the_stage_is_that_of_the_choice_which_is_furthest() -> None:
    engines = Engines(rng=random.Random(3), split=False, reply_length=3, preemptions=0)
    run = RequestRun("r", replace(CALL, n=2), seed=1, timeout_s=60.0, services=services(engines))
    task = run.start()
    for _ in range(20):
        await asyncio.sleep(0)
    assert run.timeline.stage is Stage.QUEUED
    queue = engines.heard[SequenceKey("r", 0, 0)]
    first = SequenceKey("r", 0, 0)
    queue.put_nowait(Milestone(first, MilestoneKind.PREFILL_STARTED, 0.0))
    queue.put_nowait(TokenEvent(key=first, index=0, token_id=1))
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(engines.submitted) == 2 and run.timeline.stage is Stage.DECODE
    queue.put_nowait(TokenEvent(key=first, index=1, token_id=1, finish=FinishReason.STOP))
    for _ in range(20):
        await asyncio.sleep(0)
    assert run.timeline.stage is Stage.QUEUED
    task.cancel()
    await asyncio.wait([task])
    told = [run.events.get_nowait() for _ in range(run.events.qsize())]
    assert [event.choice for event in told if isinstance(event, ChoiceFinished)] == [0]
