"""Sequences that lose their blocks in mid-reply and go on, several choices, and scores, on all parts without Ray."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import pytest

from actors.ernie.config import ErnieConfig
from actors.errors import DeadlineExceeded
from actors.types import (
    AttemptMode,
    ContentPart,
    EngineRequest,
    EngineRole,
    FinishReason,
    Message,
    MessageRole,
    SequenceKey,
    Structure,
    StructureKind,
    TextPart,
    ThinkingMode,
    TokenEvent,
)
from actors.wire.engine_link import EngineLinkServicer
from cluster.generation import (
    ChoiceFinished,
    Delta,
    Finished,
    GenerateCall,
    PositionScores,
    PromptScored,
    Started,
)
from cluster.router.fleet import Fleet
from tests.in_process import ALWAYS_PAIRS, InProcessCluster, in_process_cluster
from tests.media import image_part, video_part
from tests.tiny_model import tiny_checkpoint

COLOCATED = (EngineRole.COLOCATED,)
SPLIT = (EngineRole.PREFILL, EngineRole.DECODE)

SMALL_GIB = 0.001
"""21 blocks for a prefill engine, 48 for a decode engine."""


def pictures(seed: int) -> tuple[ContentPart, ...]:
    """67 tokens with the template, 30 of them of two pictures."""
    return image_part(90, 160, seed), TextPart(text="against"), image_part(112, 84, 100 + seed)


FILM: tuple[ContentPart, ...] = (video_part(64, 48, 24, 8, 4), TextPart(text="What moves?"))


@dataclass
class Choice:
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    reasoning: str = ""
    scores: list[PositionScores] = field(default_factory=list)
    ending: ChoiceFinished | None = None


@dataclass
class Reply:
    choices: dict[int, Choice]
    prompt_ids: tuple[int, ...]
    prompt_scores: tuple[PositionScores | None, ...] | None
    finished: Finished


def ask(*parts: ContentPart, **changes: object) -> GenerateCall:
    call = GenerateCall(
        messages=(Message(role=MessageRole.USER, parts=parts),),
        temperature=0.0,
        max_tokens=220,
        ignore_eos=True,
        return_token_ids=True,
    )
    return replace(call, **changes)  # type: ignore[arg-type]


async def reply(cluster: InProcessCluster, call: GenerateCall) -> Reply:
    choices = {index: Choice() for index in range(call.n)}
    started: Started | None = None
    scores: PromptScored | None = None
    async for event in cluster.parts.router.generate(call):
        match event:
            case Started():
                started = event
            case PromptScored():
                assert scores is None and not any(choice.tokens for choice in choices.values())
                scores = event
            case Delta():
                choice = choices[event.choice]
                assert choice.ending is None
                choice.tokens += event.token_ids
                choice.text += event.text
                choice.reasoning += event.reasoning
                choice.scores += event.logprobs
            case ChoiceFinished():
                assert choices[event.choice].ending is None
                choices[event.choice].ending = event
            case Finished():
                assert started is not None and started.prompt_token_ids is not None
                prompt_scores = None if scores is None else scores.entries
                return Reply(choices, started.prompt_token_ids, prompt_scores, event)
    raise AssertionError("no Finished")


CALLS = [
    ask(*pictures(0)),
    ask(*pictures(1), temperature=0.9, top_p=0.95, seed=11),
    ask(
        *pictures(2),
        temperature=0.8,
        seed=12,
        repetition_penalty=1.3,
        presence_penalty=0.5,
        frequency_penalty=0.25,
    ),
    ask(*FILM, temperature=1.0, top_k=50, min_p=0.01, seed=13, thinking=ThinkingMode.ON),
    ask(TextPart(text="word " * 40), temperature=0.7, seed=14),
    ask(*pictures(5), temperature=0.9, seed=15, n=3, max_tokens=90),
    ask(*pictures(6), temperature=1.0, seed=16, logprobs=2, bad_words=("the", "a")),
    ask(
        *pictures(7),
        temperature=1.0,
        seed=17,
        thinking=ThinkingMode.ON,
        reasoning_max_tokens=9,
        structure=Structure(kind=StructureKind.REGEX, text="[a-z ]{300}"),
        stop=("e", "a"),
        ignore_eos=False,
    ),
]

_alone: list[Reply] = []


async def alone() -> list[Reply]:
    """The reference: one request at a time, room for all, one engine."""
    if not _alone:
        async with in_process_cluster(tiny_checkpoint(), *COLOCATED) as cluster:
            for call in CALLS:
                _alone.append(await reply(cluster, call))
    return _alone


def resumed(caplog: pytest.LogCaptureFixture) -> int:
    """Attempts that were preempted behind a first token."""
    return len(re.findall(r"PREEMPTED after [1-9]", caplog.text))


@pytest.mark.parametrize("caches", [True, False])
async def test_preempted_replies_are_what_they_are_undisturbed(caches: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Also when nothing is kept that could be found again: then embeddings are made once more."""
    expected = await alone()
    caplog.set_level(logging.INFO, "cluster.router.choice")
    async with in_process_cluster(
        tiny_checkpoint(),
        *SPLIT,
        kv_cache_gib=SMALL_GIB,
        embedding_cache_bytes=None if caches else 0,
        media_cache_bytes=64_000_000 if caches else 1,
        prefix_caching=caches,
    ) as cluster:
        found = await asyncio.gather(*(reply(cluster, call) for call in CALLS))
        await cluster.wait_clean()
        assert cluster.parts.fleet._waiting == []
    assert resumed(caplog) > 0
    assert ("asking for it again" in caplog.text) is not caches
    for one, other in zip(found, expected, strict=True):
        for index, choice in one.choices.items():
            undisturbed = other.choices[index]
            assert replace(choice, scores=[]) == replace(undisturbed, scores=[])
            logprobs = [score.chosen.logprob for score in choice.scores]
            assert logprobs == pytest.approx([score.chosen.logprob for score in undisturbed.scores], abs=1e-9)
    structured = found[-1].choices[0]
    assert structured.reasoning and re.fullmatch("[a-z ]{50,300}", structured.text)
    assert len({choice.text for one in found for choice in one.choices.values()}) == len(CALLS) + 2


async def test_a_stop_string_is_found_behind_a_preemption(caplog: pytest.LogCaptureFixture) -> None:
    """It ends late in the reply, and the reply is as long as without preemption."""
    call, whole = CALLS[1], (await alone())[1].choices[0]
    needle = next(
        whole.text[at : at + 3]
        for at in range(len(whole.text) * 3 // 4, len(whole.text))
        if whole.text.index(whole.text[at : at + 3]) == at
    )
    caplog.set_level(logging.INFO, "cluster.router.choice")
    async with in_process_cluster(tiny_checkpoint(), *SPLIT, kv_cache_gib=SMALL_GIB) as cluster:
        others = [asyncio.create_task(reply(cluster, other)) for other in (CALLS[0], CALLS[2], CALLS[5])]
        stopped = [await reply(cluster, replace(call, stop=(needle,))) for _ in range(2)]
        await asyncio.gather(*others)
        await cluster.wait_clean()
    for found in stopped:
        ending = found.choices[0].ending
        assert ending is not None and ending.stop_reason == needle
        assert found.choices[0].text == whole.text[: whole.text.index(needle)]
    assert resumed(caplog) > 0


@asynccontextmanager
async def waiting_for_room(
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[tuple[InProcessCluster, list[GenerateCall]]]:
    """A cluster in which whoever loses its blocks waits for ever."""
    monkeypatch.setattr(Fleet, "_wake", lambda self, link: None)
    calls = [ask(*pictures(index), request_id=f"r{index}") for index in range(6)]
    async with in_process_cluster(tiny_checkpoint(), *SPLIT, kv_cache_gib=SMALL_GIB) as cluster:
        yield cluster, calls
        await cluster.wait_clean()
        assert cluster.parts.fleet._waiting == []


async def some_wait(cluster: InProcessCluster) -> None:
    async with asyncio.timeout(20):
        while not cluster.parts.fleet._waiting:
            await asyncio.sleep(0.005)


async def test_cancelling_while_waiting_for_room_keeps_what_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    async with waiting_for_room(monkeypatch) as (cluster, calls):
        tasks = [asyncio.create_task(reply(cluster, call)) for call in calls]
        await some_wait(cluster)
        while not all(task.done() for task in tasks):
            if len(cluster.parts.fleet._waiting) == cluster.parts.router.active_count:
                for call in calls:
                    await cluster.parts.router.cancel(str(call.request_id))
            await asyncio.sleep(0.005)
        ends = [(await task).choices[0] for task in tasks]
    reasons = [choice.ending.reason for choice in ends if choice.ending is not None]
    assert set(reasons) == {FinishReason.LENGTH, FinishReason.CANCELLED} and len(reasons) == len(calls)
    assert any(choice.tokens for choice, reason in zip(ends, reasons, strict=True) if reason == "cancelled")


async def test_leaving_or_running_out_of_time_while_waiting_for_room(monkeypatch: pytest.MonkeyPatch) -> None:
    async with waiting_for_room(monkeypatch) as (cluster, calls):
        patient = [asyncio.create_task(reply(cluster, call)) for call in calls[:3]]
        hurried = [asyncio.create_task(reply(cluster, replace(call, timeout_s=1.5))) for call in calls[3:]]
        await some_wait(cluster)
        ends = await asyncio.gather(*hurried, return_exceptions=True)
        assert any(isinstance(end, DeadlineExceeded) for end in ends)
        assert all(isinstance(end, DeadlineExceeded | Reply) for end in ends)
        for task in patient:
            task.cancel()
        await asyncio.wait(patient)


async def sequence(cluster: InProcessCluster, choice: int, request: EngineRequest) -> list[int]:
    """Tokens of one sequence of its own on the first engine."""
    (view,) = cluster.parts.fleet.engines()
    link = cluster.parts.fleet.link(view.info)
    assert link is not None
    key = SequenceKey("alone", 0, choice)
    events: asyncio.Queue[object] = asyncio.Queue()
    link.submit(key, request, AttemptMode.COLOCATED, None, events)  # type: ignore[arg-type]
    tokens: list[int] = []
    async with asyncio.timeout(20):
        while True:
            event = await events.get()
            if isinstance(event, TokenEvent):
                tokens.append(event.token_id)
                if event.finish is not None:
                    link.forget(key, cancel=False)
                    return tokens


@pytest.mark.parametrize("roles", [COLOCATED, SPLIT])
async def test_choices_are_sequences_of_their_own_that_share_a_prompt(
    roles: tuple[EngineRole, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[tuple[SequenceKey, EngineRequest]] = []
    deliver = EngineLinkServicer.deliver_milestone
    cached: dict[SequenceKey, int] = {}

    def listen(self: EngineLinkServicer, key, kind, busy_s, cached_tokens=0):  # type: ignore[no-untyped-def]
        cached[key] = max(cached.get(key, 0), cached_tokens)
        deliver(self, key, kind, busy_s, cached_tokens)

    monkeypatch.setattr(EngineLinkServicer, "deliver_milestone", listen)
    call = ask(TextPart(text="word " * 40), temperature=0.9, seed=5, n=4, max_tokens=20)
    async with in_process_cluster(tiny_checkpoint(), *roles, described=ALWAYS_PAIRS) as cluster:
        submit = cluster.engines[0].submit

        def note(key, request, mode, peer):  # type: ignore[no-untyped-def]
            requests.append((key, request))
            submit(key, request, mode, peer)

        monkeypatch.setattr(cluster.engines[0], "submit", note)
        found = await reply(cluster, call)
        await cluster.wait_clean()
    assert requests[0][0].choice == 0 and len(requests) == 4
    assert len({tuple(choice.tokens) for choice in found.choices.values()}) == 4
    whole_blocks = (len(found.prompt_ids) - 1) // 16 * 16
    assert {cached[key] for key, _ in requests if key.choice} == {
        whole_blocks
    } and found.finished.usage.cached_tokens == 0
    usage = found.finished.usage
    assert (usage.output_tokens, usage.prompt_tokens) == (80, len(found.prompt_ids))

    async with in_process_cluster(tiny_checkpoint(), *COLOCATED) as cluster:
        for key, request in requests:
            assert await sequence(cluster, key.choice, request) == found.choices[key.choice].tokens
        await cluster.wait_clean()


@pytest.mark.parametrize("roles", [COLOCATED, SPLIT])
async def test_scores_of_prompt_and_reply(roles: tuple[EngineRole, ...]) -> None:
    call = ask(*pictures(0), max_tokens=12, logprobs=3, prompt_logprobs=1, n=2, return_token_ids=True)
    async with in_process_cluster(tiny_checkpoint(), *roles, max_batched_tokens=24, max_num_seqs=8) as cluster:
        first = await reply(cluster, call)
        again = await reply(cluster, call)
        await cluster.wait_clean()
    limit = ErnieConfig.from_dir(tiny_checkpoint()).im_patch_id
    assert first.prompt_scores is not None and len(first.prompt_scores) == len(first.prompt_ids)
    for index, (token, entry) in enumerate(zip(first.prompt_ids, first.prompt_scores, strict=True)):
        assert (entry is None) == (index == 0 or token >= limit)
        assert entry is None or (entry.chosen.token_id == token and len(entry.top) == 1)
    # How the prompt was cut into chunks may differ, and with it the last digits.
    assert again.prompt_scores is not None
    for entry, other in zip(first.prompt_scores, again.prompt_scores, strict=True):
        assert (entry is None) == (other is None)
        if entry is not None and other is not None:
            assert entry.chosen.rank == other.chosen.rank and entry.top[0].token_id == other.top[0].token_id
            assert entry.chosen.logprob == pytest.approx(other.chosen.logprob, abs=1e-9)
            assert entry.top[0].logprob == pytest.approx(other.top[0].logprob, abs=1e-9)
    for choice in first.choices.values():
        assert [score.chosen.token_id for score in choice.scores] == choice.tokens
        assert all(score.chosen.rank == 1 and score.chosen == score.top[0] for score in choice.scores)
        assert all(len(score.top) == 3 for score in choice.scores)
        assert b"".join(score.chosen.token for score in choice.scores).decode(errors="replace") == choice.text
    assert first.choices[0].tokens == first.choices[1].tokens
